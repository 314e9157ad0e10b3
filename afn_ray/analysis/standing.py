"""The standing of a night by its earlier audits: since when it is broken, accepted, notified."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from afn_ray.analysis.verdict import BROKEN, NOT_JUDGED, Rule
from afn_ray.store import series_runs, verdicts
from afn_ray.store.manifest import RunFolder
from afn_ray.store.verdicts import Acceptance


class Standing(NamedTuple):
    """Facts of a night from earlier audits of it, if nothing has changed since."""

    since: str
    """End of the first run with this verdict, ISO 8601 in UTC."""
    is_repeated: bool = False
    """True if an earlier audit gave the same verdict on the same text."""
    was_told: bool = False
    """True if the notifications of it were delivered."""
    acceptance: Acceptance | None = None
    """Somebody's word that the night may be a baseline although it is broken."""

    @property
    def is_known(self) -> bool:
        """True if the verdict needs no further notification."""
        return self.is_repeated and (self.was_told or self.acceptance is not None)


UNKNOWN = Standing("")
"""Standing of a night of which nothing is known."""


def standing(run: RunFolder, state: str, rules: Sequence[Rule]) -> Standing:
    """The standing of the verdict ``state`` with ``rules`` on the complete ``run``.

    Runs over the same text directly before it count as the same night.
    """
    broken = _names(rules, BROKEN)
    given = (state, broken, _names(rules, NOT_JUDGED))
    acceptance = verdicts.acceptance_of(run, broken)
    found = Standing(run.info["finished_at"], acceptance=acceptance)
    earlier = series_runs.same_night(run, series_runs.alike(run, before=run.id))
    for night in (run, *earlier):
        verdict = verdicts.read_verdict(night)
        if verdict is None:  # its audit was killed, and nobody was told
            continue
        if (verdict.state, {*verdict.broken}, {*verdict.unjudged}) != given:
            break
        told = found.was_told or verdict.told
        found = Standing(night.info["finished_at"], True, told, acceptance)
    return found


def _names(rules: Sequence[Rule], state: str) -> set[str]:
    return {rule.key for rule in rules if rule.state == state}


def moment(time: str) -> str:
    """An ISO 8601 ``time`` in UTC for people, to the minute."""
    return f"{time[:16].replace('T', ' ')} UTC"
