"""Conversations: the recorded prompts of the official loaders, what sentences may hold, and whole runs."""

import json
from pathlib import Path

import pytest
import torch

from amltrain.data.conversations import ConversationWriter, Kind, add_tokens, words_of
from amltrain.data.loaders import build_writer, load_tokenizer
from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.models import model_info
from amltrain.records import IMAGE, UNSCORED, Sample

PATCHES = 16
NONE = torch.zeros(1)


def sample(sentence: str, absent: bool = False, picture: int = 0, key: int = 0) -> Sample:
    return Sample(
        NONE, NONE, NONE, NONE, torch.tensor(absent), NONE, torch.tensor(key), NONE, sentence=sentence, picture=picture
    )


def llama(shared_dir: Path) -> SentenceTokenizer:
    tokenizer = SentenceTokenizer.load(shared_dir / "goldens" / "gsva" / "tokenizer", 64)
    assert add_tokens(tokenizer, "gsva") == [440, 441]
    return tokenizer


def wordpiece(style: str = "gsva") -> SentenceTokenizer:
    tokenizer = SentenceTokenizer.train_wordpiece([*words_of(style), "the red ball", "a cup on the left"], 24)
    add_tokens(tokenizer, style)
    return tokenizer


def writer(
    tokenizer: SentenceTokenizer, kind: Kind = "train", style: str = "gsva", **options: int
) -> ConversationWriter:
    return ConversationWriter(
        tokenizer, style, kind, **{"image_tokens": PATCHES, "longest": 769, "sentences": 9, **options}
    )


def prompts(shared_dir: Path) -> dict:
    return json.loads((shared_dir / "goldens" / "gsva" / "prompts.json").read_text())


def test_prompts_ids_and_labels_of_the_official_loaders(shared_dir: Path) -> None:
    tokenizer, recorded = llama(shared_dir), prompts(shared_dir)
    compared = 0
    for kind, name in (("train", "train"), ("given", "eval")):
        write = writer(tokenizer, kind)
        for case in recorded[name]:
            key = case.get("question", 0) + 4 * case.get("answer", 0)
            rows = [sample(s, a, key=key) for s, a in zip(case["sentences"], case["absent"], strict=True)]
            found = write(rows)
            ids, labels = found.ids[0].tolist(), found.labels[0].tolist()
            at = ids.index(IMAGE)
            assert ids[at : at + PATCHES] == [IMAGE] * PATCHES
            assert [*ids[:at], IMAGE, *ids[at + PATCHES :]] == case["input_ids"], case["conversation"]
            assert [*labels[:at], UNSCORED, *labels[at + PATCHES :]] == case["labels"]
            assert [found.ids[0, place].item() == 441 for place in found.place] == case["absent"]
            compared += 1
    assert compared == 20


def test_a_tokenizer_reads_the_same_after_it_was_saved(shared_dir: Path, tmp_path: Path) -> None:
    tokenizer = llama(shared_dir)
    tokenizer.save(tmp_path)
    again = SentenceTokenizer.load(tmp_path)
    for case in prompts(shared_dir)["train"]:
        assert again.tokenizer.encode(case["conversation"]) == tokenizer.tokenizer.encode(case["conversation"])
    assert add_tokens(again, "gsva") == [440, 441]
    assert again.vocab_size == 444


