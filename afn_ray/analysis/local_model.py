"""The model of a run on this machine, for questions that measure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LocalModel:
    """The model of a run on this machine, and what it may do here.

    A store may come from a third party, so code and pickles that its run names are used only where
    the caller allows them too.
    """

    name: str | None = None  # path of the model, if it differs from the run's
    trust_remote_code: bool = False
    allow_pickle: bool = False
