"""Which files of a folder are published: the checkpoint's weights, and small files beside them that are known by name. No others.

A name is looked at in the folder itself, never a path: what lies deeper is published only where the checkpoint's format puts
weights there. Links are followed within the folder and into the Hub's cache; any other is refused, since what it leads to was
never shown. What is left out is listed, with its size.
"""

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from reshard import formats
from reshard.checkpoint import Checkpoint, open_checkpoint
from reshard.errors import DestinationError
from reshard.foreign import quote
from reshard.formats.manifest import NAME as MANIFEST
from reshard.stores.beside import is_side_file

CARD = "README.md"
_MOST = 100_000  # entries that are counted below a folder that is left out


@dataclass(frozen=True)
class Selection:
    """The files of `folder` to be published, by name, the card among them; and what is left out, name → bytes (a folder's ends in /)."""

    checkpoint: Checkpoint
    files: Mapping[str, Path]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def goes_along(name: str, include_code: bool = False) -> bool:
    """Whether a push publishes the file `name` that lies beside weights."""
    return name in (MANIFEST, CARD) or is_side_file(name, include_code)


def select(folder: str | Path, include_code: bool = False, **options: Any) -> Selection:
    """What of `folder` a push publishes; `options` are those of ``open``. Raises DestinationError for a link that leads elsewhere."""
    folder = Path(folder)
    checkpoint = open_checkpoint(folder, **options)
    weights = set(checkpoint.files)
    beside = {path.name for path in folder.iterdir() if goes_along(path.name, include_code) and path.is_file()}
    names = weights | beside | small_files(checkpoint)
    files = {name: folder / name for name in sorted(names)}
    check_links(files.values(), folder)
    return Selection(checkpoint, files, left_out(folder, names))


def small_files(checkpoint: Checkpoint) -> set[str]:
    """Files without which its format's folders are not whole, where its weights lie and in the folder itself."""
    small = formats.get(checkpoint.format).small
    inside = {"", *(file.rpartition("/")[0] for file in checkpoint.files)}
    found = [(at, path) for at in inside for path in (checkpoint.path / at if at else checkpoint.path).iterdir()]
    return {f"{at}/{path.name}".removeprefix("/") for at, path in found
            if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in small)}  # fmt: skip


def check_links(paths: Iterable[Path], folder: Path) -> None:
    """Raises DestinationError, by name, for what is no file or lies outside of `folder` and of the Hub's cache, links followed."""
    home, bad = Path(os.path.realpath(folder)), []
    for path in paths:
        real = Path(os.path.realpath(path))
        if not stat.S_ISREG(os.stat(real).st_mode):
            bad.append(f"{path.name} is no regular file")
        elif not (real.is_relative_to(home) or _in_cache(real, home)):
            bad.append(f"{path.relative_to(folder) if path.is_relative_to(folder) else path} leads to {real}")
    if bad:
        raise DestinationError(f"{folder}: {quote('; '.join(bad[:8]), 1000)}: files outside of the folder are not published",
                               "put the file itself there, or remove the link")  # fmt: skip


def _in_cache(real: Path, home: Path) -> bool:
    """Whether `real` is the content of a file of the Hub's cache: of the one that the snapshot `home` lies in, or the environment's."""
    if real.parent.name != "blobs":
        return False
    if home.parent.name == "snapshots" and real.parent.parent == home.parent.parent:
        return True
    return real.parent.parent.parent == Path(os.path.realpath(constants.HF_HUB_CACHE))


def left_out(folder: Path, names: set[str]) -> dict[str, int]:
    """What `folder` holds besides `names`: name → bytes; a folder's ends in /."""
    inside = {parent.as_posix() for name in names for parent in Path(name).parents} - {"."}
    out: dict[str, int] = {}

    def look(path: Path, at: str) -> None:
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            name = f"{at}{entry.name}"
            if name in names:
                continue
            if name in inside:
                look(Path(entry.path), f"{name}/")
            elif entry.is_dir(follow_symlinks=False):
                out[name + "/"] = _size_below(entry.path)
            else:
                out[name] = entry.stat(follow_symlinks=False).st_size

    look(folder, "")
    return out


def _size_below(folder: str) -> int:
    total = seen = 0
    for at, _, names in os.walk(folder):
        for name in names:
            seen += 1
            if seen > _MOST:
                return total
            total += os.lstat(os.path.join(at, name)).st_size
    return total
