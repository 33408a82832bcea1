"""What the adapters to trainers' frameworks are made of, and the adapters over stand-ins of the few classes that they touch; real tensors between
real processes. The frameworks' own classes are run by scripts/check_rl.py, in environments of theirs."""

import asyncio
import importlib
import json
import sys
import types
from argparse import Namespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sync_world import LLAMA, blank, free_ports, loaded, models_of, world_of

from reshard import sync
from reshard.errors import PlanError
from reshard.plugins.transfer import ByName, Terms, pairs, side

TIED = {**LLAMA, "tie_word_embeddings": True}
models = models_of({"llama": LLAMA, "tied": TIED})
world = world_of(4)


def address() -> str:
    return f"tcp://127.0.0.1:{free_ports(1)}"


def gathered(path, config, both: bool = False):
    """A fresh copy of each whole tensor, one after another; a tied head, too, under its own name."""
    layout = sync.layout(config)
    whole = loaded(path, sync.Side.placed(layout, "hf", ranks=[0]), 0)
    for name, tensor in whole.items():
        yield name, tensor.clone()
    if both:
        yield "lm_head.weight", whole["model.embed_tokens.weight"].clone()


def by_name_case(rank, root, where, name, trainer):
    config = TIED if name == "tied" else LLAMA
    ends = ByName(1 << 15, config, trainer=trainer, dist_backend="gloo", transport="p2p", timeout=30)
    wanted = dict(gathered(root / name, config))
    marks = ["a", "b", "c", "d"]
    seen = []
    for turn, told in enumerate((marks, marks, [*marks[:3], "another"])):
        ends.join(rank, 2, told, where[turn == 2])
        seen.append(ends._sync)
        if rank < 2:
            given = gathered(root / name, config, name == "tied") if ends.whole else loaded(root / name, ends._sync.plan.source, rank, tp=2)
            assert ends.send(given).sent > 0
        else:
            got = asyncio.run(_gathered(ends))
            assert got.keys() == wanted.keys() and all(torch.equal(t, wanted[n]) for n, t in got.items())
    assert seen[0] is seen[1] and seen[1] is not seen[2], "the group stays until somebody is another"
    ends.leave()
    with pytest.raises(PlanError, match="has not joined"):
        ends.send({})


async def _gathered(ends):
    return {name: tensor.clone() async for batch in ends.batches() for name, tensor in batch}


@pytest.mark.parametrize("name, trainer", [("llama", None), ("tied", None), ("llama", {"format": "megatron", "tp": 2})])
def test_engines_that_load_by_name_get_each_tensor_once_from_all_trainers(world, models, name, trainer):
    world.call(by_name_case, models, (address(), address()), name, trainer)


def tied_apart_case(rank, root):
    layout = sync.layout(TIED)
    plan = sync.plan(sync.Side.placed(layout, "hf", ranks=[0, 1]), sync.Side.placed(layout, "vllm", tp=2, ranks=(2, 3)))
    session = sync.Sync(plan, timeout=30)
    given = dict(gathered(root / "tied", TIED, True))
    given["lm_head.weight"] = given["lm_head.weight"] + rank
    with pytest.raises(sync.SyncError, match="rank 1: source: lm_head.weight is tied in this model, and came with other values"):
        session.send(iter(given.items()), 1, windows=True) if rank < 2 else session.recv(blank(plan.destinations[0], rank), 1)


def test_a_tied_weight_that_comes_twice_must_be_the_same(world, models):
    world.call(tied_apart_case, models)


def test_who_holds_what_is_told_by_json_and_wrong_words_by_name():
    layout = sync.layout(LLAMA)
    text = sync.Side.placed(layout, "vllm", tp=2, ranks=(2, 3)).to_json()
    terms = Terms(
        "tcp://a:1", LLAMA, [{"format": "vllm", "ranks": 2, "tp": 2}, {"format": "hf", "ranks": 1}], {"format": "fsdp", "ranks": 2, "dp": 2}
    )
    assert [own.processes for own in terms.sides()] == [[0, 1], [2, 3], [4]]
    assert [own.processes for own in Terms("", LLAMA, text, {"format": "hf", "ranks": 2}).sides()] == [[0, 1], [2, 3]]
    for told, words in (({"ranks": 2}, "lacks format"), ({"format": "vllm", "ranks": 2, "tpp": 2}, "tpp"), ("{}", "no side's JSON")):
        with pytest.raises(PlanError, match=words):
            side(layout, told, 0)


