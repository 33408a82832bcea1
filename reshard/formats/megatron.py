"""``megatron``: Megatron-LM's legacy ``torch`` checkpoints: mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt under a release folder.

Layers are numbered from 0 in each stage (and each virtual stage: ``model0``, ``model1`` …), experts from 0 in each rank;
dense tensors are repeated in the files of all expert-parallel ranks. Sources: Megatron-LM ``checkpointing.py``
(get_checkpoint_name, load_args_from_checkpoint), ``parallel_state.py`` (order of ranks).
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping
from math import lcm
from pathlib import Path

from reshard.block import Stored
from reshard.errors import FormatError, PlanError
from reshard.expr import evaluate
from reshard.formats import Contents, Folder, Format, OutFile, Target, safe_join
from reshard.formats.hf import tensors_of, torch_tree
from reshard.formats.manifest import read_manifest
from reshard.place import Mesh, Rank, Rules, even_stages

TRACKER = "latest_checkpointed_iteration.txt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_IGNORE = ("*._extra_state", "*.local_tokens_per_expert", "*.inv_freq")

#: fields of ``args`` that Megatron reads back, as expressions over config.json; a descriptor's [megatron.args] adds to them
ARGS = {
    "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads", "group_query_attention": "num_key_value_heads != num_attention_heads",
    "kv_channels": "head_dim", "max_position_embeddings": "max_position_embeddings", "seq_length": "max_position_embeddings",
    "position_embedding_type": "'rope'", "use_rotary_position_embeddings": "true", "rotary_base": "rope_theta",
    "rotary_percent": "1", "rotary_interleaved": "false", "add_position_embedding": "false",
    "add_bias_linear": "false", "add_qkv_bias": "false", "swiglu": "true", "squared_relu": "false",
    "untie_embeddings_and_output_weights": "not tie_word_embeddings", "apply_layernorm_1p": "false",
    "normalization": "'RMSNorm'", "norm_epsilon": "rms_norm_eps", "apply_query_key_layer_scaling": "false",
    "attention_dropout": "0", "hidden_dropout": "0", "num_experts": "null", "make_vocab_size_divisible_by": "128",
    "tokenizer_type": "'HuggingFaceTokenizer'",
}  # fmt: skip


def mp_ranks(mesh: Mesh) -> list[Rank]:
    """Every (tensor, pipeline, expert) rank that gets a file: each pair of tp and ep that occurs in a stage."""
    etp = mesh.etp or mesh.tp
    if mesh.tp % etp and etp % mesh.tp:
        raise PlanError([f"etp={etp} and tp={mesh.tp}: one must divide the other"])
    if etp > mesh.tp:
        raise PlanError([f"etp={etp} is larger than tp={mesh.tp}: a file holds one tp rank's and one etp rank's tensors"])
    out, number = [], 0
    for p in range(mesh.pp):
        seen: dict[tuple[int, int], int] = {}
        for g in range(lcm(mesh.tp, mesh.ep * etp)):
            seen.setdefault((g % mesh.tp, g // etp % mesh.ep), g % etp)
        for (t, e), x in sorted(seen.items(), key=lambda item: (item[0][1], item[0][0])):
            out.append(Rank(number, t, p, e, x))
            number += 1
    return out


def rank_folder(rank: Rank, mesh: Mesh) -> str:
    return f"mp_rank_{rank.tp:02d}" + (f"_{rank.pp:03d}" if mesh.pp > 1 else "") + (f"_{rank.ep:03d}" if mesh.ep > 1 else "")


def _recognise(folder: Path, names: set[str]) -> bool:
    return any(_RANK.fullmatch(name) for name in names) or (TRACKER in names and _root(folder) is not None)


def _root(folder: Path) -> Path | None:
    """The folder that holds mp_rank_…; None where there is none (a torch_dist checkpoint has the same tracker)."""
    if any(_RANK.fullmatch(path.name) for path in folder.iterdir()):
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file() or tracker.stat().st_size > 100:
        return None
    text = tracker.read_text().strip()
    if text != "release" and not text.isdigit():
        raise FormatError(f"{tracker} says {text!r}, expected a number or release")
    root = folder / ("release" if text == "release" else f"iter_{int(text):07d}")
    return root if root.is_dir() and any(_RANK.fullmatch(path.name) for path in root.iterdir()) else None


def _read(folder: Path) -> Contents:
    root = _root(folder)
    if root is None:
        raise FormatError(f"{folder} holds no mp_rank_… folders", "reshard reads Megatron's legacy format here (--ckpt-format torch)")
    names = sorted(path.name for path in root.iterdir() if _RANK.fullmatch(path.name))
    blobs, args = {}, {}
    for name in names:
        file = safe_join(folder, str((root / name / "model_optim_rng.pt").relative_to(folder)))
        if not file.is_file():
            raise FormatError(f"{file} is missing", "each mp_rank_… folder holds one")
        blob = torch_tree(file)
        if not isinstance(blob, dict) or not any(re.fullmatch(r"model\d*", str(key)) for key in blob):
            raise FormatError(f"{file} holds no model", "it should be a dict with model, args, checkpoint_version")
        version = blob.get("checkpoint_version", 0)
        if not isinstance(version, (int, float)) or version < 3:
            raise FormatError(f"{file} is of checkpoint_version {version}, whose query/key/value rows are ordered otherwise", "load and save it once with a current Megatron-LM (3.0)")
        blobs[name], args = blob, dict(vars(blob["args"])) if isinstance(blob.get("args"), argparse.Namespace) else args
    mesh = _mesh(folder, names, args)
    chunks = sorted((key for key in next(iter(blobs.values())) if re.fullmatch(r"model\d+", str(key))), key=lambda k: int(k[5:])) or ["model"]
    virtual = Mesh(mesh.tp, mesh.pp * len(chunks), mesh.ep, mesh.etp)
    ranks = mp_ranks(virtual)
    tensors, depth = [], defaultdict(set)
    for rank in ranks:
        chunk, stage = divmod(rank.pp, mesh.pp)  # virtual stage v·P + s lies in the files of stage s
        name = rank_folder(Rank(0, rank.tp, stage, rank.ep, rank.etp), mesh)
        if name not in blobs:
            raise FormatError(f"{root} has no {name}; its files say {mesh}", "copy the checkpoint again, whole")
        file = str((root / name / "model_optim_rng.pt").relative_to(folder))
        held = tensors_of(blobs[name].get(chunks[chunk]), file)
        held = {key.removeprefix("module."): at for key, at in held.items()}
        tensors.append(held)
        depth[rank.pp].update(int(match[1]) for key in held if (match := _LAYER.match(key)))
    manifest = read_manifest(folder)
    sizes = [len(depth[p]) for p in range(virtual.pp)]
    starts = [sum(sizes[:p]) for p in range(virtual.pp)]
    stages = [list(range(start, start + size)) for start, size in zip(starts, sizes)]
    return Contents(virtual, tensors, manifest and manifest.get("layout"), stages=stages, ignore=_IGNORE)


def _mesh(folder: Path, names: list[str], args: Mapping[str, object]) -> Mesh:
    """The mesh by the files' args, or where those are silent by the folders' names alone."""
    numbers = [tuple(int(n) for n in _RANK.fullmatch(name).groups() if n is not None) for name in names]
    most = [max(column) + 1 for column in zip(*numbers)] if len({len(n) for n in numbers}) == 1 else []
    if not most:
        raise FormatError(f"{folder}: folders {names[0]} and {names[-1]} are named for different meshes", "files of several checkpoints were mixed")
    tp, pp, ep = (args.get(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline", "expert"))
    if len(most) == 2 and (pp or 1) == 1 and (ep or 1) > 1:
        found = Mesh(most[0], 1, most[1])
    else:
        found = Mesh(*most)
    said = Mesh(tp or found.tp, pp or found.pp, ep or found.ep)
    if (said.tp, said.pp, said.ep) != (found.tp, found.pp, found.ep):
        raise FormatError(f"{folder} has folders of {found}, its args say {said}", "files are missing, or of several checkpoints")
    etp = args.get("expert_tensor_parallel_size") or 0
    return Mesh(said.tp, said.pp, said.ep, etp if etp != said.tp else 0)


def _write(target: Target, stored: list[Stored]) -> Folder:
    from reshard.stores import torchzip

    by_rank: dict[int, list[Stored]] = defaultdict(list)
    for s in stored:
        by_rank[s.rank].append(s)
    mesh, files = target.mesh, []
    args = argparse.Namespace(**megatron_args(target, stored))
    for rank in target.ranks:
        own = {s.name: s for s in by_rank[rank.number]}
        model = {s.name: torchzip.TensorSpec(s.name, s.dtype, s.shape) for s in own.values()}
        blob = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model}
        files.append(OutFile(f"release/{rank_folder(rank, mesh)}/model_optim_rng.pt", torchzip.compose(blob), own))
    return Folder(files, {TRACKER: b"release"})


def megatron_args(target: Target, stored: list[Stored]) -> dict[str, object]:
    """``args`` as Megatron's load_args_from_checkpoint reads them; what config.json does not say is left out."""
    layout, mesh = target.placement.layout, target.mesh
    rope = layout.config.get("rope_parameters") or {}
    scope = {"rope_theta": rope.get("rope_theta", 10000), "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, **layout.scope}
    table = ARGS | dict(target.placement.section.args)
    out = {}
    for name, text in table.items():
        out[name] = evaluate(text, scope)
    first = next((s for s in stored if s.rank == 0 and s.entry and s.entry.pad), None)
    if first is not None:
        out["padded_vocab_size"] = first.shape[0] * mesh.tp
    dtype = next((s.dtype for s in stored if s.dtype in ("BF16", "F16")), None)
    out |= {
        "tensor_model_parallel_size": mesh.tp, "pipeline_model_parallel_size": mesh.pp,
        "expert_model_parallel_size": mesh.ep, "expert_tensor_parallel_size": mesh.etp or mesh.tp,
        "virtual_pipeline_model_parallel_size": None,
        "ckpt_format": "torch", "use_distributed_optimizer": False, "bf16": dtype == "BF16", "fp16": dtype == "F16",
    }  # fmt: skip
    return out


FORMAT = Format("megatron", "megatron", Rules(mp_ranks, even_stages, local=True), _recognise, _read, _write,
                "Megatron-LM legacy checkpoint (mp_rank_XX/model_optim_rng.pt)")  # fmt: skip
