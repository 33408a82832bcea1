"""safetensors files: headers composed to the library's bytes, read as the library reads them, and refused when they lie."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.stores import TensorInfo
from reshard.stores.safetensors import compose, read

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"
TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def zeros(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8).to(TORCH[dtype]) if dtype != "F8_E8M0" else torch.empty(shape, dtype=TORCH[dtype]).fill_(1)


def header_of(data: bytes) -> bytes:
    return data[: 8 + int.from_bytes(data[:8], "little")]


def image_bytes(specs, metadata=None) -> bytes:
    """A composed file with its tensors' bytes left zero."""
    image = compose(specs, metadata)
    out = bytearray(image.size)
    for at, content in image.segments:
        out[at : at + len(content)] = content
    return bytes(out)


def made(header: object, data: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def written(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "x.safetensors").write_bytes(content)
    return tmp_path / "x.safetensors"


# ---------------------------------------------------------------------------------------------------------- composing


def test_every_dtype_is_known_here():
    assert set(TORCH) == set(DTYPE_SIZE)


def test_bytes_are_the_librarys(tmp_path):
    specs = [(f"{name}.{dtype}", dtype, shape) for dtype in TORCH for name in "ba" for shape in [(2, 3) if name == "a" else ()]]
    tensors = {name: zeros(dtype, shape) for name, dtype, shape in specs}
    for metadata in (None, {"format": "pt"}, {'é\n"\\/': "\u2028\x01\x7f😀"}):
        theirs = safetensors.torch.save(tensors, metadata)
        ours = image_bytes(specs, metadata)
        assert header_of(ours) == header_of(theirs) and len(ours) == len(theirs)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    assert read(tmp_path / "x.safetensors") == (compose(specs, {"format": "pt"}).tensors, {"format": "pt"})


def test_bytes_are_the_numpy_librarys_with_data():
    arrays = {
        "z": np.zeros((3, 0), np.float32),
        "a": np.zeros((), np.int8),
        "é": np.zeros(5, np.float64),
        "b": np.zeros((2, 2), np.float32),
    }
    names = {np.dtype(np.float32): "F32", np.dtype(np.int8): "I8", np.dtype(np.float64): "F64"}
    assert image_bytes([(n, names[a.dtype], a.shape) for n, a in arrays.items()]) == safetensors.numpy.save(arrays)


def test_no_tensors_and_no_metadata():
    assert image_bytes([]) == safetensors.numpy.save({})
    assert image_bytes([("a", "U8", (1,))], {}) == image_bytes([("a", "U8", (1,))])


def test_order_of_the_input_does_not_matter():
    specs = [("b", "F32", (1,)), ("a", "BF16", (1,)), ("c", "F32", (2,))]
    assert compose(specs, {"x": "1", "a": "2"}) == compose(specs[::-1], {"a": "2", "x": "1"})


@pytest.mark.samples
@pytest.mark.parametrize("pattern", ["vllm/*/model-*.safetensors", "hf/*/model.safetensors", "lora/*/*.safetensors"])
def test_genuine_files_compose_to_their_own_header(pattern):
    files = sorted(SAMPLES.glob(pattern))
    assert files
    for path in files:
        tensors, metadata = read(path)
        image = compose([(name, info.dtype, info.shape) for name, info in tensors.items()], metadata)
        assert image.tensors == tensors and image.size == path.stat().st_size
        if len(metadata) < 2:  # the library writes metadata in an order of chance
            assert image.segments[0][1] == header_of(path.read_bytes())
        with safetensors.safe_open(path, "np") as file:
            assert set(file.keys()) == set(tensors)
            for name, info in tensors.items():
                view = file.get_slice(name)
                assert (view.get_dtype(), tuple(view.get_shape())) == (info.dtype, info.shape)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda s: s != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(sorted(TORCH)), shapes), max_size=6),
    st.none() | st.dictionaries(names, names, min_size=1, max_size=1),
)
def test_any_file_equals_the_librarys_and_reads_back(tmp_path, tensors, metadata):
    specs = [(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    theirs = safetensors.torch.save({name: zeros(dtype, shape) for name, dtype, shape in specs}, metadata)
    ours = image_bytes(specs, metadata)
    assert header_of(ours) == header_of(theirs) and len(ours) == len(theirs)
    assert read(written(tmp_path, ours)) == (compose(specs, metadata).tensors, metadata or {})


# ------------------------------------------------------------------------------------------------------------ reading


def test_golden_bytes(tmp_path):
    path = written(tmp_path, b'<\0\0\0\0\0\0\0{"test":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]}}' + bytes(16))
    assert read(path) == ({"test": TensorInfo("I32", (2, 2), 68)}, {})


def test_the_order_of_entries_is_free(tmp_path):
    header = {"b": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]}, "a": {"shape": [1], "data_offsets": [0, 2], "dtype": "F16"},
              "none": {"dtype": "U8", "shape": [0], "data_offsets": [2, 2]}}  # fmt: skip
    tensors, _ = read(written(tmp_path, made(header, 3)))
    assert tensors["b"].offset == tensors["none"].offset == tensors["a"].offset + 2


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": list(offsets), **more}


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        (struct.pack("<Q", 1 << 63), f"{1 << 63} bytes is larger than the 100000000 allowed"),
        (struct.pack("<Q", 100) + b"{}", "10 bytes, its header alone needs 108"),
        (made(b""), "header"),
        (made(b"[]"), "header"),
        (made(b"\xff{}"), "header"),
        (made(b"[" * 100_000), "header"),
        (made(b'{"a":' * 50_000), "header"),
        (made(b'{"a":1' + b"0" * 10_000 + b"}"), "header"),
        (made(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1), "'a' stands twice"),
        (made(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1), "'dtype' stands twice"),
        (made({"__metadata__": {"a": 1}}), "__metadata__"),
        (made({"__metadata__": []}), "__metadata__"),
        (made({"a": []}), "a must have dtype"),
        (made({"a": {"dtype": "U8", "shape": [1]}}), "a must have"),
        (made({"a": entry(extra=1)}, 8), "a must have"),
        (made({"a": entry(dtype="F4")}, 8), "a has dtype 'F4'"),
        (made({"a": entry(dtype=[])}, 8), "a has dtype"),
        (made({"a": entry(dtype="x" * 10_000)}, 8), "a has dtype"),
        (made({"a": entry(shape=2)}, 8), "a has shape 2"),
        (made({"a": entry(shape=(True, 2))}, 8), r"a has shape \[True, 2\]"),
        (made({"a": entry(shape=(2.0,))}, 8), r"a has shape \[2.0\]"),
        (made({"a": entry(shape=(-2,))}, 8), r"a has shape \[-2\]"),
        (made({"a": entry(shape=(1 << 63,))}, 8), "a has shape"),
        (made({"a": entry(shape=(1 << 62, 1 << 62))}, 8), r"a has shape .*, which is 2\*\*63 bytes or more; it spans 8"),
        (made({"a": entry(shape=(1 << 62,) * 10_000)}, 8), r"a has shape .*…, which is 2\*\*63 bytes or more; it spans 8"),
        (made({"a" * 10_000: entry(offsets=(4, 12))}, 12), "a… begins at byte 4, expected 0"),
        (made({"a\x1b[2J": entry(offsets=(4, 12))}, 12), r"a\\x1b\[2J begins at byte 4"),
        (made({"\ud800": entry()}, 8), "ud800 is no text"),
        (made({"a": entry(offsets=(0, 8, 9))}, 8), "a has data_offsets"),
        (made({"a": entry(offsets=(8, 0))}, 8), "a has data_offsets"),
        (made({"a": entry(offsets=(0, 12))}, 12), "a spans 12 bytes, F32 .* needs 8"),
        (made({"a": entry(offsets=(4, 12))}, 12), "a begins at byte 4, expected 0"),
        (made({"a": entry(), "b": entry(offsets=(4, 12))}, 12), "b begins at byte 4, expected 8: it overlaps"),
        (made({"a": entry(), "b": entry()}, 8), "b begins at byte 0, expected 8: it overlaps"),
        (made({"a": entry(), "b": entry(offsets=(12, 20))}, 20), "b begins at byte 12, expected 8: it leaves a hole"),
        (made({"a": entry()}, 7), "has 76 bytes, its header describes 77"),
        (made({"a": entry()}, 9), "has 78 bytes, its header describes 77"),
    ],
)  # fmt: skip
def test_refused(tmp_path, content, said):
    path = written(tmp_path, content)
    with pytest.raises(FormatError, match=said) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 1000


def test_duplicates_among_many_keys_are_found_fast(tmp_path):
    header = "{" + ",".join(f'"{i}":0' for i in range(100_000)) + ',"99999":0}'
    with pytest.raises(FormatError, match="'99999' stands twice"):
        read(written(tmp_path, made(header.encode())))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_byte_is_read_as_the_library_reads_it_or_refused(tmp_path, data):
    good = made({"__metadata__": {"a": "b"}, "a": entry(), "bb": entry("BF16", (2, 2), (8, 16))}, 16)
    at = data.draw(st.integers(0, len(good) - 1))
    path = written(tmp_path, good[:at] + bytes((data.draw(st.integers(0, 255)),)) + good[at + 1 :])
    try:
        tensors, _ = read(path)
    except FormatError:
        return
    with safetensors.safe_open(path, "np") as file:  # what we take, the library takes
        assert {n: (file.get_slice(n).get_dtype(), tuple(file.get_slice(n).get_shape())) for n in sorted(file.keys())} == {
            n: (info.dtype, info.shape) for n, info in tensors.items()
        }
