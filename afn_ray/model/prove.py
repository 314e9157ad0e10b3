"""The self-checks of a model at load, the choices that follow from them, and what is refused."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from afn_ray import logs
from afn_ray.errors import ModelError
from afn_ray.model import attention, fused, memory
from afn_ray.model.engine import Model, name_of
from afn_ray.model.files import is_device_fault
from afn_ray.model.pending import Norms
from afn_ray.model.places import find_places
from afn_ray.model.signals import Centred, States, norm
from afn_ray.schema import Series

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
    ``why_eager``, ``has_final_norm`` and ``causal``, and logs what was chosen. Raises
    ``ModelError`` with the difference and the tolerance, or with the sizes where the model does not
    fit into the memory. Errors of the device are raised as they are: they say nothing about the
    model.
    """
    with memory.needed(model.name, model.device, lambda: model.num_bytes):
        _prepare(model, sequences, needs)


def _prepare(model: Model, sequences: Sequence[Sequence[int]], needs: frozenset[str]) -> None:
    model.move_rest()
    probes = [Probe(ids, _plain_norms(model, ids)) for ids in sequences]
    model.drop_unused_blocks()
    _choose_attention(model, probes)
    needs -= {"outliers", "mean"}  # found by calibrations
    places = find_places(model, max(sequences, key=len), needs) if needs else []
    _choose_products(model, probes)
    fused.choose(model, lambda: _check(model, probes, model.dtype), needs)
    model.read_from(places)  # only now: a product may have replaced a layer
    if "norm" in needs:
        _check_centred(model, min(sequences, key=len))
    long_enough = [ids for ids in sequences if len(ids) > 4]
    model.causal = _is_causal(model, min(long_enough, key=len, default=sequences[0]))
    _log_choice(model)


def _log_choice(model: Model) -> None:
    """Log how the model attends and computes its experts, and why it is not faster."""
    dtype = name_of(model.dtype)
    why = model.why_slow or model.why_padded or ""
    experts = name_of(model.experts) if model.is_mixture else ""
    logs.report(
        _log,
        "attention_chosen",
        f"{model.name} attends by {model.attention} in {dtype} on {model.device}"
        + (f", with experts in {experts}" if experts else "")
        + (f", since {why}" if why else ""),
        level=logging.WARNING if why else logging.INFO,
        attention=model.attention,
        dtype=dtype,
        experts=experts,
        why=why,
    )


# --- against the plain model ---


def _plain_norms(model: Model, ids: Sequence[int]) -> list[Norms]:
    """Norms [n_tokens] of every loaded layer of the plain model, as the hooks read them.

    Raises ``ModelError`` if the model does not run without its last blocks, or if the norms
    differ from those of its ``hidden_states``.
    """
    depth = model.depth
    try:
        done, states = model.run_plain(ids)
    except REFUSALS as error:
        if not _is_refusal(error):
            raise
        raise ModelError(
            f"{model.name} does not run with {depth} of its {model.files.depth} blocks: "
            f"{_first_line(error)}; this architecture is not supported"
        ) from error
    if states is None or len(states) != depth + 1 or done.calls != depth:
        num_states = 0 if states is None else len(states)
        raise ModelError(
            f"{model.name} gave {num_states} hidden states and ran {done.calls} blocks, expected "
            f"{depth + 1} and {depth}; this architecture is not supported"
        )
    hooked = []
    for layer in range(depth + 1):
        norms = done.read[Series("strength", layer)][0]
        hooked.append(norms.cpu().numpy())
    for layer in model.layers:
        # The last entry of hidden_states may be after a final norm.
        if layer < depth:
            what = f"layer {layer} hooked against hidden_states[{layer}]"
            norms = norm(states[layer][0])
            compare_norms(what, hooked[layer], norms.cpu().numpy(), torch.float32)
    last = norm(states[depth][0]).cpu().numpy()
    model.has_final_norm = not np.allclose(hooked[depth], last, rtol=TOLERANCE[torch.float32])
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
    by_text = np.split(together, np.cumsum(lengths), axis=1)
    for got, alone in zip(by_text, singles, strict=False):
        compare_norms(f"{what} against single texts", got, alone, dtype)


# --- choices ---


def _choose_attention(model: Model, probes: Sequence[Probe]) -> None:
    """Choose packed batches if they match the plain model, and padded batches otherwise.

    Both are checked with the plain linear layers, in float32.
    """
    # Both attributes are private: transformers has a public way to set attention, none to read it.
    before = model.module.config._attn_implementation
    try:
        if "position_ids" not in inspect.signature(model.module.forward).parameters:
            raise attention.UnsupportedAttention("it takes no position ids")
        if not model.module._can_set_attn_implementation():
            raise attention.UnsupportedAttention(
                "its attention does not go through transformers' interface"
            )
        model.packed = True
        model.attend_by(attention.NAME)
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
        model.attend_by(before)
        _check(model, probes, torch.float32)
    except REFUSALS as error:
        if not _is_refusal(error):
            raise
        raise ModelError(f"{model.name} failed its self-check: {_first_line(error)}") from error


