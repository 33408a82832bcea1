"""Files made to stall a reader, to exhaust its memory, or to command the terminal: refused by name, at once."""

import json
import os
import resource
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reshard
from reshard.cli import main
from reshard.demo import make_model
from reshard.errors import FormatError, PlanError, ReshardError
from reshard.stores import safetensors, torchzip
from reshard.stores.files import open_file, read_json, reading

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 4, "vocab_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def crafted(tmp_path: Path, pickled: bytes) -> Path:
    """A torch file whose pickle is `pickled`, with one storage of 16 bytes."""
    with zipfile.ZipFile(tmp_path / "crafted.pt", "w", zipfile.ZIP_STORED) as file:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(16)}.items():
            file.writestr(f"archive/{name}", content)
    return tmp_path / "crafted.pt"


def text(content: bytes) -> bytes:
    return b"X" + struct.pack("<L", len(content)) + content


LONG = text(b"a" * 200_000) + b"q\x01"  # remembered as 1
MANY = b"]q\x01(" + b"K\x01" * 200_000 + b"e"


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02(" + MANY + b"h\x01" * 200_000 + b"t.",  # one long list held 200,000 times
        b"\x80\x02}q\x00(" + b"K\x01" * 200_000 + b"tq\x01" + b"h\x00h\x01Ns0" * 20_000 + b".",  # a long tuple as key
        b"\x80\x02(" + MANY + b"".join(b"ctorch\nSize\nh\x01\x85R" for _ in range(20_000)) + b"t.",
        b"\x80\x02(" + LONG + b"".join(b"c_codecs\nencode\nh\x01X\x06\0\0\0latin1\x86R" for _ in range(20_000)) + b"t.",
        b"\x80\x02(" + LONG + b"".join(b"cbuiltins\nbytearray\nh\x01X\x06\0\0\0latin1\x86R" for _ in range(20_000)) + b"t.",
        b"\x80\x02(" + LONG + b"".join(b"cpathlib\nPath\nh\x01\x85R" for _ in range(20_000)) + b"t.",
        b"\x80\x02(" + LONG + b"".join(b"cbuiltins\ncomplex\nh\x01\x85R" for _ in range(20_000)) + b"t.",
        b"\x80\x02(" + MANY + b"".join(b"cbuiltins\nset\nh\x01\x85R" for _ in range(20_000)) + b"t.",
        b"\x80\x04("
        + text(b"numpy." + b"a" * 200_000)
        + b"\x94"
        + b"".join(b"h\x00" + text(b"%d" % i) + b"\x93" for i in range(20_000))
        + b"t.",
    ],
    ids=["held list", "key", "Size", "encode", "bytearray", "path", "complex", "set", "name"],
)
def test_what_a_pickle_copies_is_bounded(tmp_path, pickled):
    """defects.md M5: less than a megabyte took minutes of CPU, or gigabytes."""
    path, began = crafted(tmp_path, pickled), time.process_time()
    try:
        torchzip.read(path)
    except FormatError as error:
        assert str(path) in str(error)
    assert time.process_time() - began < 5


def test_a_tensor_of_stride_zero_is_no_larger_than_the_file(tmp_path):
    """defects.md M6: sixteen bytes stood for 70 TB."""
    torch.save({"w": torch.zeros(1).expand(1 << 30)}, tmp_path / "w.pt")
    with pytest.raises(FormatError, match=r"w: .*repeat bytes of their storages, more than"):
        torchzip.read(tmp_path / "w.pt")
    torch.save({"w": torch.zeros(1).expand(1000)}, tmp_path / "w.pt")  # control: a small one may repeat itself
    assert torchzip.read(tmp_path / "w.pt")["w"].shape == (1000,)


@pytest.mark.parametrize(
    "name", ["model-rank-0-part-0.safetensors", "shard-00001-model-00001-of-00001.safetensors", "rank_00.pt", "config.json"]
)
def test_a_named_pipe_is_no_file(tmp_path, name):
    """defects.md M6: opening one blocked for ever."""
    make_model(tmp_path / "m", CONFIG)
    (tmp_path / "m/model.safetensors").unlink()
    (tmp_path / "m" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "m" / name)
    script = f"import reshard\ntry: reshard.open({str(tmp_path / 'm')!r})\nexcept reshard.ReshardError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert name in done.stdout and done.returncode == 0, done


