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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from afn_ray import notebook, token_rows
from afn_ray.analysis.bootstrap import Drawn, Figure, Quantity, Sample, combined, fixed
from afn_ray.analysis.explained import MODELS, deviance_by_rank, explained
from afn_ray.analysis.local_model import LocalModel
from afn_ray.analysis.token_pass import (
    KINDS,
    RIVALS,
    SumsByName,
    TagCounts,
    Variable,
    read_sums,
)
from afn_ray.query.database import Run, opened
from afn_ray.reduce.stats import Float64s, auc
from afn_ray.runs import precheck
from afn_ray.text import count

MAX_TOKENS = 5_000_000
"""Default of ``max_tokens``; enough for intervals of a thousandth within an acceptable wait."""
TIMEOUT_S = 600.0
"""Default time limit of each query, in seconds."""


FIGURES = pa.schema(
    [
        ("claim", pa.string()),
        ("what", pa.string()),
        ("of", pa.string()),
        ("layer", pa.int64()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
        ("n_docs", pa.int64()),
        ("is_control", pa.bool_()),
    ]
)
"""Columns of ``Claims.table``; the fields of ``Figure`` say what they are."""


@dataclass(frozen=True, slots=True)
class Claims:
    """Figures claim by claim, and the notes needed to read them."""

    run: str  # URI
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]

    @property
    def table(self) -> pa.Table:
        """One row for each figure, with the columns of ``FIGURES``; a missing bound is NaN."""
        return pa.Table.from_pylist([asdict(figure) for figure in self.figures], FIGURES)

    __repr__ = notebook.short

    def _repr_html_(self) -> str:
        parts = []
        for claim, question in CLAIMS.items():
            here = self.table.filter(pc.field("claim") == claim).drop_columns(["claim"])
            if here.num_rows:
                parts.append(notebook.table(question, here))
        return "".join(parts) + notebook.text(self.notes)


CLAIMS = {
    "classes": "Are content words HIGH more often than function words and punctuation?",
    "tags": "Are some tags HIGH more often than others?",
    "shift": "Do HIGH tokens dominate what a layer changes?",
    "layers": "Does one layer separate best, and is HIGH stable around it?",
    "types": "Does the word alone decide its strength?",
    "frequency": "Is HIGH more than rarity, position and length?",
    "attention": "Is strength the attention that a token receives?",
    "dimensions": "Do a few dimensions make the strength?",
    "sinks": "Do a few tokens make the figures?",
    "masking": "Does the model's output rest on HIGH tokens?",
}
"""Each claim as the question that its figures and controls answer."""

AUC = "AUC of content against function words and punctuation"
DEFINITIONS = (
    "HIGH is at or above the run's own Q3, for rivals of strength at or above theirs, also where "
    "the run's labels use the thresholds of another run. AUC is how often a content word is above "
    "a function word or punctuation mark (0.5: no more than by chance). Spearman's rho compares "
    "ranks, so log frequency and frequency give the same; below 0, one is less where the other is "
    "more. A share of deviance explained is below 0 where the overall share guesses better than "
    "the model. A control is a figure that the others are compared with. Attention is a mean over "
    "the tokens of a window, so it is less in longer texts.",
)

RANK_CORRELATION = "rank correlation"
"""Beginning of the names of quantities that have a sign."""
EXPLAINED = "share of the deviance of HIGH that a smooth model explains"
NO_ATTENTION = (
    "Strength is not compared with attention, which the run did not record: 'afn run' with "
    "--signals attention records what each token receives, norm-weighted too."
)


def claims(
    run: str | Run,
    *,
    max_tokens: int = MAX_TOKENS,
    max_s: float = math.inf,
    masked_documents: int = 0,
    local: LocalModel = LocalModel(),  # noqa: B008 - frozen
    timeout_s: float = TIMEOUT_S,
) -> Claims:
    """Compute every figure that the signals of a run allow, each beside its control.

    ``run`` is a run's URI, a store's URI for its latest complete run, or an open run. A run of more
    than ``max_tokens`` is sampled down to about that many tokens, in documents chosen by their
    hash, at least about ``GROUPS``. ``timeout_s`` is the time limit of each query, in seconds, of a
    run that is not open yet. With ``masked_documents`` the model, which may be ``local``, also
    measures that many documents in this process, with and without their HIGH tokens
    (``analysis.masking``).

    Raises ``ConfigError`` for a run that does not keep the rows of all tokens,
    ``QueryError`` for a query that takes too long, once ``max_s`` seconds have passed, and
    for a run without a token. Raises what ``open_run`` raises and, with ``masked_documents``, what
    ``masking.check`` raises.
    """
    if masked_documents:  # the model may be missing here, which is known before any figure
        precheck.check_question(run if isinstance(run, str) else run.uri, local.name)
    with opened(run, timeout_s=timeout_s) as tables:
        token_rows.check_complete(tables.info["config"])
        masked: list[Figure] = []
        note = ""
        if masked_documents:
            from afn_ray.analysis import masking  # loads torch

            masked, note = masking.check(tables, masked_documents, local)
        notes, figures = _figures(tables, max_tokens, max_s)
        if note:
            notes.append(note)
        return Claims(tables.uri, tuple(notes), (*figures, *masked))


