"""Faults that a test plants in the processes of a run before it starts: `launch(..., before=partial(FAULT, ...))`.

Every function changes the code of the process that it is called in, so that the fault strikes at one certain moment.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from amltrain import run_folder as checkpoints
from amltrain.data.dataset import ReferDataset
from amltrain.evaluation import evaluator
from amltrain.methods.aml.method import AML
from amltrain.training import trainer
from amltrain.training.trainer import Trainer

SAVE_MOMENTS = ("opened", "state written", "model written", "manifest written", "renamed", "linked", "pruned")
SCORE_MOMENTS = ("scores written", "scored")


def die() -> None:
    """As by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(moment: str, number: int) -> None:
    """Die in the `number`-th save (from 1) of the main process, after `moment` of SAVE_ or SCORE_MOMENTS."""
    owner, name = {
        "opened": (checkpoints, "_make_room"),
        "state written": (trainer, "write_model_folder"),
        "model written": (trainer, "write_model_folder"),
        "manifest written": (checkpoints, "_rename"),
        "renamed": (checkpoints, "point"),
        "linked": (checkpoints, "prune"),
        "pruned": (checkpoints, "prune"),
        "scores written": (checkpoints, "_replace_manifest"),
        "scored": (checkpoints, "_replace_manifest"),
    }[moment]
    after = moment in ("opened", "model written", "pruned", "scored")
    _on_call(owner, name, number, die, after=after)


def signal_in_evaluation(number: int, batch: int) -> None:
    """Send the process a signal while it scores the `batch`-th batch (from 1)."""
    _on_call(evaluator, "count_pixels", batch, lambda: os.kill(os.getpid(), number))


def signal_in_micro_batch(number: int, forward: int) -> None:
    """Send the process a signal in AML's `forward`-th forward pass (from 1)."""
    _on_call(AML, "forward", forward, lambda: os.kill(os.getpid(), number))


def nan_images(steps: Sequence[int], everywhere: bool = True) -> None:
    """The first image of these optimizer steps (from 1) is NaN; on all processes, or on the last one alone."""
    if not everywhere and int(os.environ.get("RANK", "0")) != int(os.environ.get("WORLD_SIZE", "1")) - 1:
        return
    sound = Trainer._optimizer_step

    def step(self: Trainer, batches: list[Any]) -> Any:
        if self.progress.step + 1 in steps:
            batches[0].image[0] = torch.nan
        return sound(self, batches)

    Trainer._optimizer_step = step  # type: ignore[method-assign]


def unreadable_image(index: int) -> None:
    """The file of this training sample's image is cut off, as the loader processes, forked later, see it."""
    sound = ReferDataset._decode

    def decode(self: ReferDataset, number: int, row: int, decoder: Any) -> Any:
        opened = self.splits[number]
        of_sample = opened.split == "train" and row == self._place(index)[1]
        if of_sample and torch.utils.data.get_worker_info() is not None:
            whole = opened.rows.image_bytes(row)
            opened.rows.image_bytes = lambda wanted: whole[: len(whole) // 2]  # type: ignore[method-assign]
        return sound(self, number, row, decoder)

    ReferDataset._decode = decode  # type: ignore[method-assign]


def ask_to_stop(step: int) -> None:
    """The last process alone is asked to stop in this optimizer step (from 1)."""
    sound = Trainer._optimizer_step

    def asked(self: Trainer, batches: list[Any]) -> Any:
        if self.progress.step + 1 == step and self.accelerator.is_last_process:
            self.run.preemption.reason = "a test"
        return sound(self, batches)

    Trainer._optimizer_step = asked  # type: ignore[method-assign]


def out_of_memory(step: int) -> None:
    """The device's memory is full in this optimizer step."""

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    _on_call(Trainer, "_optimizer_step", step, fail)


def full_disk(number: int, size: int = 200_000) -> None:
    """From the `number`-th save on no file can grow over `size` bytes; the system says so, as a full disk would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _on_call(checkpoints, "_make_room", number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def read_only(output: Path, step: int) -> None:
    """The output folder is on a disk that the system makes read-only in this optimizer step."""

    def remount() -> None:
        _mount(str(output), str(output), MS_BIND)
        _mount(None, str(output), MS_BIND | MS_REMOUNT | MS_RDONLY)

    _own_mounts()
    _on_call(Trainer, "_optimizer_step", step, remount)


def small_shared_memory(kilobytes: int) -> None:
    """The process and its loaders have a /dev/shm of this size, as docker gives it."""
    _own_mounts()
    _mount("tmpfs", "/dev/shm", 0, "tmpfs", f"size={kilobytes}k")


def full_shared_memory(step: int) -> None:
    """Another program fills /dev/shm in this optimizer step."""

    def fill() -> None:
        with suppress(OSError), open("/dev/shm/fill", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    small_shared_memory(64 * 1024)
    _on_call(Trainer, "_optimizer_step", step, fill)


def no_more_files(step: int) -> None:
    """From this optimizer step on the process may open no further file."""

    def limit() -> None:
        with open(os.devnull) as next_file:
            resource.setrlimit(resource.RLIMIT_NOFILE, (next_file.fileno(), next_file.fileno()))

    _on_call(Trainer, "_optimizer_step", step, limit)


def few_open_files(limit: int) -> None:
    """The process is started where `ulimit -n` is this."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def clock_jump(step: int, seconds: float) -> None:
    """The clock is set to another time in this optimizer step; the monotonic one does not change, as on Linux."""
    sound = time.time

    def jump() -> None:
        time.time = lambda: sound() + seconds

    _on_call(Trainer, "_optimizer_step", step, jump)


MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, CLONE_NEWNS = 1, 32, 4096, 16384, 1 << 18, 0x20000


def _own_mounts() -> None:
    """What is mounted from here on, this process and its children alone see. Needs the rights of root."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    _mount(None, "/", MS_REC | MS_PRIVATE)


def _mount(source: str | None, target: str, flags: int, kind: str | None = None, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    if ctypes.CDLL(None, use_errno=True).mount(texts[0], texts[1], texts[2], flags, texts[3]):
        raise OSError(ctypes.get_errno(), f"mount {target}")


def may_mount() -> bool:
    """Whether the faults that mount something can be planted here."""
    process = multiprocessing.get_context("fork").Process(target=_own_mounts)
    process.start()
    process.join()
    return process.exitcode == 0


def kill_a_loader(step: int) -> None:
    """A data loading process dies in this optimizer step, as by the system's memory guard."""

    def kill() -> None:
        children = multiprocessing.active_children()
        os.kill(children[0].pid, signal.SIGKILL)  # type: ignore[arg-type]

    _on_call(Trainer, "_optimizer_step", step, kill)


def _on_call(owner: Any, name: str, number: int, action: Callable[[], None], *, after: bool = False) -> None:
    """Do `action` before (or after) the `number`-th call of a function."""
    sound, calls = getattr(owner, name), [0]

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == number and not after:
            action()
        result = sound(*arguments, **keywords)
        if calls[0] == number and after:
            action()
        return result

    setattr(owner, name, wrapped)
