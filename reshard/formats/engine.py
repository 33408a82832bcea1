"""``vllm`` and ``sglang``: their sharded_state folders, one set of files per rank, bytes as the engine itself writes them.

Names and required constants differ between the engines and between their releases: the descriptors say which.
Sources: vLLM 0.32 ``sharded_state_loader.py`` (files of pipeline stages are named so from after 0.28 on), SGLang 0.5.23
(whose file names have no stage, so that stages would overwrite each other).
"""

import re
import struct
from collections import defaultdict
from dataclasses import replace
from functools import partial
from math import prod

from reshard.dtypes import DTYPE_SIZE
from reshard.errors import FormatError, PlanError
from reshard.foreign import quote
from reshard.formats import Contents, Folder, Format, OutFile, Target, parts
from reshard.formats.manifest import mesh_of, read_manifest
from reshard.formats.pieces import Piece, pieces_of
from reshard.geometry.block import Stored
from reshard.layout import Mesh, Rules, parse_version
from reshard.layout.mesh import grid
from reshard.stores import safetensors
from reshard.stores.files import AnyPath

_NUMBER = r"(0|[1-9][0-9]{0,6})"  # as the engines write them: model-rank-00-… or other digits are other files
_FILE = re.compile(rf"model-rank-{_NUMBER}-part-{_NUMBER}\.safetensors")
_STAGED = re.compile(rf"model-pp-{_NUMBER}-tp-{_NUMBER}-part-{_NUMBER}\.safetensors")
_ALIKE = re.compile(r"model-(?:rank|pp)-\d.*\.safetensors")


def uneven_stages(layers: int, stages: int) -> list[list[int]]:
    """vLLM's deal of layers: a remainder goes, one each, to the stages before the last (``get_pp_indices``)."""
    sizes = [layers // stages] * stages
    for i in range(layers % stages):
        sizes[-(i + 2)] += 1
    starts = [sum(sizes[:i]) for i in range(stages)]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes)]


def _recognise(folder: AnyPath, names: set[str]) -> bool:
    return any(_FILE.fullmatch(name) or _STAGED.fullmatch(name) for name in names)


def _read(name: str, folder: AnyPath) -> Contents:
    by_rank: dict[tuple[int, int], dict[int, str]] = defaultdict(dict)
    for path in folder.iterdir():
        if match := _FILE.fullmatch(path.name):
            by_rank[0, int(match[1])][int(match[2])] = path.name
        elif match := _STAGED.fullmatch(path.name):
            by_rank[int(match[1]), int(match[2])][int(match[3])] = path.name
        elif _ALIKE.fullmatch(path.name):
            raise FormatError(
                f"{quote(path)} is named like a rank's file, but no engine writes its numbers so",
                "remove it, or copy the folder again, whole",
            )
    if not by_rank:
        raise FormatError(f"{folder} holds no model-rank-…-part-….safetensors")
    manifest = read_manifest(folder)
    tp, pp = max(t for _, t in by_rank) + 1, max(p for p, _ in by_rank) + 1
    if len(by_rank) != tp * pp:
        p, t = next((p, t) for p in range(pp) for t in range(tp) if (p, t) not in by_rank)
        raise FormatError(f"{folder} holds files of {len(by_rank)} ranks, their names tell of {tp * pp} (tp{tp}{f'×pp{pp}' if pp > 1 else ''}): "
                          f"no files of rank {t} (stage {p})", "copy the folder again, whole")  # fmt: skip
    mesh = Mesh(tp, pp)
    if manifest and (mesh_of(manifest).tp, mesh_of(manifest).pp) != (mesh.tp, mesh.pp):
        raise FormatError(
            f"{folder} holds files of {mesh}, its manifest says {mesh_of(manifest)}",
            "files of another conversion were mixed in; convert again",
        )
    pieces: list[Piece] = []
    for rank, at in enumerate(sorted(by_rank)):
        own: dict[str, str] = {}
        if sorted(by_rank[at]) != list(range(len(by_rank[at]))):
            raise FormatError(
                f"{folder}: rank {at[1]} has parts {sorted(by_rank[at])}, expected 0 to {len(by_rank[at]) - 1}",
                "copy the folder again, whole",
            )
        for file in by_rank[at].values():
            held = safetensors.read(folder / file)[0]
            twice = sorted(held.keys() & own.keys())
            if twice or (manifest and file not in manifest["files"]):
                what = f"both it and {own[twice[0]]} hold {quote(twice[0])}" if twice else "the manifest does not list it"
                raise FormatError(f"{folder / file}: {what}", "files of another conversion were mixed in; convert again")
            own.update(dict.fromkeys(held, file))
            pieces += pieces_of(file, held, rank)
    if manifest:
        mesh = mesh_of(manifest)
    said = manifest or {}
    return Contents(mesh, pieces, said.get("layout"), said.get("engine_version"), said.get("engine_platform"))


