"""What AML costs, side by side with the baseline: `python launch/benchmark.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # not launch/: its evaluate.py would hide the evaluate library
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from amltrain.commands.benchmark import main

    main()
