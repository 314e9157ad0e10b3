"""A call that met a transient error is repeated until it succeeds or its time is up; other errors
are raised at once.
"""

from __future__ import annotations

import asyncio
import errno
import os
import pickle
import socket
import ssl
import time
from functools import partial

import aiohttp
import botocore.exceptions
import botocore.parsers
import pytest
from aiohttp.http_exceptions import BadHttpMessage
from fsspec.exceptions import FSTimeoutError

from afn_ray.errors import Unavailable
from afn_ray.store import retry
from afn_ray.store.retry import http_status, is_transient, with_retries
from faults import TRANSIENT, s3_error

ENDPOINT = "http://bucket.example"


def _os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def _refused_certificate() -> BaseException:
    why = ssl.SSLCertVerificationError(1, "certificate verify failed")
    return _caused(botocore.exceptions.SSLError(endpoint_url=ENDPOINT, error=why), why)


class HttpError(Exception):
    """A class as in gcsfs, which is an extra that is not installed here."""

    def __init__(self, code: object) -> None:
        super().__init__(f"gcs, {code}")
        self.code = code


@pytest.mark.parametrize(
    "error",
    [
        *(make() for make in TRANSIENT),
        s3_error("503", 503, "HeadObject"),
        s3_error("500", 500, "HeadObject"),
        s3_error("ServiceUnavailable", 503),
        s3_error("OperationAborted", 409),
        s3_error("RequestTimeout", 400),
        s3_error("RequestTimeTooSkewed", 403),
        s3_error("BadDigest", 400),
        s3_error("NoSuchUpload", 404, "CompleteMultipartUpload"),
        s3_error("SomethingNew", 502),
        s3_error("Throttling", 400),
        botocore.exceptions.ConnectTimeoutError(endpoint_url=ENDPOINT),
        botocore.exceptions.ConnectionClosedError(endpoint_url=ENDPOINT),
        botocore.exceptions.ResponseStreamingError(error="cut"),
        botocore.exceptions.SSLError(endpoint_url=ENDPOINT, error="eof"),
        botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        botocore.parsers.ResponseParserError("no XML"),
        _caused(
            botocore.exceptions.HTTPClientError(error="garbled"), BadHttpMessage("garbled")
        ),  # it has a code, 400
        aiohttp.ClientOSError(errno.ECONNRESET, "reset"),
        aiohttp.ServerTimeoutError("read"),
        HttpError(503),
        HttpError("429"),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        BrokenPipeError(errno.EPIPE, "pipe"),
        _os_error(errno.EHOSTUNREACH),
        _os_error(errno.ENETUNREACH),
        _os_error(errno.EIO),
        _os_error(errno.EBUSY),
        _caused(OSError("could not read"), ConnectionResetError()),
        _caused(
            botocore.exceptions.CredentialRetrievalError(provider="iam-role", error_msg="timeout"),
            FSTimeoutError(),
        ),
    ],
    ids=repr,
)
def test_these_pass_on_a_network(error: BaseException) -> None:
    assert is_transient(error)
    assert is_transient(error, local=True) is False  # a disk has none of these but by defect


