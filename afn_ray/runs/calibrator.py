"""Calibrator: measure a sample to decide the precision and the outlier dimensions, once a store."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from afn_ray.corpus import listing
from afn_ray.corpus_values import Document
from afn_ray.errors import StoreError
from afn_ray.fingerprints import fingerprint
from afn_ray.measure import Measure
from afn_ray.runs import cluster, events, frequent, mean_states, outliers, precision, worker
from afn_ray.runs.events import OnEvent, on_warning
from afn_ray.runs.task import Task
from afn_ray.store import calibrations, measures, plans, series_runs

T = TypeVar("T")

CALIBRATION_DOCUMENTS = 2000
"""Largest number of documents in a calibration's sample."""


@dataclass(frozen=True, slots=True)
class Calibrator:
    """Calibrations for runs over one corpus. The store's first run measures; later runs read what
    it decided.

    A run that asks for other columns of the same tokens takes over what was decided for them, layer
    by layer, so that columns fit together.
    """

    plan: plans.Plan
    on_event: OnEvent
    keep: bool  # write the results into the store, for later runs
    reduce_only: bool  # measure nothing
    languages: str | None = None  # detector of the documents' languages, as in the measure

    def decide_precision(self, task: Task) -> precision.Precision:
        """The precision of ``task``, with warnings where it is not safe or not fast."""
        config = task.config
        if config.dtype == "float32":
            return precision.decide(task, ())
        key = fingerprint([task.measure.as_dict(), config.dtype])
        stored = calibrations.read_calibration(config.store, key)
        if stored is not None:
            decided = precision.from_json(stored)
            text = (
                f"{precision.describe(decided)}; decided by the first run of this store: another "
                "--dtype needs another --store"
            )
        else:
            ours = self._taken_over(task)
            if ours is None:
                self._check_may_measure(task)
                text = "a calibration compares half precision with float32"
                self.on_event(events.Calibrating(text))
                ours = self._measure(task, precision.decide)
            decided = ours
            if self.keep:  # what another first run has decided in the meantime counts
                decided = precision.from_json(
                    calibrations.write_calibration(config.store, key, ours.to_json())
                )
            text = precision.describe(decided)
            if text != precision.describe(ours):
                text += "; another run of this store decided it meanwhile"
        self.on_event(events.PrecisionDecided(text))
        if decided.against:
            self.on_event(events.Warned(f"{decided.dtype} is not safe here: {decided.against}"))
        if decided.device != task.device and not self.reduce_only:
            self.on_event(
                events.Warned(
                    f"{decided.dtype} was chosen on {decided.device}, this is {task.device}; it "
                    "may be slow here"
                )
            )
        return decided

    def find_outliers(self, task: Task) -> tuple[tuple[int, ...], ...]:
        """Outlier dimensions of each layer; empty if no signal leaves them out."""
        if not worker.wants(task, "outliers"):
            return ()
        what = "a calibration looks for outlier dimensions"
        found = self._find(task, "outliers", what, outliers.find_dimensions)
        return tuple(tuple(dims) for dims in found)

    def find_means(self, task: Task) -> tuple[str, ...]:
        """The mean state of each layer; empty if no signal subtracts it."""
        if not worker.wants(task, "mean"):
            return ()
        what = "a calibration looks for the mean state of each layer"
        return tuple(self._find(task, "means", what, mean_states.find_means))

    def find_mean_types(self, task: Task) -> tuple[int, ...]:
        """The most frequent types, whose mean states the config asks for; empty if it does not."""
        num = task.config.mean_vectors
        if not num:
            return ()
        key = fingerprint([task.measure.as_dict(), f"mean_types {num}"])
        stored = calibrations.read_calibration(task.config.store, key)
        if stored is None:
            others = (list(other.mean_types) for other in self._others(task))
            types = next((types for types in others if len(types) == num), None)
            if types is None:
                self._check_may_measure(task)
                self.on_event(events.Calibrating("a calibration looks for the most frequent types"))
                types = self._measure(task, frequent.find_types)
            stored = self._kept(task, key, {"mean_types": types})
        return tuple(stored["mean_types"])

    def _find(
        self,
        task: Task,
        name: str,
        what: str,
        calibration: Callable[[Task, Sequence[str]], Sequence[Any]],
    ) -> Sequence[Any]:
        """The values ``name`` of the measure, one for each layer, which ``calibration`` finds.

        ``what`` says what is measured. Layers of which another run knows them are not measured.
        """
        measure = task.measure
        key = fingerprint([measure.as_dict(), name])
        stored = calibrations.read_calibration(task.config.store, key)
        if stored is None:
            known: dict[int, Any] = {}
            for other in self._others(task):
                known = dict(zip(other.layers, getattr(other, name), strict=False)) | known
            unknown = tuple(k for k in measure.layers if k not in known)
            if unknown:
                self._check_may_measure(task)
                self.on_event(events.Calibrating(what))
                asked = replace(task, measure=replace(measure, layers=unknown, outliers=()))
                known |= zip(unknown, self._measure(asked, calibration), strict=True)
            stored = self._kept(task, key, {name: [known[k] for k in measure.layers]})
        found: Sequence[Any] = stored[name]
        return found

    def _others(self, task: Task, but: tuple[str, ...] = ()) -> list[Measure]:
        """Measures of the same tokens in the store, the newest first.

        They may differ in the keys ``but`` of the base.
        """
        ours = replace(task.measure, languages=self.languages).base
        found = []
        for other in measures.known(task.config.store):
            theirs = other.base
            differing = {key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)}
            if differing <= {*but}:
                found.append(other)
        return found

    def _taken_over(self, task: Task) -> precision.Precision | None:
        """The precision of the store's other columns, if it is safe at all layers of ``task``.

        Half precision is safe where a calibration has tried it and found so.
        """
        if task.config.dtype != "auto":
            return None
        why = "the store's other columns of these tokens have it"
        for other in self._others(task, ("dtype",)):
            if other.dtype == "float32":
                return precision.Precision(other.dtype, "auto", task.device, why, 0)
            for run in series_runs.complete_runs(task.config.store):
                if run.info["measure"]["id"] == other.id:
                    decided = precision.from_json(run.info["precision"])
                    if decided.is_safe_at(task.measure.layers):
                        return replace(decided, asked="auto", why=why)
        return None

    def _kept(self, task: Task, key: str, found: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Value of ``key`` in the store from now on: ``found``, if no other run was faster."""
        if not self.keep:
            return {**found}
        return calibrations.write_calibration(task.config.store, key, found)

    def _check_may_measure(self, task: Task) -> None:
        """Raise ``StoreError`` if nothing may be measured."""
        if self.reduce_only:
            raise StoreError(
                f"no run in {task.config.store} has decided the precision, the outlier dimensions, "
                "the mean states or the types of what this config asks for, and --reduce-only "
                "decides nothing: give the config that measured, or leave --reduce-only out"
            )

    def _measure(self, task: Task, calibration: Callable[[Task, Sequence[str]], T]) -> T:
        """Result of ``calibration`` on a sample of the corpus."""
        sample = listing.sample(self.plan.files, task.config.read_options, CALIBRATION_DOCUMENTS)
        return cluster.calibrate(calibration, task, in_turns(sample), on_warning(self.on_event))


def in_turns(documents: Sequence[Document]) -> list[str]:
    """Texts of ``documents``, one of each source in turn.

    A calibration that ends early has then seen all sources.
    """
    by_source: dict[str, list[str]] = {}
    for document in documents:
        by_source.setdefault(document.source, []).append(document.text)
    turns = itertools.zip_longest(*by_source.values())
    texts = itertools.chain.from_iterable(turns)
    return [text for text in texts if text is not None]
