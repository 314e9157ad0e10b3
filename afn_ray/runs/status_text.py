"""The status of a run as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from afn_ray.reduce import losses
from afn_ray.runs.status import EXIT_CODES, Status
from afn_ray.text import count


def lines(s: Status) -> Iterator[str]:
    """Lines that describe one run, one fact a line."""
    body = s.body
    yield f"run      {s.uri}"
    yield f"state    {_said_state(s)}"
    if "phase" not in body:
        return
    by = f", by {body['host']} (pid {body['pid']})" if "host" in body else ""
    yield f"begun    {body['began_at']}{by}"
    yield f"corpus   {', '.join(body['corpus'])}"
    live = s.state not in EXIT_CODES
    if planned := body["shards"].get("planned"):
        shards = body["shards"]
        parts = [f"{shards['done']:,} of {planned:,} done ({shards['done'] / planned:.1%})"]
        parts += [f"{shards['reused']:,} of them before"] if shards["reused"] else []
        parts += [f"{shards['running']:,} on workers"] if live and shards["running"] else []
        parts += [f"{shards['quarantined']:,} quarantined"] if shards["quarantined"] else []
        parts += [f"{body['retries']:,} tried again"] if body.get("retries") else []
        yield f"shards   {', '.join(parts)}"
        bad = body["documents_quarantined"]
        yield (
            f"tokens   {body['tokens']:,}, from {count(body['documents'], 'document')}"
            + (f", {bad:,} of them quarantined" if bad else "")
        )
    if lost := body["bytes_lost"]:
        yield (
            f"lost     {losses.said_bytes(lost)} of the corpus; 'afn show' of the complete run "
            "names the files"
        )
    if live and body["documents_planned"]:
        planned = count(body["documents_planned"], "document")
        yield f"measured {body['documents_measured']:,} of {planned} of this call"
    if body.get("tokens_per_s"):
        left = f", {said_time(body['left_s'])} left" if live and body["left_s"] is not None else ""
        yield f"rate     {body['tokens_per_s']:,.0f} tokens/s{left}"
    if live and body["workers"]:
        lost = f", {body['workers']['lost']:,} lost so far" if body["workers"]["lost"] else ""
        yield f"workers  {body['workers']['ready']:,} of {body['workers']['wanted']:,} ready{lost}"
    if live and body["waits_for"]:
        yield f"waits    {body['waits_for']}"
    if body.get("last_commit_at"):
        yield f"commit   the last at {body['last_commit_at']}"
    for failure in body.get("failures", []):
        yield f"failed   shard {failure['shard']} ({failure['uri']}): {failure['reason']}"
    if (more := body.get("num_failures", 0) - len(body.get("failures", []))) > 0:
        yield f"failed   and {count(more, 'more shard')}"
    for notice in body.get("notices", [])[-3:]:
        yield f"notice   {notice}"


def _said_state(s: Status) -> str:
    """The state of a run in words."""
    body = s.body
    if s.state == "starting" and "phase" not in body:
        return "begun a moment ago"
    if s.state == "complete":
        return f"complete since {body['written_at']}"
    if s.state == "begun":
        return "begun, and no word since: killed? The same 'afn run' command resumes"
    reason = f": {body['reason'].splitlines()[0]}" if body["reason"] else ""
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
        since = said_time(s.age_s)
        return (
            f"silent: no word for {since}, while {body['phase']}{doing}: killed? "
            "The same command resumes"
        )
    return f"{body['phase']}{doing}, told {said_time(s.age_s)} ago"


def said_time(seconds: float) -> str:
    """``seconds`` for people: 90 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def table(runs: Sequence[Status]) -> Iterator[str]:
    """Runs of a store as a table: a heading, then one line per run."""
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
    for row in rows:
        cells = [
            c.rjust(w) if i in (2, 3) else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
