"""Peak memory of a training step of a language model that segments, by torch's allocator, on one GPU.

    python benchmarks/language_memory.py gsva_7b --rows 8 --tokens 400 --checkpointing

Weights are random and stay float32, the step runs under bfloat16 autocast, with fused AdamW. Real memory on a card, or
what a simulated one would allocate: kernels' own workspaces are then not counted.
"""

import argparse
import json

import torch

from amltrain.losses import create_loss
from amltrain.models import create_model, model_info
from amltrain.training.estimate import blank_batch
from amltrain.training.optim import build_optimizer


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="gsva_7b or lisa_7b")
    parser.add_argument("--rows", type=int, default=1, help="conversations, each about a picture of its own")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of a conversation, the picture's 256 included")
    parser.add_argument("--checkpointing", action="store_true", help="compute the language model's layers again")
    args = parser.parse_args()
    device = torch.device("cuda")
    with device:
        model = create_model(args.model).train()
    model.set_gradient_checkpointing(args.checkpointing)
    weights = torch.cuda.memory_allocated()
    groups = model.param_groups(3e-4, 0.0)
    optimizer = build_optimizer(groups, "adamw", lr=3e-4, betas=(0.9, 0.95), eps=1e-8, amsgrad=False)
    loss = create_loss("language_and_masks")
    with device:
        batch = blank_batch(model_info(args.model).preprocess, args.rows, tokens=args.tokens)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(model(batch), batch)["loss"]
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated()
    print(json.dumps(vars(args) | {"weights_gb": round(weights / 1e9, 1), "peak_gb": round(peak / 1e9, 1)}))


if __name__ == "__main__":
    main()
