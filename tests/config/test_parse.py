"""Runs as YAML and flags: what is read, what is rejected, and every file that ships."""

from pathlib import Path

import pytest
import yaml

from amltrain.commands.evaluate import main as evaluate
from amltrain.commands.train import read_run
from amltrain.config.parse import save_config
from amltrain.config.schema import RunConfig
from amltrain.errors import UserError
from amltrain.models import create_model, list_models

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("recipes/**/*.yaml")])
ACCELERATE = sorted(CONFIGS.glob("accelerate/*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_shipped_run_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = read_run(["--config", str(path)])
    assert config.model.name in list_models()
    assert config.output != RunConfig().output or path.name == "quickstart.yaml"
    assert path.read_text().startswith("#")  # what it is, and how to run it


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.name)
def test_every_launcher_file_is_read(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    settings = load_config_from_file(str(path))
    assert settings.mixed_precision in ("no", "bf16")
    known = yaml.safe_load(path.read_text())
    assert settings.num_processes == known["num_processes"]


def test_layers_and_flags(tmp_path: Path) -> None:
    (tmp_path / "low.yaml").write_text("model: {name: caris_swin_base, kwargs: {drop_path_rate: 0.1}}\n")
    (tmp_path / "first.yaml").write_text("base: low.yaml\nseed: 1\noutput: a\n")
    (tmp_path / "second.yaml").write_text("seed: 2\n")
    files = ["--config", str(tmp_path / "first.yaml"), "--config", str(tmp_path / "second.yaml")]
    config = read_run([*files, "--model.kwargs.window_size", "12", "--aml.tau", "0.3"])
    assert (config.seed, config.output, config.method_options.tau) == (2, "a", 0.3)
    assert config.model.name == "caris_swin_base"
    assert config.model.kwargs == {"drop_path_rate": 0.1, "window_size": 12}


def test_a_saved_run_repeats(tmp_path: Path) -> None:
    config = read_run(["--data.datasets", "[refcoco,refcoco+]", "--optim.betas", "[0.8,0.9]"])
    save_config(config, tmp_path / "config.yaml")
    assert read_run(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_printed_run_repeats_and_shows_what_its_preset_stands_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--model.name", "rela_tiny", "--aml.preset", "released", "--aml.tau", "0.3"]
    with pytest.raises(SystemExit) as ended:
        read_run([*flags, "--print_config"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    shown = yaml.safe_load(printed)["aml"]
    assert (shown["tau"], shown["rho"], shown["projection"], shown["selection"]) == (0.3, 0.25, "linear", "released")
    (tmp_path / "printed.yaml").write_text(printed)
    again = read_run(["--config", str(tmp_path / "printed.yaml")])
    assert again.model == read_run(flags).model
    assert again.method_options.complete() == read_run(flags).method_options.complete()


def test_an_augmentation_by_its_name_alone_gets_its_defaults(tmp_path: Path) -> None:
    config = read_run(["--data.augment", "[mosaic]"])
    assert config.augment_options["mosaic"].probability == 0.5
    save_config(config, tmp_path / "config.yaml")
    assert read_run(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--trian.epochs", "3"], "train.epochs"),
        (["--train.epochs", "many"], "train.epochs: many"),
        (["--lr", "1e-3"], "unknown key lr; did you mean optim.lr?"),
        (["--train.max_step", "3"], "unknown key train.max_step; did you mean train.max_steps"),
        (["--text_ratio", "0.1"], "unknown key text_ratio; did you mean maskris.text_ratio?"),
        (["recipes/refer_mini"], "unexpected argument recipes/refer_mini; did you mean --config recipes/refer_mini?"),
        (["--model", "lavt_tiny"], "model: lavt_tiny is not a group of keys; did you mean --model.name lavt_tiny, or"),
        (["--aml.preset", "papr"], "'paper', 'released'"),
        (["--hub.push", "best"], "--hub.repo"),
        (["--config", "nowhere.yaml"], "--config: no file or shipped config is named nowhere.yaml"),
        (["--model", "nowhere.yaml"], "model: nowhere.yaml is not a group of keys"),
        (["--evaluation.splits", "val"], "expected list, e.g. '[val]'"),
        (["--train.mixed_precision", "fp32"], "fp32 does not fit; expected 'no', 'fp16', 'bf16' or null"),
        (["--data.datasets", "[refcoco,refcocog,refcoco]"], "data.datasets names refcoco more than once"),
        (["--data.datasets", "[]"], "data.datasets is empty"),
    ],
)
def test_mistakes_get_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError) as error:
        read_run(arguments)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_typo_in_a_file_names_the_nearest_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("evaluation: {protocol: {fram: original}}\n")
    with pytest.raises(UserError, match=r"evaluation\.protocol\.fram; did you mean evaluation\.protocol\.frame"):
        read_run(["--config", str(tmp_path / "run.yaml")])


def test_unknown_model_argument_is_named() -> None:
    with pytest.raises(UserError, match="drop_path_rate"):
        create_model("caris_tiny", drop_path=0.1)


def test_a_mistyped_flag_is_not_blamed_on_a_file() -> None:
    with pytest.raises(UserError, match=r"^unknown key optim\.lrr; did you mean optim\.lr"):
        read_run(["--config", "quickstart", "--optim.lrr", "1"])


def test_an_option_of_a_method_given_to_a_command_that_trains_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate(["--checkpoint", "runs/none", "--aml.features", "oracle"])
    assert capsys.readouterr().err == "error: aml.features is a key of training, not of this command; leave it out\n"
