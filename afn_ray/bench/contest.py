"""Compare the variants on the same texts, in turns, and with the machine's GEMM peak.

One variant runs at a time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers.pytorch_utils import Conv1D

from afn_ray import model
from afn_ray.bench import BUILT_IN, TOKENS_PER_WORKER, VARIANTS, machine
from afn_ray.bench.peers import Spec, find_blocks
from afn_ray.bench.texts import Text, Writer, sample, save_bert, share
from afn_ray.bench.worker import dump_texts
from afn_ray.config import RunConfig, resolve_layers
from afn_ray.errors import AfnError, ConfigError, ModelError
from afn_ray.runs import worker
from afn_ray.runs.cluster.connection import WORKER_ENV

LONGEST_WINDOW = 512
"""Longest window of the benchmark, in tokens."""
ONE_PROCESS = ("loop", "sentence_transformers", "ray_data")
"""Variants that are one process.

The process uses torch's default threads, as users have them, or it is the driver of others.
"""
SLOW = ("loop", "sentence_transformers")
"""Variants that measure a sample of the texts: one text in ``ONE_IN``."""
ONE_IN = 16
"""Sampling interval of the slow variants' texts: the sample is large enough for their speed."""
NEEDS = {"sentence_transformers": "sentence_transformers", "ray_data": "pandas"}
"""Optional package that a variant imports, by variant."""
FOREIGN = 0.1
"""Largest share of the cores' time that other processes may use in a clean repetition."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest relative difference between two variants' strengths, by dtype.

One token in a hundred may differ more: ``compare`` uses the 99th percentile.
"""
BARS: dict[str, dict[str, float]] = {
    "engine/loop": {"short": 30, "full": 8},
    "engine/tuned": {"short": 1.25, "full": 1.05},
    "engine/ray_data": {"short": 1.4, "full": 1.15},
    "job/engine": {"short": 0.90, "full": 0.92},
    "engine mfu": {"short": 0.50, "full": 0.52},
}
"""Required ratio or MFU of BERT-base's shape on two cores with AMX, by figure and profile."""

Notes = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """The options of ``afn bench engine``."""

    model: str | None = None  # None: BERT-base's shape with random weights
    layer: str = "2/3"
    device: str = "auto"
    dtype: str = "auto"
    batch_tokens: int | None = None
    tokenizer_workers: int | None = None
    workers: int | None = None
    tokens: int | None = None  # of each profile's texts
    repeat: int = 3


@dataclass(frozen=True, slots=True)
class Take:
    """One repetition of one variant."""

    seconds: float
    foreign: float  # share of the cores' time that other processes used
    peak_bytes: int
    device_bytes: int
    forward_tokens: int
    stages: dict[str, float]  # seconds, summed over the processes


class Missing(Exception):
    """A package that the variant needs is not installed."""


