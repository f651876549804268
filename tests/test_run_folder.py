"""The files of a run: the log is read by one reader."""

from pathlib import Path

import pytest

from amltrain.errors import UserError
from amltrain.run_folder import LOG_FILE, read_log


def test_a_log_that_was_cut_or_damaged(tmp_path: Path) -> None:
    log = tmp_path / LOG_FILE
    assert read_log(tmp_path) == []
    log.write_text('{"step": 1, "loss": 0.5, "note": "x"}\n{"step": 2, "lo')
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.5, "note": "x"}]
    log.write_text('{"step": 1\n{"step": 2, "loss": 1}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_log(tmp_path)
