"""Pickles and archives that would run code, in the place of every file that a command reads."""

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertModel

from amltrain.checkpoints.state import damage_named, plain_data_only
from amltrain.data.leakage import read_image_ids
from amltrain.data.rows import open_rows
from amltrain.data.sources.refer import read_refer
from amltrain.data.sources.table import read_table
from amltrain.data.text import SentenceTokenizer
from amltrain.evaluation.prediction_files import find_predictions
from amltrain.evaluation.results import read_results
from amltrain.files import load_json, load_pickle
from amltrain.hub.convert import read_official
from amltrain.hub.model_folder import load_pretrained
from amltrain.inference.predictor import read_image
from amltrain.models.backbones.weights import from_pretrained, read_state_dict, read_torchscript
from tests.attack.cases import Case, Place
from tests.traps import Touch, old_format, saved, tar_that_starts_as_a_pickle

WEIGHTS = {"a.weight": torch.zeros(2, 2)}


def beside_weights(trap: Any) -> bytes:
    return saved({"model": WEIGHTS, "args": trap})


def torchscript(trap: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"archive/{name}", pickle.dumps(trap))
        archive.writestr("archive/code/__torch__.py", "import os\nos.mkdir('executed')")
        archive.writestr("archive/version", "3")
    return file.getvalue()


def nested(trap: Any) -> bytes:
    return pickle.dumps([{"ref_id": 1, "sentences": [trap]}], protocol=0)


def evaluated(trap: Any) -> bytes:
    """builtins.eval under Python 2's name."""
    return f"c__builtin__\neval\n(S'__import__(\"os\").mkdir({str(trap.marker)!r})'\ntR.".encode()


def objects(_: Any) -> bytes:
    """A numpy array whose elements would be pointers made of chosen bytes."""

    class Pointers:
        def __reduce__(self) -> Any:
            return np.ndarray, ((1,), np.dtype([("a", "O")]), b"AAAAAAAA")

    return saved({"model": WEIGHTS, "best": Pointers()})


PAYLOADS: dict[str, Callable[[Touch], bytes]] = {
    "pickle": pickle.dumps,
    "torch.save": saved,
    "torch.save of old": old_format,
    "beside weights": beside_weights,
    "tar": tar_that_starts_as_a_pickle,
    "TorchScript": torchscript,
    "nested": nested,
    "eval": evaluated,
    "object array": objects,
}


def _into(folder: str, name: str, read: Callable[[Path], Any]) -> Callable[[Place, bytes], Any]:
    """Plant the bytes as a file in a copy of the model folder, then read the folder."""

    def attack(place: Place, content: bytes) -> Any:
        copy = place.copy(place.model)
        (copy / name).write_bytes(content)
        return read(copy)

    return attack


def _alone(name: str, read: Callable[[Path], Any]) -> Callable[[Place, bytes], Any]:
    def attack(place: Place, content: bytes) -> Any:
        path = place.folder / name
        path.write_bytes(content)
        return read(path)

    return attack


def _refs(place: Place, content: bytes) -> Any:
    root = place.copy(place.root)
    (root / "refcoco" / "refs(unc).p").write_bytes(content)
    return read_refer(root, "refcoco")


def _instances(place: Place, content: bytes) -> Any:
    root = place.copy(place.root)
    (root / "refcoco" / "instances.json").write_bytes(content)
    return read_refer(root, "refcoco")


def _shard(place: Place, content: bytes) -> Any:
    prepared = place.copy(place.prepared)
    next((prepared / "refcoco").glob("val-*")).write_bytes(content)
    return open_rows(str(prepared), "refcoco", "val", streaming=True)


def _state(place: Place, content: bytes) -> Any:
    (place.folder / "state").mkdir()
    path = place.folder / "state" / "mp_rank_00_model_states.pt"
    path.write_bytes(content)
    with damage_named(place.folder), plain_data_only():
        return torch.load(path, weights_only=False)


