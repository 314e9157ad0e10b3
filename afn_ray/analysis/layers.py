"""Compare any two layers, of two runs or of one, by ranks and shares of their words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import notebook, token_rows
from afn_ray.analysis import matched_words
from afn_ray.analysis.matched_words import MatchedWords, Overlap, Texts
from afn_ray.config import resolve_layers
from afn_ray.errors import ConfigError
from afn_ray.query import database
from afn_ray.query.word_counts import LEAST_N, WordCounts, word_counts
from afn_ray.reduce import compare
from afn_ray.reduce.distances import benjamini_hochberg, two_proportions
from afn_ray.reduce.drift import class_rows
from afn_ray.reduce.stats import spearman
from afn_ray.schema import LAYER_CLASSES_SCHEMA, LAYER_WORDS_SCHEMA
from afn_ray.store import checksums, label_thresholds
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count

JSON_VERSION = 1
"""Version of the result of ``to_json``; it grows if an entry disappears or changes its meaning."""
MOSTLY_HIGH = 0.5
"""HIGH share from which a word is mostly HIGH."""
ONE_SCALE = (
    "Strengths of different layers or models are not on one scale: only ranks and shares, HIGH "
    "among them, are compared."
)
"""The note that every comparison begins with."""
TIMEOUT_S = 600.0
"""Default time limit of each query, in seconds."""


@dataclass(frozen=True, slots=True)
class Side:
    """One layer of a run, and its words."""

    run: RunFolder
    layer: int
    words: WordCounts


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """Layer ``a`` against layer ``b``, of two runs or of one.

    ``words`` (``LAYER_WORDS_SCHEMA``) has one row for each word that is frequent enough on either
    side; those of both sides come first, in ascending order of q. ``classes`` is in
    ``LAYER_CLASSES_SCHEMA``.
    """

    a: Side
    b: Side
    words: pa.Table
    classes: pa.Table
    texts: Texts
    matched: MatchedWords | None  # None: a run lacks the offsets that matching needs
    notes: tuple[str, ...]  # sentences that a reader must know

    @property
    def in_both(self) -> pa.Table:
        """Rows of ``words`` that both sides have."""
        return self.of_status("both")

    def of_status(self, status: str) -> pa.Table:
        return self.words.filter(pc.equal(self.words["status"], status))

    @property
    def mostly_high(self) -> Overlap:
        """Words of both sides that are mostly HIGH, each word once."""
        shares = (self.in_both[f"share_high_{side}"].to_numpy() for side in "ab")
        return Overlap.of(*(share >= MOSTLY_HIGH for share in shares))

    @property
    def spearman(self) -> float | None:
        """Correlation of the ranks of the words of both sides; None where there are too few."""
        ranks = [self.in_both[f"rank_{side}"].to_numpy() for side in "ab"]
        return spearman(*ranks) if len(ranks[0]) else None

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        title = f"Words at layers {self.a.layer} (a) and {self.b.layer} (b)"
        parts = [notebook.table(title, self.words), notebook.table("Classes", self.classes)]
        return "".join(parts) + notebook.text(self.notes)


def compare_layers(
    run_a: str, run_b: str, layers: str, *, timeout_s: float = TIMEOUT_S
) -> LayerComparison:
    """Compare a layer of ``run_a`` with a layer of ``run_b``, word by word.

    Each run is a run's URI, or a store's URI for its latest complete run; both may be the same.
    ``layers`` names a layer of each, with a colon, as numbers or shares of the depth: 8:4, 2/3:2/3.
    Models, tokenizers and corpora may differ. Words are matched by their text in lower case, and
    the words of documents with the same text also by their place. ``timeout_s`` is the time limit
    of each query.

    Raises ``ConfigError`` for layers that were not recorded, for runs without words, and for those
    that do not keep the rows of all tokens;
    ``StoreError`` for a run that is missing, incomplete or damaged; ``QueryError`` for a query over
    its limits.
    """
    a, b = (compare.complete_run(run) for run in (run_a, run_b))
    with checksums.named_damage(f"{a.uri} or {b.uri}"), ExitStack() as stack:
        layer_a, layer_b = _chosen_layers(a, b, layers)
        for run in (a, b):
            token_rows.check_complete(run.info["config"])
        opened_a = opened_b = stack.enter_context(database.open_run(a.uri, timeout_s=timeout_s))
        if a.uri != b.uri:
            opened_b = stack.enter_context(database.open_run(b.uri, timeout_s=timeout_s))
        side_a = Side(a, layer_a, word_counts(opened_a, layer_a))
        side_b = Side(b, layer_b, word_counts(opened_b, layer_b))
        texts, of_a, of_b = matched_words.match_texts(opened_a, opened_b)
        matched = None
        if a.uri == b.uri or all("end" in run.words().columns for run in (opened_a, opened_b)):
            matched = matched_words.match_words(
                (opened_a, layer_a, of_a), (opened_b, layer_b, of_b), by_number=a.uri == b.uri
            )
        return LayerComparison(
            side_a,
            side_b,
            _words(side_a.words.words, side_b.words.words),
            _classes(side_a.words.classes, side_b.words.classes),
            texts,
            matched,
            tuple(_notes(side_a, side_b, texts, matched)),
        )


# --- the layers that are compared ---


def _chosen_layers(a: RunFolder, b: RunFolder, spec: str) -> tuple[int, int]:
    """The two layers that ``spec`` names. Raises ``ConfigError`` for a wrong one."""
    parts = spec.split(":")
    if len(parts) != 2:
        raise ConfigError(
            f"--layers is {spec!r}; expected a layer of each run with a colon between, as in 8:4, "
            "or shares of the depth, as in 2/3:2/3"
        )
    layer_a, layer_b = (
        _recorded_layer(name, run, part)
        for name, run, part in zip("AB", (a, b), parts, strict=True)
    )
    if a.uri == b.uri and layer_a == layer_b:
        raise ConfigError(
            f"--layers {spec} compares layer {layer_a} of run {a.uri} with itself; name two of its "
            f"layers, {_listed(a)}, or another run"
        )
    return layer_a, layer_b


def _recorded_layer(name: str, run: RunFolder, spec: str) -> int:
    """The layer of ``run`` that ``spec`` names. Raises ``ConfigError`` if the run has it not."""
    depth = run.info["model"]["depth"]
    try:
        layers = resolve_layers(spec, depth)
    except ConfigError as error:
        raise ConfigError(f"--layers for {name}, run {run.uri}: {error}") from None
    if len(layers) != 1:
        raise ConfigError(
            f"--layers names {len(layers)} layers of {name}, {spec!r}; expected one, as in 8:4"
        )
    if layers[0] not in run.info["layers"]:
        raise ConfigError(
            f"layer {layers[0]} of {name}, run {run.uri}, was not recorded; expected one of its "
            f"layers: {_listed(run)} (of {depth}). 'afn run --layers' records others"
        )
    if _q3(run, layers[0]) is None:
        raise ConfigError(
            f"{name}, run {run.uri}, has no words, only special tokens; expected a run over text"
        )
    return layers[0]


def _listed(run: RunFolder) -> str:
    return ", ".join(map(str, run.info["layers"]))


def _q3(run: RunFolder, layer: int) -> float | None:
    """Q3 by which tokens of ``run`` are HIGH at ``layer``; None for a run without tokens."""
    for row in label_thresholds.labels(run).to_pylist():
        if row["layer"] == layer and row["population"] == "tokens":
            q3: float | None = row["q3"]
            return q3
    raise KeyError(f"no thresholds of layer {layer}")


# --- tables ---


def _words(a: pa.Table, b: pa.Table) -> pa.Table:
    """The rows of ``LAYER_WORDS_SCHEMA`` for the ``words`` of two ``WordCounts``."""
    sides = (_named_apart(a, "a"), _named_apart(b, "b"))
    joined = sides[0].join(sides[1], "word", join_type="full outer").combine_chunks()
    n_a, n_b, high_a, high_b = (
        pc.fill_null(joined[name], 0).to_numpy() for name in ("n_a", "n_b", "n_high_a", "n_high_b")
    )
    both = (n_a > 0) & (n_b > 0)
    z = np.zeros(len(both))
    p = np.ones(len(both))
    q = np.ones(len(both))
    z[both], p[both] = two_proportions(high_a[both], n_a[both], high_b[both], n_b[both])
    q[both] = benjamini_hochberg(p[both])
    columns: dict[str, object] = {
        "word": joined["word"],
        "class": pc.coalesce(joined["class_b"], joined["class_a"]),
        "status": np.where(both, "both", np.where(n_a > 0, "only_a", "only_b")),
        "z": pa.array(z, mask=~both),
        "p": pa.array(p, mask=~both),
        "q": pa.array(q, mask=~both),
        "size": np.abs(z),
        "n": n_a + n_b,
    }
    for side in "ab":
        columns[f"n_{side}"] = joined[f"n_{side}"]
        n_high = pc.cast(joined[f"n_high_{side}"], pa.float64())
        columns[f"share_high_{side}"] = pc.divide(n_high, joined[f"n_{side}"])
        columns[f"rank_{side}"] = joined[f"rank_{side}"]
    order = {"status": "ascending", "q": "ascending", "size": "descending", "n": "descending"}
    rows = pa.table(columns).sort_by([*order.items(), ("word", "ascending")])
    return rows.select(LAYER_WORDS_SCHEMA.names).cast(LAYER_WORDS_SCHEMA)


def _named_apart(words: pa.Table, side: str) -> pa.Table:
    """``words`` with ``side`` at the end of the names of all columns but the word."""
    names = (name if name == "word" else f"{name}_{side}" for name in words.column_names)
    return words.rename_columns(list(names))


def _classes(a: pa.Table, b: pa.Table) -> pa.Table:
    """The rows of ``LAYER_CLASSES_SCHEMA`` for the ``classes`` of two ``WordCounts``."""
    rank_a = {row["class"]: row["rank"] for row in a.to_pylist()}
    rank_b = {row["class"]: row["rank"] for row in b.to_pylist()}
    rows = []
    for row in class_rows(0, a, b):
        name = row["class"]
        of_class = {"rank_a": rank_a.get(name), "rank_b": rank_b.get(name)}
        rows.append(row | of_class)
    return pa.Table.from_pylist(rows, LAYER_CLASSES_SCHEMA)


# --- notes for the reader ---


def _notes(a: Side, b: Side, texts: Texts, matched: MatchedWords | None) -> Iterator[str]:
    """Sentences that a reader of the comparison must know."""
    yield ONE_SCALE
    yield (
        "A word counts in lower case, with the strength of its strongest token. A rank is the "
        "share of a side's words with a smaller strength, 0 to 1."
    )
    if a.run.uri == b.run.uri:
        yield "A and B are two layers of one run."
    elif differing := _differences(a.run, b.run):
        yield f"The measures differ: {'; '.join(differing)}."
    yield from _notes_on_pieces(a, b)
    yield (
        f"Words that occur fewer than {LEAST_N} times have no rows; totals and classes have them: "
        f"{_folded(a)} of A, {_folded(b)} of B."
    )
    for name, side in (("A", a), ("B", b)):
        if "frozen" in side.run.info["tables"]:
            yield f"HIGH in {name} is decided by frozen thresholds, not by its own Q3."
        yield from compare.notes_on_losses(name, side.run)
    if a.run.uri != b.run.uri:
        yield from _notes_on_texts(texts)
    yield from _notes_on_matches(matched, texts)
    yield from compare.notes_on_copies(a.run, b.run)
    yield from compare.notes_on_classes(a.run, b.run)
    yield (
        "z is that of two independent samples. The same text measured twice is not one, so z says "
        "which words differ most, not how certain that is."
    )


def _differences(a: RunFolder, b: RunFolder) -> list[str]:
    """Differences of the measures that change strengths, layers left out."""
    left_out = label_thresholds.BESIDE_STRENGTH | {"layers"}
    measures = []
    for run in (a, b):
        stored = run.info["measure"]
        measures.append({key: value for key, value in stored.items() if key not in left_out})
    names = [run.info["model"].get("name") for run in (a, b)]
    if names[0] != names[1]:
        for measure, name in zip(measures, names, strict=True):
            measure["model"] = name
    return compare.differences(*measures)


def _folded(side: Side) -> str:
    """Number of words of ``side`` without a row, and of their occurrences."""
    return f"{count(side.words.num_folded, 'word')} ({side.words.n_folded:,} in all)"


def _notes_on_pieces(a: Side, b: Side) -> Iterator[str]:
    """Number of tokens of a word, if the sides differ: the strongest of more is HIGH more often."""
    of_a, of_b = (f"{side.words.n_tokens / side.words.n:.2f}" for side in (a, b))
    if of_a != of_b:
        yield (
            f"A word has {of_a} tokens in A and {of_b} in B: the strongest of more tokens "
            "is HIGH more often, so compare ranks first."
        )


def _notes_on_texts(texts: Texts) -> Iterator[str]:
    """Overlap of the two corpora."""
    if texts.is_cut:
        yield (
            f"Only the {texts.n_a:,} and {texts.n_b:,} documents with the lowest hashes of their "
            "texts were held against each other."
        )
    if not texts.n_a == texts.n_b == texts.n_both:
        yield (
            f"The corpora differ: {texts.n_both:,} of {count(texts.n_a, 'document')} of A and "
            f"{texts.n_b:,} of B have the same text. Words, classes and ranks are of all documents "
            "of each side, so they differ by that too."
        )


def _notes_on_matches(matched: MatchedWords | None, texts: Texts) -> Iterator[str]:
    """Note on the words that were not matched at their places."""
    if matched is None:
        yield (
            "Words were not matched at their places: a run has no offsets (--no-offsets), which "
            "matching needs."
        )
    elif matched.num_documents < texts.n_both:
        yield (
            f"Words were matched at their places in {matched.num_documents:,} of the "
            f"{count(texts.n_both, 'document')} that both have, those with the lowest hashes of "
            f"their texts: {matched_words.MAX_TOKENS:,} tokens fit."
        )


# --- JSON ---


def to_json(found: LayerComparison) -> dict[str, object]:
    """The comparison as plain values of bounded size.

    It lists the words of both sides with the lowest q, and the most frequent words of one side: at
    most ``compare.JSON_ROWS`` of each.
    """
    body: dict[str, object] = {
        "schema_version": JSON_VERSION,
        "a": _side_json(found.a),
        "b": _side_json(found.b),
        "notes": list(found.notes),
        "documents": {"a": found.texts.n_a, "b": found.texts.n_b, "both": found.texts.n_both},
        "matched": _matched_json(found.matched),
        "least_n": LEAST_N,
        "spearman": found.spearman,
        "mostly_high": _overlap_json(found.mostly_high),
        "classes": found.classes.to_pylist(),
        "n_words": len(found.in_both),
        "n_moved": compare.num_moved(found.words),
        "movers": found.in_both.slice(0, compare.JSON_ROWS).to_pylist(),
    }
    for status in ("only_a", "only_b"):
        rows = found.of_status(status)
        columns = [
            "word",
            "class",
            *(f"{name}_{status[-1]}" for name in ("n", "share_high", "rank")),
        ]
        body[status] = rows.select(columns).slice(0, compare.JSON_ROWS).to_pylist()
        body[f"n_{status}"] = len(rows)
    return body


def _side_json(side: Side) -> dict[str, object]:
    words = side.words
    return {
        **compare.describe(side.run),
        "layer": side.layer,
        "depth": side.run.info["model"]["depth"],
        "words": words.n,
        "share_high": words.n_high / words.n,
        "tokens_per_word": words.n_tokens / words.n,
        "folded_words": words.num_folded,
        "folded": words.n_folded,
    }


def _matched_json(matched: MatchedWords | None) -> dict[str, object] | None:
    if matched is None:
        return None
    return {
        "documents": matched.num_documents,
        "words_a": matched.n_a,
        "words_b": matched.n_b,
        "spearman": matched.spearman,
        "high": _overlap_json(matched.high),
    }


def _overlap_json(overlap: Overlap) -> dict[str, object]:
    return {
        "n": overlap.n,
        "n_both": overlap.n_both,
        "n_only_a": overlap.n_only_a,
        "n_only_b": overlap.n_only_b,
        "jaccard": overlap.jaccard,
        "by_chance": overlap.by_chance,
    }