def test_chunks_of_a_model_have_names_of_their_own():
    chunk = torch.nn.Sequential(torch.nn.Linear(2, 2))
    wrapped = torch.nn.ModuleDict({"module": torch.nn.ModuleDict({"module": chunk})})
    assert [name for name, _ in pairs([wrapped])] == ["0.weight", "0.bias"]
    with pytest.raises(PlanError, match="0.weight is in two chunks"):
        list(pairs([wrapped, chunk]))


# ------------------------------------------------------------------------------------------- adapters, over stand-ins of their frameworks


def stood_in(modules: dict[str, dict]):
    """sys.modules with `modules` of these names in them."""
    made = {}
    for name, held in modules.items():
        made[name] = types.ModuleType(name)
        made[name].__dict__.update(held)
    return mock.patch.dict(sys.modules, made)


class Registry:
    @staticmethod
    def register(name):
        return lambda cls: cls


VERL = {
    "verl": {},
    "verl.checkpoint_engine": {},
    "verl.checkpoint_engine.base": {"CheckpointEngine": object, "CheckpointEngineRegistry": Registry},
}
NEMO = {"nemo_rl": {}, "nemo_rl.utils": {}, "nemo_rl.utils.checkpoint_engines": {},
        "nemo_rl.utils.checkpoint_engines.base": {"CheckpointEngine": object}}  # fmt: skip


