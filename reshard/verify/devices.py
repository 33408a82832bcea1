"""Which device each rank computes on, agreed by all of them: the backend between them, and whether everything fits.

Ranks see devices under numbers of their own (``CUDA_VISIBLE_DEVICES`` of Ray and SLURM often leaves each exactly one, number 0), so
devices are told apart by uuid. NCCL wants a device for every rank, anywhere; one pair that shares makes all of them use gloo.
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from reshard.errors import FormatError, ReshardError
from reshard.text import human
from reshard.verify.exact import refuse_override
from reshard.verify.group import agreed

#: bytes of a process on its device beside torch's tensors and the context that is there already: libraries' workspaces, NCCL's buffers
OVERHEAD = 768 << 20


@dataclass(frozen=True)
class Device:
    """Rank `rank`'s device: `name` is its own in the world; `free` and `total` bytes (0 of a CPU). `problem` is why it can't be used."""

    rank: int
    kind: str
    name: str
    free: int = 0
    total: int = 0
    nccl: bool = False
    problem: str = ""
    hint: str = ""


def choose(kind: str, local: int) -> torch.device:
    """The device of the `local`-th rank of a machine; of GPUs, made the current one."""
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise FormatError("--device cuda, but torch sees no GPU here", "use --device cpu")
    device = torch.device("cuda", local % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def describe(kind: str, rank: int, local: int) -> Device:
    """This rank's device as the others must know it; never raises what one rank alone would see."""
    host = socket.gethostname()
    try:
        refuse_override(kind)
        device = choose(kind, local)
    except ReshardError as error:
        return Device(rank, kind, host, problem=f"rank {rank} on {host}: {error.args[0]}", hint=error.hint or "")
    except RuntimeError as error:
        return Device(rank, kind, host, problem=f"rank {rank} on {host} cannot use its GPU: {str(error).splitlines()[0]}")
    if device.type == "cpu":
        return Device(rank, kind, f"{host}/cpu")
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    free, total = torch.cuda.mem_get_info(device)
    return Device(rank, kind, str(uuid) if uuid else _numbered(host, device), free, total, torch.distributed.is_nccl_available())


def _numbered(host: str, device: torch.device) -> str:
    """A name for a device of which torch tells no uuid: the number that it has on its machine."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return f"{host}/{visible[device.index] if device.index < len(visible) else device.index}"


def agree(store, own: Device, world: int) -> list[Device]:
    """Every rank's device, through the rendezvous' store. Raises the same FormatError on all where one can't be used."""
    store.set(f"device/{own.rank}", json.dumps(asdict(own)))
    found = [Device(**json.loads(store.get(f"device/{rank}"))) for rank in range(world)]
    if own.kind == "cuda" and not any(device.problem for device in found):
        # every rank has its context by now, so what is free is what is left beside all of them
        own = Device(**{**asdict(own), "free": torch.cuda.mem_get_info()[0]})
        store.set(f"free/{own.rank}", json.dumps(own.free))
        found = [Device(**{**asdict(device), "free": json.loads(store.get(f"free/{device.rank}"))}) for device in found]
    for device in found:
        if device.problem:
            raise agreed(FormatError(device.problem, device.hint or None))
    return found


def backend(devices: list[Device]) -> str:
    """``nccl`` where every rank has a GPU of its own, in the whole world; else ``gloo``."""
    own = len({device.name for device in devices}) == len(devices)
    return "nccl" if own and all(device.kind == "cuda" and device.nccl for device in devices) else "gloo"


def ranks_to_a_device(devices: list[Device]) -> int:
    """The most ranks that share one GPU."""
    return max(Counter(device.name for device in devices if device.kind == "cuda").values(), default=1)


def check_memory(devices: list[Device], shards: Mapping[int, int], original: int, running: int) -> None:
    """Raise FormatError for a GPU that can't hold its work: the original on rank 0's device first, and when that is gone the shards
    of all its ranks (`shards`, bytes by rank); either with `running` bytes of a forward for each process that computes."""
    problems = []
    for name in dict.fromkeys(device.name for device in devices if device.kind == "cuda"):
        own = [device for device in devices if device.name == name]
        free = min(device.free for device in own)
        together = sum(shards[device.rank] + running + OVERHEAD for device in own)
        first = original + running + OVERHEAD * len(own) if own[0].rank == 0 else 0
        for need, what in ((first, "the original"), (together, f"the shards of {len(own)} rank{'s' * (len(own) > 1)}")):
            if need > free:
                problems.append(f"GPU {name} has {human(free)} free, {what} need {human(need)} with what a forward takes")
    if problems:
        raise FormatError(
            "; ".join(problems), "compute in --dtype bf16, stream the original with --low-memory, give more GPUs, or use --device cpu"
        )


def forward_bytes(ids: tuple[int, int], vocab: int, hidden: int, widest: int, heads: int, size: int) -> int:
    """An upper bound of what a forward of `ids` (sequences, positions) holds beside weights, in elements of `size` bytes."""
    sequences, positions = ids
    tokens = max(sequences * positions, 4096)  # rows of the embedding are looked up 4096 at a time
    scores = sequences * heads * positions * positions * (2 * size + 4)
    return sequences * positions * vocab * (size + 4) * 2 + tokens * (16 * hidden + 6 * widest) * size + scores
