"""The self-checks of a model at load, the choices that follow from them, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers.pytorch_utils import Conv1D

from afn_ray.errors import ModelError
from afn_ray.model import attention
from afn_ray.model.engine import STRENGTH, Model, Norms, Place, one_thread
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
"""Errors of a model that cannot run in the requested way."""


class _Call(NamedTuple):
    """One call of a linear layer during the search for places."""

    block: torch.nn.Module
    name: str  # of the layer in its block
    module: torch.nn.Module
    input: torch.Tensor
    width: int  # size of the output's last dimension
    attended: attention.Seen | None  # the block's attention call before this one


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


def prepare(
    self: Model, probes: Sequence[Sequence[int]], needs: frozenset[str] = frozenset()
) -> None:
    """Choose the fastest way to run this model and check it against the plain model.

    ``probes`` are a few token sequences of different lengths, each with the tokenizer's
    template. The longest has the length of a window if that is affordable. The norms of the
    hooked layers must equal those of the plain model's ``hidden_states[k]``, both one text at
    a time and all texts in one batch. ``needs`` are the inputs that signals need beside hidden
    states, from ``signals.NEEDS``; this method finds their place in each block.

    Sets ``packed``, ``why_padded`` and ``causal``. Raises ``ModelError`` with the difference
    and the tolerance.
    """
    plain = [_plain_norms(self, ids) for ids in probes]
    self._model.to(device=self.device)
    _choose_attention(self, probes, plain)
    needs -= {"outliers"}  # passed to the constructor
    places = _find_places(self, max(probes, key=len), needs) if needs else {}
    _choose_products(self, probes, plain)
    for block, place in places.items():  # only now: a product may have replaced a layer
        if place.neurons:
            block.get_submodule(place.neurons).register_forward_pre_hook(self._before_neurons)
        if place.norm:
            block.get_submodule(place.norm).register_forward_pre_hook(self._before_norm)
    self._places = places
    if "norm" in needs:
        _check_centred(self, min(probes, key=len))
    self.causal = _is_causal(
        self, min((p for p in probes if len(p) > 4), key=len, default=probes[0])
    )


def _choose_attention(
    self: Model, probes: Sequence[Sequence[int]], plain: list[list[Norms]]
) -> None:
    """Choose packed batches if they match the plain model, and padded batches otherwise.

    Both are checked with the plain linear layers, in float32.
    """
    before = self._model.config._attn_implementation
    try:
        if "position_ids" not in self._parameters:
            raise attention.UnsupportedAttention("it takes no position ids")
        if not self._model._can_set_attn_implementation():
            raise attention.UnsupportedAttention(
                "its attention does not go through transformers' interface"
            )
        self.packed = True
        self._model.set_attn_implementation(attention.NAME)
        _check(self, probes, plain, torch.float32)
        if (
            _masks_only(self._model.config.get_text_config(), self.files.context_tokens)
            and not self._windowed
        ):
            raise attention.UnsupportedAttention(
                "its attention is not told of the sliding window in its config"
            )
        return
    except (*REFUSALS, ModelError) as error:
        self.why_padded = _first_line(error)
    self.packed = False
    try:
        self._model.set_attn_implementation(before)
        _check(self, probes, plain, torch.float32)
    except REFUSALS as error:
        raise ModelError(f"{self._name} failed its self-check: {_first_line(error)}") from error


def _choose_products(
    self: Model, probes: Sequence[Sequence[int]], plain: list[list[Norms]]
) -> None:
    """Use fast linear layers if the model passes its self-check with them.

    Half precision requires them: raises ``ModelError`` if the check fails there.
    """
    full = self.dtype == torch.float32
    why = ""
    for wide in (False,) if full else (False, True):
        replaced, self._cast = replace_linear_layers(
            self._blocks, self.dtype, self._batch_tokens, wide=wide
        )
        try:
            _check(self, probes, plain, self.dtype)
            return
        except (*REFUSALS, ModelError) as error:
            why = _first_line(error)
            restore(replaced)
            self._cast = None
    if not full:
        raise ModelError(
            f"{self._name} does not run in {str(self.dtype)[6:]} ({why}); give --dtype float32"
        )


def _find_places(
    self: Model, ids: Sequence[int], needs: frozenset[str]
) -> dict[torch.nn.Module, Place]:
    """Find the places in each block that ``needs`` names, in one forward pass of all blocks.

    Raises ``ModelError`` if a block has no such place.
    """
    if "attention" in needs and not self.packed:
        raise ModelError(
            f"{self._name} gives no attention weights to read: its batches are padded, since {self.why_padded}; "
            "leave the signal attention out"
        )
    calls: list[_Call] = []
    norms: dict[torch.nn.Module, str] = {}
    last: list[tuple[str, torch.Tensor]] = []  # name and output of the last LayerNorm to run
    handles = []
    layers, self.layers, self._stop = self.layers, tuple(range(self.files.depth + 1)), False
    self._watching = True
    for block in self._blocks:
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):

                def record(
                    module: torch.nn.Module,
                    args: tuple[Any, ...],
                    output: torch.Tensor,
                    *,
                    block: torch.nn.Module = block,
                    name: str = name,
                ) -> None:
                    seen = None if self._layout is None else self._layout.seen
                    calls.append(_Call(block, name, module, args[0], output.shape[-1], seen))

                handles.append(module.register_forward_hook(record))
            elif isinstance(module, torch.nn.LayerNorm):

                def keep(
                    module: torch.nn.Module,
                    args: tuple[Any, ...],
                    output: torch.Tensor,
                    *,
                    name: str = name,
                ) -> None:
                    last[:] = [(name, output)]

                handles.append(module.register_forward_hook(keep))

        def end(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            made = output[0] if isinstance(output, tuple) else output
            norms[module] = last[0][0] if last and last[0][1] is made else ""

        handles.append(block.register_forward_hook(end))
    try:
        self.measure(*_joined([ids]))
    finally:
        self.layers, self._stop, self._watching = layers, True, False
        for handle in handles:
            handle.remove()
    places = {}
    for block in self._blocks:
        mine = [c for c in calls if c.block is block]
        found = {
            "attention": [c for c in mine if _follows(c)],
            "neurons": [c for c in mine if c.width == self.files.hidden_size and not _follows(c)],
        }
        if lacking := sorted(n for n in needs & found.keys() if not found[n]):
            raise ModelError(
                f"{self._name}: no linear layer of its blocks was found to be the one behind its {lacking[0]}; "
                f"leave signals out that need {lacking[0]}"
            )
        if "neurons" in needs and (experts := num_experts(self._model.config)):
            raise ModelError(
                f"{self._name} is a mixture of {experts} experts: its neurons are other ones for each token; leave "
                "the signal neurons out"
            )
        if "neurons" in needs and (size := found["neurons"][-1].input.shape[-1]) > MOST_NEURONS:
            raise ModelError(
                f"{self._name} has {size:,} neurons in a block, and they are recorded as numbers below "
                f"{MOST_NEURONS:,}; leave the signal neurons out"
            )
        if "norm" in needs and not norms[block]:
            raise ModelError(
                f"{self._name}: its blocks do not end with a LayerNorm, so there is no gain to leave out; leave "
                "the signal centred out"
            )
        gram = _gram(found["attention"][0]) if "attention" in needs else None
        behind = found["neurons"][-1].name if "neurons" in needs else ""
        num_neurons = found["neurons"][-1].input.shape[-1] if "neurons" in needs else 0
        places[block] = Place(norms[block] if "norm" in needs else "", gram, behind, num_neurons)
    return places


def _check_centred(self: Model, ids: Sequence[int]) -> None:
    """Check the ``Centred`` signal: its values must be sqrt(hidden_size).

    That is the norm of the output of a LayerNorm without gain and bias. Raises ``ModelError``.
    """
    got = self.measure(*_joined([ids]), (Centred(),))
    expected = np.full_like(got, self.files.hidden_size**0.5)
    what = "the LayerNorm without gain that ends a block against sqrt(hidden_size)"
    # The LayerNorm's epsilon makes the norm a little smaller, so the tolerance is wide.
    compare_norms(what, got, expected, torch.bfloat16)


def _check(
    self: Model, probes: Sequence[Sequence[int]], plain: list[list[Norms]], dtype: torch.dtype
) -> None:
    """Compare single texts with the plain model, and one batch of all texts with single texts.

    Raises ``ModelError`` if they differ by more than the tolerance of ``dtype``.
    """
    singles = [self.measure(*_joined([ids])) for ids in probes]
    for expected, got in zip(plain, singles, strict=True):
        for at, layer in enumerate(self.layers):
            compare_norms(f"layer {layer} against the plain model", got[at], expected[layer], dtype)
    ids, lengths = _joined(probes)
    if self.packed:
        ids = np.append(ids, np.full(FILLER, ids[0]))
    together = self.measure(ids, lengths)
    what = "one packed batch" if self.packed else "one padded batch"
    for got, alone in zip(np.split(together, np.cumsum(lengths), axis=1), singles, strict=False):
        compare_norms(f"{what} against single texts", got, alone, dtype)


def _plain_norms(self: Model, ids: Sequence[int]) -> list[Norms]:
    """Norms [n_tokens] of every layer of the plain model, as the hooks read them.

    Raises ``ModelError`` if they differ from the norms of the model's ``hidden_states``.
    """
    self._stop, self._calls, self._length, self._signals = False, 0, len(ids), (STRENGTH,)
    layers, self.layers = self.layers, tuple(range(self.files.depth + 1))
    try:
        with torch.inference_mode(), one_thread(torch.device("cpu")):
            states = self._model(
                input_ids=torch.tensor([list(ids)]), output_hidden_states=True
            ).hidden_states
    finally:
        self._stop, self.layers = True, layers
    if states is None or len(states) != self.files.depth + 1 or self._calls != self.files.depth:
        num_states = 0 if states is None else len(states)
        raise ModelError(
            f"{self._name} gave {num_states} hidden states and ran {self._calls} blocks, expected "
            f"{self.files.depth + 1} and {self.files.depth}; this architecture is not supported"
        )
    hooked = [
        self._read[Series("strength", layer)][0].numpy() for layer in range(self.files.depth + 1)
    ]
    self._read.clear()
    for layer in layers:
        # The last entry of hidden_states may be after a final norm.
        if layer < self.files.depth:
            what = f"layer {layer} hooked against hidden_states[{layer}]"
            compare_norms(what, hooked[layer], norm(states[layer][0]).numpy(), torch.float32)
    return hooked


def _is_causal(self: Model, ids: Sequence[int]) -> bool:
    """Whether a token sees only the tokens to its left.

    In that case a change of the last input does not change the outputs before it.
    """
    another = next((i for i in ids if i != ids[-1]), 0 if ids[-1] else 1)
    changed = [*ids[:-1], another]
    layers, self.layers = self.layers, (max(*self.layers, 1),)
    try:
        # Compare whole states: after a LayerNorm without gain all norms are equal.
        one, other = (self.measure(*_joined([x]), (States(),))[0, :-1] for x in (ids, changed))
    finally:
        self.layers = layers
    return bool(np.allclose(one, other, rtol=1e-6, atol=0))


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


def num_experts(config: Any) -> int:
    """Number of experts in a mixture-of-experts model; 0 for any other model.

    In a mixture each token has neurons of its own experts.
    """
    counts = [
        getattr(config.get_text_config(), n, None)
        for n in ("num_experts", "num_local_experts", "moe_num_experts")
    ]
    return next((n for n in counts if isinstance(n, int) and n > 1), 0)


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
            f"self-check failed: {what} differs by {difference:.2e} relative, tolerance {tolerance:.0e}"
        )