def verl_case(rank, root, where):
    with stood_in(VERL):
        engine = importlib.import_module("reshard.plugins.verl").ReshardCheckpointEngine(
            1 << 15, LLAMA, dist_backend="gloo", is_master=rank == 0
        )
    told = [None] * 4
    dist.all_gather_object(told, {**engine.prepare(), "address": where if rank == 0 else None})
    parts = type(engine).build_topology(2, 2, told)
    engine.init_process_group(**{name: values[rank % 2] for name, values in parts[rank // 2].items()})
    wanted = dict(gathered(root / "llama", LLAMA))
    for step in (7, 7):  # verl's numbers may repeat
        if rank < 2:
            trained = types.SimpleNamespace(get_per_tensor_param=lambda: (gathered(root / "llama", LLAMA), None))
            metrics = asyncio.run(engine.send_weights(trained if step else gathered(root / "llama", LLAMA), global_steps=step))
            assert metrics["reshard/sent_bytes"] > 0
        else:
            got = asyncio.run(_all(engine.receive_weights(global_steps=step)))
            assert all(torch.equal(t, wanted[n]) for n, t in got.items()) and got.keys() == wanted.keys()
        engine.finalize()
    engine.ends.leave()


async def _all(stream):
    return {name: tensor.clone() async for name, tensor in stream}


def nemo_case(rank, root, where):
    with stood_in(NEMO):
        engine = importlib.import_module("reshard.plugins.nemo_rl").ReshardCheckpointEngine(
            1 << 15, LLAMA, dist_backend="gloo", release_after_refit=True
        )
    for turn in range(2):  # released after the first
        told = [None] * 4
        dist.all_gather_object(told, {**engine.prepare(), "rank": rank % 2, "address": where[turn]})
        sizes = {"train_world_size": 2, "rollout_world_size": 2, "metadata": told}
        engine.init_policy_process_group(worker_rank=rank, **sizes) if rank < 2 else engine.init_rollout_process_group(
            rollout_rank=rank - 2, **sizes
        )
        wanted = dict(gathered(root / "llama", LLAMA))
        if rank < 2:
            asyncio.run(engine.send_weights(gathered(root / "llama", LLAMA)))
        else:
            got = asyncio.run(_gathered(types.SimpleNamespace(batches=engine.receive_weight_batches)))
            assert all(torch.equal(t, wanted[n]) for n, t in got.items()) and got.keys() == wanted.keys()
        engine.finalize()


def test_verls_engine_hands_on_what_it_is_given(world, models):
    world.call(verl_case, models, address())


def test_nemo_rls_engine_hands_on_what_it_is_given_and_meets_again(world, models):
    world.call(nemo_case, models, (address(), address()))


def module_of(tensors, prefix=""):
    """A module whose state_dict has these names."""
    out = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = (prefix + name).split(".")
        at = out
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        at.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return out


class Actor:
    """An engine of slime: what it is asked is noted."""

    def __getattr__(self, name):
        return types.SimpleNamespace(remote=lambda *given, **named: (name, given, named))


class Serializer:
    @staticmethod
    def serialize(value, output_str):
        assert output_str
        return value


ARGS = Namespace(hf_checkpoint=LLAMA, rollout_num_gpus_per_engine=1, bf16=True, fp16=False, tensor_model_parallel_size=2,
                 pipeline_model_parallel_size=1, expert_model_parallel_size=1, expert_tensor_parallel_size=None,
                 pause_generation_mode="retract")  # fmt: skip


def slime_case(rank, root, where, package):
    """Ranks 0 and 1 train, 2 and 3 are engines of one worker each; a note reaches them by broadcast, as it would by HTTP."""
    from reshard.plugins import sglang_weights, slime

    actor = f"{package}.backends.megatron_utils.actor"
    trainers, notes = dist.new_group([0, 1]), dist.new_group([0, 2, 3])
    layout = sync.layout(LLAMA)
    if rank > 1:
        side = sync.Side.placed(layout, "sglang", ranks=[2, 3])
        wanted = loaded(root / "llama", side, rank)
        for turn in (1, 2, 3):
            dist.broadcast_object_list(heard := [None], 0, group=notes)
            (((note, empty),), *_), named = heard[0][rank - 2]
            model = module_of(blank(side, rank))
            with mock.patch.object(sglang_weights, "worker", lambda: 0):
                sglang_weights.receive(model, [(note, empty)])
            assert named["load_format"] == "reshard.plugins.sglang_weights.receive" and json.loads(note)["version"] == turn
            assert all(torch.equal(t, wanted[n]) for n, t in model.state_dict().items())
        return sglang_weights.leave()
    asked = []
    with stood_in({actor: {"UpdateWeightFromDistributed": None}, "sglang.srt.utils": {"MultiprocessingSerializer": Serializer}}):
        slime.install(ARGS)

        class Updater(sys.modules[actor].UpdateWeightFromDistributed):
            backend = "gloo"

            def _gloo(self):
                return trainers

            def _trainer(self):
                return {**super()._trainer(), "ranks": 2}

            def _get(self, pending):
                asked.extend(name for name, *_ in pending[:1])
                if pending[0][0] == "update_weights_from_tensor":
                    dist.broadcast_object_list([[(given[0], named) for _, given, named in pending]], 0, group=notes)

        held = loaded(root / "llama", sync.Side.placed(layout, "megatron", tp=2, ranks=[0, 1]), rank, tp=2)
        updater = Updater(ARGS, [module_of(held, "module.module.")], None, model_name="llama", quantization_config=None)
        for turn in (1, 2, 3):
            if turn != 2:  # engines are new in the third
                with mock.patch.object(slime, "free_address", lambda turn=turn: where[turn == 3]):
                    updater.connect_rollout_engines([Actor(), Actor()], None, engine_gpu_counts=[1, 1], engine_gpu_offsets=[0, 1])
            updater.update_weights()
            assert updater.pop_metrics()["reshard/seconds"] > 0 and not updater.pop_metrics() and updater.weight_version == turn
        updater.disconnect_rollout_engines()
    return asked[: len(asked) // 3] if asked == asked[: len(asked) // 3] * 3 else asked


SLIME = ["pause_generation", "flush_cache", "update_weights_from_tensor", "continue_generation"]
MILES = [*SLIME[:2], "begin_weight_update", SLIME[2], "update_weight_version", "end_weight_update", SLIME[3]]


@pytest.mark.parametrize("package, calls", [("slime", SLIME), ("miles", MILES)])
def test_slime_and_miles_send_as_they_lie_and_join_new_engines(world, models, package, calls):
    assert world.call(slime_case, models, (address(), address()), package)[0] == calls


def test_install_outside_both_is_told():
    from reshard.plugins import slime

    with pytest.raises(PlanError, match="neither slime's nor miles' actor"):
        slime.install(ARGS)
    with pytest.raises(PlanError, match="adapters and quantised engines"):
        slime.UpdateWeightByReshard(ARGS, [], None, model_name="llama", quantization_config={"quant_method": "fp8"})
