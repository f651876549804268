"""`amltrain analyse` on an untrained model and a few scenes: a table and a picture each."""

import csv
import json
from pathlib import Path

import pytest
import torch

from amltrain.config.schema import DataConfig
from amltrain.data.loaders import build_tokenizer
from amltrain.hub.model_folder import save_pretrained
from amltrain.models import create_model, model_info
from amltrain.paper import diagnose
from amltrain.paper.analyse import main


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with two untrained checkpoints."""
    folder = tmp_path_factory.mktemp("analyse")
    info = model_info("cris_tiny")
    tokenizer = build_tokenizer(DataConfig(datasets=["refshapes"], prepared=str(shapes)), info.preprocess)
    kwargs = {"vocab_size": tokenizer.vocab_size}
    for step in (1, 2):
        torch.manual_seed(step)
        save_pretrained(
            folder / f"step-{step:06d}" / "model", name="cris_tiny", kwargs=kwargs, preprocess=info.preprocess,
            state_dict=create_model("cris_tiny", **kwargs).state_dict(), protocol=info.protocol, tokenizer=tokenizer,
        )  # fmt: skip
    return folder


def analyse(run: Path, shapes: Path, output: Path, name: str, *more: str) -> str:
    models = [f"one={run}/step-000001", f"two={run}/step-000002"]
    data = ["--datasets", "refshapes", "--prepared", str(shapes), "--workers", "0", "--output", str(output)]
    main([name, "--models", *models, *data, *more])
    return (output / f"{name}.md").read_text()


def test_occlusion_with_drops(run: Path, shapes: Path, tmp_path: Path):
    text = analyse(run, shapes, tmp_path, "occlusion", "--shares", "0", "0.5", "--max_samples", "3")
    assert "| refshapes val, oIoU |" in text and "two: drop" in text
    assert "Only the first 3 samples" in text
    assert (tmp_path / "occlusion.png").stat().st_size > 5000
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    shares = [r["provenance"]["perturbation"] and r["provenance"]["perturbation"]["severity"] for r in rows]
    assert shares == [None, 0.5, None, 0.5]


def test_seeds_get_mean_and_deviation(run: Path, shapes: Path, tmp_path: Path):
    first, second = (f"{run}/step-{step:06d}" for step in (1, 2))
    data = ["--datasets", "refshapes", "--prepared", str(shapes), "--workers", "0", "--output", str(tmp_path)]
    more = ["--shares", "0", "0.5", "--max_samples", "3"]
    main(["occlusion", "--models", f"one={first}", f"both={first},{second}", *data, *more])
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    clean = {
        r["provenance"]["checkpoint"]: r["metrics_percent"]["oIoU"] for r in rows if not r["provenance"]["perturbation"]
    }
    one, two = clean[first], clean[second]
    line = next(line for line in (tmp_path / "occlusion.md").read_text().splitlines() if line.startswith("| 0 %"))
    cells = [text.strip() for text in line.split("|")[2:-1]]
    assert cells == [f"{one:.2f}", "+0.00", f"{(one + two) / 2:.2f} ± {abs(one - two) / 2**0.5:.2f}", "+0.00 ± 0.00"]
    assert (tmp_path / "occlusion.png").exists()


def test_histogram(run: Path, shapes: Path, tmp_path: Path):
    sizes = ["--batches", "1", "--calibration", "1", "--batch_size", "4"]
    text = analyse(run, shapes, tmp_path, "histogram", *sizes)
    bins = [line.split("|") for line in text.splitlines() if " to " in line and line.startswith("| 0")]
    assert len(bins) == 20
    assert sum(float(b[2]) for b in bins) == pytest.approx(100, abs=0.2)
    assert (tmp_path / "histogram.png").exists()


def test_diagnose(run: Path, shapes: Path, tmp_path: Path):
    data = ["--datasets", "refshapes", "--prepared", str(shapes), "--workers", "0", "--output", str(tmp_path)]
    sizes = ["--batches", "2", "--calibration", "1", "--fit_batches", "1", "--batch_size", "4"]
    scorers = ["--scorers", "paper", "late_identity", "prediction", "grounded"]
    diagnose.main(["--models", str(run), "--checkpoints", *scorers, *sizes, *data])
    with (tmp_path / "diagnose.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["scorer"], r["model"]) for r in rows] == [
        (scorer, step)
        for step in ("step 1", "step 2")
        for scorer in ("paper", "late_identity", "prediction", "grounded")
    ]
    paper = [r for r in rows if r["scorer"] == "paper"]
    assert paper[0]["temperature"] == paper[1]["temperature"] != ""  # one temperature, of the first checkpoint
    assert float(paper[0]["score_mean"]) == pytest.approx(0.75, abs=0.1)
    assert all(0 <= float(r[name]) <= 1 for r in rows for name in ("auc", "auc_shuffled"))
    assert abs(float(paper[0]["agreement"])) < 0.9 and rows[2]["agreement"] == "nan"
    assert "Temperatures, solved on step 1 and used for all: paper" in (tmp_path / "diagnose.md").read_text()
    assert (tmp_path / "histogram_paper.png").exists() and (tmp_path / "dynamics_paper.png").exists()


def test_an_unknown_score_is_rejected(run: Path, shapes: Path, tmp_path: Path, capsys):
    data = ["--datasets", "refshapes", "--prepared", str(shapes), "--output", str(tmp_path), "--workers", "0"]
    with pytest.raises(SystemExit):
        diagnose.main(["--models", f"one={run}/step-000001", "--scorers", "papr", *data])
    assert "did you mean paper" in capsys.readouterr().err


def test_activation(run: Path, shapes: Path, tmp_path: Path):
    text = analyse(run, shapes, tmp_path, "activation", "--count", "1")
    assert text.count("| refshapes | 0 |") == 2
    assert (tmp_path / "activation-refshapes-val.png").exists()


def test_pictures_for_a_paper(run: Path, shapes: Path, tmp_path: Path):
    text = analyse(run, shapes, tmp_path, "pictures", "--count", "2", "--format", "pdf")
    samples = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| refshapes")]
    assert len(set(samples)) == 2
    assert (tmp_path / "pictures-refshapes-val.pdf").read_bytes().startswith(b"%PDF")
    analyse(run, shapes, tmp_path, "pictures", "--samples", "3")
    assert (tmp_path / "pictures-refshapes-val.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["occlusion", "--shares", "2"], "not a share of the image"),
        (["robustness", "--metric", "oIuO"], "did you mean oIoU"),
        (["robustness", "--datasets", "refcocoo"], "refcocoo"),
        (["activation", "--count", "0"], "--count is 0"),
        (["dynamics"], "follows one run"),
        (["pictures", "--samples", "99999"], "not a sample id"),
        (["occlusion", "--models", "a=x,x"], "given twice"),
        (["histogram", "--models", "a=x,y"], "takes one place"),
        (["convergence"], "has no log.jsonl"),
    ],
)
def test_mistakes_get_one_line(
    run: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: list[str], message: str
):
    models = ["--models", f"one={run}/step-000001", f"two={run}/step-000002"]
    data = ["--datasets", "refshapes", "--prepared", str(shapes)] if mistake[0] != "convergence" else []
    with pytest.raises(SystemExit) as stopped:
        main([mistake[0], *models, *data, "--output", str(tmp_path), *mistake[1:]])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_losses_on_the_same_pairs(run: Path, shapes: Path, tmp_path: Path):
    """Two checkpoints of one run; other batch sizes change nothing, and other pairs do."""
    data = ["--datasets", "refshapes", "--prepared", str(shapes), "--workers", "0", "--split", "train"]
    read = []
    for name, sizes in (("a", ("6", "4")), ("b", ("6", "2")), ("c", ("3", "4"))):
        pairs = ["--pairs", sizes[0], "--batch_size", sizes[1], "--output", str(tmp_path / name)]
        main(["losses", "--models", f"one={run}", *data, *pairs])
        read.append(json.loads((tmp_path / name / "losses.json").read_text()))
    values = [[step["loss"] for step in found["steps"].values()] for found in read]
    assert list(read[0]["steps"]) == ["1", "2"] and read[0]["pairs"] == 6
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert values[0] != pytest.approx(values[2], rel=1e-5)
    assert "whole images" in (tmp_path / "a" / "losses.md").read_text()
    assert (tmp_path / "a" / "losses.png").exists()


def test_dynamics_of_chosen_pairs_as_json(run: Path, shapes: Path, tmp_path: Path):
    data = ["--datasets", "refshapes", "--prepared", str(shapes), "--workers", "0", "--output", str(tmp_path)]
    main(["dynamics", "--models", str(run), *data, "--pairs", "5", "--calibration", "1"])
    found = json.loads((tmp_path / "dynamics.json").read_text())
    assert found["pairs"] == 5 and list(found["steps"]) == ["1", "2"]
    assert found["steps"]["1"]["score_mean"] == pytest.approx(0.75, abs=0.01)
