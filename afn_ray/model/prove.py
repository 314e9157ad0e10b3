"""The self-checks of a model at load, the choices that follow from them, and what is refused."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers.pytorch_utils import Conv1D

from afn_ray import logs
from afn_ray.errors import ModelError
from afn_ray.model import attention, fused, memory
from afn_ray.model.engine import Model, Norms, Place
from afn_ray.model.files import is_device_fault
from afn_ray.model.linear import replace_linear_layers, restore
from afn_ray.model.signals import Centred, States, norm
from afn_ray.schema import MOST_NEURONS, Series

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest relative difference of norms that the self-check accepts, by the dtype of the products.

In float32 it holds for all tokens. In half precision it holds for nine tokens of ten: single tokens
may differ much in a model that is wired correctly.
"""

FILLER = 16
"""Number of filler rows after the sequences in the self-check."""

REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    attention.UnsupportedAttention,
)
"""Errors of a model that cannot run in the requested way.

Errors of memory and of the device are among them, and are none: see ``_is_refusal``.
"""

OF_DTYPE = re.compile(r"dtype|scalar type|not implemented for|data type|Half|BFloat16")
"""Pattern of errors that torch raises for an operator that lacks a dtype, or gets two."""

_log = logging.getLogger(__name__)


class Probe(NamedTuple):
    """One token sequence of the self-check."""

    ids: Sequence[int]
    plain: list[Norms]  # norms [n_tokens] of every layer of the plain model


class _Call(NamedTuple):
    """One call of a linear layer during the search for places."""

    name: str  # of the layer in its block
    module: torch.nn.Module
    input: torch.Tensor
    width: int  # size of the output's last dimension
    attended: attention.Seen | None  # the block's attention call before this one


class _Block(NamedTuple):
    """Record of one block's calls during the search for places."""

    calls: list[_Call]
    norm: str  # LayerNorm that makes the block's output; empty if none does


def prepare(
    model: Model, sequences: Sequence[Sequence[int]], needs: frozenset[str] = frozenset()
) -> None:
    """Choose the fastest way to run ``model`` and check it against the plain model.

    ``sequences`` are a few token sequences of different lengths, each with the tokenizer's
    template. The longest has the length of a window if that is affordable. The norms of the hooked
    layers must equal those of the plain model's ``hidden_states[k]``, both one text at a time and
    all texts in one batch. ``needs`` are the inputs that signals need beside hidden states, from
    ``signals.NEEDS``; this function finds their place in each block.

    Sets the model's ``packed``, ``why_padded``, ``attention``, ``why_slow``, ``norm``,
    ``why_eager`` and ``causal``, and logs what was chosen. Raises ``ModelError`` with the
    difference and the tolerance, or with the sizes where the model does not fit into the memory.
    Errors of the device are raised as they are: they say nothing about the model.
    """
    with memory.needed(model.name, model.device, lambda: model.num_bytes):
        _prepare(model, sequences, needs)


def _prepare(model: Model, sequences: Sequence[Sequence[int]], needs: frozenset[str]) -> None:
    probes = [Probe(ids, _plain_norms(model, ids)) for ids in sequences]
    model.drop_unused_blocks()
    model.module.to(device=model.device)
    _choose_attention(model, probes)
    needs -= {"outliers"}  # passed to the constructor
    places = _find_places(model, max(sequences, key=len), needs) if needs else {}
    _choose_products(model, probes)
    fused.choose(model, lambda: _check(model, probes, model.dtype), needs)
    model.read_from(places)  # only now: a product may have replaced a layer
    if "norm" in needs:
        _check_centred(model, min(sequences, key=len))
    long_enough = [ids for ids in sequences if len(ids) > 4]
    model.causal = _is_causal(model, min(long_enough, key=len, default=sequences[0]))
    _log_choice(model)


def _log_choice(model: Model) -> None:
    """Log how the model attends, and why it does not attend faster."""
    dtype, why = str(model.dtype).removeprefix("torch."), model.why_slow or model.why_padded or ""
    logs.report(
        _log,
        "attention_chosen",
        f"{model.name} attends by {model.attention} in {dtype} on {model.device}"
        + (f", since {why}" if why else ""),
        level=logging.WARNING if why else logging.INFO,
        attention=model.attention,
        dtype=dtype,
        why=why,
    )


# --- against the plain model ---


