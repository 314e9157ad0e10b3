"""The model's promises: layers equal Hugging Face's, later blocks never run, attention and linear
layers are what they replace, unsafe or broken models are refused.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.attention import varlen
from transformers.pytorch_utils import Conv1D

from afn_ray import model
from afn_ray.errors import ModelError
from afn_ray.model import attention, linear, parts
from afn_ray.model import files as model_files
from afn_ray.model.load import load_weights
from afn_ray.model.signals import Signal, Site, norm
from afn_ray.reduce.histogram import round_strengths
from afn_ray.tokens.encode import TextEncoder
from conftest import find_model


def load(
    folder: Path, layers: list[int], dtype: str = "float32"
) -> tuple[model.Model, TextEncoder]:
    files = find_model(folder)
    encoder = TextEncoder(model.load_tokenizer(files))
    loaded = model.Model(files, layers, dtype, "cpu", 256)
    probes = encoder.encode(["Hello there, you.", "In the beginning was the word, they say."])
    ids = [
        probes.token_ids[a:b].tolist()
        for a, b in zip(probes.bounds, probes.bounds[1:], strict=False)
    ]
    model.prepare(loaded, ids)
    return loaded, encoder


def measure(loaded: model.Model, *rows: list[int]) -> list[np.ndarray]:
    """Norms [n_layers, n_tokens] of each of ``rows``, out of one batch."""
    lengths = [len(r) for r in rows]
    got = loaded.measure(np.concatenate([np.array(r, np.int64) for r in rows]), lengths)
    assert got.dtype == np.float32 and got.shape == (len(loaded.layers), sum(lengths))
    return np.split(got, np.cumsum(lengths)[:-1], axis=1)


def reference_norms(folder: Path, ids: list[int]) -> list[np.ndarray]:
    """Norms of plain Hugging Face ``hidden_states`` for one unpadded text, in fp32."""
    plain = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = plain(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [torch.linalg.vector_norm(s[0].double(), dim=-1).numpy() for s in states]


def test_every_layer_of_minilm_equals_hidden_states_of_single_unpadded_texts(
    minilm: Path, verses: list[str]
) -> None:
    loaded, encoder = load(minilm, list(range(7)))
    texts = [verses[i] for i in (0, 7, 1000, 20000, 31000)]
    encoded = encoder.encode(texts)
    rows = [
        encoded.token_ids[a:b].tolist()
        for a, b in zip(encoded.bounds, encoded.bounds[1:], strict=False)
    ]
    assert loaded.packed
    together = measure(loaded, *rows)
    for row, got in zip(rows, together, strict=True):
        for layer, expected in enumerate(reference_norms(minilm, row)):
            np.testing.assert_allclose(
                round_strengths(got[layer].copy()), expected, rtol=2e-5
            )  # as recorded


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_gpt", "tiny_llama"])
def test_layers_of_other_architectures_equal_hidden_states(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    loaded, encoder = load(folder, [0, 1, 2, 3])
    ids = encoder.encode(
        ["And God said, Let there be light: and there was light."]
    ).token_ids.tolist()
    (got,) = measure(loaded, ids)
    expected = reference_norms(folder, ids)
    final_norm = kind != "tiny_bert"  # then the last entry of hidden_states is no block's output
    for layer in range(3 if final_norm else 4):
        np.testing.assert_allclose(got[layer], expected[layer], rtol=2e-5)
    assert loaded.causal == final_norm


def test_blocks_after_the_last_layer_never_run(minilm: Path) -> None:
    loaded, encoder = load(minilm, [2, 4])
    ran = []
    for at, block in enumerate(loaded.module.encoder.layer):
        block.register_forward_pre_hook(lambda module, args, at=at: ran.append(at))
    ids = encoder.encode(["Let there be light"]).token_ids.tolist()
    measure(loaded, ids, ids[:1])
    assert ran == [0, 1, 2, 3]


def test_other_layers_are_measured_on_demand_and_the_chosen_ones_stay(tiny_bert: Path) -> None:
    loaded, encoder = load(tiny_bert, [2])
    ids = encoder.encode(["Let there be light"]).token_ids.astype(np.int64)
    expected = reference_norms(tiny_bert, ids.tolist())
    others = loaded.measure(ids, [len(ids)], layers=[0, 1])
    np.testing.assert_allclose(others, expected[:2], rtol=2e-5)
    np.testing.assert_allclose(loaded.measure(ids, [len(ids)]), [expected[2]], rtol=2e-5)
    with pytest.raises(ModelError, match="ran 2 blocks, its config says 3"):  # the third is freed
        loaded.measure(ids, [len(ids)], layers=[3])


def test_layer_0_alone_runs_no_block(tiny_bert: Path) -> None:
    loaded, encoder = load(tiny_bert, [0])
    ran = []
    for part in loaded.blocks[0].modules():
        part.register_forward_hook(lambda module, args, output: ran.append(module))
    ids = encoder.encode(["Let there be light"]).token_ids.tolist()
    (got,) = measure(loaded, ids)
    np.testing.assert_allclose(got[0], reference_norms(tiny_bert, ids)[0], rtol=2e-5)
    assert ran == []


def test_bfloat16_is_near_float32_and_its_norm_is_accumulated_in_float32(
    minilm: Path, verses: list[str]
) -> None:
    full, encoder = load(minilm, [4])
    half, _ = load(minilm, [4], "bfloat16")
    ids = encoder.encode([verses[0]]).token_ids.tolist()
    (a,), (b,) = (measure(m, ids) for m in (full, half))
    np.testing.assert_allclose(b, a, rtol=3e-2)
    assert not np.array_equal(a, b)
    wide = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    wide[0, :4000] = 0.01
    assert norm(wide).item() == pytest.approx(wide.double().norm().item(), rel=1e-6)


def test_with_half_precision_products_the_stream_and_the_norms_stay_float32(
    tiny_bert: Path,
) -> None:
    loaded, encoder = load(tiny_bert, [0, 1, 2, 3], "bfloat16")
    seen = set()

    class Watching(Signal):
        name, columns, unit = "watching", ("watching",), ""

        def measure(self, site: Site) -> list[torch.Tensor]:
            seen.add(site.hidden.dtype)
            return [norm(site.hidden)]

    ids = encoder.encode(["Let there be light"]).token_ids
    loaded.measure(ids.astype(np.int64), [len(ids)], [Watching()])
    assert seen == {torch.float32}
    assert {p.dtype for p in loaded.module.embeddings.parameters()} == {torch.float32}
    norms = [m for b in loaded.blocks for m in b.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert norms and all(m.weight.dtype == torch.float32 for m in norms)
    products = [m for b in loaded.blocks for m in b.modules() if isinstance(m, linear.Product)]
    assert len(products) == 3 * 6 and all(m._weight.dtype == torch.bfloat16 for m in products)


def test_no_input_is_kept_behind_a_batch(tiny_bert: Path) -> None:
    loaded, encoder = load(tiny_bert, [2], "bfloat16")
    measure(loaded, encoder.encode(["Let there be light"]).token_ids.tolist())
    assert loaded.cast is not None
    assert loaded.cast._source is loaded.cast._result is None
    assert loaded._pass.read == {}


# --- the self-check
# --------------------------------------------------------------------------------------


SMALL = {
    "vocab_size": 30522,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


@pytest.mark.parametrize("layers", [[2], [0, 3]])
def test_self_check_refuses_a_hook_that_reads_the_wrong_place(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, layers: list[int]
) -> None:
    keep = model.Model._keep

    def wrong(self: Any, site: Site) -> None:
        site.hidden = site.hidden * 1.001
        keep(self, site)

    monkeypatch.setattr(model.Model, "_keep", wrong)
    with pytest.raises(
        ModelError, match=rf"self-check failed: layer {layers[0]} hooked.* tolerance 1e-04"
    ):
        load(tiny_bert, layers)


def test_a_packing_that_lets_neighbours_in_is_found_and_not_used(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.attend_by_group

    def leak(q: Any, k: Any, v: Any, layout: attention.Layout, *rest: Any) -> torch.Tensor:
        return right(
            q, k, v, attention.Layout([layout.num_rows], layout.num_rows, layout.device), *rest
        )

    monkeypatch.setattr(attention, "attend_by_group", leak)
    loaded, encoder = load(tiny_bert, [2])
    assert not loaded.packed
    assert loaded.why_padded is not None
    assert (
        "self-check failed: one packed batch against single texts differs by" in loaded.why_padded
    )
    rows = [
        encoder.encode([text]).token_ids.tolist()
        for text in ("Let there be light", "and there was", "light")
    ]
    for row, got in zip(rows, measure(loaded, *rows), strict=True):
        np.testing.assert_allclose(got[0], reference_norms(tiny_bert, row)[2], rtol=2e-5)


def test_positions_that_run_on_into_the_neighbour_are_found(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = model.Model._run

    def wrong(self: model.Model, inputs: dict[str, torch.Tensor]) -> None:
        if "position_ids" in inputs:
            inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1])[None]
        right(self, inputs)

    monkeypatch.setattr(model.Model, "_run", wrong)
    loaded, _ = load(tiny_bert, [2])
    assert not loaded.packed and "one packed batch against single texts" in str(loaded.why_padded)


def test_an_attention_that_bypasses_the_interface_is_found(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attention.attend

    def uncounted(*args: Any, **kwargs: Any) -> Any:
        result = right(*args, **kwargs)
        attention._layout.get().calls -= 1
        return result

    functions = transformers.AttentionInterface._global_mapping
    monkeypatch.setitem(functions, attention.NAME, uncounted)
    loaded, _ = load(tiny_bert, [2])
    assert not loaded.packed
    assert "2 of its blocks ran, and 0 times its attention went through the interface" in str(
        loaded.why_padded
    )


def test_self_check_refuses_padding_that_changes_strengths(
    tiny_mpnet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not load(tiny_mpnet, [2])[0].packed
    right = model.Model._run

    def maskless(self: model.Model, inputs: dict[str, torch.Tensor]) -> None:
        inputs.pop("attention_mask", None)
        right(self, inputs)

    monkeypatch.setattr(model.Model, "_run", maskless)
    with pytest.raises(ModelError, match="one padded batch against single texts"):
        load(tiny_mpnet, [2])


def test_a_model_that_fails_in_any_way_is_refused_by_name(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: model.Model, inputs: dict[str, torch.Tensor]) -> None:
        raise KeyError("cache")

    monkeypatch.setattr(model.Model, "_run", broken)
    with pytest.raises(ModelError, match=r"\(bert\) failed its self-check: KeyError: 'cache'"):
        load(tiny_bert, [2])


def test_products_that_are_wrong_are_not_used(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = linear.Product.forward
    monkeypatch.setattr(linear.Product, "forward", lambda self, x: right(self, x) * 30)
    loaded, encoder = load(tiny_bert, [2])
    assert loaded.packed  # each choice for itself
    assert not any(isinstance(m, linear.Product) for m in loaded.module.modules())
    ids = encoder.encode(["Let there be light"]).token_ids.tolist()
    np.testing.assert_allclose(
        measure(loaded, ids)[0][0], reference_norms(tiny_bert, ids)[2], rtol=2e-5
    )
    with pytest.raises(
        ModelError, match=r"does not run in bfloat16 \(self-check failed: .*; give --dtype float32"
    ):
        load(tiny_bert, [2], "bfloat16")


# --- attention
# -------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 20) | st.sampled_from([1, 7, 8, 33]), min_size=1, max_size=8)
KINDS = [(-1, -1), (-1, 0), (4, 0), (0, 0), (4, 4), (0, 5), (3, 1), (100, 0), (100, 100)]
"""Tokens seen on the left and on the right; -1 is all."""


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    left: int,
    right: int,
) -> torch.Tensor:
    """A softmax over all rows with a mask, in float64: [heads, rows, size] each -> [rows, heads,
    size].
    """
    q, k, v = (x.double().repeat_interleave(len(q) // len(x), 0) for x in (q, k, v))
    n = sum(lengths)
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(n)[None, :] - torch.arange(n)[:, None]
    sees = doc[:, None] == doc[None, :]
    if left >= 0:
        sees &= distance >= -left
    if right >= 0:
        sees &= distance <= right
    scores = (q[:, :n] @ k[:, :n].transpose(1, 2) * scale).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ v[:, :n]).transpose(0, 1)


def random_rows(n: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    shapes = [(1, heads, n, 8), (1, kv_heads, n, 8), (1, kv_heads, n, 8)]
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 2e-5 if got.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("left", "right"), KINDS)
@settings(max_examples=10, deadline=None)
@given(lengths=LENGTHS, filler=st.integers(0, 9))
def test_packed_attention_equals_a_masked_softmax(
    left: int, right: int, dtype: torch.dtype, lengths: list[int], filler: int
) -> None:
    n = sum(lengths)
    layout = attention.Layout(lengths, n + filler, CPU)
    for kv_heads in (4, 2, 1):
        q, k, v = random_rows(n + filler, 4, kv_heads, dtype)
        got = attention.attend_by_group(q, k, v, layout, 0.3, left, right)
        assert got.shape == (1, n + filler, 4, 8) and got.dtype == dtype
        assert_close(got[0, :n], plain_attention(q[0], k[0], v[0], lengths, 0.3, left, right))
        assert torch.isfinite(got).all()


def test_scores_of_long_and_of_many_sequences_are_computed_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = [5, 5, 5, 5, 5, 40, 1, 1, 1]
    q, k, v = random_rows(sum(lengths), 4, 4, torch.bfloat16)
    layout = attention.Layout(lengths, sum(lengths), CPU)
    whole = attention.attend_by_group(q, k, v, layout, 0.3, -1, -1)
    assert_close(whole[0], plain_attention(q[0], k[0], v[0], lengths, 0.3, -1, -1))
    for scores in (1, 5 * 5 * 4 * 2, 5 * 5 * 4 * 3):
        monkeypatch.setattr(attention, "SCORES", scores)
        assert torch.equal(attention.attend_by_group(q, k, v, layout, 0.3, -1, -1), whole)


@given(lengths=LENGTHS, filler=st.integers(0, 9))
def test_a_layout_groups_neighbours_of_one_length(lengths: list[int], filler: int) -> None:
    layout = attention.Layout(lengths, sum(lengths) + filler, CPU)
    assert [length for _, n, length in layout.groups for _ in range(n)] == lengths
    rows = [row for row, _, _ in layout.groups]
    assert rows == [sum(n * length for _, n, length in layout.groups[:i]) for i in range(len(rows))]
    assert all(a[2] != b[2] for a, b in zip(layout.groups, layout.groups[1:], strict=False))
    assert layout.longest == max([*lengths, filler])
    assert layout.bounds is None


@pytest.fixture
def gpu_layouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """Layouts as on a GPU, and torch's attention for it on the CPU; gives what that was asked."""
    asked: list[dict[str, Any]] = []
    signature = inspect.signature(varlen.varlen_attn)
    to = torch.Tensor.to

    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs)  # what torch would refuse, this refuses
        given.apply_defaults()
        asked.append(given.arguments)
        a = SimpleNamespace(**given.arguments)
        assert a.query.dim() == 3 and all(x.is_contiguous() for x in (a.query, a.key, a.value))
        assert a.query.dtype == a.key.dtype == a.value.dtype and a.query.dtype in (
            torch.bfloat16,
            torch.float16,
        )
        assert a.enable_gqa or a.query.shape[1] == a.key.shape[1]
        assert a.cu_seq_q.dtype == torch.int32 and torch.equal(a.cu_seq_q, a.cu_seq_k)
        out = torch.full_like(a.query, torch.nan)
        for begin, end in zip(a.cu_seq_q[:-1].tolist(), a.cu_seq_q[1:].tolist(), strict=True):
            assert end - begin <= min(a.max_q, a.max_k)
            q, k, v = (x[begin:end].transpose(0, 1) for x in (a.query, a.key, a.value))
            out[begin:end] = plain_attention(q, k, v, [end - begin], a.scale, *a.window_size).to(
                out.dtype
            )
        return out

    def stay(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (
            self if args and getattr(args[0], "type", None) == "cuda" else to(self, *args, **kwargs)
        )

    monkeypatch.setattr(slow, "__signature__", signature, raising=False)
    monkeypatch.setattr(varlen, "varlen_attn", slow)
    monkeypatch.setattr(torch.Tensor, "to", stay)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    yield asked


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [7, 7, 3, 3, 3, 1], [33, 2, 16, 1, 20]])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("left", "right"), KINDS)
def test_attention_on_a_gpu_is_asked_for_what_the_reference_computes(
    gpu_layouts: list[dict[str, Any]], left: int, right: int, kv_heads: int, lengths: list[int]
) -> None:
    for filler in (0, 5, 50):
        n = sum(lengths)
        q, k, v = random_rows(n + filler, 4, kv_heads, torch.bfloat16)
        layout = attention.Layout(lengths, n + filler, torch.device("cuda"))
        got = attention._attend_by_flash(q, k, v, layout, 0.3, left, right)
        expected = attention.attend_by_group(
            q, k, v, attention.Layout(lengths, n + filler, CPU), 0.3, left, right
        )
        assert got.shape == (n + filler, 4, 8)
        assert torch.isfinite(
            got
        ).all()  # filler is a sequence too, so that no row is left unwritten
        assert_close(got[:n], expected[0, :n])
        asked = gpu_layouts.pop()
        assert asked["cu_seq_q"].tolist() == [*np.cumsum([0, *lengths]).tolist(), n + filler]
        assert asked["max_q"] == asked["max_k"] == max([*lengths, filler])
        assert (asked["scale"], asked["window_size"], asked["num_splits"]) == (
            0.3,
            (left, right),
            1,
        )
        assert asked["enable_gqa"] == (kv_heads != 4)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, device: torch.device, **options: Any
) -> torch.Tensor:
    layout = attention.Layout([7, 5, 1], q.shape[2], device)
    module: Any = SimpleNamespace(is_causal=options.pop("module_is_causal", False))
    with attention.packed(layout):
        got, weights = attention.attend(
            module, q, k, v, options.pop("attention_mask", None), **options
        )
    assert layout.calls == 1 and weights is None
    return got


