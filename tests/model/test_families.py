"""Every layer of every family is the plain model's, packed or padded, and the guide's table of
models says so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import dynamic_module_utils

from afn_ray import model
from afn_ray.errors import ModelError
from afn_ray.model import files
from conftest import find_model, save_model
from families import CONTEXT, DEBERTA_V3, FAMILIES, GROUPED, PADDED, SMALL

NO_FINAL_NORM = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "albert", "distilbert",
                 "nomic_bert",
                 "mpnet", "deberta-v2"}  # fmt: skip
"""Model types whose ``hidden_states`` end with the last block's output as it is."""
LAYERS = [0, 1, 2, 3]
DEPTH = 4


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A family's folder and its plain model, made once."""
    made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def make(name: str) -> tuple[Path, torch.nn.Module]:
        if name not in made:
            kind, options = FAMILIES[name]
            folder = save_model(
                tmp_path_factory.mktemp(name), getattr(transformers, kind)(**options)
            )
            made[name] = (
                folder,
                transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
            )
        return made[name]

    return make


@pytest.fixture(scope="module")
def ready(family: Any) -> Callable[[str], model.Model]:
    """A family's model in float32, made once, that reads every layer."""
    made: dict[str, model.Model] = {}

    def make(name: str) -> model.Model:
        if name not in made:
            made[name] = load(family(name)[0], [*LAYERS, DEPTH])
        return made[name]

    return make


def load(
    folder: Path, layers: list[int], dtype: str = "float32", trust_remote_code: bool = False
) -> model.Model:
    files = find_model(folder, trust_remote_code=trust_remote_code)
    loaded = model.Model(files, layers, dtype, "cpu", 64)
    model.prepare(loaded, [documents(3, [n])[0] for n in (4, 9, CONTEXT)])
    return loaded


def documents(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 190, n).tolist() for n in lengths]


def plain_norms(
    plain: torch.nn.Module, ids: list[int], block: type
) -> tuple[np.ndarray, np.ndarray]:
    """Norms of the plain model's ``hidden_states`` for one text alone, and those of what its last
    ``block`` gives.
    """
    given: list[torch.Tensor] = []
    last = [m for m in plain.modules() if type(m) is block][-1]
    handle = last.register_forward_hook(
        lambda module, args, out: given.append(out[0] if type(out) is tuple else out)
    )
    with torch.inference_mode():
        states = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    handle.remove()
    assert len(states) == DEPTH + 1
    norms = torch.stack(
        [torch.linalg.vector_norm(x[0].double(), dim=-1) for x in (*states, given[-1])]
    ).numpy()
    return norms[:-1], norms[-1]


def measure(
    loaded: model.Model,
    texts: list[list[int]],
    filler: int = 0,
    layers: Sequence[int] | None = None,
) -> list[np.ndarray]:
    lengths = [len(t) for t in texts]
    ids = np.concatenate([*(np.array(t) for t in texts), np.full(filler, 7)])
    values = loaded.measure(ids, lengths, layers=layers)
    return np.split(values[:, : sum(lengths)], np.cumsum(lengths)[:-1], axis=1)


def agree(loaded: model.Model, plain: torch.nn.Module) -> None:
    """Each layer of texts in one batch, filled up or padded, is the plain model's for the text
    alone.
    """
    texts = documents(1, [1, CONTEXT, 7, 7, 7, 30, 2, CONTEXT, 1])
    for text, got in zip(texts, measure(loaded, texts, filler=11 * loaded.packed), strict=True):
        expected, last = plain_norms(plain, text, type(loaded.blocks[0]))
        np.testing.assert_allclose(got[:DEPTH], expected[:DEPTH], rtol=2e-5)
        np.testing.assert_allclose(got[DEPTH], last, rtol=2e-5)  # no final norm is in it
        as_given = np.allclose(last, expected[DEPTH], rtol=1e-3)
        assert as_given == (loaded.files.model_type in NO_FINAL_NORM)


