"""Find a model by its name: a folder here, a run, or a repository on the HuggingFace Hub.

Nothing here imports torch, so that a command can reject a wrong name before it imports what it needs for a right one.

A trained model as a folder that anyone can load: on disk, in `step-N/model`, or on the HuggingFace Hub.

    FOLDER/
      model.safetensors          weights under our key names
      config.json                registered name, builder arguments, evaluation protocol, amltrain version
      preprocessor_config.json   input size, resize, normalization, sentence length and text field
      tokenizer files            as SentenceTokenizer.save writes them
      results.json, training.json    its scores and training, if known; shown in model cards
      base.json                  frozen parameters that model.safetensors leaves out, where a run left them out

Nothing in it is code or a pickle, so loading a stranger's folder runs nothing of theirs.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from amltrain import __version__
from amltrain.config.fields import check_number, check_ranges
from amltrain.config.schema import Preprocess, Protocol
from amltrain.errors import UserError, first_line, fits, type_name
from amltrain.files import replacing
from amltrain.hub.base_weights import BASE_FILE, Base, read_base
from amltrain.models.base import RISModel
from amltrain.models.registry import create_model, model_info
from amltrain.registry import MODELS, missing_plugins
from amltrain.run_folder import (
    CONFIG_FILE,
    PREPROCESS_FILE,
    TRAINING_FILE,
    WEIGHTS_FILE,
    ModelIdentity,
    check_model,
    find_model_folder,
    public_name,
)

if TYPE_CHECKING:
    from amltrain.data.text import SentenceTokenizer


INITIAL_WEIGHTS = ("vision_weights", "text_weights")
"""Builder arguments that name where training started from; the folder's own weights replace them."""

MAX_SIZE, MAX_TOKENS = 8192, 4096
"""The largest input side in pixels and sentence in tokens that a foreign folder may ask for; ours have 1008 and 77."""

Complete = TypeVar("Complete", Preprocess, Protocol)


class Pretrained(NamedTuple):
    """What a model folder contains; the model is in eval mode on the CPU, both configs are complete.

    folder: where it was read, without links: `best` may point elsewhere a moment later.
    """

    model: RISModel
    preprocess: Preprocess
    protocol: Protocol
    tokenizer: "SentenceTokenizer | None"
    name: str
    kwargs: dict[str, Any]
    folder: str | Path = "this model folder"
    identity: ModelIdentity | None = None


