"""Progress of a worker: counts and seconds that only grow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import attrgetter


@dataclass(slots=True)
class Progress:
    """Work of a worker so far; counts and seconds only grow."""

    documents: int = 0
    tokens: int = 0
    forward_tokens: int = 0  # with padding, filler and overlaps
    read_s: float = 0.0  # seconds of the reading thread
    tokenize_s: float = 0.0  # seconds of the tokenizing thread, or of all tokenizer processes
    wait_s: float = 0.0  # seconds in which the model waited for text
    model_s: float = 0.0  # seconds in which the model worked
    write_s: float = 0.0  # seconds of the writing thread
    why_padded: str = ""  # empty: sequences are packed without padding
    measured: float = 0.0  # documents; a chunk in the model counts by its share of tokens


def total(parts: Iterable[Progress]) -> Progress:
    """The sum of the progress of several workers."""
    parts = list(parts)
    names = (f.name for f in fields(Progress) if f.name != "why_padded")
    # map and attrgetter are fast enough for a thousand workers, a few times a minute
    sums = {name: sum(map(attrgetter(name), parts)) for name in names}
    return Progress(**sums, why_padded=next((p.why_padded for p in parts if p.why_padded), ""))
