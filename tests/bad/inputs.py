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

import numpy as np
import torch

import reshard
from bad.descriptors import as_toml, builtin_texts, mutant, use
from reshard import journal
from reshard.demo import make_model
from reshard.formats import get
from reshard.stores import DTYPE_SIZE, TensorInfo, safetensors, torchzip
from reshard.stores.torch_names import DTYPE_NAME, row_major_strides

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 4, "vocab_size": 20, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
ODD = [None, True, False, 0, -1, 1, 2, 3, 7, 4096, 65536, 1 << 31, 1 << 63, 10**400, 1.5, -0.0, float("nan"), float("inf"), "", "x", "2", "\0", "\x1b[2J", "../x",
       "/etc/passwd", "é" * 300, "F32", "I8", "BF16", [], {}, [[]], [0], [0, 4], [1 << 62, 1 << 62], ["x"], {"x": 1}, "\ud800"]  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """`make` writes one mutant into a folder made by `prepare`; `read` reads it; `judge` says what is wrong with the result."""

    prepare: Callable[[Path], None]
    make: Callable[[random.Random, Path], None]
    read: Callable[[Path], object]
    judge: Callable[[Path, object], str | None]


# ------------------------------------------------------------------------------------------------------------ mutations


def bytes_changed(r: random.Random, raw: bytes, low: int = 0, high: int | None = None) -> bytes:
    """`raw` with a few bytes between `low` and `high` flipped, cut out, put in or moved."""
    out = bytearray(raw)
    for _ in range(r.choice([1, 1, 1, 2, 4])):
        end = min(len(out), len(out) if high is None else high)
        at = r.randrange(min(low, max(0, end - 1)), max(end, low + 1)) if end else 0
        match r.randrange(7):
            case 0 if at < len(out):
                out[at] ^= 1 << r.randrange(8)
            case 1 if at < len(out):
                out[at] = r.randrange(256)
            case 2:
                del out[at : at + r.choice([1, 2, 8, 64])]
            case 3:
                out[at:at] = r.choice(
                    [b"\0", b"\xff" * 8, b"[", b"{", b'"', b"PK\1\2", struct.pack("<Q", r.choice([0, 1, 1 << 31, 1 << 63]))]
                )
            case 4:
                out[at : at + 8] = struct.pack("<Q", r.choice([0, 1, len(out), 1 << 32, (1 << 64) - 1]))
            case 5:
                other = r.randrange(len(out) or 1)
                out[at : at + 16] = out[other : other + 16]
            case _:
                del out[at : None if r.random() < 0.3 else at + 1]
    return bytes(out)


def value_changed(r: random.Random, value: object) -> object:
    """A JSON value with something inside it replaced, taken away, doubled or put in."""
    if isinstance(value, dict) and value and r.random() < 0.9:
        key = r.choice(list(value))
        match r.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, r.choice(["x", "", "__metadata__", "a" * 300, "\x1b[2J", "../x"]): r.choice(ODD)}
            case 2:
                return {**value, key: value[r.choice(list(value))]}
            case _:
                return {**value, key: value_changed(r, value[key])}
    if isinstance(value, list) and value and r.random() < 0.7:
        at = r.randrange(len(value))
        return value[:at] + [value_changed(r, value[at])] + value[at + 1 :] if r.random() < 0.7 else value[:at] + value[at + 1 :]
    if type(value) is int and r.random() < 0.5:
        return value + r.choice([-1, 1, 2, -2, 1 << 32, -value])
    return r.choice(ODD)


def json_changed(r: random.Random, raw: bytes) -> bytes:
    if r.random() < 0.4:
        return bytes_changed(r, raw)
    value = json.loads(raw)
    for _ in range(r.choice([1, 1, 2, 3])):
        value = value_changed(r, value)
    return json.dumps(value).encode()


# --------------------------------------------------------------------------------------------------------------- judges


def raw_bytes(path: Path, info: TensorInfo) -> bytes:
    """The bytes of a tensor where `info` says that it lies, in row-major order; by numpy alone."""
    if 0 in info.shape:
        return b""
    size = DTYPE_SIZE[info.dtype]
    strides = info.strides or row_major_strides(info.shape)
    count = sum((n - 1) * s for n, s in zip(info.shape, strides)) + 1
    raw = np.fromfile(path, np.uint8, count * size, offset=info.offset).view(f"V{size}")
    return np.lib.stride_tricks.as_strided(raw, info.shape, [s * size for s in strides]).tobytes()


def as_library(path: Path, found: dict[str, TensorInfo]) -> str | None:
    """What the safetensors library reads otherwise."""
    from safetensors import SafetensorError, deserialize

    try:
        theirs = {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(path.read_bytes())}
    except (SafetensorError, ValueError):
        return None
    ours = {name: (info.dtype, info.shape, raw_bytes(path, info)) for name, info in found.items()}
    return None if ours == theirs else f"the library reads {sorted(theirs)[:3]}, reshard {sorted(ours)[:3]}"


