"""Planned studies: the shipped plans, what is run in which order, what is rejected, and a small study to its end."""

from pathlib import Path

import pytest
import yaml

from amltrain.api import read_config
from amltrain.errors import UserError
from amltrain.methods.aml.options import resolve
from benchmarks.masking import Cell, check_plan, main, merged, read_plan

PLANS = ["masking_shapes.yaml", "masking_photos.yaml"]


@pytest.mark.parametrize("name", PLANS)
def test_every_run_of_a_shipped_plan_is_a_config_that_can_work(name: str, repository: Path) -> None:
    plan = read_plan(repository / "benchmarks" / name)
    cells = list(plan.cells())
    assert len(cells) == len(set(cells)) == len(plan.conditions) * sum(arm["seeds"] for arm in plan.arms.values())
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    for condition in plan.conditions.values():
        for arm in plan.arms.values():
            own = {key: value for key, value in arm.items() if key not in ("seeds", "what")}
            run = read_config(merged(plan.common, condition, own))
            if run.method == "aml":
                settings = resolve(run.method_options)
                assert settings.share == 0.2 and not settings.clean_loss_weight
    assert {name for pair in plan.pairs for name in pair} <= set(plan.arms)


def test_nested_values_are_merged() -> None:
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}, "d": [4]}) == {"a": {"b": 1, "c": 3}, "d": [4]}


def small_plan(folder: Path) -> Path:
    shapes = {"train": 16, "evaluation": 4, "size": 64, "described": 8}
    common = {
        "model": {"name": "caris_tiny"},
        "preprocess": {"size": 64},
        "data": {"prepared": str(folder / "prepared"), "shapes": shapes, "workers": 0},
        "train": {"max_steps": 2, "global_batch_size": 4, "log_every": 1},
        "optim": {"warmup_steps": 1},
        "evaluation": {"splits": ["val"], "every_steps": 2, "pictures": 0, "best_metric": "mIoU"},
        "tracking": {"trackers": []},
        "aml": {"block": 16},
    }
    plan = {
        "question": "Does it run?",
        "metric": "mIoU",
        "rule": "None.",
        "common": common,
        "start": {},
        "conditions": {"clean": {}, "wrong": {"data": {"augment": ["label_noise"]}}},
        "arms": {
            "none": {"seeds": 2},
            "oracle": {"seeds": 2, "method": "aml", "aml": {"features": "oracle", "share": 0.25}},
        },
        "pairs": [["oracle", "none"]],
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


def test_a_study_goes_on_where_it_stopped_and_a_changed_plan_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, study = small_plan(tmp_path), tmp_path / "study"
    call = ["--plan", str(plan), "--folder", str(study)]
    main([*call, "--minutes", "0"])  # only the start
    assert "8 runs of this share are missing" in capsys.readouterr().out
    first = Cell("clean", "oracle", 1).folder(study)
    main([*call, "--share", "2/2"])
    written = (first / "results.json").read_bytes()
    assert not Cell("clean", "none", 1).folder(study).exists()
    main(call)
    assert (first / "results.json").read_bytes() == written
    capsys.readouterr()
    main([*call, "--report"])
    said = capsys.readouterr().out
    assert "### wrong" in said and said.count("| oracle - none") == 2 and "| images" not in said
    masked = [line.split("|")[-2].strip() for line in said.splitlines() if line.startswith("| oracle ")]
    assert masked == ["25.0", "25.0"]
    assert not list(first.glob("step-*"))
    plan.write_text(plan.read_text() + "# another plan\n")
    with pytest.raises(UserError, match="was changed after"):
        check_plan(read_plan(plan), study)


def test_what_a_user_may_get_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = small_plan(tmp_path)
    for share in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            main(["--plan", str(plan), "--folder", str(tmp_path / "s"), "--share", share])
        assert f"--share {share} is not a part" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("question: why\n")
    with pytest.raises(UserError, match=r"bad\.yaml has no metric"):
        read_plan(tmp_path / "bad.yaml")
