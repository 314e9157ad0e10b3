"""One text compared with a run: its tokens' measurements, and the inputs of a decision."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import model
from afn_ray.config import resolve_layers
from afn_ray.errors import ConfigError, ModelError
from afn_ray.model.signals import find_signals
from afn_ray.reduce.stats import spearman
from afn_ray.runs import cluster, worker
from afn_ray.runs.measurer import Measured, Measurer, find_model
from afn_ray.runs.task import Task
from afn_ray.schema import SPECIAL, STRENGTH, WORD_START, Series
from afn_ray.store import label_thresholds, manifest
from afn_ray.store.settings import config_from

TOP = 10
"""Number of tokens and neurons that a decision lists, and of labels that it shows."""

SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Usual:
    """Figures of a token's type at one layer, from the run."""

    n: int  # occurrences
    median: float
    share_high: float


@dataclass(frozen=True, slots=True)
class Value:
    """One token's value of a signal other than strength, at one layer."""

    signal: str  # column name without the layer
    value: float
    quartile: (
        int | None
    )  # by the run's thresholds; None where it did not record the signal, and for special tokens


@dataclass(frozen=True, slots=True)
class Reading:
    """One token at one layer, compared with the run."""

    layer: int
    strength: float
    quartile: int | None  # 1 to 4 by the run's thresholds; None for special tokens
    high: bool | None  # at or above Q3
    rank: float | None  # share of the run's non-special tokens at or below ``strength``
    usual: Usual | None  # None: the type is not in the run
    signals: tuple[Value, ...] = ()  # the requested ones that the layer has


@dataclass(frozen=True, slots=True)
class Cell:
    """One token at one layer, compared within this text alone."""

    layer: int
    strength: float
    rank: float | None  # share of the text's non-special tokens at or below ``strength``
    decile: int | None  # 0 to 9 by ``rank``; both are None for special tokens
    quartile: int | None  # by the run's thresholds; None where it did not record the layer


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the text."""

    text: str  # as in the text; empty for special tokens
    piece: str  # as in the tokenizer's vocabulary
    token_id: int
    start: int  # start and end: character offsets into the text
    end: int
    special: bool
    word_start: bool
    readings: tuple[Reading, ...]  # in the order of ``Explanation.layers``
    cells: tuple[Cell, ...] = ()  # in the order of ``Explanation.sweep``


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The run's quartiles of one layer, over all its tokens except special ones."""

    layer: int
    n: int
    q1: float
    q2: float
    q3: float


@dataclass(frozen=True, slots=True)
class Label:
    """One label of the classifier."""

    name: str
    value: float  # probability; for a regression the value


@dataclass(frozen=True, slots=True)
class Neuron:
    """A neuron of the layer's MLP and its part in a decision."""

    neuron: int
    attribution: float  # sum over all tokens
    token: int  # index of the token with its largest absolute attribution
    attribution_there: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The classifier's output for the text and its attributions, as in ``model.Decided``."""

    layer: int
    kind: str  # "one" of the labels, "any" of them, or a "value"
    labels: tuple[Label, ...]
    chosen: int  # index of the label that the attributions explain
    attributions: tuple[float, ...]  # by token
    neurons: tuple[Neuron, ...]  # the ``TOP`` largest by absolute attribution; empty at layer 0
    spearman: (
        float | None
    )  # of strength and absolute attribution, without special tokens; None where either is constant


@dataclass(frozen=True, slots=True)
class Explanation:
    """A text's tokens compared with a run."""

    run: str  # URI
    model: str
    dtype: str
    device: str  # device on which the text was measured
    text: str
    layers: tuple[int, ...]  # ascending
    thresholds: tuple[Thresholds, ...]  # in the order of ``layers``
    tokens: tuple[Token, ...]
    notes: tuple[str, ...]  # reasons why figures may differ from the run's in their last digits
    sweep: tuple[int, ...] = ()  # layers of the heat map, ascending
    decision: Decision | None = None


