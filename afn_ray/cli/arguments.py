"""Types of argument values, and arguments that several commands of ``afn`` share."""

from __future__ import annotations

import argparse
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afn_ray.config import RunConfig

if TYPE_CHECKING:
    from afn_ray.query.database import Run

RUN_EPILOG = (
    "exit codes: 0 = done; 1 = ended with shards missing; 2 = the command or the config is wrong; "
    "75 = stopped, and the same command resumes"
)
"""Exit codes of commands that measure a corpus, for the end of their help."""
READ_EPILOG = (
    "exit codes: 0 = done; 2 = the command or the query is wrong, or what it reads is damaged; "
    "75 = the store does not answer"
)
"""Exit codes of commands that read a run, for the end of their help."""
RUN = "URI of a run, or of a store for its latest complete run"
"""Help of an argument that names one run."""
MEMORY_SIZE = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?B?|%)", re.IGNORECASE)
"""Form of an amount of memory: 2GB, 512MiB or 50%."""

Commands = Any
"""Result of ``add_subparsers``; argparse has no public name for its type."""


# --- types of values; a message of an ``ArgumentTypeError`` follows the name of the flag


def not_negative(text: str) -> int:
    """A whole number, 0 or more."""
    return _whole_number(text, least=0)


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    return _whole_number(text, least=1)


def _whole_number(text: str, least: int) -> int:
    if not re.fullmatch("-?[0-9]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value


def memory_size(text: str) -> str:
    """An amount of memory, as DuckDB reads it."""
    if not MEMORY_SIZE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; expected a size such as 2GB, 512MiB or 50%"
        )
    return text


def byte_size(text: str) -> int:
    """A number of bytes, as in 64MiB or 1GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text, re.IGNORECASE)
    if found is None or not (size := float(found[1])):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; expected a number of bytes such as 256MiB or 1GB"
        )
    unit = 1024 if found[3] else 1000
    return int(size * unit ** " KMGT".index(found[2].upper() or " "))


def local_file(text: str) -> Path:
    """A path on this machine."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is not a file on this machine; name a local file, and copy it there afterwards"
        )
    return Path(text)


# --- arguments that several commands share


def add_command(
    commands: Commands, name: str, *, help: str, epilog: str, description: str = ""
) -> argparse.ArgumentParser:
    """Add the command ``name``. Its own help begins with ``help``, then has ``description``."""
    summary = f"{help[0].upper()}{help[1:]}. {description}".strip()
    added: argparse.ArgumentParser = commands.add_parser(
        name, help=help, epilog=epilog, description=summary
    )
    return added


def help_of(name: str) -> str:
    """Help of the config key ``name`` for argparse, with its default."""
    field = next(f for f in fields(RunConfig) if f.name == name)
    text = str(field.metadata["help"]).replace("%", "%%")
    if field.default is MISSING or field.default is None or isinstance(field.default, bool):
        return text
    return f"{text} (default: {field.default})"


def add_run(command: argparse.ArgumentParser) -> None:
    """Add the positional argument ``RUN``."""
    command.add_argument("run", metavar="RUN", help=RUN)


def add_json(
    command: argparse.ArgumentParser, help: str = "print the result as JSON instead of text"
) -> None:
    """Add ``--json``, which prints the result as JSON."""
    command.add_argument("--json", action="store_true", help=help)


def add_quiet(command: argparse.ArgumentParser) -> None:
    """Add ``--quiet``."""
    command.add_argument(
        "--quiet",
        action="store_true",
        help="show no progress; warnings and errors are still shown",
    )


def add_model_flags(command: argparse.ArgumentParser) -> None:
    """Add ``--model`` and the flags that allow a model to run code."""
    command.add_argument(
        "--model",
        help="folder, GGUF file or hub name of the run's model, if it has moved since the run "
        "(default: where it was)",
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help=help_of("trust_remote_code")
    )
    command.add_argument("--allow-pickle", action="store_true", help=help_of("allow_pickle"))


def add_query_timeout(command: argparse.ArgumentParser, default_s: float) -> None:
    """Add ``--timeout``, the time limit of each query, in seconds."""
    command.add_argument(
        "--timeout",
        type=float,
        default=default_s,
        metavar="S",
        help=f"time limit of each query, in seconds (default: {default_s:g})",
    )


def add_memory_limit(command: argparse.ArgumentParser) -> None:
    """Add ``--memory-limit``."""
    command.add_argument(
        "--memory-limit",
        type=memory_size,
        default="2GB",
        help="memory that DuckDB may use: a size, or a percentage of this machine's memory "
        "(default: 2GB)",
    )


def add_threads(command: argparse.ArgumentParser) -> None:
    """Add ``--threads``."""
    command.add_argument(
        "--threads", type=int, help="number of threads of DuckDB (default: one per core)"
    )


def add_min_age(command: argparse.ArgumentParser, help: str) -> None:
    """Add ``--min-age-h``, in hours."""
    command.add_argument("--min-age-h", type=float, default=24.0, metavar="H", help=help)


# --- values of several arguments


def open_run(args: argparse.Namespace) -> Run:
    """The run that ``args`` name, beside its baseline, with their limits of memory and time."""
    from afn_ray.query import database

    return database.open_run(
        args.run,
        baseline=args.baseline,
        memory_limit=args.memory_limit,
        threads=args.threads,
        timeout_s=args.timeout,
    )
