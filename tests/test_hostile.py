"""Broken and hostile inputs, through the command line: one clear error, exit code 1, no traceback, and nothing left behind."""

import builtins
import json
import os
import pickle
import re
import shutil
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.cli import main
from reshard.demo import make_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 4, "vocab_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def hf(tmp_path) -> Path:
    make_model(tmp_path / "hf", CONFIG)
    return tmp_path / "hf"


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs `reshard convert FOLDER out`: it must fail, quickly, with the texts given, and leave the disk as it was."""
    monkeypatch.chdir(tmp_path)

    def run(folder: Path, *said: str, hint: str | None = None, to: tuple = ("--to", "hf")) -> str:
        before, began = sorted(tmp_path.rglob("*")), time.monotonic()
        with pytest.raises(SystemExit) as exit:
            main(["convert", str(folder), str(tmp_path / "out"), "--no-fsync", *to])
        out, err = capsys.readouterr()
        assert exit.value.code == 1
        assert time.monotonic() - began < 60
        assert out == "" and err.startswith("Error: ") and err.count("\nError: ") == 0 and "Traceback" not in err
        assert len(err) < 8000 and all(c.isprintable() or c == "\n" for c in err)
        for text in said:
            assert text in err, err
        if hint:
            assert "\n\nhint: " in err and hint in err.partition("\n\nhint: ")[2], err
        assert sorted(tmp_path.rglob("*")) == before  # no out, no .out.reshard, no file of a pickle's making
        return err

    return run


def test_the_untouched_model_converts(tmp_path, hf):
    """The control: what is refused below is refused for what was done to it."""
    with pytest.raises(SystemExit) as exit:
        main(["convert", str(hf), str(tmp_path / "out"), "--no-fsync", "--to", "hf", "-q"])
    assert exit.value.code == 0 and (tmp_path / "out/model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------------- safetensors


def rewrite(path: Path, change) -> None:
    """The file with its header changed, its data as they were; `change` gives the new header or its bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = change(json.loads(raw[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    "left, said", [(0, "has 0 bytes"), (7, "has 7 bytes"), (100, "has 100 bytes, its header alone needs"), (-1, "its header describes")]
)
def test_truncated(hf, refused, left, said):
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refused(hf, "hf/model.safetensors", said, hint="truncated")


def test_added_to(hf, refused):
    with open(hf / "model.safetensors", "ab") as file:
        file.write(b"x")
    size = (hf / "model.safetensors").stat().st_size
    refused(hf, f"has {size} bytes, its header describes {size - 1}", hint="added to")


def offsets(begin=0, end=0, **more):
    def change(header):
        low, high = header[Q]["data_offsets"]
        return {**header, Q: {**header[Q], "data_offsets": [low + begin, high + end], **more}}

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        (offsets(2, 2), "leaves a hole"),
        (offsets(-2, -2), "overlaps"),
        (offsets(0, 2), f"{Q} spans 1026 bytes, BF16 [32, 16] needs 1024"),
        (offsets(1 << 62, 1 << 62), "leaves a hole before it"),
        (offsets(shape=[1 << 40, 1 << 40]), "2**63 bytes or more"),
        (offsets(shape=[32, 8]), f"{Q} spans 1024 bytes, BF16 [32, 8] needs 512"),
        (offsets(dtype="Q4" * 5000), f"{Q} has dtype 'Q4Q4"),
        (lambda header: json.dumps(header).encode().replace(b"{", b'{"lm_head.weight":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', 1),
         "the key 'lm_head.weight' stands twice"),
        (lambda header: {**header, "x" * 5000: {"dtype": "U8", "shape": [1], "data_offsets": [5, 6]}}, "xxx… begins at byte 5"),
        (lambda header: {**header, "\x1b]0;x\x07": 1}, r"\x1b]0;x\x07 must have dtype"),
        (lambda header: b"[" * 50_000, "nested too deeply"),
        (lambda header: [header], "header is a list, not an object"),
    ],
)  # fmt: skip
def test_header_lies(hf, refused, change, said):
    rewrite(hf / "model.safetensors", change)
    refused(hf, "hf/model.safetensors", said)


def test_header_beyond_the_cap(hf, refused):
    """100 MB are the most: the number is refused, whatever the file's size (sparse)."""
    with open(hf / "model.safetensors", "r+b") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    refused(hf, "header of 100000001 bytes is larger than the 100000000 allowed")


