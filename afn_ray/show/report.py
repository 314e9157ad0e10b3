"""One run as a report page: a self-contained HTML file with Vega charts."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from afn_ray.analysis import claims
from afn_ray.analysis.audit import Audit, to_keep
from afn_ray.errors import ConfigError, QueryError, StoreError
from afn_ray.query import database
from afn_ray.query.database import Run
from afn_ray.reduce import compare, history
from afn_ray.reduce.drift import table_by_layer
from afn_ray.schema import FEATURES, HISTORY_SCHEMA
from afn_ray.show import (
    beyond,
    charts,
    claim_charts,
    history_charts,
    provenance,
    run_facts,
    vocabulary_charts,
)
from afn_ray.show.figures import number
from afn_ray.show.moved import Moved, moved_types
from afn_ray.show.page_tables import (
    Table,
    drift_of_all_tokens,
    drift_tables,
    files_table,
    glance,
    groups_table,
    kept_table,
    sources_table,
    thresholds_table,
)
from afn_ray.show.salient import SalientWord, salient_words
from afn_ray.show.screened import screened_documents
from afn_ray.show.sparklines import earlier_nights
from afn_ray.show.summary import RunSummary, summarise
from afn_ray.show.vega import Chart, VegaSpec
from afn_ray.show.verdict_facts import verdict_facts
from afn_ray.store import checksums, disk, manifest, series_runs
from afn_ray.text import printable

MAX_CHARS = 10_000
"""Largest length of any text on the page, in characters; a corpus may list a million files."""
QUERY_TIMEOUT_S = 300.0
CLAIMS_S = 300.0
"""Time limit of the claims on a page, in seconds; ``afn claims`` has no such limit."""
OF_TYPES = ("token_id", "text", "class", "n", "n_high", "share_high", "idf")
"""Columns of ``vocabulary`` and ``word_vocabulary`` that the charts read."""
PACKAGES = {"jinja2": "Jinja2", "vl_convert": "vl-convert-python"}


def write_report(
    run: str | manifest.RunFolder | Run,
    out: Path | None = None,
    *,
    baseline: str | manifest.RunFolder | None = None,
    ranks_only: bool = False,
    with_claims: bool = True,
) -> Path:
    """Write the page of ``run`` to ``out`` atomically, and return its path.

    ``out`` None is ``report-<run id>.html`` in the working directory. ``run`` and ``baseline`` are
    a run's URI, a store's URI for its latest complete run, or a run. With a baseline the page
    shows the changes since it; ``ranks_only`` is that of ``compare``. Leaving out the claims
    (``with_claims`` false) saves most of the time.

    Raises ``ConfigError`` without the packages of ``afn-ray[report]`` or where ``out`` cannot be
    written, and ``StoreError`` without such a run.
    """
    folder = database.folder_of(run)
    path = Path(f"report-{folder.id}.html") if out is None else out
    comparison = (
        None if baseline is None else compare.compare(baseline, folder, ranks_only=ranks_only)
    )
    page = render(folder, comparison, with_claims=with_claims)
    with disk.write_local(path) as file:
        file.write(page.encode())
    return path


def run_charts(
    run: str | manifest.RunFolder | Run,
    *,
    baseline: str | manifest.RunFolder | None = None,
    ranks_only: bool = False,
) -> dict[str, Chart]:
    """The charts of ``run`` by name: those of the page that need no script.

    They are "histogram-<layer>" for each layer, "classes", with several layers also
    "layers-classes" and "layers-spread", and "movers" if something moved since the baseline. The
    arguments are those of ``write_report``. A notebook shows a chart as a picture if
    ``afn-ray[report]`` is installed, else as a table. Raises ``StoreError`` without such a run.
    """
    folder = database.folder_of(run)
    comparison = None
    if baseline is not None:
        comparison = compare.compare(baseline, folder, ranks_only=ranks_only)
    with checksums.named_damage(folder.uri):
        summary = summarise(folder)
        changed = _layer_of_changes(summary.layers[-1].layer, comparison, None)
        sections = _charts(folder, summary, comparison, _words_of_charts(folder), changed)
    return {chart.name: chart for section in sections.values() for chart in section}


def _words_of_charts(run: manifest.RunFolder) -> pa.Table:
    """Words at the last layer, or its types where the run has no words."""
    deepest = run.info["layers"][-1]
    words = table_by_layer(run, "word_vocabulary", ("word", *OF_TYPES))
    if deepest in words:
        return words[deepest]
    types = manifest.read_table(run, "vocabulary", ("layer", *OF_TYPES))
    return by_layer(types, [deepest])[deepest]


def render(
    run: manifest.RunFolder,
    comparison: compare.Comparison | None = None,
    *,
    with_claims: bool = True,
    audit: Audit | None = None,
) -> str:
    """The page of a complete ``run``, and of ``comparison``, in which it is ``b``.

    It begins with the verdict of ``audit``, if there is one. Reads the tokens once, and more often
    ``with_claims``. Raises ``StoreError`` for a damaged run.
    """
    jinja2, vl_convert = check_packages()
    try:
        with checksums.named_damage(run.uri):
            return _render(jinja2, vl_convert, run, comparison, audit, with_claims)
    except jinja2.UndefinedError as error:  # the template reads run.json too
        raise StoreError(f"{run.uri} is damaged: {error}{checksums.ASK_VERIFY}") from error


def _render(
    jinja2: Any,
    vl_convert: Any,
    run: manifest.RunFolder,
    comparison: compare.Comparison | None,
    audit: Audit | None,
    with_claims: bool,
) -> str:
    info, summary = run.info, summarise(run)
    main = summary.layers[-1]
    changed = _layer_of_changes(main.layer, comparison, audit)
    types = by_layer(manifest.read_table(run, "vocabulary", ("layer", *OF_TYPES)), info["layers"])
    words = table_by_layer(run, "word_vocabulary", ("word", *OF_TYPES))
    named = vocabulary_charts.named_words(words)
    plotted, kind = (named, "word") if named else (types, "type")
    drawn = _charts(run, summary, comparison, words.get(main.layer, types[main.layer]), changed)
    drawn["vocabulary"] = [vocabulary_charts.vocabulary_chart(plotted[main.layer], kind)]
    nights = _history(run, audit)
    known_nights = HISTORY_SCHEMA.empty_table() if isinstance(nights, str) else nights
    drawn["history"] = history_charts.history_charts(known_nights, main.layer)
    verdict = None
    if audit is not None:
        verdict = verdict_facts(audit, earlier_nights(audit, known_nights))
    points = vocabulary_charts.points(plotted, kind)
    with database.open_run(run.uri, timeout_s=QUERY_TIMEOUT_S) as tables:
        salient = _salient(tables, main.layer)
        screened = screened_documents(run, tables)
        claimed = _claims(tables) if with_claims else "they were not asked for"
    claims_of = []
    if not isinstance(claimed, str):
        claims_of = claim_charts.claims_charts(claimed, main.layer)
    drawn["claims"] = [chart for *_, of_claim in claims_of for chart in of_claim]
    specs: dict[str, VegaSpec] = {}
    for group in drawn.values():
        specs |= {chart.name: chart.spec for chart in group}
    style = _resource("css")
    script = _resource("js")
    vega = _vega(vl_convert)
    page: str = _template(jinja2).render(
        run=run,
        title=_title(info["config"]["corpus"]),
        model=run_facts.model_title(info["model"]["name"]),
        summary=summary,
        main=main,
        share_high=charts.share_high(main),
        verdict=verdict,
        moved=_moved(comparison, changed),
        glance=glance(summary, comparison),
        facts=run_facts.facts(summary),
        cautions=run_facts.cautions(summary),
        thresholds=thresholds_table(summary),
        charts=drawn,
        points=points,
        salient=salient,
        rankings=_rankings(run, main.layer),
        rankings_mean=beyond.MEANING,
        no_rankings=beyond.NONE,
        screened=screened,
        claims=claims_of,
        claims_notes=claimed if isinstance(claimed, str) else claimed.notes,
        features=FEATURES,
        sources=sources_table(run, main.layer),
        files=files_table(run),
        kept=kept_table(run),
        groups=groups_table(run, main.layer),
        history=nights if isinstance(nights, str) else drawn["history"],
        comparison=comparison,
        drift=None if comparison is None else drift_tables(comparison, changed),
        command=provenance.command_line(info["config"]),
        config=json.dumps(info["config"], indent=1),
        data={"charts": specs, "points": points},
        style=style,
        vega=vega,
        script=script,
        policy={"style": _policy(style), "script": f"{_policy(vega)} {_policy(script)}"},
    )
    return page


@functools.cache
def _vega(vl_convert: Any) -> str:
    """The script that draws charts. It takes 1.2 s of CPU time, and every page has the same."""
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script


def _template(jinja2: Any) -> Any:
    """The page's template, which escapes every value and refuses one that is missing."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    return environment.from_string(_resource("html.jinja"))


