"""What engines find of reshard by entry points: it costs nothing, never raises, and fits a model's tensors or says why not. No engine is installed here."""

import importlib
import logging
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch

import reshard
from reshard.checkpoint import open_checkpoint
from reshard.conversion.placing import place, rank_at
from reshard.demo import CONFIG, make_model
from reshard.layout import Mesh
from reshard.loading import load_into
from reshard.plugins.fitting import fitted, release

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
GROUPS = ("vllm.general_plugins", "sglang.srt.plugins")


@pytest.mark.parametrize("group", GROUPS)
def test_an_entry_point_imports_nothing_heavy_and_is_silent_without_its_engine(group, caplog):
    module, function = PROJECT["entry-points"][group]["reshard"].split(":")
    heavy = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'vllm', 'sglang', 'reshard.api') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with caplog.at_level(logging.WARNING):
        getattr(importlib.import_module(module), function)()
    assert "--load-format reshard is not available" in caplog.text


class Hooks:
    registered: list = []

    @classmethod
    def register(cls, target, hook, kind):
        cls.registered.append((target, hook, kind))


def test_sglang_gets_a_class_in_place_of_the_name(monkeypatch):
    """With SGLang's modules stood in for: the name is offered once, and no other load format is touched."""
    choices = ["auto"]
    names = {
        "sglang": {}, "sglang.srt": {}, "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": Hooks, "HookType": types.SimpleNamespace(AROUND="around")},
        "sglang.srt.server_args": {"LOAD_FORMAT_CHOICES": choices, "add_load_format_choices": choices.extend},
        "reshard.plugins.sglang_loader": {"ReshardModelLoader": dict},
    }  # fmt: skip
    for name, held in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(held)
        monkeypatch.setitem(sys.modules, name, module)
    from reshard.plugins import sglang

    monkeypatch.setattr(Hooks, "registered", [])
    sglang.register()
    sglang.register()
    (target, hook, kind), *more = Hooks.registered
    assert choices == ["auto", "reshard"] and kind == "around" and not more
    assert target == "sglang.srt.configs.load_config.LoadConfig._verify_load_format"
    for given, wanted in (("reshard", dict), ("auto", "auto")):
        config = types.SimpleNamespace(load_format=given)
        hook(lambda config: None, config)
        assert config.load_format == wanted


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins") / "model"
    make_model(folder, CONFIG)  # tied, 959 words
    return folder


class Engine(torch.nn.Module):
    """A module whose state_dict has the names that are given."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            at = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, torch.nn.Module())
                at = getattr(at, part)
            at.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))


def placed(model):
    source = open_checkpoint(model)
    placement = place(source, "vllm", Mesh(3), "0.32")
    return source, placement, rank_at(placement, (1, 0))


def filled(model, tensors):
    source, placement, rank = placed(model)
    engine = Engine(tensors)
    into, copies = fitted(engine, placement, rank)
    load_into(source, placement, rank, into)
    for name, tensor in copies:
        tensor.copy_(into[name])
    return engine.state_dict()


def blank(model):
    own = reshard.load(model, format="vllm", tp=3, rank=1)
    return own, {name: torch.full_like(t, 7) for name, t in own.items()}


def test_all_of_a_model_is_filled_tied_or_not(model):
    own, tensors = blank(model)
    assert all(torch.equal(tensor, own[name]) for name, tensor in filled(model, tensors).items())
    untied = tensors | {"model.embed_tokens.weight": torch.full_like(own["lm_head.weight"], 7)}
    state = filled(model, untied)
    assert torch.equal(state["model.embed_tokens.weight"], own["lm_head.weight"])
    one = torch.full_like(own["lm_head.weight"], 7)
    state = filled(model, tensors | {"model.embed_tokens.weight": one, "lm_head.weight": one})
    assert torch.equal(state["model.embed_tokens.weight"], own["lm_head.weight"])


def test_room_that_an_engine_made_is_zero(model):
    own, tensors = blank(model)
    name = "lm_head.weight"
    rows, columns = own[name].shape
    state = filled(model, tensors | {name: torch.full((rows + 64, columns), 7, dtype=own[name].dtype)})
    assert torch.equal(state[name][:rows], own[name]) and not state[name][rows:].any()


def test_what_is_not_filled_or_has_no_place_is_told_at_once(model):
    _, tensors = blank(model)
    lost = "model.layers.0.mlp.down_proj.weight"
    tensors["model.layers.0.mlp.adapter.weight"] = tensors.pop(lost)
    with pytest.raises(reshard.ReshardError) as error:
        filled(model, tensors)
    assert f"{lost} [96, 64] is in no parameter of Engine" in str(error.value)
    assert "model.layers.0.mlp.adapter.weight [96, 64]: layout llama fills it with nothing" in str(error.value)


def test_a_release_newer_than_what_is_known_has_the_newest_names():
    assert release("vllm", "0.30.1+cpu") == "0.30"
    assert release("vllm", "1.7.0.dev3") == "0.32"
    assert release("sglang", "0.5.23") == "0.5.23"