@pytest.mark.parametrize(
    "error",
    [
        s3_error("NoSuchKey", 404),
        s3_error("NoSuchBucket", 404),
        s3_error("404", 404, "HeadObject"),
        s3_error("403", 403, "HeadObject"),
        s3_error("AccessDenied", 403),
        s3_error("InvalidAccessKeyId", 403),
        s3_error("SignatureDoesNotMatch", 403),
        s3_error("ExpiredToken", 400),
        s3_error("PreconditionFailed", 412),
        s3_error("InvalidRange", 416),
        s3_error("NotImplemented", 501),
        s3_error("KeyTooLongError", 400),
        s3_error("EntityTooLarge", 400),
        s3_error("301", 301, "HeadBucket"),
        s3_error("SomethingNew", 400),
        botocore.exceptions.NoCredentialsError(),
        botocore.exceptions.PartialCredentialsError(
            provider="env", cred_var="AWS_SECRET_ACCESS_KEY"
        ),
        botocore.exceptions.ProfileNotFound(profile="x"),
        botocore.exceptions.ParamValidationError(report="Invalid bucket name"),
        botocore.exceptions.NoRegionError(),
        _refused_certificate(),
        HttpError(400),
        HttpError("404"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        _caused(
            FileExistsError("there"), s3_error("ConditionalRequestConflict", 409)
        ),  # as adlfs translates
        PermissionError("denied"),
        IsADirectoryError(errno.EISDIR, "folder"),
        NotADirectoryError(errno.ENOTDIR, "file"),
        _os_error(errno.ENOSPC),
        _os_error(errno.EDQUOT),
        _os_error(errno.ENAMETOOLONG),
        _os_error(errno.EROFS),
        _os_error(errno.ENOTEMPTY),
        ValueError("Cannot traverse all of S3"),
        TypeError("our own fault"),
        KeyError("our own fault"),
        RuntimeError("our own fault"),
        MemoryError(),
    ],
    ids=repr,
)
def test_lasting_errors_are_not_transient(error: BaseException) -> None:
    assert not is_transient(error)
    assert not is_transient(error, local=True)


@pytest.mark.parametrize(
    ("number", "passes"),
    [
        (errno.ESTALE, True),
        (errno.EINTR, True),
        (errno.EIO, False),
        (errno.ENOSPC, False),
        (errno.EBUSY, False),
    ],
)
def test_a_disk_that_fails_goes_on_failing(number: int, passes: bool) -> None:
    assert is_transient(_os_error(number), local=True) is passes


def test_statuses_are_found_through_the_translations() -> None:
    assert http_status(s3_error("SlowDown", 503)) == 503
    assert http_status(_caused(OSError("outer"), s3_error("PreconditionFailed", 412))) == 412
    assert http_status(HttpError("404")) == 404
    assert http_status(OSError("none")) == http_status(HttpError(None)) == 0


def test_a_context_counts_unless_it_was_put_aside() -> None:
    def fail(aside: bool) -> BaseException:
        try:
            try:
                raise ConnectionResetError
            except ConnectionResetError as error:
                if aside:
                    raise RuntimeError("another matter") from None
                raise RuntimeError("in its course") from error
        except RuntimeError as error:
            return error

    assert is_transient(fail(aside=False)) and not is_transient(fail(aside=True))


# --- trying again
# ----------------------------------------------------------------------------------------


class _Clock:
    """Time that passes only in sleep and in ``call_s`` of each call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call_s: float = 0.0) -> None:
        self.now, self.call_s, self.waits, self.calls = 1000.0, call_s, list[float](), 0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def fail_until(self, up_at_s: float) -> str:
        self.calls += 1
        self.now += self.call_s
        if self.now < 1000 + up_at_s:
            raise s3_error("SlowDown", 503)
        return "answer"


def test_a_bucket_that_refuses_for_20_s_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(50):
        clock = _Clock(monkeypatch)
        fails = partial(clock.fail_until, 20)
        assert with_retries(fails, "writing x", local=False) == "answer"
        assert 20 <= clock.now - 1000 <= 20 + retry.LONGEST_WAIT_S
        for i, wait in enumerate(clock.waits):
            assert 0 <= wait <= min(retry.LONGEST_WAIT_S, retry.FIRST_WAIT_S * 2**i)


def test_waits_are_spread_over_the_whole_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand workers that were refused together must not come back together."""
    clock = _Clock(monkeypatch)
    for _ in range(400):
        up_at_s = clock.now - 1000 + 1e-9
        with_retries(lambda: clock.fail_until(up_at_s), "x", local=False)  # noqa: B023
    firsts = [w / retry.FIRST_WAIT_S for w in clock.waits]
    assert (
        len(firsts) >= 400
        and min(firsts) < 0.05
        and max(firsts) > 0.95
        and 0.4 < sum(firsts) / len(firsts) < 0.6
    )


@pytest.mark.parametrize("call_s", [0.0, 30.0, 500.0])
def test_no_answer_for_too_long_is_unavailable_and_says_why(
    monkeypatch: pytest.MonkeyPatch, call_s: float
) -> None:
    clock = _Clock(monkeypatch, call_s)
    with pytest.raises(Unavailable) as caught:
        with_retries(lambda: clock.fail_until(1e9), "writing s3://bucket/x", local=False)
    assert "writing s3://bucket/x: no answer in" in str(caught.value) and "said SlowDown" in str(
        caught.value
    )
    assert "run the same command again" in str(caught.value)
    assert caught.value.exit_code == 75 and isinstance(caught.value.__cause__, OSError)
    assert clock.calls >= 2  # a long call that fails at its end is given a second chance
    assert retry.RETRY_FOR_S <= clock.now - 1000 <= retry.RETRY_FOR_S + 2 * call_s + 1e-6
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), KeyboardInterrupt(), asyncio.CancelledError()]
)
def test_what_does_not_pass_is_raised_at_once(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    clock, calls = _Clock(monkeypatch), list[int]()

    def fail() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        with_retries(fail, "reading x", local=False)
    assert calls == [1] and clock.waits == []


def test_an_error_of_another_kind_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    answers = iter([ConnectionResetError(), socket.gaierror(), PermissionError("denied")])

    def fail() -> None:
        raise next(answers)

    with pytest.raises(PermissionError):
        with_retries(fail, "reading x", local=False)
    assert len(clock.waits) == 2


def test_messages_have_no_query_of_a_url_which_may_be_signed() -> None:
    url = "https://cdn.example/a/b.parquet?X-Amz-Signature=secret&Expires=9"
    for text in (
        f"403, url={url!r}",
        f'reading "{url}"',
        f"{url} is gone and http://a.b/?q=secret",
    ):
        message = retry.short_message(ValueError(text))
        assert "secret" not in message and "?..." in message
    assert retry.short_message(ValueError("why? https://a.b/c")) == "why? https://a.b/c"
