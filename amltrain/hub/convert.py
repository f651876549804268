"""Read official checkpoints without running their pickle, and convert them into model folders.

Files are loaded with `weights_only=True`. Besides tensors, the files hold an argparse.Namespace under "args" (LAVT,
CARIS) and numpy numbers (best scores). The first is admitted by name, the latter are left out, the rest is rejected.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from amltrain.config.fields import override
from amltrain.config.schema import PreprocessOverrides
from amltrain.errors import UserError
from amltrain.hub.model_folder import INITIAL_WEIGHTS, load_weights, save_pretrained
from amltrain.models.backbones.weights import load_plain
from amltrain.models.base import Conversion
from amltrain.models.registry import create_model, model_info
from amltrain.run_folder import CONVERSION_FILE

ENTRIES = ("state_dict", "model", "model_state_dict")
"""Keys of the weights in official files: CRIS family; LAVT, CARIS, ReLA, MagNet; CGFormer."""


class _Inert:
    """Stands for a numpy object of a training log: takes any arguments and any state, and keeps neither."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


_LOGGED = (
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Int32", "Int64", "Float32", "Float64")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
)
"""Names of numpy in official files, as numpy 1 and 2 write them: best scores, never weights."""


def _plain_values() -> list[Any]:
    """Return the plain classes that an official file may contain besides tensors.

    numpy's own would build an array over bytes of the file's choice, an object array among them, whose elements are
    pointers. So its names stand for objects that hold nothing.
    """
    return [argparse.Namespace, *((_Inert, name) for name in _LOGGED)]


def read_official(path: str | Path, entry: str | None = None) -> dict[str, Tensor]:
    """Read the state dict of an official .pth, .pt, .bin or .safetensors file, without "module." prefixes.

    entry: which entry of the file holds the weights, e.g. model_ema; by default the first of `ENTRIES` that is there,
    or the file itself. LAVT keeps BERT apart, in "bert_model": it joins as text_encoder.*, lavt_one's name for it.
    Raises UserError for a file that is absent, damaged, holds code, or holds no weights.
    """
    content = _load(Path(path))
    if entry is not None:
        if entry not in content:
            raise UserError(f"{path} has no entry {entry!r}; it has {', '.join(map(str, content))}")
        state = content[entry]
    else:
        state = next((content[e] for e in ENTRIES if isinstance(content.get(e), Mapping)), content)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise UserError(
            f"{path} holds no weights; it has {', '.join(map(str, content)) or 'nothing'} (--entry NAME chooses)"
        )
    if isinstance(content.get("bert_model"), Mapping):
        tensors |= {f"text_encoder.{k}": v for k, v in content["bert_model"].items()}
    return {k.removeprefix("module."): v for k, v in tensors.items()}


def _load(path: Path) -> dict[str, Any]:
    content = load_plain(path, _plain_values())
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return dict(content)


def convert_official(
    name: str,
    path: str | Path,
    output: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    entry: str | None = None,
    preprocess: PreprocessOverrides | None = None,
    tokenizer: Any = None,
) -> Conversion:
    """Convert an official checkpoint into a model folder, with the registry's preprocessing and protocol.

    name, kwargs: the registered model that the file belongs to. preprocess: what this file was trained with otherwise
    than in the registry; official code may differ between its data sets. Writes `output` and in it conversion.json,
    which lists every renamed and dropped key. Raises UserError, writing nothing, unless every key of the file is used
    or known to be superfluous and every weight of the model is given in its shape.
    """
    kwargs = {k: v for k, v in (kwargs or {}).items() if k not in INITIAL_WEIGHTS}
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise UserError(f"{output} exists already and is never overwritten; choose another --output")
    model, info = create_model(name, **kwargs), model_info(name)
    conversion = model.convert_state_dict(read_official(path, entry))
    if conversion.unmatched:
        raise UserError(f"{path} does not match {name}: it has {_keys(conversion.unmatched)} that {name} does not know")
    if conversion.missing:
        raise UserError(f"{path} does not match {name}: it lacks what becomes {_keys(conversion.missing)}")
    load_weights(model, conversion.state_dict, path)
    folder = save_pretrained(
        output,
        name=name,
        kwargs=kwargs,
        state_dict=model.state_dict(),
        preprocess=override(info.preprocess, preprocess),
        protocol=info.protocol,
        tokenizer=tokenizer,
    )
    report = {"file": Path(path).name, "renamed": conversion.renamed, "dropped": conversion.dropped}
    (folder / CONVERSION_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return conversion


def _keys(keys: list[str]) -> str:
    shown = ", ".join(sorted(keys)[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more keys"


def summary(conversion: Conversion) -> str:
    """Summarise the keys on one screen: renamed heads (numbers as N) with counts, dropped keys by reason."""
    same = sum(ours == theirs for theirs, ours in conversion.renamed.items())
    heads = Counter(_differing_heads(t, o) for t, o in conversion.renamed.items() if t != o)
    lines = [f"{len(conversion.renamed)} keys taken over, {same} under their own name, the others renamed:"]
    lines += [f"  {count:5d}  {theirs} -> {ours}" for (theirs, ours), count in sorted(heads.items())]
    reasons = Counter(conversion.dropped.values())
    lines.append(f"{len(conversion.dropped)} keys dropped{':' if reasons else ''}")
    for reason, count in reasons.most_common():
        example = next(k for k, r in conversion.dropped.items() if r == reason)
        lines.append(f"  {count:5d}  {reason} (e.g. {example})")
    return "\n".join(lines)


def _differing_heads(theirs: str, ours: str) -> tuple[str, str]:
    """Two names without the tail they share, numbers as N."""
    a, b = (re.sub(r"\b\d+\b", "N", name).split(".") for name in (theirs, ours))
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return ".".join(a), ".".join(b)
