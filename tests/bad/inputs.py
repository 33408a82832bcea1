"""Mutants of every kind of file that reshard reads, each with a judge that is not reshard.

A ``Reader`` makes one mutant in a folder from a seeded random source, reads it, and judges what was read. Outcomes: a
ReshardError that names the file or its folder, or a value that the judge (the safetensors library, torch, or what was
written before the mutation) finds right. ``judge`` returns None when it has nothing to say, or what is wrong.
"""

import argparse
import io
import json
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import reshard
from bad.descriptors import as_toml, builtin_texts, mutant, use
from bad.judges import as_library, as_torch
from bad.mutations import ODD, bytes_changed, json_changed, value_changed
from reshard.conversion import journal
from reshard.demo import make_model
from reshard.formats import get
from reshard.stores import safetensors, torchzip

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 20,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Reader:
    """`make` writes one mutant into a folder made by `prepare`; `read` reads it; `judge` says what is wrong with the result."""

    prepare: Callable[[Path], None]
    make: Callable[[random.Random, Path], None]
    read: Callable[[Path], object]
    judge: Callable[[Path, object], str | None]


# -------------------------------------------------------------------------------------------------------------- readers


def _tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 5, generator=g),
        "b.weight": torch.randn(4, 2, generator=g).bfloat16(),
        "c": torch.arange(7),
        "d": torch.zeros(0, 3).half(),
        "e": torch.ones(()),
    }


def _safetensors(folder: Path) -> None:
    from safetensors.torch import save

    (folder / "base").write_bytes(save(_tensors(), {"format": "pt"}))


def _make_safetensors(r: random.Random, folder: Path) -> None:
    raw = (folder / "base").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    if r.random() < 0.5:
        header = json_changed(r, raw[8 : 8 + length])
        raw = struct.pack("<Q", len(header)) + header + raw[8 + length :]
    else:
        raw = bytes_changed(r, raw, 0, r.choice([8, 8 + length, None]))
    (folder / "f.safetensors").write_bytes(raw)


def _index(folder: Path) -> None:
    make_model(folder / "hf", CONFIG)
    reshard.convert(folder / "hf", folder / "m", format="hf", max_file=600, fsync=False)
    (folder / "m/reshard.json").unlink()
    shutil.copy(folder / "m/model.safetensors.index.json", folder / "base")


def _make_index(r: random.Random, folder: Path) -> None:
    (folder / "m/model.safetensors.index.json").write_bytes(json_changed(r, (folder / "base").read_bytes()))


def _judge_index(folder: Path, contents: object) -> str | None:
    found = {
        piece.name: (piece.file, safetensors.TensorInfo(piece.dtype, piece.shape, piece.offset, piece.strides)) for piece in contents.pieces
    }
    whole = {
        name: (file.name, info) for file in sorted((folder / "m").glob("*.safetensors")) for name, info in safetensors.read(file)[0].items()
    }
    wrong = [name for name in found if found[name] != whole.get(name)]
    return f"{wrong[0]}: read {found[wrong[0]]}, lies at {whole.get(wrong[0])}" if wrong else None


def _torch(folder: Path) -> None:
    t = _tensors()
    tree = {
        "w": t["a"],
        "s": t["a"].t(),
        "b": {"c": [t["b.weight"], t["c"]]},
        "args": argparse.Namespace(a=1, n="x", l=[1, 2]),
        "n": torch.nn.Parameter(t["e"]),
        "k": (1, None, 2.5),
    }
    torch.save(tree, folder / "base")


def _make_zip(r: random.Random, folder: Path) -> None:
    raw = (folder / "base").read_bytes()
    low = r.choice([0, raw.rindex(b"PK\5\6"), raw.index(b"PK\1\2"), 0])
    (folder / "f.pt").write_bytes(bytes_changed(r, raw, low))


