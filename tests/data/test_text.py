"""Token ids as the releases make them: where a sentence is cut, what pads it, and the same ids in every process."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Tipsv2Tokenizer

from amltrain.data.text import SentenceTokenizer, clean
from amltrain.errors import UserError

SENTENCES = ["the left man", "left woman in red", "man in red, left", "réd hat", "the left dog"]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as bert-base-uncased is one: vocab.txt and its config, no tokenizer.json."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "left", "man", "wo", "##man", "red", ",", "in"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as openai/clip-vit-base-patch16 is one, with a toy alphabet and two merges."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["!", *letters, *(f"{x}</w>" for x in letters), "ma", "man</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({p: i for i, p in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nm a\nma n</w>\n")
    config = {
        "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 77,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    return folder


def test_bert_ids_and_padding(bert_folder: Path) -> None:
    ids, mask = SentenceTokenizer.load(bert_folder, 8)("The left WOMAN, zebra")
    assert ids.tolist() == [2, 5, 6, 8, 9, 11, 1, 3]
    assert mask.all() and ids.dtype == torch.int64 and mask.dtype == torch.bool
    ids, mask = SentenceTokenizer.load(bert_folder, 8)("red")
    assert ids.tolist() == [2, 10, 3, 0, 0, 0, 0, 0]
    assert mask.tolist() == [True] * 3 + [False] * 5


def test_a_long_bert_sentence_loses_its_end(bert_folder: Path) -> None:
    ids, mask = SentenceTokenizer.load(bert_folder, 4)("the left red man")
    assert ids.tolist() == [2, 5, 6, 10] and mask.all()


def test_a_long_clip_sentence_keeps_its_end(clip_folder: Path) -> None:
    tokenizer = SentenceTokenizer.load(clip_folder, 5)
    start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    ids, mask = tokenizer("a man a b c d e f")
    assert ids[0] == start and ids[-1] == end and mask.all()
    assert ids.tolist()[1:4] == SentenceTokenizer.load(clip_folder, 20)("a man a b c d e f")[0].tolist()[1:4]
    ids, mask = tokenizer("Man")
    assert ids.tolist() == [start, tokenizer.tokenizer.get_vocab()["man</w>"], end, 0, 0]  # padded with 0, not the end
    assert mask.tolist() == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("the man&#39;s &amp;quot;hat&amp;quot;", 'the man\'s "hat"'),
        ("the man\u2019s \u201chat\u201d", 'the man\'s "hat"'),
        ("\uff2dan\u3000\uff11\uff0c left", "Man 1, left"),
        ("&rsquo;round the o\ufb03ce", "'round the office"),
        ("<b>&rsquo;&lt;", "<b>\u2019<"),  # of HTML, the quotes stay
        ("cat &amp;lt; dog & bird &nbsp;", "cat < dog & bird"),
        ("caf\u00e9 \u2013 plain", "caf\u00e9 \u2013 plain"),
    ],
)
def test_clip_reads_plain_text(clip_folder: Path, bert_folder: Path, typed: str, read: str) -> None:
    """As ftfy 6.3.1 and two html.unescape give it. BERT's releases change nothing."""
    assert clean(typed) == read
    tokenizer, bert = SentenceTokenizer.load(clip_folder, 40), SentenceTokenizer.load(bert_folder, 40)
    assert torch.equal(tokenizer(typed)[0], torch.tensor(tokenizer.tokenizer.encode(read) + [0] * 40)[:40])
    assert bert(typed)[0].tolist()[: len(bert.tokenizer.encode(typed))] == bert.tokenizer.encode(typed)


def test_nothing_in_real_sentences_needs_cleaning(shared_dir: Path) -> None:
    for split in ("val", "testA", "testB"):
        for ref in json.loads((shared_dir / "data" / "refcoco_text" / f"{split}.json").read_text()):
            sentences = [s if isinstance(s, str) else s["sent"] for s in ref["sentences"]]
            assert [clean(s) for s in sentences] == [s.strip() for s in sentences]


