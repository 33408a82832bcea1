"""``megatron``: Megatron-LM's legacy ``torch`` checkpoints: mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt under a release folder.

Layers are numbered from 0 in each stage (and each virtual stage: ``model0``, ``model1`` …), experts from 0 in each rank;
dense tensors are repeated in the files of all expert-parallel ranks. Sources: Megatron-LM ``checkpointing.py``
(get_checkpoint_name, read_metadata), ``parallel_state.py`` (order of ranks).
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import islice

from reshard.errors import FormatError, PlanError
from reshard.foreign import quote
from reshard.formats import Contents, Folder, Format, OutFile, Target
from reshard.formats.hf import tensors_of, torch_tree
from reshard.formats.manifest import mesh_of, read_manifest
from reshard.formats.megatron_args import megatron_args, model_args
from reshard.formats.megatron_compare import SIZES, compare_args, fields
from reshard.formats.megatron_ranks import FOLDER, expert_cuts, folder_name, folder_names, mp_ranks
from reshard.formats.pieces import pieces_of
from reshard.geometry.block import Stored
from reshard.layout import Layout, Mesh, Rank, Rules
from reshard.layout.mesh import MOST_RANKS, even_stages
from reshard.stores import FileImage
from reshard.stores.files import AnyPath, safe_join

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
_LAYER = re.compile(r"decoder\.layers\.([0-9]{1,6})\.")
_MODEL = re.compile(r"model[0-9]{0,6}")
_PREFIX = re.compile(r"^(module\.)+")  # of wrappers that Megatron itself takes off before it saves
_MIXED = "files of several checkpoints were mixed"


def _recognise(folder: AnyPath, names: set[str]) -> bool:
    if any(FOLDER.fullmatch(name) for name in names):
        return True
    root = tracked(folder) if TRACKER in names else None
    return root is not None and (not root.is_dir() or _has_ranks(root))  # torch_dist has the same tracker, other files


def _has_ranks(root: AnyPath) -> bool:
    return any(FOLDER.fullmatch(path.name) for path in root.iterdir())


def tracked(folder: AnyPath) -> AnyPath | None:
    """The folder that `folder`'s tracker names, which may be missing; None where there is no tracker."""
    tracker = folder / TRACKER
    if not tracker.is_file() or tracker.stat().st_size > 100:
        return None
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise FormatError(f"{tracker} says {quote(repr(text))}, expected a number or release")
    return folder / ("release" if text == "release" else f"iter_{int(text):07d}")


def _root(folder: AnyPath) -> AnyPath:
    """The folder that holds mp_rank_…: `folder`, or the one that its tracker names."""
    if _has_ranks(folder):
        return folder
    root = tracked(folder)
    if root is not None and not root.is_dir():
        there = sorted(path.name for path in folder.iterdir() if path.is_dir() and _has_ranks(path))
        hint = f"here are: {', '.join(there)}; write the one you mean into {TRACKER}" if there else "copy the checkpoint again, whole"
        raise FormatError(f"{folder / TRACKER} names {root.name}, which is missing", hint)
    if root is None or not _has_ranks(root):
        raise FormatError(
            f"{root or folder} holds no mp_rank_… folders", "reshard reads Megatron's legacy format here (--ckpt-format torch)"
        )
    return root


def _read(folder: AnyPath) -> Contents:
    root = _root(folder)
    names = sorted(path.name for path in root.iterdir() if FOLDER.fullmatch(path.name))
    files = {name: str((root / name / FILE).relative_to(folder)) for name in names}
    blobs = {name: _blob(safe_join(folder, files[name])) for name in names}
    mesh = _mesh(root, blobs)
    manifest = read_manifest(folder)
    if manifest and _full(mesh_of(manifest)) != _full(mesh):
        raise FormatError(f"{folder} holds files of {_sizes(mesh)}, its manifest says {_sizes(mesh_of(manifest))}",
                          "files of another conversion were mixed in; convert again")  # fmt: skip
    chunks = _chunks(root, blobs)
    virtual = Mesh(mesh.tp, mesh.pp * len(chunks), mesh.ep, mesh.etp)
    pieces, depth = [], defaultdict(set)
    for rank in mp_ranks(virtual):
        chunk, stage = divmod(rank.pp, mesh.pp)  # virtual stage v·P + s lies in the files of stage s
        name = folder_name(Rank(0, rank.tp, stage, rank.ep, rank.etp), mesh)
        held = {_PREFIX.sub("", key): at for key, at in tensors_of(blobs[name][chunks[chunk]], files[name]).items()}
        pieces += pieces_of(files[name], held, rank.number)
        depth[rank.pp].update(int(match[1]) for key in held if (match := _LAYER.match(key)))
    layers = iter(range(sum(map(len, depth.values()))))
    stages = [list(islice(layers, len(depth[p]))) for p in range(virtual.pp)]
    settings = {files[name]: fields(blob.get("args")) for name, blob in blobs.items()}
    return Contents(virtual, pieces, manifest and manifest.get("layout"), stages=stages, settings=settings)


