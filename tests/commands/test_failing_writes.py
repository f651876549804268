"""Errors of the system while a command writes: a sentence, whole files, and a next call that ends well."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from amltrain.errors import UserError, one_line_errors
from amltrain.files import new_file, writing
from amltrain.inference.export import Program, save_program
from amltrain.inference.predict import PredictionFolder
from tests.training import failing_calls


@pytest.mark.parametrize(
    ("commands", "only"),
    [
        (["compare"], ""),
        pytest.param(["predict"], "", marks=pytest.mark.slow),
        pytest.param(["evaluate"], "", marks=pytest.mark.slow),
        pytest.param(["report", "export", "push"], "", marks=pytest.mark.slow),
    ],
)
def test_every_write_of_a_command_may_fail(tmp_path: Path, commands: list[str], only: str) -> None:
    library = failing_calls.build(tmp_path)
    if library is None:
        pytest.skip("there is no C compiler to build the library with")
    environment = {**os.environ, failing_calls.LIBRARY: str(library), "LD_PRELOAD": str(library)}
    command = [sys.executable, "-m", "tests.commands.failing_writes", "--only", only, "--commands", *commands]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 answered wrongly" in done.stdout and "right" in done.stdout


FAULTS = {
    "EIO": "the disk or the network file system fails: check it",
    "ESTALE": "the disk or the network file system fails: check it",
    "ETIMEDOUT": "the disk or the network file system fails: check it",
    "EDQUOT": "free up space",
    "ENOSPC": "free up space",
    "EROFS": "make it writable",
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("kind", ["system", "safetensors", "arrow"])
def test_an_error_names_the_file_and_what_helps(tmp_path: Path, name: str, kind: str) -> None:
    number = getattr(errno, name)
    error: Exception = OSError(number, os.strerror(number))
    if kind == "safetensors":
        error = SafetensorError(f"Error while serializing: I/O error: something (os error {number})")
    if kind == "arrow":
        error = OSError(f"Error writing bytes to file. Detail: [errno {number}] something")
    with (
        pytest.raises(UserError, match=rf"out\.json: .*; {FAULTS[name]}, or choose another --output$"),
        writing("out.json"),
    ):
        raise error


def test_what_is_no_error_of_the_system_stays_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="shape"), writing("out.json"):
        raise RuntimeError("a wrong shape")


def test_a_file_is_new_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    with new_file(path) as temporary:
        temporary.write_text("one")

    def fails() -> None:
        with new_file(path) as temporary:
            temporary.write_text("tw")
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(UserError, match="free up space"):
        fails()
    assert path.read_text() == "one" and [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_an_error_of_a_disk_that_nobody_named_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise OSError(errno.EIO, "Input/output error", "weights.bin")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: cannot read or write weights.bin: Input/output error; the disk")
    with pytest.raises(FileNotFoundError), one_line_errors():  # our own mistake keeps its trace
        raise FileNotFoundError(errno.ENOENT, "none", "x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_goes_to_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "amltrain", "list", "models"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "free up space" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_torch_says_why_a_program_was_not_written() -> None:
    """Its own writer ended the process (std::terminate) on the error of a file."""
    model = torch.nn.Linear(600, 600)
    exported = Program(torch.export.export(model, (torch.randn(2, 600),)), True, "")
    with pytest.raises(OSError, match="No space left"):
        save_program(exported, Path("/dev/full"))


def test_half_a_row_of_a_kill_is_left_out_and_a_failed_one_taken_back(tmp_path: Path) -> None:
    row = {"image": "a.png", "sentence": "red"}
    with PredictionFolder(tmp_path, ["a.png"], ["red"]) as output:
        output.add(row)
    whole = output.rows_file.read_bytes()
    output.rows_file.write_bytes(whole + b'{"image": "b.png", "sen')
    with PredictionFolder(tmp_path, ["c.png"], ["red"]):
        pass
    assert output.rows_file.read_bytes() == whole

    def fills() -> None:
        with PredictionFolder(tmp_path, ["c.png"], ["red"]) as output:
            output._file = Filling(output._file)
            output.add({"image": "c.png", "sentence": "red"})

    with pytest.raises(UserError, match="free up space"):
        fills()
    assert output.rows_file.read_bytes() == whole


class Filling:
    """A file on a disk that takes ten bytes more."""

    def __init__(self, file: object) -> None:
        self.file, self.left = file, 10

    def write(self, data: bytes) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left = 0
        return self.file.write(data[:10])

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def test_what_an_interrupted_evaluation_left_is_not_joined(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from amltrain.evaluation.prediction_files import PredictionWriter

    folder = tmp_path / "predictions"
    for form in ("rle", "masks"):
        old = folder / f".writing-{form}"
        old.mkdir(parents=True)
        (old / "1.jsonl").write_text('{"sample_id": 7, "ref_id": 1, "sent_id": 1}\n')
        Image.new("L", (2, 2)).save(old / "9_9.png")
        target = PredictionWriter(folder, form, Accelerator(cpu=True)).finish(folder / "val")
        left = [target.read_text()] if target.is_file() else [p.name for p in target.iterdir()]
        assert left in ([""], ["manifest.json"])
