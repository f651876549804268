"""One registry for everything that a user can add: models, methods, augmentations, metrics, losses, callbacks, ...

    names of the package    a table of modules below; a module is imported when one of its names is used
    your own file           `amltrain COMMAND --import my_model.py`, or `--import my_package.models`
    an installed package    the entry point group "amltrain.plugins", one module per entry point

Importing a module fills the registry, because its decorators (`register_model`, `register_method`, ...) run. Every
command takes `--import`. A run records the names of its plugins, and no command imports what a config or a model folder
names: only the command line and installed packages run code.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from amltrain.errors import UserError, first_line, unknown_name

Value = TypeVar("Value")
GROUP, FLAG = "amltrain.plugins", "--import"


class Entry(NamedTuple, Generic[Value]):
    """A registered name.

    value    what was registered, e.g. a function that builds a model
    details  facts about it, of a type of its kind
    options  dataclass of the section of a run that bears this name; None for kinds without options
    """

    name: str
    value: Value
    details: Any
    options: type | None


class Registry(Generic[Value]):
    """Names of one kind, each with a value and perhaps a dataclass of options."""

    def __init__(
        self, kind: str, modules: Mapping[str, Collection[str]] | None = None, options: Mapping[str, str] | None = None
    ) -> None:
        """kind: for messages, e.g. "model". modules: the package's own names by the module that registers them.

        options: the module that declares a name's options (`add_options`), where it can be imported without torch.
        """
        self.kind = kind
        self._module_of = {name: module for module, names in (modules or {}).items() for name in names}
        self._options_module = dict(options or {})
        self._entries: dict[str, Entry[Value]] = {}
        self._options: dict[str, type] = {}

    def add(self, name: str, value: Value, details: Any = None, *, options: type | None = None) -> None:
        """Register a value. Raises UserError for a name that is taken."""
        if name in self._entries or (name in self._module_of and not self._is_own(name, value)):
            raise UserError(f"{self.kind} {name!r} is registered already; choose another name")
        self._entries[name] = Entry(name, value, details, options)
        if options is not None:
            self._options[name] = options

    def add_options(self, name: str, options: type) -> None:
        """Declare the options of a name before the module that registers it is imported."""
        self._options[name] = options

    def options(self, name: str) -> type:
        """Return the dataclass of a name's options; imports no more than it has to. Raises UserError."""
        if name not in self._options and name in self._options_module:
            importlib.import_module(self._options_module[name])
        if name not in self._options:
            kind = self[name].options
            assert kind is not None, f"{self.kind} {name} has no options"
            self._options[name] = kind
        return self._options[name]

    def names(self) -> list[str]:
        """All names, those of installed plugins included, sorted. Imports none of the package's own modules."""
        load_installed_plugins()
        return sorted(self._module_of.keys() | self._entries.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._module_of or name in self.names()

    def __getitem__(self, name: str) -> Entry[Value]:
        """Return an entry; imports the module that registers it. Raises UserError for an unknown name."""
        if name not in self._entries and name in self._module_of:
            importlib.import_module(self._module_of[name])
        if name not in self._entries:
            load_installed_plugins()
        if name not in self._entries:
            error = unknown_name(self.kind, name, self.names())
            raise UserError(f"{error}{_broken_hint()}")
        return self._entries[name]

    def families(self) -> dict[str, list[str]]:
        """Names by the file that registers them, e.g. "caris" -> caris_swin_base, ...; imports no module."""
        found: dict[str, list[str]] = {}
        for name in self.names():
            module = self._module_of.get(name) or self._entries[name].value.__module__
            found.setdefault(module.rpartition(".")[2], []).append(name)
        return found

    def family_of(self, name: str) -> list[str]:
        """Names that the same file registers. Raises UserError for an unknown name."""
        families = self.families()
        for names in families.values():
            if name in names:
                return names
        raise unknown_name(self.kind, name, self.names())

    def registered(self) -> list[Entry[Value]]:
        """Every entry of the modules that are imported, in the order of registration."""
        return list(self._entries.values())

    def entries(self) -> list[Entry[Value]]:
        """Every entry, sorted by name; imports all modules."""
        return [self[name] for name in self.names()]

    def remove(self, name: str) -> None:
        """Forget a name, e.g. before a notebook cell that registers it runs again."""
        self._entries.pop(name, None)
        self._options.pop(name, None)

    def _is_own(self, name: str, value: Any) -> bool:
        return getattr(value, "__module__", None) == self._module_of[name]


MODELS: Registry[Callable[..., Any]] = Registry(
    "model",
    {
        "amltrain.models.barleria": ("barleria_vit_base", "barleria_eva02_base", "barleria_tiny"),
        "amltrain.models.beit3": ("beit3_base", "beit3_large", "beit3_tiny"),
        "amltrain.models.c3vg": ("c3vg_beit3_base", "c3vg_tiny"),
        "amltrain.models.caris": ("caris_swin_base", "caris_swin_tiny", "caris_tiny"),
        "amltrain.models.cgformer": ("cgformer_swin_base", "cgformer_tiny"),
        "amltrain.models.cris": ("cris_r101", "cris_r50", "cris_tiny"),
        "amltrain.models.deris": ("deris_b", "deris_l", "deris_tiny"),
        "amltrain.models.detris": ("detris_base", "detris_large", "detris_large_mixed", "detris_tiny"),
        "amltrain.models.dual": (
            "dual_dinov3_base",
            "dual_siglip2_base",
            "dual_eva02_base",
            "dual_tipsv2_base",
            "caris_lite",
            "dual_tiny",
        ),
        "amltrain.models.etris": ("etris_r101", "etris_r50", "etris_vit_base", "etris_tiny"),
        "amltrain.models.mllm": ("gsva_7b", "lisa_7b", "mllm_tiny"),
        "amltrain.models.evfsam": ("evfsam_beit3_large", "evfsam_tiny", "evfsam2_beit3_large", "evfsam2_tiny"),
        "amltrain.models.lavt": ("lavt_swin_base", "lavt_tiny"),
        "amltrain.models.magnet": ("magnet_swin_base", "magnet_tiny"),
        "amltrain.models.rela": ("rela_swin_base", "rela_swin_tiny", "rela_r50", "rela_tiny"),
        "amltrain.models.remamber": ("remamber_conv", "remamber_mamba", "remamber_tiny"),
        "amltrain.models.sam3": ("sam3", "sam3_tiny"),
        "amltrain.models.sam3_instances": ("sam3_instances", "sam3_instances_tiny"),
    },
)
METHODS: Registry[Callable[..., Any]] = Registry(
    "method",
    {
        "amltrain.methods.base": ("supervised",),
        "amltrain.methods.aml.method": ("aml",),
        "amltrain.methods.maskris": ("maskris",),
        "amltrain.methods.mask_grounding": ("mask_grounding",),
        "amltrain.methods.contrastive": ("contrastive",),
    },
    options={"aml": "amltrain.methods.aml.options", "supervised": "amltrain.registry"},
)
MASKERS: Registry[Callable[..., Any]] = Registry(
    "masker", {"amltrain.methods.maskris": ("random",), "amltrain.methods.aml.masker": ("aml", "oracle")}
)
AUGMENTATIONS: Registry[Callable[..., Any]] = Registry(
    "augmentation",
    {
        "amltrain.data.mosaic": ("mosaic",),
        "amltrain.data.augmentations": (
            "negatives",
            "flip",
            "scale_jitter",
            "resize_crop",
            "colour_jitter",
            "label_noise",
        ),
        "amltrain.data.official_augmentations": ("zoom", "other_sentence"),
    },
)
LOSSES: Registry[Callable[..., Any]] = Registry(
    "loss",
    {
        "amltrain.losses": (
            "weighted_cross_entropy",
            "binary_cross_entropy",
            "barleria",
            "cross_entropy_dice",
            "rela",
            "cgformer",
            "mask_and_presence",
            "c3vg",
        ),
        "amltrain.matching": ("deris",),
        "amltrain.instance_loss": ("instances",),
    },
)
METRICS: dict[Literal["classic", "generalized"], Registry[Any]] = {
    "classic": Registry("classic metric"),
    "generalized": Registry("generalized metric"),
}
DATASETS: Registry[Any] = Registry("data set")
READERS: Registry[Callable[..., Any]] = Registry(
    "layout",
    {
        "amltrain.data.sources.refer": ("refer",),
        "amltrain.data.sources.published": ("phrasecut", "reasonseg", "refcoco-m", "refsegrs"),
        "amltrain.data.sources.benchmarks": ("gseval", "pbench", "ref-adv-s", "nwpu-refer"),
    },
)
CALLBACKS: Registry[Callable[..., Any]] = Registry("callback")


@dataclass
class NoOptions:
    """The options of a name that has none."""


METHODS.add_options("supervised", NoOptions)


def check_options(options: Any) -> None:
    """Raise UserError for options that cannot work, if their dataclass has a `check()` that says so."""
    check = getattr(options, "check", None)
    if check is not None:
        check()


_given: list[str] = []
_imported: dict[str, ModuleType] = {}
_broken: dict[str, str] = {}
_installed_loaded = False


def take_imports(arguments: Sequence[str]) -> list[str]:
    """Import every `--import NAME` of a command line; return the arguments without them. Raises UserError."""
    rest, given = [], iter(arguments)
    for argument in given:
        flag, has_value, value = argument.partition("=")
        if flag != FLAG:
            rest.append(argument)
            continue
        name = value if has_value else next(given, "")
        if not name:
            raise UserError(f"{FLAG} needs a Python file or the name of a module")
        import_plugin(name)
        _given.append(name)
    return rest


def import_flags() -> list[str]:
    """The `--import` arguments that this process was started with, for processes that it starts."""
    return [part for name in _given for part in (FLAG, name)]


def import_plugin(name: str) -> None:
    """Import a Python file, or a module by its name.

    A plugin that fails to import is reported on stderr with its file and line; everything that does not use its names
    works. Raises UserError for a file or module that does not exist.
    """
    path = Path(name).expanduser()
    is_file = path.suffix == ".py" or path.is_file()
    if is_file and not path.is_file():
        raise UserError(
            f"{FLAG}: " + (f"{name} is a folder; give a file" if path.is_dir() else f"{name} does not exist")
        )
    if is_file and path.suffix != ".py":
        raise UserError(f"{FLAG}: {name} is not a Python file; give one whose name ends in .py")
    if name.startswith(".") and not is_file:
        raise UserError(f"{FLAG}: {name} is a relative name; give a Python file or the whole name of a module")
    key = str(path.resolve()) if is_file else name
    if key in _imported or key in _broken:
        return
    try:
        _imported[key] = _import_file(path) if is_file else _import_module(name)
    except (Exception, SystemExit) as error:  # whatever the plugin's code raises
        if isinstance(error, ModuleNotFoundError) and not is_file and f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{FLAG}: there is no module {name}; give a Python file or an importable module") from None
        _note_broken(key, path.name if is_file else name, error, where=str(path) if is_file else name)


def imported_plugins() -> list[str]:
    """Names of the plugins of this process, for a run's record: modules as named, files without their folder."""
    return [Path(key).name if key.endswith(".py") else key for key in _imported]


def load_installed_plugins() -> None:
    """Import the modules of the entry points in `amltrain.plugins`, once; one that fails is reported and left out."""
    global _installed_loaded
    if _installed_loaded:
        return
    _installed_loaded = True  # first: a plugin may ask for names itself
    for point in entry_points(group=GROUP):
        if point.value in _imported:
            continue
        try:
            _imported[point.value] = importlib.import_module(point.module)
        except (Exception, SystemExit) as error:
            _note_broken(point.value, point.name, error, where=point.module)


def missing_plugins(recorded: Iterable[str]) -> str:
    """What to add to a command whose model or run was made with these plugins, or "" if all of them are there."""
    here = set(imported_plugins())
    missing = [name for name in recorded if name not in here]
    return "" if not missing else f"it was made with {' and '.join(f'{FLAG} {name}' for name in missing)}; add that"


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))  # the program `amltrain` does not search the working folder, `python -m` does
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(Path.cwd()))


def _import_file(path: Path) -> ModuleType:
    name = f"amltrain_plugin_{path.stem}"
    if name in sys.modules:  # another folder has a file of this name
        name += f"_{sum(module.startswith(name) for module in sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # loader processes find the plugin's classes by this name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _note_broken(key: str, name: str, error: BaseException, *, where: str) -> None:
    """Report a plugin that failed, with its own line that did. where: the file or module, if no line is known."""
    package = str(Path(__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    own = [frame for frame in frames if not frame.filename.startswith(package)]
    place = f"{own[-1].filename}, line {own[-1].lineno}" if own else where
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}, line {error.lineno}"
    reason = first_line(error) if isinstance(error, Exception) else "it ended the program"
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    _broken[key] = f"plugin {name} was not loaded: {place}: {kind}{reason}"
    print(f"WARNING: {_broken[key]}", file=sys.stderr)


def _broken_hint() -> str:
    return "".join(f" ({text})" for text in _broken.values())
