"""What each rank tells all others at an agreement, as a row of numbers, and what follows from the table of all rows. Pure.

A row begins with whether the rank refuses or failed, and ends with the words for it.
"""

from dataclasses import astuple, dataclass, fields

import torch

from reshard.errors import ReshardError, SyncError

_TEXT = 480  # bytes of a refusal that all ranks get to read
MODES = ("tensors", "buckets")
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
    source_place: int = -1
    into_place: int = -1
    fresh: int = 0  # its tensors, plan or mapping are new: others may have to map its memory, or it theirs
    lies: int = 0  # where its tensors are: 0 nowhere, 1 where the host is, 2 on one accelerator, 3 on several devices

    @classmethod
    def column(cls, table: torch.Tensor, name: str) -> list[int]:
        return table[:, 1 + [f.name for f in fields(cls)].index(name)].tolist()


def row(failure: str, numbers: "Intent | list[int]" = ()) -> torch.Tensor:
    text = failure.encode()[:_TEXT].ljust(_TEXT, b"\0")
    values = [int(bool(failure)), *(astuple(numbers) if isinstance(numbers, Intent) else numbers)]
    return torch.cat([torch.tensor(values, dtype=torch.int64), torch.frombuffer(bytearray(text), dtype=torch.int64)])


def failures(table: torch.Tensor) -> list[str]:
    """What any rank refused or failed at, with the rank."""
    return [f"rank {r}: {_text(own)}" for r, own in enumerate(table) if own[0]]


def words(error: BaseException) -> str:
    """An error as all ranks get to read it."""
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


def check(table: torch.Tensor) -> None:
    """Raise what any rank refused, or any two ranks disagree on."""
    refused = failures(table)
    if refused:
        raise SyncError("the sync was refused before its first byte: " + "; ".join(refused))
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
    if len(set(modes) - {0}) != 1:
        raise SyncError("some ranks take buckets, others tensors" if len(set(modes)) > 1 else "no rank takes anything")


def _text(own: torch.Tensor) -> str:
    return bytes(own[-_TEXT // 8 :].contiguous().view(torch.uint8).tolist()).rstrip(b"\0").decode(errors="replace")