def _layer_of_changes(
    deepest: int, comparison: compare.Comparison | None, audit: Audit | None
) -> int:
    """The layer whose changes the page shows: the audit's, or the deepest that both runs have."""
    if audit is not None:
        return audit.layer
    return deepest if comparison is None else max(comparison.drift["layer"].to_pylist())


def _charts(
    run: manifest.RunFolder,
    summary: RunSummary,
    comparison: compare.Comparison | None,
    words: pa.Table,
    changed: int,
) -> dict[str, list[Chart]]:
    """Charts of the run, and of its drift at the layer ``changed``, by section.

    ``words`` are those of ``charts.classes_chart`` at the last layer.
    """
    moved = None
    if comparison is not None:
        moved = vocabulary_charts.movers_chart(comparison.movers_to_read, changed)
    return {
        "histograms": _histograms(run, summary, comparison),
        "classes": [charts.classes_chart(summary, words)],
        "layers": charts.layers_charts(summary) if len(summary.layers) > 1 else [],
        "movers": [] if moved is None else [moved],
    }


def _resource(kind: str) -> str:
    """The text of the file ``report.<kind>`` of this package."""
    return resources.files("afn_ray.show").joinpath(f"report.{kind}").read_text("utf-8")


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
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _shown(value: Any) -> Any:
    """External text, cut to ``MAX_CHARS``, with characters that reorder or hide text as escapes.

    Markup is unchanged.
    """
    if type(value) is not str:
        return value
    if len(value) > MAX_CHARS:
        value = value[:MAX_CHARS] + " …"
    return printable(value, keep="\n\t")


