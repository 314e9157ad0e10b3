"""Questions about the neurons of a run: the selective ones, those of a
word, and the uses of one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import pyarrow as pa

from afn_ray import notebook
from afn_ray.analysis import concepts
from afn_ray.analysis.concepts import Concept, Context, Neuron
from afn_ray.query.database import Run, opened
from afn_ray.text import count

TOP = 15
"""Default number of neurons of an answer."""
TIMEOUT_S = 600.0
"""Default time limit of each query, in seconds."""
TYPES = pa.list_(pa.struct([("text", pa.string()), ("n", pa.int64()), ("lift", pa.float64())]))
"""Types that a neuron responds to, with ``n`` of their tokens that have it.

``lift`` is how many times as often they have it as by chance.
"""
NEURON_COLUMNS = pa.schema(
    [
        ("neuron", pa.int64()),
        ("n", pa.int64()),
        ("share", pa.float64()),
        ("mean", pa.float64()),
        ("largest", pa.float64()),
        ("n_types", pa.int64()),
        ("selectivity", pa.float64()),
        ("types", TYPES),
    ]
)
"""Columns of ``SelectiveNeurons.table``; the fields of ``Neuron`` say what they are."""
WORD_COLUMNS = pa.schema(
    [
        ("neuron", pa.int64()),
        ("share", pa.float64()),
        ("elsewhere", pa.float64()),
        ("lift", pa.float64()),
        ("mean", pa.float64()),
        ("types", TYPES),
    ]
)
"""Columns of ``WordNeurons.table``; the fields of ``Concept`` say what they are."""
CONTEXT_COLUMNS = pa.schema(
    [
        ("doc", pa.int64()),
        ("position", pa.int64()),
        ("value", pa.float64()),
        ("left", pa.string()),
        ("word", pa.string()),
        ("right", pa.string()),
    ]
)
"""Columns of ``NeuronUses.table``; ``doc`` is that of the run's views."""


@dataclass(frozen=True, slots=True)
class NeuronLayer:
    """A layer of a run that recorded neurons."""

    run: str  # URI
    layer: int
    recorded: tuple[int, ...]  # all layers with recorded neurons, ascending
    high_only: bool  # the run recorded neurons of HIGH tokens alone


@dataclass(frozen=True, slots=True)
class SelectiveNeurons:
    """The most selective neurons of a layer, the most selective first."""

    of: NeuronLayer
    neurons: tuple[Neuron, ...]

    @property
    def table(self) -> pa.Table:
        """One row for each neuron, with the columns of ``NEURON_COLUMNS``."""
        rows = [asdict(x) | {"types": _types(x)} for x in self.neurons]
        return pa.Table.from_pylist(rows, NEURON_COLUMNS)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        return notebook.table(f"Neurons of layer {self.of.layer}", _readable(self.table))


@dataclass(frozen=True, slots=True)
class WordNeurons:
    """Neurons that the tokens of a word have more often than other tokens have."""

    of: NeuronLayer
    word: str
    occurrences: int  # of the word that were read, at most ``concepts.MOST_OCCURRENCES``
    neurons: tuple[Concept, ...]  # by share times the logarithm of the lift, the largest first

    @property
    def table(self) -> pa.Table:
        """One row for each neuron, with the columns of ``WORD_COLUMNS``."""
        rows = []
        for x in self.neurons:
            row: dict[str, object] = {"neuron": x.neuron.neuron, "types": _types(x.neuron)}
            row |= {"share": x.share, "elsewhere": x.elsewhere, "lift": x.lift, "mean": x.mean}
            rows.append(row)
        return pa.Table.from_pylist(rows, WORD_COLUMNS)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        n = count(self.occurrences, "occurrence")
        caption = f"Neurons of {self.word} at layer {self.of.layer}, {n}"
        return notebook.table(caption, _readable(self.table))


