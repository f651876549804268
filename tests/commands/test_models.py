"""`amltrain models`: every model by paper, and what is known of one."""

import re

import pytest

from amltrain.commands.models import WIDTH, main
from amltrain.models import create_model, list_models


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_every_model_is_listed_once_in_lines_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys)
    names = [name for line in said.splitlines() if line.startswith(" ") for name in line.split()]
    assert sorted(names) == list_models()
    assert max(map(len, said.splitlines())) <= WIDTH


def test_a_model_is_described_with_its_own_parameters_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, "dual_tiny")
    parameters = list(create_model("dual_tiny").parameters())
    total = sum(p.numel() for p in parameters) / 1e6
    trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
    assert f"dual_tiny: {total:.1f} M ({trained:.1f} M) parameters" in said
    assert "lora_rank=4" in said and "licence: ours Apache-2.0" in said
    assert max(map(len, said.splitlines())) <= WIDTH


def test_a_name_chooses_the_models_that_contain_it(capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, "rela_tiny", "--markdown").splitlines()
    assert re.match(r"\| rela_tiny \| [\d.]+ M \| GRES", rows[2]) and len(rows) == 3


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["no_such_model"])
    assert "no_such_model" in capsys.readouterr().err
