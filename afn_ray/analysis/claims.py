"""Claims about token activation strength, each figure beside its control.

The claims are those of arXiv:2605.22377; these measurements neither confirm nor refute them. All
figures leave special tokens out. Intervals are the 2.5 and 97.5 % points of ``REPLICATES``
bootstrap samples of documents. Tokens of one document are not independent draws, so intervals over
tokens would be too narrow. More than ``GROUPS`` documents are drawn in that many groups. A
replicate draws the same documents for every figure, so differences are paired. Ranks, bins and the
means of types come from all tokens in every replicate.

Cost: one scan of the tokens for each signal at a layer, which counts its distinct values, and one
scan that sums everything else batch by batch. Memory holds a row for each distinct value, type,
position and document, and 4 MB of bins for each signal; it does not grow with the tokens. A run of
more than ``MAX_TOKENS`` is sampled by document, and the output says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from afn_ray.errors import QueryError
from afn_ray.query.database import Run
from afn_ray.reduce.stats import Floats, Ints, auc, midranks, quantile_index
from afn_ray.schema import UNTAGGED, in_order, upos_classes
from afn_ray.text import count, printable

GROUPS = 500
REPLICATES = 1000
BINS = 256
"""Bins of a variable's ranks, for intervals of an AUC; the AUC itself uses every distinct value."""
MAX_TOKENS = 5_000_000
"""Default of ``max_tokens``; enough for intervals of a thousandth within an acceptable wait."""
SEED = 0
FEW = 20
"""Number of documents below which a bootstrap is unreliable."""
MOST_TAGS = 24
"""Number of tags with figures of their own; the rarer ones share one figure."""
KINDS = ("content", "function", "punctuation")
"""Word classes that the claims compare."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that supports or contradicts a claim."""

    claim: str
    what: str  # the quantity measured
    of: str  # the variable or the tokens it is measured on
    layer: int | None
    value: float
    low: float
    high: float  # low and high: the 95 % interval
    n: int  # number of tokens it is computed from
    n_docs: int  # number of their documents, which the bootstrap draws
    is_control: bool


@dataclass(frozen=True, slots=True)
class Claims:
    """Figures claim by claim, and the notes needed to read them."""

    run: str  # URI
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]


CLAIMS = {
    "classes": "Are content words HIGH more often than function words and punctuation?",
    "tags": "Are some tags HIGH more often than others?",
    "shift": "Do HIGH tokens dominate what a layer changes?",
    "layers": "Does one layer separate best, and is HIGH stable around it?",
    "types": "Does the word alone decide its strength?",
    "frequency": "Is HIGH more than rarity, position and length?",
    "dimensions": "Do a few dimensions make the strength?",
    "sinks": "Do a few tokens make the figures?",
    "masking": "Does the model's output rest on HIGH tokens?",
}
"""Each claim as the question that its figures and controls answer."""

AUC = "AUC of content against function words and punctuation"
DEFINITIONS = (
    "HIGH is at or above the run's own Q3, for rivals of strength at or above theirs, also where "
    "the run's labels go "
    "by thresholds of another one. AUC: how often a content word lies above a function word or "
    "punctuation mark (0.5: "
    "no more than by chance). Spearman's rho goes by ranks, so that of log frequency is that of "
    "frequency. A control "
    "is what the other figures are to be held against. Attention is a mean over the tokens of a "
    "window, so it is less "
    "in longer texts.",
)


