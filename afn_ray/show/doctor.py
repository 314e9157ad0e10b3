"""Checks of this machine's installation, with advice for each failure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from afn_ray import cgroup, nvidia
from afn_ray.errors import AfnError, ConfigError
from afn_ray.runs.address import of_cluster
from afn_ray.show import ray_check
from afn_ray.show.diagnosis import Check, Diagnosis
from afn_ray.store import disk
from afn_ray.text import count

if TYPE_CHECKING:  # a broken torch is a failed check, so nothing here imports it at once
    from afn_ray.model import Model
    from afn_ray.runs.measurer import Measurer

PACKAGE = "afn-ray"
LOW_BYTES, LEAST_BYTES = 4 << 30, 512 << 20
"""Free space, in bytes, below which to warn and to fail.

A shard's unfinished files take about 50 MB a worker; a GB of text takes about 2 GB.
"""
RATE_S = 1.0
"""Least time in seconds for which the rate of a GPU is measured."""
RATE_TOKENS = 131_072
"""About the number of tokens that a GPU measures at a time."""


def check(
    model: str | None = None, store: str | None = None, address: str | None = None
) -> Diagnosis:
    """Check everything that a run needs, in the order of its use; takes about 20 s.

    Each GPU that torch sees has a check of its own.

    - ``model``: the model to load; default the demo's, where it is installed.
    - ``store``: the store to write to; without it that check is not tried.
    - ``address``: the Ray cluster; default ``RAY_ADDRESS``, otherwise a local Ray is started and
      stopped.

    Raises nothing: a problem is a failed check with advice.
    """
    address = of_cluster(address)
    tries: list[tuple[str, Callable[[], Check], str]] = [
        ("Python", _python, ""),
        ("packages", _packages, ""),
        ("torch", _torch, f"reinstall torch: {_install('torch')}"),
        ("Ray", lambda: ray_check.check(address), f"reinstall Ray: {_install('ray')}"),
        (
            "model",
            lambda: _model(model),
            "try --model with a folder that holds config.json and model.safetensors",
        ),
        *(
            (f"GPU {i}", partial(_gpu, i, model), "give --device cpu, or --dtype float32")
            for i in range(_num_gpus())
        ),
        ("scratch space", _scratch, ""),
        (
            "store",
            lambda: _store(store),
            "check the store's URL, and its credentials in the environment",
        ),
    ]
    checks = []
    for name, attempt, advice in tries:
        try:
            checks.append(attempt())
        except AfnError as error:  # its message contains the advice
            checks.append(Check(name, False, str(error), advice))
        # A broken installation raises anything, and this function reports it.
        except Exception as error:  # noqa: BLE001
            checks.append(
                Check(
                    name, False, f"{type(error).__name__}: {error}", advice or "please report this"
                )
            )
    return Diagnosis(tuple(checks))


def _install(package: str) -> str:
    """The command that installs ``package`` in the version that afn-ray requires."""
    for requirement in _requirements():
        if requirement.name == package:
            return f"pip install --force-reinstall '{requirement}'"
    return f"pip install --force-reinstall '{package}'"


def _requirements() -> list[Requirement]:
    """Requirements of afn-ray's metadata, without extras; empty where it is not installed."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            found.append(requirement)
    return found


# --- this machine


def _python() -> Check:
    found = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    try:
        wanted = SpecifierSet(importlib.metadata.metadata(PACKAGE)["Requires-Python"])
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "Python", None, f"{found}; {PACKAGE} is not installed as a package", "pip install -e ."
        )
    if wanted.contains(platform.python_version(), prereleases=True):
        return Check("Python", True, found)
    return Check("Python", False, found, f"use a Python {wanted}")


