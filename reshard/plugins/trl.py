"""TRL over reshard: AsyncGRPO's weight transfer, and a generation backend for GRPO's server mode in which every rank sends its shards.

    AsyncGRPOTrainer(…, weight_transfer=ReshardWeightTransfer("http://engine:8000", config="/ckpt/hf"))
    trl.trainer.grpo_trainer.VLLMGeneration = ReshardVLLMGeneration      # before GRPOTrainer(…) is made

Servers are plain `vllm serve` with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config '{"backend": "reshard"}'. AsyncGRPO's main process
alone hands over weights, gathered one by one: one sender. Source: TRL 1.16.0, experimental/async_grpo, generation/vllm_generation.py.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from reshard import sync
from reshard.plugins.transfer import free_address
from reshard.plugins.vllm_transfer import ReshardTrainerEngine, ReshardTrainerInit, Servers


class ReshardWeightTransfer:
    """TRL's WeightTransferProtocol. `config`: the model's folder or config.json; `dtype`: of the trainer's parameters; `engine`: as in
    ``transfer.Terms``, by default what the servers say of themselves; more: `address`, `transport`, `verify`, `timeout`."""

    def __init__(self, *urls: str, config, dtype: str = "bf16", engine=None, backend: str = "nccl", address: str = "", **terms: Any):
        self.servers = Servers(*urls)
        self._told = {
            "address": address or free_address(),
            "config": config,
            "trainer": {"format": "hf", "ranks": 1, "dtype": dtype},
            **terms,
        }
        self._engine, self._backend = engine, backend
        self._trainer: ReshardTrainerEngine | None = None

    def init_weight_transfer(self) -> None:
        engine = self._engine or self.servers.engines(self._backend)
        info = ReshardTrainerInit(rank=0, engine=engine, **self._told)
        self._trainer = ReshardTrainerEngine.trainer_init(info, client=self.servers)

    def pause(self) -> None:
        self.servers.pause()

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        if self._trainer is None:
            self.init_weight_transfer()
        self._trainer.source = iterator
        self._trainer.send_weights()

    def resume(self) -> None:
        self.servers.resume()

    def destroy(self) -> None:
        if self._trainer is not None:
            self._trainer.shutdown()
        self._trainer = None


class ReshardVLLMGeneration(VLLMGeneration):
    """Server mode over reshard; other modes are TRL's own. FSDP2's shards and replicas go out as they lie, from every rank; under FSDP1, ZeRO 3
    or PEFT each tensor is gathered on all ranks, as TRL does, and all of them send."""

    _trainer: ReshardTrainerEngine | None = None

    def _init_vllm(self) -> None:
        if self.mode != "server":
            return super()._init_vllm()
        if self.accelerator.is_main_process:  # without the communicator that TRL would make
            url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
            self.vllm_client = VLLMClient(base_url=url, group_port=self.group_port, connection_timeout=self.server_timeout)
        self.accelerator.wait_for_everyone()

    def sync_weights(self) -> None:
        if self.mode != "server":
            return super().sync_weights()
        if self._trainer is None:  # not before: the model is sharded after this object is made
            self._trainer = self._joined()
        self._trainer.source = self._held()
        self._trainer.send_weights()
        if self.accelerator.is_main_process:
            self.vllm_client.reset_prefix_cache()

    def _joined(self) -> ReshardTrainerEngine:
        own, main = self.accelerator, self.accelerator.is_main_process
        servers = Servers(self.vllm_client.base_url) if main else None
        backend = "gloo" if own.device.type == "cpu" else "nccl"
        address, engine = broadcast_object_list([free_address(), servers.engines(backend)] if main else [None, None], from_process=0)
        model = own.unwrap_model(self.model)
        config, held = model.config.to_dict(), self._held()
        trainer = ""  # of the DTensors
        if not any(hasattr(p, "placements") for p in (held.values() if isinstance(held, Mapping) else ())):
            names = {self._fix_param_name_to_vllm(name, ["_fsdp_wrapped_module."]): p for name, p in model.named_parameters()}
            whole = sync.Side.placed(sync.layout(config), "hf", ranks=range(own.num_processes))
            trainer = whole.typed(sync.dtypes(names)).to_json()
        info = ReshardTrainerInit(rank=own.process_index, address=address, config=config, engine=engine, trainer=trainer)
        return ReshardTrainerEngine.trainer_init(info, client=servers, source=held)

    def _held(self) -> Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]:
        """What this rank holds as it lies, or what it takes part in gathering."""
        gathers = self._dist.is_fsdp and self._dist.fsdp_version == 1 or is_peft_model(self.model) or self._dist.is_zero3
        if gathers:
            return self._iter_named_params()
        model = self.accelerator.unwrap_model(self.model)
        return {self._fix_param_name_to_vllm(name): parameter for name, parameter in model.named_parameters()}
