"""The subcommands of ``afn`` that read a run: the flags of each, and its call."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from afn_ray.cli import arguments, terminal
from afn_ray.cli.arguments import READ_EPILOG, Commands, local_file, not_negative, positive
from afn_ray.errors import ConfigError
from afn_ray.query.views import MACROS, VIEWS
from afn_ray.store import disk, storage, uris
from afn_ray.text import printable

if TYPE_CHECKING:
    from afn_ray.analysis.local_model import LocalModel


def add_show(commands: Commands) -> None:
    show = arguments.add_command(
        commands,
        "show",
        help="show a run's facts, thresholds and classes, and their limits",
        epilog=READ_EPILOG,
    )
    arguments.add_run(show)
    show.add_argument(
        "--card",
        action="store_true",
        help="show the model card instead: figures of every layer, to hold against those of papers",
    )
    arguments.add_json(show)


def add_claims(commands: Commands) -> None:
    claims = arguments.add_command(
        commands,
        "claims",
        help="test what is claimed of the measure, each figure beside its control",
        epilog=READ_EPILOG,
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
    neurons = arguments.add_command(
        commands,
        "neurons",
        help="show which neurons respond to a word, and what a neuron responds to",
        epilog=READ_EPILOG,
        description="The run must have recorded neurons (afn run --signals neurons). Without "
        "--word and --neuron the most selective neurons are listed.",
    )
    arguments.add_run(neurons)
    asked = neurons.add_mutually_exclusive_group()
    asked.add_argument(
        "--word", help="list the neurons that this word has more often than other words have"
    )
    asked.add_argument(
        "--neuron",
        type=not_negative,
        metavar="N",
        help="list the types that this neuron responds to, and the tokens where it is strongest",
    )
    neurons.add_argument(
        "--layer", type=int, help="layer to show (default: the deepest that was recorded)"
    )
    neurons.add_argument(
        "--top",
        type=not_negative,
        default=15,
        metavar="N",
        help="number of neurons to show (default: 15)",
    )
    arguments.add_query_timeout(neurons, default_s=600.0)
    arguments.add_json(neurons)


def add_sql(commands: Commands) -> None:
    sql = arguments.add_command(
        commands,
        "sql",
        help="query a run with SQL",
        epilog=READ_EPILOG,
        description=f"Views: {', '.join(VIEWS)}. Those of movers and drift have rows only with "
        f"--baseline. Macros: {', '.join(MACROS)}. Without a QUERY an interactive shell opens, "
        "where .tables says what each view has.",
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
        help="run to compare with, which fills the views of movers and drift",
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
    arguments.add_threads(sql)


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
        help="write the result to FILE, a path or URL, instead of the terminal",
    )
    sql.add_argument(
        "--max-rows",
        type=not_negative,
        default=100,
        help="largest number of rows that a table shows; 0 shows all (default: 100)",
    )


def add_explain(commands: Commands) -> None:
    explain = arguments.add_command(
        commands,
        "explain",
        help="measure one text and compare its tokens with a run",
        epilog=READ_EPILOG,
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
    report = arguments.add_command(
        commands, "report", help="write a run as an HTML page with charts", epilog=READ_EPILOG
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


SAMPLE = 200
"""Default number of documents that a check by masking uses."""


def call_show(args: argparse.Namespace) -> None:
    from afn_ray.show import beyond, card, card_tables, overview
    from afn_ray.show.summary import summarise, to_json

    if args.card:
        of_run = card.card_of(args.run)
        if args.json:
            print(json.dumps(card.to_json(of_run), indent=1))
        else:
            card_tables.render(of_run, Console(highlight=False))
        return
    summary = summarise(args.run)
    if args.json:
        print(json.dumps(to_json(summary), indent=1))
    else:
        console = Console(highlight=False)
        overview.render(summary, console)
        beyond.render_rankings(summary.uri, summary.layers[-1].layer, console)


def call_claims(args: argparse.Namespace) -> None:
    from afn_ray.analysis import claims, claims_text

    if args.sample is not None and not args.masking:
        raise ConfigError("--sample needs --masking: add it, or leave out --sample")
    found = claims.claims(
        args.run,
        max_tokens=args.max_tokens,
        masked_documents=(args.sample or SAMPLE) if args.masking else 0,
        local=_local_model(args),
        timeout_s=args.timeout,
    )
    if args.json:
        print(json.dumps(claims_text.to_json(found), indent=1))
    else:
        claims_text.render(found, Console(highlight=False))


def call_neurons(args: argparse.Namespace) -> None:
    from afn_ray.analysis import neuron_questions as questions
    from afn_ray.show import neuron_tables

    found: questions.SelectiveNeurons | questions.WordNeurons | questions.NeuronUses
    options = {"layer": args.layer, "timeout_s": args.timeout}
    if args.word is not None:
        found = questions.word_neurons(args.run, args.word, top=args.top, **options)
    elif args.neuron is not None:
        found = questions.neuron_uses(args.run, args.neuron, **options)
    else:
        found = questions.neurons(args.run, top=args.top, **options)
    if args.json:
        print(json.dumps(questions.to_json(found), indent=1))
    else:
        neuron_tables.render(found, Console(highlight=False))


def call_sql(args: argparse.Namespace) -> None:
    from afn_ray.query import catalog, joined
    from afn_ray.show import query_output, shell

    if args.catalog:
        if args.query is not None:
            raise ConfigError(
                f"--open writes {args.catalog} and asks nothing; leave out --open or the query"
            )
        catalog.write_catalog(args.run, args.catalog, baseline=args.baseline)
        name = printable(str(args.catalog))
        print(f"{name} is written; any DuckDB client opens it, as in: duckdb {shlex.quote(name)}")
        return
    if args.out == "":
        raise ConfigError("--out is empty; name a file, or leave it out")
    form = _format_of(args.format, args.out)
    if args.out:
        uris.open_filesystem(args.out)  # a URL that cannot be opened is refused before the query
    tables = joined.read_tables(args.joined)
    with arguments.open_run(args) as run:
        if args.query is None:
            shell.interactive(run, tables)
            return
        relation = run.sql(args.query, **tables)
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(storage.write_whole(args.out)) if args.out else None
            num_rows = query_output.print_result(
                relation, form, out, max_rows=None if args.out else args.max_rows or None
            )
        query_output.say_notes(run, args.query, num_rows)


ENDINGS = {".csv": "csv", ".json": "json", ".parquet": "parquet", ".txt": "table"}
"""Output formats of ``afn sql`` by file ending."""


def _format_of(asked: str | None, out: str | None) -> str:
    """The requested format, otherwise that of the ending of the file or object ``out``."""
    if asked is not None or out is None:
        return asked or "table"
    path = Path(out)
    if path.exists() and not path.is_file():  # a pipe or /dev/stdout
        return "table"
    if (form := ENDINGS.get(path.suffix.lower())) is None:
        raise ConfigError(
            f"{out}: the ending says no format; end it in {', '.join(ENDINGS)}, or give --format"
        )
    return form


def _local_model(args: argparse.Namespace) -> LocalModel:
    from afn_ray.analysis.local_model import LocalModel

    return LocalModel(args.model, args.trust_remote_code, args.allow_pickle)


def call_explain(args: argparse.Namespace) -> None:
    text = terminal.read_input() if args.text == "-" else args.text
    from afn_ray.runs import precheck

    precheck.check_question(
        args.run, args.model, signals=args.signals, layers=args.layers, layer=args.layer
    )
    from afn_ray.analysis import explain, explanation
    from afn_ray.show import explanation_page, explanation_terminal

    question = explanation.Question(args.signals, args.layers, args.task, args.layer)
    result = explain.explain(args.run, text, question, _local_model(args))
    if args.html:
        with disk.write_local(args.html) as file:
            file.write(explanation_page.render_html(result).encode())
        print(f"{args.html} is written; open it in a browser")
    elif args.json:
        print(json.dumps(explanation.to_json(result), indent=1))
    else:
        explanation_terminal.render_terminal(
            result, args.layer, Console(highlight=False), show_all=args.all
        )


def call_report(args: argparse.Namespace) -> None:
    from afn_ray.show import report

    path = report.write_report(
        args.run,
        args.out,
        baseline=args.baseline,
        ranks_only=args.ranks_only,
        with_claims=not args.no_claims,
    )
    print(f"{path} is written; open it in a browser")
