"""Flags and help of the ``afn`` subcommands that read a run, one function for each subcommand."""

from __future__ import annotations

import argparse
from pathlib import Path

from afn_ray.cli import arguments
from afn_ray.cli.arguments import EPILOG, Commands, count, local_file, positive


def add_show(commands: Commands) -> None:
    show = commands.add_parser(
        "show", help="show a run's facts, thresholds and classes, and their limits", epilog=EPILOG
    )
    arguments.add_run(show)
    arguments.add_json(show)


def add_compare(commands: Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="show what changed between two runs: quartiles, classes, types and sources",
        epilog=EPILOG,
    )
    compare.add_argument("run_a", metavar="RUN_A", help=f"the baseline: {arguments.RUN}")
    compare.add_argument(
        "run_b", metavar="RUN_B", help=f"the run to compare with it: {arguments.RUN}"
    )
    compare.add_argument(
        "--json", metavar="FILE", type=local_file, help="write the comparison to FILE as JSON too"
    )
    compare.add_argument(
        "--ranks-only",
        action="store_true",
        help="compare ranks and shares, but no raw strengths; this is the only way to compare runs "
        "of different measures",
    )


def add_claims(commands: Commands) -> None:
    claims = commands.add_parser(
        "claims",
        help="test what is claimed of the measure, each figure beside its control",
        epilog=EPILOG,
        description="Every figure has a 95 % interval, by bootstrap over documents. Signals that "
        "the run recorded beside strength (afn run --signals) have figures too.",
    )
    arguments.add_run(claims)
    claims.add_argument(
        "--max-tokens",
        type=positive,
        default=5_000_000,
        metavar="N",
        help="largest number of tokens to read, in whole documents (default: 5,000,000)",
    )
    claims.add_argument(
        "--masking",
        action="store_true",
        help="also mask HIGH tokens, and as many other tokens, and measure how much the model's "
        "output changes",
    )
    claims.add_argument(
        "--sample",
        type=positive,
        metavar="N",
        help="number of documents that --masking uses (default: 200)",
    )
    arguments.add_model_flags(claims)
    arguments.add_query_timeout(claims, default_s=600.0)
    arguments.add_json(claims)


def add_neurons(commands: Commands) -> None:
    neurons = commands.add_parser(
        "neurons",
        help="show which neurons respond to a word, and what a neuron responds to",
        epilog=EPILOG,
        description="Needs a run that recorded neurons (afn run --signals neurons). Without --word "
        "and --neuron it lists the most selective neurons.",
    )
    arguments.add_run(neurons)
    asked = neurons.add_mutually_exclusive_group()
    asked.add_argument(
        "--word", help="list the neurons that this word has more often than other words have"
    )
    asked.add_argument(
        "--neuron",
        type=count,
        metavar="N",
        help="list the types that this neuron responds to, and the tokens where it is strongest",
    )
    neurons.add_argument(
        "--layer", type=int, help="layer to show (default: the deepest that was recorded)"
    )
    neurons.add_argument(
        "--top",
        type=count,
        default=15,
        metavar="N",
        help="number of neurons to show (default: 15)",
    )
    arguments.add_query_timeout(neurons, default_s=600.0)
    arguments.add_json(neurons)


def add_sql(commands: Commands) -> None:
    sql = commands.add_parser(
        "sql",
        help="query a run with SQL",
        epilog=EPILOG,
        description="Views: tokens, documents, vocabulary, words, classes, thresholds, labels, "
        "histogram, signals, signal_vocabulary, token_neurons, neurons, neuron_types, files, "
        "sources, screened, shards, run, and with --baseline movers, drift, class_drift. Macros: "
        "kwic(word, n := 5, most := NULL), document_text(document). Without a QUERY it opens an "
        "interactive shell.",
    )
    arguments.add_run(sql)
    sql.add_argument(
        "query",
        metavar="QUERY",
        nargs="?",
        help="one SQL statement (default: open an interactive shell)",
    )
    sql.add_argument(
        "--baseline",
        metavar="RUN",
        help="run to compare with, which fills the views movers, drift and class_drift",
    )
    sql.add_argument(
        "--open",
        metavar="FILE",
        type=local_file,
        nargs="?",
        const=Path("catalog.duckdb"),
        dest="catalog",
        help="write the views into a file that any DuckDB client opens, and run no query (default: "
        "catalog.duckdb)",
    )
    _add_sql_output(sql)
    arguments.add_query_timeout(sql, default_s=60.0)
    arguments.add_memory_limit(sql)
    sql.add_argument(
        "--threads", type=int, help="number of threads of DuckDB (default: one per core)"
    )


def _add_sql_output(sql: argparse.ArgumentParser) -> None:
    """Add the flags of own tables and of the output."""
    sql.add_argument(
        "--format",
        choices=("table", "csv", "json", "parquet"),
        help="format of the result (default: that of the ending of --out, otherwise table)",
    )
    sql.add_argument(
        "--with",
        metavar="NAME=FILE",
        action="append",
        default=[],
        dest="joined",
        help="add a table of your own from a CSV, JSONL or Parquet file, for joins; may be "
        "repeated",
    )
    sql.add_argument(
        "--out",
        metavar="FILE",
        type=local_file,
        help="write the result to FILE instead of the terminal",
    )
    sql.add_argument(
        "--max-rows",
        type=count,
        default=100,
        help="largest number of rows that a table shows; 0 shows all (default: 100)",
    )


def add_explain(commands: Commands) -> None:
    explain = commands.add_parser(
        "explain", help="measure one text and compare its tokens with a run", epilog=EPILOG
    )
    arguments.add_run(explain)
    explain.add_argument(
        "text", metavar="TEXT", help="the text to measure; - reads it from standard input"
    )
    explain.add_argument(
        "--layer", type=int, help="layer to show (default: the deepest that was recorded)"
    )
    explain.add_argument(
        "--signals",
        metavar="LIST",
        default="strength",
        help="signals to show beside strength, such as shift,attention; the run need not have "
        "recorded them",
    )
    explain.add_argument(
        "--layers",
        metavar="LIST",
        help="show a heat map of the tokens at these layers, such as 4,6,8 or all; the run need "
        "not have recorded them",
    )
    explain.add_argument(
        "--task",
        action="store_true",
        help="also run the model's sequence classifier, and show the tokens and neurons that its "
        "answer depends on most",
    )
    arguments.add_model_flags(explain)
    explain.add_argument(
        "--all", action="store_true", help="list every token, however long the text is"
    )
    explain.add_argument(
        "--html",
        metavar="FILE",
        type=local_file,
        help="write the result to FILE as one self-contained HTML page",
    )
    arguments.add_json(explain)


def add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report", help="write a run as an HTML page with charts", epilog=EPILOG
    )
    arguments.add_run(report)
    report.add_argument(
        "--baseline",
        metavar="RUN",
        help=f"also show what changed since this run: {arguments.RUN}",
    )
    report.add_argument(
        "--ranks-only",
        action="store_true",
        help="compare ranks and shares, but no raw strengths, with a baseline of another measure",
    )
    report.add_argument(
        "--no-claims",
        action="store_true",
        help="leave out the claims and their controls, which take most of the time",
    )
    report.add_argument(
        "--out",
        metavar="FILE",
        type=local_file,
        help="page to write (default: report-<run id>.html)",
    )