def ran(loaded: model.Model, layer: int) -> list[int]:
    """Blocks that run for ``layer``, in order."""
    calls: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args, at=at: calls.append(at))
        for at, block in enumerate(loaded.blocks)
    ]
    measure(loaded, documents(1, [5, 9]), layers=[layer])
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_is_the_plain_models(name: str, family: Any, ready: Any) -> None:
    loaded = ready(name)
    assert loaded.packed == (name not in PADDED and name != "deberta-v3"), loaded.why_padded
    agree(loaded, family(name)[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_later_blocks_never_run(name: str, ready: Any) -> None:
    loaded = ready(name)
    if name == "albert":  # one block, and layer k is its k-th pass
        assert len(loaded.blocks) == 1
        assert [ran(loaded, k) for k in (2, 4)] == [[0] * 2, [0] * 4]
    else:
        assert len(loaded.blocks) == DEPTH
        assert [ran(loaded, k) for k in (2, 4)] == [[0, 1], [0, 1, 2, 3]]


def test_a_convolution_behind_the_first_block_is_not_taken_for_it(tmp_path: Path) -> None:
    """Layer 1 of DeBERTa-v2-xlarge is no block's output: it is refused, and the others are
    right.
    """
    config = transformers.DebertaV2Config(
        **DEBERTA_V3 | {"conv_kernel_size": 3, "conv_act": "gelu"}
    )
    save_model(tmp_path, config)
    with pytest.raises(ModelError, match=r"layer 1 hooked against hidden_states\[1\] differs by"):
        load(tmp_path, [1])
    loaded = load(tmp_path, [0, 2, 3])
    plain = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    texts = documents(1, [CONTEXT, 7, 1])
    for text, got in zip(texts, measure(loaded, texts), strict=True):
        np.testing.assert_allclose(
            got, plain_norms(plain, text, type(loaded.blocks[0]))[0][[0, 2, 3]], rtol=2e-5
        )


# --- code that comes with a model
# -----------------------------------------------------------------------

CODE = {
    "configuration_minicpm.py": """
from transformers import PretrainedConfig


class MiniCPMConfig(PretrainedConfig):
    model_type = "minicpm"

    def __init__(self, scale_emb=12, scale_depth=1.4, num_hidden_layers=4, **rest):
        self.scale_emb, self.scale_depth = scale_emb, scale_depth
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**rest)
""",
    "modeling_minicpm.py": """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_minicpm import MiniCPMConfig


def rotate(x, position_ids):
    half = x.shape[-1] // 2
    angles = position_ids[:, None, :, None] * 10000.0 ** -(torch.arange(half) / half)
    (one, other), cos, sin = x.split(half, -1), angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


class MiniCPMDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.scale = config.scale_depth / config.num_hidden_layers**0.5
        products = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = products
        inner = config.intermediate_size
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(config.intermediate_size, width, bias=False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, hidden_states, attention_mask, position_ids):
        x = self.input_layernorm(hidden_states)
        made = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (m.unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in made)
        scores = rotate(q, position_ids) @ rotate(k, position_ids).transpose(-1, -2)
        scores = scores * q.shape[-1] ** -0.5
        shares = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min).softmax(-1)
        mixed = self.o_proj((shares @ v).transpose(1, 2).flatten(2))
        hidden_states = hidden_states + self.scale * mixed
        x = self.post_attention_layernorm(hidden_states)
        x = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return (hidden_states + self.scale * x,)


class MiniCPMModel(PreTrainedModel):
    config_class = MiniCPMConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (MiniCPMDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size)
        self.post_init()

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, output_hidden_states=False
    ):
        n = input_ids.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None, :].bool()
        if position_ids is None:
            position_ids = torch.arange(n)[None]
        hidden, states = self.embed_tokens(input_ids) * self.config.scale_emb, ()
        for layer in self.layers:
            states += (hidden,)
            hidden = layer(hidden, mask, position_ids)[0]
        hidden = self.norm(hidden)
        states = (*states, hidden) if output_hidden_states else None
        return BaseModelOutputWithPast(hidden, hidden_states=states)
""",
}
"""A MiniCPM in its own words, as its first versions come: they are of no class that transformers
has.
"""


def test_code_that_comes_with_a_model_runs_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "minicpm"
    folder.mkdir()
    for name, code in CODE.items():
        (folder / name).write_text(code)
    own = {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModel": "modeling_minicpm.MiniCPMModel",
    }
    transformers.PretrainedConfig(**SMALL, auto_map=own).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "minicpm"}
    (folder / "config.json").write_text(json.dumps(config))
    asked = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(asked, trust_remote_code=True).save_pretrained(folder)

    with pytest.raises(ModelError, match="--trust-remote-code runs it"):
        load(folder, LAYERS)
    loaded = load(folder, [*LAYERS, DEPTH], trust_remote_code=True)
    assert {*CODE, "config.json", "model.safetensors"} == loaded.files.identity.keys()
    assert (
        loaded.why_padded
        == "4 of its blocks ran, and 0 times its attention went through the interface"
    )
    assert loaded.causal
    plain = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    ).eval()
    agree(loaded, plain)
    assert ran(loaded, 2) == [0, 1]


