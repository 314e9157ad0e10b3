"""Screen a run's documents: one more scan of its tokens for strengths by source and outliers.

All steps are pure functions under ``reduce.tasks.Tasks``, so order, grouping and place do not
change a bit::

    scan          tokens and documents of some shards -> sums by source, features of each document,
                                                         hashes of their texts
    add           up to FAN_IN sums or hash counts    -> their sum
    rank          features of some shards             -> the strangest documents among them
    strangest_of  up to FAN_IN lists of documents     -> the strangest of all

A document is strange if one of its features is far from the median of its source. Features
(``FEATURES``) are taken at the deepest recorded layer, without special tokens. The distance is in
robust standard deviations: z = (x - median) / sqrt((1.4826 MAD)^2 + noise^2). ``noise`` is the
standard deviation of x in a document of the same length whose tokens are drawn from the source. So
a document is not strange only because it is short. A source of fewer than ``LEAST_DOCS`` documents
is compared with the whole corpus.

In this table n is the number of tokens of the document, and m is the median of its source:

===============  ================================================  ==============================
feature          value for a document                              noise squared
===============  ================================================  ==============================
mean_strength    mean of the strengths                             variance of the source's
                                                                   tokens / n
share_high       share of tokens at or above the Q3 that labels    p (1 - p) / n,
                 use                                               p = (m n + 1) / (n + 2)
share_rare       share of tokens of types that occur in at most    as for share_high
                 ``RARE`` of the documents
share_sinks      share of tokens above the sink limit              as for share_high
share_fragments  share of tokens that continue a word              as for share_high
share_distinct   log(distinct types) / log(n): Herdan's C          p (1 - p) / n / ln(n)^2,
                                                                   p = n^(m - 1)
===============  ================================================  ==============================

The same scan counts words (``reduce.word_sums``), what the salience of types needs
(``reduce.controls``) and, if the run has groups, the tokens of each (``reduce.groups``).

A text that several documents share is strange too. log2(copies) log2(n) / 2 counts as a z, because
the chance that independent texts agree falls with their length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.kept import KINDS, Kept, beside
from afn_ray.option_rules import AUTO_LANGUAGE
from afn_ray.reduce import word_tables
from afn_ray.reduce.controls import Controls, frequency_bins
from afn_ray.reduce.copied import add_copies
from afn_ray.reduce.features import AlsoCounted, FeatureLimits, ShardTables, add, read_columns, scan
from afn_ray.reduce.group_labels import count_own
from afn_ray.reduce.group_tables import group_tables
from afn_ray.reduce.groups import Grouping, find_groups
from afn_ray.reduce.histogram import Histogram, starts
from afn_ray.reduce.salience import salience_table
from afn_ray.reduce.shards import NOTHING, CommittedShards, LeftOut
from afn_ray.reduce.sources import Sources, sums_by_source
from afn_ray.reduce.strangest import describe, rank, strange_table, strangest_of
from afn_ray.reduce.tasks import Inline, Tasks, in_groups, merged
from afn_ray.reduce.word_sums import WordRules
from afn_ray.schema import LANGUAGE, SCREENED_SCHEMA, SPECIAL, WORD_START
from afn_ray.store import records
from afn_ray.store.shard_tables import DOC, ShardTable

RARE = 0.01
"""Largest share of a run's documents in which a rare type occurs."""
READ_BYTES = 64 << 20
"""Bytes of token files that one call reads; a larger shard has a call of its own."""
PART_DOCS = 2_000_000
"""Number of documents for each part in which text hashes are counted."""
TEXT_CHARS = 300
"""Longest beginning of a text in the ``screened`` table, in characters."""


class Asked(NamedTuple):
    """Results that a scan is asked for."""

    worst: int  # number of strangest documents to list
    group_by: str | None = None  # how documents are grouped; None: they are not
    by_group: bool = False  # whether a group's own Q3 labels its tokens too
    language: str = "en"  # of the closed-class words
    tagged: bool = False  # tokens have tags, which are the classes of words
    words: bool = True  # whether ``word_vocabulary`` is made