class Team:
    """The processes of one variant, from their start to ``close``."""

    def __init__(
        self, specs: Sequence[Spec], folder: Path, parts: dict[str, list[list[int]]]
    ) -> None:
        self.name = specs[0].variant
        self.parts = parts  # profile -> indices of the texts of each process
        # The number of processes that compute.
        self.at_work = specs[0].workers if self.name == "ray_data" else len(specs)
        self._logs = [folder / f"{self.name}-{i}.log" for i in range(len(specs))]
        self._processes: list[subprocess.Popen[str]] = []
        single = specs[0].device == "cpu" and self.name not in ONE_PROCESS
        environment = os.environ | (WORKER_ENV if single else {"TOKENIZERS_PARALLELISM": "true"})
        for i, (spec, log) in enumerate(zip(specs, self._logs, strict=True)):
            path = folder / f"{self.name}-{i}.json"
            path.write_text(json.dumps(asdict(spec)), "utf-8")
            command = [sys.executable, "-m", "afn_ray.bench.worker", str(path)]
            with log.open("w") as errors:
                process = subprocess.Popen(  # noqa: S603 - this project's own module
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env=environment,
                    start_new_session=True,
                )
            self._processes.append(process)

    def answers(self) -> list[dict[str, Any]]:
        """Read one answer from each process.

        Raises ``Missing``, ``ModelError`` with the error that a process reports, or ``AfnError``
        with the last line of its log when the process ended.
        """
        found = []
        for process, log in zip(self._processes, self._logs, strict=True):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                last = log.read_text("utf-8", "replace").strip().splitlines()[-1:] or [
                    "it said nothing"
                ]
                raise AfnError(f"the process of {self.name} ended with {process.wait()}: {last[0]}")
            answer = json.loads(line)
            if "missing" in answer:
                raise Missing(answer["missing"])
            if "error" in answer:
                raise ModelError(f"{self.name}: {answer['error']}")
            found.append(answer)
        return found

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send one request to each process, and read the answers. Raises as ``answers`` does."""
        for process, request in zip(self._processes, requests, strict=True):
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                break  # ``answers`` raises with the cause
        return self.answers()

    def multiply(self) -> tuple[float, float]:
        """GEMM FLOP/s summed over the processes, and the share of the cores that others used.

        The processes are those of the variant ``gemm``.
        """
        with machine.Watch(p.pid for p in self._processes) as watch:
            answers = self.ask([{}] * len(self._processes))
        return sum(a["flops_per_s"] for a in answers), watch.foreign

    def run(self, profile: str) -> Take:
        """Run the profile once, in all processes at the same time."""
        with machine.Watch(p.pid for p in self._processes) as watch:
            began = time.monotonic()
            answers = self.ask([{"run": profile}] * len(self._processes))
            seconds = time.monotonic() - began
        if answers[0]["own_clock"]:
            seconds = answers[0]["seconds"]
        stages: dict[str, float] = {}
        for answer in answers:
            for name, value in answer["stages"].items():
                stages[name] = stages.get(name, 0.0) + value
        return Take(
            seconds,
            watch.foreign,
            watch.peak_bytes,
            sum(a["device_bytes"] for a in answers),
            sum(a["forward_tokens"] for a in answers),
            stages,
        )

    def strengths(self, profile: str, folder: Path | None) -> dict[int, tuple[Any, Any]]:
        """Strengths of the last run by text: at the layer, and at the last layer or None.

        Only the loop has strengths of the last layer too. Without a ``folder`` for the files, the
        result is empty. Raises ``ModelError`` when a process returns the wrong number of texts.
        """
        files = [
            None if folder is None else folder / f"{self.name}-{i}.npz"
            for i in range(len(self._processes))
        ]
        self.ask([{"save": profile, "file": None if f is None else str(f)} for f in files])
        found: dict[int, tuple[Any, Any]] = {}
        for file, part in zip(files, self.parts[profile], strict=True):
            if file is None:
                continue
            with np.load(file) as arrays:
                bounds = np.cumsum(arrays["lengths"])[:-1]
                own = np.split(arrays["strengths"], bounds)
                last = (
                    np.split(arrays["last"], bounds) if len(arrays["last"]) else [None] * len(own)
                )
            file.unlink()
            if len(own) != len(part):
                raise ModelError(
                    f"{self.name} gave strengths of {len(own)} texts, expected {len(part)}"
                )
            found |= dict(zip(part, zip(own, last, strict=True), strict=True))
        return found

    def close(self) -> None:
        """End the processes: close their input, and kill those that still run after 20 s."""
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            assert process.stdout is not None
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def measure(
    options: Options, profiles: Sequence[str], variants: Sequence[str], note: Notes
) -> dict[str, Any]:
    """The figures of ``variants`` on ``profiles``, as ``--json`` writes them.

    Raises ``ConfigError`` for an invalid option, and ``ModelError`` when the variants' strengths
    differ.
    """
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        base, counted, causal = _plan(options, folder)
        texts = _texts(options, base, profiles, causal)
        skipped = {
            v: _missing_note(v)
            for v in variants
            if v in NEEDS and not importlib.util.find_spec(NEEDS[v])
        }
        for reason in skipped.values():
            note(reason)
        present = [v for v in variants if v not in skipped]
        if not present:
            raise ConfigError(f"nothing to measure: {'; '.join(skipped.values())}")
        note(f"loading {', '.join(present)}")
        gemm = _start("gemm", base, folder, texts)
        stack.callback(gemm.close)
        gemm.answers()  # wait: it chooses its fastest product, so nothing else may run
        teams = {}
        for variant in present:
            teams[variant] = _start(variant, base, folder, texts)
            stack.callback(teams[variant].close)
        for variant, team in list(teams.items()):
            try:
                team.answers()
            except Missing as error:
                skipped[variant] = f"{_missing_note(variant)} ({error})"
                note(skipped[variant])
                del teams[variant]
        takes: dict[str, dict[str, list[Take]]] = {p: {v: [] for v in teams} for p in profiles}
        differences: dict[str, dict[str, float]] = {}
        # FLOP/s, and the share of the cores' time that other processes used.
        peaks: list[tuple[float, float]] = []
        for profile in profiles:
            for repetition in range(1, options.repeat + 1):
                peaks.append(gemm.multiply())
                strengths = {}
                for variant, team in teams.items():
                    take = team.run(profile)
                    takes[profile][variant].append(take)
                    strengths[variant] = team.strengths(
                        profile, folder if repetition == 1 else None
                    )
                    rate = _num_tokens(texts[profile], team.parts[profile]) / take.seconds
                    busy = (
                        f", others took {take.foreign:.0%} of the cores"
                        if take.foreign > FOREIGN
                        else ""
                    )
                    note(
                        f"{profile} {repetition}/{options.repeat} {variant}: {rate:,.0f} "
                        f"tokens/s{busy}"
                    )
                if repetition == 1:
                    differences[profile] = compare(strengths, base.dtype)
        peak = statistics.median(
            [p for p, foreign in peaks if foreign <= FOREIGN] or [p for p, _ in peaks]
        )
        return {
            **_facts(options, base),
            "gemm_peak_tflops": peak / 1e12,
            "gemm_peaks_tflops": [p / 1e12 for p, _ in peaks],
            "skipped": skipped,
            "profiles": {
                profile: {
                    variant: _figures(
                        variant,
                        taken,
                        takes[profile],
                        teams,
                        texts[profile],
                        profile,
                        counted,
                        peak,
                        differences[profile].get(variant),
                    )
                    for variant, taken in takes[profile].items()
                }
                for profile in profiles
            },
            "ratios": {
                profile: _ratios(takes[profile], texts[profile], teams, profile)
                for profile in profiles
            },
        }


# --- planning


@dataclass(frozen=True, slots=True)
class Counted:
    """Cost of one token in the blocks up to the layer, in floating-point operations."""

    linear: float  # per token
    attention: float  # per token and token of its window

    def flops(self, texts: Sequence[Text]) -> float:
        """Floating-point operations of the model on ``texts``, without padding.

        Tokens that two windows share count in both, because every variant computes them twice.
        """
        return sum(
            p.length * (self.linear + self.attention * p.length) for t in texts for p in t.pieces
        )


def _plan(options: Options, folder: Path) -> tuple[Spec, Counted, bool]:
    """The spec that all variants share, the cost of the model, and whether it is a decoder.

    Raises ``ConfigError`` for a GGUF file, a wrong layer, or several workers on a GPU.
    """
    name = options.model or str(save_bert(folder / "bert-base"))
    files = model.find_model(name, None, trust_remote_code=False, allow_pickle=False)
    if files.gguf:
        raise ConfigError(
            f"{name} is a GGUF file, which the peers cannot read; give a model folder or a hub name"
        )
    layer = one_layer(options.layer, files.depth)
    device = model.choose_device(options.device)
    if device == "cuda" and (options.workers or 1) > 1:
        raise ConfigError(f"--workers is {options.workers}; on a GPU every variant is one process")
    fast = model.has_fast_products("bfloat16", device)
    dtype = options.dtype if options.dtype != "auto" else "bfloat16" if fast else "float32"
    default = next(f.default for f in fields(RunConfig) if f.name == "tokenizer_workers")
    workers = (options.workers or model.count_devices("cpu")) if device == "cpu" else 1
    base = Spec(
        "",
        str(files.folder),
        layer,
        files.depth,
        device,
        dtype,
        options.batch_tokens or worker.BATCH_TOKENS[device],
        int(str(default)) if options.tokenizer_workers is None else options.tokenizer_workers,
        min(files.context_tokens, LONGEST_WINDOW),
        workers,
        "",
        {},
    )
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(files.folder, local_files_only=True)
        shape = transformers.AutoModel.from_config(config)
    causal = any(getattr(m, "is_causal", False) is True for m in shape.modules())
    linear = [m for b in find_blocks(shape, files.depth)[:layer] for m in b.modules()]
    weights = sum(m.weight.numel() for m in linear if isinstance(m, torch.nn.Linear | Conv1D))
    return (
        base,
        Counted(2.0 * weights, 4.0 * files.hidden_size * layer * (0.5 if causal else 1)),
        causal,
    )


def one_layer(text: str, depth: int) -> int:
    """The layer that ``text`` names, from 1 to ``depth``.

    Raises ``ConfigError`` when it names several layers or layer 0, the embeddings.
    """
    layers = resolve_layers(text, depth)
    if len(layers) != 1 or layers[0] == 0:
        raise ConfigError(
            f"--layer is {text!r}; expected one layer from 1 to {depth}, or a fraction of the depth"
        )
    return layers[0]


def _texts(
    options: Options, base: Spec, profiles: Sequence[str], causal: bool
) -> dict[str, list[Text]]:
    files = model.find_model(base.model, None, trust_remote_code=False, allow_pickle=False)
    writer = Writer(model.load_tokenizer(files), base.window_tokens)
    num_tokens = options.tokens or TOKENS_PER_WORKER[base.device] * base.workers
    texts = {
        profile: writer.write(profile, num_tokens, base.batch_tokens * base.workers, causal=causal)
        for profile in profiles
    }
    for profile, found in texts.items():
        if len(found) < base.workers:
            raise ConfigError(
                f"--tokens {num_tokens} is {len(found)} texts of the profile {profile}, too few "
                f"for {base.workers} "
                "workers; give more"
            )
    return texts


def _start(variant: str, base: Spec, folder: Path, texts: dict[str, list[Text]]) -> Team:
    n = 1 if variant in ONE_PROCESS else base.workers
    parts: dict[str, list[list[int]]] = {"gemm": [[]] * n}
    if variant != "gemm":
        parts = {
            p: [sample(t, ONE_IN)] if variant in SLOW else share(t, n) for p, t in texts.items()
        }
    specs = []
    for i in range(n):
        own = folder / f"{variant}-{i}"
        own.mkdir()
        files = {}
        if variant != "gemm":
            for profile, part in parts.items():
                dump_texts([texts[profile][at] for at in part[i]], own / f"{profile}.json")
                files[profile] = str(own / f"{profile}.json")
        specs.append(
            Spec(**asdict(base) | {"variant": variant, "folder": str(own), "texts": files})
        )
    return Team(specs, folder, parts)


def _missing_note(variant: str) -> str:
    return (
        f"{variant} is skipped: {NEEDS.get(variant, variant)} is not installed; pip install "
        "'afn-ray[bench]'"
    )


# --- figures


def compare(strengths: dict[str, dict[int, tuple[Any, Any]]], dtype: str) -> dict[str, float]:
    """Relative difference of each variant's strengths from the reference, by variant.

    It is the 99th percentile over tokens. The reference is the first variant present of engine,
    loop, tuned, job and ray_data. ``sentence_transformers`` has the last layer only, so its
    reference is the loop's last layer. Raises ``ModelError`` when the shapes differ, or when a
    difference exceeds ``TOLERANCE``: figures of variants with different results cannot be compared.
    """
    order = [v for v in ("engine", "loop", "tuned", "job", "ray_data") if v in strengths]
    reference = {i: own for i, (own, _) in strengths[order[0]].items()} if order else {}
    last = {i: last for i, (_, last) in strengths.get("loop", {}).items()}
    found = {}
    for variant, by_text in strengths.items():
        expected = last if variant == "sentence_transformers" else reference
        common = sorted(by_text.keys() & expected.keys())
        if not common:
            continue
        for i in common:
            if by_text[i][0].shape != expected[i].shape:
                raise ModelError(
                    f"{variant} has {len(by_text[i][0])} tokens of text {i}, expected "
                    f"{len(expected[i])}: "
                    "the variants do not measure the same; no figures"
                )
        got, want = (
            np.concatenate([v[i] for i in common])
            for v in ({i: by_text[i][0] for i in common}, expected)
        )
        difference = float(np.quantile(np.abs(got - want) / np.abs(want), 0.99))
        if not difference <= TOLERANCE[dtype]:
            raise ModelError(
                f"{variant} differs from {order[0]} by {difference:.1e} relative, more than "
                f"rounding in {dtype} "
                f"({TOLERANCE[dtype]:.0e}): the variants do not measure the same; no figures"
            )
        found[variant] = difference
    return found


def _num_tokens(texts: Sequence[Text], parts: Sequence[Sequence[int]]) -> int:
    return sum(texts[i].num_tokens for part in parts for i in part)


def _clean(takes: Sequence[Take]) -> list[int]:
    """Indices of the clean repetitions; of all repetitions when none is clean."""
    return [i for i, take in enumerate(takes) if take.foreign <= FOREIGN] or list(range(len(takes)))


def _ratio(
    of: str,
    to: str,
    takes: dict[str, list[Take]],
    texts: Sequence[Text],
    teams: dict[str, Team],
    profile: str,
) -> float | None:
    """Median over repetitions of the speed of ``of`` divided by that of ``to``.

    Both speeds come from the same repetition. The result is None when a variant was not measured.
    """
    if of not in takes or to not in takes:
        return None
    tokens = _num_tokens(texts, teams[of].parts[profile]) / _num_tokens(
        texts, teams[to].parts[profile]
    )
    both = set(_clean(takes[of])) & set(_clean(takes[to])) or set(range(len(takes[of])))
    return statistics.median(tokens * takes[to][i].seconds / takes[of][i].seconds for i in both)


def _ratios(
    takes: dict[str, list[Take]], texts: Sequence[Text], teams: dict[str, Team], profile: str
) -> dict[str, float]:
    pairs = [name.split("/") for name in BARS if "/" in name]
    found = {f"{of}/{to}": _ratio(of, to, takes, texts, teams, profile) for of, to in pairs}
    return {name: value for name, value in found.items() if value is not None}


def _figures(
    variant: str,
    taken: Sequence[Take],
    takes: dict[str, list[Take]],
    teams: dict[str, Team],
    texts: Sequence[Text],
    profile: str,
    counted: Counted,
    peak: float,
    difference: float | None,
) -> dict[str, Any]:
    parts = teams[variant].parts[profile]
    own = [texts[i] for part in parts for i in part]
    tokens, in_windows = (
        sum(t.num_tokens for t in own),
        sum(p.length for t in own for p in t.pieces),
    )
    clean = [taken[i] for i in _clean(taken)]
    rates = [tokens / take.seconds for take in clean]
    rate = statistics.median(rates)
    forward = clean[0].forward_tokens
    total = {name: sum(t.stages.get(name, 0.0) for t in clean) for name in clean[0].stages}
    return {
        "tokens_per_s": rate,
        "low": min(rates),
        "high": max(rates),
        "seconds": [t.seconds for t in taken],
        "foreign": [round(t.foreign, 3) for t in taken],
        "n_clean": sum(t.foreign <= FOREIGN for t in taken),
        "ratio_loop": _ratio(variant, "loop", takes, texts, teams, profile),
        "ratio_tuned": _ratio(variant, "tuned", takes, texts, teams, profile),
        "mfu": counted.flops(own) / tokens * rate / peak,
        "padding": max(0.0, 1 - in_windows / forward),
        "tokens": tokens,
        "texts": len(own),
        "stages": {
            name: value / len(clean) / teams[variant].at_work for name, value in total.items()
        },
        "peak_bytes": max(t.peak_bytes for t in taken),
        "device_bytes": max(t.device_bytes for t in taken),
        "difference": difference,
    }


def _facts(options: Options, base: Spec) -> dict[str, Any]:
    return {
        **machine.facts(base.device),
        "model": options.model or BUILT_IN,
        "layer": base.layer,
        "depth": base.depth,
        "device": base.device,
        "dtype": base.dtype,
        "workers": base.workers,
        "window_tokens": base.window_tokens,
        "batch_tokens": base.batch_tokens,
        "repeat": options.repeat,
    }


# --- printing


def render(result: dict[str, Any], console: Console) -> None:
    """Print a table per profile, the ratios with their bars, and what each variant is."""
    machine.print_facts(result, console)
    console.print(
        f"model: {result['model']}; layer {result['layer']} of {result['depth']}", markup=False
    )
    console.print(
        f"{result['workers']} processes on {result['device']}, {result['dtype']}, windows of "
        f"{result['window_tokens']} tokens, batches of {result['batch_tokens']}; GEMM peak in this "
        "run "
        f"{result['gemm_peak_tflops']:.3f} TFLOP/s; n = {result['repeat']}, median "
        "(lowest-highest)",
        markup=False,
    )
    for profile, variants in result["profiles"].items():
        table = Table(
            box=None,
            pad_edge=False,
            padding=(0, 1),
            title=f"\n{profile}",
            title_justify="left",
            title_style="bold",
        )
        for heading in (
            "",
            "tokens/s",
            "",
            "x loop",
            "x tuned",
            "MFU",
            "padding",
            "GB",
            "differs",
            "clean",
        ):
            table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
        for name, f in variants.items():
            table.add_row(
                name,
                f"{f['tokens_per_s']:,.0f}",
                f"({f['low']:,.0f}-{f['high']:,.0f})",
                _times(f["ratio_loop"]),
                _times(f["ratio_tuned"]),
                f"{f['mfu']:.1%}",
                f"{f['padding']:.1%}",
                f"{(f['peak_bytes'] + f['device_bytes']) / 1e9:.1f}",
                "-" if f["difference"] is None else f"{f['difference']:.0e}",
                f"{f['n_clean']}/{result['repeat']}",
            )
        console.print(table)
        for name, f in variants.items():
            stages = ", ".join(f"{k[:-2]} {v:.2f}" for k, v in f["stages"].items())
            seconds = statistics.median(f["seconds"])
            took = f"{f['texts']} texts, {seconds:.2f} s; stages, which overlap"
            console.print(f"  {name}: {took}: {stages}", markup=False)
        _render_bars(result, profile, console)
    console.print()
    for name, reason in result["skipped"].items():
        console.print(f"{name}: {reason}", markup=False)
    for name in next(iter(result["profiles"].values())):
        console.print(f"{name}: {VARIANTS[name]}", markup=False)
    console.print(
        f"Every clock counts tokenizing. {' and '.join(SLOW)} get one text in {ONE_IN}, of all "
        "lengths, and torch's "
        "own threads; the others get one thread a core. Peers get long texts already cut into our "
        "windows. MFU: "
        "operations of the blocks up to the layer, without padding, of the GEMM peak. Sizes are "
        "those of long runs in "
        "small: nearly whole batches, lengths as evenly spread. differs: relative difference "
        "of strengths from the engine's, 99th percentile. clean: others took at most "
        f"{FOREIGN:.0%} of the cores.",
        markup=False,
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def _render_bars(result: dict[str, Any], profile: str, console: Console) -> None:
    found = dict(result["ratios"][profile])
    if "engine" in result["profiles"][profile]:
        found["engine mfu"] = result["profiles"][profile]["engine"]["mfu"]
    barred = result["model"] == BUILT_IN and result["device"] == "cpu"
    parts = []
    for name, value in found.items():
        bar = BARS[name].get(profile) if barred else None
        parts.append(
            f"{name} {value:.2f}"
            + (f" ({'met' if value >= bar else 'below'}: {bar:g})" if bar else "")
        )
    if parts:
        bars = (
            " (bars are those of two cores with AMX)"
            if barred and profile in BARS["engine/loop"]
            else ""
        )
        console.print(f"  ratios: {', '.join(parts)}{bars}", markup=False)
