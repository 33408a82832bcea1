"""Every scheme: dequantised to what its formula gives, and there and back through every mesh that its grain allows, bit for bit."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from quantised_cases import SCHEMES, write
from safetensors.torch import load_file, save_file

from reshard import api
from reshard.errors import FormatError, PlanError
from reshard.layout.schemes import schemes


def same(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("case", SCHEMES)
def test_dequantised_and_through_every_mesh(tmp_path, case):
    scheme, quantization, _, sizes = SCHEMES[case]
    state, plain = write(tmp_path / "hf", case)
    opened = api.open(tmp_path / "hf")
    assert opened.layout.scheme == scheme
    job = api.plan(opened, format="hf", dequantise=True)
    report = api.convert(opened, tmp_path / "plain", format="hf", dequantise=True, fsync=False)
    assert report.bytes_read == job.bytes_read
    same(load_file(tmp_path / "plain/model.safetensors"), plain)
    for format, tp in [("tp", sizes[-1]), *zip(itertools.repeat("vllm"), sizes)]:
        there, back = tmp_path / f"{format}{tp}", tmp_path / f"back {format}{tp}"
        api.convert(opened, there, format=format, tp=tp, fsync=False)
        api.convert(there, back, format="hf", fsync=False)
        same(load_file(back / "model.safetensors"), state)
        assert json.loads((back / "config.json").read_text())["quantization_config"] == quantization
        shard = api.load(there, format="tp", tp=2, rank=1, dequantise=True)
        rows = ("o_proj", "down_proj")
        halves = {name: t.chunk(2, int(any(r in name for r in rows)))[1] if t.dim() > 1 else t for name, t in plain.items()}
        same(shard, halves)
    if len(sizes) < 3:
        with pytest.raises(PlanError, match="would be cut inside a block"):
            api.plan(opened, format="vllm", tp=4)


@pytest.mark.parametrize("case", ["fp8 blocks", "ct fp8 rows"])
def test_sglang_holds_what_its_kernels_take_as_it_is(tmp_path, case):
    state, _ = write(tmp_path / "hf", case)
    api.convert(tmp_path / "hf", tmp_path / "sglang", format="sglang", tp=2)
    api.convert(tmp_path / "sglang", tmp_path / "back", format="hf")
    same(load_file(tmp_path / "back/model.safetensors"), state)


@pytest.mark.parametrize("case, name", [("gptq", "self_attn.o_proj.g_idx"), ("ct int4", "mlp.down_proj.weight_shape")])
def test_what_follows_from_sizes_must_be_so(tmp_path, case, name):
    """Activation order would be lost in vLLM's shards, and cut in two by any row split."""
    state, _ = write(tmp_path / "hf", case)
    state[f"model.layers.0.{name}"] = state[f"model.layers.0.{name}"].flip(0)
    save_file(state, tmp_path / "hf/model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError, match=f"{name}.*cannot be cut"):
        api.open(tmp_path / "hf")


def test_the_guide_lists_every_scheme():
    text = (Path(__file__).parents[1] / "docs/guides/quantised.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and "✓" in line]
    told = [name for row in rows for name in re.findall(r"`([a-z_0-9…]+)`", row.split("|")[2])]
    first = next(name for name in told if name.startswith("modelopt_fp8"))
    assert sorted(name.replace("…", first) for name in told) == sorted(scheme.name for scheme in schemes())
    assert {scheme for scheme, *_ in SCHEMES.values()} == {scheme.name for scheme in schemes()} - {"mxfp4"}  # that one: test_schemes.py
