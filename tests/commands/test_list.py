"""`amltrain list`: every name is listed, and what is known of one is shown as a run takes it."""

import re
from dataclasses import fields

import pytest

from amltrain.commands.list import KINDS, WIDTH, main
from amltrain.methods.aml.options import PRESETS, AMLOptions
from amltrain.models import create_model, list_models
from amltrain.registry import AUGMENTATIONS, LOSSES, METHODS


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_every_model_is_listed_once_in_lines_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "models")
    names = [name for line in said.splitlines() if line.startswith(" ") for name in line.split()]
    assert sorted(names) == list_models()
    assert max(map(len, said.splitlines())) <= WIDTH


def test_a_model_is_described_with_its_own_parameters_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "models", "dual_tiny")
    parameters = list(create_model("dual_tiny").parameters())
    total = sum(p.numel() for p in parameters) / 1e6
    trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
    assert f"dual_tiny: {total:.1f} M ({trained:.1f} M) parameters" in said
    assert "lora_rank=4" in said and "licence: ours Apache-2.0" in said
    assert max(map(len, said.splitlines())) <= WIDTH


def test_a_name_chooses_the_models_that_contain_it(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "models", "rela_tiny", "--markdown").splitlines()
    assert re.match(r"\| rela_tiny \| [\d.]+ M \| GRES", rows[2]) and len(rows) == 3


def test_an_unknown_name_is_rejected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["models", "no_such_model"])
    assert "no_such_model" in capsys.readouterr().err


def test_every_method_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods"])
    shown = capsys.readouterr().out
    for name in METHODS.names():
        assert f"{name:14} {METHODS[name].details.summary}" in shown
        assert METHODS[name].details.paper in shown


def test_options_have_help_defaults_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods", "aml"])
    shown = capsys.readouterr().out
    for option in fields(AMLOptions):
        assert f"--aml.{option.name}, default by preset: paper " in shown
    assert f"paper {PRESETS['paper'].temperature}, released {PRESETS['released'].temperature}" in shown
    assert "    Score under which a pixel is weak; 0 masks nothing." in shown
    main(["methods", "maskris"])
    assert "--maskris.text_ratio, default 0.15\n    Probability that a word is selected" in capsys.readouterr().out


def test_a_method_without_options(capsys: pytest.CaptureFixture[str]) -> None:
    main(["methods", "supervised"])
    assert "This method has no options." in capsys.readouterr().out


def test_an_unknown_method_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["methods", "maskriss"])
    assert stopped.value.code == 2
    assert "did you mean maskris" in capsys.readouterr().err


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_listed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, kind)
    known = {"augmentations": AUGMENTATIONS.names(), "losses": LOSSES.names(), "metrics": ["oIoU", "gIoU", "Pr@0.5"]}
    known |= {"datasets": ["refcoco", "grefshapes"], "configs": ["quickstart", "recipes/paper/refcoco_aml"]}
    assert all(name in said for name in known.get(kind, []))


def test_a_config_is_shown_or_located(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "configs", "quickstart").startswith("#")
    assert printed(capsys, "configs", "quickstart", "--path").strip().endswith("quickstart.yaml")
    with pytest.raises(SystemExit):
        main(["configs", "--path"])
    assert "--path needs the name of a config" in capsys.readouterr().err
