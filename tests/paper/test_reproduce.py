"""`amltrain paper reproduce`: what it would run, what it writes, and one table made from nothing."""

import argparse
import json
from pathlib import Path

import pytest

from amltrain.commands.train import read_run
from amltrain.errors import UserError
from amltrain.paper.files import collect, latex_table, markdown_page, status_page, write_table
from amltrain.paper.plan import Command, Row, Run, Settings, Table, check_data, plan, run_folder
from amltrain.paper.reproduce import build_parser, main
from amltrain.paper.run_tables import reproduce, run_command
from amltrain.paper.tables import BY_NAME, TABLE_4, TABLE_5, TABLE_14, TABLES
from amltrain.run_folder import FINISHED_FILE

TINY = Settings("tiny", Path("out"), steps=8)
FULL = Settings("full", Path("out"))


def options(tmp_path: Path, *more: str) -> argparse.Namespace:
    return build_parser().parse_args(["table4", "--output", str(tmp_path), *more])


@pytest.mark.parametrize("name", ["table2", "gres", "table3", "table12"])
def test_tiny_trainings_are_runs_that_train_takes(name: str) -> None:
    for command in plan(BY_NAME[name], TINY):
        if command.name == "train":
            run = read_run(command.arguments)
            assert run.model.name.endswith("_tiny") and "shapes" in run.data.datasets[0]
            assert (run.train.stop_after or 1) <= run.train.max_steps <= 8


def test_tiny_keeps_method_and_options() -> None:
    commands = [read_run(c.arguments) for c in plan(TABLE_4, TINY) if c.name == "train"]
    assert [run.method_options.tau for run in commands] == [0.0, 0.2, 0.3, None] * 3
    assert {run.model.name for run in commands} == {"caris_tiny"}
    assert [run.data.datasets[0] for run in commands[::4]] == ["refshapes", "refshapes+", "refshapesg"]
    assert {run.train.max_steps for run in commands} == {8}
    short = [str(c) for c in plan(BY_NAME["table7"], TINY) if c.name == "train"]
    assert all("--train.max_steps 8 --train.stop_after 2 " in command for command in short)


def test_full_trains_into_the_recipes_folders() -> None:
    seeds = FULL._replace(seeds=(0, 1), flags=("--train.micro_batch_size", "4"), prepared="elsewhere")
    commands = [c for c in plan(TABLE_4, seeds) if c.name == "train"]
    runs = [read_run(c.arguments) for c in commands]
    names = [f"runs/paper/{name}_aml" for name in ("refcoco", "refcoco+", "refcocog")]
    assert [run.output for run in runs[3::4]] == [*names, *(f"{name}-seed-1" for name in names)]
    assert {(run.train.micro_batch_size, run.data.prepared) for run in runs} == {(4, "elsewhere")}
    assert str(commands[7]).startswith("amltrain train --config recipes/paper/refcoco+_aml --data.prepared elsewhere")
    followed = [read_run(c.arguments) for c in plan(TABLE_14, FULL) if c.name == "train"]
    lengths = [(run.train.stop_after, run.checkpoint.initial) for run in followed]
    assert lengths == [(None, False)] * 2 + [(10, True)] * 2


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    settings = TINY._replace(root=tmp_path)
    folder = run_folder(TABLE_4.rows[0].run, 0, settings)
    folder.mkdir(parents=True)
    assert not any(command.done for command in plan(TABLE_4, settings))
    (folder / FINISHED_FILE).touch()
    for stopped, done in (("3", False), ("null", True)):
        (folder / "config.yaml").write_text(f"train: {{stop_after: {stopped}}}\n")
        assert [command.done for command in plan(TABLE_4, settings)][:2] == [done, False]
    run_command(Command("evaluate", ("--foo",), done=True))  # does nothing
    with pytest.raises(UserError, match=r"`amltrain train --foo bar` ended with code 2"):
        run_command(Command("train", ("--foo", "bar"), done=False))


def test_missing_data_names_the_commands(tmp_path: Path) -> None:
    settings = FULL._replace(prepared=str(tmp_path / "prepared"))
    with pytest.raises(UserError) as caught:
        check_data(BY_NAME["table15"], settings)
    message = str(caught.value)
    assert "needs refcoco, refcoco+, refcocog" in message and "\n" not in message
    assert "amltrain data download refcoco refcoco+ refcocog coco --root data/refer" in message
    assert "amltrain data prepare --dataset refcoco refcoco+ refcocog --refer_root data/refer" in message
    check_data(BY_NAME["table15"], TINY)


