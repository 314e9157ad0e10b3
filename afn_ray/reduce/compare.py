"""Compare two runs: how far strengths, classes, types and sources moved between them.

Only the small tables of the runs are read. Special tokens are left out. Distances are computed
from the lossless histograms: they cover all recorded values and are exactly 0 for two runs over
the same corpus. ``reduce.distances`` defines them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple, TypedDict

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import notebook
from afn_ray.classes import PARTS_OF_WORDS
from afn_ray.errors import ConfigError, StoreError
from afn_ray.measure import base_of
from afn_ray.reduce import duplicates, losses
from afn_ray.reduce.drift import (
    DriftRow,
    SourceStrengths,
    StrengthsBySource,
    class_rows,
    drift_row,
    histogram_of,
    histograms_by_source,
    matched_sources,
    movers_table,
    renamed,
    table_by_layer,
    without_special,
)
from afn_ray.reduce.group_drift import (
    NO_GROUPS,
    GroupDrift,
    group_drift,
    grouped_by,
    labels_by_group,
)
from afn_ray.reduce.histogram import Histogram
from afn_ray.reduce.word_movers import NO_WORDS, TIMES_LEAST, rare_below, word_movers_table
from afn_ray.schema import CLASS_DRIFT_SCHEMA, DRIFT_SCHEMA
from afn_ray.store import checksums, label_thresholds, manifest, series
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

JSON_VERSION = 2
"""Version of the result of ``to_json``; it grows if an entry disappears or changes its meaning."""
JSON_ROWS = 1000
"""Largest number of movers, new types, vanished types and sources each in ``to_json``."""
SIGNIFICANT = 0.05
"""Value of q below which a type counts as moved.

It is the expected share of types among the moved ones that moved only by chance.
"""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences between run ``a``, the baseline, and run ``b``.

    ``drift`` (``DRIFT_SCHEMA``) has, for each layer, one row for the whole run (``source`` is null)
    and one for each source of either run. ``classes`` (``CLASS_DRIFT_SCHEMA``) has one row for each
    class of either run. ``movers`` (``MOVERS_SCHEMA``) has one row for each type of either run.
    ``word_movers`` (``WORD_MOVERS_SCHEMA``) and ``word_classes`` have the same of words, and no
    rows if a run has no table of them. Within a layer, movers in both runs come first, in ascending
    order of q. ``groups`` has the same for each group.
    """

    a: RunFolder
    b: RunFolder
    drift: pa.Table
    classes: pa.Table
    movers: pa.Table
    notes: tuple[str, ...]  # sentences that a reader must know
    groups: GroupDrift = NO_GROUPS
    word_movers: pa.Table = field(default_factory=lambda: NO_WORDS)
    word_classes: pa.Table = field(default_factory=CLASS_DRIFT_SCHEMA.empty_table)

    @property
    def movers_to_read(self) -> pa.Table:
        """The movers that a reader expects: words, or types where a run has no table of words."""
        return self.word_movers if self.word_movers.num_rows else self.movers

    @property
    def classes_to_read(self) -> pa.Table:
        """The classes that a reader expects: of words, or of tokens as ``movers_to_read``."""
        return self.word_classes if self.word_classes.num_rows else self.classes

    @property
    def kind(self) -> str:
        """Kind of ``movers_to_read``: word or type."""
        return "word" if self.word_movers.num_rows else "type"

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        whole = self.drift.filter(pc.is_null(self.drift["source"])).drop_columns(["source"])
        deepest = max(whole["layer"].to_pylist())
        movers = _at(self.movers_to_read, deepest).drop_columns(["layer"])
        parts = [
            notebook.table("Strengths of all tokens", whole),
            notebook.table(f"Classes of {self.kind}s", _at(self.classes_to_read, deepest)),
            notebook.table(f"How {self.kind}s moved at layer {deepest}", movers),
        ]
        return "".join(parts) + notebook.text(self.notes)


