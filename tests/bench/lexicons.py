"""Build the closed-class words of each language from tagged words and word lists, and measure them.

Tagged words are files "en.tsv", named by language: a form, a tab and its universal part of speech
on a line, an empty line between sentences. They are not part of this repository. Words that are too
rare to be in them come from the word lists of three packages, and from ``reviewed_words.toml``.
"""

from __future__ import annotations

import math
import tomllib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from afn_ray.errors import ConfigError
from afn_ray.reduce import lexicon
from afn_ray.reduce.lexicon import Entry, Lexicon, lower, normalised

CLOSED = frozenset(("ADP", "AUX", "CCONJ", "DET", "PART", "PRON", "SCONJ"))
OPEN = frozenset(("ADJ", "ADV", "INTJ", "NOUN", "PROPN", "VERB"))
FOLDS = 10
"""Parts of each file that take turns to be held out; a part is of neighbouring sentences."""
LEAST_FORM = 3
"""Least uses of a form with capitals that may have another class than its word."""
RARE = 3
"""Most uses of a word that counts for the trust in lists: words that are not seen are rare, too."""
PRIOR = 5
"""Number of words that the trust of other languages counts for, beside a language's own."""
REVIEWED = Path(__file__).parent / "reviewed_words.toml"
UNLISTED = Entry(0.0, 0)
"""Entry that stands for a word without one."""
Sentence = list[tuple[str, str]]
"""The forms of a sentence, each with its tag."""
Counts = Mapping[tuple[str, str], int]
"""Number of uses of each form with each tag."""
Pattern = tuple[bool, ...]
"""True for each list of a language that has the word."""
Right = Mapping[Pattern, tuple[int, int]]
"""Numbers of tagged rare words of each pattern: closed ones, and all."""


class Sources(NamedTuple):
    """Sources of a language's words beside tagged words; normalised and in lower case."""

    lists: Mapping[str, frozenset[str]]  # by package
    reviewed: frozenset[str]  # closed unless the tagged words have them as open
    contractions: frozenset[str]  # closed; the tagged words have their parts instead

    def pattern(self, word: str) -> Pattern:
        """Lists that have ``word``."""
        return tuple(word in words for words in self.lists.values())

    def listed(self) -> set[str]:
        """The words of all lists."""
        return {word for words in self.lists.values() for word in words}


@dataclass(slots=True)
class Uses:
    """Uses of a word in tagged words."""

    closed: int = 0
    open: int = 0
    numeral: int = 0

    def add(self, tag: str, n: int = 1) -> None:
        """Count ``n`` uses with ``tag``."""
        if tag in CLOSED:
            self.closed += n
        elif tag in OPEN:
            self.open += n
        elif tag == "NUM":
            self.numeral += n

    def merge(self, other: Uses) -> None:
        """Count the uses of ``other`` too."""
        self.closed += other.closed
        self.open += other.open
        self.numeral += other.numeral

    def entry(self) -> Entry | None:
        """The share of the uses that is closed; None without uses.

        The numeral uses of a word that is a pronoun or determiner too, such as one, count as
        closed.
        """
        closed = self.closed + (self.numeral if self.closed else 0)
        n = self.closed + self.open + self.numeral
        return Entry(closed / n, n) if n else None


def count(sentences: Iterable[Sentence]) -> Counter[tuple[str, str]]:
    """Uses of the forms in ``sentences``, with their tags."""
    return Counter(word for one in sentences for word in one)


