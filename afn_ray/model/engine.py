"""A loaded model that reads chosen layers in one forward pass over packed sequences, and proves
itself first.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers.pytorch_utils import Conv1D

from afn_ray.errors import ModelError
from afn_ray.model import attention
from afn_ray.model.files import POSITIONS_AFTER_PADDING, ModelFiles, load_weights
from afn_ray.model.linear import Product, replace_linear_layers, restore
from afn_ray.model.signals import Attention, Centred, Signal, Site, States, Strength, measured, norm
from afn_ray.schema import MOST_NEURONS, Series

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative difference of norms that the self-check lets pass, by the dtype of the products: for all
tokens in float32, for nine of ten in half precision, where single ones may be far off and the model
still be wired right.
"""

FILLER = 16
"""Rows behind the sequences of the self-check."""

Norms = npt.NDArray[np.float32]
REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    attention.UnsupportedAttention,
)
"""What a model raises that cannot run the way it was asked to."""


STRENGTH = Strength()


class _Call(NamedTuple):
    """One call of a linear layer, in the order in which they come."""

    block: torch.nn.Module
    name: str  # in its block
    module: torch.nn.Module
    input: torch.Tensor
    width: int  # of its output
    attended: attention.Seen | None  # by the block before this call


class _Place(NamedTuple):
    """Where one block has what signals need."""

    norm: str  # the LayerNorm that makes the block's output; empty where it is not needed
    gram: (
        torch.Tensor | None
    )  # of each head's part of the output projection, for ``attention.value_norms``
    neurons: str  # the layer behind the MLP's neurons
    num_neurons: int


def _follows(call: _Call) -> bool:
    """Whether ``call`` takes what attention gave, as it gave it."""
    return call.attended is not None and torch.equal(
        call.input.flatten(), call.attended.output.flatten()
    )


def _gram(call: _Call) -> torch.Tensor:
    """[heads, size, size] of the output projection that is called."""
    assert call.attended is not None
    weight: torch.Tensor = call.module.weight  # type: ignore[assignment]
    weight = weight if isinstance(call.module, Conv1D) else weight.t()
    parts = weight.detach().float().unflatten(0, (call.attended.query.shape[1], -1))
    gram: torch.Tensor = parts @ parts.transpose(1, 2)
    return gram


class _Enough(Exception):
    """Raised in a hook once the last layer asked for is read: the later blocks never run."""


class Pending:
    """What one batch gave, maybe still on its way from the device."""

    def __init__(self, values: torch.Tensor, layout: Callable[[Norms], Norms]) -> None:
        self._layout = layout
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":  # copied behind the computation; nobody waits for it here
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def result(self) -> Norms:
        """Float32 [n_measured, n_tokens]."""
        if self._event is not None:
            self._event.synchronize()
        return self._layout(self._values.numpy())


