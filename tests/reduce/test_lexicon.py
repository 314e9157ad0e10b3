"""Classes of types, by what a reader sees."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afn_ray.errors import ConfigError
from afn_ray.reduce.lexicon import classify, function_words, languages
from afn_ray.schema import CLASSES

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
    assert classify(text, special=False, starts_word=True, is_whole=True, language="en") == name


@pytest.mark.parametrize("text", ["ing", "the", "漢", "\u093f", "\ufffd", "a\ufffd", "1st"])
def test_a_piece_that_continues_words_is_a_fragment_whatever_it_spells(text: str) -> None:
    assert (
        classify(text, special=False, starts_word=False, is_whole=False, language="en")
        == "fragment"
    )


@pytest.mark.parametrize("name", ["punctuation", "number"])
def test_punctuation_and_numbers_are_so_inside_words_too(name: str) -> None:
    texts = [t for t in EXAMPLES[name] if t != "\u0301"]
    assert {
        classify(t, special=False, starts_word=False, is_whole=False, language="en") for t in texts
    } == {name}


def test_bytes_that_make_no_character_are_fragments_of_one() -> None:
    """Chinese in a byte-level tokenizer is not punctuation."""
    assert (
        classify("\ufffd", special=False, starts_word=True, is_whole=True, language="en")
        == "fragment"
    )


def test_function_words_are_those_of_the_language() -> None:
    words = {"und": "function", "Der": "function", "the": "content", "Haus": "content"}
    for text, name in words.items():
        assert classify(text, special=False, starts_word=True, is_whole=True, language="de") == name
    assert "und" not in function_words("en")
    assert {"de", "en", "fr"} <= set(languages()) and all(
        function_words(code) for code in languages()
    )
    assert all(word == word.strip().lower() for word in function_words("de"))


def test_an_unknown_language_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        function_words("xx")
    assert (
        str(caught.value) == f"no function words for language 'xx'; known: {', '.join(languages())}"
    )


@pytest.mark.parametrize("text", ["phil", "the", "漢", "1st", "naïve"])
def test_a_type_that_mostly_begins_longer_words_is_a_piece_whatever_it_spells(text: str) -> None:
    assert classify(text, special=False, starts_word=True, is_whole=False, language="en") == "piece"


@pytest.mark.parametrize("name", ["punctuation", "number"])
def test_punctuation_and_numbers_are_so_at_the_beginning_of_words_too(name: str) -> None:
    assert {
        classify(t, special=False, starts_word=True, is_whole=False, language="en")
        for t in EXAMPLES[name]
    } == {name}


@given(st.text(max_size=5), st.booleans(), st.booleans(), st.booleans())
def test_every_text_has_one_class(
    text: str, special: bool, starts_word: bool, is_whole: bool
) -> None:
    name = classify(
        text, special=special, starts_word=starts_word, is_whole=is_whole, language="en"
    )
    assert name in CLASSES and (name == "special") == special