@pytest.mark.parametrize(
    ("options", "left", "right"),
    [
        ({}, -1, -1),
        ({"module_is_causal": True}, -1, 0),
        ({"is_causal": True}, -1, 0),
        ({"is_causal": False, "module_is_causal": True}, -1, -1),
        ({"sliding_window": 4}, 3, 3),
        ({"sliding_window": 4, "module_is_causal": True}, 3, 0),
        (
            {
                "scaling": 0.1,
                "dropout": 0.0,
                "output_attentions": False,
                "softcap": None,
                "s_aux": None,
            },
            -1,
            -1,
        ),
    ],
)
def test_options_of_a_family_become_bounds_on_every_device(
    gpu_layouts: list[dict[str, Any]], options: dict[str, Any], left: int, right: int
) -> None:
    q, k, v = random_rows(15, 4, 2, torch.bfloat16)
    expected = plain_attention(
        q[0], k[0], v[0], [7, 5, 1], options.get("scaling", 8**-0.5), left, right
    )
    for device in (CPU, torch.device("cuda")):
        got = attend(q, k, v, device, **options)
        assert got.shape == (1, 15, 4, 8)
        assert_close(got[0, :13], expected)
    assert len(gpu_layouts) == 1 and gpu_layouts[0]["window_size"] == (left, right)


