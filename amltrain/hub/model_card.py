"""The page of a pushed model: what it is, how to use it, its scores and their protocol, how it was trained.

Everything in it is read from the model folder; facts that the folder does not record are shown as unknown.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from amltrain import __version__
from amltrain.errors import UserError
from amltrain.evaluation.results import Results
from amltrain.evaluation.tables import table
from amltrain.hub.facts import training_facts
from amltrain.hub.model_folder import read_object, read_training
from amltrain.models.registry import ModelInfo, model_info
from amltrain.registry import METHODS
from amltrain.run_folder import CONFIG_FILE, CONVERSION_FILE, EXAMPLE_FILE, TRAINING_FILE

HUB_LICENCES = {"MIT": "mit", "Apache-2.0": "apache-2.0", "GPL-3.0": "gpl-3.0"}
TASK = "referring image segmentation"


def build_model_card(
    folder: Path,
    repo: str,
    results: Sequence[Results],
    *,
    rows: Sequence[Mapping[str, Any]] = (),
    caption: str | None = None,
) -> ModelCard:
    """The card of the model in `folder` as repository `repo` will show it.

    results: what the model scored, maybe nothing. Metrics are in the card's model-index too, in percent, each with its
    protocol and counts. rows: of the run's log, which know how long the training took. caption: of the repository's
    `EXAMPLE_FILE`; None = it has none.
    """
    model = str(read_object(folder / CONFIG_FILE).get("model"))
    training = read_training(folder)
    if training is not None:
        _check_training(training, folder / TRAINING_FILE)
    info = model_info(model)
    recipe = training["recipe"] if training is not None else {}
    data_sets = list(recipe.get("data", {}).get("datasets", []))
    data = ModelCardData(
        **_licence(info),
        language="en",
        library_name="amltrain",
        pipeline_tag="image-segmentation",
        tags=[TASK.replace(" ", "-"), model, *([recipe["method"]] if "method" in recipe else []), *data_sets],
        model_name=repo.split("/")[-1],
        eval_results=_model_index(results, recipe) or None,
    )
    sections = [
        f"# {repo.split('/')[-1]}",
        f"`{model}` for {TASK}: given an image and a sentence, predict the mask of the object that the sentence refers "
        f"to. {_source(info.paper)}{_origin(folder, training)}.",
        *([] if caption is None else [f"![Sentence, truth and prediction]({EXAMPLE_FILE})\n\n*{caption}*"]),
        f"## Use\n{_usage(repo)}",
        f"## Scores\n{_scores(results)}",
        f"## Training\n{_training(training, rows)}",
        f"## Licence\nThe official code ({info.official_code}) is under {info.licence}. amltrain reimplements the "
        "model and is under Apache-2.0. The data sets and the pretrained encoders have their own terms.",
        f"## Citation\n{_citation(info.paper, recipe)}",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _check_training(training: dict[str, Any], path: Path) -> None:
    """Raise UserError unless the record has what a card shows of it."""
    recipe = training.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    right = (
        isinstance(data, dict)
        and isinstance(data.get("datasets"), list)
        and all(isinstance(name, str) for name in data["datasets"])
        and isinstance(data.get("train_split"), str)
        and isinstance(training.get("versions"), dict)
        and {"hardware", "commit"} <= training.keys()
    )
    if not right:
        raise UserError(f"{path} is no record of a training by amltrain; remove it, or take the folder of the run")


def _licence(info: ModelInfo) -> dict[str, Any]:
    """The licence of the official code as the Hub names it; several licences are "other", with a name and a link."""
    if info.licence in HUB_LICENCES:
        return {"license": HUB_LICENCES[info.licence]}
    name = re.sub(r"[^a-z0-9.]+", "-", info.licence.lower()).strip("-")
    address = info.official_code.split(",")[0].split()[0]
    link = {"license_link": f"https://{address}"} if "/" in address else {}  # not every model has official code
    return {"license": "other", "license_name": name, **link}


def _model_index(results: Sequence[Results], recipe: dict[str, Any]) -> list[EvalResult]:
    """Scores for the Hub's tables: of unaltered splits that the model was not trained on."""
    trained_on = recipe.get("data", {}).get("train_split", "train")
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name=TASK,
            dataset_type=result.dataset,
            dataset_name=f"{result.dataset} {result.split}",
            dataset_split=result.split,
            dataset_args={"protocol": result.protocol, "counts": result.counts},
            metric_type=name,
            metric_name=f"{name} (%)",
            metric_value=round(value, 2),
        )
        for result in results
        if result.is_score and result.split not in ("train", trained_on)
        for name, value in result.metrics.items()
        if not math.isnan(value)
    ]


