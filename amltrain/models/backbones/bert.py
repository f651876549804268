"""BERT token features, on transformers' BertModel without its pooler; key names are HuggingFace's own.

Paper: Devlin et al., BERT, NAACL 2019. Official code bundles copies of transformers 3.0.2; the numbers are equal.

Dimensions: B batch, L text tokens, P appended vectors, C width.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel


def build_bert(
    *,
    vocab_size: int = 30522,
    hidden_size: int = 768,
    layers: int = 12,
    heads: int = 12,
    intermediate_size: int | None = None,
    max_positions: int = 512,
    dropout: float = 0.1,
) -> BertModel:
    """A BERT of the given size, random weights. The defaults are bert-base-uncased."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate_size or 4 * hidden_size,
        max_position_embeddings=max_positions,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertModel(config, add_pooling_layer=False)


def encode_tokens(bert: BertModel, input_ids: Tensor, text_mask: Tensor, appended: Tensor | None = None) -> Tensor:
    """Last hidden state of the tokens, and of vectors appended after them if there are any.

    input_ids [B, L] int64, text_mask [B, L] bool (True = a real token), appended [B, P, C] float: they skip BERT's
    embeddings (no position, no type, no LayerNorm) and are never masked. Returns [B, L + P, C].
    """
    hidden = bert.embeddings(input_ids=input_ids)
    if appended is not None:
        hidden = torch.cat([hidden, appended.to(hidden.dtype)], dim=1)
        text_mask = torch.cat([text_mask, text_mask.new_ones(appended.shape[:2])], dim=1)
    # -1e4 as in BERT, which half precision can hold
    bias = (1.0 - text_mask[:, None, None, :].to(hidden.dtype)) * -1e4
    return bert.encoder(hidden, attention_mask=bias).last_hidden_state


def train_first_layers(bert: BertModel, count: int) -> None:
    """Freeze everything but the first `count` layers: neither the embeddings nor the layers after those train."""
    bert.requires_grad_(False)
    bert.encoder.layer[:count].requires_grad_(True)


def set_bert_gradient_checkpointing(bert: BertModel, enabled: bool) -> None:
    """Recompute BERT's layers in the backward pass (the non-reentrant kind, which DDP and compile need).

    transformers' public switch also makes frozen embeddings ask for gradients and has another name in every version.
    """
    bert._set_gradient_checkpointing(enabled, partial(checkpoint, use_reentrant=False))