def _figures(run: Run, max_tokens: int, max_s: float) -> tuple[list[str], list[Figure]]:
    """Notes and figures on the tokens that ``run`` recorded."""
    sample = Sample(run, max_tokens, max_s)
    layers: list[int] = list(run.info["layers"])
    recorded = set(run.sql("FROM tokens LIMIT 0").columns)
    tags = TagCounts(sample, layers) if "tag" in recorded else None
    variables, sums, num_types = read_sums(sample, layers, recorded, tags)
    figures: list[Figure] = []
    for before, k in zip([None, *layers], layers, strict=False):
        figures += _of_layer(_Layer(sample, k, sums[k]), before, num_types)
        if tags is not None:
            figures += tags.figures(sample, k)
        for v in variables:
            if v.layer == k and v.name in RIVALS.values():
                figures += _agreement(_Layer(sample, k, sums[k]), v)
    figures += _separation(sample, variables)
    order = list(CLAIMS)
    figures.sort(key=lambda figure: order.index(figure.claim))
    notes = [*sample.notes, *DEFINITIONS]
    if not any(figure.claim == "attention" for figure in figures):
        notes.append(NO_ATTENTION)
    return notes, figures


@dataclass(frozen=True, slots=True)
class _Layer:
    """Sums of one layer over the tokens of a sample, and the figures made of them."""

    sample: Sample
    layer: int
    sums: SumsByName

    def has(self, name: str) -> bool:
        return name in self.sums

    def total(self, name: str) -> float:
        return float(self.sums[name].sum())

    def draw(self, statistic: Callable[..., Float64s], *names: str) -> Drawn:
        """``statistic`` of the sums ``names``."""
        return self.sample.draw(statistic, *(self.sums[name] for name in names))

    def share(self, part: str, whole: str) -> Drawn:
        return self.draw(np.divide, part, whole)

    def figure(
        self,
        claim: str,
        what: str,
        of: str,
        drawn: Drawn,
        n: float | None = None,
        *,
        is_control: bool = False,
    ) -> Figure:
        quantity = Quantity(claim, what, of, self.layer)
        return self.sample.figure(quantity, drawn, n, is_control=is_control)


def _of_layer(here: _Layer, before: int | None, num_types: int) -> Iterator[Figure]:
    """Figures of strength at one layer; ``before`` is the recorded layer before it."""
    yield from _class_shares(here)
    if here.has("shift"):
        yield from _shares_of_shift(here)
    if before is not None:
        yield from _overlap(here, before)
    yield from _variance_between_types(here, num_types)
    yield from _rank_correlations(here)
    yield from _explained_by_controls(here)
    if here.has("cut"):
        yield from _dimensions(here)
    yield from _sinks(here)


def _class_shares(here: _Layer) -> Iterator[Figure]:
    for kind in KINDS:
        num_tokens = here.total(kind)
        if num_tokens:
            what = f"share of {kind} that is HIGH"
            share = here.share(f"high_{kind}", kind)
            is_control = here.layer == 0
            yield here.figure("classes", what, "strength", share, num_tokens, is_control=is_control)


def _shares_of_shift(here: _Layer) -> Iterator[Figure]:
    what = "share that HIGH tokens hold"
    of_shift = here.share("high_shift", "shift")
    of_tokens = here.share("high", "n")
    yield here.figure("shift", what, "of the shift", of_shift)
    yield here.figure("shift", what, "of the tokens", of_tokens, is_control=True)
    yield here.figure("shift", what, "the difference", of_shift.less(of_tokens))


def _overlap(here: _Layer, before: int) -> Iterator[Figure]:
    """HIGH tokens that the layer has in common with the layer ``before``."""
    what, of = "HIGH tokens in common (Jaccard)", f"with layer {before}"
    yield here.figure("layers", what, of, here.share("both", "any"))
    n = here.total("n")
    share = here.total("high") / n
    share_before = (here.total("both") + here.total("any")) / n - share
    in_both = share * share_before
    chance = fixed(in_both / (share + share_before - in_both))
    yield here.figure("layers", what, f"{of}, by chance", chance, is_control=True)


