"""check_engines.py without an engine: each family through every format that its layout has, and back, byte for byte.

The original is transformers' own file; what comes back is read with safetensors. Which formats a layout has is asked of reshard; that
each of them is right is the engines' business.
"""

import shutil
import time
from pathlib import Path

FORMAT = "files"
CPU = {"engine_platform": "cpu"}  # the one that is judged beside vLLM
TARGETS = ({"format": "dcp", "tp": 2}, {"format": "tp", "tp": 3}, {"format": "rank-pt", "tp": 2}, {"format": "vllm", "tp": 2, **CPU}, {"format": "vllm", "tp": 4, **CPU},
           {"format": "vllm", "tp": 2, "ep": 2, **CPU}, {"format": "sglang", "tp": 2}, {"format": "megatron", "tp": 2},
           {"format": "megatron", "tp": 2, "pp": 2}, {"format": "megatron", "tp": 2, "ep": 2, "etp": 1}, {"format": "megatron-dist", "tp": 2},
           {"format": "megatron-dist", "tp": 2, "ep": 2, "etp": 1})  # fmt: skip


def warm() -> None:
    import importlib

    import torch

    torch.set_num_threads(1)
    for module in ("transformers.models.auto.modeling_auto", "transformers.modeling_utils", "safetensors.torch", "reshard.api",
                   "reshard.conversion.transaction"):  # fmt: skip
        importlib.import_module(module)


def release() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def check(name: str, family: dict, engine, folder: Path, quick: bool) -> list[dict]:
    from check_engines import prepare
    from engines_common import DIFFERS, EQUAL, FAILED, MISSED, NO_LAYOUT, NO_MODEL, REFUSED, forked

    control, error = forked(prepare, family["config"], folder)()
    if error:
        return [{"family": name, "mesh": "", "status": NO_MODEL, "detail": [error[1].strip().splitlines()[-1]]}]
    rows = []
    for target in TARGETS:
        if target.get("ep") and not family.get("experts"):
            continue
        began = time.monotonic()
        sizes = "·".join(f"{key}{size}" for key, size in target.items() if key in ("tp", "pp", "ep") and size > 1)
        row = {
            "family": name,
            "model_type": family["config"]["model_type"],
            "format": target["format"],
            "mesh": f"{target['format']} {sizes}",
        }
        result, error = forked(there_and_back, folder, target)()
        if error:
            known = "no layout descriptor" in error[1] or "says nothing of format" in error[1]
            status = NO_LAYOUT if known else FAILED if "Traceback" in error[1] else REFUSED
            row |= {"status": status, "detail": error[1].strip().splitlines()[:1] if known else error[1].strip().splitlines()[-8:]}
        else:
            status = DIFFERS if result["differences"] else MISSED if control and not result["control"] else EQUAL
            row |= {
                "status": status,
                "detail": result["differences"][:20],
                "computed": result["computed"],
                "tensors": result["tensors"],
                "bytes": result["bytes"],
            }
        rows.append(row | {"seconds": round(time.monotonic() - began, 2)})
    return rows


def there_and_back(folder: Path, target: dict) -> dict:
    import torch
    from engines_common import differences, what_is_computed
    from safetensors.torch import load_file

    import reshard

    def whole(path: Path) -> dict:
        return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}

    for left in ("there", "back"):
        shutil.rmtree(folder / left, ignore_errors=True)
    source = reshard.open(folder / "hf")
    kept = what_is_kept(source, what_is_computed(source, job := reshard.plan(source, **target)), job)
    reshard.convert(source, folder / "there", fsync=False, **target)
    reshard.convert(reshard.open(folder / "there", format=target["format"]), folder / "back", format="hf", fsync=False)
    original, back = whole(folder / "hf"), whole(folder / "back")
    changed = {
        name: how
        for name, how in kept.items()
        if name in back and not torch.equal(original[name], back[name]) and alike(original[name], back[name], how)
    }
    back |= {name: original[name] for name in changed}
    control = len(differences(whole(folder / "control"), back)) if (folder / "control").is_dir() else 0
    return {
        "differences": differences({name: t for name, t in original.items() if name not in job.left_out}, back),
        "left_out": len(job.left_out),
        "computed": changed,
        "control": control,
        "tensors": len(back),
        "bytes": sum(t.nbytes for t in back.values()),
    }


def what_is_kept(source, computed: dict, job) -> dict[str, str]:
    """Of the original's tensors, those that the format holds as another's value or in fewer bits: name → the function or dtype."""
    from reshard.planner.values import bare

    how = {bare(key[0]): computed[s.name] for s in job.plan.destinations if s.name in computed for key, _ in s.blocks}
    return {s.name: how[key[0]] for s in source.stored for key, _ in s.blocks if key[0] in how}


def alike(one, other, how: str) -> bool:
    """Whether two tensors are the same to a format that holds them so: no more than that can come back."""
    import torch

    held = {"minus_exp": lambda t: -torch.exp(t.double()).float(), "plus_one": lambda t: t.float() + 1, "minus_one": lambda t: t.float() - 1,
            "BF16": lambda t: t.bfloat16(), "F16": lambda t: t.half()}  # fmt: skip
    return how in held and one.shape == other.shape and torch.equal(held[how](one), held[how](other))
