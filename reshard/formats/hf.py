"""``hf``: a Hugging Face checkpoint: model.safetensors, or shards with an index; reads pytorch_model*.bin too.

Symbolic links are followed wherever they lead: the Hub's cache consists of links into ``blobs/``, and whoever made the folder
made them. A *name* in an index is another's text, and never leads out of the folder.
"""

import json
import re
from collections import defaultdict

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats import Contents, Folder, Format, OutFile, Target, parts
from reshard.formats.manifest import mesh_of, read_manifest
from reshard.formats.pieces import Piece, pieces_of
from reshard.geometry.block import Stored
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, grid
from reshard.stores import TensorInfo, safetensors
from reshard.stores.files import AnyPath, read_json, safe_join

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
#: bytes: small enough that a model of some size has several files, which can be written side by side and fetched so
_MAX_FILE = 2 * 10**9
_SINGLES = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"(?:model|pytorch_model)-[0-9]{5}-of-[0-9]{5}\.(?:safetensors|bin)")


def _recognise(folder: AnyPath, names: set[str]) -> bool:
    return bool(names & {*_INDEXES, *_SINGLES}) or any(_SHARD.fullmatch(name) for name in names)


def _read(folder: AnyPath) -> Contents:
    manifest = read_manifest(folder)
    if manifest and mesh_of(manifest) != Mesh():
        raise FormatError(
            f"{folder} is of format hf, which is whole; its manifest says {mesh_of(manifest)}",
            "the manifest is of another folder; delete it",
        )
    for index_name, single in zip(_INDEXES, _SINGLES):
        if (folder / index_name).is_file():
            if (folder / single).is_file() and single not in _index(folder / index_name):
                raise FormatError(f"{folder} holds both {single} and {index_name}, which lists other files",
                                  f"transformers would load {single} alone; remove whichever of the two is not the model")  # fmt: skip
            return Contents(Mesh(), _indexed(folder, index_name))
        if (folder / single).is_file():
            return Contents(Mesh(), pieces_of(single, _file(folder, single)))
    shards = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if shards:
        index_name = _INDEXES[shards[0].endswith(".bin")]
        raise FormatError(f"{folder} holds {len(shards)} shards ({shards[0]}, …) and no {index_name}", "download the index too")
    raise FormatError(f"{folder} holds no {' or '.join(_SINGLES + _INDEXES)}", "a Hugging Face checkpoint has one of them")


def _indexed(folder: AnyPath, index_name: str) -> list[Piece]:
    path = folder / index_name
    by_file = _index(path)
    files = {file: safe_join(folder, file) for file in sorted(by_file)}
    missing = [file for file, at in files.items() if not at.is_file()]
    if missing:
        raise FormatError(
            f"{path} lists {len(files)} files, {len(missing)} missing: {quote(', '.join(missing))}", "download the rest of the checkpoint"
        )
    listed = {name for names in by_file.values() for name in names}
    out: dict[str, Piece] = {}
    for file, names in sorted(by_file.items()):
        held = _file(folder, file)
        if not held.keys() >= set(names):
            absent = [name for name in names if name not in held]
            raise FormatError(f"{files[file]} lacks {quote(absent[0])}, which {index_name} says it holds ({len(absent)} such)",
                              "the index belongs to other files")  # fmt: skip
        if len(held) > len(names):  # what the index does not know is there all the same, and must be explained
            twice = next((name for name in held if name in out and name not in listed), None)
            if twice is not None:
                raise FormatError(
                    f"{files[file]} and {out[twice].file} both hold {quote(twice)}, and {index_name} does not say which counts"
                )
            names = [*names, *(name for name in held if name not in listed)]
        pieces = pieces_of(file, held if len(held) == len(names) else {name: held[name] for name in names})
        out.update(zip([piece.name for piece in pieces], pieces))
    return list(out.values())


def _index(path: AnyPath) -> dict[str, list[str]]:
    """The names of an index, by file."""
    table = read_json(path)
    weight_map = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weight_map, dict):
        raise FormatError(f"{path} has no weight_map of names to files", 'it should hold {"weight_map": {"tensor": "file", …}}')
    by_file: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise FormatError(f"{path} names {quote(repr(file))} as the file of {quote(name)}, expected the name of one")
        by_file[file].append(name)
    for file, names in by_file.items():
        if len(file.encode()) > 255:
            raise FormatError(f"{path} names {quote(repr(file))} as the file of {quote(names[0])}, expected the name of one")
    return by_file


def _file(folder: AnyPath, file: str) -> dict[str, TensorInfo]:
    path = safe_join(folder, file)
    if file.endswith(".safetensors"):
        return safetensors.read(path)[0]
    return state_dict(path)


def state_dict(path: AnyPath) -> dict[str, TensorInfo]:
    """The tensors of a torch file that holds a plain state dict and nothing else of size."""
    tree = torch_tree(path)
    held = tensors_of(tree, path)
    inner = next((key for key, value in tree.items() if isinstance(value, (dict, list, tuple)) and not isinstance(value, TensorInfo)), None)
    if inner is not None:
        some = quote(inner)
        raise FormatError(f"{path} holds a {type(tree[inner]).__name__} under {some}, expected tensors by name",
                          f"save the state dict alone: torch.save(torch.load(path)[{some!r}], path)")  # fmt: skip
    return held


def torch_tree(path: AnyPath) -> object:
    from reshard.stores import torchzip

    return torchzip.read(path)


def tensors_of(tree: object, path: AnyPath | str) -> dict[str, TensorInfo]:
    """The tensors of a plain state dict as torchzip reads one; errors name `path`."""
    if not isinstance(tree, dict):
        raise FormatError(f"{path} holds no state dict but a {type(tree).__name__}", "save model.state_dict() with torch.save")
    odd = next((key for key in tree if not isinstance(key, str)), None)
    if odd is not None:
        raise FormatError(f"{path} holds a {type(tree[odd]).__name__} under {quote(repr(odd))}, expected names as text")
    return {name: value for name, value in tree.items() if isinstance(value, TensorInfo)}


def _write(target: Target, stored: list[Stored]) -> Folder:
    stored = sorted(stored, key=lambda s: _depth(s, target))
    sizes = [(s.name, s.size * DTYPE_SIZE[s.dtype]) for s in stored]
    names = parts(sizes, target.max_file or _MAX_FILE)
    by_name = {s.name: s for s in stored}
    files, pieces = [], []
    for i, part in enumerate(names, 1):
        path = "model.safetensors" if len(names) == 1 else f"model-{i:05d}-of-{len(names):05d}.safetensors"
        image = safetensors.compose([(s.name, s.dtype, s.shape) for s in (by_name[name] for name in part)], {"format": "pt"})
        files.append(OutFile(path, image))
        pieces += pieces_of(path, image.tensors)
    small = {}
    if len(names) > 1:
        weight_map = {piece.name: piece.file for piece in pieces}
        index = {"metadata": {"total_size": sum(size for _, size in sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        small[_INDEXES[0]] = (json.dumps(index, indent=2) + "\n").encode()
    return Folder(files, pieces, small)


def _depth(stored: Stored, target: Target) -> int:
    """Where in the model a tensor stands: files hold whole layers, in order, as those that transformers writes."""
    tensor = target.placement.layout.descriptor.tensors[stored.entry.of[0]]
    if "layer" in tensor.index:
        return stored.blocks[0][0][1]
    return -1 if tensor.stage == "first" else target.placement.layout.layers


FORMAT = Format(
    "hf",
    "hf",
    Rules(grid, even_stages, even=False),
    _recognise,
    _read,
    _write,
    small=_INDEXES,
    usage="from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained({repo})",
)
