"""A training on Hugging Face Jobs: `amltrain train --job FLAVOR ...`.

The code of this installation and the resolved config go to the output repository (`job/`), so the job runs what was
tried here. It keeps its state there (`hub.push state`), so an attempt that ends early is followed by one that goes on.
Nothing is copied besides: data and weights must have names that the job can fetch.
"""

import gzip
import inspect
import io
import shlex
import tarfile
from dataclasses import replace
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi

from amltrain.config.files import PACKAGE, config_folder
from amltrain.config.parse import as_yaml
from amltrain.config.schema import RunConfig
from amltrain.data.catalog import dataset_spec
from amltrain.errors import UserError
from amltrain.hub.push import check_access
from amltrain.network import failure_reason, limit_waiting
from amltrain.registry import DATASETS, import_flags

PLACE, CODE, CONFIG = "job", "code.tar.gz", "config.yaml"
OUTPUT = "run"
"""The run's folder on the job's machine."""
ATTEMPTS, TIMEOUT = 3, "24h"
IMAGE = "pytorch/pytorch:2.7.1-cuda12.6-cudnn9-runtime"
"""Of Docker Hub, with a torch that this package takes."""


def job_config(config: RunConfig) -> RunConfig:
    """The run as the job takes it: its state on the Hub, its output there. Raises UserError for what the job lacks."""
    if config.hub.repo is None:
        raise UserError("a job keeps its run in a repository; name it with --hub.repo user/name")
    if not config.hub.private:
        raise UserError("a job keeps its run in a private repository; leave hub.private true")
    data, model = config.data, config.model
    unknown = [name for name in data.datasets if name not in DATASETS.names() or not dataset_spec(name).synthetic]
    if unknown and (Path(data.prepared).exists() or data.prepared.count("/") != 1):
        raise UserError(
            f"the job cannot read {data.prepared} of this machine; push the data (amltrain data push) and name them: "
            f"--data.prepared user/name"
        )
    named = {
        "model.vision_weights": model.vision_weights,
        "model.text_weights": model.text_weights,
        "model.checkpoint": model.checkpoint,
        "preprocess.tokenizer": config.preprocess.tokenizer,
        "data.held_out_ids": data.held_out_ids,
    }
    if import_flags():
        raise UserError(
            "the job has no --import of this machine; install the plugin in an image of yours (--job_image)"
        )
    for key, value in named.items():
        if value and Path(value).exists():
            raise UserError(f"the job cannot read {key} {value} of this machine; name a repository of the Hub")
    prepared = data.prepared if unknown else "prepared"
    hub = replace(config.hub, push="state")
    return replace(config, output=OUTPUT, resume="auto", hub=hub, data=replace(data, prepared=prepared))


def start_job(config: RunConfig, flavor: str, *, timeout: str = TIMEOUT, image: str = IMAGE) -> tuple[str, str]:
    """Start a run on Hugging Face Jobs; returns the job's id and address.

    flavor: of the machine, e.g. a100-large or a100x4; every GPU of it gets a process. timeout: for one attempt, e.g.
    24h. image: of Docker, with Python and torch. Raises UserError.
    """
    run = job_config(config)
    repo = str(run.hub.repo)
    check_access(repo)
    limit_waiting()
    api = HfApi(library_name="amltrain")
    if not hasattr(api, "run_job"):
        raise UserError("this huggingface_hub knows no jobs; update it: pip install -U huggingface_hub")
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        if api.repo_info(repo).private is False:
            raise UserError(f"{repo} is public, and a run's state is private; name another repository")
        adds = [
            CommitOperationAdd(f"{PLACE}/{CODE}", packed_code()),
            CommitOperationAdd(f"{PLACE}/{CONFIG}", as_yaml(run).encode()),
        ]
        api.create_commit(repo, adds, commit_message="Job")
        job = api.run_job(
            image=image,
            command=["bash", "-c", job_script(run)],
            flavor=flavor,
            timeout=timeout,
            secrets={"HF_TOKEN": huggingface_hub.get_token()},
            **_attempts(api),
        )
    except UserError:
        raise
    except Exception as error:  # of requests or httpx, depending on huggingface_hub's version
        raise UserError(f"could not start a job: {failure_reason(error, repo, writing=True)}") from error
    return job.id, job.url


def _attempts(api: HfApi) -> dict[str, Any]:
    """That a job which failed is started again, where the client can say so."""
    return {"attempts": ATTEMPTS} if "attempts" in inspect.signature(api.run_job).parameters else {}


def packed_code() -> bytes:
    """The package and its configs as a tar file, the same for the same contents."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for folder, suffixes in ((PACKAGE, (".py", ".html", ".css", ".js", ".typed")), (config_folder(), (".yaml",))):
            root = PACKAGE.parent if folder == PACKAGE else folder.parent
            for path in sorted(folder.rglob("*")):
                if path.is_file() and (path.suffix in suffixes or path.parent.name == "templates"):
                    archive.add(path, path.relative_to(root).as_posix(), recursive=False, filter=_plain)
    return packed.getvalue()


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the names and times of this machine."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def job_script(run: RunConfig) -> str:
    """The shell script that the job runs."""
    repo = str(run.hub.repo)
    packages = " ".join(map(shlex.quote, packages_of(run)))
    count = "$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')"
    return "\n".join(
        [
            "set -e",
            f"pip install --quiet {packages}",
            f"hf download {repo} --include '{PLACE}/*' --local-dir . --quiet",
            f"tar -xzf {PLACE}/{CODE}",
            f"python -m amltrain train --processes {count} --config {PLACE}/{CONFIG}",
        ]
    )


def packages_of(run: RunConfig) -> list[str]:
    """What the job installs: what this package needs, and the extras that the run uses."""
    extras = {tracker for tracker in run.tracking.trackers if tracker in ("wandb", "trackio")}
    extras |= {"lora"} if find_spec("peft") is not None else set()  # which models use it is not known before they exist
    found = []
    for need in requires("amltrain") or ():
        package, _, marker = need.partition(";")
        if "extra" not in marker or any(f'"{extra}"' in marker or f"'{extra}'" in marker for extra in extras):
            found.append(package.strip().replace(" ", ""))
    return found
