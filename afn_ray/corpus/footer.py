"""The footer of a Parquet file: where its column chunks are, and how they are encoded.

pyarrow ends the process (an uncaught C++ exception) when it is asked for damaged metadata of a
column chunk. Therefore the footer is parsed here, in Thrift's compact protocol as the format
specifies it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from afn_ray.corpus.sources import Source

MAGIC = b"PAR1"
FOOTER_BYTES = 64 << 20
"""Largest footer, in bytes."""
MOST_VALUES = 4_000_000
"""Most values of one footer, which take up to 0.6 GB of memory.

100 row groups of 1,000 columns have 3 million values.
"""
ENCODINGS_OF_DELTAS = {6, 7}
"""Numbers of DELTA_LENGTH_BYTE_ARRAY and DELTA_BYTE_ARRAY."""
TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

Struct = dict[int, Any]
"""A Thrift struct: field number -> value."""


class ColumnChunk(NamedTuple):
    """One column of one row group."""

    path: str
    offset: int
    """First byte in the file."""
    taken: int
    """Size in the file, in bytes."""
    given: int
    """Size after decompression, in bytes."""
    num_values: int
    has_deltas: bool
    """True if it has one of ``ENCODINGS_OF_DELTAS``."""


def read_chunks(source: Source) -> list[list[ColumnChunk]]:
    """Chunks of each row group, in column order.

    Raises ``ValueError`` or ``IndexError`` if the footer is missing or damaged.
    """
    if source.size < 8:
        raise ValueError("no footer")
    source.seek(-8, 2)
    tail = source.read(8)
    num_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != MAGIC or num_bytes > min(source.size - 8, FOOTER_BYTES):
        raise ValueError(f"no footer, or one of {num_bytes} bytes")
    source.seek(-8 - num_bytes, 2)
    data = source.read(num_bytes)
    source.seek(0)
    return _parse(data)


@lru_cache(2)
def _parse(data: bytes) -> list[list[ColumnChunk]]:
    """Chunks of the footer ``data``, cached because the slices of a file are read in turn."""
    try:
        footer = _ThriftReader(data).struct()
        groups = []
        num_rows = 0
        for group in footer[4]:
            groups.append([_chunk(column[3]) for column in group[1]])
            num_rows += group[3]
        if num_rows != footer[3]:
            raise ValueError(f"its row groups have {num_rows} rows, the file {footer[3]}")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its footer is damaged: {error!r}") from error
    for chunks in groups:
        if [chunk.path for chunk in chunks] != [chunk.path for chunk in groups[0]]:
            raise ValueError("its row groups have not the same columns")
    return groups


def _chunk(metadata: Struct) -> ColumnChunk:
    encodings, path = metadata[2], metadata[3]
    offset = min(at for at in (metadata[9], metadata.get(11)) if at)
    name = b".".join(path).decode()
    has_deltas = bool(ENCODINGS_OF_DELTAS.intersection(encodings))
    return ColumnChunk(name, offset, metadata[7], metadata[6], metadata[5], has_deltas)


class _ThriftReader:
    """Reads consecutive values of Thrift's compact protocol."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._num_values = 0

    def struct(self) -> Struct:
        fields: Struct = {}
        number = 0
        while header := self._byte():
            step, kind = header >> 4, header & 15
            number = number + step if step else self._zigzag()
            self._expect(1)
            fields[number] = kind == TRUE if kind in (TRUE, FALSE) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (TRUE, FALSE, BYTE):
            return self._byte()
        if kind in (I16, I32, I64):
            return self._zigzag()
        if kind == DOUBLE:
            return self._bytes(8)
        if kind == BINARY:
            return self._bytes(self._varint())
        if kind in (LIST, SET):
            header = self._byte()
            size = header >> 4
            if size == 15:
                size = self._varint()
            self._expect(size)
            return [self._value(header & 15) for _ in range(size)]
        if kind == MAP:
            size = self._varint()
            kinds = self._byte() if size else 0
            self._expect(2 * size)
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(size)]
        if kind == STRUCT:
            return self.struct()
        raise ValueError(f"its footer is damaged: a value of kind {kind}")

    def _expect(self, num_values: int) -> None:
        """Count values before they are read. Raises ``ValueError`` above ``MOST_VALUES``."""
        self._num_values += num_values
        if self._num_values > MOST_VALUES:
            raise ValueError(f"its footer has more than {MOST_VALUES:,} values")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _bytes(self, size: int) -> bytes:
        self._at += size
        if self._at > len(self._data):
            raise IndexError("its footer is damaged: a value goes beyond its end")
        return self._data[self._at - size : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            if (shift := shift + 7) > 63:
                raise ValueError("its footer is damaged: a number is too long")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
