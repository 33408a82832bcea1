"""What every adapter to a trainer's framework is made of: who holds what as plain JSON, one group of trainers and takers, one Sync.

No framework is imported here. Trainer ranks come first in the group, then the engines', one engine after another.
"""

import socket
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from reshard import sync
from reshard.errors import PlanError
from reshard.layout import Layout
from reshard.sync.tensors import named


@dataclass
class Terms:
    """What both ends are told, as plain JSON.

    `address`: tcp://host:port of trainer rank 0. `config`: the model's config.json, its folder, or its settings. `engine` and
    `trainer` say who holds what: {"format": "megatron", "ranks": 8, "tp": 4, "pp": 2, "dtype": "fp32"}; {"format": "fsdp", "ranks": 8,
    "dp": 4, "tp": 2} (``sync.fsdp``); {"format": "hf", "ranks": 8} where every rank gathers whole tensors; or what ``Side.to_json`` wrote. Engines that are cut
    differently are a list. `timeout` in seconds.
    """

    address: str
    config: str | dict[str, Any]
    engine: dict[str, Any] | str | list[dict[str, Any]]
    trainer: dict[str, Any] | str = ""
    transport: str = "auto"
    verify: bool = False
    timeout: float = 60.0

    def sides(self) -> list[sync.Side]:
        """The trainer's side, then the engines'. Raises PlanError for what does not fit the model."""
        layout, out, ranks = sync.layout(self.config), [], 0
        for told in (self.trainer, *(self.engine if isinstance(self.engine, list) else [self.engine])):
            out.append(side(layout, told, ranks))
            ranks += len(out[-1].processes)
        return out

    def joined(self, rank: int, backend: str) -> sync.Sync:
        """The Sync of all ranks; `rank` counts over both sides, `backend` is torch.distributed's. Returns when all are here."""
        source, *engines = self.sides()
        plan = sync.plan(source, engines)  # before anyone waits for anyone: what is wrong with it, each rank finds by itself
        size = sum(len(own.processes) for own in (source, *engines))
        group = sync.joined(self.address, rank, size, backend=backend, timeout=self.timeout)
        return sync.Sync(plan, group, transport=self.transport, verify=self.verify, timeout=self.timeout)


def side(layout: Layout, told: Mapping[str, Any] | str, first: int) -> sync.Side:
    """Who holds what, from plain JSON; its processes count from `first`. Raises PlanError."""
    if isinstance(told, str):
        return sync.Side.from_json(told)
    options = {name: value for name, value in told.items() if name != "backend"}
    if missing := {"format", "ranks"} - options.keys():
        raise PlanError([f"{dict(told)} lacks {' and '.join(sorted(missing))}"], 'e.g. {"format": "vllm", "ranks": 2, "tp": 2}')
    kind, ranks = options.pop("format"), range(first, first + options.pop("ranks"))
    try:
        if kind != "fsdp":
            return sync.Side.placed(layout, kind, ranks=ranks, **options)
        typed = {name: options.pop(name) for name in ("dtype", "dtypes") if name in options}
        return sync.Side.sharded(layout, sync.fsdp(layout, ranks=ranks, **options), **typed)
    except TypeError as error:
        raise PlanError([f"{dict(told)}: {error}"], "the keys are those of Side.placed, or of sync.fsdp") from None


def meanwhile(asked, own):
    """`own()` while `asked()` runs elsewhere, since both ends wait for each other; what either raises is raised."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(asked)
        try:
            result = own()
        except Exception as error:
            if pending.exception() is not None:  # waits for it
                raise error from pending.exception()
            raise
        pending.result()
        return result


def free_address(host: str | None = None) -> str:
    """tcp://host:port where nobody listens yet, on this machine."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"tcp://{host or socket.gethostbyname(socket.gethostname())}:{free.getsockname()[1]}"


class ByName:
    """Both ends of a transfer to engines that load whole tensors by Hugging Face's names, as verl's and NeMo-RL's do: the engine's ranks
    receive each tensor once, a bucket at a time, from all trainer ranks together.

    `config` as in Terms. `trainer`: who holds what, without ``ranks``; by default every rank gathers whole tensors of `dtype`, and hands
    over an iterator of (name, tensor). Anything else is given as it lies: a module, or {name: tensor}. The group and the plan stay until
    the ranks change.
    """

    def __init__(self, bucket_size: int, config, *, trainer: Mapping[str, Any] | None = None, dtype: str = "bf16", dist_backend: str = "nccl",
                 transport: str = "auto", verify: bool = False, timeout: float = 60.0):  # fmt: skip
        self._bucket, self._config, self._dtype, self._backend = bucket_size, config, dtype, dist_backend
        self._trainer = dict(trainer or {"format": "hf", "dtype": dtype})
        self._settings = {"transport": transport, "verify": verify, "timeout": timeout}
        self._sync: sync.Sync | None = None
        self._at: tuple | None = None
        self.mark = uuid.uuid4().hex  # tells this end from another in its place

    @property
    def whole(self) -> bool:
        """Whether the trainer hands over whole tensors, one after another."""
        return self._trainer["format"] == "hf"

    def join(self, rank: int, trainers: int, marks: Sequence[str], address: str) -> None:
        """Meet the others; `rank` counts over trainers, then takers, and so do their `marks`. Does nothing where all have met already."""
        takers = len(marks) - trainers
        if self._sync is not None and self._at == (rank, trainers, *marks):
            return
        self.leave()
        layout = sync.layout(self._config)
        plan = sync.plan(side(layout, {**self._trainer, "ranks": trainers}, 0),
                         side(layout, {"format": "hf", "ranks": takers, "dtype": self._dtype}, trainers), bucket_bytes=self._bucket)  # fmt: skip
        group = sync.joined(address, rank, trainers + takers, backend=self._backend, timeout=self._settings["timeout"])
        self._sync, self._at = sync.Sync(plan, group, **self._settings), (rank, trainers, *marks)

    def send(self, weights, version: int | None = None):
        """Send this rank's weights; returns ``Sync.send``'s Stats."""
        return self._joined().send(weights, version, windows=self.whole)

    async def batches(self, version: int | None = None) -> AsyncIterator[list[tuple[str, torch.Tensor]]]:
        """Lists of (name, whole tensor), each tensor once."""
        for bucket in self._joined().buckets(version=version):
            yield bucket.tensors

    def leave(self) -> None:
        """Leave the others; ``join`` may be called again."""
        if self._sync is not None:
            self._sync.close(leave=True)
        self._sync = self._at = None

    def _joined(self) -> sync.Sync:
        if self._sync is None:
            raise PlanError(["this rank has not joined the others"], "call join first, on all ranks")
        return self._sync


def pairs(weights) -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) of chunks of a Megatron model, without the names of its wrappers: parameters, and buffers that it saves.

    Raises PlanError where two chunks (virtual pipeline stages) hold the same name: their layers count from their own first.
    """
    seen: set[str] = set()
    for chunk in weights:
        for name, tensor in named(chunk).items():
            bare = name.removeprefix("module.").removeprefix("module.")
            if bare in seen:
                raise PlanError(
                    [f"{bare} is in two chunks of this rank's model"], "virtual pipeline stages are not supported: use --pp alone"
                )
            seen.add(bare)
            yield bare, tensor
