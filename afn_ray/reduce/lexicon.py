"""Classes of vocabulary types: special, punctuation, number, fragment, piece, function, content."""

from __future__ import annotations

import unicodedata
from functools import cache
from importlib.metadata import version

import stopwords

from afn_ray.errors import ConfigError

SOURCE = f"stopwords {version('stopwords')}"
"""Package and version that list the function words; another version may give other classes."""


@cache
def function_words(language: str) -> frozenset[str]:
    """Function words of ``language`` (ISO 639-1), from the package ``stopwords``, lower case.

    Raises ``ConfigError`` for a language that the package does not have.
    """
    if language not in stopwords.LANGUAGE_MAPPING:
        raise ConfigError(
            f"no function words for language {language!r}; known: {', '.join(languages())}"
        )
    words = (word.strip().lower() for word in stopwords.get_stopwords(language))
    return frozenset(word for word in words if word)


def languages() -> list[str]:
    """Language codes that ``function_words`` accepts."""
    return sorted(stopwords.LANGUAGE_MAPPING)


def classify(text: str, *, special: bool, starts_word: bool, is_whole: bool, language: str) -> str:
    """Class of the type whose readable text is ``text``.

    The first matching rule decides:

    - ``special`` types are special.
    - Bytes that make no character are a fragment, and so are combining marks (M*) in a type that
      does not start words.
    - Text without letters (L*) and digits (N*) is punctuation, also an empty text.
    - Text with digits and no letters is a number.
    - A type that mostly continues words (not ``starts_word``) is a fragment.
    - A type that mostly starts words of several tokens (not ``is_whole``) is a piece.
    - A function word of ``language`` is function; all other types are content.
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
