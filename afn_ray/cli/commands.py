"""The ``afn`` command: parse, call, print, and return an exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import NoReturn

from rich.console import Console

from afn_ray import logs
from afn_ray.cli import grammar, questions, terminal
from afn_ray.cli.estimates import print_estimate
from afn_ray.cli.progress import ToStderr, json_lines, log_as, now_and_then, shown_progress
from afn_ray.config import RunConfig
from afn_ray.errors import AfnError, ConfigError, Damaged, Interrupted
from afn_ray.store import disk
from afn_ray.text import count, printable

POLICY_BROKEN, AUDIT_FAILED = 1, 2
Calls = Mapping[str, Callable[[argparse.Namespace], int | None]]
"""The function of each command, whose result is its exit code; ``None`` is 0."""


def command(
    argv: Sequence[str] | None = None,
    make_parser: Callable[[], argparse.ArgumentParser] = grammar.parser,
    calls: Calls | None = None,
) -> NoReturn:
    """Entry point of ``afn``: call ``main``, then end the process at once.

    It does not wait for threads. One of ours may hang in an upload, and threads of libraries can
    abort the interpreter at exit, with an exit code unrelated to the result.
    """
    terminal.prepare()
    try:
        main(argv, make_parser, calls)
    except SystemExit as end:
        os._exit(
            terminal.finish(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
        )


def main(
    argv: Sequence[str] | None = None,
    make_parser: Callable[[], argparse.ArgumentParser] = grammar.parser,
    calls: Calls | None = None,
) -> NoReturn:
    """Run the ``afn`` command; raise ``SystemExit`` with its exit code.

    A program with other commands has a parser of its own, which sets ``command`` and ``parser`` as
    ``grammar.parser`` does, and ``calls``: a function for each ``command``.
    """
    parser = make_parser()
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        sys.exit(ConfigError.exit_code)
    args, rest = parser.parse_known_args(argv)
    if rest and args.command == "sql" and args.query is None and not rest[0].startswith("-"):
        args.query = rest.pop(
            0
        )  # argparse before Python 3.12 expects an optional argument directly after the first one
    if rest:
        args.parser.error(
            f"unrecognized arguments: {' '.join(rest)}{grammar.nearest_flag(args.parser, rest[0])}"
        )
    log = logging.getLogger(logs.ROOT)
    if not log.handlers:
        log.addHandler(ToStderr())
    audits, failed = args.command == "audit", True
    try:
        with _terminable():
            code = (calls or COMMANDS)[args.command](args) or 0
        sys.stdout.flush()
        failed = False
    except KeyboardInterrupt:
        resumable = audits or args.command in ("run", "demo", "gc")
        code = Interrupted.exit_code if resumable else 130
        _say_end("stopped", "stopped" + ("; the same command resumes" if resumable else ""), code)
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        terminal.drop(sys.stdout)
        code = 0
    except UnicodeError as error:
        code = AUDIT_FAILED if audits else ConfigError.exit_code
        _say_end("failed", f"text that is not {getattr(error, 'encoding', 'UTF-8')}: {error}", code)
    except AfnError as error:
        code = AUDIT_FAILED if audits else error.exit_code
        _say_end("stopped" if isinstance(error, Interrupted) else "failed", str(error), code)
    except Exception as error:
        code = AUDIT_FAILED if audits else 1
        if isinstance(error, OSError) and error.errno in disk.FULL:
            code = AUDIT_FAILED if audits else Interrupted.exit_code
            _say_end(
                "stopped", f"no space left: {error}; make room and run the same command again", code
            )
        elif json_lines() is not None:
            _say_end("failed", f"{type(error).__name__}: {error}", code, traceback=True)
        elif audits:
            traceback.print_exc()  # Python would exit with 1, which means a broken policy
        else:
            raise
    sys.exit(AUDIT_FAILED if audits and failed else code)


def _say_end(event: str, message: str, code: int, traceback: bool = False) -> None:
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
    names = {f.name for f in fields(RunConfig)}
    given = {k: tuple(v) if k == "corpus" else v for k, v in vars(args).items() if k in names}
    if not given.get("corpus"):
        given.pop("corpus", None)  # none on the command line: use the config file's
    log_as(
        vars(args).get("log_format", "text"), args.quiet
    )  # errors in the config use the same format
    if not args.dry_run and (args.rate or args.prices):
        raise ConfigError("--rate and --prices are of --dry-run: give that too, or leave them out")
    from afn_ray.store import settings

    config = settings.config_from(given, args.config)
    log_as(config.log_format, args.quiet)
    from afn_ray.runs import precheck

    precheck.check_run(config, reduce_only=args.reduce_only)
    from afn_ray.runs import estimate, job

    console = Console(stderr=True, highlight=False)
    with shown_progress(console, args.quiet) as on_event:
        if args.dry_run:
            found = estimate.dry_run(
                config, on_event, rate=args.rate, prices=args.prices, reduce_only=args.reduce_only
            )
        else:
            with job.run(config, on_event, reduce_only=args.reduce_only) as run:
                uri = run.uri
    if args.dry_run:
        print_estimate(found, Console(highlight=False))
    elif args.quiet:
        print(uri)
    else:
        print(
            f"\nNext: afn show {shlex.quote(config.store)}\n      afn sql {shlex.quote(config.store)}"
        )


def _status(args: argparse.Namespace) -> int:
    from afn_ray.runs import status

    found = status.read_status(args.run, args.last)
    if args.json:
        print(json.dumps([status.to_json(one) for one in found], indent=1))
    else:
        _print_lines(status.lines(found[0]) if len(found) == 1 else status.table(found))
    return found[0].exit_code


def _audit(args: argparse.Namespace) -> int:
    from afn_ray.runs import precheck
    from afn_ray.store import settings

    config = settings.config_from({}, args.config)
    log_as(config.log_format, args.quiet)
    settings.read_toml(args.policy, "policy")
    if args.frozen:
        precheck.check_frozen(config)
    precheck.check_run(config)
    from afn_ray.analysis import audit, notify
    from afn_ray.analysis.policy import read_policy
    from afn_ray.runs.cluster import connection
    from afn_ray.show import report
    from afn_ray.store import manifest, storage, uris

    connection.exit_when_lost_with(AUDIT_FAILED)
    policy = read_policy(args.policy)
    out = uris.absolute(args.out)  # fails now, not after the run
    url = (
        args.webhook or os.environ.get("AFN_WEBHOOK", "").strip()
    )  # a Secret made from a file ends with its newline
    webhook = notify.check_webhook(url, args.allow_http) if url else None
    command = notify.parse_command(args.on_broken) if args.on_broken is not None else None
    if not args.no_report:
        report.check_packages()  # fails now, not after the run
    errors = Console(stderr=True, highlight=False)
    with shown_progress(errors, args.quiet) as on_event:
        found = audit.run_audit(
            config,
            policy,
            baseline=args.baseline,
            frozen=args.frozen,
            mark=False,
            on_event=on_event,
        )
    written = audit.write_json(found, out)
    failures = []
    if not found.passed:
        failures = [
            notify.post(webhook, audit.to_bytes(found)) if webhook else None,
            notify.call_command(command, written) if command else None,
        ]
    if not args.no_report:
        try:
            page = report.render(found.run, found.comparison, with_claims=False)
            storage.write_over(uris.join(out, audit.PAGE), page.encode(), retry_for_s=None)
        except Exception as error:  # noqa: BLE001 - a page is worth no verdict
            failures.append(f"report.html could not be written: {error or type(error).__name__}")
    for failure in filter(
        None, failures
    ):  # the exit code is the verdict even if a notification fails
        logs.tell(logging.getLogger(logs.ROOT), "warning", failure, level=logging.WARNING)
    _print_lines(audit.lines(found))
    manifest.mark_audited(
        found.run
    )  # last: without this mark, the next audit reports this run's drift again
    return 0 if found.passed else POLICY_BROKEN


def _print_lines(lines: Iterable[str]) -> None:
    """Print ``lines``; ignore a reader that ends early, as the exit code has the verdict."""
    try:
        for line in lines:
            print(printable(line))
        sys.stdout.flush()
    except BrokenPipeError:
        terminal.drop(sys.stdout)


def _doctor(args: argparse.Namespace) -> None:
    from afn_ray.show import doctor

    checks = doctor.check(args.model, args.store, args.address)
    doctor.render(checks, Console(highlight=False))
    if failed := [c.name for c in checks if c.ok is False]:
        raise ConfigError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def _demo(args: argparse.Namespace) -> None:
    from afn_ray.runs import demo
    from afn_ray.show import overview, salient
    from afn_ray.show.summary import summarise
    from afn_ray.store import manifest

    began = time.monotonic()
    config = demo.demo_config(args.store, args.workers)
    from afn_ray.runs import job

    console = Console(stderr=True, highlight=False)
    with shown_progress(console, quiet=False) as on_event:
        run = job.run(config, on_event)
    seconds = time.monotonic() - began
    summary = summarise(manifest.find_run(run.uri))
    layer = summary.layers[-1].layer
    out = Console(highlight=False)
    tokens = summary.info["counts"]["tokens"]
    out.print(
        f"\n{tokens:,} tokens of the King James verses, all-MiniLM-L6-v2; this took {seconds:.0f} "
        "s\n"
    )
    overview.render_thresholds(summary, out)
    overview.render_classes(summary, out)
    with run:
        salient.render_salient(run, layer, out)
    overview.render_caution(summary, out)
    store = shlex.quote(args.store)
    query = (
        f"FROM vocabulary SELECT text, n, share_high WHERE layer = {layer} AND class = 'content' "
        "AND n > 99 "
        "ORDER BY share_high DESC LIMIT 9"
    )
    out.print(f"\nResults: {run.uri}", markup=False, soft_wrap=True)
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
        _print_lines(verify.lines(result))
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
    _print_lines(gc_report.lines(found, flags))


def _bench(args: argparse.Namespace) -> None:
    from afn_ray import bench

    bench.call(args)


# --- dispatch table


COMMANDS: Calls = {
    "run": _run,
    "status": _status,
    "show": questions.call_show,
    "compare": questions.call_compare,
    "claims": questions.call_claims,
    "neurons": questions.call_neurons,
    "audit": _audit,
    "sql": questions.call_sql,
    "explain": questions.call_explain,
    "report": questions.call_report,
    "verify": _verify,
    "gc": _gc,
    "doctor": _doctor,
    "demo": _demo,
    "bench": _bench,
}
"""The function of each command, by its name."""
