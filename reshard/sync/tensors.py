"""The tensors that a process gives to a sync, matched with what its side holds: names, shapes, dtypes, DTensors, ties.

Tensors are used as they lie: a view of the tensor's own storage for every copy. Everything that does not fit is reported at
once, before a byte moves.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch

from reshard.dtypes import torch_dtypes
from reshard.errors import PlanError
from reshard.geometry.block import Id, Stored, end, row_major
from reshard.sync.fp8_blocks import scales_name
from reshard.sync.sharding import Cut, Sharding, flat, tuples
from reshard.sync.side import Side

DTYPES = torch_dtypes()
WORDS = {dtype: word for word, dtype in DTYPES.items()}


class Bound:
    """A stored tensor and the torch tensor that it is here. Offsets and strides are those of a row-major tensor."""

    def __init__(self, stored: Stored, tensor: torch.Tensor, padded: bool = False):
        self.stored, self.tensor, self.padded = stored, tensor, padded
        self.row_major = tensor.is_contiguous()
        self.start = tensor.storage_offset()

    def view(self, shape: tuple[int, ...], offset: int, strides: tuple[int, ...]) -> torch.Tensor:
        """These elements, in place. An axis that crosses dimensions of a tensor that is not contiguous becomes several."""
        if self.row_major:
            return torch.as_strided(self.tensor, shape, strides, self.start + offset)
        return torch.as_strided(self.tensor, *lying(self.stored, self.tensor.stride(), shape, offset, strides, self.start))

    def zero_padding(self) -> None:
        """Zero the elements that no block fills (rows of a padded vocabulary)."""
        for low, high in gaps(self.stored):
            if self.row_major:
                self.view((high - low,), low, (1,)).zero_()
            else:
                flat = torch.zeros(self.tensor.shape, dtype=torch.bool, device=self.tensor.device)
                flat.view(-1)[low:high] = True
                self.tensor[flat] = 0


#: the tensors of one process on one side, by ``Stored.id``
Tensors = dict[Id, Bound]


def scales_of(stored: Id) -> Id:
    """The ``Stored.id`` of the scales beside a tensor in FP8 blocks."""
    rank, name, file, start = stored
    return rank, scales_name(name), file, start


def lying(stored: Stored, own: tuple[int, ...], shape, offset: int, strides, start: int = 0):
    """(shape, strides, storage offset) in a tensor whose dimensions have strides `own`, of a copy written for row-major."""
    steps = row_major(stored.shape)
    at = start
    for step, size, stride in zip(steps, stored.shape, own):
        at += offset // step % size * stride if step else 0
    sizes, moves = [], []
    for n, s in zip(shape, strides):
        sizes_, moves_ = [], []
        while n > 1 or not sizes_:
            dim = next((d for d in reversed(range(len(steps))) if steps[d] <= s < steps[d] * max(stored.shape[d], 2)), None)
            if dim is None or s % steps[dim]:
                raise PlanError([f"{stored.name} is not contiguous, in a way that its parts cannot be reached"], "pass it contiguous")
            room = steps[dim] * stored.shape[dim] // s
            here = min(n, max(room, 1))
            if n % here:
                raise PlanError([f"{stored.name} is not contiguous, and its parts do not end with its rows"], "pass it contiguous")
            sizes_.insert(0, here)
            moves_.insert(0, s // steps[dim] * own[dim])
            n, s = n // here, s * here
        sizes += sizes_
        moves += moves_
    return sizes, moves, at


def gaps(stored: Stored) -> list[tuple[int, int]]:
    """The ranges of elements of `stored` that no block covers, where its blocks are runs."""
    if not stored.blocks:
        return [(0, stored.size)]
    spans = sorted((b.offset, end(b.offset, b.shape, b.strides)) for _, b in stored.blocks)
    if sum(high - low for low, high in spans) != sum(b.size for _, b in stored.blocks):
        return []  # blocks that interleave: their formats pad only at the end of a dimension, which is then no run
    marks = [(0, 0), *spans, (stored.size, stored.size)]
    return [(a[1], b[0]) for a, b in pairwise(marks) if a[1] < b[0]]


def named(tensors: "Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | torch.nn.Module") -> dict[str, torch.Tensor]:
    """{name: tensor} of whatever a framework passes; a module gives its parameters, and its buffers that it saves."""
    if isinstance(tensors, torch.nn.Module):
        return {name: t.data for name, t in tensors.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    return dict(tensors.items() if isinstance(tensors, Mapping) else tensors)


def dtypes(tensors) -> dict[str, str]:
    """{name: dtype} of what a framework holds, for ``Side.typed``."""
    return {name: WORDS[t.dtype] for name, t in named(tensors).items() if t.dtype in WORDS}


def identity(given: Mapping[str, torch.Tensor]) -> list[tuple]:
    """What the tensors are to their views: as long as this is equal, views made of them are good. A parameter made anew may
    lie at the address of the one before, in other strides or dtype."""
    return [_identity(name, tensor) for name, tensor in given.items()]


def unchanged(given: Mapping[str, torch.Tensor], known: list[tuple]) -> bool:
    """Whether ``identity(given)`` is `known`; one at a time, since a list of all would set off the garbage collector."""
    return len(given) == len(known) and all(_identity(name, tensor) == was for (name, tensor), was in zip(given.items(), known))


def _identity(name: str, tensor: torch.Tensor) -> tuple:
    if type(tensor) not in _PLAIN and hasattr(tensor, "_local_tensor"):
        tensor = tensor._local_tensor
    return name, tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


_PLAIN = torch.Tensor, torch.nn.Parameter


def bind(given, side: Side, process: int, role: str, part: "Sequence[Stored] | None" = None) -> Tensors:
    """Match `given` with what `process` holds on `side`, scales among it; of its stored tensors with those of `part` alone, where
    that is given. Raises PlanError with all problems."""
    tensors = named(given)
    held = side.held_by(process) if part is None else part
    scales = {found.id: found for s in held for found in [side.scales(s)] if found}
    problems: list[str] = []
    out: Tensors = {}
    used: dict[str, torch.Tensor] = {}
    for s in (*held, *scales.values()):
        names = [name for name in (s.name, *side.other_names.get(s.entry.of, ())) if name in tensors]
        if not names:
            if s.size:
                problems.append(f"{s.name} is missing, expected shape {list(s.shape)}")
            continue
        tensor = tensors[names[0]]
        for name in names:
            used[name] = tensors[name]
        local = _local(names[0], tensor, side, process, problems)
        if tuple(local.shape) != s.shape:
            problems.append(f"{names[0]}: shape {list(local.shape)}, expected {list(s.shape)} on rank {process} of {side.title}")
        elif WORDS.get(local.dtype) != s.dtype:
            problems.append(f"{names[0]}: dtype {WORDS.get(local.dtype, local.dtype)}, expected {s.dtype}")
        elif local.is_meta:
            problems.append(f"{names[0]} is on the meta device: it holds nothing")
        else:
            out[s.id] = Bound(s, local.detach(), s.id not in scales and s.padding > 0 and s.name not in side.partly)
        for name in names[1:]:
            if _storage(tensors[name]) != _storage(tensor):
                problems.append(f"{name} and {names[0]} are one tensor in this model, here they lie apart")
    known = {_storage(t) for t in used.values()}
    used |= {name: tensors[name] for name in side.names(process) if name in tensors} if part is not None else {}
    for name, tensor in tensors.items():
        if name in used or side.leaves_out(name) or _storage(tensor) in known:
            continue
        problems.append(f"{name}: {side.title} has no such tensor on rank {process}")
    if problems:
        hint = "the side was made for another model, mesh or dtype than the tensors given"
        if any(" is missing, " in problem for problem in problems) and role == "source":
            hint += "; named_parameters() leaves out buffers, which may be weights: pass the module itself"
        raise PlanError([f"{role}: {problem}" for problem in problems], hint)
    return out


def _storage(tensor: torch.Tensor):
    local = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
    return local.untyped_storage().data_ptr(), local.storage_offset(), local.numel()


def _local(name: str, tensor: torch.Tensor, side: Side, process: int, problems: list[str]) -> torch.Tensor:
    """This rank's part of a DTensor, which must be the one that the side gives this process; other tensors as they are."""
    if not hasattr(tensor, "_local_tensor"):
        return tensor
    found, expected = sharding(name, tensor), side.shardings.get(name)
    if expected is not None and found != expected:
        shape = tuple(tensor.shape)  # the mesh may be a part of the plan's, over whose rest the tensor is replicated
        if found.held(process, shape) != expected.held(process, shape):
            plan = f"{expected.cuts} on {expected.ranks}"
            problems.append(f"{name}: placements {found.cuts} on ranks {found.ranks}, the plan was made for {plan}")
    return tensor._local_tensor


