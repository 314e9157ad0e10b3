"""Report the verdict of an audit: to a webhook, and to a command."""

from __future__ import annotations

import ipaddress
import os
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPMessage
from typing import IO
from urllib.parse import urlsplit

from afn_ray.errors import ConfigError

WEBHOOK_TRIES = 3
WEBHOOK_TIMEOUT_S = 10.0
COMMAND_TIMEOUT_S = 300.0


def check_webhook(url: str, allow_http: bool) -> str:
    """Return ``url`` if a verdict may be sent there.

    Allowed are https, http to this machine, and with ``allow_http`` any http. Raises
    ``ConfigError``, which names only the URL's host: the rest is often a secret.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError("the webhook is no URL; expected https://host/...") from None
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(
            "the webhook's URL has spaces or letters outside ASCII; escape them with %"
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"the webhook's URL has a user's name before {host}; put a secret into its path, or "
            "leave it out"
        )
    if parts.scheme not in ("https", "http") or not host or (port is not None and not port):
        raise ConfigError(
            f"the webhook is a {parts.scheme or 'plain'} address; expected https://host/..."
        )
    if parts.scheme == "http" and not allow_http and not is_this_machine(host):
        raise ConfigError(
            f"the webhook at {host} is http, which anybody on the way reads; use https, or "
            "--allow-http"
        )
    return url


def is_this_machine(host: str) -> bool:
    """True if ``host`` is this machine itself, which nobody listens in on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_page(url: str, most_chars: int) -> str:
    """Return ``url`` if it can be the link to a page; raises ``ConfigError`` otherwise."""
    is_plain = url.isascii() and url.isprintable() and not set(url) & set(" <>()[]`\\")
    if not url.startswith(("https://", "http://")) or not is_plain or len(url) > most_chars:
        raise ConfigError(
            f"--page-url is {url[:most_chars]!r}; expected http(s)://... of at most {most_chars} "
            "characters, without spaces and brackets"
        )
    return url


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Treats a redirect as an answer like 404: it could lead a checked URL anywhere."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: HTTPMessage,
        newurl: str,
    ) -> None:
        return None


def post(url: str, body: bytes, pause_s: float = 1.0) -> str | None:
    """POST the JSON ``body``; return None on success, else the reason of the failure.

    Tries up to ``WEBHOOK_TRIES`` times: again after no answer, 429 or 5xx.
    """
    # The scheme was checked before.
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310
    parts = urlsplit(url)
    local = parts.scheme == "http" and is_this_machine(parts.hostname or "")
    # Requests to this machine bypass every proxy.
    proxies = [urllib.request.ProxyHandler({})] if local else []
    opener = urllib.request.build_opener(_NoRedirects, *proxies)
    why = ""
    for attempt in range(WEBHOOK_TRIES):
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            with opener.open(request, timeout=WEBHOOK_TIMEOUT_S):
                return None
        except urllib.error.HTTPError as error:
            error.close()
            why = f"status {error.code}"
            if error.code != 429 and error.code < 500:
                break
        except (OSError, HTTPException) as error:
            why = str(getattr(error, "reason", error))
    return f"the webhook at {parts.hostname} did not take the verdict: {why}"


def call_command(command: list[str], audit_json: str) -> str | None:
    """Run ``command`` without a shell; return None if it exits with 0, else the reason.

    The environment variable AFN_AUDIT_JSON holds the URI of audit.json.
    """
    try:
        done = subprocess.run(  # noqa: S603 - it is what the user asked for
            command,
            env={**os.environ, "AFN_AUDIT_JSON": audit_json},
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"--on-broken {command[0]} was stopped after {COMMAND_TIMEOUT_S:g} s"
    except OSError as error:
        return f"--on-broken {command[0]} could not be run: {error}"
    return None if done.returncode == 0 else f"--on-broken {command[0]} left with {done.returncode}"


def parse_command(text: str) -> list[str]:
    """Split ``text`` into words as a shell does.

    Raises ``ConfigError`` where a shell would fail, where there is no word, and for an unknown
    command.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--on-broken {text!r} is no command: {error}") from error
    if not words:
        raise ConfigError("--on-broken is empty; give a command, or leave it out")
    if shutil.which(words[0]) is None:
        raise ConfigError(f"--on-broken {words[0]!r} is no command that can be found here")
    return words
