"""One run as a report page: a self-contained HTML file with Vega charts."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.analysis import claims
from afn_ray.config import RunConfig
from afn_ray.errors import ConfigError, QueryError, StoreError
from afn_ray.query import database
from afn_ray.reduce import compare, losses
from afn_ray.schema import FEATURES
from afn_ray.show import charts, overview
from afn_ray.show.charts import MAX_ROWS, Chart, Table, cut, number, percent
from afn_ray.store import checksums, disk, manifest
from afn_ray.text import printable

MAX_CHARS = 10_000
"""Largest length of any text on the page, in characters; a corpus may list a million files."""
MAX_SCREENED = 20
MAX_SCREENED_TOKENS = 240
MAX_SCREENED_CHARS = 2_000
"""Largest length of one screened document, in characters; one token may be that long."""
QUERY_TIMEOUT_S = 300.0
CLAIMS_S = 300.0
"""Time limit of the claims on a page, in seconds; ``afn claims`` has no such limit."""
PACKAGES = {"jinja2": "Jinja2", "vl_convert": "vl-convert-python"}


@dataclass(frozen=True, slots=True)
class ScreenedDocument:
    """A screened document and its beginning, in pieces of one quartile.

    Quartile 0 is a special token or text between tokens.
    """

    row: dict[str, Any]  # of the screened table
    pieces: tuple[tuple[str, int], ...]
    is_cut: bool


def write_report(
    run: str | manifest.RunFolder,
    out: Path | None = None,
    *,
    baseline: str | manifest.RunFolder | None = None,
    ranks_only: bool = False,
    with_claims: bool = True,
) -> Path:
    """Write the page of ``run`` to ``out`` atomically, and return its path.

    ``out`` None is ``report-<run id>.html`` in the working directory. ``run`` and ``baseline`` are
    a run's URI, a store's URI for its latest complete run, or a folder. With a baseline the page
    shows the changes since it; ``ranks_only`` is that of ``compare``. Leaving out the claims
    (``with_claims`` false) saves most of the time.

    Raises ``ConfigError`` without the packages of ``afn-ray[report]`` or where ``out`` cannot be
    written, and ``StoreError`` without such a run.
    """
    folder = manifest.find_run(run) if isinstance(run, str) else run
    path = Path(f"report-{folder.id}.html") if out is None else out
    comparison = (
        None if baseline is None else compare.compare(baseline, folder, ranks_only=ranks_only)
    )
    page = render(folder, comparison, with_claims=with_claims)
    with disk.write_local(path) as file:
        file.write(page.encode())
    return path


def render(
    run: manifest.RunFolder,
    comparison: compare.Comparison | None = None,
    *,
    with_claims: bool = True,
) -> str:
    """The page of a complete ``run``, and of ``comparison``, in which it is ``b``.

    Reads the tokens once, and more often ``with_claims``. Raises ``StoreError`` for a damaged run.
    """
    jinja2, vl_convert = check_packages()
    try:
        with checksums.named_damage(run.uri):
            return _render(jinja2, vl_convert, run, comparison, with_claims)
    except jinja2.UndefinedError as error:  # the template reads run.json too
        raise StoreError(f"{run.uri} is damaged: {error}{checksums.ASK_VERIFY}") from error


def _render(
    jinja2: Any,
    vl_convert: Any,
    run: manifest.RunFolder,
    comparison: compare.Comparison | None,
    with_claims: bool,
) -> str:
    info, summary = run.info, overview.summarise(run)
    main = summary.layers[-1]
    words = _by_layer(manifest.read_table(run, "vocabulary"), info["layers"])
    drawn = {
        "histograms": _histograms(run, summary, comparison),
        "classes": [charts.classes_chart(summary, words[main.layer])],
        "layers": charts.layers_charts(summary) if len(summary.layers) > 1 else [],
        "vocabulary": [charts.vocabulary_chart(words[main.layer])],
        "movers": []
        if comparison is None
        else [c for c in [charts.movers_chart(comparison.movers, main.layer)] if c is not None],
    }
    points = charts.points(words)
    with database.open_run(run.uri, timeout_s=QUERY_TIMEOUT_S) as tables:
        salient, screened = _salient(tables, main.layer), _screened(run, tables)
        claimed = _claims(tables) if with_claims else "they were not asked for"
    claims_of = [] if isinstance(claimed, str) else charts.claims_charts(claimed, main.layer)
    drawn["claims"] = [chart for *_, group in claims_of for chart in group]
    style, script, template = (
        resources.files("afn_ray.show").joinpath(f"report.{kind}").read_text("utf-8")
        for kind in ("css", "js", "html.jinja")
    )
    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    page: str = environment.from_string(template).render(
        run=run,
        title=_title(info["config"]["corpus"]),
        model=overview.model_title(info["model"]["name"]),
        summary=summary,
        main=main,
        glance=_glance(summary, comparison),
        facts=overview.facts(summary),
        cautions=overview.cautions(summary),
        thresholds=_thresholds_table(summary),
        charts=drawn,
        points=points,
        salient=salient,
        screened=screened,
        claims=claims_of,
        claims_notes=claimed if isinstance(claimed, str) else claimed.notes,
        features=FEATURES,
        sources=_sources_table(run, main.layer),
        files=_files_table(run),
        comparison=comparison,
        drift=None if comparison is None else _drift(comparison, main.layer),
        command=command_line(info["config"]),
        config=json.dumps(info["config"], indent=1),
        data={
            "charts": {chart.name: chart.spec for group in drawn.values() for chart in group},
            "points": points,
        },
        style=style,
        vega=vega,
        script=script,
        policy={
            "style": _policy(style),
            "script": " ".join(_policy(text) for text in (vega, script)),
        },
    )
    return page


def check_packages() -> list[Any]:
    """The modules of ``PACKAGES``. Raises ``ConfigError`` for one that is not installed."""
    found = []
    for name, package in PACKAGES.items():
        try:
            found.append(import_module(name))
        except ImportError as error:
            raise ConfigError(
                f'a report needs the package {package}; pip install "afn-ray[report]"'
            ) from error
    return found


def _policy(text: str) -> str:
    """Content-Security-Policy source of the inline ``text``: its hash.

    Raises ``AssertionError`` where the text would end its script or style element.
    """
    if "</script" in text.lower() or "</style" in text.lower() or "<!--" in text:
        raise AssertionError("what is written into a script or style element would end it")
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shown(value: Any) -> Any:
    """External text, cut to ``MAX_CHARS``, with characters that reorder or hide text as escapes.

    Markup is unchanged.
    """
    if type(value) is not str:
        return value
    return printable(value if len(value) <= MAX_CHARS else value[:MAX_CHARS] + " …", keep="\n\t")


def _title(corpus: Sequence[str]) -> str:
    """Short name of a corpus: the end of its first path."""
    more = f" and {len(corpus) - 1} more" if len(corpus) > 1 else ""
    return "/".join(corpus[0].rstrip("/").split("/")[-2:]) + more


def _by_layer(table: pa.Table, layers: Sequence[int]) -> dict[int, pa.Table]:
    """Rows of each layer, without special tokens."""
    normal = table.filter(pc.not_equal(table["class"], "special"))
    return {k: normal.filter(pc.equal(normal["layer"], k)).combine_chunks() for k in layers}


def _histograms(
    run: manifest.RunFolder, summary: overview.Summary, comparison: compare.Comparison | None
) -> list[Chart]:
    """One chart for each layer, with the baseline's line where both runs have the same measure."""
    now, before, compared = manifest.read_table(run, "histogram"), None, set()
    if comparison is not None and comparison.a.info["measure"]["id"] == run.info["measure"]["id"]:
        before, compared = (
            manifest.read_table(comparison.a, "histogram"),
            {r["layer"] for r in _whole(comparison)},
        )
    return [
        charts.histogram_chart(
            facts.layer,
            now,
            [facts.labels["tokens"][q] for q in ("q1", "q2", "q3")],
            before if facts.layer in compared else None,
        )
        for facts in summary.layers
    ]