# ---------------------------------------------------------------------------------------------------- tensors, layout


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_every_problem_in_one_error(hf, refused):
    tensors = load_file(hf / "model.safetensors")
    del tensors[Q]
    tensors["model.norm.weight"] = torch.zeros(17)
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].t().contiguous()
    tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(16)
    tensors["nonsense"] = torch.zeros(1)
    save(hf, tensors)
    refused(hf, "5 problems", f"{Q} is missing (rank 0), expected shape [32, 16]", "model.norm.weight (model.safetensors): shape [17], expected [16]",
            "model.layers.1.mlp.up_proj.weight (model.safetensors): shape [16, 24], expected [24, 16]",
            "model.layers.2.input_layernorm.weight (model.safetensors) is not in layout llama", "nonsense (model.safetensors) is not in layout llama",
            hint="config.json")  # fmt: skip


def test_no_tensors_at_all(hf, refused):
    save(hf, {})
    assert refused(hf, "21 problems", "is missing").count("is missing") == 20


def test_an_unknown_architecture_with_familiar_names(hf, refused):
    config(hf, architectures=["FooForCausalLM"])
    refused(hf, "FooForCausalLM", "llama explains the names of all 21 tensors", hint='extends = "llama"')


def test_an_unknown_architecture_with_some_foreign_names(hf, refused):
    config(hf, architectures=["FooForCausalLM"])
    save(hf, load_file(hf / "model.safetensors") | {"model.layers.0.foo.weight": torch.zeros(1), "model.bar": torch.zeros(1)})
    refused(
        hf, "closest is llama, which leaves 2 of 23 tensors unexplained", "model.bar", "model.layers.0.foo.weight", hint='extends = "llama"'
    )


def config(folder: Path, **changes) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))


@pytest.mark.parametrize(
    "content, said",
    [(b"", "config.json is not JSON"), (b"{", "config.json is not JSON"), (b"\xff\xfe\x00", "is not JSON"), (b"[]", "holds a list, expected an object"),
     (b"3", "holds a int, expected an object"), (b'{"hidden_size":' + b"9" * 5000 + b"}", "config.json is not JSON")],
)  # fmt: skip
def test_config_that_is_none(hf, refused, content, said):
    (hf / "config.json").write_bytes(content)
    refused(hf, "hf/config.json", said)


def test_config_missing(hf, refused):
    (hf / "config.json").unlink()
    refused(hf, "hf has no config.json", hint="--config")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_size": -16}, "axis hidden = 'hidden_size' is -16"),
        ({"hidden_size": "16"}, "axis hidden = 'hidden_size' is '16'"),
        ({"hidden_size": 16.0}, "is 16.0"),
        ({"hidden_size": True}, "is True"),
        ({"hidden_size": [16]}, "is [16]"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"hidden_size": 0}, "has no elements: axis hidden"),
        ({"hidden_size": 10**30}, f"expected [64, {10**30}]"),
        ({"vocab_size": 10**18}, f"expected [{10**18}, 16]"),
        ({"num_attention_heads": 9}, "9 is not divisible by 4"),
        ({"num_key_value_heads": 0}, "division of 8 by zero"),
        ({"head_dim": 3}, "3 is not divisible by 2"),
        ({"num_hidden_layers": "2"}, "count = 'num_hidden_layers' is '2', not a number of places"),
        ({"num_hidden_layers": 1}, "model.layers.1.mlp.up_proj.weight (model.safetensors) is not in layout llama"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
        ({"attention_bias": True}, "self_attn.q_proj.bias is missing"),
    ],
)  # fmt: skip
def test_config_that_lies(hf, refused, changes, said):
    config(hf, **changes)
    refused(hf, said)


# --------------------------------------------------------------------------------------------------------------- index