def _bert(path: Path) -> Any:
    folder = path.parent / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    path.rename(folder / "pytorch_model.bin")
    return from_pretrained(BertModel, str(folder), ("text encoder", "model.text_weights"))


READERS: dict[str, Callable[[Place, bytes], Any]] = {
    "official checkpoint": _alone("official.pth", read_official),
    "encoder's weights": _alone("swin.pth", read_state_dict),
    "OpenAI's archive": _alone("clip.pt", read_torchscript),
    "text encoder's folder": _alone("weights", _bert),
    "model.safetensors": _into("model", "model.safetensors", load_pretrained),
    "config.json": _into("model", "config.json", load_pretrained),
    "preprocessor_config.json": _into("model", "preprocessor_config.json", load_pretrained),
    "tokenizer.json": _into("model", "tokenizer.json", load_pretrained),
    "tokenizer_config.json": _into("model", "tokenizer_config.json", load_pretrained),
    "results.json": _alone("results.json", read_results),
    "refs(unc).p": _refs,
    "annotation pickle": _alone("refs.p", load_pickle),
    "instances.json": _instances,
    "prepared Parquet": _shard,
    "table.csv": _alone("table.csv", lambda path: read_table(path, path.parent, "own")),
    "table.parquet": _alone("table.parquet", lambda path: read_table(path, path.parent, "own")),
    "predictions": _alone("p.jsonl", lambda path: find_predictions(path, "refcoco", "val")),
    "image ids": _alone("ids.json", read_image_ids),
    "any JSON": _alone("any.json", load_json),
    "image": _alone("image.jpg", read_image),
    "state of an engine": _state,
}
HARMLESS = {
    ("official checkpoint", "object array"),  # read without the object
    ("annotation pickle", "tar"),  # read up to its first number, which the reader of refs rejects
    ("annotation pickle", "torch.save of old"),
}


def cases() -> Iterator[Case]:
    for reader, attack in READERS.items():
        for payload, make in PAYLOADS.items():

            def give(
                place: Place, attack: Callable[[Place, bytes], Any] = attack, make: Callable[[Touch], bytes] = make
            ) -> Any:
                return attack(place, make(Touch(place.marker)))

            expected = "decided" if (reader, payload) in HARMLESS else "rejected"
            yield Case("files with code", f"{payload} as {reader}", expected, give)
    for name, attack in (("tokenizer", _custom_tokenizer), ("model", _custom_model), ("config", _custom_config)):
        yield Case("files with code", f"auto_map of a {name} folder", "decided", partial(attack))


def _module(folder: Path, marker: Path) -> None:
    (folder / "custom.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\n"
        "from transformers import BertConfig as C, BertModel as M, BertTokenizer as T\n"
        "class Config(C): model_type = 'custom'\nclass Model(M): config_class = Config\nclass Tokenizer(T): ...\n"
    )


def _custom_tokenizer(place: Place) -> Any:
    import json

    folder = place.copy(place.model)
    _module(folder, place.marker)
    path = folder / "tokenizer_config.json"
    mapped = {"auto_map": {"AutoTokenizer": ["custom.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | mapped))
    return SentenceTokenizer.load(folder, 8)


def _custom(place: Place, model_type: str) -> Path:
    import json

    folder = place.folder / "custom"
    folder.mkdir()
    _module(folder, place.marker)
    mapped = {"AutoConfig": "custom.Config", "AutoModel": "custom.Model", "AutoProcessor": "custom.Tokenizer"}
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": mapped}))
    return folder


def _custom_model(place: Place) -> Any:
    from amltrain.commands.rank import load_dual_encoder

    return load_dual_encoder(str(_custom(place, "custom")), "cpu")


def _custom_config(place: Place) -> Any:
    from amltrain.models.backbones.text import build_text_model

    return build_text_model(str(_custom(place, "custom")))