def command_line(config: Mapping[str, Any]) -> str:
    """The ``afn run`` command that gives a run's recorded ``config``, quoted for a shell."""
    words = ["afn", "run", *config["corpus"]]
    for field in fields(RunConfig):
        value = config.get(field.name, field.default)
        if field.name == "corpus" or (field.default is not MISSING and value == field.default):
            continue
        flag = "--" + field.name.replace("_", "-")
        words += (
            [flag if value else flag.replace("--", "--no-", 1)]
            if isinstance(value, bool)
            else [flag, str(value)]
        )
    return shlex.join(words)


# --- tables


def _glance(
    summary: overview.Summary, comparison: compare.Comparison | None
) -> list[tuple[str, str, str]]:
    """Cards at the top of the page: a figure, its name, and the value to compare it with."""
    counts, main, first = summary.info["counts"], summary.layers[-1], summary.layers[0]
    cards = [
        (
            f"{counts['tokens'] - counts['special']:,}",
            "tokens",
            f"and {counts['special']:,} special ones, apart",
        ),
        (
            f"{counts['documents']:,}",
            "documents",
            f"{counts['quarantined']:,} quarantined, {counts['empty']:,} empty",
        ),
    ]
    if (lost := summary.losses).any:
        against = f"{losses.rounded_up(lost.share)} of the corpus: {losses.said_documents(lost)}"
        cards.append((losses.said_bytes(lost.lost_bytes), "lost", against))
    for share, control in list(zip(main.classes, first.classes, strict=True))[
        :1
    ]:  # content, where there are content words
        against = (
            f"at layer 0, the control: {percent(control.share)}"
            if first.layer == 0
            else "layer 0 not recorded"
        )
        cards.append(
            (
                percent(share.share),
                f"of {share.name} tokens are HIGH at layer {main.layer}",
                against,
            )
        )
    if main.idf_auc is not None:
        cards.append(
            (
                number(main.idf_auc, 2),
                "AUC of rarity alone for HIGH",
                "0.5 tells nothing, 1 tells all",
            )
        )
    for row in [] if comparison is None else _whole(comparison):
        if row["layer"] == main.layer:
            cards.append(
                (
                    number(row["psi"], 4),
                    f"PSI since the baseline, layer {main.layer}",
                    _reading(row["psi"]),
                )
            )
    return cards


