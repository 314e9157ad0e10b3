"""Measurements on a node of a cluster, as a Ray job.

    python jobs/benchmark.py engine --json figures.json
    python jobs/benchmark.py rate s3://bucket/run.toml --json rate.json
    python jobs/benchmark.py reduce --shards 10000
    python jobs/benchmark.py safety --store s3://bucket/prefix
    python jobs/benchmark.py simulate --shards 100000

is ``afn bench``, whose help lists what can be measured. Exit code 0: measured; 2: the request is
wrong. On a cluster: ``ray job submit --working-dir . -- python jobs/benchmark.py engine``; it
measures the node that has the job.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from afn_ray.cli import commands
    except ImportError as error:
        print(f"benchmark: afn-ray cannot be imported here: {error}", file=sys.stderr)
        sys.exit(2)
    commands.command(["bench", *sys.argv[1:]])
