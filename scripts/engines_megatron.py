"""Megatron-Core's side of check_engines.py: its GPTModel on the CPU, one process per rank, filled with reshard's files.

The model is the one that Megatron-LM would build from the files' own ``args``. Names and shapes of its state_dict must be those of the
files, on every rank; filled with them, it must compute transformers' logits. Its layers are those of Megatron's TransformerEngine spec,
whose leaves need a GPU: plain ones of the same parameters stand in their place (``standins``). No bytes can be compared: megatron-core
reads no Hugging Face checkpoint. So with pipeline stages, which are not run, names and shapes alone are proved.
"""

import importlib
import os
from contextlib import nullcontext
from pathlib import Path

FORMAT = "megatron"
CLOSE = 2e-4  # of the largest logit: float32, sums in another order


def warm() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    for module in ("megatron.core.models.gpt", "megatron.core.models.gpt.gpt_layer_specs", "megatron.core.transformer.moe.experts",
                   "transformers.models.auto.modeling_auto", "transformers.modeling_utils", "safetensors.torch", "reshard.api",
                   "reshard.conversion.transaction"):  # fmt: skip
        importlib.import_module(module)


def release() -> str:
    import megatron.core

    return f"Megatron-Core {megatron.core.__version__}"


def options() -> dict:
    return {}


def meshes(family: dict, quick: bool) -> list[dict]:
    out = [] if quick else [{"tp": 1}, {"tp": 4}, {"pp": 2}]
    return [*out, {"tp": 2}, *[{"tp": 2, "ep": 2, "etp": 1}] * family.get("experts", False)]


def rank(folder: Path, mesh: dict, rank: int, world: int, work: Path, computed: dict) -> dict:
    import torch
    from engines_common import NotBuilt, label

    torch.cuda.current_device = lambda: "cpu"  # Megatron asks for it where it makes room for what others send
    on_the_cpu()
    held = files(folder / f"hf-{label(mesh)}", mesh, rank)
    try:
        model = build(held["args"], mesh, rank, world, work)
    except Exception as error:  # noqa: BLE001  whatever Megatron cannot do here is told
        raise NotBuilt(reason(error)) from error
    lines = names_and_shapes(model, held["model"])
    out = {
        "tensors": len(held["model"]),
        "bytes": sum(t.nbytes for t in held["model"].values()),
        "control": 0,
        "proved": "names and shapes",
    }
    if lines or mesh.get("pp", 1) > 1:
        return out | {"differences": lines, "control": 1}
    try:
        difference, largest = logits(model, held["model"], folder, work)
    except Exception as error:  # noqa: BLE001  names and shapes are right; why it cannot be run is told
        raise NotBuilt(f"names and shapes are equal, but it does not run: {reason(error)}") from error
    if difference > CLOSE * largest:
        lines.append(f"logits differ from transformers' by {difference:.3g}, of {largest:.3g}")
    other, _ = logits(model, files(folder / f"control-{label(mesh)}", mesh, rank)["model"], folder, work)
    return out | {"differences": lines, "control": int(other > 20 * CLOSE * largest), "proved": "names, shapes, logits",
                  "logits": f"{difference / largest:.1e}", "control_logits": f"{other / largest:.1e}"}  # fmt: skip


def reason(error: Exception) -> str:
    import traceback

    at = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if "/megatron/" in f.filename), None)
    where = f" ({at.filename.rpartition('site-packages/')[2]}:{at.lineno})" if at else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}{where}"


def files(folder: Path, mesh: dict, rank: int) -> dict:
    """What this rank of Megatron-LM would load: args and model of its mp_rank_… file."""
    import torch

    tp, pp, ep = (mesh.get(key, 1) for key in ("tp", "pp", "ep"))
    stage, inside = divmod(rank, tp)
    name = f"mp_rank_{inside:02d}" + f"_{stage:03d}" * (pp > 1) + f"_{inside:03d}" * (ep > 1)  # experts are dealt out and not cut: etp 1
    held = torch.load(folder / "release" / name / "model_optim_rng.pt", weights_only=False)
    model = {key.replace(".transformer_layer.", ".mtp_model_layer."): value for key, value in held["model"].items()}  # its name in files
    return {"args": vars(held["args"]), "model": model}


def build(args: dict, mesh: dict, rank: int, world: int, work: Path, dtype=None):
    """GPTModel of this rank (in float32, or `dtype`), by the rules of Megatron-LM's core_transformer_config_from_args and model_provider."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import mla_qk_norm_config, multi_latent_attention
    from standins import Column, Norm, Provider, Whole

    dist.init_process_group("gloo", init_method=f"file://{work / 'store'}", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.get("tp", 1), pipeline_model_parallel_size=mesh.get("pp", 1),
        expert_model_parallel_size=mesh.get("ep", 1), expert_tensor_parallel_size=1 if mesh.get("ep", 1) > 1 else None,
    )  # fmt: skip
    random._CUDA_RNG_STATE_TRACKER, random._CUDA_RNG_STATE_TRACKER_INITIALIZED = NoDice(), True
    config = settings(args, mesh)
    gpt_layer_specs.TESpecProvider, gpt_layer_specs.TENorm = Provider, Norm
    multi_latent_attention.TELinear, multi_latent_attention.TEColumnParallelLinear = Whole, Column
    mla_qk_norm_config.get_backend = lambda implementation: Provider()
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True)
    stage = rank // mesh.get("tp", 1)
    last = stage == mesh.get("pp", 1) - 1
    predicts = gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, use_transformer_engine=True) if last and config.mtp_num_layers else None
    model = GPTModel(
        config, spec, vocab_size=args["padded_vocab_size"], max_sequence_length=args["max_position_embeddings"],
        pre_process=stage == 0, post_process=last, parallel_output=True, mtp_block_spec=predicts,
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"], rotary_percent=args["rotary_percent"], rotary_base=args["rotary_base"],
        rope_scaling=args["use_rope_scaling"], rope_scaling_factor=args["rope_scaling_factor"],
        seq_len_interpolation_factor=args["rotary_seq_len_interpolation_factor"],
    )  # fmt: skip
    return model.eval().to(dtype or torch.float32)


def on_the_cpu() -> None:
    """From here on, what Megatron makes on "cuda" by name is made on the CPU."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Here(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), options=None):
            options = dict(options or {})
            if str(options.get("device", "")).startswith("cuda"):
                options["device"] = "cpu"
            return args[0] if function is torch.Tensor.cuda else function(*args, **options)

    Here().__enter__()


