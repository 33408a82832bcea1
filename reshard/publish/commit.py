"""The one commit of a push, and the truth about it when its answer is lost.

A commit whose answer never comes, or makes no sense, may have been made. So after any such failure the branch is looked at:
it holds this push's files, then the commit was made; it stands where it stood, then it was not, and is tried again; it moved
to something else, then somebody else was faster. Of a pull request, those that were opened meanwhile are looked at.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from reshard.errors import HubError
from reshard.foreign import quote
from reshard.hub import patience
from reshard.hub.answers import Entry, is_commit, listing, pull_requests
from reshard.hub.client import endpoint, hub_api
from reshard.hub.failures import asked, explain
from reshard.hub.patience import passing, pause, wait_for
from reshard.hub.wording import safe
from reshard.publish.target import Target, check_private, info_of
from reshard.text import some

_MESSAGE = "Upload weights with reshard"


@dataclass(frozen=True)
class Made:
    """A commit that was made: `commit` is the head of the branch, or of the pull request, then."""

    commit: str
    pull_request: str | None = None


def commit(target: Target, adds: list[CommitOperationAdd], gone: list[str]) -> Made:
    """Add files to `target` and remove those named `gone` there, all in one commit, which follows the head that was seen at first.

    Raises HubError where none was made, and where nobody can tell.
    """
    api, location = hub_api(), target.location
    check_private(location, info_of(location), target.public)  # it may have been made public since
    if target.branch_is_new:
        asked(
            f"/api/models/{location.repo}/branch",
            lambda: api.create_branch(location.repo, branch=location.branch, revision=target.head, exist_ok=True),
        )
    if not adds and not gone:
        return Made(target.head)
    known = pull_requests(api, location.repo) if target.create_pr else {}
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *adds,
        *(CommitOperationDelete(target.path(name), is_folder=False) for name in gone),
    ]
    for tries in range(1, patience.TRIES + 1):
        try:
            with quietly():
                done = api.create_commit(location.repo, operations, commit_message=_MESSAGE, revision=location.branch, parent_commit=target.head,
                                         create_pr=target.create_pr)  # fmt: skip
            return _confirmed(target, adds, gone, done.oid, done.pr_url)
        except (hub_errors.HTTPError, OSError) as caught:
            if _refused(caught):
                raise
            error: Exception = caught
        except HubError:
            raise
        except Exception as caught:  # noqa: BLE001  an answer that the client stumbled over: the commit may be there
            error = caught
        made = _look(target, adds, gone, known, error)
        if made:
            return made
        if not (passing(error) or _says_moved(error)):
            break
        if tries < patience.TRIES:
            pause(wait_for(getattr(getattr(error, "response", None), "headers", {}), tries), safe(error), time.sleep)
    if isinstance(error, hub_errors.HTTPError | OSError):
        raise explain(error, location)
    raise HubError(
        f"{location}: no commit was made, and the Hub's answer makes no sense: {type(error).__name__}: {safe(error)}",
        "run the same command again later",
    )


def _confirmed(target: Target, adds: list[CommitOperationAdd], gone: list[str], oid: object, pull_request: object) -> Made:
    """The commit that the Hub says it made, once it is seen to hold what was pushed."""
    location = target.location
    if not isinstance(oid, str) or not is_commit(oid) or not isinstance(pull_request, str | None):
        raise ValueError(f"the commit is {quote(repr(oid))}, {quote(repr(pull_request))}")
    missing = asked(f"/{location.repo}", lambda: _missing(target, oid, adds, gone))
    if missing:
        raise HubError(f"{location}: the Hub made the commit {oid[:12]}, but {some(missing)} {'is' if len(missing) == 1 else 'are'} not there as sent",
                       f"look at {endpoint()}/{location.repo}/commit/{oid}, then run the same command again")  # fmt: skip
    return Made(oid, None if pull_request is None else safe(pull_request))


def _refused(error: Exception) -> bool:
    """Whether the Hub read the request and said no: nothing was committed. Not so a 412: an earlier try may have moved the branch."""
    if not isinstance(error, hub_errors.HfHubHTTPError):
        return not (isinstance(error, hub_errors.HTTPError) or passing(error))
    status = error.response.status_code
    return 400 <= status < 500 and status not in (408, 412, 429)


def _look(target: Target, adds: list[CommitOperationAdd], gone: list[str], known: dict[str, str], error: Exception) -> Made | None:
    """What is there after `error`: this push's commit, or None where the branch stands as it stood. Raises HubError where it moved otherwise."""
    location = target.location
    try:
        if target.create_pr:
            return _pull_request(target, adds, gone, known)
        head = info_of(location, location.revision).commit
        if head == target.head:
            return None
        if not _missing(target, head, adds, gone):
            return Made(head)
    except (hub_errors.HTTPError, OSError, HubError) as lost:
        where = f"{endpoint()}/{location.repo}/{'discussions' if target.create_pr else f'commits/{location.branch}'}"
        raise HubError(
            f"{location}: whether the commit was made is not known: {safe(error)}; then {safe(lost)}",
            f"look at {where}, then run the same command again",
        ) from None
    raise HubError(f"{location}: the branch moved while this was being done; nothing was committed", "run the same command again")


def _says_moved(error: Exception) -> bool:
    return isinstance(error, hub_errors.HfHubHTTPError) and error.response.status_code == 412


def _pull_request(target: Target, adds: list[CommitOperationAdd], gone: list[str], known: dict[str, str]) -> Made | None:
    location = target.location
    now = pull_requests(hub_api(), location.repo)
    for ref in sorted(now.keys() - known.keys(), key=lambda ref: int(ref.rpartition("/")[2])):
        if now[ref] != target.head and not _missing(target, now[ref], adds, gone):
            return Made(now[ref], f"{endpoint()}/{location.repo}/discussions/{ref.rpartition('/')[2]}")
    return None


def _missing(target: Target, commit: str, adds: list[CommitOperationAdd], gone: list[str]) -> list[str]:
    """Files of this push that are not at `commit` as they were sent, or still there though they were to go."""
    files = listing(hub_api(), target.location.repo, commit)
    return [add.path_in_repo for add in adds if not _is(files.get(add.path_in_repo), add)] + [
        name for name in gone if target.path(name) in files
    ]


def _is(entry: Entry | None, add: CommitOperationAdd) -> bool:
    if entry is None or entry.size != add.upload_info.size:
        return False
    if entry.sha256:
        return entry.sha256 == add.upload_info.sha256.hex()
    digest, wanted = entry.digest()
    if digest is None:
        return False
    with add.as_file() as file:
        digest.update(file.read())
    return digest.hexdigest() == wanted


@contextmanager
def quietly() -> Iterator[None]:
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
