"""A run prepares what is missing before it trains, and rejects before that what cannot be trained on."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from amltrain.config.schema import DataConfig, ShapesConfig
from amltrain.data.catalog import read_manifest
from amltrain.data.prepare import check_scenes, ensure_training_data
from amltrain.errors import UserError
from tests.data.original import Original
from tests.data.test_prepare import largest_file


def said(data: DataConfig) -> str:
    lines: list[str] = []
    ensure_training_data(data, lines.append)
    return "\n".join(lines)


def test_scenes_are_drawn_once_and_not_taken_for_others(tmp_path: Path) -> None:
    scenes = ShapesConfig(train=3, evaluation=1, size=48)
    data = DataConfig(prepared=str(tmp_path), shapes=scenes)
    assert "refshapes (split by unc)" in said(data)
    assert said(data) == ""
    check_scenes(data)
    assert read_manifest(tmp_path / "refshapes")["drawn"] == asdict(scenes)
    with pytest.raises(UserError, match=r"refshapes holds scenes drawn with data\.shapes\.train 3, not 9; set it back"):
        check_scenes(DataConfig(prepared=str(tmp_path), shapes=ShapesConfig(train=9, evaluation=1, size=48)))


def test_scenes_of_a_version_without_styles_are_simple(tmp_path: Path) -> None:
    (tmp_path / "refshapes").mkdir()
    drawn = {"train": 3, "evaluation": 1, "size": 48, "seed": 0}
    (tmp_path / "refshapes" / "manifest.json").write_text(
        json.dumps({"drawn": drawn, "format": 1, "splits": {}, "sources": {}, "skipped": []})
    )
    check_scenes(DataConfig(prepared=str(tmp_path), shapes=ShapesConfig(**drawn)))
    with pytest.raises(UserError, match=r"data\.shapes\.style simple, not cluttered"):
        check_scenes(DataConfig(prepared=str(tmp_path), shapes=ShapesConfig(**drawn, style="cluttered")))


def test_original_files_and_the_counts_of_combined_training(tmp_path: Path) -> None:
    for number, name in enumerate(("refcoco", "refcocog")):
        Original(tmp_path / "refer", name, first_image=1 + 6 * number).write()
    data = DataConfig(
        datasets=["refcoco", "refcocog"], prepared=str(tmp_path / "prepared"), refer_root=str(tmp_path / "refer")
    )
    shown = said(data)
    assert "refcoco (split by unc)" in shown and "refcocog (split by umd)" in shown
    assert "3 images dropped (combined-refcoco-refcocog.json)" in shown  # 7..9 of refcocog are 7..9 of refcoco's testA


def test_a_missing_source_is_found_before_the_first_is_prepared(tmp_path: Path) -> None:
    Original(tmp_path / "refer", "refcoco").write()
    prepared = tmp_path / "prepared"
    with pytest.raises(UserError, match=r"put refcocog's original files there"):
        said(DataConfig(datasets=["refcoco", "refcocog"], prepared=str(prepared), refer_root=str(tmp_path / "refer")))
    assert not prepared.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"datasets": ["refcoco+-umd"]}, r"refcoco\+ has no split by 'umd'"),
        ({"train_split": "trian"}, "refcoco has no split 'trian'; it has train, val, testA, testB"),
        ({"refer_root": None}, r"prepared/refcoco is not prepared; give data\.refer_root"),
        ({"image_root": "/nowhere"}, "found no image such as .* under /nowhere"),
    ],
)
def test_what_cannot_be_trained_on(options: dict, message: str, tmp_path: Path) -> None:
    Original(tmp_path / "refer").write()
    known = {"datasets": ["refcoco"], "prepared": str(tmp_path / "prepared"), "refer_root": str(tmp_path / "refer")}
    with pytest.raises(UserError, match=message):
        said(DataConfig(**{**known, **options}))
    assert not (tmp_path / "prepared").exists()


def test_a_full_disk_while_drawing(tmp_path: Path) -> None:
    data = DataConfig(prepared=str(tmp_path), shapes=ShapesConfig(train=3, evaluation=1, size=48))
    with largest_file(100), pytest.raises(UserError, match=r"could not draw scenes into .*free up space"):
        said(data)
    assert "refshapes (split by unc)" in said(data)  # what was begun is no obstacle
