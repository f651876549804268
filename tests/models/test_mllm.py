"""Language models with SAM: official keys, what is trained, what is said, and their rows against one sentence each."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from amltrain.commands.train import read_run
from amltrain.data.transforms import ImageTransform, View, normalise
from amltrain.errors import UserError
from amltrain.evaluation.metrics import metric_terms, scored_columns
from amltrain.frames import at_view, from_longest, inside_longest, longest_side
from amltrain.methods.base import mask_image, with_image
from amltrain.models import create_model
from amltrain.models.backbones.llava import build_reader, load_reader, sizes_of
from amltrain.models.mllm import MLLMSegmenter
from amltrain.records import IMAGE, UNSCORED, Batch, Conversation
from amltrain.training.optim import lr_factor
from tests.models.test_registry import make_batch
from tests.parity import compare, gsva
from tests.training import runs


def case(shared_dir: Path, name: str, config: str) -> tuple[MLLMSegmenter, dict[str, Tensor], dict[str, Tensor]]:
    """A recorded model, the case's tensors, and its official weights."""
    folder = shared_dir / "goldens" / "gsva"
    recorded = load_file(folder / f"{name}.safetensors")
    weights = compare.official_weights(recorded) or compare.official_weights(load_file(folder / "tiny.safetensors"))
    model, _ = compare.load_model(gsva.ADAPTER, compare.read_config(folder / f"{config}.json"), weights)
    return model.eval(), recorded, weights


def test_official_keys_and_what_is_trained(shared_dir: Path) -> None:
    keys = json.loads((shared_dir / "goldens" / "gsva" / "full_keys.json").read_text())
    shapes = {name: entry for part in keys.values() if isinstance(part, dict) for name, entry in part.items()}
    official = {
        n: e["shape"] if isinstance(e, dict) else e[0] for n, e in shapes.items() if n.startswith("base_model.")
    }
    assert len(official) == 1410
    with torch.device("meta"):
        model = create_model("gsva_7b")
        found = model.convert_state_dict({name: torch.empty(shape) for name, shape in official.items()})
    assert (found.unmatched, found.missing) == ([], [])
    assert len(found.renamed) + len(found.dropped) == 1410
    groups = json.loads((shared_dir / "goldens" / "gsva" / "full_optim_groups.json").read_text())
    theirs = {name for name in json.dumps(groups).split('"') if name in official}
    ours = {name for name, p in model.named_parameters() if p.requires_grad}
    left = {name for name in theirs if found.renamed[name] not in ours}
    assert {found.renamed[name] for name in theirs} >= ours
    assert left and all("iou_prediction_head" in n or "output_hypernetworks_mlps" in n for n in left)  # read by no mask


def test_what_the_first_pass_says(shared_dir: Path) -> None:
    """The official evaluation rejects a target for anything but [SEG], and a sentence without one only for [REJ]."""
    model, recorded, _ = case(shared_dir, "tiny_eval", "tiny")
    said = json.loads((shared_dir / "goldens" / "gsva" / "tiny.json").read_text())["tiny"]["eval_first_pass_argmax"]
    batch = gsva.batch(recorded)
    with torch.no_grad():
        output = model(batch)
    nothing = (output.aux["no_target"].argmax(1) == 1).tolist()
    absent = batch.no_target.tolist()
    wanted = [
        token == model.reject if none else token != model.segment for token, none in zip(said, absent, strict=True)
    ]
    assert nothing == wanted
    assert len(set(zip(wanted, absent, strict=True))) == 4  # every outcome is in the case


def test_a_single_pass_gives_the_masks_of_those_with_an_answer(shared_dir: Path) -> None:
    model, recorded, _ = case(shared_dir, "tiny_eval", "tiny")
    batch = gsva.batch(recorded)
    assert batch.conversation is not None
    with torch.no_grad():
        output = model(batch._replace(conversation=batch.conversation._replace(scored=False)))
    here = [i for i, none in enumerate(batch.no_target.tolist()) if not none]
    size = recorded["extra.single_pass_pred_masks_row0"].shape[-2:]
    torch.testing.assert_close(
        output.aux["low_resolution"][here], recorded["extra.single_pass_low_res_logits_row_0"], rtol=0, atol=2e-5
    )
    masks = torch.stack([from_longest(output.logits[i, 0], size) for i in here])
    torch.testing.assert_close(masks, recorded["extra.single_pass_pred_masks_row0"], rtol=0, atol=2e-5)


