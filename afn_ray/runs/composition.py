"""Plan which columns of a shard are copied from the store's other measures, and which are measured.

A measure consists of parts: each signal at each layer, each layer's neurons, and each layer's sums
of states. Another measure of the same base, a donor, has a part if all that the part depends on is
equal. A worker then composes the shard's tables of the donors' columns, and measures only the parts
that no donor has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from afn_ray import token_rows
from afn_ray.config import TOP_NEURONS
from afn_ray.corpus_values import Shard
from afn_ray.measure import Measure
from afn_ray.model.signals import Neurons, Signal, find_signals, series
from afn_ray.runs.task import NEURONS, TOKENS, Composition, Donor, MeasurePart, Task
from afn_ray.schema import STRENGTH, Series
from afn_ray.store import epochs, measures, shard_files
from afn_ray.store.commits import Commit
from afn_ray.store.layout import VECTORS
from afn_ray.text import count

T = TypeVar("T")

MOST_NAMES = 5
"""Largest number of measured columns that a message names."""


@dataclass(frozen=True, slots=True)
class Group:
    """Shards that come about in the same way."""

    task: Task
    shards: tuple[Shard, ...]
    donated: Sequence[Commit] = ()
    """A donor's commit of each shard: it has the documents and tokens of the shard."""


@dataclass(frozen=True, slots=True)
class Work:
    """The shards that a run has to do."""

    composed: tuple[Group, ...]
    """Shards with donors; first those that need no model."""
    measured: tuple[Shard, ...]
    """Shards without donors."""

    @property
    def needs_model(self) -> bool:
        """True if something is measured."""
        return bool(self.measured) or any(needs_model(group.task) for group in self.composed)


def plan(task: Task, todo: Sequence[Shard]) -> Work:
    """Plan for the shards ``todo``, which the store lacks. Writes nothing.

    Shards that do not keep the rows of all tokens are measured as a whole.
    """
    if not todo or not token_rows.is_complete(task.config.record):
        return Work((), tuple(todo))
    store, measure = task.config.store, task.measure
    donors = [m for m in measures.known(store, measure.id) if m.base == measure.base]
    wanted = _parts_of(task)
    bundles = _bundles(measure, wanted)
    has = {d.id: _without_torn(_provided(wanted, d, measure), bundles) for d in donors}
    has = {donor: parts for donor, parts in has.items() if parts}
    held = _held(store, has, todo)
    there = {
        donor: shard_files.find_commits(store, donor, marked) for donor, marked in held.items()
    }
    groups: dict[tuple[str, ...], list[Shard]] = {}
    measured: list[Shard] = []
    for shard in todo:
        able = {donor: has[donor] for donor, commits in there.items() if shard.id in commits}
        if able:
            found = _fewest(able)
            groups.setdefault(found, []).append(shard)
        else:
            measured.append(shard)
    composed = []
    for found, shards in groups.items():
        ids = {shard.id for shard in shards}
        later: dict[str, dict[str, int]] = {}
        for donor in found:
            there_later = [one for one in held[donor] if one.generation and one.id in ids]
            later[donor] = {one.id: one.generation for one in there_later}
        composition = _composition(task, wanted, has, later)
        of_group = replace(task, composition=composition)
        if composition.rest is None:
            of_group = replace(of_group, device="cpu")  # no GPU is asked for
        commits = there[found[0]].in_order(shard.id for shard in shards)  # they stay packed
        composed.append(Group(of_group, tuple(shards), commits))
    composed.sort(key=lambda group: needs_model(group.task))
    return Work(tuple(composed), tuple(measured))


def describe(work: Work) -> str:
    """The shards of ``work`` that are composed, in words; empty if there are none."""
    parts = []
    for group in work.composed:
        num_shards = count(len(group.shards), "shard")
        composition = group.task.composition
        if composition is None or composition.rest is None:
            parts.append(f"{num_shards} copied from columns in the store")
        else:
            names = ", ".join(part.series.name for part in composition.missing[:MOST_NAMES])
            more = ", ..." if len(composition.missing) > MOST_NAMES else ""
            parts.append(f"of {num_shards} only {names}{more} is measured, the rest copied")
    return "; ".join(parts)


def needs_model(task: Task) -> bool:
    """True if a worker of ``task`` measures."""
    return task.composition is None or task.composition.rest is not None


def _held(
    store: str, donors: Collection[str], todo: Sequence[Shard]
) -> dict[str, tuple[Shard, ...]]:
    """The shards ``todo`` in their generations under each of ``donors``."""
    if not donors:
        return {}
    epoch = epochs.newest(store)
    return {donor: epoch.marked(donor, todo) for donor in donors}


def _parts_of(task: Task) -> dict[MeasurePart, tuple[Signal, str] | None]:
    """The parts of ``task``, each with its signal and the signal's identity; None: it has none."""
    measure = task.measure
    wanted: dict[MeasurePart, tuple[Signal, str] | None] = {}
    for found in zip(*find_signals(task.config.signals, task.config.top_neurons), strict=True):
        for one in series(measure.layers, found[:1]):
            wanted[MeasurePart(TOKENS, one)] = found
        if isinstance(found[0], Neurons):
            for layer in measure.neuron_layers:
                wanted[MeasurePart(NEURONS, Series(NEURONS, layer))] = found
    if measure.mean_types:
        for layer in measure.layers:
            wanted[MeasurePart(VECTORS, Series(VECTORS, layer))] = None
    return wanted


