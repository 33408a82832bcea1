"""Every family's names and shapes, as transformers writes them (tests/families_data), through every format and mesh and back.

scripts/family_shapes.py makes the data; test_family_models.py makes it anew, where transformers is at hand, and compares.
"""

from collections import Counter
from pathlib import Path

import pytest
from family_checkpoints import FAMILIES, checkpoint

import reshard
from reshard.errors import CastError, PlanError
from reshard.formats.megatron_args import model_args
from reshard.stores import safetensors

MESHES = [
    {"format": "tp", "tp": 2}, {"format": "tp", "tp": 3}, {"format": "rank-pt", "tp": 2},
    *({"format": engine, "tp": tp} for engine in ("vllm", "sglang") for tp in (1, 2, 4)), {"format": "vllm", "tp": 2, "pp": 2},
    *({"format": engine, "tp": 2, "ep": 2} for engine in ("tp", "vllm", "sglang")),
    {"format": "megatron", "tp": 2}, {"format": "megatron", "tp": 2, "pp": 2}, {"format": "megatron", "ep": 2},
]  # fmt: skip


def bits(folder: Path) -> dict[str, bytes]:
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        out |= {name: raw[info.offset : info.offset + info.nbytes] for name, info in safetensors.read(path)[0].items()}
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_through_every_format(family, tmp_path):
    """What a format is declared to do without (prediction layers, in engines) is told, and all that lacks afterwards."""
    source = reshard.open(checkpoint(family, tmp_path / "hf"))
    whole, seen = bits(tmp_path / "hf"), Counter()
    assert not source.left_out
    for number, target in enumerate(MESHES):
        if target["format"] not in {"tp", "rank-pt", *source.layout.descriptor.formats}:
            continue
        try:
            job = reshard.plan(source, **target)
        except PlanError as error:
            seen["refused"] += 1
            assert any(
                word in str(error)
                for word in (
                    "cannot split",
                    "cannot repeat",
                    "cannot cut",
                    "without experts",
                    "on CUDA vLLM",
                    "vLLM enlarges",
                    "Megatron-LM always",
                )
            ), error
            continue
        reshard.convert(source, tmp_path / str(number), fsync=False, **target)
        reshard.convert(tmp_path / str(number), tmp_path / f"{number}-back", format="hf", fsync=False)
        back = bits(tmp_path / f"{number}-back")
        assert back.items() <= whole.items(), target
        lost = {name for name in whole.keys() - back.keys() if whole[name] not in back.values()}  # a copy goes with its prediction layer
        assert lost == set(job.left_out) and target["format"] not in ("tp", "rank-pt")[: len(lost)], target
        assert target["format"] != "megatron" or all(".visual." in name for name in lost), target
        seen["legal"] += 1
    assert seen["legal"] >= 3, seen


@pytest.mark.parametrize("allow", [False, True])
def test_a_whole_number_without_room_is_refused(allow, tmp_path):
    """DeepSeek-V4's table of experts by token is I64 on disk and I32 in vLLM: no other number may take a number's place."""
    path = checkpoint("deepseek_v4", tmp_path / "hf") / "model.safetensors"
    table = safetensors.read(path)[0]["layers.0.ffn.gate.tid2eid"]
    with open(path, "r+b") as file:
        file.seek(table.offset + 8 * 5)
        file.write((2**40 + 1).to_bytes(8, "little"))
    with pytest.raises(CastError, match=r"tid2eid.*: at least 1 values of up to 1\.09951e\+12 do not fit I32"):
        reshard.convert(tmp_path / "hf", tmp_path / "out", format="vllm", fsync=False, allow_overflow=allow)


def test_a_mesh_that_an_engine_cannot_hold_says_why(tmp_path):
    """64 sinks on one rank are FlashMLA's own number; 32 on each of two are not, but on a CPU."""
    source = reshard.open(checkpoint("deepseek_v4", tmp_path / "hf"))
    with pytest.raises(PlanError, match="attn_sink: on CUDA vLLM keeps 64 or 128 of them on a rank") as error:
        reshard.plan(source, format="vllm", tp=2)
    assert "tp sizes that fit this model here: 1;" in error.value.hint
    reshard.plan(source, format="vllm", tp=2, engine_platform="cpu")


def test_megatrons_args_tell_of_prediction_layers_that_are_there(tmp_path):
    """config.json may promise a layer that the files lack: Megatron-LM would build it, and miss its weights."""
    layout = reshard.open(checkpoint("glm4_moe", tmp_path / "hf")).layout
    assert model_args(layout)["mtp_num_layers"] == 1
    assert model_args(layout.without(frozenset({"mtp", "mtp_joint"}), frozenset()))["mtp_num_layers"] is None
