"""Load a model's weights, run batches through it, and read chosen layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from afn_ray.errors import ModelError
from afn_ray.model import attention, memory
from afn_ray.model.device import check_device, describe_device, pin_rounding
from afn_ray.model.files import POSITIONS_AFTER_PADDING, ModelFiles
from afn_ray.model.lend import Lender, copy_out, move_rest, move_weights
from afn_ray.model.linear import Cast, Product, count_weights, experts_in, make_fast
from afn_ray.model.load import list_of, load_blocks, quiet
from afn_ray.model.pending import Norms, Pending, ToTokens
from afn_ray.model.signals import Attention, Signal, Site, Strength, measured, numbered
from afn_ray.model.type_sums import Chosen, DeviceRows
from afn_ray.schema import Series

STRENGTH = Strength()


def name_of(dtype: torch.dtype) -> str:
    """Name of ``dtype`` as users give it, for example "float16"."""
    return str(dtype).removeprefix("torch.")


class Place(NamedTuple):
    """Places in one block from which signals read."""

    norm: str  # LayerNorm that makes the block's output; empty if not needed
    gram: torch.Tensor | None  # [heads, size, size] for ``attention.value_norms``
    neurons: str  # layer whose input is the MLP's neurons; empty if not needed
    num_neurons: int  # 0 if not needed


@dataclass(slots=True)
class Pass:
    """One forward pass: what it reads, how far it is, and the values read so far."""

    layers: Sequence[int] = ()  # ascending
    signals: Sequence[Signal] = ()
    needs: frozenset[str] = frozenset()  # of the signals
    to_end: bool = False  # whether blocks after the last layer run, too
    length: int = 0  # tokens in a row of the batch
    layout: attention.Layout | None = None  # of a packed batch
    calls: int = 0  # blocks that have run
    # In the running block: its input, and two places inside it, if they are read.
    before: torch.Tensor | None = None
    neurons: torch.Tensor | None = None
    unscaled: torch.Tensor | None = None
    read: dict[Series, torch.Tensor] = field(default_factory=dict)
    chosen: DeviceRows | None = None  # tokens whose states are added; None: no states are
    totals: list[torch.Tensor] = field(default_factory=list)  # of each layer so far

    def forget(self) -> None:
        """Drop all tensors: a traceback may hold this pass while its batch is tried again."""
        self.read.clear()
        self.totals.clear()
        self.before = self.neurons = self.unscaled = self.layout = self.chosen = None


class _Enough(Exception):
    """Raised in a hook after the last requested layer, so that later blocks do not run."""


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
        check_device(device)
        pin_rounding(device)
        self.files = files
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        self.layers = tuple(layers)
        self.batch_tokens = batch_tokens
        self._outliers = {
            k: torch.tensor(dims, device=self.device)
            for k, dims in zip(layers, outliers, strict=False)
        }
        self._means: dict[int, torch.Tensor] = {}  # float32 [hidden_size] each
        # Set by ``prove.prepare``, as are the next eleven.
        self.causal = False
        self.has_final_norm = False  # whether a norm follows the last block
        self.packed = False  # whether a batch is one packed sequence without padding
        self.why_padded: str | None = None
        self.flash = True  # whether attention may use flash attention, where the device has it
        self.attention = ""  # how it attends, from the names in ``attention``; "+" joins several
        self.why_slow = ""  # why it is slower than the device could be; empty if it is not
        self.cast: Cast | None = None  # that the fast products share
        # How it adds and normalises, from the names in ``fused``, and why not fused. Empty on a
        # CPU.
        self.norm = self.why_eager = ""
        self.experts = self.dtype  # dtype of the experts' products in a mixture
        self.kernels: set[str] = set()  # of attention that packed batches have used
        self.windowed = False  # whether attention has received a sliding window
        self.places: dict[torch.nn.Module, Place] = {}
        self._pass = Pass()
        self.load()
        padding = getattr(self.module.config, "pad_token_id", None) or 0
        self._first_position = padding + 1 if files.model_type in POSITIONS_AFTER_PADDING else 0

    def load(self) -> None:
        """Load the blocks up to the last chosen layer, and one more, as the files have them.

        The output of the last block may reach the plain model's ``hidden_states`` only after a
        final norm, so the self-check needs one more. Until ``build``, a block has float32 weights
        on the device only while it runs.
        """
        with memory.needed(self.name, torch.device("cpu"), lambda: self.files.weights_bytes):
            loaded = load_blocks(self.files, self._num_used + 1)
        self.module, self.blocks, self.depth, self._stored = loaded
        if self.device.type == "cuda":
            # The text model of a larger one has its own flag. A cache makes its attention float32.
            self.module.config.get_text_config().use_cache = False
        for block in self.blocks:
            block.register_forward_pre_hook(self._before_block, with_kwargs=True)
            block.register_forward_hook(self._after_block)
        self._lender = Lender(self.blocks, self.device, self._stored)
        self._sizes = count_weights(self.module, self.blocks, self._num_used)

    def build(self, *, fast: bool = True, experts: torch.dtype | None = None) -> None:
        """Give the blocks the weights with which they run from now on, one block after another.

        With ``fast``, linear layers become products in the model's dtype, and experts multiply in
        the dtype ``experts``, by default the model's. Otherwise they stay as they are, in float32.
        No weight is in a file afterwards, so files that change during a run change nothing.
        """
        self._lender.close()
        self.cast = Cast(self.dtype) if fast else None
        self.experts = (experts or self.dtype) if fast else torch.float32
        for block in self.blocks:
            stored = list(block.parameters())
            if self.cast is None:
                move_weights(block, self.device)
            else:
                make_fast(block, self.cast, self.batch_tokens, self.experts, self.device)
            self._stored.release(stored)
            del stored
            memory.trim_memory()
        copy_out(self.module, self._stored)
        self._stored.close()

    @property
    def _num_used(self) -> int:
        """Number of blocks up to the last chosen layer; at least 1."""
        return max(*self.layers, 1)

    @property
    def num_embeddings(self) -> int:
        """Number of token ids that have an embedding; the ids count from 0."""
        return int(self.module.get_input_embeddings().weight.shape[0])

    @property
    def num_bytes(self) -> int:
        """Size of the weights that run: those of products in their dtypes, others in float32."""
        products, experts, others = self._sizes
        total: int = products * self.dtype.itemsize + experts * self.experts.itemsize
        return total + others * torch.float32.itemsize

    @property
    def name(self) -> str:
        """Name and type of the model, for messages."""
        return f"{self.files.name} ({self.files.model_type})"

    @property
    def maker(self) -> dict[str, str]:
        """Entries of a commit on how this model computes: attention, dtypes, norms and device.

        The reasons of attention that is not the fastest and of norms that are not fused are
        included.
        """
        made_by = {"attention": self.attention, "dtype": name_of(self.dtype)}
        if why := self.why_slow or self.why_padded:
            made_by["why"] = why
        if self.why_eager:
            made_by["why_eager"] = self.why_eager
        if self.is_mixture:
            made_by["experts"] = name_of(self.experts)
        if self.norm:
            made_by["norm"] = self.norm
        made_by["final_norm"] = "left out" if self.has_final_norm else "none"
        return made_by | describe_device(str(self.device))

    @property
    def is_mixture(self) -> bool:
        """True if blocks have experts whose products are no linear layers."""
        return self._sizes.experts > 0

    @contextmanager
    def watched(self) -> Iterator[Callable[[], float]]:
        """Record the largest magnitude of any product's input or output in this context.

        Experts count as one product. Yields a function that returns the magnitude; nan if any
        value was nan.
        """
        peak = torch.zeros((), device=self.device)

        def look(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            for x in (args[0], output):  # an input may be the product of two values in range
                if x.numel():
                    peak.copy_(torch.maximum(peak, x.detach().abs().amax()))

        handles = []
        for block in self.blocks:
            products = [m for m in block.modules() if isinstance(m, Product)]
            for module in (*products, *experts_in(block)):
                handles.append(module.register_forward_hook(look))
        try:
            yield lambda: float(peak)
        finally:
            for handle in handles:
                handle.remove()

    def drop_unused_blocks(self) -> None:
        """Free the blocks after the last chosen layer, which never run again.

        One block is left where the embeddings alone are measured. Blocks that share one module
        stay.
        """
        found = list_of(self.module, self.blocks)
        if found is not None and len(self.blocks) == self.depth:
            del found[self._num_used :]
            self.blocks = self.blocks[: self._num_used]

    def move_rest(self) -> None:
        """Move everything but the weights of the blocks to the device."""
        if self.device.type != "cpu":
            move_rest(self.module, self.blocks, self.device)

    def subtract(self, means: Sequence[Norms]) -> None:
        """Give signals that need it the mean state of each layer, float32 [hidden_size].

        Raises ``ModelError`` unless there is one for each chosen layer.
        """
        if len(means) != len(self.layers):
            raise ModelError(f"{len(means)} mean states, expected one for each of {self.layers}")
        for layer, mean in zip(self.layers, means, strict=True):
            self._means[layer] = torch.from_numpy(mean).to(self.device)

    def attend_by(self, name: str) -> None:
        """Use the attention function ``name`` of transformers' registry from now on."""
        with quiet():
            self.module.set_attn_implementation(name)

    def read_from(self, places: Sequence[Place]) -> None:
        """Read what signals need beside hidden states from these ``places``, one for each block."""
        for block, place in zip(self.blocks, places, strict=False):
            if place.neurons:
                block.get_submodule(place.neurons).register_forward_pre_hook(self._before_neurons)
            if place.norm:
                block.get_submodule(place.norm).register_forward_pre_hook(self._before_norm)
            self.places[block] = place

    def run_plain(self, ids: Sequence[int]) -> tuple[Pass, Sequence[torch.Tensor] | None]:
        """Run all loaded blocks over one text, in float32, as transformers runs them.

        Returns the finished pass, which read the strength at every layer, and the model's own
        ``hidden_states``.
        """
        layers = range(self.depth + 1)
        self._pass = this = Pass(layers, (STRENGTH,), to_end=True, length=len(ids))
        with torch.inference_mode(), one_thread(self.device):
            states = self.module(
                input_ids=torch.tensor([list(ids)], device=self.device), output_hidden_states=True
            ).hidden_states
        return this, states

    def measure(
        self,
        ids: npt.NDArray[np.int64],
        lengths: Sequence[int],
        signals: Sequence[Signal] = (STRENGTH,),
        layers: Sequence[int] | None = None,
    ) -> Norms:
        """Like ``submit``, but wait for the values: float32 [n_measured, n_tokens]."""
        return self.submit(ids, lengths, signals, layers).result().values

    def submit(
        self,
        ids: npt.NDArray[np.int64],
        lengths: Sequence[int],
        signals: Sequence[Signal] = (STRENGTH,),
        layers: Sequence[int] | None = None,
        chosen: Chosen | None = None,
    ) -> Pending:
        """Measure ``signals`` at ``layers`` (the chosen ones by default) for sequences in ``ids``.

        ``ids`` is int64 [n_tokens]: sequences of the given ``lengths`` one after another, then
        filler. ``layers`` end at the last chosen one. The values at filler have no meaning. The
        states of ``chosen`` tokens are added up at each layer. On a GPU this method returns before
        the device is done.
        """
        layers = self.layers if layers is None else layers
        needs = frozenset(need for signal in signals for need in signal.needs)
        self._pass = this = Pass(layers, signals, needs)
        run = self._run_packed if self.packed else self._run_padded
        try:
            with torch.inference_mode(), one_thread(self.device):
                if chosen is not None:
                    this.chosen = self._on_device(chosen, ids, lengths)
                layout = run(ids, lengths)
                values = torch.stack([this.read[s] for s in measured(layers, signals)])
                found = [this.read[s] for s in numbered(layers, signals)]
                numbers = torch.stack(found) if found else None
                sums = None if chosen is None else (chosen, torch.stack(this.totals))
        finally:
            this.forget()
            if self.cast is not None:
                self.cast.clear()
        return Pending(values, numbers, layout, sums)

    def _on_device(
        self, chosen: Chosen, ids: npt.NDArray[np.int64], lengths: Sequence[int]
    ) -> DeviceRows:
        """``chosen`` tokens of ``ids``, with their rows in the batch as the blocks see it."""
        rows = chosen.rows
        if not self.packed:
            rows = np.flatnonzero(_mask(lengths))[rows]
        return DeviceRows(self._to_device(rows), self._to_device(chosen.slot_of), len(chosen.slots))

    def _run_packed(self, ids: npt.NDArray[np.int64], lengths: Sequence[int]) -> ToTokens:
        this = self._pass
        this.length = len(ids)
        this.layout = layout = attention.Layout(lengths, len(ids), self.device, flash=self.flash)
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
        self.windowed |= layout.windowed
        self.kernels |= layout.kernels
        if layout.calls != this.calls:
            raise ModelError(
                f"{this.calls} of its blocks ran, and {layout.calls} times its attention went "
                "through the interface"
            )
        return lambda values: values[:, 0]

    def _run_padded(self, ids: npt.NDArray[np.int64], lengths: Sequence[int]) -> ToTokens:
        longest, n = max(lengths), len(lengths)
        self._pass.length = longest
        mask = _mask(lengths)
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
            self.module(**inputs)
        except _Enough:
            return
        if self._pass.calls != self.files.depth:
            raise ModelError(
                f"{self.name} ran {self._pass.calls} blocks, its config says {self.files.depth}"
            )

    def _before_block(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        this = self._pass
        hidden = args[0] if args else kwargs["hidden_states"]
        if this.calls == 0 and 0 in this.layers:
            self._keep(Site(0, hidden))
        is_read = this.calls + 1 in this.layers
        this.before = hidden if is_read else None
        if this.layout is not None:
            this.layout.watched = is_read and "attention" in this.needs
            this.layout.seen = None

    def _after_block(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        this = self._pass
        this.calls += 1
        if this.calls in this.layers:
            hidden = output[0] if isinstance(output, tuple) else output
            if this.neurons is not None:  # some MLPs flatten the rows of a batch
                shape = (*hidden.shape[:-1], self.places[module].num_neurons)
                if this.neurons.numel() != math.prod(shape):
                    raise ModelError(
                        f"{self.name} runs its MLP in pieces, as with chunk_size_feed_forward in "
                        "its config; leave the signal neurons out"
                    )
                this.neurons = this.neurons.reshape(shape)
            self._keep(
                Site(
                    this.calls,
                    hidden,
                    this.before,
                    self._attention(module),
                    this.neurons,
                    this.unscaled,
                )
            )
        this.neurons = this.unscaled = None

    def _before_neurons(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        this = self._pass
        if "neurons" in this.needs and this.calls + 1 in this.layers:
            this.neurons = args[0]

    def _before_norm(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        this = self._pass
        if "norm" in this.needs and this.calls + 1 in this.layers:
            assert isinstance(module, torch.nn.LayerNorm)
            this.unscaled = torch.nn.functional.layer_norm(
                args[0], module.normalized_shape, eps=module.eps
            )

    def _attention(self, block: torch.nn.Module) -> Attention | None:
        if "attention" not in self._pass.needs:
            return None
        gram, layout = self.places[block].gram, self._pass.layout
        assert gram is not None and layout is not None and layout.seen is not None
        of_others, own = attention.received(layout.seen, layout)
        return Attention(
            of_others[:, None],
            own[:, None],
            attention.value_norms(layout.seen, gram)[:, None],
        )

    def _keep(self, site: Site) -> None:
        this = self._pass
        # Some models pad their states to a multiple of the attention window.
        for name in ("hidden", "before", "neurons", "unscaled"):
            if (states := getattr(site, name)) is not None:
                setattr(site, name, states[:, : this.length])
        site.outliers = self._outliers.get(site.layer)
        site.mean = self._means.get(site.layer)
        for signal in this.signals:
            if site.layer >= signal.first_layer:
                columns = (*signal.columns, *signal.number_columns)
                for column, values in zip(columns, signal.measure(site), strict=True):
                    this.read[Series(column, site.layer)] = values
        if this.chosen is not None:
            this.totals.append(this.chosen.add(site.hidden))
        if not this.to_end and site.layer == this.layers[-1]:
            raise _Enough


def _mask(lengths: Sequence[int]) -> npt.NDArray[np.bool_]:
    """True if each place of a padded batch has a token, [n_sequences, longest]."""
    mask: npt.NDArray[np.bool_] = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    return mask


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
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
