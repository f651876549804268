"""`amltrain COMMAND`: every command is found, and what is not understood is rejected."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from amltrain import cli

REPOSITORY = Path(__file__).resolve().parents[1]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["amltrain", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself_and_rejects_unknown_flags(monkeypatch, capsys, command: str) -> None:
    assert run(monkeypatch, *command.split(), "--help") == 0
    assert "usage: " in capsys.readouterr().out
    assert run(monkeypatch, *command.split(), "--foo", "bar") == 2
    assert "error: " in capsys.readouterr().err


def test_an_unknown_command_suggests(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "evalute") == 2
    assert capsys.readouterr().err == "error: unknown command 'evalute'; did you mean evaluate?\n"
    assert run(monkeypatch, "data", "prepar") == 2
    assert capsys.readouterr().err == "error: unknown command of amltrain data 'prepar'; did you mean prepare?\n"


@pytest.mark.parametrize("old", cli.RENAMED)
def test_names_of_version_0_1_say_what_they_are_called_now(monkeypatch, capsys, old: str) -> None:
    assert run(monkeypatch, old, "--help") == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"`amltrain {old}` is now `amltrain {cli.RENAMED[old]}`")
    assert "usage: " in said.out


def test_a_group_lists_its_commands(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["amltrain", "data"])
    cli.main()
    assert "data prepare" in capsys.readouterr().out


HELP_OF_EVERY_COMMAND = """
import contextlib, io, sys
from amltrain import cli
for name in cli.COMMANDS:
    sys.argv = ["amltrain", *name.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            cli.main()
        except SystemExit as stopped:
            assert not stopped.code, name
    assert "usage: amltrain " + name in shown.getvalue(), name
    heavy = {"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)
    assert not heavy, f"amltrain {name} --help imports {sorted(heavy)}"
"""


def test_help_imports_no_heavy_library() -> None:
    """Each of them takes seconds to import; a command imports them after its arguments are parsed."""
    ended = subprocess.run([sys.executable, "-c", HELP_OF_EVERY_COMMAND], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


WRONG_MODELS = """
import contextlib, io, sys
from amltrain import cli
for line in (
    "demo --checkpoint nope",
    "evaluate --checkpoint nope",
    "export --checkpoint nope --output out",
    "predict --checkpoint nope --image a.jpg --sentence x",
    "report nope",
):
    sys.argv = ["amltrain", *line.split()]
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        try:
            cli.main()
        except SystemExit as stopped:
            assert stopped.code == 2, line
    assert shown.getvalue().startswith("error: no folder nope here"), shown.getvalue()
    assert shown.getvalue().count("\\n") == 1, shown.getvalue()
    assert "torch" not in sys.modules, f"amltrain {line} imports torch before it looks for the model"
"""


def test_a_model_that_is_not_there_is_rejected_before_torch_is_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRONG_MODELS]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert ended.returncode == 0, ended.stderr


def test_a_reader_that_has_enough_sees_no_traceback() -> None:
    """`amltrain list configs | head -1` closes the pipe while we print."""
    command = [sys.executable, "-m", "amltrain", "list", "configs"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""