def _reading(psi: float | None) -> str:
    """Conventional reading of a population stability index."""
    if psi is None:
        return "not known: ranks only"
    return (
        "exactly the same"
        if psi == 0
        else "little"
        if psi < 0.1
        else "some"
        if psi < 0.25
        else "much"
    )


def _thresholds_table(summary: overview.Summary) -> Table:
    rows = []
    for facts in summary.layers:
        own, frozen = facts.thresholds, facts.labels["tokens"]
        of = {"all": own["tokens"]}
        if own["tokens"]["n_sinks"]:
            of["without sinks"] = own["tokens_without_sinks"]
        if frozen != own["tokens"]:
            of["all, frozen"] = frozen
        for name, row in of.items():
            ratios = (
                row[a] / row[b] if row[b] else None for a, b in (("sd", "mean"), ("q3", "q2"))
            )
            rows.append(
                (
                    str(facts.layer),
                    name,
                    f"{row['n']:,}",
                    *(number(row[q]) for q in ("q1", "q2", "q3", "max")),
                    *(number(ratio, 3) for ratio in ratios),
                    percent(row["n_high"] / row["n"] if row["n"] else None),
                    "" if name == "without sinks" else f"{row['n_sinks']:,}",
                )
            )
    heads = ("layer", "of", "tokens", "Q1", "Q2", "Q3", "max", "CV", "Q3/Q2", "HIGH", "sinks")
    return Table(
        "Quartiles of the strengths; a token at or above Q3 is HIGH", heads, tuple(rows), left=2
    )


def _sources_table(run: manifest.RunFolder, layer: int) -> Table | None:
    """The largest sources; None for a run without a table of sources."""
    if "sources" not in run.info["tables"]:
        return None
    table = manifest.read_table(run, "sources")
    rows = (
        table.filter(pc.equal(table["layer"], layer))
        .drop_columns(["bins", "counts"])
        .sort_by([("n", "descending")])
    )
    caption = f"Sources at layer {layer}" + (
        f", the largest {MAX_ROWS} of {len(rows):,}" if len(rows) > MAX_ROWS else ""
    )
    cells = (
        (
            r["source"],
            f"{r['n_docs']:,}",
            f"{r['n']:,}",
            percent(r["n_high"] / r["n"] if r["n"] else None),
        )
        for r in rows.slice(0, MAX_ROWS).to_pylist()
    )
    return Table(caption, ("source", "documents", "tokens", "HIGH"), tuple(cells))