def compare(
    run_a: str | RunFolder, run_b: str | RunFolder, *, ranks_only: bool = False
) -> Comparison:
    """Compare ``run_b`` with its baseline ``run_a``.

    Each is a run, a run's URI, or a store's URI for its latest complete run. ``two_proportions``
    defines z and the two-sided p; q is computed from p after Benjamini and Hochberg, over the
    layer's types in both runs. Tokens of one document are not independent draws. So z shows which
    types moved most, but not how certain that is. A type in both runs has its class of ``run_b``.

    Runs are compared at the layers that both have. If their measures differ in more than layers and
    signals, strengths cannot be compared. For such runs this function
    raises ``ConfigError`` unless ``ranks_only`` is set. With ``ranks_only``, quartiles, medians and
    distances are null and shares remain; types of different measures are matched by their piece.
    Also raises ``ConfigError`` for runs without a common layer, and ``StoreError`` for a run that
    is missing, incomplete or damaged.
    """
    a, b = (complete_run(run) for run in (run_a, run_b))
    base_a, base_b = (base_of(run.info["measure"]) for run in (a, b))
    same_base = base_a == base_b
    if not same_base and not ranks_only:
        raise ConfigError(
            f"runs {a.uri} and {b.uri} are of different measures, so their strengths cannot be "
            f"compared: {'; '.join(differences(base_a, base_b))}. 'afn "
            "compare A B --ranks-only' compares shares alone"
        )
    layers = [k for k in a.info["layers"] if k in b.info["layers"]]
    if not layers:
        raise ConfigError(
            f"runs {a.uri} and {b.uri} have no layer in common: {_listed(a.info['layers'])} "
            f"against {_listed(b.info['layers'])}"
        )
    with checksums.named_damage(f"{a.uri} or {b.uri}"):
        return _compared(a, b, layers, ranks_only=ranks_only, same_base=same_base)


def _compared(
    a: RunFolder, b: RunFolder, layers: list[int], *, ranks_only: bool, same_base: bool
) -> Comparison:
    tables = [_Tables.of(run) for run in (a, b)]
    drift: list[DriftRow] = []
    classes: list[dict[str, object]] = []
    movers = []
    of_words = [NO_WORDS]
    word_classes: list[dict[str, object]] = []
    vocabularies: list[pa.Table] = []
    for of_run in tables:
        vocabularies += of_run.word_vocabulary.values()
    rare = rare_below(*vocabularies)
    for layer in layers:
        types_a, types_b = (without_special(of_run.vocabulary[layer]) for of_run in tables)
        whole_a = _strengths(tables[0].histogram[layer], types_a)
        whole_b = _strengths(tables[1].histogram[layer], types_b)
        drift.append(drift_row(layer, None, whole_a, whole_b, ranks_only=ranks_only))
        if all(of_run.sources for of_run in tables):
            sources = (
                renamed(histograms_by_source(of_run.sources[layer]), name)
                for of_run, name in zip(tables, source_names(a, b), strict=True)
            )
            drift += _rows_by_source(layer, *matched_sources(*sources), ranks_only=ranks_only)
        classes += class_rows(layer, types_a, types_b)
        movers.append(movers_table(layer, types_a, types_b, by_id=same_base, ranks_only=ranks_only))
        words = [of_run.word_vocabulary.get(layer) for of_run in tables]
        if words[0] is not None and words[1] is not None:
            word_classes += class_rows(layer, *words)
            of_words.append(word_movers_table(layer, *words, ranks_only=ranks_only))
    return Comparison(
        a,
        b,
        pa.Table.from_pylist(drift, DRIFT_SCHEMA),
        pa.Table.from_pylist(classes, CLASS_DRIFT_SCHEMA),
        pa.concat_tables(movers),
        tuple(_notes(a, b, layers, ranks_only, rare)),
        group_drift(a, b, layers, by_id=same_base, ranks_only=ranks_only),
        pa.concat_tables(of_words).combine_chunks(),
        pa.Table.from_pylist(word_classes, CLASS_DRIFT_SCHEMA),
    )


