"""What users can do nothing about is not printed."""

import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from amltrain.environment import NO_ACCELERATOR, hush_deepspeed

IMPORTED = """
from accelerate import Accelerator
from torch import nn
from amltrain.environment import hush_deepspeed
hush_deepspeed()
Accelerator(cpu=True).unwrap_model(nn.Linear(1, 1))
import sys
print("deepspeed" in sys.modules)
"""


def test_only_one_message_is_dropped() -> None:
    hush_deepspeed()
    logger = logging.getLogger("DeepSpeed")

    def passes(message: str) -> bool:
        return bool(logger.filter(logger.makeRecord("DeepSpeed", logging.WARNING, "file", 1, message, (), None)))

    assert not passes(f"{NO_ACCELERATOR} If you have GPU or other accelerator, we were unable to detect it.")
    assert passes("the gradient overflowed")


def test_the_library_still_says_it_so() -> None:
    spec = find_spec("deepspeed")
    if spec is None or spec.origin is None:
        pytest.skip("deepspeed is not installed")
    source = (Path(spec.origin).parent / "accelerator" / "real_accelerator.py").read_text(encoding="utf-8")
    assert f'"{NO_ACCELERATOR}' in source
    assert "from deepspeed.utils import logger as accel_logger" in source


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_unwrapping_a_model_prints_nothing() -> None:
    ended = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert (ended.stdout, NO_ACCELERATOR in ended.stderr) == ("True\n", False)
