"""Arguments of the ``afn`` command: subcommands, flags and their help."""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

from afn_ray.config import CHOICES, HINTS, RunConfig
from afn_ray.errors import ConfigError
from afn_ray.text import nearest

EPILOG = (
    "exit codes: 0 done; 1 ended with shards missing; 2 usage, config or query; 75 stopped, "
    "resumable"
)
VERIFY_EPILOG = (
    "exit codes: 0 all is as it was committed; 1 something is damaged; 2 usage; 75 no answer from "
    "the store"
)
GC_EPILOG = (
    "exit codes: 0 listed, or deleted; 2 usage, or a plan that cannot be read; 75 stopped, "
    "resumable"
)
STATUS_EPILOG = (
    "exit codes, of the newest run: 0 complete; 1 failed; 2 usage, or neither a store nor a run; 3 "
    "under way; "
    "75 stopped, or no word from its driver: the same 'afn run' command resumes"
)
AUDIT_EPILOG = (
    "exit codes: 0 the policy holds; 1 it is broken; 2 the audit failed or was stopped, and the "
    "same command resumes it"
)
CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")
"""argparse's message for a value that is not among the allowed choices."""
RUN_HELP = "a run's URI, or a store's for its latest complete run"


class Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line; argparse would print the whole usage."""

    def error(self, message: str) -> NoReturn:
        if choice := CHOICE.search(message):
            message += nearest([choice[1]], re.findall(r"[^', ]+", choice[2]))
        self.exit(
            ConfigError.exit_code, f"{self.prog}: {message}; '{self.prog} --help' tells more\n"
        )


def parser() -> argparse.ArgumentParser:
    """The parser of ``afn``; its result's ``command`` is the subcommand's name."""
    top = Parser(
        prog="afn", description="Token Activation Strength of a whole corpus.", epilog=EPILOG
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)

    status = commands.add_parser(
        "status",
        help="how far runs are: progress, rate, time left, failures, what they wait for",
        epilog=STATUS_EPILOG,
        description="Reads what a run's driver writes into the store every ten seconds, from anywhere.",
    )
    status.add_argument(
        "run", metavar="RUN|STORE", help="a run's URI, or a store's for all its runs, newest first"
    )
    status.add_argument(
        "--last",
        type=_positive,
        default=20,
        metavar="N",
        help="runs of a store to list (default: 20)",
    )
    status.add_argument("--json", action="store_true", help="print a JSON list, newest first")
    status.set_defaults(command="status")

    show = commands.add_parser("show", help="what a run is, and its honest summary", epilog=EPILOG)
    show.add_argument("run", metavar="RUN", help=RUN_HELP)
    show.add_argument("--json", action="store_true", help="the same as JSON")
    show.set_defaults(command="show")

    compare = commands.add_parser(
        "compare",
        help="what moved between two runs: quartiles, distances, classes, types, sources",
        epilog=EPILOG,
    )
    compare.add_argument("run_a", metavar="RUN_A", help=f"the baseline: {RUN_HELP}")
    compare.add_argument(
        "run_b", metavar="RUN_B", help="the run to hold against it, said in the same way"
    )
    compare.add_argument(
        "--json", metavar="FILE", type=_local, help="write the comparison there as JSON too"
    )
    compare.add_argument(
        "--ranks-only",
        action="store_true",
        help="leave out what depends on raw strengths, which alone compares runs of different measures",
    )
    compare.set_defaults(command="compare")

    claims = commands.add_parser(
        "claims",
        help="what is claimed of the measure, each figure beside its control",
        epilog=EPILOG,
        description="Figures with 95 % intervals by bootstrap over documents. Signals that the run recorded beside "
        "strength (afn run --signals) add theirs.",
    )
    claims.add_argument("run", metavar="RUN", help=RUN_HELP)
    claims.add_argument(
        "--max-tokens",
        type=_positive,
        default=5_000_000,
        metavar="N",
        help="tokens of a larger run that are read, in whole documents (default: 5,000,000)",
    )
    claims.add_argument(
        "--masking",
        action="store_true",
        help="mask HIGH tokens, and as many others, and see what the model's output loses",
    )
    claims.add_argument(
        "--sample",
        type=_positive,
        metavar="N",
        help="documents that --masking takes (default: 200)",
    )
    claims.add_argument(
        "--model", help="where the run's model is now, for --masking (default: where it was)"
    )
    claims.add_argument(
        "--trust-remote-code", action="store_true", help=_help_of("trust_remote_code")
    )
    claims.add_argument("--allow-pickle", action="store_true", help=_help_of("allow_pickle"))
    claims.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds a query (default: 600)"
    )
    claims.add_argument("--json", action="store_true", help="print JSON")
    claims.set_defaults(command="claims")

    neurons = commands.add_parser(
        "neurons",
        help="which neurons answer to a word, and what a neuron answers to",
        epilog=EPILOG,
        description="Of a run that recorded neurons (afn run --signals neurons). Without --word or --neuron: the most "
        "selective ones.",
    )
    neurons.add_argument("run", metavar="RUN", help=RUN_HELP)
    asked = neurons.add_mutually_exclusive_group()
    asked.add_argument("--word", help="which neurons it has more often than other words have")
    asked.add_argument(
        "--neuron", type=_count, metavar="N", help="its types, and the tokens that have most of it"
    )
    neurons.add_argument("--layer", type=int, help="layer to show (default: the deepest recorded)")
    neurons.add_argument(
        "--top", type=_count, default=15, metavar="N", help="neurons to show (default: 15)"
    )
    neurons.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds a query (default: 600)"
    )
    neurons.add_argument("--json", action="store_true", help="print JSON")
    neurons.set_defaults(command="neurons")

    audit = commands.add_parser(
        "audit",
        help="the nightly audit: run, compare with an earlier run, judge by a policy",
        epilog=AUDIT_EPILOG,
        description="Writes audit.json, and tells of a broken policy once more when the same command is given again.",
    )
    audit.add_argument(
        "config", metavar="RUN_TOML", help="what to run: a file or URL as of 'afn run --config'"
    )
    audit.add_argument(
        "--policy", metavar="FILE", required=True, help="TOML file of limits, or its URL"
    )
    audit.add_argument(
        "--baseline",
        metavar="RUN",
        default="previous",
        help="previous: the store's newest run before this one; week: the newest that began 6.5 days earlier; or a "
        "run's URI (default: previous)",
    )
    audit.add_argument(
        "--frozen", action="store_true", help="label by the thresholds of the runs before this one"
    )
    audit.add_argument(
        "--out",
        metavar="DIR",
        default="audit",
        help="folder of audit.json and report.html, or its URL (default: audit)",
    )
    audit.add_argument(
        "--no-report", action="store_true", help="no report.html, and none of its packages"
    )
    audit.add_argument(
        "--webhook",
        metavar="URL",
        help="POST audit.json there if the policy is broken "
        "(default: AFN_WEBHOOK of the environment, which no list of processes shows)",
    )
    audit.add_argument(
        "--allow-http", action="store_true", help="let --webhook be http to another machine"
    )
    audit.add_argument(
        "--on-broken",
        metavar="COMMAND",
        help="run that, without a shell, if the policy is broken; "
        "AFN_AUDIT_JSON says where audit.json is",
    )
    audit.add_argument(
        "--quiet", action="store_true", help="no progress; warnings and errors still show"
    )
    audit.set_defaults(command="audit")

    sql = commands.add_parser(
        "sql",
        help="ask a run in SQL",
        epilog=EPILOG,
        description="Views: tokens, documents, vocabulary, words, classes, thresholds, labels, histogram, signals, "
        "signal_vocabulary, token_neurons, neurons, neuron_types, files, sources, screened, "
        "shards, run, and with "
        "--baseline movers, drift, class_drift. Macros: kwic(word, n := 5, most := NULL), "
        "document_text(document). Without a QUERY, a shell.",
    )
    sql.add_argument("run", metavar="RUN", help=RUN_HELP)
    sql.add_argument(
        "query",
        metavar="QUERY",
        nargs="?",
        help="one SQL statement; without it an interactive shell",
    )
    sql.add_argument(
        "--baseline",
        metavar="RUN",
        help="run to compare with: fills the views movers, drift and class_drift",
    )
    sql.add_argument(
        "--open",
        metavar="FILE",
        type=_local,
        nargs="?",
        const=Path("catalog.duckdb"),
        dest="catalog",
        help="write the views into a file that any DuckDB client opens, and do nothing else (default: catalog.duckdb)",
    )
    sql.add_argument(
        "--format",
        choices=("table", "csv", "json", "parquet"),
        help="default: by the ending of --out; without that, table",
    )
    sql.add_argument(
        "--with",
        metavar="NAME=FILE",
        action="append",
        default=[],
        dest="joined",
        help="a table of your own to join: a CSV, JSONL or Parquet file; repeatable",
    )
    sql.add_argument(
        "--out", metavar="FILE", type=_local, help="write there instead of the terminal"
    )
    sql.add_argument(
        "--max-rows",
        type=_count,
        default=100,
        help="rows that a table shows (default: 100; 0 = all)",
    )
    sql.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds for a query (default: 60)"
    )
    sql.add_argument(
        "--memory-limit", type=_memory, default="2GB", help="memory of DuckDB (default: 2GB)"
    )
    sql.add_argument("--threads", type=int, help="threads of DuckDB (default: one per core)")
    sql.set_defaults(command="sql")

    explain = commands.add_parser("explain", help="one text's tokens against a run", epilog=EPILOG)
    explain.add_argument("run", metavar="RUN", help=RUN_HELP)
    explain.add_argument("text", metavar="TEXT", help="the text, or - for standard input")
    explain.add_argument("--layer", type=int, help="recorded layer to show (default: the deepest)")
    explain.add_argument(
        "--signals",
        metavar="LIST",
        default="strength",
        help="show these beside strength, recorded or not: shift, attention, ...",
    )
    explain.add_argument(
        "--layers",
        metavar="LIST",
        help="show a heat map, token by layer, of these, recorded or not: all, or 4,6,8",
    )
    explain.add_argument(
        "--task",
        action="store_true",
        help="ask the model's sequence classifier too, and show which "
        "tokens and neurons of the layer its answer hangs on",
    )
    explain.add_argument("--model", help="where the run's model is now (default: where it was)")
    explain.add_argument(
        "--trust-remote-code", action="store_true", help=_help_of("trust_remote_code")
    )
    explain.add_argument("--allow-pickle", action="store_true", help=_help_of("allow_pickle"))
    explain.add_argument("--all", action="store_true", help="list every token of a long text")
    explain.add_argument("--html", metavar="FILE", type=_local, help="write a self-contained page")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(command="explain")

    report = commands.add_parser(
        "report", help="one run as a page that people look at", epilog=EPILOG
    )
    report.add_argument("run", metavar="RUN", help=RUN_HELP)
    report.add_argument(
        "--baseline", metavar="RUN", help="run to say what has changed since, likewise"
    )
    report.add_argument(
        "--ranks-only",
        action="store_true",
        help="baseline of another measure: compare shares alone",
    )
    report.add_argument(
        "--no-claims", action="store_true", help="leave out claims and controls, which take longest"
    )
    report.add_argument(
        "--out", metavar="FILE", type=_local, help="page to write (default: report-<run id>.html)"
    )
    report.set_defaults(command="report")

    verify = commands.add_parser(
        "verify",
        help="prove that a store still holds what was committed",
        epilog=VERIFY_EPILOG,
        description="Reads every committed file: checksums, rows, schemas, and thresholds recomputed from the rows.",
    )
    verify.add_argument(
        "uri", metavar="STORE|RUN", help="a store (all shards and runs), or a run's URI (it alone)"
    )
    verify.add_argument(
        "--clean", action="store_true", help="remove orphans: files of attempts that nothing names"
    )
    verify.add_argument(
        "--min-age-h",
        type=float,
        default=24.0,
        metavar="H",
        help="age from which files that no commit names yet are orphans: an attempt may be at work (default: 24)",
    )
    verify.add_argument(
        "--memory-limit", type=_memory, default="2GB", help="memory of DuckDB (default: 2GB)"
    )
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.set_defaults(command="verify")

    gc = commands.add_parser(
        "gc",
        help="delete what no kept run refers to, after a dry run that lists it",
        epilog=GC_EPILOG,
        description="Lists runs that are not kept and shards that only they refer to; --delete removes them. Runs that "
        "may be under way are kept.",
    )
    gc.add_argument("store", metavar="STORE", help="what was given to 'afn run --store'")
    gc.add_argument(
        "--keep",
        type=int,
        default=30,
        metavar="N",
        help="newest complete runs to keep (default: 30)",
    )
    gc.add_argument(
        "--keep-run",
        action="append",
        default=[],
        metavar="RUN",
        help="a run to keep besides, by its name or URI, a baseline say; give it again for more",
    )
    gc.add_argument(
        "--min-age-h",
        type=float,
        default=24.0,
        metavar="H",
        help="age from which a shard that no kept run refers to goes: a run may be about to (default: 24)",
    )
    gc.add_argument("--delete", action="store_true", help="delete it; without this nothing is")
    gc.add_argument("--json", action="store_true", help="print JSON")
    gc.set_defaults(command="gc")

    doctor = commands.add_parser(
        "doctor", help="what works here, and what to do about what does not", epilog=EPILOG
    )
    doctor.add_argument(
        "--model", help="model folder, GGUF file or hub name to try (default: the demo's)"
    )
    doctor.add_argument("--store", help="store to try to write")
    doctor.add_argument(
        "--address", help="Ray cluster to try (default: RAY_ADDRESS, else a local Ray)"
    )
    doctor.set_defaults(command="doctor")

    demo = commands.add_parser(
        "demo",
        help="the whole path on real input: MiniLM over the King James verses, about a minute",
        epilog=EPILOG,
    )
    demo.add_argument(
        "--store", default="afn-demo", help="folder for the results (default: ./afn-demo)"
    )
    demo.add_argument("--workers", type=int, help="workers (default: one per core)")
    demo.set_defaults(command="demo")
    _add_bench(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
        command.allow_abbrev = False  # a mistyped flag is an error, like a mistyped key
    return top


def nearest_flag(command: argparse.ArgumentParser, flag: str) -> str:
    """A hint, in brackets, at the flag of ``command`` nearest to ``flag``; empty without one."""
    flags: set[str] = set()
    for line in command.format_help().splitlines():
        if line.startswith("  -"):  # the help of an option begins two spaces or a line further on
            flags.update(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line.strip().partition("  ")[0]))
    return nearest([flag.partition("=")[0]], sorted(flags))


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="measure a corpus: plan, do what the store lacks, reduce",
        epilog=EPILOG,
        description="Give the same command again to resume; with nothing changed it does nothing.",
    )
    run.add_argument(
        "corpus", metavar="CORPUS", nargs="*", default=argparse.SUPPRESS, help=_help_of("corpus")
    )
    run.add_argument(
        "--config", metavar="FILE", help="TOML file with the same keys, or its URL; flags win"
    )
    alone = run.add_mutually_exclusive_group()
    alone.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, its time and its price, and do nothing",
    )
    alone.add_argument(
        "--reduce-only",
        action="store_true",
        help="measure nothing: reduce what the store has, without workers or a GPU",
    )
    run.add_argument(
        "--rate",
        metavar="FILE",
        type=Path,
        help="of --dry-run: what 'afn bench rate' measured; default: a sample, here",
    )
    run.add_argument(
        "--prices", metavar="FILE", type=Path, help="of --dry-run: TOML file of what things cost"
    )
    run.add_argument(
        "--quiet", action="store_true", help="no progress; warnings and errors still show"
    )
    for field in fields(RunConfig):
        if field.name == "corpus":
            continue
        flag, hint = "--" + field.name.replace("_", "-"), HINTS[field.name]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help_of(field.name)}
        if hint is bool:
            options["action"] = (
                argparse.BooleanOptionalAction if field.default is True else "store_true"
            )
        elif field.name in CHOICES:
            options["choices"] = CHOICES[field.name]
        else:
            options["metavar"] = field.name.rsplit("_", 1)[-1].upper()
            options["type"] = (
                float
                if hint in (float, float | None)
                else int
                if hint in (int, int | None)
                else str
            )
        short = [flag.removesuffix("-s")] if flag.endswith("-s") else []  # --wait is --wait-s
        run.add_argument(*short, flag, dest=field.name, **options)
    run.set_defaults(command="run")


def _add_bench(commands: Any) -> None:
    from afn_ray import bench

    parser = commands.add_parser(
        "bench",
        help="measure this engine on this machine, against what users write instead",
        epilog=EPILOG,
        description="A checkout of the repository has more: python jobs/benchmark.py demo, reduce, safety, screen, "
        "signals, simulate or sql.",
    )
    bench.add_commands(parser)
    parser.set_defaults(command="bench")


def _count(text: str) -> int:
    if not text.isdecimal() and not (text[:1] == "-" and text[1:].isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?B?|%)", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size; give one such as 2GB, 512MiB or 50%"
        )
    return text


def _local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is not a file of this machine; copy the result there afterwards"
        )
    return Path(text)


def _help_of(name: str) -> str:
    field = next(f for f in fields(RunConfig) if f.name == name)
    text = str(field.metadata["help"])
    if field.default is MISSING or field.default is None or isinstance(field.default, bool):
        return text
    return f"{text} (default: {field.default})"


def _version() -> str:
    from afn_ray import __version__

    return __version__
