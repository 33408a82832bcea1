"""The adapters in the real classes of their frameworks, as far as a CPU goes; each in an environment that has that framework.

    python scripts/check_rl.py trl                      with vLLM and TRL: real servers, Accelerator, VLLMGeneration, AsyncGRPO's protocol
    python scripts/check_rl.py verl                     its registry, base class and CheckpointEngineManager (Ray's calls stood in for)
    python scripts/check_rl.py nemo-rl --source DIR     a checkout: its factory, base class and the synchronizer's call order
    python scripts/check_rl.py slime --source DIR       (or miles) a checkout, read: every call of the actor's on its updater is bound to ours
    python scripts/check_rl.py sglang                   its plug-in hooks, its unpickler on a trainer's note

What was run and what was only read is told in each line.
"""

import argparse
import ast
import asyncio
import inspect
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import types
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "examples")]
LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2,
         "head_dim": 32, "vocab_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False}  # fmt: skip


def processes(work, size: int, *args) -> list:
    """What `size` processes return, each called with its rank."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(size)]
    ranks = [context.Process(target=_rank, args=(work, rank, there, *args)) for rank, (_, there) in enumerate(pipes)]
    for process in ranks:
        process.start()
    out = [here.recv() if here.poll(300) else "no answer" for here, _ in pipes]
    for process in ranks:
        process.join(20)
        process.kill()
    if errors := [answer for answer in out if isinstance(answer, str)]:
        raise SystemExit("\n".join(errors))
    return out


def _rank(work, rank, pipe, *args) -> None:
    import traceback

    try:
        answer = work(rank, *args)
    except BaseException:  # noqa: BLE001  what a rank dies of is the finding
        answer = traceback.format_exc()
    pipe.send(answer)
    os._exit(0)


def weights(seed: int = 0) -> dict:
    """A model's tensors under Hugging Face names."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "architectures"})).bfloat16()
    return {name: p.detach() for name, p in model.named_parameters()}


def same(got: dict, wanted: dict) -> bool:
    import torch

    return got.keys() == wanted.keys() and all(torch.equal(t, wanted[n]) for n, t in got.items())


# ------------------------------------------------------------------------------------------------------------------------------------ TRL


def trl(_) -> list[str]:
    from check_vllm import entry_points
    from grpo_vllm import free_port, make_tiny, serve
    from trl.experimental.async_grpo.async_grpo_trainer import WeightTransferProtocol

    from reshard.plugins.trl import ReshardWeightTransfer

    lines = []
    for name, method in inspect.getmembers(WeightTransferProtocol, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(method) == inspect.signature(getattr(ReshardWeightTransfer, name)), name
    lines.append("run: WeightTransferProtocol's methods have our signatures")
    with tempfile.TemporaryDirectory() as scratch:
        entry_points(Path(scratch) / "site")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), f"{scratch}/site", os.environ.get("PYTHONPATH", "")])
        folder, port = f"{scratch}/tiny", free_port()
        make_tiny(Path(folder))
        server = serve(folder, port, 1, Path(scratch) / "log")
        try:
            lines += processes(_trl_async, 1, folder, f"http://127.0.0.1:{port}")[0]
            lines += processes(_trl_grpo, 2, folder, port, free_port())[0]
        except BaseException:
            print((Path(scratch) / "log").read_text()[-4000:])
            raise
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
    return lines


