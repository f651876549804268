"""Segment the object that a sentence refers to: `python launch/predict.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # not launch/: its evaluate.py would hide the evaluate library
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from amltrain.cli import run

    run("predict", sys.argv[1:])
