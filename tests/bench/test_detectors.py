"""The texts that detectors of language are measured with, and the figures of one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from afn_ray.errors import ConfigError
from bench import commands, detectors
from conftest import printed

WORDS = {
    "en": "the house of my father is in the old town and we went there with all our children",
    "de": "das Haus von meinem Vater ist in der alten Stadt und wir gingen mit allen Kindern hin",
}


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    """Twenty sentences of each language, and of Chinese."""
    rng = random.Random(0)
    for code, words in (
        WORDS | {"zh": "我们 今天 都 在 北京 的 大学 里 学习 中文 和 历史"}
    ).items():
        sentences = []
        for _ in range(20):
            forms = [*rng.sample(words.split(), len(words.split())), "."]
            sentences.append("\n".join(f"{form}\tX" for form in forms))
        (tmp_path / f"{code}.tsv").write_text("\n\n".join(sentences), "utf-8")
    return tmp_path


def test_texts_are_whole_words_of_the_length_asked_for(tagged: Path) -> None:
    texts = detectors.texts_of(tagged / "en.tsv", 40, 5)
    assert len(texts) == 5 and all(30 <= len(text) <= 40 for text in texts)
    assert {word for text in texts for word in text.split()} <= {*WORDS["en"].split()}
    assert texts == detectors.texts_of(tagged / "en.tsv", 40, 5)
    dense = detectors.texts_of(tagged / "zh.tsv", 40, 5)
    assert {len(text) for text in dense} == {13} and not any(" " in text for text in dense)


def test_shares_of_right_and_unknown_answers_and_the_worst_language(tagged: Path) -> None:
    texts = [("en", "the house"), ("en", "12"), ("de", "das Haus ist alt"), ("de", "my house")]
    answers = {"the house": "en", "12": "unknown", "das Haus ist alt": "de", "my house": "en"}
    row = detectors._row("x", lambda text: answers[text], 20, texts)
    assert (row["right"], row["unknown"], row["worst_right"]) == (0.5, 0.25, 0.5)
    row = detectors._row("x", lambda text: "en", 20, texts)
    assert (row["right"], row["worst"], row["worst_right"]) == (0.5, "de", 0.0)


def test_every_length_is_measured_and_printed(
    tagged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detectors, "OTHERS", {"no-such-package": detectors._pycld2})
    monkeypatch.setattr(detectors, "LENGTHS", (20, 80))
    notes: list[str] = []
    result = detectors.measure(tagged, 4, notes.append)
    own = [row for row in result["rows"] if row["detector"] == "afn-ray"]
    assert [row["length"] for row in own] == [20, 80] and own[1]["right"] > 0.9
    assert "no-such-package is not installed, and is left out" in notes
    assert "afn-ray" in printed(detectors.render, result)
    with pytest.raises(ConfigError, match=r"no files of tagged words"):
        detectors.measure(tagged / "none", 4, notes.append)


def test_the_command_takes_a_folder() -> None:
    args = commands.parser().parse_args(["languages", "../shared/ud"])
    assert (args.what, args.tagged, args.repeat) == ("languages", Path("../shared/ud"), 150)
