"""Fine-tune on a folder of photographs: prepare, look, choose, train, score, report.

    amltrain.finetune("photos")         # as `amltrain finetune photos`

Every choice stands in `amltrain/choices.py`.
"""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from amltrain.choices import BASES, RULES, Facts, Plan, as_config, choose_base, make_plan
from amltrain.config.files import groups_of
from amltrain.config.parse import config_of
from amltrain.config.schema import RunConfig, nested
from amltrain.environment import Machine, this_machine
from amltrain.errors import UserError
from amltrain.run_folder import BEST, EVALUATION

SHARES = {"train": 0.8, "val": 0.2}
"""Of pictures whose annotations state no split: one held-out part, because it is small."""


class FineTuned(NamedTuple):
    """run: its folder. results, shuffled: `Results` of the last split, with its own and with other samples' sentences
    (None for a split of one object).
    """

    run: Path
    plan: Plan
    results: Any
    shuffled: Any
    report: Path


def finetune(
    path: str | Path,
    name: str | None = None,
    *,
    output: str | Path | None = None,
    prepared: str | Path = "prepared",
    images: str | Path | None = None,
    form: str | None = None,
    model: str | None = None,
    method: str = "supervised",
    minutes: float | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    plan_only: bool = False,
    said: Callable[[str], None] = print,
) -> FineTuned | Plan:
    """Fine-tune a pretrained model on your data, score it, and write its report.

    path: annotations in any form that `amltrain data prepare` reads, or prepared data. name: of the data set; None =
    the path's. output: the run's folder, runs/NAME by default. model: of `BASES`; None = by the machine. minutes: of
    training at most. settings: keys of the run that you choose yourself, e.g. {"optim.lr": 1e-4}. plan_only: return the
    plan after preparing the data. said: gets what is found and chosen, line by line. A run that was stopped continues.
    Raises UserError, before training, for what is missing.
    """
    check_settings(settings or {}, model, method, seed, minutes)
    data = prepare_data(path, name, Path(prepared), images=images, form=form, seed=seed, said=said)
    facts = look(*data)
    machine = this_machine()
    own_weights = {"model.vision_weights", "model.text_weights"} <= set(settings or {})
    base = choose_base(machine, model, own_weights=own_weights)
    run = Path(output) if output is not None else Path("runs") / facts.name
    chosen = make_plan(facts, machine, base, run, settings or {}, method=method, seed=seed, minutes=minutes)
    said(_heading(facts, machine, chosen))
    said(str(chosen))
    config_of(yaml.safe_load(as_config(chosen)), None)
    if plan_only:
        return chosen
    return _train(run, chosen, facts, said)


DECIDED = {
    "output": "output",
    "method": "method",
    "seed": "seed",
    "model.name": "model",
    "data.datasets": "name",
    "data.prepared": "prepared",
}
"""Keys of a run that an argument of `finetune` sets, and which."""
COUNTED = (
    "preprocess.size",
    "preprocess.max_tokens",
    "train.epochs",
    "train.max_steps",
    "optim.warmup_steps",
    "evaluation.every_steps",
)
"""Keys that a run may leave at null, and that a plan counts with."""


def check_settings(
    settings: Mapping[str, Any], model: str | None, method: str, seed: int, minutes: float | None
) -> None:
    """Raise UserError for what no run would take, before any data is read."""
    if minutes is not None and not (isinstance(minutes, (int, float)) and 0 < minutes < math.inf):
        raise UserError(f"minutes is {minutes!r} and must be a number above 0")
    groups = groups_of(RunConfig)
    for key, value in settings.items():
        if key in DECIDED:
            raise UserError(f"{key} is what {DECIDED[key]} of finetune sets; give that instead")
        if key in groups:
            raise UserError(
                f"{key} is a group of keys; write each with a dot, e.g. {key}.{fields(groups[key])[0].name}"
            )
        if value is None and key in COUNTED:
            raise UserError(f"{key} is null; give a number, or leave it out and it is chosen")
    start = model if model in {base.name for base in BASES} else BASES[-1].name
    config_of(nested({"method": method, "seed": seed, **settings}), f"models/{start}")


