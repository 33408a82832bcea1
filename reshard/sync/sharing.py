"""Whose memory is mapped by whom, agreed by all ranks: needs added up per node, handles exchanged, failures told.

Where memory cannot be mapped ``auto`` sends messages instead, on all ranks alike, and says why; ``mapped`` is refused.
"""

import json
from collections import defaultdict
from collections.abc import Collection

import torch

from reshard.sync import agreement, mapping
from reshard.sync.agreement import Trial
from reshard.sync.device import Devices
from reshard.sync.mapping import Mapped, publish
from reshard.sync.staging import Peers
from reshard.sync.tensors import DTYPES, Tensors
from reshard.sync.transport import Wire


class Sharing:
    """`peers`: whom this rank maps and who maps it; `memory`: what it has mapped, by rank; `note`: why some are not mapped."""

    def __init__(self, wire: Wire, transport: str, devices: Devices):
        self._wire, self._transport, self._devices = wire, transport, devices
        self.peers, self.note = Peers(), ""
        self.memory: dict[int, Mapped] = {}

    def renew(
        self,
        pairs: Collection[tuple[int, int]],
        source_places: list[int],
        into_places: list[int],
        source: Tensors,
        trial: Trial,
    ) -> list[str]:
        """Map anew. `pairs` are this rank's (sender, taker); places are those of all ranks. All ranks call this together, also one
        that has failed before in `trial`. Returns what ranks refuse, each in words: nothing where the step goes on."""
        self.memory, self.peers, self.note = {}, Peers(), ""
        me, wire = self._wire.rank, self._wire
        near = {(s, t) for s, t in pairs if source_places[s] == into_places[t] >= 0} if self._transport != "p2p" else set()
        to, out_of = {t for s, t in near if s == me}, {s for s, t in near if t == me}
        failed, problem, need, looking = trial.error is not None, "", 0, Trial(trial.error)
        with looking:
            if to and not failed:
                if not mapping.can_share(source):
                    problem = "its tensors lie on several kinds of devices"
                else:
                    need, problem = mapping.needs(source), mapping.too_many_files(source)
        told = agreement.words(looking.error) if looking.error else problem
        row = agreement.row(told, [int(failed), int(bool(to)), need, mapping.room(), mapping.node()])
        table = wire.gather(row, "mapping memory")
        if table[:, 1].any():
            return [text for r, text in zip(_failing(table), agreement.failures(table)) if table[r, 1]]
        if not table[:, 2].any():
            return []  # nobody's memory is to be mapped
        without = {r: text for r, text in zip(_failing(table), agreement.failures(table))}
        without |= _short_of_room(table, without)
        handles = b""
        if to and me not in without:
            try:
                handles = json.dumps(["", publish(source, self._devices)]).encode()
            except Exception as error:  # noqa: BLE001  expandable segments, another allocator, no room after all
                handles = json.dumps([agreement.words(error), []]).encode()
        published = [json.loads(data) if data else None for data in wire.gather_bytes(handles, "exchanging handles")]
        without |= {r: f"rank {r}: {own[0]}" for r, own in enumerate(published) if own and own[0]}
        opening = Trial()
        with opening:
            for r in sorted(out_of - set(without)):
                self.memory[r] = Mapped(published[r][1], DTYPES, self._devices)
        table = opening.told(wire, "opening mapped memory")
        closed = {r: text for r, text in zip(_failing(table), agreement.failures(table))}
        reasons = [*without.values(), *closed.values()]
        if reasons and self._transport == "mapped":
            self.memory = {}
            return [f'{text}; use transport="auto" or "p2p"' for text in reasons]
        if me in closed:
            self.memory = {}
        self.memory = {r: own for r, own in self.memory.items() if r not in without}
        to = frozenset(t for t in to if t not in closed) if me not in without else frozenset()
        self.peers = Peers(to, frozenset(self.memory))
        self.note = "by message, not mapped: " + "; ".join(reasons) if reasons else ""
        return []


def _failing(table: torch.Tensor) -> list[int]:
    return [r for r, own in enumerate(table) if own[0]]


def _short_of_room(table: torch.Tensor, without: Collection[int]) -> dict[int, str]:
    """Ranks that cannot publish, since all of their node together need more shared memory than it has."""
    need: dict[int, int] = defaultdict(int)
    room: dict[int, int] = {}
    for r, (_, _, _, own, free, node) in enumerate(table[:, :6].tolist()):
        need[node] += own if r not in without else 0
        room[node] = min(free, room.get(node, free))
    out = {}
    for r, (_, _, _, own, _, node) in enumerate(table[:, :6].tolist()):
        if own and need[node] > 0.9 * room[node]:
            out[r] = f"rank {r}: its node needs {need[node]:,} bytes of shared memory and has {room[node]:,}"
    return out
