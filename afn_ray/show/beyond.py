"""Two rankings of a run's words side by side: by HIGH share, and by HIGH share beyond frequency."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.text import Text

from afn_ray import notebook
from afn_ray.classes import CLASSES, RESERVED, upos_classes
from afn_ray.query.database import Run, folder_of
from afn_ray.reduce.stats import wilson
from afn_ray.show.terminal_tables import print_whole, titled_table
from afn_ray.store import manifest
from afn_ray.text import WORD_FORM, printable

SHOWN = 10
"""Number of words in each ranking."""
LEAST_N = 20
"""Least tokens of a word in a ranking; fewer say too little."""
COLUMNS = (
    "word",
    "class",
    "n",
    "share_high",
    "expected",
    "beyond",
    "beyond_low",
    "beyond_high",
    "n_effective",
)
"""Columns of ``word_vocabulary`` that the rankings read."""
MEANING = (
    "Rare words are HIGH more often, so a ranking by HIGH share alone follows rarity. Expected "
    "(exp.) is the HIGH share of other words as frequent, at the same positions, in documents as "
    "long; beyond is the HIGH share less that. A word whose interval of beyond is above 0 is "
    "salient for more than its frequency. Both rankings are by the lower end of a 95 % interval "
    f"clustered by document. A word is HIGH where its strongest token is; each occurs {LEAST_N} "
    "times or more."
)
"""Meaning of the difference, in words for people."""

NONE = f"no open-class word occurs {LEAST_N} times or more"
"""Says why there is no ranking of a small run."""


class RankedWord(NamedTuple):
    """A word in lower case, and what its controls make of its HIGH share."""

    text: str
    n: int
    share_high: float
    expected: float
    beyond: float
    low: float  # low and high: 95 % interval of ``beyond``, clustered by document
    high: float


RANKED = pa.schema(
    [
        ("ranking", pa.string()),
        ("word", pa.string()),
        ("n", pa.int64()),
        ("share_high", pa.float64()),
        ("expected", pa.float64()),
        ("beyond", pa.float64()),
        ("beyond_low", pa.float64()),
        ("beyond_high", pa.float64()),
    ]
)
"""Columns of ``Rankings.table``: those of the view ``word_salience``, and ``ranking``.

``ranking`` is "salient" (by HIGH share) or "beyond" (by HIGH share beyond frequency).
"""


@dataclass(frozen=True, slots=True)
class Rankings:
    """The first words by the lower ends of two intervals, both clustered by document.

    Those of ``beyond`` are HIGH more often than is expected, so it may have fewer.
    """

    salient: Sequence[RankedWord]  # of the HIGH share
    beyond: Sequence[RankedWord]  # of the difference from what is expected

    @property
    def table(self) -> pa.Table:
        """One row for each word of each ranking, with the columns of ``RANKED``."""
        rows = [("salient", *word) for word in self.salient]
        rows += [("beyond", *word) for word in self.beyond]
        named = [dict(zip(RANKED.names, row, strict=True)) for row in rows]
        return pa.Table.from_pylist(named, RANKED)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        return notebook.table("Salient words, and those beyond their frequency", self.table)


def rankings(run: str | manifest.RunFolder | Run, layer: int | None = None) -> Rankings | None:
    """The most salient open-class words of ``run`` at ``layer``; None for a run without salience.

    ``run`` is a run's URI, a store's URI for its latest complete run, or a run. ``layer`` None is
    the deepest. Reads one table. A word has the form ``WORD_FORM``. Raises ``StoreError`` if there
    is no such run.
    """
    run = folder_of(run)
    if "word_vocabulary" not in run.info["tables"]:
        return None
    if layer is None:
        layer = run.info["layers"][-1]
    is_shown = (pc.field("layer") == layer) & (pc.field("n") >= LEAST_N)
    is_shown &= pc.field("word").is_valid()
    words = manifest.read_table(run, "word_vocabulary", COLUMNS, is_shown)
    if "expected" not in words.column_names:
        return None
    words = words.filter(pc.match_substring_regex(words["word"], WORD_FORM))
    classes = words["class"].unique().to_pylist()
    is_open = pc.field("class").isin(sorted(_open_classes(classes)))
    rows = words.filter(is_open).to_pylist()
    n = np.array([row["n_effective"] for row in rows])
    share_high = np.array([row["share_high"] for row in rows])
    low, _ = wilson(share_high * n, n)
    return Rankings(
        _first(zip(low.tolist(), rows, strict=True)),
        _first((row["beyond_low"], row) for row in rows if row["beyond"] > 0),
    )


def _open_classes(classes: Collection[str]) -> set[str]:
    """Those of ``classes`` that words of the rankings may have.

    Of tags that are not those of UPOS, nothing is known, so every one may.
    """
    tags = set(classes) - {*CLASSES, *RESERVED}
    of_upos = upos_classes(tags)
    if of_upos:
        tags = {tag for tag, kind in of_upos.items() if kind == "content"}
    return tags | {"content", "word"}


def _first(rows: Iterable[tuple[float, dict[str, Any]]]) -> list[RankedWord]:
    """The first words by the lower ends that are given with them, the greatest first."""
    ordered = sorted(rows, key=lambda pair: (-pair[0], -pair[1]["n"], pair[1]["word"]))
    return [
        RankedWord(
            row["word"],
            row["n"],
            row["share_high"],
            row["expected"],
            row["beyond"],
            row["beyond_low"],
            row["beyond_high"],
        )
        for _, row in ordered[:SHOWN]
    ]


def render_rankings(run: str | manifest.RunFolder, layer: int, console: Console) -> None:
    """Print both rankings and what their difference means; nothing for a run without salience."""
    found = rankings(run, layer)
    if found is None:
        return
    title = f"Salient words at layer {layer}, and those salient beyond their frequency"
    if not found.salient:
        console.print(f"{title}: {NONE}.", markup=False, soft_wrap=True)
        return
    table = titled_table(
        title,
        "salient",
        "n",
        "HIGH",
        "exp.",
        "beyond frequency",
        "n",
        "HIGH",
        "exp.",
        "beyond",
    )
    table.columns[4].justify = "left"
    for by_share, by_difference in zip_longest(found.salient, found.beyond):
        table.add_row(*_cells(by_share)[:4], *(_cells(by_difference) if by_difference else ()))
    print_whole(table, console)
    console.print(MEANING, markup=False, soft_wrap=True)


def _cells(word: RankedWord) -> tuple[Text, str, str, str, str]:
    return (
        Text(printable(word.text)),
        f"{word.n:,}",
        f"{word.share_high:.0%}",
        f"{word.expected:.0%}",
        f"{word.beyond:+.0%}",
    )
