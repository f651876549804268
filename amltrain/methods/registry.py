"""The registry of training methods: a decorator on a function that builds the method; the function's name is its name.

@register_method(options=MaskRISOptions, summary="...", paper="...")
def maskris(model, loss, options, vocabulary) -> Method: ...

Options are a dataclass whose fields all have defaults; they are the section of a run that bears the method's name. A
`check()` on it raises UserError for values that cannot work, before any data is read. `presets()` on it returns named
complete settings, which `amltrain methods NAME` shows. A method that is a folder may declare its options in
`options.py` with `@register_options`, which then stays free of torch.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from amltrain.config.sections import Sections
from amltrain.errors import unknown_name
from amltrain.methods import METHODS

if TYPE_CHECKING:
    from torch import nn

    from amltrain.methods.base import Method
    from amltrain.models.base import RISModel
    from amltrain.records import Vocabulary

Builder = TypeVar("Builder", bound=Callable[..., "Method"])
Options = TypeVar("Options", bound=type)


@dataclass
class NoOptions:
    """The options of a method that has none."""


class MethodInfo(NamedTuple):
    """A registered method: how it is built, its options' type, one sentence, and its paper."""

    build: "Callable[..., Method]"
    options: type
    summary: str
    paper: str


_METHODS: dict[str, MethodInfo] = {}
_OPTIONS: dict[str, type] = {}


def register_options(name: str) -> Callable[[Options], Options]:
    """Register the options' dataclass of a method before the method itself is imported."""

    def register(options: Options) -> Options:
        _OPTIONS[name] = options
        return options

    return register


def register_method(*, summary: str, paper: str = "", options: type = NoOptions) -> Callable[[Builder], Builder]:
    """Register a function `build(model, loss, options, vocabulary) -> Method` under its own name."""

    def register(build: Builder) -> Builder:
        if build.__name__ in _METHODS:
            raise KeyError(f"method {build.__name__!r} is registered twice")
        _METHODS[build.__name__] = MethodInfo(build, options, summary, paper)
        _OPTIONS[build.__name__] = options
        return build

    return register


def list_methods() -> list[str]:
    """Names of all methods, sorted."""
    return sorted(METHODS)


def method_info(name: str) -> MethodInfo:
    """Return the entry of a method. Raises UserError for an unknown name."""
    if name not in METHODS:
        raise unknown_name("training method (method)", name, METHODS)
    importlib.import_module(METHODS[name])
    return _METHODS[name]


def options_type(name: str) -> type:
    """The dataclass of a method's options; imports no more than it has to. Raises UserError for an unknown name."""
    if name not in METHODS:
        raise unknown_name("training method (method)", name, METHODS)
    if name not in _OPTIONS and METHODS[name].endswith(".method"):
        importlib.import_module(METHODS[name].removesuffix("method") + "options")
    return _OPTIONS.get(name) or method_info(name).options


def build_method(
    name: str, model: "RISModel", loss: "nn.Module", options: Any = None, vocabulary: "Vocabulary | None" = None
) -> "Method":
    """Build a method around a model and its loss.

    options: of the method's own type; None = its defaults. vocabulary: of the run's tokenizer, for methods that change
    sentences. Raises UserError for options that this model cannot have, and for a loss that does not fit the model.
    """
    from amltrain.losses import check_channels

    check_channels(loss, type(model).__name__, model.mask_channels)
    info = method_info(name)
    options = info.options() if options is None else options
    check_options(options)
    method = info.build(model, loss, options, vocabulary)
    method.name = name
    return method


def check_options(options: Any) -> None:
    """Raise UserError for options that cannot work with any model."""
    check = getattr(options, "check", None)
    if check is not None:
        check()


def method_sections() -> Sections:
    """The options' sections of all methods, for the command line."""
    return Sections("method", tuple(METHODS), options_type)