class Model:
    """A model on one device that reads chosen layers in one forward pass and stops after the last
    of them.

    Layer k is the output of the k-th block that runs, layer 0 the input of the first. ``dtype`` is
    of the blocks' matrix products; the residual stream, the norms and what is read are float32.
    ``batch_tokens``: the size of most batches, for which the weights are laid out. ``outliers``:
    dimensions that stick out, for each layer, where a signal leaves them out.
    """

    def __init__(
        self,
        files: ModelFiles,
        layers: Sequence[int],
        dtype: str,
        device: str,
        batch_tokens: int,
        outliers: Sequence[Sequence[int]] = (),
    ) -> None:
        self.files = files
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self.layers = tuple(layers)
        self._outliers = {
            k: torch.tensor(dims, device=self.device)
            for k, dims in zip(layers, outliers, strict=False)
        }
        self.causal = False  # set by prepare, as are the next two
        self.packed = (
            False  # whether sequences of a batch lie one behind the other, without padding
        )
        self.why_padded: str | None = None
        self._model: Any = load_weights(files)
        self._parameters = inspect.signature(self._model.forward).parameters
        padding = getattr(self._model.config, "pad_token_id", None) or 0
        self._first_position = padding + 1 if files.model_type in POSITIONS_AFTER_PADDING else 0
        self._stop = True
        self._calls = self._length = 0
        self._windowed = False  # whether attention was told of a sliding window
        self._signals: Sequence[Signal] = (STRENGTH,)
        self._needs: frozenset[str] = frozenset()
        self._places: dict[torch.nn.Module, _Place] = {}
        self._before: torch.Tensor | None = (
            None  # what goes into the block that runs, if it is read
        )
        self._neurons: torch.Tensor | None = None
        self._unscaled: torch.Tensor | None = None
        self._layout: attention.Layout | None = None
        self._watching = False  # whether attention of every block is kept
        self._read: dict[Series, torch.Tensor] = {}
        self._cast: Any = None
        self._blocks = find_blocks(self._model, files)
        for block in self._blocks:
            block.register_forward_pre_hook(self._before_block, with_kwargs=True)
            block.register_forward_hook(self._after_block)
        self._batch_tokens = batch_tokens

    # --- proving ---

    def prepare(self, probes: Sequence[Sequence[int]], needs: frozenset[str] = frozenset()) -> None:
        """Choose how this model runs fastest, and prove that it is still the plain one.

        ``needs``: what signals want beside hidden states, of ``signals.NEEDS``; where it is in each
        block is found.

        ``probes``: a few token sequences of different lengths, each with the tokenizer's template,
        the longest as long as a window where that is affordable. Norms of hooked layers, one text
        at a time and all in one batch, must equal those of the plain model's ``hidden_states[k]``;
        sets ``packed``, ``why_padded``, ``causal``. Raises ``ModelError`` with the difference and
        the tolerance.
        """
        plain = [self._plain_norms(ids) for ids in probes]
        self._model.to(device=self.device)
        self._choose_attention(probes, plain)
        needs -= {"outliers"}  # which are given
        places = self._find_places(max(probes, key=len), needs) if needs else {}
        self._choose_products(probes, plain)
        for block, place in places.items():  # now, for a product may have taken a layer's place
            if place.neurons:
                block.get_submodule(place.neurons).register_forward_pre_hook(self._before_neurons)
            if place.norm:
                block.get_submodule(place.norm).register_forward_pre_hook(self._before_norm)
        self._places = places
        if "norm" in needs:
            self._check_centred(min(probes, key=len))
        self.causal = self._is_causal(
            min((p for p in probes if len(p) > 4), key=len, default=probes[0])
        )

    def _choose_attention(self, probes: Sequence[Sequence[int]], plain: list[list[Norms]]) -> None:
        """Packed, if it equals the plain model, else padded; both with the plain linear layers, in
        float32.
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
            self._check(probes, plain, torch.float32)
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
            self._check(probes, plain, torch.float32)
        except REFUSALS as error:
            raise ModelError(f"{self._name} failed its self-check: {_first_line(error)}") from error

    def _choose_products(self, probes: Sequence[Sequence[int]], plain: list[list[Norms]]) -> None:
        """Fast linear layers where the model lets its own be replaced; for half precision that is a
        condition.
        """
        full = self.dtype == torch.float32
        why = ""
        for wide in (False,) if full else (False, True):
            replaced, self._cast = replace_linear_layers(
                self._blocks, self.dtype, self._batch_tokens, wide=wide
            )
            try:
                self._check(probes, plain, self.dtype)
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
        self, ids: Sequence[int], needs: frozenset[str]
    ) -> dict[torch.nn.Module, _Place]:
        """Where each block has what ``needs`` names, seen in one forward pass of all blocks."""
        if "attention" in needs and not self.packed:
            raise ModelError(
                f"{self._name} gives no attention weights to read: its batches are padded, since {self.why_padded}; "
                "leave the signal attention out"
            )
        calls: list[_Call] = []
        norms: dict[torch.nn.Module, str] = {}
        last: list[tuple[str, torch.Tensor]] = []  # the LayerNorm that ran last
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
                "neurons": [
                    c for c in mine if c.width == self.files.hidden_size and not _follows(c)
                ],
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
            places[block] = _Place(
                norms[block] if "norm" in needs else "", gram, behind, num_neurons
            )
        return places

    def _check_centred(self, ids: Sequence[int]) -> None:
        """What goes into the LayerNorm that ends a block has, centred and without its gain, the
        norm sqrt(hidden).
        """
        got = self.measure(*_joined([ids]), (Centred(),))
        expected = np.full_like(got, self.files.hidden_size**0.5)
        what = "the LayerNorm without gain that ends a block against sqrt(hidden_size)"
        compare_norms(what, got, expected, torch.bfloat16)  # its epsilon takes some of it

    @property
    def num_embeddings(self) -> int:
        """Token ids that the model has a vector for: from 0 on."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def _name(self) -> str:
        return f"{self.files.name} ({self.files.model_type})"

    def _check(
        self, probes: Sequence[Sequence[int]], plain: list[list[Norms]], dtype: torch.dtype
    ) -> None:
        singles = [self.measure(*_joined([ids])) for ids in probes]
        for expected, got in zip(plain, singles, strict=True):
            for at, layer in enumerate(self.layers):
                compare_norms(
                    f"layer {layer} against the plain model", got[at], expected[layer], dtype
                )
        ids, lengths = _joined(probes)
        if self.packed:
            ids = np.append(ids, np.full(FILLER, ids[0]))
        together = self.measure(ids, lengths)
        what = "one packed batch" if self.packed else "one padded batch"
        for got, alone in zip(
            np.split(together, np.cumsum(lengths), axis=1), singles, strict=False
        ):
            compare_norms(f"{what} against single texts", got, alone, dtype)

    def _plain_norms(self, ids: Sequence[int]) -> list[Norms]:
        """What the hooks read of every layer of the plain model, proved to be its
        ``hidden_states``.
        """
        self._stop, self._calls, self._length, self._signals = False, 0, len(ids), (STRENGTH,)
        layers, self.layers = self.layers, tuple(range(self.files.depth + 1))
        try:
            with torch.inference_mode(), _one_thread(torch.device("cpu")):
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
            self._read[Series("strength", layer)][0].numpy()
            for layer in range(self.files.depth + 1)
        ]
        self._read.clear()
        for layer in layers:
            if (
                layer < self.files.depth
            ):  # the last entry of hidden_states may be after a final norm
                what = f"layer {layer} hooked against hidden_states[{layer}]"
                compare_norms(what, hooked[layer], norm(states[layer][0]).numpy(), torch.float32)
        return hooked

    def _is_causal(self, ids: Sequence[int]) -> bool:
        """Whether a token sees only what is to its left: the first outputs do not move when the
        last input does.
        """
        changed = [*ids[:-2], *reversed(ids[-2:])] if ids[-1] != ids[-2] else [*ids[:-1], ids[0]]
        layers, self.layers = self.layers, (max(*self.layers, 1),)
        try:
            # Whole states: norms behind a LayerNorm without a gain are all the same.
            one, other = (self.measure(*_joined([x]), (States(),))[0, :-2] for x in (ids, changed))
        finally:
            self.layers = layers
        return bool(np.allclose(one, other, rtol=1e-6, atol=0))

    @contextmanager
    def watched(self) -> Iterator[Callable[[], float]]:
        """While open, the largest magnitude into or out of any product is kept; the call gives it
        (nan if one was).
        """
        peak = torch.zeros((), device=self.device)

        def look(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            for x in (args[0], output):  # what goes in may be a product of two that were in range
                if x.numel():
                    peak.copy_(torch.maximum(peak, x.detach().abs().amax()))

        modules = [m for block in self._blocks for m in block.modules() if isinstance(m, Product)]
        handles = [m.register_forward_hook(look) for m in modules]
        try:
            yield lambda: float(peak)
        finally:
            for handle in handles:
                handle.remove()

    # --- measuring ---

    def measure(
        self,
        ids: npt.NDArray[np.int64],
        lengths: Sequence[int],
        signals: Sequence[Signal] = (STRENGTH,),
    ) -> Norms:
        """``submit``, and wait for what it gives."""
        return self.submit(ids, lengths, signals).result()

    def submit(
        self,
        ids: npt.NDArray[np.int64],
        lengths: Sequence[int],
        signals: Sequence[Signal] = (STRENGTH,),
    ) -> Pending:
        """``signals`` of every chosen layer for sequences that lie one behind the other in ``ids``.

        ``ids``: int64 [n_tokens], of which those behind ``sum(lengths)`` are filler. The result is
        float32 [n_measured, n_tokens], in the order of ``signals.measured``; at filler it is
        meaningless. On a GPU this returns before the device is done.
        """
        self._signals = signals
        self._needs = frozenset(need for signal in signals for need in signal.needs)
        self._calls = 0
        self._read.clear()
        run = self._run_packed if self.packed else self._run_padded
        try:
            with torch.inference_mode(), _one_thread(self.device):
                layout = run(ids, lengths)
                values = torch.stack([self._read[s] for s in measured(self.layers, signals)])
        finally:  # what a failed pass left behind is not the next one's
            self._read.clear()
            self._before = self._neurons = self._unscaled = self._layout = None
            if self._cast is not None:
                self._cast.clear()
        return Pending(values, layout)

    def _run_packed(
        self, ids: npt.NDArray[np.int64], lengths: Sequence[int]
    ) -> Callable[[Norms], Norms]:
        self._length = len(ids)
        self._layout = layout = attention.Layout(lengths, len(ids), self.device)
        positions = np.full(len(ids), self._first_position, np.int64)
        n = sum(lengths)
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
        positions[:n] += np.arange(n) - starts.astype(np.int64)
        inputs = {
            "input_ids": self._to_device(ids[None]),
            "position_ids": self._to_device(positions[None]),
        }
        with attention.packed(layout):
            self._run(inputs)
        self._windowed |= layout.windowed
        if layout.calls != self._calls:
            raise ModelError(
                f"{self._calls} of its blocks ran, and {layout.calls} times its attention went through the interface"
            )
        return lambda values: values[:, 0]

    def _run_padded(
        self, ids: npt.NDArray[np.int64], lengths: Sequence[int]
    ) -> Callable[[Norms], Norms]:
        longest, n = max(lengths), len(lengths)
        self._length = longest
        mask = np.arange(longest) < np.asarray(lengths)[:, None]
        matrix = np.full((n, longest), ids[0], np.int64)  # any id; the mask must make it irrelevant
        matrix[mask] = ids[: sum(lengths)]
        inputs = {"input_ids": self._to_device(matrix)}
        if not mask.all():  # without padding no mask is needed, and attention without one is faster
            inputs["attention_mask"] = self._to_device(mask.astype(np.int64))
        self._run(inputs)
        return lambda values: values[:, mask]

    def _to_device(self, array: npt.NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return (
            tensor.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else tensor
        )

    def _run(self, inputs: dict[str, torch.Tensor]) -> None:
        try:
            self._model(**inputs)
        except _Enough:
            return
        if self._calls != self.files.depth:
            raise ModelError(
                f"{self._name} ran {self._calls} blocks, its config says {self.files.depth}"
            )

    def _before_block(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self._calls == 0 and 0 in self.layers:
            self._keep(Site(0, hidden))
        is_read = self._calls + 1 in self.layers
        self._before = hidden if is_read else None
        if self._layout is not None:
            self._layout.watched = self._watching or (is_read and "attention" in self._needs)
            self._layout.seen = None

    def _after_block(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._calls += 1
        if self._calls in self.layers:
            hidden = output[0] if isinstance(output, tuple) else output
            if self._neurons is not None:  # some MLPs see all rows of a batch as one sequence
                shape = (*hidden.shape[:-1], self._places[module].num_neurons)
                if self._neurons.numel() != math.prod(shape):
                    raise ModelError(
                        f"{self._name} runs its MLP in pieces, as with chunk_size_feed_forward in its "
                        "config; leave the signal neurons out"
                    )
                self._neurons = self._neurons.reshape(shape)
            self._keep(
                Site(
                    self._calls,
                    hidden,
                    self._before,
                    self._attention(module),
                    self._neurons,
                    self._unscaled,
                )
            )
        self._neurons = self._unscaled = None

    def _before_neurons(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if "neurons" in self._needs and self._calls + 1 in self.layers:
            self._neurons = args[0]

    def _before_norm(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if "norm" in self._needs and self._calls + 1 in self.layers:
            assert isinstance(module, torch.nn.LayerNorm)
            self._unscaled = torch.nn.functional.layer_norm(
                args[0], module.normalized_shape, eps=module.eps
            )

    def _attention(self, block: torch.nn.Module) -> Attention | None:
        if "attention" not in self._needs:
            return None
        gram = self._places[block].gram
        assert gram is not None and self._layout is not None and self._layout.seen is not None
        of_others, own = attention.received(self._layout.seen, self._layout)
        return Attention(
            of_others[:, None],
            own[:, None],
            attention.value_norms(self._layout.seen, gram)[:, None],
        )

    def _keep(self, site: Site) -> None:
        # Some models pad to a multiple of their attention window.
        for name in ("hidden", "before", "neurons", "unscaled"):
            if (states := getattr(site, name)) is not None:
                setattr(site, name, states[:, : self._length])
        site.outliers = self._outliers.get(site.layer)
        for signal in self._signals:
            if site.layer >= signal.first_layer:
                for column, values in zip(signal.columns, signal.measure(site), strict=True):
                    self._read[Series(column, site.layer)] = values
        if self._stop and site.layer == self.layers[-1]:
            raise _Enough


def find_blocks(model: torch.nn.Module, files: ModelFiles) -> list[torch.nn.Module]:
    """The modules whose outputs are the layers; shared ones (ALBERT) once."""
    recorded = getattr(model, "_can_record_outputs", None) or {}
    spec = recorded.get("hidden_states")
    classes = []
    for item in spec if isinstance(spec, list | tuple) else [spec]:
        target = getattr(item, "target_class", item)
        if isinstance(target, type):
            classes.append(target)
    blocks = [m for m in model.modules() if isinstance(m, tuple(classes))] if classes else []
    if not blocks:
        lists = [
            m
            for m in model.modules()
            if isinstance(m, torch.nn.ModuleList) and len(m) == files.depth
        ]
        blocks = list(lists[0]) if lists else []
    if not blocks:
        raise ModelError(
            f"{files.name} ({files.model_type}): its blocks were not found; not supported"
        )
    return blocks


def _masks_only(config: Any, context_tokens: int) -> bool:
    """Whether the config limits what a token sees: some families say so to the mask alone, which is
    not built here.
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
    """Of a mixture, whose neurons are others for each token; 0 for a model that is none."""
    counts = [
        getattr(config.get_text_config(), n, None)
        for n in ("num_experts", "num_local_experts", "moe_num_experts")
    ]
    return next((n for n in counts if isinstance(n, int) and n > 1), 0)


def _joined(sequences: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int64], list[int]]:
    return np.concatenate([np.asarray(s, np.int64) for s in sequences]), [len(s) for s in sequences]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    if isinstance(error, ModelError | attention.UnsupportedAttention):
        return text[0] if text else type(error).__name__
    return f"{type(error).__name__}: {text[0] if text else ''}"


def compare_norms(what: str, got: Norms, expected: Norms, dtype: torch.dtype) -> None:
    """Raises ``ModelError`` where ``got`` differs from ``expected`` by more than products of
    ``dtype`` explain.
    """
    tolerance = TOLERANCE[dtype]
    differences = np.abs(got - expected) / np.maximum(np.abs(expected), 1e-30)
    difference = float(np.quantile(differences, 1.0 if dtype == torch.float32 else 0.9))
    if not difference <= tolerance:
        raise ModelError(
            f"self-check failed: {what} differs by {difference:.2e} relative, tolerance {tolerance:.0e}"
        )


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """One thread for the product: bits differ between numbers of threads, and a worker has one
    core.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
