"""Publish a checkpoint: large files first, one by one, then everything in one commit, so that a reader sees all of it or nothing.

What a repository already holds is not sent again, and where nothing differs there is no commit. A new repository is private.
"""

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from reshard.checkpoint import open_checkpoint
from reshard.errors import DestinationError, HubError
from reshard.execute import run
from reshard.formats.manifest import NAME as MANIFEST
from reshard.hub.card import MARK, card
from reshard.hub.client import endpoint, hub_api
from reshard.hub.failures import told
from reshard.hub.patience import patiently
from reshard.hub.location import Location, parse_target
from reshard.job import COMPANIONS, Job, default_jobs
from reshard.output import Output
from reshard.stores.foreign import LIMIT
from reshard.text import some
from reshard.transaction import only

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".safetensors.index.json", ".bin.index.json")
CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What a push did. `commit` is the branch's head afterwards; `committed` tells whether it is new."""

    location: str
    commit: str
    committed: bool
    url: str
    files: list[str]
    new: list[str]  # those that the repository did not have, or had otherwise
    bytes_new: int
    seconds: float
    pull_request: str | None = None


@dataclass
class Target:
    """The repository as it stands: what it holds, and the commit that the new one shall follow."""

    location: Location
    head: str | None
    files: dict[str, RepoFile] = field(default_factory=dict)
    create_pr: bool = False
    branch_is_new: bool = False

    @property
    def branch(self) -> str:
        """The branch to ask about."""
        return "main" if self.branch_is_new else self.location.branch

    def path(self, name: str) -> str:
        return f"{self.location.folder}/{name}" if self.location.folder else name

    def inside(self) -> list[str]:
        """Names of the files in the folder to be written."""
        start = self.location.folder + "/" if self.location.folder else ""
        return [path[len(start) :] for path in self.files if path.startswith(start)]


