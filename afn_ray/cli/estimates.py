"""Print a dry run's estimate for people."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from afn_ray.text import count, printable

if TYPE_CHECKING:
    from afn_ray.runs.estimate import Estimate
    from afn_ray.runs.prices import Cost


def print_estimate(e: Estimate, console: Console) -> None:
    from afn_ray.reduce import losses

    about = "" if e.documents_exact else "about "
    todo = e.num_shards - e.num_shards_done
    labels = f"by the thresholds of {e.thresholds}" if e.thresholds else ""
    signals = ", ".join(f"{name} {cost:+.0%}" for name, cost in e.signal_costs.items())
    if signals:
        signals = f"time of the forward pass beside strength alone: {signals}"
    rows = [
        (
            "model",
            f"{e.model}: layers {', '.join(map(str, e.layers))} of {e.depth}, {e.dtype} on "
            f"{e.device}",
        ),
        ("windows", f"{e.window_tokens} tokens, {e.overlap_tokens} shared by neighbours"),
        (
            "corpus",
            f"{about}{count(e.num_documents, 'document')}, {count(e.num_bytes, 'byte')} in "
            f"{count(e.num_files, 'file')}",
        ),
        *_selected(e),
        *_lost(e),
        (
            "shards",
            f"{e.num_shards:,}, of them {e.num_shards_done:,} in the store and {todo:,} to do",
        ),
        ("columns", e.composed),
        ("tokens", _tokens(e)),
        ("store", f"about {e.store_bytes:,} bytes"),
        ("HIGH", labels),
        *_recorded(e),
        ("workers", e.workers),
        *(("workers", notice) for notice in e.notices),
        *_pace(e),
        (
            "requests",
            f"about {e.num_puts:,} PUT or LIST, {e.num_gets:,} GET or HEAD, if corpus and store "
            "are buckets",
        ),
        ("signals", signals),
        *(_bill(e) if e.prices else []),
        ("measure", e.measure),
    ]
    for name, value in rows:
        if value:
            console.print(f"{name:<8} {printable(value)}", markup=False, soft_wrap=True)
    if skipped := losses.describe_skipped(e.skipped):
        console.print(f"skipped  {printable(skipped)}", markup=False, soft_wrap=True)
    console.print("nothing was done (--dry-run)", markup=False)


def _selected(e: Estimate) -> Iterator[tuple[str, str]]:
    """The selection, and what it leaves unread."""
    from afn_ray.reduce import selected

    if not e.selection:
        return
    left_out = ""
    if e.counts.get("unselected"):
        left_out = f"{selected.describe_left_out(e.counts)}{_of_sample(e)}"
    yield (
        "selected",
        "; ".join(filter(None, [e.selection, left_out, selected.describe_unread(e.unread)])),
    )


def _lost(e: Estimate) -> Iterator[tuple[str, str]]:
    """Quarantined documents and replaced characters."""
    from afn_ray.reduce import losses

    if quarantined := e.counts.get("quarantined"):
        why = f", as in {e.reasons[0]}" if e.reasons else ""
        yield "lost", f"{count(quarantined, 'document')} quarantined{_of_sample(e)}{why}"
    if replaced := e.counts.get("replaced"):
        yield "replaced", f"{count(replaced, 'character')}{_of_sample(e)}"
    if question := losses.describe_encoding(replaced or 0, e.replaced_in, e.encoding):
        yield "encoding", question


def _of_sample(e: Estimate) -> str:
    """The documents that were counted, where they are a sample."""
    if e.tokens_exact:
        return ""
    num_read = e.counts.get("documents", 0) + e.counts.get("unselected", 0)
    return f" among {count(num_read, 'document')} that were read"


def _recorded(e: Estimate) -> Iterator[tuple[str, str]]:
    """The rows of tokens that are kept, if not all are."""
    from afn_ray import token_rows

    if not token_rows.is_complete(e.record):
        yield "recorded", token_rows.describe(e.record)


def _tokens(e: Estimate) -> str:
    """The number of tokens, and how it was obtained."""
    there = f"{e.tokens_there:,} in the store" if e.tokens_there else ""
    known = e.tokens_there + e.tokens_composed
    composed = f"{e.tokens_composed:,} in shards with copied columns" if e.tokens_composed else ""
    if e.tokens_exact:
        more = f"{e.tokens - known:,} counted" if e.tokens > known else ""
        return f"{e.tokens:,}: {', '.join(filter(None, (there, composed, more)))}"
    parts = [there, composed, "the rest from a sample" if known else "from a sample"]
    if e.num_beginnings:
        parts.append(f"of {count(e.num_beginnings, 'large file')} the beginning alone")
    interval = f"{e.tokens_low:,} to {e.tokens_high:,} with 95 %"
    return f"about {e.tokens:,} ({interval}): {', '.join(filter(None, parts))}"


def _pace(e: Estimate) -> Iterator[tuple[str, str]]:
    """Rate, time and work, or why they are unknown."""
    if e.num_shards_done == e.num_shards and e.seconds is not None:
        yield "time", f"about {_duration(e.seconds)}: nothing is left to measure"
        return
    if e.tokens_per_second is None and e.seconds is None:
        yield "rate", f"not known: {e.rate}"
    elif e.tokens_per_second is not None:
        yield "rate", f"{e.tokens_per_second:,.0f} tokens/s of one worker ({e.rate})"
    if e.seconds is None or e.load_s is None or e.worker_hours is None:
        yield "time", f"not known without a rate; {count(e.num_workers, 'worker')}"
        return
    yield (
        "time",
        (
            f"about {_duration(e.seconds)} with {count(e.num_workers, 'worker')}: loading "
            f"{_duration(e.load_s)}, reduce and screening {_duration(e.reduce_s)}"
        ),
    )
    unit, shared = "worker", ""
    if e.device == "cuda":
        unit = "GPU"
        shared = f" / {e.workers_per_gpu}" if e.workers_per_gpu > 1 else ""
    yield (
        "work",
        (
            f"about {e.worker_hours / e.workers_per_gpu:,.2f} {unit}-hours = {e.num_workers} x "
            f"{e.seconds / 3600:,.3f}{shared}"
        ),
    )


def _bill(e: Estimate) -> Iterator[tuple[str, str]]:
    """The cost with its arithmetic; items without a price are listed and left out of the sum."""
    assert e.prices is not None and e.monthly is not None
    currency = e.prices.currency
    yield "prices", f"in {currency}, of {e.prices.as_of}"
    for cost in (*e.costs, e.monthly):
        a_month = " a month" if cost is e.monthly else ""
        yield "money", f"{cost.what}: {_arithmetic(cost, currency)}{a_month}"
        if cost.what == "workers" and e.prices.worker_hour_on_demand is not None:
            dearer = replace(cost, price=e.prices.worker_hour_on_demand)
            yield "money", f"workers, all on demand instead: {_arithmetic(dearer, currency)}"
    if not e.costs:
        yield "money", "the run: not known without a rate"
        return
    total = sum(cost.total for cost in e.costs if cost.total is not None)
    without = [cost.what for cost in e.costs if cost.price is None]
    yield (
        "money",
        f"the run: {_amount(total)} {currency}"
        + (f" without {', '.join(without)}" if without else ""),
    )


def _arithmetic(cost: Cost, currency: str) -> str:
    if cost.price is None:
        return f"{_amount(cost.amount)} {cost.unit}, for which there is no price"
    return (
        f"{_amount(cost.amount)} {cost.unit} x {cost.price:g} = {_amount(cost.total or 0.0)} "
        f"{currency}"
    )


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value >= 100 else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
