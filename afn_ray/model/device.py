"""The device: whether torch can use it, how it rounds, and what commits say of it."""

from __future__ import annotations

import platform

import torch

from afn_ray import nvidia
from afn_ray.errors import ModelError
from afn_ray.model.memory import GB
from afn_ray.provenance import cpu_name

CONTEXT_BYTES = 1 << 30
"""Memory of a GPU that a process takes outside of torch's allocator, in bytes; an upper estimate.

It holds the CUDA context, the code of kernels, and the handles of cuBLAS and cuDNN.
"""


def check_device(device: str) -> None:
    """Raise ``ModelError``, in one line, if ``device`` is a GPU that torch cannot use here."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        why = nvidia.why_no_gpu(torch.__version__, torch.version.cuda)
        raise ModelError(
            f"this run measures on GPUs, and on {platform.node()} {why}; or give --device cpu"
        )


def pin_rounding(device: str) -> None:
    """Make products on a GPU exact in their dtype: no TF32, and sums in float32.

    These are settings of the process. cuDNN's TF32 and sums in half precision are on by default.
    """
    if torch.device(device).type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def limit_memory(num_workers: int) -> None:
    """Limit this process to its share of the GPU's memory, which ``num_workers`` share.

    torch's limit does not count ``CONTEXT_BYTES`` of each process, so they are left out of the
    shares. A batch that does not fit then fails in the worker whose batch it is. Raises
    ``ModelError`` where torch can use no GPU, or where nothing is left to share.
    """
    check_device("cuda")
    total_bytes = torch.cuda.get_device_properties().total_memory
    shared_bytes = total_bytes - num_workers * CONTEXT_BYTES
    if shared_bytes <= 0:
        raise ModelError(
            f"workers_per_gpu is {num_workers}, but the GPU on {platform.node()} has "
            f"{total_bytes / GB:.1f} GB, and each process on it takes about "
            f"{CONTEXT_BYTES / GB:.1f} GB beside its model; give fewer --workers-per-gpu"
        )
    torch.cuda.set_per_process_memory_fraction(shared_bytes / total_bytes / num_workers)


def describe_device(device: str) -> dict[str, str]:
    """Description of ``device`` in a commit.

    A CPU has a name and the instructions that torch uses on it; a GPU has a name, a compute
    capability and how it rounds.
    """
    if torch.device(device).type != "cuda":
        return {"cpu": cpu_name(), "instructions": torch.backends.cpu.get_cpu_capability()}
    matmul = torch.backends.cuda.matmul
    halves = (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )
    reduced = []
    if matmul.allow_tf32 or torch.backends.cudnn.allow_tf32:
        reduced.append("tf32")
    if any(halves):
        reduced.append("sums")
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "reduced": "+".join(reduced) or "none",
    }
