"""The sum, LayerNorm and cast behind a product of a block, as one kernel where that is right.

BERT ends both halves of a block with a product, its sum with the residual stream and a LayerNorm;
the next products then cast the result. torch has one kernel for each of the three, which move 24
bytes a number through the GPU's memory. One kernel moves 12. It normalises each row alone, so the
result of a token does not depend on its batch.

No clock has a part in the choice: all workers of a run on the same machines must choose the same.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from afn_ray import logs
from afn_ray.model import memory
from afn_ray.model.engine import Model
from afn_ray.model.linear import Cast, Product

FUSED, EAGER = "fused", "eager"
"""Names of the ways in which a model on a GPU adds and normalises, as commits record them."""

LEAST_CAPABILITY = (8, 0)
"""Lowest compute capability of a GPU for which triton makes kernels."""

NARROWEST, WIDEST = 256, 16_384
"""Smallest and largest number of columns of a row for which the kernel is used.

In narrower rows, memory is no bottleneck: at 256 columns, a batch of 32,768 tokens is 8.4 M
numbers, whose 12 bytes each take an H200 (4.8 TB/s) 21 us, about the time in which Python launches
a kernel of Triton. One program of the kernel holds a row of the largest size in registers.
"""

FAULT = "the fused kernel"
"""Beginning of the reasons for which a kernel that should work is left out."""

PARITY = 1e-5
"""Largest difference from torch's kernels, as a share of the largest magnitude in the row.

Both compute in float32, in another order.
"""

WARM_UP, REPEAT, QUEUED = 2, 7, 20
"""Rounds of the timed comparison that do not count, rounds that do, and calls in each.

A round has several calls, as in a forward pass: the GPU works while Python prepares the next call.
"""

Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.nn.LayerNorm, torch.dtype],
    tuple[torch.Tensor, torch.Tensor],
]
"""Function of a product, the residual stream, a LayerNorm and a dtype.

It returns the norm of the sum in float32, and the same in the dtype.
"""

Replaced = list[tuple[torch.nn.Module, str, torch.nn.Module]]
"""Replaced modules: the parent, the name in the parent, and the original module."""

_log = logging.getLogger(__name__)


class Unfused(Exception):
    """Reason why a model adds and normalises by torch's kernels."""


class Times(NamedTuple):
    """Median durations of one call, in milliseconds."""

    eager_ms: float
    fused_ms: float


