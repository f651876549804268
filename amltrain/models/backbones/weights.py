"""The tensors of a TorchScript archive (OpenAI's CLIP files) without running the code in it.

`torch.jit.load` would compile and run the archive, `torch.load(weights_only=True)` rejects it. The archive is a zip:
`data.pkl` describes the module tree, `data/N` are raw storages. An unpickler that admits that description and nothing
else reads it; the archive's own classes become bare holders of attributes.

Pretrained encoders, by timm or Hub name or from the official files. Files are read as tensors only: no code runs.
"""

import collections
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.layers import resize_rel_pos_bias_table_simple
from torch import Tensor, nn
from transformers import BertModel

from amltrain.errors import UserError, first_line
from amltrain.models.backbones.swin import Swin

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Holder:
    """Stands for any object of the archive's own classes: its attributes, no behaviour."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()


def _first(value: Any, *_: Any) -> Any:
    return value


class _Unpickler(pickle.Unpickler):
    """Admits module descriptions, tensors and TorchScript's typed lists."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Holder
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch.jit._pickle":  # restore_type_tag(value, type), build_intlist(list), ...
            return _first
        raise pickle.UnpicklingError(f"{module}.{name} does not belong to a module description")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown record {kind!r}")
        content = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive; plain `torch.save` files have no constants record."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the archived module by dotted name, as its `state_dict()` would give them.

    Raises UserError for a file that is damaged or holds anything but a module.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).rsplit("/", 1)[0]
            module = _Unpickler(archive, root).load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than a module's weights, and is not read: {error}") from error
    except Exception as error:  # a damaged archive can raise almost anything
        raise UserError(
            f"{path} is damaged or no TorchScript archive ({first_line(error)}); download it again"
        ) from error
    return dict(_tensors(module, ""))


def _tensors(holder: Any, prefix: str) -> list[tuple[str, Tensor]]:
    found = []
    for name, value in vars(holder).items():
        if isinstance(value, Tensor):
            found.append((prefix + name, value))
        elif isinstance(value, _Holder):
            found += _tensors(value, f"{prefix}{name}.")
    return found


def load_encoders(vision: Swin, text: BertModel, vision_weights: str | None, text_weights: str | None) -> None:
    """Fill a Swin and a BERT; None leaves an encoder at its random start."""
    if vision_weights is not None:
        load_swin(vision, vision_weights)
    if text_weights is not None:
        load_bert(text, text_weights)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or of a .pth/.pt/.bin file, whatever container they lie in.

    Takes the dict under "model" or "state_dict" where there is one, and drops a "module." prefix (DDP).
    Raises UserError for a file that is missing, damaged, holds code, or holds no tensors.
    """
    content = load_plain(path)
    for container in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    tensors = {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    return tensors


def load_plain(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """Read a .safetensors or .pth/.pt/.bin file: tensors, plain containers and the classes of `allowed`.

    Raises UserError for a file that is missing, damaged or holds anything else, which is not run.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a weights file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise almost anything
        rejected = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if rejected:
            raise UserError(
                f"{path} holds a {rejected[1]}; loading it could run code, so it is rejected: "
                "save its state dict alone in a new file"
            ) from error
        reason = first_line(error).split(". ")[0]
        if isinstance(error, pickle.UnpicklingError):  # torch then advises to run the file's code
            reason = "it holds something that is not plain data"
        raise UserError(f"{path} is damaged or no checkpoint ({reason}); download it again") from error


TEXT_WEIGHTS = "text encoder", "model.text_weights"
"""What `from_pretrained` calls a text encoder, and the key that names it."""


def from_pretrained(kind: Any, source: str, called: tuple[str, str], **options: Any) -> Any:
    """Call `kind.from_pretrained` of transformers without running code of the source.

    source: a folder or a Hub id. called: what it is, and the key that names it, for messages. Raises UserError.
    """
    what, key = called
    try:
        return kind.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # files of something else can raise almost anything
        if Path(source).is_dir():
            raise UserError(
                f"{what} {source} is damaged or holds something else ({type(error).__name__}: {first_line(error)}); "
                f"download it again ({key})"
            ) from error
        raise UserError(
            f"{what} {source!r} is not a folder and cannot be fetched from the Hub; download it where there is a "
            f"network and name the folder ({key})"
        ) from error


