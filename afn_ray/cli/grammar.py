"""The parser of the ``afn`` command, one function for each subcommand.

``questions`` has the subcommands that read a run, ``comparisons`` those that compare runs.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, NoReturn

from afn_ray import __version__, bench
from afn_ray.analysis import json_schema
from afn_ray.cli import arguments, comparisons, export, questions
from afn_ray.cli.arguments import RUN_EPILOG, Commands, help_of, positive
from afn_ray.config import HINTS, RunConfig
from afn_ray.errors import ConfigError
from afn_ray.option_rules import CHOICES
from afn_ray.text import nearest

TOP_EPILOG = (
    "exit codes of most commands: 0 = done; 1 = ended with shards missing, or 'afn verify' found "
    "damage; 2 = the command, the config or the query is wrong, or what it reads is damaged; 75 = "
    "stopped, and the same command resumes. 'afn COMMAND --help' lists those of each command."
)
SCHEMA_EPILOG = "exit codes: 0 = done; 2 = the command is wrong"
DOCTOR_EPILOG = "exit codes: 0 = no check failed; 2 = a check failed, or the command is wrong"
BENCH_EPILOG = (
    "exit codes: 0 = done; 2 = the command is wrong, or the strengths of two programs differ"
)
VERIFY_EPILOG = (
    "exit codes: 0 = every file is as it was committed; 1 = something is damaged; 2 = the command "
    "is wrong; 75 = the store does not answer"
)
GC_EPILOG = (
    "exit codes: 0 = listed, or deleted; 2 = the command is wrong, or a plan cannot be read; 75 = "
    "stopped, and the same command resumes"
)
STATUS_EPILOG = (
    "exit codes, for the newest run: 0 = complete; 1 = failed; 2 = the command is wrong, or RUN is "
    "neither a store nor a run; 3 = running; 75 = stopped, or its driver no longer reports: the "
    "same 'afn run' command resumes"
)
AUDIT_EPILOG = (
    "exit codes: 0 = the policy holds; 1 = the policy is broken; 2 = the audit failed or was "
    "stopped, and the same command resumes it; 3 = a limit could not be judged, and no other is "
    "broken"
)
INVALID_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")
"""argparse's message for a value that is not among the allowed choices."""
METAVARS = {
    "allow_quarantined": "N",
    "group_by": "NAME",
    "labels": "COLUMN",
    "limit": "N",
    "mean_vectors": "N",
    "near_duplicates": "SHARE",
    "sample": "SHARE",
    "scratch": "FOLDER",
    "screen": "N",
    "thresholds": "RUN",
    "tokenizer_workers": "N",
    "top_neurons": "N",
    "where": "CONDITION",
    "workers": "N",
    "workers_per_gpu": "N",
}
"""Metavars of ``afn run`` where the last word of a key does not say what to give."""


class Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line; argparse would print the whole usage."""

    def error(self, message: str) -> NoReturn:
        if choice := INVALID_CHOICE.search(message):
            message += nearest([choice[1]], re.findall(r"[^', ]+", choice[2]))
        self.exit(
            ConfigError.exit_code,
            f"{self.prog}: {message}; '{self.prog} --help' lists what it accepts\n",
        )


def parser() -> argparse.ArgumentParser:
    """The parser of ``afn``; its result's ``command`` is the subcommand's name."""
    top = Parser(
        prog="afn",
        description="Measure the activation strength of every token of a corpus, and query it.",
        epilog=TOP_EPILOG,
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_status(commands)
    questions.add_show(commands)
    comparisons.add_compare(commands)
    questions.add_claims(commands)
    questions.add_neurons(commands)
    _add_audit(commands)
    comparisons.add_history(commands)
    _add_schema(commands)
    questions.add_sql(commands)
    export.add_export(commands)
    questions.add_explain(commands)
    questions.add_report(commands)
    _add_verify(commands)
    _add_gc(commands)
    _add_doctor(commands)
    _add_demo(commands)
    _add_bench(commands)
    for name, command in commands.choices.items():
        command.set_defaults(command=name, parser=command)
        command.allow_abbrev = False  # a mistyped flag is an error, like a mistyped key
    return top


def nearest_flag(command: argparse.ArgumentParser, flag: str) -> str:
    """A hint, in brackets, at the flag of ``command`` nearest to ``flag``; empty without one."""
    flags: set[str] = set()
    for line in command.format_help().splitlines():
        if line.startswith("  -"):  # the help of an option begins two spaces or a line further on
            option = line.strip().partition("  ")[0]
            flags.update(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", option))
    return nearest([flag.partition("=")[0]], sorted(flags))


def key_of(flag: str) -> str | None:
    """The config key whose flag ``afn run`` would have as ``flag``; None without one."""
    key = flag.partition("=")[0].removeprefix("--").replace("-", "_")
    return key if flag.startswith("--") and key in {f.name for f in fields(RunConfig)} else None


# --- measuring


def _add_run(commands: Commands) -> None:
    run = arguments.add_command(
        commands,
        "run",
        help="measure a corpus and write the results into a store",
        epilog=RUN_EPILOG,
        description="It measures what the store does not have yet, then computes the run's tables. "
        "The same command resumes a stopped run. With nothing changed since the store's newest run "
        "it does nothing.",
    )
    run.add_argument(
        "corpus", metavar="CORPUS", nargs="*", default=argparse.SUPPRESS, help=help_of("corpus")
    )
    run.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file with the options below as keys, or its URL; a flag overrides its key",
    )
    alone = run.add_mutually_exclusive_group()
    alone.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, its estimated time and its price, and measure nothing",
    )
    alone.add_argument(
        "--reduce-only",
        action="store_true",
        help="measure nothing, and compute the run's tables from what the store has; this needs "
        "no workers and no GPU",
    )
    run.add_argument(
        "--rate",
        metavar="FILE",
        type=Path,
        help="for --dry-run: speed that 'afn bench rate' measured (default: a sample is measured "
        "on this machine)",
    )
    run.add_argument(
        "--prices",
        metavar="FILE",
        type=Path,
        help="for --dry-run: TOML file with the prices of machines and storage",
    )
    arguments.add_quiet(run)
    for field in fields(RunConfig):
        if field.name != "corpus":
            _add_config_flag(run, field)


def _add_config_flag(run: argparse.ArgumentParser, field: Field[Any]) -> None:
    """Add the flag of a config key; the default stays in ``RunConfig``."""
    flags = ["--" + field.name.replace("_", "-")]
    if flags[0].endswith("-s"):  # --wait is --wait-s
        flags.insert(0, flags[0].removesuffix("-s"))
    hint = HINTS[field.name]
    options: dict[str, Any] = {}
    if hint is bool:
        may_be_negated = field.default is True
        options["action"] = argparse.BooleanOptionalAction if may_be_negated else "store_true"
    elif field.name in CHOICES:
        options["choices"] = CHOICES[field.name]
    else:
        _, _, last_word = field.name.rpartition("_")
        options["metavar"] = METAVARS.get(field.name, last_word.upper())
        options["type"] = str
        if hint in (float, float | None):
            options["type"] = float
        elif hint in (int, int | None):
            options["type"] = int
    run.add_argument(
        *flags, dest=field.name, default=argparse.SUPPRESS, help=help_of(field.name), **options
    )


def _add_status(commands: Commands) -> None:
    status = arguments.add_command(
        commands,
        "status",
        help="show how far runs are: progress, speed, time left and failures",
        epilog=STATUS_EPILOG,
        description="It reads what a run's driver writes into the store every ten seconds. So it "
        "works from any machine that can read the store.",
    )
    status.add_argument(
        "run",
        metavar="RUN|STORE",
        help="URI of a run, or of a store for all its runs, newest first",
    )
    status.add_argument(
        "--last",
        type=positive,
        default=20,
        metavar="N",
        help="largest number of a store's runs to list (default: 20)",
    )
    arguments.add_json(status, help="print the runs as a JSON list, newest first")


def _add_audit(commands: Commands) -> None:
    audit = arguments.add_command(
        commands,
        "audit",
        help="measure a corpus, compare the run with an earlier one, and check a policy",
        epilog=AUDIT_EPILOG,
        description="This is for a nightly job. It writes audit.json. The same command again gives "
        "the same verdict.",
    )
    audit.add_argument(
        "config",
        metavar="RUN_TOML",
        nargs="?",
        help="config of the run: a file or URL, as for 'afn run'",
    )
    audit.add_argument("--policy", metavar="FILE", help="TOML file with the limits, or its URL")
    audit.add_argument(
        "--accept",
        metavar="RUN",
        help="measure nothing: record that the broken night of this run may be a baseline; needs "
        "--why",
    )
    audit.add_argument("--why", metavar="TEXT", help="reason for --accept, shown in the history")
    _add_night(audit)
    audit.add_argument(
        "--out",
        metavar="DIR",
        default="audit",
        help="folder for audit.json and report.html, or its URL (default: audit)",
    )
    audit.add_argument(
        "--no-report",
        action="store_true",
        help="write no report.html; the packages that it needs may then be missing",
    )
    _add_notifications(audit)
    arguments.add_quiet(audit)


def _add_night(audit: argparse.ArgumentParser) -> None:
    """Flags that choose the night and its baseline."""
    audit.add_argument(
        "--baseline",
        metavar="RUN",
        help="run to compare with. 'previous': the newest run of the series before this one. "
        "'week': the newest that began at least 6.5 days earlier. 'weekday', for dated partitions: "
        "the partition of seven days earlier. 'median:7': the median of the last 7 nights. "
        "Anything else is the URI of a run (default: the policy's baseline)",
    )
    audit.add_argument(
        "--series",
        metavar="NAME",
        help="name of the series whose earlier runs are the baselines (default: the config's, "
        "otherwise derived from the store and the corpus with dates replaced)",
    )
    audit.add_argument(
        "--partition",
        metavar="DATE",
        help='with window = "new" in the policy: date of the partition to measure, as in '
        "2026-11-02, or latest (default: latest)",
    )
    audit.add_argument(
        "--first-night",
        action="store_true",
        help="accept that limits cannot be judged because the series has no baseline yet",
    )
    audit.add_argument(
        "--frozen",
        action="store_true",
        help="decide what is HIGH by the thresholds of the runs before this one",
    )


def _add_notifications(audit: argparse.ArgumentParser) -> None:
    """Flags that choose who is told of a verdict, and how."""
    audit.add_argument(
        "--webhook",
        metavar="URL",
        help="POST audit.json to this URL unless the policy holds (default: the environment "
        "variable AFN_WEBHOOK, which keeps the URL out of the list of processes)",
    )
    audit.add_argument(
        "--notify",
        metavar="URL",
        action="append",
        help="send a short message unless the policy holds: a URL of apprise (slack://..., "
        "workflows://... for Teams, mailtos://..., pagerduty://..., jsons://...); may be repeated "
        "(default: the environment variable AFN_NOTIFY, with spaces between several)",
    )
    audit.add_argument(
        "--page-url",
        metavar="URL",
        help="link to report.html in the message (default: --out, if it is an http URL)",
    )
    audit.add_argument(
        "--allow-http",
        action="store_true",
        help="allow --webhook and --notify to send to another machine without encryption",
    )
    audit.add_argument(
        "--on-broken",
        metavar="COMMAND",
        help="run this command, without a shell, unless the policy holds; the environment variable "
        "AFN_AUDIT_JSON names audit.json",
    )
    audit.add_argument(
        "--notify-again",
        action="store_true",
        help="notify even if an earlier audit notified of the same verdict on the same text",
    )


def _add_schema(commands: Commands) -> None:
    schema = arguments.add_command(
        commands,
        "schema",
        help="print the JSON Schema of run.toml, policy.toml or audit.json",
        epilog=SCHEMA_EPILOG,
        description="The schema is of draft 2020-12. A TOML file names it in its first line: "
        "#:schema ./run.schema.json",
    )
    schema.add_argument("of", choices=list(json_schema.SCHEMAS), help="what the schema describes")


# --- keeping a store


def _add_verify(commands: Commands) -> None:
    verify = arguments.add_command(
        commands,
        "verify",
        help="prove that a store still holds what was committed",
        epilog=VERIFY_EPILOG,
        description="It reads every committed file, checks checksums, numbers of rows and schemas, "
        "and computes the thresholds again from the rows.",
    )
    verify.add_argument(
        "uri",
        metavar="STORE|RUN",
        help="URI of a store to check all its shards and runs, or of a run to check only that run",
    )
    verify.add_argument(
        "--clean",
        action="store_true",
        help="delete orphans: files of unfinished attempts that no commit names",
    )
    arguments.add_min_age(
        verify,
        help="age in hours from which a file that no commit names is an orphan; a younger one may "
        "belong to a running attempt (default: 24)",
    )
    arguments.add_memory_limit(verify)
    arguments.add_json(verify)


def _add_gc(commands: Commands) -> None:
    gc = arguments.add_command(
        commands,
        "gc",
        help="list what no kept run needs, and delete it with --delete",
        epilog=GC_EPILOG,
        description="The list has the runs that are not kept, and the shards that only they need. "
        "Runs that may be running are always kept.",
    )
    gc.add_argument("store", metavar="STORE", help="store to clean up, as for 'afn run --store'")
    gc.add_argument(
        "--keep",
        type=int,
        default=30,
        metavar="N",
        help="number of newest complete runs to keep (default: 30)",
    )
    gc.add_argument(
        "--keep-run",
        action="append",
        default=[],
        metavar="RUN",
        help="also keep this run, such as a baseline, by its name or URI; may be repeated",
    )
    arguments.add_min_age(
        gc,
        help="age in hours from which a shard that no kept run needs is deleted; a run that just "
        "starts may need a younger one (default: 24)",
    )
    gc.add_argument(
        "--delete", action="store_true", help="delete what is listed; without it nothing is deleted"
    )
    arguments.add_json(gc)


# --- this machine


def _add_doctor(commands: Commands) -> None:
    doctor = arguments.add_command(
        commands,
        "doctor",
        help="check this installation, and say how to fix what fails",
        epilog=DOCTOR_EPILOG,
    )
    doctor.add_argument(
        "--model", help="model folder, GGUF file or hub name to load (default: the demo's model)"
    )
    doctor.add_argument("--store", help="store to write a test file into")
    doctor.add_argument(
        "--address", help="Ray cluster to join (default: RAY_ADDRESS, otherwise a local Ray)"
    )


def _add_demo(commands: Commands) -> None:
    demo = arguments.add_command(
        commands,
        "demo",
        help="measure the King James Bible with MiniLM and show the results, in about a minute",
        epilog=RUN_EPILOG,
    )
    demo.add_argument(
        "--store", default="afn-demo", help="folder for the results (default: ./afn-demo)"
    )
    demo.add_argument("--workers", type=int, help="number of workers (default: one per core)")


def _add_bench(commands: Commands) -> None:
    command = arguments.add_command(
        commands,
        "bench",
        help="measure the speed of this engine on this machine, beside what users write instead",
        epilog=BENCH_EPILOG,
        description="A checkout of the repository has more benchmarks: python jobs/benchmark.py "
        "audit, demo, groups, languages, lexicons, reduce, safety, screen, signals, simulate "
        "or sql.",
    )
    bench.add_commands(command)