def test_lisa_as_it_evaluates(shared_dir: Path) -> None:
    model, recorded, _ = case(shared_dir, "lisa_tiny", "lisa_tiny")
    inputs = {n.removeprefix("extra.eval_"): v for n, v in recorded.items() if n.startswith("extra.eval_in")}
    with torch.no_grad():
        output = model(gsva.batch(inputs))
    wanted = recorded["extra.eval_output.pred_masks_image0"]
    masks = torch.stack([from_longest(logits[0], wanted.shape[-2:]) for logits in output.logits])
    torch.testing.assert_close(masks, wanted, rtol=0, atol=2e-5)
    assert "no_target" not in output.aux  # it cannot reject


def trained(seed: int = 0) -> MLLMSegmenter:
    torch.manual_seed(seed)
    model = create_model("mllm_tiny", vocab_size=64)
    assert isinstance(model, MLLMSegmenter)
    return model


def test_no_prediction_depends_on_the_truth() -> None:
    model, batch = trained().eval(), make_batch("mllm_tiny", 96, 96, count=3)
    with torch.no_grad():
        one, other = model(batch), model(batch._replace(no_target=~batch.no_target, target=255 - batch.target))
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=0)
    torch.testing.assert_close(one.aux["no_target"], other.aux["no_target"], rtol=0, atol=0)


def test_a_rejected_sentence_has_a_flat_mask_without_gradient() -> None:
    model, batch = trained().train(), make_batch("mllm_tiny", 96, 96, count=2)
    batch = batch._replace(no_target=torch.tensor([True, True]))
    output = model(batch)
    assert (output.logits == 0).all()
    output.logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.sam.mask_decoder.parameters() if p.requires_grad)


def answered(model: MLLMSegmenter, batch: Batch) -> Conversation:
    """The short conversation of a batch, whose answers are still to be written, padded on the left."""
    talk = model._short(batch)
    rows = [ids[: int(place)] for ids, place in zip(talk.ids, talk.place, strict=True)]
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(length - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows])
    labels = torch.full_like(ids, UNSCORED)
    return talk._replace(ids=ids, labels=labels, mask=mask, place=torch.full_like(talk.place, -1), open=True)


def test_what_is_written_is_what_is_decided_in_one_pass() -> None:
    """Greedy writing with a cache of keys, padded on the left, against one pass without answers."""
    model, batch = trained().eval(), make_batch("mllm_tiny", 96, 96, count=4)
    batch = batch._replace(geometry=torch.tensor([[96.0, 96, 1, 1, 0, 0]] * 4))
    with torch.no_grad():
        model.reader.lm_head.weight[model.segment] *= 40  # [SEG] is said at once, or hardly ever
        short, written = model(batch), model(batch._replace(conversation=answered(model, batch)))
        talk = model._short(batch)
        states, _ = model._read(talk, model.see(batch.image))
        at_once = model.reader.lm_head(model._states_of(talk, states)).argmax(1) == model.segment
    assert at_once.any()
    torch.testing.assert_close(written.logits[at_once], short.logits[at_once], rtol=1e-4, atol=1e-4)
    nothing = written.aux["no_target"].argmax(1) == 1
    assert not nothing[at_once].any()
    assert (written.logits[nothing] < 0).all()  # nothing is drawn where [SEG] is not said


