"""Time DCP → Hugging Face beside torch's own tool, dcp_to_torch_save, in turn: seconds and peak memory of each as a process.

python scripts/bench_dcp.py FOLDER [LAYERS]    (16 layers: 3.0 GB of weights, four times that of disk)
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
    """Seconds, and MB of memory at the most."""
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1e3


def main() -> None:
    folder, layers = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16
    shutil.rmtree(folder, ignore_errors=True)
    size = make(folder / "hf", layers)
    reshard.convert(folder / "hf", folder / "dcp", format="dcp", tp=RANKS)
    theirs = [
        "-c",
        f"from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as f; f({str(folder / 'dcp')!r}, {str(folder / 'out.bin')!r})",
    ]
    tools = {
        "reshard convert --to hf": ["-m", "reshard", "convert", str(folder / "dcp"), str(folder / "out"), "--to", "hf", "--no-fsync", "--overwrite"],
        "torch dcp_to_torch_save": theirs,
    }  # fmt: skip
    print(f"{size / 1e9:.1f} GB, {RANKS} ranks\n\n| tool | seconds, {TURNS} turns | peak memory |\n| --- | --- | --- |")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
    for _ in range(TURNS):
        for name, command in tools.items():
            times[name].append(measured(command))
            (folder / "out.bin").unlink(missing_ok=True)
    for name, rows in times.items():
        print(f"| {name} | {', '.join(f'{seconds:.1f}' for seconds, _ in rows)} | {max(memory for _, memory in rows):.0f} MB |")
    print(f"\nequal: {bool(reshard.diff(folder / 'hf', folder / 'out'))}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
