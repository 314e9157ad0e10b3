"""Calibrator: measure a sample to decide the precision and the outlier dimensions, once a store."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from afn_ray.corpus import listing
from afn_ray.corpus_values import Document
from afn_ray.errors import StoreError
from afn_ray.fingerprints import fingerprint
from afn_ray.runs import cluster, events, frequent, mean_states, outliers, precision, worker
from afn_ray.runs.events import OnEvent, on_warning
from afn_ray.runs.task import Task
from afn_ray.store import calibrations, plans

T = TypeVar("T")

CALIBRATION_DOCUMENTS = 2000
"""Largest number of documents in a calibration's sample."""


@dataclass(frozen=True, slots=True)
class Calibrator:
    """Calibrations for runs over one corpus. The store's first run measures; later runs read what it decided."""

    plan: plans.Plan
    on_event: OnEvent
    keep: bool  # write the results into the store, for later runs
    reduce_only: bool  # measure nothing

    def decide_precision(self, task: Task) -> precision.Precision:
        """The precision of ``task``, with warnings where it is not safe or not fast."""
        config = task.config
        if config.dtype == "float32":
            return precision.decide(task, ())
        key = fingerprint([task.measure.as_dict(), config.dtype])
        stored = self._read(task, key)
        if stored is None:
            self.on_event(events.Calibrating("a calibration compares half precision with float32"))
            ours = decided = self._measure(task, precision.decide)
            if self.keep:  # what another first run has decided in the meantime counts
                decided = precision.from_json(
                    calibrations.write_calibration(config.store, key, ours.to_json())
                )
            text = precision.describe(decided)
            if text != precision.describe(ours):
                text += "; another run of this store decided it meanwhile"
        else:
            decided = precision.from_json(stored)
            text = (
                f"{precision.describe(decided)}; this store's first run decided it, and another "
                "--dtype wants another store"
            )
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
        what = "a calibration looks for the most frequent types"
        return tuple(self._find(task, f"mean_types {num}", what, frequent.find_types))

    def _find(
        self, task: Task, name: str, what: str, calibration: Callable[[Task, Sequence[str]], T]
    ) -> T:
        """The result ``name`` of ``calibration``, which the store's first run measures.

        ``what`` says what is measured.
        """
        store, (key, *_) = task.config.store, name.split()
        of = fingerprint([task.measure.as_dict(), name])
        stored = self._read(task, of)
        if stored is None:
            self.on_event(events.Calibrating(what))
            stored = {key: self._measure(task, calibration)}
            if self.keep:
                stored = calibrations.write_calibration(store, of, stored)
        found: T = stored[key]
        return found

    def _read(self, task: Task, key: str) -> dict[str, Any] | None:
        """The stored result of the calibration ``key``; None: it has to be measured."""
        stored = calibrations.read_calibration(task.config.store, key)
        if stored is None and self.reduce_only:
            raise StoreError(
                f"no run in {task.config.store} has decided the precision, the outlier dimensions, "
                "the mean states or the types of what this config asks for, and --reduce-only decides nothing: give "
                "the config that measured, or leave --reduce-only out"
            )
        return stored

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
    rows = itertools.zip_longest(*by_source.values())
    return [text for row in rows for text in row if text is not None]
