"""Let every call that writes fail once in the commands beside `train`; then the command is called again.

    python -m tests.commands.failing_writes [--errors EIO,ENOSPC] [--only TEXT] [--commands evaluate report]

A command is right if it ends by itself, or with one sentence that names a file and exit code 2; if every file with its
final name is whole then; and if the next call ends well and leaves the files of a call in which nothing failed. Needs a
C compiler, as `tests.training.failing_calls` does.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.training.failing_calls import EndedError, forked, misanswered, places, preload

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "ESTALE", "ETIMEDOUT", "EROFS")
CURES = ("free up space", "make it writable", "check it", "choose another")
"""What a sentence advises, one of them."""
Action = Callable[[Path], None]


def actions(scratch: Path, prepared: Path, model: Path) -> dict[str, Action]:
    """Name -> what is done below a folder."""
    data = ["--data.datasets", "[refshapes]", "--data.prepared", str(prepared), "--data.workers", "0"]
    scoring = ["--checkpoint", str(model), "--splits", "val", "--max_samples", "2", "--pictures", "1", *data]
    scored = _evaluated(scratch / "scored", [*scoring, "--max_samples", "null"])
    photo = _photo(scratch / "photo.png")

    def evaluate(form: str) -> Action:
        def act(folder: Path) -> None:
            from amltrain.commands.evaluate import main

            main([*scoring, "--save_predictions", form, "--output", str(folder / "out")])

        return act

    def report(folder: Path) -> None:
        from amltrain.commands.report import main

        place = ["--results", str(scored), "--datasets", "refshapes", "--prepared", str(prepared)]
        main([str(model), *place, "--splits", "val", "--pictures", "1", "--output", str(folder / "out" / "a.html")])

    def compare(folder: Path) -> None:
        from amltrain.commands.compare import main

        main([f"one={scored}", f"two={scored}", "--draws", "5", "--output", str(folder / "out")])

    def predict(folder: Path) -> None:
        from amltrain.commands.predict import main

        flags = ["--sentence", "the red square", "a circle", "--device", "cpu", "--output", str(folder / "out")]
        main(["--checkpoint", str(model), "--image", str(photo), *flags])

    def export(kind: str) -> Action:
        def act(folder: Path) -> None:
            from amltrain.commands.export import main

            main(["--checkpoint", str(model), "--output", str(folder / "out"), "--formats", kind, "--runs", "1"])

        return act

    def push(folder: Path) -> None:
        _submit(model, folder)

    return {
        "evaluate (run lengths)": evaluate("rle"),
        "evaluate (masks)": evaluate("masks"),
        "report": report,
        "compare": compare,
        "predict": predict,
        "export (torch)": export("torch"),
        "export (onnx)": export("onnx"),
        "push (in a run)": push,
    }


def _evaluated(folder: Path, scoring: Sequence[str]) -> Path:
    from amltrain.commands.evaluate import main

    log = folder.parent / "scoring.log"
    code = forked(lambda: main([*scoring, "--output", str(folder)]), folder, log)
    assert code == 0, log.read_text()
    return folder


def _photo(path: Path) -> Path:
    from PIL import Image

    Image.linear_gradient("L").convert("RGB").resize((64, 64)).save(path)
    return path


def _submit(model: Path, folder: Path) -> None:
    """What a run does on its own disk for a push: a copy of the model; a push that fails never stops a run."""
    from amltrain.hub.push import Publisher

    checkpoint = folder / "out" / "step-1"
    if not checkpoint.exists():
        shutil.copytree(model, checkpoint / "model")
    pushed: list[list[str]] = []
    publisher = Publisher(lambda copy: str(pushed.append(sorted(path.name for path in copy.iterdir()))), print)
    publisher.submit(checkpoint)
    publisher._wait(1e9)
    assert all(names == sorted(path.name for path in (model).iterdir()) for names in pushed), "half a model was pushed"


def broken(folder: Path) -> list[str]:
    """Files with a final name that are not whole."""
    found = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            try:
                _read(path)
            except Exception as fault:  # whatever a reader says of half a file
                found.append(f"{relative} ({type(fault).__name__})")
    return found


def _read(path: Path) -> None:
    from PIL import Image

    content = path.read_bytes()
    assert content or path.suffix == ".jsonl", "empty"  # no row yet
    if path.suffix == ".json":
        json.loads(content)
    elif path.suffix == ".jsonl":
        assert content.endswith(b"\n") or not content
        [json.loads(line) for line in content.splitlines()]
    elif path.suffix == ".parquet":
        from amltrain.evaluation.samples import read_samples

        read_samples(path)
    elif path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".html":
        assert content.rstrip().endswith(b"</html>")
    elif path.suffix == ".pt2":
        assert zipfile.ZipFile(path).testzip() is None
    elif path.suffix == ".onnx":
        import onnx

        onnx.checker.check_model(onnx.load(path))
    elif path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        load_file(path)


VARY = (".html", ".pt2", ".onnx", "export.json")
"""Files that hold times."""
REMAINS = ("*.tmp", ".writing-*")
"""What a file system may keep that lets nothing be removed."""


def left(folder: Path) -> dict[str, str]:
    """Every file below a folder and the hash of its content; of files that hold times, the name alone."""
    remains = {path for name in REMAINS for path in folder.rglob(name)}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not {path, *path.parents} & remains]
    return {
        str(path.relative_to(folder)): "" if path.name.endswith(VARY) else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def judge(action: Action, folder: Path, whole: dict[str, str], number: int, error: str, stays: bool) -> str:
    """Let one call fail, then call again; what is wrong, or an empty text."""
    log, again = (folder.parent / name for name in ("failed.log", "again.log"))
    try:
        code = forked(lambda: action(folder), folder, log, number=number, error=getattr(errno, error), stays=stays)
        said = log.read_text(errors="replace")
        if fault := misanswered(code, said):
            return fault
        if code and not (str(folder) in said and any(cure in said for cure in CURES)):
            return f"no file or no cure: {said[-500:]}"
        if halves := broken(folder):
            return f"exit code {code}, not whole: {', '.join(halves)}"
        if code and forked(lambda: action(folder), folder, again):
            return f"cannot be called again: {again.read_text(errors='replace')[-500:]}"
        now = left(folder)
        differing = sorted(name for name in now.keys() | whole.keys() if now.get(name) != whole.get(name))
        return f"other files than without the failure: {', '.join(differing)}" if differing else ""
    except EndedError as end:
        return str(end)


def walk(
    prepared: Path, scratch: Path, *, errors: Sequence[str], only: str, commands: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield (command, error and call; what is wrong or an empty text) for one call of each kind."""
    for name, action in actions(scratch, prepared, _model(scratch / "model")).items():
        if commands and not any(name.startswith(command) for command in commands):
            continue
        folder = scratch / "under"
        folder.mkdir()
        calls = scratch / "calls"
        calls.unlink(missing_ok=True)
        code = forked(lambda: action(folder), folder, scratch / "whole.log", calls=calls)  # noqa: B023 - called at once
        assert code == 0, (scratch / "whole.log").read_text()
        whole = left(folder)
        for position, (number, place) in enumerate(places(calls, 0, only)):
            shutil.rmtree(folder)
            folder.mkdir()
            error = errors[position % len(errors)]
            yield f"{name}: {error} in {place}", judge(action, folder, whole, number, error, stays=position % 2 == 1)
            for log in scratch.glob("*.log"):
                log.unlink()
        shutil.rmtree(folder)