def test_dry_run_prints_commands_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["table4", "table17", "--dry_run", "--output", str(tmp_path / "new"), "--flags", "--optim.lr", "0.1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 24
    assert all(line.startswith(("amltrain train ", "amltrain evaluate ")) for line in lines)
    assert lines[0].endswith("--optim.lr 0.1")
    assert not (tmp_path / "new").exists()


def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "name a table"),
        (["table99"], "unknown table"),
        (["table4", "--scale", "full", "--steps", "3"], "--steps must be at least 1"),
        (["table4", "--seeds", "1", "1"], "--seeds must be different"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_an_empty_table_shows_what_is_published(tmp_path: Path) -> None:
    settings = FULL._replace(root=tmp_path)
    content = collect(TABLE_4, settings, "amltrain paper reproduce table4")
    text = markdown_page(content)
    assert [row["ours"] for row in content["rows"]] == [[]] * 18
    assert "| tau 0.4, RefCOCO+ | refcoco+:testB/oIoU |     59.51 |    - |  not run |" in text
    assert r"\toprule" in latex_table(content) and "59.51" in latex_table(content)
    write_table(TABLE_4, settings, "amltrain paper reproduce table4")
    assert "| 0 of 18 |" in status_page(tmp_path)


def test_seeds_are_averaged() -> None:
    content = collect(TABLE_5, TINY._replace(seeds=(0, 1)), "command")
    bounds = [row for row in content["rows"] if row["measure"] == "distortion bound"]
    printed = [row for row in content["rows"] if row["measure"] == "JL error of the paper"]
    assert all(row["ours"][0] == pytest.approx(row["published"], abs=2e-4) for row in printed) and len(printed) == 3
    assert [len(row["ours"]) for row in bounds] == [2, 2, 2]
    assert bounds[0]["ours"][0] > bounds[1]["ours"][0] > bounds[2]["ours"][0] > 0
    assert "± 0.0000 (2)" in markdown_page(content)
    assert "tiny, not comparable" in markdown_page(content)


def test_a_table_is_made_from_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row of a score and one that is computed; the second call runs nothing."""
    table = Table(
        ("probe",),
        "Probe",
        "one row",
        (
            Row("tau 0.2", Run("paper/refcoco+_aml_tau_0.2"), {"refcoco+:val/oIoU": 66.99}),
            Row("bound", Run("paper/refcoco+_aml"), {"distortion bound": None}, "bound"),
        ),
    )
    args = options(tmp_path, "--steps", "1")
    reproduce([table], args)
    folder = tmp_path / "tiny-1-steps"
    content = json.loads((folder / "tables" / "probe.json").read_text())
    assert [len(row["ours"]) for row in content["rows"]] == [1, 1]
    assert content["rows"][0]["protocol"].startswith("refshapes+ val, ")
    page = (folder / "tables" / "probe.md").read_text()
    assert page.count("tiny, not comparable") == 2 and "66.99" in page
    assert (folder / "tables" / "probe.tex").is_file()
    assert "| 2 of 2 |" in (tmp_path / "status.md").read_text()
    log = folder / "runs" / "paper" / "refcoco+_aml_tau_0.2" / "log.jsonl"
    before = log.stat().st_mtime_ns
    capsys.readouterr()
    reproduce([table], args)
    assert log.stat().st_mtime_ns == before
    assert "$ amltrain" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"amltrain train .* ended with code 2"):  # another recipe's run in its folder
        reproduce([table], options(tmp_path, "--steps", "1", "--flags", "--optim.lr", "0.5"))
    with pytest.raises(UserError, match=r"amltrain train .* ended with code 2"):
        reproduce([table], options(tmp_path, "--steps", "1", "--flags", "--train.max_steps", "7"))


@pytest.mark.slow
def test_every_table_is_made_at_the_tiny_scale(tmp_path: Path) -> None:
    reproduce(TABLES, options(tmp_path, "--steps", "8"))  # an epoch, which Table 14 needs
    for table in TABLES:
        content = json.loads((tmp_path / "tiny-8-steps" / "tables" / f"{table.name}.json").read_text())
        missing = [
            f"{row['row']}: {row['measure']}"
            for row in content["rows"]
            if not row["ours"] and row["kind"] != "published"
        ]
        assert not missing, table.name
