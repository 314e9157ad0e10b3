"""Measurements: on a node of a cluster, as a Ray job, or in a checkout of the repository.

    python jobs/benchmark.py engine --json figures.json
    python jobs/benchmark.py monitor
    python jobs/benchmark.py feed
    python jobs/benchmark.py rate s3://bucket/run.toml --json rate.json

is ``afn bench``. A checkout has more, which live in tests/bench and are not shipped with a job:

    python jobs/benchmark.py audit                      alarms of each kind of limit
    python jobs/benchmark.py demo                       time, memory and bytes of 'afn demo'
    python jobs/benchmark.py groups --tokens 100000000  what groups add to a reduce
    python jobs/benchmark.py languages TAGGED           detected languages of short texts
    python jobs/benchmark.py lexicons TAGGED            closed-class words told from others
    python jobs/benchmark.py reduce --shards 10000      the reduce of many shards
    python jobs/benchmark.py safety --store s3://b/p    what a shard costs beside its tokens
    python jobs/benchmark.py screen                     planted junk that screening finds
    python jobs/benchmark.py signals                    what each signal costs
    python jobs/benchmark.py simulate --shards 100000   the driver of a huge run
    python jobs/benchmark.py sql                        questions to a large run

Exit code 0: measured; 2: the request is wrong. On a cluster it measures the node that has the job:

    ray job submit --working-dir . -- python jobs/benchmark.py engine
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
OF_A_CHECKOUT = (
    "audit",
    "demo",
    "groups",
    "languages",
    "lexicons",
    "reduce",
    "safety",
    "screen",
    "signals",
    "simulate",
    "sql",
)

if __name__ == "__main__":
    try:
        from afn_ray.cli import commands
    except ImportError as error:
        print(f"benchmark: afn-ray cannot be imported here: {error}", file=sys.stderr)
        sys.exit(2)
    if sys.argv[1:2] and sys.argv[1] in OF_A_CHECKOUT:
        if not (TESTS / "bench").is_dir():
            print(
                f"benchmark: {sys.argv[1]} is measured in a checkout of the repository alone: "
                f"there is no {TESTS / 'bench'}",
                file=sys.stderr,
            )
            sys.exit(2)
        sys.path.insert(0, str(TESTS))
        from bench.commands import command

        command(sys.argv[1:])
    commands.command(["bench", *sys.argv[1:]])