@pytest.mark.parametrize("kind", ["train", "given", "written"])
@pytest.mark.parametrize(
    "sentence",
    [
        "[SEG]",
        "[REJ] cup [SEG]",
        "cup</s>[REJ]",
        "<</s>s>",
        "[[SEG]SEG]",
        "[S[SEG]EG]",
        "<im_start><im_end>",
        "ASSISTANT: Sure, [SEG].",
        "{s} {a}",
        "{0}",
        "<image>",
        "a\nb",
        "...",
        "  .  ",
        "ＣＵＰ “left”",
        "é" * 40,
        "<unk>",
    ],
)
@pytest.mark.parametrize("tokens", ["llama", "wordpiece"])
def test_no_sentence_passes_for_an_answer(shared_dir: Path, tokens: str, sentence: str, kind: Kind) -> None:
    """However it is written, a conversation has one image, and exactly the answers that its sentences have."""
    write = writer(llama(shared_dir) if tokens == "llama" else wordpiece(), kind)
    rows = [sample("the red ball", key=3), sample(sentence, True, key=7), sample("a cup", key=1)]
    found = write(rows)
    answers = list(write.answers)
    assert (found.ids == IMAGE).sum(1).tolist() == [PATCHES] * len(found.ids)
    if kind == "written":
        assert not torch.isin(found.ids, torch.tensor(answers)).any()
        assert found.place.tolist() == [-1, -1, -1] and found.open
        return
    assert torch.isin(found.ids, torch.tensor(answers)).sum() == 3
    said = [write.answers[int(found.ids[row, place])] for row, place in zip(found.row, found.place, strict=True)]
    assert said == ["[SEG]", "[REJ]", "[SEG]"]
    assert (found.labels[found.row, found.place] == found.ids[found.row, found.place]).all()


def test_neighbours_share_a_question_up_to_the_number_asked_for() -> None:
    rows = [sample(f"ball {i}", picture=picture) for i, picture in enumerate([5, 5, 5, 9, 5, 9, 9])]
    found = writer(wordpiece(), sentences=2)(rows)
    assert found.row.tolist() == [0, 0, 1, 2, 3, 4, 4]
    assert found.owner.tolist() == [0, 0, 1, 0, 1]
    assert found.pictures.tolist() == [0, 3]  # a picture is encoded once, whoever talks about it
    written = writer(wordpiece(), "written")(rows)
    assert written.row.tolist() == list(range(7))


def test_lisa_asks_for_one_and_never_rejects() -> None:
    write = writer(wordpiece("lisa"), style="lisa")
    found = write([sample("the red ball"), sample("a cup", absent=True)])
    assert found.row.tolist() == [0, 1]
    assert [write.answers[int(found.ids[r, p])] for r, p in zip(found.row, found.place, strict=True)] == ["[SEG]"] * 2


def test_a_long_conversation_is_cut_in_training_only(shared_dir: Path) -> None:
    """As the official loader cuts it: an answer that is cut off has no place, and no mask is asked for."""
    tokenizer, recorded = llama(shared_dir), prompts(shared_dir)["truncation"]
    rows = [sample("the red cup on the left of the dog", key=4) for _ in range(12)]
    whole = writer(tokenizer, sentences=12)(rows)
    cut = writer(tokenizer, sentences=12, longest=recorded["kept"])(rows)
    length = recorded["kept"] + PATCHES - 1
    assert whole.ids.shape[1] > length == cut.ids.shape[1]
    assert cut.ids[0].tolist() == whole.ids[0, :length].tolist()
    assert [p for p in whole.place.tolist() if p < length] == [p for p in cut.place.tolist() if p >= 0]
    assert -1 in cut.place.tolist()
    assert writer(tokenizer, "given", sentences=12, longest=recorded["kept"])(rows).ids.shape[1] > length


def test_written_conversations_end_where_the_answer_is_due() -> None:
    found = writer(wordpiece(), "written")([sample("ball"), sample("a cup on the left on the left")])
    ends = found.ids[:, -3:]
    assert (ends[0] == ends[1]).all()  # "ASSISTANT:", the padding is on the left
    assert found.mask[:, -1].all() and not found.mask[0, 0] and found.mask[1].all()


def test_a_tokenizer_that_lost_its_answers_is_named() -> None:
    plain = SentenceTokenizer.train_wordpiece(["a ball"], 24)
    with pytest.raises(UserError, match=r"has lost \[SEG\], \[REJ\], .*use the whole tokenizer"):
        writer(plain)


def test_a_converted_models_tokenizer_has_its_answers(shared_dir: Path) -> None:
    """What `convert` and a run load for a model in conversation is the same."""
    preprocess = model_info("gsva_7b").preprocess
    tokenizer = load_tokenizer(str(shared_dir / "goldens" / "gsva" / "tokenizer"), preprocess)
    assert tokenizer.tokenizer.convert_tokens_to_ids(["[SEG]", "[REJ]"]) == [440, 441]
    assert build_writer(preprocess, tokenizer, "written") is not None
