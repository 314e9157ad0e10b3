"""The words that are most and least surely HIGH."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from afn_ray.option_rules import AUTO_LANGUAGE
from afn_ray.query.database import Run
from afn_ray.query.expressions import is_high, lower_word
from afn_ray.reduce import lexicon
from afn_ray.reduce.language_uses import Uses
from afn_ray.reduce.stats import wilson
from afn_ray.schema import LANGUAGE
from afn_ray.show.figures import figure
from afn_ray.show.terminal_tables import print_whole, titled_table
from afn_ray.text import WORD_FORM, printable

SALIENT_WORDS = 10
SALIENT_MIN_N = 20
"""Least occurrences of a word to be ranked; fewer say too little."""


@dataclass(frozen=True, slots=True)
class SalientWord:
    """One word, in lower case, and how often the mean strength of its tokens is at or above Q3."""

    text: str
    n: int
    n_high: int
    median: float  # of the mean strengths of its occurrences
    low: float  # low and high: Wilson's 95 % interval of the share
    high: float


def salient_words(run: Run, layer: int) -> tuple[list[SalientWord], list[SalientWord]]:
    """Content words that are most surely and least surely HIGH.

    Words are ranked by the end of the interval nearer to the middle. A content word has
    the form ``WORD_FORM`` and is no closed-class word, by the languages of the documents that it
    occurs in or by the one that the run names. Reads the run's tokens once, or twice to count
    these.
    """
    ((q3,),) = run.sql(
        "SELECT q3 FROM labels WHERE layer = ? AND population = 'tokens'", [layer]
    ).fetchall()
    strength = f"mean_strength_{int(layer)}"
    query = f"""
        SELECT {lower_word("text")} AS spelled, count(*) AS n,
              count(*) FILTER ({is_high(strength, "$q3")}) AS n_high,
               quantile_disc({strength}, 0.5) AS median
        FROM words WHERE regexp_matches(text, $form) GROUP BY ALL HAVING n >= $least
    """  # noqa: S608 - the layer is a number
    rows = run.sql(query, {"q3": q3, "least": SALIENT_MIN_N, "form": WORD_FORM}).fetchall()
    words_of = _words_of(run)
    found = []
    for word, n, n_high, median in rows:
        words = words_of(word)
        if words is None or words.guess(word).name != "function":
            low, high = wilson(n_high, n)
            found.append(SalientWord(word, n, n_high, median, float(low), float(high)))
    most = sorted(found, key=lambda w: (-w.low, -w.n, w.text))[:SALIENT_WORDS]
    least = sorted(found, key=lambda w: (w.high, -w.n, w.text))[:SALIENT_WORDS]
    return most, least


def _words_of(run: Run) -> Callable[[str], lexicon.Words | None]:
    """Words by which a word of the run, in lower case, is classified."""
    language = run.info["config"]["language"]
    if language != AUTO_LANGUAGE:
        words = lexicon.find(language)
        return lambda word: words
    query = f"""
        SELECT {lower_word("text")} AS spelled, {LANGUAGE}, count(*)
              FROM words JOIN documents USING (doc)
        WHERE regexp_matches(text, $form) AND {LANGUAGE} IS NOT NULL
        GROUP BY spelled, {LANGUAGE}
        QUALIFY sum(count(*)) OVER (PARTITION BY spelled) >= $least
    """  # noqa: S608 - a name of ours
    counts: dict[str, dict[str, int]] = {}
    for word, spoken, n in run.sql(query, {"least": SALIENT_MIN_N, "form": WORD_FORM}).fetchall():
        counts.setdefault(word, {})[spoken] = n
    return lambda word: Uses(counts.get(word, {}))


def render_salient(run: Run, layer: int, console: Console) -> None:
    """Print the most and the least salient words, side by side."""
    table = titled_table(
        f"Words at layer {layer}, seen {SALIENT_MIN_N} times or more (HIGH: mean of the tokens at "
        "or above Q3)",
        "most salient",
        "n",
        "HIGH",
        "median",
        "least salient",
        "n",
        "HIGH",
        "median",
        left=1,
    )
    table.columns[4].justify = "left"
    for pair in zip(*salient_words(run, layer), strict=True):
        cells = [
            (Text(printable(w.text)), f"{w.n:,}", f"{w.n_high / w.n:.0%}", figure(w.median))
            for w in pair
        ]
        table.add_row(*cells[0], *cells[1])
    print_whole(table, console)