def source_names(a: RunFolder, b: RunFolder) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Functions that give the sources of two runs the names by which they are compared.

    If the dates in the runs' corpora differ, they are left out of the names of sources.
    """
    corpora = (list(run.info["config"].get("corpus", [])) for run in (a, b))
    return series.matched_names(*corpora)


class _Tables(NamedTuple):
    """Tables of a run that are compared, by layer."""

    histogram: dict[int, pa.Table]
    vocabulary: dict[int, pa.Table]
    sources: dict[int, pa.Table]  # empty for an older run, which has no such table
    word_vocabulary: dict[int, pa.Table]  # likewise

    @classmethod
    def of(cls, run: RunFolder) -> _Tables:
        return cls(*(table_by_layer(run, name) for name in cls._fields))


def _strengths(histogram: pa.Table, types: pa.Table) -> SourceStrengths:
    """Strengths of a whole run at a layer, from its rows of ``HISTOGRAM_SCHEMA`` and its types."""
    n_high = pc.sum(types["n_high"]).as_py() or 0
    return SourceStrengths(histogram_of(histogram), int(n_high))


def _rows_by_source(
    layer: int, a: StrengthsBySource, b: StrengthsBySource, *, ranks_only: bool
) -> Iterator[DriftRow]:
    """Rows of ``DRIFT_SCHEMA`` for each source of either run."""
    nothing = SourceStrengths(Histogram.empty(), 0)
    for name in sorted({*a, *b}):
        in_a, in_b = a.get(name, nothing), b.get(name, nothing)
        yield drift_row(layer, name, in_a, in_b, ranks_only=ranks_only)


def complete_run(run: str | RunFolder) -> RunFolder:
    """The run's folder. Raises ``StoreError`` if the run is not complete."""
    folder = manifest.find_run(run) if isinstance(run, str) else run
    if not folder.info:
        why = manifest.why_incomplete(folder.uri)
        raise StoreError(f"run {folder.uri} is not complete: {why}")
    return folder


# --- notes for the reader ---


