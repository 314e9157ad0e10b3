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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from afn_ray.analysis.bootstrap import Drawn, Figure, Sample, fixed
from afn_ray.analysis.token_pass import KINDS, Sums, TagCounts, Variable, read_sums
from afn_ray.query.database import Run
from afn_ray.reduce.stats import Floats, auc
from afn_ray.text import count

MAX_TOKENS = 5_000_000
"""Default of ``max_tokens``; enough for intervals of a thousandth within an acceptable wait."""


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
    sample = Sample(run, max_tokens, max_s)
    layers: list[int] = list(run.info["layers"])
    recorded = set(run.sql("FROM tokens LIMIT 0").columns)
    tags = TagCounts(sample, layers) if "tag" in recorded else None
    variables, sums, num_types = read_sums(sample, layers, recorded, tags)
    figures: list[Figure] = []
    for before, k in zip([None, *layers], layers, strict=False):
        figures += _of_layer(sample, k, before, sums[k], num_types)
        figures += [] if tags is None else tags.figures(sample, k)
    figures += _separation(sample, variables)
    ordered = sorted(figures, key=lambda f: list(CLAIMS).index(f.claim))
    return Claims(run.uri, (*sample.notes, *DEFINITIONS), tuple(ordered))


# --- the bootstrap


# --- one pass over the tokens


# --- figures


def _of_layer(
    sample: Sample, k: int, before: int | None, g: Sums, num_types: int
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


def _separation(sample: Sample, variables: Sequence[Variable]) -> list[Figure]:
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
