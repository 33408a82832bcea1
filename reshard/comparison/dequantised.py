"""diff --dequantise: the weights that a quantised checkpoint's codes and scales give, beside those of a twin that is not quantised.

The twin's own tensors are the destinations of a plan; what would be written is compared with what stands there.
"""

import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import numpy as np

from reshard.checkpoint import Checkpoint
from reshard.comparison.compare import Likeness
from reshard.comparison.difference import Difference, DiffReport
from reshard.conversion.placing import on_mesh
from reshard.dtypes import DTYPE_SIZE, FLOATS, numbers_of, words_of
from reshard.errors import PlanError
from reshard.executor.casts import Casts
from reshard.executor.run import run
from reshard.geometry.block import Stored
from reshard.layout import Entry
from reshard.layout.check import omitted
from reshard.planner.copies import Copy, Move
from reshard.planner.make import plan


def compare_dequantised(
    a: Checkpoint, b: Checkpoint, progress: Callable[[int], None] = lambda size: None, likeness: Likeness = Likeness()
) -> DiffReport:
    """Compare the weights of `a` and `b`, one of which is quantised: each value is computed, and rounded to the twin's dtype. Tensors are
    told by the twin's names. Raises PlanError where not one of them is quantised, and for a tensor that one side lacks."""
    quantised = [checkpoint.layout.plain is not None for checkpoint in (a, b)]
    if quantised[0] == quantised[1]:
        what = "both are quantised: without it, codes and scales are compared" if quantised[0] else "neither is quantised"
        raise PlanError([f"dequantise: of {a.path} and {b.path}, {what}"], "leave out --dequantise")
    source, twin = (a, b) if quantised[0] else (b, a)
    if twin.remote:
        raise PlanError([f"dequantise: the twin {twin.path} is on the Hub"], "pull it first: reshard pull")
    assert source.layout.plain is not None
    placement = on_mesh(source, source.layout.plain, twin.format, twin.mesh)
    wanted = [s._replace(entry=_as_held(s)) for s in twin.stored]
    joined = plan(
        source.stored, wanted, sizes=source.layout.shape_of, omitted=omitted(placement, source.layout), values=source.layout.values
    )
    found: dict[str, Difference] = defaultdict(lambda: Difference(""))
    lock = threading.Lock()
    with closing(source.source()) as left, closing(twin.source()) as right:
        left.casts = Casts(allow=True)  # what has no room in the twin's dtype is a difference there

        def look(stored: Stored, element: int, content: memoryview) -> None:
            held = bytearray(len(content))
            right.read(stored, element, memoryview(held))
            words = words_of(DTYPE_SIZE[stored.dtype])
            mine, other = np.frombuffer(content, words), np.frombuffer(held, words)
            if np.array_equal(mine, other) and not likeness.atol:
                return
            wrong = likeness.unequal(mine, other, Copy(("",), stored, stored, Move((), 0, 0, (), 0, ())))
            if wrong is None:
                return
            with np.errstate(invalid="ignore"):
                first, second = (side.view(numbers_of(stored.dtype))[wrong].astype(np.float64) for side in (mine, other))
                gap = float(np.abs(first - second).max())
            with lock:
                difference = found[stored.name]
                difference.name, difference.elements = stored.name, difference.elements + int(np.count_nonzero(wrong))
                difference.max_abs_diff = float(np.fmax(difference.max_abs_diff or 0.0, gap)) if gap == gap else gap

        run(joined, left, look, progress=progress)
    return DiffReport(len(wanted), sorted(found.values(), key=lambda difference: difference.name))


def _as_held(stored: Stored) -> Entry | None:
    """The twin's entry, which wants the dtype that it has."""
    entry = stored.entry
    return replace(entry, dtype=stored.dtype) if isinstance(entry, Entry) and stored.dtype in FLOATS else entry  # type: ignore[return-value]