def _origin(folder: Path, training: dict[str, Any] | None) -> str:
    """Describe the origin of the weights, as far as the folder records it."""
    conversion = folder / CONVERSION_FILE
    if training is None:
        if not conversion.is_file():
            return ""
        file = read_object(conversion).get("file", "a file")
        return (
            f"; its weights are those of the official checkpoint `{file}`, converted by amltrain and not trained by it"
        )
    method = training["recipe"].get("method")
    paper = METHODS[method].details.paper if method in METHODS else ""
    named = f" by the method `{method}`" + (f" ({paper})" if paper else "") if method else ""
    return f", trained with amltrain{named}"


def _source(paper: str) -> str:
    if has_paper(paper):
        return f"The model is that of *{paper}*"
    return f"The model has no paper: {paper.removeprefix('none').lstrip(': ')}"


def _citation(paper: str, recipe: dict[str, Any]) -> str:
    """BibTeX of amltrain, the model's paper and the method's, by title; every key once."""
    method = recipe.get("method")
    papers = [paper, *([METHODS[str(method)].details.paper] if method in METHODS else [])]
    software = "@software{amltrain,\n  title = {{amltrain}},\n  version = {" + __version__ + "}\n}"
    entries = {"amltrain": software, **dict(_bibtex(paper) for paper in papers if has_paper(paper))}
    return "```bibtex\n" + "\n".join(entries.values()) + "\n```"


def has_paper(paper: str) -> bool:
    """Whether a registry's `paper` names one: "none: ..." tells what a model without a paper is."""
    return bool(paper) and not paper.startswith("none")


def _bibtex(paper: str) -> tuple[str, str]:
    """Key and entry of a paper given as "Name: Title (VENUE YEAR)" or "Name: Title, VENUE YEAR"."""
    found = re.match(r"(?P<title>.+?)(?: \(|, (?=\S+ \d))(?P<venue>[^()]*)", paper)
    title, venue = (found["title"], found["venue"]) if found else (paper, "")
    year = re.search(r"\b(?:19|20)\d\d$", venue)
    name = title.split(":")[0] if ":" in title else "".join(title.split()[:2])
    key = re.sub(r"[^a-z0-9]", "", name.lower()) + (year[0] if year else "")
    lines = {"title": f"{{{title}}}", "howpublished": venue, "year": year[0] if year else ""}
    fields = ",\n".join(f"  {field} = {{{value}}}" for field, value in lines.items() if value)
    return key, f"@misc{{{key},\n{fields}\n}}"


def _usage(repo: str) -> str:
    sentence = "the man in the red shirt"
    return (
        "From a clone of amltrain's repository:\n```bash\npip install -e .\n```\n"
        "```python\n"
        "from PIL import Image\n"
        "from amltrain import Predictor\n"
        f'[found] = Predictor.from_pretrained("{repo}")(Image.open("photo.jpg"), "{sentence}")\n'
        "found.mask  # [height, width] bool\n"
        "```\n"
        "```bash\n"
        f'amltrain predict --checkpoint {repo} --image photo.jpg --sentence "{sentence}"\n'
        "```"
    )


def _scores(results: Sequence[Results]) -> str:
    if not results:
        return "Not evaluated."
    counts = [
        f"- {r.dataset} {r.split}: {', '.join(f'{v} {k.replace(chr(95), chr(32))}' for k, v in r.counts.items() if v)}"
        for r in results
    ]
    steps = {r.provenance["step"] for r in results if "step" in r.provenance}
    weights = "".join(f" Weights of step {step}." for step in steps)
    return f"In percent.{weights}\n\n{table(results)}\n\nCounts:\n" + "\n".join(counts)


def _training(training: dict[str, Any] | None, rows: Sequence[Mapping[str, Any]]) -> str:
    if training is None:
        return "Unknown: the model folder records no training."
    recipe = training["recipe"]
    versions = ", ".join(f"{name} {version}" for name, version in training["versions"].items())
    contents = str(training.get("data_fingerprint") or "")
    lines = [
        *(f"- {name}: {text}" for name, text in training_facts(training, rows).items()),
        *([f"- fingerprint of the data: {contents[:16]}"] if contents else []),
        f"- versions: {versions}",
    ]
    text = yaml.safe_dump(_given(recipe), sort_keys=False, default_flow_style=False)
    return (
        "\n".join(lines) + "\n\n<details><summary>Recipe (what is not here is the default of the model or the method)"
        f"</summary>\n\n```yaml\n{text}```\n\n</details>"
    )


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without nulls and empty groups, which mean "the default"."""
    nested = {key: _given(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in nested.items() if value is not None and value != {}}
