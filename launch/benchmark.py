"""Measure training steps (`python launch/benchmark.py --help`), loading (`loader`), everything (`--suite gpu`)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # not launch/: its evaluate.py would hide the evaluate library
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from benchmarks.command import main

    main()
