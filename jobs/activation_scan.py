"""A whole run as a Ray job: plan, resume, process, reduce.

    python jobs/activation_scan.py s3://bucket/run.toml --workers 100

is ``afn run --config``: first the config, a file or its URL, then any flag of ``afn run``. Exit
code 0: the run is complete; 1: it ended with shards missing; 2: the request is wrong; 75: it was
stopped. The same command resumes it. On a cluster: ``ray job submit --working-dir . -- python
jobs/activation_scan.py s3://bucket/run.toml``.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from afn_ray.cli import commands
    except ImportError as error:  # Python would leave with 1, which says that shards are missing
        print(f"activation_scan: afn-ray cannot be imported here: {error}", file=sys.stderr)
        sys.exit(2)
    commands.command(["run", "--config", *sys.argv[1:]])
