"""launch/evaluate.py on real expressions, prepared from their original files."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from amltrain.commands.evaluate import main
from amltrain.config.schema import DataConfig, EvaluationConfig, RunConfig
from amltrain.data.loaders import build_eval_loaders, build_tokenizer
from amltrain.data.prepare import prepare
from amltrain.evaluation.evaluator import evaluate_model
from amltrain.hub.model_folder import load_pretrained, save_pretrained
from amltrain.inference.predictor import Predictor
from amltrain.models import create_model, model_info
from tests.training.runs import FORKS, free_port


@pytest.fixture(scope="module")
def run(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared data and an untrained model."""
    folder = tmp_path_factory.mktemp("evaluate")
    prepare("refcoco", shared_dir / "data" / "refer_mini", folder / "prepared", progress=False)
    torch.manual_seed(0)
    info = model_info("caris_tiny")
    data = DataConfig(datasets=["refcoco"], prepared=str(folder / "prepared"))
    tokenizer = build_tokenizer(data, info.preprocess)
    kwargs = {"vocab_size": tokenizer.vocab_size}
    state = create_model("caris_tiny", **kwargs).state_dict()
    save_pretrained(
        folder / "last" / "model", name="caris_tiny", kwargs=kwargs, state_dict=state, preprocess=info.preprocess,
        protocol=info.protocol, tokenizer=tokenizer,
    )  # fmt: skip
    return folder


def options(run: Path, output: Path, *more: str) -> list[str]:
    shown = ["--checkpoint", run / "last", "--data.prepared", run / "prepared", "--output", output]
    return [*map(str, shown), "--data.datasets", "[refcoco]", "--data.workers", "0", *more]


def evaluate(run: Path, output: Path, *more: str) -> list[dict]:
    main(options(run, output, *more))
    return json.loads((output / "results.json").read_text())["results"]


