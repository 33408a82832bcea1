"""``deepspeed``: what DeepSpeed's engine saves under a tag (``global_stepN/``), and universal checkpoints. Read, not written.

ZeRO-0, 1 and 2 keep a rank's whole weights in ``mp_rank_TT_model_states.pt``; ZeRO-3 keeps none, and they are read from the optimizer's fp32
partitions, as are those of ZeRO-1 and 2 where fp32 is asked for. A mixture's experts have files of their own. Which part of the
whole a tensor-parallel rank has, its file's affine map says. Sources: deepspeed 0.19 ``engine.py``, ``zero_to_fp32.py``, ``ds_to_universal.py``.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from reshard import formats
from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats import Contents, Format
from reshard.formats.deepspeed_files import (
    CONVERT,
    COPY,
    MIXED,
    MODEL,
    OPTIMIZER,
    UNIVERSAL,
    ModelStates,
    count_of,
    model_states,
    recognise,
    root_of,
    tree_of,
)
from reshard.formats.hf import torch_tree
from reshard.formats.pieces import Piece
from reshard.formats.zero import fragments, moments
from reshard.layout import Mesh, Rules
from reshard.layout.mesh import even_stages, grid
from reshard.stores import TensorInfo, torchzip
from reshard.text import some

_STATE = "optimizer.state."
_SETTINGS = (int, float, str, list, tuple, type(None))  # what an optimizer's group may say in its own words


def _read(folder: Path) -> Contents:
    root, inside = root_of(folder)
    if (root / UNIVERSAL).is_dir():
        return _universal(root, inside)
    states = model_states(folder)
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
    return Contents(
        Mesh(),
        pieces,
        nested=True,
        writer=states.writer("model states"),
        masters=partial(_masters, states),
        states=partial(_moments, states),
    )


def _packed(path: Path, name: str, at: TensorInfo) -> int:
    if at.strides is not None:
        raise FormatError(f"{path}: {quote(name)} is a view with strides {list(at.strides)}", "save it once with .contiguous()")
    return at.offset


def _optimizers(states: ModelStates) -> dict[tuple[int, int], str]:
    """The optimizer's files, each by the (data-parallel, tensor-parallel) rank whose partition it holds."""
    root = states.root
    if states.experts or states.first.get("ds_autoep_layers"):
        raise FormatError(f"{root}: experts' optimizer states are partitioned among those that hold the same experts", CONVERT)
    found = {}
    for path in sorted(root.iterdir()):
        if match := OPTIMIZER.fullmatch(path.name):
            if found.setdefault((int(match[1]), int(match[2])), path.name) != path.name:
                raise FormatError(f"{root} holds {found[int(match[1]), int(match[2])]} and {path.name}", MIXED)
    dp = count_of(root, states.first, "dp_world_size", max((d for d, _ in found), default=0) + 1)
    missing = [
        f"(bf16_)zero_pp_rank_{d}_mp_rank_{m:02d}_optim_states.pt" for m in range(states.tp) for d in range(dp) if (d, m) not in found
    ]
    if missing or len(found) > dp * states.tp:
        raise FormatError(f"{root} holds the optimizer states of {len(found)} ranks of {dp * states.tp}, where fp32 weights lie; missing: {some(missing) or 'none'}",
                          COPY if missing else MIXED)  # fmt: skip
    return found


def _of(states: ModelStates, found: Mapping[tuple[int, int], str], m: int) -> tuple[list[tuple[str, Any]], list[dict[str, Any]], list[str]]:
    """Of tensor-parallel rank `m`: its optimizers with their files, its model states, and these's files."""
    ranks = sorted(d for d, each in found if each == m)
    optimizers = [(found[d, m], tree_of(states.root / found[d, m], "optimizer_state_dict")["optimizer_state_dict"]) for d in ranks]
    held = [at for at in sorted(states.trees) if at[1] == m]
    return optimizers, [states.trees[at] for at in held], [states.names[at] for at in held]


def _fragments(states: ModelStates, m: int, parts: tuple, moment: str | None = None) -> Iterator[Piece]:
    """The pieces that tensor-parallel rank `m` has in its optimizers' partitions."""
    for name, shape, found in fragments(states.root, *parts, moment):
        share = states.share(name, shape, m)
        for d, file, at, low, high in found:
            offset = _packed(states.root / file, name, at)
            yield from share.pieces(states.inside + file, offset, at.dtype, low, high, name, d * states.tp + m)


def _masters(states: ModelStates) -> Contents:
    """The optimizer's fp32 weights, each rank's partition; with them what has none: buffers, frozen parameters, other names of shared ones."""
    found, pieces = _optimizers(states), []
    for m in range(states.tp):
        parts = _of(states, found, m)
        pieces += _fragments(states, m, parts)
        buffers = parts[1][0].get("buffer_names") or ()
        for name, at in parts[1][0]["module"].items():
            if name in buffers and isinstance(at, TensorInfo):
                pieces.append(Piece(states.inside + parts[2][0], at.offset, at.dtype, at.shape, name, 0, None, at.strides, m))
    pieces += list(_shared(states.first, pieces))
    return Contents(Mesh(), pieces, nested=True, writer=states.writer("the optimizer's fp32 partitions"), states=partial(_moments, states))


