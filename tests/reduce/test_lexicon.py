"""Classes of types, by what a reader sees, and the packed closed-class words."""

from __future__ import annotations

import tomllib
from hashlib import sha256
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afn_ray.classes import CLASSES, CLASSES_VERSION
from afn_ray.reduce import lexicon
from afn_ray.reduce.lexicon import Entry, Guess, Lexicon, classify, find, languages

TAGGED = [
    "ar",
    "de",
    "en",
    "es",
    "fi",
    "fr",
    "hi",
    "id",
    "it",
    "nl",
    "pl",
    "pt",
    "ru",
    "sv",
    "tr",
    "zh",
]
"""Languages whose words were counted in tagged text."""


def guess(
    text: str,
    language: str = "en",
    *,
    special: bool = False,
    starts: float = 1.0,
    whole: float = 1.0,
) -> Guess:
    return classify(text, special=special, starts=starts, whole=whole, words=find(language))


EXAMPLES = {
    "punctuation": [
        ".",
        "...",
        "$",
        "€",
        "—",
        "«",
        "。",
        "😀",
        "❤\ufe0f",
        "👩\u200d🚀",
        "+",
        "\u0301",
        "",
        "\n",
        "\u200d",
    ],
    "number": ["7", "1,000", "1.5", "10%", "²", "½", "Ⅻ", "٣", "①", "1\ufe0f\u20e3", "-3"],
    "function": ["the", "The", "AND", "of"],
    "content": [
        "lord",
        "LORD",
        "漢",
        "日本",
        "مرحبا",
        "हिन्दी",
        "e\u0301te\u0301",
        "1st",
        "covid-19",
        "naïve",
    ],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in EXAMPLES.items() for text in texts]
)
def test_class_of_a_type_that_starts_words(name: str, text: str) -> None:
    assert guess(text).name == name


@pytest.mark.parametrize("text", ["ing", "the", "漢", "\u093f", "\ufffd", "a\ufffd", "1st"])
def test_a_piece_that_continues_words_is_a_fragment_whatever_it_spells(text: str) -> None:
    assert guess(text, starts=0.0).name == "fragment"


@pytest.mark.parametrize("name", ["punctuation", "number"])
def test_punctuation_and_numbers_are_so_inside_words_too(name: str) -> None:
    texts = [t for t in EXAMPLES[name] if t != "\u0301"]
    assert {guess(t, starts=0.0).name for t in texts} == {name}


def test_bytes_that_make_no_character_are_fragments_of_one() -> None:
    """Chinese in a byte-level tokenizer is not punctuation."""
    assert guess("\ufffd").name == "fragment"


@pytest.mark.parametrize("text", ["phil", "the", "漢", "1st", "naïve"])
def test_a_type_that_mostly_begins_longer_words_is_a_piece_whatever_it_spells(text: str) -> None:
    assert guess(text, whole=0.25) == Guess("piece", 0.75)
    assert guess(text, starts=0.25, whole=0.25) == Guess("fragment", 0.75)
    assert guess(text, starts=0.5, whole=0.5) == guess(text)


@pytest.mark.parametrize("name", ["punctuation", "number"])
def test_punctuation_and_numbers_are_so_at_the_beginning_of_words_too(name: str) -> None:
    assert {guess(t, whole=0.0).name for t in EXAMPLES[name]} == {name}


