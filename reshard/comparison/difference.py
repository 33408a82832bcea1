"""What a comparison of two checkpoints says: which tensors differ, by how much, and what one side lacks."""

from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any


@dataclass
class Difference:
    """One tensor that differs between two checkpoints.

    `elements` counts each of its elements once, however many ranks hold it. `max_abs_diff` is the largest difference among
    those that differ: NaN where a NaN is among them, None where nothing could be compared. In ``to_json`` NaN and infinity are
    the texts "NaN" and "Infinity", since JSON has no such numbers. `why` says what is unlike besides values: sizes, dtypes, or
    how many elements a side lacks.
    """

    name: str
    elements: int = 0
    max_abs_diff: float | None = 0.0
    why: str = ""
    heat: Any = None  # where they lie (``heat.Heat``), if that was asked for

    def to_json(self) -> dict[str, object]:
        gap = self.max_abs_diff
        said = gap if gap is None or isfinite(gap) else "NaN" if isnan(gap) else "Infinity"
        return {"name": self.name, "elements": self.elements, "max_abs_diff": said} | ({"why": self.why} if self.why else {})


@dataclass
class DiffReport:
    """Whether two checkpoints hold the same parameters, bit for bit. Names are those of the Hugging Face format.

    `missing_in_a` and `missing_in_b` are tensors that only the other side has, of so many bytes there; weights that a layout
    declares to be left out are among them, under their own names.
    """

    tensors: int
    differing: list[Difference] = field(default_factory=list)
    missing_in_a: list[str] = field(default_factory=list)
    missing_in_b: list[str] = field(default_factory=list)
    bytes_missing_in_a: int = 0
    bytes_missing_in_b: int = 0

    @property
    def equal(self) -> bool:
        return not (self.differing or self.missing_in_a or self.missing_in_b)

    def __bool__(self) -> bool:
        return self.equal
