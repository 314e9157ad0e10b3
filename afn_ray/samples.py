"""Samples of documents, drawn by a hash of each document's id: the same ones in every run."""

from __future__ import annotations

import hashlib
import re
from decimal import Decimal
from fractions import Fraction

from afn_ray.errors import ConfigError

SHARE = re.compile(r"(?=.*[1-9])(0?\.[0-9]{1,9}|[0-9]{1,2}(\.[0-9]{1,7})?%)")
"""Form of a share above 0 and below 1: 0.01, or 1%."""
EXPECTED = "a share above 0 and below 1, such as 1% or 0.01"
"""Form of a share in words."""


def share_of(text: str) -> Fraction:
    """The share that ``text`` writes. Raises ``ConfigError`` if it is not of the form ``SHARE``."""
    if not SHARE.fullmatch(text):
        raise ConfigError(f"the share is {text[:80]!r}; expected {EXPECTED}")
    if text.endswith("%"):
        return Fraction(text[:-1]) / 100
    return Fraction(text)


def canonical(text: str) -> str:
    """``text``, a share, in percent: 0.01 and 1.0% are both 1%."""
    percent = share_of(text) * 100
    value = Decimal(percent.numerator) / Decimal(percent.denominator)
    return f"{value.normalize():f}%"


def is_drawn(doc_id: str, share: Fraction, salt: str = "") -> bool:
    """True if the sample of ``share`` has the document ``doc_id``.

    It depends on nothing else, and a larger sample has all documents of a smaller one. Samples with
    different ``salt`` are independent of each other.
    """
    digest = hashlib.sha256(f"{salt}{doc_id}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64
