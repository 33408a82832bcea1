"""What transformers and vLLM, where they are installed, do with each tensor of a checkpoint. vLLM tells by its own model class and loader.

The class is built without memory for its weights, on one rank, and given tensors of the checkpoint's names and shapes. Each parameter's
``weight_loader`` only notes what would have been loaded into it, so that it is all one whether the author wrote the names as a mapper,
as a list of stacked parameters, or in a loop. What a loader computes with before that is not followed.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from reshard.errors import ReshardError
from reshard.foreign import quote
from reshard.layout import Layout

#: vLLM's words for the parts of a parameter, in their order there
_ORDER = {"q": 0, "k": 1, "v": 2, "w1": 0, "w3": 1, "w2": 2}
#: by vLLM's layers, the first that a module is: what tensor parallelism splits of its weight, in transformers' words
_WAYS = {"ReplicatedLinear": "replicated", "RowParallelLinear": "rowwise", "ColumnParallelLinear": "colwise", "VocabParallelEmbedding": "colwise"}  # fmt: skip


class Loaded(NamedTuple):
    """Into which parameter a tensor goes, where among its parts, what tensor parallelism does to it (None: not told), and whether
    vLLM holds it in float32 beside a model in bfloat16."""

    parameter: str
    part: int
    way: str | None
    wide: bool


def tensor_parallel_plan(settings: Mapping[str, object]) -> Mapping[str, str]:
    """transformers' way to split, by the module's name with * for numbers: colwise, rowwise …"""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        raise ReshardError("--from-transformers needs transformers", "pip install 'reshard[verify]'") from None
    known = settings.get("model_type")
    if known not in CONFIG_MAPPING:
        raise ReshardError(f"transformers knows no model_type {quote(repr(known))}", "leave out --from-transformers")
    return getattr(CONFIG_MAPPING[known], "base_model_tp_plan", None) or {}


def loaded(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Loaded]]:
    """By the tensor's name in the checkpoint. Raises ReshardError where vLLM is not here, or cannot build or load the model."""
    try:
        import torch
        import vllm  # noqa: F401
    except ImportError:
        raise ReshardError(
            "--from-vllm needs vLLM", "pip install vllm, in an environment of its own; leave the option out without it"
        ) from None
    try:
        with _model(folder) as model:
            out: dict[str, list[Loaded]] = {name: [] for name in shapes}
            current: list[str] = []
            for name, owner, parameter in _parameters(model):
                _note(parameter, name, _way(owner), out, current)
            model.load_weights(_tensors(torch, shapes, current))
            return out
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ReshardError(f"vLLM does not read {folder}: {type(error).__name__}: {quote(text)}", "leave out --from-vllm") from error


@contextmanager
def _model(folder: Path) -> Iterator[Any]:
    """vLLM's model of the checkpoint, its weights on the meta device."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment, model_parallel_is_initialized
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=str(folder), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
        disable_log_stats=True,
    ).create_engine_config()  # fmt: skip
    with ExitStack() as stack:
        store = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(set_current_vllm_config(config))
        stack.enter_context(set_default_torch_dtype(torch.bfloat16))
        if not model_parallel_is_initialized():
            init_distributed_environment(1, 0, f"file://{store}/group", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        with torch.device("meta"):
            model = initialize_model(vllm_config=config)
        yield model


def _parameters(model: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each parameter and buffer once: (the smallest of its names, which is the one that stays in files, its module, itself)."""
    found: dict[int, tuple[str, Any, Any]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                whole = f"{path}.{name}" if path else name
                if id(tensor) not in found or whole < found[id(tensor)][0]:
                    found[id(tensor)] = whole, module, tensor
    yield from found.values()


def _way(module: Any) -> str | None:
    kinds = ["ReplicatedLinear"] if getattr(module, "disable_tp", False) else [kind.__name__ for kind in type(module).__mro__]
    known = next((_WAYS[kind] for kind in kinds if kind in _WAYS), None)
    return known or ("replicated" if kinds[0].endswith("Norm") else None)


def _note(parameter: Any, name: str, way: str | None, out: dict[str, list[Loaded]], current: list[str]) -> None:
    """Have `parameter` note what is loaded into it: the tensor that is given, or the one that the loader took last and made it of."""
    wide = parameter.dtype.itemsize == 4 and parameter.is_floating_point()

    def loader(*args: Any, **more: Any) -> bool:
        tensor = more["loaded_weight"] if "loaded_weight" in more else args[1]
        shard = getattr(tensor, "shard_id", more.get("shard_id"))
        for value in args[2:]:
            shard = value if shard is None and (value in _ORDER or isinstance(value, int)) else shard
        found = Loaded(name, _ORDER.get(shard, shard if isinstance(shard, int) else 0), way, wide)
        source = getattr(tensor, "checkpoint_name", current[0])
        if found not in out[source]:
            out[source].append(found)
        return True

    parameter.__dict__.pop("weight_loader", None)
    parameter.weight_loader = loader


def _tensors(torch: Any, shapes: Mapping[str, tuple[int, ...]], current: list[str]) -> Iterator[tuple[str, Any]]:
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        tensor.checkpoint_name = name
        current[:] = [name]
        yield name, tensor


def engine_entries(layout: Layout, held: Mapping[str, tuple[str, ...]], told: Mapping[str, list[Loaded]]) -> list[str] | None:
    """The lines of a descriptor's [vllm] by which it differs from `layout`'s; None where they cannot be said in it.

    `held`: by the names of checkpoint tensors, * for the number of a layer, the tensors that they hold.
    """
    if "vllm" not in layout.descriptor.formats:
        return None
    made: dict[str, dict[int, tuple[tuple[str, ...], bool]]] = {}
    for name, found in told.items():
        of = held.get(re.sub(r"\.\d+\.", ".*.", name, count=1))
        for each in found if of else ():
            made.setdefault(re.sub(r"\.\d+\.", ".*.", each.parameter, count=1), {})[each.part] = of, each.wide
    entries = layout.section("vllm").entries
    known = {(_spelled(entry.name), entry.of, entry.dtype == "F32") for entry in entries}
    layer = next((_spelled(entry.name).partition("*.")[0] + "*." for entry in entries if entry.place == "layer"), "*.")
    root = next((entry.name.removesuffix("lm_head.weight") for entry in entries if entry.name.endswith("lm_head.weight")), "")
    out = []
    for name, parts in made.items():
        of = tuple(label for _, (labels, _) in sorted(parts.items()) for label in labels)
        wide = any(wide for _, wide in parts.values())
        if (name, of, wide) in known:
            continue
        if not name.startswith(layer if "*" in name else root):
            return None  # under a prefix of its own
        own = name.removeprefix(layer) if "*" in name else f"/{name.removeprefix(root)}"
        said = [f'name = "{own}"', f'of = "{" ".join(of)}"', *['dtype = "F32"'] * wide]
        out.append(f"{of[0]} = {{ {', '.join(said)} }}")
    return out


def _spelled(name: str) -> str:
    """A template of names with * for its number, as names of the checkpoint are written here."""
    return re.sub(r"\{[^}]*\}", "*", name, count=1)
