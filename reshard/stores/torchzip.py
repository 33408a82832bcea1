"""torch.save files: where their tensors lie, and new ones laid out, without torch (its import takes two seconds).

Such a file is a zip of stored (never compressed) records under one folder::

    archive/data.pkl     a pickle of the saved object; each tensor in it names a storage by number
    archive/data/N       storage N: raw little-endian bytes, aligned to 64
    archive/byteorder, version, .format_version, .storage_alignment, .data/serialization_id

The zip is ``ziprecords``' business, its pickle that of ``torch_unpickle`` (which trusts nothing and runs nothing) and
``torch_pickle``. Sources: torch/serialization.py and caffe2/serialize/inline_container.cc.
"""

import hashlib
import io
from math import prod

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.stores import FileImage, TensorInfo
from reshard.stores.files import AnyPath, open_file, reading
from reshard.stores.torch_names import DTYPE_NAME, DType, Global, Opaque, TensorSpec
from reshard.stores.torch_pickle import Pickler
from reshard.stores.torch_unpickle import Unpickler
from reshard.stores.ziprecords import ALIGNMENT, COPY, Archive, Layout

__all__ = ["DTYPE_NAME", "DType", "Global", "Opaque", "TensorSpec", "compose", "read"]


def read(path: AnyPath, start: int = 0, length: int | None = None) -> object:
    """The object saved in `path`, each tensor of it a TensorInfo (offsets count from the start of `path`).

    `start` and `length` say where in the file the zip lies; default is all of it. Reads the zip's directory, the pickle
    and one header per storage, no tensor. Raises FormatError for anything broken, foreign or unsafe.
    """
    with reading(path), open_file(path, buffering=0) as file:
        size = file.seek(0, io.SEEK_END)
        end = size if length is None else start + length
        if not 0 <= start <= end <= size:
            raise FormatError(f"{path} has {size} bytes, an item is said to lie at {start} to {end}", COPY)
        archive = Archive(path, file, start, end)
        order = archive.content("byteorder", 64) if "byteorder" in archive.records else b"little"
        if order != b"little":
            raise FormatError(f"{path} was saved on a {order.decode('latin1')}-endian machine", "re-save it on a little-endian one")
        if "constants.pkl" in archive.records:
            raise FormatError(f"{path} is a TorchScript program, not a checkpoint", "save model.state_dict() with torch.save")
        tree = Unpickler(archive).run()
    return tree


def compose(tree: object) -> FileImage:
    """The file that torch.save would write for `tree`, in which each TensorSpec is a tensor; all but the tensors' bytes.

    The tree is made of dicts, lists, tuples, texts, bytes, numbers, None, Namespace, PurePosixPath and DType. The same
    tree gives the same bytes. Layout and flags are torch 2.13's, to the byte, but for two things. The serialization id is a
    hash of this skeleton. And tensors' checksums are 0, as torch writes under ``set_crc32_options(False)``: the bytes are
    not known here, and torch does not check them on reading (Python's zipfile and unzip do, and will complain).
    """
    pickled = io.BytesIO()
    pickler = Pickler(pickled)
    pickler.dump(tree)
    layout = Layout("archive")
    layout.add("data.pkl", pickled.getvalue())
    layout.add(".format_version", b"1")
    layout.add(".storage_alignment", str(ALIGNMENT).encode())
    layout.add("byteorder", b"little")
    tensors = {}
    for i, spec in enumerate(pickler.specs):
        shape = tuple(spec.shape)
        offset = layout.reserve(f"data/{i}", prod(shape) * DTYPE_SIZE[spec.dtype])
        tensors[spec.name] = TensorInfo(spec.dtype, shape, offset)
    layout.add("version", b"3\n")
    digest = hashlib.sha256(pickled.getvalue()).digest()  # the pickle tells all names and sizes
    halves = (int.from_bytes(half, "little") % 10**20 for half in (digest[:16], digest[16:]))
    layout.add(".data/serialization_id", "".join(f"{half:020d}" for half in halves).encode())
    size, segments = layout.finish()
    return FileImage(size, segments, tensors)
