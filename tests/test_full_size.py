"""Published models from config.json alone: their parameters are the published ones, and ranks hold all of them.

All ten, with time and memory, by hand: scripts/full_size.py.
"""

import json
from pathlib import Path

import pytest

import reshard
from reshard.checkpoint import describe_checkpoint
from reshard.cli import main

CONFIGS = Path(__file__).parent / "full_size"
PARAMETERS = {"llama-3.1-405b": 405_853_388_800, "gpt-oss-120b": 116_829_156_672, "nemotron-3-nano-30b-a3b": 31_577_940_288}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_the_published_ones(name):
    source = describe_checkpoint(CONFIGS / f"{name}.json")
    assert source.parameters == PARAMETERS[name]
    job = reshard.plan(source, format="tp", tp=8)
    widest = max(row["bytes_held"] for row in job.ranks())
    assert sum(row["bytes_held"] for row in job.ranks()) >= source.bytes >= 2 * source.parameters and widest < source.bytes / 7


def test_a_layer_less_is_another_number(tmp_path):
    """The negative control: the count is of the config, not of the name."""
    config = json.loads((CONFIGS / "gpt-oss-120b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 35}))
    assert describe_checkpoint(tmp_path).parameters < PARAMETERS["gpt-oss-120b"]


@pytest.mark.models
@pytest.mark.parametrize("name, kind", [("deepseek-v3", "deepseek_v3"), ("deepseek-v3.2", "deepseek_v32"), ("glm-5", "glm_moe_dsa"),
                                        ("gpt-oss-120b", "gpt_oss"), ("minimax-m2", "minimax_m2")])  # fmt: skip
def test_configs_are_what_transformers_has_of_these_models(name, kind):
    """Their classes' own defaults are the published model's: every size that shapes hang on."""
    known = pytest.importorskip("transformers").AutoConfig.for_model(kind)
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    sizes = {key: value for key, value in config.items() if isinstance(value, int) and hasattr(known, key) and "position" not in key}
    assert len(sizes) > 8 and {key: getattr(known, key) for key in sizes} == sizes


def test_plan_without_a_checkpoint(capsys):
    for arguments, code, words in (
        (["--config", str(CONFIGS / "llama-3.1-405b.json"), "--to", "vllm", "--tp", "8"], 0, "405,853,388,800 parameters"),
        (["--to", "vllm"], 2, "name SRC, or the config.json"),
        (["--config", str(CONFIGS / "llama-3.1-405b.json"), "--to", "vllm", "--tp", "3"], 1, "cannot split axis kv (8)"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["plan", *arguments])
        out = capsys.readouterr()
        assert end.value.code == code and words in out.out + out.err
