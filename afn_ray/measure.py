"""The measure: everything that changes a recorded value. Its fingerprint names shards' folders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict

from afn_ray.fingerprints import fingerprint
from afn_ray.schema import VALUES_VERSION, Series

OF_COLUMNS = frozenset(
    {
        "layers",
        "signals",
        "series",
        "neuron_layers",
        "top_neurons",
        "outliers",
        "neurons_above",
        "mean_types",
        "means",
    }
)
"""Keys of a measure that decide which values of a token are recorded, and no token itself."""


class StoredMeasure(TypedDict, total=False):
    """A measure as plans and run.json store it; what is not recorded has no key."""

    id: str  # in run.json alone
    schema_version: int
    model: dict[str, str]
    model_type: str
    layers: list[int]
    signals: list[str]
    series: list[list[Any]]  # pairs of a signal and a layer
    window_tokens: int
    overlap_tokens: int
    offsets: bool
    neuron_layers: list[int]
    top_neurons: int
    dtype: str
    labels: str
    languages: str
    outliers: list[list[int]]
    neurons_above: list[float]
    mean_types: list[int]
    means: list[str]


def without_id(stored: StoredMeasure) -> StoredMeasure:
    """``stored`` as a plan has it."""
    measure = stored.copy()
    measure.pop("id", None)
    return measure


def base_of(stored: StoredMeasure) -> dict[str, object]:
    """The part of a stored measure that decides which tokens there are, and how models run.

    Measures of one base have the same tokens, so that their columns can stand side by side.
    """
    return {key: value for key, value in stored.items() if key not in OF_COLUMNS | {"id"}}


@dataclass(frozen=True, slots=True)
class Measure:
    """Recorded values of each token, and everything that these values depend on."""

    model: tuple[tuple[str, str], ...]
    """Identity of the model, the items of ``model.load_identified``: checksums and versions."""
    model_type: str
    layers: tuple[int, ...]
    signals: tuple[str, ...]
    """Identities of the signals, from ``model.signals.find_signals``."""
    series: tuple[Series, ...]
    """Recorded series in the order of the tables: strength first, by layer."""
    window_tokens: int
    overlap_tokens: int
    offsets: bool
    """True if character offsets are recorded."""
    dtype: str
    """Dtype of the matrix products."""
    neuron_layers: tuple[int, ...] = ()
    """Layers whose neurons are recorded."""
    top_neurons: int = 0
    """Recorded neurons of a token at each of ``neuron_layers``; 0 if there are no such layers."""
    labels: str | None = None
    """Source of the documents' tags; None if they have none."""
    languages: str | None = None
    """Detector of the documents' languages, with its versions; None: they are not detected."""
    outliers: tuple[tuple[int, ...], ...] = ()
    """Per layer, the dimensions that a signal leaves out; empty if no signal does."""
    neurons_above: tuple[float, ...] = ()
    """Per neuron layer, the least strength of tokens with recorded neurons; empty: all tokens."""
    mean_types: tuple[int, ...] = ()
    """Types, ascending, whose hidden states are added up at every layer."""
    means: tuple[str, ...] = ()
    """Per layer, the mean state that a signal subtracts, as ``mean_texts`` writes it.

    Empty if no signal subtracts it.
    """
    schema_version: int = VALUES_VERSION

    @classmethod
    def of_dict(cls, stored: StoredMeasure) -> Measure:
        """The measure that ``as_dict`` gave as ``stored``.

        Keys of other versions, and the id in run.json, are left out: the id of a stored measure is
        the fingerprint of ``stored`` itself. Raises ``KeyError`` for a missing key, ``TypeError``
        or ``ValueError`` for a value of another form.
        """
        return cls(
            model=tuple(stored["model"].items()),
            model_type=stored["model_type"],
            layers=tuple(stored["layers"]),
            signals=tuple(stored["signals"]),
            series=tuple(Series(signal, layer) for signal, layer in stored["series"]),
            window_tokens=stored["window_tokens"],
            overlap_tokens=stored["overlap_tokens"],
            offsets=stored["offsets"],
            dtype=stored["dtype"],
            neuron_layers=tuple(stored.get("neuron_layers", ())),
            top_neurons=stored.get("top_neurons", 0),
            labels=stored.get("labels"),
            languages=stored.get("languages"),
            outliers=tuple(tuple(dims) for dims in stored.get("outliers", ())),
            neurons_above=tuple(stored.get("neurons_above", ())),
            mean_types=tuple(stored.get("mean_types", ())),
            means=tuple(stored.get("means", ())),
            schema_version=stored["schema_version"],
        )

    @property
    def id(self) -> str:
        """Fingerprint of ``as_dict``."""
        return fingerprint(self.as_dict())

    @property
    def base(self) -> dict[str, object]:
        """``base_of`` this measure."""
        return base_of(self.as_dict())

    @property
    def tagged(self) -> bool:
        """True if the corpus is labelled."""
        return self.labels is not None

    @property
    def detected(self) -> bool:
        """True if the languages of documents are detected."""
        return self.languages is not None

    def as_dict(self) -> StoredMeasure:
        """The measure as plans and run.json store it; what is not recorded has no key."""
        value: StoredMeasure = {
            "schema_version": self.schema_version,
            "model": dict(self.model),
            "model_type": self.model_type,
            "layers": list(self.layers),
            "signals": list(self.signals),
            "series": [list(s) for s in self.series],
            "window_tokens": self.window_tokens,
            "overlap_tokens": self.overlap_tokens,
            "offsets": self.offsets,
        }
        if self.neuron_layers:
            value["neuron_layers"] = list(self.neuron_layers)
            value["top_neurons"] = self.top_neurons
        value["dtype"] = self.dtype
        if self.labels is not None:
            value["labels"] = self.labels
        if self.languages is not None:
            value["languages"] = self.languages
        if self.outliers:
            value["outliers"] = [list(dims) for dims in self.outliers]
        if self.neurons_above:
            value["neurons_above"] = list(self.neurons_above)
        if self.mean_types:
            value["mean_types"] = list(self.mean_types)
        if self.means:
            value["means"] = list(self.means)
        return value