def _masks_only(config: Any, context_tokens: int) -> bool:
    """True if the config limits which tokens a token sees.

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
    """Use fast linear layers and experts if the model passes its self-check with them.

    Half precision requires fast layers: raises ``ModelError`` if no way passes the check.
    """
    full = model.dtype == torch.float32
    reasons: dict[str, str] = {}
    model.flash = True
    model.build()
    while (error := _fault(model, probes)) is not None:
        _choose_slower(model, error, reasons)
    model.why_slow = "; ".join(reasons.values())
    model.attention = "+".join(sorted(model.kernels)) if model.packed else attention.PADDED
    slow = model.packed and attention.FLOAT32 in model.kernels and not full
    if slow and not model.why_slow:
        model.why_slow = "its blocks give queries, keys and values in float32"


def _fault(model: Model, probes: Sequence[Probe]) -> Exception | None:
    """The error for which the model is refused as it is; None if it passes its self-check.

    Errors of memory and of the device are raised.
    """
    model.kernels.clear()
    try:
        _check(model, probes, model.dtype)
    except (*REFUSALS, ModelError) as error:
        if not _is_refusal(error):
            raise
        return error.with_traceback(None)  # which holds tensors of the pass
    return None


def _choose_slower(model: Model, error: Exception, reasons: dict[str, str]) -> None:
    """Choose the next slower way to run ``model`` after ``error``; keep its reason in ``reasons``.

    Attention falls back from flash attention to torch's where flash attention is refused. After
    a fault of half precision, the products return float32, and so attention becomes float32; if
    that does not help, the experts become float32. Raises ``ModelError`` if there is no slower
    way.
    """
    why = _first_line(error)
    is_full = model.dtype == torch.float32
    cast = model.cast
    is_of_dtype = not is_full and _is_of_dtype(error)
    if model.flash and isinstance(error, attention.FlashRefused):
        model.flash, reasons["flash"] = False, f"flash attention is refused: {why}"
    elif is_of_dtype and cast is not None and not cast.wide:
        cast.wide = True
        reasons["wide"] = f"its blocks need float32 between products: {why}"
    elif is_of_dtype and model.is_mixture and model.experts == model.dtype:
        reasons.pop("wide")  # as it did not help
        reasons["experts"] = f"its experts run in float32: {why}"
        _build_again(model, experts=torch.float32)
    elif is_full and cast is not None:
        _build_again(model, fast=False)
    else:
        raise ModelError(
            f"{model.name} does not run in {name_of(model.dtype)} ({why})"
            + ("" if is_full else "; give --dtype float32")
        ) from error


def _build_again(model: Model, **options: Any) -> None:
    """``Model.build`` from weights that are loaded anew, for it keeps none that it replaces."""
    model.module, model.blocks = None, []
    memory.free_memory()
    model.load()
    model.move_rest()
    model.drop_unused_blocks()
    if model.packed:
        model.attend_by(attention.NAME)
    model.build(**options)


def _is_refusal(error: BaseException) -> bool:
    """True if ``error`` says something about the model, and not about memory or the device."""
    return not memory.is_out_of_memory(error) and not is_device_fault(error)


def _is_of_dtype(error: BaseException) -> bool:
    """True if ``error`` is one of half precision: values that differ, or a dtype not taken."""
    return isinstance(error, ModelError) or OF_DTYPE.search(str(error)) is not None


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
    """True if a token sees only the tokens to its left.

    In that case a change of the last input does not change the outputs before it.
    """
    others = [i for i in ids if i != ids[-1]] or [0 if ids[-1] else 1]
    layers = [max(*model.layers, 1)]
    # Compare whole states: after a LayerNorm without gain all norms are equal.
    states = []
    for sequence in (ids, [*ids[:-1], others[0]]):
        measured = model.measure(*_joined([sequence]), (States(),), layers)
        states.append(measured[0, :-1])
    before, after = states
    return bool(np.allclose(before, after, rtol=1e-6, atol=0))


# --- comparisons ---


def _joined(sequences: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """The ids of all ``sequences`` one after another, and the length of each."""
    ids = np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences])
    return ids, [len(sequence) for sequence in sequences]


def _first_line(error: BaseException) -> str:
    """First line of the error's text, after the name of its class unless the error is ours."""
    text = str(error).strip().splitlines()
    if isinstance(error, ModelError | attention.UnsupportedAttention):
        return text[0] if text else type(error).__name__
    return f"{type(error).__name__}: {text[0] if text else ''}"


def compare_norms(what: str, got: Norms, expected: Norms, dtype: torch.dtype) -> None:
    """Raise ``ModelError`` if ``got`` and ``expected`` differ by more than ``TOLERANCE[dtype]``."""
    if not np.isfinite(expected).all():
        raise ModelError(
            f"self-check failed: {what}: the plain model gives values that are no finite numbers, "
            "so its weights may be damaged"
        )
    tolerance = TOLERANCE[dtype]
    differences = np.abs(got - expected) / np.maximum(np.abs(expected), 1e-30)
    difference = float(np.quantile(differences, 1.0 if dtype == torch.float32 else 0.9))
    if not difference <= tolerance:
        raise ModelError(
            f"self-check failed: {what} differs by {difference:.2e} relative, tolerance "
            f"{tolerance:.0e}"
        )
