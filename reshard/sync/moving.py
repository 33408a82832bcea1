"""One part of a plan, bound to tensors: made ready, and its sums compared when it has moved."""

from dataclasses import dataclass

import torch

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import SyncError
from reshard.sync.agreement import Trial
from reshard.sync.checks import Sums, differing, replicated, sent_and_taken
from reshard.sync.device import Devices
from reshard.sync.messages import RankPlan
from reshard.sync.plan import SyncPlan
from reshard.sync.sharing import Sharing
from reshard.sync.staging import Buffers, Copies, Staging, source_view, straight
from reshard.sync.tensors import Tensors
from reshard.sync.transport import Wire


@dataclass(frozen=True)
class Stats:
    """What one step moved at this rank, in bytes: `sent` and `taken` in messages, `mapped` out of peers' memory, `local`
    within the process. `staging` is what its buffers take, `held` what was here of a streamed source at most, `checks` the bytes of sums that ``verify`` exchanged. `note` says why
    messages were sent where memory should have been mapped, or is empty."""

    version: int
    sent: int
    taken: int
    mapped: int
    local: int
    staging: int
    held: int
    checks: int
    seconds: float
    note: str = ""

    @property
    def received(self) -> int:
        return self.taken + self.mapped


@dataclass
class Ready:
    """One part of the plan, bound to tensors: its messages, copies out of peers' memory, copies within the process, sums; and
    the bytes of the middle two (a cast out of peers' memory reads the wider source)."""

    staging: Staging
    mapped: Copies
    own: Copies
    sums: tuple[Sums, Sums, Sums] | None  # sent, taken, held by replicas
    bytes_mapped: int
    bytes_local: int

    def move(self, wire: Wire) -> None:
        """Move one part's bytes. An error is raised when this rank has sent all that others wait for."""
        trial = Trial()
        trial.run(self.mapped.run, self.own.run)
        with trial:
            wire.run(self.staging)
        trial.settle()

    def run(self, wire: Wire, devices: Devices) -> None:
        """Move one part's bytes, and compare them."""
        trial = Trial()
        with trial:
            self.move(wire)
        if self.sums:
            compare(self.sums, wire, devices, self, trial.error is not None)
        trial.settle()


def make(
    part: RankPlan,
    source: Tensors,
    into: Tensors,
    wire: Wire,
    sharing: Sharing,
    devices: Devices,
    verify: SyncPlan | None,
    first: bool,
    buffers: Buffers | None = None,
) -> Ready:
    """`verify`: the plan, where sums are to be compared; `first`: of a plan's parts, the one with which replicas compare theirs,
    unless they give them window by window. `buffers` of a part that has moved are used again."""
    staging = Staging(part, source, into, wire.device, sharing.peers, devices, buffers)
    mapped, size = Copies(), 0
    for (sender, taker), copies in part.pairs.items():
        if taker == part.process and sender in sharing.peers.out_of:
            mapped.extend(straight(copies, sharing.memory[sender].view, into))
            size += sum(t.copy.move.size * DTYPE_SIZE[t.copy.src.dtype] for t in copies)
    sums = None
    if verify is not None:
        sent, taken = sent_and_taken(part)
        replicas = replicated(verify, part) if source and (first or part.gives) else {}
        sums = Sums(sent, source), Sums(taken, into), Sums(replicas, source)
    own = straight(part.local, lambda copy: source_view(copy, source), into)
    return Ready(staging, mapped, own, sums, size, sum(t.bytes for t in part.local))


def compare(sums: tuple[Sums, Sums, Sums], wire: Wire, devices: Devices, ready: Ready, failed: bool) -> None:
    """Exchange the sums of every tensor. Raises SyncError naming what differs. A rank that has `failed` before, or fails at this,
    sends sums of nothing, since others wait for them, and compares nothing."""
    trial = Trial()
    values = [{pair: torch.zeros(len(own), dtype=torch.int64) for pair, own in kind.labels.items()} for kind in sums]
    with trial:
        devices.synchronize(ready.staging.devices)
        values = values if failed else [kind.run() for kind in sums]
    (sent, taken, held), me, doing = values, wire.rank, "comparing sums"

    def blank(own: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(own), dtype=torch.int64, device=wire.control)

    arrived = {sender: blank(own) for (sender, _), own in taken.items()}
    wire.exchange([(taker, own.to(wire.control)) for (_, taker), own in sent.items()], list(arrived.items()), doing)
    copies = {other: blank(own) for (other, first), own in held.items() if first == me}
    wire.exchange([(first, own.to(wire.control)) for (other, first), own in held.items() if other == me], list(copies.items()), doing)
    trial.settle()
    if failed:
        return
    unlike = [
        f"{label} on rank {other}"
        for other, own in copies.items()
        for label in differing(sums[2].labels[other, me], held[other, me], own.cpu())
    ]
    if unlike:
        raise SyncError(f"replicas of the trainer hold other weights than rank {me}: {_listed(unlike)}")
    wrong = [
        f"{label} from rank {sender}"
        for sender, own in arrived.items()
        for label in differing(sums[1].labels[sender, me], taken[sender, me], own.cpu())
    ]
    if wrong:
        raise SyncError(f"{len(wrong)} tensors arrived with other values than were sent: {_listed(wrong)}")


def _listed(found: list[str]) -> str:
    return ", ".join(found[:8]) + (" …" if len(found) > 8 else "")