@dataclass(frozen=True, slots=True)
class NeuronUses:
    """One neuron, and the tokens with its largest absolute values."""

    of: NeuronLayer
    neuron: Neuron
    contexts: tuple[Context, ...]  # the largest first

    @property
    def table(self) -> pa.Table:
        """One row for each token, with the columns of ``CONTEXT_COLUMNS``."""
        return pa.Table.from_pylist([asdict(c) for c in self.contexts], CONTEXT_COLUMNS)

    @property
    def types(self) -> pa.Table:
        """The types that the neuron responds to, with the columns of ``TYPES``."""
        return pa.Table.from_pylist(_types(self.neuron), pa.schema(TYPES.value_type))

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        caption = f"Neuron {self.neuron.neuron} of layer {self.of.layer}"
        return notebook.table(f"{caption}: types", self.types) + notebook.table(
            f"{caption}: tokens where it is furthest from 0", self.table
        )


def neurons(
    run: str | Run, *, layer: int | None = None, top: int = TOP, timeout_s: float = TIMEOUT_S
) -> SelectiveNeurons:
    """The ``top`` most selective neurons of a layer (``concepts.selective_neurons``).

    ``run`` is a run's URI, a store's URI for its latest complete run, or an open run. ``layer``
    None is the deepest with recorded neurons. ``timeout_s`` is the time limit of each query of a
    run that is not open yet. Raises ``ConfigError`` for a run or a layer without recorded neurons
    (``afn run --signals neurons`` records them), and what ``open_run`` raises.
    """
    with opened(run, timeout_s=timeout_s) as tables:
        of = _layer_of(tables, layer)
        return SelectiveNeurons(of, tuple(concepts.selective_neurons(tables, of.layer, top)))


def word_neurons(
    run: str | Run,
    word: str,
    *,
    layer: int | None = None,
    top: int = TOP,
    timeout_s: float = TIMEOUT_S,
) -> WordNeurons:
    """The ``top`` neurons that ``word`` has more often than other words have.

    All spellings of the word in upper or lower case count. The other arguments and errors are those
    of ``neurons``; also raises ``ConfigError`` for a word that does not occur in the run.
    """
    with opened(run, timeout_s=timeout_s) as tables:
        of = _layer_of(tables, layer)
        found, occurrences = concepts.neurons_of_word(tables, word, of.layer, top)
        return WordNeurons(of, word, occurrences, tuple(found))


def neuron_uses(
    run: str | Run, number: int, *, layer: int | None = None, timeout_s: float = TIMEOUT_S
) -> NeuronUses:
    """Responses of the neuron ``number`` of a layer: types, and ``CONTEXTS`` tokens.

    The other arguments and errors are those of ``neurons``; also raises ``ConfigError`` for a
    neuron that no token has among its recorded ones.
    """
    with opened(run, timeout_s=timeout_s) as tables:
        of = _layer_of(tables, layer)
        neuron = concepts.find_neuron(tables, of.layer, number)
        return NeuronUses(of, neuron, tuple(concepts.contexts(tables, of.layer, number)))


def _layer_of(run: Run, layer: int | None) -> NeuronLayer:
    shown = concepts.layer_of(run, layer)
    measure = run.info["measure"]
    recorded = tuple(measure["neuron_layers"])
    return NeuronLayer(run.uri, shown, recorded, "neurons_above" in measure)


def _types(neuron: Neuron) -> list[dict[str, object]]:
    return [{"text": text, "n": n, "lift": lift} for text, n, lift in neuron.types]


def _readable(table: pa.Table) -> pa.Table:
    """``table`` with its types as one text in each row."""
    texts = []
    for types in table["types"].to_pylist():
        texts.append(", ".join(kind["text"] for kind in types))
    at = table.column_names.index("types")
    return table.set_column(at, "types", pa.array(texts, pa.string()))


def to_json(found: SelectiveNeurons | WordNeurons | NeuronUses) -> dict[str, object]:
    """``found`` as plain values."""
    layer = found.of.layer
    if isinstance(found, SelectiveNeurons):
        return {"layer": layer, "neurons": [asdict(x) for x in found.neurons]}
    if isinstance(found, NeuronUses):
        return {**asdict(found.neuron), "contexts": [asdict(c) for c in found.contexts]}
    return {
        "word": found.word,
        "layer": layer,
        "occurrences": found.occurrences,
        "neurons": [{**asdict(x), "lift": x.lift} for x in found.neurons],
    }
