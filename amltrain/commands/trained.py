"""What a model was trained on: the defaults of the commands that run it on data."""

from pathlib import Path
from typing import Any

import yaml

from amltrain.hub.find import find_model_folder
from amltrain.hub.model_folder import read_training

RUN_CONFIG = "config.yaml"


def trained_data(place: str) -> dict[str, Any]:
    """The `data` section of a model's recipe; empty where the model folder does not record it.

    A model folder leaves out paths, because it may be published; `prepared` comes from the config.yaml of the run that
    the folder lies in, and is only there where that path exists.
    """
    folder = find_model_folder(place)
    training = read_training(folder)
    data = {} if training is None else {k: v for k, v in training["recipe"]["data"].items() if k != "prepared"}
    prepared = _prepared(folder)
    return data | ({"prepared": prepared} if data and prepared else {})


def _prepared(folder: Path) -> str | None:
    """RUN/config.yaml for RUN/model, RUN/best/model and RUN/step-N/model."""
    for run in folder.absolute().parents[:2]:
        try:
            config = yaml.safe_load((run / RUN_CONFIG).read_text(encoding="utf-8"))
            prepared = config["data"]["prepared"]
        except (OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError):
            continue
        return prepared if isinstance(prepared, str) and Path(prepared).is_dir() else None
    return None