def _files_table(run: manifest.RunFolder) -> Table | None:
    """The files with most bytes lost or characters replaced; None without any."""
    table = manifest.read_table(run, "files")
    lossy = pc.or_(losses.lost_something(table), pc.greater(table["n_replaced"], 0))
    order = [("lost_bytes", "descending"), ("n_replaced", "descending"), ("source", "ascending")]
    rows = table.filter(lossy).sort_by(order)
    if not len(rows):
        return None
    caption = "Files that were not read as a whole" + (
        f", the worst {MAX_ROWS} of {len(rows):,}" if len(rows) > MAX_ROWS else ""
    )
    cells = (
        (
            row["source"],
            losses.said_bytes(row["num_bytes"]),
            losses.said_bytes(row["lost_bytes"]),
            losses.rounded_down(row["share_read"]),
            _said_lost_documents(row),
            f"{row['n_replaced']:,}",
        )
        for row in rows.slice(0, MAX_ROWS).to_pylist()
    )
    heads = ("file", "size", "lost", "read", "documents lost", "characters replaced")
    return Table(caption, heads, tuple(cells))


def _said_lost_documents(row: Mapping[str, Any]) -> str:
    known = f"{row['lost_documents']:,}"
    if not row["lost_unknown"]:
        return known
    return f"{known} or more" if row["lost_documents"] else "unknown"


def _whole(comparison: compare.Comparison) -> list[dict[str, Any]]:
    """The rows of all tokens, one for each layer."""
    return [r for r in comparison.drift.to_pylist() if r["source"] is None]


def _drift(comparison: compare.Comparison, layer: int) -> dict[str, Any]:
    """The tables of changes; those with many rows for each layer are of ``layer`` only."""
    heads = (
        "tokens before",
        "now",
        "Q1 before",
        "now",
        "Q2 before",
        "now",
        "Q3 before",
        "now",
        "HIGH before",
        "now",
        "PSI",
        "KS",
        "JS",
    )

    def cells(r: Mapping[str, Any]) -> tuple[str, ...]:
        return (
            f"{r['n_a']:,}",
            f"{r['n_b']:,}",
            *(number(r[f"{q}_{ab}"]) for q in ("q1", "q2", "q3") for ab in "ab"),
            percent(r["share_high_a"]),
            percent(r["share_high_b"]),
            *(number(r[d], 4) for d in ("psi", "ks", "js")),
        )

    rows = comparison.drift.to_pylist()
    layers = tuple((str(r["layer"]), *cells(r)) for r in rows if r["source"] is None)
    of_sources = [r for r in rows if r["source"] is not None and r["layer"] == layer]
    new_or_gone = 2.0  # above any KS, so that new and vanished sources come first
    of_sources.sort(
        key=lambda r: (-(new_or_gone if r["ks"] is None else r["ks"]), -r["n_a"] - r["n_b"])
    )
    sources = tuple((r["source"], *cells(r)) for r in of_sources[:MAX_ROWS])
    table = comparison.movers
    movers = table.filter(pc.equal(table["layer"], layer))
    of_status = {
        s: movers.filter(pc.equal(movers["status"], s)) for s in ("both", "new", "vanished")
    }
    moved = compare.moved(movers)
    high = "{share_high_%s:.3f} ({share_high_low_%s:.3f}–{share_high_high_%s:.3f})"
    classes = tuple(
        (
            r["class"],
            f"{r['n_a']:,}",
            f"{r['n_b']:,}",
            percent(r["share_a"]),
            percent(r["share_b"]),
            *((high % (run, run, run)).format(**r) for run in "ab"),
        )
        for r in comparison.classes.to_pylist()
        if r["layer"] == layer
    )
    return {
        "layers": Table("Strengths, all tokens", ("layer", *heads), layers),
        "sources": Table(
            f"Sources at layer {layer}, the furthest by KS first", ("source", *heads), sources
        ),
        "num_sources": len(of_sources),
        "classes": Table(
            f"Classes at layer {layer}: their part of the tokens, and the share of theirs that is "
            "HIGH (95 % interval)",
            ("class", "tokens before", "now", "part before", "now", "HIGH before", "now"),
            classes,
        ),
        "num_both": len(of_status["both"]),
        "num_moved": len(moved),
        **{
            s: _types_table(of_status[s], n, caption)
            for s, n, caption in (
                ("new", "n_b", "New types"),
                ("vanished", "n_a", "Vanished types"),
            )
        },
    }


