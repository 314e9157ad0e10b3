"""Check and measure the GPU path: one command, less than eight minutes, results in one JSON file.

    python infra/gpu/check.py [--out FILE] [--model FOLDER] [--parts LIST] [--dry]

It runs from a checkout, with torch, transformers, pyarrow and fsspec; it loads neither Ray nor
DuckDB. ``--model`` is a local folder with real weights, for the label flips. ``--dry`` runs all
parts at toy size on the CPU: it checks this file, and its figures mean nothing.

Each part is a process of its own with a time limit, so a part that hangs, crashes or breaks the
GPU's context loses its own figures only. Each row is written to the file as soon as it is measured.
The part ``device`` always runs, and first. Parts that an earlier file has, and that do not run, are
kept if they were measured on the same machine with the same versions. Exit code: 0 if nothing in
the file failed, 1 if a row or a part failed, 2 if the check cannot start, 130 after Ctrl-C, 143
after SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
    "1"  # the other check spoils CUDA for forked processes
)
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process with threads should not fork
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "model"))

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
import torch.nn.functional as functional
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from afn_ray import cgroup, model
from afn_ray.bench import figures, ours, peers
from afn_ray.bench import texts as made_texts
from afn_ray.config import RunConfig, resolve_layers
from afn_ray.corpus_values import Shard
from afn_ray.errors import ConfigError
from afn_ray.model import attention, fused
from afn_ray.model.prove import TOLERANCE
from afn_ray.runs import flow, measurer, worker
from afn_ray.runs.deadlines import SLOTS
from afn_ray.runs.plan import make_plan
from afn_ray.schema import SPECIAL
from afn_ray.store import disk
from afn_ray.store.commits import Commit
from afn_ray.tokens import encode
from families import CONTEXT, FAMILIES

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
LIMIT_S = 465.0
"""Longest duration of the whole check, in seconds."""
FORMAT = 1
"""Version of the form of the results."""
WIDTH = 80
"""Width of the summary, in columns."""
LAYER = 8
"""Layer of the BERT-base shape that is measured; later blocks do not run."""
STOPS = (signal.SIGINT, signal.SIGTERM)
"""Signals that stop the check."""
POLL_S = 0.1
"""Pause between two looks at the running part, in seconds."""
REPEAT = 5
"""Number of timed repetitions; the median counts."""
QUEUED = flow.SUBMITTED
"""Batches that are submitted before the first result is awaited, as in a worker."""
FLASH = ("varlen_attn", "flash_attention")
"""Parts of the names of torch's flash attention operators."""
FLASH_CAPABILITY = (8, 0)
"""Lowest compute capability of a GPU for which torch has flash attention."""
MOST_FLIPS = {"float32": 0.001, "float16": 0.01, "bfloat16": 0.02}
"""Largest share of flipped labels that rounding explains, by dtype."""
LENGTHS = (CONTEXT, 33, 33, 33, 20, 7, 2, 1)
"""Lengths of the sequences in the batch for parity, in tokens."""
FILLER = 17
"""Filler rows after these sequences."""
REAL_HEADS: dict[str, dict[str, int]] = {
    "gemma": {"head_dim": 256},
    "gemma3": {"head_dim": 256},
    "minicpm3": {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
}
"""Head sizes of families whose kernels depend on them, as in the published models."""

Figure = float | int | str | bool | None
Row = dict[str, Figure]
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of what is measured."""

    device: str
    slack: float  # factor of all time limits
    families: tuple[str, ...]  # for parity
    dtypes: tuple[str, ...]  # for parity and flips
    fast: tuple[str, ...]  # for speed; the first one is used wherever there is only one
    bert: dict[str, int]  # changes to the BERT-base shape
    gemm: tuple[tuple[int, int, int], ...]  # shapes (m, k, n)
    copy_bytes: int
    means: tuple[int, ...]  # mean lengths of sequences, in tokens
    batches: tuple[int, ...]  # batch sizes, in tokens; the one of a run is in the middle
    profiles: tuple[str, ...]  # of the tuned pipeline
    texts_tokens: int  # tokens of one profile's texts
    flip_tokens: int
    tokenizers: tuple[int, ...]  # numbers of tokenizer processes
    repeats: int  # copies of the texts in the corpus of files
    shard_bytes: int
    feed_s: float  # duration of one measurement of files to Parquet
    spare_bytes: int  # memory left to a batch that does not fit
    large_batch: int  # that batch, in tokens


REAL = Size(
    device="cuda",
    slack=1.0,
    families=tuple(FAMILIES),
    dtypes=("float32", "float16", "bfloat16"),
    fast=("float16", "bfloat16"),
    bert={},
    gemm=((8192, 8192, 8192), (32_768, 768, 3072)),
    copy_bytes=1 << 31,
    means=(40, 128, 512),
    batches=(4096, 8192, 16_384, 32_768, 65_536, 131_072),
    profiles=("short", "mixed", "full"),
    texts_tokens=400_000,
    flip_tokens=30_000,
    tokenizers=(0, 6, 12),
    repeats=100,
    shard_bytes=4 << 20,
    feed_s=10.0,
    spare_bytes=400 << 20,
    large_batch=1 << 19,
)
TOY = Size(
    device="cpu",
    slack=5.0,  # the gate shares its cores
    families=("bert", *REAL_HEADS, "mpnet", "gemma3-with-images"),
    dtypes=("float32", "bfloat16"),
    fast=("float32",),
    bert={"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128},
    gemm=((256, 256, 256), (512, 64, 128)),
    copy_bytes=1 << 20,
    means=(40, 128, 512),
    batches=(256, 512),
    profiles=("short",),
    texts_tokens=2000,
    flip_tokens=400,
    tokenizers=(0, 1),
    repeats=2,
    shard_bytes=4096,
    feed_s=2.0,
    spare_bytes=64 << 20,
    large_batch=1 << 19,
)


class Report:
    """The results so far, in a JSON file that is whole at any time.

    The check and the process of the running part write it in turn.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.path.read_text("utf-8"))
        return content

    def write(self, content: dict[str, Any]) -> None:
        with disk.write_local(self.path) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    def part(self, name: str) -> dict[str, Any]:
        """Rows of the file for the part ``name``."""
        part: dict[str, Any] = self.read()["parts"].get(name, {"rows": {}})
        return part

    def rows(self, name: str) -> dict[str, Row]:
        """The rows of the part ``name``, by their names."""
        rows: dict[str, Row] = self.part(name)["rows"]
        return rows

    def update(self, name: str, **changes: Figure) -> None:
        """Set facts of the part ``name``."""
        content = self.read()
        content["parts"].setdefault(name, {"rows": {}}).update(changes)
        self.write(content)

    def add(self, name: str, row_name: str, row: Row) -> None:
        """Add one row to the part ``name``."""
        content = self.read()
        content["parts"].setdefault(name, {"rows": {}})["rows"][row_name] = row
        self.write(content)