def test_a_device_is_no_file():
    with pytest.raises(FormatError, match="/dev/zero is a device, not a file"):
        open_file(Path("/dev/zero"))


@pytest.mark.parametrize("name", ["config.json", "reshard.json", "model.safetensors.index.json"])
def test_a_json_of_gigabytes_is_not_read(tmp_path, name):
    """defects.md M6: three sparse gigabytes became six of memory."""
    make_model(tmp_path / "m", CONFIG)
    with open(tmp_path / "m" / name, "wb") as file:
        file.truncate(3 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=rf"{name} has {3 << 30} bytes, more than the"):
        reshard.open(tmp_path / "m")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.parametrize("item", [b"[],", b"{},", b"0,"])
def test_a_header_of_millions_of_values_is_refused_before_it_is_parsed(tmp_path, item):
    """defects.md M6: a 100 MB header of empty lists took 2.8 GB."""
    raw = b'{"a":[' + item * 5_000_000 + b"0]}"
    (tmp_path / "h.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    began = time.process_time()
    with pytest.raises(FormatError, match="values, more than the 4000000 allowed"):
        safetensors.read(tmp_path / "h.safetensors")
    assert time.process_time() - began < 2


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4976698672\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, name):
    """defects.md B, unsupported input: it was a "header of 2336927755350992246 bytes"."""
    make_model(tmp_path / "m", CONFIG)
    if name == "pytorch_model.bin":
        (tmp_path / "m/model.safetensors").unlink()
    (tmp_path / "m" / name).write_bytes(POINTER)
    with pytest.raises(FormatError) as caught:
        reshard.open(tmp_path / "m")
    assert name in str(caught.value) and "git lfs pull" in caught.value.hint and "LFS pointer" in f"{caught.value} {caught.value.hint}"


def test_surprises_in_a_reader_become_one_error_that_names_the_file(tmp_path):
    """defects.md L1: the one boundary; the cause stays attached, and what reshard says itself passes unchanged."""
    for surprise in (
        KeyError("x"),
        ValueError("x\x1b[2J"),
        RecursionError(),
        struct.error("x"),
        OverflowError(),
        UnicodeError(),
        IndexError(),
    ):
        with pytest.raises(FormatError, match="f.bin can't be read") as caught, reading(tmp_path / "f.bin"):
            raise surprise
        assert caught.value.__cause__ is surprise and "\x1b" not in str(caught.value)
    with pytest.raises(PlanError, match="mine"), reading(tmp_path):
        raise PlanError(["mine"])
    with pytest.raises(AssertionError), reading(tmp_path):  # no user's input fails an assertion: that is our defect
        raise AssertionError


def test_no_error_commands_the_terminal():
    """defects.md, Low: escapes were printed raw."""
    for error in (ReshardError("a\x1b[2Jb\u202ec", "d\x07e"), PlanError(["a\x1b[2Jb\nc"], "d\x9be")):
        assert all(c.isprintable() or c == "\n" for c in f"{error}{error.hint}"), repr(str(error))
    assert "ü×…" in str(ReshardError("ü×…"))


def test_no_table_commands_the_terminal(tmp_path, capsys):
    """defects.md, Low: architectures[0] and the names of dropped tensors went to the terminal as they were."""
    make_model(tmp_path / "m", CONFIG)
    config = json.loads((tmp_path / "m/config.json").read_text())
    evil = "\x1b]0;owned\x07"
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"architectures": [f"x{evil}\nError: y", "LlamaForCausalLM"]}))
    held = reshard.load(tmp_path / "m", format="hf")
    save_file({**held, f"model.layers.{evil}.self_attn.rotary_emb.inv_freq": torch.zeros(1)}, tmp_path / "m/model.safetensors")
    for command in (["inspect", str(tmp_path / "m"), "--tensors"], ["plan", str(tmp_path / "m"), "--to", "tp", "--tp", "2"]):
        with pytest.raises(SystemExit) as exit:
            main(command)
        out, err = capsys.readouterr()
        assert exit.value.code == 0, err
        assert "owned" in out and all(c.isprintable() or c == "\n" for c in out), repr(out)
        assert "\nError" not in out


def test_json_says_which_file(tmp_path):
    (tmp_path / "x.json").write_bytes(b"{")
    with pytest.raises(FormatError, match="x.json is not JSON"):
        read_json(tmp_path / "x.json")