def disagreements(layout: Layout, contents: Contents) -> list[str]:
    """Sizes that the files' args state otherwise than config.json: by equal products, they would scramble rows unseen."""
    told = {file: table for file, table in contents.settings.items() if table}
    if not told:
        return []
    expected = model_args(layout, names=[name for name in SIZES + ("group_query_attention",)])
    by_text: dict[str, list[str]] = defaultdict(list)
    for file, table in told.items():
        for difference in compare_args(table, expected, SIZES):
            by_text[str(difference)].append(file)
    return [f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}: {text}" for text, files in by_text.items()]


def _blob(file: AnyPath) -> dict:
    """What `file` holds, checked to be a model of megatron-core in today's order of rows."""
    if not file.is_file():
        raise FormatError(f"{file} is missing", "each mp_rank_… folder holds one")
    blob = torch_tree(file)
    models = [value for key, value in blob.items() if _MODEL.fullmatch(str(key))] if isinstance(blob, dict) else []
    if not models or not all(isinstance(model, dict) for model in models):
        raise FormatError(f"{file} holds no model", "it should be a dict with model, args, checkpoint_version")
    if any("language_model" in model for model in models):
        raise FormatError(
            f"{file} is of Megatron-LM's models before megatron-core",
            "convert it with a Megatron-LM of 2024 (tools/checkpoint, --saver core)",
        )
    version = blob.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or version < 3:
        raise FormatError(
            f"{file} is of checkpoint_version {version}, whose query/key/value rows are ordered otherwise",
            "load and save it once with a current Megatron-LM (3.0)",
        )
    return blob


def _chunks(root: AnyPath, blobs: Mapping[str, dict]) -> list[str]:
    """The keys of the model's chunks, one for each virtual stage of a rank, in order."""
    found = {
        name: sorted((key for key in blob if _MODEL.fullmatch(str(key))), key=lambda key: int(key[5:] or 0)) for name, blob in blobs.items()
    }
    first, chunks = next(iter(found.items()))
    other = next((name for name, keys in found.items() if keys != chunks), None)
    if other:
        raise FormatError(f"{root}: {first} holds {', '.join(chunks)}, {other} holds {', '.join(found[other])}", _MIXED)
    if chunks not in (["model"], [f"model{i}" for i in range(len(chunks))]):
        raise FormatError(f"{root / first / FILE} holds {', '.join(chunks)}", "expected model, or model0, model1 … for virtual stages")
    return chunks


def _mesh(root: AnyPath, blobs: Mapping[str, dict]) -> Mesh:
    """The mesh by the files' args, or where those are silent by the folders' names; checked against the folders."""
    names = set(blobs)
    said = {name: sizes for name, blob in blobs.items() if (sizes := _said(root / name / FILE, fields(blob.get("args"))))}
    first, sizes = next(iter(said.items()), (None, None))
    other = next((name for name, value in said.items() if value != sizes), None)
    if other:
        raise FormatError(f"{root}: args in {first} say {_sizes(_of(sizes))}, in {other} {_sizes(_of(said[other]))}", _MIXED)
    tp, pp, ep, etp = sizes or (*_by_names(root, blobs), None)
    # where args don't say how experts are cut: by tp, Megatron's default, unless the folders can't be of such a mesh
    tried = [_of((tp, pp, ep, cut)) for cut in ([etp] if etp else expert_cuts(tp))]
    try:
        mesh = next((mesh for mesh in tried if set(folder_names(mesh)) == names), tried[0])
        expected = folder_names(mesh)
    except PlanError as error:
        raise FormatError(f"{root / next(iter(blobs)) / FILE}: {error}") from None
    problems = [f"{text} {', '.join(some[:8])}{' …' if len(some) > 8 else ''}" for text, some in (
        ("lacks", [name for name in expected if name not in names]), ("has besides", sorted(names - set(expected)))) if some]  # fmt: skip
    if problems:
        raise FormatError(
            f"{root} {' and '.join(problems)}: its {'args' if said else 'folders'} say {_sizes(mesh)}",
            "copy the checkpoint again, whole, into an empty folder",
        )
    return mesh


