"""Options that a resumed run may change, and options that would make it another run."""

from pathlib import Path

import pytest

from amltrain.errors import UserError
from tests.training import runs


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--optim.lr", "0.5"), "optim.lr 0.001, not 0.5"),
        (("--method", "supervised"), "method aml, not supervised"),
        (("--model.name", "lavt_tiny"), "model.name caris_tiny, not lavt_tiny"),
        (("--train.ema_decay", "0.9"), "train.ema_decay null, not 0.9"),
        (("--preprocess.max_tokens", "5"), "preprocess.max_tokens null, not 5"),
        (("--data.mask_parts", "exclusive"), "data.mask_parts union, not exclusive"),
        (("--model.kwargs.text_dropout", "0.3"), "model.kwargs.text_dropout 0.1, not 0.3"),
    ],
)
def test_another_run_is_rejected_and_changes_nothing(
    whole: Path, shapes: Path, flags: tuple[str, str], named: str
) -> None:
    before = (whole / "config.yaml").read_text()
    with pytest.raises(UserError, match=f"step-000008 was made with {named}; set it back"):
        runs.run(shapes, whole, *flags)
    assert (whole / "config.yaml").read_text() == before


def test_what_changes_no_weights_may_change_and_the_length_is_said(
    whole: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ("--resume", str(whole / "step-000006"), "--evaluation.batch_size", "4", "--train.micro_batch_size", "4")
    runs.run(shapes, tmp_path / "same", *resume)
    assert "was made with" not in capsys.readouterr().out
    runs.run(shapes, tmp_path / "shorter", *resume, "--train.max_steps", "7")
    assert "was made with train.max_steps 8, not 7; the run continues with the new value" in capsys.readouterr().out
