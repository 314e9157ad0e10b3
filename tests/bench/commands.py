"""``python jobs/benchmark.py`` in a checkout: define the command line and call a benchmark."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeAlias

from afn_ray import bench as of_users
from afn_ray.bench import TOKENS_PER_WORKER
from afn_ray.cli import commands as cli
from afn_ray.cli import grammar

LEAST = {
    "tokens": 16,
    "workers": 1,
    "repeat": 1,
    "shards": 1,
    "rows": 10_000,
    "groups": 1,
}
"""Smallest valid value of each numeric argument, by name."""


def command(argv: Sequence[str]) -> NoReturn:
    """Run the benchmark in ``argv``; end the process as ``afn`` does, with its exit codes."""
    cli.command(argv, parser, {"bench": call})


Commands: TypeAlias = "argparse._SubParsersAction[grammar.Parser]"
"""Sub-commands of ``parser``; argparse has no public name for their type."""


def main(argv: Sequence[str]) -> NoReturn:
    """Run the benchmark in ``argv``; raise ``SystemExit`` with the exit code."""
    cli.main(argv, parser, {"bench": call})


def parser() -> argparse.ArgumentParser:
    """The parser of the benchmarks that need a checkout."""
    top = grammar.Parser(
        prog="python jobs/benchmark.py",
        description="Measurements of a checkout; engine, feed, monitor and rate are those of "
        "'afn bench'.",
    )
    top.set_defaults(command="bench")
    commands = top.add_subparsers(required=True, metavar="WHAT", dest="what")
    for add in (
        _add_audit,
        _add_demo,
        _add_groups,
        _add_languages,
        _add_lexicons,
        _add_reduce,
        _add_safety,
        _add_screen,
        _add_signals,
        _add_simulate,
        _add_sql,
    ):
        add(commands)
    for command in commands.choices.values():
        of_users.add_json_flag(command)
        command.set_defaults(parser=command)
    return top


def _add_audit(commands: Commands) -> None:
    """Add the flags of ``audit``."""
    audit = commands.add_parser(
        "audit",
        allow_abbrev=False,
        help="how often each kind of limit wakes somebody rightly, wrongly and not at all",
        description="Half a year of nights is simulated from histograms made by hand, with a "
        "weekly rhythm, growth and seven incidents. No model is used.",
    )
    audit.add_argument(
        "--repeat", type=int, default=20, metavar="N", help="half years (default: 20)"
    )


def _add_demo(commands: Commands) -> None:
    """Add the flags of ``demo``."""
    demo = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="time, memory and bytes per token of 'afn demo', and the same command again",
        description="Every repetition starts a fresh store in a temporary folder.",
    )
    demo.add_argument("--workers", type=int, metavar="N", help="workers (default: one per core)")
    demo.add_argument("--repeat", type=int, default=3, metavar="N", help="repetitions (default: 3)")


def _add_groups(commands: Commands) -> None:
    """Add the flags of ``groups``."""
    groups = commands.add_parser(
        "groups",
        allow_abbrev=False,
        help="what groups of documents add to the reduce of a run with its scan",
        description="Shards of up to two million tokens are generated as for sql. Reduces without "
        "and with groups take turns, each in its own process.",
    )
    groups.add_argument(
        "--tokens",
        type=int,
        default=10_000_000,
        metavar="N",
        help="of the run (default: 10,000,000)",
    )
    groups.add_argument(
        "--groups",
        type=int,
        default=30,
        metavar="N",
        help="of the documents, in turn (default: 30)",
    )
    groups.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="reduces of each kind (default: 3)"
    )


def _add_languages(commands: Commands) -> None:
    """Add the flags of ``languages``."""
    languages = commands.add_parser(
        "languages",
        allow_abbrev=False,
        help="how often the language of a short text is detected right, and what it costs",
        description="Texts of several lengths are cut from tagged words, as lexicons takes them. "
        "Detectors of other packages are measured too, if they are installed.",
    )
    languages.add_argument("tagged", type=Path, metavar="TAGGED", help="folder of tagged words")
    languages.add_argument(
        "--repeat",
        type=int,
        default=150,
        metavar="N",
        help="texts of each language and length (default: 150)",
    )


def _add_lexicons(commands: Commands) -> None:
    """Add the flags of ``lexicons``."""
    lexicons = commands.add_parser(
        "lexicons",
        allow_abbrev=False,
        help="how well the packed lists tell closed-class words from others",
        description="Lists are built from tagged words and packages of word lists, and scored over "
        "the parts that are held out in turn. A file of tagged words is named by language, such as "
        "en.tsv, and has a form, a tab and its universal part of speech on a line.",
    )
    lexicons.add_argument("tagged", type=Path, metavar="TAGGED", help="folder of tagged words")
    what = lexicons.add_mutually_exclusive_group()
    what.add_argument(
        "--check", action="store_true", help="score the packed lists over TAGGED, and build none"
    )
    what.add_argument("--write", action="store_true", help="put what is built into the package")


def _add_reduce(commands: Commands) -> None:
    """Add the flags of ``reduce``."""
    reduce = commands.add_parser(
        "reduce",
        allow_abbrev=False,
        help="seconds and memory of the reduce of many shards, in different orders",
        description="Summaries are generated: Zipf's law over 30,522 types, lognormal strengths of "
        "each type. Every reduce has its own process and order; results are compared bit by bit.",
    )
    reduce.add_argument(
        "--shards", type=int, default=10_000, metavar="N", help="summaries (default: 10,000)"
    )
    reduce.add_argument(
        "--tokens",
        type=int,
        default=40_000,
        metavar="N",
        help="of a shard, in the mean (default: 40,000)",
    )
    reduce.add_argument(
        "--repeat", type=int, default=2, metavar="N", help="reduces by each executor (default: 2)"
    )


def _add_safety(commands: Commands) -> None:
    """Add the flags of ``safety``."""
    safety = commands.add_parser(
        "safety",
        allow_abbrev=False,
        help="what a shard costs beside its tokens, and a finished run that is run again",
        description="Whole runs of an all but empty model over shards of one word each.",
    )
    safety.add_argument(
        "--shards", type=int, default=1000, metavar="N", help="shards (default: 1,000)"
    )
    safety.add_argument(
        "--store",
        metavar="URI",
        help="where stores are made, and left (default: a temporary folder)",
    )
    safety.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="repetitions (default: 3)"
    )


def _add_screen(commands: Commands) -> None:
    """Add the flags of ``screen``."""
    screen = commands.add_parser(
        "screen",
        allow_abbrev=False,
        help="how well the screening of documents finds planted junk",
        description="Replaces 1 % of the King James verses by junk of six kinds, runs MiniLM over "
        "them (minutes), and compares the screening with an order by length and one by idf.",
    )
    screen.add_argument(
        "--store",
        metavar="URI",
        help="where the run is made, and left (default: a temporary folder)",
    )
    screen.add_argument("--seed", type=int, default=0, metavar="N", help="of the junk (default: 0)")


def _add_signals(commands: Commands) -> None:
    """Add the flags of ``signals``."""
    signals = commands.add_parser(
        "signals",
        allow_abbrev=False,
        help="what each signal costs beside strength alone, and a sweep of all layers",
        description="Whole shards, from JSONL to committed Parquet, by one worker; on a "
        "CPU it keeps "
        "to one core.",
    )
    signals.add_argument(
        "--layer",
        default="2/3",
        help="layer k to record, or a fraction of the depth (default: 2/3)",
    )
    cpu, cuda = TOKENS_PER_WORKER.values()
    signals.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"of the texts (default: {cpu:,}, on a GPU {cuda:,})",
    )
    signals.add_argument("--repeat", type=int, default=5, metavar="N", help="turns (default: 5)")
    of_users.add_model_flags(signals)


def _add_simulate(commands: Commands) -> None:
    """Add the flags of ``simulate``."""
    simulate = commands.add_parser(
        "simulate",
        allow_abbrev=False,
        help="what the driver of a huge run takes, and that it loses no shard",
        description="The real plan, dispatcher, status and reduce over workers and a clock that "
        "are fake, with crashes, lost nodes, hangs, want of memory and outages of the store. Each "
        "run has its own process.",
    )
    simulate.add_argument(
        "--shards", type=int, default=1_000_000, metavar="N", help="shards (default: 1,000,000)"
    )
    simulate.add_argument(
        "--workers", type=int, default=1000, metavar="N", help="workers (default: 1,000)"
    )
    simulate.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="runs, each of its own luck (default: 1)"
    )


def _add_sql(commands: Commands) -> None:
    """Add the flags of ``sql``."""
    sql = commands.add_parser(
        "sql",
        allow_abbrev=False,
        help="seconds and memory of questions to a large run, and of its reduce",
        description="A run is generated: Zipf's law over 30,522 types, lognormal strengths of each "
        "type, shards of two million tokens. Every reduce and question has its own process; the "
        "memory limit is that of 'afn sql', 2GB.",
    )
    sql.add_argument(
        "--rows",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens of the run (default: 100,000,000, 0.5 GB in a temporary folder)",
    )
    sql.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="times of each question (default: 3)"
    )


def call(args: argparse.Namespace) -> None:
    """Run the benchmark that ``args`` select, print the result and write it to ``--json``.

    Raises ``ConfigError``.
    """
    of_users.check(args, LEAST | ({"shards": 10} if args.what == "safety" else {}))
    console, on_note = of_users.consoles()
    if args.what == "audit":
        from bench import half_year

        result = half_year.measure(args.repeat, on_note)
        half_year.render(result, console)
    elif args.what == "demo":
        from bench import demo

        result = demo.measure(args.workers, args.repeat, on_note)
        demo.render(result, console)
    elif args.what == "simulate":
        from bench import simulate

        result = simulate.measure(args.shards, args.workers, args.repeat, on_note)
        simulate.render(result, console)
    elif args.what == "groups":
        from bench import groups

        result = groups.measure(args.tokens, args.groups, args.repeat, on_note)
        groups.render(result, console)
    elif args.what == "languages":
        from bench import detectors

        result = detectors.measure(args.tagged, args.repeat, on_note)
        detectors.render(result, console)
    elif args.what == "lexicons":
        from bench import lexicons

        check, measure = lexicons.check, lexicons.measure
        result = check(args.tagged) if args.check else measure(args.tagged, on_note)
        lexicons.render(result, console)
        if args.write:
            lexicons.packed_file().write_text(result["packed"], "utf-8")
    elif args.what == "reduce":
        from bench import reduce

        result = reduce.measure(args.shards, args.tokens, args.repeat, on_note)
        reduce.render(result, console)
    elif args.what == "safety":
        from bench import safety

        result = safety.measure(args.shards, args.store, args.repeat, on_note)
        safety.render(result, console)
    elif args.what == "screen":
        from bench import screen

        with tempfile.TemporaryDirectory(prefix="afn-bench-") as folder:
            result = screen.measure(args.store or folder, args.seed, on_note)
        screen.render(result, console)
    elif args.what == "signals":
        from afn_ray import model
        from bench import signals

        device = model.choose_device(args.device)
        result = signals.measure(
            args.model,
            args.layer,
            args.tokens or TOKENS_PER_WORKER[device],
            device,
            args.repeat,
            on_note,
        )
        signals.render(result, console)
    elif args.what == "sql":
        from bench import sql

        result = sql.measure(args.rows, args.repeat, on_note)
        sql.render(result, console)
    if args.json is not None:
        of_users.write_json(args.json, result)
