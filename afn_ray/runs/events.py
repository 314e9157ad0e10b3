"""Events of a run, for the caller who waits for it: one class for each kind.

Each event has a ``message`` for people, and the ``name`` of its line in the JSON log. Code tells
events apart by class, never by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from afn_ray.runs.progress import Progress


@dataclass(frozen=True, slots=True)
class Hashing:
    """The run has read some files of the corpus to plan."""

    name: ClassVar[str] = "hashing"
    message: ClassVar[str] = "reading the corpus to plan"
    num_read: int
    num_files: int


@dataclass(frozen=True, slots=True)
class Calibrating:
    """A calibration starts."""

    name: ClassVar[str] = "pilot"
    message: str


@dataclass(frozen=True, slots=True)
class PrecisionDecided:
    """The precision of the run is decided."""

    name: ClassVar[str] = "planned"
    message: str


@dataclass(frozen=True, slots=True)
class Planned:
    """The run has a name and a plan."""

    name: ClassVar[str] = "planned"
    message: str
    run: str  # id of the run


@dataclass(frozen=True, slots=True)
class Starting:
    """Workers start."""

    name: ClassVar[str] = "starting"
    message: str


@dataclass(frozen=True, slots=True)
class Working:
    """The dispatcher has polled its workers."""

    name: ClassVar[str] = "progress"
    message: ClassVar[str] = ""  # the caller that shows ``progress`` chooses the words
    progress: Progress


@dataclass(frozen=True, slots=True)
class Reducing:
    """The reduce of the shards starts."""

    name: ClassVar[str] = "reducing"
    message: ClassVar[str] = "finding the thresholds and the vocabulary"


@dataclass(frozen=True, slots=True)
class Screening:
    """The screening of the documents starts."""

    name: ClassVar[str] = "screening"
    message: ClassVar[str] = "looking for strange documents"


@dataclass(frozen=True, slots=True)
class Warned:
    """Something is wrong, and the run continues."""

    name: ClassVar[str] = "warning"
    notice: str

    @property
    def message(self) -> str:
        return f"warning: {self.notice}"


@dataclass(frozen=True, slots=True)
class Complete:
    """The run is complete; the message is one fact about it."""

    name: ClassVar[str] = "complete"
    message: str


Event = (
    Hashing
    | Calibrating
    | PrecisionDecided
    | Planned
    | Starting
    | Working
    | Reducing
    | Screening
    | Warned
    | Complete
)
"""Any event that a run reports to its caller."""
OnEvent = Callable[[Event], None]
"""Callback for the events of a run."""


def on_warning(on_event: OnEvent) -> Callable[[str], None]:
    """Callback that reports a notice as a warning."""
    return lambda notice: on_event(Warned(notice))
