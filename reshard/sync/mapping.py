"""Memory that one process maps of another: the sender publishes where its storages are, the taker copies straight out of them.

On the CPU by shared memory, to which a sender's storages move once, in place; on CUDA by IPC handles, which carry the
device's uuid, since processes may number their devices differently.
"""

import hashlib
import os
import resource
import socket
from collections.abc import Iterable
from pathlib import Path

import torch

from reshard.errors import SyncError
from reshard.geometry.block import row_major
from reshard.planner.copies import Copy
from reshard.sync.device import Devices
from reshard.sync.tensors import Tensors, lying

#: file descriptors that a process keeps for itself when its storages move to shared memory, one for each
SPARE_FILES = 64


def node() -> int:
    """A number that processes share when one can map the other's memory: same host, same boot, same pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        names = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        boot, names = "", os.getpid()
    return int.from_bytes(hashlib.sha256(f"{socket.gethostname()} {boot} {names}".encode()).digest()[:7], "big")


def place(found: Iterable[torch.device], transport: str, devices: Devices) -> int:
    """Equal for tensors of two processes that may map each other's: of one node, and under ``auto`` in CPU memory or on one
    and the same accelerator. Below zero: none may."""
    kinds = set(found)
    fast = {device for device in kinds if devices.accelerated(device)}
    if not kinds or (fast and fast != kinds):
        return -1
    if not fast or transport == "mapped":
        return node()
    if len(fast) > 1:
        return -1
    return node() ^ int.from_bytes(hashlib.sha256(devices.identity(fast.pop()).encode()).digest()[:7], "big")


def storages(tensors: Tensors) -> dict[int, torch.UntypedStorage]:
    """By address, the storages that these tensors lie in."""
    return {b.tensor.untyped_storage().data_ptr(): b.tensor.untyped_storage() for b in tensors.values() if b.stored.size}


def can_share(tensors: Tensors) -> bool:
    """Whether storages of their kinds can be mapped by others at all."""
    kinds = {s.device.type for s in storages(tensors).values()}
    return len(kinds) <= 1 and kinds <= {"cpu", "cuda"}


def needs(tensors: Tensors) -> int:
    """Bytes of shared memory that these tensors take when they are published."""
    return sum(s.nbytes() for s in storages(tensors).values() if s.device.type == "cpu" and not s.is_shared())


def room() -> int:
    """Bytes of shared memory that are free on this node."""
    try:
        found = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def too_many_files(tensors: Tensors) -> str:
    """Why these tensors cannot be published, where that takes more open files than this process may have; or ``""``."""
    new = sum(1 for s in storages(tensors).values() if s.device.type == "cpu" and not s.is_shared())
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        opened = len(os.listdir("/proc/self/fd"))
    except OSError:
        opened = 0
    if not new or limit == resource.RLIM_INFINITY or opened + new + SPARE_FILES <= limit:
        return ""
    return f"{new} tensors in shared memory take a file descriptor each, {opened} are open and the limit (ulimit -n) is {limit}"


def publish(tensors: Tensors, devices: Devices) -> list:
    """Where each tensor lies, for ``Mapped``: plain lists, no pickles. CPU storages move to shared memory, in place."""
    rows, known = [], {}
    handles: list = []
    try:
        for bound in tensors.values():
            if not bound.stored.size:
                continue
            storage = bound.tensor.untyped_storage()
            at = storage.data_ptr()
            if at not in known:
                handles.append(_handle(storage, devices))
                known[at] = known[storage.data_ptr()] = len(handles) - 1
            rows.append([bound.stored.rank, bound.stored.name, known[at], bound.tensor.storage_offset(), list(bound.tensor.stride())])
    except Exception:
        give_back(handles)  # nobody will hear of them
        raise
    return [handles, rows]


def _handle(storage: torch.UntypedStorage, devices: Devices) -> list:
    if storage.device.type == "cpu":
        fd, size = storage._share_fd_cpu_()
        return ["cpu", os.getpid(), fd, size]
    identity = devices.identity(storage.device)  # before the handle, which has to be given back once it is made
    return ["cuda", identity, *(x.hex() if isinstance(x, bytes) else x for x in storage._share_cuda_())]


class Mapped:
    """A peer's tensors, mapped into this process. Reads what the peer last wrote there."""

    def __init__(self, published: list, dtypes: dict, devices: Devices):
        handles, rows = published
        self._storages: list[torch.UntypedStorage] = []
        try:
            for handle in handles:
                self._storages.append(open_storage(handle, devices))
        except Exception:
            give_back(handles[len(self._storages) :])
            raise
        self._dtypes = dtypes
        self._at = {(rank, name): (number, offset, tuple(strides)) for rank, name, number, offset, strides in rows}

    def view(self, copy: Copy) -> torch.Tensor:
        """The elements of `copy` at its source, in the peer's memory."""
        number, start, own = self._at[copy.src.rank, copy.src.name]
        storage, move = self._storages[number], copy.move
        flat = torch.empty(0, dtype=self._dtypes[copy.src.dtype], device=storage.device).set_(storage)
        if own == row_major(copy.src.shape):
            return torch.as_strided(flat, move.shape, move.src_strides, start + move.src_offset)
        return torch.as_strided(flat, *lying(copy.src, own, move.shape, move.src_offset, move.src_strides, start))


def open_storage(handle: list, devices: Devices) -> torch.UntypedStorage:
    """The storage behind one handle of ``publish``. Raises SyncError where this process cannot reach it."""
    kind, *rest = handle
    if kind == "cuda":
        identity, _, *shared = rest  # the number that the device has at the sender means nothing here
        index = devices.index(identity)
        if index is None:
            raise SyncError(f"GPU {identity} is not visible to this process", 'use transport="p2p", or show it in CUDA_VISIBLE_DEVICES')
        return _open_cuda(index, *[bytes.fromhex(x) if isinstance(x, str) else x for x in shared])
    pid, fd, size = rest
    try:
        return torch.UntypedStorage.from_file(f"/proc/{pid}/fd/{fd}", shared=True, nbytes=size)
    except RuntimeError as error:
        raise SyncError(f"cannot map the memory of process {pid}: {str(error).splitlines()[0]}", 'use transport="p2p"') from None


def give_back(handles: list) -> None:
    """Tell the sender that nobody holds these: torch keeps what it has published until each handle was opened and let go."""
    for kind, *rest in handles:
        if kind == "cuda":
            _, _, _, _, _, counter, at, *_ = rest
            _release_cuda(bytes.fromhex(counter), at)


def _release_cuda(counter: bytes, at: int) -> None:
    torch.UntypedStorage._release_ipc_counter(counter, at, device="cuda")


def _open_cuda(*handle) -> torch.UntypedStorage:
    return torch.UntypedStorage._new_shared_cuda(*handle)