def indexed(folder: Path, weight_map: object = None, **more) -> None:
    """The model in two files, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    true = {name: file for file, part in files.items() for name in part}
    table = {"metadata": {}, "weight_map": {**true, **(weight_map or {}), **more}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def test_an_honest_index(tmp_path, hf):
    content = (hf / "model.safetensors").read_bytes()
    indexed(hf)
    reshard.convert(hf, tmp_path / "out", format="hf", fsync=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == content


@pytest.mark.parametrize(
    "file, said",
    [
        ("../outside.safetensors", "'../outside.safetensors' leads out of the folder"),
        ("a/../../outside.safetensors", "leads out of the folder"),
        ("/etc/passwd", "'/etc/passwd' leads out of the folder"),
        ("", "leads out of the folder"),
        ("x\0.safetensors", "leads out of the folder"),
        ("gone.safetensors", "lists 3 files, 1 missing: gone.safetensors"),
        (".", "lists 3 files, 1 missing: ."),
        ("config.json", "config.json: is not a torch.save file"),
        (7, f"names 7 as the file of {Q}"),
        (None, f"names None as the file of {Q}"),
        (["x"], f"names ['x'] as the file of {Q}"),
        ("x" * 5000, f"as the file of {Q}, expected the name of one"),
    ],
)  # fmt: skip
def test_index_leads_astray(tmp_path, hf, refused, file, said):
    shutil.copy(hf / "model.safetensors", tmp_path / "outside.safetensors")
    indexed(hf, {Q: file})
    refused(hf, said)


def test_index_lists_what_its_file_lacks(hf, refused):
    indexed(hf, {"model.extra": "model-00001-of-00002.safetensors"})
    refused(
        hf,
        "model-00001-of-00002.safetensors lacks model.extra, which model.safetensors.index.json says it holds (1 such)",
        hint="other files",
    )


def test_index_swaps_files(hf, refused):
    indexed(hf)
    first, second = sorted(hf.glob("model-*.safetensors"))
    first.rename(hf / "x")
    second.rename(first)
    (hf / "x").rename(second)
    refused(hf, "model-00001-of-00002.safetensors lacks lm_head.weight", "(11 such)")


def test_file_holds_what_its_index_does_not_list(hf, refused):
    """Not dropped in silence: whatever lies in the files must be explained."""
    indexed(hf)
    path = hf / "model-00002-of-00002.safetensors"
    save_file(load_file(path) | {"secret": torch.zeros(1)}, path)
    refused(hf, "secret (model-00002-of-00002.safetensors) is not in layout llama")


def test_index_with_a_key_twice(hf, refused):
    indexed(hf)
    path = hf / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"{Q}": "model-00001-of-00002.safetensors",'))
    refused(hf, f"{path} is not JSON: the key '{Q}' stands twice")


@pytest.mark.parametrize(
    "content, said",
    [("{", "is not JSON"), ("[]", "no weight_map"), ('{"weight_map": []}', "no weight_map"), ("[" * 99999, "nested too deeply")],
)
def test_index_that_is_none(hf, refused, content, said):
    indexed(hf)
    (hf / "model.safetensors.index.json").write_text(content)
    refused(hf, "hf/model.safetensors.index.json", said)


def test_links_are_followed_as_the_hub_cache_needs(tmp_path, hf):
    """Names never lead out of the folder, links may: the Hub's cache keeps every file in blobs/ and links to it."""
    content = (hf / "model.safetensors").read_bytes()
    indexed(hf)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(hf.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(i))
    reshard.convert(snapshot, tmp_path / "out", format="hf", fsync=False)
    assert (tmp_path / "out/model.safetensors").read_bytes() == content
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_links_that_lead_nowhere(hf, refused):
    indexed(hf)
    (hf / "model-00002-of-00002.safetensors").unlink()
    (hf / "model-00002-of-00002.safetensors").symlink_to("model-00002-of-00002.safetensors")
    refused(hf, "1 missing: model-00002-of-00002.safetensors", hint="download")


# ------------------------------------------------------------------------------------------------- manifest and ranks


@pytest.fixture
def ranks(tmp_path, hf):
    """Folders of ranks: ranks("vllm", 2)."""

    def make(format: str, tp: int) -> Path:
        reshard.convert(hf, tmp_path / f"{format}{tp}", format=format, tp=tp, fsync=False)
        return tmp_path / f"{format}{tp}"

    return make


def manifest(folder: Path, **changes) -> None:
    table = json.loads((folder / "reshard.json").read_text())
    (folder / "reshard.json").write_text(json.dumps({**table, **changes}))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"{}", b"[" * 99999, b'{"format": 1}'])
def test_manifest_that_is_none(ranks, refused, content):
    folder = ranks("vllm", 2)
    (folder / "reshard.json").write_bytes(content)
    refused(folder, "reshard.json is not a manifest that reshard wrote", hint="delete it")


