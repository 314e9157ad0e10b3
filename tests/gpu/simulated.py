"""A simulated CUDA device: tensors that say ``cuda:0`` over memory of the CPU.

The CPU computes the values. What a GPU would be asked for is logged: kernels, copies, and what the
host waits for. A tensor on the wrong device, a shape that flash attention refuses and a dtype that
a CUDA kernel does not take raise the errors that torch raises on a GPU. The bytes of the tensors
that live on the device are counted. What a copy to pinned memory brings is there once the host has
waited for an event that was recorded after it, or for the device. A launch takes a millisecond,
whatever it computes. torch's grouped products of mixtures run as on the CPU.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from afn_ray.model import fused

DEVICE = torch.device("cuda", 0)
CPU = torch.device("cpu")
META = torch.device("meta")
HALF = (torch.float16, torch.bfloat16)
TYPE_NAMES = {torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float32: "Float"}
"""Names of dtypes in torch's error messages."""
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh",
             "_reshape_alias", "_unsafe_view"}  # fmt: skip
"""Operators that launch nothing on a GPU, apart from views."""
WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim",
         "_unique2", "unique_consecutive", "bincount"}  # fmt: skip
"""Operators whose result the host needs, so that it waits for the device."""
FACTORIES = {torch.arange, torch.empty, torch.full, torch.ones, torch.tensor, torch.zeros}
MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU."""

    name: str
    capability: tuple[int, int]
    total_bytes: int


H200 = Gpu("NVIDIA H200", (9, 0), 139 << 30)
T4 = Gpu("Tesla T4", (7, 5), 15 << 30)


class Memory:
    """The tensors that live on the device, counted by the memory that they share."""

    def __init__(self) -> None:
        self._held: dict[int, list[int]] = {}  # address -> number of tensors, bytes
        self.live_bytes = 0
        self.peak_bytes = 0

    def add(self, address: int, num_bytes: int) -> None:
        held = self._held.setdefault(address, [0, num_bytes])
        held[0] += 1
        if held[0] == 1:
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def remove(self, address: int) -> None:
        held = self._held[address]
        held[0] -= 1
        if held[0] == 0:
            self.live_bytes -= held[1]
            del self._held[address]


class _Share:
    """One tensor's share of the device's memory; ends with the tensor."""

    def __init__(self, memory: Memory, inner: torch.Tensor) -> None:
        storage = inner.untyped_storage()
        self._memory, self._address = memory, storage.data_ptr()
        memory.add(self._address, storage.nbytes())

    def __del__(self) -> None:
        self._memory.remove(self._address)


class Arrivals:
    """Copies to pinned memory of the host, which holds poison until they have arrived."""

    def __init__(self) -> None:
        self.begun = 0
        self._missing: list[tuple[torch.Tensor, torch.Tensor]] = []  # the last ones begun

    def begin(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Begin the copy of ``values``, as they are now, to ``target``."""
        target.fill_(torch.nan if target.is_floating_point() else torch.iinfo(target.dtype).min)
        self._missing.append((target, values.clone()))
        self.begun += 1

    def finish(self, number: int) -> None:
        """Fill the targets of the first ``number`` copies."""
        while self._missing and self.begun - len(self._missing) < number:
            target, values = self._missing.pop(0)
            target.copy_(values)


@dataclass(slots=True)
class Log:
    """Requests to the device, by name, since the last ``clear``."""

    kernels: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)  # pinned and non-blocking
    waits: Counter[str] = field(default_factory=Counter)  # of the host, with the line that waits
    # Whether each event lets the host sleep while it waits.
    events: list[bool] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)  # not cleared
    arrivals: Arrivals = field(default_factory=Arrivals)  # not cleared
    memory_share: float = 1.0  # that torch's allocator may use; not enforced, and not cleared

    def clear(self) -> None:
        for counter in (self.kernels, self.copies, self.waits):
            counter.clear()
        self.events.clear()

    def wait(self, what: str) -> None:
        """Count a wait of the host, with the line of ours or of transformers that causes it."""
        self.waits[f"{what} at {_line()}"] += 1


def _line() -> str:
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_code.co_filename
        if "afn_ray" in name or "transformers/models" in name:
            return f"{'/'.join(name.split('/')[-2:])}:{frame.f_lineno}"
    return "?"


