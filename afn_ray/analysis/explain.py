"""Compare one text with a run: measure its tokens, and attribute a
classifier's decision to them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import model
from afn_ray.analysis.explanation import (
    TOP,
    Cell,
    Decision,
    ExplainedToken,
    Explanation,
    Label,
    NeuronPart,
    Question,
    Reading,
    Thresholds,
    Value,
    index_of,
)
from afn_ray.analysis.local_model import LocalModel
from afn_ray.analysis.remeasure import measure_text, notes_on, recorded_task
from afn_ray.analysis.word_readings import TextWord, Usual, explained_words, words_in
from afn_ray.config import resolve_layers
from afn_ray.errors import ConfigError, ModelError
from afn_ray.model.signals import find_signals
from afn_ray.query.database import Run, folder_of
from afn_ray.reduce.stats import spearman
from afn_ray.runs import worker
from afn_ray.runs.measurer import find_model_files
from afn_ray.runs.task import Task
from afn_ray.schema import SPECIAL, STRENGTH, WORD_START, Series
from afn_ray.store import label_thresholds, manifest
from afn_ray.store.manifest import RunFolder
from afn_ray.tokens.encode import Encoded

SURROGATES = re.compile("[\ud800-\udfff]")


def explain(
    run: str | RunFolder | Run,
    text: str,
    question: Question = Question(),  # noqa: B008 - frozen
    local: LocalModel = LocalModel(),  # noqa: B008 - frozen
) -> Explanation:
    """Measure ``text`` as ``run`` measured its corpus, in this process, and compare.

    ``run`` is a run's URI, a store's URI for its latest complete run, or a run. ``question`` says
    what to measure beside the strengths at the recorded layers. ``local`` is the model, if it has
    moved since the run, and what it may do here. Each call loads the model.

    Raises ``StoreError`` where there is no such run, and ``ConfigError`` for a text without tokens,
    a layer that was not recorded or an unknown signal. Raises ``ModelError`` when the model here
    differs from the run's (the message names the differences), cannot give a signal or has no
    classifier.
    """
    folder = folder_of(run)
    sweep: tuple[int, ...] = ()
    if question.layers is not None:
        sweep = resolve_layers(question.layers, folder.info["model"]["depth"])
    plan = recorded_task(folder, local)
    layer = plan.measure.layers[index_of(plan.measure.layers, question.layer)]
    plan = _with_signals(plan, question.signals, folder.uri)
    cleaned = SURROGATES.sub("\ufffd", text)  # no surrogates, as in the corpus
    measured, pieces = measure_text(plan, cleaned, cleaned != text)
    encoded = measured.encoded
    by_series = dict(zip(plan.measure.series, measured.values, strict=True))
    is_special = (encoded.flags & SPECIAL) > 0
    words = words_in(cleaned, encoded)
    tables = _tables(folder, encoded.token_ids, words)
    thresholds, readings = _compare(tables, encoded.token_ids, is_special, by_series)
    strengths = {k: by_series[Series(STRENGTH, k)] for k in plan.measure.layers}
    q3 = {limits.layer: limits.q3 for limits in thresholds}
    explained = explained_words(words, strengths, q3, tables.get("word_vocabulary"))
    if sweep:
        by_series |= _measure_elsewhere(plan, sweep, cleaned, cleaned != text)
    cells = []
    for k in sweep:
        quartiles = [r.quartile for r in readings[k]] if k in readings else None
        cells.append(_within_text(k, by_series[Series(STRENGTH, k)], is_special, quartiles))
    tokens = _tokens(cleaned, encoded, pieces, list(readings.values()), cells)
    decision = None
    if question.task:
        _check_window(len(tokens), folder.info["measure"]["window_tokens"])
        strengths = by_series[Series(STRENGTH, layer)]
        decision = _decide(plan, layer, encoded.token_ids, strengths, is_special)
    return Explanation(
        run=folder.uri,
        model=plan.config.model,
        dtype=plan.measure.dtype,
        device=plan.device,
        text=cleaned,
        layers=plan.measure.layers,
        thresholds=tuple(thresholds),
        tokens=tokens,
        notes=notes_on(folder.info["made_by"], plan.device, plan.measure.dtype),
        sweep=sweep,
        decision=decision,
        words=explained,
    )


def _compare(
    tables: Mapping[str, pa.Table], token_ids: Any, special: Any, by_series: Mapping[Series, Any]
) -> tuple[list[Thresholds], dict[int, list[Reading]]]:
    """Thresholds of each recorded layer, and a reading per token by layer;
    arrays are [n_tokens].
    """
    thresholds: list[Thresholds] = []
    readings: dict[int, list[Reading]] = {}
    for series, strengths in by_series.items():
        if series.signal != STRENGTH:
            continue
        k = series.layer
        limits, plain = _read_layer(tables, k, token_ids, special, strengths)
        others = [s for s in by_series if s.layer == k and s.signal != STRENGTH]
        values = [_read_signal(tables, s, special, by_series[s]) for s in others]
        thresholds.append(limits)
        readings[k] = []
        for at, reading in enumerate(plain):
            of_token = tuple(of_signal[at] for of_signal in values)
            readings[k].append(replace(reading, signals=of_token))
    return thresholds, readings


def _measure_elsewhere(
    task: Task, layers: Sequence[int], text: str, is_replaced: bool
) -> dict[Series, Any]:
    """Strengths of ``text`` at those of ``layers`` that ``task`` does not measure.

    They are measured in a pass of their own, so that the first one is exactly the run's.
    """
    elsewhere = tuple(k for k in layers if k not in task.measure.layers)
    if not elsewhere:
        return {}
    measure = replace(task.measure, layers=elsewhere, outliers=(), means=())
    other = worker.with_signals(replace(task, measure=measure))
    swept, _ = measure_text(other, text, is_replaced)
    return dict(zip(other.measure.series, swept.values, strict=True))


def _with_signals(task: Task, signals: str, run_uri: str) -> Task:
    """``task`` that also measures ``signals``."""
    asked, _ = find_signals(signals)
    not_series = [signal.name for signal in asked if not signal.is_series]
    if not_series:
        raise ConfigError(
            f"signals has {not_series[0]}, which is no number a token; 'afn neurons' and --task "
            "show neurons"
        )
    task = worker.with_signals(task, signals)
    if worker.wants(task, "outliers") and not task.measure.outliers:
        raise ConfigError(
            f"signals {signals} leave out dimensions that a run finds on its corpus, and {run_uri} "
            "looked for none; leave them out, or explain against a run that recorded them"
        )
    if worker.wants(task, "mean") and not task.measure.means:
        raise ConfigError(
            f"signals {signals} subtract a mean state that a run finds on its corpus, and "
            f"{run_uri} looked for none; leave them out, or explain against a run that recorded "
            "them"
        )
    return task


def _tables(run: RunFolder, token_ids: Any, words: Sequence[TextWord]) -> dict[str, pa.Table]:
    """Tables of ``run`` that a text is compared with; ``labels`` are the thresholds that label.

    Those of types and words have the rows of the text's own.
    """
    figures = ("layer", "n", "q2", "share_high")
    of_types = pc.field("token_id").isin(np.unique(token_ids).tolist())
    columns = ("token_id", "class", *figures)
    tables = {
        "histogram": manifest.read_table(run, "histogram"),
        "vocabulary": manifest.read_table(run, "vocabulary", columns, of_types),
        "labels": label_thresholds.labels(run),
    }
    if "signals" in run.info["tables"]:
        tables["signals"] = manifest.read_table(run, "signals")
    if "word_vocabulary" in run.info["tables"]:
        names = sorted({word.name for word in words})
        of_words = pc.field("word").isin(pa.array(names, pa.string()))
        tables["word_vocabulary"] = manifest.read_table(
            run, "word_vocabulary", ("word", *figures), of_words
        )
    return tables


def _tokens(
    text: str,
    encoded: Encoded,
    pieces: Sequence[str],
    readings: Sequence[Sequence[Reading]],
    cells: Sequence[Sequence[Cell]],
) -> tuple[ExplainedToken, ...]:
    """Tokens of ``text``; ``readings`` and ``cells`` are lists by token for each layer."""
    ids = encoded.token_ids.tolist()
    flags = encoded.flags.tolist()
    spans = zip(encoded.start.tolist(), encoded.end.tolist(), strict=True)
    tokens = []
    for at, (start, end) in enumerate(spans):
        is_special = bool(flags[at] & SPECIAL)
        tokens.append(
            ExplainedToken(
                text="" if is_special else text[start:end],
                piece=pieces[ids[at]],
                token_id=ids[at],
                start=start,
                end=end,
                special=is_special,
                word_start=bool(flags[at] & WORD_START),
                readings=tuple(of_layer[at] for of_layer in readings),
                cells=tuple(of_layer[at] for of_layer in cells),
            )
        )
    return tuple(tokens)


def _check_window(num_tokens: int, window: int) -> None:
    if num_tokens > window:
        raise ConfigError(
            f"the text has {num_tokens:,} tokens, and a classifier decides about one window, which "
            f"has {window:,}; shorten it"
        )


def _decide(task: Task, layer: int, token_ids: Any, strengths: Any, special: Any) -> Decision:
    """The classifier's decision, attributed at ``layer``; the arrays are [n_tokens]."""
    model.free_memory()
    files = find_model_files(task.config)
    ids = token_ids.tolist()
    decided = model.decide(files, ids, layer, strengths, task.measure.dtype, task.device)
    return _decision(decided, layer, strengths, special)


