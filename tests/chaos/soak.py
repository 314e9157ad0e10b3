"""A soak for as long as asked: ``python tests/chaos/soak.py --minutes 30 --seed 1``; the test
beside it is the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="for how long (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    args = parser.parse_args()
    environment = os.environ | {
        "AFN_SOAK_MINUTES": str(args.minutes),
        "AFN_SOAK_SEED": str(args.seed),
    }
    test = str(Path(__file__).with_name("test_soak.py"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-n0",
        "--timeout=0",
        "-m",
        "chaos",
        test,
    ]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