def test_sentences_of_a_conversation_share_its_picture() -> None:
    """Two rows about one picture are two sentences with a copy each."""
    model, batch = trained().eval(), make_batch("mllm_tiny", 96, 96, count=2)
    batch = batch._replace(image=batch.image[:1].expand(2, -1, -1, -1).clone())
    talk = model._short(batch)
    shared = talk._replace(owner=torch.tensor([0, 0]), pictures=torch.tensor([0]))
    with torch.no_grad():
        one, other = model(batch._replace(conversation=talk)), model(batch._replace(conversation=shared))
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-5, atol=1e-5)


def test_only_low_rank_updates_and_tokens_of_the_language_model_train() -> None:
    pytest.importorskip("peft")
    model = create_model("mllm_tiny", vocab_size=64, text_tuning="lora", lora_rank=2)
    language = {n for n, p in model.named_parameters() if p.requires_grad and ".language_model." in n}
    assert {n.split(".")[-3] if "lora" in n else n for n in language} == {
        "lora_A",
        "lora_B",
        "reader.model.language_model.embed_tokens.weight",
    }
    assert all("q_proj" in n or "v_proj" in n for n in language if "lora" in n)


def test_the_short_conversation_ends_with_its_answer() -> None:
    model, batch = trained().train(), make_batch("mllm_tiny", 96, 96, count=2)
    batch = batch._replace(no_target=torch.tensor([False, True]))
    talk = model._short(batch)
    for row, answer in zip(range(2), (model.segment, model.reject), strict=True):
        place = int(talk.place[row])
        assert talk.ids[row, place] == answer == talk.labels[row, place]
        assert (talk.ids[row, : model.image_tokens] == IMAGE).all()
        assert talk.mask[row].sum() == place + 1
        assert (talk.labels[row] != UNSCORED).sum() == 1


def test_the_recipe_is_the_releases_but_for_its_data(shared_dir: Path, repository: Path) -> None:
    recorded = json.loads((shared_dir / "goldens" / "gsva" / "lr_schedule.json").read_text())
    config = read_run(["--config", str(repository / "configs" / "models" / "gsva_7b.yaml")])
    o, release = config.optim, recorded["release"]
    assert (o.lr, o.warmup_steps, config.train.max_steps) == (
        release["base_lr"],
        release["warmup_num_steps"],
        release["total_num_steps"],
    )
    assert (o.betas, o.eps, o.weight_decay, o.clip_norm) == ((0.9, 0.95), 1e-8, 0.0, 1.0)
    for step, rate in release["lr_at_deepspeed_0_15_0"].items():
        found = o.lr * lr_factor(int(step), 5000, o.schedule, warmup_steps=o.warmup_steps)
        assert found == pytest.approx(rate, rel=1e-9, abs=1e-18), step
    short = recorded["short"]
    for step, rate in enumerate(short["lr_deepspeed_0_15_0"]):
        factor = lr_factor(step, short["total_num_steps"], "warmup_decay", warmup_steps=short["warmup_num_steps"])
        assert short["base_lr"] * factor == pytest.approx(rate, rel=1e-9, abs=1e-18), step


def test_both_pictures_are_the_official_ones(shared_dir: Path) -> None:
    """SAM's and the reader's, of every shape, at the tiny and at the full size."""
    recorded = load_file(shared_dir / "goldens" / "gsva" / "preprocess.safetensors")
    for name in ("land", "large", "port", "square"):
        picture = Image.fromarray(recorded[f"image.{name}"].numpy())
        for kind, size, view, steps in (("tiny", 128, 56, (1, 1)), ("full", 1024, 224, (16, 4))):
            if f"{kind}.resized.{name}" not in recorded:
                continue
            transformed = ImageTransform(size, "longest", "imagenet")(picture)
            seen = normalise(transformed.image, "imagenet") * inside_longest(transformed.geometry[None], size)
            closer = normalise(View(view)(picture)[0], "clip")
            every = ("", "") if kind == "tiny" else ("_every_16", "_every_4")
            sam, clip = (
                recorded[f"{kind}.{part}{suffix}.{name}"] for part, suffix in zip(("sam", "clip"), every, strict=True)
            )
            torch.testing.assert_close(seen[:, :: steps[0], :: steps[0]], sam, rtol=0, atol=2e-6)
            torch.testing.assert_close(closer[:, :: steps[1], :: steps[1]], clip, rtol=0, atol=2e-6)
            assert longest_side(picture.height, picture.width, size) == tuple(
                recorded[f"{kind}.resized.{name}"].tolist()
            )