def _read_signal(
    tables: Mapping[str, pa.Table], series: Series, special: Any, values: Any
) -> list[Value]:
    """Values of ``series`` by token, with quartiles where recorded; arrays are [n_tokens]."""
    quartiles = [None] * len(values)
    if "signals" in tables:
        here = (pc.field("signal") == series.signal) & (pc.field("layer") == series.layer)
        for row in tables["signals"].filter(here).to_pylist():
            quartiles = _quartiles(row, values)
    found = []
    by_token = zip(values.tolist(), quartiles, special.tolist(), strict=True)
    for value, quartile, is_special in by_token:
        found.append(Value(series.signal, value, None if is_special else quartile))
    return found


def _quartiles(thresholds: Mapping[str, Any], values: Any) -> list[Any]:
    """Quartile of each value, 1 to 4; a value at a threshold belongs to the upper quartile."""
    limits = np.array([thresholds[name] for name in ("q1", "q2", "q3")])
    found: list[Any] = (1 + np.searchsorted(limits, values, side="right")).tolist()
    return found


def _within_text(
    layer: int, values: Any, special: Any, quartiles: Sequence[int | None] | None
) -> list[Cell]:
    """Each token's rank among the tokens of the text at ``layer``; the arrays are [n_tokens]."""
    others = np.sort(values[~special])
    n = len(others)
    at_or_below = np.searchsorted(others, values, side="right").tolist()
    by_token = zip(values.tolist(), at_or_below, special.tolist(), strict=True)
    cells = []
    for at, (value, k, is_special) in enumerate(by_token):
        if is_special:
            cells.append(Cell(layer, value, None, None, None))
        else:
            decile = (10 * k - 1) // n
            quartile = None if quartiles is None else quartiles[at]
            cells.append(Cell(layer, value, k / n, decile, quartile))
    return cells


