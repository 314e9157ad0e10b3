"""Calls to a filesystem: transient errors are retried, all errors are raised as ``AfnError``."""

from __future__ import annotations

import contextlib
import errno
import posixpath
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from afn_ray.errors import AfnError, ConfigError, Interrupted
from afn_ray.store import disk
from afn_ray.store.retry import OFFLINE, http_status, short_message, with_retries

T = TypeVar("T")
# Class names of errors of botocore, google.auth and azure.core. The packages are optional.
FOREIGN_ERRORS = frozenset(
    {"BotoCoreError", "ClientError", "HttpError", "GoogleAuthError", "AzureError"}
)
NO_CREDENTIALS = frozenset(
    {
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "TokenRetrievalError",
        "SSOError",
        "ProfileNotFound",
        "DefaultCredentialsError",
        "RefreshError",
        "ClientAuthenticationError",
    }
)
UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK})
"""Errors of filesystems that do not support a call."""
NO_DATASET = frozenset({"RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError"})
"""Class names of errors of the Hub for a dataset that is not there, or not for everyone."""
NO_BUCKET = "bucket does not exist"
"""Text in S3's error of a missing bucket."""


@contextlib.contextmanager
def named_errors(action: str, uri: str, kind: type[AfnError]) -> Iterator[None]:
    """Raise filesystem errors as an ``AfnError`` that says what happened, where, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in disk.FULL:
            raise Interrupted(
                f"no space left while {action} {uri}; make room and run the same command again: it "
                "resumes"
            ) from error
        raise kind(f"{action} {uri}: {_reason(error, action, uri)}") from error
    except Exception as error:
        names = {cls.__name__ for cls in type(error).__mro__}
        if not names.isdisjoint(NO_CREDENTIALS):
            raise kind(
                f"{action} {uri}: {short_message(error)}; give credentials in the environment, as "
                "for the store's own tools"
            ) from error
        # botocore raises ValueError for a malformed endpoint in the environment.
        if isinstance(error, ValueError) and "endpoint" in str(error):
            raise ConfigError(
                f"{action} {uri}: {error}; AWS_ENDPOINT_URL must have the form http://host:port"
            ) from error
        if not names.isdisjoint(FOREIGN_ERRORS):
            raise kind(f"{action} {uri}: {short_message(error)}") from error
        raise


def _reason(error: OSError, action: str, uri: str) -> str:
    """Message: the event, and the remedy where it is known."""
    if uri.startswith("hf://") and (reason := _hub_reason(error)):
        return reason
    if isinstance(error, FileNotFoundError):
        other = error.filename
        if "://" in uri and other and posixpath.isabs(str(other)):  # a scratch file of this machine
            return f"no such file or folder: {other}"
        is_new_object = action == "writing" and "://" in uri  # its bucket alone can be missing
        is_bucket = is_new_object or NO_BUCKET in str(error)
        return "no such bucket" if is_bucket else "no such file or folder"
    if isinstance(error, PermissionError):
        detail = f" ({error})" if error.errno is None and str(error) else ""
        return f"permission denied; check owner, mode or credentials{detail}"
    if error.errno in UNSUPPORTED:
        return (
            f"its filesystem does not support this call ({error.strerror}); use a folder on "
            "another filesystem"
        )
    return str(error.strerror or error)


def _hub_reason(error: OSError) -> str:
    """Message of an error of the Hugging Face Hub; empty for others."""
    status = http_status(error)
    if type(error).__name__ == OFFLINE:
        return "HF_HUB_OFFLINE is set; unset it to read a dataset of the Hub"
    if status in (401, 403, 404):
        return (
            "the Hub has no such dataset, revision or file, or it is private or gated (status "
            f"{status}); check the name, accept the dataset's terms, and set HF_TOKEN to a token "
            "that may read it"
        )
    return f"the Hub answered with status {status}" if status else ""


def call_with_retries(
    fs: fsspec.AbstractFileSystem,
    action: str,
    uri: str,
    kind: type[AfnError],
    call: Callable[[], T],
) -> T:
    """Call ``call()`` on ``fs`` and retry transient errors; raise errors as ``AfnError``.

    Raises ``Unavailable`` when the retries are used up, and ``kind`` for other errors.
    """
    with named_errors(action, uri, kind):
        return with_retries(call, f"{action} {uri}", local=isinstance(fs, LocalFileSystem))


FsEntry = dict[str, Any]
"""A file or folder as fsspec's ``info`` describes it: name, size, type, and more that differs."""


def find_entry(fs: fsspec.AbstractFileSystem, path: str) -> FsEntry | None:
    """The entry of ``path`` in ``fs``; None if there is none.

    fsspec's ``exists()`` is not used: it reports any failure as absence.
    """
    try:
        return cast(FsEntry, fs.info(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        if type(error.__cause__).__name__ in NO_DATASET:
            raise
        return None
