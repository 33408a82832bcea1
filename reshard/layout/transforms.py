"""Tensors that a format stores as a named function of the model's: what is stored is a tensor of its own, computed either way.

``executor/values.py`` has the functions. Their names here, and which undoes which; the result of one and back may differ in its last bits.
"""

from collections.abc import Mapping

from reshard.errors import LayoutError
from reshard.layout.bound import Layout
from reshard.layout.entries import TRANSFORMS
from reshard.layout.model import transformed
from reshard.planner.values import Operand, Value

INVERSE = {"minus_exp": "log_minus", "minus_one": "plus_one", "plus_one": "minus_one"}
assert set(INVERSE) == set(TRANSFORMS)


def transforms(layout: Layout) -> Mapping[str, Value]:
    """How tensors that some format stores transformed are computed, and how their own values come back. Raises LayoutError."""
    out = {}
    for section in layout.descriptor.formats.values():
        for entry in (e for e in section.entries if e.transform):
            for name in entry.of:
                tensor = layout.descriptor.tensors[name]
                shapes = {layout.shape(tensor, n) for n in layout.numbers(tensor.place) if layout.exists(tensor, n)}
                if len(shapes) > 1:
                    raise LayoutError(
                        f"layout {layout.name}: {entry.name}: {entry.transform} of {name}, whose size differs from layer to layer"
                    )
                for shape in shapes:
                    stored = transformed(name, entry.transform)
                    out[stored] = Value(entry.transform, (Operand.alike(name, shape),))
                    out[name] = Value(INVERSE[entry.transform], (Operand.alike(stored, shape),))
    return out