def load_swin(swin: Swin, weights: str) -> None:
    """Fill a Swin from an official file (swin_base_patch4_window7_224_22k.pth), a timm name or `hf-hub:` id.

    The classification head and its norm are not used here; the four output norms start at 1 and 0, as in the
    official code. Bias tables of another window size are resized bicubically.
    """
    state = read_state_dict(Path(weights)) if is_file(weights) else timm_state(weights)
    if not any(key.startswith("layers.0.downsample.") for key in state):
        state = _after_their_stage(state)
    unused = ("head.", "norm.", "attn_mask", "relative_position_index")
    state = {
        key: value for key, value in state.items() if not key.startswith(unused[:2]) and not key.endswith(unused[2:])
    }
    own = swin.state_dict()
    for key, table in state.items():
        if key.endswith("relative_position_bias_table") and key in own and table.shape != own[key].shape:
            side = round(own[key].shape[0] ** 0.5)
            window = ((side + 1) // 2, (side + 1) // 2)
            state[key] = resize_rel_pos_bias_table_simple(table, window, own[key].shape)  # the one that is bicubic
    fill(swin, state, weights, may_be_missing=tuple(f"norm{i}." for i in range(4)))


def load_bert(bert: BertModel, weights: str) -> None:
    """Fill a BERT from a Hub id or folder (bert-base-uncased), or from a pytorch_model.bin / model.safetensors file.

    The pooler and the heads of pretraining have no place here.
    """
    if is_file(weights):
        state = {_bert_name(key): value for key, value in read_state_dict(Path(weights)).items()}
    else:
        found, report = from_pretrained(
            BertModel, weights, TEXT_WEIGHTS, add_pooling_layer=False, output_loading_info=True
        )
        absent = set(report["missing_keys"])  # transformers has filled these with random numbers
        state = {key: value for key, value in found.state_dict().items() if key not in absent}
    unused = ("pooler.", "cls.")
    state = {key: v for key, v in state.items() if not key.startswith(unused) and not key.endswith("position_ids")}
    fill(bert, state, weights)


def fill(module: nn.Module, state: Mapping[str, Tensor], source: str, may_be_missing: tuple[str, ...] = ()) -> None:
    """Load tensors strictly; a UserError names the first key that is unknown, missing or of another shape."""
    own = module.state_dict()
    unknown = [key for key in state if key not in own]
    missing = [key for key in own if key not in state and not key.startswith(may_be_missing)]
    if unknown or missing:
        kind, keys = ("does not belong to", unknown) if unknown else ("is missing for", missing)
        raise UserError(
            f"{source}: {len(keys)} keys do not fit, {keys[0]} {kind} this {type(module).__name__}; "
            f"name weights of the same architecture and size"
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UserError(
                f"{source}: {key} is {list(value.shape)}, this {type(module).__name__} has {list(own[key].shape)}; "
                f"name weights of the same size"
            )
    module.load_state_dict(dict(state), strict=False)


def is_file(weights: str) -> bool:
    """Whether a weights argument means a file, there or not, rather than a name."""
    return weights.endswith((".pth", ".pt", ".bin", ".safetensors")) or Path(weights).is_file()


def timm_state(name: str) -> dict[str, Tensor]:
    """Pretrained tensors of a timm model, under timm's key names. Raises UserError when they cannot be had."""
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # timm and the Hub raise many kinds; all mean that the name gave no weights
        raise UserError(
            f"vision encoder {name!r} is no weights file and timm cannot fetch it ({first_line(error)}); "
            f"download it where there is a network and name the file (model.vision_weights)"
        ) from error


def _after_their_stage(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Timm keeps the merging at the start of the next stage: layers.{i+1}.downsample -> layers.{i}.downsample."""
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        renamed[".".join(parts)] = value
    return renamed


def _bert_name(key: str) -> str:
    """Without the prefix of a BERT with heads, and with Google's names of 2018 brought up to date."""
    key = key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
    return key.replace("LayerNorm.beta", "LayerNorm.bias")
