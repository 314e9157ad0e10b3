"""CRC-32 of each block of a file: a reader of any part of the file can check that part alone."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LEAST_BLOCK_BYTES = 64 << 10
"""Size of a block of a small file, in bytes."""
MOST_BLOCKS = 128
"""Blocks of a large file, which are larger: the list in a commit.json stays at 1 kB a file."""
CRC_CHARS = 8
"""Length of one CRC-32, in hex digits."""


def block_bytes(num_bytes: int) -> int:
    """Size of the blocks of a file of ``num_bytes``: the smallest power of two that gives few
    enough blocks.
    """
    size = LEAST_BLOCK_BYTES
    while num_bytes > size * MOST_BLOCKS:
        size *= 2
    return size


def checksums(data: bytes) -> str:
    """CRC-32 of each block of ``data``, in hex, one behind the other."""
    size = block_bytes(len(data))
    view = memoryview(data)
    return "".join(_crc32(view[at : at + size]) for at in range(0, len(data), size))


def file_checksums(path: Path) -> tuple[str, str]:
    """SHA-256 of a local file, in hex, and ``checksums`` of its blocks; the file is read once."""
    size = block_bytes(path.stat().st_size)
    digest = hashlib.sha256()
    crcs = []
    with path.open("rb") as source:
        while block := source.read(size):
            digest.update(block)
            crcs.append(_crc32(block))
    return digest.hexdigest(), "".join(crcs)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of one file of ``num_bytes``, and the checksum that each of them must have."""

    num_bytes: int
    checksums: str

    @classmethod
    def of(cls, num_bytes: object, checksums: object) -> Blocks:
        """Checksums as a JSON file lists them. Raises ``ValueError`` for values that are no such
        list.
        """
        if type(num_bytes) is not int or num_bytes < 0 or not isinstance(checksums, str):
            raise ValueError(
                f"bytes is {num_bytes!r:.40} and crc32 {checksums!r:.40}, expected a size and hex digits"
            )
        expected = CRC_CHARS * -(-num_bytes // block_bytes(num_bytes))
        if len(checksums) != expected:
            raise ValueError(
                f"crc32 has {len(checksums)} digits, expected {expected} for {num_bytes} bytes"
            )
        return cls(num_bytes, checksums)

    def read(self, start: int, end: int, read: Callable[[int, int], bytes]) -> bytes | None:
        """Bytes ``start`` to ``end`` of the file, which ``read(start, end)`` reads; None: they are
        damaged.

        Whole blocks are read, for the checksum is of the whole block.
        """
        size = block_bytes(self.num_bytes)
        first, last = start // size, -(-end // size)
        data = read(first * size, min(last * size, self.num_bytes))
        view = memoryview(data)
        found = "".join(_crc32(view[at : at + size]) for at in range(0, len(data), size))
        if found != self.checksums[first * CRC_CHARS : last * CRC_CHARS]:
            return None
        return (
            data
            if len(data) == end - start
            else bytes(view[start - first * size : end - first * size])
        )


def _crc32(block: bytes | memoryview) -> str:
    return f"{zlib.crc32(block):08x}"