def _plain_norms(model: Model, ids: Sequence[int]) -> list[Norms]:
    """Norms [n_tokens] of every layer of the plain model, as the hooks read them.

    Raises ``ModelError`` if they differ from the norms of the model's ``hidden_states``.
    """
    depth = model.files.depth
    done, states = model.run_plain(ids)
    if states is None or len(states) != depth + 1 or done.calls != depth:
        num_states = 0 if states is None else len(states)
        raise ModelError(
            f"{model.name} gave {num_states} hidden states and ran {done.calls} blocks, expected "
            f"{depth + 1} and {depth}; this architecture is not supported"
        )
    hooked = [done.read[Series("strength", layer)][0].numpy() for layer in range(depth + 1)]
    for layer in model.layers:
        # The last entry of hidden_states may be after a final norm.
        if layer < depth:
            what = f"layer {layer} hooked against hidden_states[{layer}]"
            compare_norms(what, hooked[layer], norm(states[layer][0]).numpy(), torch.float32)
    return hooked


def _check(model: Model, probes: Sequence[Probe], dtype: torch.dtype) -> None:
    """Compare single texts with the plain model, and one batch of all texts with single texts.

    Raises ``ModelError`` if they differ by more than the tolerance of ``dtype``.
    """
    singles = [model.measure(*_joined([probe.ids])) for probe in probes]
    for probe, got in zip(probes, singles, strict=True):
        for at, layer in enumerate(model.layers):
            what = f"layer {layer} against the plain model"
            compare_norms(what, got[at], probe.plain[layer], dtype)
    ids, lengths = _joined([probe.ids for probe in probes])
    if model.packed:
        ids = np.append(ids, np.full(FILLER, ids[0]))
    together = model.measure(ids, lengths)
    what = "one packed batch" if model.packed else "one padded batch"
    for got, alone in zip(np.split(together, np.cumsum(lengths), axis=1), singles, strict=False):
        compare_norms(f"{what} against single texts", got, alone, dtype)


# --- choices ---


def _choose_attention(model: Model, probes: Sequence[Probe]) -> None:
    """Choose packed batches if they match the plain model, and padded batches otherwise.

    Both are checked with the plain linear layers, in float32.
    """
    before = model.module.config._attn_implementation
    try:
        if "position_ids" not in inspect.signature(model.module.forward).parameters:
            raise attention.UnsupportedAttention("it takes no position ids")
        if not model.module._can_set_attn_implementation():
            raise attention.UnsupportedAttention(
                "its attention does not go through transformers' interface"
            )
        model.packed = True
        model.module.set_attn_implementation(attention.NAME)
        _check(model, probes, torch.float32)
        if (
            _masks_only(model.module.config.get_text_config(), model.files.context_tokens)
            and not model.windowed
        ):
            raise attention.UnsupportedAttention(
                "its attention does not get the sliding window of its config"
            )
        return
    except (*REFUSALS, ModelError) as error:
        if not _is_refusal(error):
            raise
        model.why_padded = _first_line(error)
    model.packed = False
    try:
        model.module.set_attn_implementation(before)
        _check(model, probes, torch.float32)
    except REFUSALS as error:
        if not _is_refusal(error):
            raise
        raise ModelError(f"{model.name} failed its self-check: {_first_line(error)}") from error


