"""Megatron-Core's torch_dist: its own `dist_checkpointing` loads what reshard writes, on other meshes, and saves what reshard reads.

The truth on both sides is the Hugging Face folder: the model filled by Megatron computes transformers' logits, and its parameters on each rank
are those of the legacy files that reshard writes for the mesh (which check_engines.py proves by themselves). Layers are those of Megatron's
TransformerEngine spec, whose leaves need a GPU: plain ones of the same parameters stand in their place (`standins`).
"""

import argparse
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from frameworks import Differs, check

TITLE = "Megatron-Core torch_dist"
INSTALL = ("--no-deps", "megatron-core==0.19.2")
VERSIONS = ("megatron-core", "torch")
#: of families.toml, laid over; where it is written, where it is loaded
LLAMA, TIED, MOE, MLA, MTP = "llama", "qwen2_tied", "qwen3_moe", "deepseek_v3", "deepseek_v3 with a prediction layer"
MESHES = {
    LLAMA: [({"tp": 2}, {"tp": 1}), ({"tp": 1}, {"tp": 4}), ({"tp": 4, "pp": 2}, {"tp": 2}), ({"tp": 2}, {"pp": 2})],
    TIED: [({"tp": 2}, {"tp": 4}), ({"tp": 1}, {"pp": 2})],
    MOE: [({"tp": 2}, {"tp": 2, "ep": 2, "etp": 1}), ({"tp": 2, "ep": 2, "etp": 1}, {"tp": 1}), ({"tp": 2, "ep": 2}, {"tp": 2})],
    MLA: [({"tp": 1}, {"tp": 2}), ({"tp": 2, "ep": 2, "etp": 1, "pp": 2}, {"tp": 2, "ep": 2, "etp": 1})],
    MTP: [({"tp": 2}, {"tp": 1}), ({"tp": 1}, {"pp": 2}), ({"tp": 2, "ep": 2, "etp": 1}, {"tp": 2})],
}
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
SAVED = [
    (LLAMA, {"tp": 2}, {}), (TIED, {"tp": 2, "pp": 2}, {}), (LLAMA, {"tp": 2}, {"non_homogeneous_layers": True}),
    (LLAMA, {"tp": 2}, {"singleton_local_shards": True}), (MOE, {"tp": 2, "ep": 2, "etp": 1}, {}), (MOE, {"tp": 2}, {}),
    (MOE, {"tp": 2, "ep": 2, "etp": 1}, {"singleton_local_shards": True}), (MLA, {"tp": 2}, {}), (MLA, {"tp": 1, "pp": 2}, {}), (MTP, {"tp": 2}, {}), (MTP, {"tp": 1, "pp": 2}, {}),
]  # fmt: skip


def rows(scratch: Path, quick: bool) -> Iterator[dict]:
    import engines_megatron
    from engines_common import label
    from tiny_models import families

    engines_megatron.warm()
    table = families()
    for name, pairs in MESHES.items():
        folder = scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _alone(prepare, table[name.partition(" ")[0]]["config"] | ({"num_nextn_predict_layers": 1} if name == MTP else {}), folder)
        for written, there in pairs[:1] if quick else pairs:
            what = f"{name}: megatron-dist for {label(written)}, `dist_checkpointing.load` on {label(there)}"
            yield check(what, partial(_loads, folder, written, there, "hf"), partial(_loads, folder, written, there, "control"))
        for model, mesh, content in [each for each in SAVED if each[0] == name][: 1 if quick else None]:
            kind = " ".join(content) or "as it saves by itself"
            what = f"{name}: `dist_checkpointing.save` on {label(mesh)} ({kind}) → hf"
            yield check(what, partial(_saves, folder, mesh, content, "hf"), partial(_saves, folder, mesh, content, "control"))


def prepare(config: dict, folder: Path) -> None:
    """The family's checkpoint, with the prediction layer that its config.json promises and transformers does not build; the control's."""
    import torch
    from check_engines import reference
    from safetensors.torch import load_file, save_file
    from tiny_models import exchange, make

    reference(make(config, folder / "hf"), folder / "logits.pt")
    path, layers = folder / "hf" / "model.safetensors", config["num_hidden_layers"]
    held = load_file(path)
    for k in range(config.get("num_nextn_predict_layers") or 0):
        own, last = f"model.layers.{layers + k}.", f"model.layers.{layers - 1}."
        like = {own + name.removeprefix(last): tensor for name, tensor in held.items() if name.startswith(last)}
        width = len(held["model.norm.weight"])
        like |= {f"{own}{name}.weight": held["model.norm.weight"] for name in ("enorm", "hnorm", "shared_head.norm")}
        like[f"{own}eh_proj.weight"] = held["lm_head.weight"].new_zeros(width, 2 * width)
        held |= {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in like.items()}
    save_file(held, path, {"format": "pt"})
    exchange(folder / "hf", folder / "control")


def _alone(work, *args):
    """`work(*args)` in a process of its own, whose groups end with it."""
    from engines_common import forked

    result, error = forked(work, *args)()
    if error:
        raise RuntimeError(error[1])
    return result


def _group(work, mesh: dict, folder: Path, *args) -> list:
    """What `work` returns on each rank of `mesh`."""
    from engines_common import forked, label

    world = mesh.get("tp", 1) * mesh.get("pp", 1)
    meeting = folder / f"group-{label(mesh)}"
    shutil.rmtree(meeting, ignore_errors=True)
    meeting.mkdir()
    answers = [wait() for wait in [forked(work, rank, world, mesh, meeting, folder, *args, quiet=False) for rank in range(world)]]
    errors = [error[1] for _, error in answers if error]
    if errors:
        raise RuntimeError(min(errors, key=lambda text: "gloo" in text))  # the others only lost the one that failed
    return [result for result, _ in answers]


