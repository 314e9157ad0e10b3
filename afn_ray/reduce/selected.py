"""Documents and bytes that a run left out of its corpus on request, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from afn_ray.corpus_values import Unread
from afn_ray.reduce.losses import bytes_text
from afn_ray.store import series
from afn_ray.text import count, printable


def describe(info: Mapping[str, Any]) -> str:
    """The selection of the run of ``info``, a run.json, and what it left out; empty without one."""
    asked = series.selection_of(info["config"])
    if not asked:
        return ""
    counts, parts = info["counts"], list[str]()
    if "unselected" in counts:
        left_out = (
            f"left out {count(counts['unselected'], 'document')} "
            f"({bytes_text(counts['unselected_bytes'])} of text)"
        )
        if unknown := counts["unselected_unknown"]:
            left_out += f", {unknown:,} of them because a null makes the condition unknown"
        parts.append(left_out)
    corpus = info["corpus"]
    unread = Unread(
        corpus.get("unread", 0), corpus.get("unread_bytes", 0), info.get("unread_from", "")
    )
    if rest := describe_unread(unread):
        parts.append(rest)
    return printable("; ".join([asked, *(parts or ["left out nothing"])]))


def describe_unread(unread: Unread) -> str:
    """The end of the corpus, which a limit left unread; empty without one."""
    if not unread.num_bytes:
        return ""
    text = f"{bytes_text(unread.num_bytes)} after the limit were not read"
    if unread.num_files:
        text += f", with {count(unread.num_files, 'file')} from {unread.first} on"
    return text
