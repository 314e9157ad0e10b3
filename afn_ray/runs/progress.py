"""Progress of a worker: counts and seconds that only grow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import attrgetter


@dataclass(slots=True)
class Progress:
    """What a worker has done so far; counts and seconds only grow."""

    documents: int = 0
    tokens: int = 0
    forward_tokens: int = 0  # with padding, filler and overlaps
    read_s: float = 0.0  # on the reading thread
    tokenize_s: float = 0.0  # on the tokenizing thread, or in all tokenizer processes together
    wait_s: float = 0.0  # the model's, for text
    model_s: float = 0.0
    write_s: float = 0.0  # on the writing thread
    why_padded: str = ""  # empty: sequences are packed without padding
    measured: float = 0.0  # documents, those of a chunk in the model by the share of its tokens


def total(parts: Iterable[Progress]) -> Progress:
    """The sum of what workers have done."""
    parts = list(parts)
    names = (f.name for f in fields(Progress) if f.name != "why_padded")
    sums = {
        name: sum(map(attrgetter(name), parts)) for name in names
    }  # of a thousand workers, a few times a minute
    return Progress(**sums, why_padded=next((p.why_padded for p in parts if p.why_padded), ""))