def explain(
    run_uri: str,
    text: str,
    *,
    model_name: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    signals: str = STRENGTH,
    layers: str | None = None,
    task: bool = False,
    layer: int | None = None,
) -> Explanation:
    """Measure ``text`` as the run at ``run_uri`` measured its corpus, in this process, and compare.

    - ``signals``: signals to measure beside strength, recorded or not.
    - ``layers``: layers of a heat map of the text, recorded or not; same syntax as in a config.
    - ``task``: also run the model's own sequence classifier and attribute its output at ``layer``
      (None: the deepest recorded layer).
    - ``model_name``: path of the run's model on this machine, if it differs from the run's.

    A store may come from a third party, so code and pickles that its run names are used only where
    the caller allows them too (``trust_remote_code``, ``allow_pickle``).

    Raises ``StoreError`` where there is no such run, and ``ConfigError`` for a text without tokens,
    a layer that was not recorded or an unknown signal. Raises ``ModelError`` when the model here
    differs from the run's (the message names the differences), cannot give a signal or has no
    classifier.
    """
    run = manifest.find_run(run_uri)
    plan = recorded_task(
        run, model_name=model_name, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    config, device = plan.config, plan.device
    chosen = index_of(plan.measure.layers, layer)
    if apart := [s.name for s in find_signals(signals)[0] if not s.is_series]:
        raise ConfigError(
            f"signals has {apart[0]}, which is no number a token; 'afn neurons' and --task show "
            "neurons"
        )
    plan = worker.with_signals(plan, signals)
    measure = plan.measure
    if worker.wants_outliers(plan) and not measure.outliers:
        raise ConfigError(
            f"signals {signals} leave out dimensions that a run finds on its corpus, and {run.uri} "
            "looked for none; leave them out, or explain against a run that recorded them"
        )
    cleaned = SURROGATES.sub("\ufffd", text)  # no surrogates, as in the corpus
    measured, pieces = _measure(plan, cleaned, cleaned != text)
    encoded, by_series = measured.encoded, dict(zip(measure.series, measured.values, strict=True))
    special = (encoded.flags & SPECIAL) > 0
    tables = {name: manifest.read_table(run, name) for name in ("histogram", "vocabulary")}
    tables["labels"] = label_thresholds.labels(run)
    if "signals" in run.info["tables"]:
        tables["signals"] = manifest.read_table(run, "signals")
    thresholds, columns = [], []
    for at in measure.layers:
        limits, readings = _read_layer(
            tables, at, encoded.token_ids, special, by_series[Series(STRENGTH, at)]
        )
        thresholds.append(limits)
        others = [
            _read_signal(tables, s, special, by_series[s]) for s in measure.series if s.layer == at
        ][1:]
        columns.append(
            [replace(r, signals=tuple(o[i] for o in others)) for i, r in enumerate(readings)]
        )
    sweep = () if layers is None else resolve_layers(layers, run.info["model"]["depth"])
    if elsewhere := tuple(k for k in sweep if k not in measure.layers):
        # in a pass of its own, so that the first one is exactly the run's
        other = replace(plan, measure=replace(measure, layers=elsewhere, outliers=()))
        other = worker.with_signals(other)
        by_series |= zip(
            other.measure.series, _measure(other, cleaned, cleaned != text)[0].values, strict=True
        )
    quartiles = {
        k: [r.quartile for r in column] for k, column in zip(measure.layers, columns, strict=True)
    }
    cells = [
        _within_text(k, by_series[Series(STRENGTH, k)], special, quartiles.get(k)) for k in sweep
    ]
    spans = zip(encoded.start.tolist(), encoded.end.tolist(), strict=True)
    tokens = tuple(
        Token(
            "" if special[i] else cleaned[start:end],
            pieces[token_id],
            token_id,
            start,
            end,
            bool(special[i]),
            bool(encoded.flags[i] & WORD_START),
            tuple(r[i] for r in columns),
            tuple(c[i] for c in cells),
        )
        for i, ((start, end), token_id) in enumerate(
            zip(spans, encoded.token_ids.tolist(), strict=True)
        )
    )
    decision = None
    if task:
        window = run.info["measure"]["window_tokens"]
        if len(tokens) > window:
            raise ConfigError(
                f"the text has {len(tokens):,} tokens, and a classifier decides about one window, "
                "which "
                f"has {window:,}; shorten it"
            )
        model.free_memory()
        at, values = measure.layers[chosen], by_series[Series(STRENGTH, measure.layers[chosen])]
        files = find_model(config)
        decided = model.decide(files, encoded.token_ids.tolist(), at, values, measure.dtype, device)
        decision = _decision(decided, at, values, special)
    return Explanation(
        run.uri,
        config.model,
        measure.dtype,
        device,
        cleaned,
        measure.layers,
        tuple(thresholds),
        tokens,
        _notes(run.info["made_by"], device, measure.dtype),
        sweep,
        decision,
    )


def _measure(plan: Task, text: str, replaced: bool) -> tuple[Measured, list[str]]:
    """``plan``'s series for every token of ``text``, and the tokenizer's vocabulary."""
    model.free_memory()  # free the previous model
    loaded = Measurer(plan)
    measured, pieces = loaded.measure([text], [replaced]), loaded.preparer.pieces
    if problem := measured.encoded.problems.get(0):
        raise ModelError(
            f"{plan.config.model} cannot measure this text; a run would quarantine it: {problem}"
        )
    if not len(measured.encoded.token_ids):
        raise ConfigError("the text has no tokens; give one with at least a word")
    if bad := [
        s.name
        for s, v in zip(plan.measure.series, measured.values, strict=True)
        if not np.isfinite(v).all()
    ]:
        raise ModelError(
            f"{plan.config.model} gave a {bad[0]} that is not finite for this text; a run would "
            "quarantine it"
        )
    return measured, pieces


def _read_signal(
    tables: Mapping[str, pa.Table], series: Series, special: Any, values: Any
) -> list[Value]:
    """Values of ``series`` by token, with quartiles where recorded; arrays are [n_tokens]."""
    rows = []
    if "signals" in tables:
        here = (pc.field("signal") == series.signal) & (pc.field("layer") == series.layer)
        rows = tables["signals"].filter(here).to_pylist()
    limits = np.array([rows[0][q] for q in ("q1", "q2", "q3")]) if rows else None
    quartiles = (
        [None] * len(values)
        if limits is None
        else (1 + np.searchsorted(limits, values, side="right")).tolist()
    )
    return [
        Value(series.signal, value, None if is_special else quartile)
        for value, quartile, is_special in zip(
            values.tolist(), quartiles, special.tolist(), strict=True
        )
    ]


def _within_text(
    layer: int, values: Any, special: Any, quartiles: Sequence[int | None] | None
) -> list[Cell]:
    """Each token's rank among the tokens of the text at ``layer``; the arrays are [n_tokens]."""
    others = np.sort(values[~special])
    at_or_below, n = np.searchsorted(others, values, side="right").tolist(), len(others)
    return [
        Cell(layer, value, None, None, None)
        if is_special
        else Cell(
            layer, value, k / n, (10 * k - 1) // n, None if quartiles is None else quartiles[i]
        )
        for i, (value, k, is_special) in enumerate(
            zip(values.tolist(), at_or_below, special.tolist(), strict=True)
        )
    ]


def _decision(decided: model.Decided, layer: int, values: Any, special: Any) -> Decision:
    """``decided`` with ranked neurons; ``values`` (strengths) and ``special`` are [n_tokens]."""
    if not (np.isfinite(decided.tokens).all() and np.isfinite(decided.neurons).all()):
        raise ModelError("the gradient of the classifier's answer is not finite for this text")
    totals = decided.neurons.sum(axis=0, dtype=np.float64)
    neurons = []
    for neuron in np.argsort(-np.abs(totals), kind="stable")[:TOP].tolist():
        parts = decided.neurons[:, neuron]
        token = int(np.abs(parts).argmax())
        neurons.append(Neuron(neuron, float(totals[neuron]), token, float(parts[token])))
    return Decision(
        layer,
        decided.kind,
        tuple(map(Label, decided.labels, decided.values)),
        decided.chosen,
        tuple(decided.tokens.tolist()),
        tuple(neurons),
        spearman(values[~special], np.abs(decided.tokens[~special])),
    )


def recorded_task(
    run: manifest.RunFolder, *, model_name: str | None, trust_remote_code: bool, allow_pickle: bool
) -> Task:
    """The task that measures texts on this machine as ``run`` measured its corpus.

    Raises ``ModelError`` as ``explain`` does.
    """
    recorded = run.info["measure"]
    config = config_from(run.info["config"])
    for flag, asked, given in (
        ("trust_remote_code", config.trust_remote_code, trust_remote_code),
        ("allow_pickle", config.allow_pickle, allow_pickle),
    ):
        if asked and not given:
            raise ModelError(
                f"run {run.uri} was made with {flag}, which lets its model run code here; "
                f"if you trust {model_name or config.model}, give --{flag.replace('_', '-')}"
            )
    config = replace(config, dtype=recorded["dtype"], model=model_name or config.model)
    device = cluster.local_device(run.info["made_by"]["device"])
    task = worker.prepare(config, find_model(config), device, config.dtype)
    measure = replace(
        task.measure,
        labels=recorded.get("labels"),
        outliers=tuple(tuple(dims) for dims in recorded.get("outliers", ())),
        neurons_above=tuple(recorded.get("neurons_above", ())),
    )
    if measure.id != recorded["id"]:
        raise ModelError(_not_the_same(config.model, run.uri, recorded, measure.as_dict()))
    return replace(task, measure=measure)


def _read_layer(
    tables: Mapping[str, pa.Table], layer: int, token_ids: Any, special: Any, strengths: Any
) -> tuple[Thresholds, list[Reading]]:
    """Thresholds of ``layer`` and a reading per token, from ``tables``; arrays are [n_tokens]."""
    here = pc.field("layer") == layer
    row = tables["labels"].filter(here & (pc.field("population") == "tokens")).to_pylist()[0]
    limits = Thresholds(layer, row["n"], row["q1"], row["q2"], row["q3"])
    histogram = tables["histogram"].filter(here & ~pc.field("special"))
    at_or_below = np.append(0, np.cumsum(histogram["n"].to_numpy()))
    ranks = (
        at_or_below[np.searchsorted(histogram["strength"].to_numpy(), strengths, side="right")]
        / limits.n
    )
    quartiles = 1 + np.searchsorted(
        np.array([limits.q1, limits.q2, limits.q3]), strengths, side="right"
    )
    ours = pc.field("token_id").isin(np.unique(token_ids).tolist())
    usual = {
        (r["token_id"], r["class"] == "special"): Usual(r["n"], r["q2"], r["share_high"])
        for r in tables["vocabulary"].filter(here & ours).to_pylist()
    }
    return limits, [
        Reading(layer, strength, None, None, None, usual.get((i, s)))
        if s
        else Reading(layer, strength, quartile, quartile == 4, rank, usual.get((i, s)))
        for i, s, strength, quartile, rank in zip(
            token_ids.tolist(),
            special.tolist(),
            strengths.tolist(),
            quartiles.tolist(),
            ranks.tolist(),
            strict=True,
        )
    ]


def _not_the_same(name: str, run: str, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    differs = []
    for key in sorted({*theirs, *ours} - {"id"}):
        if key == "model" and theirs.get(key) != ours[key]:
            a, b = theirs.get(key) or {}, ours[key]
            parts = sorted(p for p in {*a, *b} if a.get(p) != b.get(p))
            told = [
                f"{p} ({a.get(p)} in the run, {b[p]} here)" if p in model.MAKERS else p
                for p in parts
            ]
            differs.append(f"these parts of it differ: {', '.join(told)}")
        elif theirs.get(key) != ours.get(key):
            differs.append(
                f"{key} is {json.dumps(theirs.get(key))} in the run, {json.dumps(ours.get(key))} "
                "here"
            )
    return (
        f"the model at {name} is not the one of run {run}: "
        f"{'; '.join(differs) or 'its run.json was edited'}. "
        "Strengths of two measures cannot be compared; give the run's model"
    )


def _notes(made_by: dict[str, str], device: str, dtype: str) -> tuple[str, ...]:
    notes = []
    if made_by["device"] != device:
        digits = "fifth or a later" if dtype == "float32" else "third or fourth"
        notes.append(
            f"The run was measured on {made_by['device']}, this text on {device} (both {dtype}): "
            "strengths differ in "
            f"their {digits} digit, and a token close to a threshold can lie on its other side."
        )
    changed = [
        f"{k} {made_by.get(k)} then, {v} here"
        for k, v in model.VERSIONS.items()
        if made_by.get(k) != v
    ]
    if changed:
        notes.append(
            f"Libraries differ from the run's ({'; '.join(changed)}): last digits of strengths "
            "may, too."
        )
    return tuple(notes)


def index_of(layers: tuple[int, ...], layer: int | None) -> int:
    """Index of ``layer`` among the recorded ``layers``; None means the deepest."""
    if layer is None:
        return len(layers) - 1
    if layer not in layers:
        raise ConfigError(
            f"layer {layer} was not recorded; the run has {', '.join(map(str, layers))}"
        )
    return layers.index(layer)


def to_json(explanation: Explanation) -> dict[str, Any]:
    """``explanation`` as plain values, equal to what ``json.loads`` returns."""
    value: dict[str, Any] = json.loads(json.dumps(asdict(explanation), allow_nan=False))
    return value
