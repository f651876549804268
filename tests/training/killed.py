"""kill -9 at three random moments of a 200-step run, by the command that a user types: python -m tests.training.killed

Slow (every start imports everything); tests.training.faults does the same and more in forked processes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from amltrain import run_folder as checkpoints
from tests.training import runs
from tests.training.faults import draw_scenes

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, SAVES_EVERY = 200, 20


def start(prepared: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", "configs/accelerate/cpu.yaml", "launch/train.py"]
    command += runs.arguments(prepared, output, "--train.max_steps", str(STEPS), "--checkpoint.keep", "2")
    command += ["--checkpoint.every_steps", str(SAVES_EVERY), "--evaluation.every_steps", "100", "--data.workers", "1"]
    command += ["--train.global_batch_size", "2"]
    with output.with_name(f"{output.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    moments = random.Random(parser.parse_args().seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared, whole, killed = draw_scenes(folder), folder / "whole", folder / "killed"
        if start(prepared, whole).wait():
            sys.exit((folder / "whole.log").read_text()[-4000:])
        for step in sorted(moments.sample(range(1, STEPS), 3)):
            run = start(prepared, killed)
            while len(runs.losses(killed)) < step and run.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.random() * 0.3)
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            done, newest = len(runs.losses(killed)), checkpoints.checkpoints(killed)[-1:]
            print(f"killed after step {done}; the newest checkpoint is {newest[0].name if newest else 'none'}")
        if start(prepared, killed).wait():
            sys.exit((folder / "killed.log").read_text()[-4000:])
        same = runs.same_weights(whole, killed) and runs.losses(whole) == runs.losses(killed)
        print("weights and losses are the same, bit for bit" if same else "weights or losses DIFFER")
    sys.exit(not same)


if __name__ == "__main__":
    main()
