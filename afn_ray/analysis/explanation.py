"""Explanation of a text beside a run: tokens, words, and the inputs of a decision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import notebook
from afn_ray.analysis.word_readings import ExplainedWord, Usual
from afn_ray.errors import ConfigError
from afn_ray.schema import STRENGTH
from afn_ray.text import visible

TOP = 10
"""Number of tokens and neurons that a decision lists, and of labels that it shows."""
OF_RUN = [("n", pa.int64()), ("median", pa.float64()), ("share_high", pa.float64())]
"""Figures of a token's type, or of a word, in the run; null where it is not there."""
TOKENS = pa.schema(
    [
        ("at", pa.int32()),
        ("token", pa.string()),
        ("token_id", pa.int32()),
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("is_special", pa.bool_()),
        ("is_word_start", pa.bool_()),
        ("layer", pa.int16()),
        ("strength", pa.float64()),
        ("quartile", pa.int8()),
        ("high", pa.bool_()),
        ("rank", pa.float64()),
        *OF_RUN,
    ]
)
"""First columns of ``Explanation.table``; the fields of ``ExplainedToken`` and ``Reading``."""
WORDS = pa.schema(
    [
        ("word", pa.string()),
        ("first", pa.int32()),
        ("n_tokens", pa.int32()),
        ("layer", pa.int16()),
        ("strength", pa.float64()),
        ("high", pa.bool_()),
        *OF_RUN,
    ]
)
"""Columns of ``Explanation.word_table``; the fields of ``ExplainedWord`` and ``WordReading``."""


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
class ExplainedToken:
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
class NeuronPart:
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
    neurons: tuple[NeuronPart, ...]  # the ``TOP`` largest by absolute attribution; empty at layer 0
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
    tokens: tuple[ExplainedToken, ...]
    notes: tuple[str, ...]  # reasons why figures may differ from the run's in their last digits
    sweep: tuple[int, ...] = ()  # layers of the heat map, ascending
    decision: Decision | None = None
    words: tuple[ExplainedWord, ...] = ()  # of several tokens; empty if the run counted no words

    @property
    def table(self) -> pa.Table:
        """One row for each token at each recorded layer.

        It has the columns of ``TOKENS``, then a float64 column for each other signal asked for,
        which is null at a layer that has no such signal.
        """
        names: dict[str, None] = {}
        for reading in self.tokens[0].readings:
            names |= dict.fromkeys(value.signal for value in reading.signals)
        schema = pa.schema([*TOKENS, *((name, pa.float64()) for name in names)])
        rows = []
        for at, token in enumerate(self.tokens):
            of_token = {
                "at": at,
                "token": token.piece if token.special else token.text,
                "token_id": token.token_id,
                "start": token.start,
                "end": token.end,
                "is_special": token.special,
                "is_word_start": token.word_start,
            }
            rows += [of_token | _figures(reading) for reading in token.readings]
        return pa.Table.from_pylist(rows, schema)

    @property
    def word_table(self) -> pa.Table:
        """One row for each word of several tokens at each recorded layer, as in ``WORDS``."""
        rows = []
        for word in self.words:
            of_word = {"word": word.text, "first": word.first, "n_tokens": word.n_tokens}
            for reading in word.readings:
                figures = {"strength": reading.strength, "high": reading.high}
                row = of_word | {"layer": reading.layer} | figures | _of_run(reading.usual)
                rows.append(row)
        return pa.Table.from_pylist(rows, WORDS)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        deepest = self.layers[-1]
        here = pc.field("layer") == deepest
        tokens = self.table.filter(here)
        shown = ["token", "strength", "quartile", "rank", "median", "share_high", "n"]
        shown += tokens.column_names[len(TOKENS) :]
        pieces = [
            (text, token is not None and bool(token.readings[-1].high))
            for text, token in running_text(self)
        ]
        parts = [
            notebook.marked_text(pieces),
            notebook.table(f"Tokens at layer {deepest}; marked: HIGH", tokens.select(shown)),
        ]
        if self.words:
            words = self.word_table.filter(here).drop_columns(["first", "layer"])
            parts.append(notebook.table("Words of several tokens", words))
        if self.decision is not None:
            labels = [asdict(label) for label in self.decision.labels]
            parts.append(notebook.table_of("Labels of the classifier", labels))
        return "".join(parts) + notebook.text(self.notes)


@dataclass(frozen=True, slots=True)
class Question:
    """Question about a text, beside its strengths at the recorded layers."""

    signals: str = STRENGTH  # also measured, recorded or not
    layers: str | None = None  # layers of a heat map, recorded or not; same syntax as in a config
    task: bool = False  # run the model's own sequence classifier, and attribute its output
    layer: int | None = None  # of the attributions; None: the deepest recorded layer


def running_text(explanation: Explanation) -> Iterator[tuple[str, ExplainedToken | None]]:
    """The text in order, cut into tokens and the parts between them (None); each character once.

    White space before a token's first letter counts as between. Where tokens share a character
    (byte-level pieces), the first one shows it.
    """
    text, cursor = explanation.text, 0
    for token in explanation.tokens:
        body = text[max(cursor, token.start) : token.end]
        if token.special or not body:
            continue
        begin = token.end - len(body.lstrip() or body)
        if cursor < begin:
            yield _shown(text[cursor:begin]), None
        yield _shown(text[begin : token.end]), token
        cursor = token.end
    if cursor < len(text):
        yield _shown(text[cursor:]), None


def _shown(text: str) -> str:
    return visible(text.replace("\r\n", "\n"), keep="\n\t")


def _figures(reading: Reading) -> dict[str, object]:
    """Columns of a token at one layer."""
    row = {
        "layer": reading.layer,
        "strength": reading.strength,
        "quartile": reading.quartile,
        "high": reading.high,
        "rank": reading.rank,
    }
    return row | _of_run(reading.usual) | {v.signal: v.value for v in reading.signals}


def _of_run(usual: Usual | None) -> dict[str, object]:
    return {} if usual is None else asdict(usual)


def index_of(layers: tuple[int, ...], layer: int | None) -> int:
    """Index of ``layer`` among the recorded ``layers``; None means the deepest."""
    if layer is None:
        return len(layers) - 1
    if layer not in layers:
        recorded = ", ".join(map(str, layers))
        raise ConfigError(f"layer {layer} was not recorded; the run has {recorded}")
    return layers.index(layer)


def to_json(explanation: Explanation) -> dict[str, object]:
    """``explanation`` as plain values, equal to what ``json.loads`` returns."""
    value: dict[str, object] = json.loads(json.dumps(asdict(explanation), allow_nan=False))
    return value
