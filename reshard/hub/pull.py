"""Fetch a repository's folder as it is, by the client's own downloads: for those who want the files themselves."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import DestinationError, HubError
from reshard.hub.failures import told
from reshard.hub.folder import HubPath, open_folder


@dataclass(frozen=True)
class Pulled:
    """What a pull did."""

    path: Path
    revision: str
    files: list[str]
    bytes: int
    seconds: float


def wanted(folder: HubPath) -> dict[str, int]:
    """Files of the folder that a model consists of, and their sizes: of two kinds of weights the safer; no code, no other formats."""
    entries = folder.repository.entries
    start = folder.path + "/" if folder.path else ""
    names = {path[len(start) :]: entry.size for path, entry in entries.items() if path.startswith(start)}
    skipped = (".py", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".tflite")
    if any(name.endswith(".safetensors") for name in names):
        skipped += (".bin", ".bin.index.json", ".pth")
    return {name: size for name, size in names.items() if not name.endswith(skipped) and not name.startswith(".git")}


def pull(source: str, destination: str | Path, *, overwrite: bool = False, cache: bool = False, progress: Callable[[int], None] = lambda size: None) -> Pulled:
    """Download `source`, hf://ORG/NAME[@REV][/SUBDIR], into the folder `destination`, which appears whole or not at all.

    Files that an interrupted pull finished are not fetched again. Raises HubError, or DestinationError.
    """
    began = time.monotonic()
    folder = source if isinstance(source, HubPath) else open_folder(str(source), cache)
    destination = Path(os.path.abspath(destination))
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise DestinationError(f"{destination} is not empty ({sum(1 for _ in destination.iterdir())} entries)", "use --overwrite to replace it, or choose another destination")
    repository, names = folder.repository, wanted(folder)
    partial = destination.parent / f".{destination.name}.reshard-pull"
    free, need = shutil.disk_usage(_existing(partial)).free, sum(names.values())
    there = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
    if need - there > free:
        raise DestinationError(f"{destination.parent} has {free:,} bytes free, the files have {need:,}", "free some space, or write to another disk")
    start = folder.path + "/" if folder.path else ""
    with told(repository.location):
        repository.api.snapshot_download(repository.location.repo, revision=repository.commit, local_dir=partial,
                                         allow_patterns=[glob_safe(start + name) for name in names], tqdm_class=_bar(progress))  # fmt: skip
    for name, size in names.items():
        got = (partial / (start + name)).stat().st_size
        if got != size:
            raise HubError(f"{name} has {got} bytes after the download, the Hub lists {size}", "run the same command again")
    with told(repository.location):
        differing = repository.api.verify_repo_checksums(repository.location.repo, local_dir=partial, revision=repository.commit).mismatches
    if differing:
        for each in differing:
            (partial / each["path"]).unlink()
        first = differing[0]
        raise HubError(f"{repository.location}: {first['path']} has the checksum {first['actual']}, the Hub lists {first['expected']} ({len(differing)} such)",
                       "run the same command again: it fetches those again")  # fmt: skip
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    if destination.exists():
        shutil.rmtree(destination)
    os.rename(partial / folder.path if folder.path else partial, destination)
    shutil.rmtree(partial, ignore_errors=True)
    return Pulled(destination, repository.commit, sorted(names), need, time.monotonic() - began)


def glob_safe(name: str) -> str:
    """A pattern that is `name` and nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _bar(tell: Callable[[int], None]):
    """A tqdm that shows nothing and passes on the bytes that come over the network (there is another bar, of bytes written)."""
    from huggingface_hub.utils import tqdm

    class Told(tqdm):
        def __init__(self, *args, **options):
            self._bytes = options.get("unit") == "B" and str(options.get("desc")).startswith("Downloading")
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n=1):
            if self._bytes and n:
                tell(int(n))

    return Told
