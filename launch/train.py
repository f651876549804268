"""Train: `accelerate launch launch/train.py --config configs/recipes/NAME.yaml`; without arguments, the quickstart."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # not launch/: its evaluate.py would hide the evaluate library
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from amltrain.commands.train import main

    main()
