"""SQL that several views share: the rows of files, exact numbers, and what is HIGH."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from afn_ray import token_rows
from afn_ray.reduce.stats import Z_95
from afn_ray.schema import SCHEMA_VERSION, TOKEN_CHARS, Series


class ShardFile(NamedTuple):
    """One shard's file of a table."""

    path: str  # SQL of its path
    doc_offset: int  # run-wide number of its first document
    n_documents: int
    n_tokens: int
    folder: str | None
    """Unique folder of its shard, for catalogs: DuckDB before 1.3 does not number files.

    None for queries in the package's own process.
    """
    docs: tuple[int, int] | None = None
    """First document to read and the one after the last, numbered in the shard; None: all."""
    schema_version: int = SCHEMA_VERSION
    """Version of its columns."""


@dataclass(frozen=True)
class RecordedColumns:
    """Contents of a run that its views depend on."""

    layers: Sequence[int]
    thresholds: Mapping[int, Mapping[str, Any]]
    """The thresholds that label tokens, for the population of all tokens, by layer."""
    others: Sequence[Series]
    """Series beside strength."""
    offsets: bool
    """True if tokens have ``start`` and ``end``."""
    tagged: bool
    """True if tokens have ``tag``."""
    kept: Sequence[str] = ()
    """Names of the documents' kept columns; they come from users, so SQL needs them ``quoted``."""
    copies: str | None = None
    """SQL of the path of the run's table ``duplicates``; None if it has none."""
    near_copies: str | None = None
    """SQL of the path of the run's table ``near_duplicates``; None if it has none."""
    word_table: str | None = None
    """SQL of the path of the run's table ``word_vocabulary``; None if it has none."""
    mean_vectors: str | None = None
    """SQL of the path of the run's table ``mean_vectors``; None if it has none."""

    detected: bool = False
    """True if documents have a detected language."""

    record: str = token_rows.ALL
    """Rows of tokens that the run keeps, as the config's ``record``."""

    @property
    def and_counts(self) -> str:
        """SQL, after a condition, of whether the document ``doc`` is counted: it is no copy."""
        if self.copies is None:
            return ""
        # NOT IN always makes its hash table from the copies, and never from the tokens.
        return f" AND doc NOT IN (SELECT doc FROM read_parquet({self.copies}){self.of_docs})"  # noqa: S608

    of_docs: str = ""
    """SQL of the condition that leaves out copies of other documents than those that are read."""

    own_q3: str | None = None
    """SQL of ``doc`` and ``q3_<k>`` of its group, if tokens are labelled by that too."""

    def quartile(self, name: str, layer: int) -> str:
        """SQL of the threshold ``name`` (q1, q2 or q3) of ``layer``."""
        return exact(self.thresholds[layer][name], "FLOAT")


def tokens_of(files: Sequence[ShardFile], offsets: bool) -> str:
    """SQL of the rows of ``files`` of tokens, as ``rows_of``; ``offsets``: they have some.

    These are ``start`` and ``"end"``, whatever version wrote the files.
    """
    start = f"{TOKEN_CHARS} * position + start_ahead"
    return rows_of(files, f'{start} AS start, {start} + length AS "end"' if offsets else "")


def rows_of(files: Sequence[ShardFile], of_today: str = "") -> str:
    """SQL of the rows of ``files`` in order, with run-wide ``doc`` and the ``file`` and ``row``.

    One file can be read in part, by its ``docs``; then it is the only one. Files of older versions
    come first. ``of_today`` is SQL of columns that only these have.
    """
    ordinals: dict[bool, list[int]] = {}
    for ordinal, of_shard in enumerate(files):
        ordinals.setdefault(of_shard.schema_version == SCHEMA_VERSION, []).append(ordinal)
    parts = []
    for is_todays, some in sorted(ordinals.items()):
        doc, more = ("doc_in_shard", of_today) if is_todays else ("doc", "")
        file = f"([{', '.join(map(str, some))}])[file::BIGINT + 1]" if len(ordinals) > 1 else "file"
        parts.append(_rows_of([files[ordinal] for ordinal in some], doc, file, more))
    return f"({' UNION ALL BY NAME '.join(parts)})"


def _rows_of(files: Sequence[ShardFile], doc: str, file: str, more: str) -> str:
    """SQL of the rows of ``files`` of one version, whose number in the shard is ``doc``.

    ``file`` is SQL of a file's ordinal from its place among ``files``, ``more`` that of further
    columns.
    """
    paths = ", ".join(file.path for file in files)
    offsets = ", ".join(str(file.doc_offset) for file in files)
    numbered = (
        "SELECT *, file_index AS file, file_row_number AS row FROM "  # noqa: S608
        f"read_parquet([{paths}], {PLAIN})"
    )
    if files[0].docs is not None:  # a filter here skips row groups
        begin, end = files[0].docs
        numbered += f" WHERE {doc} >= {begin} AND {doc} < {end}"
    if files[0].folder is not None:
        folders = ", ".join(f"'{f.folder}'" for f in files)
        numbered = (
            "SELECT * EXCLUDE (filename, file_row_number), file_row_number AS row, "  # noqa: S608
            f"list_position([{folders}], string_split(filename, '/')[-2]) - 1 AS file "
            f"FROM read_parquet([{paths}], {PLAIN}, filename = true, file_row_number = true)"
        )
    columns = [
        f"* EXCLUDE ({doc}, file)",
        f"{file} AS file",
        f"([{offsets}]::BIGINT[])[file::BIGINT + 1] + {doc} AS doc",
        *([more] if more else []),
    ]
    return f"SELECT {', '.join(columns)} FROM ({numbered})"  # noqa: S608


