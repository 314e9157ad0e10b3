"""Summary of a run with cautions on its measure, as data and tables; comparison of two runs."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from afn_ray.query.database import Run
from afn_ray.query.expressions import is_high
from afn_ray.reduce import compare, lexicon, losses
from afn_ray.reduce.losses import Losses
from afn_ray.reduce.stats import auc, wilson
from afn_ray.runs import precision
from afn_ray.schema import in_order
from afn_ray.store import checksums, label_thresholds, manifest
from afn_ray.store.commits import num_measured
from afn_ray.text import count, printable

SALIENT_WORDS = 10
SALIENT_MIN_N = 20
"""Least occurrences of a word to be ranked; fewer say too little."""

MOVERS = 15
MOVED_SOURCES = 8
"""Number of types and of sources of a comparison that a terminal shows."""
MAX_CLASSES = 24
"""Number of classes that a table or chart shows, the most frequent; a corpus may have more tags."""


@dataclass(frozen=True, slots=True)
class ClassShare:
    """Share of one class's tokens that is HIGH at one layer, with Wilson's 95 % interval."""

    layer: int
    name: str
    n: int
    n_high: int
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """The thresholds of one layer, and figures to judge them by."""

    layer: int
    thresholds: dict[str, dict[str, Any]]  # population -> row of the thresholds table
    labels: dict[
        str, dict[str, Any]
    ]  # the thresholds that decide HIGH: frozen ones, or the run's own
    cv: float  # sd / mean of all tokens except special ones
    q3_over_q2: float
    special_mean: float | None  # mean strength of the special tokens
    idf_auc: float | None  # AUC of rarity alone for HIGH; 0.5 is chance
    classes: tuple[ClassShare, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A run's summary."""

    uri: str
    info: dict[str, Any]
    bytes_per_token: dict[str, float]  # keys: tokens, documents, summary, neurons, pairs, all
    padding_share: float
    losses: Losses
    skipped: str  # files left out of the corpus, in words
    layers: tuple[LayerFacts, ...]


def summarise(run: manifest.RunFolder) -> Summary:
    """The summary of a complete run; reads only its small tables."""
    with checksums.named_damage(run.uri):
        return _summarise(run)


