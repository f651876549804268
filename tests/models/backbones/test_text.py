"""Token features against transformers' own call, with vectors appended, and what is frozen."""

import pytest
import torch

from amltrain.models.backbones.text import (
    build_bert,
    encode_tokens,
    set_bert_gradient_checkpointing,
    train_first_layers,
)


@pytest.fixture
def bert():
    torch.manual_seed(0)
    return build_bert(vocab_size=50, hidden_size=16, layers=3, heads=2, max_positions=12, dropout=0.0).eval()


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    return torch.randint(1, 50, (2, 7)), mask


def test_same_as_calling_the_model(bert, tokens) -> None:
    ids, mask = tokens
    expected = bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(encode_tokens(bert, ids, mask), expected)


def test_appended_vectors_are_read_and_padding_is_not(bert, tokens) -> None:
    ids, mask = tokens
    extra = torch.randn(2, 3, 16)
    out = encode_tokens(bert, ids, mask, extra)
    assert out.shape == (2, 10, 16)
    assert not torch.allclose(out[:, :7], encode_tokens(bert, ids, mask), atol=1e-3)
    assert not torch.allclose(out[:, :7], encode_tokens(bert, ids, mask, extra.flip(0))[:, :7], atol=1e-3)
    other = encode_tokens(bert, ids.masked_fill(~mask, 9), mask, extra)
    torch.testing.assert_close(other[1, :4], out[1, :4])
    torch.testing.assert_close(other[:, 7:], out[:, 7:])


def test_appended_vectors_skip_the_embeddings(bert, tokens) -> None:
    """What enters the first layer is the vectors as they are: no position, no type, no norm."""
    ids, mask = tokens
    seen = []
    bert.encoder.layer[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    extra = 100 * torch.randn(2, 3, 16)
    encode_tokens(bert, ids, mask, extra)
    torch.testing.assert_close(seen[0][:, 7:], extra, rtol=0, atol=0)
    torch.testing.assert_close(seen[0][:, :7], bert.embeddings(input_ids=ids), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_masks_padding_too(bert, tokens, dtype: torch.dtype) -> None:
    ids, mask = tokens
    with torch.autocast("cpu", dtype=dtype):
        one, other = (encode_tokens(bert, x, mask) for x in (ids, ids.masked_fill(~mask, 9)))
    assert one.isfinite().all()
    torch.testing.assert_close(one[mask], other[mask], rtol=0, atol=0)


def test_checkpointing_changes_nothing(bert, tokens) -> None:
    bert.train()
    encode_tokens(bert, *tokens).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in bert.named_parameters()}
    bert.zero_grad()
    set_bert_gradient_checkpointing(bert, True)
    encode_tokens(bert, *tokens).square().sum().backward()
    for name, p in bert.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    set_bert_gradient_checkpointing(bert, False)


def test_only_the_first_layers_train(bert) -> None:
    train_first_layers(bert, 2)
    trained = {name for name, p in bert.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in bert.named_parameters() if n.startswith(("encoder.layer.0.", "encoder.layer.1."))}
