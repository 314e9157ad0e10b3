"""Log records with fields, written as JSON lines for machines or plain lines for people."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from afn_ray.text import printable

T = TypeVar("T")

ROOT = "afn_ray"
"""Name of the package's top logger."""


def report(
    log: logging.Logger, event: str, message: str, *, level: int = logging.INFO, **fields: Any
) -> None:
    """Log ``message`` as ``event``, a name for machines, with ``fields`` that JSON can hold.

    Fields are names, counts and reasons, never text of the corpus or values of the environment.
    """
    if log.isEnabledFor(level):
        log.log(level, "%s", message, extra={"afn": {"event": event, **fields}})


class Lines(logging.Formatter):
    """Formatter that writes one line per record.

    ``about`` holds fields of every record, such as the run. The caller may add to it later.
    """

    def __init__(self, form: str, **about: Any) -> None:
        """``form``: "json" or "text"."""
        super().__init__()
        self.is_json, self.about = form == "json", about

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        level = record.levelname.lower()
        message = record.getMessage()
        fields = {**self.about, **getattr(record, "afn", {"event": "log"})}
        if not self.is_json:
            known = [
                f"{name} {fields[name]}"
                for name in ("run", "shard", "attempt", "worker")
                if name in fields
            ]
            return printable(f"{at} {level} {' '.join(known)}: {message}")
        line = {
            "time": at,
            "level": level,
            "event": fields.pop("event"),
            **fields,
            "message": message,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)  # ASCII alone: terminal control characters are escaped


class BestEffort:
    """Make best-effort calls: log the first exception and suppress all of them."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        """``what``: what the run lacks when a call fails, such as "metrics"."""
        self._log = log
        self._what = what
        self._told = False

    def call(self, function: Callable[..., T], *args: Any) -> T | None:
        """Return ``function(*args)``, or None where it raised."""
        try:
            return function(*args)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is worth no run
            if not self._told:
                self._told = True
                self._log.warning(
                    "the run goes on without %s: %s: %s", self._what, type(error).__name__, error
                )
            return None


def to_stderr(form: str, **about: Any) -> None:
    """Write all logs of the package to stderr as ``Lines``; for processes that afn-ray starts."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(form, **about))
    log = logging.getLogger(ROOT)
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.INFO)
