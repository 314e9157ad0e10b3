"""The ``afn`` command: parse, call, print, and return an exit code."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from afn_ray import logs
from afn_ray.cli import audits, comparisons, export, grammar, questions, terminal
from afn_ray.cli.audits import AUDIT_FAILED
from afn_ray.cli.estimates import print_estimate
from afn_ray.cli.progress import ToStderr, json_lines, log_as, now_and_then, shown_progress
from afn_ray.config import RunConfig
from afn_ray.errors import AfnError, ConfigError, Damaged, Interrupted
from afn_ray.store import disk
from afn_ray.text import count, printable

if TYPE_CHECKING:
    from afn_ray.query.database import Run

Calls = Mapping[str, Callable[[argparse.Namespace], int | None]]
"""The function of each command, whose result is its exit code; ``None`` is 0."""
NEW_OBJECTS = 50_000
"""New objects between two garbage collections of a command. At Python's 700 they take a fifth of
the time in which torch and transformers, some two million objects, are imported.
"""


def command(
    argv: Sequence[str] | None = None,
    make_parser: Callable[[], argparse.ArgumentParser] = grammar.parser,
    calls: Calls | None = None,
) -> NoReturn:
    """Entry point of ``afn``: call ``main``, then end the process at once.

    It does not wait for threads. One of ours may hang in an upload, and threads of libraries can
    abort the interpreter at exit, with an exit code unrelated to the result.
    """
    gc.set_threshold(NEW_OBJECTS)
    terminal.prepare()
    try:
        main(argv, make_parser, calls)
    except SystemExit as end:
        code = 1  # ``end.code`` may be a message
        if end.code is None:
            code = 0
        elif isinstance(end.code, int):
            code = end.code
        os._exit(terminal.finish(code))


def main(
    argv: Sequence[str] | None = None,
    make_parser: Callable[[], argparse.ArgumentParser] = grammar.parser,
    calls: Calls | None = None,
) -> NoReturn:
    """Run the ``afn`` command; raise ``SystemExit`` with its exit code.

    A program with other commands has a parser of its own, which sets ``command`` and ``parser`` as
    ``grammar.parser`` does, and ``calls``: a function for each ``command``.
    """
    args = _parse(argv, make_parser())
    log = logging.getLogger(logs.ROOT)
    if not log.handlers:
        log.addHandler(ToStderr())
    sys.exit(_call(args, calls or COMMANDS))


def _parse(argv: Sequence[str] | None, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments in ``argv``. Raises ``SystemExit`` with 2 for a wrong command."""
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        sys.exit(ConfigError.exit_code)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command == "sql" and args.query is None and not rest[0].startswith("-"):
        # argparse before Python 3.12 expects an optional argument directly after the first one
        args.query = rest.pop(0)
    if rest:
        hint = grammar.nearest_flag(args.parser, rest[0])
        if args.command == "audit" and (key := grammar.key_of(rest[0])) is not None:
            hint = f" ({key} is a key of RUN_TOML)"
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return args