def claims(run: Run, *, max_tokens: int = MAX_TOKENS, max_s: float = math.inf) -> Claims:
    """Compute every figure that the signals of ``run`` allow.

    A run of more than ``max_tokens`` is sampled down to about that many tokens, in documents chosen
    by their hash, at least about ``GROUPS``.

    Raises ``QueryError`` for a query that takes too long (raise its limit with ``open_run(...,
    timeout_s=...)``), once ``max_s`` seconds have passed, and for a run without a token.
    """
    sample = _Sample(run, max_tokens, max_s)
    layers: list[int] = list(run.info["layers"])
    recorded = set(run.sql("FROM tokens LIMIT 0").columns)
    tags = _Tags(sample, layers) if "tag" in recorded else None
    variables, sums, num_types = _read(sample, layers, recorded, tags)
    figures: list[Figure] = []
    for before, k in zip([None, *layers], layers, strict=False):
        figures += _of_layer(sample, k, before, sums[k], num_types)
        figures += [] if tags is None else tags.figures(sample, k)
    figures += _separation(sample, variables)
    ordered = sorted(figures, key=lambda f: list(CLAIMS).index(f.claim))
    return Claims(run.uri, (*sample.notes, *DEFINITIONS), tuple(ordered))


# --- the bootstrap


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure over all documents, and over those of each replicate [REPLICATES]."""

    value: float
    replicates: Floats

    def less(self, other: Drawn) -> Drawn:
        """The difference; both figures use the same documents in each replicate."""
        return Drawn(self.value - other.value, self.replicates - other.replicates)

    def interval(self) -> tuple[float, float]:
        """The 95 % interval over replicates in which the figure exists; nan where none does."""
        there = self.replicates[np.isfinite(self.replicates)]
        if not len(there):
            return math.nan, math.nan
        low, high = np.quantile(there, [0.025, 0.975])
        return float(low), float(high)


def fixed(value: float) -> Drawn:
    """A figure that does not depend on the documents drawn."""
    return Drawn(value, np.full(REPLICATES, math.nan))


class Draws:
    """Number of times each of ``num_groups`` is drawn in each replicate."""

    def __init__(self, num_groups: int) -> None:
        even = np.full(num_groups, 1 / num_groups)
        drawn = np.random.default_rng(SEED).multinomial(num_groups, even, REPLICATES)
        self._weights = drawn.astype(np.float64)  # [REPLICATES, num_groups]
        if num_groups < 2:
            self._weights[:] = math.nan  # one document does not show how far documents differ

    def draw(self, statistic: Callable[..., Floats], *parts: Floats) -> Drawn:
        """Apply ``statistic`` to the sums over all groups, and over those of each replicate.

        ``parts`` are sums by group, [num_groups, ...]. ``statistic`` maps their totals [n, ...] to
        [n].
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            value = float(statistic(*(p.sum(axis=0, keepdims=True) for p in parts))[0])
            return Drawn(value, statistic(*(np.tensordot(self._weights, p, axes=1) for p in parts)))


