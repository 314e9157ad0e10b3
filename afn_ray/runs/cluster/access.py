"""Access control: a local Ray listens on loopback alone; a cluster without a token is refused."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from afn_ray.errors import ConfigError
from afn_ray.runs import address
from afn_ray.runs.cluster import session

CONNECT_S = 5.0
"""Longest wait for a connection to the head, in seconds."""
REFUSED = ("Unauthenticated", "AuthenticationError", "authentication_token_loader")
"""Ray's words to a client without a valid token."""
NOT_OURS = (
    "the cluster at {} requires a token that this process does not have: set RAY_AUTH_TOKEN to the "
    "cluster's, or RAY_AUTH_TOKEN_PATH to a file that has it"
)
"""Message for a cluster that refuses this process's token."""
ASK_S = 90.0
"""Longest wait for a health check, in seconds; Ray itself stops after 45 s."""
HOW_TO_CLOSE = (
    "start every node with RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN (KubeRay: authOptions: "
    "{mode: token}), and set both here"
)
"""Advice for a cluster that asks for no token."""
NEEDLESS = ("start_monitor", "start_log_monitor", "start_api_server")
"""Methods of Ray's node that start what a local Ray does without."""

_starting = threading.Lock()
"""One start at a time: its changes to Ray are those of the whole process."""
_log = logging.getLogger(__name__)
_asked: dict[str, bool] = {}  # address -> whether it is open; one command may join several times


def choose_token(own: bool) -> None:
    """Set token authentication in the environment, before Ray is imported.

    ``own``: for a local Ray, set a token too. Ray then does not write one to ``~/.ray/auth_token``,
    which every user of the machine may read.
    """
    # Ray reads the mode at import; code that imported it earlier has chosen the mode.
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if own:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers have an environment of their own, so a process that Ray starts beforehand for each
        # CPU would only take memory.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")


def start_local(**options: Any) -> None:
    """Start a local Ray with a token, on loopback alone; ``options`` are ``ray.init``'s.

    Ray's autoscaler, log monitor and dashboard, which afn-ray does not use, are not started.
    """
    choose_token(own=True)
    session.check()
    import ray

    with _changed_start():
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            **options,
        )


@contextlib.contextmanager
def _changed_start() -> Iterator[None]:
    """A Ray that starts within listens on loopback alone, and starts nothing of ``NEEDLESS``.

    Both need private parts of Ray. It replaces any address given to ``ray.init`` by one that other
    machines reach, and listens on all interfaces; and it always starts the three, which take 2 CPU
    seconds and 160 MB of memory. The old values are restored, since this process may join a
    cluster or start another Ray later.
    """
    from ray._private import ray_constants
    from ray._private.node import Node

    changes: list[tuple[Any, str, Any]] = [(ray_constants, "ENABLE_RAY_CLUSTER", False)]
    changes += [(Node, name, _start_nothing) for name in NEEDLESS]
    with _starting:
        before = [(part, name, getattr(part, name)) for part, name, _ in changes]
        try:
            for part, name, value in changes:
                setattr(part, name, value)
            yield
        finally:
            for part, name, value in before:
                setattr(part, name, value)


def _start_nothing(*_: object, **__: object) -> None:
    pass


def check(where: str | None, allow_open: bool) -> None:
    """Raise ``ConfigError`` for a Ray that other machines reach and that asks for no token.

    ``where`` None: a local Ray. With ``allow_open`` there is a warning instead. Raises
    ``ConfigError`` also where nothing answers at ``where``.
    """
    if where is None:
        is_refused = os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled"
        what, how = "RAY_AUTH_MODE=disabled starts a Ray that asks", "unset it"
    else:
        address.check(where)
        if (why := unreachable(where)) is not None:
            raise ConfigError(f"{why}; check the address (host:6379), the cluster and firewalls")
        is_refused = not is_loopback(where) and is_open(where)
        what, how = f"the cluster at {where} asks", HOW_TO_CLOSE
    if is_refused and not allow_open:
        raise ConfigError(
            f"{what} for no token: anyone who reaches it can run code there; {how}, or go on all "
            "the same with --allow-open-cluster"
        )
    if is_refused:
        _log.warning(
            "%s for no token: anyone who reaches it can run code there, with what this run may "
            "read and write",
            what,
        )


def is_open(where: str) -> bool:
    """True if the Ray at ``where`` (``host:port`` or ``auto``) accepts a client without a token.

    Takes about a second. Raises ``ConfigError`` when Ray does not answer or the answer is unclear.
    """
    if where not in _asked:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_TOKEN")}
        asked = _ask(where, kept | {"RAY_AUTH_MODE": "disabled"})
        is_closed = any(word in asked.stderr for word in REFUSED)
        if asked.returncode and not is_closed:
            said = asked.stderr.strip().rpartition("\n")[2]
            raise ConfigError(
                f"whether the cluster at {where} asks for a token cannot be told: {said}"
            )
        _asked[where] = not is_closed
    return _asked[where]


def refuses_us(where: str) -> bool:
    """True if the Ray at ``where`` refuses this process's token, or the lack of one."""
    said = _ask(where, dict(os.environ)).stderr
    return any(word in said for word in REFUSED)


def _ask(where: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run Ray's health check of a head in a process of its own.

    In this process the check would print, and keep what it found.
    """
    ray = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "health-check",
        "--skip-version-check",
        "--address",
        where,
    ]
    try:
        return subprocess.run(  # noqa: S603
            ray, env=environment, capture_output=True, text=True, timeout=ASK_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"the cluster at {where} does not answer within {ASK_S:g} s") from error


def unreachable(where: str) -> str | None:
    """Reason why nothing answers at ``where``; None: it answers, or ``where`` is ``auto``.

    Takes seconds, where Ray takes minutes.
    """
    if where == "auto":
        return None
    try:
        socket.create_connection(address.host_and_port(where), timeout=CONNECT_S).close()
    except OSError as error:
        return f"nothing answers at {where}: {error}"
    return None


def is_loopback(where: str) -> bool:
    """True if ``where`` is an address of this machine that no other machine reaches."""
    if where == "auto":
        return False
    host, _ = address.host_and_port(where)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a host name
        return False