def scan_run(
    shards: CommittedShards,
    layers: Sequence[int],
    reduced: Mapping[str, pa.Table],
    readable: Sequence[str],
    asked: Asked,
    tasks: Tasks | None = None,
) -> dict[str, pa.Table]:
    """The tables ``sources``, ``screened``, ``strange``, ``salience`` and ``word_vocabulary`` of a
    run.

    ``tasks`` make them, or this process does. With groups, their tables too. ``reduced`` are the
    run's other tables by name; its ``files`` define the sources. ``readable`` has the tokenizer's
    texts by token id. ``screened`` has at most ``asked.worst`` documents. Of documents with the
    same text it has the strangest, or the first of several equally strange ones. Raises
    ``StoreError`` for a file that differs from its commit.
    """
    tasks = tasks or Inline()
    labels = reduced["frozen" if "frozen" in reduced else "thresholds"]
    files = reduced["files"].filter(pc.invert(reduced["files"]["is_skipped"]))
    sources = Sources.of(files["source"].to_pylist())
    layer = layers[-1]
    limits = _limits(layers, labels, reduced["vocabulary"], shards.n_docs)
    of_rows = _described(shards, layers, labels, readable, asked)
    places = list(_places(shards))
    read_at_once = list(in_groups(places, lambda place: place.tokens.num_bytes, READ_BYTES))
    cuts = word_tables.cuts(shards.n_tokens * len(layers), len(read_at_once))
    num_word_parts = cuts.first if asked.words else 0
    words = None
    if asked.words:
        words = WordRules(readable, of_rows.q3, asked.tagged, cuts.first, of_rows.by_language)
    counted = AlsoCounted(1 + shards.n_docs // PART_DOCS, words)
    grouping = _grouping(shards, layers, labels, sources, asked, tasks)
    if grouping is not None:
        grouping = grouping._replace(num_types=len(limits.rare))
        counted = counted._replace(grouping=grouping)
    num_others = 4 + counted.num_parts  # results of a scan that are not on words
    scanned: list[list[Any]] = []

    def words_scanned() -> Iterator[list[Any]]:
        """Sums of the words of each call; its other results go to ``scanned``."""
        for some in read_at_once:
            args = (some, sources, layers, limits, counted)
            found = tasks.submit(scan, *args, num_results=num_others + num_word_parts)
            scanned.append(found[:num_others])
            yield found[num_others:]

    of_words = word_tables.merge_words(words_scanned(), cuts, tasks)
    of_sums, tables, copied, controlled, *of_parts = map(list, zip(*scanned, strict=True))
    sums = merged(tasks, add, of_sums)
    (salience,) = tasks.submit(
        _salience,
        layers,
        reduced["vocabulary"],
        limits.controls.bins,
        merged(tasks, add, controlled),
    )
    read = sums_by_source(files, sources)
    spread, described = tasks.submit(
        describe, sources.names, layers, labels, sums, read, num_results=2
    )
    further: dict[str, pa.Table] = {}
    if grouping is not None:
        own = []
        if asked.by_group:
            own = [count_own(read_at_once, grouping, layers, sums, tasks)]
        args = (grouping, layers, reduced["vocabulary"], sums, *own)
        (made,) = tasks.submit(group_tables, *args)
        further |= tasks.result(made)
    hashes = [merged(tasks, add, handles) for handles in of_parts]
    repeated = [tasks.submit(_repeated, part)[0] for part in hashes]
    of_tables = []
    for table in tables:
        by = (sources, spread, *repeated)
        of_tables.append(tasks.submit(rank, layer, asked.worst, table, *by, num_results=2))
    ranked, of_strange = (list(handles) for handles in zip(*of_tables, strict=True))
    strangest = tasks.result(merged(tasks, strangest_of, ranked, asked.worst))
    strange = tasks.result(merged(tasks, add, of_strange))
    if shards.copies is not None:
        further["copied"] = tasks.result(merged(tasks, add_copies, copied))
    if asked.words:
        further["word_vocabulary"] = word_tables.word_vocabulary(of_words, of_rows, tasks)
    groups = (None,) if grouping is None else grouping.names
    return {
        "sources": tasks.result(described),
        "screened": _with_texts(places, strangest, readable, shards.kept, tasks),
        "strange": strange_table(sources.names, groups, strange),
        "salience": tasks.result(salience),
        **further,
    }


def _described(
    shards: CommittedShards,
    layers: Sequence[int],
    labels: pa.Table,
    readable: Sequence[str],
    asked: Asked,
) -> word_tables.Described:
    """Facts that the rows of words have beside their sums."""
    q3 = {r["layer"]: r["q3"] for r in labels.to_pylist() if r["population"] == "tokens"}
    q3_by_layer = [q3[layer] for layer in layers]
    return word_tables.Described(
        layers, q3_by_layer, shards.n_docs, asked.language, asked.tagged, readable
    )


def _grouping(
    shards: CommittedShards,
    layers: Sequence[int],
    labels: pa.Table,
    sources: Sources,
    asked: Asked,
    tasks: Tasks,
) -> Grouping | None:
    """The groups that are ``asked`` for; None if none are."""
    if asked.group_by is None:
        return None
    q3 = {r["layer"]: r["q3"] for r in labels.to_pylist() if r["population"] == "tokens"}
    limits = [np.inf if q3[layer] is None else q3[layer] for layer in layers]
    # An older run, which names its language, may have a column or key of this name.
    is_language = asked.group_by == LANGUAGE and asked.language == AUTO_LANGUAGE
    is_column = is_language or asked.group_by in [column.name for column in shards.kept]
    by_language = is_language and not asked.tagged
    grouping = Grouping(asked.group_by, is_column, sources, by_language=by_language)
    return find_groups(shards, grouping, limits, tasks)


def _places(shards: CommittedShards) -> Iterator[ShardTables]:
    of_copies = NOTHING if shards.copies is None else LeftOut(shards.copies)
    for commit, doc_offset, left_out in shards.places():
        tokens = shards.file(commit, "tokens")
        documents = shards.file(commit, "documents")
        copies = of_copies.of_shard(doc_offset, commit.counts["documents"])
        yield ShardTables(commit.shard, doc_offset, tokens, documents, left_out, copies)


def _salience(*args: Any) -> list[pa.Table]:
    return [salience_table(*args)]


def _limits(
    layers: Sequence[int], labels: pa.Table, vocabulary: pa.Table, n_docs: int
) -> FeatureLimits:
    """Limits at the last of ``layers``; infinite if the run has no normal tokens."""
    rows = {r["layer"]: r for r in labels.to_pylist() if r["population"] == "tokens"}
    layer = layers[-1]
    row = rows[layer]
    here = vocabulary.filter(pc.equal(vocabulary["layer"], layer))
    ids = here["token_id"].to_numpy()
    in_docs = here["n_docs"].to_numpy()
    is_rare = in_docs <= max(1, RARE * n_docs)
    rare = np.zeros(int(ids.max(initial=0)) + 1, bool)
    rare[ids[is_rare]] = True
    q3 = tuple(np.inf if rows[k]["q3"] is None else rows[k]["q3"] for k in layers)
    counts = np.zeros(len(rare), np.int64)
    is_normal = pc.not_equal(here["class"], "special").to_numpy(zero_copy_only=False)
    counts[ids[is_normal]] = here["n"].to_numpy()[is_normal]
    controls = Controls(q3, frequency_bins(counts))
    if row["q3"] is None:
        return FeatureLimits(np.inf, np.inf, rare, controls)
    return FeatureLimits(row["q3"], row["sink_factor"] * row["q2"], rare, controls)


def _repeated(part: tuple[Histogram]) -> list[Histogram]:
    """Hashes that occur in more than one document."""
    (hashes,) = part
    repeated = hashes.counts > 1
    return [Histogram(hashes.keys[repeated], hashes.counts[repeated])]


def _with_texts(
    places: Sequence[ShardTables],
    table: pa.Table,
    readable: Sequence[str],
    kept: Kept,
    tasks: Tasks,
) -> pa.Table:
    """``table`` with ranks, the beginnings of the texts and ``kept`` columns.

    It is as in ``SCREENED_SCHEMA``, followed by the kept columns.
    """
    shards = table["shard"].to_pylist()
    docs = table["in_shard"].to_pylist()
    wanted: dict[str, list[int]] = {}
    for shard, doc in zip(shards, docs, strict=True):
        wanted.setdefault(shard, []).append(doc)
    handles = {}
    names = [column.name for column in kept]
    for place in places:
        if place.shard in wanted:
            args = (place, wanted[place.shard], readable, names)
            (handles[place.shard],) = tasks.submit(_texts, *args)
    found = {shard: tasks.result(handle) for shard, handle in handles.items()}
    rows = [found[shard][doc] for shard, doc in zip(shards, docs, strict=True)]
    ranks = np.arange(1, len(table) + 1, dtype=np.int32)
    table = table.append_column("text", pa.array([text for text, _ in rows], pa.string()))
    table = table.append_column("rank", pa.array(ranks))
    table = table.select(SCREENED_SCHEMA.names).cast(SCREENED_SCHEMA)
    for at, of_corpus in enumerate(kept):
        kind = KINDS[of_corpus.kind]
        plain = kind.value_type if of_corpus.kind == "string" else kind
        column = pa.array([values[at] for _, values in rows], plain)
        table = table.append_column(beside(of_corpus.name, SCREENED_SCHEMA.names), column)
    return table


def _texts(
    place: ShardTables, docs: Sequence[int], readable: Sequence[str], kept: Sequence[str]
) -> list[dict[int, tuple[str, list[Any]]]]:
    """Beginnings of the texts of ``docs``, joined from their tokens, and their ``kept`` values."""
    documents = read_columns(place.documents, kept) if kept else None
    file = ShardTable(place.tokens.read())
    columns = ["token_id", "flags", "surface"]
    found: dict[int, tuple[str, list[Any]]] = {}
    for tokens in records.some_documents(file, np.unique(docs), columns):
        column = tokens[DOC].to_numpy()
        begins = starts(column)
        sizes = np.diff(begins, append=len(column))
        for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
            # Nearly every token has at least one character.
            text = joined_text(tokens.slice(begin, min(size, TEXT_CHARS)), readable)
            if len(text) > TEXT_CHARS:
                text = text[: TEXT_CHARS - 3] + "..."
            doc = int(column[begin])
            values = [] if documents is None else [documents[name][doc].as_py() for name in kept]
            found[doc] = text, values
    return [found]


def joined_text(tokens: pa.Table, readable: Sequence[str]) -> str:
    """The text of ``tokens``: words as written in the corpus, with one space between them."""
    pieces: list[str] = []
    is_whole = False  # the whole current word is already in ``pieces``
    columns = (tokens[name].to_pylist() for name in ("token_id", "flags", "surface"))
    for token_id, flags, surface in zip(*columns, strict=True):
        if flags & SPECIAL:
            continue
        if flags & WORD_START:
            word = readable[token_id] if surface is None else surface
            pieces.append(" " + word)
            is_whole = surface is not None
        elif not is_whole:
            pieces.append(readable[token_id])
    return "".join(pieces).strip()