def test_in_float32_a_gpu_computes_as_a_cpu_does(gpu_layouts: list[dict[str, Any]]) -> None:
    q, k, v = random_rows(15, 4, 4, torch.float32)
    assert torch.equal(attend(q, k, v, torch.device("cuda")), attend(q, k, v, CPU))
    assert gpu_layouts == []


def test_the_narrowest_of_the_inputs_decides(gpu_layouts: list[dict[str, Any]]) -> None:
    q, k, v = random_rows(
        15, 4, 4, torch.bfloat16
    )  # rotary embeddings in float32 widen query and key
    for device in (CPU, torch.device("cuda")):
        assert torch.equal(attend(q.float(), k.float(), v, device), attend(q, k, v, device))
        assert attend(q.float(), k.float(), v, device).dtype == torch.bfloat16
    assert len(gpu_layouts) == 3


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attention_mask": torch.zeros(1, 1, 13, 13)}, "a mask of its own"),
        ({"softcap": 50.0}, "wants softcap"),
        ({"s_aux": torch.zeros(4)}, "wants s_aux"),
        (
            {"position_bias": torch.zeros(1), "indexer": 1, "dropout": 0.1},
            "wants indexer, position_bias$",
        ),
    ],
)
def test_what_packed_attention_cannot_do_is_refused(options: dict[str, Any], why: str) -> None:
    q, k, v = random_rows(13, 4, 4, torch.float32)
    with pytest.raises(attention.UnsupportedAttention, match=why):
        attend(q, k, v, CPU, **options)


