"""The ``afn`` command: parses, calls, prints, and returns an exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from afn_ray.config import CHOICES, HINTS, RunConfig, config_from
from afn_ray.errors import AfnError, ConfigError, Damaged, Interrupted, count, printable

if TYPE_CHECKING:
    from afn_ray.job import Estimate, Event, OnEvent
    from afn_ray.pipeline import Progress

EPILOG = "exit codes: 0 done; 1 ended with shards missing; 2 usage, config or query; 75 stopped, resumable"
VERIFY_EPILOG = "exit codes: 0 all is as it was committed; 1 something is damaged; 2 usage; 75 no answer from the store"
GC_EPILOG = "exit codes: 0 listed, or deleted; 2 usage, or a plan that cannot be read; 75 stopped, resumable"
AUDIT_EPILOG = (
    "exit codes: 0 the policy holds; 1 it is broken; 2 the audit failed or was stopped, and the same command resumes it"
)
POLICY_BROKEN, AUDIT_FAILED = 1, 2
LOG_EVERY_S = 10.0
RUN_HELP = "a run's URI, or a store's for its latest complete run"


def command(argv: Sequence[str] | None = None) -> NoReturn:
    """``afn``: ``main``, and then the process ends at once.

    Threads are not waited for: one of ours may hang in an upload, and libraries' have been seen to abort the
    interpreter as it ended, with a code that says nothing of what was done.
    """
    try:
        main(argv)
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """What ``afn`` does, with the exit code as ``SystemExit``."""
    parser = _parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        sys.exit(ConfigError.exit_code)
    args, rest = parser.parse_known_args(argv)
    if rest and args.call is _sql and args.query is None and not rest[0].startswith("-"):
        args.query = rest.pop(0)  # argparse before Python 3.12 wants an optional argument right behind the first one
    if rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    log = logging.getLogger("afn_ray")
    if not log.handlers:
        log.addHandler(_ToStderr())
    audits, failed = args.call is _audit, True
    try:
        with _terminable():
            code = args.call(args) or 0
        sys.stdout.flush()
        failed = False
    except KeyboardInterrupt:
        resumable = audits or args.call in (_run, _demo, _gc)
        errors.print("afn: stopped" + ("; the same command resumes" if resumable else ""), markup=False)
        code = Interrupted.exit_code if resumable else 130
    except BrokenPipeError:  # the reader, `head` say, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except AfnError as error:
        errors.print("afn:", printable(str(error), keep="\n"), markup=False)
        code = error.exit_code
    except Exception:
        if not audits:
            raise
        traceback.print_exc()  # Python would leave with 1, which says that a policy is broken
        code = AUDIT_FAILED
    sys.exit(AUDIT_FAILED if audits and failed else code)


class _ToStderr(logging.Handler):
    """What the library logs, above a live bar where there is one: that takes over ``sys.stderr``."""

    def emit(self, record: logging.LogRecord) -> None:
        print("afn:", printable(record.getMessage()), file=sys.stderr)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends like Ctrl-C: workers are stopped, scratch files removed, and the exit code says resumable."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- grammar ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A mistake is told in one line; the whole usage, 50 lines for some commands, is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(ConfigError.exit_code, f"{self.prog}: {message}; '{self.prog} --help' tells more\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="afn", description="Token Activation Strength of a whole corpus.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)

    show = commands.add_parser("show", help="what a run is, and its honest summary", epilog=EPILOG)
    show.add_argument("run", metavar="RUN", help=RUN_HELP)
    show.add_argument("--json", action="store_true", help="the same as JSON")
    show.set_defaults(call=_show)

    compare = commands.add_parser(
        "compare", help="what moved between two runs: quartiles, distances, classes, types, sources", epilog=EPILOG
    )
    compare.add_argument("run_a", metavar="RUN_A", help=f"the baseline: {RUN_HELP}")
    compare.add_argument("run_b", metavar="RUN_B", help="the run to hold against it, said in the same way")
    compare.add_argument("--json", metavar="FILE", type=_local, help="write the comparison there as JSON too")
    compare.add_argument(
        "--ranks-only", action="store_true",
        help="leave out what depends on raw strengths, which alone compares runs of different measures",
    )  # fmt: skip
    compare.set_defaults(call=_compare)

    claims = commands.add_parser(
        "claims", help="what is claimed of the measure, each figure beside its control", epilog=EPILOG,
        description="Figures with 95 %% intervals by bootstrap over documents. Signals that the run recorded beside "
        "strength (afn run --signals) add theirs.",
    )  # fmt: skip
    claims.add_argument("run", metavar="RUN", help=RUN_HELP)
    claims.add_argument(
        "--max-tokens", type=_positive, default=5_000_000, metavar="N",
        help="tokens of a larger run that are read, in whole documents (default: 5,000,000)",
    )  # fmt: skip
    claims.add_argument("--masking", action="store_true",
                        help="mask HIGH tokens, and as many others, and see what the model's output loses")  # fmt: skip
    claims.add_argument(
        "--sample", type=_positive, default=200, metavar="N", help="documents that --masking takes (default: 200)"
    )
    claims.add_argument("--model", help="where the run's model is now, for --masking (default: where it was)")
    claims.add_argument("--trust-remote-code", action="store_true", help=_help_of("trust_remote_code"))
    claims.add_argument("--allow-pickle", action="store_true", help=_help_of("allow_pickle"))
    claims.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a query (default: 600)")
    claims.add_argument("--json", action="store_true", help="print JSON")
    claims.set_defaults(call=_claims)

    neurons = commands.add_parser(
        "neurons", help="which neurons answer to a word, and what a neuron answers to", epilog=EPILOG,
        description="Of a run that recorded neurons (afn run --signals neurons). Without --word or --neuron: the most "
        "selective ones.",
    )  # fmt: skip
    neurons.add_argument("run", metavar="RUN", help=RUN_HELP)
    asked = neurons.add_mutually_exclusive_group()
    asked.add_argument("--word", help="which neurons it has more often than other words have")
    asked.add_argument("--neuron", type=_count, metavar="N", help="its types, and the tokens that have most of it")
    neurons.add_argument("--layer", type=int, help="layer to show (default: the deepest recorded)")
    neurons.add_argument("--top", type=_count, default=15, metavar="N", help="neurons to show (default: 15)")
    neurons.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds a query (default: 600)")
    neurons.add_argument("--json", action="store_true", help="print JSON")
    neurons.set_defaults(call=_neurons)

    audit = commands.add_parser(
        "audit", help="the nightly audit: run, compare with an earlier run, judge by a policy", epilog=AUDIT_EPILOG,
        description="Writes audit.json, and tells of a broken policy once more when the same command is given again.",
    )  # fmt: skip
    audit.add_argument("config", metavar="RUN_TOML", type=Path, help="what to run: a file as of 'afn run --config'")
    audit.add_argument("--policy", metavar="FILE", type=Path, required=True, help="TOML file of limits")
    audit.add_argument(
        "--baseline", metavar="RUN", default="previous",
        help="previous: the store's newest run before this one; week: the newest that began 6.5 days earlier; or a "
             "run's URI (default: previous)",
    )  # fmt: skip
    audit.add_argument("--frozen", action="store_true", help="label by the thresholds of the runs before this one")
    audit.add_argument(
        "--out",
        metavar="DIR",
        type=_local,
        default="audit",
        help="folder of audit.json and report.html (default: audit)",
    )
    audit.add_argument("--no-report", action="store_true", help="no report.html, and none of its packages")
    audit.add_argument("--webhook", metavar="URL", help="POST audit.json there if the policy is broken "
                       "(default: AFN_WEBHOOK of the environment, which no list of processes shows)")  # fmt: skip
    audit.add_argument("--allow-http", action="store_true", help="let --webhook be http to another machine")
    audit.add_argument("--on-broken", metavar="COMMAND", help="run that, without a shell, if the policy is broken; "
                       "AFN_AUDIT_JSON says where audit.json is")  # fmt: skip
    audit.add_argument("--quiet", action="store_true", help="no progress; errors still show")
    audit.set_defaults(call=_audit)

    sql = commands.add_parser(
        "sql", help="ask a run in SQL", epilog=EPILOG,
        description="Views: tokens, documents, vocabulary, words, thresholds, labels, histogram, sources, screened, "
        "shards, run, and with --baseline movers, drift, class_drift. Macros: kwic(word, n := 5, most := NULL), "
        "document_text(document). Without a QUERY, a shell.",
    )  # fmt: skip
    sql.add_argument("run", metavar="RUN", help=RUN_HELP)
    sql.add_argument("query", metavar="QUERY", nargs="?", help="one SQL statement; without it an interactive shell")
    sql.add_argument(
        "--baseline", metavar="RUN", help="run to compare with: fills the views movers, drift and class_drift"
    )
    sql.add_argument(
        "--open", metavar="FILE", type=_local, nargs="?", const=Path("catalog.duckdb"), dest="catalog",
        help="write the views into a file that any DuckDB client opens, and do nothing else (default: catalog.duckdb)",
    )  # fmt: skip
    sql.add_argument("--format", choices=("table", "csv", "json", "parquet"), default="table", help="default: table")
    sql.add_argument("--out", metavar="FILE", type=_local, help="write there instead of the terminal")
    sql.add_argument("--max-rows", type=_count, default=100, help="rows that a table shows (default: 100; 0 = all)")
    sql.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for a query (default: 60)")
    sql.add_argument("--memory-limit", type=_memory, default="2GB", help="memory of DuckDB (default: 2GB)")
    sql.add_argument("--threads", type=int, help="threads of DuckDB (default: one per core)")
    sql.set_defaults(call=_sql)

    explain = commands.add_parser("explain", help="one text's tokens against a run", epilog=EPILOG)
    explain.add_argument("run", metavar="RUN", help=RUN_HELP)
    explain.add_argument("text", metavar="TEXT", help="the text, or - for standard input")
    explain.add_argument("--layer", type=int, help="recorded layer to show (default: the deepest)")
    explain.add_argument("--signals", metavar="LIST", default="strength",
                         help="show these beside strength, recorded or not: shift, attention, ...")  # fmt: skip
    explain.add_argument("--layers", metavar="LIST",
                         help="show a heat map, token by layer, of these, recorded or not: all, or 4,6,8")  # fmt: skip
    explain.add_argument("--task", action="store_true", help="ask the model's sequence classifier too, and show which "
                         "tokens and neurons of the layer its answer hangs on")  # fmt: skip
    explain.add_argument("--model", help="where the run's model is now (default: where it was)")
    explain.add_argument("--trust-remote-code", action="store_true", help=_help_of("trust_remote_code"))
    explain.add_argument("--allow-pickle", action="store_true", help=_help_of("allow_pickle"))
    explain.add_argument("--all", action="store_true", help="list every token of a long text")
    explain.add_argument("--html", metavar="FILE", type=_local, help="write a self-contained page")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(call=_explain)

    report = commands.add_parser("report", help="one run as a page that people look at", epilog=EPILOG)
    report.add_argument("run", metavar="RUN", help=RUN_HELP)
    report.add_argument("--baseline", metavar="RUN", help="run to say what has changed since, likewise")
    report.add_argument("--ranks-only", action="store_true", help="baseline of another measure: compare shares alone")
    report.add_argument("--no-claims", action="store_true", help="leave out claims and controls, which take longest")
    report.add_argument("--out", metavar="FILE", type=_local, help="page to write (default: report-<run id>.html)")
    report.set_defaults(call=_report)

    verify = commands.add_parser(
        "verify", help="prove that a store still holds what was committed", epilog=VERIFY_EPILOG,
        description="Reads every committed file: checksums, rows, schemas, and thresholds recomputed from the rows.",
    )  # fmt: skip
    verify.add_argument("uri", metavar="STORE|RUN", help="a store (all shards and runs), or a run's URI (it alone)")
    verify.add_argument("--clean", action="store_true", help="remove orphans: files of attempts that nothing names")
    verify.add_argument(
        "--min-age-h", type=float, default=24.0, metavar="H",
        help="age from which files that no commit names yet are orphans: an attempt may be at work (default: 24)",
    )  # fmt: skip
    verify.add_argument("--memory-limit", type=_memory, default="2GB", help="memory of DuckDB (default: 2GB)")
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.set_defaults(call=_verify)

    gc = commands.add_parser(
        "gc", help="delete what no kept run refers to, after a dry run that lists it", epilog=GC_EPILOG,
        description="Lists runs that are not kept and shards that only they refer to; --delete removes them. Runs that "
        "may be under way are kept.",
    )  # fmt: skip
    gc.add_argument("store", metavar="STORE", help="what was given to 'afn run --store'")
    gc.add_argument("--keep", type=int, default=30, metavar="N", help="newest complete runs to keep (default: 30)")
    gc.add_argument(
        "--keep-run", action="append", default=[], metavar="RUN",
        help="a run to keep besides, by its name or URI, a baseline say; give it again for more",
    )  # fmt: skip
    gc.add_argument(
        "--min-age-h", type=float, default=24.0, metavar="H",
        help="age from which a shard that no kept run refers to goes: a run may be about to (default: 24)",
    )  # fmt: skip
    gc.add_argument("--delete", action="store_true", help="delete it; without this nothing is")
    gc.add_argument("--json", action="store_true", help="print JSON")
    gc.set_defaults(call=_gc)

    doctor = commands.add_parser("doctor", help="what works here, and what to do about what does not", epilog=EPILOG)
    doctor.add_argument("--model", help="model folder, GGUF file or hub name to try (default: the demo's)")
    doctor.add_argument("--store", help="store to try to write")
    doctor.add_argument("--address", help="Ray cluster to try (default: RAY_ADDRESS, else a local Ray)")
    doctor.set_defaults(call=_doctor)

    demo = commands.add_parser(
        "demo", help="the whole path on real input: MiniLM over the King James verses, about a minute", epilog=EPILOG
    )
    demo.add_argument("--store", default="afn-demo", help="folder for the results (default: ./afn-demo)")
    demo.add_argument("--workers", type=int, help="workers (default: one per core)")
    demo.set_defaults(call=_demo)
    _add_bench(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
        command.allow_abbrev = False  # a mistyped flag is an error, as a mistyped key is
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run", help="measure a corpus: plan, do what the store lacks, reduce", epilog=EPILOG,
        description="Give the same command again to resume; with nothing changed it does nothing.",
    )  # fmt: skip
    run.add_argument("corpus", metavar="CORPUS", nargs="*", default=argparse.SUPPRESS, help=_help_of("corpus"))
    run.add_argument("--config", metavar="FILE", type=Path, help="TOML file with the same keys; flags win")
    run.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    run.add_argument("--quiet", action="store_true", help="no progress; errors still show")
    for field in fields(RunConfig):
        if field.name == "corpus":
            continue
        flag, hint = "--" + field.name.replace("_", "-"), HINTS[field.name]
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help_of(field.name)}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction if field.default is True else "store_true"
        elif field.name in CHOICES:
            options["choices"] = CHOICES[field.name]
        else:
            options["metavar"] = field.name.rsplit("_", 1)[-1].upper()
            options["type"] = float if hint in (float, float | None) else int if hint in (int, int | None) else str
        short = [flag.removesuffix("-s")] if flag.endswith("-s") else []  # --wait is --wait-s
        run.add_argument(*short, flag, dest=field.name, **options)
    run.set_defaults(call=_run)


def _add_bench(commands: Any) -> None:
    from afn_ray import bench

    parser = commands.add_parser(
        "bench", help="measure this engine on this machine, against what users write instead", epilog=EPILOG
    )
    bench.add_commands(parser)
    parser.set_defaults(call=_bench)


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)?\s*([KMGT]i?B?|%)", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give one such as 2GB, 512MiB or 50%")
    return text


def _local(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is not a file of this machine; copy the result there afterwards")
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


# --- commands --------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> None:
    names = {f.name for f in fields(RunConfig)}
    given = {k: tuple(v) if k == "corpus" else v for k, v in vars(args).items() if k in names}
    if not given.get("corpus"):
        given.pop("corpus", None)  # none on the command line: the file's
    config = config_from(given, args.config)
    from afn_ray import job

    console = Console(stderr=True, highlight=False)
    with _progress(console, args.quiet) as on_event:
        if args.dry_run:
            estimate = job.dry_run(config, on_event)
        else:
            with job.run(config, on_event) as run:
                uri = run.uri
    if args.dry_run:
        _print_estimate(estimate, Console(highlight=False))
    elif args.quiet:
        print(uri)
    else:
        print(f"\nNext: afn show {_shell(config.store)}\n      afn sql {_shell(config.store)}")


def _show(args: argparse.Namespace) -> None:
    from afn_ray import manifest, show

    summary = show.summarise(manifest.find_run(args.run))
    if args.json:
        print(json.dumps(show.to_json(summary), indent=1))
    else:
        show.render(summary, Console(highlight=False))


def _compare(args: argparse.Namespace) -> None:
    from afn_ray import compare, show

    found = compare.compare(args.run_a, args.run_b, ranks_only=args.ranks_only)
    if args.json:
        with _output(args.json) as file:
            file.write((json.dumps(compare.to_json(found), indent=1, allow_nan=False) + "\n").encode())
    show.render_comparison(found, Console(highlight=False))


def _claims(args: argparse.Namespace) -> None:
    from afn_ray import claims, query

    with query.open_run(args.run, timeout_s=args.timeout) as run:
        found = claims.claims(run, max_tokens=args.max_tokens)
        if args.masking:
            from afn_ray import masking

            figures, note = masking.check(
                run, num_documents=args.sample, model_name=args.model, trust_remote_code=args.trust_remote_code,
                allow_pickle=args.allow_pickle,
            )  # fmt: skip
            found = claims.Claims(found.run, (*found.notes, note), (*found.figures, *figures))
    if args.json:
        print(json.dumps(claims.to_json(found), indent=1))
    else:
        claims.render(found, Console(highlight=False))


def _neurons(args: argparse.Namespace) -> None:
    from afn_ray import concepts, query

    console = Console(highlight=False)
    found: Any
    with query.open_run(args.run, timeout_s=args.timeout) as run:
        layer = concepts.layer_of(run, args.layer)
        if args.word is not None:
            found, occurrences = concepts.neurons_of_word(run, args.word, layer, args.top)
            value = {"word": args.word, "layer": layer, "occurrences": occurrences,
                     "neurons": [{**asdict(c), "lift": c.lift} for c in found]}  # fmt: skip
            render = partial(concepts.render_word, args.word, found, occurrences)
        elif args.neuron is not None:
            neuron = concepts.find_neuron(run, layer, args.neuron)
            found = concepts.contexts(run, layer, args.neuron)
            value = {**asdict(neuron), "contexts": [asdict(c) for c in found]}
            render = partial(concepts.render_neuron, neuron, found)
        else:
            found = concepts.selective_neurons(run, layer, args.top)
            value = {"layer": layer, "neurons": [asdict(n) for n in found]}
            render = partial(concepts.render_selective, found)
    if args.json:
        print(json.dumps(value, indent=1))
    else:
        render(console)


def _audit(args: argparse.Namespace) -> int:
    from afn_ray import audit, manifest, report
    from afn_ray.cluster import connection

    connection.lost_exit_code = AUDIT_FAILED
    config, policy = config_from({}, args.config), audit.read_policy(args.policy)
    url = args.webhook or os.environ.get("AFN_WEBHOOK")
    webhook = audit.check_webhook(url, args.allow_http) if url else None
    command = audit.parse_command(args.on_broken) if args.on_broken is not None else None
    if not args.no_report:
        report.check_packages()  # now, not after the run
    errors = Console(stderr=True, highlight=False)
    with _progress(errors, args.quiet) as on_event:
        found = audit.run_audit(
            config, policy, baseline=args.baseline, frozen=args.frozen, mark=False, on_event=on_event
        )  # fmt: skip
    written = audit.write_json(found, args.out)
    (args.out / "report.html").unlink(missing_ok=True)  # of another verdict
    failures = []
    if not found.passed:
        failures = [audit.post(webhook, audit.to_bytes(found)) if webhook else None,
                    audit.call_command(command, written) if command else None]  # fmt: skip
    if not args.no_report:
        try:
            report.write_report(found.run, args.out / "report.html", baseline=found.baseline, with_claims=False)
        except Exception as error:  # noqa: BLE001 - a page is worth no verdict
            failures.append(f"report.html could not be written: {error or type(error).__name__}")
    for failure in filter(None, failures):  # whoever waits for the exit code still learns the verdict
        errors.print("afn:", printable(failure), markup=False, soft_wrap=True)
    try:
        for line in audit.lines(found):
            print(printable(line))
        sys.stdout.flush()
    except BrokenPipeError:  # the verdict is the exit code all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    manifest.mark_audited(found.run)  # last: whatever ends this before, its step is told of again, or with the next
    return 0 if found.passed else POLICY_BROKEN


def _sql(args: argparse.Namespace) -> None:
    from afn_ray import query, shell

    if args.catalog:
        if args.query is not None:
            raise ConfigError(f"--open writes {args.catalog} and asks nothing; leave out --open or the query")
        query.write_catalog(args.run, args.catalog, baseline=args.baseline)
        print(f"{args.catalog} is written; any DuckDB client opens it, as in: duckdb {_shell(str(args.catalog))}")
        return
    with query.open_run(
        args.run, baseline=args.baseline, memory_limit=args.memory_limit, threads=args.threads, timeout_s=args.timeout
    ) as run:  # fmt: skip
        if args.query is None:
            shell.interactive(run)
            return
        relation = run.sql(args.query)
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(_output(args.out)) if args.out else None
            shell.print_result(relation, args.format, out, max_rows=None if args.out else args.max_rows or None)


def _output(path: Path) -> contextlib.AbstractContextManager[Any]:
    from afn_ray import storage

    return storage.write_local(path)


def _explain(args: argparse.Namespace) -> None:
    from afn_ray import explain, explained

    text = sys.stdin.read() if args.text == "-" else args.text
    result = explain.explain(
        args.run,
        text,
        model_name=args.model,
        trust_remote_code=args.trust_remote_code,
        allow_pickle=args.allow_pickle,
        signals=args.signals,
        layers=args.layers,
        task=args.task,
        layer=args.layer,
    )
    if args.html:
        with _output(args.html) as file:
            file.write(explained.render_html(result).encode())
        print(f"{args.html} is written; open it in a browser")
    elif args.json:
        print(json.dumps(explain.to_json(result), indent=1))
    else:
        explained.render_terminal(result, args.layer, Console(highlight=False), show_all=args.all)


def _report(args: argparse.Namespace) -> None:
    from afn_ray import report

    path = report.write_report(
        args.run, args.out, baseline=args.baseline, ranks_only=args.ranks_only, with_claims=not args.no_claims
    )
    print(f"{path} is written; open it in a browser")


def _doctor(args: argparse.Namespace) -> None:
    from afn_ray import doctor

    checks = doctor.check(args.model, args.store, args.address)
    doctor.render(checks, Console(highlight=False))
    if failed := [c.name for c in checks if c.ok is False]:
        raise ConfigError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def _demo(args: argparse.Namespace) -> None:
    from afn_ray import demo, manifest, show

    began = time.monotonic()
    config = demo.demo_config(args.store, args.workers)
    from afn_ray import job

    console = Console(stderr=True, highlight=False)
    with _progress(console, quiet=False) as on_event:
        run = job.run(config, on_event)
    seconds = time.monotonic() - began
    summary = show.summarise(manifest.find_run(run.uri))
    layer = summary.layers[-1].layer
    out = Console(highlight=False)
    tokens = summary.info["counts"]["tokens"]
    out.print(f"\n{tokens:,} tokens of the King James verses, all-MiniLM-L6-v2; this took {seconds:.0f} s\n")
    show.render_thresholds(summary, out)
    show.render_classes(summary, out)
    with run:
        show.render_salient(run, layer, out)
    show.render_caution(summary, out)
    store = _shell(args.store)
    query = (
        f"FROM vocabulary SELECT text, n, share_high WHERE layer = {layer} AND class = 'content' AND n > 99 "
        "ORDER BY share_high DESC LIMIT 9"
    )
    out.print(f"\nResults: {run.uri}", markup=False, soft_wrap=True)
    for command in (f"show {store}", f"explain {store} 'In the beginning was the Word'", f'sql {store} "{query}"'):
        out.print(f"Next:    afn {command}", markup=False, soft_wrap=True)


def _verify(args: argparse.Namespace) -> None:
    from afn_ray import verify

    result = verify.verify_store(
        args.uri,
        clean=args.clean,
        min_age_h=args.min_age_h,
        memory_limit=args.memory_limit,
        on_progress=_now_and_then(),
    )
    if args.json:
        print(json.dumps(asdict(result), indent=1))
    else:
        for line in verify.lines(result):
            print(printable(line))
    if result.findings:
        raise Damaged(f"{result.uri} is damaged: {count(len(result.findings), 'finding')}")


def _gc(args: argparse.Namespace) -> None:
    from afn_ray import garbage

    found = garbage.collect_garbage(
        args.store, keep=args.keep, keep_runs=args.keep_run, min_age_h=args.min_age_h, delete=args.delete,
        on_progress=_now_and_then(),
    )  # fmt: skip
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return
    flags = [f"--keep={args.keep}", *(f"--keep-run={run}" for run in args.keep_run), f"--min-age-h={args.min_age_h:g}"]
    for line in garbage.lines(found, flags):
        print(printable(line))


def _now_and_then() -> Callable[[str], None]:
    """Prints what it is told on stderr, every ten seconds at most."""
    console, last = Console(stderr=True, highlight=False), time.monotonic()

    def say(message: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LOG_EVERY_S:
            last = time.monotonic()
            console.print(printable(message), markup=False, soft_wrap=True)

    return say


def _bench(args: argparse.Namespace) -> None:
    from afn_ray import bench

    bench.call(args)


def _shell(text: str) -> str:
    import shlex

    return shlex.quote(text)


# --- progress --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(console: Console, quiet: bool) -> Iterator[OnEvent]:
    """Shows events: a live bar on a terminal, else a line when something ends and every ten seconds."""
    if quiet:
        yield lambda event: None
    elif console.is_terminal:
        with _live(console) as on_event:
            yield on_event
    else:
        yield _log(console)


@contextlib.contextmanager
def _live(console: Console) -> Iterator[OnEvent]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(),
               TextColumn("{task.fields[note]}"), TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("planning", total=None, note="")

        def on_event(event: Event) -> None:
            if event.kind in ("planned", "warning", "complete"):
                progress.console.print(printable(event.message), markup=False, soft_wrap=True)
            elif event.kind == "hashing":
                progress.update(task, description=event.message, completed=event.done, total=event.total, note="files")
            elif event.state is not None:
                state = event.state
                done = len(state.commits) + len(state.failures)
                progress.update(task, description="shards", completed=done, total=state.num_shards, note=_note(event))
            else:
                progress.update(task, description=event.message, completed=0, total=None, note="")

        yield on_event


def _log(console: Console) -> OnEvent:
    last = 0.0

    def on_event(event: Event) -> None:
        nonlocal last
        state = event.state
        if state is None and event.kind != "hashing":
            console.print(printable(event.message), markup=False, soft_wrap=True)
        elif time.monotonic() - last >= LOG_EVERY_S:
            last = time.monotonic()
            if state is None:
                console.print(f"{event.message}: {event.done:,} of {event.total:,} files", markup=False)
            else:
                done = len(state.commits) + len(state.failures)
                console.print(f"shards {done}/{state.num_shards}  {_note(event)}", markup=False, soft_wrap=True)

    return on_event


def _note(event: Event) -> str:
    """Documents, tokens per second, padding, time left and failures of a run at work."""
    assert event.state is not None
    state, live = event.state, event.state.live
    if not state.num_ready and not state.commits:
        return f"waiting for workers: 0 of {state.num_workers} have loaded the model"
    rate = live.tokens / state.seconds if state.seconds else 0.0
    done = len(state.commits) + len(state.failures)
    parts = [f"{live.documents:,} documents", f"{rate:,.0f} tokens/s"]
    if live.tokens:
        parts.append(f"{max(0.0, 1 - live.tokens / live.forward_tokens):.1%} padding")
    if done:
        left = state.seconds / done * (state.num_shards - done)
        parts.append(f"{left:,.0f} s left" if left < 600 else f"{left / 60:,.0f} min left")
    if waits := _waits(live):
        parts.append(waits)
    if state.retries:
        parts.append(f"{state.retries} retried")
    if state.failures:
        parts.append(f"{len(state.failures)} FAILED")
    return ", ".join(parts)


def _waits(live: Progress) -> str:
    """What the models wait for, where that takes a fifth of their time."""
    if live.model_s + live.wait_s < 5 or live.wait_s < 0.2 * (live.model_s + live.wait_s):
        return ""
    share = f"{live.wait_s / (live.model_s + live.wait_s):.0%} of the time waiting for "
    return share + ("the tokenizer: try more --tokenizer-workers" if live.tokenize_s > live.read_s else "the corpus")


def _print_estimate(e: Estimate, console: Console) -> None:
    about = "" if e.documents_exact else "about "
    todo = e.num_shards - e.num_shards_done
    speed = f"{e.num_workers} workers of {e.tokens_per_second:,.0f} tokens/s (measured here)"
    rows = [
        ("model", f"{e.model}: layers {', '.join(map(str, e.layers))} of {e.depth}, {e.dtype} on {e.device}"),
        ("windows", f"{e.window_tokens} tokens, {e.overlap_tokens} shared by neighbours"),
        ("corpus", f"{about}{e.num_documents:,} documents, {e.num_bytes:,} bytes in {e.num_files:,} files"),
        ("shards", f"{e.num_shards:,}, of them {e.num_shards_done:,} in the store and {todo:,} to do"),
        ("tokens", f"about {e.tokens:,} (from a sample)"),
        ("store", f"about {e.store_bytes:,} bytes"),
        ("time", f"about {_duration(e.seconds)}: {speed}"),
        *(
            (
                (
                    "signals",
                    "time of the forward pass beside strength alone: "
                    + ", ".join(f"{name} {cost:+.0%}" for name, cost in e.signal_costs.items()),
                ),
            )
            if e.signal_costs
            else ()
        ),
        ("measure", e.measure),
    ]
    for name, value in rows:
        console.print(f"{name:<8} {printable(value)}", markup=False, soft_wrap=True)
    for uri in e.skipped:
        console.print(f"skipped  {printable(uri)}: its ending is no known format", markup=False, soft_wrap=True)
    console.print("nothing was done (--dry-run)", markup=False)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