def _masks_only(config: Any, context_tokens: int) -> bool:
    """Whether the config limits which tokens a token sees.

    Some families apply such a limit only in the mask, and packed attention builds no mask.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in k or "chunked" in k for k in kinds):
        return False
    if getattr(config, "use_sliding_window", True) is False:
        return False
    limits = [
        getattr(config, name, None)
        for name in ("sliding_window", "attention_chunk_size", "local_attention")
    ]
    return any(isinstance(limit, int) and 0 < limit < context_tokens for limit in limits)


def _choose_products(model: Model, probes: Sequence[Probe]) -> None:
    """Use fast linear layers if the model passes its self-check with them.

    In half precision, attention falls back from flash attention to torch's, where flash attention
    is refused. It falls back to float32 where the model gets a dtype that it cannot take, or values
    too far from the plain model's. Half precision requires fast layers: raises ``ModelError`` if
    the check still fails.
    """
    full, wide = model.dtype == torch.float32, False
    model.flash, model.why_slow = True, ""
    while True:
        replaced, model.cast = replace_linear_layers(
            model.blocks, model.dtype, model.batch_tokens, wide=wide
        )
        model.kernels.clear()
        try:
            _check(model, probes, model.dtype)
        except (*REFUSALS, ModelError) as error:
            restore(replaced)
            model.cast = None
            if not _is_refusal(error):
                raise
            why = _first_line(error)
            if model.flash and isinstance(error, attention.FlashRefused):
                model.flash, model.why_slow = False, f"flash attention is refused: {why}"
                continue
            if not full and not wide and _is_of_dtype(error):
                wide, model.why_slow = True, f"its blocks need float32 between products: {why}"
                continue
            if not full:
                raise ModelError(
                    f"{model.name} does not run in {str(model.dtype)[6:]} ({why}); give --dtype "
                    "float32"
                ) from error
            model.kernels = {attention.FLOAT32}  # the plain layers have passed it before
        break
    model.attention = "+".join(sorted(model.kernels)) if model.packed else attention.PADDED
    slow = model.packed and attention.FLOAT32 in model.kernels and not full
    if slow and not model.why_slow:
        model.why_slow = "its blocks give queries, keys and values in float32"


def _is_refusal(error: BaseException) -> bool:
    """Whether ``error`` says something about the model, and not about memory or the device."""
    return not memory.is_out_of_memory(error) and not is_device_fault(error)


def _is_of_dtype(error: BaseException) -> bool:
    """Whether ``error`` is one of half precision: values that differ, or a dtype not taken."""
    return isinstance(error, ModelError) or OF_DTYPE.search(str(error)) is not None


# --- places of signals ---


def _find_places(
    model: Model, ids: Sequence[int], needs: frozenset[str]
) -> dict[torch.nn.Module, Place]:
    """Find the places in each block that ``needs`` names, in one forward pass of the blocks.

    Raises ``ModelError`` if a block has no such place.
    """
    if "attention" in needs and not model.packed:
        raise ModelError(
            f"{model.name} gives no attention weights to read: its batches are padded, since "
            f"{model.why_padded}; leave the signal attention out"
        )
    ran = _watch_blocks(model, ids)
    return {block: _find_place(model, ran[block], needs) for block in model.blocks}


def _watch_blocks(model: Model, ids: Sequence[int]) -> dict[torch.nn.Module, _Block]:
    """Run the blocks over one text, and record what ran in each of them."""
    calls: dict[torch.nn.Module, list[_Call]] = {block: [] for block in model.blocks}
    norms: dict[torch.nn.Module, str] = {}
    last: tuple[str, torch.Tensor | None] = "", None  # name and output of the last LayerNorm

    def begin(block: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if (layout := attention.current()) is not None:
            layout.watched = True  # after the model's own hook, which keeps no call here

    def linear(
        block: torch.nn.Module,
        name: str,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        output: torch.Tensor,
    ) -> None:
        layout = attention.current()
        seen = None if layout is None else layout.seen
        calls[block].append(_Call(name, module, args[0], output.shape[-1], seen))

    def layer_norm(
        name: str, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> None:
        nonlocal last
        last = name, output

    def end(block: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        norms[block] = last[0] if last[1] is made else ""

    handles = []
    for block in model.blocks:
        handles.append(block.register_forward_pre_hook(begin))
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                handles.append(module.register_forward_hook(partial(linear, block, name)))
            elif isinstance(module, torch.nn.LayerNorm):
                handles.append(module.register_forward_hook(partial(layer_norm, name)))
        # Before the model's own hook, which stops the pass after the last block.
        handles.append(block.register_forward_hook(end, prepend=True))
    try:
        model.measure(*_joined([ids]), layers=range(max(*model.layers, 1) + 1))
    finally:
        for handle in handles:
            handle.remove()
    return {block: _Block(calls[block], norms[block]) for block in model.blocks}


def _find_place(model: Model, block: _Block, needs: frozenset[str]) -> Place:
    """The places in one block that ``needs`` names. Raises ``ModelError`` if it lacks one."""
    width = model.files.hidden_size
    found = {
        "attention": [c for c in block.calls if _follows(c)],
        "neurons": [c for c in block.calls if c.width == width and not _follows(c)],
    }
    if lacking := sorted(n for n in needs & found.keys() if not found[n]):
        raise ModelError(
            f"{model.name}: no linear layer of its blocks was found to be the one behind its "
            f"{lacking[0]}; leave signals out that need {lacking[0]}"
        )
    behind, num_neurons = "", 0
    if "neurons" in needs:
        behind, num_neurons = found["neurons"][-1].name, found["neurons"][-1].input.shape[-1]
        if experts := num_experts(model.module.config):
            raise ModelError(
                f"{model.name} is a mixture of {experts} experts: its neurons are other ones for "
                "each token; leave the signal neurons out"
            )
        if num_neurons > MOST_NEURONS:
            raise ModelError(
                f"{model.name} has {num_neurons:,} neurons in a block, and they are recorded as "
                f"numbers below {MOST_NEURONS:,}; leave the signal neurons out"
            )
    if "norm" in needs and not block.norm:
        raise ModelError(
            f"{model.name}: its blocks do not end with a LayerNorm, so there is no gain to leave "
            "out; leave the signal centred out"
        )
    gram = _gram(found["attention"][0]) if "attention" in needs else None
    return Place(block.norm if "norm" in needs else "", gram, behind, num_neurons)


def _follows(call: _Call) -> bool:
    """Whether the input of ``call`` is the output of attention, unchanged."""
    return call.attended is not None and torch.equal(
        call.input.flatten(), call.attended.output.flatten()
    )


def _gram(call: _Call) -> torch.Tensor:
    """P P^T for each head's part P of the output projection in ``call``: [heads, size, size]."""
    assert call.attended is not None
    weight: torch.Tensor = call.module.weight  # type: ignore[assignment]
    weight = weight if isinstance(call.module, Conv1D) else weight.t()
    parts = weight.detach().float().unflatten(0, (call.attended.query.shape[1], -1))
    gram: torch.Tensor = parts @ parts.transpose(1, 2)
    return gram