def _variance_between_types(here: _Layer, num_types: int) -> Iterator[Figure]:
    def eta_squared(n: Float64s, off: Float64s, squares: Float64s, within: Float64s) -> Float64s:
        return np.asarray(1 - within / (squares - off**2 / n))

    what = "share of the variance that is between groups (eta squared)"
    eta = here.draw(eta_squared, "n", "off", "off_2", "within")
    yield here.figure("types", what, "a group for each type", eta)
    chance = fixed((num_types - 1) / max(1, here.sample.n - 1))
    yield here.figure("types", what, "as many groups by chance", chance, is_control=True)


def _rank_correlations(here: _Layer) -> Iterator[Figure]:
    rivals = {"frequency": "log frequency", "place": "position", "length": "document length"}
    for key, name in rivals.items():
        rho = here.draw(_correlation, "n", "x", key, "xx", f"{key}_2", f"{key}_x")
        yield here.figure("frequency", "Spearman's rho with strength", name, rho)
    n = here.total("k_n")
    if not n > here.total("k_c") > 0:
        return
    what = f"{RANK_CORRELATION} of strength with being content, not function or punctuation"
    of_content = here.draw(_correlation, "k_n", "k_x", "k_c", "k_xx", "k_c", "k_cx")
    yield here.figure("frequency", what, "as it is", of_content, n)
    of_frequency = here.draw(_correlation, "k_n", "k_x", "k_f", "k_xx", "k_ff", "k_fx")
    of_both = here.draw(_correlation, "k_n", "k_f", "k_c", "k_ff", "k_c", "k_cf")
    at_one = combined(_partial, of_content, of_frequency, of_both)
    of = "at one frequency (partial)"
    yield here.figure("frequency", what, of, at_one, n, is_control=True)


def _explained_by_controls(here: _Layer) -> Iterator[Figure]:
    """Share of HIGH that its controls explain; nothing where no token is HIGH, or every one is."""
    if not 0 < here.total("high") < here.total("n"):
        return
    for name in MODELS:
        share = here.draw(explained, "n", "high", f"deviance by {name}")
        yield here.figure("frequency", EXPLAINED, name, share)


def _agreement(here: _Layer, rival: Variable) -> Iterator[Figure]:
    """Agreement of strength and a rival at one layer."""
    name = rival.name
    of_rival = (f"{name} {sum_}" for sum_ in ("y", "yy", "xy"))
    y, yy, xy = of_rival
    what = f"{RANK_CORRELATION} with strength (Spearman)"
    yield here.figure("attention", what, name, here.draw(_correlation, "n", "x", y, "xx", yy, xy))
    what = "HIGH tokens in common with strength (Jaccard)"
    yield here.figure("attention", what, name, here.share(f"{name} both", f"{name} any"))
    n = here.total("n")
    share = here.total(f"{name} high") / n
    of_strength = here.total("high") / n
    in_both = share * of_strength
    chance = fixed(in_both / (share + of_strength - in_both))
    yield here.figure("attention", what, f"{name}, by chance", chance, is_control=True)
    if 0 < here.total("high") < n:
        by_rank = deviance_by_rank(rival.by_bin.sum(axis=1), rival.strong_by_bin)
        drawn = here.sample.draw(explained, here.sums["n"], here.sums["high"], by_rank)
        yield here.figure("attention", EXPLAINED, name, drawn)


def _correlation(
    n: Float64s, x: Float64s, y: Float64s, xx: Float64s, yy: Float64s, xy: Float64s
) -> Float64s:
    """Pearson's correlation from sums."""
    covariance = n * xy - x * y
    variances = (n * xx - x * x) * (n * yy - y * y)
    return np.asarray(covariance / np.sqrt(variances))


def _partial(xy: Float64s, xz: Float64s, yz: Float64s) -> Float64s:
    """Partial correlation of x and y with z held constant, from their three correlations."""
    unexplained = (1 - xz * xz) * (1 - yz * yz)
    return np.asarray((xy - xz * yz) / np.sqrt(unexplained))


