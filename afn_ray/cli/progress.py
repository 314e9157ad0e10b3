"""Progress of a run: a bar, log lines or JSON."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console

from afn_ray import logs
from afn_ray.runs import events
from afn_ray.runs.events import Event, OnEvent
from afn_ray.runs.progress import Progress
from afn_ray.text import count, printable

LOG_EVERY_S = 30.0


class ToStderr(logging.Handler):
    """Logging handler that prints on ``sys.stderr``, above a live bar where there is one.

    A live bar replaces ``sys.stderr``, so the handler looks it up for each record.
    """

    def emit(self, record: logging.LogRecord) -> None:
        text = (
            f"afn: {printable(record.getMessage())}"
            if self.formatter is None
            else self.format(record)
        )
        print(text, file=sys.stderr)


def log_as(form: str, quiet: bool) -> None:
    """Set the log's format to ``form``, a value of ``RunConfig.log_format``, and its level."""
    log = logging.getLogger(logs.ROOT)
    for handler in log.handlers:
        handler.setFormatter(logs.Lines("json") if form == "json" else None)
    log.setLevel(logging.INFO if form == "json" and not quiet else logging.WARNING)


def json_lines() -> logs.Lines | None:
    """The formatter that writes the log as JSON; None where the log is text."""
    formatters = (handler.formatter for handler in logging.getLogger(logs.ROOT).handlers)
    return next((f for f in formatters if isinstance(f, logs.Lines)), None)


def now_and_then() -> Callable[[str], None]:
    """A function that prints its message on stderr, at most once in ``LOG_EVERY_S`` seconds."""
    console = Console(stderr=True, highlight=False)
    last = time.monotonic()

    def say(message: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_EVERY_S:
            last = time.monotonic()
            console.print(printable(message), markup=False, soft_wrap=True)

    return say


@contextlib.contextmanager
def shown_progress(console: Console, quiet: bool) -> Iterator[OnEvent]:
    """Show events: a live bar on a terminal, otherwise log lines.

    Log lines come at every event, with progress at most every ``LOG_EVERY_S`` seconds. ``quiet``
    shows warnings only.
    """
    if (
        lines := json_lines()
    ) is not None:  # for ``quiet``, ``log_as`` has set the level to warnings
        yield log_json(lines)
    elif quiet:
        yield _warnings(console)
    elif console.is_terminal:
        with _live(console) as on_event:
            yield on_event
    else:
        yield _log(console)


@contextlib.contextmanager
def _live(console: Console) -> Iterator[OnEvent]:
    from rich import progress as rich_progress
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("planning", total=None, note="")

        def on_event(event: Event) -> None:
            match event:
                case events.Hashing(done, total):
                    bar.update(
                        task, description=event.message, completed=done, total=total, note="files"
                    )
                case events.Working(progress):
                    what, done, total = bar_counts(progress)
                    bar.update(
                        task, description=what, completed=done, total=total, note=_note(progress)
                    )
                case (
                    events.Calibrating()
                    | events.Starting()
                    | events.Reducing()
                    | events.Screening()
                ):
                    bar.update(task, description=event.message, completed=0, total=None, note="")
                case _:
                    bar.console.print(printable(event.message), markup=False, soft_wrap=True)

        yield on_event


def _warnings(console: Console) -> OnEvent:
    def on_event(event: Event) -> None:
        if isinstance(event, events.Warned):
            console.print(printable(event.message), markup=False, soft_wrap=True)

    return on_event


def _log(console: Console) -> OnEvent:
    last = 0.0

    def on_event(event: Event) -> None:
        nonlocal last
        if isinstance(event, events.Hashing | events.Working):
            if time.monotonic() - last < LOG_EVERY_S:
                return
            last = time.monotonic()
        match event:
            case events.Hashing(done, total):
                console.print(f"{event.message}: {done:,} of {count(total, 'file')}", markup=False)
            case events.Working(progress):
                what, done, total = bar_counts(progress)
                text = f"{what} {done:,}/{total:,}  {_note(progress)}"
                console.print(text, markup=False, soft_wrap=True)
            case _:
                console.print(printable(event.message), markup=False, soft_wrap=True)

    return on_event


def log_json(lines: logs.Lines) -> OnEvent:
    """Log events as JSON records; progress at most every ``LOG_EVERY_S`` seconds."""
    last = 0.0
    log = logging.getLogger(logs.ROOT)

    def on_event(event: Event) -> None:
        nonlocal last
        if isinstance(event, events.Planned):
            lines.about["run"] = event.run
        if isinstance(event, events.Hashing | events.Working):
            if time.monotonic() - last < LOG_EVERY_S:
                return
            last = time.monotonic()
        match event:
            case events.Hashing(done, total):
                files = {"files_done": done, "files": total}
                logs.report(log, event.name, event.message, counts=files)
            case events.Working(progress):
                logs.report(
                    log,
                    event.name,
                    _note(progress),
                    counts=_counts(progress),
                    tokens_per_s=round(progress.tokens_per_s, 1),
                    left_s=progress.left_s and round(progress.left_s),
                )
            case events.Warned(notice):
                logs.report(log, event.name, notice, level=logging.WARNING)
            case _:
                logs.report(log, event.name, event.message)

    return on_event


def _counts(progress: Progress) -> dict[str, int | None]:
    """Counts of a run in progress, for the JSON log."""
    return {
        "shards": progress.num_shards,
        "done": progress.num_committed,
        "quarantined": len(progress.failures),
        "running": progress.num_running,
        "retries": progress.retries,
        "workers": progress.num_workers,
        "workers_ready": progress.num_ready,
        "documents": progress.work.documents,
        "tokens": progress.work.tokens,
        "lost_bytes": progress.counts["lost_bytes"],
        "documents_measured": progress.num_measured,
        "documents_planned": progress.num_documents,
    }


def bar_counts(progress: Progress) -> tuple[str, int, int]:
    """The bar's unit, done and total: documents where their number is planned, else shards."""
    if progress.num_documents:
        return "documents", progress.num_measured, progress.num_documents
    return "shards", progress.num_done, progress.num_shards


def _note(progress: Progress) -> str:
    """Documents, tokens per second, padding, time left and failures of a run in progress."""
    if loading := progress.loading_text:
        return f"waiting for {loading}"
    from afn_ray.reduce import losses

    if progress.num_documents:  # the bar already shows documents
        counted = f"{progress.num_done:,} of {count(progress.num_shards, 'shard')}"
    else:
        counted = count(progress.num_measured, "document")
    parts = [counted, f"{progress.tokens_per_s:,.0f} tokens/s"]
    if (share := progress.share_padded) is not None:
        parts.append(f"{share:.1%} padding")
    if (left_s := progress.left_s) is not None:
        parts.append(f"{left_s:,.0f} s left" if left_s < 600 else f"{left_s / 60:,.0f} min left")
    if bottleneck := progress.work.bottleneck:
        parts.append(bottleneck)
    if lost := progress.counts["lost_bytes"]:
        parts.append(f"{losses.bytes_text(lost)} lost")
    if progress.retries:
        parts.append(f"{progress.retries} retried")
    if progress.failures:
        parts.append(f"{len(progress.failures)} FAILED")
    return ", ".join(parts)
