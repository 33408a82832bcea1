"""The repository that a push writes to, as it stands: what would forbid the push is known before the first byte goes up."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import get_token

from reshard.errors import DestinationError, HubError
from reshard.foreign import LIMIT
from reshard.formats.manifest import NAME as MANIFEST
from reshard.hub.answers import Entry, Info, info, listing
from reshard.hub.client import hub_api
from reshard.hub.failures import asked, unexpected
from reshard.hub.location import Location
from reshard.hub.repository import Repository
from reshard.publish.card import MARK
from reshard.publish.selection import CARD
from reshard.text import some

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp", ".safetensors.index.json", ".bin.index.json")


@dataclass
class Target:
    """What the repository holds, and the commit `head` that the new one shall follow."""

    location: Location
    head: str
    files: dict[str, Entry] = field(default_factory=dict)
    create_pr: bool = False
    public: bool = False  # whether a public repository is meant
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

    def others(self, names: set[str]) -> list[str]:
        """Weights and notes of them that a push of `names` does not replace and a reader of its folder would find."""
        tops = {name.partition("/")[0] for name in names if "/" in name}
        return sorted(name for name in self.inside() if name not in names and (name.endswith(_WEIGHTS) or name == MANIFEST)
                      and ("/" not in name or name.partition("/")[0] in tops))  # fmt: skip

    def has(self, name: str, content: Path | bytes) -> bool:
        """Whether the repository has this very file, by its hash."""
        there = self.files.get(self.path(name))
        return there is not None and is_same(there, content)

    def card_is_ours(self) -> bool:
        """Whether the card may be written: there is none, or it is one that reshard wrote."""
        path = self.path(CARD)
        if path not in self.files:
            return True
        if self.files[path].size > LIMIT:
            return False
        return MARK.encode() in Repository(replace(self.location, revision=self.head)).content(path)


def is_same(there: Entry, content: Path | bytes) -> bool:
    """Whether `content` is that of the file `there`, by its size and hash."""
    if there.size != (len(content) if isinstance(content, bytes) else content.stat().st_size):
        return False
    digest, wanted = there.digest()
    if digest is None:
        return False
    if isinstance(content, bytes):
        digest.update(content)
        return digest.hexdigest() == wanted
    with open(content, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == wanted


def info_of(location: Location, revision: str | None = None) -> Info:
    """Raises HubError too where the Hub does not say whether the repository is private."""
    found = info(hub_api(), location.repo, revision)
    if found.private is None:
        raise unexpected(f"/api/models/{location.repo}", "it does not say whether the repository is private")
    return found


def prepare(location: Location, public: bool, create_pr: bool, names: set[str], overwrite: bool) -> Target:
    """The repository, made if it is not there; everything that would forbid a push of `names` is known after this."""
    api = hub_api()
    if not get_token():
        raise HubError(f"{location}: writing needs a token", "`hf auth login`, or set HF_TOKEN")
    try:
        found = info_of(location)
    except hub_errors.RepositoryNotFoundError:
        asked("/api/repos/create", lambda: api.create_repo(location.repo, private=not public, exist_ok=True))
        found = info_of(location)
    else:
        if not create_pr:  # which any reader may open
            asked(f"/api/models/{location.repo}/auth-check/write", lambda: api.auth_check(location.repo, write=True))
    check_private(location, found, public)
    head, new = found.commit, False
    if location.revision:
        try:
            head = info_of(location, location.revision).commit
        except hub_errors.RevisionNotFoundError:
            if location.revision.startswith("refs/"):
                raise
            new = True
    target = Target(location, head, listing(api, location.repo, head), create_pr, public, new)
    others = target.others(names)
    if others and not overwrite:
        raise DestinationError(f"{location} holds other weights, which a reader would mix up with these: {some(others)}",
                               "--overwrite removes them in the same commit; or push to another repository, branch or /SUBDIR")  # fmt: skip
    return target


def check_private(location: Location, found: Info, public: bool) -> None:
    if not found.private and not public:
        raise DestinationError(
            f"{location.repo} is a public repository: everyone could read what is pushed",
            "say --public if that is meant, or push to another one",
        )
