"""A loaded, self-checked model that reads chosen layers in one forward pass."""

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
"""Largest relative difference of norms that the self-check accepts, by the dtype of the products.

In float32 it holds for all tokens. In half precision it holds for nine tokens of ten: single tokens
may differ much in a model that is wired correctly.
"""

FILLER = 16
"""Number of filler rows after the sequences in the self-check."""

Norms = npt.NDArray[np.float32]
"""Norms of tokens, float32."""
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

STRENGTH = Strength()


class _Call(NamedTuple):
    """One call of a linear layer during the search for places."""

    block: torch.nn.Module
    name: str  # of the layer in its block
    module: torch.nn.Module
    input: torch.Tensor
    width: int  # size of the output's last dimension
    attended: attention.Seen | None  # the block's attention call before this one


class _Place(NamedTuple):
    """Places in one block from which signals read."""

    norm: str  # LayerNorm that makes the block's output; empty if not needed
    gram: torch.Tensor | None  # [heads, size, size] for ``attention.value_norms``
    neurons: str  # layer whose input is the MLP's neurons; empty if not needed
    num_neurons: int  # 0 if not needed


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


class _Enough(Exception):
    """Raised in a hook after the last requested layer, so that later blocks do not run."""


class Pending:
    """The values of one batch, perhaps still in transfer from the device."""

    def __init__(self, values: torch.Tensor, layout: Callable[[Norms], Norms]) -> None:
        self._layout = layout
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":  # copy after the computation, without waiting here
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values

    def result(self) -> Norms:
        """Wait for the device; return float32 [n_measured, n_tokens]."""
        if self._event is not None:
            self._event.synchronize()
        return self._layout(self._values.numpy())