class Tagged:
    """Uses of words, and of their forms with capitals.

    A form in capitals, such as US, is no use of its word if it has a class of its own.
    """

    def __init__(self, counts: Counts, language: str) -> None:
        self.words: dict[str, Uses] = defaultdict(Uses)
        self.forms: dict[str, Uses] = defaultdict(Uses)
        capitals: dict[str, Uses] = defaultdict(Uses)
        for (form, tag), n in counts.items():
            for script, word in spelled(form, language):
                is_capitals = len(script) > 1 and script.isupper()
                (capitals if is_capitals else self.words)[word].add(tag, n)
                if script != word:
                    self.forms[script].add(tag, n)
        for word, uses in capitals.items():
            own, of_word = uses.entry(), self.words[word].entry()
            if own is None or of_word is None or not is_apart(own, of_word):
                self.words[word].merge(uses)

    def entries(self) -> dict[str, Entry]:
        """Entries of all words that have uses."""
        found = {word: uses.entry() for word, uses in self.words.items()}
        return {word: entry for word, entry in found.items() if entry is not None}


def is_apart(form: Entry, word: Entry) -> bool:
    """True if a form of ``word`` has a class of its own, and uses enough to say so."""
    return form.uses >= LEAST_FORM and form.is_closed != word.is_closed


@cache
def spelled(form: str, language: str) -> list[tuple[str, str]]:
    """``form`` as it is normalised, in each of its ``scripts``, and its word in lower case."""
    return [(script, lower(script)) for script in scripts(normalised(form), language)]


def scripts(word: str, language: str) -> set[str]:
    """``word`` as it is written, and Chinese in traditional and simplified characters too."""
    if language != "zh":
        return {word}
    return {word, *(convert(word) for convert in _conversions())}


@cache
def _conversions() -> tuple[Callable[[str], str], ...]:
    from opencc import OpenCC

    return tuple(OpenCC(way).convert for way in ("t2s", "s2t"))


# --- the rule


def build(tagged: Tagged, sources: Sources, elsewhere: Right, unlisted: float) -> Lexicon:
    """The lexicon of a language: its closed words, and open ones that are ambiguous.

    Words with uses have the share of these that is closed. A word without uses is closed if
    lists are right about such words at least half of the time. ``elsewhere`` says how right the
    same packages are in other languages.
    """
    seen = tagged.entries()
    words = {word: one for word, one in seen.items() if one.is_closed or one.is_ambiguous}
    trust = partial(_trust, rightness(seen, sources), elsewhere)
    for word in sources.listed() - seen.keys():
        listed = Entry(trust(sources.pattern(word)), 0)
        if listed.is_closed:
            words[word] = listed
    known_open = {word for word, one in seen.items() if not one.is_closed}
    words |= dict.fromkeys(sources.reviewed - known_open - words.keys(), Entry(1.0, 0))
    words |= dict.fromkeys(sources.contractions, Entry(1.0, 0))
    for form, uses in tagged.forms.items():
        own, of_word = uses.entry(), words.get(lower(form), UNLISTED)
        if own is not None and is_apart(own, of_word):
            words[form] = own
    return Lexicon(unlisted, words)


def rightness(seen: Mapping[str, Entry], sources: Sources, most_uses: float = RARE) -> Right:
    """Counts of the words in ``seen`` with few uses, by pattern of the
    lists: closed ones, and all.
    """
    counts: dict[Pattern, tuple[int, int]] = {}
    for word in sources.listed() & seen.keys():
        if seen[word].uses <= most_uses:
            pattern = sources.pattern(word)
            closed, n = counts.get(pattern, (0, 0))
            counts[pattern] = (closed + seen[word].is_closed, n + 1)
    return counts


def add_up(parts: Iterable[Right]) -> Right:
    """The sum of ``parts``."""
    total: dict[Pattern, tuple[int, int]] = {}
    for part in parts:
        for pattern, (closed, n) in part.items():
            closed_before, n_before = total.get(pattern, (0, 0))
            total[pattern] = (closed_before + closed, n_before + n)
    return total


def _trust(here: Right, elsewhere: Right, pattern: Pattern) -> float:
    """Share of the unseen words of ``pattern`` that are closed.

    It is the share of this language's rare words, with ``PRIOR`` words of the share elsewhere.
    """
    closed, n = elsewhere.get(pattern, (0, 0))
    prior = (closed + 1) / (n + 2)
    closed, n = here.get(pattern, (0, 0))
    return (closed + PRIOR * prior) / (n + PRIOR)