def _types_table(types: pa.Table, n: str, caption: str) -> Table:
    words = compare.whole_words(types).sort_by([(n, "descending"), ("token_id", "ascending")])
    rows, ab = words.slice(0, MAX_ROWS).to_pylist(), n[-1]
    some = (
        f"{caption}, the most frequent {len(rows)} words of {len(types):,} types"
        if len(types) > len(rows)
        else caption
    )
    cells = (
        (cut(r["text"]), r["class"], f"{r[n]:,}", percent(r[f"share_high_{ab}"])) for r in rows
    )
    return Table(some, ("word", "class", "n", "HIGH"), tuple(cells), left=2)


# --- figures from the tokens


def _salient(tables: database.Run, layer: int) -> tuple[Table, ...] | str:
    """The most and the least salient words, or why they are unknown.

    The query over all words may exceed its limits.
    """
    try:
        found = overview.salient_words(tables, layer)
    except QueryError as error:
        return str(error)
    return tuple(
        Table(
            f"{name} salient",
            ("word", "n", "HIGH", "95 % interval", "median"),
            tuple(
                (
                    w.text,
                    f"{w.n:,}",
                    f"{w.n_high / w.n:.0%}",
                    f"{w.low:.2f}–{w.high:.2f}",
                    number(w.median),
                )
                for w in words
            ),
        )
        for name, words in zip(("Most", "Least"), found, strict=True)
    )


def _claims(tables: database.Run) -> claims.Claims | str:
    """Claims and controls, or why they are unknown."""
    try:
        return claims.claims(tables, max_s=CLAIMS_S)
    except QueryError as error:
        return str(error)


def _screened(run: manifest.RunFolder, tables: database.Run) -> list[ScreenedDocument] | None:
    """The strangest documents, their tokens by quartile; None for a run that was not screened."""
    if "screened" not in run.info["tables"]:
        return None
    rows = manifest.read_table(run, "screened").sort_by("rank").slice(0, MAX_SCREENED).to_pylist()
    has_offsets = "start" in tables.tokens().columns
    places = 'start, "end"' if has_offsets else "NULL, NULL"
    tokens: dict[int, list[tuple[Any, ...]]] = {r["doc"]: [] for r in rows}
    for layer in {r["layer"] for r in rows}:  # one layer, or none
        ask = f"""
            SELECT doc, text, surface, is_word_start, {places}, coalesce(quartile_{int(layer)}, 0) FROM tokens
            WHERE doc IN (SELECT unnest($docs)) AND position <= $last AND NOT is_special ORDER BY doc, position
        """  # noqa: S608 - our own text and a number
        for doc, *token in tables.sql(
            ask, {"docs": list(tokens), "last": MAX_SCREENED_TOKENS}
        ).fetchall():
            tokens[doc].append(tuple(token))
    return [_bounded(r, (_placed if has_offsets else _unplaced)(tokens[r["doc"]])) for r in rows]


def _placed(tokens: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, int]]:
    """Tokens by their offsets, as written in the text where the surface of their word is known.

    Characters that tokens share appear once.
    """
    words: list[list[tuple[Any, ...]]] = []
    for token in tokens:
        if token[2] or not words:
            words.append([])
        words[-1].append(token)
    cursor = 0
    for word in words:
        surface, first = word[0][1], word[0][3]
        origin = (
            first if surface is None else max(first, word[-1][4] - len(surface))
        )  # the surface has no leading space
        if cursor and first > cursor:
            yield " ", 0
        for text, _, _, start, end, quartile in word:
            if (
                body := text
                if surface is None
                else surface[max(cursor, start, origin) - origin : end - origin]
            ):
                yield body, quartile
            cursor = end


def _unplaced(tokens: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, int]]:
    """Tokens without offsets, as in the vocabulary, with a space before each word."""
    for at, (text, _, is_word_start, _, _, quartile) in enumerate(tokens):
        if at and is_word_start:
            yield " ", 0
        yield text, quartile


def _bounded(row: dict[str, Any], pieces: Iterable[tuple[str, int]]) -> ScreenedDocument:
    """``row`` with its ``pieces``, cut to ``MAX_SCREENED_CHARS``."""
    left, shown = MAX_SCREENED_CHARS, []
    for text, quartile in pieces:
        shown.append((text[:left], quartile))
        left -= len(text)
        if left <= 0:
            break
    return ScreenedDocument(row, tuple(shown), left <= 0 or row["n_tokens"] > MAX_SCREENED_TOKENS)
