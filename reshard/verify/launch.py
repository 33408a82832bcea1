"""Start the processes of a verification, or be one of those that torchrun started."""

import itertools
import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from reshard import formats
from reshard.errors import FormatError, ReshardError
from reshard.formats.manifest import read_manifest
from reshard.verify.request import Request
from reshard.verify.watch import Stopped, Watch, die_with, first_line

#: seconds that ranks are given to end after the first did, so that a killed one is found among those that lost it
GRACE = 2.0
_RUNS = itertools.count()  # a script may verify several checkpoints under one rendezvous


def run_here(request: Request):
    """Be the rank that torchrun's environment says. Returns the Report on rank 0, None on the others."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    return _in_group(request, int(os.environ["RANK"]), world, local, int(os.environ.get("LOCAL_WORLD_SIZE", str(world))), "env://")


def under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def run_processes(request: Request, count: int):
    """Run `count` ranks as processes of this machine, and return their Report. A rank that dies ends the others, and so does the
    end of this process, however it comes."""
    context = multiprocessing.get_context("forkserver")
    # one process imports torch and transformers, and the ranks are forked from it
    multiprocessing.set_forkserver_preload(["reshard.verify.run", *_modeling(request)])
    outbox, inbox = context.Pipe(duplex=False)
    lifeline, held = context.Pipe(duplex=False)  # `held` stays open as long as this process lives
    ranks: list = []
    with tempfile.TemporaryDirectory(prefix="reshard-verify-") as folder:
        try:
            for number in range(count):
                rank = context.Process(
                    target=_process, args=(number, request, count, folder, inbox, lifeline), name=f"rank {number}", daemon=True
                )
                rank.start()
                ranks.append(rank)  # one that did not start cannot be killed
            inbox.close()
            outcome = _result(ranks, outbox, Path(folder))
        finally:
            for rank in ranks:
                rank.kill()  # without effect on those that are done
                rank.join()
            held.close()
            lifeline.close()
            outbox.close()
    if isinstance(outcome, ReshardError):
        raise outcome
    return outcome


def _result(ranks: list, outbox, folder: Path):
    """What rank 0 sends, when all ranks are done. Raises ReshardError that names the rank which stopped first."""
    running = {rank.sentinel: rank for rank in ranks}
    outcome, listening = None, [outbox]
    while running:
        for ready in wait([*running, *listening]):
            if ready is outbox:
                listening = []
                with suppress(EOFError):
                    outcome = outbox.recv()
            else:
                rank = running.pop(ready)
                rank.join()
                if rank.exitcode:
                    raise _first_stop(ranks, folder)
    return outcome


def _first_stop(ranks: list, folder: Path) -> ReshardError:
    """What stopped the rank that stopped first; the others only lost their connection to it.

    A rank that is killed says nothing, and its peers may be seen to end before it: so whoever ends soon is waited for.
    """
    until = time.monotonic() + GRACE
    while not (killed := [number for number, rank in enumerate(ranks) if (rank.exitcode or 0) < 0]) and time.monotonic() < until:
        if all(rank.exitcode is not None for rank in ranks):
            break
        time.sleep(0.02)
    if killed:
        number = killed[0]
        name = signal.Signals(-ranks[number].exitcode).name
        hint = "the system kills what takes too much memory (see `dmesg`): try --low-memory, or --dtype bf16" if name == "SIGKILL" else None
        return ReshardError(f"rank {number} was killed by {name}", hint)
    stopped = sorted(folder.glob("*.stopped"), key=lambda path: path.stat().st_mtime_ns)
    if not stopped:
        number = next((number for number, rank in enumerate(ranks) if rank.exitcode), 0)
        return ReshardError(f"rank {number} stopped with exit code {ranks[number].exitcode}")
    text = stopped[0].read_text(encoding="utf-8")
    error = ReshardError(f"rank {stopped[0].stem} stopped: {first_line(text)}", "run with -v for all it said")
    error.__cause__ = RuntimeError(text)
    return error


def _process(number: int, request: Request, count: int, folder: str, inbox, lifeline) -> None:
    from reshard.verify.group import is_agreed

    die_with(lifeline)
    tempfile.tempdir = folder  # whatever is left there goes with it
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one machine need no name of it
    try:
        outcome = _in_group(request, number, count, number, count, f"file://{folder}/rendezvous")
    except Stopped:
        os._exit(1)  # the one that stopped first has said why
    except BaseException as error:  # noqa: BLE001  the process ends here, at once: a device or a socket may never let go
        if is_agreed(error):
            outcome = error
        else:
            text = f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}"
            (Path(folder) / f"{number}.stopped").write_text(text, encoding="utf-8", errors="backslashreplace")
            os._exit(1)
    if number == 0:
        inbox.send(outcome)


def _in_group(request: Request, number: int, world: int, local: int, locals_: int, rendezvous: str):
    """Meet the other ranks, agree on devices and the backend, and verify. An error on one rank reaches all of them."""
    import torch.distributed as dist

    from reshard.verify.devices import agree, backend, describe
    from reshard.verify.group import SILENCE, is_agreed
    from reshard.verify.run import verify_rank

    store, number, world = next(dist.rendezvous(rendezvous, number, world))
    store = dist.PrefixStore(f"reshard-verify-{next(_RUNS)}", store)
    devices = agree(store, describe(request.device, number, local), world)
    store.set_timeout(SILENCE)
    dist.init_process_group(backend(devices), store=store, timeout=SILENCE, world_size=world, rank=number)
    with Watch(store, number, _abort) as watch:
        try:
            report = verify_rank(request, number, world, local, locals_, devices)
        except BaseException as error:
            if is_agreed(error):
                dist.destroy_process_group()
                raise
            watch.tell(error)
            _abort()
            if isinstance(error, Exception):
                raise watch.translated(error) from error
            raise
        dist.destroy_process_group()
        return report


def _abort() -> None:
    """Free this rank from whatever it waits for in NCCL, and its peers; over gloo they hear of it as sockets close."""
    import torch.distributed as dist

    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if abort is not None and dist.is_initialized() and dist.get_backend() == "nccl":
        with suppress(Exception):
            abort()


def _modeling(request: Request) -> list[str]:
    """The module that transformers defines the reference's model in, to be imported once for all ranks."""
    try:
        kind = json.loads((request.reference / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [f"transformers.models.{kind}.modeling_{kind}"] if isinstance(kind, str) and kind.isidentifier() else []


def check_reference(folder: Path) -> None:
    """Raise FormatError unless `folder` is a Hugging Face checkpoint: transformers would take others for something else."""
    kind = formats.recognise(folder, read_manifest(folder)).name
    if kind != "hf":
        raise FormatError(f"--reference {folder} is of format {kind}", "name the folder of the original Hugging Face checkpoint")
    if not (folder / "config.json").is_file():
        raise FormatError(f"--reference {folder} has no config.json", "transformers makes the model by it; download it too")