PLAIN = "hive_partitioning = false"
"""Options of ``read_parquet``: folder names are no columns."""


def answerable(
    sql: str, recorded: RecordedColumns, lacking: Collection[str], instead: str = ""
) -> str:
    """SQL of the rows of ``sql``, or an error if the run's ``record`` is one of ``lacking``.

    The columns are known either way, and no row is read for the error. ``instead`` is a query that
    nearly has them, for the message.
    """
    if recorded.record not in lacking:
        return sql
    return (
        f"SELECT t.* FROM {_refused(recorded, instead)} LEFT JOIN ({sql}) AS t ON "  # noqa: S608
        "r.why IS NULL"
    )


def answerable_value(sql: str, recorded: RecordedColumns, lacking: Collection[str]) -> str:
    """SQL of the value of ``sql``, or an error as of ``answerable``."""
    if recorded.record not in lacking:
        return sql
    return f"SELECT CASE WHEN why IS NULL THEN ({sql}) END FROM {_refused(recorded)}"  # noqa: S608


def _refused(recorded: RecordedColumns, instead: str = "") -> str:
    why = token_rows.why_refused(recorded.record) + (instead and f"; nearly the same is: {instead}")
    why = why.replace("'", "''")
    return f"(SELECT error('{why}') AS why) AS r"


def quoted(name: str) -> str:
    """``name`` as an SQL identifier, whatever is in it."""
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


def is_high(strength: str, q3: str) -> str:
    """SQL of whether ``strength`` is HIGH: at or above ``q3``, the Q3 of the thresholds that label.

    It is NULL if ``q3`` is NULL, because a run without normal tokens has no HIGH ones.
    """
    return f"{strength} >= {q3}"


def wilson(k: str, n: str) -> tuple[str, str]:
    """SQL of the lower and upper end of Wilson's 95 % interval of the share ``k / n``, n > 0.

    The operations are those of ``reduce.stats.wilson``, in its order, so the bits are equal.
    """
    k, n, z2 = f"({k})::DOUBLE", f"({n})::DOUBLE", f"{Z_95**2!r}::DOUBLE"
    p, scale = f"({k} / {n})", f"(1 + {z2} / {n})"
    centre = f"({p} + {z2} / (2 * {n})) / {scale}"
    error = f"sqrt({p} * (1 - {p}) / {n} + {z2} / (4 * {n} * {n}))"
    half = f"{Z_95!r}::DOUBLE / {scale} * {error}"
    low = f"CASE {k} WHEN 0 THEN 0 ELSE greatest(0, {centre} - {half}) END"
    high = f"CASE {k} WHEN {n} THEN 1 ELSE least(1, {centre} + {half}) END"
    return low, high


IGNORABLE = (
    r"\p{Mn}\p{Me}\p{Cf}\p{Lm}\p{Sk}''.\x{2018}\x{2019}\x{2024}:\x{b7}\x{387}\x{55f}\x{5f4}\x{2027}"
)
"""Characters, for a class of RE2 in an SQL string, between a final sigma
and the end of its word.
"""
CASED = r"\p{Lu}\p{Ll}\p{Lt}"
"""Letters with case, for a class of RE2."""


def lower_word(text: str) -> str:
    """SQL of ``text`` in lower case and NFC, as words are compared: ``word_sums.normalised``.

    The capital i with a dot of Turkish becomes a plain i, and so does an i with a combining dot. A
    capital sigma at the end of a Greek word becomes a final one, as Unicode has it.
    """
    dotted = "'i' || chr(775)"
    ends = f"'([{CASED}][{IGNORABLE}]*)\u03a3([{IGNORABLE}]*(?:[^{CASED}{IGNORABLE}]|$))'"
    final = f"regexp_replace({text}, {ends}, '\\1\u03c2\\2', 'g')"
    given = f"CASE WHEN contains({text}, '\u03a3') THEN {final} ELSE {text} END"
    lowered = f"lower(replace({given}, chr(304), {dotted}))"  # two dots: one stays
    return f"nfc_normalize(replace({lowered}, {dotted}, 'i'))"


WORD_CHARS = 200
"""Number of characters of a word that are compared, so that no text makes a query large."""
WORD = lower_word(f"left(trim(coalesce(text, '')), {WORD_CHARS})")
"""SQL of a row of ``words`` as a word: lower case, NFC."""


def exact(value: float | None, kind: str) -> str:
    """SQL of ``value`` as ``kind``, without loss."""
    # DuckDB reads text as the nearest FLOAT, which is the value itself. It would read a bare
    # number as DECIMAL first.
    return f"NULL::{kind}" if value is None else f"'{value!r}'::{kind}"
