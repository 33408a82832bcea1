"""`reshard verify` as people run it: real processes, exit codes, JSON, the page; and under torchrun."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reshard
from reshard import cli

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
GOOD = f"{SAMPLES}/vllm/llama-tp2 --reference {SAMPLES}/vllm/hf/llama"
NUMBER = r"\d+(?:\.\d+)?(?:e[+-]\d+)?"  # however a float prints: 0, 1e-07, 1.2e-07, 0.00012
KEYS = {"ok", "passed", "max_abs_diff", "max_abs_logit", "mean_kl", "top1_agreement", "tolerance", "nproc", "device", "backend", "control"}


def run(command: str, launcher: tuple[str, ...] = (sys.executable,), **environment) -> subprocess.CompletedProcess:
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launcher, "-m", "reshard", *command.split()],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, **quiet, **environment},
    )


def test_without_transformers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("reshard.verify.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", "ckpt", "--reference", "hf"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 1 and out == ""
    assert err == "Error: verify needs transformers and accelerate to run the original model\n\nhint: pip install 'reshard[verify]'\n"


@pytest.mark.parametrize("value", [0.0, 1e-7, 9.96e-8, 1.19e-7, 1.2e-4, 0.5, 1.0, 12.34, 3e20])
def test_the_pattern_for_numbers_fits_whatever_a_run_measures(value):
    """test_sound_shards_pass_and_are_told_so failed where an error happened to print as 1e-07"""
    assert re.fullmatch(NUMBER, f"{value:.2g}")


@pytest.mark.samples
@pytest.mark.models
def test_sound_shards_pass_and_are_told_so(tmp_path):
    done = run(f"verify {GOOD} --report {tmp_path}/out.html --trace")
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    for line in (
        f"{SAMPLES}/vllm/llama-tp2  vllm tp2  LlamaForCausalLM, 2 layers",
        "per rank: 1.71 MB stored, 3.41 MB held in fp32",
        "passed: logits agree, and all 3 planted defects were found",
    ):
        assert line in shown.splitlines(), shown
    assert re.search(rf"^2 processes on cpu \(gloo\), fp32, 2 × 32 tokens, {NUMBER} s$", shown, re.MULTILINE), shown
    assert re.search(rf"^shards +{NUMBER} +{NUMBER} +{NUMBER} +100% +equal$", shown, re.MULTILINE), shown
    assert len(re.findall(rf"^planted: .* {NUMBER} +{NUMBER} +{NUMBER} +\d+% +found$", shown, re.MULTILINE)) == 3, shown
    assert re.search(rf"^model\.layers\.1\.mlp +{NUMBER}$", shown, re.MULTILINE), "a line of the trace"
    assert re.search(r"^not exercised:\n  positions 32 to \d+: ", shown, re.MULTILINE), "what the verdict does not cover"
    assert done.stderr.splitlines()[:2] == ["running the original", "running the shards on 2 processes"]
    page = (tmp_path / "out.html").read_text()
    assert "passed: logits agree" in page and "model.layers.1.mlp" in page and "rank 1" in page
    assert not re.search(r"(src|href)=|@import|url\(", page), "self-contained"


@pytest.mark.samples
@pytest.mark.models
def test_json_and_exit_code_of_shards_that_differ(tmp_path):
    """Two ranks' files exchanged: the verdict is no, exit code 3, and the part that is off is named."""
    folder = tmp_path / "swapped"
    folder.mkdir()
    good = SAMPLES / "vllm/llama-tp2"
    for path in good.iterdir():
        name = path.name.replace("rank-0", "rank-x").replace("rank-1", "rank-0").replace("rank-x", "rank-1")
        (folder / name).symlink_to(path)
    done = run(f"verify {folder} --reference {SAMPLES}/vllm/hf/llama --nproc 2 --device cpu --dtype fp32 --json")
    assert done.returncode == 3 and done.stderr == "" and done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert KEYS <= result.keys()
    assert result["ok"] and not result["passed"] and result["max_abs_diff"] > result["tolerance"] > 0
    assert (result["nproc"], result["device"], result["backend"]) == (2, "cpu", "gloo")
    assert result["first_apart"] == "model.embed_tokens" and result["suspects"] == ["model.embed_tokens.weight"]
    assert not result["control"]["passed"] and KEYS & result["control"].keys() >= {"max_abs_diff", "mean_kl", "top1_agreement"}
    assert [rank["rank"] for rank in result["ranks"]] == [0, 1]


@pytest.mark.samples
@pytest.mark.models
def test_under_torchrun_one_rank_speaks():
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(f"verify {GOOD} --json", launcher)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["passed"] and result["nproc"] == 2
    wrong = run(f"verify {SAMPLES}/vllm/llama-kv2-tp4 --reference {SAMPLES}/vllm/hf/llama-kv2", launcher)
    assert wrong.returncode != 0
    assert len(re.findall("has 4 ranks .tp4., but 2 processes run", wrong.stderr)) == 1


@pytest.mark.samples
@pytest.mark.models
def test_prompts_low_memory_and_half_precision():
    prompt = run(f"verify {SAMPLES}/vllm/phi3-tp2 --reference {SAMPLES}/vllm/hf/phi3 --json --dtype bf16 --low-memory")
    result = json.loads(prompt.stdout)
    assert result["passed"] and result["dtype"] == "bf16" and result["tolerance"] > 1e-2 * result["max_abs_logit"]


@pytest.mark.samples
@pytest.mark.models
@pytest.mark.parametrize(
    "command, message",
    [
        (f"{GOOD} --nproc 3", r"has 2 ranks \(tp2\), --nproc says 3"),
        (f"{SAMPLES}/vllm/llama-tp2 --reference {SAMPLES}/vllm/llama-tp2", "is of format vllm"),
        (f"{SAMPLES}/vllm/llama-tp2 --reference {SAMPLES}/hf/llama", "has a vocabulary of 1000, the reference .* one of 320"),
        (
            f"{SAMPLES}/vllm/qwen2-tp2 --reference {SAMPLES}/vllm/hf/qwen2 --config {SAMPLES}/vllm/hf/llama",
            r"qkv_proj\.bias .* has no place in LlamaForCausalLM",
        ),
        (
            f"{SAMPLES}/transformers_dist/llama-tp2-fsdp2 --reference {SAMPLES}/hf/llama",
            "of which verify does not know how its engine computes\n\nhint: .*convert it to one of hf",
        ),
    ],
)
def test_what_cannot_be_run_is_one_clear_error(command, message):
    done = run(f"verify {command} -q")
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.startswith("Error: ") and "Traceback" not in done.stderr and done.stderr.count("Error: ") == 1


@pytest.mark.samples
@pytest.mark.models
def test_the_tensor_with_a_wrong_shape_is_named_before_anything_runs(tmp_path):
    """Shards for another tp: vLLM would load these and produce garbage."""
    folder = tmp_path / "tp4-as-tp2"
    folder.mkdir()
    for rank in (0, 1):
        (folder / f"model-rank-{rank}-part-0.safetensors").symlink_to(SAMPLES / f"vllm/llama-kv2-tp4/model-rank-{rank}-part-0.safetensors")
    with pytest.raises(reshard.ReshardError) as error:
        from reshard.verify import verify

        verify(folder, reference=SAMPLES / "vllm/hf/llama-kv2", device="cpu")
    assert len(error.value.problems) > 10
    assert "model.layers.0.mlp.down_proj.weight" in str(
        error.value
    ) and "= 192 on the ranks of its group, the engine takes 384 in all" in str(error.value)