def tensors_in(tree: object, at: str = "", seen: set[int] | None = None) -> dict[str, object]:
    """Every tensor in a tree of dicts, lists and namespaces, by its path; what is held twice is looked at once."""
    if isinstance(tree, (TensorInfo, torch.Tensor)):
        return {at: tree}
    if isinstance(tree, argparse.Namespace):
        tree = vars(tree)
    seen = set() if seen is None else seen
    if id(tree) in seen:
        return {}
    seen.add(id(tree))
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {path: leaf for key, value in items for path, leaf in tensors_in(value, f"{at}/{key}", seen).items()}


def as_torch(path: Path, tree: object) -> str | None:
    """What torch.load reads otherwise; a record that torch reads past the end of is judged by zipfile."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            theirs = tensors_in(torch.load(path, weights_only=True))
    except Exception:  # noqa: BLE001 - torch refuses in many ways; then it is no judge
        return None
    ours = tensors_in(tree)
    for name in ours.keys() & theirs.keys():
        mine, his = ours[name], theirs[name]
        plain = his.detach().contiguous().reshape(-1)
        same = DTYPE_NAME[mine.dtype] == str(his.dtype).removeprefix("torch.") and mine.shape == tuple(his.shape)
        if not same or (plain.numel() and raw_bytes(path, mine) != plain.view(torch.uint8).numpy().tobytes()):
            return None if same and _by_zipfile(path, mine) else f"{name}: torch reads {his.dtype} {tuple(his.shape)}, reshard {mine}"
    return None


def _by_zipfile(path: Path, info: TensorInfo) -> bool:
    """Whether `info` lies in a record of the zip, as Python's zipfile finds it: torch may return memory it never filled."""
    try:
        with zipfile.ZipFile(path) as file, open(path, "rb") as raw:
            for item in file.infolist():
                raw.seek(item.header_offset)
                header = struct.unpack("<4s5H3L2H", raw.read(30))
                begin = item.header_offset + 30 + header[-2] + header[-1]
                if begin <= info.offset < begin + item.file_size:
                    return True
    except (zipfile.BadZipFile, struct.error, OSError, ValueError):
        pass
    return False


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
    (found,) = contents.tensors
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


_CODES = [bytes((c,)) for c in pickle._Unpickler.dispatch] + [b"h\0", b"q\1", b"K\1", b"X\1\0\0\0a", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n", b")R", b"\x85R", b"(", b"t",
          b"cbuiltins\nset\n", b"cbuiltins\nbytearray\n", b"cpathlib\nPath\n", b"cargparse\nNamespace\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n"]  # fmt: skip


def _make_pickle(r: random.Random, folder: Path) -> None:
    with zipfile.ZipFile(folder / "base") as file:
        records = {item.filename: file.read(item) for item in file.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    raw = records[name]
    if r.random() < 0.5:
        at = r.randrange(2, len(raw))
        raw = raw[:at] + b"".join(r.choice(_CODES) for _ in range(r.choice([1, 2, 5, 30]))) + raw[at + r.choice([0, 0, 1, 4]) :]
    elif r.random() < 0.1:
        raw = b"\x80\x02(" + r.choice([b"]q\1(" + b"K\1" * 3000 + b"e", b"X\x00\x10\0\0" + b"a" * 4096 + b"q\1"]) + r.choice(
            [b"h\1", b"ctorch\nSize\nh\1\x85R", b"cbuiltins\nbytearray\nh\1X\6\0\0\0latin1\x86R", b"cbuiltins\nset\nh\1\x85R"]) * 3000 + b"t."  # fmt: skip
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
    "safetensors": Reader(_safetensors, _make_safetensors, lambda f: safetensors.read(f / "f.safetensors")[0], lambda f, found: as_library(f / "f.safetensors", found)),
    "index": Reader(_index, _make_index, lambda f: get("hf").read(f / "m"), _judge_index),
    "zip": Reader(_torch, _make_zip, lambda f: torchzip.read(f / "f.pt"), lambda f, found: as_torch(f / "f.pt", found)),
    "pickle": Reader(_torch, _make_pickle, lambda f: torchzip.read(f / "f.pt"), lambda f, found: as_torch(f / "f.pt", found)),
    "args": Reader(_megatron, _make_args, lambda f: _opened(f / "m", f / "hf"), _as_before),
    "config": Reader(_hf, _make_config, _use_config, _as_before),
    "manifest": Reader(_manifest, _make_manifest, lambda f: _opened(f / "m"), _as_before),
    "descriptor": Reader(_nothing, _make_descriptor, lambda f: use(f / "m.toml"), lambda f, found: None),
}  # fmt: skip
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
        return ("refused", text) if str(folder) in text or folder.name in text else ("unnamed", text)
    wrong = reader.judge(folder, found)
    return ("wrong", wrong) if wrong else ("right", "")


__all__ = ["READERS", "Reader", "outcome"]
