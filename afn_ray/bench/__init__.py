"""``afn bench``: define its command line, check the arguments and call the benchmark."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console

from afn_ray.errors import ConfigError
from afn_ray.store import disk

PROFILES = {
    "short": "lognormal, mean 40 tokens",
    "mixed": "lognormal, mean 150 tokens, some longer than a window",
    "full": "full windows",
}
VARIANTS = {
    "loop": "the Hugging Face loop a user writes: float32, padded, batches of 32, all hidden "
    "states",
    "tuned": "the best-tuned padded pipeline: stopped at the layer, sorted by length, a budget of "
    "tokens",
    "ray_data": "Ray Data map_batches with `tuned` inside, from the first batch on, its actors "
    "loaded",
    "sentence_transformers": "token embeddings of sentence-transformers: float32, padded, all "
    "layers",
    "engine": "afn-ray: texts in memory -> strengths in memory",
    "job": "afn-ray: JSONL files -> Parquet, committed; workers loaded and shards planned, as "
    "within a long run",
}
TOKENS_PER_WORKER = {"cpu": 16_300, "cuda": 1_000_000}
"""Default number of tokens of each profile's texts, per worker, by device.

The CPU value nearly fills eight batches of 2,048 tokens: a partly filled batch weighs more here
than in a long run.
"""
LEAST_S = {"cpu": 0.0, "cuda": 30.0}
"""Shortest timed measurement of a pipeline, in seconds, by device.

On a GPU the model waits about a second for the first texts to be tokenized. 1,000,000 tokens may
take less than that, so they are measured again and again without a pause. On a CPU the model is the
slow part, and begins at once.
"""
MOST_GROWTH = 20
"""Largest factor by which a measurement is longer than the one that was too short."""
LEAST = {
    "tokens": 16,
    "workers": 1,
    "batch_tokens": 16,
    "tokenizer_workers": 0,
    "repeat": 1,
    "texts": 1,
}
"""Smallest valid value of each numeric argument, by name."""
PIPED_COLUMNS = 100
"""Width of a result whose output is not a terminal, in columns."""
BUILT_IN_TOKENIZER = "WordPiece of made-up words"
"""Name, in results, of the tokenizer that ``feed`` measures without ``--model``."""
BUILT_IN = "BERT-base shape, random weights"
"""Name, in results, of the model that is measured without ``--model``."""


def more_passes(passes: int, seconds: float, least_s: float) -> int:
    """Passes that take ``least_s``, a little more, or not yet, where
    ``passes`` took ``seconds``.
    """
    return math.ceil(passes * min(MOST_GROWTH, 1.1 * least_s / seconds))


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Sub-commands of a parser; argparse has no public name for their type."""


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands of ``afn bench`` to ``parser``."""
    commands = parser.add_subparsers(
        required=True,
        metavar="WHAT",
        dest="what",
        help="benchmark to run: engine, feed, monitor or rate",
    )
    _add_engine(commands)
    _add_feed(commands)
    _add_monitor(commands)
    _add_rate(commands)


def _add_engine(commands: Commands) -> None:
    """Add the sub-command ``engine`` to ``commands``."""
    engine = commands.add_parser(
        "engine",
        allow_abbrev=False,
        help="compare the speed of this engine with other ways to measure the same strengths",
        description="Compare the speed of this engine with other ways to measure the same "
        "strengths: the variants. Each variant has its own processes and is loaded before the "
        "clock starts. The variants run in turns, one at a time. The figures are medians over the "
        "repetitions that no other process disturbed.",
    )
    engine.add_argument(
        "--profiles",
        metavar="LIST",
        default=",".join(PROFILES),
        help=f"profiles of texts to measure (default: {','.join(PROFILES)})",
    )
    engine.add_argument(
        "--variants",
        metavar="LIST",
        default=",".join(VARIANTS),
        help=f"variants to compare (default: {','.join(VARIANTS)})",
    )
    engine.add_argument(
        "--layer", default="2/3", help="layer to read, or a fraction of the depth (default: 2/3)"
    )
    cpu, cuda = TOKENS_PER_WORKER.values()
    engine.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"tokens in the texts of a profile (default: {cpu:,} per core, {cuda:,} per GPU)",
    )
    engine.add_argument(
        "--workers", type=int, metavar="N", help="processes of each variant (default: one per core)"
    )
    engine.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="tokens in one forward pass, except in the loops (default: as in a run)",
    )
    engine.add_argument(
        "--tokenizer-workers",
        type=int,
        metavar="N",
        help="tokenizer processes beside each process of afn-ray (default: as in a run)",
    )
    engine.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="number type of all variants except the loops; auto: the first that a run would try",
    )
    engine.add_argument(
        "--repeat",
        type=int,
        default=3,
        metavar="N",
        help="repetitions of each measurement (default: 3)",
    )
    add_model_flags(engine)
    add_json_flag(engine)


def _add_monitor(commands: Commands) -> None:
    """Add the sub-command ``monitor`` to ``commands``."""
    monitor = commands.add_parser(
        "monitor",
        allow_abbrev=False,
        help="measure the latency of one text at a time, with and without recording strengths",
        description="Measure the latency of one text at a time, with and without recording "
        "strengths. Each batch is one text, and the two ways run in turns. Without --model, "
        "BERT-base is compared with a distilled shape.",
    )
    monitor.add_argument(
        "--layer", default="2/3", help="layer to record, or a fraction of the depth (default: 2/3)"
    )
    monitor.add_argument(
        "--texts",
        type=int,
        default=50,
        metavar="N",
        help="number of texts of each length (default: 50)",
    )
    add_model_flags(monitor)
    add_json_flag(monitor)


def _add_rate(commands: Commands) -> None:
    """Add the sub-command ``rate`` to ``commands``."""
    rate = commands.add_parser(
        "rate",
        allow_abbrev=False,
        help="measure the speed of one worker on the texts of a run, for 'afn run "
        "--dry-run --rate'",
        description="Measure the speed of one worker on the texts of a run. The worker processes "
        "whole shards, from JSONL to committed Parquet; on a CPU it uses one core. Nothing is "
        "written to the run's store.",
    )
    rate.add_argument(
        "config",
        metavar="RUN_TOML",
        type=Path,
        help="TOML file of the run, as for 'afn run --config'",
    )
    cpu, _ = TOKENS_PER_WORKER.values()
    rate.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"approximate number of tokens to measure (default: {3 * cpu:,}, on a GPU what takes "
        f"{LEAST_S['cuda']:.0f} s)",
    )
    rate.add_argument(
        "--repeat",
        type=int,
        default=3,
        metavar="N",
        help="repetitions of the measurement (default: 3)",
    )
    add_json_flag(rate)


def _add_feed(commands: Commands) -> None:
    """Add the sub-command ``feed`` to ``commands``."""
    feed = commands.add_parser(
        "feed",
        allow_abbrev=False,
        help="measure the speed of a worker whose model answers at once",
        description="Measure the speed of a worker whose model answers at once, with 0, 1, 2 ... "
        "tokenizer processes. The worker processes whole shards, from JSONL to committed Parquet. "
        "The figures are its tokens per second, and the CPU time per token of each stage around "
        "the model. No GPU is used.",
    )
    feed.add_argument(
        "--model", help=f"model whose tokenizer is used (default: {BUILT_IN_TOKENIZER})"
    )
    feed.add_argument(
        "--corpus",
        nargs="+",
        default=[],
        metavar="URI",
        help="files, folders or globs with texts in the column text (default: made-up texts)",
    )
    feed.add_argument(
        "--processes",
        type=_counts,
        default="0,1,2",
        metavar="LIST",
        help="numbers of tokenizer processes to measure (default: 0,1,2)",
    )
    tokens = TOKENS_PER_WORKER["cuda"]
    feed.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"approximate number of tokens to measure (default: {tokens:,})",
    )
    feed.add_argument("--repeat", type=int, default=3, metavar="N", help="repetitions (default: 3)")
    add_json_flag(feed)


def _counts(text: str) -> list[int]:
    """The whole numbers in the comma-separated ``text``. Raises ``ArgumentTypeError``."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers like 0,1,2")
    return sorted({int(part) for part in parts})


