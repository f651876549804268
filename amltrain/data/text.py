"""Turn a sentence into token ids, as the official code does.

BERT style: [CLS] words [SEP], cut by plain slicing after the special tokens are added, so a long sentence loses [SEP].
CLIP style: `clean` first, as CLIP's own tokenizer does and transformers' does not; then start, pieces, end; a long
sentence keeps the end token in the last place. A tokenizer without special tokens (TIPSv2) is cut by plain slicing. All
are padded with id 0.
"""

import html
import json
import os
import reprlib
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from amltrain.environment import PACKAGED, TEXT, package_folder
from amltrain.errors import UserError, first_line
from amltrain.files import load_json, write_text
from amltrain.records import Vocabulary

# loader processes are forked after the tokenizer was used; its own threads would then only warn
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TRAIN_WORDPIECE = (
    "name a folder that has it, or set preprocess.tokenizer to wordpiece to build one from the training sentences"
)
LONGEST, LONGEST_GROWTH = 4096, 100
"""Tokens of a sentence, and how many times longer a tokenizer's replacements may make a text."""
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_QUOTES = {**dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"), **dict.fromkeys("\u201c\u201d\u201e\u201f", '"')}
_FORMS = [0x3000, *range(0xFF01, 0xFFF0), *range(0xFB00, 0xFB05)]  # full width, half width, ligatures of f
PLAIN = str.maketrans(_QUOTES | {c: unicodedata.normalize("NFKC", c) for c in map(chr, _FORMS)})


def clean(sentence: str) -> str:
    """A sentence with HTML entities, curly quotes and full-width letters as plain text, as CLIP's tokenizer reads it.

    CLIP asks the library ftfy, whose results these are, and unescapes twice. ftfy's other steps are left out: to repair
    text that was decoded wrongly (the two letters that stand for one accented one), and to drop control characters.
    """
    if "<" not in sentence:  # ftfy leaves a piece of HTML alone
        sentence = html.unescape(sentence)
    return html.unescape(html.unescape(sentence.translate(PLAIN))).strip()


def _check_replacements(path: Path) -> None:
    """Raise UserError if a tokenizer's replacements could make a short text huge."""
    if not path.is_file():
        return
    growth, pending = 1, [load_json(path)]
    while pending:
        entry = pending.pop()
        if isinstance(entry, dict) and entry.get("type") == "Replace":
            growth *= max(1, len(str(entry.get("content", ""))))
        if isinstance(entry, dict):  # the vocabulary holds no replacement, and is long
            pending += [value for key, value in entry.items() if key not in ("model", "vocab", "added_tokens")]
        elif isinstance(entry, list):
            pending += entry
        if growth > LONGEST_GROWTH:
            raise UserError(f"{path} makes a text more than {LONGEST_GROWTH} times longer; use another tokenizer")


class SentenceTokenizer:
    """A transformers tokenizer with a fixed sentence length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        """max_tokens: L, special tokens included."""
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.keeps_end = tokenizer.cls_token is None and tokenizer.eos_token is not None

    def __call__(self, sentence: str) -> tuple[Tensor, Tensor]:
        """input_ids [L] int64 padded with 0, text_mask [L] bool (True = a real token)."""
        ids = self._encode(sentence)
        if len(ids) > self.max_tokens:
            end = ids[-1]
            ids = ids[: self.max_tokens]
            if self.keeps_end:
                ids[-1] = end
        input_ids = torch.zeros(self.max_tokens, dtype=torch.int64)
        input_ids[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return input_ids, torch.arange(self.max_tokens) < len(ids)

    def _encode(self, sentence: str, special: bool = True) -> list[int]:
        """Return all ids, not truncated. Raises UserError for half of a surrogate pair, which is not text."""
        text = clean(sentence) if self.keeps_end else sentence
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError("a sentence holds half of a surrogate pair, which is not valid text") from error
        return self.tokenizer.encode(text, add_special_tokens=special, verbose=False)  # it warns about truncation

    def cut(self, sentence: str) -> str:
        """Return the words from the first truncated one on; empty if all are read."""
        words = sentence.split()
        limit = self.max_tokens + (self.tokenizer.cls_token is not None)  # BERT's end token may be cut
        read, more = 0, len(words)  # of the first words, so many fit for certain, and at most so many
        while read < more:
            middle = (read + more + 1) // 2
            if len(self._encode(" ".join(words[:middle]))) <= limit:
                read = middle
            else:
                more = middle - 1
        return " ".join(words[read:])

    def unknown(self, sentence: str) -> list[str]:
        """The words that the model has hardly seen: with a piece that is not in the vocabulary, or read as letters.

        A small vocabulary spells a word of its own alphabet; a large one has whole words or long pieces.
        """
        return [word for word in sentence.split() if self._is_unknown(word)]

    def _is_unknown(self, word: str) -> bool:
        ids = self._encode(word, special=False)
        pieces = [str(self.tokenizer.decode([i])).removeprefix("##").strip() for i in ids]
        return self.tokenizer.unk_token_id in ids or (len(pieces) > 2 and all(len(p) == 1 for p in pieces))

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def vocabulary(self) -> Vocabulary:
        """The token ids that a method which changes sentences must know."""
        special = tuple(sorted({0, *self.tokenizer.all_special_ids}))
        return Vocabulary(self.vocab_size, 0, self.tokenizer.mask_token_id, special)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a model folder, the sentence length among them.

        transformers leaves out that a LLaMA's tokenizer is of the old kind, and would read it as one of the new kind,
        which gives other ids around added tokens.
        """
        self.tokenizer.model_max_length = self.max_tokens
        self.tokenizer.save_pretrained(str(folder))
        if getattr(self.tokenizer, "legacy", False):
            path = Path(folder) / "tokenizer_config.json"
            kept = load_json(path) | {"legacy": True}
            write_text(path, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(
        cls, name: str | Path, max_tokens: int | None = None, fix: str = TRAIN_WORDPIECE, **options: bool
    ) -> "SentenceTokenizer":
        """From a folder, a Hub id, or `packaged` (MiniLM's); without `max_tokens`, the length that `save` kept.

        fix: advice if there is none. options: of transformers' tokenizer. Raises UserError for an unavailable tokenizer
        or damaged files.
        """
        if name == PACKAGED:
            with tempfile.TemporaryDirectory() as folder:
                return cls.load(packaged_tokenizer(Path(folder)), max_tokens)
        _check_replacements(Path(name) / "tokenizer.json")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(name), trust_remote_code=False, **options)
        except Exception as error:  # files of something else than a tokenizer can raise almost anything
            if Path(name).is_dir():
                raise UserError(
                    f"the tokenizer files in {name} are missing or damaged ({type(error).__name__}: "
                    f"{first_line(error)}); copy or download them again"
                ) from error
            raise UserError(
                f"tokenizer {str(name)!r} is not a folder and cannot be fetched from the Hub; {fix}"
            ) from error
        stated = tokenizer.model_max_length
        if not isinstance(stated, (int, float)) or not stated >= 1:
            shown = reprlib.repr(stated)
            raise UserError(f"the tokenizer of {name} has model_max_length {shown}, not a number of tokens")
        return cls(tokenizer, max_tokens or int(min(stated, LONGEST)))  # transformers writes 1e30 for no limit

    @classmethod
    def train_wordpiece(cls, sentences: Iterable[str], max_tokens: int, vocab_size: int = 8192) -> "SentenceTokenizer":
        """Build a lower-case BERT-style vocabulary: letters, and the most frequent words whole.

        A function of the sentences alone. `tokenizers`' own WordPiece trainer breaks ties differently in every process,
        so two processes, or a run and its resumption, would not share a vocabulary.
        """
        normalise, split = BertNormalizer(lowercase=True), BertPreTokenizer()
        counts: Counter[str] = Counter()
        for sentence, times in Counter(sentences).items():  # many are alike
            for word, _ in split.pre_tokenize_str(normalise.normalize_str(sentence)):
                counts[word] += times
        letters = sorted({letter for word in counts for letter in word})
        words = sorted(counts, key=lambda word: (-counts[word], word))
        entries = dict.fromkeys([*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters), *words])
        vocabulary = {token: number for number, token in enumerate(list(entries)[:vocab_size])}
        wordpiece = BertWordPieceTokenizer(vocab=vocabulary, lowercase=True)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=wordpiece._tokenizer,
            unk_token="[UNK]",
            sep_token="[SEP]",
            pad_token="[PAD]",
            cls_token="[CLS]",
            mask_token="[MASK]",
        )
        return cls(tokenizer, max_tokens)


def packaged_tokenizer(folder: Path) -> Path:
    """Write the tokenizer files of the package with MiniLM into a folder; returns the folder."""
    with zipfile.ZipFile(package_folder(TEXT) / "model.zip") as archive:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            archive.extract(name, folder)
    return folder
