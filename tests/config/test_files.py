"""Every mistake in a `--config` file is said with the file's name."""

from pathlib import Path

import pytest

from amltrain.commands.train import read_run
from amltrain.errors import UserError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"run\.yaml is empty"),
        (b"# nothing but this\n", r"run\.yaml is empty"),
        (b"output: \xff\xfe\n", r"run\.yaml is no text in UTF-8"),
        (b"- seed: 1\n", r"run\.yaml holds no keys"),
        (b"seed: 1\nmodel: {name: [\n", r"run\.yaml, line 3 is no YAML"),
        (b"seed: 1\noutput: a\nseed: 2\n", r"run\.yaml, line 3: seed is already given in line 1"),
        (b"model:\n  name: a\n  name: b\n", r"run\.yaml, line 3: model\.name is already given in line 2"),
        (b"aml: gone.yaml\n", r"run\.yaml, line 1, aml: could not read .*/gone\.yaml \(No such file"),
        (b"evaluation:\n  protocol: gone.yaml\n", r"run\.yaml, line 2, evaluation\.protocol: could not read .*/gone"),
        (b"model: part.yaml\n", r"part\.yaml, line 2: name is already given in line 1"),
    ],
)
def test_a_mistake_is_said_with_its_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    (tmp_path / "part.yaml").write_text("name: caris_tiny\nname: caris_swin_base\n")
    for arguments in (["--config", str(tmp_path / "run.yaml")], [f"--config={tmp_path / 'run.yaml'}", "--seed", "1"]):
        with pytest.raises(UserError, match=message) as error:
            read_run(arguments)
        assert "\n" not in str(error.value)


def test_a_key_may_come_again_in_another_group_or_file(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("seed: 1\ndata: {shapes: {seed: 2}}\nmodel: {kwargs: {seed: 3}}\n")
    (tmp_path / "two.yaml").write_text("seed: 4\n")
    config = read_run(["--config", str(tmp_path / "one.yaml"), "--config", str(tmp_path / "two.yaml")])
    assert (config.seed, config.data.shapes.seed, config.model.kwargs) == (4, 2, {"seed": 3})
