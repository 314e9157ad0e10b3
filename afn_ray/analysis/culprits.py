"""Culprits of a broken limit, by name: sources, groups, files, classes, types, documents.

All texts are from the corpus: they are cut, and characters that act on a terminal or reorder a page
are escaped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import kept, token_rows
from afn_ray.analysis import own_parts, parts
from afn_ray.analysis.evidence import Evidence, sources_at
from afn_ray.analysis.limits import DISTANCE_LIMITS, PART_LIMITS, Limit
from afn_ray.analysis.parts import PartFigure
from afn_ray.analysis.policy import Policy
from afn_ray.analysis.verdict import BROKEN, WARNED, Culprit, Rule
from afn_ray.errors import QueryError, StoreError
from afn_ray.query import database
from afn_ray.query.expressions import quoted
from afn_ray.reduce import compare, duplicates, losses
from afn_ray.reduce.compare import Comparison
from afn_ray.reduce.group_drift import grouping_column
from afn_ray.reduce.groups import group_name
from afn_ray.reduce.strangest import STRANGE_SCORE
from afn_ray.schema import LANGUAGE, SCREENED_SCHEMA
from afn_ray.store import manifest
from afn_ray.store.manifest import RunFolder
from afn_ray.text import count, visible

MOST = 5
"""Largest number of culprits of a kind that a limit names."""
MOST_READ = 10_000
"""Largest number of documents among which those of a source or group are looked for."""
MOST_NAME_CHARS, MOST_TEXT_CHARS = 300, 200
"""Longest name and longest text of a culprit, in characters."""
CONTEXT_TOKENS = 8
"""Number of tokens on each side of an example of a type."""
STATUS = {"max_moved_types": "both", "max_new_types": "new", "max_vanished_types": "vanished"}
"""Status of the types that a limit counts, in ``MOVERS_SCHEMA``."""
OF_DOCUMENTS = {
    "quarantined_documents": "starts_with(status, 'quarantined')",
    "empty_documents": "status = 'empty'",
    "lost_bytes": "lost_bytes > 0",
    "lost_share": "lost_bytes > 0",
    "lost_documents": "lost_documents IS NULL OR lost_documents > 0",
    "replaced_characters": "n_replaced > 0",
    "replaced_share": "n_replaced > 0",
}
"""SQL of the documents that a limit on the run alone counts."""


def shown(text: str, most_chars: int = MOST_NAME_CHARS) -> str:
    """``text`` in one line, with hidden characters as escapes, cut after ``most_chars``."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= most_chars else line[: most_chars - 1] + "…"


