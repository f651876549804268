"""Load models, build the page and serve it: what `amltrain demo` does after its arguments are read."""

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from amltrain.environment import choose_device
from amltrain.errors import UserError
from amltrain.evaluation.draw import tint
from amltrain.hub.model_folder import load_pretrained, read_training
from amltrain.inference.predict import describe, unread
from amltrain.inference.predictor import Predictor, load_image
from amltrain.methods.aml.masker import Aligner, build_aligner
from amltrain.report.collect import onto_image
from amltrain.run_folder import find_model_folder

SIDE = 800
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


def build_page(contenders: Sequence[Contender]) -> Any:
    """The page as gradio Blocks. Raises UserError where gradio is not installed."""
    gradio = import_gradio()

    def segment(image: Image.Image | None, sentence: str) -> list[Any]:
        if image is None:
            raise gradio.Error("Upload an image first.")
        if not sentence or not sentence.strip():
            raise gradio.Error("Type what to look for.")
        try:
            upright = load_image(image)
            shown = [contender(upright, sentence.strip()) for contender in contenders]
            return [value for found in shown for value in (found.mask, found.text, found.alignment)]
        except UserError as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title="amltrain demo", analytics_enabled=False) as page:
        gradio.Markdown("# Referring image segmentation\nUpload an image and type what to look for.")
        with gradio.Row():
            image = gradio.Image(type="pil", label="Image", height=320, sources=["upload", "clipboard"])
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
        gradio.on([button.click, sentence.submit], segment, [image, sentence], outputs, api_name="segment")
    return page


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
            server_name=host, server_port=port, theme=theme, prevent_thread_lock=True, share=False, quiet=True
        )
    except OSError as error:
        raise UserError(f"--port {port} on {host} cannot be used ({error}); choose another") from error
    if block:
        print(f"demo at {address} (Ctrl-C ends it)")
        page.block_thread()
    return str(address)
