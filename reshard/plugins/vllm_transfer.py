"""vLLM's weight transfer, backend ``reshard``: every worker takes its own fused slices, every trainer rank sends what it holds as it lies.

    vllm serve MODEL --weight-transfer-config '{"backend": "reshard"}'
    trainer = WeightTransferTrainerFactory.trainer_init(ReshardTrainerInit(address, config, trainer={…}, engine={…}, rank=…), client=…, source=model)
    trainer.send_weights()                                   # on every trainer rank, after each step

`trainer` and `engine` say who holds what, as plain JSON: {"format": "fsdp", "ranks": 8, "dp": 4, "tp": 2} or {"format": "megatron", "ranks": 8,
"tp": 4, "pp": 2, "dtype": "fp32"}; {"ranks": 2, "tp": 2, "dtype": "bf16"}. Both ends make the same plan of them. A layer that vLLM repacked
after loading is given tensors in the shape of loading, filled, and repacked; all others are written where they lie. Source: vLLM 0.32,
distributed/weight_transfer/base.py, model_executor/model_loader/reload/.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
import vllm
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload.layerwise import _copy_and_restore_kernel_tensors, _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer, restore_layer_on_meta
from vllm.model_executor.model_loader.reload.utils import get_layer_params_buffers

from reshard import sync
from reshard.plugins.fitting import release


@dataclass
class ReshardInitInfo(WeightTransferInitInfo):
    """What the workers are told. `address`: tcp://host:port of trainer rank 0; `config`: the model's config.json or its folder."""

    address: str
    config: str
    trainer: dict
    engine: dict
    transport: str = "auto"
    verify: bool = False


@dataclass
class ReshardUpdateInfo(WeightTransferUpdateInfo):
    version: int


@dataclass
class ReshardTrainerInit(TrainerInitInfo):
    """What a trainer's rank is told; ``rank`` is its own among the trainers."""

    backend: ClassVar[str] = "reshard"
    address: str
    config: str
    trainer: dict
    engine: dict
    transport: str = "auto"
    verify: bool = False


def connected(info: ReshardInitInfo | ReshardTrainerInit, rank: int, backend: str):
    """(group, Sync) of all trainer ranks, then all workers. `rank` counts over both."""
    ranks = info.trainer["ranks"], info.engine["ranks"]
    group = sync.joined(info.address, rank, sum(ranks), backend=backend)
    layout = sync.layout(info.config)
    source = side(layout, info.trainer, range(ranks[0]))
    into = side(layout, {"format": "vllm", "engine_version": release("vllm", vllm.__version__), **info.engine}, range(ranks[0], sum(ranks)))
    return group, sync.Sync(sync.plan(source, into), group, transport=info.transport, verify=info.verify)


def side(layout, told: Mapping, processes: range) -> sync.Side:
    """Who holds what, from plain JSON."""
    options = {name: value for name, value in told.items() if name not in ("format", "ranks", "backend")}
    if told["format"] != "fsdp":
        return sync.Side.placed(layout, told["format"], ranks=processes, **options)
    dtype = {"dtype": options.pop("dtype")} if "dtype" in options else {}
    return sync.Side.sharded(layout, sync.fsdp(layout, ranks=processes, **options), **dtype)


class ReshardWeightTransferEngine(WeightTransferEngine[ReshardInitInfo, ReshardUpdateInfo]):
    init_info_cls = ReshardInitInfo
    update_info_cls = ReshardUpdateInfo
    supports_draft_weight_update = False
    _group, _sync, _opened = None, None, ()

    def init_transfer_engine(self, init_info: ReshardInitInfo) -> None:
        self.shutdown()  # a second trainer after the first
        own = self.parallel_config
        rank = init_info.trainer["ranks"] + own.data_parallel_index * own.world_size + own.rank
        self._group, self._sync = connected(init_info, rank, "gloo" if self.device.type == "cpu" else "nccl")

    def start_weight_update(self) -> None:
        """Give layers that were repacked after loading tensors as they were loaded. Tied parameters stay one tensor."""
        self._opened = []
        one: dict[tuple, torch.nn.Parameter] = {}
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            live, loaded = get_layer_params_buffers(layer)[0], info.restore_metadata[0]
            if not hasattr(layer, "cpu_linear") and all(
                n in live and (live[n].shape, live[n].dtype) == (t.shape, t.dtype) for n, t in loaded.items()
            ):
                continue
            info.kernel_tensors = get_layer_params_buffers(layer)
            info.kernel_non_persistent_buffers = set(layer._non_persistent_buffers_set)
            shared = {name: tensor.untyped_storage().data_ptr() for name, tensor in live.items() if tensor.numel()}
            self._opened.append((layer, info))
            restore_layer_on_meta(layer, info)
            materialize_layer(layer, info)
            for name, key in shared.items():
                if name in layer._parameters:
                    layer._parameters[name] = one.setdefault((key, layer._parameters[name].shape), layer._parameters[name])

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: ReshardUpdateInfo) -> None:
        """Raises SyncError after putting repacked layers back as they were; what is written where it lies may be new by then, as it says."""
        tensors = {name: t.data for name, t in self.model.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
        try:
            self._sync.recv(tensors, version=update_info.version)
        except BaseException:
            self._put_back()
            raise

    def finish_weight_update(self) -> None:
        """Repack what was opened, into the tensors that the kernels know."""
        for layer, info in self._opened:
            if hasattr(layer, "_already_called_process_weights_after_loading"):
                delattr(layer, "_already_called_process_weights_after_loading")
            layer.quant_method.process_weights_after_loading(layer)
            _copy_and_restore_kernel_tensors(layer, info)
            info.reset()
        self._opened = ()

    def _put_back(self) -> None:
        for layer, info in self._opened:
            _place_kernel_tensors(layer, info)
            info.reset()
        self._opened = ()

    def shutdown(self) -> None:
        self._put_back()
        if self._sync is not None:
            self._sync.close()
            with suppress(Exception):  # peers that are gone already
                torch.distributed.destroy_process_group(self._group)
        self._group, self._sync = None, None


class ReshardTrainerEngine(TrainerWeightTransferEngine[ReshardTrainerInit]):
    """One rank of the trainer. `source`: a module, or {name: tensor} of what this rank holds."""

    init_info_cls = ReshardTrainerInit

    @classmethod
    def trainer_init(cls, init_info: ReshardTrainerInit, *, client, source=None) -> "ReshardTrainerEngine":
        self = cls(client=client, source=source, is_sender=init_info.is_sender)
        told = {name: value for name, value in asdict(init_info).items() if name in ReshardInitInfo.__dataclass_fields__}
        with ThreadPoolExecutor(1) as pool:  # workers and trainers meet: neither returns before the other has come
            asked = pool.submit(client.init_weight_transfer_engine, told) if self.is_sender else None
            self._group, self._sync = connected(init_info, init_info.rank, init_info.engine.get("backend", "nccl"))
            if asked:
                asked.result()
        self.version = 0
        return self

    def send_weights(self):
        """Send this step's weights; returns ``Sync.send``'s Stats. Every trainer rank calls it."""
        self.version += 1
        held = self.source.named_parameters() if isinstance(self.source, torch.nn.Module) else self.source
        if not self.is_sender:
            return self._sync.send(held, version=self.version)
        self.client.start_weight_update()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self.client.update_weights, {"version": self.version})
            stats = self._sync.send(held, version=self.version)
            asked.result()
        self.client.finish_weight_update(weight_version=str(self.version))
        return stats

    def shutdown(self) -> None:
        self._sync.close()
        with suppress(Exception):
            torch.distributed.destroy_process_group(self._group)
