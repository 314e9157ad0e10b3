"""TOML files that users write, local or behind a URL: read them and build a ``RunConfig``."""

from __future__ import annotations

import codecs
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from afn_ray.config import RunConfig
from afn_ray.errors import AfnError, ConfigError, Unavailable
from afn_ray.store import disk, storage
from afn_ray.text import nearest

MOST_BYTES = 1 << 20
"""Largest TOML file, in bytes. Such files are written by hand."""
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks and their encodings. UTF-32-LE is first: its mark begins with UTF-16-LE's."""
STREAMS = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")
"""Beginnings of paths of open files, as a shell gives them for the output of a command."""
PLACES = ("corpus", "store", "scratch", "thresholds")
"""Config keys that hold paths or URLs.

``model`` is not among them: it may be a hub name, which looks like a relative path.
"""


def read_toml(file: str | Path, what: str) -> dict[str, Any]:
    """The values in the TOML ``file``, a path or any fsspec URL. Errors name it ``what``.

    Raises ``ConfigError`` if the file cannot be read, is larger than ``MOST_BYTES`` or is not TOML,
    and ``Unavailable`` if its store does not answer.
    """
    try:
        data = _read(str(file))
    except OSError as error:
        raise ConfigError(f"{what} {file} cannot be read: {error.strerror}") from error
    except Unavailable:
        raise
    except AfnError as error:
        raise ConfigError(f"{what} cannot be read: {error}") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{what} {file} has more than {MOST_BYTES:,} bytes; is it another file?")
    try:
        return tomllib.loads(decode(data))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{what} {file} is not TOML: {error}") from error


def decode(data: bytes) -> str:
    """The text in ``data``: UTF-8, or the encoding of its byte order mark.

    Editors on Windows write such marks.
    """
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    return data.decode("utf-8")


def _read(file: str) -> bytes:
    if "://" in file:
        return storage.read_bytes(file, 0, MOST_BYTES + 1)
    return read_local(Path(file))


def read_local(path: Path) -> bytes:
    """The first bytes of a file that a user names, at most one over ``MOST_BYTES``.

    Raises ``OSError``, also for a pipe or device that no shell has opened.
    """
    if not str(path).startswith(STREAMS):
        disk.check_ends(path)
    with path.open("rb") as source:
        return source.read(MOST_BYTES + 1)


def config_from(values: Mapping[str, Any], file: str | Path | None = None) -> RunConfig:
    """A ``RunConfig`` from ``values`` (the given flags) over the TOML ``file``; flags win.

    ``file`` is a path or an fsspec URL. Relative paths in it are relative to the working folder,
    not to the file. A file behind a URL is read on many machines and must not contain relative
    paths. Raises ``ConfigError`` for an unknown key (the message lists the known ones), a wrong
    type, a missing key or such a path.
    """
    found = {} if file is None else read_toml(file, "config file")
    merged = {**found, **values}
    known = [field.name for field in fields(RunConfig)]
    unknown = sorted(set(merged) - set(known))
    if unknown:
        where = f" in {file}" if file is not None else ""
        raise ConfigError(
            f"unknown key{where}: {', '.join(unknown)}{nearest(unknown, known)}; known keys: "
            f"{', '.join(known)}"
        )
    corpus = merged.get("corpus")
    if isinstance(corpus, str):
        merged["corpus"] = (corpus,)
    elif isinstance(corpus, list):
        merged["corpus"] = tuple(corpus)
    missing = [name for name in ("corpus", "model", "store") if merged.get(name) is None]
    if missing:
        raise ConfigError(
            f"missing: {', '.join(missing)}; give it as a flag or in a TOML file (--config)"
        )
    config = RunConfig(**merged)
    if "://" in str(file):
        for name in PLACES:
            if name in found and name not in values:
                _check_absolute(name, getattr(config, name), str(file))
    return config


def _check_absolute(name: str, value: str | tuple[str, ...], file: str) -> None:
    places = (value,) if isinstance(value, str) else value
    for place in places:
        if "://" not in place and not Path(place).is_absolute():
            raise ConfigError(
                f"{name} in {file} is {place!r}, which is another place on every machine that "
                "reads this file; give a URL or an absolute path there"
            )
