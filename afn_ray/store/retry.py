"""Transient errors of filesystems, and retries of a call after one."""

from __future__ import annotations

import errno
import itertools
import logging
import random
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from afn_ray.errors import Unavailable

T = TypeVar("T")

RETRY_FOR_S = 120.0
"""Longest retry time after the first failure of a call, in seconds.

A throttled bucket or a restarted gateway needs less.
"""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 8.0
"""Upper bounds of the first and of the longest wait between two tries, in seconds."""
WARN_AFTER_S = 5.0
"""Time of failures after which a warning is logged, in seconds."""
WARN_EVERY_S = 30.0
"""Shortest pause between two such warnings in one process, in seconds."""

_log = logging.getLogger(__name__)

LOCAL_ERRNOS = frozenset({errno.EINTR, errno.ESTALE})
"""Transient errors of a mounted folder. EIO is not included: a failing disk keeps failing."""

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
"""Transient errors of a remote filesystem."""

DEFINITE = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,
    TypeError,
)
"""Errors that another try does not change."""

OFFLINE = "OfflineModeIsEnabled"
"""Class name of the Hub's error where HF_HUB_OFFLINE is set, which is a ``ConnectionError``."""

# Class names of transient errors of botocore, aiohttp, requests, gcsfs, google.auth and azure.core.
# They are names because the packages are optional.
TRANSIENT_NAMES = frozenset(
    {
        "HTTPClientError",
        "ConnectionError",
        "ClientConnectionError",
        "ClientPayloadError",
        "ServerTimeoutError",
        "IncompleteReadError",
        "IncompleteRead",
        "ResponseParserError",
        "FlexibleChecksumError",
        "ChecksumError",
        "Timeout",
        "ChunkedEncodingError",
        "TransportError",
        "ServiceRequestError",
        "ServiceResponseError",
    }
)

TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})
"""HTTP statuses below 500 of requests that may succeed a moment later."""
# Transient S3 error codes whose HTTP status says otherwise. A retry restarts a multipart upload
# that is gone, and corrects the clock after a skewed request.
TRANSIENT_CODES = frozenset(
    {
        "RequestTimeout",
        "RequestTimeTooSkewed",
        "IncompleteBody",
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "NoSuchUpload",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
    }
)


def with_retries(
    call: Callable[[], T], what: str, *, local: bool, retry_for_s: float | None = None
) -> T:
    """Call ``call()`` and retry transient errors with exponential backoff and full jitter.

    Raises ``Unavailable``, with ``what`` and the last error, ``retry_for_s`` (by default
    ``RETRY_FOR_S``) after the first failure. Raises any other error unchanged. A call that fails
    may still have taken effect.
    """
    began, warned = 0.0, False
    for attempt in itertools.count():
        try:
            return call()
        except Exception as error:
            if not is_transient(error, local=local):
                raise
            now = time.monotonic()
            began = began or now
            left = began + (RETRY_FOR_S if retry_for_s is None else retry_for_s) - now
            if left > 0 and not warned and now - began >= WARN_AFTER_S and _may_warn(now):
                warned = True
                _log.warning(
                    "%s: no answer for %.0f s, last error %s: %s; retrying for up to %.0f s more",
                    what,
                    now - began,
                    type(error).__name__,
                    short_message(error),
                    left,
                )
            if left <= 0:
                raise Unavailable(
                    f"{what}: no answer in {attempt + 1} tries over {now - began:.0f} s, last "
                    f"error {type(error).__name__}: {short_message(error)}; check the store and "
                    "the network, then run the same command again"
                ) from error
            longest = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(attempt, 16))
            time.sleep(min(left, random.uniform(0, longest)))  # noqa: S311
    raise AssertionError


_next_warning_s = 0.0


def _may_warn(now: float) -> bool:
    """True if a further warning is due.

    The calls of many threads fail together, and one warning is enough.
    """
    global _next_warning_s
    if now < _next_warning_s:
        return False
    _next_warning_s = now + WARN_EVERY_S
    return True


def is_transient(error: BaseException, *, local: bool = False) -> bool:
    """True if the same call may succeed a moment later.

    ``error`` comes from a filesystem; its causes are considered too. ``local`` means a local or
    mounted disk.
    """
    if local:
        return isinstance(error, OSError) and error.errno in LOCAL_ERRNOS
    chain = list(_causes(error))
    if any(_s3_code(e) in TRANSIENT_CODES for e in chain):
        return True
    if isinstance(error, DEFINITE) or type(error).__name__ == OFFLINE:
        return False
    if any(isinstance(e, ssl.SSLCertVerificationError) for e in chain):
        return False
    for e in chain:  # the newest error decides: a garbled answer outweighs an older status 400
        if status := _status(e):
            return status in TRANSIENT_STATUSES or (status >= 500 and status not in (501, 505))
        if isinstance(e, ConnectionError | TimeoutError | socket.gaierror):
            return True
        names = {cls.__name__ for cls in type(e).__mro__}
        if not names.isdisjoint(TRANSIENT_NAMES):
            return True
    return any(isinstance(e, OSError) and e.errno in REMOTE_ERRNOS for e in chain)


def short_message(error: BaseException) -> str:
    """The message of ``error`` without what is long or secret.

    That is the whole answer, or all tries, which Azure's appends, and the query of each URL: that
    of a signed one opens its file to everybody.
    """
    message = re.split(r"\n(?:RequestId:|Attempted credentials:)", str(error))[0]
    return re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]*", r"\1?...", message)


def http_status(error: BaseException) -> int:
    """The HTTP status in ``error`` or its causes; 0 if there is none."""
    for cause in _causes(error):
        if status := _status(cause):
            return status
    return 0


def _status(error: BaseException) -> int:
    answer: Any = getattr(error, "response", None)
    if isinstance(answer, dict):
        found = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        values = [getattr(error, name, None) for name in ("status", "status_code", "code")]
        values.append(getattr(answer, "status_code", None))  # of httpx, in errors of the Hub
        found = next(filter(None, values), None)
    return int(found) if isinstance(found, int | str) and str(found).isdigit() else 0


def _s3_code(error: BaseException) -> str:
    answer: Any = getattr(error, "response", None)
    if not isinstance(answer, dict):
        return ""
    return str(answer.get("Error", {}).get("Code", ""))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and its causes, newest first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        if current.__cause__ is not None or current.__suppress_context__:
            current = current.__cause__
        else:
            current = current.__context__
