"""Benchmarks: training steps (`python launch/benchmark.py --help`), data loading (`... benchmark.py loader --help`),
large data (`... benchmark.py scale --help`)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # not launch/: its evaluate.py would hide the evaluate library
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    if sys.argv[1:2] == ["loader"]:
        from amltrain.commands.benchmark_loader import main as loader_main

        loader_main(sys.argv[2:])
    elif sys.argv[1:2] == ["scale"]:
        from amltrain.commands.benchmark_scale import main as scale_main

        scale_main(sys.argv[2:])
    else:
        from amltrain.commands.benchmark import main

        main()
