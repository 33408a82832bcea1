"""Worlds of real processes that verify one checkpoint after another: torch and transformers are imported once, ranks are forked."""

import atexit
import multiprocessing
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from reshard.errors import ReshardError
from reshard.verify.report import Report
from reshard.verify.request import Request

SILENCE = 300  # seconds after which ranks count as hanging


@dataclass
class Crash:
    """A rank that stopped in the middle of a forward, and what it said."""

    rank: int
    text: str


class World:
    """`size` ranks on gloo. ``verify(request)`` gives the Report, the ReshardError that all ranks raised, or a Crash."""

    def __init__(self, size: int):
        self.size = size
        self.pipes: list = []
        self.processes: list = []

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        multiprocessing.set_forkserver_preload(["reshard.verify.run", "transformers.modeling_utils"])
        self.folder = tempfile.TemporaryDirectory(prefix="ranks-")  # where they meet
        for number in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(number, self.size, f"file://{self.folder.name}/{self.size}", theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def verify(self, request: Request) -> Report | ReshardError | Crash:
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send(request)
        found: dict = {}
        while len(found) < self.size:
            silent = [pipe for number, pipe in enumerate(self.pipes) if number not in found]
            for pipe in wait(silent, SILENCE) or silent[:1]:
                number = self.pipes.index(pipe)
                try:
                    found[number] = pipe.recv() if pipe.poll() else Crash(number, f"silent for {SILENCE} s")
                except EOFError:
                    found[number] = Crash(number, "it died")
                if isinstance(found[number], Crash):
                    self.stop()  # the others wait for it
                    return found[number]
        return found[0]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if self.processes:
            self.folder.cleanup()
        self.pipes, self.processes = [], []


_worlds: dict[int, World] = {}


def verify(checkpoint: Path, reference: Path, format: str | None = None, config: Path | None = None) -> Report | ReshardError | Crash:
    """Verify `checkpoint` in a world of as many ranks as it has, which is kept for the next one."""
    from reshard.verify.shards import open_shards

    try:
        size = len(open_shards(checkpoint, format).ranks)
    except ReshardError as error:
        return error
    world = _worlds.setdefault(size, World(size))
    return world.verify(Request(checkpoint, reference, format, config))


@atexit.register
def _stop() -> None:
    for world in _worlds.values():
        world.stop()


def _serve(number: int, size: int, rendezvous: str, pipe) -> None:
    import torch
    import torch.distributed as dist

    from reshard.verify.run import verify_rank

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rendezvous, world_size=size, rank=number)
    with suppress(EOFError):
        while True:
            request = pipe.recv()
            try:
                outcome = verify_rank(request, number, size, number, os.cpu_count())
            except ReshardError as error:
                outcome = error
            except Exception as error:  # noqa: BLE001  whatever a broken shard makes torch say
                outcome = Crash(number, f"{type(error).__name__}: {error}")
            pipe.send(outcome)