def _model(folder: Path) -> Path:
    import torch

    from amltrain.data.text import SentenceTokenizer
    from amltrain.hub.model_folder import save_pretrained
    from amltrain.models import create_model, model_info

    torch.manual_seed(0)
    info, tokenizer = model_info("caris_tiny"), SentenceTokenizer.train_wordpiece(["red square", "a blue circle"], 24)
    kwargs = {"vocab_size": tokenizer.vocab_size}
    state = create_model("caris_tiny", **kwargs).state_dict()
    return save_pretrained(
        folder, name="caris_tiny", kwargs=kwargs, state_dict=state, preprocess=info.preprocess, protocol=info.protocol,
        tokenizer=tokenizer,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", default=",".join(ERRORS))
    parser.add_argument("--only", default="", help="calls whose name or path contains this")
    parser.add_argument("--commands", nargs="+", default=[], help="commands whose names start so")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="failing-writes-") as name:
        scratch = Path(name)
        preload("tests.commands.failing_writes", scratch)
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        from amltrain.inference import evaluate, export, predict  # noqa: F401 - once, before the forks
        from amltrain.report import page  # noqa: F401
        from tests.training.failing_calls import _shapes

        wrong = count = 0
        chosen = {"errors": options.errors.split(","), "only": options.only, "commands": options.commands}
        for place, fault in walk(_shapes(scratch), scratch, **chosen):
            count, wrong = count + 1, wrong + bool(fault)
            print(f"{'WRONG' if fault else 'right'}  {place}  {fault}", flush=True)
        print(f"{count} calls failed, {wrong} answered wrongly")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
