"""Progress of a run: a bar, log lines or JSON."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from afn_ray import logs
from afn_ray.text import count, printable

if TYPE_CHECKING:
    from afn_ray.runs.dispatch import State
    from afn_ray.runs.job import Event, OnEvent

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
    console, last = Console(stderr=True, highlight=False), time.monotonic()

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
        yield _log_json(lines)
    elif quiet:
        yield _warnings(console)
    elif console.is_terminal:
        with _live(console) as on_event:
            yield on_event
    else:
        yield _log(console)


@contextlib.contextmanager
def _live(console: Console) -> Iterator[OnEvent]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
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
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("planning", total=None, note="")

        def on_event(event: Event) -> None:
            if event.kind in ("planned", "warning", "complete"):
                progress.console.print(printable(event.message), markup=False, soft_wrap=True)
            elif event.kind == "hashing":
                progress.update(
                    task,
                    description=event.message,
                    completed=event.done,
                    total=event.total,
                    note="files",
                )
            elif event.state is not None:
                what, done, total = _bar(event.state)
                progress.update(
                    task, description=what, completed=done, total=total, note=_note(event)
                )
            else:
                progress.update(task, description=event.message, completed=0, total=None, note="")

        yield on_event


def _warnings(console: Console) -> OnEvent:
    def on_event(event: Event) -> None:
        if event.kind == "warning":
            console.print(printable(event.message), markup=False, soft_wrap=True)

    return on_event


def _log(console: Console) -> OnEvent:
    last = 0.0

    def on_event(event: Event) -> None:
        nonlocal last
        state = event.state
        if state is None and event.kind != "hashing":
            console.print(printable(event.message), markup=False, soft_wrap=True)
        elif time.monotonic() - last >= LOG_EVERY_S:
            last = time.monotonic()
            if state is None:
                console.print(
                    f"{event.message}: {event.done:,} of {event.total:,} files", markup=False
                )
            else:
                what, done, total = _bar(state)
                console.print(
                    f"{what} {done:,}/{total:,}  {_note(event)}", markup=False, soft_wrap=True
                )

    return on_event


def _log_json(lines: logs.Lines) -> OnEvent:
    """Log events as JSON records; progress at most every ``LOG_EVERY_S`` seconds."""
    last, log = 0.0, logging.getLogger(logs.ROOT)

    def on_event(event: Event) -> None:
        nonlocal last
        if event.run:
            lines.about["run"] = event.run
        state = event.state
        if state is None and event.kind != "hashing":
            level = logging.WARNING if event.kind == "warning" else logging.INFO
            logs.tell(log, event.kind, event.message.removeprefix("warning: "), level=level)
        elif time.monotonic() - last >= LOG_EVERY_S:
            last = time.monotonic()
            if state is None:
                logs.tell(
                    log,
                    "hashing",
                    event.message,
                    counts={"files_done": event.done, "files": event.total},
                )
                return
            counts = {
                "shards": state.num_shards,
                "done": len(state.commits),
                "quarantined": len(state.failures),
                "running": state.num_running,
                "retries": state.retries,
                "workers": state.num_workers,
                "workers_ready": state.num_ready,
                "documents": state.live.documents,
                "tokens": state.live.tokens,
                "lost_bytes": state.counts["lost_bytes"],
                "documents_measured": state.num_measured,
                "documents_planned": state.num_documents,
            }
            logs.tell(
                log,
                "progress",
                _note(event),
                counts=counts,
                tokens_per_s=round(state.tokens_per_s, 1),
                left_s=state.left_s and round(state.left_s),
            )

    return on_event


def _bar(state: State) -> tuple[str, int, int]:
    """The bar's unit, done and total: documents where their number is planned, else shards."""
    if state.num_documents:
        return "documents", state.num_measured, state.num_documents
    return "shards", state.num_done, state.num_shards


def _note(event: Event) -> str:
    """Documents, tokens per second, padding, time left and failures of a run in progress."""
    assert event.state is not None
    state, live = event.state, event.state.live
    if not state.num_ready and not state.commits:
        return f"waiting for workers: 0 of {state.num_workers} have loaded the model"
    from afn_ray.reduce import losses
    from afn_ray.runs import status

    counted = f"{state.num_measured:,} documents"
    if state.num_documents:  # the bar already shows documents
        counted = f"{state.num_done:,} of {count(state.num_shards, 'shard')}"
    parts = [counted, f"{state.tokens_per_s:,.0f} tokens/s"]
    if live.tokens:
        parts.append(f"{max(0.0, 1 - live.tokens / live.forward_tokens):.1%} padding")
    if (left_s := state.left_s) is not None:
        parts.append(f"{left_s:,.0f} s left" if left_s < 600 else f"{left_s / 60:,.0f} min left")
    if waits := status.waits(live):
        parts.append(waits)
    if lost := state.counts["lost_bytes"]:
        parts.append(f"{losses.said_bytes(lost)} lost")
    if state.retries:
        parts.append(f"{state.retries} retried")
    if state.failures:
        parts.append(f"{len(state.failures)} FAILED")
    return ", ".join(parts)
