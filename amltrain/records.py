"""The records that data, models and methods exchange, in the order in which they appear.

NamedTuples, because Accelerate moves and gathers them as they are (it does not walk dataclasses).

Dimensions: B batch, H W network input size, h w a feature map's size, L text tokens, C channels, K classes.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Draw(NamedTuple):
    """What a sampler hands to a dataset: everything random about a sample is a function of the seed and of these."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides a tuple's own method, which a draw does not need
    repeat: int = 0
    """How often the sample was drawn before in this epoch; weights of data sets draw some again."""


class Sample(NamedTuple):
    """One image with one sentence, ready to be collated. Fields as in `Batch`, without the first dimension.

    sentence: the words as they are, for those who do not read `input_ids`. picture: the same number for samples of one
    picture of the data set.
    """

    image: Tensor
    input_ids: Tensor
    text_mask: Tensor
    target: Tensor
    no_target: Tensor
    sample_id: Tensor
    random_key: Tensor
    geometry: Tensor
    original_target: Tensor | None = None
    regions: Tensor | None = None
    view: Tensor | None = None
    sentence: str = ""
    picture: int = -1
    box: Tensor | None = None
    view_geometry: Tensor | None = None
    instances: tuple[Tensor, ...] = ()


class Vocabulary(NamedTuple):
    """What a method that changes sentences must know of the tokenizer; all are token ids but `size`.

    size      entries of the vocabulary
    padding   fills a sentence up
    mask      stands for a hidden word; None where the tokenizer has none (CLIP)
    special   ids that are not words: padding, unknown, start, end, mask
    """

    size: int
    padding: int
    mask: int | None
    special: tuple[int, ...]


IMAGE, UNSCORED = -200, -100
"""In place of a token id: a position that the image takes; in place of a label: a position that no loss reads."""


