"""The closed-class words that are built from tagged words and lists, and how they are scored."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from afn_ray.errors import ConfigError
from afn_ray.reduce import lexicon
from afn_ray.reduce.lexicon import Entry, Lexicon
from bench import commands, lexicons
from bench.lexicons import Sentence, Sources, Tagged, count

NOTHING = frozenset[str]()
GUIDE = Path(__file__).parents[2] / "infra" / "guide" / "signals.md"


def tagged(text: str) -> list[Sentence]:
    """Sentences of ``text``, whose words are written word/TAG, one sentence a line."""
    return [
        [tuple(word.split("/")) for word in line.split()]  # type: ignore[misc]
        for line in text.splitlines()
    ]


def built(
    text: str,
    *lists: str,
    reviewed: str = "",
    contractions: str = "",
    elsewhere: lexicons.Right | None = None,
) -> Lexicon:
    named = {str(at): frozenset(words.split()) for at, words in enumerate(lists)}
    sources = Sources(named, frozenset(reviewed.split()), frozenset(contractions.split()))
    return lexicons.build(Tagged(count(tagged(text)), "en"), sources, elsewhere or {}, 0.9)


def test_a_word_is_closed_where_at_least_half_of_its_uses_are() -> None:
    words = built("like/ADP Like/VERB like/SCONJ like/VERB the/DET go/VERB go/ADP go/VERB x/SYM")
    assert words.words == {"like": Entry(0.5, 4), "the": Entry(1.0, 1), "go": Entry(1 / 3, 3)}
    assert words.guess("like").name == "function" and words.guess("go").name == "content"
    assert words.guess("x") == ("content", 0.9, False)


def test_only_open_words_that_are_never_closed_are_left_out() -> None:
    rare = "run/VERB " * 100 + "run/PART"
    assert built(rare + " dog/NOUN").words == {}
    assert built("run/VERB " * 99 + "run/PART").words == {"run": Entry(0.01, 100)}


def test_a_list_is_trusted_as_often_as_it_is_right_and_the_tagged_words_know_better() -> None:
    text = "the/DET a/DET of/ADP said/VERB"
    good, bad = "the a of said whereas", "the said went going said"
    words = built(text, good, "")
    # three of four rare words are closed; five more words of no known list count a half each
    assert words.words["whereas"] == Entry((3 + 5 * 0.5) / 9, 0)
    assert "said" not in words.words
    assert "whereas" not in built(text, "said whereas").words
    assert "whereas" in built(text, "said whereas", elsewhere={(True,): (98, 98)}).words
    assert "whereas" not in built(text, good, elsewhere={(True,): (0, 98)}).words
    assert "went" not in built(text, good, bad, elsewhere={(False, True): (2, 8)}).words


def test_only_rare_words_count_for_trust() -> None:
    seen = Tagged(count(tagged("the/DET " * 4 + "a/DET " * 3 + "go/VERB")), "en").entries()
    sources = Sources({"x": frozenset(("the", "a", "go", "unseen"))}, NOTHING, NOTHING)
    assert lexicons.rightness(seen, sources) == {(True,): (1, 2)}
    assert lexicons.rightness(seen, sources, 4) == {(True,): (2, 3)}
    both = lexicons.add_up([{(True,): (1, 2)}, {(True,): (3, 4), (False,): (0, 1)}])
    assert both == {(True,): (4, 6), (False,): (0, 1)}


def test_reviewed_words_are_closed_unless_known_as_open_and_contractions_always() -> None:
    words = built("art/NOUN dos/NOUN", reviewed="thou art", contractions="dos")
    assert words.words == {"thou": Entry(1.0, 0), "dos": Entry(1.0, 0)}


def test_a_numeral_counts_as_closed_if_it_is_a_pronoun_too() -> None:
    words = built("one/NUM one/NUM one/NOUN one/PRON two/NUM two/NUM", "two")
    assert words.words == {"one": Entry(0.75, 4)}


def test_a_form_with_capitals_has_a_class_of_its_own_if_it_is_used_often_enough() -> None:
    text = "us/PRON us/PRON us/PRON us/PRON US/PROPN US/PROPN US/PROPN Us/PRON The/DET"
    words = built(text)
    assert words.words["US"] == Entry(0.0, 3) and words.words["us"] == Entry(1.0, 5)
    assert words.guess("US").name == "content" and words.guess("uS").name == "function"
    assert "The" not in words.words and words.guess("THE").name == "function"
    fewer = built(text.replace("US/PROPN ", "", 1)).words
    assert "US" not in fewer and fewer["us"] == Entry(5 / 7, 7)
    assert built("May/PROPN may/AUX MAY/AUX").words["may"] == Entry(2 / 3, 3)
    assert built("OF/ADP").words == {"of": Entry(1.0, 1)}


def test_chinese_words_are_there_in_both_scripts() -> None:
    pytest.importorskip("opencc")
    words = lexicons.build(
        Tagged({("這", "DET"): 1, ("说", "VERB"): 1}, "zh"), Sources({}, NOTHING, NOTHING), {}, 1.0
    )
    assert words.words == {"這": Entry(1.0, 1), "这": Entry(1.0, 1)}


def test_the_score_is_that_of_a_count_by_hand() -> None:
    words = Lexicon(1.0, {"the": Entry(1.0, 1), "in": Entry(1.0, 1)})
    found = lexicons.score(
        words, count(tagged("the/DET dog/NOUN 7/NUM ./PUNCT\nin/ADV of/ADP 5/NOUN"))
    )
    assert (found.n, found.right, found.closed, found.closed_right) == (5, 2, 2, 1)
    assert (found.share, found.open_share, found.closed_share) == (0.4, 1 / 3, 0.5)
    assert (found.unlisted, found.unlisted_open, found.unlisted_share) == (3, 2, 3 / 5)


def test_what_is_held_out_is_not_learnt_from() -> None:
    """Each fold has a word of its own, and the word that all have."""
    sentences = tagged("\n".join(f"w{i}/DET the/DET dog/NOUN" for i in range(20)))
    found = lexicons.cross_validate(sentences, "en", Sources({}, NOTHING, NOTHING), {})
    assert (found.n, found.closed, found.closed_right, found.right) == (60, 40, 20, 40)
    seen = lexicons.build(Tagged(count(sentences), "en"), Sources({}, NOTHING, NOTHING), {}, 1.0)
    assert lexicons.score(seen, count(sentences)).right == 60


def test_the_lists_of_the_packages_are_words_of_their_language() -> None:
    sources = lexicons.read_sources("fr")
    assert list(sources.lists) == list(lexicons.PACKAGES)
    assert all({"le", "avec"} <= words for words in sources.lists.values())
    assert "dos" not in sources.contractions and {"au", "du"} <= sources.contractions
    assert all(
        w == lexicon.lower(lexicon.normalised(w)) and len(w.split()) == 1 for w in sources.listed()
    )
    assert {"thou", "unto"} <= lexicons.read_sources("en").reviewed
    assert list(lexicons.read_sources("sw").lists) == ["stopwordsiso"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tagged words of two languages."""
    folder = tmp_path_factory.mktemp("tagged")
    for name, line in (("en", "The\tDET\ndog\tNOUN\n"), ("fr", "le\tDET\nchien\tNOUN\n")):
        (folder / f"{name}.tsv").write_text("\n".join([line] * 20), "utf-8")
    return folder


