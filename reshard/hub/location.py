"""``hf://ORG/NAME[@REV][/SUBDIR]``, or a URL pasted from the browser: what it names."""

import re
from dataclasses import dataclass

from reshard.errors import HubError

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Location:
    """A folder of a model's repository. `revision` is a branch, tag or commit; None the default branch."""

    repo: str
    revision: str | None = None
    folder: str = ""

    def __str__(self) -> str:
        name = self.revision or ""
        revision = f"@{name if name.startswith('refs/') else name.replace('/', '%2F')}" if name else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.folder}" if self.folder else "")

    @property
    def is_commit(self) -> bool:
        return bool(self.revision and _COMMIT.fullmatch(self.revision))

    @property
    def branch(self) -> str:
        return self.revision or "main"


def parse(text: str) -> Location:
    """Raises HubError for anything but a model's repository."""
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    from reshard.hub.client import endpoint

    try:
        uri = parse_hf_uri(text, endpoint=endpoint())
    except HfUriError as error:
        body = text.removeprefix("hf://")
        hint = "write hf://ORG/NAME, with @REVISION and /SUBDIR if need be"
        if text.startswith("hf://") and body and "/" not in body:
            hint = f"write hf://ORG/{body}: every model belongs to an organisation or a user"
        raise HubError(f"{text}: {error.msg.rstrip('.')}", hint) from None
    if uri.type != "model":
        raise HubError(f"{text} is a {uri.type}, not a model", "reshard reads and writes models' repositories")
    return Location(uri.id, uri.revision, uri.path_in_repo.strip("/"))


def parse_target(text: str) -> Location:
    """A location to write to: its revision is a branch. Raises HubError."""
    location = parse(text)
    if location.is_commit:
        raise HubError(
            f"{text}: {location.revision} is a commit; one pushes to a branch", f"hf://{location.repo} or hf://{location.repo}@BRANCH"
        )
    return location
