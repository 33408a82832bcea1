"""``deepspeed``: what DeepSpeed's engine saves under a tag (``global_stepN/``), and universal checkpoints. Read, not written.

ZeRO-0, 1 and 2 keep a rank's whole weights in ``mp_rank_TT_model_states.pt``; ZeRO-3 keeps none, and they are read from the optimizer's fp32
partitions, as are those of ZeRO-1 and 2 where fp32 is asked for. A mixture's experts have files of their own. Which part of the
whole a tensor-parallel rank has, its file's affine map says. Sources: deepspeed 0.19 ``engine.py``, ``zero_to_fp32.py``, ``ds_to_universal.py``.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats import Contents, Format
from reshard.formats import States as Beside
from reshard.formats.affine import Share, shares
from reshard.formats.hf import torch_tree
from reshard.formats.pieces import Piece
from reshard.formats.zero import base_of, fragments, moments
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, grid
from reshard.stores import TensorInfo, torchzip
from reshard.stores.files import read_small
from reshard.text import some

_MODEL = re.compile(r"(?:zero_pp_rank_([0-9]{1,5})_)?mp_rank_([0-9]{1,5})_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]{1,5})_mp_rank_([0-9]{1,5})_optim_states\.pt")
_EXPERT = re.compile(r"(?:layer_([0-9]{1,5})_)?expert_([0-9]{1,5})_mp_rank_([0-9]{1,5})_model_states\.pt")
_PIPELINE = re.compile(r"layer_[0-9]+-model_[0-9]+-model_states\.pt")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_UNIVERSAL = "zero"  # of a universal checkpoint: a folder for each parameter
_STATE = "optim.state."  # as torch names what an optimizer keeps of a parameter
_COPY = "copy the folder again, whole"
_MIXED = "files of several checkpoints were mixed"
_CONVERT = "make a universal checkpoint of it with `python -m deepspeed.checkpoint.ds_to_universal`, and name that folder"


def _recognise(folder: Path, names: set[str]) -> bool:
    if any(pattern.fullmatch(name) for name in names for pattern in (_MODEL, _OPTIMIZER, _EXPERT, _PIPELINE)):
        return True
    if _UNIVERSAL in names and (folder / _UNIVERSAL).is_dir():
        return any((path / "fp32.pt").exists() for path in (folder / _UNIVERSAL).iterdir())
    root = _tagged(folder) if names & {"latest", "latest_universal"} else None
    tags = [] if root is None else [root] if root.is_dir() else [path for path in folder.iterdir() if path.is_dir()]
    return any(_recognise(path, {inside.name for inside in path.iterdir()} - {"latest", "latest_universal"}) for path in tags)


def _tagged(folder: Path) -> Path | None:
    """The folder that a run's ``latest`` names, which may be missing; None where that is no name."""
    tracker = next((folder / name for name in ("latest", "latest_universal") if (folder / name).is_file()), None)
    tag = read_small(tracker, 300).decode(errors="replace").strip() if tracker else ""
    return folder / tag if _TAG.fullmatch(tag) else None


def _root(folder: Path) -> tuple[Path, str]:
    """The folder that holds the files, and its path within `folder`, to be put before theirs."""
    names = {path.name for path in folder.iterdir()}
    if _UNIVERSAL in names or any(_MODEL.fullmatch(name) for name in names) or not names & {"latest", "latest_universal"}:
        return folder, ""
    root = _tagged(folder)
    if root is None:
        raise FormatError(f"{folder / 'latest'} names no folder beside it", "name the folder of one checkpoint")
    if not root.is_dir():
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise FormatError(
            f"{folder} names {root.name} as its latest checkpoint, which is missing", f"here are: {some(there)}" if there else _COPY
        )
    return root, f"{root.name}/"