@given(st.text(max_size=5), st.booleans(), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_every_text_has_one_class(
    text: str, special: bool, starts: float, whole: float, is_known: bool
) -> None:
    found = guess(text, "en" if is_known else "xx", special=special, starts=starts, whole=whole)
    assert found.name in CLASSES and (found.name == "special") == special
    assert 0 <= found.confidence <= 1
    assert is_known == (found.name != "word") or found.name not in ("content", "function", "word")


# --- the packed words


CLOSED = {
    "en": "us the of and shall will may must upon without unto thou thee thy ye hath one "
    "don't it's 's",
    "fr": "au aux du des l' qu’ le et",
    "pt": "dos da no pelo nos e",
    "es": "del al el y",
    "it": "della dell' nei il",
    "de": "im zum der und Der",
    "fi": "ettei ja",
    "zh": "的 這 这",
    "ar": "فيها وهو في",
    "sv": "och",
    "da": "og",
}


@pytest.mark.parametrize("language", CLOSED)
def test_closed_class_words_and_contractions_are_function(language: str) -> None:
    words = CLOSED[language].split()
    assert {w: guess(w, language).name for w in words} == dict.fromkeys(words, "function")


@pytest.mark.parametrize(
    ("language", "text"),
    [("en", "lord said went many US house"), ("de", "und Haus the"), ("fr", "maison dit")],
)
def test_other_words_are_content(language: str, text: str) -> None:
    open_words = [w for w in text.split() if (language, w) != ("de", "und")]
    assert {guess(w, language).name for w in open_words} == {"content"}


def test_contractions_that_a_tokenizer_cuts_at_the_apostrophe_are_function() -> None:
    cut = "don t isn t didn 't we 'll you ve he d I 'm they 're shan 't can 't it 's"
    assert {guess(part).name for part in cut.split()} == {"function"}
    assert guess("won").name == "content"  # mostly a verb


@pytest.mark.parametrize("text", ["will", "may", "like"])
def test_words_that_are_used_as_both_are_marked(text: str) -> None:
    assert guess(text).is_ambiguous and 0.5 <= guess(text).confidence < 0.99
    assert not guess("the").is_ambiguous and guess("the").confidence > 0.99
    assert not guess("xylophone").is_ambiguous and guess("xylophone").confidence > 0.9


def test_the_class_of_a_word_and_how_sure_it_is() -> None:
    words = {
        "both": Entry(0.5, 4),
        "mostly": Entry(0.25, 4),
        "once": Entry(1.0, 1),
        "the": Entry(0.995, 1000),
        "listed": Entry(0.75, 0),
        "us": Entry(1.0, 8),
        "US": Entry(0.0, 8),
    }
    found = Lexicon(0.875, words)
    assert found.guess("both") == Guess("function", 0.5, True)
    assert found.guess("Mostly") == Guess("content", 4 / 6, True)
    assert found.guess("once") == Guess("function", 2 / 3)
    assert found.guess("the") == Guess("function", 996 / 1002)
    assert found.guess("listed") == Guess("function", 0.75)
    assert found.guess("other") == Guess("content", 0.875)
    assert found.guess("us") == found.guess("Us") == Guess("function", 0.9)
    assert found.guess("US") == Guess("content", 0.9)


@pytest.mark.parametrize("text", ["’S", "-s", "S’", "s'", "‑s"])
def test_a_word_is_found_however_its_ends_and_letters_are_written(text: str) -> None:
    words = Lexicon(1.0, {"s": Entry(1.0, 1), "é": Entry(1.0, 1), "ile": Entry(1.0, 1)})
    assert words.guess(text).name == "function"
    assert words.guess("É").name == words.guess("İLE").name == "function"
    assert words.guess("--").name == "content"


def test_a_language_is_found_by_its_code_whatever_follows() -> None:
    assert find("pt-BR") is find("pt") is find("PT_br") is not None
    assert find("nn") is find("nb") is not None
    assert find("xx") is None and "known: ar, bg," in lexicon.why_none("xx")
    assert "language 'xx'" in lexicon.why_none("xx")


def test_without_closed_class_words_a_word_is_a_word() -> None:
    names = {text: guess(text, "xx").name for text in ("the", "lord", ".", "7", "�")}
    assert names == {
        "the": "word",
        "lord": "word",
        ".": "punctuation",
        "7": "number",
        "�": "fragment",
    }


def test_every_entry_of_the_packed_file_can_be_found() -> None:
    assert set(TAGGED) <= set(languages())
    for code in languages():
        words = find(code)
        assert words is not None and 0.5 < words.unlisted <= 1, code
        assert any(entry.is_closed for entry in words.words.values()), code
        for word, entry in words.words.items():
            assert words.entry(word) is entry and 0 <= entry.share <= 1, (code, word)
        seen = sum(entry.uses > 0 for entry in words.words.values())
        assert (seen > 100) == (code in TAGGED), code


def test_the_packed_file_is_part_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    data = project["tool"]["setuptools"]["package-data"]["afn_ray"]
    assert f"reduce/{lexicon.PACKED}" in data


def test_packed_lexicons_read_as_they_were() -> None:
    words = {"a": Entry(0.25, 8), "b-c": Entry(1.0, 0), "É": Entry(0.6667, 3)}
    given_ = {"aa": Lexicon(0.5, words), "b": Lexicon(0.9876, {})}
    assert lexicon.unpack(lexicon.pack(given_, ["x", "[y]"])) == given_


def test_other_words_are_another_version_of_the_classes() -> None:
    """A version that is part of finished runs' requests must not stand for other classes."""
    packed = (resources.files("afn_ray.reduce") / lexicon.PACKED).read_bytes()
    assert (CLASSES_VERSION, sha256(packed).hexdigest()[:12]) == (3, "7165f91152a9")