def _of(sizes: tuple[int, int, int, int | None]) -> Mesh:
    tp, pp, ep, etp = sizes
    return Mesh(tp, pp, ep, 0 if etp in (None, tp) else etp)


def _said(file: AnyPath, args: Mapping[str, object]) -> tuple[int, int, int, int | None] | None:
    """tp, pp, ep and etp (None: not said) that one file's args state; None where they don't."""
    tp, pp, ep, etp = (args.get(f"{kind}_parallel_size") for kind in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor"))
    if not tp or not pp:
        return None
    sizes = (tp, pp, ep or 1, etp or tp)
    if not all(type(n) is int and 0 < n <= MOST_RANKS for n in sizes) or tp * pp * sizes[2] > MOST_RANKS:
        raise FormatError(f"{file}: args state tp={quote(tp)}, pp={quote(pp)}, ep={quote(ep)}, expert tp={quote(etp)}: no mesh")
    return tp, pp, ep or 1, etp or None


def _by_names(root: AnyPath, blobs: Mapping[str, dict]) -> tuple[int, int, int]:
    """tp, pp and ep by the folders' names."""
    numbers = {name: [int(n) for n in FOLDER.fullmatch(name).groups() if n is not None] for name in blobs}
    short, long = min(numbers, key=lambda n: len(numbers[n])), max(numbers, key=lambda n: len(numbers[n]))
    if len(numbers[short]) != len(numbers[long]):
        raise FormatError(f"{root}: folders {short} and {long} are named for different meshes", _MIXED)
    sizes = [max(column) + 1 for column in zip(*numbers.values())]
    if max(sizes) > max(MOST_RANKS // 64, len(blobs)):  # each rank has a folder of its own: no need to count them
        raise FormatError(f"{root} holds {len(blobs)} mp_rank_… folders, among them {max(numbers, key=lambda n: max(numbers[n]))}",
                          "copy the checkpoint again, whole, into an empty folder")  # fmt: skip
    tp, *rest = sizes
    if len(rest) == 1:  # mp_rank_00_001 is of a pipeline stage or of an expert-parallel rank: only the latter has an embedding
        second = next((blob for name, blob in blobs.items() if numbers[name][1]), {})
        keys = {_PREFIX.sub("", str(key)) for key in second.get("model", ())}
        rest = [1, *rest] if "embedding.word_embeddings.weight" in keys else [*rest, 1]
    pp, ep = rest or (1, 1)
    return tp, pp, ep


def _full(mesh: Mesh) -> Mesh:
    """`mesh` with the cut of experts spelled out."""
    return Mesh(mesh.tp, mesh.pp, mesh.ep, mesh.etp or mesh.tp)


def _sizes(mesh: Mesh) -> str:
    return f"{mesh}, experts cut by {mesh.etp}" if mesh.etp else str(mesh)


def _write(target: Target, stored: list[Stored]) -> Folder:
    from reshard.stores import torchzip

    mesh, files, pieces = target.mesh, [], []
    args = argparse.Namespace(**megatron_args(target, stored))
    images: dict[tuple, FileImage] = {}  # ranks whose tensors have the same names, dtypes and shapes have the same file but for values
    for rank, own in target.by_rank(stored):
        specs = tuple([(s.name, s.dtype, s.shape) for s in own.values()])
        if specs not in images:
            model = {spec[0]: torchzip.TensorSpec(*spec) for spec in specs}
            images[specs] = torchzip.compose({"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model})
        files.append(OutFile(f"release/{folder_name(rank, mesh)}/{FILE}", images[specs], rank.number))
        pieces += pieces_of(files[-1].path, images[specs].tensors, rank.number)
    return Folder(files, pieces, {TRACKER: b"release"})


FORMAT = Format(
    "megatron",
    "megatron",
    Rules(mp_ranks, even_stages, local=True),
    _recognise,
    _read,
    _write,
    disagreements=disagreements,
    small=(TRACKER,),
    usage="--load {folder} --ckpt-format torch --use-checkpoint-args --tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}",
)
