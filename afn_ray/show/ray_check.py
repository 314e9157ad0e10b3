"""The doctor's check of Ray: its address, its token, and one task that it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from afn_ray.errors import AfnError, ConfigError
from afn_ray.runs.address import check as check_address
from afn_ray.show.diagnosis import Check

RAY_S = 150.0
"""Longest time for Ray to start and run a task, in seconds."""


def check(address: str | None) -> Check:
    """Check Ray in a process of its own, so that everything it starts ends with it."""
    from afn_ray.runs.cluster import access

    began = time.monotonic()
    exposed = False
    if address is not None:
        try:
            check_address(address)
        except ConfigError as error:
            return Check(
                "Ray",
                False,
                str(error),
                "set --address or RAY_ADDRESS to that, or unset it for a local Ray",
            )
        exposed = not access.is_loopback(address)
        if refused := access.unreachable(address):
            return Check(
                "Ray", False, refused, "check the address (host:6379), the cluster and firewalls"
            )
        try:
            is_open = exposed and access.is_open(address)
        except ConfigError as error:
            return Check(
                "Ray",
                False,
                str(error),
                "ask the administrator of the cluster how its nodes are started",
            )
        if is_open:
            return Check(
                "Ray",
                False,
                f"the cluster at {address} answers without a token: anyone who reaches it can run "
                "code there",
                access.HOW_TO_CLOSE,
            )
    done = _probe(address)
    if done.returncode == 0:
        found, *notices = done.stdout.strip().splitlines()
        found = "; ".join([found, *notices, f"{time.monotonic() - began:.0f} s"])
        if exposed and os.environ.get("RAY_USE_TLS") != "1":
            return Check(
                "Ray",
                None,
                f"{found}; its token travels in clear text",
                "set RAY_USE_TLS=1 and its certificates on every node and here, or keep others off "
                "that network",
            )
        if notices:
            return Check("Ray", None, found, "use nodes with more CPUs for each GPU")
        return Check("Ray", True, found)
    message = (done.stderr.strip().splitlines() or ["its process died"])[-1].removesuffix(
        "; 'afn doctor' tells more"
    )
    if "Unauthenticated" in done.stderr or "AuthenticationError" in done.stderr:
        return Check(
            "Ray",
            False,
            f"the cluster at {address} requires a token that this process does not have",
            "set RAY_AUTH_TOKEN to the cluster's, or RAY_AUTH_TOKEN_PATH to a file that has it",
        )
    if address is None:
        return Check("Ray", False, message, "small runs work without Ray: --executor inline")
    return Check(
        "Ray",
        False,
        message,
        "the cluster needs this Ray and Python version, and afn-ray on its nodes",
    )


def _probe(address: str | None) -> subprocess.CompletedProcess[str]:
    code = "import sys; from afn_ray.show import ray_check; ray_check.probe(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *([address] if address else [])]
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    try:
        return subprocess.run(  # noqa: S603
            command, env=env, capture_output=True, text=True, timeout=RAY_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        errors = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else ""
        return subprocess.CompletedProcess(
            command, 1, "", f"{errors}\nno answer within {RAY_S:g} s"
        )


def probe(address: str | None = None) -> None:
    """Body of the process of ``_probe``.

    Prints Ray's resources and then notices, a line each, or exits with the error as the last line.
    """
    try:
        from afn_ray.runs.cluster import connection

        print(*connection.probe(address), sep="\n")
    except (AfnError, ImportError) as error:
        words = str(error).split()
        sys.exit(" ".join(words))