def eager(
    added: torch.Tensor, residual: torch.Tensor, norm: torch.nn.LayerNorm, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: torch's kernels, as the block and the next products call them."""
    full: torch.Tensor = norm(added + residual)
    return full, full.to(dtype)


class Tail(torch.nn.Module):
    """A module like ``BertOutput`` that runs ``kernel``, and fills ``cast`` for the next products.

    Its layers keep their names.
    """

    def __init__(self, plain: torch.nn.Module, kernel: Kernel, cast: Cast) -> None:
        super().__init__()
        self.dense: torch.nn.Module = plain.get_submodule("dense")
        self.LayerNorm = _norm_of(plain)
        self.kernel, self._cast = kernel, cast

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        product = self.dense(hidden_states)
        full, low = self.kernel(product, input_tensor, self.LayerNorm, self._cast.dtype)
        self._cast.keep(full, low)
        return full


def choose(model: Model, check: Callable[[], None], needs: frozenset[str]) -> None:
    """Fuse the tails of ``model`` if it is on a GPU and that is right; log the choice.

    ``check`` is the model's self-check, which measures the probes and raises ``ModelError``.
    ``needs`` are the inputs of the signals. Sets the model's ``norm`` and ``why_eager``. Errors of
    memory and of the device are raised.
    """
    if model.device.type != "cuda":
        return
    try:
        _fuse(model, check, needs)
        model.norm, model.why_eager = FUSED, ""
    except Unfused as reason:
        model.norm = EAGER
        model.why_eager = str(reason)
    why = model.why_eager
    logs.report(
        _log,
        "norm_chosen",
        f"{model.name} adds and normalises {model.norm}" + (f", since {why}" if why else ""),
        level=logging.WARNING if why.startswith(FAULT) else logging.INFO,
        norm=model.norm,
        why=why,
    )


def time_norms(model: Model) -> Times | None:
    """Durations of one fused tail of ``model`` on a batch, and of torch's
    kernels; None for none.
    """
    tail = next((part for part in model.module.modules() if isinstance(part, Tail)), None)
    if tail is None:
        return None
    with torch.inference_mode():
        return time_both(tail.kernel, tail.LayerNorm, model.dtype, model.batch_tokens)


def find_kernel() -> Kernel:
    """The fused kernel. Raises ``Unfused`` where this machine cannot compile it."""
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < LEAST_CAPABILITY:
        raise Unfused(f"this GPU has compute capability {major}.{minor}, expected 8.0 or higher")
    if importlib.util.find_spec("triton") is None:
        raise Unfused("triton is not installed")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise Unfused("triton needs a C compiler, and there is no gcc or clang")
    from afn_ray.model.fused_kernel import add_norm_cast

    return add_norm_cast


def find_tails(blocks: Iterable[torch.nn.Module]) -> Replaced:
    """Modules in ``blocks`` that look like ``BertOutput``: parent, name in it, module."""
    found: Replaced = []
    for block in blocks:
        for parent in block.modules():
            for name, child in parent.named_children():
                if _is_tail(child):
                    found.append((parent, name, child))
    return found


def time_both(kernel: Kernel, norm: torch.nn.LayerNorm, dtype: torch.dtype, rows: int) -> Times:
    """Durations of torch's kernels and of ``kernel``, in turns, on ``rows`` rows of the GPU."""
    shape = (1, rows, *norm.normalized_shape)
    added = torch.zeros(shape, dtype=dtype, device=norm.weight.device)
    residual = torch.zeros(shape, device=norm.weight.device)
    found: dict[Kernel, list[float]] = {eager: [], kernel: []}
    for turn in range(-WARM_UP, REPEAT):
        for way, times in found.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(QUEUED):
                way(added, residual, norm, dtype)
            end.record()
            end.synchronize()
            if turn >= 0:
                times.append(begin.elapsed_time(end) / QUEUED)
    return Times(*(statistics.median(times) for times in found.values()))


def _norm_of(tail: torch.nn.Module) -> torch.nn.LayerNorm:
    norm = tail.get_submodule("LayerNorm")
    assert isinstance(norm, torch.nn.LayerNorm)
    return norm


def _is_tail(module: torch.nn.Module) -> bool:
    """True if ``module`` has the layers of ``BertOutput``; ``_compared`` checks what it does."""
    layers = dict(module.named_children())
    norm = layers.get("LayerNorm")
    return (
        layers.keys() == {"dense", "LayerNorm", "dropout"}
        and isinstance(layers["dense"], Product)
        and isinstance(norm, torch.nn.LayerNorm)
        and norm.weight is not None
        and norm.bias is not None
        and len(norm.normalized_shape) == 1
        and NARROWEST <= norm.normalized_shape[0] <= WIDEST
    )


def _fuse(model: Model, check: Callable[[], None], needs: frozenset[str]) -> None:
    """Replace the tails of ``model``. Raises ``Unfused``, with the model as it was."""
    if model.dtype == torch.float32:
        raise Unfused("its products are in float32")
    if "norm" in needs:
        raise Unfused("the signal centred reads what a norm normalises")
    if not (tails := find_tails(model.blocks)):
        raise Unfused(
            "its blocks do not add and normalise as BERT's do, in rows of "
            f"{NARROWEST} to {WIDEST:,} numbers"
        )
    assert model.cast is not None
    try:
        kernel = find_kernel()
        tails = _compared(tails, kernel, model.cast, check)
        for parent, name, plain in tails:
            setattr(parent, name, Tail(plain, kernel, model.cast))
        check()
    except Exception as error:  # compilers fail in many ways, and the model runs without
        for parent, name, plain in tails:
            setattr(parent, name, plain)
        if isinstance(error, Unfused) or memory.is_out_of_memory(error):
            raise
        torch.cuda.synchronize()  # raises where the error has made the GPU unusable
        first = (str(error).strip().splitlines() or [""])[0]
        raise Unfused(f"{FAULT} failed: {type(error).__name__}: {first}") from error


def _compared(tails: Replaced, kernel: Kernel, cast: Cast, check: Callable[[], None]) -> Replaced:
    """The ``tails`` that ran during ``check``, each compared with its fused form on its inputs.

    Raises ``Unfused`` if a value differs by more than ``PARITY``, or a cast at all.
    """
    worst: list[torch.Tensor] = []  # one value for each call
    ran: set[torch.nn.Module] = set()

    def compare(
        plain: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> None:
        ran.add(plain)
        full = Tail(plain, kernel, cast)(*args, **kwargs)
        low = cast(full)
        apart = (full - output).abs().amax(-1) / output.abs().amax(-1)
        differs = (low != full.to(low.dtype)).any()
        worst.append(apart.amax().masked_fill(differs, torch.inf))

    handles = [plain.register_forward_hook(compare, with_kwargs=True) for _, _, plain in tails]
    try:
        check()
    finally:
        for handle in handles:
            handle.remove()
    if not worst:
        raise Unfused("none of its blocks runs")
    difference = float(torch.stack(worst).amax())
    if not difference <= PARITY:
        raise Unfused(f"{FAULT} differs by {difference:.1e} from torch's, more than {PARITY:.0e}")
    return [tail for tail in tails if tail[2] in ran]