def _write(name: str, target: Target, stored: list[Stored]) -> Folder:
    _check_release(name, target.engine_version, target.mesh)
    files, pieces = [], []
    for rank, own in target.by_rank(stored):
        constants = {n: constant for n, constant in target.placement.constants(rank)}
        specs = [(s.name, s.dtype, s.shape) for s in own.values()] + [(n, c.dtype, c.shape) for n, c in constants.items()]
        sizes = [(n, prod(shape) * DTYPE_SIZE[dtype]) for n, dtype, shape in sorted(specs)]
        for i, part in enumerate(parts(sizes, target.max_file)):
            chosen = set(part)
            image = safetensors.compose([spec for spec in specs if spec[0] in chosen])
            where = f"pp-{rank.pp}-tp-{rank.tp}" if target.mesh.pp > 1 else f"rank-{rank.tp}"
            values = [
                (image.tensors[n].offset, constant_bytes(c.value, c.dtype) * prod(c.shape)) for n, c in constants.items() if n in chosen
            ]
            path = f"model-{where}-part-{i}.safetensors"
            files.append(OutFile(path, replace(image, segments=(*image.segments, *values)), rank.number))
            pieces += pieces_of(path, {n: image.tensors[n] for n in part if n in own}, rank.number)
    return Folder(files, pieces, {})


def _check_release(engine: str, version: str, mesh: Mesh) -> None:
    """Refuse meshes whose files this release could not read. Raises PlanError."""
    if engine == "sglang" and mesh.pp > 1:
        raise PlanError([f"SGLang has no names for files of pipeline stages (pp={mesh.pp})"], "use --pp 1")
    if engine == "vllm" and mesh.pp > 1 and parse_version(version)[:2] <= (0, 28):
        raise PlanError([f"vLLM {version} has no names for files of pipeline stages (pp={mesh.pp})"], "use --engine-version 0.32 or --pp 1")
    if engine == "vllm" and mesh.ep > 1 and parse_version(version)[:2] < (0, 28):
        raise PlanError([f"vLLM {version} wants each rank's expert map beside its weights, which reshard does not write (ep={mesh.ep})"],
                        "use --engine-version 0.28 or newer, or --ep 1")  # fmt: skip


def constant_bytes(value: float, dtype: str) -> bytes:
    """One element of a constant, little-endian."""
    codes = {"F64": "<d", "F32": "<f", "F16": "<e"}  # struct's, which saves a plan numpy's import
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    if dtype not in codes:
        raise FormatError(f"a constant of dtype {dtype} can't be written", "use F32, F16 or BF16 in the descriptor")
    return struct.pack(codes[dtype], value)


def _format(name: str, oldest: str, newest: str) -> Format:
    recognise = _recognise if name == "vllm" else lambda folder, names: False  # the two look alike; --from tells
    return Format(
        name,
        name,
        Rules(grid, uneven_stages),
        recognise,
        partial(_read, name),
        partial(_write, name),
        newest,
        oldest,
        platforms=True,
        usage=_USAGE[name],
    )


_USAGE = {
    "vllm": "vllm serve {folder} --load-format sharded_state --tensor-parallel-size {tp}",
    "sglang": "python -m sglang.launch_server --model-path {folder} --load-format sharded_state --tp {tp}",
}
VLLM = _format("vllm", "0.11", "0.32")
SGLANG = _format("sglang", "0.5", "0.5.23")