def _provided(
    wanted: Mapping[MeasurePart, tuple[Signal, str] | None], donor: Measure, measure: Measure
) -> frozenset[MeasurePart]:
    """The ``wanted`` parts of ``measure`` that ``donor`` has with the same values."""
    found = []
    for part, of_signal in wanted.items():
        layer = part.series.layer
        if of_signal is None:
            has = layer in donor.layers and donor.mean_types == measure.mean_types
        elif of_signal[1] not in donor.signals:
            has = False
        elif part.table == NEURONS:
            has = layer in donor.neuron_layers and donor.top_neurons == measure.top_neurons
            has &= donor.neurons_above == measure.neurons_above
            if measure.neurons_above:  # which tokens have a row depends on all layers
                has &= donor.neuron_layers == measure.neuron_layers
        else:
            needs = of_signal[0].needs
            has = part.series in donor.series
            if "outliers" in needs:
                has &= of_layer(donor, donor.outliers, layer) == of_layer(
                    measure, measure.outliers, layer
                )
            if "mean" in needs:
                has &= of_layer(donor, donor.means, layer) == of_layer(
                    measure, measure.means, layer
                )
        if has:
            found.append(part)
    return frozenset(found)


def _bundles(measure: Measure, wanted: Collection[MeasurePart]) -> list[frozenset[MeasurePart]]:
    """The ``wanted`` parts that fit together only if one pass over the text has measured them.

    The same strength may differ in its last digits from pass to pass, by device and batch.
    """
    bundles: list[set[MeasurePart]] = []
    if measure.neurons_above:  # strengths decide which tokens have neurons
        layers = measure.neuron_layers
        bundles.append({MeasurePart(NEURONS, Series(NEURONS, k)) for k in layers})
        bundles[-1] |= {MeasurePart(TOKENS, Series(STRENGTH, k)) for k in layers}
    if measure.mean_types:  # a state is as long as its token is strong
        for k in measure.layers:
            sums = Series(VECTORS, k)
            strength = Series(STRENGTH, k)
            bundles.append({MeasurePart(VECTORS, sums), MeasurePart(TOKENS, strength)})
    return [frozenset(bundle & {*wanted}) for bundle in bundles]


def _without_torn(
    parts: frozenset[MeasurePart], bundles: Sequence[frozenset[MeasurePart]]
) -> frozenset[MeasurePart]:
    """``parts`` without those of a bundle of which they have not all."""
    while torn := [bundle for bundle in bundles if bundle & parts and not bundle <= parts]:
        parts = parts.difference(*torn)
    return parts


def of_layer(measure: Measure, values: Sequence[T], layer: int) -> T | None:
    """The one of ``values``, which are by layer of ``measure``; None if there is none."""
    return dict(zip(measure.layers, values, strict=False)).get(layer)


def _fewest(able: Mapping[str, frozenset[MeasurePart]]) -> tuple[str, ...]:
    """Donors that have together all parts that any of ``able`` has, each as many as it can.

    Of equal ones the first is taken, that of the newest run.
    """
    chosen: list[str] = []
    left = frozenset().union(*able.values())
    while left:
        best = max(able, key=lambda donor: len(able[donor] & left))
        chosen.append(best)
        left -= able[best]
    return tuple(chosen)


def _composition(
    task: Task,
    wanted: Mapping[MeasurePart, tuple[Signal, str] | None],
    has: Mapping[str, frozenset[MeasurePart]],
    donors: Mapping[str, Mapping[str, int]],
) -> Composition:
    """The origin of each ``wanted`` part of ``task`` where the store has those of ``donors``.

    These come with the generations of their shards.
    """
    left = list(wanted)
    taken = []
    for donor, generations in donors.items():
        parts = tuple(part for part in left if part in has[donor])
        taken.append(Donor(donor, parts, generations))
        left = [part for part in left if part not in has[donor]]
    names: set[str] = set()
    for part in left:
        of_signal = wanted[part]
        if of_signal is not None:
            names.add(of_signal[0].name)
    rest = _restricted(task, left, names) if left else None
    return Composition(tuple(taken), rest, tuple(left))


def _restricted(task: Task, parts: Sequence[MeasurePart], names: set[str]) -> Task:
    """``task`` that measures the signals ``names`` at the layers of ``parts``, and strength."""
    measure, config = task.measure, task.config
    of_parts = {part.series.layer for part in parts}
    layers = tuple(k for k in measure.layers if k in of_parts)
    signals = ",".join(sorted(names | {STRENGTH}))
    found, identities = find_signals(signals, config.top_neurons)
    neuron_layers = tuple(k for k in layers if k in measure.neuron_layers and NEURONS in names)
    above = dict(zip(measure.neuron_layers, measure.neurons_above, strict=False))
    sums = any(part.table == VECTORS for part in parts)
    restricted = replace(
        measure,
        layers=layers,
        signals=tuple(identities),
        series=tuple(series(layers, found)),
        neuron_layers=neuron_layers,
        top_neurons=measure.top_neurons if neuron_layers else 0,
        neurons_above=tuple(above[k] for k in neuron_layers) if above else (),
        outliers=_at(measure, measure.outliers, layers),
        means=_at(measure, measure.means, layers),
        mean_types=measure.mean_types if sums else (),
    )
    config = replace(
        config,
        signals=signals,
        neurons_of=config.neurons_of if neuron_layers else "all",
        top_neurons=config.top_neurons if neuron_layers else TOP_NEURONS,
        mean_vectors=config.mean_vectors if sums else 0,
    )
    return replace(task, config=config, measure=restricted)


def _at(measure: Measure, values: Sequence[T], layers: Sequence[int]) -> tuple[T, ...]:
    """Those of ``values``, which are by layer of ``measure`` or empty, at ``layers``."""
    by_layer = dict(zip(measure.layers, values, strict=False))
    return tuple(by_layer[k] for k in layers if k in by_layer)
