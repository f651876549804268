"""Training methods: how to train a model, independent of the model.

    base.py            the contract: an nn.Module around model and loss, one forward and one backward per batch
    registry.py        methods by name, and their options
    blocks.py          masked blocks of an image, which several methods use
    supervised.py      the plain baseline
    aml/               alignment-aware masked learning
    maskris.py         masked image and sentence with self-distillation
    mask_grounding.py  hidden words recovered from the image and the referent's mask (MagNet)
    contrastive.py     sentences and images of a batch told apart, so that encoders share a space

A new method is one file with a function under `@register_method`, and one line in `METHODS`.
"""

METHODS = {
    "supervised": "amltrain.methods.supervised",
    "aml": "amltrain.methods.aml.method",
    "maskris": "amltrain.methods.maskris",
    "mask_grounding": "amltrain.methods.mask_grounding",
    "contrastive": "amltrain.methods.contrastive",
}
"""The file of each method, imported on first use: the command line's help must not wait for torch."""