class Model:
    """A model on one device that reads chosen layers in one forward pass.

    The pass stops after the last chosen layer. Layer k is the output of the k-th block that runs;
    layer 0 is the input of the first block. ``dtype`` is the dtype of the blocks' matrix products.
    The residual stream, the norms and all values read are float32. ``batch_tokens`` is the size of
    most batches, for which the memory layout of the weights is chosen. ``outliers`` lists the
    outlier dimensions of each layer, for signals that leave them out.
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
        # Set by ``prepare``, as are the next two.
        self.causal = False
        self.packed = False  # whether a batch is one packed sequence without padding
        self.why_padded: str | None = None
        self._model: Any = load_weights(files)
        self._parameters = inspect.signature(self._model.forward).parameters
        padding = getattr(self._model.config, "pad_token_id", None) or 0
        self._first_position = padding + 1 if files.model_type in POSITIONS_AFTER_PADDING else 0
        self._stop = True
        self._calls = self._length = 0
        self._windowed = False  # whether attention received a sliding window
        self._signals: Sequence[Signal] = (STRENGTH,)
        self._needs: frozenset[str] = frozenset()
        self._places: dict[torch.nn.Module, _Place] = {}
        self._before: torch.Tensor | None = None  # input of the running block, if it is read
        self._neurons: torch.Tensor | None = None
        self._unscaled: torch.Tensor | None = None
        self._layout: attention.Layout | None = None
        self._watching = False  # whether to keep the attention call of every block
        self._read: dict[Series, torch.Tensor] = {}
        self._cast: Any = None
        self._blocks = find_blocks(self._model, files)
        for block in self._blocks:
            block.register_forward_pre_hook(self._before_block, with_kwargs=True)
            block.register_forward_hook(self._after_block)
        self._batch_tokens = batch_tokens

    # --- self-check ---

    def prepare(self, probes: Sequence[Sequence[int]], needs: frozenset[str] = frozenset()) -> None:
        """Choose the fastest way to run this model and check it against the plain model.

        ``probes`` are a few token sequences of different lengths, each with the tokenizer's
        template. The longest has the length of a window if that is affordable. The norms of the
        hooked layers must equal those of the plain model's ``hidden_states[k]``, both one text at
        a time and all texts in one batch. ``needs`` are the inputs that signals need beside hidden
        states, from ``signals.NEEDS``; this method finds their place in each block.

        Sets ``packed``, ``why_padded`` and ``causal``. Raises ``ModelError`` with the difference
        and the tolerance.
        """
        plain = [self._plain_norms(ids) for ids in probes]
        self._model.to(device=self.device)
        self._choose_attention(probes, plain)
        needs -= {"outliers"}  # passed to the constructor
        places = self._find_places(max(probes, key=len), needs) if needs else {}
        self._choose_products(probes, plain)
        for block, place in places.items():  # only now: a product may have replaced a layer
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
        """Check the ``Centred`` signal: its values must be sqrt(hidden_size).

        That is the norm of the output of a LayerNorm without gain and bias. Raises ``ModelError``.
        """
        got = self.measure(*_joined([ids]), (Centred(),))
        expected = np.full_like(got, self.files.hidden_size**0.5)
        what = "the LayerNorm without gain that ends a block against sqrt(hidden_size)"
        # The LayerNorm's epsilon makes the norm a little smaller, so the tolerance is wide.
        compare_norms(what, got, expected, torch.bfloat16)

    @property
    def num_embeddings(self) -> int:
        """Number of token ids that have an embedding; the ids count from 0."""
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def _name(self) -> str:
        return f"{self.files.name} ({self.files.model_type})"

    def _check(
        self, probes: Sequence[Sequence[int]], plain: list[list[Norms]], dtype: torch.dtype
    ) -> None:
        """Compare single texts with the plain model, and one batch of all texts with single texts.

        Raises ``ModelError`` if they differ by more than the tolerance of ``dtype``.
        """
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
        """Norms [n_tokens] of every layer of the plain model, as the hooks read them.

        Raises ``ModelError`` if they differ from the norms of the model's ``hidden_states``.
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
            # The last entry of hidden_states may be after a final norm.
            if layer < self.files.depth:
                what = f"layer {layer} hooked against hidden_states[{layer}]"
                compare_norms(what, hooked[layer], norm(states[layer][0]).numpy(), torch.float32)
        return hooked

    def _is_causal(self, ids: Sequence[int]) -> bool:
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

    @contextmanager
    def watched(self) -> Iterator[Callable[[], float]]:
        """Record the largest magnitude of any product's input or output in this context.

        Yields a function that returns it; nan if any value was nan.
        """
        peak = torch.zeros((), device=self.device)

        def look(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            for x in (args[0], output):  # an input may be the product of two values in range
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
        """Like ``submit``, but wait for the values: float32 [n_measured, n_tokens]."""
        return self.submit(ids, lengths, signals).result()

    def submit(
        self,
        ids: npt.NDArray[np.int64],
        lengths: Sequence[int],
        signals: Sequence[Signal] = (STRENGTH,),
    ) -> Pending:
        """Measure ``signals`` at every chosen layer for the sequences in ``ids``.

        ``ids`` is int64 [n_tokens]: sequences of the given ``lengths`` one after another, then
        filler. The result is float32 [n_measured, n_tokens] in the order of ``signals.measured``;
        the values at filler have no meaning. On a GPU this method returns before the device is
        done.
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
        finally:  # a failed pass must not leave state to the next one
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
        matrix = np.full((n, longest), ids[0], np.int64)  # pad with any id: the mask excludes it
        matrix[mask] = ids[: sum(lengths)]
        inputs = {"input_ids": self._to_device(matrix)}
        if not mask.all():  # without padding, attention needs no mask and is faster
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
            if self._neurons is not None:  # some MLPs flatten the rows of a batch
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
        # Some models pad their states to a multiple of the attention window.
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
    """The modules whose outputs are the layers; a shared module (ALBERT) occurs once.

    Raises ``ModelError`` if there are none.
    """
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


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Limit torch to one CPU thread in this context.

    The bits of products depend on the number of threads, and a worker has one core.
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
