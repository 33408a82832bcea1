"""What the tests of reshard.sync share: models, a plan run in one process with no transport, and real gloo processes."""

import itertools
import multiprocessing
import os
import socket
import traceback

import pytest
import torch

import reshard
from reshard.demo import make_model
from reshard.sync.messages import rank_plan
from reshard.sync.staging import Peers, Staging, source_view, straight
from reshard.sync.tensors import bind

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 12, "num_key_value_heads": 6,
         "head_dim": 8, "vocab_size": 192, "num_hidden_layers": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False, "dtype": "bfloat16"}  # fmt: skip
QWEN3_MOE = {**LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
             "norm_topk_prob": True}  # fmt: skip


def models_of(configs: dict[str, dict]):
    """A fixture: a folder with a small random model of each of `configs`, by name."""

    @pytest.fixture(scope="module")
    def models(tmp_path_factory):
        root = tmp_path_factory.mktemp("sync")
        for name, config in configs.items():
            make_model(root / name, config)
        return root

    return models


def world_of(size: int):
    """A fixture: `size` processes in one group, for all tests of a file."""

    @pytest.fixture(scope="module")
    def world():
        world = World(size)
        yield world
        world.close()

    return world


def loaded(path, side, process: int, **options) -> dict[str, torch.Tensor]:
    """What `reshard.load` gives the rank whose tensors `process` holds on `side`, by names of the side."""
    number = next(i for i, ranks in enumerate(side.ranks) if process in ranks)
    return reshard.load(path, format=side.format, rank=number, **options)


def blank(side, process: int) -> dict[str, torch.Tensor]:
    """The engine's tensors before a sync: of the side's shapes and dtypes, full of a value that no weight has."""
    from reshard.dtypes import torch_dtypes

    kinds = torch_dtypes()
    held = side.held_by(process)
    held += [scales for s in held for scales in [side.scales(s)] if scales]
    return {s.name: torch.full(s.shape, 7.0).to(kinds[s.dtype]) for s in held}


def loopback(plan, sources: dict[int, dict], targets: dict[int, dict]) -> dict[int, int]:
    """Run `plan` on all processes' tensors at once, in this one; the messages are real, the wire is not. Returns bytes taken."""
    made, mail = {}, {}
    for process in plan.processes:
        part = rank_plan(plan, process)
        source = bind(sources[process], plan.source, process, "source") if process in plan.source.processes else {}
        into = {}
        for side in plan.destinations:
            if process in side.processes:
                into = bind(targets[process], side, process, "destination")
        made[process] = part, Staging(part, source, into, torch.device("cpu"), Peers()), into
        straight(part.local, lambda copy, source=source: source_view(copy, source), into).run()
    for number in range(max(len(staging.rounds) for _, staging, _ in made.values())):
        for process, (_, staging, _) in made.items():
            if number < len(staging.rounds):
                staging.rounds[number].pack.run()
                staging.rounds[number].leave.run()
                for parcel in staging.rounds[number].sends:
                    mail.setdefault((process, parcel.peer), []).append(parcel.bytes.clone())
        for process, (_, staging, _) in made.items():
            if number < len(staging.rounds):
                for parcel in staging.rounds[number].takes:
                    parcel.bytes.copy_(mail[parcel.peer, process].pop(0))
                staging.rounds[number].arrive.run()
                staging.rounds[number].unpack.run()
    assert not any(mail.values()), "messages that nobody took"
    for _, _, into in made.values():
        for bound in into.values():
            if bound.padded:
                bound.zero_padding()
    return {process: part.bytes_taken for process, (part, _, _) in made.items()}


class World:
    """`size` gloo processes; ``run(function, *args)`` calls it on every rank and returns what each returned (or its error)."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "reshard.sync.session"])
        port = free_ports(1)
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function, *args, ranks=None, timeout: float = 120) -> list:
        chosen = range(len(self.pipes)) if ranks is None else ranks
        for rank in chosen:
            self.pipes[rank].send((function, args))
        out = []
        for rank in chosen:
            if not self.pipes[rank].poll(timeout):
                raise TimeoutError(f"rank {rank} does not answer")
            out.append(self.pipes[rank].recv())
        return out

    def call(self, function, *args) -> list:
        """As ``run``; raises the error of a rank, of one that did not just wait for another."""
        out = self.run(function, *args)
        failures = sorted((a for a in out if isinstance(a, Failure)), key=lambda failure: failure.kind == "PeerLost")
        if failures:
            raise AssertionError(failures[0].text)
        return out

    def close(self) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        for process in self.processes:
            process.join(5)
            process.kill()


class Failure:
    def __init__(self, error: BaseException):
        self.kind, self.message, self.text = type(error).__name__, str(error), traceback.format_exc()


def _serve(rank: int, size: int, port: int, pipe) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send(function(rank, *args))
        except BaseException as error:  # noqa: BLE001  the test shows it
            pipe.send(Failure(error))
    os._exit(0)


_ports = itertools.count(
    10_000 + os.getpid() * 61 % 20_000, 7
)  # below those that the system gives away, and another row for each process of tests


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports, all free a moment ago, that no other call gave."""
    while True:
        first = 10_000 + next(_ports) % 20_000
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + i))
            return first
        except OSError:
            continue
        finally:
            for s in sockets:
                s.close()
