"""torch files: read and composed against torch itself, the samples, and files made to deceive."""

import argparse
import io
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError, ReshardError
from reshard.stores import FileImage, TensorInfo
from reshard.stores.torch_names import row_major_strides
from reshard.stores.torchzip import DTYPE_NAME, DType, Opaque, TensorSpec, compose, read
from reshard.stores.ziprecords import Layout

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
DTYPES = {dtype: getattr(torch, name) for dtype, name in DTYPE_NAME.items()}


def bytes_at(path: Path, info: TensorInfo) -> torch.Tensor:
    """The tensor that `info` describes, read with numpy and os alone."""
    strides = info.strides or row_major_strides(info.shape)
    last = sum((n - 1) * s for n, s in zip(info.shape, strides))
    size = DTYPE_SIZE[info.dtype]
    with open(path, "rb") as file:
        file.seek(info.offset)
        raw = file.read(0 if 0 in info.shape else (last + 1) * size)
    if not raw:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    flat = torch.frombuffer(bytearray(raw), dtype=DTYPES[info.dtype])
    return flat.as_strided(info.shape, strides).clone()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8).tolist() for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and as_bytes[0] == as_bytes[1]


def some(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    count = int(np.prod(shape, dtype=np.int64)) * DTYPE_SIZE[dtype]
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == "BOOL" else 256, count, dtype=np.uint8)
    return torch.from_numpy(raw).view(DTYPES[dtype]).reshape(shape) if count else torch.empty(shape, dtype=DTYPES[dtype])


def write(path: Path, image: FileImage, tensors: dict[str, torch.Tensor]) -> Path:
    assert set(tensors) == set(image.tensors)
    with open(path, "wb") as file:
        file.truncate(image.size)
        for at, content in [*image.segments, *((image.tensors[n].offset, t) for n, t in tensors.items())]:
            file.seek(at)
            file.write(content if isinstance(content, bytes) else bytes(content.contiguous().reshape(-1).view(torch.uint8).tolist()))
    return path


def saved(tmp_path: Path, tree: object, **options) -> Path:
    torch.save(tree, tmp_path / "saved.pt", **options)
    return tmp_path / "saved.pt"


# ------------------------------------------------------------------------------------------------------------ reading


def test_import_brings_neither_torch_nor_numpy():
    code = "import sys, reshard.stores.torchzip; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_every_dtype_and_plain_values(tmp_path):
    tensors = {dtype: some(dtype, (3, 5)) for dtype in DTYPES}
    tree = {
        "tensors": tensors, "empty": torch.zeros(0, 4), "scalar": torch.tensor(7), "param": torch.nn.Parameter(torch.ones(2)),
        "args": argparse.Namespace(lr=0.5, dtype=torch.bfloat16), "simple": types.SimpleNamespace(a=[1, (2, None)]),
        "size": torch.Size([1, 2]), "ordered": OrderedDict(b=1, a=2), "default": defaultdict(int, k=3), "bytes": b"\x00\xff", "none": b"",
        "array": bytearray(b"ab"), "complex": 1 + 2j, "set": {1, 2}, "frozen": frozenset("a"), "path": Path("/a/b"),
        "slice": slice(1, None), "long": 1 << 70, (1, "tuple"): True,
    }  # fmt: skip
    path = saved(tmp_path, tree)
    got = read(path)
    assert list(got) == list(tree)
    for dtype, tensor in tensors.items():
        info = got["tensors"][dtype]
        assert (info.dtype, info.shape, info.strides) == (dtype, (3, 5), None)
        assert same(bytes_at(path, info), tensor)
    assert (got["empty"].shape, got["scalar"].shape, got["param"].shape) == ((0, 4), (), (2,))
    assert got["args"] == argparse.Namespace(lr=0.5, dtype=DType("bfloat16")) and type(got["args"]) is argparse.Namespace
    assert got["path"] == PurePosixPath("/a/b")
    for key in ("simple", "size", "ordered", "default", "bytes", "none", "array", "complex", "set", "frozen", "slice", "long"):
        assert got[key] == tree[key], key
    assert got[1, "tuple"] is True


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path, protocol):
    path = saved(tmp_path, {"w": torch.arange(4), "b": b"xyz", "s": {1}, "n": argparse.Namespace(a=1)}, pickle_protocol=protocol)
    got = read(path)
    assert same(bytes_at(path, got["w"]), torch.arange(4))
    assert (got["b"], got["s"], got["n"]) == (b"xyz", {1}, argparse.Namespace(a=1))


