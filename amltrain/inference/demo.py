"""Load models, build the page and serve it: what `amltrain demo` does after its arguments are read."""

import html
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from amltrain.environment import choose_device
from amltrain.errors import UserError, plain
from amltrain.evaluation.draw import tint
from amltrain.hub.model_folder import load_pretrained, read_training
from amltrain.inference.predict import describe, unread
from amltrain.inference.predictor import Predictor, load_image
from amltrain.methods.aml.masker import Aligner, build_aligner
from amltrain.report.collect import onto_image
from amltrain.run_folder import find_model_folder

SIDE = 800
MAX_BYTES, MAX_PIXELS, MAX_LETTERS = 20 * 2**20, 30_000_000, 500
"""The largest upload, image and sentence: larger ones would keep everybody else waiting."""
MAX_WAITING = 64
"""Requests in the queue; later ones are told to come back."""
CACHE_SECONDS = 600
"""Age at which uploads and answers are deleted."""
ALIGNMENT = "Alignment scores, dark 0 to bright 1 (temperature solved on this image)"


class Shown(NamedTuple):
    """Outputs of one model on the page: the mask over the image, the alignment map over it, a text below the mask."""

    mask: Image.Image
    alignment: Image.Image | None
    text: str


class Contender:
    """A model of the demo."""

    def __init__(self, predictor: Predictor, aligner: Aligner | None, label: str) -> None:
        self.predictor, self.aligner, self.label = predictor, aligner, label

    def __call__(self, image: Image.Image, sentence: str) -> Shown:
        """Segment and draw. image: RGB."""
        (found,) = self.predictor(image, sentence)
        notes = [
            describe(found).capitalize() + ".",
            *(f"Warning: {n}" for n in unread(self.predictor.tokenizer, sentence)),
        ]
        side = min(SIDE, max(320, *image.size))
        return Shown(tint(image, found.mask, side=side), self._alignment(image, sentence, side), "\n\n".join(notes))

    def _alignment(self, image: Image.Image, sentence: str, side: int) -> Image.Image | None:
        """Scores 0 to 1 as colours over the image; the temperature is solved on this image, so their mean is 0.75."""
        if self.aligner is None:
            return None
        pixels, _, geometry = self.predictor.transform(image, None)
        batch = self.predictor.batch(pixels, geometry, [sentence])
        try:
            self.aligner.calibrate([batch], again=True)
        except UserError:
            return None
        maps = self.aligner(batch)
        assert maps.scores is not None, "AML's masker always scores"
        size = (batch.image.shape[-2], batch.image.shape[-1])
        scores = onto_image(maps.scores[0].float().cpu().numpy(), size, geometry.tolist())
        colours = Image.fromarray(matplotlib.colormaps["viridis"](np.clip(scores, 0, 1), bytes=True)[..., :3])
        scale = side / max(image.size)
        shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return Image.blend(image.resize(shape), colours.resize(shape, Image.Resampling.NEAREST), 0.65)


def load_contenders(checkpoints: Sequence[str], device: str | None, revision: str | None = None) -> list[Contender]:
    """Load the models. Raises UserError for more than two, or for one that cannot be loaded."""
    if len(checkpoints) > 2:
        raise UserError(f"--checkpoint names {len(checkpoints)} models; the page shows one or two")
    chosen = choose_device(device)
    contenders = []
    for checkpoint in checkpoints:
        predictor = Predictor(load_pretrained(checkpoint, revision=revision), chosen)
        training = read_training(find_model_folder(checkpoint, revision))
        label = f"{Path(checkpoint).as_posix().removesuffix('/model')} ({predictor.name})"
        contenders.append(Contender(predictor, build_aligner(predictor.model, training), label))
    return contenders


def missing(upload: str | None, sentence: Any) -> str:
    """What to do first, in one line; empty where there is an upload and a sentence."""
    no_sentence = not isinstance(sentence, str) or not sentence.strip()
    if not upload:
        return "Upload an image, and type what to look for." if no_sentence else "Upload an image first."
    return "Type what to look for." if no_sentence else ""


def respond(contenders: Sequence[Contender], upload: str | None, sentence: Any) -> list[Shown]:
    """Segment an uploaded file with every model. Raises UserError for anything that is not an image and a sentence.

    Sizes are looked at before anything is decoded or read by a tokenizer.
    """
    if asked := missing(upload, sentence):
        raise UserError(asked)
    assert upload is not None, "an upload is there, or it is asked for"
    if len(sentence) > MAX_LETTERS:
        raise UserError(f"The sentence has {len(sentence):,} characters; type at most {MAX_LETTERS}.")
    image = read_upload(Path(upload))
    return [contender(image, plain(sentence).strip()) for contender in contenders]