def test_the_official_scores_of_recorded_masks(shared_dir: Path) -> None:
    """gIoU and cIoU where a rejected target keeps its mask, and ReLA's rule beside them on the same masks."""
    folder = shared_dir / "goldens" / "gsva"
    recorded, wanted = (
        load_file(folder / "evaluation.safetensors"),
        json.loads((folder / "evaluation.json").read_text()),
    )
    columns: list[list[int]] = [[], [], [], [], []]
    for i in range(4):
        for logits, truth, rejected in zip(
            *(recorded[f"input.{n}_{i}"] for n in ("pred", "gt", "rejected")), strict=True
        ):
            mask, true = logits >= 0, truth > 0
            values = ((mask & true).sum(), (mask | true).sum(), ~true.any(), rejected, mask.sum())
            for column, value in zip(columns, values, strict=True):
                column.append(int(value))
    samples = scored_columns(*columns)
    official, rela = wanted["results"]["eval_gres_grefcoco"], wanted["for_comparison_rela_rule_of_amltrain"]
    for name, value in (
        ("gIoU (GSVA)", official["gIoU"]),
        ("cIoU (GSVA)", official["cIoU"]),
        ("N-acc", official["N_acc"]),
        ("T-acc", official["T_acc"]),
        ("gIoU", rela["gIoU"]),
        ("cIoU", rela["cIoU"]),
    ):
        assert metric_terms(name, samples, "generalized").percent() == pytest.approx(100 * value, abs=1e-3), name


def official_llava(folder: Path, reader: LlavaForConditionalGeneration, tokens: int) -> Path:
    """A folder as LLaVA is published: two shards of its own keys, and a config that names CLIP's folder."""
    state = reader.state_dict()
    tower = CLIPVisionModel(reader.config.vision_config)
    tower.save_pretrained(folder / "clip")
    named = {}
    for key, value in state.items():
        if not key.startswith("model.vision_tower."):
            named[key.replace("model.language_model.", "model.").replace("multi_modal_projector", "mm_projector")] = (
                value
            )
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        named[key] = named[key][:tokens].clone()
    named["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    keys = sorted(named)
    for number, part in enumerate((keys[::2], keys[1::2])):
        save_file(
            {key: named[key].contiguous() for key in part}, folder / f"model-0000{number + 1}-of-00002.safetensors"
        )
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": str(folder / "clip")}))
    return folder


def test_llavas_own_files_fill_the_reader_and_added_tokens_stay_random(tmp_path: Path) -> None:
    sizes = {"width": 16, "layers": 1, "heads": 2, "mlp": 24, "clip": 12, "clip_layers": 2, "clip_heads": 2}
    torch.manual_seed(0)
    published, mine = (build_reader(sizes_of(**sizes, pixels=16, patch=8, positions=64), tokens) for tokens in (50, 54))
    folder = official_llava(tmp_path, published, 50)
    before = mine.state_dict()["lm_head.weight"][47:].clone()
    load_reader(mine, str(folder), tokens=47)  # [SEG] has the place of a piece that this LLaVA was padded with
    theirs, ours = published.state_dict(), mine.state_dict()
    tower = CLIPVisionModel.from_pretrained(folder / "clip").state_dict()
    for key, value in ours.items():
        if key in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            assert torch.equal(value[:47], theirs[key][:47])
        elif key.startswith("model.vision_tower."):
            assert torch.equal(value, tower[key.removeprefix("model.vision_tower.")])
        else:
            assert torch.equal(value, theirs[key]), key
    assert torch.equal(ours["lm_head.weight"][47:], before)
    with pytest.raises(UserError, match=r"has 50 rows and the tokenizer 51 tokens of its own; use LLaVA's tokenizer"):
        load_reader(mine, str(folder), tokens=51)
    with pytest.raises(UserError, match=r"no folder with its \.safetensors or \.bin files; download it"):
        load_reader(mine, "llava/none", tokens=47)
    save_file({"something.weight": torch.ones(2)}, folder / "other.safetensors")
    with pytest.raises(UserError, match=r"keys that are not LLaVA's, first something\.weight"):
        load_reader(mine, str(folder), tokens=47)


def test_what_is_hidden_is_hidden_in_both_pictures() -> None:
    """Blocks of SAM's picture, and the same places of the closer one, for pictures of any shape and either resize."""
    for height, width in ((60, 100), (97, 64), (80, 80), (31, 200)):
        for resize in ("longest", "square"):
            transform = ImageTransform(96, resize, "imagenet")  # type: ignore[arg-type]
            geometry = transform.geometry(height, width)[None]
            blocks = torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(height)) > 0.5
            hidden = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
            # the same blocks painted on the original picture, then looked at as the reader does
            rows, columns = (
                (((torch.arange(n) + 0.5) * geometry[0, 2 + axis]).floor().long())
                for axis, n in ((0, height), (1, width))
            )
            painted = hidden[0][rows[:, None].clamp(max=95), columns.clamp(max=95)]
            picture = Image.fromarray(painted.numpy().astype("uint8") * 255).convert("RGB")
            for kind in ("centre", "bilinear", "bicubic"):
                view, frame = View(56, kind)(picture)  # type: ignore[arg-type]
                found = at_view(hidden, geometry, frame[None], 56)[0]
                assert (found == (view[0] > 127)).float().mean() > 0.9, (height, width, resize, kind)
                assert 0 < found.float().mean() < 1


