"""One module per framework for check_frameworks.py.

A section is a module with

- ``TITLE``: the framework, as the table calls it;
- ``INSTALL``: what ``pip install`` is given in an environment of its own, () where this one has all it needs;
- ``VERSIONS``: distributions whose versions the table names;
- ``rows(scratch, quick)``: a generator of ``row(…)``, each made by ``check``. It runs in that environment, with this checkout's reshard.

``check`` runs what a row stands for, and a control: the same with something wrong in it, which must be told apart.
"""

import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SAMPLES = Path(__file__).resolve().parents[3] / "shared" / "samples"
#: what became of a row; only the first is a success
EQUAL, DIFFERS, MISSED, FAILED = "equal", "differs", "control missed", "failed"


class Differs(Exception):
    """What was to be equal is not; the message says how."""


def check(what: str, run: Callable[[], str], control: Callable[[], object] | None = None) -> dict:
    """One row: `run` returns what was found equal, or raises Differs; `control` must raise Differs or a ReshardError."""
    from reshard.errors import ReshardError

    began, out = time.monotonic(), {"what": what, "status": EQUAL, "control": "none"}
    try:
        out["detail"] = run()
        if control is not None:
            try:
                control()
                out |= {"status": MISSED, "control": "NOT SEEN"}
            except (Differs, ReshardError) as error:
                out["control"] = f"told apart: {str(error).splitlines()[0][:160]}"
    except Differs as error:
        out |= {"status": DIFFERS, "detail": str(error)}
    except Exception:  # noqa: BLE001  whatever a framework dies of is the row's finding
        out |= {"status": FAILED, "detail": traceback.format_exc()[-1500:]}
    return out | {"seconds": round(time.monotonic() - began, 1)}


def on_ranks(size: int, function: Callable, *args) -> list:
    """What `function(rank, *args)` returns on each of `size` processes of one gloo group, in order. `function` stands in a module."""
    import tempfile

    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (size, folder, function, args), size, start_method="spawn")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, function: Callable, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(rank, *args)))
    torch.distributed.destroy_process_group()


def unlike(want: dict, found: dict) -> list[str]:
    """The names under which two state dicts hold other bits."""
    import torch

    names = sorted(want.keys() | found.keys())
    return [n for n in names if n not in want or n not in found or want[n].dtype != found[n].dtype or not torch.equal(want[n], found[n])]


def same(want: dict, found: dict) -> str:
    """The row's words for two state dicts that are equal bit for bit. Raises Differs."""
    other = unlike(want, found)
    if other:
        raise Differs(f"{len(other)} of {len(want)} tensors differ: {', '.join(other[:5])}")
    return f"{len(want)} tensors, {sum(t.nbytes for t in want.values()):,} bytes, bit for bit"