def test_words_that_are_cut(bert_folder: Path, clip_folder: Path) -> None:
    """Of BERT's style only words count: [SEP] is cut first. A word of which a part is cut counts as cut."""
    assert SentenceTokenizer.load(bert_folder, 5).cut("the left red man") == ""
    assert SentenceTokenizer.load(bert_folder, 4).cut("the left red man") == "man"
    assert SentenceTokenizer.load(bert_folder, 4).cut("the left woman in red") == "woman in red"
    assert SentenceTokenizer.load(clip_folder, 5).cut("a man a") == ""
    assert SentenceTokenizer.load(clip_folder, 5).cut("a man a b") == "b"


def test_a_tokenizer_without_an_end_is_cut_plainly(tmp_path: Path) -> None:
    """TIPSv2's: neither a start nor an end token, so the last word of a long sentence takes no place of its own."""
    pieces = ["<pad>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdef"]
    merges = [("\u2581", letter) for letter in "abcdef"]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    Tipsv2Tokenizer(vocab=vocabulary, merges=merges).save_pretrained(tmp_path)
    tokenizer = SentenceTokenizer.load(tmp_path, 4)
    ids, mask = tokenizer("a B c d e f")
    assert ids.tolist() == [vocabulary["\u2581" + letter] for letter in "abcd"] and mask.all()
    assert tokenizer.cut("a b c d e f") == "e f"
    assert tokenizer("&amp; a")[0].tolist() != tokenizer("& a")[0].tolist()  # CLIP's cleaning is not its own
    ids, mask = tokenizer("a b")
    assert ids[2:].tolist() == [0, 0] and mask.tolist() == [True, True, False, False]


def test_words_that_are_unknown(bert_folder: Path, clip_folder: Path) -> None:
    assert SentenceTokenizer.load(bert_folder, 8).unknown("the left zebra man") == ["zebra"]
    assert SentenceTokenizer.load(clip_folder, 8).unknown("a man") == []


def test_wordpiece_knows_frequent_words_whole_and_every_word_somehow() -> None:
    tokenizer = SentenceTokenizer.train_wordpiece(SENTENCES, 12, vocab_size=60)
    pieces = tokenizer.tokenizer.convert_ids_to_tokens(tokenizer("Left, MANED réd")[0].tolist())
    assert pieces == ["[CLS]", "left", ",", "man", "##e", "##d", "red", "[SEP]", *["[PAD]"] * 4]
    assert tokenizer.vocab_size <= 60
    assert tokenizer.tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]


def test_wordpiece_ids_are_a_function_of_the_sentences() -> None:
    """Every process of a run builds its own; the trainer of `tokenizers` gives other ids each time it runs."""
    built = [SentenceTokenizer.train_wordpiece(sentences, 9) for sentences in (SENTENCES, SENTENCES[::-1])]
    assert built[0].tokenizer.get_vocab() == built[1].tokenizer.get_vocab()


@pytest.mark.parametrize("kind", ["bert", "clip", "wordpiece"])
def test_saved_and_loaded_it_reads_the_same(kind: str, bert_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    made = {
        "bert": lambda: SentenceTokenizer.load(bert_folder, 7),
        "clip": lambda: SentenceTokenizer.load(clip_folder, 7),
        "wordpiece": lambda: SentenceTokenizer.train_wordpiece(SENTENCES, 7),
    }[kind]()
    made.save(tmp_path / "tokenizer")
    loaded = SentenceTokenizer.load(tmp_path / "tokenizer")
    assert loaded.max_tokens == 7 and loaded.vocab_size == made.vocab_size
    for sentence in (*SENTENCES, "a sentence that is much too long for seven tokens", ""):
        for before, after in zip(made(sentence), loaded(sentence), strict=True):
            assert torch.equal(before, after)


def test_real_sentences_keep_their_words(shared_dir: Path) -> None:
    text = json.loads((shared_dir / "data" / "refcoco_text" / "testA.json").read_text())
    sentences = [s if isinstance(s, str) else s["sent"] for ref in text for s in ref["sentences"]]
    assert len(sentences) == 5657
    tokenizer = SentenceTokenizer.train_wordpiece(sentences, 20)
    unknown = tokenizer.tokenizer.unk_token_id
    assert all(unknown not in tokenizer(s)[0] for s in sentences[::50])
    assert all(s.split()[0] in tokenizer.tokenizer.decode(tokenizer(s)[0]) for s in sentences[::50])


def test_a_tokenizer_that_cannot_be_had_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nobody/nothing.*wordpiece"):
        SentenceTokenizer.load("nobody/nothing", 20)
