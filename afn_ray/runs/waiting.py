"""Wait for workers: report a long wait, and end it after a limit."""

from __future__ import annotations

import time
from collections.abc import Callable

from afn_ray.errors import (
    Interrupted,
)
from afn_ray.text import count

NOTICE_AFTER_S = 20.0
"""Time without any ready worker after which the run reports what it waits for, in seconds."""


class WaitLimit:
    """Report a wait after ``NOTICE_AFTER_S``, and raise ``Interrupted`` after ``wait_s``.

    ``lack`` says what is missing, for the messages.
    """

    def __init__(
        self,
        wait_s: float,
        lack: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
        num_loading: Callable[[], int] = lambda: 0,
    ) -> None:
        self._wait_s = wait_s
        self._lack = lack
        self._clock = clock
        self._num_loading = num_loading
        self.reset()

    def reset(self) -> None:
        """Start a new wait."""
        self._since = self._clock()
        self._noticed = False

    def check(self) -> str | None:
        """Return a notice, once per wait. Raises ``Interrupted`` after ``wait_s``."""
        waited = self._clock() - self._since
        if waited >= self._wait_s:
            raise Interrupted(
                f"{self._who()} for {waited:,.0f} s (--wait {self._wait_s:g}): {self._lack()}; the "
                "same command resumes"
            )
        if self._noticed or waited < NOTICE_AFTER_S:
            return None
        self._noticed = True
        return (
            f"{self._who()} for {waited:,.0f} s: {self._lack()}; waiting for up to "
            f"{self._wait_s:,.0f} s (--wait)"
        )

    def _who(self) -> str:
        loading = self._num_loading()
        return f"{count(loading, 'worker')} loading the model" if loading else "no worker"