@pytest.mark.parametrize("format", ["vllm", "tp", "rank-pt", "megatron"])
@pytest.mark.parametrize(
    "mesh, said",
    [
        ({"pp": 1, "ep": 1}, "its mesh is {'pp': 1, 'ep': 1}, expected sizes"),
        ({"tp": 0, "pp": 1, "ep": 1}, "expected sizes"),
        ({"tp": True, "pp": 1, "ep": 1}, "expected sizes"),
        ({"tp": "2", "pp": 1, "ep": 1}, "expected sizes"),
        ({"tp": 2, "pp": 1, "ep": 1, "etp": -1}, "a size etp"),
        ({"tp": 10**9, "pp": 1, "ep": 1}, "more than 65536 ranks"),
        ({"tp": 1, "pp": 1, "ep": 10**9}, "more than 65536 ranks"),
        ({"tp": 65536, "pp": 65536, "ep": 1}, "more than 65536 ranks"),
        ([2, 1, 1], "expected sizes"),
        (None, "expected sizes"),
    ],
)  # fmt: skip
def test_manifest_with_an_impossible_mesh(ranks, refused, format, mesh, said):
    folder = ranks(format, 2)
    manifest(folder, mesh=mesh)
    refused(folder, "is not a manifest that reshard wrote: its mesh is", said, hint="delete it")


@pytest.mark.parametrize("format, said", [("vllm", "manifest says tp4"), ("tp", "disagree on the mesh: tp2, tp4"), ("rank-pt", "holds 2 rank_XX.pt"),
                                          ("rank-pt", "expected 4, of ranks 0 to 3")])  # fmt: skip
def test_manifest_of_another_mesh(ranks, refused, format, said):
    folder = ranks(format, 2)
    manifest(folder, mesh={"tp": 4, "pp": 1, "ep": 1})
    refused(folder, said)


def test_manifest_that_cuts_a_whole_format(hf, refused, tmp_path):
    reshard.convert(hf, tmp_path / "whole", format="hf", fsync=False)
    manifest(tmp_path / "whole", mesh={"tp": 2, "pp": 1, "ep": 1})
    refused(tmp_path / "whole", "format hf, which is whole; its manifest says tp2")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"files": {"../hf/model.safetensors": 1}}, "'../hf/model.safetensors' leads out of the folder"),
        ({"files": {"/etc/passwd": 1}}, "leads out of the folder"),
        ({"files": {"gone.safetensors": 1}}, "gone.safetensors is missing (1 of the 1 files"),
        ({"files": {"model-rank-0-part-0.safetensors": 1}}, "bytes, the manifest says 1"),
        ({"files": {"model-rank-0-part-0.safetensors": "1"}}, "its files are"),
        ({"files": {"x" * 5000: 1}}, "its files are"),
        ({"files": ["a"]}, "its files are"),
        ({"files": None}, "its files are"),
        ({"format": "nonsense"}, "unknown format 'nonsense'"),
        ({"format": "hf"}, "its manifest says tp2"),
        ({"format": "tp"}, "holds no shard-"),
        ({"format": None}, "its format is None"),
        ({"layout": 3}, "its layout is 3"),
        ({"engine_version": [1]}, "its engine_version is [1]"),
        ({"dtypes": {"q": "int4"}}, "its dtypes are {'q': 'int4'}"),
    ],
)  # fmt: skip
def test_manifest_that_lies(ranks, refused, changes, said):
    folder = ranks("vllm", 2)
    manifest(folder, **changes)
    refused(folder, said)


def test_a_truncated_rank_is_found_by_its_size(ranks, refused):
    folder = ranks("vllm", 2)
    path = folder / "model-rank-1-part-0.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, f"model-rank-1-part-0.safetensors has {size - 1} bytes, the manifest says {size}", hint="truncated")


def test_vllm_ranks_of_two_meshes(ranks, refused):
    """With its manifest, and without."""
    folder, other = ranks("vllm", 2), ranks("vllm", 4)
    for rank in (2, 3):
        shutil.copy(other / f"model-rank-{rank}-part-0.safetensors", folder)
    refused(folder, "holds files of tp4, its manifest says tp2", hint="mixed")
    (folder / "reshard.json").unlink()
    refused(folder, "model.layers.0.self_attn.qkv_proj.weight (model-rank-0-part-0.safetensors): shape [32, 16], expected [16, 16]")