def save_pretrained(
    folder: str | Path,
    *,
    name: str,
    kwargs: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    preprocess: Preprocess,
    protocol: Protocol,
    tokenizer: "SentenceTokenizer | None",
    base: Base | None = None,
) -> Path:
    """Write a model folder atomically; an older model folder of that name is replaced.

    name, kwargs: how `create_model` builds it (kwargs must be JSON); state_dict: the model's, on any device. tokenizer:
    None leaves it out; such a folder cannot predict. base: frozen parameters that state_dict leaves out. Raises
    UserError when the disk is full or `folder` holds something else.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} exists and is not a model folder; choose another name or remove it")
    kept = {k: v for k, v in kwargs.items() if k not in INITIAL_WEIGHTS}
    config = {"amltrain": __version__, "model": name, "kwargs": kept, "protocol": asdict(protocol)}
    described = asdict(preprocess) | {"tokenizer": public_name(preprocess.tokenizer)}
    try:
        with replacing(folder) as temporary:
            temporary.mkdir(parents=True)
            save_file(_owned(state_dict), temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (temporary / PREPROCESS_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            shutil.copymode(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)  # safetensors writes for the owner alone
            if base is not None:
                base.write(temporary)
            if tokenizer is not None:
                tokenizer.save(temporary)
                _forget_origin(temporary / "tokenizer_config.json")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot save the model to {folder}: {error}; nothing was changed there") from error
    return folder


def _forget_origin(path: Path) -> None:
    """Remove from a tokenizer's config where it was loaded from, which may be a private path."""
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        kept = {key: value for key, value in config.items() if key not in ("name_or_path", "auto_map")}
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _owned(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU tensors, none sharing memory with another (safetensors rejects tied weights)."""
    seen: set[int] = set()
    owned = {}
    for key, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        owned[key] = tensor
    return owned


def load_pretrained(source: str | Path, *, revision: str | None = None, built_on: tuple[Path, ...] = ()) -> Pretrained:
    """Load a model folder, a checkpoint folder that has one in `model/`, or a Hub repository "user/name".

    revision: branch, tag or commit of a Hub repository; "user/name@REVISION" names it as well. built_on: folders that
    leave out parameters of this one. Raises UserError, naming file or key, for a folder that is not there, misses a
    file, is not as its manifest says, or does not fit the model that its config.json names.
    """
    folder = find_model_folder(source, revision).resolve()
    if folder in built_on:
        raise UserError(f"{folder / BASE_FILE} names this folder itself as where its weights come from; copy it again")
    identity = check_model(folder)
    config = read_object(folder / CONFIG_FILE)
    for key, kind, what in (("model", str, "name"), ("kwargs", dict, "object"), ("protocol", dict, "object")):
        if not isinstance(config.get(key), kind):
            raise UserError(f"{folder / CONFIG_FILE} has no {key!r} {what}; was it written by save_pretrained?")
    preprocess = _from_dict(Preprocess, read_object(folder / PREPROCESS_FILE), folder / PREPROCESS_FILE)
    protocol = _from_dict(Protocol, _completed(config["protocol"], folder, config["model"]), folder / CONFIG_FILE)
    for key, value, low, high in (
        ("size", preprocess.size, 1, MAX_SIZE),
        ("max_tokens", preprocess.max_tokens, 1, MAX_TOKENS),
    ):
        check_number(f"{folder / PREPROCESS_FILE}: {key}", value, low, high)
    base, weights = read_base(folder), read_weights(folder)
    sources = {} if base is None else dict(base.sources)
    beginning = sources.pop("checkpoint", None)
    model = _build(config["model"], config["kwargs"] | sources, folder / CONFIG_FILE)
    if base is not None:
        if beginning is not None:
            model.load_state_dict(load_pretrained(beginning, built_on=(*built_on, folder)).model.state_dict())
        weights |= base.check(model, folder)
    load_weights(model, weights, folder / WEIGHTS_FILE)
    tokenizer = _tokenizer(folder, preprocess.max_tokens)
    name, kwargs = config["model"], config["kwargs"]
    return Pretrained(model.eval(), preprocess, protocol, tokenizer, name, kwargs, folder, identity)


def _build(name: str, kwargs: dict[str, Any], path: Path) -> RISModel:
    try:
        return create_model(name, **kwargs)
    except UserError as error:
        training = read_training(path.parent) if name not in MODELS else None
        plugins = missing_plugins((training or {}).get("recipe", {}).get("imports", []))
        raise UserError(f"{path}: {error}" + (f" {plugins}" if plugins else "")) from error
    except Exception as error:  # sizes that fit no layer end in errors of torch, timm and transformers
        raise UserError(
            f"{path}: its kwargs do not describe a {name} ({type(error).__name__}: {first_line(error)}); download it "
            f"again"
        ) from error


def _completed(protocol: dict[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Complete a protocol of an older version, which has null for unset fields, with the model's own values."""
    given = {key: value for key, value in protocol.items() if value is not None}
    if "mask_parts" in given:
        return given
    training = read_training(folder)
    data = _section(_section(training or {}, "recipe"), "data")
    trained_on = data.get("mask_parts") or model_info(name).protocol.mask_parts
    return {**given, "mask_parts": trained_on}


def _tokenizer(folder: Path, max_tokens: int) -> "SentenceTokenizer | None":
    if not any(folder.glob("tokenizer*.json")):
        return None
    from amltrain.data.text import SentenceTokenizer  # a model alone loads without the text stack

    return SentenceTokenizer.load(folder, max_tokens)


def read_training(folder: Path) -> dict[str, Any] | None:
    """Return how a folder's model was trained (recipe, commit, hardware, versions); None if unknown."""
    path = folder / TRAINING_FILE
    return read_object(path) if path.is_file() else None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder. Raises UserError where they are absent, pickled or damaged."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")]
        if pickled:
            fix = f"{pickled[0]} is a pickle: turn it into a model folder with amltrain convert"
        else:
            fix = "copy or download the folder again"
        raise UserError(f"{folder} has no {WEIGHTS_FILE}; {fix}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); use another checkpoint or download it again") from error


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str | Path) -> None:
    """Load every tensor into the model, all of them and none else. Raises UserError naming the first key that differs.

    source: the file to name in the message.
    """
    own = model.state_dict()
    missing, unexpected = (sorted(set(a) - set(b)) for a, b in ((own, state_dict), (state_dict, own)))
    wrong = [k for k in sorted(own) if k in state_dict and own[k].shape != state_dict[k].shape]
    if wrong:
        here, there = (list(s[wrong[0]].shape) for s in (own, state_dict))
        raise UserError(f"{source}: {wrong[0]} has shape {there}, the model's is {here}{_more(wrong)}")
    if missing:
        raise UserError(f"{source} lacks the key {missing[0]}{_more(missing)}; it was saved from another model")
    if unexpected:
        raise UserError(f"{source} has the key {unexpected[0]}, which the model has not{_more(unexpected)}")
    model.load_state_dict(state_dict, strict=True)


def _more(keys: list[str]) -> str:
    return f" (and {len(keys) - 1} more keys like it)" if len(keys) > 1 else ""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path} is missing; the model folder is incomplete")
    if not path.is_file():  # a named pipe would be waited for
        raise UserError(f"{path} is not a regular file; copy or download the folder again")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    return values


def _section(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _from_dict(kind: type[Complete], values: dict[str, Any], path: Path) -> Complete:
    known = get_type_hints(kind)
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}; it was written by another version of amltrain")
        if not fits(value, known[key]):
            raise UserError(f"{path}: {key} is {value!r}, not {type_name(known[key])}; correct it there")
    for field in fields(kind):
        if field.name not in values and field.default is MISSING:
            raise UserError(f"{path} has no {field.name}; the model folder is incomplete")
    built = kind(**values)
    try:
        check_ranges(built)
    except UserError as error:
        raise UserError(f"{path}: {error}; correct it there") from error
    return built
