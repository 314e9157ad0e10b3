"""Classes of token types, and the tags that take their place in a labelled corpus."""

from __future__ import annotations

from collections.abc import Iterable

CLASSES_VERSION = 3
"""Version of the rules and words that give types their classes; part of a run's request.

It grows when the class of a type may change. 1 stands for the stop lists of earlier versions.
"""
CLASSES = ("content", "function", "word", "piece", "fragment", "number", "punctuation", "special")
"""Classes of a token type, in the order of the tables.

A type is a ``word`` where the language has no list of closed-class words.
"""
WORD_CLASSES = ("content", "function", "word")
"""Classes of types that are mostly whole words."""
PARTS_OF_WORDS = ("piece", "fragment")
"""Classes of types that mostly begin or continue a word of several tokens.

No word list contains such types.
"""
UNTAGGED = "untagged"
"""Class of tokens without a tag in a labelled corpus."""
RESERVED = ("special", UNTAGGED)
"""Class names that no tag may have."""
UPOS_CLASSES = {
    "content": ("NOUN", "PROPN", "VERB", "ADJ", "ADV", "INTJ"),
    "function": ("ADP", "AUX", "CCONJ", "DET", "NUM", "PART", "PRON", "SCONJ"),
    "punctuation": ("PUNCT", "SYM"),
}
"""UPOS tags by class: open classes, closed classes with numerals, and the others except X."""
_ORDER = (*CLASSES[:-1], *(tag for tags in UPOS_CLASSES.values() for tag in tags), "X")


def in_order(classes: Iterable[str]) -> list[str]:
    """``classes`` or tags, each once, in the order of the tables.

    Known names come first, then other tags by name, then those in ``RESERVED``.
    """
    rank = {name: at for at, name in enumerate(_ORDER)} | {
        name: len(_ORDER) + 1 for name in RESERVED
    }
    return sorted({*classes}, key=lambda name: (rank.get(name, len(_ORDER)), name))


def upos_classes(tags: Iterable[str]) -> dict[str, str]:
    """Class of each of ``tags`` by ``UPOS_CLASSES``; empty where any tag is not a UPOS tag.

    A joined tag has the class that all its parts share. X, and joined tags whose parts differ in
    class, are left out.
    """
    kinds = {"X": ""}
    for kind, of_kind in UPOS_CLASSES.items():
        kinds |= dict.fromkeys(of_kind, kind)
    found = {}
    for tag in tags:
        if tag in RESERVED:
            continue
        parts = tag.split("+")
        if not kinds.keys() >= {*parts}:
            return {}
        shared = {kinds[part] for part in parts}
        if len(shared) == 1 and "" not in shared:
            found[tag] = shared.pop()
    return found
