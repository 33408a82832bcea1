"""FSDP1's own state dicts, saved per rank as verl names them: ShardedTensors, DTensors, flat parts of original parameters, flat parameters."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from reshard.demo import make_model
from reshard.stores import torchzip

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 21, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip
WORLD = 3
KINDS = {"sharded": {}, "dtensor": {"mesh": True}, "original": {"use_orig_params": True}, "parts": {"use_orig_params": True}, "flat": {}}


class Model(torch.nn.Module):
    """A module tree with the Hub's names; each layer a module of its own, which FSDP flattens by itself."""

    def __init__(self, state: dict):
        super().__init__()
        for name, value in state.items():
            *path, last = name.split(".")
            held = self
            for step in path:
                if not hasattr(held, step):
                    setattr(held, step, torch.nn.Module())
                held = getattr(held, step)
            setattr(held, last, torch.nn.Parameter(value.clone()))


def save(rank: int, source: str, root: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, LocalStateDictConfig, ShardedStateDictConfig, StateDictType

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=WORLD)
    for kind, options in KINDS.items():
        model = Model(load_file(source))
        layers = {module for name, module in model.named_modules() if name.rpartition(".")[0] == "model.layers"}
        own = {name: value for name, value in options.items() if name != "mesh"}
        if options.get("mesh"):
            own["device_mesh"] = torch.distributed.init_device_mesh("cpu", (WORLD,))
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or module in layers,  # noqa: B023
                                           device_id=torch.device("cpu"), **own)  # fmt: skip
        if kind in ("parts", "flat"):
            FullyShardedDataParallel.set_state_dict_type(wrapped, StateDictType.LOCAL_STATE_DICT, LocalStateDictConfig())
        else:
            FullyShardedDataParallel.set_state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig())
        torch.save(wrapped.state_dict(), f"{root}/{kind}/model_world_size_{WORLD}_rank_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("fsdp1")
    make_model(root / "hf", CONFIG)
    for kind in KINDS:
        (root / kind).mkdir()
        shutil.copy(root / "hf/config.json", root / kind)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save, args=(rank, str(root / "hf/model.safetensors"), str(root))) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * WORLD
    return root


@pytest.mark.parametrize("kind", ["sharded", "dtensor", "original", "parts"])
def test_every_kind_of_state_dict_becomes_its_original(saved, kind):
    """Three ranks over a vocabulary of 21 rows, heads and rows that do not divide."""
    want, found = load_file(saved / "hf/model.safetensors"), reshard.load(saved / kind, format="hf")
    assert want.keys() == found.keys() and all(torch.equal(want[name], found[name]) for name in want)


def test_flat_parameters_whose_order_no_file_tells_are_refused(saved):
    with pytest.raises(reshard.FormatError, match="all parameters of a module one after another") as caught:
        reshard.open(saved / "flat")
    assert "SHARDED_STATE_DICT" in caught.value.hint


def test_flat_parts_in_another_order_are_other_weights(saved, tmp_path):
    """The control: two ranks' files exchanged."""
    folder = shutil.copytree(saved / "parts", tmp_path / "parts")
    one, other = (folder / f"model_world_size_{WORLD}_rank_{rank}.pt" for rank in (0, 1))
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    assert reshard.diff(folder, saved / "hf").differing


@pytest.mark.parametrize("kind", ["sharded", "parts"])
def test_a_rank_cut_short_or_lost_is_named(saved, tmp_path, kind):
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    path = folder / f"model_world_size_{WORLD}_rank_2.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(reshard.FormatError, match=r"rank_2\.pt"):
        reshard.open(folder)
    path.unlink()
    with pytest.raises(reshard.FormatError, match="missing: rank 2"):
        reshard.open(folder)


class Attribute:
    """A pickle that asks for an attribute of what it may not."""

    def __init__(self, owner: object, name: str):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize("owner, name", [(torch, "save"), (Path, "unlink"), (dict, "clear"), ("text", "format")])
def test_getattr_reaches_nothing(tmp_path, owner, name):
    import pickle
    import zipfile

    class Own(pickle.Pickler):
        def reducer_override(self, value: object):
            return (__import__, ("torch",)) if value is torch else NotImplemented

    with (tmp_path / "data.pkl").open("wb") as file:
        Own(file, 2).dump({"x": Attribute(owner, name)})
    torch.save({}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for item in old.namelist():
            new.writestr(item, (tmp_path / "data.pkl").read_bytes() if item.endswith("data.pkl") else old.read(item))
    with pytest.raises(reshard.FormatError, match="asks for an attribute|neither needs nor runs"):
        torchzip.read(tmp_path / "y.pt")
