"""vLLM's side of check_engines.py: its model classes on the CPU, one process per rank, filled by its own loader.

Its parameters are compared as its loader leaves them, before it repacks them for its kernels: that is what sharded_state files hold.
"""

import importlib
import os
from pathlib import Path

FORMAT = "vllm"


def warm() -> None:
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    os.environ.setdefault("VLLM_PLUGINS", "")
    from unittest.mock import MagicMock

    import torch
    from vllm.model_executor.models import registry

    for module in ("engine.arg_utils", "v1.executor", "model_executor.model_loader", "model_executor.model_loader.sharded_state_loader",
                   "distributed.device_communicators.cpu_communicator", "model_executor.models.deepseek_v2", "model_executor.models.llama"):  # fmt: skip
        importlib.import_module(f"vllm.{module}")
    for module in ("transformers.models.auto.modeling_auto", "transformers.modeling_utils", "safetensors.torch", "reshard.api",
                   "reshard.conversion.transaction"):  # fmt: skip
        importlib.import_module(module)
    torch.set_num_threads(1)
    torch.cuda.Event = torch.cuda.Stream = MagicMock  # made by models that overlap streams, and never waited for here
    for names in ("torchvision torchvision.transforms torchvision.transforms.v2 torchvision.transforms.v2.functional torchvision.transforms.functional",
                  "cutlass cutlass.cute cutlass.cute.runtime cutlass.utils cutlass.cutlass_dsl cutlass._mlir cutlass._mlir.dialects",
                  "cuda cuda.bindings cuda.bindings.driver cuda.bindings.runtime"):  # fmt: skip
        stand_in(*names.split())  # only now, when transformers has looked for them
    registry._run_in_subprocess = lambda work: work()  # a class is looked at in a process of its own, which would import vLLM anew


def stand_in(*names: str) -> None:
    """Modules in the place of packages that are not here, and whose code no loading of weights reaches: image processors, GPU kernels."""
    import sys
    from importlib.machinery import ModuleSpec
    from importlib.util import find_spec
    from unittest.mock import MagicMock

    if find_spec(names[0]) is None:
        for name in names:
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[], __name__=name)


def release() -> str:
    import vllm

    return f"vLLM {vllm.__version__}"


def options() -> dict:
    import vllm

    return {"engine_version": ".".join(vllm.__version__.split("+")[0].split(".")[:2]), "engine_platform": "cpu"}


def meshes(family: dict, quick: bool) -> list[dict]:
    out = [] if quick else [{"tp": 1}, {"tp": 4}, {"pp": 2}]
    return [*out, {"tp": 2}, *[{"tp": 2, "ep": 2}] * family.get("experts", False)]


def rank(folder: Path, mesh: dict, rank: int, world: int, work: Path, computed: dict) -> dict:
    """One rank: its model loaded by vLLM from the checkpoint, beside the rank's files."""
    from engines_common import NotBuilt, differences

    try:
        state, before = loaded(folder / "hf", mesh, rank, world, work)
    except Exception as error:  # noqa: BLE001  whatever vLLM cannot do here is told
        raise NotBuilt(reason(error)) from error
    stage, tp = divmod(rank, mesh.get("tp", 1))
    files = read(folder, "hf", mesh, stage, tp)
    control = differences(state, read(folder, "control", mesh, stage, tp), None, computed) if (folder / "control").is_dir() else []
    return {"differences": differences(state, files, before, computed), "control": len(control), "tensors": len(state),
            "bytes": sum(t.nbytes for t in state.values())}  # fmt: skip


def reason(error: Exception) -> str:
    """Where it comes from, and what it says."""
    import traceback

    at = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/vllm/" in f.filename), None)
    where = f" ({at.filename.rpartition('site-packages/')[2]}:{at.lineno})" if at else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:600]}{where}"


def loaded(path: Path, mesh: dict, rank: int, world: int, work: Path, load_format: str = "auto", **more):
    """(state after vLLM's loader, state before it): {name: tensor}, names that share storage once, as sharded_state has it."""

    with building(path, mesh, rank, world, work, load_format, **more) as (model, config):
        before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        from vllm.model_executor.model_loader import get_model_loader

        get_model_loader(config.load_config).load_weights(model, config.model_config)
        return stored(model), before


def stored(model) -> dict:
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    return {name: tensor.detach() for name, tensor in ShardedStateLoader._filter_subtensors(model.state_dict()).items()}


class building:
    """vLLM's model for one rank, made but not loaded; as a context, because much of vLLM asks for the current config."""

    def __init__(
        self, path: Path, mesh: dict, rank: int, world: int, work: Path, load_format: str = "auto", dtype: str = "bfloat16", **more
    ):
        from vllm.engine.arg_utils import EngineArgs

        self.rank, self.world, self.work = rank, world, work
        os.environ["VLLM_DIST_IDENT"] = f"{os.getppid()}-{work.parent.name}-{work.name}"[-40:]
        self.config = EngineArgs(
            model=str(path), load_format=load_format, tensor_parallel_size=mesh.get("tp", 1), pipeline_parallel_size=mesh.get("pp", 1),
            enable_expert_parallel=mesh.get("ep", 1) > 1, dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
            **whole_tower(path), distributed_executor_backend="mp" if world > 1 else "uni", disable_log_stats=True, **more,
        ).create_engine_config()  # fmt: skip
        self.config.parallel_config.rank = rank

    def __enter__(self):
        from contextlib import ExitStack

        from vllm.config import set_current_vllm_config
        from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment, model_parallel_is_initialized
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        self.stack = ExitStack()
        self.stack.enter_context(set_current_vllm_config(self.config))
        self.stack.enter_context(set_default_torch_dtype(self.config.model_config.dtype))
        parallel = self.config.parallel_config
        if not model_parallel_is_initialized():
            init_distributed_environment(self.world, self.rank, f"file://{self.work / 'store'}", self.rank, "gloo")
            ensure_model_parallel_initialized(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        return initialize_model(vllm_config=self.config), self.config

    def __exit__(self, *error):
        self.stack.close()


def whole_tower(path: Path) -> dict:
    """A wrapper's tower is whole on every rank, as in reshard's files: vLLM's --mm-encoder-tp-mode data."""
    return {"mm_encoder_tp_mode": "data"} if "vision_config" in (path / "config.json").read_text() else {}


def read(folder: Path, source: str, mesh: dict, stage: int, tp: int) -> dict:
    """The tensors of one rank's files, as reshard wrote them."""
    from engines_common import label
    from safetensors.torch import load_file

    pattern = f"model-pp-{stage}-tp-{tp}-part-*.safetensors" if mesh.get("pp", 1) > 1 else f"model-rank-{tp}-part-*.safetensors"
    tensors = {}
    for path in sorted((folder / f"{source}-{label(mesh)}").glob(pattern)):
        tensors |= load_file(path)
    return tensors