_CODES = [bytes((c,)) for c in pickle._Unpickler.dispatch] + [
    b"h\0",
    b"q\1",
    b"K\1",
    b"X\1\0\0\0a",
    b"ctorch\nSize\n",
    b"ccollections\nOrderedDict\n",
    b")R",
    b"\x85R",
    b"(",
    b"t",
    b"cbuiltins\nset\n",
    b"cbuiltins\nbytearray\n",
    b"cpathlib\nPath\n",
    b"cargparse\nNamespace\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"cos\nsystem\n",
]


def _make_pickle(r: random.Random, folder: Path) -> None:
    with zipfile.ZipFile(folder / "base") as file:
        records = {item.filename: file.read(item) for item in file.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    raw = records[name]
    if r.random() < 0.5:
        at = r.randrange(2, len(raw))
        raw = raw[:at] + b"".join(r.choice(_CODES) for _ in range(r.choice([1, 2, 5, 30]))) + raw[at + r.choice([0, 0, 1, 4]) :]
    elif r.random() < 0.1:
        raw = (
            b"\x80\x02("
            + r.choice([b"]q\1(" + b"K\1" * 3000 + b"e", b"X\x00\x10\0\0" + b"a" * 4096 + b"q\1"])
            + r.choice([b"h\1", b"ctorch\nSize\nh\1\x85R", b"cbuiltins\nbytearray\nh\1X\6\0\0\0latin1\x86R", b"cbuiltins\nset\nh\1\x85R"])
            * 3000
            + b"t."
        )
    else:
        raw = bytes_changed(r, raw)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as file:
        for key, content in {**records, name: raw}.items():
            file.writestr(key, content)
    (folder / "f.pt").write_bytes(out.getvalue())


def _opened(path: Path, config: Path | None = None) -> list:
    return [(s.rank, s.name, s.dtype, s.shape, s.file, s.start) for s in reshard.open(path, config=config).stored]


def _megatron(folder: Path) -> None:
    make_model(folder / "hf", CONFIG)
    reshard.convert(folder / "hf", folder / "m", format="megatron", tp=2, fsync=False)
    (folder / "m/reshard.json").unlink()
    (folder / "m/config.json").unlink()
    blobs = {str(file): torch.load(file, weights_only=False) for file in sorted((folder / "m").glob("release/*/*.pt"))}
    torch.save(blobs, folder / "base")
    (folder / "right").write_text(repr(sorted(row[:4] for row in _opened(folder / "m", folder / "hf"))))


def _make_args(r: random.Random, folder: Path) -> None:
    blobs = torch.load(folder / "base", weights_only=False)
    names = list(blobs) if r.random() < 0.5 else [r.choice(list(blobs))]
    seed = r.random()
    for name, blob in blobs.items():
        if name in names:
            same = random.Random(seed)  # all files alike, or one alone
            table = vars(blob["args"])
            for _ in range(same.choice([1, 1, 2, 5])):
                key = same.choice(list(table))
                table[key] = same.choice([*ODD[:-1], value_changed(same, table[key]), (1, 2), torch.bfloat16])
            if same.random() < 0.1:
                blob["args"] = same.choice([None, 3, [1], {"tensor_model_parallel_size": "2"}, dict(table)])
            if same.random() < 0.1:
                blob["checkpoint_version"] = same.choice(ODD[:-1])
        torch.save(blob, name)


def _hf(folder: Path) -> None:
    make_model(folder / "m", CONFIG)
    (folder / "base").write_bytes((folder / "m/config.json").read_bytes())
    (folder / "right").write_text(repr(sorted(row[:4] for row in _opened(folder / "m"))))


def _make_config(r: random.Random, folder: Path) -> None:
    (folder / "m/config.json").write_bytes(json_changed(r, (folder / "base").read_bytes()))


def _as_before(folder: Path, rows: list) -> str | None:
    """Whether the same tensors, of the same shapes, were read as before the mutation."""
    right = (folder / "right").read_text()
    return None if repr(sorted(row[:4] for row in rows)) == right else "other tensors, shapes or ranks were read"


def _use_config(folder: Path) -> list:
    """What a conversion does with a config.json: reads it, opens the model, plans each format."""
    rows = _opened(folder / "m")
    for format, mesh in (("vllm", {"tp": 2}), ("megatron", {"tp": 2})):
        try:
            reshard.plan(folder / "m", format=format, **mesh)
        except reshard.ReshardError as error:
            if "malformed" in str(error):
                raise
    return rows


def _manifest(folder: Path) -> None:
    make_model(folder / "hf", CONFIG)
    reshard.convert(folder / "hf", folder / "m", format="vllm", tp=2, fsync=False)
    (folder / "base").write_bytes((folder / "m/reshard.json").read_bytes())
    (folder / "right").write_text(repr(sorted(row[:4] for row in _opened(folder / "m"))))


def _make_manifest(r: random.Random, folder: Path) -> None:
    (folder / "m/reshard.json").write_bytes(json_changed(r, (folder / "base").read_bytes()))


def _nothing(folder: Path) -> None:
    """Nothing to prepare."""


_TEXTS = builtin_texts()


def _make_descriptor(r: random.Random, folder: Path) -> None:
    (folder / "m.toml").write_bytes(as_toml(mutant(r, _TEXTS)))


_NOTES = [
    {"fingerprint": "x", "version": 1},
    {"boot": "b"},
    {"file": "model.safetensors"},
    {"batch": 3},
    {"mark": 1},
    {"durable": 1},
    {"forget": True},
    {"batch": 4},
]


def _make_journal(r: random.Random, folder: Path) -> None:
    lines = [json.dumps(note).encode() for note in _NOTES]
    lines = [json_changed(r, line) if r.random() < 0.3 else line for line in lines]
    raw = b"\n".join(lines) + b"\n"
    (folder / "journal.jsonl").write_bytes(bytes_changed(r, raw) if r.random() < 0.5 else raw)


def _read_journal(folder: Path) -> object:
    notes, good = journal.read_notes((folder / "journal.jsonl").read_bytes())
    return notes, good, journal.replay(notes, "b")


def _judge_journal(folder: Path, found: object) -> str | None:
    notes, good, _ = found
    lines = (folder / "journal.jsonl").read_bytes()[:good].splitlines()
    return None if [json.loads(line) for line in lines] == notes else "notes that are not in the file"


READERS = {
    "safetensors": Reader(
        _safetensors,
        _make_safetensors,
        lambda f: safetensors.read(f / "f.safetensors")[0],
        lambda f, found: as_library(f / "f.safetensors", found),
    ),
    "index": Reader(_index, _make_index, lambda f: get("hf").read(f / "m"), _judge_index),
    "zip": Reader(_torch, _make_zip, lambda f: torchzip.read(f / "f.pt"), lambda f, found: as_torch(f / "f.pt", found)),
    "pickle": Reader(_torch, _make_pickle, lambda f: torchzip.read(f / "f.pt"), lambda f, found: as_torch(f / "f.pt", found)),
    "args": Reader(_megatron, _make_args, lambda f: _opened(f / "m", f / "hf"), _as_before),
    "config": Reader(_hf, _make_config, _use_config, _as_before),
    "manifest": Reader(_manifest, _make_manifest, lambda f: _opened(f / "m"), _as_before),
    "descriptor": Reader(_nothing, _make_descriptor, lambda f: use(f / "m.toml"), lambda f, found: None),
}
if hasattr(journal, "read_notes"):
    READERS["journal"] = Reader(_nothing, _make_journal, _read_journal, _judge_journal)


def outcome(reader: Reader, folder: Path) -> tuple[str, str]:
    """("refused" | "right" | "wrong", why) of the mutant in `folder`; anything that is no ReshardError is raised."""
    try:
        found = reader.read(folder)
    except reshard.ReshardError as error:
        text = f"{error} {error.hint or ''}"
        if "content is malformed" in text:
            return "surprise", text
        return ("refused", text) if str(folder) in text or folder.name in text or "layout m:" in text else ("unnamed", text)
    wrong = reader.judge(folder, found)
    return ("wrong", wrong) if wrong else ("right", "")


__all__ = ["READERS", "Reader", "outcome"]
