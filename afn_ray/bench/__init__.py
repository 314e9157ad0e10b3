"""``afn bench``: what it takes on the command line, checked, and handed to who measures."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from afn_ray.errors import ConfigError

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
"""On a CPU a little less than eight batches of 2,048: one that is partly filled weighs more here
than in a long run.
"""
PIPED_COLUMNS = 100
BUILT_IN = "BERT-base shape, random weights"


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of ``afn bench``."""
    commands = parser.add_subparsers(
        required=True,
        metavar="WHAT",
        dest="what",
        help="demo, engine, monitor, rate, reduce, safety, screen, signals, simulate or sql",
    )
    demo = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="time, memory and bytes per token of 'afn demo', and the same command again",
        description="Every repetition starts a fresh store in a temporary folder.",
    )
    demo.add_argument("--workers", type=int, metavar="N", help="workers (default: one per core)")
    demo.add_argument("--repeat", type=int, default=3, metavar="N", help="repetitions (default: 3)")
    engine = commands.add_parser(
        "engine",
        allow_abbrev=False,
        help="tokens per second of this engine and of what users write, interleaved",
        description="Every variant has its own processes, loaded before any clock starts; one runs at a time, in "
        "turns; reported are medians of the repetitions that nothing else on the machine "
        "disturbed.",
    )
    engine.add_argument(
        "--profiles", metavar="LIST", default=",".join(PROFILES), help=f"of {','.join(PROFILES)}"
    )
    engine.add_argument(
        "--variants", metavar="LIST", default=",".join(VARIANTS), help=f"of {','.join(VARIANTS)}"
    )
    engine.add_argument(
        "--layer", default="2/3", help="layer to read, or a fraction of the depth (default: 2/3)"
    )
    cpu, cuda = TOKENS_PER_WORKER.values()
    engine.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"of a profile's texts (default: {cpu:,} a core, {cuda:,} a GPU)",
    )
    engine.add_argument(
        "--workers", type=int, metavar="N", help="processes of a variant (default: one per core)"
    )
    engine.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help="in one forward pass, but for the loops (default: that of a run)",
    )
    engine.add_argument(
        "--tokenizer-workers",
        type=int,
        metavar="N",
        help="processes that tokenize, beside each of afn-ray's (default: that of a run)",
    )
    engine.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of all variants but the loops; auto: bfloat16 where it is faster",
    )
    engine.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="repetitions (default: 3)"
    )
    monitor = commands.add_parser(
        "monitor",
        allow_abbrev=False,
        help="latency of one text at a time, with and without recording strengths",
        description="Batches of one text, interleaved; without --model, BERT-base against a distilled shape.",
    )
    monitor.add_argument(
        "--layer", default="2/3", help="layer to record, or a fraction of the depth (default: 2/3)"
    )
    monitor.add_argument(
        "--texts", type=int, default=50, metavar="N", help="texts of each length (default: 50)"
    )
    rate = commands.add_parser(
        "rate",
        allow_abbrev=False,
        help="tokens per second of one worker at a run's own work, for --dry-run --rate",
        description="Whole shards of the run's own texts, from JSONL to committed Parquet, by one worker; on a CPU it "
        "keeps to one core. Nothing is written to the run's store.",
    )
    rate.add_argument(
        "config", metavar="RUN_TOML", type=Path, help="what to run: a file as of 'afn run --config'"
    )
    cpu, cuda = TOKENS_PER_WORKER.values()
    rate.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"about (default: {3 * cpu:,}, on a GPU {3 * cuda:,})",
    )
    rate.add_argument("--repeat", type=int, default=3, metavar="N", help="turns (default: 3)")
    reduce = commands.add_parser(
        "reduce",
        allow_abbrev=False,
        help="seconds and memory of the reduce of many shards, in different orders",
        description="Summaries are generated: Zipf's law over 30,522 types, lognormal strengths of each type. Every "
        "reduce has its own process and order; results are compared bit by bit.",
    )
    reduce.add_argument(
        "--shards", type=int, default=10_000, metavar="N", help="summaries (default: 10,000)"
    )
    reduce.add_argument(
        "--tokens",
        type=int,
        default=40_000,
        metavar="N",
        help="of a shard, in the mean (default: 40,000)",
    )
    reduce.add_argument(
        "--repeat", type=int, default=2, metavar="N", help="reduces by each executor (default: 2)"
    )
    safety = commands.add_parser(
        "safety",
        allow_abbrev=False,
        help="what a shard costs beside its tokens, and a finished run that is run again",
        description="Whole runs of an all but empty model over shards of one word each.",
    )
    safety.add_argument(
        "--shards", type=int, default=1000, metavar="N", help="shards (default: 1,000)"
    )
    safety.add_argument(
        "--store",
        metavar="URI",
        help="where stores are made, and left (default: a temporary folder)",
    )
    safety.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="repetitions (default: 3)"
    )
    screen = commands.add_parser(
        "screen",
        allow_abbrev=False,
        help="how well the screening of documents finds planted junk",
        description="Replaces 1 % of the King James verses by junk of six kinds, runs MiniLM over them (minutes), and "
        "compares the screening with an order by length and one by idf.",
    )
    screen.add_argument(
        "--store",
        metavar="URI",
        help="where the run is made, and left (default: a temporary folder)",
    )
    screen.add_argument("--seed", type=int, default=0, metavar="N", help="of the junk (default: 0)")
    signals = commands.add_parser(
        "signals",
        allow_abbrev=False,
        help="what each signal costs beside strength alone, and a sweep of all layers",
        description="Whole shards, from JSONL to committed Parquet, by one worker; on a CPU it keeps to one core.",
    )
    signals.add_argument(
        "--layer",
        default="2/3",
        help="layer k to record, or a fraction of the depth (default: 2/3)",
    )
    cpu, cuda = TOKENS_PER_WORKER.values()
    signals.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"of the texts (default: {cpu:,}, on a GPU {cuda:,})",
    )
    signals.add_argument("--repeat", type=int, default=5, metavar="N", help="turns (default: 5)")
    simulate = commands.add_parser(
        "simulate",
        allow_abbrev=False,
        help="what the driver of a huge run takes, and that it loses no shard",
        description="The real plan, dispatcher, status and reduce over workers and a clock that are fake, with "
        "crashes, lost nodes, hangs, want of memory and outages of the store. Each run has its own "
        "process.",
    )
    simulate.add_argument(
        "--shards", type=int, default=1_000_000, metavar="N", help="shards (default: 1,000,000)"
    )
    simulate.add_argument(
        "--workers", type=int, default=1000, metavar="N", help="workers (default: 1,000)"
    )
    simulate.add_argument(
        "--repeat", type=int, default=1, metavar="N", help="runs, each of its own luck (default: 1)"
    )
    sql = commands.add_parser(
        "sql",
        allow_abbrev=False,
        help="seconds and memory of questions to a large run, and of its reduce",
        description="A run is generated: Zipf's law over 30,522 types, lognormal strengths of each type, shards of two "
        "million tokens. Every reduce and question has its own process; the memory limit is that "
        "of 'afn sql', 2GB.",
    )
    sql.add_argument(
        "--rows",
        type=int,
        default=100_000_000,
        metavar="N",
        help="tokens of the run (default: 100,000,000, 0.5 GB in a temporary folder)",
    )
    sql.add_argument(
        "--repeat", type=int, default=3, metavar="N", help="times of each question (default: 3)"
    )
    for command in (engine, monitor, signals):
        command.add_argument("--model", help=f"model folder or hub name (default: {BUILT_IN})")
        command.add_argument(
            "--device",
            choices=("auto", "cpu", "cuda"),
            default="auto",
            help="auto takes a GPU when there is one",
        )
    for command in (demo, engine, monitor, rate, reduce, safety, screen, signals, simulate, sql):
        command.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")


