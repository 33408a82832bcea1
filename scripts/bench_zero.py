"""Time ZeRO → HF against DeepSpeed's own ``zero_to_fp32``, alternating in one run, and print ratios and peak memory as a Markdown table.

    python scripts/bench_zero.py FOLDER --python ENV/bin/python [--layers 5] [--ranks 4] [--runs 3]

ENV has deepspeed. Makes fp32 partitions of Llama-1B's shape in FOLDER (3.3 GB at 5 layers) as ZeRO-2 and ZeRO-3 write them, without Adam's
moments, which neither reads. *Inside*: without the start of Python and its imports. Memory is the peak of resident pages; what of
them is the file's own, mapped, is counted for whoever maps it. Not timed: that both write the same bytes is checked.
"""

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from bench_convert import RESHARD, Timing, measure, ratio

T = TypeVar("T")
PEER = """import contextlib, io, json, sys, time
with contextlib.redirect_stdout(io.StringIO()):
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert
    began = time.perf_counter()
    convert(sys.argv[1], sys.argv[2], safe_serialization=True)
print(json.dumps({"seconds": time.perf_counter() - began}))"""


def elsewhere(function: Callable[..., T], *args: object) -> T:
    """In a process of its own: what this one holds would be counted for those that it starts."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def source(root: Path, layers: int) -> int:
    from bench_checkpoint import make

    return make(root, layers)


def partition(hf: Path, run: Path, stage: int, world: int) -> int:
    """The checkpoint in `hf` as `world` ranks' fp32 partitions; returns their bytes."""
    import torch
    from safetensors import safe_open

    tag = run / "global_step1"
    tag.mkdir(parents=True)
    (run / "latest").write_text("global_step1")
    shutil.copy(hf / "config.json", run)
    files = [safe_open(path, "pt") for path in sorted(hf.glob("*.safetensors"))]
    held = {name: file for file in files for name in file.keys()}
    shapes = {name: torch.Size(file.get_slice(name).get_shape()) for name, file in held.items()}
    if stage == 3:
        sizes = {name: -(-prod(shape) // world) for name, shape in shapes.items()}
    total = sum(sizes.values()) if stage == 3 else -(-sum(map(prod, shapes.values())) // world)
    for rank in range(world):
        flat, at = torch.zeros(total), 0
        for name, shape in shapes.items():
            low, high = (rank * sizes[name], (rank + 1) * sizes[name]) if stage == 3 else (rank * total - at, (rank + 1) * total - at)
            if low < prod(shape) and high > 0:
                own = held[name].get_tensor(name).flatten()[max(low, 0) : high]
                begin = at if stage == 3 else max(at - rank * total, 0)
                flat[begin : begin + len(own)] = own
            at += sizes[name] if stage == 3 else prod(shape)
        state = {"zero_stage": stage, "partition_count": world}
        state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"] = [flat]
        torch.save({"optimizer_state_dict": state}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3 or rank == 0:
            module = {name: torch.empty(0, dtype=torch.bfloat16) if stage == 3 else held[name].get_tensor(name) for name in shapes}
            model = {"module": module, "buffer_names": [], "param_shapes": [shapes], "shared_params": {}, "frozen_param_shapes": None,
                     "frozen_param_fragments": None, "dp_world_size": world, "mp_world_size": 1, "ds_version": "0.19.8"}  # fmt: skip
            del flat, state
            torch.save(model, tag / (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"))
    return sum(path.stat().st_size for path in tag.iterdir())


def same(a: Path, b: Path) -> bool:
    """Whether two folders of safetensors hold the same tensors, one at a time."""
    import torch
    from safetensors import safe_open

    sides = [
        {name: file for path in sorted(folder.glob("*.safetensors")) for file in [safe_open(path, "pt")] for name in file.keys()}
        for folder in (a, b)
    ]
    return sides[0].keys() == sides[1].keys() and all(torch.equal(*(side[name].get_tensor(name) for side in sides)) for name in sides[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default=sys.executable, help="of an environment with deepspeed")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    elsewhere(source, args.folder / "hf", args.layers)
    print(f"{os.cpu_count()} cores, {args.ranks} ranks, {args.runs} alternating runs; median (best)\n")
    print("| conversion | size | reshard | inside | zero_to_fp32 | inside | ratio | ratio inside | peak memory | zero_to_fp32's |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for stage in (2, 3):
        run, out, theirs = args.folder / f"zero{stage}", args.folder / "out", args.folder / "theirs"
        size = elsewhere(partition, args.folder / "hf", run, stage, args.ranks)
        ours, peer = Timing(), Timing()
        for _ in range(args.runs):
            measure([args.python, "-c", PEER, str(run), str(theirs)], theirs, peer)
            measure([*RESHARD, "convert", str(run), str(out), "--to", "hf", "--dtype", "fp32", "--no-fsync", "--json"], out, ours)
        cells = [f"{statistics.median(times):.2f} s" for times in (ours.whole, ours.inside, peer.whole, peer.inside)]
        equal = "" if elsewhere(same, out, theirs) else " **DIFFERS**"
        print(f"| ZeRO-{stage} → HF fp32{equal} | {size / 1e9:.2f} GB | {' | '.join(cells)} | {ratio(ours.whole, peer.whole)} | {ratio(ours.inside, peer.inside)} "
              f"| {ours.peak / 1e6:.0f} MB | {peer.peak / 1e6:.0f} MB |", flush=True)  # fmt: skip
        for folder in (run, out, theirs):
            shutil.rmtree(folder)
    shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
