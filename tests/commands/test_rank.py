"""Ranking files written by a tiny random CLIP, and read by the mosaic."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from amltrain.commands.rank import main
from amltrain.data.mosaic import Mosaic, MosaicOptions, Ranking, ranking_path
from amltrain.records import Draw
from tests.data.stand_in import shapes_dataset

WORDS = "the on left right top bottom small big plain striped dotted red green blue yellow purple white square circle"


@pytest.fixture
def prepared(shapes: Path) -> str:
    return str(shapes)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: 2 layers of width 16, images of 32 px."""
    folder = tmp_path_factory.mktemp("clip")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<start>", "<end>", "<unk>", *WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>",
        model_max_length=12,
    )  # fmt: skip
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tiny, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "eos_token_id": 2},
        vision_config={**tiny, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_rankings_are_the_models_similarities_best_first(clip: Path, prepared: str, tmp_path: Path) -> None:
    common = ["--prepared", prepared, "--dataset", "refshapes", "--split", "val", "--device", "cpu"]
    main([*common, "--model", str(clip), "--output", str(tmp_path), "--keep", "2", "--batch", "3"])
    dataset = shapes_dataset(prepared, "val")
    rankings = {k: Ranking(ranking_path(tmp_path, "refshapes", "val", k)) for k in ("sentences", "images")}
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    ids, first = dataset.first_referents("refshapes")
    pictures: list[Image.Image] = [dataset.referent_picture(int(referent)) for referent in first]
    info = dataset.info(5)
    inputs = processor(text=[info.sentence], images=pictures, return_tensors="pt", padding="max_length")
    with torch.no_grad():
        output = model(**inputs)
    expected = (output.text_embeds @ output.image_embeds.T)[0].numpy()
    found = rankings["sentences"][info.sent_id]
    assert info.image_id not in found.images and len(found.images) == 2
    assert (np.diff(found.scores) <= 0).all()
    np.testing.assert_allclose(found.scores, expected[np.searchsorted(ids, found.images)], atol=1e-5)
    near = (output.image_embeds @ output.image_embeds.T)[int(np.searchsorted(ids, info.image_id))].numpy()
    found = rankings["images"][info.image_id]
    np.testing.assert_allclose(found.scores, near[np.searchsorted(ids, found.images)], atol=1e-5)
    assert set(found.images) == set(ids[np.argsort(-near)][1:3].tolist())


def test_the_mosaic_trains_on_what_was_ranked(clip: Path, prepared: str, tmp_path: Path) -> None:
    common = ["--prepared", prepared, "--dataset", "refshapes", "--device", "cpu"]
    main([*common, "--model", str(clip), "--output", str(tmp_path), "--keep", "5"])
    options = MosaicOptions(probability=1.0, retrieval=1.0, rankings=str(tmp_path), top_k=3)
    dataset = shapes_dataset(prepared, augmentations=[Mosaic(options)])
    used: list[int] = []
    decode = dataset.referent_picture
    dataset.referent_picture = lambda referent: used.append(referent) or decode(referent)
    assert dataset[Draw(0, 3)].image.shape == (3, 32, 32)
    ranked = Ranking(ranking_path(tmp_path, "refshapes", "train", "sentences"))[dataset.info(3).sent_id].images[:3]
    assert set(dataset.referent_images[used].tolist()) == set(ranked.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "--keep is 0"),
        (["--model", "/no/such/folder"], "cannot be loaded .*give a folder or a Hub id"),
    ],
)
def test_bad_input_is_one_line(
    prepared: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--prepared", prepared, "--dataset", "refshapes", "--model", "/none", "--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
