"""Training methods: how to train a model, independent of the model.

    base.py            the contract: an nn.Module around model and loss, one forward and one backward per batch
    maskers.py         which blocks of an image a method hides
    aml/               alignment-aware masked learning
    maskris.py         masked image and sentence with self-distillation
    mask_grounding.py  hidden words recovered from the image and the referent's mask (MagNet)
    contrastive.py     sentences and images of a batch told apart, so that encoders share a space

A method is one file with a function under `@register_method`; see docs/adding-a-method.md.
"""