def _dimensions(here: _Layer) -> Iterator[Figure]:
    info = here.sample.run.info
    at = list(info["layers"]).index(here.layer)
    num_dimensions = len(info["measure"]["outliers"][at])
    what = f"share of the squared norm in {count(num_dimensions, 'dimension')}"
    yield here.figure("dimensions", what, "the largest", here.share("cut", "squares"))
    alike = fixed(num_dimensions / info["model"]["hidden_size"])
    yield here.figure("dimensions", what, "were all alike", alike, is_control=True)
    what, of = "HIGH tokens in common (Jaccard)", "with and without these"
    yield here.figure("dimensions", what, of, here.share("trimmed_both", "trimmed_any"))


def _sinks(here: _Layer) -> Iterator[Figure]:
    def ratio_of_means(
        total: Float64s, n: Float64s, without: Float64s, sinks: Float64s
    ) -> Float64s:
        mean = total / n
        mean_without = without / (n - sinks)
        return np.asarray(mean / mean_without)

    yield here.figure("sinks", "share of the tokens", "sinks", here.share("sinks", "n"))
    what = "strength with sinks over strength without"
    ratio = here.draw(ratio_of_means, "sum", "n", "sum_without", "sinks")
    yield here.figure("sinks", what, "mean", ratio)
    query = f"SELECT population, q2 FROM thresholds WHERE layer = {here.layer}"  # noqa: S608
    medians = dict(here.sample.run.sql(query).fetchall())
    if medians["tokens_without_sinks"]:
        of_medians = fixed(medians["tokens"] / medians["tokens_without_sinks"])
        yield here.figure("sinks", what, "median, of the whole run", of_medians, is_control=True)


def _separation(sample: Sample, variables: Sequence[Variable]) -> list[Figure]:
    """AUC of strength at every layer and of its rivals, and which layer separates best.

    Also the HIGH shares of the rivals, by class. Empty if the tokens compared are all of one side.
    """
    found: list[Figure] = []
    by_layer: dict[int, Drawn] = {}
    n = 0
    for v in variables:
        content = v.by_value[0]
        others = v.by_value[1] + v.by_value[2]
        if not content.any() or not others.any():
            return []
        n = int(content.sum() + others.sum())
        drawn = _auc(sample, v)
        is_control = v.name != "strength" or v.layer == 0
        quantity = Quantity("classes", AUC, v.name, v.layer)
        found.append(sample.figure(quantity, drawn, n, is_control=is_control))
        if v.name == "strength":
            assert v.layer is not None
            by_layer[v.layer] = drawn
        else:
            found += _shares_of_rival(sample, v)
    if len(by_layer) > 1:
        found += _best_layer(sample, by_layer, n)
    return found


def _auc(sample: Sample, v: Variable) -> Drawn:
    """AUC of ``v``: exact, with an interval from binned ranks.

    Binning shifts the AUC slightly, and equally in all replicates.
    """
    content = v.by_value[0]
    others = v.by_value[1] + v.by_value[2]
    exact = float(auc(content[None], others[None])[0])
    binned_content = v.by_bin[:, 0]
    binned_others = v.by_bin[:, 1] + v.by_bin[:, 2]
    binned = sample.draw(auc, binned_content, binned_others)
    return Drawn(exact, binned.replicates + exact - binned.value)


def _shares_of_rival(sample: Sample, v: Variable) -> Iterator[Figure]:
    for at, kind in enumerate(KINDS):
        n = v.by_bin[:, at].sum(axis=1)  # by group
        num_tokens = n.sum()
        if num_tokens:
            share = sample.draw(np.divide, v.high[:, at], n)
            quantity = Quantity("classes", f"share of {kind} that is HIGH", v.name, v.layer)
            yield sample.figure(quantity, share, num_tokens, is_control=True)


def _best_layer(sample: Sample, by_layer: Mapping[int, Drawn], n: int) -> Iterator[Figure]:
    """Figures on the layer whose AUC is the largest; ``by_layer`` are the layers' AUCs."""
    best_first = sorted(by_layer, key=lambda k: -by_layer[k].value)
    others = [k for k in best_first if k != 0]
    if 0 in by_layer:
        for k in others:
            quantity = Quantity("layers", f"{AUC}, less that of layer 0", "strength", k)
            yield sample.figure(quantity, by_layer[k].less(by_layer[0]), n)
    replicates = np.array([by_layer[k].replicates for k in best_first])
    is_complete = np.isfinite(replicates).all(axis=0)
    replicates = replicates[:, is_complete]
    if not replicates.size:
        return
    best = np.argmax(replicates, axis=0)
    what = "share of bootstrap samples in which its AUC is the largest"
    for at, k in enumerate(best_first):
        share = fixed(float((best == at).mean()))
        yield sample.figure(Quantity("layers", what, "strength", k), share, n, is_control=k == 0)
