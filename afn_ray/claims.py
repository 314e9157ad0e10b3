"""What is claimed of token activation strength, each figure beside its control, with an interval over documents.

Claims are those of arXiv:2605.22377; what is measured here says neither yes nor no. Every figure is of the tokens
that are not special. Intervals are the 2.5 and 97.5 % points of ``REPLICATES`` bootstrap samples of documents: tokens
of one document are no independent draws, so intervals over tokens would be too narrow. Documents beyond ``GROUPS`` are
drawn in that many groups; where a figure goes by ranks, ranks and bins are those of the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table

from afn_ray.query import Run

GROUPS = 500
REPLICATES = 1000
BINS = 512
"""Of a variable's values, for intervals of an AUC; the AUC itself goes by every distinct value."""
SEED = 0

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that bears on a claim."""

    claim: str
    what: str
    layer: int | None
    value: float
    low: float
    high: float  # of the 95 % interval
    n: int  # tokens that it rests on
    is_control: bool


CLAIMS = {
    "classes": "Content words are HIGH more often than function words and punctuation",
    "shift": "HIGH tokens dominate what a layer changes",
    "layers": "One layer separates best, and HIGH is stable around it",
    "types": "Strength is of a word in its context, not of the word",
    "frequency": "Strength is more than frequency, position or length",
    "dimensions": "Strength is of the whole state, not of a few dimensions",
    "sinks": "A few tokens do not make the figures",
}
"""Each claim with its sentence; figures of a claim stand beside what else would give them."""


def claims(run: Run) -> list[Figure]:
    """Every figure that the signals of ``run`` allow, claim by claim. Raises ``QueryError`` for a query that takes too
    long: ``open_run(..., timeout_s=...)`` gives it more."""
    layers: list[int] = list(run.info["layers"])
    recorded = set(run.sql("FROM tokens LIMIT 0").columns)
    found = [
        *_classes(run, layers, recorded), *_shift(run, layers, recorded), *_layers(run, layers),
        *_types(run, layers), *_ranks(run, layers), *_dimensions(run, layers, recorded), *_sinks(run, layers),
    ]  # fmt: skip
    return sorted(found, key=lambda f: list(CLAIMS).index(f.claim))


# --- the bootstrap ---------------------------------------------------------------------------------------


def _group(run: Run) -> str:
    """SQL of the number of a token's group of documents, from 0."""
    ((n,),) = run.sql("SELECT count(*) FROM documents").fetchall()
    return "doc" if n <= GROUPS else f"(hash(doc) % {GROUPS})::BIGINT"


def _weights(num_groups: int) -> Floats:
    """How often each group is drawn in each replicate, [REPLICATES, num_groups]."""
    draws = np.random.default_rng(SEED).multinomial(num_groups, np.full(num_groups, 1 / num_groups), REPLICATES)
    return draws.astype(np.float64)