@dataclass(frozen=True)
class States:
    """The model states of a folder, each file by the (data-parallel, tensor-parallel) rank that wrote it."""

    root: Path
    inside: str
    names: Mapping[tuple[int, int], str]
    trees: Mapping[tuple[int, int], dict[str, Any]]
    experts: Mapping[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)  # file → tensor-parallel rank, what it holds

    @property
    def first(self) -> dict[str, Any]:
        return self.trees[min(self.trees)]

    @property
    def tp(self) -> int:
        return max(m for _, m in self.trees) + 1

    @property
    def partitioned(self) -> bool:
        """Whether weights lie in partitions alone: ZeRO-3."""
        return any(name.startswith("zero_pp_rank_") for name in self.names.values())

    def share(self, name: str, shape: tuple[int, ...], m: int) -> Share:
        """What rank `m` has of tensor `name`, of which it holds `shape`."""
        if self.tp == 1:
            return Share(shape, shape)
        shared = self.first.get("shared_params") or {}
        names = [name, *(one for pair in shared.items() if name in pair for one in pair)]
        found = next((self._maps[each, m] for each in names if (each, m) in self._maps), None)
        path = self.root / self.names[min(at for at in self.names if at[1] == m)]
        if found is None:
            raise FormatError(f"{path}: nothing says which part of {quote(name)} rank {m} of {self.tp} holds", _CONVERT)
        if found.shape != shape:
            raise FormatError(f"{path}: {quote(name)} has shape {list(shape)}, its affine map says {list(found.shape)}", _MIXED)
        return found

    @property
    def _maps(self) -> Mapping[tuple[str, int], Share]:
        if "maps" not in self.__dict__:
            info = self.first.get("universal_checkpoint_info") or {}
            table = info.get("affine_map")
            object.__setattr__(self, "maps", shares(self.root / self.names[min(self.names)], table) if table else {})
        return self.__dict__["maps"]

    def writer(self, what: str) -> str:
        stage = "3" if self.partitioned else str((self.first.get("ds_config") or {}).get("zero_optimization", {}).get("stage", 0))
        return quote(
            f"DeepSpeed {self.first.get('ds_version', '')}, ZeRO-{stage}, data parallel {self.first.get('dp_world_size')}, tensor parallel {self.tp}: {what}"
        )


def _states(folder: Path) -> States:
    root, inside = _root(folder)
    listed = sorted(path.name for path in root.iterdir())
    if any(_PIPELINE.fullmatch(name) for name in listed):
        raise FormatError(f"{root} holds layers of DeepSpeed's pipeline engine, whose names are its modules' numbers", _CONVERT)
    names = {(int(match[1] or 0), int(match[2])): name for name in listed if (match := _MODEL.fullmatch(name))}
    if not names:
        raise FormatError(f"{root} holds no …model_states.pt, which tells names and shapes", _COPY)
    zero3 = any(name.startswith("zero_pp_rank_") for name in names.values())
    if len(names) < sum(1 for name in listed if _MODEL.fullmatch(name)):
        raise FormatError(f"{root} holds both mp_rank_… and zero_pp_rank_… model states", _MIXED)
    trees = {at: _tree(root / name, "module") for at, name in names.items()}
    first = trees[min(trees)]
    for key in ("ds_version", "global_steps", "dp_world_size", "mp_world_size"):
        other = next((at for at in sorted(trees) if trees[at].get(key) != first.get(key)), None)
        if other:
            said = f"{key} is {quote(first.get(key))} in {names[min(trees)]}, {quote(trees[other].get(key))} in {names[other]}"
            raise FormatError(f"{root}: {said}", _MIXED)
    dp, tp = (_count(root, first, key, max(at[i] for at in names) + 1) for i, key in enumerate(("dp_world_size", "mp_world_size")))
    expected = [(d, m) for d in range(dp if zero3 else 1) for m in range(tp)]
    missing = [
        f"zero_pp_rank_{d}_mp_rank_{m:02d}_model_states.pt" if zero3 else f"mp_rank_{m:02d}_model_states.pt"
        for d, m in expected
        if (d, m) not in names
    ]
    if missing or len(names) > len(expected):
        raise FormatError(f"{root} holds the model states of {len(names)} ranks, they say {len(expected)}; missing: {some(missing) or 'none'}",
                          _COPY if missing else _MIXED)  # fmt: skip
    return States(root, inside, names, trees, _experts(root, listed, first.get("num_experts")))