# --- how good it is


@dataclass(slots=True)
class Score:
    """Open- and closed-class words of a text that is tagged, and how many are classed right."""

    n: int = 0
    right: int = 0
    closed: int = 0  # closed-class words
    closed_right: int = 0
    unlisted: int = 0  # words without an entry
    unlisted_open: int = 0

    def add(self, n: int, guess: str, is_closed: bool, is_listed: bool) -> None:
        """Count ``n`` words that are closed or open and were classed ``guess``."""
        is_right = guess == ("function" if is_closed else "content")
        self.n += n
        self.right += n * is_right
        self.closed += n * is_closed
        self.closed_right += n * (is_right and is_closed)
        self.unlisted += n * (not is_listed)
        self.unlisted_open += n * (not is_listed and not is_closed)

    @classmethod
    def sum(cls, parts: Iterable[Score]) -> Score:
        """All words of ``parts``."""
        rows = [astuple(part) for part in parts]
        return cls(*map(sum, zip(*rows, strict=True)))

    @property
    def share(self) -> float:
        """Share of all words that are classed right."""
        return self.right / self.n

    @property
    def open_share(self) -> float:
        """Share of the open-class words that are classed right."""
        return (self.right - self.closed_right) / (self.n - self.closed)

    @property
    def closed_share(self) -> float:
        """Share of the closed-class words that are classed right."""
        return self.closed_right / self.closed

    @property
    def unlisted_share(self) -> float:
        """Share of the words without an entry that are open (Laplace's rule)."""
        return (self.unlisted_open + 1) / (self.unlisted + 2)


@cache
def kind(form: str) -> str:
    """Class of ``form`` without a lexicon; all words are one class."""
    return lexicon.classify(form, special=False, starts=1.0, whole=1.0, words=None).name


def score(words: Lexicon, counts: Counts) -> Score:
    """Compare the classes of the open- and closed-class words in ``counts`` with their tags."""
    total = Score()
    for (form, tag), n in counts.items():
        if tag in CLOSED or tag in OPEN:
            name = kind(form)
            if name == "word":
                name = words.guess(form).name
            total.add(n, name, tag in CLOSED, words.entry(form) is not None)
    return total