def _call(args: argparse.Namespace, calls: Calls) -> int:
    """Call the command, report how it ended, and return its exit code."""
    is_audit = args.command == "audit"

    def failure(code: int) -> int:
        # Every failed audit has the same exit code, because 1 means a broken policy.
        return AUDIT_FAILED if is_audit else code

    try:
        with _terminable():
            code = calls[args.command](args) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        resumable = is_audit or args.command in ("run", "demo", "gc", "export")
        code = failure(Interrupted.exit_code if resumable else 130)
        hint = "; the same command resumes" if resumable else ""
        _report_end("stopped", f"stopped{hint}", code)
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        terminal.drop(sys.stdout)
        code = failure(0)
    except UnicodeError as error:
        code = failure(ConfigError.exit_code)
        encoding = getattr(error, "encoding", "UTF-8")
        _report_end("failed", f"text that is not {encoding}: {error}", code)
    except AfnError as error:
        code = failure(error.exit_code)
        event = "stopped" if isinstance(error, Interrupted) else "failed"
        _report_end(event, str(error), code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in disk.FULL:
            code = failure(Interrupted.exit_code)
            hint = "make room and run the same command again"
            _report_end("stopped", f"no space left: {error}; {hint}", code)
        elif json_lines() is not None:
            code = failure(1)
            _report_end("failed", f"{type(error).__name__}: {error}", code, traceback=True)
        elif is_audit:
            traceback.print_exc()  # Python would exit with 1
            code = AUDIT_FAILED
        else:
            raise
    return code


def _report_end(event: str, message: str, code: int, traceback: bool = False) -> None:
    """Print on stderr, or log as JSON, why the command ends."""
    if json_lines() is None:
        errors = Console(stderr=True, soft_wrap=True, highlight=False)
        errors.print("afn:", printable(message, keep="\n"), markup=False)
    else:
        fields = {"event": event, "exit_code": code}
        logging.getLogger(logs.ROOT).error("%s", message, extra={"afn": fields}, exc_info=traceback)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C.

    Workers stop, scratch files are removed, and the exit code says resumable.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- commands


def _run(args: argparse.Namespace) -> None:
    # Errors in the config use the same format.
    log_as(vars(args).get("log_format", "text"), args.quiet)
    if not args.dry_run and (args.rate or args.prices):
        raise ConfigError("--rate and --prices need --dry-run: add it, or leave them out")
    from afn_ray.store import settings

    config = settings.config_from(_config_flags(args), args.config)
    log_as(config.log_format, args.quiet)
    from afn_ray.runs import precheck

    precheck.check_run(config, reduce_only=args.reduce_only)
    from afn_ray.runs import estimate, job

    console = Console(stderr=True, highlight=False)
    if args.dry_run:
        with shown_progress(console, args.quiet) as on_event:
            found = estimate.dry_run(
                config, on_event, rate=args.rate, prices=args.prices, reduce_only=args.reduce_only
            )
        print_estimate(found, Console(highlight=False))
        return
    with (
        shown_progress(console, args.quiet) as on_event,
        job.run(config, on_event, reduce_only=args.reduce_only) as run,
    ):
        uri = run.uri
    if args.quiet:
        print(uri)
    else:
        store = shlex.quote(config.store)
        print(f"\nNext: afn show {store}\n      afn sql {store}")


def _config_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The config keys that are on the command line."""
    names = {f.name for f in fields(RunConfig)}
    flags = vars(args)
    given = {name: value for name, value in flags.items() if name in names}
    # Without a corpus on the command line, the config file has it.
    if corpus := given.pop("corpus", None):
        given["corpus"] = tuple(corpus)
    return given


def _status(args: argparse.Namespace) -> int:
    from afn_ray.runs import status, status_text

    found = status.read_status(args.run, args.last)
    if args.json:
        print(json.dumps([status.to_json(one) for one in found], indent=1))
    else:
        terminal.print_lines(
            status_text.lines(found[0])
            if len(found) == 1
            else status_text.table(found, terminal.width())
        )
    return found[0].exit_code


def _schema(args: argparse.Namespace) -> None:
    from afn_ray.analysis import json_schema

    print(json.dumps(json_schema.schema_of(args.of), indent=1))


def _doctor(args: argparse.Namespace) -> None:
    from afn_ray.show import diagnosis, doctor

    found = doctor.check(args.model, args.store, args.address)
    diagnosis.render(found, Console(highlight=False))
    if found.failed:
        names = ", ".join(found.failed)
        raise ConfigError(f"{len(found.failed)} of {len(found.checks)} checks failed: {names}")


def _demo(args: argparse.Namespace) -> None:
    from afn_ray.runs import demo

    began = time.monotonic()
    config = demo.demo_config(args.store, args.workers)
    from afn_ray.runs import job

    console = Console(stderr=True, highlight=False)
    with shown_progress(console, quiet=False) as on_event:
        run = job.run(config, on_event)
    with run:
        _print_demo(run, args.store, time.monotonic() - began)


def _print_demo(run: Run, store: str, seconds: float) -> None:
    """Print the results of the demo, and commands to try next."""
    from afn_ray.show import beyond, overview, salient
    from afn_ray.show.summary import summarise
    from afn_ray.store import manifest

    folder = manifest.find_run(run.uri)
    summary = summarise(folder)
    layer = summary.layers[-1].layer
    out = Console(highlight=False)
    tokens = f"{summary.info['counts']['tokens']:,} tokens of the King James verses"
    out.print(f"\n{tokens}, all-MiniLM-L6-v2; this took {seconds:.0f} s\n")
    overview.render_thresholds(summary, out)
    overview.render_classes(summary, out)
    salient.render_salient(run, layer, out)
    beyond.render_rankings(folder, layer, out)
    overview.render_caution(summary, out)
    query = (
        "FROM word_vocabulary SELECT word, n, share_high "
        f"WHERE layer = {layer} AND class = 'content' AND n > 99 ORDER BY share_high DESC LIMIT 9"
    )
    out.print(f"\nResults: {run.uri}", markup=False, soft_wrap=True)
    store = shlex.quote(store)
    for command in (
        f"show {store}",
        f"explain {store} 'In the beginning was the Word'",
        f'sql {store} "{query}"',
    ):
        out.print(f"Next:    afn {command}", markup=False, soft_wrap=True)


def _verify(args: argparse.Namespace) -> None:
    from afn_ray.analysis import verify

    result = verify.verify_store(
        args.uri,
        clean=args.clean,
        min_age_h=args.min_age_h,
        memory_limit=args.memory_limit,
        on_progress=now_and_then(),
    )
    if args.json:
        print(json.dumps(asdict(result), indent=1))
    else:
        terminal.print_lines(verify.lines(result))
    if result.findings:
        raise Damaged(f"{result.uri} is damaged: {count(len(result.findings), 'finding')}")


def _gc(args: argparse.Namespace) -> None:
    from afn_ray.store import garbage, gc_report

    found = garbage.collect_garbage(
        args.store,
        keep=args.keep,
        keep_runs=args.keep_run,
        min_age_h=args.min_age_h,
        delete=args.delete,
        on_progress=now_and_then(),
    )
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return
    flags = [
        f"--keep={args.keep}",
        *(f"--keep-run={run}" for run in args.keep_run),
        f"--min-age-h={args.min_age_h:g}",
    ]
    terminal.print_lines(gc_report.lines(found, flags))


def _bench(args: argparse.Namespace) -> None:
    from afn_ray import bench

    bench.call(args)


# --- dispatch table


COMMANDS: Calls = {
    "run": _run,
    "status": _status,
    "show": questions.call_show,
    "compare": comparisons.call_compare,
    "claims": questions.call_claims,
    "neurons": questions.call_neurons,
    "audit": audits.call_audit,
    "history": comparisons.call_history,
    "schema": _schema,
    "sql": questions.call_sql,
    "export": export.call_export,
    "explain": questions.call_explain,
    "report": questions.call_report,
    "verify": _verify,
    "gc": _gc,
    "doctor": _doctor,
    "demo": _demo,
    "bench": _bench,
}
"""The function of each command, by its name."""
