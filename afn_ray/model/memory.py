"""Memory of models: which errors mean that it ran out, what there is, and how to free it."""

from __future__ import annotations

import ctypes
import errno
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from afn_ray import cgroup
from afn_ray.errors import ModelError

GB = 1e9
"""Bytes in a gigabyte."""
MARKS = (
    "out of memory",  # CUDA, as torch.OutOfMemoryError or torch.AcceleratorError
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN and their kin
    "can't allocate memory",  # torch's allocator of the CPU
    "not enough memory",
    "annot allocate memory",  # the system, where a file cannot be mapped
)
"""Substrings of a ``RuntimeError`` that ran out of memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if ``error`` means that the device or this process ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # a file cannot be mapped
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in MARKS)


def free_memory() -> None:
    """Free the memory of models that are no longer in use.

    A model and its hooks refer to each other, so only a garbage collection frees them.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim_memory() -> None:
    """Return freed memory of the CPU to the system, where the C library can: glibc keeps some."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def needed(name: str, device: torch.device, wanted: Callable[[], int]) -> Iterator[None]:
    """Raise ``ModelError`` where the model ``name`` does not fit into the memory of ``device``.

    ``wanted`` returns the size of the weights in bytes, for the message.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"{name} does not fit into the memory of {device}: its weights take "
            f"{wanted() / GB:.1f} GB, and {_available(device)} ({reason}). Use a smaller model, "
            "fewer workers on this machine, or a machine with more memory"
        ) from error


def _available(device: torch.device) -> str:
    """The memory of ``device`` in words."""
    if device.type == "cuda":
        try:
            free, total = torch.cuda.mem_get_info(device)
            share = torch.cuda.get_per_process_memory_fraction(device)
        except (RuntimeError, AssertionError):  # the device is in no state to answer
            return "the device does not say what is free"
        found = f"{free / GB:.1f} of its {total / GB:.1f} GB are free"
        if share == 1:
            return found
        return f"{found}, and this worker may use {share * total / GB:.1f} GB in all"
    limit = cgroup.memory_bytes()
    return "there is less" if limit is None else f"this process may use {limit / GB:.1f} GB"