def cross_validate(
    sentences: Sequence[Sentence], language: str, sources: Sources, elsewhere: Right
) -> Score:
    """Score of each part of ``sentences`` by a lexicon of all others, added up."""
    n, parts, whole = len(sentences), [], count(sentences)
    for fold in range(FOLDS):
        held_out = count(sentences[n * fold // FOLDS : n * (fold + 1) // FOLDS])
        words = build(Tagged(whole - held_out, language), sources, elsewhere, 1.0)
        parts.append(score(words, held_out))
    return Score.sum(parts)


# --- files and packages


def read_tagged(file: Path) -> list[Sentence]:
    """The sentences of a file of tagged words. Raises ``ConfigError`` for another file."""
    sentences: list[Sentence] = []
    try:
        for block in file.read_text("utf-8").strip().split("\n\n"):
            pairs = (line.split("\t") for line in block.splitlines())
            sentences.append([(form, tag) for form, tag in pairs])
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read as tagged words, which are a form, a tab and a tag on a line: "
            f"{error}"
        ) from error
    return sentences


def read_sources(language: str) -> Sources:
    """Word lists of ``language`` in the installed packages, and its reviewed words."""
    lists = {
        package: _cleaned(read()[language], language)
        for package, read in PACKAGES.items()
        if language in read()
    }
    reviewed = tomllib.loads(REVIEWED.read_text("utf-8"))
    archaic, rare, contractions = (
        _cleaned(reviewed[part].get(language, "").split(), language)
        for part in ("archaic", "rare", "contractions")
    )
    return Sources(lists, archaic | rare, contractions)


def _cleaned(words: Iterable[str], language: str) -> frozenset[str]:
    """``words`` as a lexicon has them, without those that are more or less than a word."""
    found = (lower(s) for word in words for s in scripts(normalised(word.strip()), language))
    return frozenset(filter(_is_word, found))


def _is_word(text: str) -> bool:
    """True if ``text`` has letters, and beside them only marks, joiners,
    apostrophes and hyphens.
    """
    kinds = [unicodedata.category(c)[0] for c in text if c not in "'-\u200c\u200d"]
    return "L" in kinds and {*kinds} <= {"L", "M"}


@cache
def _stopwords() -> dict[str, list[str]]:
    import stopwords

    codes = (code for code in stopwords.LANGUAGE_MAPPING if "-" not in code)
    return {code: list(stopwords.get_stopwords(code)) for code in codes}


@cache
def _stop_words() -> dict[str, list[str]]:
    import stop_words

    return {code: stop_words.get_stop_words(code) for code in stop_words.LANGUAGE_MAPPING}


@cache
def _stopwordsiso() -> dict[str, list[str]]:
    import stopwordsiso

    return {code: sorted(stopwordsiso.stopwords(code)) for code in stopwordsiso.langs()}


PACKAGES: dict[str, Callable[[], dict[str, list[str]]]] = {
    "stopwords": _stopwords,
    "stop-words": _stop_words,
    "stopwordsiso": _stopwordsiso,
}
"""Packages of word lists, in the order of a ``Pattern``: each gives its lists by language."""


# --- all languages


@dataclass(frozen=True)
class Language:
    """A language with tagged words."""

    code: str
    sentences: list[Sentence]
    counts: Counts
    tagged: Tagged
    sources: Sources
    seen: dict[str, Entry]

    def with_lists(self, packages: Iterable[str]) -> Sources:
        """Sources of a language that has the lists of ``packages`` alone."""
        lists = {name: self.sources.lists.get(name, frozenset()) for name in packages}
        return Sources(lists, frozenset(), frozenset())


def read_languages(folder: Path) -> list[Language]:
    """The languages with a file in ``folder``.

    Raises ``ConfigError`` if there are fewer than two.
    """
    found = []
    for file in sorted(folder.glob("*.tsv")):
        sentences = read_tagged(file)
        counts = count(sentences)
        tagged, sources = Tagged(counts, file.stem), read_sources(file.stem)
        found.append(Language(file.stem, sentences, counts, tagged, sources, tagged.entries()))
    if len(found) < 2:
        raise ConfigError(
            f"{folder} has {len(found)} files of tagged words, expected two or more, named by "
            "language, such as en.tsv"
        )
    return found


def measure(folder: Path, on_note: Callable[[str], None]) -> dict[str, Any]:
    """Build all lexicons from the tagged words in ``folder``, and score them by cross-validation.

    The result has the packed text, and for each language of ``folder`` the score of words held out
    and of lists alone.
    """
    tagged = read_languages(folder)
    lexicons, rows = {}, []
    for one in tagged:
        on_note(f"cross-validating {one.code}")
        elsewhere = _rightness_of([t for t in tagged if t is not one], one.sources.lists, RARE)
        held_out = cross_validate(one.sentences, one.code, one.sources, elsewhere)
        words = build(one.tagged, one.sources, elsewhere, held_out.unlisted_share)
        lexicons[one.code] = words
        alone = score_alone(one, tagged, tuple(one.sources.lists))
        rows.append(_row(one.code, words, held_out) | {"lists_only": alone.share})
    lexicons |= lexicons_without_tagged(tagged)
    return {"packed": lexicon.pack(lexicons, made_from(tagged)), "languages": rows}


def lexicons_without_tagged(tagged: Sequence[Language]) -> dict[str, Lexicon]:
    """Lexicons of the languages that have lists, but are not ``tagged``; none without words.

    A list is trusted as often as it is right about all words of tagged languages, rare or not.
    """
    found = {}
    trusted: dict[tuple[str, ...], tuple[Right, float]] = {}
    known = {code for read in PACKAGES.values() for code in read()}
    for code in sorted(known - {one.code for one in tagged}):
        sources = read_sources(code)
        packages = tuple(sources.lists)
        if packages not in trusted:
            found_alone = Score.sum(score_alone(one, tagged, packages) for one in tagged)
            right = _rightness_of(tagged, packages, math.inf)
            trusted[packages] = right, found_alone.unlisted_share
        words = build(Tagged({}, code), sources, *trusted[packages])
        if words.words:
            found[code] = words
    return found


def score_alone(one: Language, tagged: Sequence[Language], packages: tuple[str, ...]) -> Score:
    """Score of the classes of ``one``, built without its tagged words from
    lists of ``packages``.
    """
    elsewhere = _rightness_of([t for t in tagged if t is not one], packages, math.inf)
    words = build(Tagged({}, one.code), one.with_lists(packages), elsewhere, 1.0)
    return score(words, one.counts)


def _rightness_of(others: Iterable[Language], packages: Iterable[str], most_uses: float) -> Right:
    """Accuracy of the lists of ``packages`` in ``others``."""
    names = list(packages)
    return add_up(rightness(other.seen, other.with_lists(names), most_uses) for other in others)


def _row(code: str, words: Lexicon, found: Score) -> dict[str, Any]:
    return {
        "language": code,
        "n": found.n,
        "closed": found.closed,
        "entries": len(words.words),
        "right": found.share,
        "right_open": found.open_share,
        "right_closed": found.closed_share,
    }


def made_from(tagged: Iterable[Language]) -> Iterator[str]:
    """Lines that say what the packed file is built from."""
    yield f"tagged words of {' '.join(one.code for one in tagged)}"
    yield f"words reviewed by hand, in tests/bench/{REVIEWED.name}"
    yield ", ".join(f"{package} {version(package)}" for package in PACKAGES)


def packed_file() -> Path:
    """The packed words of this checkout."""
    return Path(lexicon.__file__).with_name(lexicon.PACKED)


def check(folder: Path) -> dict[str, Any]:
    """Score the packed lexicons over the tagged words in ``folder``, which may be others."""
    rows = []
    for file in sorted(folder.glob("*.tsv")):
        words = lexicon.find(file.stem)
        if words is None:
            raise ConfigError(f"{file}: {lexicon.why_none(file.stem)}")
        rows.append(
            _row(file.stem, words, score(words, count(read_tagged(file)))) | {"lists_only": None}
        )
    if not rows:
        raise ConfigError(f"{folder} has no files of tagged words, such as en.tsv")
    return {"languages": rows}


def render(result: dict[str, Any], console: Console) -> None:
    """Print a row for each language, and the mean of the languages."""
    table = Table(box=None, pad_edge=False)
    heads = ("language", "words", "closed", "entries", "right", "open", "closed", "lists only")
    for heading in heads:
        table.add_column(heading, justify="right" if table.columns else "left", no_wrap=True)
    rows = result["languages"]
    for row in rows:
        counts = (f"{row[name]:,}" for name in ("n", "closed", "entries"))
        table.add_row(row["language"], *counts, *_shares(row))
    names = ("right", "right_open", "right_closed", "lists_only")
    columns = ([row[name] for row in rows] for name in names)
    means = {
        name: None if None in column else fmean(column)
        for name, column in zip(names, columns, strict=True)
    }
    table.add_row("mean", "", "", "", *_shares(means))
    console.print(table)


def _shares(row: Mapping[str, Any]) -> Iterator[str]:
    for name in ("right", "right_open", "right_closed", "lists_only"):
        yield "" if row[name] is None else f"{row[name]:.3f}"
