"""The reduce alone as a Ray job: thresholds and vocabulary of what the store has, without workers
or a GPU.

    python jobs/reduce.py s3://bucket/run.toml

is ``afn run --reduce-only --config``: first the config that measured, a file or its URL, then any
flag of ``afn run``. Exit code 0: the run is complete; 1: shards are lacking, and it says how many;
2: the request is wrong; 75: it was stopped. On a cluster: ``ray job submit --working-dir . --
python jobs/reduce.py s3://bucket/run.toml``.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from afn_ray.cli import commands
    except ImportError as error:  # Python would leave with 1, which says that shards are lacking
        print(f"reduce: afn-ray cannot be imported here: {error}", file=sys.stderr)
        sys.exit(2)
    commands.command(["run", "--reduce-only", "--config", *sys.argv[1:]])