def _packages() -> Check:
    found, missing = [], []
    for wanted in _requirements():
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append((f"{wanted.name} is missing", wanted))
            continue
        found.append(f"{wanted.name} {version}")
        if not wanted.specifier.contains(version, prereleases=True):
            missing.append((f"{wanted.name} is {version}, expected {wanted.specifier}", wanted))
    if missing:
        return Check(
            "packages",
            False,
            "; ".join(what for what, _ in missing),
            "pip install " + " ".join(f"'{wanted}'" for _, wanted in missing),
        )
    return Check("packages", True, ", ".join(found))


def _torch() -> Check:
    import torch

    machine = _machine()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        gpus = f"torch {torch.__version__} with {', '.join(names)}; {machine}"
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return Check("torch", None, f"{gpus}; no bfloat16", "run with --dtype float32")
        return Check("torch", True, gpus)
    capabilities: dict[str, object] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # missing in some builds
    half = [
        name
        for name in ("amx_bf16", "avx512_bf16", "amx_fp16", "avx512_fp16")
        if capabilities.get(name)
    ]
    found = (
        f"torch {torch.__version__} on the CPU: {machine}, "
        f"{torch.backends.cpu.get_cpu_capability()}, half precision: "
        f"{', '.join(half) or 'none (float32 is the default and fastest)'}"
    )
    if (driver := nvidia.driver_version()) is not None:
        return Check(
            "torch",
            None,
            f"{found}; there is an NVIDIA driver ({driver}), but torch sees no GPU",
            nvidia.why_no_gpu(torch.__version__, torch.version.cuda),
        )
    return Check("torch", True, found)


def _machine() -> str:
    """CPU cores and memory that a run may use; also the machine's cores where it has more."""
    cores = cgroup.num_cores()
    of = os.cpu_count() or 1
    memory = cgroup.memory_bytes()
    return (f"{cores} of {of} CPU cores" if cores < of else count(cores, "CPU core")) + (
        f", {memory / 2**30:,.1f} GiB of memory" if memory is not None else ""
    )


def _scratch() -> Check:
    """Check the scratch folders of a run without --scratch and of a local Ray."""
    from afn_ray.runs.cluster import session

    scratch = disk.scratch_folder(None)
    checks = [_space("scratch space", scratch, "set TMPDIR, or give --scratch")]
    if session.folder().parent != scratch:
        checks.append(_space("scratch space", session.folder(), "set RAY_TMPDIR"))
    try:
        session.check()
    except AfnError as error:
        checks.append(
            Check(
                "scratch space", False, str(error), "small runs work without Ray: --executor inline"
            )
        )
    worst = max(checks, key=lambda c: (True, None, False).index(c.ok))
    return Check("scratch space", worst.ok, "; ".join(c.found for c in checks), worst.advice)


