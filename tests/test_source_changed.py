"""A source that changes after its headers were read: no mixture appears, no process dies of it."""

import os
import shutil
import subprocess
import sys

import pytest

import reshard
from reshard.demo import CONFIG, make_model

FORMATS = [
    {"format": "hf"},
    {"format": "vllm", "tp": 3},
    {"format": "megatron", "tp": 3},
    {"format": "rank-pt", "tp": 2},
    {"format": "tp", "tp": 2},
]


@pytest.fixture
def model(tmp_path):
    make_model(tmp_path / "hf")
    return tmp_path / "hf"


def weights(folder):
    return next(path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".pt"))


def overwrite(path):
    """Other bytes in place, as many as before."""
    with open(path, "r+b") as file:
        file.seek(-1000, 2)
        file.write(os.urandom(1000))


def exchange(path):
    shutil.copy(path, path.with_name("new"))
    overwrite(path.with_name("new"))
    os.replace(path.with_name("new"), path)


def shorten(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("change", [overwrite, exchange, shorten])
def test_source_changed_during_the_run_publishes_nothing(model, tmp_path, options, change):
    """defects.md H2"""
    reshard.convert(model, tmp_path / "src", fsync=False, **options)
    done = []

    def progress(size):
        if not done:
            done.append(change(weights(tmp_path / "src")))

    with pytest.raises(reshard.FormatError) as error:
        reshard.convert(tmp_path / "src", tmp_path / "out", format="vllm", tp=3, progress=progress, jobs=1, buffer=1 << 18)
    assert weights(tmp_path / "src").name in str(error.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.reshard").exists()


@pytest.mark.parametrize("options", FORMATS)
@pytest.mark.parametrize("change", [overwrite, exchange])
def test_file_exchanged_between_open_and_use_is_not_read_by_the_old_header(model, tmp_path, options, change):
    """defects.md H2"""
    reshard.convert(model, tmp_path / "src", fsync=False, **options)
    opened = reshard.open(tmp_path / "src")
    change(weights(tmp_path / "src"))
    with pytest.raises(reshard.FormatError, match="was changed after its header was read"):
        reshard.convert(opened, tmp_path / "out", format="hf")
    with pytest.raises(reshard.FormatError, match="was changed after its header was read"):
        reshard.load(opened, format="vllm", tp=3, rank=1)
    with pytest.raises(reshard.FormatError, match="was changed after its header was read"):
        reshard.diff(opened, model)
    assert not (tmp_path / "out").exists()


def test_config_changed_during_the_run_publishes_nothing(model, tmp_path):
    def progress(size):
        (model / "config.json").write_text((model / "config.json").read_text() + " ")

    with pytest.raises(reshard.FormatError, match="config.json was changed"):
        reshard.convert(model, tmp_path / "out", format="hf", progress=progress)
    assert not (tmp_path / "out").exists()


PROGRAM = """
import os, sys, reshard
from reshard.executor import rearrange, sources
real = sources.Source.{call}
def cut(self, *args):
    os.truncate({file!r}, 20_000)
    return real(self, *args)
sources.Source.{call} = cut
try:
    {command}
except reshard.FormatError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize("command", ["reshard.convert({src!r}, {out!r}, format='vllm', tp=3, rank=1)", "reshard.load({src!r}, format='vllm', tp=3, rank=1)",
                                     "reshard.diff({src!r}, {other!r})"])  # fmt: skip
def test_source_cut_short_while_it_is_read_is_an_error_and_no_dead_process(tmp_path, command):
    """defects.md M9: a mapped file that becomes shorter kills with SIGBUS"""
    config = {**CONFIG, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 9, "head_dim": 128}
    make_model(tmp_path / "hf", config)
    shutil.copytree(tmp_path / "hf", tmp_path / "other")
    command = command.format(src=str(tmp_path / "hf"), out=str(tmp_path / "out"), other=str(tmp_path / "other"))
    program = PROGRAM.format(call="_read_at", file=str(tmp_path / "hf" / "model.safetensors"), command=command)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 7, (done.returncode, done.stderr)
    assert "model.safetensors" in done.stdout and not (tmp_path / "out").exists()


def test_one_rank_of_a_wide_matrix_takes_little_memory(tmp_path):
    """One rank's columns lie far apart: what lies between them is neither mapped nor held. README: 80 MB at most."""
    config = {
        **CONFIG,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 1,
        "vocab_size": 512,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    make_model(tmp_path / "hf", config)
    program = """
import re, sys, reshard, reshard.executor.rearrange, reshard.conversion.transaction
most = lambda: int(re.search("VmHWM:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1]) // 1024
before = most()
reshard.convert(sys.argv[1], sys.argv[2], format="vllm", tp=8, rank=3, fsync=False)
print(most(), before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "hf"), str(tmp_path / "out")], capture_output=True, check=True, text=True
    )
    peak, before = map(int, done.stdout.split())
    assert peak <= 80 and peak - before < 45, (peak, before)
