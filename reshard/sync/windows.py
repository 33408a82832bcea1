"""What a rank gives or takes a window at a time: tensors that are asked for when their window comes, and let go after it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from reshard.errors import PlanError
from reshard.geometry.block import Stored
from reshard.sync.messages import RankPlan
from reshard.sync.side import Side
from reshard.sync.tensors import DTYPES, Tensors, bind

#: asked for tensors by their names, which it may make only then
Give = Callable[[list[str]], Mapping[str, torch.Tensor]]
#: told the names of tensors that are whole
Complete = Callable[[list[str]], object]


@dataclass(frozen=True)
class Bucket:
    """Some of the weights, whole, under Hugging Face names: views of one flat buffer that nothing writes to again.

    `flat` is uint8; `layout` lists (name, shape, dtype, first byte, past the last), offsets aligned to the dtype.
    """

    tensors: list[tuple[str, torch.Tensor]]
    flat: torch.Tensor
    layout: list[tuple[str, tuple[int, ...], torch.dtype, int, int]]


class Stream:
    """(name, tensor) pairs of a source that come one after another, each let go when its window has been sent. What comes before its
    turn waits; `held` is the most bytes that were here at a time."""

    def __init__(self, pairs: Iterable[tuple[str, torch.Tensor]], side: Side, process: int):
        self._pairs, self._side, self._process = iter(pairs), side, process
        self._here: dict[str, torch.Tensor] = {}
        self._known, self._gone = set(side.names(process)), set[str]()
        tied = [(s.name, *others) for s in side.held_by(process) if (others := side.other_names.get(s.entry.of, ()))]
        self._twins = {name: [other for other in own if other != name] for own in tied for name in own}
        self.held = 0

    def begin(self) -> frozenset[torch.device]:
        """Take the first pair: the device on which the tensors come."""
        self._pull()
        return frozenset(t.device for t in self._here.values())

    def window(self, part: RankPlan, *, last: bool) -> Tensors:
        """The source's tensors of one window. Raises PlanError for what does not fit, is missing when the pairs end, or is no part
        of the source."""
        names = {s.name: (s.name, *self._side.other_names.get(s.entry.of, ())) for s in part.gives or () if s.size}
        more = True
        while more and (last or not all(self._here.keys() & own for own in names.values())):
            more = self._pull()
        used = {name for own in names.values() for name in own}
        self._gone |= used
        strange = {name for name in self._here if name not in self._known and not self._side.leaves_out(name)}
        given = {name: self._here.pop(name) for name in list(self._here) if name in used or name in strange}
        self._here = {name: t for name, t in self._here.items() if name in self._known}
        return bind(given, self._side, self._process, "source", part.gives or ())

    def _pull(self) -> bool:
        pair = next(self._pairs, None)
        if pair is None:
            return False
        name, tensor = pair
        if name in self._here or (name in self._gone and not any(name in own for own in self._side.other_names.values())):
            raise PlanError([f"source: {name} came twice"])
        twin = next((self._here[other] for other in self._twins.get(name, ()) if other in self._here), None)
        if twin is not None:  # gathered twice, so in memory of its own
            if twin.shape != tensor.shape or not torch.equal(twin, tensor.detach()):
                raise PlanError([f"source: {name} is tied in this model, and came with other values than {self._twins[name][0]}"])
        elif name not in self._gone:  # else the other name of a tied weight that has gone
            self._here[name] = tensor.detach()
            self.held = max(self.held, sum(t.numel() * t.element_size() for t in self._here.values()))
        return True


class Taking:
    """What a rank takes: `bound` from the beginning, or bound window by window to what `give` gives."""

    def __init__(self, side: Side | None, process: int, bound: Tensors, give: Give | None = None, complete: Complete | None = None):
        self._side, self._process, self._give, self._complete = side, process, give, complete
        self.tensors = bound

    def open(self, part: RankPlan) -> None:
        """Ask for the tensors that the window is the first to fill."""
        if self._side is not None and self._give is not None and part.opens:
            self.tensors = self.tensors | bind(self._give(self._names(part.opens)), self._side, self._process, "destination", part.opens)

    def close(self, part: RankPlan) -> None:
        """Zero the padding of what is whole now, tell it, and let go of it."""
        for s in part.completes:
            bound = self.tensors.get(s.id)
            if bound is not None and bound.padded:
                bound.zero_padding()
        if self._give is not None and part.completes:
            names = self._names(part.completes)
            self.tensors = {at: bound for at, bound in self.tensors.items() if bound.stored.name not in names}
            if self._complete is not None:
                self._complete(names)

    def _names(self, stored: Iterable[Stored]) -> list[str]:
        return [own.name for s in stored for own in (s, self._side.scales(s)) if own]


class Rooms:
    """Buffers for whole tensors, those of one window in one: what ``Taking`` gives and completes where an engine has none itself."""

    def __init__(self, side: Side | None, process: int, device: Callable[[], torch.device]):
        held = side.held_by(process) if side else []
        self._stored = {s.name: s for s in (*held, *(found for s in held for found in [side.scales(s)] if found))}
        self._device, self._open = device, list[tuple[set[str], Bucket]]()

    def give(self, names: list[str]) -> dict[str, torch.Tensor]:
        at, layout = 0, []
        for name in names:
            shape, kind = self._stored[name].shape, DTYPES[self._stored[name].dtype]
            at = -(-at // 16) * 16
            layout.append((name, shape, kind, at, at + self._stored[name].size * kind.itemsize))
            at = layout[-1][-1]
        flat = torch.empty(at, dtype=torch.uint8, device=self._device())
        tensors = [(name, flat[low:high].view(kind).view(shape)) for name, shape, kind, low, high in layout]
        self._open.append((set(names), Bucket(tensors, flat, layout)))
        return dict(tensors)

    def complete(self, names: list[str]) -> None:
        for waiting, _ in self._open:
            waiting.difference_update(names)

    def filled(self) -> list[Bucket]:
        """Buckets that are whole, each once."""
        out = [bucket for waiting, bucket in self._open if not waiting]
        self._open = [pair for pair in self._open if pair[0]]
        return out
