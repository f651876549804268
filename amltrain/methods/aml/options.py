"""What a run sets of AML: the section `aml`. Imports no torch, so that --help can show it quickly."""

from amltrain.config.partial import Partial, partial_of
from amltrain.methods.aml.presets import PRESETS, resolve
from amltrain.methods.aml.settings import AMLSettings
from amltrain.methods.registry import register_options


@register_options("aml")
@partial_of(AMLSettings)
class AMLOptions(Partial):
    """Alignment-aware masked learning (arXiv 2602.22740). null = the preset's value; the default preset is paper."""

    @staticmethod
    def presets() -> dict[str, AMLSettings]:
        """Return the complete settings that `preset` stands for, by name."""
        return PRESETS

    def complete(self) -> AMLSettings:
        """Return the preset with what the run sets itself. Raises UserError for values that cannot work."""
        return resolve(self)

    def check(self) -> None:
        """Raise UserError for values that cannot work, alone or together."""
        resolve(self)
