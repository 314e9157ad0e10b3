"""One line on an error, for messages and records."""

from __future__ import annotations

import traceback
from pathlib import Path

from afn_ray.errors import (
    AfnError,
)


class ReportedError(Exception):
    """A third-party exception as text by ``reason``: its class may not unpickle in the driver."""


def reason(error: BaseException) -> str:
    """One line on ``error``: its type and the last line of its message.

    For an error that is not an ``AfnError``, the file and line that raised it follow.
    """
    if isinstance(error, ReportedError):
        return str(error)
    text = str(error).strip().splitlines()
    frames = [] if isinstance(error, AfnError) else traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[-1] if text else 'no message'}{where}"