def prepare_data(
    path: str | Path,
    name: str | None,
    prepared: Path,
    *,
    images: str | Path | None,
    form: str | None,
    seed: int,
    said: Callable[[str], None],
) -> tuple[str, str]:
    """The folder of prepared data and the data set's name; annotations are prepared first."""
    from amltrain.api import prepare
    from amltrain.data.catalog import describe, read_manifest
    from amltrain.data.prepare import available_cores
    from amltrain.data.sources.table import ReadOptions

    if not isinstance(path, (str, Path)) or not str(path).strip():
        raise UserError(f"path is {path!r}; give the folder or file with your annotations, or . for this folder")
    path = Path(path)
    for folder in (path,) if path.exists() else (prepared / path,):  # annotations that are there may have changed
        if folder.is_dir() and read_manifest(folder) is not None:
            return str(folder.parent), folder.name
    manifest = prepare(
        path,
        name,
        output=prepared,
        images=images,
        form=form,
        describe=None,
        hold_out=True,
        options=ReadOptions(seed=seed, shares=SHARES),
        workers=available_cores(),
        said=said,
    )
    said(describe(manifest))
    said(f"look at {prepared / manifest['dataset'] / 'rows.jpg'}: it shows some rows as they were read")
    return str(prepared), str(manifest["dataset"])


def look(prepared: str, name: str) -> Facts:
    """Read what the choices depend on. Raises UserError for data without a training split."""
    from amltrain.data.catalog import find_spec
    from amltrain.data.rows import open_rows

    splits = find_spec(name, prepared).splits
    if "train" not in splits:
        raise UserError(f"{name} has no split train (it has {', '.join(splits)}); name one so in the annotations")
    held_out = [split for split in splits if split != "train"]
    scored = "val" if "val" in held_out else held_out[0] if held_out else "train"
    final = "test" if "test" in held_out else scored
    tables = {split: open_rows(prepared, name, split).columns for split in dict.fromkeys(("train", scored, final))}
    rows = {split: table.select(["height", "width", "referents"]).to_pylist() for split, table in tables.items()}
    refs = {split: [ref for row in kept for ref in row["referents"]] for split, kept in rows.items()}
    texts = [sentence["sent"] for ref in refs["train"] for sentence in ref["sentences"]]
    every = [sentence["sent"] for split in refs.values() for ref in split for sentence in ref["sentences"]]
    boxes = [
        math.sqrt(ref["bbox"][2] * ref["bbox"][3] / (row["height"] * row["width"]))
        for row in rows["train"]
        for ref in row["referents"]
        if len(ref["bbox"]) == 4
    ]
    return Facts(
        name=name,
        prepared=prepared,
        images=len(rows["train"]),
        refs=len(refs["train"]),
        sentences=len(texts),
        scored=scored,
        scored_samples=sum(len(ref["sentences"]) for ref in refs[scored]),
        final=final,
        final_refs=len(refs[final]),
        side=float(np.quantile(boxes, 0.25)) if boxes else 0.5,
        photo=_median_size(rows["train"]),
        english=float(np.mean([bool(ENGLISH & set(text.lower().split())) for text in texts])),
        texts=tuple(dict.fromkeys(every)),
        findings=tuple(_findings(name, scored, final, refs, rows["train"])),
    )


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


ENGLISH = {"the", "a", "an", "on", "in", "of", "with", "left", "right", "to", "is", "and"}


