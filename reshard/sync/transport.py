"""Moving bytes between processes: torch.distributed point to point, and memory that one process maps of another.

Point to point goes in rounds; gloo posts each message by itself, NCCL a round as one group. Mapped memory needs no
messages at all: the sender publishes where its storages are, the taker copies straight out of them.
"""

import hashlib
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from reshard.block import row_major
from reshard.errors import PeerLost, SyncError
from reshard.sync.messages import Copy
from reshard.sync.staging import FLIGHTS, Parcel, Staging
from reshard.sync.tensors import Bound, lying


class Wire:
    """A process group, with a time-out. Ranks are those of the group."""

    def __init__(self, group: dist.ProcessGroup | None, timeout: float):
        self.group = group if group is not None else dist.group.WORLD
        self.timeout = timeout
        self.rank, self.size = self.group.rank(), self.group.size()  # also right for a group that joins two worlds
        self.gloo = dist.get_backend(self.group) == "gloo"
        self.device = torch.device("cpu") if self.gloo else torch.device("cuda", torch.cuda.current_device())
        self.bytes_sent = self.bytes_taken = 0  # counted here, message by message, for the tests' sake

    def wait(self, work, doing: str) -> None:
        """Wait for one operation. Raises PeerLost when its peer is gone or the time-out passes."""
        try:
            if work.wait(timedelta(seconds=self.timeout)) is False:
                raise RuntimeError("it did not complete")
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise PeerLost(f"{doing}: a peer is gone, or silent for {self.timeout:g} s ({reason})", "start a new process group, and send all weights again") from None

    def drain(self, doing: str) -> None:
        """Wait until the device has done all that was queued; CUDA's waits return at once, and NCCL knows no time-out here."""
        if self.gloo:
            return
        done, until = torch.cuda.Event(), time.monotonic() + self.timeout
        done.record()
        while not done.query():
            if time.monotonic() > until:
                raise PeerLost(f"{doing}: a peer is gone, or silent for {self.timeout:g} s", "start a new process group, and send all weights again")
            time.sleep(0.0005)

    def gather(self, row: torch.Tensor, doing: str) -> torch.Tensor:
        """Every rank's `row` (int64, equally long), stacked; on the CPU."""
        row = row.to(self.device)
        rows = torch.empty((self.size, *row.shape), dtype=row.dtype, device=self.device)
        try:
            if self.gloo:  # by way of rank 0: a ring, as gloo's all_gather is, takes as many hops as there are ranks
                parts = list(rows.unbind()) if self.rank == 0 else None
                self.wait(dist.gather(row, parts, dst=self._global(0), group=self.group, async_op=True), doing)
                work = dist.broadcast(rows, self._global(0), group=self.group, async_op=True)
            else:
                work = dist.all_gather_into_tensor(rows, row, group=self.group, async_op=True)
        except PeerLost:
            raise
        except RuntimeError as error:
            raise PeerLost(f"{doing}: a peer is gone ({str(error).splitlines()[0][:200]})") from None
        self.wait(work, doing)
        self.drain(doing)
        return rows.cpu()

    def gather_bytes(self, data: bytes, doing: str) -> list[bytes]:
        """Every rank's `data`, of any length."""
        lengths = self.gather(torch.tensor([len(data)]), doing)[:, 0].tolist()
        width = -(-max(lengths) // 8) * 8
        row = torch.frombuffer(bytearray(data.ljust(width, b"\0")), dtype=torch.int64) if width else torch.empty(0, dtype=torch.int64)
        rows = self.gather(row, doing) if width else [row] * self.size
        return [bytes(r.contiguous().view(torch.uint8).tolist())[:n] if n else b"" for r, n in zip(rows, lengths)]

    def run(self, staging: Staging) -> None:
        """All rounds of `staging`: round r is packed while round r - 1 travels, and r - 1 unpacked while r travels. With gloo,
        what needs no buffer here is awaited last; NCCL wants each round as one group, posted alike at both ends."""
        straight = self._post([p for here in staging.rounds for p in here.takes if p.straight], []) if self.gloo else []
        flying: list[tuple] = []
        for here in staging.rounds:
            here.pack.run()
            if self.gloo:
                flying.append((here, self._post([p for p in here.takes if not p.straight], [p for p in here.sends if not p.straight])))
                straight += self._post([], [p for p in here.sends if p.straight])
            else:
                flying.append((here, self._post(here.takes, here.sends)))
            if len(flying) == FLIGHTS:
                self._land(*flying.pop(0))
        for here, works in flying:
            self._land(here, works)
        for work, peer in straight:
            self.wait(work, f"exchanging weights with rank {peer}")
        self.drain("sending")

    def _post(self, takes: list[Parcel], sends: list[Parcel]) -> list:
        self.bytes_sent += sum(p.bytes.numel() for p in sends)
        self.bytes_taken += sum(p.bytes.numel() for p in takes)
        try:
            if self.gloo:
                out = [(dist.irecv(p.bytes, self._global(p.peer), self.group, tag=p.tag), p.peer) for p in takes]
                return out + [(dist.isend(p.bytes, self._global(p.peer), self.group, tag=p.tag), p.peer) for p in sends]
            ops = [dist.P2POp(dist.irecv, p.bytes, self._global(p.peer), self.group) for p in takes]
            ops += [dist.P2POp(dist.isend, p.bytes, self._global(p.peer), self.group) for p in sends]
            return [(work, None) for work in dist.batch_isend_irecv(ops)] if ops else []
        except RuntimeError as error:
            raise PeerLost(f"sending: a peer is gone ({str(error).splitlines()[0][:200]})") from None

    def _land(self, here, works: list) -> None:
        for work, peer in works:
            self.wait(work, "exchanging weights" if peer is None else f"exchanging weights with rank {peer}")
        here.unpack.run()

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


def joined(address: str, rank: int, size: int, *, backend: str = "nccl", timeout: float = 60.0, name: str = "reshard") -> dist.ProcessGroup:
    """One group of processes of several worlds (a trainer's and its engines'), each with a default group of its own or none.

    `address` (``tcp://host:port``) is rank 0's; every process calls this with its own `rank` of `size`.
    """
    from torch.distributed import distributed_c10d as c10d

    store, rank, size = next(dist.rendezvous(address, rank, size, timeout=timedelta(seconds=timeout)))
    store.set_timeout(timedelta(seconds=timeout))
    group, _ = c10d._new_process_group_helper(  # what torch has no public call for; frameworks carry copies of this
        size, rank, [], backend=backend, store=c10d.PrefixStore(name, store), group_name=name, timeout=timedelta(seconds=timeout))  # fmt: skip
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group


# ------------------------------------------------------------------------------------------------------- mapped memory


def node() -> int:
    """A number that processes share when one can map the other's memory: same host, same boot, same pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        names = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        boot, names = "", os.getpid()
    return int.from_bytes(hashlib.sha256(f"{socket.gethostname()} {boot} {names}".encode()).digest()[:7], "big")


#: storages one process publishes at most: each keeps a file descriptor
MOST_STORAGES = 4096


def can_share(tensors: dict[int, Bound]) -> bool:
    """Whether these tensors' storages can be mapped by others: on the CPU in shared memory, or moved there; or on CUDA."""
    storages = {b.tensor.untyped_storage().data_ptr(): b.tensor.untyped_storage() for b in tensors.values() if b.stored.size}
    kinds = {s.device.type for s in storages.values()}
    if len(storages) > MOST_STORAGES or len(kinds) > 1 or not kinds <= {"cpu", "cuda"}:
        return False
    if kinds == {"cuda"} or not kinds:
        return True
    new = sum(s.nbytes() for s in storages.values() if not s.is_shared())
    try:
        room = os.statvfs("/dev/shm")
    except OSError:
        return False
    return new < room.f_bavail * room.f_frsize * 0.9


def publish(tensors: dict[int, Bound]) -> list:
    """Where each tensor lies, for ``Mapped``: plain lists, no pickles. CPU storages move to shared memory, in place."""
    rows, known = [], {}
    storages: list = []
    for bound in tensors.values():
        if not bound.stored.size:
            continue
        storage = bound.tensor.untyped_storage()
        at = storage.data_ptr()
        if at not in known:
            if storage.device.type == "cpu":
                fd, size = storage._share_fd_cpu_()
                handle = ["cpu", os.getpid(), fd, size]
            else:
                handle = ["cuda", *[x.hex() if isinstance(x, bytes) else x for x in storage._share_cuda_()]]
            known[at] = known[storage.data_ptr()] = len(storages)
            storages.append(handle)
        rows.append([bound.stored.rank, bound.stored.name, known[at], bound.tensor.storage_offset(), list(bound.tensor.stride())])
    return [storages, rows]


class Mapped:
    """A peer's tensors, mapped into this process. Reads what the peer last wrote there."""

    def __init__(self, published: list, dtypes: dict):
        storages, rows = published
        self._storages = [_open(handle) for handle in storages]
        self._dtypes = dtypes
        self._at = {(rank, name): (number, offset, tuple(strides)) for rank, name, number, offset, strides in rows}

    def view(self, copy: Copy) -> torch.Tensor:
        """The elements of `copy` at its source, in the peer's memory."""
        number, start, own = self._at[copy.src.rank, copy.src.name]
        storage = self._storages[number]
        flat = torch.empty(0, dtype=self._dtypes[copy.src.dtype], device=storage.device).set_(storage)
        if own == row_major(copy.src.shape):
            return torch.as_strided(flat, copy.shape, copy.src_strides, start + copy.src_offset)
        return torch.as_strided(flat, *lying(copy.src, own, copy.shape, copy.src_offset, copy.src_strides, start))


def _open(handle: list) -> torch.UntypedStorage:
    kind, *rest = handle
    if kind == "cuda":
        return torch.UntypedStorage._new_shared_cuda(*[bytes.fromhex(x) if isinstance(x, str) else x for x in rest])
    pid, fd, size = rest
    try:
        return torch.UntypedStorage.from_file(f"/proc/{pid}/fd/{fd}", shared=True, nbytes=size)
    except RuntimeError as error:
        raise SyncError(f"cannot map the memory of process {pid}: {str(error).splitlines()[0]}", 'use transport="p2p"') from None