def add_model_flags(command: argparse.ArgumentParser) -> None:
    """Add ``--model`` and ``--device`` to ``command``."""
    command.add_argument("--model", help=f"model folder or hub name (default: {BUILT_IN})")
    command.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device to measure on; auto: a GPU if there is one, else the CPU",
    )


def add_json_flag(command: argparse.ArgumentParser) -> None:
    """Add ``--json`` to ``command``."""
    command.add_argument(
        "--json", metavar="FILE", type=Path, help="file to which the figures are written"
    )


def check(args: argparse.Namespace, least_of: Mapping[str, int]) -> None:
    """Check the numeric arguments against ``least_of``, and that the folder of ``--json`` exists.

    Raises ``ConfigError``.
    """
    for name, least in least_of.items():
        if (value := getattr(args, name, None)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected at least {least}")
    # Checked before the measurement, which may take ten minutes.
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {args.json}: there is no folder {args.json.absolute().parent}")


def consoles() -> tuple[Console, Callable[[str], None]]:
    """The console for results, and a function that prints a progress note to standard error."""
    console = Console(highlight=False)
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_COLUMNS)
    return console, lambda note: notes.print(note, markup=False)


def call(args: argparse.Namespace) -> None:
    """Run the benchmark that ``args`` select, print the result and write it to ``--json``.

    Raises ``ConfigError``.
    """
    check(args, LEAST)
    console, on_note = consoles()
    result: object
    if args.what == "monitor":
        from afn_ray.bench import monitor

        result = monitor.measure(args.model, args.layer, args.texts, args.device)
        monitor.render(result, console)
    elif args.what == "feed":
        from afn_ray.bench import feed

        result = feed.measure(
            args.model, args.corpus, args.processes, args.tokens, args.repeat, on_note
        )
        feed.render(result, console)
    elif args.what == "rate":
        from afn_ray.runs import precheck
        from afn_ray.store import settings

        config = settings.config_from({}, args.config)
        precheck.check_run(config)
        from afn_ray.bench import rate

        result = rate.measure(config, args.tokens, args.repeat, on_note)
        rate.render(result, console)
    else:
        profiles = chosen("profiles", args.profiles, PROFILES)
        variants = chosen("variants", args.variants, VARIANTS)
        from afn_ray.bench import contest, results

        options = contest.Options(
            args.model,
            args.layer,
            args.device,
            args.dtype,
            args.batch_tokens,
            args.tokenizer_workers,
            args.workers,
            args.tokens,
            args.repeat,
        )
        result = contest.measure(options, profiles, variants, on_note)
        results.render(result, console)
    if args.json is not None:
        write_json(args.json, result)


def chosen(what: str, text: str, known: dict[str, str]) -> list[str]:
    """The names in the comma-separated ``text``, in the order of ``known``.

    Raises ``ConfigError`` when there is no name or an unknown one; ``what`` names them in its
    message.
    """
    names = {name.strip() for name in text.split(",")} - {""}
    if not names or names - set(known):
        raise ConfigError(f"{what} are {text!r}; expected some of {', '.join(known)}")
    return [name for name in known if name in names]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON to ``path``, atomically. Raises ``ConfigError``."""
    with disk.write_local(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())
