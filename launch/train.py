"""Train. `accelerate launch launch/train.py --config configs/recipes/....yaml`; without arguments, the quickstart."""

import sys
from pathlib import Path

from amltrain.config import parse_config
from amltrain.errors import one_line_errors

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"


def main() -> None:
    with one_line_errors():
        config = parse_config(sys.argv[1:] or ["--config", str(QUICKSTART)])
        from amltrain.training.trainer import train  # after the arguments are known to be good: torch takes a while

        train(config)


if __name__ == "__main__":
    main()