def moved(model, seed: int):
    """The model with other weights."""
    import torch

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (getattr(p, "_local_tensor", p) for p in model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    return model


def greedy(model, prompt: list[int], length: int) -> list[int]:
    import torch

    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(length):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


def _trl_async(_, folder: str, url: str) -> list[str]:
    """The protocol's calls in AsyncGRPO's order, with the iterator that it makes of a model."""
    import urllib.request

    import torch
    from transformers import AutoModelForCausalLM
    from trl.experimental.async_grpo.async_grpo_trainer import _iter_vllm_named_params

    from reshard.plugins.trl import ReshardWeightTransfer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    transfer = ReshardWeightTransfer(url, config=folder, dtype="fp32", backend="gloo")
    transfer.init_weight_transfer()
    for seed in (1, 2):
        moved(model, seed)
        transfer.pause()
        transfer.send_weights((name, parameter.detach()) for name, parameter in _iter_vllm_named_params(model))
        transfer.resume()
        asked = {"model": "policy", "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "return_token_ids": True, "ignore_eos": True}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["choices"][0]["token_ids"] == greedy(model, [5, 6, 7], 8), "the engine generates otherwise"
    transfer.destroy()
    return ["run: AsyncGRPO's calls into a vLLM server, twice; it then generates transformers' tokens"]


def _trl_grpo(rank: int, folder: str, port: int, meeting: int) -> list[str]:
    """VLLMGeneration's subclass on two ranks of an Accelerator: sync_weights, then TRL's own generate."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting),
                   "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}  # fmt: skip
    import torch
    from accelerate import Accelerator
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reshard.plugins.trl import ReshardVLLMGeneration

    own = Accelerator(cpu=True)
    lines = []
    for sharded in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        backend = ReshardVLLMGeneration(model, own, AutoTokenizer.from_pretrained(folder), mode="server", server_base_url=f"http://127.0.0.1:{port}",
                                        temperature=0.0, max_completion_length=8, generation_kwargs={"ignore_eos": True})  # fmt: skip
        if sharded:  # as Accelerate does to the model when training begins, after TRL has made this object
            for layer in model.model.layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        for seed in (3, 4):
            moved(model, seed + 10 * rank * sharded)
            backend.sync_weights()
            own.wait_for_everyone()
            out, wanted = backend.generate(prompts=[[5, 6, 7]], images=None, num_generations=1), greedy(model, [5, 6, 7], 8)
            assert list(out[1][0]) == wanted, (out[1], wanted)
        kind = "FSDP2's shards" if sharded else "replicas"
        lines.append(
            f"run: VLLMGeneration (server) on {own.num_processes} ranks, {kind}, twice; TRL's generate then gives transformers' tokens"
        )
        backend._trainer.shutdown()
    return lines


# ----------------------------------------------------------------------------------------------------------------------------------- verl


def verl(_) -> list[str]:
    import shutil
    import subprocess

    import verl.workers.engine_workers as workers
    from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

    from reshard.plugins.verl import ReshardCheckpointEngine

    assert CheckpointEngineRegistry.get("reshard") is ReshardCheckpointEngine and issubclass(ReshardCheckpointEngine, CheckpointEngine)
    lines = ["run: registered, and every abstract method of the base class is there"]
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "verl/workers/engine_workers.py"
        target.parent.mkdir(parents=True)
        shutil.copy(inspect.getsourcefile(workers), target)
        patch = HERE.parent / "examples/verl_takes_engine.patch"
        subprocess.run(["patch", "-p1", "-i", str(patch)], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        ast.parse(target.read_text())
    lines.append("run: verl_takes_engine.patch applies")
    return lines + _manager()


class Group:
    """A worker group of verl's, its workers at the other ends of pipes; what it gives is asked for by `get`."""

    def __init__(self, pipes):
        self.pipes, self.world_size, self.workers = pipes, len(pipes), pipes

    def execute_checkpoint_engine(self, method, **each):
        names = list(each)
        return [self._sent(pipe, method[i], {name: each[name][i] for name in names}) for i, pipe in enumerate(self.pipes)]

    def update_weights(self, global_steps=None, mode=None):
        return [self._sent(pipe, "update", {"global_steps": global_steps}) for pipe in self.pipes]

    @staticmethod
    def _sent(pipe, method, named):
        pipe.send((method, named))
        return pipe


def _manager() -> list[str]:
    """verl's CheckpointEngineManager drives three steps over two trainers and two rollout workers, one of which is replaced."""
    from unittest import mock

    from verl.checkpoint_engine import base

    context = multiprocessing.get_context("fork")  # verl takes long to import
    pipes, ranks = [], []
    for number in range(5):
        here, there = context.Pipe()
        ranks.append(context.Process(target=_verl_worker, args=(number, there)))
        ranks[-1].start()
        pipes.append(here)

    def answers(pending):
        out = [pipe.recv() for pipe in pending]
        if errors := [answer for answer in out if isinstance(answer, str)]:
            raise SystemExit("\n".join(errors))
        return out

    async def nothing(*_, **__):
        return None

    calls = ("abort_all_requests", "release_kv_cache", "resume_kv_cache", "resume_generation")

    def replica(pipe):
        return type("Replica", (), {"workers": [pipe], **dict.fromkeys(calls, staticmethod(nothing))})()

    config = types.SimpleNamespace(backend="reshard", custom_backend_module="reshard.plugins.verl")
    with (
        mock.patch.object(base.ray, "get", answers),
        mock.patch.object(base, "RayWorkerGroup", lambda worker_handles, **_: Group(worker_handles)),
    ):
        replicas = [replica(pipe) for pipe in pipes[2:4]]
        manager = base.CheckpointEngineManager(config, Group(pipes[:2]), replicas)
        for step in (1, 2):
            manager.update_weights(global_steps=step)
        manager.remove_replicas(replicas[1:])
        manager.add_replicas([replica(pipes[4])])
        metrics = manager.update_weights(global_steps=3)
    for pipe, process in zip(pipes, ranks):
        pipe.send(None)
        process.join(20)
        process.kill()
    return [
        f"run: CheckpointEngineManager.update_weights, 3 steps, 2 trainers, 2 rollout workers of which one is replaced; metrics {sorted(metrics)}"
    ]


def _verl_worker(number: int, pipe) -> None:
    import traceback

    from verl.checkpoint_engine.base import CheckpointEngineRegistry

    import reshard.plugins.verl  # noqa: F401

    engine = CheckpointEngineRegistry.new(
        "reshard", is_master=number == 0, bucket_size=1 << 16, config=LLAMA, dist_backend="gloo", transport="p2p", timeout=30
    )
    while (told := pipe.recv()) is not None:
        method, named = told
        try:
            if method != "update":
                answer = getattr(engine, method)(**named)
            elif number < 2:
                answer = asyncio.run(engine.send_weights(iter(weights(named["global_steps"]).items()), **named))
            else:
                got = asyncio.run(_all(engine.receive_weights(**named)))
                assert same(got, weights(named["global_steps"])), "other weights came"
                answer = None
        except BaseException:  # noqa: BLE001  what a rank dies of is the finding
            answer = traceback.format_exc()
        pipe.send(answer)
    os._exit(0)


async def _all(stream) -> dict:
    return {name: tensor.clone() async for name, tensor in stream}


# -------------------------------------------------------------------------------------------------------------------------------- NeMo-RL


def nemo_rl(source: Path) -> list[str]:
    from grpo_vllm import free_port

    bytes_ = processes(_nemo, 4, str(source), free_port())
    read = (source / "nemo_rl/weight_sync/checkpoint_engine_weight_synchronizer.py").read_text()
    calls = [
        "init_checkpoint_engine",
        "prepare_checkpoint_engine",
        "init_checkpoint_engine_process_group",
        "send_weights_via_checkpoint_engine",
    ]
    assert all(f'"{call}"' in read for call in calls)
    return [f"run: create_checkpoint_engine(module:Class), then the synchronizer's calls, released after each of 2 refits; {bytes_[0]:,} bytes sent by rank 0",
            "read: the synchronizer itself (Ray, CUDA)"]  # fmt: skip


def _nemo(rank: int, source: str, port: int) -> int:
    sys.path.insert(0, source)
    import torch.distributed as dist
    from nemo_rl.utils.checkpoint_engines.base import create_checkpoint_engine

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    engine = create_checkpoint_engine("reshard.plugins.nemo_rl:ReshardCheckpointEngine", bucket_size_bytes=1 << 16,
                                      engine_kwargs={"config": LLAMA, "dist_backend": "gloo", "transport": "p2p", "release_after_refit": True})  # fmt: skip
    for turn in range(2):
        told: list = [None] * 4
        dist.all_gather_object(told, {**engine.prepare(), "rank": rank % 2})
        sizes = {"train_world_size": 2, "rollout_world_size": 2, "metadata": told}
        if rank < 2:
            engine.init_policy_process_group(worker_rank=rank, **sizes)
            asyncio.run(engine.send_weights(iter(weights(turn).items())))
            sent = engine.ends._sync.stats.sent
        else:
            engine.init_rollout_process_group(rollout_rank=rank - 2, **sizes)
            got, sent = {}, 0

            async def take(got=got):
                async for batch in engine.receive_weight_batches():
                    got.update((name, tensor.clone()) for name, tensor in batch)

            asyncio.run(take())
            assert same(got, weights(turn)), "other weights came"
        engine.finalize()
    return sent


# -------------------------------------------------------------------------------------------------------------------------- slime, miles


def slime(source: Path, package: str = "slime") -> list[str]:
    """Every use of `self.weight_updater` in the actor, bound to our class; every call that we make of an engine, bound to theirs."""
    from reshard.plugins import slime as adapter

    ours = adapter.UpdateWeightByReshard if package == "slime" else adapter.MilesUpdateWeightByReshard
    actor = ast.parse((source / package / "backends/megatron_utils/actor.py").read_text())
    uses = set()
    for node in ast.walk(actor):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_updater(node.func.value):
            given = [None] * (len(node.args) + 1)
            inspect.signature(getattr(ours, node.func.attr)).bind(*given, **{word.arg: None for word in node.keywords})
            uses.add(node.func.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "update_weight_cls":
            inspect.signature(ours.__init__).bind(None, *node.args, **{word.arg: None for word in node.keywords})
            uses.add("__init__")
    names = {node.id for node in ast.walk(actor) if isinstance(node, ast.Name)}
    assert {"__init__", "connect_rollout_engines", "update_weights", "pop_metrics"} <= uses and "UpdateWeightFromDistributed" in names, uses
    theirs = {node.name: node.args for node in ast.walk(ast.parse((source / package / "backends/sglang_utils/sglang_engine.py").read_text()))
              if isinstance(node, ast.FunctionDef)}  # fmt: skip
    asked = ["pause_generation", "flush_cache", "update_weights_from_tensor", "continue_generation"]
    asked += ["begin_weight_update", "end_weight_update", "update_weight_version"] if package == "miles" else []
    missing = [name for name in asked if name not in theirs]
    assert not missing, missing
    own = [arg.arg for arg in theirs["update_weights_from_tensor"].args]
    assert own[1] == "serialized_named_tensors" and {"load_format", "weight_version"} <= set(own), own
    return [f"read and bound: {', '.join(sorted(uses))} as {package}'s actor calls them; {', '.join(asked)} as its engine has them"]


def _is_updater(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "weight_updater"


# --------------------------------------------------------------------------------------------------------------------------------- SGLang


def sglang(_) -> list[str]:
    import torch
    from sglang.srt.utils.common import MultiprocessingSerializer

    (note, empty), *_ = MultiprocessingSerializer.deserialize(
        MultiprocessingSerializer.serialize([("a note", torch.empty(0))], output_str=True)
    )
    assert note == "a note" and not empty.numel()
    lines = ["run: a trainer's note through MultiprocessingSerializer and its unpickler"]
    from unittest import mock

    for name in (
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.functional",
        "torchvision.io",
    ):  # its configs import that at the top, and use nothing of it here
        sys.modules.setdefault(name, mock.MagicMock(__spec__=None, __path__=[]))
    from sglang.srt.configs.load_config import LoadConfig

    from reshard.plugins import sglang as plugin

    plugin.register()
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
    loader = LoadConfig(load_format="reshard", model_loader_extra_config={"jobs": 1}).load_format
    return [*lines, f"run: LoadConfig(load_format='reshard') after the hooks gives {getattr(loader, '__name__', loader)}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checks = {
        "trl": trl,
        "verl": verl,
        "nemo-rl": nemo_rl,
        "slime": slime,
        "miles": lambda source: slime(source, "miles"),
        "sglang": sglang,
    }
    parser.add_argument("framework", choices=checks)
    parser.add_argument("--source", type=Path, help="a checkout, for what is not on PyPI")
    args = parser.parse_args()
    for line in checks[args.framework](args.source):
        print(f"{args.framework}: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