class OnDevice(torch.Tensor):
    """A tensor on the simulated device; ``held`` has its values on the CPU.

    torch's C++ sees a tensor on the device "meta", which has shapes and no values.
    """

    held: torch.Tensor
    share: _Share
    memory = Memory()  # of the device in use

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=META,
        )
        made.held = inner
        made.share = _Share(cls.memory, inner)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # without this, torch turns every result into an ``OnDevice``
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{func} ran outside of simulated.device()")


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors in ``values`` and in the lists in it."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _any_on_device(values: Iterable[Any]) -> bool:
    """True if a tensor in ``values``, or in the lists in it, is on the device."""
    for value in values:
        if isinstance(value, OnDevice):
            return True
        if isinstance(value, list | tuple) and _any_on_device(value):
            return True
    return False


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with each tensor in it, or in its lists and tuples, changed."""
    kind = type(value)
    if kind is list or kind is tuple:
        return kind([_mapped(change, each) for each in value])
    return change(value) if isinstance(value, torch.Tensor) else value


def _inner(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Operators(TorchDispatchMode):
    """Run torch's operators on the CPU, and log those that a GPU would run."""

    def __init__(self, log: Log, gpu: Gpu, num_splits: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._log, self._gpu = log, gpu
        self._num_splits = num_splits  # that flash attention must be given
        self.in_call = False  # of a function that was given a tensor on the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        tensors = _tensors((*args, *kwargs.values()))
        ours = {id(x.held): x for x in tensors if isinstance(x, OnDevice)}
        made = kwargs.get("device")
        if not ours and not (made is not None and self.in_call and made.type == "meta"):
            return func(*args, **kwargs)
        if name == "_varlen_attn":
            return self._flash(*args)
        if name == "copy_" and not all(isinstance(x, OnDevice) for x in tensors):
            return self._copy(*args, **kwargs)
        if name == "_to_copy" and kwargs.get("device") == CPU:
            self._log.wait("copy to the host")
        elif name == "native_layer_norm":
            _check_layer_norm(*args)
        elif name == "histc":  # a GPU takes integers, too
            self._log.kernels[name] += 1
            return OnDevice(func(args[0].held.float(), *args[1:], **kwargs).to(args[0].dtype))
        self._check_devices(name, args, tensors)
        if name in WAITS:
            self._log.wait(name)
        elif not func.is_view and name not in NO_KERNEL:
            self._log.kernels[name] += 1
        to_host = kwargs.get("device") == CPU
        if "device" in kwargs:
            kwargs["device"] = CPU
        given = {key: _mapped(_inner, value) for key, value in kwargs.items()}
        result = func(*_mapped(_inner, args), **given)
        if to_host:
            return result

        def wrapped(value: torch.Tensor) -> torch.Tensor:
            known = ours.get(id(value))  # an operator in place returns its input
            return OnDevice(value) if known is None else known

        return _mapped(wrapped, result)

    def _copy(
        self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
    ) -> torch.Tensor:
        """A copy between host and device."""
        to_host = isinstance(source, OnDevice)
        what = "copy to the host" if to_host else "copy to the device"
        if non_blocking and getattr(target if to_host else source, "pinned", False):
            self._log.copies[what] += 1
            if to_host:
                self._log.arrivals.begin(target, _inner(source))
                return target
        else:
            self._log.wait(what)
        _inner(target).copy_(_inner(source))
        return target

    def _check_devices(
        self, name: str, args: Sequence[Any], tensors: Sequence[torch.Tensor]
    ) -> None:
        """Raise torch's error for tensors on two devices; a number on the host is allowed."""
        there = [x for x in tensors if not isinstance(x, OnDevice) and x.dim()]
        if name in ("index", "index_put_"):
            if there or any(x.dtype == torch.bool for x in _tensors(args[1])):
                self._log.wait(f"{name} by numbers on the host or by a mask")
        elif there:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! ({name}, {[tuple(x.shape) for x in there]}, at {_line()})"
            )

    def _flash(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flash attention over sequences of different lengths, with the checks of its C++."""
        query, key, value, bounds = args[:4]
        scale, (left, right) = args[8], args[9] or (-1, -1)
        assert all(isinstance(x, OnDevice) for x in args[:5])
        assert bounds.dtype == torch.int32 and query.dim() == 3
        num_splits = args[13] if len(args) > 13 else None
        assert num_splits == self._num_splits, "a sequence's bits depend on its batch"
        _check_flash(self._gpu, query, key, value)
        self._log.kernels["flash"] += 1
        out = torch.full_like(query.held, torch.nan)
        for begin, end in itertools.pairwise(bounds.held.tolist()):
            assert end - begin <= min(args[5:7]), "flash attention leaves out the rows behind"
            q, k, v = (x.held[begin:end].transpose(0, 1).float() for x in (query, key, value))
            at = torch.arange(end - begin)
            distance = at[None, :] - at[:, None]
            mask = (distance >= (-left if left >= 0 else begin - end)) & (
                distance <= (right if right >= 0 else end - begin)
            )
            each = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
            )
            out[begin:end] = each.transpose(0, 1).to(out.dtype)
        sums = torch.empty(query.shape[1], query.shape[0])
        return OnDevice(out), OnDevice(sums), OnDevice(torch.zeros(2, dtype=torch.uint64))


def _check_flash(gpu: Gpu, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """The checks of ``mha_varlen_fwd`` in torch's ``flash_api.cpp``."""
    size = query.shape[-1]
    if gpu.capability < (8, 0):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    if query.dtype not in HALF:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError("query and key must have the same dtype")
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        raise RuntimeError("Input tensor must have contiguous last dimension")
    if size > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if query.shape[1] % key.shape[1]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if size % 8:
        raise RuntimeError("head_size must be a multiple of 8, this is ensured by padding!")
    for x in (key, value):
        if x.shape != (*key.shape[:2], size):
            raise RuntimeError(f"v must have shape (total_k, num_heads_k, {size})")


def _check_layer_norm(
    x: torch.Tensor, shape: Any, weight: torch.Tensor | None, *others: object
) -> None:
    """CUDA's LayerNorm has one dtype; that of the CPU takes float32 weights with any input."""
    if weight is not None and weight.dtype != x.dtype:
        raise RuntimeError(
            f"expected scalar type {TYPE_NAMES[x.dtype]} but found {TYPE_NAMES[weight.dtype]}"
        )


class _Calls(TorchFunctionMode):
    """Calls that torch's C++ would refuse where it is built without CUDA, or would not show."""

    def __init__(self, log: Log, gpu: Gpu, operators: _Operators) -> None:
        super().__init__()
        self._log, self._gpu, self._operators = log, gpu, operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MOVES:
            return self._to(func, args, kwargs)
        if func is torch.Tensor.pin_memory:
            return _pinned(args[0].clone())
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], OnDevice):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the "
                "tensor to host memory first."
            )
        if func is torch.Tensor.tolist and isinstance(args[0], OnDevice):
            self._log.wait("tolist")
            return args[0].held.tolist()
        if func in FACTORIES:
            return self._made(func, args, kwargs)
        if func is functional.scaled_dot_product_attention and isinstance(args[0], OnDevice):
            return self._sdpa(*args, **kwargs)
        operators, before = self._operators, self._operators.in_call
        operators.in_call = _any_on_device((*args, *kwargs.values()))
        try:
            return func(*args, **kwargs)
        finally:
            operators.in_call = before

    def _to(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """``tensor.to``, ``cpu`` or ``cuda``."""
        tensor, *others = args
        device = {torch.Tensor.cpu: CPU, torch.Tensor.cuda: DEVICE}.get(func, kwargs.get("device"))
        dtype = kwargs.get("dtype")
        for each in others:
            if isinstance(each, torch.dtype):
                dtype = each
            elif isinstance(each, torch.Tensor):
                device, dtype = each.device, each.dtype
            elif isinstance(each, str | torch.device):
                device = torch.device(each)
        there = isinstance(tensor, OnDevice)
        if device is None or _on_device(device) == there:
            inner = _inner(tensor)
            if there and dtype not in (None, inner.dtype):
                self._log.kernels["_to_copy"] += 1
            made = inner if dtype is None else inner.to(dtype)
            return tensor if made is inner else OnDevice(made) if there else made
        what = "copy to the host" if there else "copy to the device"
        if kwargs.get("non_blocking") and getattr(tensor, "pinned", False):
            self._log.copies[what] += 1
        else:
            self._log.wait(what)
        moved: torch.Tensor = _inner(tensor).detach().clone().to(dtype or tensor.dtype)
        return moved if there else OnDevice(moved)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """A new tensor."""
        there, pin = _on_device(kwargs.get("device")), kwargs.pop("pin_memory", False)
        if there:
            del kwargs["device"]
        made: torch.Tensor = func(*args, **kwargs)
        if not there:
            return _pinned(made) if pin else made
        if func is torch.tensor:
            self._log.wait("copy to the device")
        elif func is not torch.empty:
            self._log.kernels[func.__name__] += 1
        return OnDevice(made)

    def _sdpa(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """torch's attention, logged as "sdpa: " and the kernel that CUDA would choose."""
        given = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        assert all(isinstance(x, OnDevice) for x in given)
        gqa = bool(options.get("enable_gqa"))
        kernel = _sdpa_kernel(self._gpu, query, value, attn_mask is not None, gqa)
        self._log.kernels[f"sdpa: {kernel}"] += 1
        q, k, v = (_inner(x).float() for x in (query, key, value))
        options["attn_mask"] = _inner(attn_mask)
        made = functional.scaled_dot_product_attention(q, k, v, **options)
        return OnDevice(made.to(query.dtype))


def _sdpa_kernel(
    gpu: Gpu, query: torch.Tensor, value: torch.Tensor, masked: bool, gqa: bool
) -> str:
    """The kernel that CUDA chooses (``sdp_utils.cpp``); "math" holds all scores in memory."""
    ampere, size = gpu.capability >= (8, 0), query.shape[-1]
    same_size = value.shape[-1] == size
    if ampere and query.dtype in HALF and not masked and same_size and size <= 256:
        return "flash"
    aligned = all(x.shape[-1] * x.dtype.itemsize % 16 == 0 for x in (query, value))
    if aligned and not gqa and (ampere or query.dtype != torch.bfloat16):
        return "efficient"
    return "math"


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, which is from now on in pinned memory."""
    tensor.pinned = True  # type: ignore[attr-defined]
    return tensor


def varlen_of_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """``varlen_attn`` with the options of torch 2.11, which refuses grouped queries."""
    assert query.shape[1] == key.shape[1]
    options = {"scale": scale, "window_size": window_size}
    result: torch.Tensor = varlen_of_now(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options
    )
    return result


def varlen_of_2_10(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> torch.Tensor:
    """``varlen_attn`` with the options of torch 2.10, which has no scale and no windows."""
    raise AssertionError("its attention has another scale than was asked for")


varlen_of_now: Callable[..., Any] = varlen.varlen_attn


def fused_norm(log: Log) -> fused.Kernel:
    """The fused kernel of ``model/fused``: the values of torch's kernels, in one launch."""

    def add_norm_cast(
        added: torch.Tensor, residual: torch.Tensor, norm: torch.nn.LayerNorm, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log.kernels["add_norm_cast"] += 1
        total = _inner(added) + _inner(residual)
        weight, bias = _inner(norm.weight), _inner(norm.bias)
        full = functional.layer_norm(total, norm.normalized_shape, weight, bias, norm.eps)
        return OnDevice(full), OnDevice(full.to(dtype))

    return add_norm_cast


@contextlib.contextmanager
def device(
    gpu: Gpu = H200,
    varlen_attn: Callable[..., Any] = varlen_of_now,
    kernel: Callable[[Log], fused.Kernel] | None = None,
) -> Iterator[Log]:
    """Let torch have one GPU in this context and thread; yields the log of what it was asked for.

    ``varlen_attn`` is the function of torch that calls flash attention. ``kernel`` makes the kernel
    of ``model/fused``; without it, triton is not installed.
    """
    log = Log()

    class Event:
        def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
            log.events.append(blocking)
            self.launches = self.copies = 0  # before this event

        def record(self) -> None:
            self.launches, self.copies = sum(log.kernels.values()), log.arrivals.begun

        def synchronize(self) -> None:
            log.arrivals.finish(self.copies)  # at once, if the event was never recorded

        def elapsed_time(self, end: Event) -> float:
            return float(end.launches - self.launches)

    def synchronize(index: object = None) -> None:
        log.wait("synchronize")
        log.arrivals.finish(log.arrivals.begun)

    def find_kernel() -> fused.Kernel:
        if kernel is None:
            raise fused.Unfused("triton is not installed")
        return kernel(log)

    facts = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.total_bytes,
        multi_processor_count=132,
    )
    answers: dict[str, Callable[..., Any]] = {
        "current_device": lambda: 0,
        "device": lambda index: contextlib.nullcontext(),
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_capability": lambda index=None: gpu.capability,
        "get_device_name": lambda index=None: gpu.name,
        "get_device_properties": lambda index=None: facts,
        "get_per_process_memory_fraction": lambda index=None: log.memory_share,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: (
            including_emulation or gpu.capability >= (8, 0)
        ),
        "max_memory_allocated": lambda index=None: 0,
        "mem_get_info": lambda index=None: (gpu.total_bytes, gpu.total_bytes),
        "memory_allocated": lambda index=None: 0,
        "set_per_process_memory_fraction": lambda share: setattr(log, "memory_share", share),
        "synchronize": synchronize,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(OnDevice, "memory", log.memory)
        patch.setattr(torch, "inference_mode", torch.no_grad)  # in it, torch hides its operators
        patch.setattr(varlen, "varlen_attn", varlen_attn)
        patch.setattr(fused, "find_kernel", find_kernel)
        patch.setattr(fused, "NARROWEST", 1)  # the models of tests are narrow
        splits = 1 if "num_splits" in inspect.signature(varlen_attn).parameters else None
        operators, threads = _Operators(log, gpu, splits), torch.get_num_threads()
        torch.set_num_threads(1)  # more threads would only wait for each other
        try:
            with operators, _Calls(log, gpu, operators):
                yield log
        finally:
            torch.set_num_threads(threads)
