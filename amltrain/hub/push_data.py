"""Publish prepared data as a Hub data set, one shard after the other, so that an interrupted push resumes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile

from amltrain.data.card import CARD, data_card
from amltrain.data.catalog import MANIFEST, read_manifest
from amltrain.data.rows import check_file
from amltrain.errors import UserError
from amltrain.files import sha256
from amltrain.hub.benchmark import EVAL_FILE, eval_yaml
from amltrain.hub.push import check_access
from amltrain.network import failure_reason, limit_waiting

COMMIT_BYTES = 2**30
"""Shards of about so many bytes arrive together; an interruption loses no more than these."""


def push_data(
    prepared: Path,
    repo: str,
    *,
    private: bool,
    names: Sequence[str] = (),
    revision: str | None = None,
    benchmark: str | None = None,
    log: Callable[[str], None] = print,
) -> str:
    """Push prepared data sets and return the address of the Hub data set.

    names: which of them; all if empty. Nothing else in the folder (`source/`, other files) is pushed. Shards that the
    Hub has already, by SHA-256, are left out; the card and the manifests come last. benchmark: evaluation framework to
    name in an eval.yaml; None = no such file. Raises UserError.
    """
    check_access(repo)
    folders = _folders(prepared, names)
    shards = [shard for folder in folders for shard in _checked_shards(folder)]
    limit_waiting()
    manifests = {folder.name: read_manifest(folder) or {} for folder in folders}
    evaluated = None if benchmark is None else eval_yaml(repo, benchmark, manifests)
    api = HfApi(library_name="amltrain")
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type="dataset", exist_ok=True)
        there = _hashes(api, repo, revision)
        missing = [s for s in shards if there.get(_name(s, prepared)) != sha256(s)]
        log(f"{len(shards) - len(missing)} of {len(shards)} shards are on the Hub already")
        for number, batch in enumerate(_batches(missing), 1):
            adds = [CommitOperationAdd(_name(shard, prepared), str(shard)) for shard in batch]
            message = f"Data, part {number}"
            api.create_commit(repo, adds, commit_message=message, repo_type="dataset", revision=revision)
            log(f"pushed {', '.join(_name(shard, prepared) for shard in batch)}")
        rest = [path for folder in folders for path in (folder / MANIFEST, folder / "rows.jpg") if path.is_file()]
        last = [CommitOperationAdd(_name(path, prepared), str(path)) for path in rest]
        card = data_card(prepared, repo, [folder.name for folder in folders])
        last.append(CommitOperationAdd(CARD, card.encode()))
        if evaluated is not None:
            last.append(CommitOperationAdd(EVAL_FILE, evaluated.encode()))
        api.create_commit(repo, last, commit_message="Card and manifests", repo_type="dataset", revision=revision)
    except Exception as error:  # of requests or httpx, depending on huggingface_hub's version
        raise UserError(
            f"could not push to {repo}: {failure_reason(error, repo, writing=True)}; rerun to resume"
        ) from error
    return f"{api.endpoint}/datasets/{repo}"


def _folders(prepared: Path, names: Sequence[str]) -> list[Path]:
    there = sorted(path.parent for path in prepared.glob(f"*/{MANIFEST}"))
    known = {folder.name: folder for folder in there}
    if not there:
        raise UserError(f"{prepared} holds nothing prepared; run amltrain data prepare first")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{prepared} has no data set {unknown[0]!r}; it has {', '.join(known)}")
    return [known[name] for name in names] if names else there


def _checked_shards(folder: Path) -> list[Path]:
    """Return the shards after comparing each with its hash: damaged files must not be published."""
    manifest = read_manifest(folder) or {}
    shards = sorted(folder.glob("*.parquet"))
    for shard in shards:
        check_file(shard, manifest.get("files", {}).get(shard.name))
    absent = [name for name in manifest.get("files", {}) if not (folder / name).is_file()]
    if absent:
        raise UserError(f"{folder} has no {absent[0]}, which its manifest lists; copy it again or prepare it again")
    return shards


def _hashes(api: HfApi, repo: str, revision: str | None) -> dict[str, str]:
    """SHA-256 of the large files in the repository, by name."""
    tree = api.list_repo_tree(repo, recursive=True, repo_type="dataset", revision=revision)
    return {entry.path: entry.lfs.sha256 for entry in tree if isinstance(entry, RepoFile) and entry.lfs is not None}


def _batches(shards: Sequence[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    for shard in shards:
        batch.append(shard)
        if sum(path.stat().st_size for path in batch) >= COMMIT_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _name(path: Path, prepared: Path) -> str:
    return path.relative_to(prepared).as_posix()
