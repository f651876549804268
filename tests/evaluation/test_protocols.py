"""Which rule a score is measured by: the official code's, then what the data and the run say."""

from dataclasses import replace

import pytest

from amltrain.config.schema import DataConfig, ProtocolOverrides
from amltrain.errors import UserError
from amltrain.evaluation.results import named_protocol, presets, run_protocol
from amltrain.models import list_models, model_info
from amltrain.registry import MODELS


@pytest.mark.parametrize("name", list_models())
def test_a_release_scores_all_its_models_alike(name: str) -> None:
    """All but how a padded picture is undone: EVF-SAM pads, EVF-SAM2 stretches."""
    protocol = model_info(name).protocol
    family = named_protocol(next(f for f, names in MODELS.families().items() if name in names))
    assert replace(protocol, interpolation=family.interpolation) == family
    assert (protocol.interpolation == "cropped") == (model_info(name).preprocess.resize == "longest")
    assert protocol.no_target_pixels == 0


def test_every_release_has_a_preset() -> None:
    assert presets() == [
        "barleria",
        "beit3",
        "c3vg",
        "caris",
        "cgformer",
        "cris",
        "deris",
        "detris",
        "dual",
        "etris",
        "evfsam",
        "lavt",
        "magnet",
        "mllm",
        "rela",
        "remamber",
        "sam3",
        "sam3_instances",
    ]
    assert {name for name in presets() if named_protocol(name).mask_parts == "exclusive"} == {
        "lavt",
        "cgformer",
        "evfsam",
        "magnet",
    }


@pytest.mark.parametrize(
    ("data", "run", "expected"),
    [
        (None, None, "exclusive"),
        ("union", None, "union"),
        (None, "union", "union"),
        ("union", "exclusive", "exclusive"),
    ],
)
def test_the_ground_truth_is_the_releases_unless_data_or_run_say_otherwise(
    data: str | None, run: str | None, expected: str
) -> None:
    wanted = ProtocolOverrides(threshold=0.4, mask_parts=run)
    found = run_protocol(named_protocol("lavt"), DataConfig(mask_parts=data), wanted)
    assert (found.mask_parts, found.threshold, found.frame) == (expected, 0.4, "network")


def test_a_threshold_that_decides_nothing_is_rejected() -> None:
    for value in (0.0, 1.0, 1.5):
        with pytest.raises(UserError, match=r"evaluation\.protocol\.threshold"):
            run_protocol(named_protocol("lavt"), DataConfig(), ProtocolOverrides(threshold=value))
