"""The subcommand ``afn export``: its flags, and its call."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from afn_ray.cli import arguments
from afn_ray.cli.arguments import Commands
from afn_ray.errors import ConfigError
from afn_ray.exports.formats import FORMATS
from afn_ray.query.views import VIEWS
from afn_ray.text import count, printable

if TYPE_CHECKING:
    from afn_ray.exports.writing import ExportFile

EXPORT_EPILOG = (
    "exit codes: 0 = written, or there already; 2 = the command or the query is wrong, or TARGET "
    "holds something else; 75 = stopped, and the same command resumes"
)
SAY_EVERY_S = 10.0
"""Shortest time between two lines of progress, in seconds."""


def add_export(commands: Commands) -> None:
    export = arguments.add_command(
        commands,
        "export",
        help="write a table or query of a run for other engines: Parquet, Iceberg, CSV",
        epilog=EXPORT_EPILOG,
        description="The same command finishes an export that was stopped. Tables: "
        f"{', '.join(VIEWS)}. Tokens have the id, the source and the kept columns of their "
        "document too.",
    )
    arguments.add_run(export)
    export.add_argument(
        "target",
        metavar="TARGET",
        help="folder to write to, or its URL: new, empty, or with this export",
    )
    rows = export.add_mutually_exclusive_group()
    rows.add_argument(
        "--table", default="tokens", metavar="TABLE", help="table to export (default: tokens)"
    )
    rows.add_argument("--sql", metavar="QUERY", help="export the rows of this query instead")
    export.add_argument(
        "--format",
        choices=tuple(FORMATS),
        default="parquet",
        help="format of the files; hf-dataset is Parquet with the card of a dataset of the Hub "
        "(default: parquet)",
    )
    export.add_argument(
        "--file-size",
        type=arguments.byte_size,
        default="256MiB",
        metavar="SIZE",
        help="approximate size of a file (default: 256MiB)",
    )
    export.add_argument(
        "--baseline",
        metavar="RUN",
        help="run to compare with, which fills the tables of movers and drift",
    )
    export.add_argument(
        "--catalog",
        metavar="URI",
        help="for --format iceberg: URI of the catalog, or its name in pyiceberg's configuration "
        "(default: a SQLite file in TARGET)",
    )
    export.add_argument(
        "--name",
        metavar="NAMESPACE.TABLE",
        help="for --format iceberg: name of the table in the catalog (default: afn.TABLE)",
    )
    arguments.add_query_timeout(export, default_s=3600.0)
    arguments.add_memory_limit(export)
    arguments.add_threads(export)
    arguments.add_quiet(export)
    arguments.add_json(export)


def call_export(args: argparse.Namespace) -> None:
    if args.format != "iceberg" and (args.catalog or args.name):
        raise ConfigError("--catalog and --name need --format iceberg: add it, or leave them out")
    from afn_ray.exports import card
    from afn_ray.exports.export import export
    from afn_ray.exports.request import IcebergTable

    iceberg = None
    if args.format == "iceberg":
        iceberg = IcebergTable(
            args.name or f"afn.{args.table if args.sql is None else 'query'}", args.catalog
        )
    with arguments.open_run(args) as run:
        done = export(
            run,
            args.target,
            args.table if args.sql is None else None,
            sql=args.sql,
            format=args.format,
            file_bytes=args.file_size,
            iceberg=iceberg,
            on_file=None if args.quiet else _progress(),
        )
        query = args.table if args.sql is None else args.sql
        for note in card.left_out(run, query):
            print(f"note: {printable(note)}", file=sys.stderr)
    if args.json:
        sums = {"num_rows": done.num_rows, "num_bytes": done.num_bytes}
        print(json.dumps({**asdict(done), **sums}, indent=1))
        return
    there = len(done.files) - done.num_new
    earlier = ""
    if there:
        earlier = f"; {count(there, 'file')} of them {'was' if there == 1 else 'were'} there"
    print(
        f"{printable(done.uri)} has {count(done.num_rows, 'row')} in "
        f"{count(len(done.files), 'file')}, {done.num_bytes:,} bytes{earlier}"
    )


def _progress() -> Callable[[ExportFile, int | None], None]:
    """A function that prints on standard error, from time to time, how far an export is."""
    files = num_rows = 0
    said_s = time.monotonic()

    def say(file: ExportFile, of: int | None) -> None:
        nonlocal files, num_rows, said_s
        files += 1
        num_rows += file.rows
        if time.monotonic() - said_s >= SAY_EVERY_S:
            said_s = time.monotonic()
            parts = f" of at most {of:,}" if of else ""
            print(
                f"{count(files, 'file')}{parts} written, {count(num_rows, 'row')}", file=sys.stderr
            )

    return say