def _summarise(run: manifest.RunFolder) -> Summary:
    thresholds, labels = (
        manifest.read_table(run, "thresholds").to_pylist(),
        label_thresholds.labels(run).to_pylist(),
    )
    vocabulary = manifest.read_table(run, "vocabulary")
    histogram = manifest.read_table(run, "histogram")
    shards = manifest.read_table(run, "shards")
    files = manifest.read_table(run, "files")
    n = max(1, sum(shards["n_tokens"].to_pylist()))
    size = {
        t: sum(shards[f"{c}_bytes"].to_pylist()) / n
        for t, c in (
            ("tokens", "token"),
            ("documents", "document"),
            ("summary", "summary"),
            ("neurons", "neurons"),
            ("pairs", "pairs"),
        )
    }
    counts = run.info["counts"]
    layers = []
    for layer in run.info["layers"]:
        rows = {r["population"]: r for r in thresholds if r["layer"] == layer}
        main = rows["tokens"]
        words = vocabulary.filter(pc.equal(vocabulary["layer"], layer))
        strengths = histogram.filter(pc.equal(histogram["layer"], layer))
        special = strengths.filter(strengths["special"])
        layers.append(
            LayerFacts(
                layer=layer,
                thresholds=rows,
                labels={r["population"]: r for r in labels if r["layer"] == layer},
                cv=_ratio(main["sd"], main["mean"]),
                q3_over_q2=_ratio(main["q3"], main["q2"]),
                special_mean=_mean(special),
                idf_auc=_idf_auc(words),
                classes=_class_shares(layer, words),
            )
        )
    padding = 1 - counts["tokens"] / max(1, counts["forward_tokens"])
    return Summary(
        run.uri,
        run.info,
        {**size, "all": sum(size.values())},
        max(0.0, padding),
        losses.total(files),
        losses.describe_skipped(losses.skipped_files(files)),
        tuple(layers),
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _mean(rows: Any) -> float | None:
    n = rows["n"].to_numpy()
    return float(rows["strength"].to_numpy().astype(np.float64) @ n / n.sum()) if len(n) else None


def _class_shares(layer: int, vocabulary: Any) -> tuple[ClassShare, ...]:
    classes = np.array(vocabulary["class"].to_pylist())
    n, n_high = vocabulary["n"].to_numpy(), vocabulary["n_high"].to_numpy()
    shares = []
    for name in in_order(classes.tolist()):
        here = classes == name
        total, high = int(n[here].sum()), int(n_high[here].sum())
        if total and name != "special":
            low, upper = wilson(high, total)
            shares.append(
                ClassShare(layer, name, total, high, high / total, float(low), float(upper))
            )
    return tuple(shares)


def frequent_classes(facts: LayerFacts) -> list[int]:
    """Indices of the ``MAX_CLASSES`` most frequent of ``facts.classes``, ascending.

    They are valid at every layer.
    """
    by_n = sorted(range(len(facts.classes)), key=lambda at: -facts.classes[at].n)
    return sorted(by_n[:MAX_CLASSES])


def _idf_auc(vocabulary: Any) -> float | None:
    """Probability that a HIGH token's type is rarer than a LOW token's; ties count half.

    Exact, from the counts.
    """
    normal = np.array(vocabulary["class"].to_pylist()) != "special"
    idf = vocabulary["idf"].to_numpy()[normal]
    high = vocabulary["n_high"].to_numpy()[normal].astype(np.float64)
    low = vocabulary["n"].to_numpy()[normal] - high
    if not high.sum() or not low.sum():
        return None
    _, at = np.unique(idf, return_inverse=True)
    return float(auc(np.bincount(at, high), np.bincount(at, low)))


def to_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain values; class shares include their interval."""
    return asdict(summary)


def figure(value: float) -> str:
    """Format ``value`` with about five digits."""
    return f"{value:,.{max(0, 5 - max(1, len(str(int(abs(value))))))}f}"


# --- tables


def _titled_table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(
        title=Text(printable(title)), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.title_justify, table.title_style = "left", "bold"
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at < left else "right", no_wrap=True)
    return table


def _print(table: Table, console: Console) -> None:
    """Print ``table`` at its full width: a narrow terminal wraps lines but cuts no figure."""
    table.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table, crop=False, no_wrap=True, overflow="ignore")


GENERIC = re.compile(
    r"models?|weights|final|export|output|snapshots?|checkpoint.*|[0-9a-f]{40}", re.IGNORECASE
)
"""Names of folders that do not identify a model."""


def model_title(name: str) -> str:
    """Short name of the model ``name`` (a hub name, a folder or a GGUF file), without its path."""
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~")]
    if not parts or (len(parts) == 2 and not name.startswith(("/", ".", "~"))):
        return name  # a hub name, or a folder relative to the run's working directory
    for part in parts:
        if part.startswith("models--"):  # the hub's cache
            return part.removeprefix("models--").replace("--", "/")
    at = next(
        (at for at in reversed(range(len(parts))) if not GENERIC.fullmatch(parts[at])),
        len(parts) - 1,
    )
    return "/".join(parts[at:])


def facts(summary: Summary) -> list[tuple[str, str]]:
    """Facts about the run, names and values for people.

    Raises ``StoreError`` for a damaged run.json.
    """
    with checksums.named_damage(summary.uri):
        return _facts(summary)


def _facts(summary: Summary) -> list[tuple[str, str]]:
    info = summary.info
    counts, model, size = info["counts"], info["model"], summary.bytes_per_token
    rows = [
        ("where", summary.uri),
        ("corpus", ", ".join(info["config"]["corpus"])),
        (
            "documents",
            f"{counts['documents']:,} = {num_measured(counts):,} measured + {counts['empty']:,} "
            "empty "
            f"+ {counts['quarantined']:,} quarantined, in {info['corpus']['files']:,} files",
        ),
        ("lost", losses.describe(summary.losses) or "nothing"),
        *(
            [("replaced", replaced)]
            if (replaced := losses.describe_replaced(summary.losses))
            else []
        ),
        *([("unknown", unknown)] if (unknown := losses.describe_unknown(info)) else []),
        (
            "tokens",
            f"{counts['tokens']:,}, of them {counts['special']:,} special (kept out of the "
            "thresholds)",
        ),
        (
            "model",
            f"{model_title(model['name'])} "
            f"({model['type']}, {model['depth']} layers, {info['measure']['dtype']})",
        ),
        ("precision", precision.describe(precision.from_json(info["precision"]))),
        ("layers", ", ".join(str(k) for k in info["layers"]) + "  (0 = embeddings)"),
        *(
            [("classes", f"of a type its most frequent tag in {info['measure']['labels']!r}")]
            if "labels" in info["measure"]
            else []
        ),
        (
            "size",
            f"{size['tokens']:.2f} bytes a token in the tokens table, {size['all']:.2f} in all",
        ),
        *(
            [("signals", ", ".join(info["measure"]["signals"]))]
            if len(info["measure"]["signals"]) > 1
            else []
        ),
        (
            "padding",
            f"{summary.padding_share:.1%} of what the model saw was padding, filler or overlap",
        ),
        (
            "finished",
            f"{info['finished_at']}, {info['seconds']:,.0f} s, "
            f"{counts['shards'] - counts['shards_reused']} of {counts['shards']} shards new",
        ),
    ]
    if missing := info.get("quarantined"):
        uris = ", ".join(q["uri"] for q in missing[:3]) + (", ..." if len(missing) > 3 else "")
        rows.append(
            ("missing", f"{len(missing)} of {len(missing) + counts['shards']} shards: {uris}")
        )
    if summary.skipped:
        rows.append(("skipped", summary.skipped))
    return rows


def cautions(summary: Summary) -> list[str]:
    """Limits of what the figures say; an indented line belongs to the line before it."""
    lines = []
    if summary.losses.any:
        lines.append(f"Lost, and in no figure: {losses.describe(summary.losses)}.")
    for layer in summary.layers:
        main = layer.thresholds["tokens"]
        line = (
            f"Layer {layer.layer}: Q3 lies {layer.q3_over_q2 - 1:.1%} above the median (CV "
            f"{layer.cv:.2f})"
        )
        if layer.idf_auc is not None:
            line += (
                f"; rarity alone tells HIGH from LOW with AUC {layer.idf_auc:.2f} (0.5 = not at "
                "all, 1 = always)"
            )
        if layer.special_mean is not None:
            line += (
                f"; special tokens have mean {figure(layer.special_mean)}, the others "
                f"{figure(main['mean'])}"
            )
        lines.append(line + ".")
        if main["n_sinks"]:
            sinks = f"{main['n_sinks']:,} sinks over {main['sink_factor']:g} medians"
            lines.append(f"  {sinks}: compare medians, not means.")
    if all(layer.layer != 0 for layer in summary.layers):
        with_control = ",".join(map(str, (0, *(layer.layer for layer in summary.layers))))
        lines.append(
            "Layer 0 was not recorded: to see what the embeddings alone explain, give the same "
            "'afn run' "
            f"command with --layers {with_control} and another --store."
        )
    lines.append("Never compare raw strengths across layers or models; compare ranks and shares.")
    return lines


def render(summary: Summary, console: Console) -> None:
    """Print a run's facts, thresholds, class shares beside their control, and cautions."""
    with checksums.named_damage(summary.uri):
        _render(summary, console)


def _render(summary: Summary, console: Console) -> None:
    table = _titled_table(f"Run {summary.info['id']}", "", "", left=2)
    table.columns[1].no_wrap, table.columns[1].overflow = False, "fold"
    table.show_header = False
    for name, value in facts(summary):
        table.add_row(name, Text(printable(value)))
    console.print(table)
    render_thresholds(summary, console)
    render_classes(summary, console)
    render_caution(summary, console)


def render_thresholds(summary: Summary, console: Console) -> None:
    """Print the quartiles of every layer, with and without sinks."""
    table = _titled_table(
        "Thresholds (a token at or above Q3 is HIGH)",
        "layer",
        "of",
        "tokens",
        "Q1",
        "Q2",
        "Q3",
        "max",
        "CV",
        "Q3/Q2",
        "sinks",
        left=2,
    )
    for facts in summary.layers:
        for population, row in facts.thresholds.items():
            if population != "tokens" and not row["n_sinks"]:
                continue
            main = population == "tokens"
            table.add_row(
                str(facts.layer),
                "all" if main else "no sinks",
                f"{row['n']:,}",
                *(figure(row[q]) for q in ("q1", "q2", "q3", "max")),
                f"{_ratio(row['sd'], row['mean']):.3f}",
                f"{_ratio(row['q3'], row['q2']):.3f}",
                f"{row['n_sinks']:,}" if main else "",
            )
        if (row := facts.labels["tokens"]) != facts.thresholds["tokens"]:
            table.add_row(
                str(facts.layer),
                "frozen",
                f"{row['n']:,}",
                *(figure(row[q]) for q in ("q1", "q2", "q3")),
                "",
                "",
                f"{_ratio(row['q3'], row['q2']):.3f}",
                f"{row['n_sinks']:,}",
            )
    _print(table, console)
    if any(f.labels != f.thresholds for f in summary.layers):
        shares = ", ".join(
            f"layer {f.layer}: {_ratio(r['n_high'], r['n']):.1%}"
            for f in summary.layers
            for r in [f.labels["tokens"]]
        )
        console.print(
            "HIGH is decided by the frozen thresholds, of "
            f"{printable(str(summary.info['config']['thresholds']))}; "
            f"tokens that are HIGH by them: {shares}",
            markup=False,
            soft_wrap=True,
        )


def render_classes(summary: Summary, console: Console) -> None:
    """Print the HIGH share of each class at every layer, beside the embeddings as the control."""
    ordered = sorted(summary.layers, key=lambda f: (f.layer == 0, f.layer))
    shown = ordered[-max(2, (console.width - 20) // 21) :]
    heads = [f"layer {f.layer}" + (" (control)" if f.layer == 0 else "") for f in shown]
    table = _titled_table(
        "Which classes are HIGH (share, 95 % interval)", "class", "tokens", *heads
    )
    classes = ordered[0].classes
    left_out = [f"{len(ordered) - len(shown)} more layers"] * (len(shown) < len(ordered))
    left_out += [count(len(classes) - MAX_CLASSES, "rarer tag")] * (len(classes) > MAX_CLASSES)
    if left_out:
        table.caption, table.caption_justify = (
            f"and {' and '.join(left_out)}: afn show --json",
            "left",
        )
    total = sum(c.n for c in classes)
    for at in frequent_classes(ordered[0]):
        shares = [
            f"{c.share:.3f} ({c.low:.3f}-{c.high:.3f})"
            for c in (facts.classes[at] for facts in shown)
        ]
        table.add_row(Text(printable(classes[at].name)), f"{classes[at].n / total:.1%}", *shares)
    _print(table, console)


def render_caution(summary: Summary, console: Console) -> None:
    """Print the cautions."""
    lines = [
        "[bold]To be careful about[/bold]",
        *(escape(printable(line)) for line in cautions(summary)),
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


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

    Words are ranked by the end of the interval nearer to the middle. A content word has two letters
    or more and is no function word of the run's language. Reads the run's tokens once.
    """
    ((q3,),) = run.sql(
        "SELECT q3 FROM labels WHERE layer = ? AND population = 'tokens'", [layer]
    ).fetchall()
    strength = f"mean_strength_{int(layer)}"
    query = f"""
        SELECT lower(text) AS word, count(*) AS n, count(*) FILTER ({is_high(strength, "$q3")}) AS n_high,
               quantile_disc({strength}, 0.5) AS median
        FROM words WHERE regexp_full_match(text, '\\p{{L}}{{2,}}') GROUP BY lower(text) HAVING n >= $least
    """  # noqa: S608 - the layer is a number
    rows = run.sql(query, {"q3": q3, "least": SALIENT_MIN_N}).fetchall()
    functions = lexicon.function_words(run.info["config"]["language"])
    found = []
    for word, n, n_high, median in rows:
        if word not in functions:
            low, high = wilson(n_high, n)
            found.append(SalientWord(word, n, n_high, median, float(low), float(high)))
    most = sorted(found, key=lambda w: (-w.low, -w.n, w.text))[:SALIENT_WORDS]
    least = sorted(found, key=lambda w: (w.high, -w.n, w.text))[:SALIENT_WORDS]
    return most, least


def render_salient(run: Run, layer: int, console: Console) -> None:
    """Print the most and the least salient words, side by side."""
    table = _titled_table(
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
    _print(table, console)


# --- two runs


def render_comparison(found: compare.Comparison, console: Console) -> None:
    """Print both runs, the distances at every layer, and the changes at the deepest layer."""
    table = _titled_table("Compared", "", "tokens", "documents", "corpus", "run", left=0)
    for at in (0, 3, 4):
        table.columns[at].justify = "left"
    for name, run in (("A", found.a), ("B", found.b)):
        about = compare.describe(run)
        corpus = ", ".join(about["corpus"])
        table.add_row(
            name,
            f"{about['tokens']:,}",
            f"{about['documents']:,}",
            *(Text(printable(t)) for t in (corpus, run.uri)),
        )
    _print(table, console)
    whole = pc.is_null(found.drift["source"])
    _render_drift(
        "Strengths of all tokens", "layer", found.drift.filter(whole).to_pylist(), console
    )
    layer = max(found.drift["layer"].to_pylist())
    _render_class_drift(layer, found.classes, console)
    _render_movers(layer, found.movers, console)
    at_layer = pc.and_(pc.invert(whole), pc.equal(found.drift["layer"], layer))
    if sources := found.drift.filter(at_layer).to_pylist():
        apart = sorted(sources, key=lambda r: (-1.0 if r["ks"] is None else -r["ks"], r["source"]))
        title = (
            f"Sources at layer {layer}: new or gone, then the furthest apart ({len(sources):,} in "
            "all)"
        )
        _render_drift(title, "source", apart[:MOVED_SOURCES], console)
    console.print(
        Text("\n".join(["To be careful about", *map(printable, found.notes)])), soft_wrap=True
    )


def _render_drift(title: str, first: str, rows: list[dict[str, Any]], console: Console) -> None:
    """Print ``DRIFT_SCHEMA`` rows: quartiles of B, their shift from A, HIGH shares, distances."""
    table = _titled_table(
        title,
        first,
        "tokens A",
        "tokens B",
        "Q1 B",
        "shift",
        "Q2 B",
        "shift",
        "Q3 B",
        "shift",
        "HIGH A",
        "HIGH B",
        "PSI",
        "KS",
        "JS",
    )
    for row in rows:
        quartiles = []
        for q in ("q1", "q2", "q3"):
            a, b = row[f"{q}_a"], row[f"{q}_b"]
            quartiles += [
                "" if b is None else figure(b),
                f"{b / a - 1:+.2%}" if a and b is not None else "",
            ]
        shares = [
            "" if row[s] is None else f"{row[s]:.1%}" for s in ("share_high_a", "share_high_b")
        ]
        distances = ["" if row[d] is None else f"{row[d]:.4f}" for d in ("psi", "ks", "js")]
        name = Text(printable(str(row[first])))
        table.add_row(name, f"{row['n_a']:,}", f"{row['n_b']:,}", *quartiles, *shares, *distances)
    _print(table, console)


def _render_class_drift(layer: int, classes: pa.Table, console: Console) -> None:
    """Print each class's share of the tokens and its HIGH share, in both runs."""
    table = _titled_table(
        f"Classes at layer {layer} (HIGH: share, 95 % interval)",
        "class",
        "tokens A",
        "tokens B",
        "HIGH A",
        "HIGH B",
    )
    for row in classes.filter(pc.equal(classes["layer"], layer)).to_pylist():
        highs = (
            f"{row[f'share_high_{r}']:.3f} "
            f"({row[f'share_high_low_{r}']:.3f}-{row[f'share_high_high_{r}']:.3f})"
            for r in "ab"
        )
        table.add_row(
            Text(printable(row["class"])), f"{row['share_a']:.1%}", f"{row['share_b']:.1%}", *highs
        )
    _print(table, console)


def _render_movers(layer: int, movers: pa.Table, console: Console) -> None:
    """Print the most significantly moved types, and the most frequent new and vanished ones."""
    here = movers.filter(pc.equal(movers["layer"], layer))
    of_status = {s: here.filter(pc.equal(here["status"], s)) for s in ("both", "new", "vanished")}
    both, moved = of_status["both"], compare.moved(here)
    words = compare.whole_words(moved)
    title = (
        f"Types at layer {layer}: {len(moved):,} of {len(both):,} in both moved (q < "
        f"{compare.SIGNIFICANT})"
    )
    table = _titled_table(
        title,
        "word",
        "class",
        "n A",
        "n B",
        "HIGH A",
        "HIGH B",
        "z",
        "q",
        "median A",
        "median B",
        left=2,
    )
    if parts := len(moved) - len(words):
        table.caption, table.caption_justify = (
            f"and {count(parts, 'part')} of words: afn compare --json",
            "left",
        )
    for row in words.slice(0, MOVERS).to_pylist():
        medians = ("" if row[f"median_{r}"] is None else figure(row[f"median_{r}"]) for r in "ab")
        table.add_row(
            Text(printable(row["text"])),
            Text(printable(row["class"])),
            f"{row['n_a']:,}",
            f"{row['n_b']:,}",
            f"{row['share_high_a']:.1%}",
            f"{row['share_high_b']:.1%}",
            f"{row['z']:+.1f}",
            f"{row['q']:.1e}",
            *medians,
        )
    if len(moved):
        _print(table, console)
    else:
        console.print(Text(title, style="bold"))
    for status, verb, n in (("new", "are new", "n_b"), ("vanished", "have vanished", "n_a")):
        types = of_status[status]
        words = compare.whole_words(types).slice(0, MOVERS).to_pylist()
        most = ", ".join(f"{r['text']} ({r[n]:,})" for r in words)
        console.print(
            Text(printable(f"{len(types):,} types {verb}" + (f": {most}" if most else ""))),
            soft_wrap=True,
        )
