"""What is said when the model does not read a sentence as it was typed."""

from amltrain.commands.predict import unread
from amltrain.data.text import SentenceTokenizer

TOKENIZER = SentenceTokenizer.train_wordpiece(["the red square on the left", "a blue circle"], 6)


def test_a_sentence_that_is_read_is_not_mentioned() -> None:
    assert unread(TOKENIZER, "the red square") == []


def test_a_sentence_that_is_cut() -> None:
    assert unread(TOKENIZER, "the red square on the left") == [
        '"the red square on the left" is cut after 6 tokens; not read: left'
    ]


def test_a_sentence_of_unknown_words() -> None:
    assert unread(TOKENIZER, "红色 方块") == ['"红色 方块": the model\'s vocabulary lacks most of it: 红色 方块']
    assert unread(TOKENIZER, "the 红色 square") == []
