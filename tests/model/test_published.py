"""Figures that papers publish of BERT-base, as far as a folder of its weights reproduces them.

Table of Kobayashi et al. 2021 ("Incorporating Residual and Normalization Layers into Analysis of
Masked Language Models"): the mixing ratio, mean over layers and tokens, over 992 texts of
Wikipedia. Those texts are not here, so other English is measured, within stated tolerances. The
correlation with frequency ranks needs those of the corpus that the model was trained on, and the
expansion by the value transformation is left out for the same reason: it depends on the inputs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from afn_ray.model.signals import Received
from afn_ray.runs import worker
from afn_ray.runs.measurer import Measurer, find_model_files
from conftest import config_of

PUBLISHED = {"Attn-W": 96.41, "Attn-N": 85.28, "AttnRes-N": 22.25, "AttnResLn-N": 18.75}
"""Mixing ratios of BERT-base in percent."""
TOLERANCE = {"Attn-W": 1.5, "Attn-N": 5.0, "AttnRes-N": 5.0, "AttnResLn-N": 5.0}
"""Differences for other texts than the paper's, in percentage points."""
NUM_TEXTS = 40


def _texts() -> list[str]:
    """Paragraphs of English prose: of the help topics of Python."""
    paragraphs = [
        " ".join(p.split()) for topic in sorted(topics) for p in topics[topic].split("\n\n")
    ]
    prose = [p for p in paragraphs if 150 < len(p) < 600 and p.count(" ") > len(p) / 8]
    return prose[:NUM_TEXTS]


class _Block:
    """Parts of one token's output of a BERT block's attention, in float64.

    ``x`` [n, size] are the block's inputs, ``weights`` [heads, n, n] its attention.
    """

    def __init__(self, block: Any, x: torch.Tensor, weights: torch.Tensor) -> None:
        inner, dense = block.attention.self, block.attention.output.dense
        heads, n, _ = weights.shape
        values = (x @ inner.value.weight.double().T + inner.value.bias.double()).view(n, heads, -1)
        # Each head's values after its part of the output product, [heads, n, size].
        out = dense.weight.double().view(x.shape[1], heads, -1)
        transformed = torch.einsum("nhd,ohd->hno", values, out)
        own = torch.diagonal(weights, dim1=1, dim2=2)  # [heads, n]
        self.own = torch.einsum("hn,hno->no", own, transformed)
        self.others = torch.einsum("hnm,hmo->no", weights, transformed) - self.own
        self.own_share = own.mean(0)
        self.x, self.norm = x, block.attention.output.LayerNorm
        self.bias = dense.bias.double()

    def mixing(self) -> Iterator[torch.Tensor]:
        """The mixing ratio of each token in the four ways of the table, [n] each."""
        yield 1 - self.own_share
        yield _ratio(self.others, self.own)
        preserved = self.own + self.x
        yield _ratio(self.others, preserved)
        total = self.others + preserved + self.bias
        scale = self.norm.weight.double() / total.std(1, correction=0, keepdim=True)

        def normalised(part: torch.Tensor) -> torch.Tensor:
            centred: torch.Tensor = (part - part.mean(1, keepdim=True)) * scale
            return centred

        yield _ratio(normalised(self.others), normalised(preserved))


def _ratio(mixed: torch.Tensor, preserved: torch.Tensor) -> torch.Tensor:
    a, b = mixed.norm(dim=1), preserved.norm(dim=1)
    ratio: torch.Tensor = a / (a + b)
    return ratio


def _plain_mixing(folder: Path, ids: Sequence[list[int]]) -> Any:
    """Mixing ratios of every token, [n_layers, 4, n_tokens], by plain transformers."""
    plain = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    found = []
    with torch.inference_mode():
        for row in ids:
            out = plain(torch.tensor([row]), output_attentions=True, output_hidden_states=True)
            found.append(
                torch.stack(
                    [
                        torch.stack(
                            list(_Block(block, x[0].double(), weights[0].double()).mixing())
                        )
                        for block, x, weights in zip(
                            plain.encoder.layer, out.hidden_states, out.attentions, strict=False
                        )
                    ]
                )
            )
    return torch.cat(found, dim=2).numpy()


def _measured(folder: Path, texts: list[str], tmp_path: Path) -> tuple[Any, list[list[int]]]:
    """Attention of each token to itself as a run measures it, [n_layers, n_tokens]; token ids."""
    config = config_of(folder, tmp_path / "c", tmp_path / "s", layers="all", signals="attention")
    measuring = Measurer(worker.prepare(config, find_model_files(config), "cpu", "float32"))
    prepared = measuring.preparer.prepare(texts, [False] * len(texts))
    bounds, tokens = prepared.encoded.bounds, prepared.encoded.token_ids
    assert prepared.n_windows.tolist() == [1] * len(texts)
    own = np.empty((measuring.model.depth, len(tokens)))
    for batch in prepared.batches:
        read = measuring.model.measure(batch.ids, batch.lengths, (Received(),))
        of_layers = np.split(read, len(Received.columns))[1]
        own[:, batch.rows] = of_layers[:, batch.kept]
    return own, [tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def test_attention_self_is_one_minus_the_mixing_ratio_of_weights(
    tiny_bert: Path, verses: list[str], tmp_path: Path
) -> None:
    """The run's signal is the table's Attn-W, token by token;
    parts add up to the block's output.
    """
    own, ids = _measured(tiny_bert, [text for text in verses[:20] if len(text) < 150], tmp_path)
    mixing = _plain_mixing(tiny_bert, ids)
    np.testing.assert_allclose(1 - own, mixing[:, 0], atol=1e-5)
    plain = transformers.AutoModel.from_pretrained(tiny_bert, attn_implementation="eager").eval()
    block = plain.encoder.layer[1]
    with torch.inference_mode():
        out = plain(torch.tensor([ids[0]]), output_attentions=True, output_hidden_states=True)
        x, weights = out.hidden_states[1], out.attentions[1]
        parts = _Block(block, x[0].double(), weights[0].double())
        total = parts.norm((parts.others + parts.own + parts.bias + parts.x).float())
        wanted = block.attention(x)[0][0]
    np.testing.assert_allclose(total.numpy(), wanted.numpy(), atol=1e-5)


@pytest.mark.skipif("AFN_BERT_BASE" not in os.environ, reason="AFN_BERT_BASE names no BERT-base")
def test_bert_base_mixes_as_kobayashi_et_al_published(tmp_path: Path) -> None:
    folder, texts = Path(os.environ["AFN_BERT_BASE"]), _texts()
    assert len(texts) == NUM_TEXTS
    own, ids = _measured(folder, texts, tmp_path)
    mixing = _plain_mixing(folder, ids)
    assert mixing.shape[:2] == (12, 4) and own.shape == (12, mixing.shape[2])
    found = dict(zip(PUBLISHED, 100 * mixing.mean(axis=(0, 2)), strict=True))
    assert 100 * (1 - own.mean()) == pytest.approx(found["Attn-W"], abs=0.01)
    assert list(found.values()) == sorted(found.values(), reverse=True), found
    for name, wanted in PUBLISHED.items():
        assert found[name] == pytest.approx(wanted, abs=TOLERANCE[name]), found