def test_every_sentence_has_its_own_hidden_places() -> None:
    """Two sentences about one picture hide different blocks of it; a conversation about it shows each its own."""
    batch = make_batch("mllm_tiny", 96, 96, count=2)
    view = torch.ones(2, 3, 96, 96)
    geometry = torch.tensor([[96.0, 96, 1, 1, 0, 0]] * 2)
    model = trained().eval()
    talk = model._short(batch)._replace(owner=torch.tensor([0, 0]), pictures=torch.tensor([0]))
    blocks = torch.zeros(2, 3, 3, dtype=torch.bool)
    blocks[0, 0, 0] = blocks[1, 2, 2] = True
    image = mask_image(batch.image, blocks, 32)
    seen = batch._replace(view=view, view_geometry=geometry, geometry=geometry, conversation=talk)
    masked = with_image(seen, image, blocks, 32)
    assert masked.conversation is not None and masked.view is not None
    assert masked.conversation.owner.tolist() == [0, 1] == masked.conversation.pictures.tolist()
    assert (masked.view[0, :, :32, :32] == 0).all() and (masked.view[0, :, 32:] == 1).all()
    assert (masked.view[1, :, 64:, 64:] == 0).all() and (masked.view[1, :, :64] == 1).all()
    with torch.no_grad():
        together = model(masked).logits
        alone = [model(one(masked, i)._replace(conversation=model._short(one(masked, i)))).logits for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


def one(batch: Batch, row: int) -> Batch:
    return batch.mapped(lambda value: value[row : row + 1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "maskris"], r"maskris hides words of the sentences, and mllm_tiny reads conversations"),
        (["--method", "aml", "--data.sentences_per_image", "2"], r"set data\.sentences_per_image to 1"),
    ],
)
def test_methods_that_a_conversation_cannot_bear_are_rejected(
    flags: list[str], said: str, shapes: Path, tmp_path: Path
) -> None:
    talks = [
        "--model.name",
        "mllm_tiny",
        "--model.kwargs",
        "{}",
        "--preprocess.conversation",
        "gsva",
        "--preprocess.image_tokens",
        "144",
    ]
    with pytest.raises(UserError, match=said):
        runs.run(shapes, tmp_path / "run", *talks, "--preprocess.size", "96", *flags)