def test_splits_table_results_and_pictures(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = evaluate(run, tmp_path, "--splits", "val", "testB", "--pictures", "2")
    assert [(r["split"], r["counts"]["samples"], r["counts"]["referents"]) for r in results] == [
        ("val", 10, 4),
        ("testB", 14, 4),
    ]
    said = capsys.readouterr().out
    assert "| refcoco | testB |      14 |" in said
    assert "Scored at 96 x 96, probability > 0.5 (bilinear), all sentences, Pr@t: IoU >= t." in said
    assert {p.name for p in tmp_path.iterdir()} == {
        ".results.json.lock", "results.json", "results.md", "results.tex", "results.csv", "samples", "pictures",
    }  # fmt: skip
    assert len(list((tmp_path / "pictures").glob("refcoco-*.png"))) == 2
    assert results[0]["protocol"]["mask_parts"] == "union"
    assert results[0]["provenance"]["checkpoint"].endswith("last")


def test_protocol_preset_and_overrides(run: Path, tmp_path: Path):
    found = evaluate(run, tmp_path, "--preset", "cris", "--protocol.threshold", "0.4", "--protocol.sentences", "first")[
        0
    ]
    assert found["protocol"]["frame"] == "original"
    assert (found["protocol"]["threshold"], found["protocol"]["ties"]) == (0.4, "gt")
    assert found["counts"]["samples"] == 4


def test_perturbations_and_shuffled_sentences(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--perturbations", "none", "low_light", "occluded", "--severity", "0.9", "--shuffle_sentences", "true"]
    results = evaluate(run, tmp_path, *arguments, "--max_samples", "5")
    names = [r["provenance"]["perturbation"] and r["provenance"]["perturbation"]["name"] for r in results]
    assert names == [None, "low_light", "occluded"]
    assert all(r["protocol"]["shuffled_sentences"] and r["counts"]["samples"] == 5 for r in results)
    assert "val (occluded 90 %, sentences shuffled, first 5 samples)" in capsys.readouterr().out


def test_data_that_is_not_prepared_yet_is(run: Path, shared_dir: Path, tmp_path: Path):
    more = ["--data.prepared", str(tmp_path / "new"), "--data.refer_root", str(shared_dir / "data" / "refer_mini")]
    assert evaluate(run, tmp_path, *more)[0]["counts"]["samples"] == 10
    assert (tmp_path / "new" / "refcoco" / "manifest.json").exists()


def test_without_a_checkpoint(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr().err == "error: give --checkpoint RUN (or a folder of masks as --predictions)\n"


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--splits", "vall"], "no split 'vall'"),
        (["--preset", "criss"], "did you mean cris"),
        (["--protocol.threshold", "2"], "must lie between 0 and 1"),
        (["--protocol.frame", "orig"], "protocol.frame"),
        (["--perturbations", "fog"], "unknown perturbation 'fog'"),
        (["--chekpoint", "x"], "chekpoint"),
        (["--config", "gone.yaml"], "no file or shipped config is named gone.yaml"),
        (["--severity", "2"], "give --perturbations"),
        (["--batch_size", "0"], "--batch_size is 0 and must be at least 1"),
        (["--data.datasets", "[]"], "data.datasets is empty"),
    ],
)
def test_mistakes_get_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: list[str], message: str
):
    with pytest.raises(SystemExit) as stopped:
        main(options(run, tmp_path / "out", *mistake))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert said[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_made_is_rejected_before_scoring(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(options(run, tmp_path / "file" / "out"))
    said = capsys.readouterr().err
    assert "choose another --output" in said and "evaluate:" not in said


def test_a_model_that_knows_its_data_is_scored_on_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """And the table says where training and scores meet."""
    recipe = asdict(RunConfig(data=DataConfig(datasets=["refcoco"], train_split="testB")))
    shutil.copytree(run / "last", tmp_path / "run" / "last")
    training = {"recipe": recipe, "commit": "abc", "hardware": "", "versions": {}}
    (tmp_path / "run" / "last" / "model" / "training.json").write_text(json.dumps(training))
    monkeypatch.chdir(tmp_path)
    given = ["--checkpoint", "run/last/model", "--data.prepared", str(run / "prepared"), "--data.workers", "0"]
    main([*given, "--splits", "testB", "--max_samples", "3"])
    result = json.loads(Path("evaluation/run-last/results.json").read_text())["results"][0]
    assert result["dataset"] == "refcoco"
    assert (result["provenance"]["trained_on"], result["provenance"]["train_split"]) == (["refcoco"], "testB")
    assert "refcoco testB (first 3 samples): the model was trained on this split." in capsys.readouterr().out


@pytest.mark.parametrize("older", [False, True], ids=["now", "before config.json named it"])
def test_a_converted_model_is_scored_on_its_releases_ground_truth(run: Path, tmp_path: Path, older: bool):
    info, tokenizer = model_info("lavt_tiny"), load_pretrained(run / "last").tokenizer
    kwargs = {"vocab_size": tokenizer.vocab_size}
    converted = save_pretrained(
        tmp_path / "converted", name="lavt_tiny", kwargs=kwargs, preprocess=info.preprocess, protocol=info.protocol,
        state_dict=create_model("lavt_tiny", **kwargs).state_dict(), tokenizer=tokenizer,
    )  # fmt: skip
    if older:
        config = json.loads((converted / "config.json").read_text())
        del config["protocol"]["mask_parts"]
        (converted / "config.json").write_text(json.dumps(config))
    cases = [([], "exclusive"), (["--preset", "caris"], "union")]
    for more, expected in [*cases, (["--preset", "caris", "--protocol.mask_parts", "exclusive"], "exclusive")]:
        given = ["--checkpoint", str(converted), "--max_samples", "1", "--pictures", "0", *more]
        assert evaluate(run, tmp_path / f"out{len(more)}", *given)[0]["protocol"]["mask_parts"] == expected


@pytest.mark.e2e
def test_two_processes_give_the_scores_of_one(run: Path, tmp_path: Path):
    alone = evaluate(run, tmp_path / "one", "--splits", "testB", "--batch_size", "4")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    given = options(run, tmp_path / "two", "--splits", "testB", "--batch_size", "4")
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]  # as torchrun gives them
    processes = [FORKS.Process(target=evaluate_as, args=(rank, given), daemon=True) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert json.loads((tmp_path / "two" / "results.json").read_text())["results"] == alone


def evaluate_as(rank: dict[str, str], given: list[str]) -> None:
    """In a process of its own."""
    os.environ.update(rank)
    torch.set_num_threads(1)
    main(given)


def test_predictor_sees_what_the_evaluation_scored(run: Path):
    pretrained = load_pretrained(run / "last")
    data = DataConfig(datasets=["refcoco"], prepared=str(run / "prepared"), workers=0)
    loaders = build_eval_loaders(
        data, pretrained.preprocess, EvaluationConfig(), pretrained.protocol, pretrained.tokenizer
    )
    results = evaluate_model(Accelerator(cpu=True), pretrained.model, loaders["val"], pretrained.protocol, pictures=3)
    predictor, dataset = Predictor(pretrained), loaders["val"].dataset
    for kept in results.predictions:
        found = predictor(dataset.picture(kept.sample_id), dataset.info(kept.sample_id).sentence)[0]
        assert np.mean(found.mask != kept.mask) < 1e-4  # batches of other sizes round differently
