"""The tensors that a rank gives to the steps of a sync, bound to what its sides hold; looked at again only when they change."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from reshard.sync.device import Devices
from reshard.sync.side import Side
from reshard.sync.tensors import Tensors, bind, identity, named, unchanged

#: what is new since the last step, added up: the source's tensors, the destination's, all (a plan, or what a failed step left)
SOURCE, INTO, ALL = 1, 2, 4


@dataclass
class Binding:
    """Tensors that were given, what they were then, what they are on a side, and where they lie."""

    given: Mapping[str, torch.Tensor] = field(default_factory=dict)
    keys: list[tuple] = field(default_factory=list)
    tensors: Tensors = field(default_factory=dict)
    devices: frozenset[torch.device] = frozenset()


class Bindings:
    """What one rank gives as `source` and as `into`; `fresh` is what of it is new."""

    def __init__(self, process: int, devices: Devices):
        self._process, self._devices = process, devices
        self.source, self.into = Binding(), Binding()
        self.fresh = ALL

    def bind(self, source, source_side: Side, into, into_side: Side | None) -> None:
        """Bind what is given; None is nothing. Raises PlanError for what does not fit."""
        known, self.source = self.source, Binding()
        self.source = self._bound("source", source, source_side, known, SOURCE)
        known, self.into = self.into, Binding()
        self.into = self._bound("destination", into, into_side, known, INTO)

    def _bound(self, role: str, tensors, side: Side | None, known: Binding, bit: int) -> Binding:
        if tensors is None:
            return Binding()
        given = named(tensors)
        if known.keys and unchanged(given, known.keys):
            return known
        bound = bind(given, side, self._process, role)
        self.fresh |= bit
        return Binding(given, identity(given), bound, frozenset(b.tensor.device for b in bound.values()))

    def moved(self) -> None:
        """Storages lie elsewhere now: note that, so that the tensors do not count as new."""
        for own in (self.source, self.into):
            own.keys = identity(own.given)

    @property
    def devices(self) -> frozenset[torch.device]:
        return self.source.devices | self.into.devices

    def lies(self, coming: frozenset[torch.device]) -> int:
        """Where the tensors are, and those that are `coming`: 0 nowhere, 1 where the host is, 2 on one accelerator, 3 on several
        devices."""
        fast = [self._devices.accelerated(device) for device in self.devices | coming]
        return 0 if not fast else 1 if not any(fast) else 2 if len(fast) == 1 else 3
