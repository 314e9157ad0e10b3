"""The nightly audit as a Ray job: an increment, a comparison with an earlier run, and a verdict by
a policy.

    python jobs/nightly_audit.py run.toml --policy policy.toml --frozen --out /var/audit

is ``afn audit``; config and policy are files or their URLs. Exit code 0: the policy holds; 1: it is
broken; 2: the audit failed or was stopped, and the same command resumes it; 3: a limit could not be
judged, and none is broken. On a cluster: ``ray job submit --working-dir . -- python
jobs/nightly_audit.py s3://bucket/run.toml --policy s3://bucket/policy.toml ...``.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from afn_ray.cli import commands
    except ImportError as error:  # Python would leave with 1, which says that the policy is broken
        print(f"nightly_audit: afn-ray cannot be imported here: {error}", file=sys.stderr)
        sys.exit(2)
    commands.command(["audit", *sys.argv[1:]])
