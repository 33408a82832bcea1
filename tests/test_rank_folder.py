"""--rank: each rank's run adds its files to one folder, which is whole with the last."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

import reshard
from reshard.demo import make_model

TARGETS = [{"format": "vllm", "tp": 3}, {"format": "megatron", "tp": 3, "pp": 2}, {"format": "tp", "tp": 2}, {"format": "rank-pt", "tp": 3}]


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "hf")
    return tmp_path / "hf"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("options", TARGETS)
def test_ranks_fill_one_folder_which_is_then_as_one_made_at_once(model, tmp_path, options):
    """defects.md B8"""
    reshard.convert(model, tmp_path / "whole", **options)
    count = options["tp"] * options.get("pp", 1)
    order = list(range(count))
    Random(1).shuffle(order)
    for rank in order:
        report = reshard.convert(model, tmp_path / "out", rank=rank, **options)
        assert report.bytes_written
        if rank != order[-1]:
            with pytest.raises(reshard.FormatError, match=rf"holds {order.index(rank) + 1} of the {count} ranks") as error:
                reshard.open(tmp_path / "out")
            assert "--rank" in error.value.hint
        again = reshard.convert(model, tmp_path / "out", rank=rank, **options) if rank != order[-1] else None
        assert again is None or (again.bytes_written == 0 and again.resumed_files == len(again.files))
    assert reshard.diff(model, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole") and leftovers(tmp_path) == []


def test_whole_model_in_one_rank_is_a_whole_model(model, tmp_path):
    """defects.md B8"""
    reshard.convert(model, tmp_path / "out", format="hf", rank=0)
    assert reshard.diff(model, tmp_path / "out")


@pytest.mark.parametrize(
    "other", [{"format": "tp", "tp": 2}, {"dtype": "fp32"}, {"format": "sglang"}, {"max_file": 300_000}, {"engine_version": "0.28"}]
)
def test_rank_of_another_conversion_is_refused(model, tmp_path, other):
    options = {"format": "vllm", "tp": 3}
    reshard.convert(model, tmp_path / "out", rank=0, **options)
    before = files_of(tmp_path / "out")
    with pytest.raises(reshard.DestinationError, match="rank 0 of another conversion"):
        reshard.convert(model, tmp_path / "out", rank=1, **{**options, **other})
    assert files_of(tmp_path / "out") == before


def test_rank_of_another_source_or_layout_is_refused(model, tmp_path):
    options = {"format": "vllm", "tp": 3}
    reshard.convert(model, tmp_path / "out", rank=0, **options)
    make_model(tmp_path / "other", seed=1)
    with pytest.raises(reshard.DestinationError, match="another conversion"):
        reshard.convert(tmp_path / "other", tmp_path / "out", rank=1, **options)
    swapped = '[vllm]\ngate_up = { name = ".gate_up_proj.weight", of = "up gate" }\n'
    (tmp_path / "llama.toml").write_text(f'extends = "llama"\narchitectures = ["LlamaForCausalLM"]\n{swapped}')
    with pytest.raises(reshard.DestinationError, match="another conversion"):
        reshard.convert(model, tmp_path / "out", rank=1, layout=tmp_path / "llama.toml", **options)
    with pytest.raises(reshard.DestinationError, match="not empty"):
        reshard.convert(model, tmp_path / "out", **options)
    reshard.convert(model, tmp_path / "out", overwrite=True, **options)
    assert reshard.diff(model, tmp_path / "out")


def test_overwrite_with_the_same_conversion_keeps_the_other_ranks(model, tmp_path):
    """defects.md B8: following the hint deleted rank 0's files"""
    for rank in range(3):
        reshard.convert(model, tmp_path / "out", rank=rank, overwrite=True, format="vllm", tp=3)
    assert reshard.diff(model, tmp_path / "out")


def test_ranks_at_once_from_several_processes(model, tmp_path):
    reshard.convert(model, tmp_path / "whole", format="tp", tp=5)
    program = "import sys, reshard; reshard.convert(sys.argv[1], sys.argv[2], format='tp', tp=5, rank=int(sys.argv[3]))"
    for _ in range(2):
        processes = [subprocess.Popen([sys.executable, "-c", program, str(model), str(tmp_path / "out"), str(rank)]) for rank in range(5)]
        assert [process.wait() for process in processes] == [0] * 5
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole") and leftovers(tmp_path) == []
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("at", range(1, 5))
def test_death_while_a_rank_is_added_harms_no_other(model, tmp_path, at):
    options = {"format": "vllm", "tp": 3, "max_file": 300_000}
    reshard.convert(model, tmp_path / "whole", **options)
    reshard.convert(model, tmp_path / "out", rank=0, **options)
    program = f"""
import os, sys, reshard
real, calls = os.replace, []
def replace(a, b):
    calls.append(b)
    if len(calls) == {at}:
        os.kill(os.getpid(), 9)
    return real(a, b)
os.replace = replace
reshard.convert({str(model)!r}, {str(tmp_path / "out")!r}, rank=1, **{options!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    for rank in (2, 1):
        reshard.convert(model, tmp_path / "out", rank=rank, **options)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole") and leftovers(tmp_path) == []


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_death_after_the_last_step_of_a_rank_is_tidied_up(model, tmp_path, rank):
    options = {"format": "vllm", "tp": 3}
    for other in {0, 1, 2} - {rank}:
        reshard.convert(model, tmp_path / "out", rank=other, **options)
    program = f"""
import os, shutil, reshard
shutil.rmtree = lambda *a, **k: os.kill(os.getpid(), 9)
reshard.convert({str(model)!r}, {str(tmp_path / "out")!r}, rank={rank}, **{options!r})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert reshard.diff(model, tmp_path / "out") and leftovers(tmp_path)
    report = reshard.convert(model, tmp_path / "out", rank=rank, **options)
    assert report.bytes_written == 0 and leftovers(tmp_path) == []


def test_file_of_a_rank_that_was_cut_short_is_made_again(model, tmp_path):
    reshard.convert(model, tmp_path / "out", rank=0, format="vllm", tp=3)
    (tmp_path / "out" / "model-rank-0-part-0.safetensors").write_bytes(b"x")
    assert reshard.convert(model, tmp_path / "out", rank=0, format="vllm", tp=3).bytes_written
    for rank in (1, 2):
        reshard.convert(model, tmp_path / "out", rank=rank, format="vllm", tp=3)
    assert reshard.diff(model, tmp_path / "out")


@pytest.mark.parametrize(
    "ranks", [5, {}, {"held": [0]}, {"held": ["0"], "of": 3}, {"held": [0, 0], "of": 3}, {"held": [0], "of": 10**9}, {"held": [], "of": 3}]
)
def test_hostile_ranks_in_a_manifest_are_refused(model, tmp_path, ranks):
    reshard.convert(model, tmp_path / "out", rank=0, format="vllm", tp=3)
    path = tmp_path / "out" / "reshard.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "ranks": ranks}))
    with pytest.raises(reshard.FormatError, match="its ranks are"):
        reshard.open(tmp_path / "out")
    with pytest.raises(reshard.DestinationError, match="not empty"):
        reshard.convert(model, tmp_path / "out", rank=1, format="vllm", tp=3)
