"""vLLM's model filled by reshard: any checkpoint that reshard opens, each worker its own bytes, straight into its parameters.

    vllm serve CKPT --load-format reshard [--tensor-parallel-size N] [--model-loader-extra-config '{"source": "…", …}']

vLLM has built the model for this worker; ``load_weights`` joins the checkpoint with reshard's placement for vLLM's mesh and release,
and fills what lies in the model's state_dict, before vLLM repacks it for its kernels. Every tensor must be filled: what the placement
does not name is refused, or the whole is left to vLLM's own loader, which reads Hugging Face folders (drafts, architectures without a
layout, quantised weights), with a warning. Source: vLLM 0.32, model_loader/base_loader.py, default_loader.py.
"""

import copy
import os

import torch
import vllm
from vllm.config import ModelConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from reshard import formats
from reshard.checkpoint import Checkpoint, open_checkpoint
from reshard.checkpoint.config import folder_of
from reshard.conversion.placing import place, rank_at
from reshard.errors import FormatError, LayoutError, PlanError, ReshardError
from reshard.layout import Mesh, Placement, Rank
from reshard.layout.values import PLATFORMS
from reshard.loading import load_into
from reshard.plugins.fitting import fitted, release

logger = init_logger("vllm.reshard")


class ReshardModelLoader(BaseModelLoader):
    """Extra config: `source` (weights elsewhere than the model, which then gives config and tokenizer), `config`, `layout`, `format`
    (as for ``reshard.open``), `jobs` (threads), `strict` (never leave a model to vLLM's own loader)."""

    def __init__(self, load_config):
        super().__init__(load_config)
        extra = dict(load_config.model_loader_extra_config or {})
        self.source, self.jobs, self.strict = extra.pop("source", None), extra.pop("jobs", None), extra.pop("strict", False)
        self.options = {name: extra.pop(name) for name in ("layout", "config", "format") if name in extra}
        if extra:
            raise ValueError(f"--load-format reshard: unexpected keys in model_loader_extra_config: {', '.join(sorted(extra))}")

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing: of what lies on the Hub, ranges are read as they are needed."""

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fill `model`. Raises ReshardError for what neither reshard nor vLLM's own loader can read."""
        try:
            checkpoint, placement, rank = self.placed(model_config)
            into, copies = fitted(model, placement, rank)
            load_into(checkpoint, placement, rank, into, jobs=self.jobs)
        except (LayoutError, PlanError, FormatError) as error:  # raised before the first byte is written
            if self.strict or self.of_main(model_config, self.source) or not whole(model_config):
                raise
            logger.warning("reshard cannot load %s, vLLM's own loader does: %s", model_config.model, error)
            return self.default().load_weights(model, model_config)
        for name, tensor in copies:
            tensor.copy_(into[name])
        logger.info("reshard filled %d tensors of rank tp %d, pp %d from %s (%s %s)", len(into), rank.tp, rank.pp, checkpoint.path,
                    checkpoint.format, checkpoint.mesh)  # fmt: skip

    def get_all_weights(self, model_config: ModelConfig, model: torch.nn.Module):
        """(name, whole tensor) by Hugging Face's names: what the engine's ``reload_weights`` asks for."""
        if not self.of_main(model_config, self.source) and whole(model_config):
            yield from self.default().get_all_weights(model_config, model)
        else:
            from reshard.api import load

            yield from load(self.opened(model_config), format="hf", jobs=self.jobs).items()

    def default(self) -> DefaultModelLoader:
        config = copy.copy(self.load_config)
        config.load_format, config.model_loader_extra_config = "auto", {}
        return DefaultModelLoader(config)

    @staticmethod
    def of_main(model_config: ModelConfig, option):
        """`option`, which is of the model that is served, and of no draft beside it."""
        return option if model_config is get_current_vllm_config().model_config and model_config.runner != "draft" else None

    def opened(self, model_config: ModelConfig) -> Checkpoint:
        path = self.of_main(model_config, self.source) or located(model_config)
        options = self.of_main(model_config, dict(self.options)) or {}
        if "config" not in options and not str(path).startswith("hf://") and not os.path.isfile(os.path.join(path, "config.json")):
            options["config"] = model_config.hf_config_path or located(model_config)
        return open_checkpoint(path, **options)

    def placed(self, model_config: ModelConfig) -> tuple[Checkpoint, Placement, Rank]:
        """The checkpoint, reshard's placement for vLLM's mesh and release, and this worker in it."""
        checkpoint = self.opened(model_config)
        known, built = checkpoint.layout.descriptor.architectures, model_config.architectures
        if "layout" not in self.options and not set(known) & set(built):
            raise LayoutError(
                f"vLLM builds {', '.join(built)}, config.json is of {checkpoint.architecture}"
            )  # a draft in the model's files
        words, own = model_config.get_vocab_size(), checkpoint.layout.sizes.get("vocab")
        if own not in (None, words):
            raise PlanError([f"{checkpoint.config_path} is of a model of {own} words, {model_config.model} of one of {words}"])
        parallel = get_current_vllm_config().parallel_config
        experts = bool(checkpoint.layout.sizes.get("expert"))
        if experts and parallel.data_parallel_size > 1:
            raise PlanError(["experts that vLLM deals out over data-parallel ranks too"])
        if experts and parallel.enable_eplb:
            raise PlanError(["experts that vLLM balances (--enable-eplb)"])
        tp, stages = get_tensor_model_parallel_world_size(), get_pp_group()
        mesh = Mesh(tp, stages.world_size, tp if experts and parallel.enable_expert_parallel else 1)
        placement = place(checkpoint, "vllm", mesh, release("vllm", vllm.__version__), platform())
        return checkpoint, placement, rank_at(placement, (get_tensor_model_parallel_rank(), stages.rank_in_group))


def platform() -> str | None:
    """cuda, rocm or cpu, where this vLLM runs on one of those."""
    name = current_platform.device_name if not current_platform.is_rocm() else "rocm"
    return name if name in PLATFORMS else None


def located(model_config: ModelConfig) -> str:
    """The model's folder, or its place on the Hub."""
    if os.path.isdir(model_config.model) or model_config.model.startswith("hf://"):
        return model_config.model
    return f"hf://{model_config.model}" + (f"@{model_config.revision}" if model_config.revision else "")


def whole(model_config: ModelConfig) -> bool:
    """Whether the model is a Hugging Face folder, which vLLM's own loader reads."""
    try:
        return formats.recognise(folder_of(located(model_config))).name == "hf"
    except ReshardError:
        return False
