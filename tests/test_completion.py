"""The shell completes commands, flags, choices and shipped configs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("amltrain tra", "train"),
        ("amltrain train --train.max_s", "--train.max_steps"),
        ("amltrain train --data.train_unit ref", "referent"),
        ("amltrain train --config recipes/rela/grefcoco_5k_", "recipes/rela/grefcoco_5k_aml"),
        ("amltrain train --model.name caris_sw", "caris_swin_tiny"),
        ("amltrain train --method mask", "maskris"),
        ("amltrain evaluate --check", "--checkpoint"),
        ("amltrain data prep", "prepare"),
        ("amltrain predict --sentence", "--sentence"),
    ],
)
def test_it_completes(line: str, expected: str, tmp_path: Path) -> None:
    told = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    subprocess.run([sys.executable, "-m", "amltrain"], env=os.environ | told, capture_output=True, check=True)
    assert expected in (tmp_path / "out").read_text().split()
