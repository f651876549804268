"""`amltrain COMMAND`: every command is found, and what is not understood is refused."""

import sys

import pytest

from amltrain import cli


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["amltrain", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself_and_refuses_unknown_flags(monkeypatch, capsys, command: str) -> None:
    assert run(monkeypatch, command, "--help") == 0
    assert "usage: " in capsys.readouterr().out
    assert run(monkeypatch, command, "--foo", "bar") == 2
    assert "error: " in capsys.readouterr().err


def test_an_unknown_command_suggests(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "benchmarks") == 2
    assert capsys.readouterr().err == "error: unknown command 'benchmarks'; did you mean benchmark?\n"