def _bootstrap(sums: Floats, statistic: Callable[[Floats], Floats]) -> tuple[float, float, float]:
    """``statistic`` of the sums over all groups, and its interval. ``sums`` [n_groups, ...] add up; ``statistic``
    takes [n, ...] and gives [n]."""
    value = float(statistic(sums.sum(axis=0, keepdims=True))[0])
    drawn = np.tensordot(_weights(len(sums)), sums, axes=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        replicates = statistic(drawn)
    replicates = replicates[np.isfinite(replicates)]
    if not len(replicates):
        return value, math.nan, math.nan
    low, high = np.quantile(replicates, [0.025, 0.975])
    return value, float(low), float(high)


def _ratio(over: int, under: int) -> Callable[[Floats], Floats]:
    return lambda s: np.asarray(s[:, over] / s[:, under])


def _sums(run: Run, select: Sequence[str], source: str) -> Floats:
    """``select`` (SQL aggregates) of ``source`` by group of documents, [n_groups, n_select]."""
    columns = ", ".join(f"({s})::DOUBLE AS c{i}" for i, s in enumerate(select))
    rows = run.sql(f"SELECT {columns} FROM {source} GROUP BY {_group(run)}").fetchall()  # noqa: S608
    return np.array(rows, np.float64).reshape(-1, len(select))


NORMAL = "(FROM tokens WHERE NOT is_special)"


# --- classes ---------------------------------------------------------------------------------------------


def _classes(run: Run, layers: Sequence[int], recorded: set[str]) -> Iterator[Figure]:
    """Shares of HIGH by class and the AUC of content against function words and punctuation, by strength at every
    layer and by what else could tell them apart."""
    deepest = layers[-1]
    variables: list[tuple[str, int | None, str]] = [("strength", k, f"strength_{k}") for k in layers]
    variables += [("rarity (idf)", None, "idf")]
    for signal, name in (("attention", "attention received"), ("attention_norm", "norm-weighted attention")):
        variables += [(name, k, f"{signal}_{k}") for k in layers if f"{signal}_{k}" in recorded]
    for name, layer, column in variables:
        is_control = name != "strength" or layer == 0
        counts, q3 = _by_class(run, column, deepest)
        of_content, of_others = counts.get("content"), counts.get("others")
        if of_content is None or of_others is None:
            continue
        yield _auc_figure(run, name, layer, column, deepest, counts, is_control)
        sums = _sums(
            run,
            [x for c in ("content", "function", "punctuation", None)
             for where in (f" FILTER (class = '{c}')" if c else "",)
             for x in (f"count_if({column} >= {q3!r}::FLOAT){where}" if column != "idf"
                       else f"count_if({column} >= {q3!r}::DOUBLE){where}", f"count(*){where}")],
            _with_class(deepest),
        )  # fmt: skip
        for at, kind in enumerate(("content", "function", "punctuation", "all tokens")):
            if n := int(sums[:, 2 * at + 1].sum()):
                figures = _bootstrap(sums, _ratio(2 * at, 2 * at + 1))
                yield Figure("classes", f"{name}: {kind} at or above its Q3", layer, *figures, n, is_control)


def _with_class(layer: int) -> str:
    """Tokens with class and idf of their types; ``strength`` and whatever else is recorded beside them."""
    return (
        f"(FROM tokens JOIN (SELECT token_id, class, idf FROM vocabulary WHERE layer = {layer} "  # noqa: S608
        "AND class <> 'special') USING (token_id) WHERE NOT is_special)"
    )


def _by_class(run: Run, column: str, layer: int) -> tuple[dict[str, tuple[Floats, Floats]], float]:
    """Distinct values with their counts, of content and of function words and punctuation; and Q3 of all tokens."""
    rows = run.sql(
        f"SELECT {column}, count(*), count(*) FILTER (class = 'content'), "  # noqa: S608
        f"count(*) FILTER (class IN ('function', 'punctuation')) FROM {_with_class(layer)} GROUP BY 1 ORDER BY 1"
    ).fetchall()
    table = np.array(rows, np.float64)
    upto = np.cumsum(table[:, 1])
    q3 = float(table[np.searchsorted(upto, math.ceil(0.75 * upto[-1])), 0])
    found = {}
    for at, name in ((2, "content"), (3, "others")):
        if table[:, at].sum():
            found[name] = (table[:, 0], table[:, at])
    return found, q3


def _auc(content: Floats, others: Floats) -> Floats:
    """Chance that a draw of ``content`` lies above one of ``others``, equal ones counting half; counts [n, bins] of
    ascending values -> [n]."""
    below = np.cumsum(others, axis=1) - others
    wins = (content * (below + others / 2)).sum(axis=1)
    return np.asarray(wins / (content.sum(axis=1) * others.sum(axis=1)))


def _auc_figure(
    run: Run, what: str, layer: int | None, column: str, deepest: int,
    counts: dict[str, tuple[Floats, Floats]], is_control: bool,
) -> Figure:  # fmt: skip
    values, content = counts["content"]
    others = counts["others"][1]
    exact = float(_auc(content[None], others[None])[0])
    upto = np.cumsum(content + others)
    low, high = (float(values[np.searchsorted(upto, q * upto[-1])]) for q in (0.001, 0.999))
    width = (high - low) / (BINS - 2) or 1.0
    position = f"least({BINS - 1}, greatest(0, 1 + floor(({column} - {low!r}) / {width!r})))::INTEGER"
    rows = run.sql(
        f"SELECT {_group(run)} AS g, {position} AS bin, class = 'content' AS is_content, count(*) "  # noqa: S608
        f"FROM {_with_class(deepest)} WHERE class IN ('content', 'function', 'punctuation') GROUP BY ALL"
    ).fetchall()
    groups, at = np.unique([r[0] for r in rows], return_inverse=True)
    binned = np.zeros((len(groups), 2, BINS))
    kinds, bins, n_of = (np.array([int(r[i]) for r in rows]) for i in (2, 1, 3))
    np.add.at(binned, (at, kinds, bins), n_of)
    coarse, *interval = _bootstrap(binned, lambda s: _auc(s[:, 1], s[:, 0]))
    least, most = (exact + x - coarse for x in interval)  # bins move the AUC a little, and all replicates alike
    n = int(content.sum() + others.sum())
    return Figure("classes", f"{what}: AUC of content against function words and punctuation", layer, exact, least,
                  most, n, is_control)  # fmt: skip


# --- shift, layers, dimensions, sinks --------------------------------------------------------------------


def _shift(run: Run, layers: Sequence[int], recorded: set[str]) -> Iterator[Figure]:
    for k in layers:
        if f"shift_{k}" not in recorded:
            continue
        sums = _sums(
            run, [f"sum(shift_{k}::DOUBLE) FILTER (high_{k})", f"sum(shift_{k}::DOUBLE)", f"count_if(high_{k})",
                  "count(*)"], NORMAL,
        )  # fmt: skip
        sums = np.nan_to_num(sums)  # a group without a HIGH token has no sum
        n = int(sums[:, 3].sum())
        yield Figure("shift", "HIGH tokens' share of the shift", k, *_bootstrap(sums, _ratio(0, 1)), n, False)
        yield Figure("shift", "HIGH tokens' share of the tokens", k, *_bootstrap(sums, _ratio(2, 3)), n, True)


def _layers(run: Run, layers: Sequence[int]) -> Iterator[Figure]:
    for a, b in pairwise(layers):
        sums = _sums(
            run, [f"count_if(high_{a} AND high_{b})", f"count_if(high_{a} OR high_{b})", "count(*)"], NORMAL
        )  # fmt: skip
        n = int(sums[:, 2].sum())
        what = f"HIGH tokens in common with layer {a} (Jaccard)"
        yield Figure("layers", what, b, *_bootstrap(sums, _ratio(0, 1)), n, False)
        share = _bootstrap(sums, lambda s: (s[:, 0] + s[:, 1]) / 2 / s[:, 2])[0]
        yield Figure("layers", f"the same of layer {a}, if drawn by chance", b, share / (2 - share), math.nan, math.nan,
                     n, True)  # fmt: skip


def _types(run: Run, layers: Sequence[int]) -> Iterator[Figure]:
    """Eta squared: the share of the variance of strength that is between types."""
    for k in layers:
        rows = run.sql(
            f"SELECT {_group(run)} AS g, token_id, count(*), sum(strength_{k}::DOUBLE), "  # noqa: S608
            f"sum(strength_{k}::DOUBLE ** 2) FROM {NORMAL} GROUP BY ALL"
        ).to_arrow_table()
        g, types, n, total, squares = (rows.column(i).to_numpy() for i in range(5))
        _, g = np.unique(g, return_inverse=True)
        num_types, types = len(np.unique(types)), np.unique(types, return_inverse=True)[1]

        def eta(weights: Floats) -> float:
            w = weights[g]  # noqa: B023 - called before the next layer
            by_type = [np.bincount(types, w * x, num_types) for x in (n, total)]  # noqa: B023
            count, mean = (w * n).sum(), (w * total).sum() / (w * n).sum()  # noqa: B023
            there = by_type[0] > 0
            between = (by_type[1][there] ** 2 / by_type[0][there]).sum() - count * mean**2
            return float(between / ((w * squares).sum() - count * mean**2))  # noqa: B023

        ones = np.ones(g.max() + 1)
        replicates = [eta(w) for w in _weights(len(ones))[:: REPLICATES // 200]]
        low, high = np.quantile(replicates, [0.025, 0.975])
        chance = (num_types - 1) / max(1, int(n.sum()) - 1)
        yield Figure("types", "variance of strength between types (eta squared)", k, eta(ones), float(low), float(high),
                     int(n.sum()), False)  # fmt: skip
        yield Figure("types", "the same, if types had nothing to do with it", k, chance, math.nan, math.nan,
                     int(n.sum()), True)  # fmt: skip


RANKED = {
    "how often the type occurs": "n",
    "position in the document": "position",
    "tokens of the document": "length",
}


def _ranks(run: Run, layers: Sequence[int]) -> Iterator[Figure]:
    """Spearman's correlation of strength with what has nothing to do with context."""
    deepest = layers[-1]
    source = f"""(
        SELECT t.*, v.n, d.n_tokens AS length FROM tokens t
        JOIN (SELECT token_id, n FROM vocabulary WHERE layer = {deepest} AND class <> 'special') v USING (token_id)
        JOIN (SELECT doc, n_tokens FROM documents) d USING (doc) WHERE NOT is_special
    )"""  # noqa: S608
    for k in layers:
        for name, column in RANKED.items():
            rank = "(sum(count(*)) OVER (ORDER BY {0}) - (count(*) - 1) / 2) / sum(count(*)) OVER ()"
            ranked = f"""(
                WITH t AS MATERIALIZED (SELECT doc, strength_{k} AS a, {column} AS b FROM {source}),
                xs AS (SELECT a, {rank.format("a")} AS x FROM t GROUP BY a),
                ys AS (SELECT b, {rank.format("b")} AS y FROM t GROUP BY b)
                SELECT doc, x::DOUBLE AS x, y::DOUBLE AS y FROM t JOIN xs USING (a) JOIN ys USING (b)
            )"""  # noqa: S608
            sums = _sums(run, ["count(*)", "sum(x)", "sum(y)", "sum(x * x)", "sum(y * y)", "sum(x * y)"], ranked)

            def spearman(s: Floats) -> Floats:
                n, x, y, xx, yy, xy = s.T
                return np.asarray((n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y)))

            n = int(sums[:, 0].sum())
            figures = _bootstrap(sums, spearman)
            yield Figure("frequency", f"Spearman's rho of strength and {name}", k, *figures, n, False)


def _dimensions(run: Run, layers: Sequence[int], recorded: set[str]) -> Iterator[Figure]:
    for k in layers:
        if f"strength_trimmed_{k}" not in recorded:
            continue
        ((q3,),) = run.sql(
            f"SELECT q3 FROM signals WHERE signal = 'strength_trimmed' AND layer = {k}"  # noqa: S608
        ).fetchall()
        trimmed = f"strength_trimmed_{k} >= {q3!r}::FLOAT"
        sums = _sums(
            run, [f"sum(strength_{k}::DOUBLE ** 2 - strength_trimmed_{k}::DOUBLE ** 2)",
                  f"sum(strength_{k}::DOUBLE ** 2)", f"count_if(high_{k} AND {trimmed})",
                  f"count_if(high_{k} OR {trimmed})", "count(*)"], NORMAL,
        )  # fmt: skip
        n = int(sums[:, 4].sum())
        dims = len(run.info["measure"]["outliers"][layers.index(k)])
        yield Figure("dimensions", f"share of the squared norm in the {dims} largest dimensions", k,
                     *_bootstrap(sums, _ratio(0, 1)), n, False)  # fmt: skip
        yield Figure("dimensions", "the same, were all dimensions alike", k, dims / run.info["model"]["hidden_size"],
                     math.nan, math.nan, n, True)  # fmt: skip
        figures = _bootstrap(sums, _ratio(2, 3))
        yield Figure("dimensions", "HIGH tokens in common without them (Jaccard)", k, *figures, n, False)


def _sinks(run: Run, layers: Sequence[int]) -> Iterator[Figure]:
    for k in layers:
        sums = _sums(
            run, [f"count_if(sink_{k})", "count(*)", f"sum(strength_{k}::DOUBLE)",
                  f"sum(strength_{k}::DOUBLE) FILTER (NOT sink_{k})", f"count_if(NOT sink_{k})"], NORMAL,
        )  # fmt: skip
        sums = np.nan_to_num(sums)
        n = int(sums[:, 1].sum())
        yield Figure("sinks", "tokens that are sinks", k, *_bootstrap(sums, _ratio(0, 1)), n, False)
        yield Figure("sinks", "mean strength over the mean without sinks", k,
                     *_bootstrap(sums, lambda s: s[:, 2] / s[:, 1] / (s[:, 3] / s[:, 4])), n, False)  # fmt: skip


# --- what is shown ---------------------------------------------------------------------------------------


def to_json(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Plain values; intervals that do not exist are null."""
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(f).items()}
            for f in figures]  # fmt: skip


def render(figures: Sequence[Figure], console: Console) -> None:
    """A table for each claim: its figures, and beneath each its controls."""
    for claim, sentence in CLAIMS.items():
        if not (mine := [f for f in figures if f.claim == claim]):
            continue
        table = Table(title=sentence, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("layer", "figure", "", "value", "95 % interval", "tokens"):
            left = heading in ("layer", "figure", "")
            table.add_column(heading, justify="left" if left else "right", overflow="fold")
        for f in mine:
            interval = "" if math.isnan(f.low) else f"{f.low:.3f} to {f.high:.3f}"
            layer = "" if f.layer is None else str(f.layer)
            table.add_row(layer, f.what, "control" if f.is_control else "", f"{f.value:.3f}", interval, f"{f.n:,}")
        console.print(table)