def push(
    folder: str | Path,
    destination: str,
    *,
    public: bool = False,
    create_pr: bool = False,
    overwrite: bool = False,
    base_model: str | None = None,
    progress: Callable[[int], None] = lambda size: None,
    **options,
) -> Pushed:
    """Publish the checkpoint in `folder` as `destination`, hf://ORG/NAME[@BRANCH][/SUBDIR]. `progress` is told bytes of files dealt with.

    A repository that is not there is made, private unless `public`. Raises HubError, or DestinationError: a public one is
    there and `public` was not said; it holds other weights and `overwrite` was not said. `options` are those of ``open``.
    """
    began = time.monotonic()
    checkpoint = open_checkpoint(folder, **options)
    location = parse_target(str(destination))
    paths = {str(p.relative_to(folder)): p for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    wanted = {name: path for name, path in paths.items() if name in {*checkpoint.files, MANIFEST} or _small(name)}
    with told(location):
        target = _prepare(location, public, create_pr, set(wanted), overwrite)
        small: dict[str, bytes] = {}
        if CARD not in paths and _card_is_ours(target):
            small[CARD] = card(location.repo, location.folder, checkpoint.format, checkpoint.mesh, checkpoint.engine_version, checkpoint, base_model)
        elif CARD in paths:
            wanted[CARD] = paths[CARD]
        adds = _upload(target, iter(wanted.items()), progress)
        return _commit(target, adds, small, [*wanted, *small], began)


def _small(name: str) -> bool:
    """Whether `name` is one of the small files that go with weights."""
    return any(fnmatchcase(name, pattern) for pattern in COMPANIONS) or name.endswith(".index.json") or name == "latest_checkpointed_iteration.txt"


def convert_and_push(
    job: Job,
    destination: str,
    *,
    public: bool = False,
    create_pr: bool = False,
    overwrite: bool = False,
    base_model: str | None = None,
    jobs: int | None = None,
    buffer: int,
    progress: Callable[[int], None] = lambda size: None,
    scratch: str | Path | None = None,
) -> Pushed:
    """Run `job` file by file: each is written to `scratch` (the system's folder for such), sent, and removed. One commit at the end.

    The disk needs room for the largest file. Source bytes that several files need are read for each of them.
    """
    began = time.monotonic()
    location = parse_target(destination)
    names = {file.path for file in job.folder.files} | set(job.companions) | set(job.folder.small)
    with told(location), tempfile.TemporaryDirectory(prefix="reshard-push-", dir=scratch) as made:
        room = Path(made)
        _check_room(job, room)
        target = _prepare(location, public, create_pr, names, overwrite)
        adds = _upload(target, _written(job, room, jobs, buffer, progress), lambda size: None)
        small = {name: path.read_bytes() for name, path in job.companions.items()} | dict(job.folder.small)
        if CARD not in small and _card_is_ours(target):
            small[CARD] = card(location.repo, location.folder, job.format, job.mesh, job.engine_version, job.source, base_model)
        return _commit(target, adds, small, sorted({*names, *small}), began)


def _check_room(job: Job, scratch: Path) -> None:
    need, free = max(file.image.size for file in job.folder.files), shutil.disk_usage(scratch).free
    if need > free:
        raise DestinationError(f"{scratch.parent} has {free:,} bytes free, the largest file has {need:,}", "set TMPDIR to a folder on another disk")


def _written(job: Job, scratch: Path, jobs: int | None, buffer: int, progress: Callable[[int], None]) -> Iterator[tuple[str, Path]]:
    """Each weight file, written alone; it is removed when the next one is asked for."""
    for file in job.folder.files:
        with closing(job.source.source()) as source, closing(Output(scratch, [file], None)) as output:
            run(only(job.plan, [file]), source, output.write, jobs=jobs or default_jobs(job.source), buffer=buffer, progress=progress)
            output.finish()
        yield file.path, scratch / file.path
        (scratch / file.path).unlink()


def _prepare(location: Location, public: bool, create_pr: bool, names: set[str], overwrite: bool) -> Target:
    """The repository, made if it is not there; everything that would forbid the push is known after this."""
    api = hub_api()
    if not get_token():
        raise HubError(f"{location}: writing needs a token", "`hf auth login`, or set HF_TOKEN")
    try:
        info = patiently(lambda: api.model_info(location.repo))
    except hub_errors.RepositoryNotFoundError:
        patiently(lambda: api.create_repo(location.repo, private=not public, exist_ok=True))
        info = patiently(lambda: api.model_info(location.repo))
    else:
        if not create_pr:  # which any reader may open
            patiently(lambda: api.auth_check(location.repo, write=True))
        if not info.private and not public:
            raise DestinationError(f"{location.repo} is a public repository: everyone could read what is pushed", "say --public if that is meant, or push to another one")
    head, new = info.sha, False
    if location.revision:
        try:
            head = patiently(lambda: api.model_info(location.repo, revision=location.revision)).sha
        except hub_errors.RevisionNotFoundError:
            if location.revision.startswith("refs/"):
                raise
            new = True
    files = patiently(lambda: list(api.list_repo_tree(location.repo, recursive=True, revision=head)))
    target = Target(location, head, {file.path: file for file in files if isinstance(file, RepoFile)}, create_pr, new)
    others = _others(target, names)
    if others and not overwrite:
        raise DestinationError(f"{location} holds other weights, which a reader would mix up with these: {some(others)}",
                               "--overwrite removes them in the same commit; or push to another repository, branch or /SUBDIR")  # fmt: skip
    return target


def _others(target: Target, names: set[str]) -> list[str]:
    """Weights and notes of them that the push does not replace and a reader of its folder would find."""
    tops = {name.partition("/")[0] for name in names if "/" in name}
    return sorted(name for name in target.inside() if name not in names and (name.endswith(_WEIGHTS) or name == MANIFEST)
                  and ("/" not in name or name.partition("/")[0] in tops))  # fmt: skip


def _card_is_ours(target: Target) -> bool:
    """Whether the card may be written: there is none, or it is one that reshard wrote."""
    path = target.path(CARD)
    if path not in target.files:
        return True
    if target.files[path].size > LIMIT:
        return False
    from reshard.hub.repository import Repository

    return MARK.encode() in Repository(replace(target.location, revision=target.head)).content(path)


def _unchanged(target: Target, name: str, content: Path | bytes) -> bool:
    """Whether the repository has this very file, by its hash."""
    there = target.files.get(target.path(name))
    if there is None or there.size != (len(content) if isinstance(content, bytes) else content.stat().st_size):
        return False
    if there.lfs is None:
        content = content if isinstance(content, bytes) else content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest() == there.lfs.sha256
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == there.lfs.sha256


def _upload(target: Target, files: Iterable[tuple[str, Path]], progress: Callable[[int], None]) -> list[CommitOperationAdd]:
    """Send large files that the repository lacks, one after the other. Small ones wait, in memory, for the commit."""
    api, adds = hub_api(), []
    for name, path in files:
        size = path.stat().st_size
        if not _unchanged(target, name, path):
            add = CommitOperationAdd(target.path(name), path)
            with _quiet():
                patiently(lambda add=add: api.preupload_lfs_files(target.location.repo, [add], revision=target.branch))
            if add.path_or_fileobj != b"":  # it goes with the commit itself, and may be gone by then
                add = CommitOperationAdd(target.path(name), path.read_bytes())
            adds.append(add)
        progress(size)
    return adds


def _commit(target: Target, adds: list[CommitOperationAdd], small: dict[str, bytes], names: list[str], began: float) -> Pushed:
    """One commit of everything that is new, which follows the head that was seen at first; none where nothing is."""
    api, location = hub_api(), target.location
    adds = adds + [CommitOperationAdd(target.path(name), content) for name, content in sorted(small.items()) if not _unchanged(target, name, content)]
    gone = [CommitOperationDelete(target.path(name)) for name in _others(target, set(names))]
    commit, pull = target.head, None
    if target.branch_is_new:
        patiently(lambda: api.create_branch(location.repo, branch=location.branch, revision=target.head, exist_ok=True))
    if adds or gone:
        with _quiet():
            info = patiently(lambda: api.create_commit(location.repo, [*adds, *gone], commit_message="Upload weights with reshard", revision=location.branch,
                                                       parent_commit=target.head, create_pr=target.create_pr))  # fmt: skip
        commit, pull = info.oid, info.pr_url
    new = [add.path_in_repo.removeprefix(target.path("")) for add in adds]
    return Pushed(str(location), commit, bool(adds or gone), f"{endpoint()}/{location.repo}", sorted(names), sorted(new),
                  sum(add.upload_info.size for add in adds), time.monotonic() - began, pull)  # fmt: skip


@contextmanager
def _quiet():
    """Without the client's own progress bars and remarks."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    hidden = constants.HF_HUB_DISABLE_PROGRESS_BARS
    logger.setLevel(logging.ERROR)
    if hidden is None:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if hidden is None:
            enable_progress_bars()
