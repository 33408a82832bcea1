"""vLLM's weight transfer, backend ``reshard``: every worker takes its own fused slices, every trainer rank sends what it holds as it lies.

    vllm serve MODEL --weight-transfer-config '{"backend": "reshard"}'
    info = ReshardTrainerInit(address, config, engine={"ranks": 2, "tp": 2, "dtype": "bf16"}, rank=rank)
    trainer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=model)
    trainer.send_weights()                                   # on every trainer rank, after each step

`engine` and `trainer` say who holds what, as plain JSON (``transfer.Terms``); without `trainer` it is read from the source's DTensors. Both
ends make the same plan of them. A layer that vLLM repacks after loading is given tensors in the shape of loading when its turn comes,
filled, and repacked; all others are written where they lie (``vllm_layers.py``). Source: vLLM 0.32, distributed/weight_transfer/base.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import vllm
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

from reshard import sync
from reshard.errors import SyncError
from reshard.plugins.fitting import release
from reshard.plugins.transfer import Terms, meanwhile
from reshard.plugins.vllm_layers import Layers


@dataclass
class ReshardInitInfo(Terms, WeightTransferInitInfo):
    """What the workers of an engine are told; `first`: the number of the first of them among all engines' workers."""

    first: int = 0


@dataclass
class ReshardUpdateInfo(WeightTransferUpdateInfo):
    version: int


@dataclass
class ReshardTrainerInit(Terms, TrainerInitInfo):
    """What a trainer's rank is told; ``rank`` is its own among the trainers."""

    backend: ClassVar[str] = "reshard"


class ReshardWeightTransferEngine(WeightTransferEngine[ReshardInitInfo, ReshardUpdateInfo]):
    init_info_cls = ReshardInitInfo
    update_info_cls = ReshardUpdateInfo
    supports_draft_weight_update = False
    _sync: sync.Sync | None = None
    _layers: Layers | None = None

    def init_transfer_engine(self, init_info: ReshardInitInfo) -> None:
        """Join the trainers. A trainer that was joined before is left: this is another, or other engines have come or gone."""
        self.shutdown()
        own, source = self.parallel_config, init_info.sides()[0]
        rank = len(source.processes) + init_info.first + own.data_parallel_index * own.world_size + own.rank
        self._sync = init_info.joined(rank, "gloo" if self.device.type == "cpu" else "nccl")
        self._rank = rank

    def start_weight_update(self) -> None:
        """Nothing: layers are opened when their turn comes."""

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ReshardUpdateInfo) -> None:
        """Raises SyncError, on all ranks, for what went wrong on any; layers that were open become what they were, and the error says
        whether others are new."""
        if self._sync is None:
            raise SyncError("no trainer has joined this engine", "call init_weight_transfer_engine first")
        side = next(side for side in self._sync.plan.destinations if self._rank in side.processes)
        try:
            self._layers = self._layers or Layers(self.model, side, self._rank)
            self._layers.written, tensors = False, self._layers.give
        except Exception as error:  # noqa: BLE001  all ranks must hear of it, before a byte moves
            tensors = _raising(error)
        try:
            self._sync.recv(tensors, update_info.version, complete=self._layers and self._layers.complete)
        except Exception as error:
            self._put_back()
            new = self._layers is not None and self._layers.written
            state = "partly new: update them before this engine serves" if new else "as they were"
            raise SyncError(f"{error}; weights of worker {self.parallel_config.rank} are {state}") from error
        except BaseException:
            self._put_back()
            raise

    def finish_weight_update(self) -> None:
        if self._layers is not None:
            self._layers.finish(self.model_config.dtype)

    def shutdown(self) -> None:
        self._put_back()
        if self._sync is not None:
            self._sync.close(leave=True)
        self._sync = self._layers = None

    def _put_back(self) -> None:
        if self._layers is not None:
            self._layers.put_back()


