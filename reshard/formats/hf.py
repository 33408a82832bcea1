"""``hf``: a Hugging Face checkpoint: model.safetensors, or shards with an index; reads pytorch_model*.bin too."""

import json
from collections import defaultdict
from pathlib import Path

from reshard.block import Stored
from reshard.errors import FormatError
from reshard.formats import Contents, Folder, Format, OutFile, Target, parts, safe_join
from reshard.place import Mesh, Rules, even_stages, grid
from reshard.stores import DTYPE_SIZE, TensorInfo, safetensors

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


def _recognise(folder: Path, names: set[str]) -> bool:
    return bool(names & {*_INDEXES, *_SINGLES})


def _read(folder: Path) -> Contents:
    for index_name, single in zip(_INDEXES, _SINGLES):
        if (folder / index_name).is_file():
            return Contents(Mesh(), [_indexed(folder, index_name)])
        if (folder / single).is_file():
            return Contents(Mesh(), [_file(folder, single)])
    raise FormatError(f"{folder} holds no {' or '.join(_SINGLES + _INDEXES)}", "a Hugging Face checkpoint has one of them")


def _indexed(folder: Path, index_name: str) -> dict[str, tuple[str, TensorInfo]]:
    by_file: dict[str, list[str]] = defaultdict(list)
    try:
        weight_map = json.loads((folder / index_name).read_bytes())["weight_map"]
        for name, file in weight_map.items():
            by_file[file].append(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"{folder / index_name} has no weight_map of names to files") from None
    wrong = [file for file in by_file if not isinstance(file, str)]
    if wrong:
        raise FormatError(f"{folder / index_name} names {wrong[0]!r} as the file of {by_file[wrong[0]][0]}, expected text")
    out: dict[str, tuple[str, TensorInfo]] = {}
    missing = [file for file in sorted(by_file) if not safe_join(folder, file).is_file()]
    if missing:
        raise FormatError(f"{folder / index_name} lists {len(by_file)} files, {len(missing)} missing: {', '.join(missing[:5])}", "download the rest of the checkpoint")
    for file, names in sorted(by_file.items()):
        held = _file(folder, file)
        absent = [name for name in names if name not in held]
        if absent:
            raise FormatError(f"{folder / file} lacks {absent[0]}, which {index_name} says it holds ({len(absent)} such)", "the index belongs to other files")
        out.update((name, held[name]) for name in names)
    return out


def _file(folder: Path, file: str) -> dict[str, tuple[str, TensorInfo]]:
    path = safe_join(folder, file)
    if file.endswith(".safetensors"):
        return {name: (file, info) for name, info in safetensors.read(path)[0].items()}
    return tensors_of(torch_tree(path), file)


def torch_tree(path: Path) -> object:
    from reshard.stores import torchzip

    return torchzip.read(path)


def tensors_of(tree: object, file: str) -> dict[str, tuple[str, TensorInfo]]:
    """The tensors of a plain state dict as torchzip reads one."""
    if not isinstance(tree, dict):
        raise FormatError(f"{file} holds no state dict but a {type(tree).__name__}")
    return {str(name): (file, value) for name, value in tree.items() if isinstance(value, TensorInfo)}


def _write(target: Target, stored: list[Stored]) -> Folder:
    sizes = [(s.name, s.size * DTYPE_SIZE[s.dtype]) for s in stored]
    names = parts(sizes, target.max_file)
    by_name = {s.name: s for s in stored}
    files = []
    for i, part in enumerate(names, 1):
        path = "model.safetensors" if len(names) == 1 else f"model-{i:05d}-of-{len(names):05d}.safetensors"
        tensors = {name: by_name[name] for name in part}
        image = safetensors.compose([(s.name, s.dtype, s.shape) for s in tensors.values()], {"format": "pt"})
        files.append(OutFile(path, image, tensors))
    small = {}
    if len(names) > 1:
        weight_map = {name: file.path for file in files for name in file.tensors}
        index = {"metadata": {"total_size": sum(size for _, size in sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        small[_INDEXES[0]] = (json.dumps(index, indent=2) + "\n").encode()
    return Folder(files, small)


FORMAT = Format("hf", "hf", Rules(grid, even_stages, even=False), _recognise, _read, _write,
                "Hugging Face checkpoint (model.safetensors, sharded with index, pytorch_model*.bin)")  # fmt: skip
