"""Worlds of real processes that verify one checkpoint after another: torch and transformers are imported once, ranks are forked."""

import multiprocessing
import os
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from reshard.errors import ReshardError


@dataclass
class Crash:
    """A rank that stopped in the middle of a forward, and what it said."""

    rank: int
    text: str


class World:
    """`size` ranks on gloo. ``verify(request)`` gives the Report, the ReshardError that all ranks raised, or a Crash."""

    def __init__(self, size: int, folder: Path):
        self.size, self.folder, self.count = size, folder, 0
        self.pipes: list = []
        self.processes: list = []

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        multiprocessing.set_forkserver_preload(["reshard.verify.run", "transformers.modeling_utils"])
        self.count += 1
        for number in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(number, self.size, f"file://{self.folder}/{self.size}-{self.count}", theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def verify(self, request):
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send(request)
        found = {}
        while len(found) < self.size:
            for pipe in wait([pipe for i, pipe in enumerate(self.pipes) if i not in found]):
                number = self.pipes.index(pipe)
                try:
                    found[number] = pipe.recv()
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
        self.pipes, self.processes = [], []


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
            except Exception as error:  # whatever a broken shard makes torch say
                outcome = Crash(number, f"{type(error).__name__}: {error}")
            pipe.send(outcome)
