"""Conversations about pictures, as language models are trained and scored on them: GSVA's and LISA's.

samples of a batch -> those of one picture together -> question and answer -> token ids, labels, places of the answers

Three kinds: `train` (questions and answers drawn from the model's own lists), `given` (the official evaluation: the
ground truth's answer is part of the input, nothing is written) and `written` (one sentence per question, which ends
where the answer is due).

Strings are facts of the official data formats. Sources: LeapLabTHU/GSVA, commit 618dc79; dvlab-research/LISA, commit
3cb2d43 (both Apache-2.0).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from amltrain.data.text import SentenceTokenizer
from amltrain.errors import UserError
from amltrain.records import IMAGE, UNSCORED, Conversation, Sample

Kind = Literal["train", "given", "written"]
SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
SEGMENT, REJECT = "[SEG]", "[REJ]"
FRAME = ("<im_start>", "<im_end>")
"""Around the image."""


class Answer(NamedTuple):
    """`start`, then `part` with the sentence and its token for every sentence, then `end`."""

    start: str
    part: str
    end: str = "."


class Style(NamedTuple):
    """What a model asks and answers. {s}: the sentences, {a}: [SEG] or [REJ].

    asked, answered   of an evaluation. several: whether one question names several sentences. rejects: whether the
                      model has [REJ]. strips: whether full stops around a sentence are removed
    """

    questions: tuple[str, ...]
    answers: tuple[Answer, ...]
    asked: str
    answered: Answer
    several: bool
    rejects: bool
    strips: bool


STYLES = {
    "gsva": Style(
        questions=(
            "Can you segment {s} in this image?",
            "Please segment {s} in this image.",
            "What are {s} in this image? Please respond with segmentation masks.",
            "What are {s} in this image? Please output segmentation masks.",
        ),
        answers=(
            Answer("The segmentation results are ", "{s} {a}"),
            Answer("Sure, they are ", "{s}:{a}"),
            Answer("Sure, ", "the mask of {s} is {a}"),
            Answer("Sure, ", "the segmentation of {s} is {a}"),
            Answer("Sure, ", "the referred {s} is {a}"),
        ),
        # without the space before "in", and with one before "What", as in the official evaluation
        asked=" What are {s}in this image? Please output segmentation masks.",
        answered=Answer("Sure,", "{s}:{a}"),
        several=True,
        rejects=True,
        strips=True,
    ),
    "lisa": Style(
        questions=(
            "Can you segment the {s} in this image?",
            "Please segment the {s} in this image.",
            "What is {s} in this image? Please respond with segmentation mask.",
            "What is {s} in this image? Please output segmentation mask.",
        ),
        answers=(
            Answer("It is ", "{a}"),
            Answer("Sure, ", "{a}"),
            Answer("Sure, it is ", "{a}"),
            Answer("Sure, the segmentation result is ", "{a}"),
            Answer("", "{a}"),
        ),
        asked=" What is {s} in this image? Please output segmentation mask.",
        answered=Answer("", "{a}"),
        several=False,
        rejects=False,
        strips=False,
    ),
}


def answer_tokens(style: str) -> list[str]:
    """Texts of the tokens that a model of this style answers with."""
    return [SEGMENT, REJECT] if STYLES[style].rejects else [SEGMENT]


def words_of(style: str) -> list[str]:
    """Texts around the sentences, for a vocabulary that is built from a data set."""
    told = STYLES[style]
    parts = [text for answer in (*told.answers, told.answered) for text in (answer.start, answer.part, answer.end)]
    texts = [SYSTEM, "USER: ASSISTANT: ,", *told.questions, told.asked, *parts]
    return [text.replace("{s}", " ").replace("{a}", " ") for text in texts]


def add_tokens(tokenizer: SentenceTokenizer, style: str) -> list[int]:
    """Add what the conversations need to a tokenizer, where it is not there; returns the ids of [SEG] and [REJ].

    The order is the official one, so that a vocabulary of 32,000 gets 32,000 to 32,003.
    """
    inner = tokenizer.tokenizer
    inner.add_tokens(answer_tokens(style))
    inner.add_tokens(list(FRAME), special_tokens=True)
    ids: list[int] = [inner.convert_tokens_to_ids(text) for text in (*answer_tokens(style), *FRAME)]  # type: ignore[misc]
    if len(set(ids)) < len(ids) or any(number is None for number in ids):
        raise UserError(
            f"the tokenizer cannot hold {', '.join([*answer_tokens(style), *FRAME])} as tokens of their own; use the "
            f"tokenizer of the language model (preprocess.tokenizer)"
        )
    return ids[: len(answer_tokens(style))]


class ConversationWriter:
    """Writes the conversation of a batch."""

    def __init__(
        self,
        tokenizer: SentenceTokenizer,
        style: str,
        kind: Kind,
        *,
        image_tokens: int,
        longest: int,
        sentences: int = 1,
    ) -> None:
        """tokenizer: with the tokens of `add_tokens`. image_tokens: places of a picture. longest: tokens of a training
        conversation, the image counted once. sentences: how many share a question, where the style lets them.
        """
        self.tokenizer, self.style, self.kind = tokenizer.tokenizer, STYLES[style], kind
        self.image_tokens, self.longest = image_tokens, longest
        self.sentences = sentences if self.style.several and kind != "written" else 1
        known = self.tokenizer.get_vocab()
        missing = [text for text in answer_tokens(style) if text not in known]
        if missing:
            raise UserError(
                f"the tokenizer has lost {', '.join(missing)}, which the model answers with; use the whole tokenizer "
                f"that was saved with the model"
            )
        self.answers = {known[text]: text for text in answer_tokens(style)}
        self.own = sorted({*self.answers.values(), *FRAME, *self.tokenizer.all_special_tokens}, key=len, reverse=True)

    def __call__(self, samples: Sequence[Sample]) -> Conversation:
        """The conversation of samples in a row; neighbours with the same picture share a question."""
        groups: list[list[int]] = []
        for number, sample in enumerate(samples):
            last = samples[groups[-1][0]] if groups else None
            shares = last is not None and last.picture == sample.picture and len(groups[-1]) < self.sentences
            (groups[-1].append(number) if shares else groups.append([number]))
        rows, row, place = [], [], []
        for number, group in enumerate(groups):
            ids, labels, places = self.talk([samples[i] for i in group])
            rows.append((ids, labels))
            row += [number] * len(group)
            place += places
        length = max(len(ids) for ids, _ in rows)
        count = len(rows)
        ids_of = torch.full((count, length), self.tokenizer.pad_token_id or 0, dtype=torch.int64)
        labels_of = torch.full((count, length), UNSCORED, dtype=torch.int64)
        mask = torch.zeros(count, length, dtype=torch.bool)
        for number, (ids, labels) in enumerate(rows):
            there = slice(length - len(ids), length) if self.kind == "written" else slice(0, len(ids))
            ids_of[number, there], labels_of[number, there] = torch.tensor(ids), torch.tensor(labels)
            mask[number, there] = True
        first: dict[int, int] = {}
        for group in groups:
            first.setdefault(samples[group[0]].picture, group[0])
        order = {picture: number for number, picture in enumerate(first)}
        end = self.tokenizer.eos_token_id
        return Conversation(
            ids_of,
            labels_of,
            mask,
            torch.tensor(row),
            torch.tensor(place),
            torch.tensor([order[samples[group[0]].picture] for group in groups]),
            torch.tensor(list(first.values())),
            scored=self.kind == "given",
            open=self.kind == "written",
            end=-1 if end is None else end,
        )

    def talk(self, samples: Sequence[Sample]) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels and the answers' places of one conversation about a picture, its image expanded."""
        question, answer = self.text(samples)
        head, tail = self._encode(f"{SYSTEM} USER: {FRAME[0]}"), self._encode(f"{FRAME[1]}\n{question} ASSISTANT:")
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        before = [*start, *head, IMAGE, *tail]
        if self.kind == "written":
            return self._expanded(before), [UNSCORED] * (len(before) + self.image_tokens - 1), [-1] * len(samples)
        end = self.tokenizer.eos_token or ""
        # tokenised with what comes before it: a piece may depend on its neighbour
        whole = [*start, *head, IMAGE, *self._encode(f"{FRAME[1]}\n{question} ASSISTANT: {answer}{end}")]
        if whole[: len(before)] != before:
            raise UserError(f"the tokenizer joins the answer to the question {question!r}; use that of a LLaMA")
        places = [at for at, number in enumerate(whole) if at >= len(before) and number in self.answers]
        if self.kind == "train":
            whole = whole[: self.longest]
        labels = [UNSCORED] * len(before) + whole[len(before) :]
        grown = self.image_tokens - 1
        return (
            self._expanded(whole),
            [UNSCORED] * grown + labels[: len(whole)],
            [at + grown if at < len(whole) else -1 for at in places],
        )

    def text(self, samples: Sequence[Sample]) -> tuple[str, str]:
        """Question and answer; which of the training's own they are is a function of the first sample's random key."""
        style = self.style
        names = [self._name(sample.sentence) for sample in samples]
        key = int(samples[0].random_key)
        if self.kind == "train":
            question = style.questions[key % len(style.questions)]
            answer = style.answers[key // len(style.questions) % len(style.answers)]
        else:
            question, answer = style.asked, style.answered
            names = [name.lower().strip() for name in names]
        rejected = [style.rejects and bool(sample.no_target) for sample in samples]
        parts = [
            answer.part.replace("{a}", REJECT if no else SEGMENT).replace("{s}", name)
            for name, no in zip(names, rejected, strict=True)
        ]
        asked = question.replace("{s}", ", ".join(names).lower())
        return asked, answer.start + ", ".join(parts) + answer.end

    def _name(self, sentence: str) -> str:
        """A sentence as it is put into question and answer; no part of it can pass for a token of the conversation."""
        while found := [text for text in self.own if text in sentence]:  # taking one away may make another
            sentence = sentence.replace(found[0], found[0].strip("[]<>|/") or " ")
        sentence = sentence.strip()
        return sentence.strip(".").strip() if self.style.strips else sentence

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _expanded(self, ids: list[int]) -> list[int]:
        at = ids.index(IMAGE)
        return [*ids[:at], *[IMAGE] * self.image_tokens, *ids[at + 1 :]]
