"""URIs: the filesystem behind one, its canonical form, and URIs below it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from afn_ray.errors import ConfigError

WILDCARDS = "*?["
"""Characters that make a pattern a glob."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
"""URL protocol -> extra of the package that supports it."""
# Timeouts in seconds, so that a dead peer is noticed. botocore retries one request (a page of a
# listing, a part of a file); `with_retries` retries the whole call.
OPTIONS: dict[str, dict[str, Any]] = {
    "s3": {
        "config_kwargs": {
            "connect_timeout": 5,
            "read_timeout": 30,
            "retries": {"total_max_attempts": 3, "mode": "standard"},
            "max_pool_connections": 32,
        },
    },
    "gs": {"requests_timeout": 120},  # for a whole request
    "az": {"connection_timeout": 5, "read_timeout": 30},
}
MISTYPED = re.compile(rf"({'|'.join(EXTRAS)}|hf|https?):/?(?!/)(.*)", re.IGNORECASE | re.DOTALL)
"""A URL that lacks a slash, and so would be a local path."""
MEMBER_MARK = "::"
"""Mark between an archive and its member."""
MEMBER = re.compile(r"(.+?\.(?:zip|tar))::(.*)", re.IGNORECASE | re.DOTALL)
# Without a handler Python prints what these log, with tracebacks: the errors that we raise.
for _name in ("azure", "gcsfs"):
    logging.getLogger(_name).addHandler(logging.NullHandler())
# gcsfs would ask for each bucket's layout: one more permission, and one more protocol (gRPC), for
# appends, which a store has not.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# Azure names a container `container@account`, and an ARN has colons; neither is a secret.
URL_SECRET = re.compile(
    r"^(?!abfss?://[^/:@]*@)(?:[^/]*::)?[^:/]+://(?!arn:)(?:[^/?#@]*@|[^/?#@:]+:(?!\d+/)[^@]*@)"
    r"|[?&][^=&/]*(?:secret|token|passw|signature|credential|key|sig)[^=&/]*=",
    re.IGNORECASE,
)


def split_member(uri: str) -> tuple[str, str] | None:
    """The archive and the member, or glob of members, that ``uri`` names; None if it is no member.

    A local file of that name is none.
    """
    found = MEMBER.fullmatch(uri)
    # Unlike ``Path.exists``, this is false for a name that is too long for the filesystem.
    if found is None or ("://" not in uri and os.path.exists(path_in(uri))):  # noqa: PTH110
        return None
    return found[1], found[2]


def open_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of ``uri``, without a listings cache, and the path in it.

    Raises ``ConfigError`` for a URL that cannot be opened or that holds credentials. Credentials
    come from the environment.
    """
    typed = MISTYPED.fullmatch(uri)
    is_mistyped = typed is not None and not os.path.exists(uri.partition("/")[0])  # noqa: PTH110
    url = f"{typed[1]}://{typed[2]}" if typed is not None and is_mistyped else uri
    if "://" not in url:  # a local path may contain anything, including fsspec's `::`
        local = LocalFileSystem()
        return local, path_in(uri)
    protocol = url.partition("://")[0]
    if URL_SECRET.search(url):
        raise ConfigError(
            f"a {protocol}:// URL holds credentials, which would end up in logs and in the store; "
            "remove them from the URL and give them in the environment"
        )
    if is_mistyped:
        raise ConfigError(
            f"{uri!r} lacks slashes, so it would be a folder here named '{protocol}:'; give {url}, "
            f"or ./{uri} for the folder"
        )
    if "::" in uri:
        raise ConfigError(
            f"chained URL {uri!r}; give a plain one (a file's ending says how it is compressed)"
        )
    extra = EXTRAS.get(protocol, "")
    try:
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False, **OPTIONS.get(extra, {}))
    except ImportError as error:
        how = f'pip install "afn-ray[{extra}]"' if extra else str(error)
        raise ConfigError(f"{uri!r} cannot be opened: a package is missing: {how}") from error
    except ValueError as error:
        raise ConfigError(f"{uri!r} cannot be opened: {error}") from error
    if extra == "s3":
        fs.retries = 1  # retries of s3fs would multiply with those of botocore
    return fs, path


def path_in(uri: str) -> str:
    """Path of ``uri`` in its filesystem."""
    # "data:" is a protocol without slashes to fsspec; here it begins the name of a local file.
    return str(fsspec.core.strip_protocol(f"./{uri}" if uri.startswith("data:") else uri))


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` appended."""
    return "/".join([uri.rstrip("/"), *parts])


def is_local(uri: str) -> bool:
    """True if ``uri`` is on a local or mounted disk."""
    archive, _ = split_member(uri) or (uri, "")
    return isinstance(open_filesystem(archive)[0], LocalFileSystem)


def is_process_memory(uri: str) -> bool:
    """True if ``uri`` is in the memory of this process, which other processes cannot read."""
    return bool(open_filesystem(uri)[0].protocol == "memory")


def absolute(uri: str) -> str:
    """Canonical form of ``uri``: absolute, with its protocol unless local."""
    if (parts := split_member(uri)) is not None:
        return MEMBER_MARK.join([absolute(parts[0]), parts[1]])
    fs, path = open_filesystem(uri)
    return _plain(path) if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def _plain(path: str) -> str:
    """The local ``path`` without empty steps, ``.``, and ``..`` where it only undoes a step.

    After a link or a glob, ``..`` leads elsewhere, and stays.
    """
    steps: list[str] = []
    for step in path.split("/"):
        if step == ".." and steps and not _is_turn(steps):
            steps.pop()
        elif step not in ("", "."):
            steps.append(step)
    return f"/{'/'.join(steps)}"


def _is_turn(steps: list[str]) -> bool:
    """True if ``..`` after ``steps`` may lead to another folder than that of the last one."""
    last = steps[-1]
    return (
        last == ".."
        or any(character in last for character in WILDCARDS)
        or Path("/", *steps).is_symlink()
    )


def below(folder: str) -> Callable[[str], bool]:
    """A predicate on absolute URIs, as listings give them: is the URI ``folder`` or below it?

    On a local disk it also follows links.
    """
    fs, path = open_filesystem(folder)
    root = absolute(folder).rstrip("/")
    real = os.path.realpath(path) if isinstance(fs, LocalFileSystem) else None

    @cache
    def is_below(uri: str) -> bool:
        if f"{uri}/".startswith(f"{root}/"):
            return True
        if real is None or "://" in uri:
            return False
        return f"{os.path.realpath(uri)}/".startswith(f"{real}/")

    return is_below