def _moments(states: ModelStates) -> formats.States:
    """What the optimizer keeps of each parameter, by torch's names: moments, step counts, fp32 weights where the model's are others; and its
    groups' settings."""
    found, pieces = _optimizers(states), []
    others: dict[str, bytes] = {}
    for m in range(states.tp):
        parts = _of(states, found, m)
        first = parts[0][0][1]
        held = moments(first)
        words = sorted(word for word, at in (held[0] if held else {}).items() if isinstance(at, TensorInfo) and at.shape)
        trained = [list(group) for group in parts[1][0].get("param_shapes") or ()]
        every = {name for group in trained for name in group}
        for word in [*words, *([] if states.partitioned else [None])]:
            own = [piece for piece in _fragments(states, m, parts, word) if piece.name in every]
            if any(piece.scale != 1 for piece in own):
                raise FormatError(f"{states.root}: ranks hold biases divided, and their moments multiplied", CONVERT)
            pieces += [piece._replace(name=f"{_STATE}{piece.name}.{word or 'fp32'}") for piece in own]
        for g, group in enumerate(trained):
            at = held[min(g, len(held) - 1)].get("step") if held else None
            if isinstance(at, TensorInfo) and at.shape == () and m == 0:
                file = states.inside + parts[0][0][0]
                pieces += [Piece(file, at.offset, at.dtype, (), f"{_STATE}{name}.step", 0, None, None, 0) for name in group]
        base = first.get("base_optimizer_state") or first.get("optimizer_state_dict")
        for g, group in enumerate(base.get("param_groups") or () if m == 0 and isinstance(base, dict) else ()):
            told = group | ({"params": trained[g]} if g < len(trained) else {})
            others |= {f"optimizer.param_groups.{g}.{key}": _saved(value) for key, value in told.items() if isinstance(value, _SETTINGS)}
    paths: dict[str, tuple[str | int, ...]] = {
        name: ("optimizer", "param_groups", int(name.split(".")[2]), name.split(".", 3)[3]) for name in others
    }
    for piece in pieces:
        name, _, word = piece.name.removeprefix(_STATE).rpartition(".")
        paths[piece.name] = ("optimizer", "state", name, word)
    return formats.States(pieces, others, paths)


def _saved(value: object) -> bytes:
    """A setting as torch.save writes it."""
    image = torchzip.compose(value)
    out = bytearray(image.size)
    for at, content in image.segments:
        out[at : at + len(content)] = content
    return bytes(out)


def _shared(tree: Mapping[str, Any], pieces: list[Piece]) -> Iterator[Piece]:
    """Pieces of tied parameters under their other names."""
    for other, name in (tree.get("shared_params") or {}).items():
        yield from (piece._replace(name=other) for piece in pieces if piece.name == name)


def _universal(root: Path, inside: str) -> Contents:
    """``zero/NAME/fp32.pt``: each parameter whole, merged over all ranks; flat where it comes from ZeRO-3."""
    models = sorted(path.name for path in root.iterdir() if MODEL.fullmatch(path.name))
    tree = tree_of(root / models[0]) if models else {}
    shapes = {name: tuple(size) for group in tree.get("param_shapes") or () for name, size in group.items()}
    pieces = []
    for path in sorted(path for path in (root / UNIVERSAL).iterdir() if path.is_dir()):
        name, file = path.name, f"{UNIVERSAL}/{path.name}/fp32.pt"
        if not (root / file).is_file():
            raise FormatError(f"{root / file} is missing", COPY)
        held = torch_tree(root / file)
        at = held.get("param") if isinstance(held, dict) else held
        if not isinstance(at, TensorInfo):
            raise FormatError(f"{root / file} holds no parameter but a {type(at).__name__}")
        shape = at.shape if isinstance(held, dict) else shapes.get(name)
        if shape is None:
            raise FormatError(
                f"{root / file} is flat, and no …model_states.pt tells its shape", "copy those of the checkpoint beside zero/"
            )
        if prod(shape) != prod(at.shape):
            raise FormatError(f"{root / file} has {prod(at.shape)} elements, {models[0]} says {list(shape)}", MIXED)
        pieces.append(Piece(inside + file, at.offset, at.dtype, tuple(shape), name, 0, None, at.strides))
    pieces += list(_shared(tree, pieces))
    return Contents(Mesh(), pieces, nested=True, writer=quote(f"DeepSpeed {tree.get('ds_version', '')}, a universal checkpoint"))


FORMAT = Format("deepspeed", "hf", Rules(grid, even_stages, even=False), recognise, _read, None)
