"""Compare the variants on the same texts, in turns, and with the machine's GEMM peak.

One variant runs at a time.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.pytorch_utils import Conv1D

from afn_ray import model
from afn_ray.bench import BUILT_IN, LEAST_S, TOKENS_PER_WORKER, machine
from afn_ray.bench.figures import (
    FOREIGN,
    Counted,
    ProfileTimes,
    VariantFigures,
    compare_strengths,
    profile_figures,
    ratios,
)
from afn_ray.bench.peers import Spec, blocks_of
from afn_ray.bench.team import ONE_PROCESS, Missing, Team
from afn_ray.bench.texts import Text, Writer, sample, save_bert, share
from afn_ray.bench.worker import dump_texts
from afn_ray.config import RunConfig, resolve_layers
from afn_ray.errors import ConfigError
from afn_ray.runs import measurer, precision
from afn_ray.runs.cluster import placement

LONGEST_WINDOW = 512
"""Longest window of the benchmark, in tokens."""
SLOW = ("loop", "sentence_transformers")
"""Variants that measure a sample of the texts: one text in ``ONE_IN``."""
ONE_IN = 16
"""Sampling interval of the slow variants' texts: the sample is large enough for their speed."""
NEEDS = {"sentence_transformers": "sentence_transformers", "ray_data": "pandas"}
"""Optional package that a variant imports, by variant."""

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


class EngineFacts(machine.MachineFacts):
    """Facts of a measurement: the machine, the model and the options."""

    model: str
    layer: int
    depth: int
    device: str
    dtype: str
    workers: int
    window_tokens: int
    batch_tokens: int
    repeat: int
    gemm_peak_tflops: float  # median of clean measurements, or of all where none is clean
    gemm_peaks_tflops: list[float]


class EngineResult(EngineFacts):
    """The figures of all variants, as ``--json`` writes them."""

    skipped: dict[str, str]  # variant -> why
    profiles: dict[str, dict[str, VariantFigures]]
    ratios: dict[str, dict[str, float]]


def measure(
    options: Options, profiles: Sequence[str], variants: Sequence[str], note: Notes
) -> EngineResult:
    """The figures of ``variants`` on ``profiles``.

    Raises ``ConfigError`` for an invalid option, and ``ModelError`` when the variants' strengths
    differ.
    """
    with tempfile.TemporaryDirectory(prefix="afn-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        base, counted, causal = _plan(options, folder)
        texts = _texts(options, base, profiles, causal)
        skipped = _without_package(variants)
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
        peaks: list[Peak] = []
        measured = []
        for profile in profiles:
            one = ProfileTimes(profile, texts[profile], teams, {v: [] for v in teams}, {})
            for repetition in range(options.repeat):
                peaks.append(Peak(*gemm.multiply()))
                strengths = _measure_once(one, folder, repetition, options.repeat, note)
                if repetition == 0:
                    one.differences = compare_strengths(strengths, base.dtype)
            measured.append(one)
    return _result(_facts(options, base, peaks), skipped, measured, counted)


class Peak(NamedTuple):
    """One measurement of the machine's GEMM peak."""

    flops_per_s: float
    foreign: float
    """Share of the cores' time that other processes used."""


def _measure_once(
    measured: ProfileTimes, folder: Path, repetition: int, repeat: int, note: Notes
) -> dict[str, dict[int, tuple[Any, Any]]]:
    """Run every variant once; return their strengths in the first repetition."""
    strengths = {}
    for variant, team in measured.teams.items():
        take = team.run(measured.profile)
        measured.takes[variant].append(take)
        strengths[variant] = team.strengths(measured.profile, folder if repetition == 0 else None)
        rate = measured.num_tokens(variant) / take.seconds
        busy = f", others took {take.foreign:.0%} of the cores" if take.foreign > FOREIGN else ""
        turn = f"{measured.profile} {repetition + 1}/{repeat} {variant}"
        note(f"{turn}: {rate:,.0f} tokens/s{busy}")
    return strengths


def _result(
    facts: EngineFacts,
    skipped: dict[str, str],
    measured: Sequence[ProfileTimes],
    counted: Counted,
) -> EngineResult:
    peak = facts["gemm_peak_tflops"] * 1e12
    profiles = {}
    for one in measured:
        profiles[one.profile] = {v: profile_figures(one, v, counted, peak) for v in one.teams}
    return {
        **facts,
        "skipped": skipped,
        "profiles": profiles,
        "ratios": {one.profile: ratios(one) for one in measured},
    }


def _without_package(variants: Sequence[str]) -> dict[str, str]:
    """Reason why a variant is skipped, for those whose optional package is not installed."""
    skipped = {}
    for variant in variants:
        package = NEEDS.get(variant)
        if package is not None and not importlib.util.find_spec(package):
            skipped[variant] = _missing_note(variant)
    return skipped


# --- planning


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
    dtype = options.dtype if options.dtype != "auto" else likely_dtype(device)
    asked = RunConfig(
        corpus=("-",), model=name, store="-", tokenizer_workers=options.tokenizer_workers
    )
    placed = placement.place(asked, [placement.this_machine()], device)
    workers = (options.workers or model.count_devices("cpu")) if device == "cpu" else 1
    base = Spec(
        "",
        str(files.folder),
        layer,
        files.depth,
        device,
        dtype,
        options.batch_tokens or measurer.BATCH_TOKENS[device],
        placed.tokenizer_workers,
        min(files.context_tokens, LONGEST_WINDOW),
        workers,
        "",
        {},
        LEAST_S[device],
    )
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(files.folder, local_files_only=True)
        shape = transformers.AutoModel.from_config(config)
    causal = any(getattr(m, "is_causal", False) is True for m in shape.modules())
    weights = 0
    for block in blocks_of(shape, files.depth)[:layer]:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                weights += module.weight.numel()
    return (
        base,
        Counted(2.0 * weights, 4.0 * files.hidden_size * layer * (0.5 if causal else 1)),
        causal,
    )


def likely_dtype(device: str) -> str:
    """The number type that a run with ``--dtype auto`` tries first on ``device``.

    A run keeps it if a calibration on its corpus finds it safe.
    """
    return next(iter(precision.candidates("auto", device)), "float32")


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
                f"for {base.workers} workers; give more"
            )
    return texts


def _start(variant: str, base: Spec, folder: Path, texts: dict[str, list[Text]]) -> Team:
    n = 1 if variant in ONE_PROCESS else base.workers
    parts: dict[str, list[list[int]]] = {"gemm": [[]] * n}
    if variant != "gemm":
        parts = {}
        for profile, of_profile in texts.items():
            is_slow = variant in SLOW
            parts[profile] = [sample(of_profile, ONE_IN)] if is_slow else share(of_profile, n)
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


def _facts(options: Options, base: Spec, peaks: Sequence[Peak]) -> EngineFacts:
    every = [peak.flops_per_s for peak in peaks]
    clean = [peak.flops_per_s for peak in peaks if peak.foreign <= FOREIGN]
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
        "gemm_peak_tflops": statistics.median(clean or every) / 1e12,
        "gemm_peaks_tflops": [flops_per_s / 1e12 for flops_per_s in every],
    }


# --- printing