class Conversation(NamedTuple):
    """What a language model reads of a batch: R conversations about P pictures, with an answer for each of B sentences.

    ids       [R, T] int64, tokens; IMAGE where a patch of the picture goes
    labels    [R, T] int64, the same where an answer is learned, else UNSCORED
    mask      [R, T] bool, True = read; padded on the right, or on the left where the talk is open
    row       [B] int64, the conversation of each sentence
    place     [B] int64, position of its answer's token, [SEG] or [REJ]; -1 = cut off, or not there because it is open
    owner     [R] int64, number of the picture that each conversation is about
    pictures  [P] int64, row of the batch that has each picture
    scored    the answers are the ground truth's, and the model is judged by what it would have said there
    open      it ends where the answer is due, and the model writes it (R = B)
    end       token id that ends an answer; -1 = none
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor
    row: Tensor
    place: Tensor
    owner: Tensor
    pictures: Tensor
    scored: bool = True
    open: bool = False
    end: int = -1


class Batch(NamedTuple):
    """What a model reads (`image`, `input_ids`, `text_mask`), what a loss reads, and what leads back to the data.

    image            [B, 3, H, W] uint8 as a loader gives it; float32, normalised with the mean and std of the model's
                     protocol, after `data.transforms.prepare_batch`: what models, losses and methods expect
    input_ids        [B, L] int64, padded to the protocol's `max_tokens`
    text_mask        [B, L] bool, True = a real token, [CLS] and [SEP] included
    target           [B, H, W] uint8, share of the pixel that the referent covers in 1/255: 255 referent, 0 background;
                     values between only where a protocol resizes masks linearly (letterbox)
    no_target        [B] bool, True = the sentence means nothing in the image (gRefCOCO)
    sample_id        [B] int64, position in the dataset's index: unique in a split
    random_key       [B] int64, hash of (seed, epoch, sample): the only source of per-sample randomness in a step
    geometry         [B, 6] float64: original height, original width, then the map from original to network pixels:
                     scale_y, scale_x, offset_y, offset_x (network = original * scale + offset, continuous coordinates)
    original_target  B tensors [h0, w0] uint8 0/255 at each image's own size; empty unless the evaluation needs it
    regions          [B, H, W] uint8, what the annotations say of every pixel before any label noise: BACKGROUND,
                     OTHER (another referent of the picture) or REFERENT of `data.augment`; None unless the method asks
    loss_weight      [B, H, W] float32, 0..1: how much a pixel counts in the loss; None = all the same. A method sets it
    view             [B, 3, v, v] as `image`, but normalised as CLIP's: the same picture in the frame of a second
                     encoder; None unless the model asks (`preprocess.view_size`)
    view_geometry    [B, 6] float64, `geometry` of the view
    instances        [B, N, H, W] uint8 as `target`: what a sentence means, one by one, in samples that mean several
                     objects; the rest of the N is empty. None = every target is one, or the model does not ask
                     (`needs_instances`)
    conversation     what a language model reads; None = it makes its own of `input_ids`
    box              [B, 4] float32, corners x1, y1, x2, y2 of the referent in pixels of the network's input, by
                     `data.boxes`; zeros without a referent. None unless the model `needs_boxes`
    """

    image: Tensor
    input_ids: Tensor
    text_mask: Tensor
    target: Tensor
    no_target: Tensor
    sample_id: Tensor
    random_key: Tensor
    geometry: Tensor
    original_target: tuple[Tensor, ...] = ()
    regions: Tensor | None = None
    loss_weight: Tensor | None = None
    view: Tensor | None = None
    conversation: Conversation | None = None
    box: Tensor | None = None
    view_geometry: Tensor | None = None
    instances: Tensor | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with `change` applied to every tensor with a row per sample; `original_target` stays as it is, and
        there is no conversation, which may be about several samples.
        """
        return Batch(
            image=change(self.image),
            input_ids=change(self.input_ids),
            text_mask=change(self.text_mask),
            target=change(self.target),
            no_target=change(self.no_target),
            sample_id=change(self.sample_id),
            random_key=change(self.random_key),
            geometry=change(self.geometry),
            original_target=self.original_target,
            regions=None if self.regions is None else change(self.regions),
            loss_weight=None if self.loss_weight is None else change(self.loss_weight),
            view=None if self.view is None else change(self.view),
            box=None if self.box is None else change(self.box),
            view_geometry=None if self.view_geometry is None else change(self.view_geometry),
            instances=None if self.instances is None else change(self.instances),
        )


class Features(NamedTuple):
    """What a model's encoders give its decoder.

    visual      maps [B, C_i, h_i, w_i] from fine to coarse
    text        [B, L, C_t] one vector per token, padded positions included
    text_mask   [B, L] bool, True = a real token
    extra       further inputs of this model's decoder (a sentence vector, ...)
    suppressed  [B, h, w] bool at the coarsest map's size, positions that attention must not read (AML level
                "feature"); None = read everything
    """

    visual: tuple[Tensor, ...]
    text: Tensor
    text_mask: Tensor
    extra: dict[str, Tensor] = {}  # noqa: RUF012 - a NamedTuple default, never mutated
    suppressed: Tensor | None = None


class AlignmentFeatures(NamedTuple):
    """What AML scores: visual [B, C_v, h, w], text [B, L, C_t], text_mask [B, L] bool (True = a real token)."""

    visual: Tensor
    text: Tensor
    text_mask: Tensor


class ModelOutput(NamedTuple):
    """Output of a model.

    logits  [B, 2, h, w] (background, referent; softmax) or [B, 1, h, w] (referent; sigmoid), at the model's own size
    aux     named extra outputs. Names with a meaning outside the model:
            "box" [B, 4] the referent's box: centre x, centre y, width, height as shares of the network's input;
            "no_target" [B, 2] logits (target, no target); "fused_visual" [B, C, h, w] and "fused_text" [B, L, C] after
            cross-modal fusion (AML `features: late`)
    """

    logits: Tensor
    aux: dict[str, Tensor] = {}  # noqa: RUF012 - a NamedTuple default, never mutated