def _experts(root: Path, listed: list[str], count: object) -> dict[str, tuple[int, dict[str, Any]]]:
    """The files of a mixture's experts, all of them."""
    found: dict[tuple[str | None, str], set[int]] = defaultdict(set)
    out = {}
    for name in listed:
        if match := _EXPERT.fullmatch(name):
            found[match[1], match[3]].add(int(match[2]))
            out[name] = int(match[3]), _tree(root / name)
    most = max(count) if isinstance(count, list) and count and all(type(n) is int for n in count) else 0
    for (layer, rank), numbers in sorted(found.items(), key=str):
        size = min(most, 1 << 16) if len(found) == 1 or isinstance(count, list) and len(set(count)) == 1 else 0
        lacking = sorted(set(range(max(size, max(numbers) + 1))) - numbers)
        if lacking:
            prefix = "" if layer is None else f"layer_{layer}_"
            raise FormatError(f"{root} lacks {some([f'{prefix}expert_{n}_mp_rank_{rank}_model_states.pt' for n in lacking])}", _COPY)
    return out


def _count(root: Path, tree: Mapping[str, Any], key: str, seen: int) -> int:
    """How many ranks a file says there are."""
    told = tree.get(key, seen)
    if type(told) is not int or not 0 < told <= 1 << 16:
        raise FormatError(f"{root}: {key} is {quote(told)}, not a number of ranks")
    return told


def _tree(path: Path, *keys: str) -> dict[str, Any]:
    tree = torch_tree(path)
    lacking = [key for key in keys if not isinstance(tree, dict) or not isinstance(tree.get(key), dict)]
    if not isinstance(tree, dict) or lacking:
        raise FormatError(f"{path} holds no {lacking[0] if lacking else 'state'} of DeepSpeed's", "the file is damaged, or of another kind")
    return tree


def _read(folder: Path) -> Contents:
    root, inside = _root(folder)
    if (root / _UNIVERSAL).is_dir():
        return _universal(root, inside)
    states = _states(folder)
    if states.partitioned:
        return _masters(states)
    pieces = []
    holders: list[tuple[int, str, Mapping[str, Any]]] = [
        (m, states.names[0, m], tree["module"]) for (_, m), tree in sorted(states.trees.items())
    ]
    holders += [(m, name, tree) for name, (m, tree) in states.experts.items()]
    for m, file, held in holders:
        for name, at in held.items():
            if isinstance(at, TensorInfo) and isinstance(name, str):
                share = states.share(name, at.shape, m)
                if at.strides is not None and not share.views:
                    pieces.append(Piece(inside + file, at.offset, at.dtype, at.shape, name, 0, None, at.strides, m))
                else:
                    pieces += share.pieces(inside + file, _packed(root / file, name, at), at.dtype, 0, prod(at.shape), name, m)
    return Contents(Mesh(), pieces, nested=True, writer=states.writer("model states"), masters=partial(_masters, states),
                    states=partial(_optimizer, states, True))  # fmt: skip


def _packed(path: Path, name: str, at: TensorInfo) -> int:
    if at.strides is not None:
        raise FormatError(f"{path}: {quote(name)} is a view with strides {list(at.strides)}", "save it once with .contiguous()")
    return at.offset