def sharding(name: str, tensor: torch.Tensor) -> Sharding:
    """Mesh and placements of a DTensor."""
    cuts: list[Cut] = []
    for placement in tensor.placements:
        kind = type(placement).__name__
        if placement.is_replicate():
            cuts.append(None)
        elif kind == "_StridedShard":
            cuts.append((placement.dim, placement.split_factor))
        elif placement.is_shard():
            cuts.append(placement.dim)
        else:
            raise PlanError([f"{name}: placement {placement} is neither a shard nor a replica"], "redistribute it first")
    return Sharding(tuples(tensor.device_mesh.mesh.tolist()), tuple(cuts))


def shardings(tensors, ranks: Iterable[int] = (), *, mesh: "torch.distributed.DeviceMesh | None" = None) -> dict[str, Sharding]:
    """{name: Sharding} of a model's DTensors, equal on all ranks that hold a part of it.

    Pass the module itself: ``named_parameters()`` has no buffers, and some are weights (a router's correction bias). A DTensor
    whose mesh is a part of `mesh` (norms under FSDP2 beside a tensor parallel plan that leaves them out) is replicated over
    the rest of it; `mesh` is by default the largest that any of the tensors has. Plain tensors are whole on each of `ranks`, by
    default on all of that mesh. Raises PlanError with all that cannot be placed so.
    """
    given = named(tensors)
    found = {name: sharding(name, tensor) for name, tensor in given.items() if hasattr(tensor, "_local_tensor")}
    meshes = {own.ranks: len(own.sizes) for own in found.values()}
    largest = tuples(mesh.mesh.tolist()) if mesh is not None else max(meshes, key=lambda m: (len(flat(m)), meshes[m]), default=())
    plain = tuple(ranks) or tuple(flat(largest))
    out, problems = {}, []
    for name in given:
        if name not in found:
            out[name] = Sharding(plain, (None,))
            if not plain:
                problems.append(f"{name} is no DTensor: say which ranks hold it whole")
            continue
        wider = found[name].extended(largest)
        if wider is None:
            problems.append(f"{name} lies on ranks {flat(found[name].ranks)}, which are no dimension of the mesh {largest}")
        else:
            out[name] = wider
    if problems:
        raise PlanError(problems, "shardings(model, ranks=[…]) for plain tensors, mesh= the mesh of all ranks that train this model")
    return out
