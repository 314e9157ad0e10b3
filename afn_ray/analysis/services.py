"""Notification through apprise: chats, mail and pagers, each named by a URL.

Such a URL is often a secret. Errors name only the service, and the host where it is a host.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from afn_ray.analysis.message import Message
from afn_ray.analysis.notify import is_this_machine
from afn_ray.errors import ConfigError

STATUS = re.compile(r"error=(\d{3})\b")
"""HTTP status in apprise's log; the rest of that log may have parts of the URL."""


def services(urls: Sequence[str], allow_http: bool) -> list[Any]:
    """The services at ``urls``, as apprise has them.

    Raises ``ConfigError`` if apprise is not installed, for a URL that it does not know, and for one
    without encryption, unless it is of this machine or ``allow_http`` is set.
    """
    try:
        import apprise
    except ImportError:
        raise ConfigError(
            '--notify needs the package apprise; pip install "afn-ray[notify]"'
        ) from None
    asset = apprise.AppriseAsset(app_id="afn-ray", app_desc="afn audit", async_mode=False)
    found = []
    for number, url in enumerate(urls, start=1):
        with _silence():
            service = apprise.Apprise.instantiate(url, asset=asset)
        if service is None:
            raise ConfigError(
                f"number {number} of the --notify URLs is none that apprise knows; expected "
                "slack://..., workflows://..., mailtos://..., pagerduty://... or another of its "
                "services, with all that the service needs"
            )
        if _is_open(service) and not allow_http and not is_this_machine(service.host or ""):
            raise ConfigError(
                f"--notify to {name_of(service)} is not encrypted, and anybody on the way reads "
                "it; use a scheme and a mode that encrypt (most end with s), or --allow-http"
            )
        found.append(service)
    return found


def _is_open(service: Any) -> bool:
    """True if ``service`` sends to a host in clear text, by its scheme or by a mode in its URL.

    A service without a host in its URL sends to this machine, or to its own address by https.
    """
    if getattr(service, "secure_mode", None) == "insecure":
        return True
    to_host = bool(service.secure_protocol) or _has_host(service)
    return bool(service.protocol) and not service.secure and to_host


def send(service: Any, message: Message, is_broken: bool) -> str | None:
    """Send ``message`` by ``service``; return None on success, else the reason of the failure."""
    from apprise import Apprise, NotifyFormat, NotifyType

    with _silence() as heard:
        sender = Apprise(asset=service.asset)
        sender.add(service)
        taken = sender.notify(
            title=message.title,
            body=message.body,
            notify_type=NotifyType.FAILURE if is_broken else NotifyType.WARNING,
            body_format=NotifyFormat.MARKDOWN,
        )
    if taken:
        return None
    why = f": status {heard.status}" if heard.status else ""
    return f"{name_of(service)} did not take the verdict{why}"


def name_of(service: Any) -> str:
    """Name of ``service``, with its host where that part of the URL is a host, not a secret."""
    name = str(service.service_name)
    return f"{name} at {service.host}" if _has_host(service) else name


def _has_host(service: Any) -> bool:
    return any("{host}" in template for template in service.templates)


class _Statuses(logging.Filter):
    """Drops apprise's log, which may have parts of a URL, and keeps its last HTTP status."""

    status: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if found := STATUS.search(record.getMessage()):
            self.status = found[1]
        return False


@contextmanager
def _silence() -> Iterator[_Statuses]:
    """Silence apprise's log, also towards handlers of the caller."""
    heard = _Statuses()
    logger = logging.getLogger("apprise")
    logger.addFilter(heard)
    try:
        yield heard
    finally:
        logger.removeFilter(heard)
