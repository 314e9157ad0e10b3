"""The audit on the command line: run or accept a night, report its verdict, exit by it."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from afn_ray import logs
from afn_ray.cli.progress import log_as, shown_progress
from afn_ray.cli.terminal import print_lines
from afn_ray.errors import AfnError, ConfigError

if TYPE_CHECKING:
    from afn_ray.analysis.audit import Audit
    from afn_ray.analysis.learned import UsualRange

AUDIT_FAILED = 2
VERDICTS = {"held": 0, "broken": 1, "not judged": 3}
"""Exit code of ``afn audit`` by the state of the night; 2 is ``AUDIT_FAILED``."""


def call_audit(args: argparse.Namespace) -> int:
    if args.accept is not None:
        return _accept(args)
    if args.config is None or args.policy is None or args.why is not None:
        raise ConfigError("expected afn audit RUN_TOML --policy FILE; --why stands with --accept")
    from afn_ray.store import series_runs

    with series_runs.read_once():
        return _audit(args)


def _audit(args: argparse.Namespace) -> int:
    """Run and judge a night, and report its verdict."""
    from afn_ray.analysis.nights import Night, choose_partition
    from afn_ray.analysis.policy import read_policy
    from afn_ray.runs import precheck
    from afn_ray.store import settings

    given = {} if args.series is None else {"series": args.series}
    config = settings.config_from(given, args.config)
    log_as(config.log_format, args.quiet)
    policy = read_policy(args.policy)
    if args.frozen:
        precheck.check_frozen(config)
    night = Night(args.baseline, args.partition, args.first_night, args.frozen)
    precheck.check_run(choose_partition(config, policy, night).config)
    from afn_ray.analysis import audit
    from afn_ray.runs.cluster import connection
    from afn_ray.show import report
    from afn_ray.store import uris

    connection.exit_when_lost_with(AUDIT_FAILED)
    out = uris.absolute(args.out)  # fails now, not after the run
    notifications = _notifications(args)
    if not args.no_report:
        report.check_packages()  # fails now, not after the run
    errors = Console(stderr=True, highlight=False)
    with shown_progress(errors, args.quiet) as on_event:
        found = audit.run_audit(config, policy, night, mark=False, on_event=on_event)
    written = audit.write_json(found, out)
    failures: list[str | None] = []
    if not found.passed and (args.notify_again or not found.standing.is_known):
        failures += [notify(found, written) for notify in notifications]
    told = bool(failures) and not any(failures)
    if not args.no_report:
        failures.append(_write_page(found, out))
    if found.partition is not None and args.partition in (None, "latest"):
        failures.append(_repeated(found))
    # The exit code is the verdict even if a notification fails.
    for failure in failures:
        if failure is not None:
            logs.report(logging.getLogger(logs.ROOT), "warning", failure, level=logging.WARNING)
    print_lines(audit.lines(found))
    audit.keep_verdict(found, told=told)
    return VERDICTS[found.state]


def _accept(args: argparse.Namespace) -> int:
    """Record that a broken night may be a baseline."""
    from afn_ray.store import verdicts

    if args.config is not None or args.policy is not None or args.why is None:
        raise ConfigError('--accept stands alone with --why: afn audit --accept RUN --why "..."')
    run = verdicts.accept_run(args.accept, args.why)
    print_lines([f"accepted: run {run.uri} may be a baseline"])
    return 0


def _notifications(args: argparse.Namespace) -> list[Callable[[Audit, str], str | None]]:
    """Calls that report a verdict, given it and the URI of audit.json; each returns what failed.

    Raises ``ConfigError`` for a wrong webhook or command.
    """
    from afn_ray.analysis import audit, notify

    calls: list[Callable[[Audit, str], str | None]] = []
    # A Secret made from a file ends with its newline.
    url = args.webhook or os.environ.get("AFN_WEBHOOK", "").strip()
    if url:
        webhook = notify.check_webhook(url, args.allow_http)
        calls.append(lambda found, written: notify.post(webhook, audit.to_bytes(found)))
    if urls := args.notify or os.environ.get("AFN_NOTIFY", "").split():
        calls += _messages(urls, _page_url(args), args.allow_http)
    if args.on_broken is not None:
        command = notify.parse_command(args.on_broken)
        calls.append(lambda found, written: notify.call_command(command, written))
    return calls


def _messages(
    urls: Sequence[str], page: str | None, allow_http: bool
) -> list[Callable[[Audit, str], str | None]]:
    """Calls that send a short message to each of ``urls``, with a link to ``page``."""
    from afn_ray.analysis import services
    from afn_ray.analysis.message import message

    def call_of(service: Any) -> Callable[[Audit, str], str | None]:
        return lambda found, written: services.send(
            service, message(found, page, _usual(found)), found.state == "broken"
        )

    return [call_of(service) for service in services.services(urls, allow_http)]


def _usual(found: Audit) -> Mapping[str, UsualRange]:
    """The usual ranges of the limits by name; none if an earlier night cannot be read."""
    from afn_ray.show import sparklines

    try:
        return sparklines.usual_ranges(found)
    except AfnError:  # the message goes out without them
        return {}


def _page_url(args: argparse.Namespace) -> str | None:
    """The URL of report.html for a message; None without one."""
    from afn_ray.analysis import audit, message, notify
    from afn_ray.store import uris

    if args.page_url is not None:
        return notify.check_page(args.page_url, message.MOST_PAGE_CHARS)
    if args.no_report or not args.out.startswith(("https://", "http://")):
        return None
    return uris.join(args.out, audit.PAGE)


def _repeated(found: Audit) -> str | None:
    """A warning if the latest partition was audited before, so that tonight's may be late."""
    from afn_ray.store import manifest

    if not manifest.is_audited(found.run):
        return None
    return (
        f"partition {found.partition} was audited before, and no newer one is there: this is its "
        "verdict again; --partition DATE fails if the partition of that date is late"
    )


def _write_page(found: Audit, out: str) -> str | None:
    """Write report.html into ``out``; return what failed, if something did."""
    from afn_ray.analysis import audit
    from afn_ray.show import report
    from afn_ray.store import storage, uris

    try:
        page = report.render(found.run, found.comparison, with_claims=False, audit=found)
        storage.write_over(uris.join(out, audit.PAGE), page.encode(), retry_for_s=None)
    except Exception as error:  # noqa: BLE001 - the verdict does not depend on the page
        return f"report.html could not be written: {error or type(error).__name__}"
    return None