def _median_size(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    return int(np.median([row["width"] for row in rows])), int(np.median([row["height"] for row in rows]))


def _findings(name: str, scored: str, final: str, refs: Mapping[str, Sequence[Any]], rows: Sequence[Any]) -> list[str]:
    """What a person should know about the data whatever is trained."""
    found = []
    if scored == "train":
        found.append(
            f"{name} has one split, so the score is that of the training pictures: it shows memory, not skill; mark "
            f"some pictures as val"
        )
    elif len(refs[final]) < 30:
        found.append(
            f"split {final} has {_many(len(refs[final]), 'object')}, so one of them changes the last score by up to "
            f"{100 / max(1, len(refs[final])):.0f} points"
        )
    if len(refs["train"]) < RULES.few_refs:
        found.append(
            f"{_many(len(refs['train']), 'object')} {'is' if len(refs['train']) == 1 else 'are'} few: expect a model "
            f"that knows these pictures; some hundreds generalise"
        )
    known = {ref["category"] for ref in refs["train"] if ref["category"]}
    unseen = sorted({ref["category"] for ref in refs[final] if ref["category"]} - known)
    if unseen and known:
        some = f"{', '.join(unseen[:5])}{', ...' if len(unseen) > 5 else ''}"
        found.append(f"classes of split {final} that training does not have: {some}; the model may miss them")
    if rows and np.mean([len(row["referents"]) == 1 for row in rows]) > 0.9:
        found.append(
            "almost every picture has one object with a sentence, so the sentence is not needed to find it: annotate "
            "several objects per picture, or the model will not read the words"
        )
    return found


def _heading(facts: Facts, machine: Machine, chosen: Plan) -> str:
    where = f"{machine.device} ({machine.name}, {machine.threads} threads)"
    length = "" if chosen.minutes is None else f", about {_many(max(1, round(chosen.minutes)), 'minute')} here"
    return f"{chosen.base} on {facts.name}: {chosen.steps:,} steps{length}; {where}"


def _train(run: Path, chosen: Plan, facts: Facts, said: Callable[[str], None]) -> FineTuned:
    """Write the config, train or continue, score with both kinds of sentences, and write the report."""
    from amltrain import api
    from amltrain.files import write_text

    file = run / "finetune.yaml"
    try:
        run.mkdir(parents=True, exist_ok=True)
        before = file.read_text(encoding="utf-8") if file.exists() else None
        write_text(file, as_config(chosen))
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}; choose another output") from error
    said(f"config -> {file} (the same run: amltrain train --config {file})")
    try:
        api.train(file)
    except UserError:
        if before is not None:  # the folder has another run, whose config this one must not replace
            write_text(file, before)
        raise
    best = run / BEST
    data = {"datasets": [facts.name], "prepared": facts.prepared, "workers": 0}
    said(f"the last score: split {facts.final}, then with the sentences of other samples")
    folder = run / EVALUATION
    [own] = api.evaluate(best, data=data, splits=[facts.final], output=str(folder))
    shuffled = None
    if facts.final_refs > 1:
        [shuffled] = api.evaluate(
            best, data=data, splits=[facts.final], output=str(folder / "shuffled"), shuffle_sentences=True
        )
    page = api.report(run, splits=[facts.final], results=str(folder))
    said(verdict(own.metrics, None if shuffled is None else shuffled.metrics, facts.final))
    if facts.refs < RULES.few_refs and facts.final != "train":
        [known] = api.evaluate(best, data=data, splits=["train"], output=str(folder / "train"))
        mean = mean_metric(known.metrics)
        said(f"on the {_many(facts.images, 'picture')} that it was trained on: {mean} {known.metrics[mean]:.1f}")
    said(f"report -> {page}")
    example = shlex.quote(min(facts.texts, key=len))
    said(f"try it: amltrain predict --checkpoint {best} --image PHOTO --sentence {example}")
    said(f"in the browser: amltrain demo --checkpoint {best}")
    return FineTuned(run, chosen, own, shuffled, page)


def mean_metric(metrics: Mapping[str, float]) -> str:
    """The name of the mean IoU: gIoU where sentences that refer to nothing were scored."""
    return "mIoU" if "mIoU" in metrics else "gIoU"


def verdict(own: Mapping[str, float], shuffled: Mapping[str, float] | None, split: str) -> str:
    """The result in two sentences: the score, and whether the model reads the words."""
    mean = mean_metric(own)
    score, overall = own[mean], "oIoU" if "oIoU" in own else "cIoU"
    if shuffled is None:
        return f"{mean} {score:.1f} on {split}, which has one object: no other sentence to try it with"
    other = shuffled[mean_metric(shuffled)]
    also = "" if math.isnan(own[overall]) else f", {overall} {own[overall]:.1f}"
    text = f"{mean} {score:.1f}{also} on {split}; with other samples' sentences {mean} {other:.1f}: "
    if score < 5:
        return f"{text}the model has hardly learned yet; train longer (--minutes) or give more pictures"
    if score - other >= RULES.reads_words:
        return f"{text}the model reads the words"
    return (
        f"{text}the model hardly reads the words and takes the object that stands out; annotate several objects per "
        f"picture, with sentences that tell them apart, or train longer"
    )
