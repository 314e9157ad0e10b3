"""The status of a run as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from afn_ray.reduce import losses
from afn_ray.runs.status import EXIT_CODES, Status, StatusBody
from afn_ray.text import count


def lines(s: Status) -> Iterator[str]:
    """Lines that describe one run, one fact a line."""
    body = s.body
    live = s.state not in EXIT_CODES
    yield f"run      {s.uri}"
    yield f"state    {_state_text(s)}"
    yield from _more_reasons(body)
    if "phase" not in body:
        return
    by = f", by {body['host']} (pid {body['pid']})" if "host" in body else ""
    yield f"begun    {body['began_at']}{by}"
    yield f"corpus   {', '.join(body['corpus'])}"
    if body["shards"].get("planned"):
        yield f"shards   {_shards_text(body, live=live)}"
        yield f"tokens   {_tokens_text(body)}"
    if lost := body["bytes_lost"]:
        named = "; 'afn show' of the complete run names the files" if s.state != "failed" else ""
        yield f"lost     {losses.bytes_text(lost)} of the corpus{named}"
    if live and body["documents_planned"]:
        planned = count(body["documents_planned"], "document")
        yield f"measured {body['documents_measured']:,} of {planned} of this call"
    if body.get("tokens_per_s"):
        left = f", {time_text(body['left_s'])} left" if live and body["left_s"] is not None else ""
        yield f"rate     {body['tokens_per_s']:,.0f} tokens/s{left}"
    if live and (workers := body["workers"]):
        so_far = f", {workers['lost']:,} lost so far" if workers["lost"] else ""
        yield f"workers  {workers['ready']:,} of {workers['wanted']:,} ready{so_far}"
    if live and body["waits_for"]:
        yield f"waits    {body['waits_for']}"
    if body.get("last_commit_at"):
        yield f"commit   the last at {body['last_commit_at']}"
    yield from _failure_lines(body)
    for notice in body.get("notices", [])[-3:]:
        yield f"notice   {notice}"


def _shards_text(body: StatusBody, *, live: bool) -> str:
    """Numbers of shards; ``live``: the run has not ended."""
    shards = body["shards"]
    planned = body["shards"]["planned"]
    parts = [f"{shards['done']:,} of {planned:,} done ({shards['done'] / planned:.1%})"]
    if shards["reused"]:
        parts.append(f"{shards['reused']:,} of them before")
    if live and shards["running"]:
        parts.append(f"{shards['running']:,} on workers")
    if shards["quarantined"]:
        parts.append(f"{shards['quarantined']:,} quarantined")
    if body.get("retries"):
        parts.append(f"{body['retries']:,} tried again")
    return ", ".join(parts)


def _tokens_text(body: StatusBody) -> str:
    text = f"{body['tokens']:,}, from {count(body['documents'], 'document')}"
    if bad := body["documents_quarantined"]:
        text += f", {bad:,} of them quarantined"
    return text


def _failure_lines(body: StatusBody) -> Iterator[str]:
    failures = body.get("failures", [])
    for failure in failures:
        yield f"failed   shard {failure['shard']} ({failure['uri']}): {failure['reason']}"
    if (more := body.get("num_failures", 0) - len(failures)) > 0:
        yield f"failed   and {count(more, 'more shard')}"


def _more_reasons(body: StatusBody) -> Iterator[str]:
    """Further lines of the reason; without those on shards, which have lines of their own."""
    if not body.get("failures"):
        for line in body.get("reason", "").splitlines()[1:]:
            yield f"reason   {line.strip()}"


def _state_text(s: Status) -> str:
    """The state of a run in words."""
    body = s.body
    if s.state == "starting" and "phase" not in body:
        return "begun a moment ago"
    if s.state == "complete":
        return f"complete since {body['written_at']}"
    if s.state == "begun":
        return "begun, and no update since: killed? The same 'afn run' command resumes"
    reason = f": {body['reason'].splitlines()[0].rstrip(':')}" if body["reason"] else ""
    if s.state == "failed":
        return f"failed at {body['written_at']}, exit code {body['exit_code']}{reason}"
    if s.state == "stopped":
        return (
            f"stopped at {body['written_at']}, exit code {body['exit_code']}; the same command "
            f"resumes{reason}"
        )
    doing = f" ({body['doing']})" if body["doing"] else ""
    assert s.age_s is not None
    if s.state == "silent":
        since = time_text(s.age_s)
        return (
            f"silent: no update for {since}, while {body['phase']}{doing}: killed? The same "
            "command resumes"
        )
    return f"{body['phase']}{doing}, last update {time_text(s.age_s)} ago"


def time_text(seconds: float) -> str:
    """``seconds`` for people: 90 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def table(runs: Sequence[Status], width: int | None = None) -> Iterator[str]:
    """Runs of a store as a table: a heading, then one line per run.

    Where that would be wider than ``width`` (None: any), a run's corpus is on a second line.
    """
    rows = [("STATE", "BEGUN", "SHARDS", "TOKENS", "RUN", "CORPUS")]
    for s in runs:
        shards = s.body.get("shards") or {}
        rows.append(
            (
                s.state,
                s.body.get("began_at", "")[:16].replace("T", " "),
                f"{shards['done']:,}/{shards['planned']:,}" if shards.get("planned") else "",
                f"{s.body['tokens']:,}" if s.body.get("tokens") else "",
                s.body.get("run", ""),
                ", ".join(s.body.get("corpus", [])),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    is_narrow = width is not None and sum(widths) + 2 * len(widths[1:]) > width
    for row in rows:
        cells: list[str] = []
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            is_number = column in (2, 3)
            cells.append(cell.rjust(width) if is_number else cell.ljust(width))
        if is_narrow:
            *cells, corpus = cells
            yield "  ".join(cells).rstrip()
            yield f"  {corpus}".rstrip()
        else:
            yield "  ".join(cells).rstrip()