def _raising(error: Exception) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that cannot be had."""
    raise error
    yield


class ReshardTrainerEngine(TrainerWeightTransferEngine[ReshardTrainerInit]):
    """One rank of the trainer. `source`: a module or {name: tensor} of what this rank holds, as it lies; or a WeightSource, or any iterable
    that gives (name, whole tensor) anew each time, where ``trainer`` is {"format": "hf", "ranks": …}."""

    init_info_cls = ReshardTrainerInit
    version = 0

    @classmethod
    def trainer_init(cls, init_info: ReshardTrainerInit, *, client, source=None) -> "ReshardTrainerEngine":
        """Join the engines that `client` speaks to. Raises PlanError for what cannot be synced, ReshardError or the client's error for
        what goes wrong there."""
        self = cls(client=client, source=source, is_sender=init_info.is_sender)
        terms = init_info if init_info.trainer else replace(init_info, trainer=lying(init_info, source))
        engines = terms.engine if isinstance(terms.engine, list) else [terms.engine]
        own = {"format": "vllm", "engine_version": release("vllm", vllm.__version__)}
        terms = replace(terms, engine=[own | told if isinstance(told, dict) else told for told in engines])
        backend = next((told["backend"] for told in engines if "backend" in told and isinstance(told, dict)), "nccl")
        told = {field.name: getattr(terms, field.name) for field in fields(Terms)}

        def join() -> sync.Sync:
            return terms.joined(terms.rank, backend)

        self._sync = meanwhile(lambda: client.init_weight_transfer_engine(told), join) if self.is_sender else join()
        return self

    def send_weights(self) -> Any:
        """Send this step's weights; returns ``Sync.send``'s Stats. Every trainer rank calls it. A client that has ``pause`` and ``resume``
        pauses its engines meanwhile, and leaves them paused where the step fails."""
        self.version += 1
        whole = isinstance(self.source, WeightSource) or not isinstance(self.source, Mapping | torch.nn.Module)

        def send() -> Any:
            return self._sync.send(iter(self.source) if whole else self.source, self.version, windows=whole)

        if not self.is_sender:
            return send()
        pause, resume = (getattr(self.client, name, lambda: None) for name in ("pause", "resume"))
        pause()
        self.client.start_weight_update()
        stats = meanwhile(lambda: self.client.update_weights({"version": self.version}), send)
        self.client.finish_weight_update(weight_version=str(self.version))
        resume()
        return stats

    def shutdown(self) -> None:
        self._sync.close(leave=True)


def lying(terms: Terms, source) -> str:
    """Who holds what, of a module's DTensors; the same on all ranks. Raises PlanError where it cannot be told."""
    layout = sync.layout(terms.config)
    return sync.Side.sharded(layout, sync.shardings(source)).typed(sync.dtypes(source)).to_json()


#: vLLM's dtypes as the words that a side takes
WORDS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Servers:
    """vLLM servers over HTTP (VLLM_SERVER_DEV_MODE=1) as one client: all do the same at once, workers count over them in this order,
    and none answers while its weights change. To add or remove one, shut the trainer's ends down, and ``trainer_init`` with the new list.
    """

    def __init__(self, *urls: str, timeout: float = 300.0):
        self.servers = [HTTPVLLMWeightSyncClient(url, timeout) for url in urls]

    def engines(self, backend: str = "nccl") -> list[dict[str, Any]]:
        """Who holds what, as the servers say of themselves: ``engine`` of ReshardTrainerInit; `backend` is torch.distributed's."""
        out = []
        for server in self.servers:
            told = self._told(server, "server_info?config_format=json")["vllm_config"]
            mesh, dtype = told["parallel_config"], told["model_config"]["dtype"].removeprefix("torch.")
            tp, dp = mesh["tensor_parallel_size"], mesh["data_parallel_size"]
            own = {"tp": tp, "pp": mesh["pipeline_parallel_size"], "ep": tp if mesh["enable_expert_parallel"] else 1}
            out.append({"ranks": tp * own["pp"] * dp, **own, "dtype": WORDS[dtype], "backend": backend})
        return out

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        ranks = [self._told(server, "get_world_size")["world_size"] for server in self.servers]
        firsts = [sum(ranks[:i]) for i in range(len(ranks))]
        self._all(lambda server, first: server.init_weight_transfer_engine({**init_info, "first": first}), firsts)

    def shutdown_weight_transfer_engine(self) -> None:
        self._all(lambda server: server.shutdown_weight_transfer_engine())

    def pause(self) -> None:
        self._all(lambda server: server._post("pause"))

    def resume(self) -> None:
        self._all(lambda server: server._post("resume"))

    def start_weight_update(self) -> None:
        self._all(lambda server: server.start_weight_update())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._all(lambda server: server.update_weights(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all(lambda server: server.finish_weight_update(weight_version))

    def _all(self, call: Callable, *more: Iterable) -> None:
        with ThreadPoolExecutor(len(self.servers)) as pool:
            for done in [pool.submit(call, *each) for each in zip(self.servers, *more)]:
                done.result()

    @staticmethod
    def _told(server: HTTPVLLMWeightSyncClient, path: str) -> dict[str, Any]:
        import requests

        answer = requests.get(f"{server.base_url}/{path}", timeout=server.timeout)
        answer.raise_for_status()
        return answer.json()