def _masters(states: States) -> Contents:
    """The optimizer's fp32 weights, each rank's partition; with them what has none: buffers, frozen parameters, other names of shared ones."""
    pieces = list(_partitions(states, _optimizers(states)))
    for m in range(states.tp):
        model = states.trees[0, m]
        buffers = model.get("buffer_names") or ()
        for name, at in model["module"].items():
            if name in buffers and isinstance(at, TensorInfo):
                pieces.append(Piece(states.inside + states.names[0, m], at.offset, at.dtype, at.shape, name, 0, None, at.strides, m))
    pieces += list(_shared(states.first, pieces))
    writer = states.writer("the optimizer's fp32 partitions")
    return Contents(Mesh(), pieces, nested=True, writer=writer, states=partial(_optimizer, states, False))


#: of each tensor-parallel rank, the optimizers of its data-parallel ranks: the file's name, and what it holds
Optimizers = list[list[tuple[str, dict[str, Any]]]]


def _optimizers(states: States) -> Optimizers:
    """Raises FormatError where files lack."""
    root = states.root
    if states.experts or states.first.get("ds_autoep_layers"):
        raise FormatError(f"{root}: experts' optimizer states are partitioned among those that hold the same experts", _CONVERT)
    found = {}
    for path in sorted(root.iterdir()):
        if match := _OPTIMIZER.fullmatch(path.name):
            if found.setdefault((int(match[1]), int(match[2])), path.name) != path.name:
                raise FormatError(f"{root} holds {found[int(match[1]), int(match[2])]} and {path.name}", _MIXED)
    dp = _count(root, states.first, "dp_world_size", max((d for d, _ in found), default=0) + 1)
    missing = [
        f"(bf16_)zero_pp_rank_{d}_mp_rank_{m:02d}_optim_states.pt" for m in range(states.tp) for d in range(dp) if (d, m) not in found
    ]
    if missing or len(found) > dp * states.tp:
        raise FormatError(f"{root} holds the optimizer states of {len(found)} ranks of {dp * states.tp}, where fp32 weights lie; missing: {some(missing) or 'none'}",
                          _COPY if missing else _MIXED)  # fmt: skip
    return [
        [(found[d, m], _tree(root / found[d, m], "optimizer_state_dict")["optimizer_state_dict"]) for d in range(dp)]
        for m in range(states.tp)
    ]


def _partitions(states: States, optimizers: Optimizers, word: str | None = None) -> Iterator[Piece]:
    """Each rank's partition of the fp32 weights, or of the state that Adam calls `word`."""
    for m, own in enumerate(optimizers):
        models = [states.trees[d, m] for d in range(len(own) if states.partitioned else 1)]
        for name, shape, parts in fragments(states.root, own, models, [states.names[d, m] for d in range(len(models))], word):
            share = states.share(name, shape, m)
            for d, file, at, low, high in parts:
                offset = _packed(states.root / file, name, at)
                yield from share.pieces(states.inside + file, offset, at.dtype, low, high, name, d * states.tp + m)


def _optimizer(states: States, masters: bool) -> Beside:
    """Adam's moments and step counts under torch's names, and its groups' settings; with `masters` the fp32 weights, too."""
    optimizers = _optimizers(states)
    file, state = optimizers[0][0]
    path, pieces = states.root / file, []
    kept = moments(path, state)
    words = sorted({word for each in kept for word, at in each.items() if isinstance(at, TensorInfo) and len(at.shape) == 1})
    shapes = [list(group) for group in states.first.get("param_shapes") or ()]
    for word, called in [*((word, word) for word in words), *([(None, "master_param")] if masters else ())]:
        pieces += [p._replace(name=f"{_STATE}{p.name}.{called}") for p in _partitions(states, optimizers, word)]
    for number, names in enumerate(shapes):
        for word, at in kept[min(number, len(kept) - 1)].items():
            if isinstance(at, TensorInfo) and not at.shape:
                pieces += [Piece(states.inside + file, at.offset, at.dtype, (), f"{_STATE}{name}.{word}") for name in names]
    return _beside(path, pieces, base_of(state)["param_groups"], shapes)


