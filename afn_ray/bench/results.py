"""Print the results of ``afn bench engine``."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

from afn_ray.bench import BUILT_IN, VARIANTS, machine
from afn_ray.bench.contest import ONE_IN, SLOW, EngineResult
from afn_ray.bench.figures import BARS, FOREIGN


def render(result: EngineResult, console: Console) -> None:
    """Print a table per profile, the ratios with their bars, and what each variant is."""
    machine.print_facts(result, console)
    console.print(
        f"model: {result['model']}; layer {result['layer']} of {result['depth']}", markup=False
    )
    console.print(
        f"{result['workers']} processes on {result['device']}, {result['dtype']}, windows of "
        f"{result['window_tokens']} tokens, batches of {result['batch_tokens']}; GEMM peak in "
        f"this run {result['gemm_peak_tflops']:.3f} TFLOP/s; n = {result['repeat']}, median "
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
            times = f" {f['passes']} times" if f["passes"] > 1 else ""
            took = f"{f['texts']} texts{times}, {seconds:.2f} s; stages, which overlap"
            console.print(f"  {name}: {took}: {stages}", markup=False)
        _render_bars(result, profile, console)
    console.print()
    for name, reason in result["skipped"].items():
        console.print(f"{name}: {reason}", markup=False)
    for name in next(iter(result["profiles"].values())):
        console.print(f"{name}: {VARIANTS[name]}", markup=False)
    console.print(
        f"Every clock counts tokenizing. {' and '.join(SLOW)} get one text in {ONE_IN}, of all "
        "lengths, and torch's own threads; the others get one thread a core. Peers get long texts "
        "already cut into our windows. MFU: operations of the blocks up to the layer, without "
        "padding, of the GEMM peak. Sizes are those of long runs in small: nearly whole batches, "
        "lengths as evenly spread. differs: relative difference of strengths from the engine's, "
        f"99th percentile. clean: others took at most {FOREIGN:.0%} of the cores.",
        markup=False,
    )


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def _render_bars(result: EngineResult, profile: str, console: Console) -> None:
    found = dict(result["ratios"][profile])
    if "engine" in result["profiles"][profile]:
        found["engine mfu"] = result["profiles"][profile]["engine"]["mfu"]
    barred = result["model"] == BUILT_IN and result["device"] == "cpu"
    parts = []
    for name, value in found.items():
        bar = BARS[name].get(profile) if barred else None
        part = f"{name} {value:.2f}"
        if bar:
            part += f" ({'met' if value >= bar else 'below'}: {bar:g})"
        parts.append(part)
    if parts:
        bars = (
            " (bars are those of two cores with AMX)"
            if barred and profile in BARS["engine/loop"]
            else ""
        )
        console.print(f"  ratios: {', '.join(parts)}{bars}", markup=False)