class _Asked:
    """Answers to SQL questions about a run, which is opened at the first of them."""

    def __init__(self, run: RunFolder | None) -> None:
        self._run = run
        self._opened: database.Run | None = None

    @property
    def has_all_rows(self) -> bool:
        """True if there is a run, and it keeps the rows of all tokens."""
        return self._run is not None and token_rows.is_complete(
            token_rows.record_of(self._run.info["config"])
        )

    def table(self, query: str, parameters: Mapping[str, Any] | None = None) -> pa.Table | None:
        """The answer to ``query``; None without a run, or if it cannot be read or not in time.

        Names are extra: a verdict stands without them.
        """
        if self._run is None:
            return None
        try:
            if self._opened is None:
                self._opened = database.open_run(self._run.uri)
            return self._opened.sql(query, parameters or {}).to_arrow_table()
        except (QueryError, StoreError):
            return None

    def rows(self, query: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """The rows of ``table``; none if it is None."""
        found = self.table(query, parameters)
        return [] if found is None else found.to_pylist()

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()


class _Night(NamedTuple):
    """The runs, tables and queries in which the culprits of a night are found."""

    policy: Policy
    evidence: Evidence
    here: _Asked  # the run
    before: _Asked  # the baseline


def with_culprits(rules: Sequence[Rule], policy: Policy, evidence: Evidence) -> tuple[Rule, ...]:
    """``rules``; those that are broken or warn name what is to blame."""
    namers = _namers(rules)
    found = []
    with closing(_Asked(evidence.run)) as here, closing(_Asked(evidence.baseline.run)) as before:
        night = _Night(policy, evidence, here, before)
        for rule in rules:
            if rule.state in (BROKEN, WARNED):
                kinds = [kind for kind in PART_LIMITS if namers[kind, rule.limit.key] == rule.key]
                culprits = tuple(_first(_of(rule, kinds, night)))
                rule = replace(_with_numbers(rule, night), culprits=culprits)
            found.append(rule)
    return tuple(found)


def _namers(rules: Sequence[Rule]) -> dict[tuple[str, str], str]:
    """The limit that names the parts of a kind by the figure of a key, so that one limit does.

    It is the limit on that kind if it is broken or warns, otherwise the first broken one, or else
    the first that warns.
    """
    namers: dict[tuple[str, str], str] = {}
    for state in (BROKEN, WARNED):
        for rule in rules:
            if rule.state == state:
                for kind in PART_LIMITS:
                    namers.setdefault((kind, rule.limit.key), rule.key)
    for rule in rules:
        if rule.limit.of and rule.state in (BROKEN, WARNED):
            namers[rule.limit.of, rule.limit.key] = rule.key
    return namers


def _first(found: Iterable[Culprit]) -> Iterator[Culprit]:
    """The first ``MOST`` of each kind, with texts that can be shown."""
    num_of: Counter[str] = Counter()
    for one in found:
        num_of[one.kind] += 1
        if num_of[one.kind] <= MOST:
            text = None if one.text is None else shown(one.text, MOST_TEXT_CHARS)
            yield Culprit(one.kind, shown(one.name), shown(one.reason), text)


def _of(rule: Rule, kinds: Sequence[str], night: _Night) -> Iterator[Culprit]:
    """Culprits for the state of ``rule``, the worst of each kind first; parts are of ``kinds``."""
    for kind in kinds:
        yield from _parts(rule, kind, night)
    yield from _places(rule.limit, night.evidence)
    if night.evidence.comparison is not None:
        yield from _classes(rule.limit, night.evidence, night.evidence.comparison)
        yield from _types(rule.limit, night, night.evidence.comparison)
    yield from _documents(rule, night)


# --- sources, groups, files, shards


def _parts(rule: Rule, kind: str, night: _Night) -> Iterator[Culprit]:
    """The parts of the ``kind`` by the figure of ``rule``; those of new or vanished sources.

    Of a limit on parts only those that are beyond it.
    """
    limit, evidence = rule.limit, night.evidence
    if limit.key in ("max_new_sources", "max_vanished_sources"):
        if kind == "source" and evidence.comparison is not None:
            yield from _unmatched_sources(limit, evidence, evidence.comparison)
        return
    for part in _figures(rule, kind, night):
        if rule.is_beyond(part.value) if limit.of else part.value:
            figure = f"{part.value:,.0f}" if limit.is_whole else f"{part.value:.4g}"
            yield Culprit(kind, part.name, f"{limit.key} {figure}, {part.tokens}")


def _figures(rule: Rule, kind: str, night: _Night) -> list[PartFigure]:
    """The parts by the figure of ``rule``, the worst first; none if they cannot be read."""
    try:
        return parts.figures_of(rule.limit, kind, night.policy, night.evidence)
    except (QueryError, StoreError):
        return []


def _unmatched_sources(
    limit: Limit, evidence: Evidence, comparison: Comparison
) -> Iterator[Culprit]:
    """The sources that are new or vanished, the largest first."""
    sources = sources_at(comparison, evidence.layer)
    for source in sorted(sources, key=lambda source: -max(source.n_a, source.n_b)):
        if not (source.n_a if limit.key == "max_new_sources" else source.n_b):
            n = count(max(source.n_a, source.n_b), "token")
            yield Culprit("source", source.name, n)


def _with_numbers(rule: Rule, night: _Night) -> Rule:
    """``rule`` with the numbers of parts beyond it and within it, if it is on parts."""
    if not rule.limit.of:
        return rule
    values = [part.value for part in _figures(rule, rule.limit.of, night)]
    beyond = sum(map(rule.is_beyond, values))
    return replace(rule, num_beyond=beyond, num_within=len(values) - beyond)


OF_FILES = {
    "lost_bytes": "lost_bytes",
    "lost_share": "lost_bytes",
    "lost_documents": "lost_bytes",
    "quarantined_documents": "n_quarantined",
    "replaced_characters": "n_replaced",
    "replaced_share": "n_replaced",
}
"""Column of ``FILES_SCHEMA`` by which a limit ranks files."""
UNITS = {
    "lost_bytes": "lost byte",
    "n_quarantined": "quarantined document",
    "n_replaced": "replaced character",
}


def _places(limit: Limit, evidence: Evidence) -> Iterator[Culprit]:
    """Files that lost most, quarantined shards, and repeated ids."""
    run = evidence.run
    if limit.key == "quarantined_shards":
        for shard in run.info["quarantined"]:
            yield Culprit("shard", shard["uri"], shard["reason"])
    if limit.key == "repeated_ids" and (found := duplicates.figures_of(run.info)) is not None:
        for one in found.examples:
            yield Culprit("id", one.id, f"{one.n:,} documents have it")
    if (column := OF_FILES.get(limit.key)) is None:
        return
    files = manifest.read_table(run, "files")
    rows = files.filter(pc.greater(files[column], 0)).sort_by([(column, "descending")])
    for row in rows.slice(0, MOST).to_pylist():
        read = f"; {losses.rounded_down(row['share_read'])} read"
        yield Culprit("file", row["source"], count(row[column], UNITS[column]) + read)


# --- classes and types


def _classes(limit: Limit, evidence: Evidence, comparison: Comparison) -> Iterator[Culprit]:
    """The classes whose share, or whose share of HIGH tokens, changed most."""
    columns = {"class_share_shift": "share", "class_high_shift": "share_high"}
    if (column := columns.get(limit.key)) is None:
        return
    here = comparison.classes.filter(pc.equal(comparison.classes["layer"], evidence.layer))
    rows = here.to_pylist()
    for row in sorted(rows, key=lambda row: -abs(row[f"{column}_b"] - row[f"{column}_a"])):
        before, now = (f"{row[f'{column}_{run}']:.1%}" for run in "ab")
        what = "HIGH" if column == "share_high" else "of the tokens"
        yield Culprit("class", row["class"], f"{before} {what} before, {now} now")


def _types(limit: Limit, night: _Night, comparison: Comparison) -> Iterator[Culprit]:
    """The types that moved most, are new or vanished, each where it first occurs."""
    statuses = (STATUS[limit.key],) if limit.key in STATUS else tuple(STATUS.values())
    if limit.key not in (*STATUS, *DISTANCE_LIMITS, "class_share_shift", "class_high_shift"):
        return
    movers = comparison.movers.filter(pc.equal(comparison.movers["layer"], night.evidence.layer))
    movers = compare.whole_words(movers)
    rows: list[dict[str, Any]] = []
    for status in statuses:
        some = movers.filter(pc.equal(movers["status"], status))
        some = compare.moved(some) if status == "both" else some
        rows += some.slice(0, MOST).to_pylist()
    for row in rows[:MOST]:
        asked = night.before if row["status"] == "vanished" else night.here
        text = row["text"].strip()
        yield Culprit("type", text, _moved(row), _in_context(asked, row["token_id"]))


def _moved(row: Mapping[str, Any]) -> str:
    """Move of a type in words, from a row of ``MOVERS_SCHEMA``."""
    if row["status"] != "both":
        n = row["n_b"] if row["status"] == "new" else row["n_a"]
        return f"{row['status']}, {n:,} times"
    before, now = (f"{row[f'share_high_{run}']:.1%}" for run in "ab")
    return f"HIGH {before} before, {now} now (z {row['z']:+.1f})"


def _in_context(asked: _Asked, token_id: int) -> str | None:
    """The first occurrence of a type with the tokens around it; None if none is found.

    Tokens beside each other are known only where the run keeps the rows of all.
    """
    if not asked.has_all_rows:
        return None
    around = f"""
        FROM tokens t JOIN (
            SELECT doc, position FROM tokens WHERE token_id = $token_id
            ORDER BY doc, position LIMIT 1
        ) AS f ON t.doc = f.doc
            AND t.position BETWEEN f.position - {CONTEXT_TOKENS}
                AND f.position + {CONTEXT_TOKENS}"""  # noqa: S608
    rows = asked.rows(_written(around), {"token_id": token_id})
    return rows[0]["text"] if rows else None


# --- documents


def _documents(rule: Rule, night: _Night) -> Iterator[Culprit]:
    """The strangest documents for limits on junk and drift; for others those that they count.

    They are of the part that ``rule`` names, if it names one.
    """
    key, tables = rule.limit.key, night.evidence.run.info["tables"]
    if key in ("junk_share", *DISTANCE_LIMITS) and "screened" in tables:
        table = manifest.read_table(night.evidence.run, "screened").sort_by("rank")
        strange = table.filter(pc.greater_equal(table["score"], STRANGE_SCORE))
        for row in _first_rows(_of_part(rule, night, strange)):
            yield Culprit("document", _name(row), row["reason"], row["text"])
    if key == "duplicate_share" and rule.limit.of:
        yield from _copies_of_part(rule, night)
    elif key == "duplicate_share" and "duplicates" in tables:
        yield from _left_out(night)
    elif key == "duplicate_share" and "screened" in tables:
        table = manifest.read_table(night.evidence.run, "screened")
        table = table.sort_by([("n_copies", "descending"), ("rank", "ascending")])
        for row in _first_rows(table.filter(pc.greater(table["n_copies"], 1))):
            reason = f"{row['n_copies']:,} documents have this text"
            yield Culprit("document", _name(row), reason, row["text"])
    if key == "near_duplicate_share":
        query = "FROM documents WHERE near_duplicate_of IS NOT NULL ORDER BY doc"
        near = _such_documents(rule, night, "doc, source, near_duplicate_of", query)
        yield from _by_original(night, near, "near_duplicate_of", ("a near-copy", "near-copies"))
    if (condition := OF_DOCUMENTS.get(key)) is not None:
        query = f"FROM documents WHERE {condition} ORDER BY lost_bytes DESC, n_replaced DESC, doc"
        columns = "doc, source, status, lost_bytes, lost_documents, n_replaced"
        for row in _first_rows(_such_documents(rule, night, columns, query)):
            yield Culprit("document", _name(row), _damage(row))


def _such_documents(rule: Rule, night: _Night, columns: str, query: str) -> pa.Table | None:
    """The first ``columns`` of ``query``, both SQL, that are of the part that ``rule`` names.

    A part's rows, and near-copies, are looked for among the first ``MOST_READ``. None if they
    cannot be read.
    """
    limit, column = MOST, grouping_column(night.evidence.run)
    if rule.limit.of or rule.limit.key == "near_duplicate_share":
        limit = MOST_READ
    if rule.limit.of and column is not None:
        columns += f", documents.{quoted(column.name)} AS {quoted(_in_screened(column.name))}"
    table = night.here.table(f"SELECT {columns} {query} LIMIT {limit}")
    return None if table is None else _of_part(rule, night, table)


FIRST = '"first document"'
"""Name of the first document of a text, in SQL; no kept column can have it."""
COPIES = f"""
    FROM documents JOIN (
        SELECT d.doc, min(d.doc) OVER (PARTITION BY d.text_sha256) AS {FIRST}
        FROM documents AS d WHERE d.n_tokens > 0 QUALIFY d.doc > {FIRST}
    ) AS copies ON documents.doc = copies.doc ORDER BY documents.doc"""  # noqa: S608 - ours
"""SQL of the documents with the text of an earlier one."""


def _copies_of_part(rule: Rule, night: _Night) -> Iterator[Culprit]:
    """The texts with most copies in the part that ``rule`` names, each by its first copy there."""
    columns = f"documents.doc, documents.source, copies.{FIRST}"
    table = _such_documents(rule, night, columns, COPIES)
    yield from _by_original(night, table, FIRST.strip('"'), ("a copy", "copies"))


def _by_original(
    night: _Night, table: pa.Table | None, column: str, words: tuple[str, str]
) -> Iterator[Culprit]:
    """The first copy of each document in ``column`` of ``table``, those with most copies first.

    ``words`` are a copy and copies; the text is that of the document.
    """
    rows = [] if table is None else table.to_pylist()
    num_of = Counter(row[column] for row in rows)
    first_of = {row[column]: row for row in reversed(rows)}
    # Equally many are in the order of the corpus.
    most = sorted(num_of, key=lambda doc: (-num_of[doc], first_of[doc]["doc"]))[:MOST]
    texts = _texts_of(night, most)
    for doc in most:
        reason = f"{words[0]} of document {doc:,}"
        if num_of[doc] > 1:
            reason = f"the first of {num_of[doc]:,} {words[1]} of document {doc:,}"
        yield Culprit("document", _name(first_of[doc]), reason, texts.get(doc, {}).get("text"))


def _left_out(night: _Night) -> Iterator[Culprit]:
    """The documents with most copies that are not counted; screening sees none of these copies."""
    copies = manifest.read_table(night.evidence.run, "duplicates")
    most = copies.group_by("duplicate_of").aggregate([("doc", "count")])
    order = [("doc_count", "descending"), ("duplicate_of", "ascending")]
    rows = _first_rows(most.sort_by(order))
    of_doc = _texts_of(night, {row["duplicate_of"] for row in rows})
    for row in rows:
        if (document := of_doc.get(row["duplicate_of"])) is not None:
            reason = f"{row['doc_count'] + 1:,} documents have this text"
            yield Culprit("document", _name(document), reason, document["text"])


def _texts_of(night: _Night, docs: Collection[int]) -> dict[int, dict[str, Any]]:
    """``doc``, ``source`` and the beginning of the ``text`` of each of ``docs`` that counts."""
    if not docs:
        return {}
    listed = ", ".join(map(str, docs))
    tokens = f"FROM tokens t WHERE t.doc IN ({listed}) AND t.position <= {MOST_TEXT_CHARS}"
    written = f"({_written(tokens)})"
    query = f"SELECT doc, source, text FROM documents JOIN {written} USING (doc)"  # noqa: S608
    return {row["doc"]: row for row in night.here.rows(query)}


def _written(tokens: str) -> str:
    """SQL of each ``doc`` in ``tokens`` with their ``text``, its words as they are written.

    ``tokens`` is SQL from FROM on, which names the view ``tokens`` t.
    """
    # The token that begins a word has the whole word, unless it is as the type's own text.
    return f"""
        SELECT doc, string_agg(word, ' ' ORDER BY number) AS text FROM (
            SELECT doc, number,
              coalesce(max(surface), string_agg(text, '' ORDER BY position)) AS word
            FROM (
                SELECT t.*, count(*) FILTER (is_word_start)
                    OVER (PARTITION BY t.doc ORDER BY t.position) AS number
                {tokens}
            ) WHERE NOT is_special GROUP BY doc, number
        ) GROUP BY doc"""  # noqa: S608


def _first_rows(table: pa.Table | None) -> list[dict[str, Any]]:
    """The first ``MOST`` rows of ``table``."""
    return [] if table is None else table.slice(0, MOST).to_pylist()


def _of_part(rule: Rule, night: _Night, table: pa.Table) -> pa.Table:
    """The rows of ``table`` that are of the part that ``rule`` names; all if it names none."""
    evidence = night.evidence
    if not rule.limit.of or rule.where is None:
        return table
    grouped = _with_language(night, table)
    places = own_parts.parts_of(evidence.run, rule.limit.of, _places_of(evidence.run, grouped))
    if rule.limit.of == "source" and evidence.comparison is not None:
        _, renamed = compare.source_names(evidence.comparison.a, evidence.run)
        places = [place if place == rule.where else renamed(str(place)) for place in places]
    names = [group_name(place) if rule.limit.of == "group" else place for place in places]
    return table.filter(pa.array([name == rule.where for name in names], pa.bool_()))


def _with_language(night: _Night, table: pa.Table) -> pa.Table:
    """``table`` with the languages of its documents, if these make the groups and it lacks them."""
    column = grouping_column(night.evidence.run)
    if column is None or column.name != LANGUAGE or LANGUAGE in table.column_names:
        return table
    docs = table["doc"].to_pylist()
    listed = ", ".join(map(str, docs)) or "NULL"
    query = f"SELECT doc, {LANGUAGE} FROM documents WHERE doc IN ({listed})"  # noqa: S608 - numbers
    found = {row["doc"]: row[LANGUAGE] for row in night.here.rows(query)}
    languages = pa.array([found.get(doc) for doc in docs], pa.string())
    return table.append_column(LANGUAGE, languages)


def _places_of(run: RunFolder, rows: pa.Table) -> pa.Table:
    """``source`` of ``rows``, and the column that groups them as ``screened`` has it, if any."""
    places = rows.select(["source"])
    column = grouping_column(run)
    if column is None or _in_screened(column.name) not in rows.column_names:
        return places
    values = own_parts.as_kept(rows[_in_screened(column.name)], column)
    return places.append_column(column.name, values)


def _in_screened(name: str) -> str:
    """Name of the kept column ``name`` in the table ``screened``."""
    return kept.beside(name, SCREENED_SCHEMA.names)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['doc']} of {row['source']}"


def _damage(row: Mapping[str, Any]) -> str:
    """The fate of a document that lost something, from its row of ``documents``."""
    found = [row["status"]]
    if row["lost_bytes"]:
        found.append(count(row["lost_bytes"], "lost byte"))
    if row["lost_documents"] is None:
        found.append("nobody can tell how many documents it stands for")
    if row["n_replaced"]:
        found.append(count(row["n_replaced"], "replaced character"))
    return ", ".join(found)
