"""`amltrain methods`: every method is listed, and its options are shown as a run takes them."""

from dataclasses import fields

import pytest

from amltrain.commands.methods import main
from amltrain.methods.aml.options import PRESETS, AMLOptions
from amltrain.methods.registry import list_methods, method_info


def test_every_method_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    shown = capsys.readouterr().out
    for name in list_methods():
        assert f"{name:14} {method_info(name).summary}" in shown
        assert method_info(name).paper in shown


def test_options_have_help_defaults_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    main(["aml"])
    shown = capsys.readouterr().out
    for option in fields(AMLOptions):
        assert f"--aml.{option.name}, default by preset: paper " in shown
    assert f"paper {PRESETS['paper'].temperature}, released {PRESETS['released'].temperature}" in shown
    assert "    Score under which a pixel is weak; 0 masks nothing." in shown
    main(["maskris"])
    assert "--maskris.text_ratio, default 0.15\n    Probability that a word is selected" in capsys.readouterr().out


def test_a_method_without_options(capsys: pytest.CaptureFixture[str]) -> None:
    main(["supervised"])
    assert "This method has no options." in capsys.readouterr().out


def test_an_unknown_method_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["maskriss"])
    assert stopped.value.code == 2
    assert "did you mean maskris" in capsys.readouterr().err
