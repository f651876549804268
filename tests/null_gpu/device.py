"""The null GPU: found beside the recorded tensors, built once, and put under the programs that are started here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import REPOSITORY, find_shared
from tests.training.runs import free_port


def missing() -> str | None:
    """Why there is no null GPU here; None when one can be built."""
    shared = find_shared()
    if shared is None or not (shared / "null_gpu" / "build.sh").is_file():
        return "the null GPU is not here (set AMLTRAIN_SHARED to the folder that contains null_gpu)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if shutil.which("cc") is None:
        return "there is no C compiler (cc) to build the null GPU with"
    return None


class NullGPU:
    """A library built in `folder`, and programs of Python that see it as their card."""

    def __init__(self, folder: Path) -> None:
        shared = find_shared()
        assert shared is not None
        self.source, self.built = folder / "source", folder / "built"
        for file in (shared / "null_gpu").rglob("*"):  # a copy: the build writes beside its sources
            if file.is_file():
                copy = self.source / file.relative_to(shared / "null_gpu")
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        environment = os.environ | {"OUT": str(self.built), "PYTHON": sys.executable}
        made = subprocess.run(["bash", self.source / "build.sh"], env=environment, capture_output=True, text=True)
        assert made.returncode == 0, f"the null GPU was not built\n{made.stdout}{made.stderr}"

    def environment(self, cards: int = 1) -> dict[str, str]:
        """The variables of a program that sees so many cards of 80 GiB."""
        hidden = ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES")
        return {key: value for key, value in os.environ.items() if key not in hidden} | {
            "NULLGPU": "1",
            "FAKE_CUDA_DEVICES": str(cards),
            "LD_PRELOAD": str(self.built / "libnullcuda.so"),
            "LD_LIBRARY_PATH": str(self.built),
            "PYTHONPATH": f"{self.source}:{REPOSITORY}",
            "PYTHONFAULTHANDLER": "1",  # an operation that the null GPU lacks ends the process: say where
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def run(self, *arguments: str | Path, seconds: float = 300) -> str:
        """`python ARGUMENTS` with one card; what it wrote. An exit code but 0 fails."""
        return self.run_on_cards(1, *arguments, seconds=seconds)[0]

    def run_on_cards(self, cards: int, *arguments: str | Path, seconds: float = 300) -> list[str]:
        """The same on so many cards, one process each, in torchrun's environment; what each of them wrote."""
        given = self.environment(cards)
        if cards > 1:
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            given |= {"WORLD_SIZE": str(cards), "LOCAL_WORLD_SIZE": str(cards)}
        programs = [
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                env=given | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if cards > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(cards)
        ]
        try:
            said = [program.communicate(timeout=seconds)[0] for program in programs]
        finally:
            for program in programs:
                program.kill()
                for left in Path("/dev/shm").glob(f"fknccl-{program.pid}-*"):  # the stand-in for NCCL leaves its memory
                    left.unlink()
        codes = [program.returncode for program in programs]
        assert not any(codes), f"exit codes {codes}\n" + "\n".join(text[-4000:] for text in said)
        return said