@dataclass(frozen=True, slots=True)
class Check:
    """One part while it runs: its size, its scratch folder, and the file for its rows."""

    part: str
    size: Size
    report: Report
    folder: Path  # shared by all parts
    weights: str | None  # folder with real weights

    @property
    def device(self) -> str:
        return self.size.device

    @property
    def dtype(self) -> str:
        """The dtype in which a run would measure."""
        return self.size.fast[0]

    def row(self, name: str, measure: Callable[[], Row]) -> None:
        """Measure one row and write it; an error becomes the row."""
        began = time.monotonic()
        try:
            row = measure()
        except Exception as error:  # noqa: BLE001 - the other rows are still wanted
            row = {"error": reason(error)}
        row["seconds"] = round(time.monotonic() - began, 3)
        self.report.add(self.part, name, row)
        print(f"  {name}: {shown(row)}", flush=True)

    def skip(self, name: str, why: str) -> None:
        """Write a row that says why it is not measured."""
        self.report.add(self.part, name, {"skipped": why})
        print(f"  {name}: skipped, {why}", flush=True)

    def bert(self) -> str:
        """Folder of a BERT-base with random weights, made by the first part that needs it."""
        folder = self.folder / "bert"
        if not (folder / "config.json").exists():
            made_texts.save_bert(folder, **self.size.bert)
        return str(folder)

    def load_bert(self, dtype: str) -> model.Model:
        """The model at ``LAYER``, proved and ready."""
        probes = [random_ids([n], made_texts.VOCABULARY).tolist() for n in (4, 30, 250)]
        return load(self.bert(), [LAYER], dtype, self.device, probes)


def reason(error: BaseException) -> str:
    """The type and the first line of ``error``."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def shown(row: Row) -> str:
    """The figures of ``row`` in one line, without those that are not known."""
    known = {name: value for name, value in row.items() if value is not None}
    short = {n: f"{v:.4g}" if isinstance(v, float) else f"{v}" for n, v in known.items()}
    return "; ".join(f"{name} {value}" for name, value in short.items())


def find(folder: str) -> model.ModelFiles:
    """The model in ``folder``, of any family."""
    return model.find_model(
        folder, None, trust_remote_code=False, allow_pickle=False, allow_untested=True
    )


def load(
    folder: str, layers: Sequence[int], dtype: str, device: str, probes: Sequence[Sequence[int]]
) -> model.Model:
    """The model in ``folder``, proved and ready, as a worker has it."""
    loaded = model.Model(find(folder), layers, dtype, device, measurer.BATCH_TOKENS[device])
    model.prepare(loaded, probes)
    return loaded


def random_ids(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> Ids:
    """Token ids of sequences of ``lengths``, one after another."""
    return np.random.default_rng(seed).integers(5, vocabulary - 5, sum(lengths), np.int64)


def synchronize(device: str) -> None:
    """Wait until ``device`` is idle."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str) -> float:
    """Median duration of ``work`` in seconds, after two calls that warm up."""
    found = []
    for turn in range(-2, REPEAT):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        if turn >= 0:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


# --- the device ---


def check_device(run: Check) -> None:
    """Machine on which the figures were measured."""
    run.row("machine", partial(_machine, run.device))


