"""Records that an audit keeps beside its run: the verdict, and the figures that need the baseline.

``verdict.json`` is replaced as a whole if the run is audited again. The verdict outlives the
baseline, which a garbage collection may remove. All other figures of a night are in the run's own
tables.

``figures-<hash>.json`` has figures that the night's own audit did not keep, as a later one found
them. Its name is made of all that they depend on, so it is written once and never replaced.

``accepted.json`` beside a broken night says that somebody accepted it as a baseline, why, and which
broken limits that covers.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from afn_ray.errors import ConfigError
from afn_ray.fingerprints import fingerprint
from afn_ray.schema import SCHEMA_VERSION
from afn_ray.store import checksums, manifest, series_runs, storage, uris
from afn_ray.store.checksums import checksummed, read_json
from afn_ray.store.manifest import RunFolder

VERDICT = "verdict.json"
ACCEPTED = "accepted.json"
NAMES = (VERDICT, ACCEPTED)
"""Names of the files in the folder of the run that have one name in each."""
FIGURES = re.compile(r"figures-[0-9a-f]{32}\.json")
"""Names of the files with figures that a later audit found."""
FIGURES_VERSION = 1
"""Raised when a figure of a limit is found in another way; those found before are not read then."""
MOST_WHY_CHARS = 1000
"""Longest reason for accepting a night, in characters."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Distances of the strengths from the baseline: of all tokens at a layer, or of a group's."""

    layer: int
    group_by: str | None
    """Key that groups the run; None: the distance is that of all tokens."""
    group: str | None
    """The group; None also for documents without a value."""
    psi: float | None
    ks: float | None
    js: float | None


@dataclass(frozen=True, slots=True)
class StoredVerdict:
    """The verdict on a run as its last audit gave it."""

    state: str
    """State of the night, as in audit.json."""
    window: str
    layer: int
    """Layer that was judged."""
    baseline: str | None
    """URI of the run that the night was held against; None: there was none."""
    broken: tuple[str, ...]
    """Names of the limits that were broken."""
    warned: tuple[str, ...]
    """Names of the limits that gave a warning."""
    unjudged: tuple[str, ...]
    """Names of the limits that were not judged."""
    figures: Mapping[str, float | None]
    """Values of the limits by name; None: infinite, unknown or not judged."""
    distances: tuple[Distance, ...] = ()
    terms: Mapping[str, str] = field(default_factory=dict)
    """Settings under which each figure was found, by name; older verdicts lack them."""
    told: bool = False
    """True if every place that the audit notifies has got this verdict."""


@dataclass(frozen=True, slots=True)
class AskedFigures:
    """Figures of a night that a later audit asks for: all that they depend on beside the run."""

    layer: int
    baseline: tuple[str, ...]
    """Ids of the runs that the night is held against."""
    terms: Mapping[str, str]
    """Settings under which each figure is found, by name of the limit."""

    @property
    def file(self) -> str:
        """Name of the file that has them, in the folder of the run."""
        return f"figures-{fingerprint([FIGURES_VERSION, asdict(self)])}.json"


class Acceptance(NamedTuple):
    """Somebody's word that a broken night may be a baseline."""

    why: str
    accepted_at: str  # ISO 8601, UTC
    broken: frozenset[str] | None
    """Names of the limits that were broken; None: all, as in files from before they were kept."""

    def covers(self, broken: Iterable[str]) -> bool:
        """True if this is a word on every limit of ``broken``."""
        return self.broken is None or self.broken.issuperset(broken)


def write_verdict(run: RunFolder, verdict: StoredVerdict) -> None:
    """Write ``verdict`` beside the complete ``run``.

    Another one is replaced atomically; the same one is left, as a bucket may refuse to replace it.
    """
    body = checksummed({"schema_version": SCHEMA_VERSION, "run": run.id, **asdict(verdict)})
    try:
        storage.write_once(_uri(run), body)
    except storage.AlreadyWritten:
        if storage.read_bytes(_uri(run)) != body:
            storage.write_over(_uri(run), body, retry_for_s=None)


def read_verdict(run: RunFolder) -> StoredVerdict | None:
    """The verdict on ``run``; None if no audit has kept one. Raises ``StoreError`` for damage."""
    uri = _uri(run)
    body = read_json(uri)
    if body is None:
        return None
    with checksums.named_damage(uri):
        if body["run"] != run.id:  # copied with a folder
            return None
        terms = body.get("terms", {})  # older verdicts lack it, and "told"
        found = StoredVerdict(
            state=_text(body["state"]),
            window=_text(body["window"]),
            layer=_whole(body["layer"]),
            baseline=_text_or_none(body["baseline"]),
            broken=tuple(map(_text, body["broken"])),
            warned=tuple(map(_text, body["warned"])),
            unjudged=tuple(map(_text, body["unjudged"])),
            figures={_text(key): _number(value) for key, value in body["figures"].items()},
            distances=tuple(map(_distance, body["distances"])),
            terms={_text(key): _text(value) for key, value in terms.items()},
            told=body.get("told") is True,
        )
    return found


def write_figures(run: RunFolder, asked: AskedFigures, figures: Mapping[str, float | None]) -> None:
    """Keep ``figures`` of the complete ``run`` by name of the limit; None: there is none.

    Every audit that is asked for them finds the same, so the first one's stay.
    """
    body = {"schema_version": SCHEMA_VERSION, "run": run.id, **asdict(asked), "figures": figures}
    with contextlib.suppress(storage.AlreadyWritten):
        storage.write_once(uris.join(run.uri, asked.file), checksummed(body))