def _decision(decided: model.Decided, layer: int, values: Any, special: Any) -> Decision:
    """``decided`` with ranked neurons; ``values`` (strengths) and ``special`` are [n_tokens]."""
    parts_of_all = (decided.tokens, decided.neurons)
    if not all(np.isfinite(part).all() for part in parts_of_all):
        raise ModelError("the gradient of the classifier's answer is not finite for this text")
    totals = decided.neurons.sum(axis=0, dtype=np.float64)
    largest = np.argsort(-np.abs(totals), kind="stable")[:TOP]
    neurons = []
    for neuron in largest.tolist():
        parts = decided.neurons[:, neuron]
        token = int(np.abs(parts).argmax())
        neurons.append(NeuronPart(neuron, float(totals[neuron]), token, float(parts[token])))
    attributions = np.abs(decided.tokens[~special])
    return Decision(
        layer=layer,
        kind=decided.kind,
        labels=tuple(map(Label, decided.labels, decided.values)),
        chosen=decided.chosen,
        attributions=tuple(decided.tokens.tolist()),
        neurons=tuple(neurons),
        spearman=spearman(values[~special], attributions),
    )


def _read_layer(
    tables: Mapping[str, pa.Table], layer: int, token_ids: Any, special: Any, strengths: Any
) -> tuple[Thresholds, list[Reading]]:
    """Thresholds of ``layer`` and a reading per token, from ``tables``; arrays are [n_tokens]."""
    here = pc.field("layer") == layer
    is_of_tokens = pc.field("population") == "tokens"
    row, *_ = tables["labels"].filter(here & is_of_tokens).to_pylist()
    limits = Thresholds(layer, row["n"], row["q1"], row["q2"], row["q3"])
    histogram = tables["histogram"].filter(here & ~pc.field("special"))
    at_or_below = np.append(0, np.cumsum(histogram["n"].to_numpy()))
    below = np.searchsorted(histogram["strength"].to_numpy(), strengths, side="right")
    ranks = at_or_below[below] / limits.n
    usual = _usual(tables["vocabulary"].filter(here))
    by_token = zip(
        token_ids.tolist(),
        special.tolist(),
        strengths.tolist(),
        _quartiles(row, strengths),
        ranks.tolist(),
        strict=True,
    )
    readings = []
    for token_id, is_special, strength, quartile, rank in by_token:
        of_type = usual.get((token_id, is_special))
        if is_special:
            readings.append(Reading(layer, strength, None, None, None, of_type))
        else:
            readings.append(Reading(layer, strength, quartile, quartile == 4, rank, of_type))
    return limits, readings


def _usual(vocabulary: pa.Table) -> dict[tuple[int, bool], Usual]:
    """Figures of the types in ``vocabulary``, by id and whether the type is special."""
    usual = {}
    for row in vocabulary.to_pylist():
        is_special = row["class"] == "special"
        share_high = None if is_special else row["share_high"]
        usual[row["token_id"], is_special] = Usual(row["n"], row["q2"], share_high)
    return usual
