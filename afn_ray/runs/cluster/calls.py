"""Function calls as Ray tasks: those of the reduce, and one with a worker's resources."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from afn_ray.config import RunConfig
from afn_ray.errors import Interrupted
from afn_ray.reduce.tasks import call
from afn_ray.runs import reasons
from afn_ray.runs.cluster.connection import cause_of, lack, needs
from afn_ray.runs.waiting import WaitLimit

POLL_S = 0.5
"""Longest wait for results between two checks for missing resources, in seconds."""
MAX_PENDING = 256
"""Largest number of calls in flight.

It bounds the memory of the object store and the driver for any number of shards.
"""


def call_on_place(
    config: RunConfig,
    device: str,
    on_notice: Callable[[str], None],
    function: Callable[..., Any],
    *args: Any,
) -> Any:
    """Return ``function(*args)``, run on Ray with a worker's resources.

    Raises the function's own error, and ``Interrupted`` when there are no resources in time or when
    the process is lost even after retries.
    """
    import ray

    answers = ray.remote(max_retries=3, num_returns="streaming", **needs(config, device))(
        _announced
    )
    under_way = answers.remote(function, *args)
    wait_limit = WaitLimit(config.wait_s, lambda: lack(1, config, device))
    while not ray.wait([under_way], timeout=POLL_S)[0]:
        if (notice := wait_limit.check()) is not None:
            on_notice(notice)
    try:
        ray.get(next(under_way))
        return ray.get(next(under_way))
    except ray.exceptions.RayError as error:
        cause = cause_of(error)
        if isinstance(cause, ray.exceptions.RayError):
            raise Interrupted(
                f"a call on Ray lost its process, again when repeated: {reasons.reason(cause)}; "
                "the same command resumes"
            ) from error
        raise cause from None


def _announced(function: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """Yield None once the call runs, which may need a long wait for resources, then the result."""
    yield None
    yield function(*args)


class RayTasks:
    """``reduce.Tasks`` on the joined Ray.

    Calls are pure functions, so Ray may repeat one whose process or result is lost.
    """

    def __init__(self, config: RunConfig, on_notice: Callable[[str], None]) -> None:
        import ray

        self._wait_limit = WaitLimit(config.wait_s, lambda: lack(1, config, "cpu"))
        self._on_notice = on_notice

        # A call's error is raised with its result, not printed by each call that depends on it.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        self._ray = ray
        self._call = ray.remote(num_cpus=1, max_retries=3)(call)
        self._pending: list[Any] = []

    def submit(
        self, function: Callable[..., Sequence[Any]], *args: Any, num_results: int = 1
    ) -> list[Any]:
        if len(self._pending) >= MAX_PENDING:
            # Only one reference of each call is held until then, never its value.
            self._pending = self._wait(self._pending, MAX_PENDING // 2)
        task = self._call.options(
            num_returns=num_results, name=f"reduce:{function.__name__.strip('_')}"
        )
        refs = task.remote(function, num_results, *args)
        handles = refs if num_results > 1 else [refs]
        self._pending.append(handles[0])
        return list(handles)

    def _wait(self, refs: list[Any], num_done: int) -> list[Any]:
        """Wait until ``num_done`` of ``refs`` are done; return the others.

        Raises ``Interrupted`` when there are no resources for too long.
        """
        self._wait_limit.reset()
        num_before = 0
        while True:
            done, left = self._ray.wait(
                refs, num_returns=num_done, timeout=POLL_S, fetch_local=False
            )
            if len(done) >= num_done:
                return list(left)
            if len(done) > num_before:  # calls are short: while none ends, none has resources
                num_before = len(done)
                self._wait_limit.reset()
            elif (notice := self._wait_limit.check()) is not None:
                self._on_notice(notice)

    def result(self, handle: Any) -> Any:
        self._wait([handle], 1)
        try:
            return self._ray.get(handle)
        except self._ray.exceptions.RayError as error:
            cause = cause_of(error)
            if isinstance(cause, self._ray.exceptions.RayError):
                raise Interrupted(
                    "the reduce lost a process or a result on Ray, again when repeated: "
                    f"{reasons.reason(cause)}; the shards are committed, and the same command goes "
                    "on from there"
                ) from error
            raise cause from None
