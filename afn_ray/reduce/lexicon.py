"""Classes of vocabulary types: what a reader sees in a type, and the closed-class words of its
language.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import NamedTuple, Protocol

from afn_ray.classes import CLASSES_VERSION

SOURCE = f"closed-class words {CLASSES_VERSION}"
"""Name and version of the packed word lists; another version may give other classes."""
PACKED = "closed_words.tsv"
"""File beside this module with the closed-class words of all languages.

``python jobs/benchmark.py lexicons`` builds it. A line "[en]", a tab and ``Lexicon.unlisted``
begins a language; each line after it has a word, its share and its uses, with tabs between. Lines
before the first language say what the file was built from.
"""
MANY = 0.01
"""Least share of a word's uses that the rarer of open and closed needs to make it ambiguous."""
_SAME = {"nn": "nb"}
"""Languages that have their words under another code."""
_EDGES = "'-\u2010\u2011\u2013"
"""Apostrophes and hyphens: at the ends of a word they mark that it leans on its neighbour."""
_APOSTROPHES = str.maketrans({"\u2019": "'", "\u02bc": "'", "\u2018": "'"})


class Guess(NamedTuple):
    """The class of a type, and how sure it is."""

    name: str  # one of ``classes.CLASSES``
    confidence: float  # estimated share of the type's uses that have this class
    is_ambiguous: bool = False  # a word that is used as open and as closed, see ``MANY``


class Entry(NamedTuple):
    """A word of a lexicon."""

    share: float  # of its uses that is closed
    uses: int  # in the tagged words; 0: word lists have it, and are so often right about such words

    @property
    def is_closed(self) -> bool:
        """True if at least half of the uses are closed."""
        return self.share >= 0.5

    @property
    def is_ambiguous(self) -> bool:
        """True if the tagged words have it as open and as closed, each not just by mistake."""
        return self.uses > 0 and MANY <= self.share <= 1 - MANY

    @property
    def confidence(self) -> float:
        """Certainty of the word's class; few uses make less sure (Laplace's rule)."""
        right = self.share if self.is_closed else 1 - self.share
        return (right * self.uses + 1) / (self.uses + 2) if self.uses else right


class Words(Protocol):
    """Words with classes: those of one language, or of several together."""

    def guess(self, word: str) -> Guess:
        """The class of a whole word."""


@dataclass(frozen=True, slots=True)
class Lexicon:
    """The closed-class words of a language."""

    unlisted: float
    """Share of the uses of words without an entry that are open."""
    words: Mapping[str, Entry]
    """Entries by word in lower case as ``normalised`` gives it.

    A form with capitals has an entry of its own where its class is another, such as US and us.
    """

    def guess(self, word: str) -> Guess:
        """Function or content, for a whole word."""
        entry = self.entry(word)
        if entry is None:
            return Guess("content", self.unlisted)
        name = "function" if entry.is_closed else "content"
        return Guess(name, entry.confidence, entry.is_ambiguous)

    def closed_share(self, word: str) -> float:
        """Share of the uses of a whole word that is closed."""
        entry = self.entry(word)
        return 1 - self.unlisted if entry is None else entry.share

    def entry(self, word: str) -> Entry | None:
        """The entry of ``word`` as it is written, else of its lower case."""
        form = normalised(word)
        return self.words.get(form) or self.words.get(lower(form))


def normalised(word: str) -> str:
    """``word`` in NFC, with one kind of apostrophe, and without apostrophes and hyphens at its
    ends.

    So French l', Dutch -ie and English 's are the words l, ie and s.
    """
    if not word.isascii():
        word = unicodedata.normalize("NFC", word).translate(_APOSTROPHES)
    return word.strip(_EDGES) or word


def lower(word: str) -> str:
    """``word`` in lower case; the capital i with a dot of Turkish becomes a plain i."""
    return word.lower().replace("i\u0307", "i")


def pack(lexicons: Mapping[str, Lexicon], made_from: Iterable[str]) -> str:
    """The text of ``PACKED``; ``made_from`` are lines that say what it was built from."""
    lines = ["# Closed-class words by language, as lexicon.PACKED describes; built from:"]
    lines += [f"# {line}" for line in made_from]
    for language, lexicon in sorted(lexicons.items()):
        lines.append(f"[{language}]\t{lexicon.unlisted:.4g}")
        words = sorted(lexicon.words.items())
        lines += [f"{word}\t{entry.share:.4g}\t{entry.uses}" for word, entry in words]
    return "\n".join(lines) + "\n"


def unpack(text: str) -> dict[str, Lexicon]:
    """The lexicons in ``text``, by language; the inverse of ``pack`` but for rounding."""
    _, *sections = text.split("\n[")
    return dict(_sections(sections))


def _sections(sections: Iterable[str]) -> Iterator[tuple[str, Lexicon]]:
    for section in sections:
        head, *lines = section.rstrip("\n").split("\n")
        language, unlisted = head.split("]\t")
        words = {}
        for line in lines:
            word, share, uses = line.split("\t")
            words[word] = Entry(float(share), int(uses))
        yield language, Lexicon(float(unlisted), words)


@cache
def _packed() -> dict[str, Lexicon]:
    file = resources.files(__package__) / PACKED
    return unpack(file.read_text("utf-8"))


def languages() -> list[str]:
    """Codes of the languages that have closed-class words."""
    return sorted(_packed())


@cache
def find(language: str) -> Lexicon | None:
    """The closed-class words of ``language``, a code such as en or pt-BR; None: there are none."""
    base, *_ = language.lower().replace("_", "-").split("-")
    return _packed().get(_SAME.get(base, base))


def why_none(language: str) -> str:
    """Says what follows if ``find`` has no words of ``language``."""
    return (
        f"there are no closed-class words of language {language!r}, so words have the class word, "
        f"neither content nor function; known: {', '.join(languages())}"
    )


def classify(
    text: str, *, special: bool, starts: float, whole: float, words: Words | None
) -> Guess:
    """Class of the type whose readable text is ``text``, by the classes of ``words``.

    ``starts`` is the share of its tokens that start a word, and ``whole`` the share of these that
    are a whole word. The first matching rule decides:

    - ``special`` types are special.
    - Bytes that make no character are a fragment, and so are combining marks (M*) in a type that
      does not start words.
    - Text without letters (L*) and digits (N*) is punctuation, also an empty text.
    - Text with digits and no letters is a number.
    - A type that mostly continues words is a fragment.
    - A type that mostly starts words of several tokens is a piece.
    - Other types are words: function or content, or word if there are no ``words``.
    """
    if special:
        return Guess("special", 1.0)
    kinds = {unicodedata.category(c)[0] for c in text}
    if "\ufffd" in text or (kinds == {"M"} and starts < 0.5):
        return Guess("fragment", 1.0)
    if not kinds & {"L", "N"}:
        return Guess("punctuation", 1.0)
    if "L" not in kinds:
        return Guess("number", 1.0)
    if starts < 0.5:
        return Guess("fragment", 1.0 - starts)
    if whole < 0.5:
        return Guess("piece", 1.0 - whole)
    return Guess("word", 1.0) if words is None else words.guess(text)
