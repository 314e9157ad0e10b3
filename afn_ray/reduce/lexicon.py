"""Classes of vocabulary types: special, punctuation, number, fragment, piece, function, content."""

from __future__ import annotations

import unicodedata
from functools import cache
from importlib.metadata import version

import stopwords

from afn_ray.errors import ConfigError

SOURCE = f"stopwords {version('stopwords')}"
"""Where function words come from: another version may have others, and so other classes."""


@cache
def function_words(language: str) -> frozenset[str]:
    """Function words of ``language`` (ISO 639-1), from the package ``stopwords``, lower case.

    Raises ``ConfigError`` for a language that it does not have.
    """
    if language not in stopwords.LANGUAGE_MAPPING:
        raise ConfigError(
            f"no function words for language {language!r}; known: {', '.join(languages())}"
        )
    words = (word.strip().lower() for word in stopwords.get_stopwords(language))
    return frozenset(word for word in words if word)


def languages() -> list[str]:
    """Codes that ``function_words`` knows."""
    return sorted(stopwords.LANGUAGE_MAPPING)


def classify(text: str, *, special: bool, starts_word: bool, is_whole: bool, language: str) -> str:
    """Class of the type that reads ``text``.

    Unicode categories decide: all symbols and punctuation (P*, S*) is punctuation; digits (N*) with
    at most punctuation around them are a number; marks that no text is left of are punctuation. A
    type that mostly continues words (not ``starts_word``) is a fragment, whatever it spells, and so
    are bytes that make no character of their own. One that mostly starts words of several tokens
    (not ``is_whole``) is a piece.
    """
    if special:
        return "special"
    kinds = {unicodedata.category(c)[0] for c in text}
    if "\ufffd" in text or (kinds == {"M"} and not starts_word):
        return "fragment"
    if not kinds & {"L", "N"}:
        return "punctuation"
    if "L" not in kinds:
        return "number"
    if not starts_word:
        return "fragment"
    if not is_whole:
        return "piece"
    return "function" if text.lower() in function_words(language) else "content"