def _space(name: str, folder: Path, otherwise: str) -> Check:
    """Free space on the disk of ``folder``, which may not exist yet."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:  # some mounts do not report it
        return Check(
            name,
            None,
            f"free space at {folder} is not known: {error.strerror}",
            "see that there is room",
        )
    found = f"{free / 2**30:,.1f} GiB free at {folder}"
    if free < LOW_BYTES:
        return Check(
            name, False if free < LEAST_BYTES else None, found, f"make room, or {otherwise}"
        )
    return Check(name, True, found)


# --- model and store


def _model(name: str | None) -> Check:
    from afn_ray.config import RunConfig
    from afn_ray.model import choose_device
    from afn_ray.runs import demo, worker
    from afn_ray.runs.measurer import Measurer, find_model_files

    if name is None:
        try:
            name = str(demo.model_folder())
        except ConfigError as error:
            return Check("model", None, "not tried", f"name one with --model, or: {error}")
    began = time.monotonic()
    config = RunConfig(corpus=("-",), model=name, store="-", layers="2/3")
    files = find_model_files(config)
    task = worker.prepare(config, files, choose_device("auto"), "float32")
    why = Measurer(task).counters.why_padded
    packing = f"padded ({why})" if why else "packed without padding"
    return Check(
        "model",
        True,
        f"{name}: {files.model_type}, {files.depth} layers of {files.hidden_size}, "
        f"{task.measure.window_tokens} tokens; passed its self-check at layer "
        f"{task.measure.layers[-1]} on {task.device} in {task.measure.dtype}, {packing}, "
        f"{time.monotonic() - began:.1f} s",
    )


def _num_gpus() -> int:
    """Number of GPUs that torch sees; 0 where torch is broken, which has a check of its own."""
    try:
        import torch
    except Exception:  # noqa: BLE001 - a broken installation raises anything
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu(index: int, name: str | None) -> Check:
    """Measure texts on one GPU as a worker does, in half precision."""
    import torch

    from afn_ray.config import RunConfig
    from afn_ray.runs import demo, worker
    from afn_ray.runs.measurer import Measurer, find_model_files

    what = f"GPU {index}"
    gpu = torch.cuda.get_device_name(index)
    if name is None:
        try:
            name = str(demo.model_folder())
        except ConfigError as error:
            return Check(what, None, f"{gpu}: not tried", f"name a model with --model, or: {error}")
    config = RunConfig(corpus=("-",), model=name, store="-", layers="2/3")
    with torch.cuda.device(index):
        measurer = Measurer(worker.prepare(config, find_model_files(config), "cuda", "float16"))
        rate, loaded = _rate(measurer), measurer.model
        norms = _norms(loaded)
        made_by = loaded.maker
    found = (
        f"{gpu}, compute capability {made_by['capability']}, driver {nvidia.driver_version()}: "
        f"passed its self-check in {made_by['dtype']}, attention {loaded.attention}, "
        f"norms {norms}, "
        f"{rate:,.0f} tokens/s with {name}"
    )
    if why := loaded.why_slow or loaded.why_padded:
        return Check(what, None, f"{found}; slower than it could be: {why}", _faster(loaded.packed))
    return Check(what, True, found)


def _norms(loaded: Model) -> str:
    """Addition and normalisation on a GPU: the speed of the one kernel, or
    the reason against it.
    """
    from afn_ray.model import time_norms

    if (times := time_norms(loaded)) is None:
        return f"{loaded.norm} ({loaded.why_eager})"
    return (
        f"{loaded.norm} ({times.fused_ms:.3f} ms a batch, {times.eager_ms:.3f} by torch's kernels)"
    )


def _faster(packed: bool) -> str:
    """Advice for a faster GPU, for a model that is packed or not."""
    if packed:
        return "flash attention needs compute capability 8.0 or higher and torch 2.11 or newer"
    return "other families run packed: infra/guide/signals.md lists them"


def _rate(measurer: Measurer) -> float:
    """Tokens a second that ``measurer`` measures, once warm."""
    from afn_ray.runs.measurer import PROBES

    text = " ".join(PROBES * 4)  # about 100 tokens
    texts = [text] * max(1, RATE_TOKENS // 100)
    prepared = measurer.preparer.prepare(texts, [False] * len(texts), 0, None)
    measurer.values(prepared)
    began, n_tokens = time.monotonic(), 0
    while (seconds := time.monotonic() - began) < RATE_S:
        measurer.values(prepared)
        n_tokens += len(prepared.encoded.token_ids)
    return n_tokens / seconds


def _store(uri: str | None) -> Check:
    from afn_ray.store import probes, storage, uris

    if uri is None:
        return Check("store", None, "not tried", "name one with --store")
    if uris.is_process_memory(uri):
        return Check(
            "store", None, f"{uri} lives in one process", "it works with --executor inline only"
        )
    there = storage.exists(uri)
    probes.check_writable(uri)
    found = f"{uri} is writable" + ("" if there else " (it is new)")
    if not uris.is_local(uri):
        return Check("store", True, found)
    if lacks := probes.find_lacks(uri):
        found += f"; its filesystem lacks {' and '.join(lacks)}"
    space = _space("store", Path(uris.absolute(uri)), "use another --store")
    return Check("store", space.ok, f"{found}; {space.found}", space.advice)
