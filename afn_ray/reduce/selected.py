"""Documents and bytes that a run left out of its corpus on request, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afn_ray.corpus_values import Unread
from afn_ray.reduce.losses import bytes_text
from afn_ray.run_info import RunInfo
from afn_ray.store import series
from afn_ray.text import count, printable


def describe(info: RunInfo) -> str:
    """The selection of the run of ``info``, a run.json, and what it left out; empty without one."""
    asked = series.selection_of(info["config"])
    if not asked:
        return ""
    counts = info["counts"]
    parts = list[str]()
    if "unselected" in counts:
        parts.append(describe_left_out(counts))
    corpus = info["corpus"]
    unread = Unread(
        corpus.get("unread", 0), corpus.get("unread_bytes", 0), info.get("unread_from", "")
    )
    if rest := describe_unread(unread):
        parts.append(rest)
    return printable("; ".join([asked, *(parts or ["left out nothing"])]))


def describe_left_out(counts: Mapping[str, int]) -> str:
    """The documents that a selection left out, by the ``counts`` of commits."""
    num_bytes = bytes_text(counts["unselected_bytes"])
    text = f"left out {count(counts['unselected'], 'document')} ({num_bytes} of text)"
    return text + _describe_unknown(counts)


def describe_nothing(config: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """Reason why the selection of ``config`` has no document, by the ``counts`` of commits."""
    num = counts["unselected"]
    where = config.get("where")
    sample = config.get("sample")
    if where is None:
        verb = "is" if num == 1 else "are"
        return f"no document is in the sample of {sample} ({num:,} {verb} not)"
    verb = "does" if num == 1 else "do"
    of_sample = f" and is in the sample of {sample}" if sample is not None else ""
    return printable(
        f"no document meets {where}{of_sample} ({num:,} {verb} not{_describe_unknown(counts)})"
    )


def _describe_unknown(counts: Mapping[str, int]) -> str:
    """Addition on documents whose condition is unknown; empty without any."""
    if not (unknown := counts.get("unselected_unknown", 0)):
        return ""
    return f", {unknown:,} of them because a null makes the condition unknown"


def describe_unread(unread: Unread) -> str:
    """The end of the corpus, which a limit left unread; empty without one."""
    if not unread.num_bytes:
        return ""
    text = f"{bytes_text(unread.num_bytes)} after the limit were not read"
    if unread.num_files:
        text += f", with {count(unread.num_files, 'file')} from {unread.first} on"
    return text