def test_vllm_missing_rank(ranks, refused):
    folder = ranks("vllm", 4)
    (folder / "model-rank-1-part-0.safetensors").unlink()
    refused(folder, "model-rank-1-part-0.safetensors is missing (1 of the 4 files", hint="again, whole")
    (folder / "reshard.json").unlink()
    refused(folder, "no files of rank 1", hint="again, whole")


@pytest.mark.parametrize("format, file, said", [
    ("tp", "shard-00002-model-00001-of-00001.safetensors", "rank 1 has parts []"),
    ("tp", "shard-00004-model-00001-of-00001.safetensors", "has files of 3 ranks, its metadata says 4"),
    ("rank-pt", "rank_01.pt", "holds 3 rank_XX.pt, of ranks 0, 2, 3; expected 4, of ranks 0 to 3"),
])  # fmt: skip
def test_missing_rank(ranks, refused, format, file, said):
    folder = ranks(format, 4)
    (folder / file).unlink()
    refused(folder, f"{file} is missing")
    (folder / "reshard.json").unlink()
    refused(folder, said, hint="again, whole")


def test_a_rank_number_beyond_reason(ranks, refused):
    folder = ranks("rank-pt", 2)
    (folder / "reshard.json").unlink()
    shutil.copy(folder / "rank_01.pt", folder / "rank_99999.pt")
    refused(folder, "holds 3 rank_XX.pt, of ranks 0, 1, 99999; expected 100000")


# -------------------------------------------------------------------------------------------------------------- pickles


class Run:
    """Pickles as a call."""

    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