def _machine(device: str) -> Row:
    row: Row = {
        "device": "cpu",
        "cpu": platform.processor() or platform.machine(),
        "cores": cgroup.num_cores(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compiler": shutil.which("cc") or shutil.which("gcc"),
    }
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        driver = Path("/proc/driver/nvidia/version")
        row |= {
            "device": facts.name,
            "capability": f"{facts.major}.{facts.minor}",
            "memory_gb": facts.total_memory / 1e9,
            "cuda": torch.version.cuda,
            "driver": driver.read_text().splitlines()[0] if driver.exists() else None,
        }
    return row


# --- parity of every family ---


class _Family:
    """A family's model with random weights, and its values in float32 on the CPU."""

    layers = (0, 1, 3)

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.ids = random_ids([*LENGTHS, FILLER], 190, seed=1)

    @cached_property
    def saved(self) -> str:
        """The folder, with the model in it."""
        kind, options = FAMILIES[self.name]
        config = getattr(transformers, kind)(**options | REAL_HEADS.get(self.name, {}))
        torch.manual_seed(0)
        made = transformers.AutoModel.from_config(config)
        with torch.no_grad():
            for name, value in made.named_parameters():
                # The norms of fresh weights hardly differ from token to token.
                if "norm" in name.lower() and name.endswith("weight"):
                    value.copy_(1 + 0.5 * torch.rand_like(value))
        made.save_pretrained(self.folder)
        return str(self.folder)

    def load(self, dtype: str, device: str) -> model.Model:
        probes = [random_ids([n], 190, seed=3).tolist() for n in (4, 9, CONTEXT)]
        return load(self.saved, self.layers, dtype, device, probes)

    @cached_property
    def reference(self) -> npt.NDArray[np.float32]:
        """Strengths [n_layers, n_tokens] in float32 on the CPU."""
        return self.submit(self.load("float32", "cpu"))

    def submit(self, loaded: model.Model) -> npt.NDArray[np.float32]:
        return self.pending(loaded).result().values[:, : sum(LENGTHS)]

    def pending(self, loaded: model.Model) -> model.Pending:
        ids = self.ids if loaded.packed else self.ids[: sum(LENGTHS)]
        return loaded.submit(ids, LENGTHS)


class _AttentionOps(TorchDispatchMode):
    """Counts torch's attention operators in a context, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.name()
        if "attn" in name or "attention" in name:
            self.names[name] += 1
        return func(*args, **kwargs or {})


def check_parity(run: Check) -> None:
    """Each family and dtype against float32 on the CPU: values, kernel, stalls, repeatability."""
    for name in run.size.families:
        family = _Family(name, run.folder / name)
        for dtype in run.size.dtypes:
            run.row(f"{name} {dtype}", partial(_compare, family, dtype, run.device))
        shutil.rmtree(family.folder, ignore_errors=True)


def _compare(family: _Family, dtype: str, device: str) -> Row:
    expected, loaded = family.reference, family.load(dtype, device)
    with _AttentionOps() as ops:
        got = family.submit(loaded)
    pending, syncs = _count_syncs(partial(family.pending, loaded), device)
    again = pending.result().values[:, : sum(LENGTHS)]
    relative = np.abs(got - expected) / np.abs(expected)
    q90, worst = float(np.quantile(relative, 0.9)), float(relative.max())
    tolerance = TOLERANCE[getattr(torch, dtype)]
    checked = worst if dtype == "float32" else q90
    row: Row = {
        "attention": loaded.attention,
        "norm": loaded.norm,
        "operators": ", ".join(sorted(ops.names)) or "matrix products",
        "syncs": syncs,
        "q90": q90,
        "worst": worst,
        "of_tolerance": checked / tolerance,
        "repeatable": bool(np.array_equal(got, again)),
    }
    faults = []
    if not checked <= tolerance:
        faults.append(f"differs by {checked:.1e}, more than {tolerance:.0e}")
    if syncs:
        faults.append(f"submit waited for the device {syncs} times")
    flash = loaded.attention == attention.FLASH and all(map(_is_flash, ops.names))
    if loaded.packed and dtype != "float32" and _has_flash(device) and not flash:
        faults.append(f"no flash attention, but {row['operators']}: {loaded.why_slow}")
    return row | {"error": "; ".join(faults)} if faults else row


def _is_flash(operator: str) -> bool:
    return any(name in operator for name in FLASH)


def _has_flash(device: str) -> bool:
    return device == "cuda" and torch.cuda.get_device_capability() >= FLASH_CAPABILITY


def _count_syncs(
    submit: Callable[[], model.Pending], device: str
) -> tuple[model.Pending, int | None]:
    """Result of ``submit``, and the number of times that it waited for the
    GPU; None without a GPU.
    """
    if device != "cuda":
        return submit(), None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            pending = submit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return pending, sum("synchronizing" in str(w.message) for w in seen)


# --- label flips on real weights ---


def check_flips(run: Check) -> None:
    """Share of HIGH labels that differ from float64, on real weights and English text."""
    if run.weights is None:
        run.skip("labels", "no folder with real weights was given: --model FOLDER")
        return
    files = find(run.weights)
    encoded = encode.TextEncoder(model.load_tokenizer(files), files.num_embeddings).encode(
        _paragraphs()
    )
    sequences: list[Ids] = []
    content: list[npt.NDArray[np.bool_]] = []
    for begin, end in zip(encoded.bounds[:-1], encoded.bounds[1:], strict=True):
        if (
            2 < end - begin <= files.context_tokens
            and sum(map(len, sequences)) < run.size.flip_tokens
        ):
            sequences.append(encoded.token_ids[begin:end].astype(np.int64))
            content.append(encoded.flags[begin:end] & SPECIAL == 0)
    (layer,) = resolve_layers("2/3", files.depth)
    expected = _exact_norms(files, sequences, layer, run.device)
    for dtype in run.size.dtypes:
        measure = partial(_flips, run, dtype, layer, sequences, np.concatenate(content), expected)
        run.row(dtype, measure)


def _paragraphs() -> list[str]:
    """Paragraphs of the guide in this checkout."""
    pages = sorted((ROOT / "infra" / "guide").glob("*.md"))
    return [p for page in pages for p in page.read_text("utf-8").split("\n\n") if len(p) > 80]


def _exact_norms(
    files: model.ModelFiles, sequences: Sequence[Ids], layer: int, device: str
) -> npt.NDArray[np.float64]:
    """Norms of ``hidden_states[layer]`` in float64, one text at a time, as
    transformers has them.
    """
    plain: Any = transformers.AutoModel.from_pretrained(
        files.folder, dtype=torch.float64, attn_implementation="eager"
    )
    plain = plain.to(device).eval()
    norms = []
    with torch.inference_mode():
        for ids in sequences:
            inputs = torch.from_numpy(ids[None]).to(device)
            states = plain(input_ids=inputs, output_hidden_states=True).hidden_states
            norms.append(states[layer][0].norm(dim=-1).cpu().numpy())
    return np.concatenate(norms)


def _flips(
    run: Check,
    dtype: str,
    layer: int,
    sequences: Sequence[Ids],
    content: npt.NDArray[np.bool_],
    expected: npt.NDArray[np.float64],
) -> Row:
    assert run.weights is not None
    by_length = sorted(sequences, key=len)
    probes = [by_length[at].tolist() for at in (0, len(by_length) // 2, -1)]
    loaded = load(run.weights, [layer], dtype, run.device, probes)
    got = loaded.measure(np.concatenate(sequences), [len(s) for s in sequences])[0]
    relative = np.abs(got - expected)[content] / expected[content]
    high = [
        v[content] >= np.quantile(v[content], 0.75, method="inverted_cdf") for v in (got, expected)
    ]
    flips = float(np.mean(high[0] != high[1]))
    row: Row = {
        "flips": flips,
        "median": float(np.median(relative)),
        "worst": float(relative.max()),
        "tokens": int(content.sum()),
        "layer": layer,
    }
    if flips > MOST_FLIPS[dtype]:
        row["error"] = f"{flips:.2%} of the labels flip; expected at most {MOST_FLIPS[dtype]:.1%}"
    return row


# --- ceilings ---


def check_ceilings(run: Check) -> None:
    """The fastest matrix products and copies of this device: the limits of any engine."""
    for dtype in run.size.fast:
        for shape in run.size.gemm:
            name = f"GEMM {dtype} {' x '.join(map(str, shape))}"
            run.row(name, partial(_gemm, run.device, dtype, shape))
    run.row("copy on the device", partial(_copy, run, run.device))
    run.row("copy to the device", partial(_copy, run, "cpu"))


def _gemm(device: str, dtype: str, shape: tuple[int, int, int]) -> Row:
    m, k, n = shape
    x = torch.randn(m, k, device=device).to(getattr(torch, dtype))
    weight = torch.randn(n, k, device=device).to(x.dtype)
    with torch.inference_mode():
        seconds = timed(lambda: functional.linear(x, weight), device)
    return {"tflops": 2 * m * k * n / seconds / 1e12}


def _copy(run: Check, source: str) -> Row:
    """Rate of a copy; on the device, bytes read and bytes written both count."""
    here = torch.ones(run.size.copy_bytes, dtype=torch.uint8, device=source)
    if source == "cpu" and run.device == "cuda":
        here = here.pin_memory()
    there = torch.empty(run.size.copy_bytes, dtype=torch.uint8, device=run.device)
    seconds = timed(lambda: there.copy_(here, non_blocking=True), run.device)
    counted = run.size.copy_bytes * (2 if source == run.device else 1)
    return {"tb_per_s": counted / seconds / 1e12}


def peak_tflops(run: Check, dtype: str) -> float | None:
    """The fastest matrix product of ``dtype`` that this check has measured, in TFLOP/s."""
    rows = run.report.rows("ceilings").items()
    found = [row.get("tflops") for name, row in rows if name.startswith(f"GEMM {dtype} ")]
    return max((v for v in found if isinstance(v, float)), default=None)


# --- speed of the engine ---


def check_speed(run: Check) -> None:
    """Tokens/s and MFU of the engine at each mean length and batch size."""
    for dtype in run.size.fast:
        loaded = run.load_bert(dtype)
        middle = run.size.batches[len(run.size.batches) // 2]
        for mean in run.size.means:
            for num_rows in run.size.batches if dtype == run.dtype else (middle,):
                name = f"{dtype}, mean {mean}, batch {num_rows}"
                run.row(name, partial(_speed, run, loaded, dtype, mean, num_rows))


def plan_lengths(mean: int, num_rows: int, longest: int = 512) -> list[int]:
    """Lengths of sequences with about that mean, sorted, that fill ``num_rows`` exactly."""
    draw = np.random.default_rng(mean)
    lengths: list[int] = []
    while sum(lengths) < num_rows:
        length = longest if mean >= longest else int(draw.lognormal(np.log(mean) - 0.32, 0.8))
        lengths.append(min(max(length, 4), longest))
    lengths[-1] -= sum(lengths) - num_rows
    return sorted(lengths, reverse=True)


def count_flop(lengths: Sequence[int], bert: dict[str, int]) -> float:
    """Floating-point operations of ``LAYER`` blocks of that BERT, without padding."""
    d, f = bert.get("hidden_size", 768), bert.get("intermediate_size", 3072)
    return float(LAYER * sum(n * (8 * d * d + 4 * d * f + 4 * n * d) for n in lengths))


def _speed(run: Check, loaded: model.Model, dtype: str, mean: int, num_rows: int) -> Row:
    lengths = plan_lengths(mean, num_rows)
    ids = random_ids(lengths, made_texts.VOCABULARY)

    def batches() -> None:
        for pending in [loaded.submit(ids, lengths) for _ in range(QUEUED)]:
            pending.result()

    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(batches, run.device) / QUEUED
    began = time.perf_counter()
    pending = loaded.submit(ids, lengths)
    host = time.perf_counter() - began
    pending.result()
    tflops, peak = count_flop(lengths, run.size.bert) / seconds / 1e12, peak_tflops(run, dtype)
    return {
        "tokens_per_s": num_rows / seconds,
        "tflops": tflops,
        "mfu": tflops / peak if peak else None,
        "batch_ms": seconds * 1e3,
        "host_ms": host * 1e3,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if run.device == "cuda" else None,
    }


# --- against the tuned pipeline ---


def check_pipeline(run: Check) -> None:
    """The engine and the tuned Hugging Face pipeline of ``afn bench``, on the same texts."""
    files = find(run.bert())
    writer = made_texts.Writer(model.load_tokenizer(files), 512)
    budget = measurer.BATCH_TOKENS[run.device]
    tuned = peers.Tuned(_spec(run, "tuned", files.depth))
    engine = ours.Engine(_spec(run, "engine", files.depth))
    try:
        for profile in run.size.profiles:
            texts = writer.write(profile, run.size.texts_tokens, budget, causal=False)
            run.row(profile, partial(_against_tuned, engine, tuned, texts, run.dtype))
    finally:
        engine.close()


def _spec(run: Check, variant: str, depth: int) -> peers.Spec:
    return peers.Spec(
        variant=variant,
        model=run.bert(),
        layer=LAYER,
        depth=depth,
        device=run.device,
        dtype=run.dtype,
        batch_tokens=measurer.BATCH_TOKENS[run.device],
        tokenizer_workers=0,
        window_tokens=512,
        workers=1,
        folder=str(run.folder),
        texts={},
    )


def _against_tuned(
    engine: ours.Engine, tuned: peers.Tuned, texts: Sequence[made_texts.Text], dtype: str
) -> Row:
    num_tokens = sum(t.num_tokens for t in texts)
    model_s, strengths = {}, {}
    for name, variant in (("engine", engine), ("tuned", tuned)):
        variant.run(texts)  # all shapes are known afterwards
        outcome = variant.run(texts)
        model_s[name] = outcome.stages["model_s"]
        strengths[name] = {i: (norms, None) for i, norms in enumerate(outcome.strengths)}
    differences = figures.compare_strengths(strengths, dtype)  # raises where the values disagree
    return {
        "engine_tokens_per_s": num_tokens / model_s["engine"],
        "tuned_tokens_per_s": num_tokens / model_s["tuned"],
        "ratio": model_s["tuned"] / model_s["engine"],
        "difference": differences["tuned"],
        "tokens": num_tokens,
    }


# --- fused against eager ---


def check_fused(run: Check) -> None:
    """Sum, norm and cast by torch's kernels and by the engine's own: alone, and in the engine."""
    try:
        # The toy run has no kernel: it compares torch's with themselves.
        kernel = fused.find_kernel() if run.device == "cuda" else fused.eager
    except fused.Unfused as why:
        run.skip("fused against eager", str(why))
        return
    run.row("sum, norm and cast", partial(_fused, run, kernel))
    run.row("engine", partial(_fused_engine, run))


def _fused(run: Check, kernel: fused.Kernel) -> Row:
    width, dtype = run.size.bert.get("hidden_size", 768), getattr(torch, run.dtype)
    num_rows = measurer.BATCH_TOKENS[run.device]
    added = torch.randn(1, num_rows, width).to(dtype).to(run.device)
    residual = torch.randn(1, num_rows, width).to(run.device)
    norm = torch.nn.LayerNorm(width, eps=1e-12).to(run.device)

    def repeated(way: fused.Kernel) -> None:
        for _ in range(fused.QUEUED):
            way(added, residual, norm, dtype)

    with torch.inference_mode():
        began = time.perf_counter()
        full, low = kernel(added, residual, norm, dtype)
        synchronize(run.device)
        compile_s = time.perf_counter() - began
        expected, _ = fused.eager(added, residual, norm, dtype)
        difference = float((full - expected).abs().max() / expected.abs().max())
        ways = (fused.eager, kernel)
        eager_s, fused_s = (timed(partial(repeated, w), run.device) / fused.QUEUED for w in ways)
    row: Row = {
        "eager_ms": eager_s * 1e3,
        "fused_ms": fused_s * 1e3,
        "speedup": eager_s / fused_s,
        "compile_s": compile_s,
        "difference": difference,
    }
    if not (difference <= fused.PARITY and torch.equal(low, full.to(dtype))):
        row["error"] = f"differs by {difference:.1e}, more than {fused.PARITY:.0e}, or in its cast"
    return row


def _fused_engine(run: Check) -> Row:
    """Whole batches of the engine as it chose, and with torch's kernels."""
    chosen = run.load_bert(run.dtype)
    left_out = fused.Unfused("it was left out, to compare")
    with mock.patch.object(fused, "find_kernel", side_effect=left_out):
        plain = run.load_bert(run.dtype)
    mean, num_rows = (sizes[len(sizes) // 2] for sizes in (run.size.means, run.size.batches))
    eager_s, chosen_s = (
        _speed(run, loaded, run.dtype, mean, num_rows)["batch_ms"] for loaded in (plain, chosen)
    )
    assert isinstance(eager_s, float) and isinstance(chosen_s, float)
    row: Row = {
        "eager_ms": eager_s,
        "fused_ms": chosen_s,
        "speedup": eager_s / chosen_s,
        "norm": chosen.norm,
        "why": chosen.why_eager,
    }
    if chosen.why_eager.startswith(fused.FAULT):
        row["error"] = chosen.why_eager
    return row


# --- files to committed Parquet ---


def check_feed(run: Check) -> None:
    """One whole worker, from JSONL files to committed Parquet, by number of tokenizer processes."""
    # A tokenizer process would import the main module, and with it torch. It does not need it.
    sys.modules["__main__"].__file__ = None
    corpus = _write_corpus(run)
    for num_tokenizers in run.size.tokenizers:
        name = f"{num_tokenizers} tokenizer processes"
        run.row(name, partial(_feed, run, corpus, num_tokenizers))


def _write_corpus(run: Check) -> Path:
    writer = made_texts.Writer(model.load_tokenizer(find(run.bert())), 512)
    texts = writer.write("mixed", run.size.texts_tokens, 32_768, causal=False)
    block = "".join(json.dumps({"text": t.text}) + "\n" for t in texts)
    file = run.folder / "corpus" / "texts.jsonl"
    file.parent.mkdir()
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(run.size.repeats):
            lines.write(block)
    return file.parent


def _feed(run: Check, corpus: Path, num_tokenizers: int) -> Row:
    config = RunConfig(
        corpus=(str(corpus),),
        model=run.bert(),
        store=str(run.folder / f"store-{num_tokenizers}"),
        layers=str(LAYER),
        dtype=run.dtype,
        device=run.device,
        executor="inline",
        scratch=str(run.folder),
        tokenizer_workers=num_tokenizers,
        shard_bytes=run.size.shard_bytes,
    )
    task = worker.prepare(config, measurer.find_model_files(config), run.device, run.dtype)
    first, *shards = make_plan(config).shards
    processor = worker.Processor(task)
    try:
        warm_up = processor.process(first)  # afterwards the tokenizer processes have started
        row, commits = _timed_shards(processor, shards, run.size.feed_s)
    finally:
        processor.close()
    counted = sum(c.counts["tokens"] for c in [warm_up, *commits])
    files = Path(config.store).glob("shards/*/*/*-tokens.parquet")
    if (written := sum(pq.read_metadata(f).num_rows for f in files)) != counted:
        row["error"] = f"{written} rows are in the store's Parquet files; expected {counted}"
    shutil.rmtree(config.store)
    best = _best_speed(run)
    speed = row["tokens_per_s"]
    row["of_engine"] = speed / best if best and isinstance(speed, float) else None
    return row


def _timed_shards(
    processor: worker.Processor, shards: Sequence[Shard], seconds: float
) -> tuple[Row, list[Commit]]:
    """Process ``shards`` until ``seconds`` have passed; what it took, and the commits.

    The speed is that between the first commit and the last, so filling the pipeline is left out.
    """
    counters = processor.counters
    wait_s, model_s, cpu_s = counters.wait_s, counters.model_s, time.process_time()
    began = time.monotonic()
    ended: list[tuple[float, int]] = []  # when each commit was there, and its tokens

    def process(shard: Shard) -> Commit | None:
        if len(ended) > SLOTS and time.monotonic() - began > seconds:
            return None
        commit = processor.process(shard)
        ended.append((time.monotonic(), commit.counts["tokens"]))
        return commit

    with ThreadPoolExecutor(SLOTS) as pool:
        commits = [c for c in pool.map(process, shards) if c is not None]
    took, cpu_s = time.monotonic() - began, time.process_time() - cpu_s
    tokens = sum(c.counts["tokens"] for c in commits)
    (first, _), *later = ended
    row: Row = {
        "tokens_per_s": sum(n for _, n in later) / (later[-1][0] - first),
        "model_share": (counters.model_s - model_s) / took,
        "wait_share": (counters.wait_s - wait_s) / took,
        "cpu_us_per_token": cpu_s / tokens * 1e6,  # of the worker's own process
        "shards": len(commits),
    }
    return row, commits


def _best_speed(run: Check) -> float | None:
    """The engine's best speed at the middle mean length, in tokens/s, if it was measured."""
    mean = run.size.means[len(run.size.means) // 2]
    rows = run.report.rows("speed").items()
    found = [r.get("tokens_per_s") for name, r in rows if f"{run.dtype}, mean {mean}," in name]
    return max((v for v in found if isinstance(v, float)), default=None)


# --- memory drills ---


def check_drills(run: Check) -> None:
    """Memory that is too small must be reported as that, and the model must work afterwards."""
    run.row("a model that does not fit", partial(_drill_model, run))
    loaded = run.load_bert(run.dtype)
    run.row("a batch that does not fit", partial(_drill_batch, run, loaded))
    run.row("a small batch after it", partial(_drill_after, run, loaded))


@contextlib.contextmanager
def little_memory(device: str, spare_bytes: int) -> Iterator[None]:
    """Leave this process ``spare_bytes`` of the device's memory while the context is open."""
    model.free_memory()
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        share = (torch.cuda.memory_reserved() + spare_bytes) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _drill(
    device: str, spare_bytes: int, work: Callable[[], object], is_right: Callable[[Exception], bool]
) -> Row:
    """Run ``work``, which must fail with an error for which ``is_right`` holds."""
    try:
        with little_memory(device, spare_bytes):
            work()
    except Exception as error:  # noqa: BLE001 - the drill is about the kind of error
        found = reason(error)
        return {"found" if is_right(error) else "error": found}
    return {"error": "nothing failed, so the drill had too much memory"}


def _drill_model(run: Check) -> Row:
    run.bert()  # made before, with enough memory
    return _drill(
        run.device,
        run.size.spare_bytes // 16,
        partial(run.load_bert, run.dtype),
        lambda error: "memory" in str(error),  # the message must name the cause
    )


def _drill_batch(run: Check, loaded: model.Model) -> Row:
    lengths = plan_lengths(128, run.size.large_batch)
    ids = random_ids(lengths, made_texts.VOCABULARY)
    return _drill(
        run.device,
        run.size.spare_bytes,
        partial(loaded.measure, ids, lengths),
        model.is_out_of_memory,  # else a worker would not try a smaller batch
    )


def _drill_after(run: Check, loaded: model.Model) -> Row:
    values = loaded.measure(random_ids([64], made_texts.VOCABULARY), [64])
    if not (np.isfinite(values).all() and (values > 0).all()):
        return {"error": "the values are not finite and positive"}
    return {"found": f"{values.shape[1]} values"}


# --- all parts, one after another ---


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the check, and its time limit in seconds."""

    measure: Callable[[Check], None]
    limit_s: float


PARTS = {
    "device": Part(check_device, 15),
    "parity": Part(check_parity, 100),
    "flips": Part(check_flips, 30),
    "ceilings": Part(check_ceilings, 20),
    "speed": Part(check_speed, 60),
    "pipeline": Part(check_pipeline, 45),
    "fused": Part(check_fused, 50),
    "feed": Part(check_feed, 105),
    "drills": Part(check_drills, 25),
}
"""Parts in order; later ones use rows of earlier ones. The limits sum to less than ``LIMIT_S``."""


def measure_part(run: Check) -> None:
    """Run one part in this process; what stops it is written as its error."""
    began = time.monotonic()
    if run.device == "cpu":
        torch.set_num_threads(1)
    try:
        PARTS[run.part].measure(run)
    except Exception as error:  # noqa: BLE001 - the other parts are still wanted
        run.report.update(run.part, error=reason(error))
    run.report.update(run.part, seconds=round(time.monotonic() - began, 3))


def _in_child(run: Check, arguments: Sequence[str]) -> None:
    """Run one part in a forked process, or in a new one if this one cannot use CUDA."""
    os.setsid()  # its own processes end with it
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    # torch has no public question for it.
    if getattr(torch.cuda, "_is_in_bad_fork", lambda: False)():
        target = ["--out", str(run.report.path), "--parts", run.part, "--here"]
        command = [sys.executable, __file__, *arguments, *target]
        os.execv(sys.executable, command)  # noqa: S606 - this program, once more
    measure_part(run)


@contextlib.contextmanager
def stops() -> Iterator[list[signal.Signals]]:
    """The signals that have told the check to stop while this context is open, at first none."""
    told: list[signal.Signals] = []
    before = {number: signal.getsignal(number) for number in STOPS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as for Ctrl-C in a program in the background
            signal.signal(number, lambda number, frame: told.append(signal.Signals(number)))
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_part(
    run: Check, limit_s: float, arguments: Sequence[str], told: Sequence[signal.Signals]
) -> None:
    """Run one part in a process of its own; end it and all its processes after ``limit_s``.

    A signal in ``told`` ends it at once.
    """
    print(f"{run.part}:", flush=True)
    began = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(run, arguments))
    child.start()
    while child.is_alive() and not told and (left_s := began + limit_s - time.monotonic()) > 0:
        child.join(min(left_s, POLL_S))
    ended = not child.is_alive()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid or 0, signal.SIGKILL)
    child.kill()  # in case it has no group yet
    child.join()
    if not ended:
        why = told[0].name if told else f"after {limit_s:.0f} s, its time limit"
        run.report.update(run.part, error=f"stopped {'by ' * bool(told)}{why}")
    elif child.exitcode:
        run.report.update(run.part, error=f"its process ended with exit code {child.exitcode}")
    run.report.update(run.part, seconds=round(time.monotonic() - began, 3))


def failures(content: dict[str, Any]) -> list[str]:
    """Failures: one line for each part or row with an error."""
    found = []
    for name, part in content["parts"].items():
        if "error" in part:
            found.append(f"{name}: {part['error']}")
        rows = part["rows"].items()
        found += [f"{name}, {row}: {v['error']}" for row, v in rows if "error" in v]
    return found


# --- the summary ---

COLUMNS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "parity": (("rows", "rows", "d"), ("flash", "flash", "d"), ("syncs", "syncs", "d"),
               ("of_tolerance", "of limit", ".2f"), ("repeatable", "repeat", "d")),
    "flips": (("flips", "flips", ".3%"), ("median", "median", ".1e"), ("worst", "worst", ".1e")),
    "ceilings": (("tflops", "TFLOP/s", ".4g"), ("tb_per_s", "TB/s", ".4g")),
    "speed": (("tokens_per_s", "tokens/s", ",.0f"), ("mfu", "MFU", ".1%"),
              ("batch_ms", "batch ms", ".2f"),
              ("host_ms", "host ms", ".2f")),
    "pipeline": (("engine_tokens_per_s", "engine tok/s", ",.0f"),
                 ("tuned_tokens_per_s", "tuned tok/s", ",.0f"),
                 ("ratio", "ratio", ".2f")),
    "fused": (("eager_ms", "eager ms", ".3f"), ("fused_ms", "fused ms", ".3f"),
              ("speedup", "speedup", ".2f")),
    "feed": (("tokens_per_s", "tokens/s", ",.0f"), ("of_engine", "of engine", ".2f"),
             ("wait_share", "waits", ".0%"), ("cpu_us_per_token", "us/token", ".2f")),
}  # fmt: skip
"""Columns of each part's table: the figure, its heading, its format."""


def by_dtype(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows of parity, summed up by dtype."""
    found: dict[str, Row] = {}
    for dtype in dict.fromkeys(name.split()[-1] for name in rows):
        some = [row for name, row in rows.items() if name.endswith(f" {dtype}")]
        shares = [row["of_tolerance"] for row in some if isinstance(row.get("of_tolerance"), float)]
        operators = [str(row.get("operators")) for row in some]
        found[dtype] = {
            "rows": len(some),
            "flash": sum(_is_flash(names) for names in operators),
            "syncs": sum(int(row.get("syncs") or 0) for row in some),
            "of_tolerance": max((s for s in shares if isinstance(s, float)), default=None),
            "repeatable": sum(bool(row.get("repeatable")) for row in some),
        }
    return found


def table(name: str, rows: dict[str, Row]) -> list[str]:
    """The rows of one part, with the columns of ``COLUMNS``, at most ``WIDTH`` wide."""
    columns = COLUMNS[name]
    lines = [
        f"{name:<33.33}" + "".join(f"{heading:>{_wide(heading)}}" for _, heading, _ in columns)
    ]
    for row_name, row in rows.items():
        line = f"  {row_name:<31.31}"
        for key, heading, form in columns:
            value = row.get(key)
            shown = format(value, form) if isinstance(value, int | float) else "-"
            line += f"{shown:>{_wide(heading)}}"
        lines.append(line)
    return lines


def _wide(heading: str) -> int:
    return max(9, len(heading) + 2)


def summary(content: dict[str, Any]) -> str:
    """All figures and failures, at most ``WIDTH`` columns wide."""
    lines: list[str] = []
    for name, part in content["parts"].items():
        rows = {n: r for n, r in part["rows"].items() if "skipped" not in r}
        if name in COLUMNS and rows:
            lines += table(name, by_dtype(rows) if name == "parity" else rows)
        else:
            lines += [f"{name}, {n}: {shown(r)}" for n, r in rows.items()]
        lines += [f"{name}, {n}: {shown(r)}" for n, r in part["rows"].items() if "skipped" in r]
    failed = failures(content)
    lines += [f"FAILED {line}" for line in failed]
    lines.append(f"{len(failed)} failures; {content['seconds']:.0f} s; {content['about']}")
    fill = partial(
        textwrap.fill, width=WIDTH, subsequent_indent="    ", break_on_hyphens=False, tabsize=1
    )
    return "\n".join(line if len(line) <= WIDTH else fill(line) for line in lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Check and measure a GPU.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-check.json"),
        help="file of results; keeps the parts that do not run",
    )
    parser.add_argument("--model", help="local folder with real weights, for the label flips")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, with commas")
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--here", action="store_true", help="no processes and limits; add to --out")
    return parser.parse_args(arguments)


class Refused(Exception):
    """The check cannot start; the message says why, in one line. ``code`` is the exit code."""

    def __init__(self, why: str, code: int = 2) -> None:
        super().__init__(why)
        self.code = code


def part_names(listed: str) -> list[str]:
    """The parts in a list with commas, each once. Raises ``Refused`` for a part that is none."""
    names = list(dict.fromkeys(name.strip() for name in listed.split(",")))
    if unknown := sorted(set(names) - set(PARTS)):
        raise Refused(f"no part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    return names


def check_machine(args: argparse.Namespace) -> None:
    """Raise ``Refused`` where there is no GPU, or no model in the folder that was given."""
    if not args.dry and not torch.cuda.is_available():
        raise Refused("torch sees no GPU here; --dry runs all parts at toy size on the CPU")
    if args.model is not None and not (Path(args.model) / "config.json").expanduser().is_file():
        raise Refused(f"--model {args.model}: no model there; expected a folder with config.json")


def is_results(content: Any) -> bool:
    """True if ``content``, from a JSON file, has the form of this check's results."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return False
    parts = content.get("parts")
    return (
        isinstance(parts, dict)
        and parts.keys() <= PARTS.keys()
        and all(
            isinstance(part, dict) and isinstance(part.get("rows"), dict) for part in parts.values()
        )
        and all(isinstance(row, dict) for part in parts.values() for row in part["rows"].values())
    )


def open_results(path: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """The results in the file ``path``; ``empty``, which is written, if there is no such file.

    Raises ``Refused`` for a file that has something else, or cannot be written.
    """
    try:
        found = path.read_bytes() if path.exists() else b""
        content = json.loads(found) if found else empty
        if (path.exists() and not path.is_file()) or not is_results(content):
            raise ValueError
        Report(path).write(content)
    except (ConfigError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise Refused(f"--out {path}: {why}; give another file") from error
    except ValueError as error:
        raise Refused(f"--out {path} has no results of this check; give another file") from error
    return content


def why_apart(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Differences of two results of the part ``device``; empty if in nothing."""
    facts = [part.get("rows", {}).get("machine", {}) for part in (earlier, now)]
    if not all("torch" in each for each in facts):
        return "where they were measured is not known"
    for name in dict.fromkeys([*facts[0], *facts[1]]):
        old, new = (each.get(name) for each in facts)
        if name != "seconds" and old != new:
            return f"{name} was {old}, and is {new}"
    return ""


class _All:
    """All parts, one after another, each in a process of its own."""

    def __init__(self, args: argparse.Namespace, arguments: Sequence[str], folder: Path) -> None:
        self._args, self._arguments, self._folder = args, arguments, folder
        self._size = TOY if args.dry else REAL
        self._began = time.monotonic()
        self.report = Report(args.out.absolute())

    def check(self, name: str, report: Report) -> Check:
        """The part ``name``, which writes its rows to ``report``."""
        return Check(name, self._size, report, self._folder, self._args.model)

    def begin(
        self, names: Sequence[str], empty: dict[str, Any], told: list[signal.Signals]
    ) -> None:
        """Measure the part ``device``, and keep the parts of an earlier file beside ``names``.

        Raises ``Refused``, with the file as it was, if that is of another machine.
        """
        earlier = open_results(self.report.path, empty)["parts"]
        kept = {n: part for n, part in earlier.items() if n not in ("device", *names)}
        first = Report(self._folder / "device.json") if kept else self.report
        first.write(empty)
        self.run("device", first, told)
        if not kept:
            return
        if told:
            raise Refused(
                f"stopped by {told[0].name}; --out {self.report.path} is as it was", 128 + told[0]
            )
        device = first.part("device")
        if why := why_apart(earlier.get("device", {}), device):
            raise Refused(
                f"--out {self.report.path} has other parts ({', '.join(kept)}), and {why}; "
                "give another file"
            )
        print(f"kept from {self.report.path}: {', '.join(kept)}", flush=True)
        self.report.write(empty | {"parts": {"device": device} | kept})

    def run(self, name: str, report: Report, told: Sequence[signal.Signals]) -> None:
        """Run one part, if there is time."""
        left_s = LIMIT_S * self._size.slack - (time.monotonic() - self._began)
        limit_s = min(PARTS[name].limit_s * self._size.slack, left_s)
        if left_s > 1:
            run_part(self.check(name, report), limit_s, self._arguments, told)
        else:
            report.update(name, error="not begun: the time of the whole check was over")

    def end(self) -> dict[str, Any]:
        """Write how long it took, with the parts in order; return what the file has."""
        content = self.report.read()
        content["seconds"] = round(time.monotonic() - self._began, 1)
        content["parts"] = {n: content["parts"][n] for n in PARTS if n in content["parts"]}
        self.report.write(content)
        return content


def main(arguments: Sequence[str]) -> int:
    """Run the parts in order, print the summary, and return the exit code."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    args = parse(arguments)
    try:
        names = part_names(args.parts)
        check_machine(args)
        if args.here:
            return measure_here(args, arguments, names)
        return measure_all(args, arguments, names)
    except Refused as why:
        print(why, file=sys.stderr)
        return why.code


def measure_here(args: argparse.Namespace, arguments: Sequence[str], names: Sequence[str]) -> int:
    """Run the parts in this process, and add to the file; 0, whatever fails."""
    if not args.out.is_file():
        raise Refused(f"--here adds to a file of results, and --out {args.out} is none")
    with tempfile.TemporaryDirectory(prefix="afn-gpu-") as folder:
        parts = _All(args, arguments, Path(folder))
        open_results(parts.report.path, {})
        for name in names:
            measure_part(parts.check(name, parts.report))
    return 0


def measure_all(args: argparse.Namespace, arguments: Sequence[str], names: Sequence[str]) -> int:
    """Run each part in a process of its own, print the summary, and return the exit code."""
    about = "toy sizes on a CPU: the figures mean nothing" if args.dry else "measured on a GPU"
    empty = {"format": FORMAT, "about": about, "seconds": 0.0, "parts": {}}
    with tempfile.TemporaryDirectory(prefix="afn-gpu-") as folder, stops() as told:
        parts = _All(args, arguments, Path(folder))
        parts.begin(names, empty, told)
        for name in names:
            if name != "device" and not told:
                parts.run(name, parts.report, told)
        content = parts.end()
        print(summary(content), flush=True)
        return 128 + told[0] if told else int(bool(failures(content)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
