"""A tensor that is spread over ranks, as a pickle holds it: a DTensor or a ShardedTensor, by the attributes that were recorded of it."""

from math import prod
from typing import Any

from reshard.stores import TensorInfo
from reshard.stores.torch_names import Opaque, Sharded, Shards


def shards(state: Any) -> Shards:
    """A ShardedTensor by its state: (local shards, metadata, …). Raises KeyError, TypeError or ValueError for what is none."""
    local, metadata, *_ = state
    size = fields(metadata)["size"]
    out = []
    for shard in local:
        told = fields(shard)
        at, box = told["tensor"], fields(told["metadata"])
        if not isinstance(at, TensorInfo) or list(at.shape) != list(box["shard_sizes"]):
            raise ValueError(
                f"a box of {box['shard_sizes']}, and a tensor of {at.shape if isinstance(at, TensorInfo) else type(at).__name__}"
            )
        out.append((at, tuple(box["shard_offsets"])))
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*size, *(n for _, offsets in out for n in offsets))):
        raise ValueError(f"size {size}")
    return Shards(tuple(size), tuple(out))


def fields(value: Any) -> dict[str, Any]:
    """The attributes of an instance, its slots included."""
    state = value.state if isinstance(value.state, tuple) else (value.state,)
    return {key: held for part in state if part for key, held in part.items()}


def sharded(state: Any) -> Sharded:
    """A DTensor by its attributes. Raises KeyError, TypeError or ValueError for what is none, or none that can be placed."""
    if isinstance(state, tuple):  # of a class with slots: its attributes, then its slots
        state = {key: value for part in state if part for key, value in part.items()}
    local, spec = state["_local_tensor"], state["_spec"].state
    mesh: Any = spec["mesh"].state
    size = spec["tensor_meta"].args[0]
    if not isinstance(local, TensorInfo) or not all(type(n) is int and 0 <= n < 1 << 63 for n in size):
        raise TypeError("its local part is no tensor, or its size no size")
    layout = mesh.get("_layout")
    if isinstance(layout, Opaque):
        axes: Any = layout.state
        shape = tuple(prod(axis.state["shape"]) for axis in axes["axes"])
    else:  # before torch 2.10
        shape = next(mesh[key].shape for key in ("mesh", "_mesh") if key in mesh)
    coordinate = tuple(mesh["_coordinate_on_dim"])
    if not len(coordinate) == len(shape) == len(spec["placements"]) or not all(
        type(i) is int and 0 <= i < n for i, n in zip(coordinate, shape)
    ):
        raise ValueError(f"place {coordinate} on a mesh of {shape}, {len(spec['placements'])} placements")
    cuts = []
    for placement in spec["placements"]:
        if placement.name not in ("Shard", "_StridedShard", "Replicate"):
            raise ValueError(f"placement {placement.name}")
        told = placement.state or {}
        cuts.append((None, 1) if placement.name == "Replicate" else (told["dim"], told.get("split_factor", 1)))
    if not all(dim is None or (type(dim) is int and 0 <= dim < len(size)) for dim, _ in cuts) or not all(
        type(f) is int and f > 0 for _, f in cuts
    ):
        raise ValueError(f"cuts {cuts} of {len(size)} dimensions")
    return Sharded(local, tuple(size), shape, coordinate, tuple(cuts))
