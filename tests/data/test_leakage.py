"""The leak filter: no image that anything is evaluated on is trained on, and it is written down which went."""

import json
from pathlib import Path

import pytest

from amltrain.commands.prepare import main
from amltrain.commands.train import read_run
from amltrain.config.schema import DataConfig, Preprocess
from amltrain.data.leakage import excluded_images, read_image_ids
from amltrain.data.loaders import build_train_dataset
from amltrain.errors import UserError
from tests.data.original import Original
from tests.data.stand_in import word_tokenizer

PREPROCESS = Preprocess(
    size=32, resize="square", normalization="imagenet", tokenizer="wordpiece", max_tokens=12, sentence_field="sent"
)
BOTH = ["refcoco", "refcoco+"]


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets over the same photographs; which leaks into which is known.

    refcoco trains on 1..6 and evaluates on 7..9; refcoco+ trains on 4..9 and evaluates on 1, 21, 22; refcocog trains on
    1, 7, 30, 31 and evaluates on 5, 31 (made up: one photograph of its own) and 32.
    """
    root = tmp_path_factory.mktemp("leaky")
    trained = {"refcoco": range(1, 7), "refcoco+": range(4, 10), "refcocog": (1, 7, 30, 31)}
    evaluated = {"refcoco": (7, 8, 9), "refcoco+": (1, 21, 22), "refcocog": (5, 31, 32)}
    for name in trained:
        original = Original(root, name, per_split=0)
        for image in trained[name]:
            original.add(image, "train", ("the square", "left thing", "it") if image == 5 else ("the square",))
        for image, split in zip(evaluated[name], original.spec.evaluation_splits, strict=False):
            original.add(image, split)
        if name == "refcocog":
            original.add(evaluated[name][2], "test")
            original.images = list({image["id"]: image for image in original.images}.values())
        original.write()
    return root


def prepared(leaky: Path, *options: str, dataset: tuple[str, ...] = ("combined",)) -> dict:
    """The manifest of a combined training."""
    output = leaky / "prepared"
    main(["--dataset", *dataset, "--refer_root", str(leaky), "--output", str(output), *options])
    (newest,) = sorted(output.glob("combined*.json"), key=lambda path: path.stat().st_mtime_ns)[-1:]
    return {"file": newest.name, **json.loads(newest.read_text())}


def trained_images(leaky: Path, **options) -> dict[str, set[int]]:
    config = DataConfig(prepared=str(leaky / "prepared"), workers=0, **options)
    dataset = build_train_dataset(config, PREPROCESS, word_tokenizer(), mask_parts="union", seed=0)
    infos = [dataset.info(i) for i in range(len(dataset))]
    return {name: {i.image_id for i in infos if i.dataset == name} for name in config.datasets}


def test_every_leak_is_dropped_and_written_down(leaky: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = prepared(leaky)
    assert manifest["file"] == "combined-refcoco-refcoco+-refcocog.json" and manifest["leak_filter"]
    assert manifest["dropped_images"] == [1, 5, 7, 8, 9, 31]
    assert manifest["train"] == {
        "refcoco": {
            "before": {"refs": 6, "expressions": 8, "images": 6},
            "after": {"refs": 4, "expressions": 4, "images": 4},
        },
        "refcoco+": {
            "before": {"refs": 6, "expressions": 8, "images": 6},
            "after": {"refs": 2, "expressions": 2, "images": 2},
        },
        "refcocog": {
            "before": {"refs": 4, "expressions": 4, "images": 4},
            "after": {"refs": 1, "expressions": 1, "images": 1},
        },
    }
    assert "6 images dropped" in capsys.readouterr().out
    assert trained_images(leaky, datasets=["combined"]) == {
        "refcoco": {2, 3, 4, 6},
        "refcoco+": {4, 6},
        "refcocog": {30},
    }


def test_the_unfiltered_variant_has_its_own_name(leaky: Path) -> None:
    manifest = prepared(leaky, dataset=("combined-unfiltered",))
    assert manifest["file"] == "combined-unfiltered-refcoco-refcoco+-refcocog.json"
    assert not manifest["leak_filter"] and manifest["dropped_images"] == []
    assert all(counts["before"] == counts["after"] for counts in manifest["train"].values())
    everything = {"refcoco": set(range(1, 7)), "refcoco+": set(range(4, 10)), "refcocog": {1, 7, 30, 31}}
    assert trained_images(leaky, datasets=["combined-unfiltered"]) == everything
    assert trained_images(leaky, datasets=["combined"], leak_filter=False) == everything


def test_further_images_can_be_held_out(leaky: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(["000000000004", 6]))
    manifest = prepared(leaky, "--also_held_out", "refcocog", "--held_out_ids", str(ids), dataset=tuple(BOTH))
    assert manifest["dropped_images"] == [1, 4, 5, 6, 7, 8, 9]
    options = {"also_held_out": ["refcocog"], "held_out_ids": str(ids)}
    assert trained_images(leaky, datasets=["refcoco"], **options) == {"refcoco": {1, 2, 3}}
    with pytest.raises(UserError, match=r"refcoco\+: no training sample is left"):
        trained_images(leaky, datasets=BOTH, **options)


def test_one_data_set_alone_keeps_its_images(leaky: Path) -> None:
    assert trained_images(leaky, datasets=["refcoco"]) == {"refcoco": set(range(1, 7))}


def test_real_images(shared_dir: Path, tmp_path: Path) -> None:
    """74 photographs of two data sets, none in both; PolyFormer's list holds every one that they evaluate on."""
    options = ["--dataset", "refcoco", "refcocog", "--refer_root", str(shared_dir / "data" / "refer_mini")]
    main([*options, "--output", str(tmp_path)])
    manifest = json.loads((tmp_path / "combined-refcoco-refcocog.json").read_text())
    assert manifest["dropped_images"] == []
    assert [manifest["train"][name]["after"]["refs"] for name in ("refcoco", "refcocog")] == [37, 22]
    evaluated = excluded_images(str(tmp_path), ["refcoco", "refcocog"])
    assert len(evaluated) == 15
    polyformer = read_image_ids(shared_dir / "data" / "refcoco_text" / "polyformer_val_test_image_ids.json")
    assert len(polyformer) == 10113 and evaluated <= polyformer


def test_the_lists_of_real_evaluation_images(shared_dir: Path) -> None:
    """2,998 images hold RefCOCO's 3 evaluation splits (1,500 + 750 + 750, none twice), all on PolyFormer's list."""
    text = shared_dir / "data" / "refcoco_text"
    images = [
        {entry["image_id"] for entry in json.loads((text / f"{split}.json").read_text())}
        for split in ("val", "testA", "testB")
    ]
    assert [len(some) for some in images] == [1500, 750, 750]
    assert set.union(*images) <= read_image_ids(text / "polyformer_val_test_image_ids.json")


def test_names_in_a_recipe(tmp_path: Path) -> None:
    config = read_run(["--data.datasets", "[combined-unfiltered]"]).data
    assert config.datasets == ["refcoco", "refcoco+", "refcocog"] and not config.leak_filter
    config = read_run(["--data.datasets", "[combined]"]).data
    assert config.datasets == ["refcoco", "refcoco+", "refcocog"] and config.leak_filter


def test_a_list_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text('["x"]')
    (tmp_path / "table.json").write_text('{"25": "x"}')
    for path in (tmp_path / "ids.json", tmp_path / "table.json", tmp_path / "missing.json"):
        with pytest.raises(UserError, match=f"{path.name} is no JSON list of image ids"):
            read_image_ids(path)