def test_module_state_dict_shared_and_strided(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {"base": base, "row": base[1:3], "column": base[:, 2:4], "t": base.t(), "expanded": base[:1, :1].expand(3, 4)}
    path = saved(tmp_path, tensors | {"module": torch.nn.Linear(2, 3).state_dict()})
    got = read(path)
    for name, tensor in tensors.items():
        assert same(bytes_at(path, got[name]), tensor), name
        assert (got[name].strides is None) == tensor.is_contiguous(), name
    assert got["row"].offset == got["base"].offset + 6 * 4
    assert [i.shape for i in got["module"].values()] == [(3, 2), (3,)]


def test_tensor_with_attributes_is_the_tensor(tmp_path):
    param = torch.nn.Parameter(torch.arange(3.0))
    param.tensor_model_parallel = True
    buffer = torch.arange(2.0)
    buffer.note = "x"
    path = saved(tmp_path, {"p": param, "b": buffer})
    got = read(path)
    assert same(bytes_at(path, got["p"]), param) and same(bytes_at(path, got["b"]), buffer)


def test_inert_classes_are_recorded_not_run(tmp_path, monkeypatch):
    module = types.ModuleType("megatron.core.enums")

    class ModelType:
        def __init__(self, value):
            self.value = value

        def __reduce__(self):
            return ModelType, (self.value,), {"state": 1}

    ModelType.__module__, ModelType.__qualname__ = "megatron.core.enums", "ModelType"
    module.ModelType = ModelType
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core.enums", module)
    path = saved(tmp_path, {"kind": ModelType(1), "rng": np.random.get_state(), "extra": io.BytesIO(b"x"), "device": torch.device("cpu")})
    got = read(path)
    kind = got["kind"]
    assert (type(kind), kind.module, kind.name, kind.args, kind.state) == (Opaque, "megatron.core.enums", "ModelType", (1,), {"state": 1})
    assert got["rng"][0] == "MT19937" and type(got["rng"][1]) is Opaque
    assert type(got["extra"]) is Opaque and type(got["device"]) is Opaque


def test_an_item_inside_a_bigger_file(tmp_path):
    item = saved(tmp_path, {"w": torch.arange(9)}).read_bytes()
    path = tmp_path / "big"
    path.write_bytes(b"x" * 1001 + item + b"PK\5\6 and more")
    assert same(bytes_at(path, read(path, 1001, len(item))["w"]), torch.arange(9))
    with pytest.raises(FormatError, match=f"{path} has {path.stat().st_size} bytes"):
        read(path, 1001, len(item) + 100)


def test_not_computed_checksums_are_fine(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path, {"w": torch.arange(9)})
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as file:
        assert {i.CRC for i in file.infolist()} == {0}  # what compose writes for tensors is torch's own habit
    assert same(bytes_at(path, read(path)["w"]), torch.arange(9))


def leaves(tree: object, at: tuple = ()) -> dict:
    if isinstance(tree, dict):
        return {k: v for key, child in tree.items() for k, v in leaves(child, (*at, key)).items()}
    return {at: tree}


@pytest.mark.samples
@pytest.mark.parametrize("pattern", ["megatron/*/legacy_tp2/**/*.pt", "meta/**/*.pth"])
def test_samples_as_torch_reads_them(pattern):
    files = sorted(SAMPLES.glob(pattern))
    assert files
    for path in files:
        with torch.serialization.safe_globals([argparse.Namespace]):
            want = leaves(torch.load(path, weights_only=True))
        got = leaves(read(path))
        assert list(got) == list(want)
        for key, value in want.items():
            assert same(bytes_at(path, got[key]), value) if isinstance(value, torch.Tensor) else got[key] == value, key


# ---------------------------------------------------------------------------------------------------------- composing


def as_specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    back = {torch_dtype: dtype for dtype, torch_dtype in DTYPES.items()}
    return {name: TensorSpec(name, back[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def blank(data: bytes) -> bytes:
    """`data` with what may differ from torch's blanked: the serialization id and each record's checksum."""
    out = bytearray(data)
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        at = file.start_dir
        for info in file.infolist():
            n, e = struct.unpack_from("<2H", data, info.header_offset + 26)
            begin = info.header_offset + 30 + n + e
            if info.filename.endswith("serialization_id"):
                out[begin : begin + info.file_size] = bytes(info.file_size)
            if info.file_size:
                out[begin + info.file_size + 4 : begin + info.file_size + 8] = bytes(4)
            out[at + 16 : at + 20] = bytes(4)
            at += 46 + n + len(info.extra) + len(info.comment)
    return bytes(out)


def both(tmp_path: Path, tensors: dict[str, torch.Tensor], wrap=lambda tensors: tensors) -> tuple[Path, Path]:
    """The same tree as torch saves it and as compose lays it out."""
    torch.save(wrap(tensors), tmp_path / "archive.pt")  # the name of the file is that of the folder in the zip
    return tmp_path / "archive.pt", write(tmp_path / "ours.pt", compose(wrap(as_specs(tensors))), tensors)


def test_bytes_are_those_of_torch(tmp_path):
    tensors = {f"{dtype}.{shape}": some(dtype, shape) for dtype in DTYPES for shape in ((), (0, 3), (7,), (300, 3))}

    def wrap(t):
        args = argparse.Namespace(
            tp=2, eps=1e-5, big=1 << 40, name="a", none=None, flag=True, path=PurePosixPath("/a"), raw=b"\xff", many=list(range(3000))
        )
        return {
            "args": args,
            "checkpoint_version": 3.0,
            "model": t,
            "again": OrderedDict(x=[(1,), (1, 2), (1, 2, 3, 4)], cpu="cpu", storage="storage"),
        }

    theirs, ours = both(tmp_path, tensors, wrap)
    assert blank(ours.read_bytes()) == blank(theirs.read_bytes())
    with zipfile.ZipFile(ours) as file:  # the small records have true checksums
        assert file.read("archive/version") == b"3\n" and file.read("archive/data.pkl")
        assert len(file.read("archive/.data/serialization_id")) == 40


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it(tmp_path, mmap):
    tensors = {dtype: some(dtype, (4, 3)) for dtype in DTYPES} | {"empty": torch.zeros(0)}
    spec = as_specs(tensors)
    tree = {"args": argparse.Namespace(dtype=DType("bfloat16"), tp=2), "model": spec, "tied": spec["F32"], "list": [1.5, ("a", None)]}
    path = write(tmp_path / "x.pt", compose(tree), tensors)
    with torch.serialization.safe_globals([argparse.Namespace]):
        got = torch.load(path, weights_only=True, mmap=mmap)
    assert all(same(got["model"][name], tensor) for name, tensor in tensors.items())
    assert got["tied"].data_ptr() == got["model"]["F32"].data_ptr()
    assert got["args"] == argparse.Namespace(dtype=torch.bfloat16, tp=2) and got["list"] == [1.5, ("a", None)]
    assert read(path)["args"] == tree["args"]


def test_beyond_4_gib(tmp_path):
    """A sparse file: sizes and places that need zip64. Byte for byte torch's, which skips data the same way."""
    specs = [("a", "U8", (4,)), ("b", "U8", (2**32 + 100,)), ("c", "F16", (7,)), ("empty", "F32", (0,)), ("f8", "F8_E4M3", (3,))]
    image = compose({name: TensorSpec(name, dtype, shape) for name, dtype, shape in specs})
    path = tmp_path / "ours.pt"
    with open(path, "wb") as file:
        file.truncate(image.size)
        for at, content in [*image.segments, (image.tensors["c"].offset, b"\x00\x3c" * 7)]:
            file.seek(at)
            file.write(content)
    assert image.tensors["c"].offset > 2**32
    assert read(path) == image.tensors
    got = torch.load(path, weights_only=True, mmap=True)
    assert same(got["c"], torch.ones(7, dtype=torch.float16)) and got["b"].shape == (2**32 + 100,)
    with zipfile.ZipFile(path) as file:
        assert file.getinfo("archive/data/1").file_size == 2**32 + 100

    torch.serialization.set_crc32_options(False)
    with torch.serialization.skip_data():
        torch.save({name: torch.empty(shape, dtype=DTYPES[dtype]) for name, dtype, shape in specs}, tmp_path / "archive.pt")
    torch.serialization.set_crc32_options(True)
    assert read(tmp_path / "archive.pt") == image.tensors
    assert os.path.getsize(tmp_path / "archive.pt") == image.size
    assert skeleton(path) == skeleton(tmp_path / "archive.pt")
    wide = [extra[:2] == b"\1\0" for extra in local_extras(path)]  # zip64 fields stand where, and only where, they are needed
    assert [i for i, is_wide in enumerate(wide) if is_wide] == [5, 6, 7, 8, 9, 10]


def local_extras(path: Path) -> list[bytes]:
    """The extra field of each record's own header."""
    out = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            n, e = struct.unpack("<2H", file.read(4))
            file.seek(n, io.SEEK_CUR)
            out.append(file.read(e))
    return out


def skeleton(path: Path) -> list[bytes]:
    """Of a file of any size, each record's header and what follows its content, and the directory; checksums blanked."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        infos = archive.infolist()
        ends = [info.header_offset for info in infos[1:]] + [archive.start_dir]
        out = []
        for info, extra, end in zip(infos, local_extras(path), ends):
            file.seek(info.header_offset)
            head = file.read(30 + len(info.filename) + len(extra))
            file.seek(info.file_size, io.SEEK_CUR)
            after = file.read(end - file.tell())
            out += [head, after[:4] + bytes(4) + after[8:] if after else b""]
        directory = bytearray(file.read())
    at = 0
    for _ in infos:
        n, e, c = struct.unpack_from("<3H", directory, at + 28)
        directory[at + 16 : at + 20] = bytes(4)
        at += 46 + n + e + c
    return [*out, bytes(directory)]


def test_more_than_65535_records(tmp_path):
    layout = Layout("archive")
    layout.add("data.pkl", tensor_pickle(1, 0, (1,)).replace(b"\x01\0\0\x000X", b"\x05\0\0\x0065999X"))
    offsets = [layout.reserve(f"data/{i}", 4) for i in range(66_000)]
    layout.add("version", b"3\n")
    size, segments = layout.finish()
    path = write(tmp_path / "x.pt", FileImage(size, segments, {}), {})
    assert read(path)["the.weight"].offset == offsets[-1]
    assert len(zipfile.ZipFile(path).infolist()) == 66_002
    assert torch.load(path, weights_only=True)["the.weight"].shape == (1,)


def test_compose_is_deterministic_and_refuses_what_torch_could_not_load():
    tree = {"w": TensorSpec("w", "BF16", (2, 3))}
    assert compose(tree) == compose(tree)
    assert compose(tree).segments != compose({"w": TensorSpec("w", "BF16", (3, 2))}).segments
    with pytest.raises(ReshardError, match="w stands twice"):
        compose([TensorSpec("w", "F32", (1,)), TensorSpec("w", "F32", (1,))])
    with pytest.raises(ReshardError, match="x has dtype F4"):
        compose([TensorSpec("x", "F4", (1,))])
    for foreign in (np.float32(1), {1, 2}, os.system, torch.float32, Opaque("a", "b", ())):
        with pytest.raises(ReshardError, match="cannot hold"):
            compose({"x": foreign})


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(min_size=1, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3) | st.tuples(inner, inner)
    | st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(lambda d: argparse.Namespace(**d)),
    max_leaves=8,
)  # fmt: skip
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(min_size=1, max_size=6), st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=5), plain)
def test_any_tree_round_trips_and_equals_torchs(tmp_path, tensors, extra):
    tensors = {name: some(dtype, shape, i) for i, (name, (dtype, shape)) in enumerate(tensors.items())}
    theirs, ours = both(tmp_path, tensors, lambda t: {"t": t, "extra": extra})
    image = compose({"t": as_specs(tensors), "extra": extra})
    assert read(ours) == {"t": image.tensors, "extra": extra}
    assert read(theirs) == read(ours)
    with torch.serialization.safe_globals([argparse.Namespace]):
        got = torch.load(ours, weights_only=True)
    assert got["extra"] == extra and all(same(got["t"][n], t) for n, t in tensors.items())


# ------------------------------------------------------------------------------------------------------------ hostile


def crafted(tmp_path: Path, pickled: bytes, records: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    path = tmp_path / "crafted.pt"
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in ({"data.pkl": pickled, "byteorder": b"little", "data/0": bytes(16)} | (records or {})).items():
            file.writestr(f"archive/{name}", content)
    return path


def tensor_pickle(count=4, offset=0, shape=(4,), strides=(1,), kind="torch\nFloatStorage", tail=b"") -> bytes:
    """{"the.weight": a tensor of storage 0}"""

    def number(n) -> bytes:
        return pickle.dumps(n, 2)[2:-1]

    pid = b"(X\x07\0\0\0storagec" + kind.encode() + b"\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(count) + b"tQ"
    args = b"(" + pid + number(offset) + number(shape) + number(strides) + b"\x89N" + tail + b"t"
    return b"\x80\x02}X\x0a\0\0\0the.weightctorch._utils\n_rebuild_tensor_v2\n" + args + b"Rs."


def test_crafted_is_sound(tmp_path):
    info = read(crafted(tmp_path, tensor_pickle()))["the.weight"]
    assert (info.dtype, info.shape, info.strides) == ("F32", (4,), None)


@pytest.mark.parametrize(
    "pickled, said",
    [
        (tensor_pickle(count=5), r"the.weight: record data/0 has 16 bytes, the pickle says 5 elements of FloatStorage"),
        (tensor_pickle(count=1 << 62), "record data/0 has 16 bytes"),
        (tensor_pickle(count=True), "record data/0 has 16 bytes"),
        (tensor_pickle(offset=1), r"the.weight: a tensor of F32 \(4,\) .* ends at byte 20 of its storage data/0, which has 16"),
        (tensor_pickle(offset=-1), "the.weight: a tensor has offset -1"),
        (tensor_pickle(offset=True), "the.weight: a tensor has offset True"),
        (tensor_pickle(strides=(2,)), "ends at byte 28"),
        (tensor_pickle(strides=(-1,)), r"strides \(-1,\)"),
        (tensor_pickle(shape=(1 << 63,), strides=(0,)), "expected sizes"),
        (tensor_pickle(shape=(1 << 62,), strides=(0,)), "ends at byte 4"),
        (tensor_pickle(shape=(1 << 62, 1 << 62), strides=(1 << 62, 1)), "ends at byte"),
        (tensor_pickle(shape=(4, 1)), "shape"),
        (tensor_pickle(shape=[4]), "shape"),
        (tensor_pickle(kind="torch\nComplexDoubleStorage"), "the.weight: its dtype is torch's ComplexDoubleStorage"),
        (tensor_pickle(kind="torch.storage\nUntypedStorage", count=16), "no storage of a known dtype"),
        (tensor_pickle(kind="collections\nOrderedDict"), "its storage is a collections.OrderedDict"),
        (tensor_pickle(tail=b"}X\x04\0\0\0conj\x88s"), "conjugated"),
        (tensor_pickle().replace(b"\x01\0\0\x000X", b"\x01\0\0\x001X"), "record data/1 is missing"),
    ],
)
def test_lying_tensors(tmp_path, pickled, said):
    with pytest.raises(FormatError, match=said) as caught:
        read(crafted(tmp_path, pickled))
    assert str(caught.value).startswith(str(tmp_path / "crafted.pt"))


class Run:
    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


def nested(code: bytes, depth: int) -> bytes:
    return b"\x80\x02N" + code * depth


@pytest.mark.parametrize(
    "pickled, said",
    [
        (pickle.dumps({"key": Run(os.system, "touch pwned")}, 2), "key: its pickle names posix.system"),
        (pickle.dumps(Run(eval, "1"), 4), "names builtins.eval"),
        (b"cnumpy\nload\n(S'x'\ni.", "damaged or hostile"),
        (b"\x80\x02ccollections\nOrderedDict\n)R\x82\x01.", "damaged or hostile"),  # EXT1
        (b"\x80\x02cargparse\nNamespace\n}X\x01\0\0\0a\x88sb.", "sets attributes of a Global"),
        (b"\x80\x02ctorch\nfloat32\n)R.", "calls a DType"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage"),
        (pickle.dumps(bytearray(b""), 2)[:-1].replace(b")R", b"J\xff\xff\xff\x7f\x85R") + b".", "damaged or hostile"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b".", "damaged or hostile"),  # BYTEARRAY8
        (b"\x80\x02\x8b" + struct.pack("<l", -1) + b".", "damaged or hostile"),
        (pickle.dumps(Run(__import__("codecs").encode, "x", "rot13"), 2), "encoding 'rot13' is not allowed"),
        (nested(b"\x85", 500) + b".", "more than 200 levels"),
        (b"\x80\x02}" + nested(b"\x85", 500_000)[2:] + b"\x88s.", "may not be nested"),  # its hash would end the process
        (b"\x80\x02(" + nested(b"\x85", 500_000)[2:] + b"\x91.", "may not be nested"),
        (b"\x80\x02cbuiltins\nslice\n" + b")\x85R.", "slice of no numbers"),
        (b"\x80\x02]q\0h\0a.", "holds itself"),
        (b"\x80\x02N" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b".", "more than 20000000 values"),  # a billion laughs
        (b"\x80\x02r\xff\xff\xff\xff.", "damaged or hostile"),
        (b"\x80\x02", "damaged or hostile"),
        (b"\x80\x63.", "damaged or hostile"),
        (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged or hostile"),
    ],
)  # fmt: skip
def test_hostile_pickles(tmp_path, monkeypatch, pickled, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=said):
        read(crafted(tmp_path, pickled))
    assert not (tmp_path / "pwned").exists()


def test_huge_memo_index_costs_nothing(tmp_path):
    assert read(crafted(tmp_path, b"\x80\x02Nr\xff\xff\xff\xff.")) is None


def test_container_damage(tmp_path):
    good = crafted(tmp_path, tensor_pickle()).read_bytes()
    path = tmp_path / "bad.pt"

    def refuse(data: bytes, said: str):
        path.write_bytes(data)
        with pytest.raises(FormatError, match=said) as caught:
            read(path)
        assert caught.value.hint
        return caught.value

    refuse(good[:-30], f"zip of {len(good) - 30} bytes has no end record")
    refuse(good + b"x", "has 1 bytes after its end, 0 are declared")
    refuse(b"", "is not a torch.save file")
    refuse(b"\x80\x02" + bytes(600), "before 1.6")
    refuse(good[1:], "expected to end at")
    central = good.index(b"PK\1\2")
    for at, value, said in (
        (central + 42, 1 << 30, "data.pkl is said to lie at"),
        (central + 42, 7, "has no header at 7"),
        (central + 24, 1 << 20, "compressed or encrypted"),
        (central + 16, 1, "has checksum"),
    ):
        refuse(good[:at] + struct.pack("<L", value) + good[at + 4 :], said)
    sized = bytearray(good)
    sized[central + 20 : central + 28] = struct.pack("<2L", 1 << 20, 1 << 20)
    refuse(bytes(sized), "data.pkl spans bytes")
    sized[central + 20 : central + 28] = b"\xff" * 8
    refuse(bytes(sized), "lacks its zip64 sizes")
    end = good.index(b"PK\5\6")
    for at in (end + 10, end + 12, end + 16):
        refuse(good[:at] + b"\xff\x7f" + good[at + 2 :], "directory")


def test_wrong_kinds_of_file(tmp_path):
    with pytest.raises(FormatError, match="compressed"):
        read(crafted(tmp_path, tensor_pickle(tail=b"N" * 500), method=zipfile.ZIP_DEFLATED))
    with pytest.raises(FormatError, match="big-endian"):
        read(crafted(tmp_path, tensor_pickle(), {"byteorder": b"big"}))
    with pytest.raises(FormatError, match="TorchScript"):
        read(crafted(tmp_path, tensor_pickle(), {"constants.pkl": b""}))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a.txt", "x")
    with pytest.raises(FormatError, match=r"a.txt lies outside"):
        read(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a/b.txt", "x")
    with pytest.raises(FormatError, match=r"data.pkl is missing; the zip has 1 records"):
        read(tmp_path / "other.zip")
    torch.save({"w": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="before 1.6") as caught:
        read(tmp_path / "old.pt")
    assert "torch.save" in caught.value.hint


def test_duplicate_records(tmp_path):
    path = crafted(tmp_path, tensor_pickle())
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", bytes(16))
    with pytest.raises(FormatError, match="archive/data/0 stands twice"):
        read(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_byte_is_read_or_refused(tmp_path, data):
    good = getattr(test_any_flipped_byte_is_read_or_refused, "good", None)
    if good is None:
        tree = {"w": torch.ones(3, 2), "args": argparse.Namespace(a=1), "o": OrderedDict(x=torch.zeros(2, 2).t())}
        good = test_any_flipped_byte_is_read_or_refused.good = saved(tmp_path, tree).read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    broken = good[:at] + bytes((good[at] ^ data.draw(st.integers(1, 255)),)) + good[at + 1 :]
    path = tmp_path / "flipped.pt"
    path.write_bytes(broken)
    try:
        read(path)
    except FormatError:
        pass


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from([bytes((c,)) for c in pickle._Unpickler.dispatch] + [b"\0", b"\1", b"X\1\0\0\0a", b"K\1", b"ctorch\nSize\n"]),
        max_size=30,
    )
)
def test_any_opcodes_are_read_or_refused(tmp_path, codes):
    try:
        read(crafted(tmp_path, b"\x80\x04}N" + b"".join(codes) + b"."))
    except FormatError:
        pass
