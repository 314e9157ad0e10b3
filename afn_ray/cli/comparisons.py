"""The subcommands of ``afn`` that compare runs: the flags of each, and its call."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from afn_ray.cli import arguments
from afn_ray.cli.arguments import READ_EPILOG, Commands, local_file, positive
from afn_ray.store import disk
from afn_ray.text import printable


def add_compare(commands: Commands) -> None:
    compare = arguments.add_command(
        commands,
        "compare",
        help="show what changed between two runs: quartiles, classes, types and sources",
        epilog=READ_EPILOG,
    )
    compare.add_argument("run_a", metavar="RUN_A", help=f"the baseline: {arguments.RUN}")
    compare.add_argument(
        "run_b", metavar="RUN_B", help=f"the run to compare with it: {arguments.RUN}"
    )
    compare.add_argument(
        "--json", metavar="FILE", type=local_file, help="write the comparison to FILE as JSON too"
    )
    compare.add_argument(
        "--ranks-only",
        action="store_true",
        help="compare ranks and shares, but no raw strengths; this is the only way to compare runs "
        "of different measures",
    )
    compare.add_argument(
        "--layers",
        metavar="A:B",
        help="compare a layer of A with a layer of B word by word, by ranks and shares: numbers or "
        "shares of the depth, as in 8:4 or 2/3:2/3; models, tokenizers and depths may differ, and "
        "A and B may be one run",
    )
    arguments.add_query_timeout(compare, default_s=600.0)


def add_history(commands: Commands) -> None:
    history = arguments.add_command(
        commands,
        "history",
        help="show the nights of a series: figures, distances from the baseline, verdicts",
        epilog=READ_EPILOG,
        description="There is a line for each complete run of the series. --json also has layers, "
        "groups and classes; so has the view history of 'afn sql'.",
    )
    history.add_argument("store", metavar="STORE", help="URI of a store")
    history.add_argument(
        "--series",
        metavar="NAME",
        help="series to show (default: that of the store's latest complete run)",
    )
    history.add_argument(
        "--layer", type=int, help="layer to show (default: the deepest that was recorded)"
    )
    history.add_argument(
        "--last",
        type=positive,
        default=30,
        metavar="N",
        help="largest number of nights, the newest (default: 30)",
    )
    arguments.add_json(history)


def call_compare(args: argparse.Namespace) -> None:
    from afn_ray.reduce import compare
    from afn_ray.show import comparison_tables

    if args.layers is not None:
        _compare_layers(args)
        return
    found = compare.compare(args.run_a, args.run_b, ranks_only=args.ranks_only)
    if args.json:
        _write_json(args.json, compare.to_json(found))
    comparison_tables.render_comparison(found, Console(highlight=False))


def _compare_layers(args: argparse.Namespace) -> None:
    from afn_ray.analysis import layers
    from afn_ray.show import layer_tables

    found = layers.compare_layers(args.run_a, args.run_b, args.layers, timeout_s=args.timeout)
    if args.json:
        _write_json(args.json, layers.to_json(found))
    layer_tables.render(found, Console(highlight=False))


def _write_json(path: Path, body: dict[str, object]) -> None:
    with disk.write_local(path) as file:
        file.write((json.dumps(body, indent=1, allow_nan=False) + "\n").encode())


def call_history(args: argparse.Namespace) -> None:
    from afn_ray.reduce import history
    from afn_ray.show import history_table

    found = history.of_store(args.store, args.series, args.last)
    if args.json:
        print(json.dumps(history_table.to_json(found), indent=1, allow_nan=False))
        return
    for line in history_table.lines(found, args.layer):
        print(printable(line))
