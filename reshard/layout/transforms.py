"""Entries that hold a function of a tensor: ``transform = "minus_exp"`` holds -exp(x) of what the model calls x.

What such an entry holds goes under a key of its own, ``minus_exp(x)``: between two formats that hold the same function nothing is
computed. Where only one side does, ``values_of`` says how either is computed from the other.
"""

from collections.abc import Iterable

from reshard.layout.bound import Layout
from reshard.layout.model import TRANSFORMS, Entry
from reshard.planner.values import Operand, Value, formed


def values_of(layout: Layout, entries: Iterable[Entry]) -> dict[str, Value]:
    """How what `entries` hold is computed from the tensors, and these from that."""
    out = {}
    for entry in entries:
        for name in entry.of if entry.transform else ():
            tensor = layout.descriptor.tensors[name]
            shapes = [layout.shape(tensor, n) for n in layout.numbers(tensor.place) if layout.exists(tensor, n)]
            if shapes:
                shape, there = tuple(map(max, *shapes)) if len(shapes) > 1 else shapes[0], formed(name, entry.transform)
                out[there] = Value(entry.transform, (Operand.alike(name, shape),))
                out[name] = Value(TRANSFORMS[entry.transform], (Operand.alike(there, shape),))
    return out