def _legacy(folder: Path, mesh: dict, source: str) -> None:
    """Megatron's older files of `source` for `mesh`."""
    from engines_common import label

    import reshard

    reshard.convert(folder / source, folder / f"{source}-{label(mesh)}", format="megatron", fsync=False, overwrite=True, **mesh)


def _loads(folder: Path, written: dict, there: dict, source: str) -> str:
    import reshard

    reshard.convert(folder / source, folder / "dist", format="megatron-dist", fsync=False, overwrite=True, **written)
    _alone(_legacy, folder, there, "hf")
    answers = _group(load, there, folder)
    wrong = [line for lines, _ in answers for line in lines]
    if wrong:
        raise Differs(f"{len(wrong)} tensors: {'; '.join(wrong[:4])}")
    return answers[0][1]


def load(rank: int, world: int, mesh: dict, meeting: Path, folder: Path) -> tuple[list[str], str]:
    """On one rank: the model that the files' args describe, made NaN and filled by Megatron's own loader. What differs, and what was found."""
    import engines_megatron as engine
    import torch
    from engines_common import label
    from megatron.core import dist_checkpointing

    release = folder / "dist" / "release"
    torch.cuda.current_device = lambda: "cpu"
    engine.on_the_cpu()
    common = dist_checkpointing.load_common_state_dict(str(release))
    legacy = engine.files(folder / f"hf-{label(mesh)}", mesh, rank)
    wanted, padded = legacy["model"], legacy["args"]["padded_vocab_size"]  # which the mesh decides, and not the files
    model = engine.build(vars(common["args"]) | {"padded_vocab_size": padded}, mesh, rank, world, meeting)
    vocabulary = json.loads((folder / "hf" / "config.json").read_text())["vocab_size"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    state = {"model": model.sharded_state_dict(metadata=dict(common["content_metadata"]))}
    state, unread, lacking = dist_checkpointing.load(state, str(release), strict="return_all")
    model.load_state_dict({name: value for name, value in state["model"].items() if value is not None}, strict=False)
    lines = [f"{name}: asked for, not in the files" for name in sorted(lacking)]
    lines += [f"{name}: in the files, and nobody asks for it" for name in sorted(unread) if "_extra_state" not in name]
    held = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor) and not engine.skipped(name)}
    for name in sorted(wanted.keys() | held.keys()):
        if name not in held or name not in wanted:
            lines.append(f"{name}: only in {'the model' if name in held else 'the files'}")
        elif name in VOCABULARY:
            first = rank % mesh.get("tp", 1) * len(held[name])
            rows = max(0, min(len(held[name]), vocabulary - first))
            held[name][rows:] = 0  # rows that no token has may be in no file
            if not torch.equal(held[name][:rows], wanted[name][:rows].float()):
                lines.append(f"rank {rank}: {name}")
        elif not torch.equal(held[name], wanted[name].float()):
            lines.append(f"rank {rank}: {name}")
    text = f"{len(held)} tensors of rank 0 equal"
    if mesh.get("pp", 1) == 1:  # on every rank, whatever one of them found: they compute together
        difference, largest = engine.computed(model, folder)
        if not difference <= engine.CLOSE * largest:
            lines.append(f"logits differ from transformers' by {difference:.3g}, of {largest:.3g}")
        text += f", logits within {difference / largest:.1e} of transformers'"
    torch.distributed.barrier()  # who leaves first would cut the others off
    return lines, text


def _saves(folder: Path, mesh: dict, content: dict, source: str) -> str:
    import torch
    from safetensors.torch import load_file

    import reshard
    from frameworks import same

    shutil.rmtree(folder / "saved", ignore_errors=True)
    (folder / "saved").mkdir()
    _alone(_legacy, folder, mesh, source)
    _group(save, mesh, folder, source, content)
    checkpoint = reshard.open(folder / "saved", config=folder / "hf")
    if checkpoint.format != "megatron-dist":
        raise Differs(f"read as {checkpoint.format}")
    reshard.convert(checkpoint, folder / "back", format="hf", fsync=False, overwrite=True)
    want, found = (load_file(folder / name / "model.safetensors") for name in ("hf", "back"))
    for name in want.keys() & found.keys():
        if found[name].dtype == torch.float32:  # Megatron keeps a router's bias so: every number of bfloat16 is one of float32
            want[name] = want[name].float()
    return same(want, found)


def save(rank: int, world: int, mesh: dict, meeting: Path, folder: Path, source: str, content: dict) -> None:
    """On one rank: the model filled with this rank's legacy file, and saved by Megatron's own writer."""
    import engines_megatron as engine
    import torch
    from engines_common import label
    from megatron.core import dist_checkpointing

    torch.cuda.current_device, torch.cuda.synchronize = lambda: "cpu", lambda: None
    engine.on_the_cpu()
    held = engine.files(folder / f"{source}-{label(mesh)}", mesh, rank)
    model = engine.build(held["args"], mesh, rank, world, meeting, torch.bfloat16)
    model.load_state_dict(held["model"], strict=False)
    for name, buffer in model.named_buffers():
        if name in held["model"]:
            buffer.data = held["model"][name].clone()  # a router's bias stays float32
    args = argparse.Namespace(**held["args"])
    state = {"model": model.sharded_state_dict(metadata=dict(content)), "args": args, "checkpoint_version": 3.0, "iteration": 7}
    dist_checkpointing.save(state, str(folder / "saved"), content_metadata=content)
    torch.distributed.barrier()
    for child in multiprocessing.active_children():  # Megatron's writers, which would outlive this process
        child.kill()
