"""SGLang's model filled by reshard, before SGLang repacks it for its kernels. Read in SGLang 0.5.23, not run: see ``vllm_loader.py``."""

import os

import sglang
import torch
from sglang.srt.model_loader.loader import DefaultModelLoader, _get_quantization_config, _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.runtime_context import get_parallel

from reshard.checkpoint import open_checkpoint
from reshard.conversion.placing import place, rank_at
from reshard.layout import Mesh
from reshard.loading import load_into
from reshard.plugins.fitting import fitted, release


class ReshardModelLoader(DefaultModelLoader):
    """Extra config (--model-loader-extra-config): `source`, `config`, `layout`, `format`, `jobs`."""

    def __init__(self, load_config):
        extra = load_config.model_loader_extra_config
        self.extra = dict(extra) if isinstance(extra, dict) else {}
        load_config.model_loader_extra_config = {}  # the default loader refuses what it does not know
        super().__init__(load_config)

    def download_model(self, model_config) -> None:
        """Nothing: of what lies on the Hub, ranges are read as they are needed."""

    def load_model(self, *, model_config, device_config) -> torch.nn.Module:
        target = torch.device(device_config.device)
        with set_default_torch_dtype(model_config.dtype):
            with target:
                model = _initialize_model(model_config, self.load_config, _get_quantization_config(model_config, self.load_config))
            self.fill(model, model_config.model_path)
            self.postprocess_weights(model, target)
        return model.eval()

    def fill(self, model: torch.nn.Module, path: str) -> None:
        source = self.extra.get("source") or (path if os.path.isdir(path) or path.startswith("hf://") else f"hf://{path}")
        options = {name: self.extra[name] for name in ("config", "layout", "format") if name in self.extra}
        if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "config.json")):
            options.setdefault("config", path)
        checkpoint, at = open_checkpoint(source, **options), get_parallel()
        ep = at.moe_ep_size if checkpoint.layout.sizes.get("expert") else 1
        placement = place(checkpoint, "sglang", Mesh(at.tp_size, at.pp_size, ep), release("sglang", sglang.__version__))
        rank = rank_at(placement, (at.tp_rank, at.pp_rank))
        into, copies = fitted(model, placement, rank)
        load_into(checkpoint, placement, rank, into, jobs=self.extra.get("jobs"))
        for name, tensor in copies:
            tensor.copy_(into[name])