def read_upload(path: Path) -> Image.Image:
    """Read an uploaded image as RGB, upright. Raises UserError without the server's path in it."""
    try:
        size = path.stat().st_size if path.is_file() else 0
        if size > MAX_BYTES:
            raise UserError(f"The file has {size / 2**20:.0f} MiB; upload at most {MAX_BYTES // 2**20}.")
        with Image.open(path) as image:  # reads the header alone
            pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise UserError(
                f"The image has {pixels / 1e6:,.0f} million pixels; upload at most {MAX_PIXELS // 10**6} million."
            )
        return load_image(path)
    except UserError as error:
        raise UserError(str(error).replace(str(path), "The file")) from error
    except Image.DecompressionBombError as error:
        raise UserError(f"The image has too many pixels; upload at most {MAX_PIXELS // 10**6} million.") from error
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise UserError("The file is not an image that can be read; upload a JPEG, PNG or WebP picture.") from error


def build_page(contenders: Sequence[Contender]) -> Any:
    """The page as gradio Blocks. Raises UserError where gradio is not installed."""
    gradio = import_gradio()

    def segment(upload: str | None, sentence: str) -> list[Any]:
        if asked := missing(upload, sentence):
            return [value for i in range(len(contenders)) for value in (None, asked if i == 0 else "", None)]
        try:
            shown = respond(contenders, upload, sentence)
        except UserError as error:
            raise gradio.Error(html.escape(str(error))) from error
        return [value for found in shown for value in (found.mask, found.text, found.alignment)]

    cache = (60, CACHE_SECONDS)  # seconds between looks, and the age of what is deleted
    with gradio.Blocks(title="amltrain demo", analytics_enabled=False, delete_cache=cache) as page:
        gradio.Markdown("# Referring image segmentation\nUpload an image and type what to look for.")
        with gradio.Row():
            image = gradio.Image(type="filepath", label="Image", height=320, sources=["upload", "clipboard"])
            image.preprocess = lambda payload: getattr(payload, "path", None)  # decoded here, after its size is known
            with gradio.Column():
                sentence = gradio.Textbox(label="Sentence", placeholder="the red car on the left", elem_id="sentence")
                button = gradio.Button("Segment", variant="primary", elem_id="segment")
        outputs: list[Any] = []
        with gradio.Row():
            for contender in contenders:
                with gradio.Column():
                    gradio.Markdown(f"### {contender.label}")
                    mask = _picture(gradio, "Mask")
                    answer = gradio.Markdown(elem_classes="answer")
                    scored = contender.aligner is not None
                    gradio.Markdown(ALIGNMENT, visible=scored)
                    outputs += [mask, answer, _picture(gradio, "Alignment scores", visible=scored)]
        events = [button.click, sentence.submit]
        gradio.on(events, segment, [image, sentence], outputs, api_name="segment", concurrency_limit=1)
    return page.queue(max_size=MAX_WAITING)  # the page shows the place in it


def _picture(gradio: Any, label: str, visible: bool = True) -> Any:
    """A picture that the page fills, with nothing over it but the buttons to enlarge and to save it.

    Gradio 6 adds a button that publishes the picture on the Hub; older versions show it only on Spaces.
    """
    newer = "buttons" in inspect.signature(gradio.Image).parameters
    options = {"buttons": ["download", "fullscreen"]} if newer else {}
    return gradio.Image(label=label, show_label=False, interactive=False, format="png", visible=visible, **options)


def import_gradio() -> Any:
    """Import gradio with its telemetry off. Raises UserError if it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise UserError("the demo needs gradio; install it with: pip install 'gradio>=5'") from error
    return gradio


def launch(page: Any, host: str, port: int | None, *, block: bool = True) -> str:
    """Serve the page and return its address. Raises UserError if the port is taken."""
    gradio = import_gradio()
    fonts = ["system-ui", "sans-serif"]  # the default theme fetches its fonts from the network
    theme = gradio.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            theme=theme,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            max_file_size=MAX_BYTES,
        )
    except OSError as error:
        raise UserError(f"--port {port} on {host} cannot be used ({error}); choose another") from error
    if block:
        print(f"demo at {address} (Ctrl-C ends it)")
        page.block_thread()
    return str(address)
