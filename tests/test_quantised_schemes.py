"""Every scheme: dequantised to what its formula gives, and there and back through every mesh that its grain allows, bit for bit."""

import itertools
import json

import pytest
import torch
from quantised_cases import SCHEMES, write
from safetensors.torch import load_file

from reshard import api
from reshard.errors import PlanError


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