# --- linear layers
# ---------------------------------------------------------------------------------------

HALF = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("prepacked", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_a_product_is_the_linear_layer_it_replaces(
    dtype: torch.dtype, prepacked: bool, bias: bool, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not prepacked:
        monkeypatch.setattr(linear, "_can_prepack", lambda dtype: False)
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 32, bias=bias).requires_grad_(False)
    cast = linear.Cast(dtype)
    cast.wide = wide
    product = linear.Product(layer.weight.detach(), layer.bias, cast, 64)
    assert product._prepacked == (prepacked and linear._can_prepack(dtype))
    for shape in ((1, 64, 48), (1, 3, 48), (2, 5, 48), (7, 48)):
        x = torch.randn(shape)
        got = product(x)
        assert got.dtype == (torch.float32 if wide else dtype)
        assert (got + x.mean()).dtype == (
            torch.float32 if dtype == torch.float32 or wide else dtype
        )
        assert (
            torch.randn(got.shape) + got
        ).dtype == torch.float32  # a residual stream stays what it is
        torch.testing.assert_close(got.float(), layer(x), rtol=HALF[dtype], atol=HALF[dtype])
        assert torch.equal(product(x.to(dtype)), got)


def test_weights_are_laid_out_for_onednn_where_it_takes_them(
    minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not linear._can_prepack(torch.float16)
    if torch.backends.mkldnn.is_available():
        assert linear._can_prepack(torch.float32)
    loaded, encoder = load(minilm, [4])
    product = loaded.module.encoder.layer[0].intermediate.dense
    assert isinstance(product, linear.Product) and product._prepacked == linear._can_prepack(
        torch.float32
    )
    plain = transformers.AutoModel.from_pretrained(minilm).encoder.layer[0].intermediate.dense
    x = torch.randn(7, 384)
    with torch.inference_mode():
        torch.testing.assert_close(product(x), plain(x), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(linear, "_can_prepack", lambda dtype: False)
    other, _ = load(minilm, [4])
    ids = encoder.encode(["And there was light."]).token_ids.tolist()
    np.testing.assert_allclose(measure(other, ids)[0], measure(loaded, ids)[0], rtol=2e-5)


def test_onednn_that_miscomputes_or_refuses_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    for product in (refuse, lambda x, *rest: torch.zeros(3, 16, dtype=x.dtype)):
        fake = SimpleNamespace(
            _reorder_linear_weight=lambda weight, rows: weight, _linear_pointwise=product
        )
        monkeypatch.setattr(torch.ops, "mkldnn", fake, raising=False)
        assert not linear._can_prepack.__wrapped__(torch.float32)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(), raising=False)
    assert not linear._can_prepack.__wrapped__(torch.float32)


def test_one_input_of_several_layers_is_cast_once() -> None:
    cast = linear.Cast(torch.bfloat16)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    one = cast(x)
    assert one.dtype == torch.bfloat16 and cast(x) is one
    assert torch.equal(cast(y), y.bfloat16())
    again = cast(x)
    assert again is not one and torch.equal(again, one)
    cast.clear()
    assert cast._source is cast._result is None
    half = x.bfloat16()
    assert cast(half) is half and cast._source is None
    layers = [torch.nn.Linear(4, 2).requires_grad_(False) for _ in range(3)]
    products = [linear.Product(m.weight, m.bias, cast, 3) for m in layers]
    casts = [(p(x), cast._result)[1] for p in products]
    assert all(c is casts[0] for c in casts)


def test_linear_layers_are_replaced_and_no_others() -> None:
    torch.manual_seed(0)
    special = type("Special", (torch.nn.Linear,), {})(8, 8)
    block = torch.nn.Sequential(
        torch.nn.Linear(8, 12),
        torch.nn.Sequential(torch.nn.GELU(), Conv1D(8, 12)),
        torch.nn.LayerNorm(8),
        special,
    ).requires_grad_(False)
    x = torch.randn(5, 8)
    before = block(x)
    linear.make_fast(block, linear.Cast(torch.float32), 5, torch.float32, CPU)
    inner = block[1]
    assert isinstance(inner, torch.nn.Sequential)
    assert isinstance(block[0], linear.Product) and isinstance(inner[1], linear.Product)
    assert block[3] is special  # a subclass may compute something else
    torch.testing.assert_close(block(x), before, rtol=1e-5, atol=1e-5)


def test_fast_products_are_those_that_the_processor_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in (
        ({}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_f": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert model.has_fast_products("bfloat16", "cpu") is expected
        assert not model.has_fast_products("float16", "cpu")
    for is_able in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, able=is_able: able
        )
        assert model.has_fast_products("bfloat16", "cuda") is is_able
        assert model.has_fast_products("float16", "cuda")


# --- finding and loading
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "expected a folder with config.json"),
        ("no-such-model-anywhere", "no such folder here, and the hub did not give it"),
        ("bad name!", "the hub did not give it"),
    ],
)
def test_unknown_models_say_what_was_tried(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_model(name)


def test_a_folder_without_config_or_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match=r"has no \.safetensors file"):
        find_model(tmp_path)


