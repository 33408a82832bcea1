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
