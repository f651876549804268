"""From a folder of annotations to a trained model and its report; random weights, because none are packaged here."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import amltrain
from amltrain.commands.finetune import main, own_settings
from amltrain.errors import UserError
from amltrain.finetune import FineTuned, finetune, look, prepare_data, verdict
from tests.data.sources.writers import Object, picture, write_cvat, write_labelme

SIZE = (48, 64)
OWN_WEIGHTS = {
    "model.vision_weights": None,
    "model.text_weights": None,
    "model.allow_random_frozen": True,
    "preprocess.tokenizer": "wordpiece",
    "preprocess.size": 64,
    "train.max_steps": 2,
    "tracking.trackers": [],
}


def things(left: int, *, sentence: str = "") -> list[Object]:
    """A cup and a ball beside each other."""
    found = []
    for label, x in (("cup", left), ("ball", left + 25)):
        mask = np.zeros(SIZE, np.uint8)
        mask[10:30, x : x + 15] = 1
        outline = [x, 10.0, x + 15, 10.0, x + 15, 30.0, x, 30.0]
        found.append(Object(label, mask, list(map(float, outline)), sentence and f"{sentence} {label}"))
    return found


def labelme(root: Path, count: int, *, sentence: str = "") -> Path:
    root.mkdir()
    for number in range(count):
        name = f"photo{number}.png"
        write_labelme(root, f"photo{number}", SIZE, things(number, sentence=sentence), imagePath=name, imageData=None)
        picture(SIZE, number).save(root / name)
    return root


def test_a_folder_becomes_a_model_with_two_scores_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = labelme(tmp_path / "my photos", 8)
    done = amltrain.finetune(folder, model="caris_lite", settings=OWN_WEIGHTS)
    assert isinstance(done, FineTuned) and done.report.stat().st_size > 10_000
    assert done.run == Path("runs/my-photos") and (done.run / "best").exists()
    assert {r.split for r in (done.results, done.shuffled)} == {"val"}
    assert done.shuffled.alteration and not done.results.alteration
    written = yaml.safe_load((done.run / "finetune.yaml").read_text())
    assert written["base"] == ["models/caris_lite"] and written["train"]["max_steps"] == 2
    assert written["optim"]["warmup_steps"] == 0 and written["data"]["datasets"] == ["my-photos"]
    said = capsys.readouterr().out
    assert "sentences were written" in said and "given by you" in said and "that it was trained on: mIoU" in said
    # a finished run is started again: nothing is trained twice
    before = (done.run / "log.jsonl").read_text()
    amltrain.finetune(folder, model="caris_lite", settings=OWN_WEIGHTS)
    assert (done.run / "log.jsonl").read_text() == before
    assert callable(amltrain.report) and callable(amltrain.finetune)  # modules of their names were imported


def test_an_export_that_is_all_train_is_split(tmp_path: Path) -> None:
    (tmp_path / "cvat").mkdir()
    write_cvat(tmp_path / "cvat", {f"p{n}.png": (SIZE, things(n, sentence="the")) for n in range(10)})
    for number in range(10):
        picture(SIZE, number).save(tmp_path / "cvat" / f"p{number}.png")
    said: list[str] = []
    place = prepare_data(
        tmp_path / "cvat", "cups", tmp_path / "prepared", images=None, form=None, seed=0, said=said.append
    )
    facts = look(*place)
    assert (facts.name, facts.scored, facts.final) == ("cups", "val", "val")
    assert facts.refs + facts.final_refs == 20 and "every picture was in split train" in "\n".join(said)


def test_prepared_data_are_named_by_path_or_name(tmp_path: Path) -> None:
    said: list[str] = []
    options = {"images": None, "form": None, "seed": 0, "said": said.append}
    folder, prepared = labelme(tmp_path / "cups", 5, sentence="the"), tmp_path / "prepared"
    first = prepare_data(folder, None, prepared, **options)  # type: ignore[arg-type]
    count = len(said)
    assert prepare_data("cups", None, prepared, **options) == first  # type: ignore[arg-type]
    assert prepare_data(prepared / "cups", None, prepared, **options) == first  # type: ignore[arg-type]
    assert len(said) == count


def test_annotations_that_changed_are_not_replaced_by_what_was_prepared_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"images": None, "form": None, "seed": 0, "said": lambda line: None}
    labelme(Path("cups"), 5, sentence="the")
    first = prepare_data("cups", None, Path("prepared"), **options)  # type: ignore[arg-type]
    assert prepare_data("cups", None, Path("prepared"), **options) == first  # type: ignore[arg-type]
    shutil.rmtree("cups")
    labelme(Path("cups"), 7, sentence="the")
    with pytest.raises(UserError, match="was prepared from other files"):
        prepare_data("cups", None, Path("prepared"), **options)  # type: ignore[arg-type]


def test_the_plan_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    settings = OWN_WEIGHTS | {"train.max_steps": 50, "optim.warmup_steps": 90, "evaluation.every_steps": 70}
    plan = finetune(
        labelme(tmp_path / "cups", 5), model="caris_lite", settings=settings, plan_only=True, said=said.append
    )
    assert not Path("runs").exists()
    text = str(plan)
    assert "warm-up of 90 steps is as long as the run (50)" in text and "is beyond the run (50 steps)" in text
    assert "objects are few" in text


def test_a_missing_path_and_an_unknown_model_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the folder or file with your annotations"):
        finetune(tmp_path / "nothing", prepared=tmp_path / "prepared")
    with pytest.raises(UserError, match="unknown model of finetune 'sam'; did you mean sam3"):
        finetune(labelme(tmp_path / "cups", 4), model="sam", prepared=tmp_path / "prepared", said=lambda line: None)


def test_data_without_a_training_split(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "sentence": "the cup", "mask": [10, 10, 20, 20], "split": "val"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    picture(SIZE).save(tmp_path / "a.png")
    amltrain.prepare(tmp_path / "t.jsonl", "cups", output=tmp_path / "prepared")
    with pytest.raises(UserError, match="cups has no split train"):
        look(str(tmp_path / "prepared"), "cups")


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        (60.0, 20.0, "the model reads the words"),
        (60.0, 58.0, "hardly reads the words"),
        (2.0, 1.0, "has hardly learned yet"),
        (60.0, None, "no other sentence"),
    ],
)
def test_the_verdict(own: float, other: float | None, said: str) -> None:
    scores = {"mIoU": own, "oIoU": own}
    assert said in verdict(scores, None if other is None else {"mIoU": other, "oIoU": other}, "val")


def test_the_verdict_of_sentences_that_refer_to_nothing() -> None:
    """Their split has gIoU and cIoU; cIoU is a ratio over nothing where no sentence refers to anything."""
    own, other = {"gIoU": 60.0, "cIoU": float("nan")}, {"gIoU": 2.0, "cIoU": 1.0}
    assert verdict(own, other, "val").startswith("gIoU 60.0 on val; with other samples' sentences gIoU 2.0: the model")
    assert verdict(own, None, "val").startswith("gIoU 60.0 on val, which has one object")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim.lrr": 1}, "unknown key optim.lrr; did you mean optim.lr"),
        ({"optim.lr": "fast"}, "optim.lr: fast does not fit; expected float"),
        ({"train.max_steps": "many"}, "train.max_steps: many does not fit"),
        ({"train.global_batch_size": 0}, "train.global_batch_size is 0 and must be at least 1"),
        ({"preprocess.size": [192, 192]}, "preprocess.size: .* does not fit"),
        ({"preprocess.max_tokens": None}, "preprocess.max_tokens is null; give a number, or leave it out"),
        ({"optim": {"lr": 1}}, "optim is a group of keys; write each with a dot, e.g. optim.optimizer"),
        ({"model.name": "caris_tiny"}, "model.name is what model of finetune sets"),
        ({"output": "there"}, "output is what output of finetune sets"),
    ],
)
def test_settings_are_checked_before_any_data_is_read(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        finetune("there is no such path", settings=settings)


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), "5"])
def test_minutes_out_of_range(minutes: Any) -> None:
    with pytest.raises(UserError, match=r"minutes is .* and must be a number above 0"):
        finetune("there is no such path", minutes=minutes)


@pytest.mark.parametrize("path", [None, "", 3])
def test_a_path_that_is_none(path: Any) -> None:
    with pytest.raises(UserError, match=r"path is .*; give the folder or file with your annotations"):
        finetune(path)


def test_an_empty_path_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labelme(tmp_path / "photos", 2)
    monkeypatch.chdir(tmp_path / "photos")
    with pytest.raises(SystemExit):
        main([""])
    assert "path is ''; give the folder or file with your annotations" in capsys.readouterr().err
    assert not (tmp_path / "photos" / "prepared").exists()


def test_few_photographs_of_a_tool_are_told_how_to_choose_splits(tmp_path: Path) -> None:
    manifest = amltrain.prepare(labelme(tmp_path / "photos", 3, sentence="the"), "few", output=tmp_path / "prepared")
    assert any(
        "there are few images (3)" in note and "folders named train and val" in note for note in manifest["notes"]
    )


def test_a_method_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="unknown method 'amll'; did you mean aml"):
        finetune("there is no such path", method="amll")


def test_a_rejected_run_keeps_the_config_of_the_one_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = {"model": "caris_lite", "said": lambda line: None}
    first = finetune(labelme(tmp_path / "cups", 5), settings=OWN_WEIGHTS, **quiet)  # type: ignore[arg-type]
    assert isinstance(first, FineTuned)
    written = (first.run / "finetune.yaml").read_text()
    with pytest.raises(UserError, match=r"was made with data\.datasets"):
        finetune(labelme(tmp_path / "jars", 4), output=first.run, settings=OWN_WEIGHTS, **quiet)  # type: ignore[arg-type]
    assert (first.run / "finetune.yaml").read_text() == written


def test_sentences_that_refer_to_nothing_end_in_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows: list[dict[str, Any]] = [
        {"image": f"a{n}.png", "sentence": "the cup", "mask": [10, 10, 20, 20], "split": "train"} for n in range(4)
    ]
    rows.append({"image": "a4.png", "sentence": "the horse", "no_target": True, "split": "val"})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number in range(5):
        picture(SIZE, number).save(tmp_path / f"a{number}.png")
    said: list[str] = []
    done = finetune(tmp_path / "t.jsonl", model="caris_lite", settings=OWN_WEIGHTS, said=said.append)
    assert isinstance(done, FineTuned) and any(line.startswith("gIoU") for line in said)
    [example] = [line for line in said if line.startswith("try it")]
    assert example.endswith("--sentence 'the cup'") and "split val has 1 object, so" in "\n".join(said)


def test_keys_of_a_run_are_read_from_the_command_line() -> None:
    assert own_settings(["--optim.lr", "1.0e-4", "--data.augment=[flip]"]) == {
        "optim.lr": 1e-4,
        "data.augment": ["flip"],
    }
    with pytest.raises(UserError, match="unknown flag --lr"):
        own_settings(["--lr", "3"])
    with pytest.raises(UserError, match="write --KEY VALUE"):
        own_settings(["--optim.lr"])