def read_figures(run: RunFolder, asked: AskedFigures) -> dict[str, float | None] | None:
    """The figures ``asked`` for, as ``write_figures`` kept them; None: there are none yet.

    Raises ``StoreError`` for damage.
    """
    return read_figures_file(run, asked.file)


def read_figures_file(run: RunFolder, name: str) -> dict[str, float | None] | None:
    """The figures in the file ``name`` of ``run``, as ``read_figures``."""
    uri = uris.join(run.uri, name)
    body = read_json(uri)
    if body is None:
        return None
    with checksums.named_damage(uri):
        if body["run"] != run.id:  # copied with a folder
            return None
        return {_text(key): _number(value) for key, value in body["figures"].items()}


def accept_run(uri: str, why: str) -> RunFolder:
    """Record that the broken night of the run at ``uri`` may be a baseline, and ``why``.

    Returns the run. Raises ``ConfigError`` if ``uri`` is that of a store, and what ``accept``
    raises.
    """
    run = manifest.find_run(uri)
    if run.uri != uris.absolute(uri).rstrip("/"):
        raise ConfigError(f"{uri} is a store; name one of its runs, {run.uri} say")
    accept(run, why)
    return run


def accept(run: RunFolder, why: str) -> None:
    """Record that the broken night of ``run`` may be a baseline, and ``why``.

    It covers the limits that the last audit found broken, and replaces an acceptance that does not.
    Raises ``ConfigError`` if none was broken or all of them were accepted before, and for a reason
    that is empty or too long.
    """
    verdict = read_verdict(run)
    if verdict is None or not verdict.broken:
        state = "it was never audited" if verdict is None else "its last audit found nothing broken"
        raise ConfigError(
            f"run {run.uri} needs no acceptance: {state}; only a broken night is no baseline"
        )
    why = why.strip()
    if not why or len(why) > MOST_WHY_CHARS:
        raise ConfigError(
            f"the reason has {len(why):,} characters; expected 1 to {MOST_WHY_CHARS:,}, "
            'as in --why "the new source is meant to be there"'
        )
    if acceptance_of(run, verdict.broken) is not None:
        raise ConfigError(f"run {run.uri} was accepted before; nothing has changed")
    body = {
        "schema_version": SCHEMA_VERSION,
        "run": run.id,
        "why": why,
        "accepted_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "broken": list(verdict.broken),
    }
    uri = uris.join(run.uri, ACCEPTED)
    try:
        storage.write_once(uri, checksummed(body))
    except storage.AlreadyWritten:  # of fewer limits
        storage.write_over(uri, checksummed(body), retry_for_s=None)


def read_acceptance(run: RunFolder) -> Acceptance | None:
    """The acceptance in ``accepted.json`` beside ``run``; None without it. Raises ``StoreError``
    for damage.

    Whether it holds for the verdict on the run is what ``acceptance_of`` tells.
    """
    uri = uris.join(run.uri, ACCEPTED)
    body = read_json(uri)
    if body is None:
        return None
    with checksums.named_damage(uri):
        if body["run"] != run.id:  # copied with a folder
            return None
        broken = body.get("broken")
        keys = None if broken is None else frozenset(map(_text, broken))
        return Acceptance(_text(body["why"]), _text(body["accepted_at"]), keys)


def acceptance_of(run: RunFolder, broken: Iterable[str]) -> Acceptance | None:
    """Somebody's word that the night of ``run`` may be a baseline although ``broken`` limits are.

    It may be beside a run over the same text directly before it. None: nobody accepted every limit
    of ``broken``, or there are none.
    """
    if not (keys := frozenset(broken)):
        return None
    earlier = series_runs.same_night(run, series_runs.alike(run, before=run.id))
    for night in itertools.chain([run], earlier):
        acceptance = read_acceptance(night)
        if acceptance is not None and acceptance.covers(keys):
            return acceptance
    return None


def may_be_baseline(run: RunFolder) -> bool:
    """True if later nights may be held against ``run``: no limit is broken, or it was accepted.

    A night that a policy counts as broken because limits could not be judged is one, as otherwise
    there might never be enough of them. A run without a verdict has that of the run over the same
    text directly before it.
    """
    verdict = read_verdict(run)
    if verdict is None:
        earlier = series_runs.same_night(run, series_runs.alike(run, before=run.id))
        verdict = next(filter(None, map(read_verdict, earlier)), None)
    return verdict is None or not verdict.broken or acceptance_of(run, verdict.broken) is not None


def _uri(run: RunFolder) -> str:
    return uris.join(run.uri, VERDICT)


def _distance(row: Mapping[str, Any]) -> Distance:
    group_by = _text_or_none(row["group_by"])
    group = _text_or_none(row["group"])
    psi, ks, js = (_number(row[name]) for name in ("psi", "ks", "js"))
    return Distance(_whole(row["layer"]), group_by, group, psi, ks, js)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{checksums.short(value)} is no text")
    return value


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 15:
        raise TypeError(f"{checksums.short(value)} is no layer")
    return int(value)


def _number(value: Any) -> float | None:
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise TypeError(f"{checksums.short(value)} is no number")
    return float(value)
