"""Both sides of a verification compute at full precision, whatever the environment or the caller asked for."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from reshard.errors import FormatError
from reshard.verify.exact import exact

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"


def test_full_precision_whatever_the_environment_asks_for():
    """defects.md E14: with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 torch starts with TF32 on"""
    code = """
import torch
from reshard.verify.exact import exact
matmul = torch.backends.cuda.matmul
state = lambda: [matmul.allow_tf32, matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction, torch.backends.cudnn.allow_tf32]
before = state()
with exact():
    print(state(), torch.get_float32_matmul_precision())
print(before[0], before == state())
"""
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == ["[False, False, False, False] highest", "True True"]


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch 2.9 began these names")
@pytest.mark.parametrize(
    "caller",
    [
        "b.cuda.matmul.fp32_precision = 'tf32'",  # torch then refuses to read allow_tf32, and get_float32_matmul_precision()
        "b.fp32_precision = 'tf32'",
        "b.cudnn.fp32_precision = 'tf32'",
        "b.mkldnn.matmul.fp32_precision = 'bf16'",
        "torch.set_float32_matmul_precision('medium')",
        "b.cuda.matmul.allow_tf32 = True",
        "b.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)",
    ],
)
def test_full_precision_by_whichever_names_the_caller_asked_for_less(caller):
    """torch has two sets of names for TF32 since 2.9, and raises where both were used: verify stopped at them"""
    code = f"""
import torch
from reshard.verify.exact import exact
b = torch.backends
owners = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
def read(get):
    try: return get()
    except RuntimeError: return "not told"
def state():
    older = [lambda: b.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision, lambda: b.cudnn.allow_tf32,
             lambda: torch._C._get_cublas_allow_bf16_reduced_precision_reduction()]
    return [owner.fp32_precision for owner in owners] + [read(get) for get in older]
{caller}
before = state()
with exact():
    print(state())
print(state() == before)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines() == [str(["ieee"] * 6 + [False, "highest", False, (False, True)]), "True"]


def test_the_verdict_says_which_precision_it_is_of(tmp_path):
    """Issue 18: the figures of a GPU mean nothing without it"""
    from reshard.verify.exact import STATED
    from reshard.verify.figures import Figures
    from reshard.verify.page import page
    from reshard.verify.report import Report, Result

    result = Result("shards", Figures(1e-6, 1.0, 0.0, 1.0, 1e-5))
    words = (tmp_path, tmp_path, "vllm", "tp 2", "LlamaForCausalLM", 2, "fp32", "cuda", "nccl", 2, 1, (2, 32), "tp", result, [], [], 1.0)
    report = Report(*words)
    assert "TF32 off" in STATED and STATED in report.describe() and STATED in page(report) and report.to_json()["precision"] == STATED


def test_settings_of_the_caller_come_back_after_an_error():
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(KeyError), exact():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.models
@pytest.mark.parametrize("method", ["tp", "permute"])
def test_both_methods_compute_within_full_precision(method, monkeypatch):
    """defects.md E14: permute went past it"""
    pytest.importorskip("transformers")
    from reshard.verify import permute, run
    from reshard.verify.request import Request

    seen = []
    torch.set_float32_matmul_precision("medium")

    def stop(*args, **options):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction))
        raise FormatError("far enough")

    monkeypatch.setattr(run if method == "tp" else permute, "run_reference", stop)
    request = (
        Request(SAMPLES / "vllm/llama-tp2", SAMPLES / "vllm/hf/llama")
        if method == "permute"
        else Request(SAMPLES / "hf/llama", SAMPLES / "hf/llama")
    )
    try:
        with tempfile.TemporaryDirectory() as folder, pytest.raises(FormatError, match="far enough"):
            if method == "tp":
                dist.init_process_group("gloo", f"file://{folder}/meet", world_size=1, rank=0)
                run.verify_rank(request, 0, 1, 0, 1)
            else:
                permute.verify_permuted(request)
        assert seen == [("highest", False)] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        if dist.is_initialized():
            dist.destroy_process_group()
