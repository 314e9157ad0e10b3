"""Encodings of text files: which can be read, and one name for each."""

from __future__ import annotations

import codecs
import warnings

ASCII = bytes(range(128)) + b"\\n \\x41 \\u0041 \x1b$B0!\x1b(B +AGE- a-b .xn--nxasmq6b."
"""Text that an encoding with ASCII in it leaves as it is, in which other codecs have escapes."""

UTF_BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks and their encodings. UTF-32-LE is first: its mark begins with UTF-16-LE's."""


def encoding_of(head: bytes) -> str:
    """UTF-16 or UTF-32 if ``head`` begins with such a byte order mark, else empty."""
    return next((name for mark, name in UTF_BOMS if head.startswith(mark)), "")


def canonical(encoding: str) -> str:
    """Python's name of ``encoding``; empty for UTF-8.

    Raises ``ValueError`` for one that Python does not know, or that has no ASCII in it: the byte of
    a newline must end a line, since files are cut there.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that some codecs do not know
            has_ascii = ASCII.decode(encoding) == ASCII.decode("ascii")
    except LookupError as error:
        raise ValueError(encoding) from error
    if not has_ascii:
        raise ValueError(encoding)
    name = codecs.lookup(encoding).name
    return "" if name in ("utf-8", "utf-8-sig") else name
