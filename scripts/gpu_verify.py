"""The proof by forward on a GPU, for gpu_check.py."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_common import Bench, gb, last, reshard


def cuts(b: Bench) -> dict[str, list[str]]:
    return {
        "vllm-tp4": ["--to", "vllm", "--tp", "4"],
        "megatron-tp2pp2": ["--to", "megatron", "--tp", "2", "--pp", "2"],
        "vllm-tp1": ["--to", "vllm"],
    }


def verify(b: Bench) -> None:
    """The proof by forward, of every cut, in both dtypes; what it must refuse; three at a time."""
    folder = b.model()
    for name, options in cuts(b).items():
        if not (b.work / name).exists():
            reshard("convert", folder, b.work / name, *options, "-q")
    ways = [(name, ["--dtype", kind], {}) for kind in ("fp32", "bf16") for name in cuts(b)]
    ways += [("vllm-tp4", ["--low-memory"], {}), ("vllm-tp4", ["--method", "permute"], {})]
    ways += [("vllm-tp4", [], {"NVIDIA_TF32_OVERRIDE": "1"})] if b.cuda else []
    with ThreadPoolExecutor(b.at_once(3, 14e9)) as pool:
        list(pool.map(lambda way: _verify(b, folder, *way), ways))


def _verify(b: Bench, folder: Path, name: str, options: list[str], more: dict[str, str]) -> None:
    case = " ".join([name, *options, *(f"{k}={v}" for k, v in more.items())])
    done = reshard("verify", b.work / name, "--reference", folder, "--device", b.device.type, "--json", *options, **more)
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        found = {}
    if more:
        refused = done.returncode not in (0, 3) and "TF32" in done.stdout + done.stderr
        b.row(case, f"exit code {done.returncode}: {found.get('error') or last(done)}"[:300], "refused", refused)
        return
    if "passed" not in found:
        b.row(case, f"exit code {done.returncode}: {found.get('error') or last(done)}"[:300], "passed", False)
        return
    relative = float("inf") if found["max_abs_diff"] is None else found["max_abs_diff"] / (found["max_abs_logit"] or 1)
    peak = max((rank["peak_bytes"] for rank in found["ranks"]), default=0)
    where = f"{found['device']}, {found['backend']}, {found['nproc']} ranks, up to {found['ranks_per_device']} to a device"
    missed = [control["name"] for control in found["controls"] if control["passed"]]
    controls = len(found["controls"])
    value = ("passed" if found["passed"] else "NOT PASSED") + f": {relative:.2g} of the largest logit; "
    value += f"{controls - len(missed)} of {controls} defects found; "
    value += f"{found['seconds']:.1f} s; peak {gb(peak)}; {where}"
    passed = found["passed"] and not done.returncode and found["device"] == b.device.type
    b.row(case, value, "passed", passed, relative=relative, seconds=found["seconds"], peak=peak, precision=found.get("precision"))
