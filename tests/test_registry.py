"""Plugins that cannot be loaded: what is said about them."""

from pathlib import Path

import pytest

from amltrain import registry
from amltrain.errors import UserError
from amltrain.registry import import_plugin

TAKEN = 'from amltrain import register_metric\nregister_metric("oIoU", "classic")(print)\n'


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_imported", {})
    monkeypatch.setattr(registry, "_broken", {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"import sys\nsys.exit(3)\n", "line 2: SystemExit: it ended the program"),
        (b"x = 1\ndef f(:\n", "line 2: SyntaxError"),
        (b"\xff\xfe\x00", "SyntaxError"),
        (TAKEN.encode(), "line 2: classic metric 'oIoU' is registered already"),
    ],
)
def test_a_plugin_that_fails_is_named_with_its_own_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_bytes(content)
    import_plugin(str(file))
    line = capsys.readouterr().err
    assert line.startswith(f"WARNING: plugin mine.py was not loaded: {file}") and said in line
    assert line.count("\n") == 1 and registry.imported_plugins() == []


def test_what_is_not_a_plugin_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x = 1\n")
    (tmp_path / "folder.py").mkdir()
    for name, said in (
        (str(tmp_path / "notes.txt"), "is not a Python file"),
        (str(tmp_path / "folder.py"), "is a folder"),
        (str(tmp_path / "none.py"), "does not exist"),
        (".mine", "is a relative name"),
    ):
        with pytest.raises(UserError, match=said):
            import_plugin(name)


def test_a_missing_module_inside_a_plugin_is_not_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine_of_today.py").write_text("import mine_of\n")
    import_plugin("mine_of_today")
    assert "line 1: ModuleNotFoundError: No module named 'mine_of'" in capsys.readouterr().err


def test_one_file_is_imported_once_and_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    files = [tmp_path / folder / "same_name.py" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text("class Own:\n    pass\n")
    for name in (files[0], files[1], tmp_path / "a" / ".." / "a" / "same_name.py"):
        import_plugin(str(name))
    modules = list(registry._imported.values())
    assert len(modules) == 2 and modules[0].Own.__module__ != modules[1].Own.__module__
