"""Start the processes of a verification, or be one of those that torchrun started."""

import json
import logging
import os
import tempfile
from pathlib import Path

from reshard import formats
from reshard.errors import FormatError, ReshardError
from reshard.verify.request import Request


def run_here(request: Request):
    """Be the rank that torchrun's environment says. Returns the Report on rank 0, None on the others."""
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0"))
    return _in_group(request, int(os.environ["RANK"]), world, local, int(os.environ.get("LOCAL_WORLD_SIZE", str(world))), "env://")


def under_torchrun() -> bool:
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def run_processes(request: Request, count: int):
    """Run `count` ranks as processes of this machine, and return their Report. A rank that dies ends the others."""
    import multiprocessing

    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells of every rank that it ends
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one machine need no name of it
    # one process imports torch and transformers, and the ranks are forked from it
    multiprocessing.set_forkserver_preload(["reshard.verify.run", *_modeling(request)])
    outbox, inbox = multiprocessing.get_context("forkserver").Pipe(duplex=False)
    outcome = None
    with tempfile.TemporaryDirectory(prefix="reshard-verify-") as folder:
        ranks = start_processes(_process, (request, count, folder, inbox), count, join=False, start_method="forkserver")
        inbox.close()
        done = False
        try:
            while not done:
                done = ranks.join(timeout=0.1)
                if outcome is None and outbox.poll():
                    outcome = outbox.recv()
        except EOFError:
            pass
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise _first_stop(Path(folder), error) from error
    if isinstance(outcome, ReshardError):
        raise outcome
    return outcome


def _process(number: int, request: Request, count: int, folder: str, inbox) -> None:
    try:
        report = _in_group(request, number, count, number, count, f"file://{folder}/rendezvous")
    except ReshardError as error:
        report = error
    except Exception as error:
        (Path(folder) / f"{number}.stopped").write_text(f"{type(error).__name__}: {error}")
        raise
    if number == 0:
        inbox.send(report)


def _first_stop(folder: Path, error: Exception) -> ReshardError:
    """What stopped the rank that stopped first; the others only lost their connection to it."""
    stopped = sorted(folder.glob("*.stopped"), key=lambda path: path.stat().st_mtime_ns)
    rank, text = (stopped[0].stem, stopped[0].read_text()) if stopped else (error.error_index, str(error))
    return ReshardError(f"rank {rank} stopped: {text.strip().splitlines()[-1]}", "run with -v for all it said")


def _in_group(request: Request, number: int, world: int, local: int, locals_: int, rendezvous: str):
    import torch
    import torch.distributed as dist

    from reshard.verify.group import SILENCE
    from reshard.verify.run import verify_rank

    if request.device == "cuda" and not torch.cuda.is_available():
        raise FormatError("--device cuda, but torch sees no GPU here", "use --device cpu")
    enough = request.device == "cuda" and torch.cuda.device_count() >= locals_  # NCCL wants a device for each rank
    dist.init_process_group("nccl" if enough else "gloo", rendezvous, timeout=SILENCE, world_size=world, rank=number)
    try:
        return verify_rank(request, number, world, local, locals_)
    finally:
        dist.destroy_process_group()


def _modeling(request: Request) -> list[str]:
    """The module that transformers defines the reference's model in, to be imported once for all ranks."""
    try:
        kind = json.loads((request.reference / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [f"transformers.models.{kind}.modeling_{kind}"] if isinstance(kind, str) and kind.isidentifier() else []


def check_reference(folder: Path) -> None:
    """Raise FormatError unless `folder` is a Hugging Face checkpoint: transformers would take others for something else."""
    kind = formats.recognise(folder).name
    if kind != "hf":
        raise FormatError(f"--reference {folder} is of format {kind}", "name the folder of the original Hugging Face checkpoint")
    if not (folder / "config.json").is_file():
        raise FormatError(f"--reference {folder} has no config.json", "transformers makes the model by it; download it too")
