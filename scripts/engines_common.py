"""What check_engines.py and its engines share: ranks forked from one process, and tensors compared."""

import json
import os
import select
import sys
import time
import traceback
from collections.abc import Collection

#: what became of one family on one mesh; only the first is a success, and the last three are no fault of reshard's files
EQUAL, DIFFERS, MISSED, REFUSED, FAILED, NO_LAYOUT, NOT_BUILT, NO_MODEL = (
    "equal", "differs", "control missed", "refused", "failed", "no layout", "not built", "no model")  # fmt: skip
FAULTS = (DIFFERS, MISSED, REFUSED, FAILED)


class NotBuilt(Exception):
    """The engine cannot build the model here."""


def forked(work, *args, seconds: float = 300, quiet: bool = True):
    """Start `work(*args)` in a forked process. Calling what is returned waits and gives (result, None) or (None, (kind, text))."""
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        os.close(read)
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
        try:
            answer = [work(*args), None]
        except NotBuilt as error:
            answer = [None, [NOT_BUILT, str(error)]]
        except BaseException as error:  # noqa: BLE001  what a rank dies of is the finding
            kind = type(error).__name__
            text = str(error) if any(c.__name__ == "ReshardError" for c in type(error).__mro__) else traceback.format_exc()
            answer = [None, [kind, text]]
        with os.fdopen(write, "w") as pipe:
            pipe.write(json.dumps(answer))
        sys.stdout.flush()
        os._exit(0)
    os.close(write)

    def wait():
        text, until = b"", time.monotonic() + seconds
        while True:
            ready, _, _ = select.select([read], [], [], max(0, until - time.monotonic()))
            piece = os.read(read, 1 << 16) if ready else b""
            text += piece
            if not piece:
                break
        if not ready:
            os.kill(pid, 9)
        os.close(read)
        _, status = os.waitpid(pid, 0)
        if not text:
            return None, ["died", f"after {seconds} s" if not ready else f"of signal {status & 127}"]
        return json.loads(text)

    return wait


def label(mesh: dict) -> str:
    return "·".join(f"{key}{size}" for key, size in mesh.items() if size > 1) or "tp1"


def differences(engine: dict, files: dict, before: dict | None = None, computed: Collection[str] = ()) -> list[str]:
    """What the engine's tensors and the files' disagree in, a line each; `before`: the engine's, before anything was loaded. Floats
    of the names in `computed`, which both sides compute from another tensor, may differ by one unit in the last place: exp is
    rounded otherwise by each library."""
    import torch

    lines = []
    for name in sorted(engine.keys() | files.keys()):
        a, b = engine.get(name), files.get(name)
        if a is None or b is None:
            lines.append(f"{name} {list((b if a is None else a).shape)}: only {'in the files' if a is None else 'in the engine'}")
        elif a.shape != b.shape:
            lines.append(f"{name}: {list(a.shape)} in the engine, {list(b.shape)} in the files")
        elif a.dtype != b.dtype:
            lines.append(f"{name}: {a.dtype} in the engine, {b.dtype} in the files")
        elif name in computed and a.dtype == torch.float32 and int((a.view(torch.int32) - b.view(torch.int32)).abs().max()) <= 1:
            continue
        elif not torch.equal(raw(a), raw(b)):
            other = int((raw(a).view(-1, a.element_size()) != raw(b).view(-1, a.element_size())).any(-1).sum())
            untouched = before is not None and name in before and torch.equal(raw(before[name]), raw(a))
            lines.append(f"{name}: {other} of {a.numel()} elements differ{', which the engine did not load' * untouched}")
    return lines


def what_is_computed(source, job) -> dict[str, str]:
    """Of a conversion's stored tensors, those that are computed, and those whose dtype has fewer bits than the model's: name →
    the function's name, or the dtype."""
    from reshard.dtypes import DTYPE_SIZE
    from reshard.planner.values import bare

    own = {key: s.dtype for s in source.stored for key, _ in s.blocks}
    out = {}
    for s in job.plan.destinations:
        for key, _ in s.blocks:
            if bare(key[0]) != key[0]:
                out[s.name] = key[0].partition("(")[0]
            elif DTYPE_SIZE[s.dtype] < DTYPE_SIZE[own.get(key, s.dtype)]:
                out[s.name] = s.dtype
    return out


def raw(tensor):
    """Its bytes."""
    import torch

    return tensor.detach().contiguous().view(-1).view(torch.uint8) if tensor.dim() else tensor.detach().reshape(1).view(torch.uint8)