def test_the_command_builds_every_language_and_writes_only_if_asked(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "packed.tsv"
    monkeypatch.setattr(lexicons, "packed_file", lambda: file)
    monkeypatch.setattr(lexicons, "PACKAGES", {"a": lambda: {"en": ["the"], "da": ["the", "og"]}})
    monkeypatch.setattr(lexicons, "version", lambda package: "1")
    for flags in ([], ["--write"]):
        assert not file.exists()
        with pytest.raises(SystemExit) as end:
            commands.main(["lexicons", str(folder), *flags])
        assert end.value.code in (0, None)
        assert "mean" in capsys.readouterr().out
    text = file.read_text("utf-8")
    assert "# tagged words of en fr\n" in text and "# a 1\n" in text
    found = lexicon.unpack(text)
    assert set(found) == {"en", "fr", "da"}
    assert found["en"].words["the"] == Entry(1.0, 20)
    assert found["da"].words["og"].uses == 0


def test_packed_lists_are_scored_over_other_tagged_words(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        commands.main(["lexicons", str(folder), "--check"])
    assert "1.000" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"has no files of tagged words"):
        lexicons.check(tmp_path)
    (tmp_path / "xx.tsv").write_text("a\tDET\n")
    with pytest.raises(ConfigError, match=r"xx\.tsv: there are no closed-class words"):
        lexicons.check(tmp_path)
    with pytest.raises(ConfigError, match=r"has 1 files of tagged words, expected two"):
        lexicons.measure(tmp_path, print)
    (tmp_path / "yy.tsv").write_text("a\n")
    with pytest.raises(ConfigError, match=r"yy\.tsv cannot be read as tagged words"):
        lexicons.measure(tmp_path, print)


TAGGED = Path(os.environ.get("AFN_TAGGED", Path(__file__).parents[3] / "shared" / "ud"))
"""Folder of the tagged words, which are no part of the repository."""


@pytest.mark.skipif(not TAGGED.is_dir(), reason=f"there are no tagged words in {TAGGED}")
def test_the_packed_file_is_what_the_tagged_words_give() -> None:
    made = lexicons.measure(TAGGED, print)
    assert made["packed"] == lexicons.packed_file().read_text("utf-8")
    shares = {row["language"]: row["right"] for row in made["languages"]}
    assert len(shares) == 16 and shares["en"] >= 0.96 and min(shares.values()) >= 0.88
    assert sum(shares.values()) / 16 >= 0.94
    written = guide_shares(GUIDE.read_text("utf-8"))
    assert written == {code: f"{share:.3f}" for code, share in shares.items()}


def test_the_guide_lists_the_languages_and_no_others() -> None:
    page = GUIDE.read_text("utf-8")
    _, _, rest = page.partition("more languages the words come from stop lists alone")
    alone = re.findall(r"`(\w+)`", rest.partition(".\n")[0])
    assert sorted([*alone, *guide_shares(page)]) == lexicon.languages()


def guide_shares(page: str) -> dict[str, str]:
    """The share classed right of each language in the guide's table."""
    return dict(re.findall(r"^\| `(\w\w)` \([\w-]+\) \| [\d,]+ \| (0\.\d+) \|", page, re.M))
