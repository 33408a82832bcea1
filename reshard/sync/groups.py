"""One process group of processes that have default groups of their own."""

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def joined(address: str, rank: int, size: int, *, backend: str = "nccl", timeout: float = 60.0, name: str = "reshard") -> dist.ProcessGroup:
    """One group of processes of several worlds (a trainer's and its engines'), each with a default group of its own or none.

    `address` (``tcp://host:port``) is rank 0's; every process calls this with its own `rank` of `size`. Called again with the
    same `address` it makes another group. Leave it by ``torch.distributed.destroy_process_group(group)``. `timeout` in seconds.
    """
    until = time.monotonic() + timeout
    while True:
        try:
            store, own = _met(address, rank, size, name, until - time.monotonic())
            break
        except (dist.DistNetworkError, dist.DistStoreError):  # the store of a group that another rank was about to leave
            if time.monotonic() > until:
                raise
    store.set_timeout(timedelta(seconds=timeout))
    with _own_communicator():
        group, _ = c10d._new_process_group_helper(  # what torch has no public call for; frameworks carry copies of this
            size,
            rank,
            [],
            backend=backend,
            store=store,  # which torch prefixes with the name
            group_name=own,
            timeout=timedelta(seconds=timeout),
        )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(size)}
    return group


def _met(address: str, rank: int, size: int, name: str, timeout: float) -> tuple[dist.Store, str]:
    """The store at `address`, and a name for the group that none of these processes has given a group before."""
    store, _, _ = next(dist.rendezvous(address, rank, size, timeout=timedelta(seconds=timeout)))
    store.set_timeout(timedelta(seconds=timeout))
    turn = store.add(f"{name}/joined/{rank}", 1)  # the same for all: which of the groups that meet at this address
    if rank == 0:
        store.set(f"{name}/own/{turn}", uuid.uuid4().hex)
    return store, f"{name}/{store.get(f'{name}/own/{turn}').decode()}"


@contextmanager
def _own_communicator() -> Iterator[None]:
    """Keep torch from splitting the new group's communicator off that of the default group, as it does where that is bound to a
    device: processes of other worlds have no part in it, and both sides would wait for each other."""
    default = dist.group.WORLD if dist.is_initialized() else None
    bound = default.bound_device_id if default is not None else None
    if bound is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound
