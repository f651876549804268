"""Score a trained model on splits of prepared data: `python launch/evaluate.py --help`.

Python puts a script's folder first on its path, so for every script in launch/ `import evaluate` finds this file in
place of the library of that name. It then takes the folder off the path and lets the library take its place.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != HERE]

if __name__ == "evaluate":
    del sys.modules["evaluate"]
    import evaluate  # noqa: F401 - the library

if __name__ == "__main__":
    from amltrain.commands.evaluate import main

    main()