def differences(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """Keys of two measures with different values, with both values, cut."""
    keys = sorted({*a, *b} - {"id"})
    differing = [key for key in keys if a.get(key) != b.get(key)]
    return [f"{key}: {_short(a.get(key))} against {_short(b.get(key))}" for key in differing]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _listed(layers: list[int]) -> str:
    return "layers " + ", ".join(map(str, layers))


def _notes(
    a: RunFolder, b: RunFolder, layers: list[int], ranks_only: bool, rare: int
) -> Iterator[str]:
    """Sentences that a reader of the comparison must know; ``rare`` is ``rare_below``."""
    if a.uri == b.uri:
        yield "A and B are one run."
    of_a, of_b = (series.selection_of_run(run.info) for run in (a, b))
    if of_a != of_b:
        yield (
            f"Other documents were selected: of A {_short(of_a or 'all')}, of B "
            f"{_short(of_b or 'all')}."
        )
    if ranks_only:
        yield "Ranks only: quartiles, medians and distances are left out; shares remain."
        if differing := differences(base_of(a.info["measure"]), base_of(b.info["measure"])):
            yield (
                "The measures differ, and types are matched by their piece: "
                f"{'; '.join(differing)}."
            )
    if source_names(a, b) != (str, str):
        yield f"Sources are matched by their names with {series.DATE} in place of the runs' dates."
    if _labels_by_layer(a, layers) == _labels_by_layer(b, layers):
        yield "HIGH means the same in A and B: both label by the same Q3."
    else:
        yield (
            "HIGH is a rank within each run: A and B label by different Q3, so a HIGH share says "
            "nothing of raw strengths."
        )
    for name, run, other in (("A", a, b), ("B", b, a)):
        if left_out := [k for k in run.info["layers"] if k not in layers]:
            yield f"Of {name} {_listed(left_out)} were not compared: {other.uri} has them not."
        yield from notes_on_losses(name, run)
        if "sources" not in run.info["tables"]:
            yield f"Sources were not compared: {name} was made without a table of them."
    if all("word_vocabulary" in run.info["tables"] for run in (a, b)):
        yield (
            f"New and vanished words occur {TIMES_LEAST * rare:,} times or more in one run; in the "
            f"other they may occur too, fewer than {rare:,} times."
        )
    yield from notes_on_copies(a, b)
    by_a, by_b = grouped_by(a), grouped_by(b)
    if by_a != by_b:
        yield (
            f"Groups were not compared: A is grouped by {by_a or 'nothing'}, B by "
            f"{by_b or 'nothing'}."
        )
    elif by_a is not None:
        yield from _notes_on_group_labels(labels_by_group(a), labels_by_group(b))
    yield from notes_on_classes(a, b)


def notes_on_losses(name: str, run: RunFolder) -> Iterator[str]:
    """Sentences on the part of its corpus that the run, called ``name``, lost."""
    if lost := losses.describe(losses.of_run(run)):
        yield f"{name} lost {lost}."
    if missing := run.info.get("quarantined"):
        yield f"{name} lacks {count(len(missing), 'shard')} of its corpus, quarantined."


def notes_on_copies(a: RunFolder, b: RunFolder) -> Iterator[str]:
    """True if the runs count copies of a text in the same way."""
    copies_a, copies_b = (duplicates.choice_of(run.info) for run in (a, b))
    if copies_a != copies_b:
        yield (
            f"Copies are counted differently: duplicates is {copies_a} in A and {copies_b} in B, "
            "so all that is compared differs by that too."
        )


def _notes_on_group_labels(in_a: bool, in_b: bool) -> Iterator[str]:
    """Note on the Q3 by which tokens are HIGH in the groups; the flags are ``labels_by_group``."""
    if in_a and in_b:
        yield ("In groups, HIGH is a rank within the group and its run: each labels by its own Q3.")
    elif in_a or in_b:
        yield (
            f"In groups, HIGH goes by the corpus-wide Q3: {'A' if in_b else 'B'} has no labels by "
            "the groups' own (thresholds_by)."
        )


def notes_on_classes(a: RunFolder, b: RunFolder) -> Iterator[str]:
    """Reasons why the classes of types differ between the runs."""
    language_a, language_b = (run.info["config"].get("language") for run in (a, b))
    if language_a != language_b:
        yield (
            f"Function words are those of {language_a!r} in A and of {language_b!r} in B, so "
            "classes differ by that too."
        )
    detector_a, detector_b = (run.info["measure"].get("languages") for run in (a, b))
    if detector_a and detector_b and detector_a != detector_b:
        yield (
            f"Languages were detected by {detector_a} in A and by {detector_b} in B, so documents "
            "of the same text may have another language, and words another class."
        )
    tags_a, tags_b = (run.info["measure"].get("labels") for run in (a, b))
    if tags_a != tags_b:
        of_a, of_b = _origin_of_classes(tags_a), _origin_of_classes(tags_b)
        yield f"Classes are {of_a} in A and {of_b} in B, so they differ by that too."
    words_a, words_b = (run.info.get("function_words") for run in (a, b))
    if words_a != words_b:
        yield (
            f"Function words are from {words_a} in A and from {words_b} in B, so classes may "
            "differ by that too."
        )


def _origin_of_classes(tags: str | None) -> str:
    return "guessed" if tags is None else f"the tags in {tags!r}"


def _labels_by_layer(run: RunFolder, layers: list[int]) -> dict[int, float | None]:
    """Q3 of the thresholds that label tokens of ``run``, at each of ``layers``."""
    rows = label_thresholds.labels(run).to_pylist()
    q3 = {row["layer"]: row["q3"] for row in rows if row["population"] == "tokens"}
    return {layer: q3[layer] for layer in layers}


def to_json(comparison: Comparison) -> dict[str, object]:
    """The comparison as plain values of bounded size.

    It lists the movers with the lowest q, the most frequent new and vanished types, and the sources
    with the largest KS distance: at most ``JSON_ROWS`` of each. The total numbers are those at the
    deepest layer.
    """
    drift, movers = comparison.drift, comparison.movers
    deepest = max(drift["layer"].to_pylist())
    is_whole = pc.is_null(drift["source"])
    sources = _largest_distance_first(drift.filter(pc.invert(is_whole)))
    both = _surest_first(_of_status(movers, "both"))
    body: dict[str, object] = {
        "schema_version": JSON_VERSION,
        "a": describe(comparison.a),
        "b": describe(comparison.b),
        "notes": list(comparison.notes),
        "drift": drift.filter(is_whole).to_pylist(),
        "sources": sources.slice(0, JSON_ROWS).to_pylist(),
        "classes": comparison.classes.to_pylist(),
        "word_classes": comparison.word_classes.to_pylist(),
        "group_by": comparison.groups.by,
        "groups": comparison.groups.drift.to_pylist(),
        "group_classes": comparison.groups.classes.to_pylist(),
        "movers": both.slice(0, JSON_ROWS).to_pylist(),
        "n_sources": len(_at(sources, deepest)),
        "n_types": len(_at(both, deepest)),
        "n_moved": num_moved(_at(movers, deepest)),
    }
    body |= _words_json(comparison.word_movers, deepest)
    for status in ("new", "vanished"):  # the same types in every layer
        rows = _at(_of_status(movers, status), deepest)
        listed = rows.select(["token_id", "token", "text", "class", "n_a", "n_b"])
        body[status] = listed.slice(0, JSON_ROWS).to_pylist()
        body[f"n_{status}"] = len(rows)
    return body


def _words_json(movers: pa.Table, deepest: int) -> dict[str, object]:
    """Entries on the words of ``WORD_MOVERS_SCHEMA`` rows, as ``to_json`` has them of types."""
    both = _surest_first(_of_status(movers, "both"))
    body: dict[str, object] = {
        "word_movers": both.slice(0, JSON_ROWS).to_pylist(),
        "n_words": len(_at(both, deepest)),
        "n_words_moved": num_moved(_at(movers, deepest)),
    }
    for status in ("new", "vanished"):
        rows = _at(_of_status(movers, status), deepest)
        listed = rows.select(["word", "text", "class", "n_a", "n_b"])
        body[f"{status}_words"] = listed.slice(0, JSON_ROWS).to_pylist()
        body[f"n_{status}_words"] = len(rows)
    return body


def _largest_distance_first(sources: pa.Table) -> pa.Table:
    """``sources`` by KS distance; new and vanished sources, which have none, come first."""
    ordered = sources.sort_by([("ks", "descending"), ("layer", "descending")])
    is_unknown = pc.is_null(ordered["ks"])
    return pa.concat_tables([ordered.filter(is_unknown), ordered.filter(pc.invert(is_unknown))])


def _surest_first(movers: pa.Table) -> pa.Table:
    """``movers`` by q; of equal q, those with the largest absolute z first."""
    with_size = movers.append_column("size", pc.abs(movers["z"]))
    return with_size.sort_by([("q", "ascending"), ("size", "descending")]).drop_columns("size")


def _of_status(movers: pa.Table, status: str) -> pa.Table:
    return movers.filter(pc.equal(movers["status"], status))


def _at(table: pa.Table, layer: int) -> pa.Table:
    return table.filter(pc.equal(table["layer"], layer))


class RunJson(TypedDict):
    """A run in ``audit.json`` and in the result of ``to_json``."""

    uri: str
    id: str
    corpus: Annotated[list[str], "files, folders and globs that the run measured"]
    model: Annotated[str, "name of the model"]
    measure: Annotated[str, "fingerprint of all that changes a value"]
    tokens: Annotated[int, "tokens, special ones apart"]
    documents: int
    created_at: Annotated[str, "when the run began: ISO 8601, UTC"]
    finished_at: Annotated[str, "when the run was complete: ISO 8601, UTC"]


def describe(run: RunFolder) -> RunJson:
    """The facts that identify a run, as plain values."""
    info = run.info
    return {
        "uri": run.uri,
        "id": run.id,
        "corpus": list(info["config"]["corpus"]),
        "model": info["model"]["name"],
        "measure": info["measure"]["id"],
        "tokens": info["counts"]["tokens"] - info["counts"]["special"],
        "documents": info["counts"]["documents"],
        "created_at": info["created_at"],
        "finished_at": info["finished_at"],
    }


def whole_words(types: pa.Table) -> pa.Table:
    """Rows of ``types`` that may stand in a list of words: their ``class`` is no part of a word."""
    is_part = pc.is_in(types["class"], pa.array(PARTS_OF_WORDS))
    return types.filter(pc.invert(is_part))


def moved(movers: pa.Table) -> pa.Table:
    """Rows of ``movers`` whose HIGH share moved: their q is below ``SIGNIFICANT``."""
    is_significant = pc.less(movers["q"], SIGNIFICANT)
    return movers.filter(pc.fill_null(is_significant, False))


def num_moved(movers: pa.Table) -> int:
    """Number of rows of ``movers`` with a q below ``SIGNIFICANT``."""
    return len(moved(movers))
