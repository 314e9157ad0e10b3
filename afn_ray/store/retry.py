"""Which failures of a filesystem pass by themselves, and asking again until they have."""

from __future__ import annotations

import errno
import itertools
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from afn_ray.errors import Unavailable

T = TypeVar("T")

RETRY_FOR_S = 120.0
"""From the first failure of a call; longer than a throttled bucket or a restarted gateway needs."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 8.0
SAY_AFTER_S = 5.0
"""Of failures: a person who waits is told why."""
SAY_EVERY_S = 30.0

_log = logging.getLogger(__name__)

LOCAL_ERRNOS = frozenset({errno.EINTR, errno.ESTALE})
"""What a mounted folder gives in passing. EIO is not here: a disk that fails goes on failing."""

REMOTE_ERRNOS = LOCAL_ERRNOS | {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EIO,
    errno.EREMOTEIO,
    errno.ENOBUFS,
    errno.ETIMEDOUT,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
}

DEFINITE = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError,
)  # fmt: skip

# By name, because the packages are extras: of botocore, aiohttp, requests, gcsfs, google.auth and
# azure.core.
TRANSIENT_NAMES = frozenset({
    "HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError", "ServerTimeoutError",
    "IncompleteReadError", "IncompleteRead", "ResponseParserError", "FlexibleChecksumError", "ChecksumError",
    "Timeout", "ChunkedEncodingError", "TransportError", "ServiceRequestError", "ServiceResponseError",
})  # fmt: skip

# Of S3, with a status that says otherwise. A multipart upload that is gone is begun again; a clock
# is put right.
TRANSIENT_CODES = frozenset({
    "RequestTimeout", "RequestTimeTooSkewed", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
    "NoSuchUpload", "Throttling", "ThrottlingException", "RequestLimitExceeded",
})  # fmt: skip


def with_retries(
    call: Callable[[], T], what: str, *, local: bool, retry_for_s: float | None = None
) -> T:
    """``call()``, again with exponential backoff and full jitter for as long as its failure may
    pass.

    Raises ``Unavailable``, with ``what`` and the last error, ``retry_for_s`` (by default
    ``RETRY_FOR_S``) after the first failure; any other error as it is. A call that fails may still
    have acted.
    """
    began, said = 0.0, False
    for attempt in itertools.count():
        try:
            return call()
        except Exception as error:
            if not is_transient(error, local=local):
                raise
            now = time.monotonic()
            began = began or now
            left = began + (RETRY_FOR_S if retry_for_s is None else retry_for_s) - now
            if left > 0 and not said and now - began >= SAY_AFTER_S and _may_say(now):
                said = True
                _log.warning(
                    "%s: no answer for %.0f s, at last %s: %s; asking again for up to %.0f s",
                    what,
                    now - began,
                    type(error).__name__,
                    error,
                    left,
                )
            if left <= 0:
                raise Unavailable(
                    f"{what}: no answer in {attempt + 1} tries over {now - began:.0f} s, at last "
                    f"{type(error).__name__}: {error}; check the store and the network, then run the same command "
                    "again"
                ) from error
            longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempt, 16))
            time.sleep(min(left, random.uniform(0, longest)))  # noqa: S311
    raise AssertionError


_next_word = 0.0


def _may_say(now: float) -> bool:
    """Whether it is time for another word: calls of many threads fail together."""
    global _next_word
    if now < _next_word:
        return False
    _next_word = now + SAY_EVERY_S
    return True


def is_transient(error: BaseException, *, local: bool = False) -> bool:
    """Whether the same call may succeed a moment later, as a filesystem's ``error`` and its causes
    tell.
    """
    if local:
        return isinstance(error, OSError) and error.errno in LOCAL_ERRNOS
    chain = list(_causes(error))
    if any(_s3_code(e) in TRANSIENT_CODES for e in chain):
        return True
    if isinstance(error, DEFINITE) or any(
        isinstance(e, ssl.SSLCertVerificationError) for e in chain
    ):
        return False
    for e in chain:  # the newest word counts: a garbled answer is no answer 400
        if status := _status(e):
            return status in (408, 409, 425, 429) or (status >= 500 and status not in (501, 505))
        names = {c.__name__ for c in type(e).__mro__}
        if isinstance(e, ConnectionError | TimeoutError | socket.gaierror) or not names.isdisjoint(
            TRANSIENT_NAMES
        ):
            return True
    return any(isinstance(e, OSError) and e.errno in REMOTE_ERRNOS for e in chain)


def http_status(error: BaseException) -> int:
    """The HTTP status behind ``error``, 0 where there is none."""
    return next((status for e in _causes(error) if (status := _status(e))), 0)


def _status(error: BaseException) -> int:
    answer: Any = getattr(error, "response", None)
    if isinstance(answer, dict):
        found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        found = next(
            (v for k in ("status", "status_code", "code") if (v := getattr(error, k, None))), None
        )
    return int(found) if isinstance(found, int | str) and str(found).isdigit() else 0


def _s3_code(error: BaseException) -> str:
    answer: Any = getattr(error, "response", None)
    return str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, dict) else ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what led to it, the newest first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