def _title(corpus: Sequence[str]) -> str:
    """Short name of a corpus: the end of its first path."""
    more = f" and {len(corpus) - 1} more" if len(corpus) > 1 else ""
    return "/".join(corpus[0].rstrip("/").split("/")[-2:]) + more


def by_layer(table: pa.Table, layers: Sequence[int]) -> dict[int, pa.Table]:
    """Rows of each layer, without special tokens."""
    normal = table.filter(pc.not_equal(table["class"], "special"))
    return {k: normal.filter(pc.equal(normal["layer"], k)).combine_chunks() for k in layers}


def _histograms(
    run: manifest.RunFolder, summary: RunSummary, comparison: compare.Comparison | None
) -> list[Chart]:
    """One chart for each layer, with the baseline's line where strengths can be compared."""
    now, before = manifest.read_table(run, "histogram"), None
    compared: set[int] = set()
    if comparison is not None and series_runs.is_comparable(comparison.a, run):
        before = manifest.read_table(comparison.a, "histogram")
        compared = {row["layer"] for row in drift_of_all_tokens(comparison)}
    drawn = []
    for facts in summary.layers:
        of_labels = facts.labels["tokens"]
        limits = (of_labels["q1"], of_labels["q2"], of_labels["q3"])
        quartiles = [limit for limit in limits if limit is not None]
        baseline = before if facts.layer in compared else None
        drawn.append(charts.histogram_chart(facts.layer, now, quartiles, baseline))
    return drawn


def _history(run: manifest.RunFolder, audit: Audit | None) -> pa.Table | str:
    """Rows of the nights up to ``run``, or why they are unknown: another run may be damaged."""
    tonight = None if audit is None else to_keep(audit)
    try:
        return history.of_run(run, tonight, history_charts.MOST_NIGHTS).table
    except StoreError as error:
        return str(error)


def _moved(comparison: compare.Comparison | None, layer: int) -> Moved | None:
    """Moved words in context; None without a baseline."""
    return None if comparison is None else moved_types(comparison, layer, QUERY_TIMEOUT_S)


def _salient(tables: database.Run, layer: int) -> tuple[Table, ...] | str:
    """The most and the least salient words, or why they are unknown.

    The query over all words may exceed its limits.
    """
    try:
        most, least = salient_words(tables, layer)
    except QueryError as error:
        return str(error)
    return (_salient_table("Most salient", most), _salient_table("Least salient", least))


def _salient_table(caption: str, words: Sequence[SalientWord]) -> Table:
    rows = []
    for word in words:
        share_high = f"{word.n_high / word.n:.0%}"
        interval = f"{word.low:.2f}–{word.high:.2f}"
        rows.append((word.text, f"{word.n:,}", share_high, interval, number(word.median)))
    return Table(caption, ("word", "n", "HIGH", "95 % interval", "median"), tuple(rows))


def _rankings(run: manifest.RunFolder, layer: int) -> tuple[Table, ...] | None:
    """Words by HIGH share, and by HIGH share beyond frequency.

    None for a run without salience, and empty if no word is frequent enough.
    """
    found = beyond.rankings(run, layer)
    if found is None:
        return None
    if not found.salient:
        return ()
    return (
        _ranking_table("Salient", found.salient),
        _ranking_table("Salient beyond frequency", found.beyond),
    )


def _ranking_table(caption: str, words: Sequence[beyond.RankedWord]) -> Table:
    rows = []
    for word in words:
        share_high = f"{word.share_high:.0%} ({word.expected:.0%})"
        rows.append((word.text, f"{word.n:,}", share_high, f"{word.low:.2f}–{word.high:.2f}"))
    heads = ("word", "n", "HIGH (exp.)", "beyond")  # a table of more than four is stacked
    return Table(caption, heads, tuple(rows))


def _claims(tables: database.Run) -> claims.Claims | str:
    """Claims and controls, or why they are unknown."""
    try:
        return claims.claims(tables, max_s=CLAIMS_S)
    except (ConfigError, QueryError) as error:  # ConfigError: the run lacks rows
        return str(error)
