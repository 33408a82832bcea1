"""Time distributed checkpoints → Hugging Face beside the frameworks' own tools, in turn: seconds and peak memory of each as a process.

python scripts/bench_dcp.py FOLDER [LAYERS]    (16 layers: 3.0 GB of weights, five times that of disk)
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from bench_checkpoint import make

import reshard

RANKS, TURNS = 4, 3


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds, and MB of memory at the most. `command` begins with a program."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1e3


def in_turn(tools: dict[str, list[str]], results: list[Path]) -> None:
    """Run `tools` in turn, and print a table; `results` are removed after each, but for the last turn's."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
    for turn in range(TURNS):
        for name, command in tools.items():
            times[name].append(measured(command))
            for path in results if turn < TURNS - 1 else ():
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    print(f"| tool | seconds, {TURNS} turns | peak memory |\n| --- | --- | --- |")
    for name, rows in times.items():
        print(f"| {name} | {', '.join(f'{seconds:.1f}' for seconds, _ in rows)} | {max(memory for _, memory in rows):.0f} MB |", flush=True)


def convert(source: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "reshard", "convert", str(source), str(out), "--to", "hf", "--no-fsync", "--overwrite", *more]


def theirs(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def main() -> None:
    folder, layers = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16
    shutil.rmtree(folder, ignore_errors=True)
    size = make(folder / "hf", layers)
    dcp, shards, out = folder / "dcp", folder / "shards", folder / "out"
    reshard.convert(folder / "hf", dcp, format="dcp", tp=RANKS)
    reshard.convert(folder / "hf", shards, format="transformers", tp=RANKS)
    print(f"{size / 1e9:.1f} GB, {RANKS} ranks\n\nFrom .distcp:\n")
    formats = "torch.distributed.checkpoint"
    in_turn(
        {
            "reshard convert --to hf": convert(dcp, out),
            "torch dcp_to_torch_save": theirs(
                f"from {formats}.format_utils import dcp_to_torch_save as f; f({str(dcp)!r}, {str(folder / 'b')!r})"
            ),
            "accelerate merge_fsdp_weights": theirs(
                f"from accelerate.utils import merge_fsdp_weights as f; f({str(dcp)!r}, {str(folder / 'c')!r})"
            ),
        },
        [folder / "b", folder / "c"],
    )
    print(f"\nequal: {bool(reshard.diff(folder / 'hf', out))}\n\nFrom sharded safetensors:\n")
    for path in (folder / "b", folder / "c", out):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    module = f"{formats}._consolidate_hf_safetensors"
    in_turn(
        {
            "reshard convert --to hf": convert(shards, out),
            "torch consolidate_safetensors_files_on_every_rank": theirs(
                f"from {module} import consolidate_safetensors_files_on_every_rank as f; from safetensors import safe_open; import glob; "
                f"names = [n for p in glob.glob({str(shards / '*.safetensors')!r}) for n in safe_open(p, 'pt').keys()]; "
                f"f({str(shards)!r}, {str(folder / 'b')!r}, dict.fromkeys(names, 1), num_threads=2)"
            ),
        },
        [folder / "b"],
    )
    print(f"\nequal: {bool(reshard.diff(folder / 'hf', out))}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