def num_experts(config: Any) -> int:
    """Number of experts in a mixture-of-experts model; 0 for any other model.

    In a mixture each token has neurons of its own experts.
    """
    counts = [
        getattr(config.get_text_config(), n, None)
        for n in ("num_experts", "num_local_experts", "moe_num_experts")
    ]
    return next((n for n in counts if isinstance(n, int) and n > 1), 0)


def _check_centred(model: Model, ids: Sequence[int]) -> None:
    """Check the ``Centred`` signal: its values must be sqrt(hidden_size).

    That is the norm of the output of a LayerNorm without gain and bias. Raises ``ModelError``.
    """
    got = model.measure(*_joined([ids]), (Centred(),))
    expected = np.full_like(got, model.files.hidden_size**0.5)
    what = "the LayerNorm without gain that ends a block against sqrt(hidden_size)"
    # The LayerNorm's epsilon makes the norm a little smaller, so the tolerance is wide.
    compare_norms(what, got, expected, torch.bfloat16)


# --- causality ---


def _is_causal(model: Model, ids: Sequence[int]) -> bool:
    """Whether a token sees only the tokens to its left.

    In that case a change of the last input does not change the outputs before it.
    """
    another = next((i for i in ids if i != ids[-1]), 0 if ids[-1] else 1)
    layers = [max(*model.layers, 1)]
    # Compare whole states: after a LayerNorm without gain all norms are equal.
    before, after = (
        model.measure(*_joined([sequence]), (States(),), layers)[0, :-1]
        for sequence in (ids, [*ids[:-1], another])
    )
    return bool(np.allclose(before, after, rtol=1e-6, atol=0))


# --- comparisons ---


def _joined(sequences: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """The ids of all ``sequences`` one after another, and the length of each."""
    return np.concatenate([np.asarray(s, np.int64) for s in sequences]), [len(s) for s in sequences]


def _first_line(error: BaseException) -> str:
    """First line of the error's text, after the name of its class unless the error is ours."""
    text = str(error).strip().splitlines()
    if isinstance(error, ModelError | attention.UnsupportedAttention):
        return text[0] if text else type(error).__name__
    return f"{type(error).__name__}: {text[0] if text else ''}"


def compare_norms(what: str, got: Norms, expected: Norms, dtype: torch.dtype) -> None:
    """Raise ``ModelError`` if ``got`` and ``expected`` differ by more than ``TOLERANCE[dtype]``."""
    tolerance = TOLERANCE[dtype]
    differences = np.abs(got - expected) / np.maximum(np.abs(expected), 1e-30)
    difference = float(np.quantile(differences, 1.0 if dtype == torch.float32 else 0.9))
    if not difference <= tolerance:
        raise ModelError(
            f"self-check failed: {what} differs by {difference:.2e} relative, tolerance "
            f"{tolerance:.0e}"
        )