def call(args: argparse.Namespace) -> None:
    """Measure what ``args`` ask for, print it, and write it to the file they name. Raises
    ``ConfigError``.
    """
    least_of = {
        "tokens": 16,
        "workers": 1,
        "batch_tokens": 16,
        "tokenizer_workers": 0,
        "repeat": 1,
        "texts": 1,
        "shards": 10 if args.what == "safety" else 1,
        "rows": 10_000,
    }
    for name, least in least_of.items():
        if (value := getattr(args, name, None)) is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected at least {least}")
    if (
        args.json is not None and not args.json.absolute().parent.is_dir()
    ):  # now, not after ten minutes
        raise ConfigError(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    console, notes = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPED_COLUMNS)
    if args.what == "demo":
        from afn_ray.bench import demo

        result = demo.measure(
            args.workers, args.repeat, lambda note: notes.print(note, markup=False)
        )
        demo.render(result, console)
    elif args.what == "monitor":
        from afn_ray.bench import monitor

        result = monitor.measure(args.model, args.layer, args.texts, args.device)
        monitor.render(result, console)
    elif args.what == "rate":
        from afn_ray.runs import precheck
        from afn_ray.store import settings

        config = settings.config_from({}, args.config)
        precheck.check_run(config)
        from afn_ray.bench import rate

        result = rate.measure(
            config, args.tokens, args.repeat, lambda note: notes.print(note, markup=False)
        )
        rate.render(result, console)
    elif args.what == "simulate":
        from afn_ray.bench import simulate

        result = simulate.measure(
            args.shards, args.workers, args.repeat, lambda note: notes.print(note, markup=False)
        )
        simulate.render(result, console)
    elif args.what == "reduce":
        from afn_ray.bench import reduce

        result = reduce.measure(
            args.shards, args.tokens, args.repeat, lambda note: notes.print(note, markup=False)
        )
        reduce.render(result, console)
    elif args.what == "safety":
        from afn_ray.bench import safety

        result = safety.measure(
            args.shards, args.store, args.repeat, lambda note: notes.print(note, markup=False)
        )
        safety.render(result, console)
    elif args.what == "screen":
        from afn_ray.bench import screen

        with tempfile.TemporaryDirectory(prefix="afn-bench-") as folder:
            result = screen.measure(
                args.store or folder, args.seed, lambda note: notes.print(note, markup=False)
            )
        screen.render(result, console)
    elif args.what == "signals":
        from afn_ray import model
        from afn_ray.bench import signals

        device = model.choose_device(args.device)
        result = signals.measure(
            args.model,
            args.layer,
            args.tokens or TOKENS_PER_WORKER[device],
            device,
            args.repeat,
            lambda note: notes.print(note, markup=False),
        )
        signals.render(result, console)
    elif args.what == "sql":
        from afn_ray.bench import sql

        result = sql.measure(args.rows, args.repeat, lambda note: notes.print(note, markup=False))
        sql.render(result, console)
    else:
        profiles = chosen("profiles", args.profiles, PROFILES)
        variants = chosen("variants", args.variants, VARIANTS)
        from afn_ray.bench import contest

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
        result = contest.measure(
            options, profiles, variants, lambda note: notes.print(note, markup=False)
        )
        contest.render(result, console)
    if args.json is not None:
        write_json(args.json, result)


def chosen(what: str, text: str, known: dict[str, str]) -> list[str]:
    """The names in the comma-separated ``text``, in the order of ``known``. Raises
    ``ConfigError``.
    """
    names = {name.strip() for name in text.split(",")} - {""}
    if not names or names - set(known):
        raise ConfigError(f"{what} are {text!r}; expected some of {', '.join(known)}")
    return [name for name in known if name in names]


def write_json(path: Path, value: Any) -> None:
    """``value`` in a file that appears whole. Raises ``ConfigError``."""
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