class _Sample:
    """Documents of a run that the figures are computed from, in groups."""

    def __init__(self, run: Run, max_tokens: int, max_s: float) -> None:
        self.run = run
        self._until, self._max_s = time.monotonic() + max_s, max_s
        ((of_docs, of_tokens),) = run.sql(
            "SELECT count(*), coalesce(sum(n_tokens), 0)::BIGINT FROM documents WHERE n_tokens > 0"
        ).fetchall()
        one_in = max(1, min(-(-of_tokens // max_tokens), of_docs // GROUPS))
        self.tokens = "tokens WHERE NOT is_special" + (
            f" AND hash(doc) % {one_in} = 0" if one_in > 1 else ""
        )
        docs, sizes = self.ask(f"SELECT doc, count(*) FROM {self.tokens} GROUP BY 1 ORDER BY 1")  # noqa: S608
        if not len(docs):
            raise QueryError(
                f"{run.uri} has no token that is not special, so there is nothing to hold claims "
                "against"
            )
        self.n, self.n_docs = int(sizes.sum()), len(docs)
        self.num_groups = min(self.n_docs, GROUPS)
        dealt = np.random.default_rng(SEED).permutation(self.n_docs) % self.num_groups
        self.group_of, self.length_of = (
            _by_number(docs, dealt),
            _by_number(docs, ranks(sizes, sizes)),
        )
        self.draw = Draws(self.num_groups).draw
        of = f", one in {one_in} of {of_docs:,}, chosen by their hash" if one_in > 1 else ""
        groups = f" in {self.num_groups:,} groups" if self.num_groups < self.n_docs else ""
        self.notes: tuple[str, ...] = (
            f"{count(self.n, 'token')} of {count(self.n_docs, 'document')}{of}; intervals by "
            f"{REPLICATES:,} bootstrap "
            f"samples of documents{groups}",
        )
        if -(-of_tokens // max_tokens) > one_in:
            self.notes += (
                f"Intervals want {GROUPS} documents, so no fewer are read, whatever their tokens.",
            )
        if self.num_groups < FEW:
            self.notes += (
                "So few documents say little of how far documents differ: "
                + (
                    "there are no intervals."
                    if self.num_groups < 2
                    else "intervals are too narrow."
                ),
            )

    def ask(self, query: str) -> list[npt.NDArray[Any]]:
        """Run ``query`` and return the columns of its result."""
        self.check_time()
        return [column.to_numpy() for column in self.run.sql(query).to_arrow_table().columns]

    def check_time(self) -> None:
        if time.monotonic() >= self._until:
            raise QueryError(
                f"the claims took more than {self._max_s:g} s; afn claims {self.run.uri} takes the "
                "time that it needs"
            )

    def figure(
        self,
        claim: str,
        what: str,
        of: str,
        layer: int | None,
        drawn: Drawn,
        n: float | None = None,
        *,
        is_control: bool = False,
    ) -> Figure:
        tokens = self.n if n is None else int(n)
        return Figure(
            claim, what, of, layer, drawn.value, *drawn.interval(), tokens, self.n_docs, is_control
        )


def ranks(by: npt.NDArray[Any], counts: npt.NDArray[Any]) -> Floats:
    """Mid-ranks of rows in the order of ``by``, scaled to -0.5 to 0.5.

    A row stands for ``counts`` tokens. Equal values get the middle of their ranks.
    """
    return np.asarray(midranks(by, counts) / counts.sum() - 0.5)


def _by_number(keys: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A table with ``values`` at the indices ``keys`` (whole numbers) and 0 elsewhere."""
    table = np.zeros(keys.max() + 1, values.dtype)
    table[keys] = values
    return table


# --- one pass over the tokens

Sums = dict[str, Floats]
"""Sums over the tokens by group: [num_groups]."""


class _Variable:
    """A variable that may separate classes, and the distribution of its values in each class."""

    def __init__(
        self,
        name: str,
        layer: int | None,
        column: str,
        values: npt.NDArray[Any],
        counts: npt.NDArray[Any],
        groups: int,
    ) -> None:
        """``values`` [n_values] are distinct and ascending; ``counts`` are their token counts."""
        self.name, self.layer, self.column = name, layer, column
        self.q3 = values[quantile_index(counts, 3, 4)]
        self._values, self._ranks = values, ranks(values, counts)
        self._bins = np.minimum(BINS - 1, (self._ranks + 0.5) * BINS).astype(np.int64)
        self.by_value = np.zeros((len(KINDS) + 1, len(values)))  # the last kind is everything else
        self.by_bin = np.zeros((groups, len(KINDS) + 1, BINS))
        self.high = np.zeros((groups, len(KINDS) + 1))
        self.tells = len(values) > 1  # False: all values are equal and separate nothing

    def add(self, values: npt.NDArray[Any], g: Ints, kind: Ints) -> Floats:
        """Count tokens, all arrays [n_tokens]; return their ranks."""
        at = np.searchsorted(self._values, values)
        row = g * (len(KINDS) + 1) + kind
        np.add.at(
            self.by_value.ravel(), kind * len(self._values) + at, 1.0
        )  # on a flat view: tens of times faster
        np.add.at(self.by_bin.ravel(), row * BINS + self._bins[at], 1.0)
        self.high += np.bincount(row, values >= self.q3, self.high.size).reshape(self.high.shape)
        return self._ranks[at]


class _Tags:
    """Tags of a labelled corpus, and how many tokens of each are HIGH."""

    def __init__(self, sample: _Sample, layers: Sequence[int]) -> None:
        tag = f"coalesce(tag, '{UNTAGGED}')"
        tags = sample.ask(
            f"SELECT {tag} FROM {sample.tokens} GROUP BY 1 ORDER BY count(*) DESC, 1"  # noqa: S608
        )[0]
        self._tags, kinds = pa.array(tags, pa.string()), upos_classes(tags)
        self._kinds = np.array([KINDS.index(kinds[t]) if t in kinds else len(KINDS) for t in tags])
        self._names = in_order(tags[:MOST_TAGS])
        self._columns = np.full(len(tags), len(self._names))
        self._columns[: len(self._names)] = [self._names.index(t) for t in tags[:MOST_TAGS]]
        if rest := len(tags) - len(self._names):
            self._names.append(f"{count(rest, 'rarer tag')} together")
        shape = (len(layers), 2, sample.num_groups, len(self._names))
        self._high, self._n = (
            dict(zip(layers, part, strict=True)) for part in np.zeros(shape).swapaxes(0, 1)
        )

    def read(self, tags: pa.Array) -> tuple[Ints, Ints]:
        """Index of the name under which each token's tag is counted, and its index in ``KINDS``."""
        found = pc.index_in(pc.fill_null(tags.cast(pa.string()), UNTAGGED), self._tags).to_numpy()
        return self._columns[found], self._kinds[found]

    def add(self, layer: int, g: Ints, tags: Ints, high: npt.NDArray[np.bool_]) -> None:
        """Count tokens of groups ``g``; all arrays are [n_tokens]."""
        row = g * len(self._names) + tags
        for counts, weights in ((self._n[layer], None), (self._high[layer], high)):
            counts += np.bincount(row, weights, counts.size).reshape(counts.shape)

    def figures(self, sample: _Sample, layer: int) -> Iterator[Figure]:
        """The share of each tag that is HIGH."""
        for at, name in enumerate(self._names):
            n = self._n[layer][:, at]
            share = sample.draw(np.divide, self._high[layer][:, at], n)
            yield sample.figure(
                "tags", "share that is HIGH", name, layer, share, n.sum(), is_control=layer == 0
            )


def _read(
    sample: _Sample, layers: Sequence[int], recorded: set[str], tags: _Tags | None
) -> tuple[list[_Variable], dict[int, Sums], int]:
    """Read the inputs of all figures: variables, sums by layer, and the number of types.

    Strength comes first among the variables, layer by layer. A token's class, one of ``KINDS``, is
    that of its type, or with ``tags`` that of its own tag.
    """
    run, groups = sample.run, sample.num_groups
    mean_columns = ", ".join(f"avg(strength_{k}::DOUBLE)" for k in layers)
    types, n_of, *means = sample.ask(
        f"SELECT token_id, count(*), {mean_columns} FROM {sample.tokens} GROUP BY 1"  # noqa: S608
    )
    mean_of = {k: _by_number(types, mean) for k, mean in zip(layers, means, strict=True)}
    centre = {k: float(mean @ n_of) / sample.n for k, mean in zip(layers, means, strict=True)}
    known = sample.ask(
        f"SELECT token_id, coalesce(list_position({list(KINDS)}, class) - 1, {len(KINDS)}), n, idf "  # noqa: S608
        f"FROM vocabulary WHERE layer = {layers[-1]} AND class <> 'special'"
    )
    kind_of, run_n_of, idf_of = (_by_number(known[0], column) for column in known[1:])
    frequency_of = _by_number(types, ranks(run_n_of[types], n_of))
    places, num_there = sample.ask(f"SELECT position, count(*) FROM {sample.tokens} GROUP BY 1")  # noqa: S608
    place_of = _by_number(places, ranks(places, num_there))

    def variable(name: str, layer: int | None, column: str) -> _Variable:
        if column == "idf":
            values, level = np.unique(idf_of[types], return_inverse=True)
            counts = np.bincount(level, n_of)
        else:
            values, counts = sample.ask(
                f"SELECT {column}, count(*) FROM {sample.tokens} GROUP BY 1 ORDER BY 1"  # noqa: S608
            )
        return _Variable(name, layer, column, values, counts, groups)

    variables = [variable("strength", k, f"strength_{k}") for k in layers]
    rarity = variable("rarity (idf)", None, "idf")
    variables += [rarity] if rarity.tells else []
    for signal, name in (
        ("attention", "attention received"),
        ("attention_norm", "norm-weighted attention"),
    ):
        variables += [
            variable(name, k, f"{signal}_{k}") for k in layers if f"{signal}_{k}" in recorded
        ]
    trimmed_q3 = dict(
        run.sql("SELECT layer, q3 FROM signals WHERE signal = 'strength_trimmed'").fetchall()
    )
    q3 = dict(run.sql("SELECT layer, q3 FROM thresholds WHERE population = 'tokens'").fetchall())
    columns = ["doc", "position", "token_id", *(v.column for v in variables if v.column != "idf")]
    columns += [
        f"{name}_{k}"
        for name in ("sink", "shift", "strength_trimmed")
        for k in layers
        if f"{name}_{k}" in recorded
    ]
    columns += ["tag"] if tags is not None else []
    sums: dict[int, Sums] = {k: {} for k in layers}
    sample.check_time()
    for batch in run.sql(f"SELECT {', '.join(columns)} FROM {sample.tokens}").to_arrow_reader():  # noqa: S608
        sample.check_time()
        row = {
            name: batch.column(name).to_numpy(zero_copy_only=False)
            for name in columns
            if name != "tag"
        }
        row["idf"] = idf_of[row["token_id"]]
        row |= {f"high_{k}": row[f"strength_{k}"] >= np.float32(q3[k]) for k in layers}
        g, kind = sample.group_of[row["doc"]], kind_of[row["token_id"]]
        if tags is not None:
            tag, kind = tags.read(batch.column("tag"))
            for k in layers:
                tags.add(k, g, tag, row[f"high_{k}"])
        rank = {v.column: v.add(row[v.column], g, kind) for v in variables}
        for before, k in zip([None, *layers], layers, strict=False):
            s, x, high = (
                row[f"strength_{k}"].astype(np.float64),
                rank[f"strength_{k}"],
                row[f"high_{k}"],
            )
            off = s - centre[k]
            adding = {
                "high": high,
                "sinks": row[f"sink_{k}"],
                "sum": s,
                "sum_without": s * ~row[f"sink_{k}"],
                "within": (s - mean_of[k][row["token_id"]]) ** 2,
                "off": off,
                "off_2": off**2,
                "x": x,
                "xx": x * x,
                "n": np.ones(len(x)),
            }
            frequency = frequency_of[row["token_id"]]
            for name, y in (
                ("frequency", frequency),
                ("place", place_of[row["position"]]),
                ("length", sample.length_of[row["doc"]]),
            ):
                adding |= {name: y, f"{name}_2": y * y, f"{name}_x": x * y}
            adding |= {f"high_{name}": high & (kind == at) for at, name in enumerate(KINDS)}
            adding |= {name: kind == at for at, name in enumerate(KINDS)}
            ours, content = kind < len(KINDS), kind == KINDS.index("content")
            adding |= {
                "k_n": ours,
                "k_c": content,
                "k_x": x * ours,
                "k_xx": x * x * ours,
                "k_cx": x * content,
                "k_f": frequency * ours,
                "k_ff": frequency**2 * ours,
                "k_fx": x * frequency * ours,
                "k_cf": frequency * content,
            }
            if before is not None:
                adding |= {
                    "both": row[f"high_{before}"] & high,
                    "any": row[f"high_{before}"] | high,
                }
            if (shift := row.get(f"shift_{k}")) is not None:
                adding |= {"shift": shift, "high_shift": shift * high}
            if (trimmed := row.get(f"strength_trimmed_{k}")) is not None:
                still = trimmed >= trimmed_q3[k]
                adding |= {
                    "squares": s**2,
                    "cut": s**2 - trimmed.astype(np.float64) ** 2,
                    "trimmed_both": still & high,
                    "trimmed_any": still | high,
                }
            for name, values in adding.items():
                sums[k].setdefault(name, np.zeros(groups))[:] += np.bincount(g, values, groups)
    return variables, sums, len(types)


# --- figures


def _of_layer(
    sample: _Sample, k: int, before: int | None, g: Sums, num_types: int
) -> Iterator[Figure]:
    """Figures of strength at layer ``k`` from its sums ``g``.

    ``before`` is the recorded layer before ``k``.
    """
    run, draw, figure = sample.run, sample.draw, sample.figure
    total = {name: float(x.sum()) for name, x in g.items()}
    for c in KINDS:
        if total[c]:
            drawn = draw(np.divide, g[f"high_{c}"], g[c])
            yield figure(
                "classes",
                f"share of {c} that is HIGH",
                "strength",
                k,
                drawn,
                total[c],
                is_control=k == 0,
            )
    if "shift" in g:
        of_shift, of_tokens = (
            draw(np.divide, g["high_shift"], g["shift"]),
            draw(np.divide, g["high"], g["n"]),
        )
        what = "share that HIGH tokens hold"
        yield figure("shift", what, "of the shift", k, of_shift)
        yield figure("shift", what, "of the tokens", k, of_tokens, is_control=True)
        yield figure("shift", what, "the difference", k, of_shift.less(of_tokens))
    if before is not None:
        what = "HIGH tokens in common (Jaccard)"
        yield figure(
            "layers", what, f"with layer {before}", k, draw(np.divide, g["both"], g["any"])
        )
        here = total["high"] / total["n"]
        there = (total["both"] + total["any"]) / total["n"] - here
        chance = fixed(here * there / (here + there - here * there))
        yield figure("layers", what, f"with layer {before}, by chance", k, chance, is_control=True)

    what = "share of the variance that is between groups (eta squared)"
    parts = [g[name] for name in ("n", "off", "off_2", "within")]
    eta = draw(lambda n, off, squares, within: 1 - within / (squares - off**2 / n), *parts)
    yield figure("types", what, "a group for each type", k, eta)
    chance = fixed((num_types - 1) / max(1, sample.n - 1))
    yield figure("types", what, "as many groups by chance", k, chance, is_control=True)

    for key, name in (
        ("frequency", "log frequency"),
        ("place", "position"),
        ("length", "document length"),
    ):
        rho = draw(
            _correlation, *(g[part] for part in ("n", "x", key, "xx", f"{key}_2", f"{key}_x"))
        )
        yield figure("frequency", "Spearman's rho with strength", name, k, rho)
    if total["k_c"] and total["k_n"] > total["k_c"]:
        parts = [g[f"k_{name}"] for name in ("n", "c", "x", "xx", "f", "ff", "fx", "cx", "cf")]
        what = "rank correlation of strength with being content, not function or punctuation"
        alone = draw(_correlation, *(g[f"k_{name}"] for name in ("n", "x", "c", "xx", "c", "cx")))
        yield figure("frequency", what, "as it is", k, alone, total["k_n"])
        at_one = draw(_partial, *parts)
        yield figure(
            "frequency",
            what,
            "at one frequency (partial)",
            k,
            at_one,
            total["k_n"],
            is_control=True,
        )

    if "cut" in g:
        dims = len(run.info["measure"]["outliers"][list(run.info["layers"]).index(k)])
        what = f"share of the squared norm in {count(dims, 'dimension')}"
        yield figure("dimensions", what, "the largest", k, draw(np.divide, g["cut"], g["squares"]))
        alike = fixed(dims / run.info["model"]["hidden_size"])
        yield figure("dimensions", what, "were all alike", k, alike, is_control=True)
        common = draw(np.divide, g["trimmed_both"], g["trimmed_any"])
        yield figure(
            "dimensions", "HIGH tokens in common (Jaccard)", "with and without these", k, common
        )

    yield figure("sinks", "share of the tokens", "sinks", k, draw(np.divide, g["sinks"], g["n"]))
    what = "strength with sinks over strength without"
    parts = [g[name] for name in ("sum", "n", "sum_without", "sinks")]
    yield figure(
        "sinks", what, "mean", k, draw(lambda a, n, b, sinks: a / n / (b / (n - sinks)), *parts)
    )
    medians = dict(run.sql(f"SELECT population, q2 FROM thresholds WHERE layer = {k}").fetchall())  # noqa: S608
    if medians["tokens_without_sinks"]:
        ratio = fixed(medians["tokens"] / medians["tokens_without_sinks"])
        yield figure("sinks", what, "median, of the whole run", k, ratio, is_control=True)


def _correlation(n: Floats, x: Floats, y: Floats, xx: Floats, yy: Floats, xy: Floats) -> Floats:
    """Pearson's correlation from sums."""
    return np.asarray((n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y)))


def _partial(
    n: Floats,
    c: Floats,
    x: Floats,
    xx: Floats,
    f: Floats,
    ff: Floats,
    fx: Floats,
    cx: Floats,
    cf: Floats,
) -> Floats:
    """Partial correlation of ``x`` and ``c`` (0 or 1) with ``f`` held constant."""
    xc, xf, fc = (
        _correlation(n, x, c, xx, c, cx),
        _correlation(n, x, f, xx, ff, fx),
        _correlation(n, f, c, ff, c, cf),
    )
    return np.asarray((xc - xf * fc) / np.sqrt((1 - xf * xf) * (1 - fc * fc)))


def _separation(sample: _Sample, variables: Sequence[_Variable]) -> list[Figure]:
    """AUC of strength at every layer and of its rivals, and which layer separates best.

    Also the HIGH shares of the rivals, by class.
    """
    found: list[Figure] = []
    by_layer: dict[int, Drawn] = {}
    n = 0
    for v in variables:
        content, others = v.by_value[0], v.by_value[1] + v.by_value[2]
        n = int(content.sum() + others.sum())
        if not content.any() or not others.any():
            return []
        exact = float(auc(content[None], others[None])[0])
        drawn = sample.draw(auc, v.by_bin[:, 0], v.by_bin[:, 1] + v.by_bin[:, 2])
        drawn = Drawn(
            exact, drawn.replicates + exact - drawn.value
        )  # binning shifts the AUC slightly, and equally in all replicates
        is_control = v.name != "strength" or v.layer == 0
        found.append(
            sample.figure("classes", AUC, v.name, v.layer, drawn, n, is_control=is_control)
        )
        if v.name == "strength":
            assert v.layer is not None
            by_layer[v.layer] = drawn
            continue
        for at, kind in enumerate(KINDS):
            if total := v.by_bin[:, at].sum():
                share = sample.draw(np.divide, v.high[:, at], v.by_bin[:, at].sum(axis=1))
                what = f"share of {kind} that is HIGH"
                found.append(
                    sample.figure("classes", what, v.name, v.layer, share, total, is_control=True)
                )
    if len(by_layer) < 2:
        return found
    best_first = sorted(by_layer, key=lambda k: -by_layer[k].value)
    for k in best_first if 0 in by_layer else []:
        if k != 0:
            what, less = f"{AUC}, less that of layer 0", by_layer[k].less(by_layer[0])
            found.append(sample.figure("layers", what, "strength", k, less, n))
    drawn_all = np.array([by_layer[k].replicates for k in best_first])
    there = drawn_all[:, np.isfinite(drawn_all).all(axis=0)]
    if not there.size:
        return found
    best = np.argmax(there, axis=0)
    for at, k in enumerate(best_first):
        what, share = (
            "share of bootstrap samples in which its AUC is the largest",
            fixed(float((best == at).mean())),
        )
        found.append(sample.figure("layers", what, "strength", k, share, n, is_control=k == 0))
    return found


# --- output


def to_json(found: Claims) -> dict[str, Any]:
    """The claims as plain values; missing interval bounds are null."""
    value = asdict(found)
    for figure in value["figures"]:
        figure |= {
            k: None for k, v in figure.items() if isinstance(v, float) and not math.isfinite(v)
        }
    return value | {"claims": CLAIMS}


def render(found: Claims, console: Console) -> None:
    """Print for each claim its question, a sentence on its controls, and its figures."""
    for claim, question in CLAIMS.items():
        if not (mine := [f for f in found.figures if f.claim == claim]):
            continue
        console.print(Text(f"\n{question}", style="bold"))
        if sentence := against_controls(mine):
            console.print(Text(printable(sentence)))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("", overflow="fold", ratio=1)
        table.add_column("layer", no_wrap=True)
        for heading in ("value", "95 % interval"):
            table.add_column(heading, justify="right", no_wrap=True)
        for what in dict.fromkeys(f.what for f in mine):
            of_this = [f for f in mine if f.what == what]
            table.add_row(
                Text(
                    f"{what}, of {_amount([f.n for f in of_this], 'token')} in "
                    f"{_amount([f.n_docs for f in of_this], 'document')}:"
                )
            )
            for f in of_this:
                name = f"  {f.of}{' (control)' if f.is_control else ''}"
                interval = "" if math.isnan(f.low) else f"{shown(f.low)} to {shown(f.high)}"
                table.add_row(
                    Text(printable(name)),
                    "" if f.layer is None else str(f.layer),
                    shown(f.value),
                    interval,
                )
        console.print(table)
    console.print()
    for note in found.notes:
        console.print(note, markup=False)


def against_controls(figures: Sequence[Figure]) -> str:
    """Name the controls that equal or beat the main figure, in one sentence with numbers.

    ``figures`` belong to one claim. The main figure is the first one of the deepest layer. A
    control beats it when its interval is above, and equals it when the two overlap. Empty where
    there is no control.
    """
    known = [f for f in figures if math.isfinite(f.value)]
    deepest = max(
        (f.layer for f in known if f.layer is not None and not f.is_control), default=None
    )
    whats = sorted(
        dict.fromkeys(f.what for f in known), key=lambda what: what != AUC
    )  # stable sort: equal keys keep their order
    for what in whats:
        of_this = [f for f in known if f.what == what and f.layer in (None, 0, deepest)]
        mine = [f for f in of_this if not f.is_control and f.layer == deepest]
        if not mine:
            continue
        main = max(mine, key=lambda f: f.value) if mine[0].claim == "tags" else mine[0]
        # Controls are the same variable at layer 0, and controls that are no measure of a layer. A
        # different quantity at layer 0 is not a control of this figure.
        controls = [f for f in of_this if f.is_control and (f.layer != 0 or f.of == main.of)]
        if controls:
            break
    else:
        return ""
    low, high = _interval(main)
    beat = [f for f in controls if _interval(f)[0] > high]
    equal = [f for f in controls if f not in beat and _interval(f)[1] >= low]
    parts = [f"{what[0].upper()}{what[1:]}: {_named([main])}."]
    parts += [f"Beaten by: {_named(beat)}."] if beat else []
    parts += [f"Equalled by: {_named(equal)}."] if equal else []
    if not beat and not equal:
        nearest = max(controls, key=lambda f: f.value)
        parts += [f"No control reaches it; the nearest: {_named([nearest])}."]
    return " ".join(parts)


def _interval(figure: Figure) -> tuple[float, float]:
    return (figure.value, figure.value) if math.isnan(figure.low) else (figure.low, figure.high)


def _named(figures: Sequence[Figure]) -> str:
    places = ["" if f.layer is None else f", layer {f.layer}" for f in figures]
    return "; ".join(
        f"{f.of}{place}, {shown(f.value)}" for f, place in zip(figures, places, strict=True)
    )


def _amount(numbers: Sequence[int], noun: str) -> str:
    least, most = min(numbers), max(numbers)
    return count(most, noun) if least == most else f"{least:,} to {count(most, noun)}"


def shown(value: float) -> str:
    """Format with three decimals, or with two significant digits where these would show 0."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