# --- what is taken, and why
# ------------------------------------------------------------------------------


def types(families: dict[str, tuple[str, dict[str, Any]]]) -> set[str]:
    return {getattr(transformers, kind).model_type for kind, _ in families.values()}


def test_every_family_that_is_taken_has_a_test_and_no_other_is() -> None:
    assert types(FAMILIES) | {"minicpm"} == files.TESTED


def test_the_table_of_models_says_what_is_tested() -> None:
    text = (Path(__file__).parents[2] / "infra/guide/signals.md").read_text("utf-8")
    section = text[text.index("\n## Choose a model\n") :]
    table = [
        line for line in section[: section.index("\n## ", 1)].splitlines() if line.startswith("|")
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    listed = [(name, row) for row in rows for name in re.findall(r"`([a-z0-9_-]+)`", row[1])]
    assert len(listed) == len(dict(listed))  # a type is in one row
    assert dict(listed).keys() == files.TESTED
    padded = types(PADDED) | {"minicpm"}
    for name, (_, _, batches, last, _) in listed:
        assert batches.startswith("padded: " if name in padded else "packed"), name
        assert last == (
            "`hidden_states[-1]`" if name in NO_FINAL_NORM else "before the final norm"
        ), name


def test_a_family_without_a_test_is_tried_on_demand(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "ernie", transformers.ErnieConfig(**SMALL))
    asked = {"trust_remote_code": False, "allow_pickle": False}
    with pytest.raises(
        ModelError, match=r"family ernie, which has no test; --allow-untested tries it.* bert, "
    ):
        model.find_model(str(folder), None, **asked)
    found = model.find_model(str(folder), None, **asked, allow_untested=True)
    loaded = model.Model(found, LAYERS, "float32", "cpu", 64)
    model.prepare(loaded, [documents(3, [n])[0] for n in (4, 9)])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mpnet", "does not go through transformers"),
        ("deberta-v2", "does not go through"),
        ("gemma2", "wants softcap"),
    ],
)
def test_a_padded_family_says_why(name: str, why: str, ready: Any) -> None:
    loaded = ready(name)
    assert loaded.why_padded is not None
    assert why in loaded.why_padded


def test_a_window_that_only_the_mask_knows_is_never_packed(ready: Any) -> None:
    loaded = ready("qwen2-moe")
    assert loaded.why_padded is not None
    assert (
        "against the plain model differs" in loaded.why_padded
        or "sliding window" in loaded.why_padded
    )


def test_rotary_frequencies_that_depend_on_the_longest_text_bound_the_window(
    tmp_path: Path,
) -> None:
    factors = [1.0] * 4
    scaling = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": 32,
    }
    config = transformers.Phi3Config(
        **GROUPED
        | {"rope_parameters": scaling | {"rope_theta": 1e4}, "original_max_position_embeddings": 32}
    )
    save_model(tmp_path, config)
    assert (
        model.find_model(
            str(tmp_path), None, trust_remote_code=False, allow_pickle=False
        ).context_tokens
        == 32
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_products_stay_near(name: str, family: Any) -> None:
    folder, plain = family(name)
    loaded = load(folder, LAYERS, "bfloat16")
    texts = documents(2, [1, 30, 7, CONTEXT])
    for text, got in zip(texts, measure(loaded, texts), strict=True):
        expected = plain_norms(plain, text, type(loaded.blocks[0]))[0][:DEPTH]
        np.testing.assert_allclose(got, expected, rtol=2e-2)
        np.testing.assert_allclose(got[0], expected[0], rtol=2e-5)  # embeddings are no product


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, CONTEXT), min_size=1, max_size=12),
    filler=st.integers(0, 50),
    data=st.data(),
)
def test_any_packing_gives_what_single_texts_give(
    lengths: list[int], filler: int, data: Any, ready: Any
) -> None:
    for name in ("bert", "mistral", "mpnet"):
        loaded = ready(name)
        texts = documents(len(lengths), lengths)
        order = data.draw(st.permutations(range(len(texts))))
        packed = measure(loaded, [texts[i] for i in order], filler * loaded.packed)
        for i, got in zip(order, packed, strict=True):
            np.testing.assert_allclose(got, measure(loaded, [texts[i]])[0], rtol=2e-5)
