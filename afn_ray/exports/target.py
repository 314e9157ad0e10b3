"""The folder of an export: what it is asked for, what it has, and its end.

::

    <target>/README.md             what the rows are, for people
    <target>/export.json           written once, last: the request and the files that count
    <target>/data/part-*           the files
    <target>/plan.json             written once, first: the request and the parts of the shards
    <target>/written/<part>.json   written once: the file that is the part; removed at the end
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypedDict

from afn_ray.errors import ConfigError, StoreError
from afn_ray.exports.request import ExportRequest
from afn_ray.exports.writing import ExportFile
from afn_ray.query.shard_views import ShardRange
from afn_ray.store import storage, uris
from afn_ray.text import printable

VERSION = 1
"""Version of ``plan.json`` and ``export.json``."""
OURS = re.compile(r"\.?part-\d{5,}(-[0-9a-f]{8})?\.(parquet|csv)(-[0-9a-f]+)?")
"""Names of files that an export writes, unfinished ones too."""
NOTE = re.compile(r"part-(\d{5,})\.json")
"""Names of the notes on parts."""


class FileRecord(TypedDict):
    """A file of ``export.json``."""

    name: str
    rows: int
    bytes: int


class ExportRecord(TypedDict, total=False):
    """The content of ``plan.json``, which has parts, and of ``export.json``, which has files."""

    version: int
    request: dict[str, object]
    parts: list[tuple[int, int, tuple[int, int] | None]]  # of ``ShardRange``
    files: list[FileRecord]


class Target:
    """The folder of one export, on a disk or in a bucket."""

    def __init__(self, uri: str, request: ExportRequest) -> None:
        self.uri = uris.absolute(uri).rstrip("/")
        self.data = uris.join(self.uri, "data")
        self._request = request
        self._export = uris.join(self.uri, "export.json")
        self._plan = uris.join(self.uri, "plan.json")
        self._written = uris.join(self.uri, "written")

    # --- request and parts

    def finished(self) -> list[ExportFile] | None:
        """The files of the finished export; None if it is not.

        Raises ``ConfigError`` if the folder holds anything else.
        """
        if (found := self._read(self._export)) is not None:
            return [ExportFile(**file) for file in found["files"]]
        return None

    def planned(self) -> list[ShardRange] | None:
        """The parts of an export that was begun; None if none was.

        One that was begun for another request and wrote nothing is forgotten. Raises
        ``ConfigError`` if the folder holds anything else.
        """
        there = storage.list_names(self.uri)
        names = {name for name in there if not name.startswith(".")}
        begun = [*storage.list_names(self.data), *storage.list_names(self._written)]
        if names <= {"plan.json", "data"} and not begun:
            if self._other_plan():
                storage.remove(self._plan)
            names = set()
        if (found := self._read(self._plan)) is not None:
            return _parts(found)
        if names:
            raise ConfigError(
                f"{self.uri} holds {min(names)!r} and no export; give an empty folder, or one that "
                "does not exist"
            )
        return None

    def _other_plan(self) -> bool:
        """True if the folder has the plan of another request."""
        try:
            self._read(self._plan)
        except ConfigError:
            return True
        return False

    def plan(self, parts: Sequence[ShardRange]) -> list[ShardRange]:
        """Write the request and its ``parts``; return them, or those of a
        process that was first.
        """
        with contextlib.suppress(storage.AlreadyWritten):
            storage.write_once(self._plan, self._body(parts=parts))
        storage.make_folder(self.data)
        found = self._read(self._plan)
        assert found is not None
        return _parts(found)

    def _read(self, uri: str) -> ExportRecord | None:
        data = storage.read_if_there(uri)
        if data is None:
            return None
        try:
            found: ExportRecord = json.loads(data)
            there = found["request"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{uri} is not what 'afn export' writes; give another folder"
            ) from error
        if found.get("version") != VERSION or there != self._request.to_json():
            raise ConfigError(
                f"{self.uri} holds another export{self._difference(there)}; give another folder, "
                "or remove that one"
            )
        return found

    def _difference(self, there: Mapping[str, object]) -> str:
        here = self._request.to_json()
        for key, value in here.items():
            if there.get(key) != value:
                shown = (printable(str(v or "none"))[:200] for v in (there.get(key), value))
                return f": its {key} is {', here it is '.join(shown)}"
        return ""

    def _body(self, **more: Any) -> bytes:
        body = {"version": VERSION, "request": self._request.to_json(), **more}
        return json.dumps(body, ensure_ascii=False, indent=1).encode()

    # --- files

    def written(self) -> dict[int, ExportFile]:
        """The files of parts that are whole, by the number of the part."""
        notes = [NOTE.fullmatch(name) for name in storage.list_names(self._written)]
        names = {*storage.list_names(self.data)}
        found = {}
        for note in filter(None, notes):
            file = _noted(uris.join(self._written, note[0]))
            if file is not None and file.name in names:
                found[int(note[1])] = file
        return found

    def noted(self, part: int) -> ExportFile | None:
        """File that another process has written as the ``part`` by now; None if there is none."""
        file = _noted(self._note(part))
        is_there = file is not None and storage.exists(uris.join(self.data, file.name))
        return file if is_there else None

    def _note(self, part: int) -> str:
        return uris.join(self._written, f"part-{part:05d}.json")

    def note(self, part: int, file: ExportFile) -> ExportFile:
        """Record that ``file`` is the ``part``; return it, or that of a process that was first."""
        uri = self._note(part)
        body = json.dumps(asdict(file)).encode()
        try:
            storage.write_once(uri, body)
        except storage.AlreadyWritten:
            first = _noted(uri)
            if first is None or first == file:  # the export is finished, or an answer was lost
                return file
            if storage.exists(uris.join(self.data, first.name)):
                storage.delete([uris.join(self.data, file.name)])
                return first
            storage.write_over(uri, body, retry_for_s=None)  # that file was removed
        return file

    def finish(self, files: Sequence[ExportFile], readme: str) -> list[ExportFile]:
        """End the export with ``files``; return these, or those of a process that was first."""
        readme_uri = uris.join(self.uri, "README.md")
        storage.write_over(readme_uri, readme.encode(), retry_for_s=None)
        entries = [asdict(file) for file in files]
        with contextlib.suppress(storage.AlreadyWritten):
            storage.write_once(self._export, self._body(files=entries))
        finished = self.finished()
        if finished is None:
            raise StoreError(f"{self._export} was written and is not there")
        return finished

    def clean(self, files: Sequence[ExportFile]) -> None:
        """Remove what earlier attempts left beside ``files``, and the notes on parts."""
        names = {file.name for file in files}
        there = storage.list_names(self.data)
        left = [name for name in there if OURS.fullmatch(name) and name not in names]
        notes = storage.list_names(self._written)
        storage.delete([uris.join(self.data, name) for name in left])
        storage.delete([uris.join(self._written, name) for name in notes])
        storage.remove_if_empty(self._written)


def _noted(uri: str) -> ExportFile | None:
    """The file that the note ``uri`` is about; None if the note was removed."""
    data = storage.read_if_there(uri)
    return None if data is None else ExportFile(**json.loads(data))


def _parts(found: ExportRecord) -> list[ShardRange]:
    parts = []
    for first, end, docs in found["parts"]:
        parts.append(ShardRange(first, end, None if docs is None else (docs[0], docs[1])))
    return parts