def _beside(path: Path, pieces: list[Piece], groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> Beside:
    """`pieces` with the settings of an optimizer's groups, each of the parameters in `names`, as torch would pickle them."""
    if len(groups) != len(names):
        raise FormatError(f"{path} has {len(groups)} groups of parameters, the model states {len(names)}", _MIXED)
    others: dict[str, bytes] = {}
    paths: dict[str, tuple[str | int, ...]] = {}
    for number, (group, own) in enumerate(zip(groups, names)):
        for key, value in {**group, "params": list(own)}.items():
            name = f"optim.param_groups.{number}.{key}"
            others[name], paths[name] = torchzip.compose(value).content, ("optim", "param_groups", number, key)
    for piece in pieces:
        name, _, word = piece.name.removeprefix(_STATE).rpartition(".")
        paths[piece.name] = ("optim", "state", name, word)
    return Beside(pieces, others, paths, "model.")


def _shared(tree: Mapping[str, Any], pieces: list[Piece]) -> Iterator[Piece]:
    """Pieces of tied parameters under their other names."""
    for other, name in (tree.get("shared_params") or {}).items():
        yield from (piece._replace(name=other) for piece in pieces if piece.name == name)


def _universal(root: Path, inside: str) -> Contents:
    """``zero/NAME/fp32.pt``: each parameter whole, merged over all ranks; flat where it comes from ZeRO-3."""
    pieces, tree = _parameters(root, inside, "fp32")
    pieces += list(_shared(tree, pieces))

    def states() -> Beside:
        words = sorted({path.stem for each in (root / _UNIVERSAL).iterdir() for path in each.glob("*.pt")} - {"fp32"})
        found = [p._replace(name=f"{_STATE}{p.name}.{word}") for word in words for p in _parameters(root, inside, word)[0]]
        beside = root / _UNIVERSAL / "optimizer_state.pt"
        told = torch_tree(beside) if beside.is_file() else {}
        groups = told.get("param_groups") or () if isinstance(told, dict) else ()
        return _beside(beside, found, groups, [list(group) for group in tree.get("param_shapes") or ()] if groups else [])

    writer = quote(f"DeepSpeed {tree.get('ds_version', '')}, a universal checkpoint")
    return Contents(Mesh(), pieces, nested=True, writer=writer, states=states)


def _parameters(root: Path, inside: str, word: str) -> tuple[list[Piece], dict[str, Any]]:
    """What a universal checkpoint has of each parameter under `word`, and the model's state beside it."""
    models = sorted(path.name for path in root.iterdir() if _MODEL.fullmatch(path.name))
    tree = _tree(root / models[0]) if models else {}
    shapes = {name: tuple(size) for group in tree.get("param_shapes") or () for name, size in group.items()}
    pieces = []
    for path in sorted(path for path in (root / _UNIVERSAL).iterdir() if path.is_dir()):
        name, file = path.name, f"{_UNIVERSAL}/{path.name}/{word}.pt"
        if not (root / file).is_file():
            raise FormatError(f"{root / file} is missing", _COPY)
        held = torch_tree(root / file)
        at = held.get("param") if isinstance(held, dict) else held
        if not isinstance(at, TensorInfo):
            raise FormatError(f"{root / file} holds no parameter but a {type(at).__name__}")
        shape = at.shape if isinstance(held, dict) or not at.shape else shapes.get(name)
        if shape is None:
            raise FormatError(
                f"{root / file} is flat, and no …model_states.pt tells its shape", "copy those of the checkpoint beside zero/"
            )
        if prod(shape) != prod(at.shape):
            raise FormatError(f"{root / file} has {prod(at.shape)} elements, {models[0]} says {list(shape)}", _MIXED)
        pieces.append(Piece(inside + file, at.offset, at.dtype, tuple(shape), name, 0, None, at.strides))
    return pieces, tree


FORMAT = Format("deepspeed", "hf", Rules(grid, even_stages, even=False), _recognise, _read, None)
