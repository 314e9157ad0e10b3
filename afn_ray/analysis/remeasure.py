"""Measure a text on this machine as a run measured its corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from afn_ray import model
from afn_ray.analysis.local_model import LocalModel
from afn_ray.errors import ConfigError, ModelError
from afn_ray.measure import StoredMeasure
from afn_ray.runs import cluster, worker
from afn_ray.runs.measurer import Measured, Measurer, find_model_files
from afn_ray.runs.task import Task
from afn_ray.store import manifest
from afn_ray.store.settings import config_from


def measure_text(plan: Task, text: str, replaced: bool) -> tuple[Measured, list[str]]:
    """``plan``'s series for every token of ``text``, and the tokenizer's vocabulary."""
    model.free_memory()  # free the previous model
    loaded = Measurer(plan)
    measured = loaded.measure([text], [replaced])
    pieces = loaded.preparer.pieces
    if problem := measured.encoded.problems.get(0):
        raise ModelError(
            f"{plan.config.model} cannot measure this text; a run would quarantine it: {problem}"
        )
    if not len(measured.encoded.token_ids):
        raise ConfigError("the text has no tokens; give one with at least a word")
    for series, values in zip(plan.measure.series, measured.values, strict=True):
        if not np.isfinite(values).all():
            raise ModelError(
                f"{plan.config.model} gave a {series.name} that is not finite for this text; a run "
                "would quarantine it"
            )
    return measured, pieces


def recorded_task(run: manifest.RunFolder, local: LocalModel) -> Task:
    """The task that measures texts on this machine as ``run`` measured its corpus.

    Raises ``ModelError`` when the model here differs from the run's, naming the differences.
    """
    recorded = run.info["measure"]
    config = config_from(
        {**run.info["config"], "keep_columns": None, "where": None}
    )  # a text has none
    for flag, asked, given in (
        ("trust_remote_code", config.trust_remote_code, local.trust_remote_code),
        ("allow_pickle", config.allow_pickle, local.allow_pickle),
    ):
        if asked and not given:
            raise ModelError(
                f"run {run.uri} was made with {flag}, which lets its model run code here; if you "
                f"trust {local.name or config.model}, give --{flag.replace('_', '-')}"
            )
    config = replace(config, dtype=recorded["dtype"], model=local.name or config.model)
    device = cluster.local_device(run.info["made_by"]["device"])
    task = worker.prepare(config, find_model_files(config), device, config.dtype)
    measure = replace(
        task.measure,
        labels=recorded.get("labels"),
        outliers=tuple(tuple(dims) for dims in recorded.get("outliers", ())),
        neurons_above=tuple(recorded.get("neurons_above", ())),
        languages=recorded.get("languages"),
        mean_types=tuple(recorded.get("mean_types", ())),
        means=tuple(recorded.get("means", ())),
    )
    if measure.id != recorded["id"]:
        raise ModelError(_not_the_same(config.model, run.uri, recorded, measure.as_dict()))
    # A text that is asked about needs no language, and the run's detector may be missing here. Its
    # states are not added up either.
    return replace(task, measure=replace(measure, languages=None, mean_types=()))


def _not_the_same(name: str, run: str, theirs: StoredMeasure, ours: StoredMeasure) -> str:
    differences = []
    for key in sorted({*theirs, *ours} - {"id"}):
        there = theirs.get(key)
        here = ours.get(key)
        if there == here:
            continue
        if key == "model":
            parts = ", ".join(_different_parts(theirs.get("model", {}), ours.get("model", {})))
            differences.append(f"these parts of it differ: {parts}")
        else:
            differences.append(f"{key} is {json.dumps(there)} in the run, {json.dumps(here)} here")
    return (
        f"the model at {name} is not the one of run {run}: "
        f"{'; '.join(differences) or 'its run.json was edited'}. Strengths of two measures cannot "
        "be compared; give the run's model"
    )


def _different_parts(theirs: Mapping[str, str], ours: Mapping[str, str]) -> Iterator[str]:
    """Parts of a model's identity that differ, with both values where people can read them."""
    for part in sorted({*theirs, *ours}):
        if theirs.get(part) == ours.get(part):
            continue
        if part in model.MAKERS:
            yield f"{part} ({theirs.get(part)} in the run, {ours[part]} here)"
        else:
            yield part


def notes_on(made_by: dict[str, str], device: str, dtype: str) -> tuple[str, ...]:
    """Reasons why figures may differ from the run's in their last digits."""
    notes = []
    if made_by["device"] != device:
        digits = "fifth or a later" if dtype == "float32" else "third or fourth"
        notes.append(
            f"The run was measured on {made_by['device']}, this text on {device} (both {dtype}): "
            f"strengths differ in their {digits} digit, and a token close to a threshold can lie "
            "on its other side."
        )
    changed = []
    for name, here in model.VERSIONS.items():
        then = made_by.get(name)
        if then != here:
            changed.append(f"{name} {then} then, {here} here")
    if changed:
        notes.append(
            f"Libraries differ from the run's ({'; '.join(changed)}): last digits of strengths "
            "may, too."
        )
    return tuple(notes)