def test_pickled_weights_need_a_flag_and_load_with_it(tmp_path: Path, tiny_bert: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "pickled")
    weights = transformers.AutoModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle can run code as it loads.*--allow-pickle"):
        find_model(folder)
    files = find_model(folder, allow_pickle=True)
    assert "pytorch_model.bin" in files.identity
    assert model.Model(files, [1], "float32", "cpu", 256)


def test_remote_code_needs_a_flag(tmp_path: Path, tiny_bert: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mystery",
        "auto_map": {"AutoConfig": "code.MysteryConfig", "AutoModel": "code.Mystery"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ModelError, match="--trust-remote-code runs it"):
        find_model(folder)


def test_missing_weights_are_refused_and_not_random(tmp_path: Path, tiny_bert: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"its files lack 1 weight, which would be random: encoder\.layer\.1"
    ):
        model.Model(find_model(folder), [1], "float32", "cpu", 256)


def test_weights_in_many_files_are_those_of_one(tmp_path: Path, tiny_bert: Path) -> None:
    folder = shutil.copytree(
        tiny_bert, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors")
    )
    transformers.AutoModel.from_pretrained(tiny_bert).save_pretrained(folder, max_shard_size="1MB")
    shards = sorted(p.name for p in folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert {*shards, "model.safetensors.index.json"} <= find_model(folder).identity.keys()
    (one, encoder), (many, _) = load(tiny_bert, [0, 3]), load(folder, [0, 3])
    ids = encoder.encode(["And there was light."]).token_ids.tolist()
    np.testing.assert_array_equal(measure(many, ids)[0], measure(one, ids)[0])

    before = find_model(folder).identity
    for name in shards:  # each is a part of what is measured
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert [k for k, v in find_model(folder).identity.items() if v != before[k]] == [name]
        (folder / name).write_bytes(whole)
    (folder / shards[-1]).unlink()
    with pytest.raises(ModelError, match=rf"sharded cannot be loaded: .*{shards[-1]}"):
        load(folder, [3])


# --- a folder's parts, held against each other
# -----------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    weights = edit(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path, tiny_bert: Path) -> Path:
    """A copy of the tiny BERT."""
    return shutil.copytree(tiny_bert, tmp_path / "copy")


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json", "special_tokens_map.json"]])
def test_a_folder_without_a_tokenizer_is_refused(left: list[str], folder: Path) -> None:
    for name in {
        "tokenizer.json",
        "vocab.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
    } - {*left}:
        (folder / name).unlink()
    with pytest.raises(
        ModelError, match=r"has no tokenizer: .*copy has no tokenizer\.json.*Copy the files"
    ):
        model.load_tokenizer(find_model(folder))


def test_a_tokenizer_whose_vocabulary_is_a_stub_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(
        ModelError, match="makes its unknown token of every word, with a vocabulary of 5 entries"
    ):
        model.load_tokenizer(find_model(folder))


def test_a_tokenizer_is_built_once_for_the_same_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its callers share it, and encoders of it change no identity; whatever changes in a file, and
    a model without room for it, is seen.
    """
    build, built = transformers.AutoTokenizer.from_pretrained, []

    def count(*args: Any, **options: Any) -> Any:
        built.append(args)
        return build(*args, **options)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", count)
    identity = model.load_identified(find_model(folder))[1]
    first, second = (model.load_tokenizer(find_model(folder)) for _ in range(2))
    assert len(built) <= 1 and first is second and first.truncation is not None

    texts = TextEncoder(second).texts()
    assert first.truncation is None and model.load_identified(find_model(folder))[1] == identity
    path = folder / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"jesus"', '"jesux"'), "utf-8")
    changed = TextEncoder(model.load_tokenizer(find_model(folder))).texts()
    assert "jesux" in changed[1] and "jesux" not in texts[1]
    assert TextEncoder(second).texts() == texts
    edit_json(folder / "config.json", vocab_size=30000)
    with pytest.raises(ModelError, match="522 ids that the model has no embedding for"):
        model.load_tokenizer(find_model(folder))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda w: w.fill_(torch.nan), "no finite numbers, so its weights may be damaged"),
        (lambda w: w.to(torch.int8), "dense.weight is stored as int8; expected floating point"),
    ],
    ids=["not a number", "quantized"],
)
def test_weights_that_are_no_numbers_or_whole_ones_are_named(
    folder: Path, edit: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    name = "encoder.layer.0.intermediate.dense.weight"
    edit_weights(folder, lambda weights: weights | {name: edit(weights[name])})
    with pytest.raises(ModelError, match=says):
        loaded = model.Model(find_model(folder), [1], "float32", "cpu", 64)
        model.prepare(loaded, [[5, 6, 7]])


def test_what_lies_beside_a_gguf_file_is_not_read(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a corpus."""
    made = model_files._tokenizer(find_model(tiny_bert))
    monkeypatch.setattr(model_files, "_build_tokenizer", lambda *key: made)
    monkeypatch.setattr(model_files, "_descriptions", unread)
    found = replace(find_model(tiny_bert), folder=tmp_path, gguf="model.gguf")
    assert model.load_tokenizer(found) is made.built


def test_a_tokenizer_whose_files_change_while_it_is_read_is_refused_and_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, build = folder / "tokenizer.json", transformers.AutoTokenizer.from_pretrained
    right = path.read_text("utf-8")
    edit_json(folder / "tokenizer_config.json", name_or_path="of this test")  # no other's cache

    def build_another(*args: Any, **options: Any) -> Any:
        path.write_text(right.replace('"jesus"', '"jesux"'), "utf-8")
        return build(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(ModelError, match="changed while its token"):
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", build_another)
        model.load_tokenizer(find_model(folder))
    path.write_text(right, "utf-8")
    encoder = TextEncoder(model.load_tokenizer(find_model(folder)))
    assert "jesus" in encoder.texts()[1]
    encoder.texts()[1].clear()  # a caller's own
    assert "jesus" in encoder.texts()[1]


def unread(folder: Path) -> dict[str, str]:
    raise AssertionError(f"{folder} was read")


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(folder: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(["covfefe"])
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(
        ModelError,
        match=r"1 id that the model has no embedding for: 30522 \('covfefe'\) is the first",
    ):
        model.load_tokenizer(find_model(folder))
    edit_weights(folder, lambda w: w | {"embeddings.word_embeddings.weight": torch.rand(30000, 32)})
    edit_json(folder / "config.json", vocab_size=30000)
    with pytest.raises(
        ModelError, match=r"523 ids that the model has no embedding for: 30000 .* is 30,000"
    ):
        model.load_tokenizer(find_model(folder))


def test_a_special_token_beyond_the_embeddings_is_only_text_in_texts(
    folder: Path, tiny_bert: Path
) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = ["an <image> here"]
    got, plain = (
        TextEncoder(model.load_tokenizer(find_model(f)), 30522).encode(texts)
        for f in (folder, tiny_bert)
    )
    assert got.token_ids.tolist() == plain.token_ids.tolist() and not got.problems


def with_lora(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    at = "encoder.layer.0.attention.self.query"
    return weights | {
        f"{at}.lora_A.default.weight": torch.rand(4, 32),
        f"{at}.lora_B.default.weight": torch.rand(32, 4),
    }


@pytest.mark.parametrize(
    ("edit", "changes", "why"),
    [
        (with_lora, {},
         r"hold 2 tensors that BertModel does not have .*"
          r"query\.lora_A\.default\.weight.*merge it into"),
        (lambda w: {f"base_model.model.{k}": v for k, v in w.items()}, {},
         r"does not have .*merge it into"),
        (dict, {"num_hidden_layers": 2},
         r"hold 16 tensors .*encoder\.layer\.2\..*config\.json says 2 blocks"),
        (dict, {"num_hidden_layers": 4},
         r"its files lack 16 weights, .*encoder\.layer\.3\..*says 4 blocks of 32"),
        (dict, {"hidden_size": 16}, r"embeddings\.LayerNorm\.bias is \(32,\), expected \(16,\)"),
        (dict, {"vocab_size": 30600},
         r"1 tensor of its files .* is \(30522, 32\), expected \(30600, 32\)"),
        (lambda w: w | {"emb_ln.weight": torch.rand(32)}, {},
         r"hold 1 tensor that BertModel does not have .*emb_ln"),
        (lambda w: w | {"encoder.cls.weight": torch.rand(32)}, {},
         r"hold 1 tensor .*encoder\.cls\.weight"),
    ],
)  # fmt: skip
def test_weights_and_a_config_that_are_not_of_one_model_are_refused(
    edit: Callable[..., Any], changes: dict[str, Any], why: str, folder: Path
) -> None:
    edit_weights(folder, edit)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelError, match=why):
        model.Model(find_model(folder), [1], "float32", "cpu", 256)


@pytest.mark.parametrize(
    ("config", "kind"),
    [("BertConfig", "MaskedLM"), ("RobertaConfig", "SequenceClassification"),
     ("DistilBertConfig", "MaskedLM"),
     ("ElectraConfig", "PreTraining"), ("ModernBertConfig", "MaskedLM"),
     ("NomicBertConfig", "SequenceClassification"),
     ("EuroBertConfig", "SequenceClassification"), ("DebertaV2Config", "SequenceClassification"),
     ("GPTNeoXConfig", "CausalLM"), ("LlamaConfig", "TokenClassification"),
     ("AlbertConfig", "PreTraining"),
     ("OPTConfig", "SequenceClassification")],
)  # fmt: skip
def test_heads_that_no_layer_depends_on_may_be_in_the_weights(
    config: str, kind: str, tmp_path: Path
) -> None:
    size = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 20,
        "pad_token_id": 1,
    }
    made = getattr(transformers, config)(**size)
    whole = getattr(transformers, f"AutoModelFor{kind}").from_config(made)
    whole.save_pretrained(tmp_path)
    loaded = load_weights(find_model(tmp_path))
    for name, value in loaded.named_parameters():
        if "pooler" not in name:
            assert torch.equal(value, whole.base_model.get_parameter(name)), name


def test_buffers_that_old_checkpoints_hold_are_no_weights(
    folder: Path, tmp_path: Path, tiny_gpt: Path
) -> None:
    edit_weights(folder, lambda w: w | {"embeddings.position_ids": torch.arange(64)[None]})
    assert load_weights(find_model(folder))
    gpt = shutil.copytree(tiny_gpt, tmp_path / "gpt")
    edit_weights(
        gpt,
        lambda w: (
            w | {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.0.attn.masked_bias": torch.ones(1)}
        ),
    )
    assert load_weights(find_model(gpt))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "names", [["adapter_config.json"], ["adapter_model.safetensors"], ["adapter_model.bin"]]
)
def test_an_adapter_is_refused_whether_peft_is_installed_or_not(
    alone: bool, names: list[str], folder: Path
) -> None:
    for name in names:
        (folder / name).write_bytes(b"{}")
    for name in ("config.json", "model.safetensors") if alone else ():
        (folder / name).unlink()
    with pytest.raises(
        ModelError, match=rf"copy holds an adapter \({names[0]}\).*Merge it into its weights"
    ):
        find_model(folder)


def sharded(folder: Path, source: Path) -> list[str]:
    (folder / "model.safetensors").unlink()
    transformers.AutoModel.from_pretrained(source).save_pretrained(folder, max_shard_size="1MB")
    return sorted(p.name for p in folder.glob("model-*.safetensors"))


def test_files_of_weights_that_disagree_are_refused(folder: Path, tiny_bert: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    shards, index = sharded(folder, tiny_bert), folder / "model.safetensors.index.json"
    listed = index.read_text()
    before = find_model(folder).identity
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    (folder / "pytorch_model.bin").write_bytes(b"nor this")
    assert find_model(folder).identity == before == find_model(folder, allow_pickle=True).identity

    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(
        ModelError,
        match=r"two sets of weights, model\.safetensors and model\.safetensors\.index\.json",
    ):
        find_model(folder)
    index.unlink()
    with pytest.raises(
        ModelError, match=rf"weights that model\.safetensors knows nothing of: {shards[0]}"
    ):
        find_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ModelError,
        match=rf"{len(shards)} parts of its weights .*no model\.safetensors\.index\.json",
    ):
        find_model(folder)
    index.write_text(listed)
    (folder / "model-00009-of-00009.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"index\.json knows nothing of: model-00009-of-00009"):
        find_model(folder)
    (folder / "model-00009-of-00009.safetensors").unlink()
    (folder / shards[0]).rename(folder / "elsewhere")
    with pytest.raises(
        ModelError, match=rf"names {len(shards)} files of weights, and .* lacks {shards[0]}"
    ):
        find_model(folder)
    (folder / "elsewhere").rename(folder / shards[0])
    for wrong, why in (
        ('{"weight_map": {"a": "../secret.safetensors"}}', "expected a name in its own folder"),
        ('{"weight_map": {"a": 7}}', "expected a name in its own folder"),
        ("{}", "has no weight_map"),
        ("[]", "expected an object"),
        ("{", "cannot be read as JSON"),
    ):
        index.write_text(wrong)
        with pytest.raises(ModelError, match=why):
            find_model(folder)


def test_weights_that_the_config_names_are_those_of_the_measure(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    with pytest.raises(ModelError, match=r"has mine\.safetensors, expected model\.safetensors"):
        find_model(folder)
    edit_json(folder / "config.json", transformers_weights="mine.safetensors")
    assert "mine.safetensors" in find_model(folder).identity and load_weights(find_model(folder))
    edit_json(folder / "config.json", transformers_weights="lost.safetensors")
    with pytest.raises(ModelError, match=r"names lost\.safetensors as its weights"):
        find_model(folder)


def test_quantized_weights_and_code_of_another_repository_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", auto_map={"AutoModel": "someone/else--code.Model"})
    assert find_model(folder)
    with pytest.raises(ModelError, match=r"code of .* is in another repository \(someone/else\)"):
        find_model(folder, trust_remote_code=True)
    edit_json(
        folder / "config.json", auto_map={}, quantization_config={"quant_method": "bitsandbytes"}
    )
    with pytest.raises(ModelError, match=r"are quantized \(bitsandbytes\)"):
        find_model(folder)


def test_a_tokenizer_file_that_makes_its_library_panic_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    def panic(*args: Any, **options: Any) -> Any:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(
        ModelError, match=r"its tokenizer\) cannot be loaded: called `Option::unwrap"
    ):
        model.load_tokenizer(find_model(folder))


@pytest.mark.parametrize("variable", sorted(parts.ROUNDING))
def test_an_environment_that_rounds_float32_products_is_refused(
    variable: str, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "BF16" if "FPMATH" in variable else "1")
    with pytest.raises(ModelError, match=f"{variable} is .* rounds the inputs of float32 products"):
        load_weights(find_model(tiny_bert))


def test_what_changes_no_value_is_not_in_the_identity_and_what_does_is(
    folder: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identity() -> dict[str, str]:
        return model.load_identified(find_model(folder))[1]

    before = identity()
    assert before.keys() == {
        "config.json",
        "model.safetensors",
        "tokenizer",
        "tokenizers",
        "transformers",
    }
    assert before["transformers"] == ".".join(transformers.__version__.split(".")[:2])
    for name in (
        "eval_results.json",
        "all_results.json",
        "trainer_state.json",
        "notes.txt",
        "README.md",
        "train.py",
        "optimizer.pt",
        "training_args.bin",
        "generation_config.json",
        "config_sentence_transformers.json",
        "modules.json",
        "optimizer.safetensors",
    ):
        (folder / name).write_text("{}")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.json").write_text("{}")
    (folder / "vocab.txt").unlink()  # tokenizer.json says it all
    assert identity() == before
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    edit_json(folder / "config.json", layer_norm_eps=1e-6)
    edit_weights(folder, lambda w: {k: v * 2 for k, v in w.items()})
    after = identity()
    assert {k for k in before if after[k] != before[k]} == {
        "config.json",
        "model.safetensors",
        "tokenizer",
    }


def test_damaged_weights_are_an_error_that_names_the_model(tmp_path: Path, tiny_bert: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "damaged")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"damaged.* cannot be loaded"):
        model.Model(find_model(folder), [1], "float32", "cpu", 256)


def test_encoder_decoders_are_refused(tmp_path: Path, byte_bpe: Path) -> None:
    transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(
        tmp_path
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        find_model(tmp_path)


def test_positions_that_roberta_cannot_use_are_not_offered(tmp_path: Path) -> None:
    transformers.RobertaConfig(max_position_embeddings=514, num_hidden_layers=2).save_pretrained(
        tmp_path
    )
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_model(tmp_path).context_tokens == 512


def test_identity_is_of_content_and_not_of_place(tmp_path: Path, tiny_bert: Path) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "copy")
    assert find_model(copy).identity == find_model(tiny_bert).identity
    (copy / "README.md").write_text("hello")
    assert find_model(copy).identity == find_model(tiny_bert).identity
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert find_model(copy).identity != find_model(tiny_bert).identity


def test_cuda_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model.choose_device("auto") == "cpu"
    with pytest.raises(ModelError, match="torch sees no GPU here"):
        model.choose_device("cuda")


def write_gguf(path: Path, folder: Path) -> None:
    """The Llama and byte-level BPE of ``folder`` as one GGUF file, as llama.cpp writes it."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    for name, value in load_file(folder / "model.safetensors").items():
        parts = name.removesuffix(".weight").split(".")
        block = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        part = ".".join(parts[2:]) if block else parts[0]
        if part in heads:  # llama.cpp keeps rotary pairs side by side
            value = (
                value.reshape(heads[part], 2, -1, value.shape[1])
                .swapaxes(1, 2)
                .reshape(value.shape)
            )
        writer.add_tensor(f"{block}{names[part]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_a_model(tmp_path: Path, tiny_llama: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama)
    files = find_model(path)
    assert (files.depth, files.hidden_size, files.context_tokens, files.gguf) == (
        3,
        32,
        48,
        "tiny.gguf",
    )
    loaded, encoder = load(path, [0, 1, 2])
    ids = encoder.encode(["And there was light."]).token_ids.tolist()
    assert (
        ids
        == TextEncoder(model.load_tokenizer(find_model(tiny_llama)))
        .encode(["And there was light."])
        .token_ids.tolist()
    )
    (got,) = measure(loaded, ids)
    expected = reference_norms(tiny_llama, ids)
    for layer in range(3):
        np.testing.assert_allclose(got[layer], expected[layer], rtol=2e-5)


def test_a_damaged_gguf_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 20)
    with pytest.raises(ModelError, match=r"broken\.gguf cannot be loaded"):
        find_model(tmp_path / "broken.gguf")