class NoDice:
    """Megatron's states of random numbers live on a GPU; nothing is drawn here."""

    def fork(self, name: str = ""):
        return nullcontext()

    def is_initialized(self) -> bool:
        return True


def settings(args: dict, mesh: dict):
    """The config that Megatron-LM makes of `args`, for the CPU and float32."""
    from dataclasses import fields

    import torch
    import torch.nn.functional as F
    from megatron.core.activations import quick_gelu, squared_relu
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if args["multi_latent_attention"] else TransformerConfig
    own = {field.name for field in fields(kind)}
    chosen = {name: value for name, value in args.items() if name in own}
    chosen |= {"layernorm_epsilon": args["norm_epsilon"], "layernorm_zero_centered_gamma": args["apply_layernorm_1p"],
               "num_moe_experts": args["num_experts"], "hidden_dropout": 0.0, "attention_dropout": 0.0,
               "num_query_groups": args["num_query_groups"] if args["group_query_attention"] else None,
               "gated_linear_unit": bool(args["swiglu"] or args["quick_geglu"]),
               "activation_func": F.silu if args["swiglu"] else quick_gelu if args["quick_geglu"] else squared_relu if args["squared_relu"] else F.gelu,
               "bias_activation_fusion": False, "bias_dropout_fusion": False, "masked_softmax_fusion": False, "apply_rope_fusion": False,
               "gradient_accumulation_fusion": False, "persist_layer_norm": False, "use_cpu_initialization": True,
               "perform_initialization": False, "params_dtype": torch.float32, "pipeline_dtype": torch.float32, "bf16": False, "fp16": False,
               "tensor_model_parallel_size": mesh.get("tp", 1), "pipeline_model_parallel_size": mesh.get("pp", 1),
               "expert_model_parallel_size": mesh.get("ep", 1)}  # fmt: skip
    if args["num_experts"]:
        chosen |= {"moe_token_dispatcher_type": "allgather", "moe_grouped_gemm": True}
    if mesh.get("ep", 1) > 1:
        chosen |= {"expert_tensor_parallel_size": 1}
    config = kind(**{name: value for name, value in chosen.items() if value is not None})
    for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings", "beta_fast", "beta_slow",
                 "correction_range_round_to_int"):  # fmt: skip
        if args["position_embedding_type"] == "yarn":  # fields that only model providers declare
            setattr(config, f"yarn_{name}", args.get(f"yarn_{name}", args.get(name)))
    return config


def names_and_shapes(model, held: dict) -> list[str]:
    """What the model's own state_dict, but for what is no weight, and the files disagree in."""
    own = {name: tuple(t.shape) for name, t in model.state_dict().items() if t is not None and hasattr(t, "shape") and not skipped(name)}
    theirs = {name: tuple(t.shape) for name, t in held.items()}
    lines = [f"{name} {list(own[name])}: only in the engine" for name in sorted(own.keys() - theirs.keys())]
    lines += [f"{name} {list(theirs[name])}: only in the files" for name in sorted(theirs.keys() - own.keys())]
    both = sorted(own.keys() & theirs.keys())
    return lines + [f"{n}: {list(own[n])} in the engine, {list(theirs[n])} in the files" for n in both if own[n] != theirs[n]]


def skipped(name: str) -> bool:
    return name.endswith(("_extra_state", "local_tokens_per_expert", "global_tokens_per_expert"))


def logits(model, held: dict, folder: Path, work: Path) -> tuple[float, float]:
    """Largest difference of this model's logits, filled with `held`, from transformers', and the largest of those."""
    model.load_state_dict({name: tensor.float() for name, tensor in held.items()}, strict=False)  # buffers that count tokens stay
    return computed(model, folder)


def computed(model, folder: Path) -> tuple[float, float]:
    """The same of a model that is filled."""
    import torch
    import torch.distributed as dist

    reference = torch.load(folder / "logits.pt")
    tokens, wanted = reference["tokens"], reference["logits"]
    length = tokens.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(length)[None].expand_as(tokens)
    with torch.no_grad():
        out = model(tokens, positions, mask)
    parts = [torch.empty_like(out) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, out.contiguous())
    whole = torch.cat(parts, -1)[..., : wanted.shape[-1]]
    return float((whole - wanted).abs().max()), float(wanted.abs().max())
