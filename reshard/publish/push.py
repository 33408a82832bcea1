"""Publish a checkpoint: large files first, one by one, then everything in one commit, so that a reader sees all of it or nothing.

What a repository already holds is not sent again, and where nothing differs there is no commit. A new repository is private.
Only files that ``selection.py`` knows are published; what is left out is told.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from reshard.conversion.job import Job, default_jobs
from reshard.conversion.job import left_out as what_is_left_out
from reshard.conversion.output import Output
from reshard.errors import DestinationError, HubError
from reshard.executor.run import run
from reshard.formats.manifest import read_manifest
from reshard.hub.client import endpoint, hub_api
from reshard.hub.failures import asked, told
from reshard.hub.location import parse_target
from reshard.publish.card import card
from reshard.publish.commit import commit, quietly
from reshard.publish.selection import CARD, Selection, check_links, goes_along, left_out, select, small_files
from reshard.publish.target import Target, prepare
from reshard.stores.files import AnyPath

_REGULAR = 32 << 20  # bytes: the Hub keeps larger files in LFS; those that it does not wait for the commit in memory


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
    left_out: dict[str, int] = field(default_factory=dict)  # what of the source was not published: name → bytes


def push(
    folder: str | Path | Selection,
    destination: str,
    *,
    public: bool = False,
    create_pr: bool = False,
    overwrite: bool = False,
    include_code: bool = False,
    base_model: str | None = None,
    progress: Callable[[int], None] = lambda size: None,
    **options: Any,
) -> Pushed:
    """Publish the checkpoint in `folder` as `destination`, hf://ORG/NAME[@BRANCH][/SUBDIR]. `progress` is told bytes of files dealt with.

    Its weights and the small files that go with them are published, nothing else of the folder; `include_code` adds the .py
    files that lie directly in it. A repository that is not there is made, private unless `public`. Raises HubError, or
    DestinationError: a public one is there and `public` was not said; it holds other weights and `overwrite` was not said; a
    link leads out of the folder. `options` are those of ``open``.
    """
    began = time.monotonic()
    selection = folder if isinstance(folder, Selection) else select(folder, include_code, **options)
    checkpoint, wanted = selection.checkpoint, dict(selection.files)
    location = parse_target(str(destination))
    with told(location):
        target = prepare(location, public, create_pr, set(wanted), overwrite)
        adds = _upload(target, iter(wanted.items()), progress)
        small: dict[str, bytes] = {}
        if CARD not in wanted and target.card_is_ours():
            small[CARD] = card(
                location.repo, location.folder, checkpoint.format, checkpoint.mesh, checkpoint.engine_version, checkpoint, base_model,
                (read_manifest(checkpoint.path) or {}).get("left_out", {}),
            )  # fmt: skip
        return _publish(target, adds, small, [*wanted, *small], began, dict(selection.left_out))


def convert_and_push(
    job: Job,
    destination: str,
    *,
    public: bool = False,
    create_pr: bool = False,
    overwrite: bool = False,
    include_code: bool = False,
    base_model: str | None = None,
    jobs: int | None = None,
    buffer: int,
    progress: Callable[[int], None] = lambda size: None,
    scratch: str | Path | None = None,
) -> Pushed:
    """Run `job` file by file: each is written to `scratch` (the system's folder for such), sent, and removed. One commit at the end.

    The disk needs room for the largest file. Source bytes that several files need are read for each of them. Of the files
    beside the source's weights only those that a ``push`` would publish go along.
    """
    began = time.monotonic()
    location = parse_target(destination)
    beside = {name: path for name, path in job.companions.items() if goes_along(name, include_code)}
    others = {}
    source = job.source.path
    if isinstance(source, Path):
        goes = {*beside, *job.folder.small, *job.source.files, *small_files(job.source), CARD}
        others = left_out(source, goes)
        here = [path for path in beside.values() if isinstance(path, Path)]  # a config.json on the Hub has its companions there
        check_links([path for path in here if path != job.source.config_path or path.parent == source], source)
    names = {file.path for file in job.folder.files} | set(beside) | set(job.folder.small)
    with told(location), tempfile.TemporaryDirectory(prefix="reshard-push-", dir=scratch) as made:
        room = Path(made)
        _check_room(job, room)
        target = prepare(location, public, create_pr, names, overwrite)
        adds = _upload(target, _written(job, room, jobs, buffer, progress), lambda size: None)
        adds += _upload(target, _copied(beside, room), lambda size: None)
        small, left = dict(job.folder.small), what_is_left_out(job.source, job.not_held)
        if CARD not in small and target.card_is_ours():
            small[CARD] = card(location.repo, location.folder, job.format, job.mesh, job.engine_version, job.source, base_model, left)
        return _publish(target, adds, small, sorted({*names, *small}), began, others)


def _check_room(job: Job, scratch: Path) -> None:
    need, free = max(file.image.size for file in job.folder.files), shutil.disk_usage(scratch).free
    if need > free:
        raise DestinationError(
            f"{scratch.parent} has {free:,} bytes free, the largest file has {need:,}", "set TMPDIR to a folder on another disk"
        )


def _written(job: Job, scratch: Path, jobs: int | None, buffer: int, progress: Callable[[int], None]) -> Iterator[tuple[str, Path]]:
    """Each weight file, written alone; it is removed when the next one is asked for."""
    for file in job.folder.files:
        plan = job.plan.only([file.path])
        with closing(job.source.source()) as source, closing(Output(scratch, [file], None, padded=plan.padding)) as output:
            source.casts = job.casts
            run(plan, source, output.write, jobs=jobs or default_jobs(job.source), buffer=buffer, progress=progress)
            output.finish()
            source.check_unchanged()
        yield file.path, scratch / file.path
        (scratch / file.path).unlink()


def _copied(files: Mapping[str, AnyPath], scratch: Path) -> Iterator[tuple[str, Path]]:
    """Each file, of a folder or of another repository, copied alone."""
    for name, path in files.items():
        copy = scratch / name
        copy.write_bytes(path.read_bytes())
        yield name, copy
        copy.unlink()


def _upload(target: Target, files: Iterable[tuple[str, Path]], progress: Callable[[int], None]) -> list[CommitOperationAdd]:
    """Send large files that the repository lacks, one after the other. Small ones wait, in memory, for the commit."""
    api, adds, waiting = hub_api(), [], 0
    for name, path in files:
        size = path.stat().st_size
        if not target.has(name, path):
            add = CommitOperationAdd(target.path(name), path)
            with quietly():
                asked(f"/api/models/{target.location.repo}/preupload/{target.branch}",
                      partial(api.preupload_lfs_files, target.location.repo, [add], revision=target.branch, create_pr=target.create_pr))  # fmt: skip
            if add.path_or_fileobj != b"":  # it goes with the commit itself, and may be gone by then
                waiting += size
                if waiting > _REGULAR:
                    raise HubError(
                        f"{target.location}: the Hub wants {name}, of {size} bytes, inside the commit and not in LFS", "check HF_ENDPOINT"
                    )
                add = CommitOperationAdd(target.path(name), path.read_bytes())
            adds.append(add)
        progress(size)
    return adds


def _publish(
    target: Target, adds: list[CommitOperationAdd], small: dict[str, bytes], names: list[str], began: float, left_out: dict[str, int]
) -> Pushed:
    """One commit of everything that is new; none where nothing is."""
    location = target.location
    adds = adds + [
        CommitOperationAdd(target.path(name), content) for name, content in sorted(small.items()) if not target.has(name, content)
    ]
    gone = target.others(set(names))
    head, pull_request = target.head, None
    if adds or gone or target.branch_is_new:
        made = commit(target, adds, gone)
        head, pull_request = made.commit, made.pull_request
    new = [add.path_in_repo.removeprefix(target.path("")) for add in adds]
    return Pushed(str(location), head, bool(adds or gone), f"{endpoint()}/{location.repo}", sorted(names), sorted(new),
                  sum(add.upload_info.size for add in adds), time.monotonic() - began, pull_request, left_out)  # fmt: skip