def bin_file(folder: Path, pickled: bytes, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", method) as file:
        for name, content in ({"archive/data.pkl": pickled, "archive/data/0": bytes(64)} | (records or {})).items():
            file.writestr(name, content)


def tensor(offset=0, shape=(4,), strides=(1,), key="0", count=16) -> bytes:
    """{Q: a tensor of storage `key`}, 16 floats"""

    def spelled(value) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    pid = b"(" + spelled("storage") + b"ctorch\nFloatStorage\n" + spelled(key) + spelled("cpu") + spelled(count) + b"tQ"
    return (
        b"\x80\x02}"
        + spelled(Q)
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + pid
        + spelled(offset)
        + spelled(shape)
        + spelled(strides)
        + b"\x89NtRs."
    )


def deep(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


@pytest.mark.parametrize(
    "pickled, said",
    [
        (pickle.dumps({"w": Run(os.system, "touch pwned")}, 2), "names posix.system, which reshard neither needs nor runs"),
        (pickle.dumps(Run(eval, "open('pwned','w')"), 4), "names builtins.eval"),
        (pickle.dumps(Run(builtins.exec, "open('pwned','w')"), 0), "names builtins.exec"),
        (pickle.dumps(Run(getattr, Run(__import__, "os"), "system"), 2), "names builtins."),
        (pickle.dumps([[Run(dict, Run(list, Run(os.mkdir, "pwned")))]], 2), "its pickle names"),
        (b"cos\nsystem\n(S'touch pwned'\ntR.", "names os.system"),
        (b"(S'touch pwned'\nios\nsystem\n.", "damaged or hostile (opcode b'i')"),
        (b"ctorch\nload\n(S'x'\ntR.", "names torch.load"),
        (b"ctorch._utils\n__builtins__\n.", "names torch._utils.__builtins__"),
        (b"cnumpy\nload\n(S'x'\ntR.", "holds no state dict but a Opaque"),
        (b"\x80\x04\x8c\x0cbuiltins\x8c\x04eval\x93.", "damaged or hostile"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "names builtins.eval"),
        (b"\x80\x02h\x07.", "damaged or hostile"),  # a memo never filled
        (b"\x80\x02]q\x00h\x00a.", "holds itself"),
        (b"\x80\x02N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b".", "more than 20000000 values"),
        (deep(100_000), "more than 200 levels"),
        (b"\x80\x02" + b"(" * 500_000 + b".", "damaged or hostile"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged or hostile"),
        (b"\x80\x02" + pickle.dumps("\x1b[2J" * 1000, 2)[2:-1] + b"cos\nsystem\n.", r"\x1b[2J"),
        (b"", "damaged or hostile"),
        (b"junk", "damaged or hostile"),
    ],
)  # fmt: skip
def test_hostile_pickles(hf, refused, pickled, said):
    bin_file(hf, pickled)
    refused(hf, "hf/pytorch_model.bin", said)


@pytest.mark.parametrize(
    "pickled, said",
    [
        (tensor(offset=13), f"{Q}: a tensor of F32 (4,) with strides (1,) ends at byte 68 of its storage data/0, which has 64"),
        (tensor(offset=-1), "has offset -1"),
        (tensor(strides=(6,)), "ends at byte 76"),
        (tensor(strides=(-1,)), "strides (-1,)"),
        (tensor(shape=(17,)), "ends at byte 68"),
        (tensor(shape=(1 << 62, 1 << 62), strides=(0, 0)), "ends at byte 4 of its storage"),
        (tensor(shape=(1 << 5000,)), "expected sizes"),
        (tensor(shape=(1 << 20000,)), "expected sizes"),
        (tensor(shape=(1,) * 100, strides=(1,) * 100), "a tensor has shape"),
        (tensor(key="1"), "record data/1 is missing"),
        (tensor(key="../../etc/passwd"), "record data/../../etc/passwd is missing"),
        (tensor(count=17), "record data/0 has 64 bytes, the pickle says 17 elements of FloatStorage"),
    ],
)  # fmt: skip
def test_tensors_outside_their_storage(hf, refused, pickled, said):
    bin_file(hf, pickled)
    refused(hf, "hf/pytorch_model.bin", said)


def test_a_tensor_inside_its_storage_is_only_missing_the_rest(hf, refused):
    """The control for the two tests above: nothing is wrong with the file but its content."""
    bin_file(hf, tensor())
    refused(hf, f"{Q} (pytorch_model.bin): shape [4], expected [32, 16]", "21 problems")


def test_compressed_records_are_never_unpacked(hf, refused):
    bin_file(hf, tensor(), {"archive/data/1": bytes(50_000_000)}, method=zipfile.ZIP_DEFLATED)
    assert (hf / "pytorch_model.bin").stat().st_size < 100_000
    refused(hf, "record archive/data.pkl is compressed or encrypted (method 8", hint="re-save it")


@pytest.mark.parametrize("name", ["archive/../../evil", "../evil", "/evil", "archive/a/../../../evil", "elsewhere/x"])
def test_record_names_that_lead_out(hf, refused, name):
    bin_file(hf, tensor(), {name: b"x"})
    refused(hf, "lies outside the folder archive", hint="not of torch.save")


def test_truncated_zips(hf, refused):
    tensors = load_file(hf / "model.safetensors")
    torch.save(tensors, hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    whole = (hf / "pytorch_model.bin").read_bytes()
    for left, said in ((len(whole) - 1, "has no end record: it is truncated"), (len(whole) // 2, "it is truncated"), (100, "it is truncated"),
                       (3, "is not a torch.save file"), (0, "is not a torch.save file")):  # fmt: skip
        (hf / "pytorch_model.bin").write_bytes(whole[:left])
        refused(hf, "hf/pytorch_model.bin", said)


def test_the_same_pickle_as_a_rank(tmp_path, hf, refused):
    """rank-pt and Megatron read through the same door."""
    evil = pickle.dumps({"model": Run(os.system, "touch pwned")}, 2)
    bin_file(hf, evil)
    (hf / "pytorch_model.bin").rename(hf / "rank_00.pt")
    refused(hf, "hf/rank_00.pt: model: its pickle names posix.system")
    (hf / "mp_rank_00").mkdir()
    (hf / "rank_00.pt").rename(hf / "mp_rank_00/model_optim_rng.pt")
    refused(hf, "mp_rank_00/model_optim_rng.pt: model: its pickle names posix.system")


def test_errors_as_json(tmp_path, hf, capsys):
    rewrite(hf / "model.safetensors", offsets(dtype="Q4\x1b"))
    with pytest.raises(SystemExit) as exit:
        main(["convert", str(hf), str(tmp_path / "out"), "--to", "hf", "--json"])
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (
        exit.value.code == 1
        and err == ""
        and error["type"] == "FormatError"
        and re.search(r"has dtype 'Q4\\+x1b'", error["message"])
        and error["hint"]
    )
