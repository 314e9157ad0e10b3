"""The stored vocabulary of a run in tables that are computed anew, which cannot name its types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.reduce.tables import TokenTexts
from afn_ray.schema import ADDED


def texts_of(vocabulary: pa.Table) -> TokenTexts:
    """Texts by token id, as the stored ``vocabulary`` has them."""
    ids, tokens, texts = (vocabulary[n].to_pylist() for n in ("token_id", "token", "text"))
    num_ids = max(ids, default=0) + 1
    pieces = [""] * num_ids
    readable = [""] * num_ids
    for at, token, text in zip(ids, tokens, texts, strict=True):
        pieces[at], readable[at] = token, text
    return TokenTexts(pieces, readable)


def without_added(name: str, computed: pa.Table, stored: pa.Table) -> pa.Table:
    """The ``computed`` table, without columns that the ``stored`` one of an older run lacks."""
    lacking = {*ADDED.get(name, ())} - {*stored.column_names}
    return computed.select([column for column in computed.column_names if column not in lacking])


def with_classes(tables: Mapping[str, pa.Table], vocabulary: pa.Table) -> dict[str, pa.Table]:
    """The tables of types in ``tables``, with the classes of the stored ``vocabulary``."""
    classed = tables["vocabulary"]
    for name in ("class", *ADDED["vocabulary"]):
        if name in classed.column_names:
            classed = _with_column(classed, name, vocabulary[name])
    named = {"vocabulary": classed}
    of_signals = tables.get("signal_vocabulary")
    if of_signals is not None:
        known = dict(zip(_types_of(vocabulary), vocabulary["class"].to_pylist(), strict=True))
        classes = [known[of_type] for of_type in _types_of(of_signals)]
        column = pa.array(classes, pa.string())
        named["signal_vocabulary"] = _with_column(of_signals, "class", column)
    return named


def has_decomposed_forms(tables: Mapping[str, pa.Table]) -> bool:
    """True if an older version listed forms of words that are not composed (NFC)."""
    if "word_vocabulary" not in tables:
        return False
    forms = pc.list_flatten(tables["word_vocabulary"]["forms"])
    return not forms.equals(pc.utf8_normalize(forms, "NFC"))


def without_forms(tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """``tables`` without how words are written, which only a checksum vouches for then."""
    words = tables["word_vocabulary"].drop_columns(["text", "forms"])
    return {**tables, "word_vocabulary": words}


def _types_of(vocabulary: pa.Table) -> Iterator[tuple[int, bool]]:
    """The token id of each row, and whether its tokens are special."""
    is_special = pc.equal(vocabulary["class"].cast(pa.string()), "special")
    return zip(vocabulary["token_id"].to_pylist(), is_special.to_pylist(), strict=True)


def _with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)
