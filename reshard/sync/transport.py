"""Moving bytes between processes by torch.distributed: point to point, in rounds, with a time-out.

gloo posts each message by itself, NCCL a round as one group. With gloo the agreements are messages too: a collective would
leave gloo's threads waiting in it when a peer falls silent, and leaving the group would wait for them, half an hour by default.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from reshard.errors import PeerLost, SyncError
from reshard.sync.agreement import Trial
from reshard.sync.device import Devices
from reshard.sync.staging import FLIGHTS, Parcel, Round, Staging

#: gloo's tags for what is no weight: those of weights count from 0 for each pair of ranks
_AGREE, _SUMS, _NEVER = 1 << 30, (1 << 30) + 1, (1 << 30) + 2
_AGAIN = "close() this one, leave the process group, and send all weights again over a new one"


class Wire:
    """A process group, with a time-out. Ranks are those of the group.

    `device` is where weights are sent from and received into: an accelerator by NCCL, the host by gloo. A group that has
    both backends uses NCCL where all tensors lie on accelerators (``choose``), and gloo for all that is no weight.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, devices: Devices | None = None):
        if group is None and not dist.is_initialized():
            raise SyncError("there is no process group", "call torch.distributed.init_process_group first, or pass group=")
        self.group = group if group is not None else dist.group.WORLD
        self.timeout, self.devices = timeout, devices or Devices()
        self.rank, self.size = self.group.rank(), self.group.size()  # also right for a group that joins two worlds
        self.backends = backends(self.group)
        self.host = self.backends.get("cpu") == "gloo"  # agreements go by the host
        self.direct = self.backends.get("cuda", "gloo") != "gloo"  # NCCL: from device to device
        self.control = torch.device("cpu") if self.host else self.devices.current()
        self._met = not self.host  # whether the communicator of all ranks is there: the first agreement by NCCL makes it
        self.choose(False)
        self.bytes_sent = self.bytes_taken = 0  # counted here, message by message, for the tests' sake

    def choose(self, accelerated: bool, device: torch.device | None = None) -> None:
        """Send weights from accelerators, `device` at this rank, if the group can; `accelerated`: all ranks' tensors lie there."""
        self.gloo = self.host and not (accelerated and self.direct)
        self.device = torch.device("cpu") if self.gloo else device or (self.devices.current() if self.host else self.control)
        if not self.gloo and not self._met:
            self._meet()

    def _meet(self) -> None:
        """All ranks make NCCL's communicator of the group: a round of messages, which also would, may be between a few of them."""
        try:
            work = dist.all_reduce(torch.zeros(1, device=self.device), group=self.group, async_op=True)
            self._until(work.is_completed, "meeting")
            work.wait()
        except PeerLost:
            raise
        except RuntimeError as error:
            raise self.lost("meeting", error) from None
        self._met = True

    # ------------------------------------------------------------------------------------------------------- waiting

    def lost(self, doing: str, error: object = "") -> PeerLost:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        return PeerLost(
            f"{doing}: a peer is gone, or silent for {self.timeout:g} s{f' ({reason})' if reason else ''}{self._told()}", _AGAIN
        )

    def wait(self, work, doing: str) -> None:
        """Wait for one operation. Raises PeerLost when its peer is gone or the time-out passes."""
        try:
            if self.gloo:
                if work.wait(timedelta(seconds=self.timeout)) is False:
                    raise RuntimeError("it did not complete")
                return
            # NCCL's wait with a time-out aborts the communicator when it passes, and its watchdog may end the process
            self._until(work.is_completed, doing)
            work.wait()  # the current stream waits; raises what went wrong
        except PeerLost:
            raise
        except RuntimeError as error:
            raise self.lost(doing, error) from None

    def drain(self, doing: str) -> None:
        """Wait until the device has done all that was queued; CUDA's waits return at once, and NCCL knows no time-out here."""
        if self.devices.accelerated(self.device):
            self._until(self.devices.event(self.device).query, doing)

    def _until(self, done: Callable[[], bool], doing: str) -> None:
        until = time.monotonic() + self.timeout
        pause = 0.00002
        while not done():
            if time.monotonic() > until:
                raise self.lost(doing)
            time.sleep(pause)
            pause = min(pause * 2, 0.0005)

    # ------------------------------------------------------------------------------------------------------ agreements

    def gather(self, row: torch.Tensor, doing: str) -> torch.Tensor:
        """Every rank's `row` (int64, equally long), stacked; on the CPU."""
        if self.host:
            return self._gather_by_messages(row, doing)
        row = row.to(self.control)
        rows = torch.empty((self.size, *row.shape), dtype=row.dtype, device=self.control)
        try:
            work = dist.all_gather_into_tensor(rows, row, group=self.group, async_op=True)
            self._until(work.is_completed, doing)
            work.wait()
        except PeerLost:
            raise
        except RuntimeError as error:
            raise self.lost(doing, error) from None
        return rows.cpu()

    def _gather_by_messages(self, row: torch.Tensor, doing: str) -> torch.Tensor:
        """To rank 0, then down a tree: rank r passes the table on to r + 1, r + 2, r + 4 … as far as those are its to serve."""
        rows = torch.empty((self.size, *row.shape), dtype=row.dtype)
        rows[self.rank] = row
        if not row.numel():
            return rows
        try:
            if self.rank == 0:
                works = [self.group.recv([rows[r]], r, _AGREE) for r in range(1, self.size)]
            else:
                works = [self.group.send([rows[self.rank].clone()], 0, _AGREE)]
            self._all(works, doing)
            low = self.rank & -self.rank if self.rank else 1 << self.size.bit_length()
            if self.rank:
                self._all([self.group.recv([rows], self.rank - low, _AGREE)], doing)
            steps = [low >> n for n in range(1, low.bit_length())]
            self._all([self.group.send([rows], self.rank + step, _AGREE) for step in steps if self.rank + step < self.size], doing)
        except PeerLost:
            raise
        except RuntimeError as error:
            raise self.lost(doing, error) from None
        return rows

    def _all(self, works: list, doing: str) -> None:
        for work in works:
            if work.wait(timedelta(seconds=self.timeout)) is False:
                raise self.lost(doing, "it did not complete")

    def gather_bytes(self, data: bytes, doing: str) -> list[bytes]:
        """Every rank's `data`, of any length."""
        lengths = self.gather(torch.tensor([len(data)]), doing)[:, 0].tolist()
        width = -(-max(lengths) // 8) * 8
        row = torch.frombuffer(bytearray(data.ljust(width, b"\0")), dtype=torch.int64) if width else torch.empty(0, dtype=torch.int64)
        rows = self.gather(row, doing) if width else [row] * self.size
        return [bytes(r.contiguous().view(torch.uint8).tolist())[:n] if n else b"" for r, n in zip(rows, lengths)]

    def exchange(self, sends: list[tuple[int, torch.Tensor]], takes: list[tuple[int, torch.Tensor]], doing: str) -> None:
        """Small messages to and from several peers, at most one each way for a pair: posted together, since NCCL makes a
        communicator for each pair and waits in it for the other end."""
        if self.host:
            try:
                works = [self.group.recv([tensor], peer, _SUMS) for peer, tensor in takes]
                works += [self.group.send([tensor], peer, _SUMS) for peer, tensor in sends]
                self._all(works, doing)
            except PeerLost:
                raise
            except RuntimeError as error:
                raise self.lost(doing, error) from None
            return
        ops = [dist.P2POp(dist.irecv, tensor, self._global(peer), self.group) for peer, tensor in takes]
        ops += [dist.P2POp(dist.isend, tensor, self._global(peer), self.group) for peer, tensor in sends]
        for work in self._batch(ops, doing):
            self.wait(work, doing)
        if self.devices.accelerated(self.control):
            self._until(self.devices.event(self.control).query, doing)

    # --------------------------------------------------------------------------------------------------------- weights

    def run(self, staging: Staging) -> None:
        """All rounds of `staging`: round r is packed while round r - 1 travels, and r - 1 unpacked while r travels. With gloo,
        what needs no buffer here is awaited last; NCCL wants each round as one group, posted alike at both ends.

        An error of packing or unpacking is raised when all messages have gone: peers wait for no one, and the group is left
        as it was.
        """
        trial = Trial()
        with self.devices.side_streams(staging.devices):
            straight = self._post([p for here in staging.rounds for p in here.takes if p.straight], []) if self.gloo else []
            flying: list[tuple[Round, list]] = []
            for here in staging.rounds:
                trial.run(here.pack.run, here.leave.run)
                if staging.crosses or (self.gloo and len(staging.devices) > 1):
                    self.devices.settle(staging.devices)  # the host sends what the device has packed
                if self.gloo:
                    takes, sends = [p for p in here.takes if not p.straight], [p for p in here.sends if not p.straight]
                    flying.append((here, self._post(takes, sends)))
                    straight += self._post([], [p for p in here.sends if p.straight])
                else:
                    flying.append((here, self._post(here.takes, here.sends)))
                if len(flying) == FLIGHTS:
                    self._land(staging, trial, *flying.pop(0))
            for here, works in flying:
                self._land(staging, trial, here, works)
            for work, peer in straight:
                self.wait(work, f"exchanging weights with rank {peer}")
            self.drain("sending")
        trial.settle()

    def _post(self, takes: list[Parcel], sends: list[Parcel]) -> list:
        self.bytes_sent += sum(p.bytes.numel() for p in sends)
        self.bytes_taken += sum(p.bytes.numel() for p in takes)
        if self.gloo:
            try:
                out = [(self.group.recv([p.bytes], p.peer, p.tag), p.peer) for p in takes]
                return out + [(self.group.send([p.bytes], p.peer, p.tag), p.peer) for p in sends]
            except RuntimeError as error:
                raise self.lost("sending", error) from None
        ops = [dist.P2POp(dist.irecv, p.bytes, self._global(p.peer), self.group) for p in takes]
        ops += [dist.P2POp(dist.isend, p.bytes, self._global(p.peer), self.group) for p in sends]
        return [(work, None) for work in self._batch(ops, "sending")]

    def _batch(self, ops: list, doing: str) -> list:
        try:
            return dist.batch_isend_irecv(ops) if ops else []
        except RuntimeError as error:
            raise self.lost(doing, error) from None

    def _land(self, staging: Staging, trial: Trial, here: Round, works: list) -> None:
        for work, peer in works:
            self.wait(work, "exchanging weights" if peer is None else f"exchanging weights with rank {peer}")
        trial.run(here.arrive.run, here.unpack.run)
        if staging.crosses:
            self.devices.settle(staging.devices)  # the next message comes into the same buffer

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)

    # ----------------------------------------------------------------------------------------------------- giving up

    def abort(self, why: str) -> None:
        """Let peers that wait know at once that this rank takes part no more: they raise PeerLost, with `why` where it reaches them."""
        text = f"rank {self.rank}: {why}"[:500]
        _beside(lambda: c10d._world.pg_map[self.group][1].compare_set("reshard/sync/stopped", "", text))  # the first one's stays
        if self.host and self.size > 1:
            with suppress(RuntimeError):  # a wait that runs out closes gloo's connections, at both ends
                self.group.recv([torch.empty(1, dtype=torch.uint8)], (self.rank + 1) % self.size, _NEVER).wait(timedelta(milliseconds=1))
        if self.direct:
            with suppress(RuntimeError):
                self.group._get_backend(torch.device("cuda")).abort()

    def _told(self) -> str:
        """What a rank that gave up left in the group's store."""
        found: list[str] = []

        def look() -> None:
            store = c10d._world.pg_map[self.group][1]
            if store.check(["reshard/sync/stopped"]):
                found.append(store.get("reshard/sync/stopped").decode(errors="replace"))

        _beside(look)
        return f"; {found[0]}" if found else ""


def _beside(call: Callable[[], None], seconds: float = 1.0) -> None:
    """Do what may block, since the process that keeps the store may be gone, and wait for it no longer than `seconds`."""

    def quietly() -> None:
        with suppress(Exception):
            call()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)


def backends(group: dist.ProcessGroup) -> dict[str, str]:
    """The backend that serves each type of device. `dist.get_backend` cannot say: ``undefined``, or ``cpu:gloo,cuda:nccl``."""
    found = {}
    for device in ("cpu", "cuda"):
        try:
            found[device] = group._get_backend(torch.device(device)).name()
        except RuntimeError:
            continue
    return found
