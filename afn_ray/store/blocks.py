"""CRC-32 checksums of a file's blocks, so that a reader of one part can check that part alone."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LEAST_BLOCK_BYTES = 64 << 10
"""Smallest block size, in bytes."""
MOST_BLOCKS = 128
"""Most blocks per file. It keeps the checksums in commit.json at about 1 kB a file."""
CRC_CHARS = 8
"""Length of one CRC-32, in hex digits."""


def block_bytes(num_bytes: int) -> int:
    """Block size for a file of ``num_bytes``, in bytes.

    It is the smallest power of two, at least ``LEAST_BLOCK_BYTES``, that gives at most
    ``MOST_BLOCKS`` blocks.
    """
    size = LEAST_BLOCK_BYTES
    while num_bytes > size * MOST_BLOCKS:
        size *= 2
    return size


def checksums(data: bytes) -> str:
    """CRC-32 of each block of ``data``, in hex, concatenated."""
    size = block_bytes(len(data))
    view = memoryview(data)
    return "".join(_crc32(view[at : at + size]) for at in range(0, len(data), size))


def file_checksums(path: Path) -> tuple[str, str]:
    """SHA-256 of a local file, in hex, and ``checksums`` of its blocks, in one read of the file."""
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
    """The size of one file, in bytes, and the expected ``checksums`` of its blocks."""

    num_bytes: int
    checksums: str

    @classmethod
    def of(cls, num_bytes: object, checksums: object) -> Blocks:
        """Validate values read from JSON. Raises ``ValueError`` if they are no such list.

        ``num_bytes`` is the size of the file, ``checksums`` has the CRC-32 of each block.
        """
        if type(num_bytes) is not int or num_bytes < 0 or not isinstance(checksums, str):
            raise ValueError(
                f"bytes is {num_bytes!r:.40} and crc32 {checksums!r:.40}, expected a size and hex "
                "digits"
            )
        expected = CRC_CHARS * -(-num_bytes // block_bytes(num_bytes))
        if len(checksums) != expected:
            raise ValueError(
                f"crc32 has {len(checksums)} digits, expected {expected} for {num_bytes} bytes"
            )
        return cls(num_bytes, checksums)

    def read(self, start: int, end: int, read: Callable[[int, int], bytes]) -> bytes | None:
        """Return bytes ``start`` to ``end`` (exclusive) of the file, or None if they are damaged.

        ``read(start, end)`` reads the file. It is called for whole blocks, because a checksum
        covers a whole block.
        """
        size = block_bytes(self.num_bytes)
        first = start // size
        last = -(-end // size)
        data = read(first * size, min(last * size, self.num_bytes))
        view = memoryview(data)
        found = "".join(_crc32(view[at : at + size]) for at in range(0, len(data), size))
        if found != self.checksums[first * CRC_CHARS : last * CRC_CHARS]:
            return None
        if len(data) == end - start:
            return data
        return bytes(view[start - first * size : end - first * size])


def _crc32(block: bytes | memoryview) -> str:
    return f"{zlib.crc32(block):08x}"
