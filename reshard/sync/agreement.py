"""What each rank tells all others at an agreement, as a row of numbers, and what follows from the table of all rows. Pure.

A row begins with whether the rank refuses or failed, and ends with the words for it.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

import torch

from reshard.errors import PeerLost, ReshardError, SyncError

if TYPE_CHECKING:
    from reshard.sync.transport import Wire

_TEXT = 480  # bytes of a refusal that all ranks get to read
#: how ranks take: all tensors at once, or windows of them
MODES = ("tensors", "windows")
TRANSPORTS = ("auto", "p2p", "mapped")
_LARGEST = 1 << 62


@dataclass
class Intent:
    """What a rank is about to do. Places are those of ``mapping.place``, below zero where nothing can be mapped."""

    fingerprint: int = 0
    version: int = 0
    held: int = -1  # version that it holds; -1: none
    transport: int = 0  # number of TRANSPORTS
    verify: int = 0
    mode: int = 0  # 0: takes nothing, else 1 + the number of MODES
    streams: int = 0  # whether it gives its tensors one after another
    source_place: int = -1
    into_place: int = -1
    fresh: int = 0  # its tensors, plan or mapping are new: others may have to map its memory, or it theirs
    lies: int = 0  # where its tensors are: 0 nowhere, 1 where the host is, 2 on one accelerator, 3 on several devices

    @classmethod
    def column(cls, table: torch.Tensor, name: str) -> list[int]:
        return table[:, 1 + [f.name for f in fields(cls)].index(name)].tolist()


class Trial:
    """What a rank tries before all ranks go on: ``with trial:`` keeps the first error, for ``told`` to tell. A lost peer is raised at
    once, since nobody can be told then."""

    def __init__(self, error: BaseException | None = None):
        self.error = error

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if isinstance(error, PeerLost) or (error is not None and not isinstance(error, Exception)):
            return False
        self.error = self.error or error
        return error is not None

    def run(self, *calls: Callable[[], object]) -> None:
        """Call one after another, as long as nothing has failed."""
        for call in calls:
            if self.error is None:
                with self:
                    call()

    def told(self, wire: "Wire", doing: str, numbers: "Intent | list[int]" = ()) -> torch.Tensor:
        """All ranks' rows: every rank comes here, also one that failed."""
        return wire.gather(row(words(self.error) if self.error else "", numbers), doing)

    def settle(self) -> None:
        """Raise what failed."""
        if self.error is not None:
            raise self.error


def row(failure: str, numbers: "Intent | list[int]" = ()) -> torch.Tensor:
    text = failure.encode()[:_TEXT].ljust(_TEXT, b"\0")
    values = [int(bool(failure)), *(astuple(numbers) if isinstance(numbers, Intent) else numbers)]
    return torch.cat([torch.tensor(values, dtype=torch.int64), torch.frombuffer(bytearray(text), dtype=torch.int64)])


def failures(table: torch.Tensor) -> list[str]:
    """What any rank refused or failed at, with the rank."""
    return [f"rank {r}: {_text(own)}" for r, own in enumerate(table) if own[0]]


def words(error: BaseException) -> str:
    """An error as all ranks get to read it."""
    if isinstance(error, GeneratorExit):
        return "it stopped before the last window"
    if isinstance(error, ReshardError):
        return str(error) + (f"; {error.hint}" if error.hint else "")
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def number(version: object) -> int:
    """`version` as ranks can compare it. Raises SyncError for what is no version."""
    if isinstance(version, bool) or not hasattr(version, "__index__"):
        raise SyncError(f"version {version!r} is no whole number", "pass the step's number")
    found = version.__index__()
    if not 0 <= found < _LARGEST:
        raise SyncError(f"version {found} is not between 0 and 2^62", "pass the step's number")
    return found


def refuse(reasons: list[str], own: BaseException | None = None) -> None:
    """Raise what ranks refuse, if any does; `own` is this rank's error."""
    if reasons:
        raise SyncError("the sync was refused before its first byte: " + "; ".join(reasons)) from own


def check(table: torch.Tensor) -> None:
    """Raise what any rank refused, or any two ranks disagree on."""
    refuse(failures(table))
    fingerprints, versions, held, modes = (Intent.column(table, name) for name in ("fingerprint", "version", "held", "mode"))
    if len(set(fingerprints)) > 1:
        groups = {f: [r for r, other in enumerate(fingerprints) if other == f] for f in dict.fromkeys(fingerprints)}
        text = ", ".join(f"{f:015x} on ranks {ranks}" for f, ranks in groups.items())
        raise SyncError(
            f"ranks made different plans: {text}", "make the plan from the same layout, meshes, dtypes and bucket_bytes everywhere"
        )
    for name, said in (("transport", TRANSPORTS), ("verify", (False, True))):
        own = Intent.column(table, name)
        if len(set(own)) > 1:
            text = ", ".join(f"{said[n]} on ranks {[r for r, other in enumerate(own) if other == n]}" for n in dict.fromkeys(own))
            raise SyncError(f"ranks have different settings of {name}: {text}", "make every Sync of a group with the same")
    if len(set(versions)) > 1:
        at = ", ".join(f"rank {r} at {v}" for r, v in enumerate(versions))
        raise SyncError(f"ranks are at different versions: {at}", "call send and recv with the step's number")
    if max(held) >= versions[0]:
        raise SyncError(f"version {versions[0]} is stale: rank {held.index(max(held))} already holds {max(held)}", "versions must grow")
    if not any(modes):
        raise SyncError("no rank takes anything")


def layout_of(table: torch.Tensor) -> str:
    """How messages are laid out in the step that ranks have agreed on: all at once, or in windows of the destinations' tensors, or of
    the source's where these come one after another."""
    if any(Intent.column(table, "streams")):
        return "stream"
    return "windows" if 2 in Intent.column(table, "mode") else "tensors"


def _text(own: torch.Tensor) -> str:
    return bytes(own[-_TEXT // 8 :].contiguous().view(torch.uint8).tolist()).rstrip(b"\0").decode(errors="replace")
