"""One rank's stored tensors under the paths of its model, with the checks that need every rank's headers."""

from collections import defaultdict
from dataclasses import replace

import torch

from reshard.verify.group import Group, Seat
from reshard.verify.model import Model
from reshard.verify.shards import Held, Shards
from reshard.verify.tables import Row


class Slices:
    """The tensors of seat `number`. Without `groups` (process group handles by their members) nothing is ever read.

    `table` maps paths of the model to stored tensors; `problems` gathers what doesn't fit.
    """

    def __init__(self, shards: Shards, seats: list[Seat], number: int, model: Model, groups: dict[tuple[int, ...], object] | None,
                 device: torch.device, dtype: torch.dtype):  # fmt: skip
        self.shards, self.seats, self.number, self.seat, self.model = shards, seats, number, seats[number], model
        self.groups, self.device, self.dtype = groups, device if groups is not None else torch.device("meta"), dtype
        self.group = self._group(self.seat.tensor)
        self.stage = self._group(self.seat.stage)
        self.tables, self.rows = shards.tables, shards.rows
        self.table = self.tables[self.seat.rank.number]
        self.modules: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.table:
            path, _, kind = name.rpartition(".")
            self.modules[path][kind] = name
        self.computes_logits = True  # whether the output layer is on this rank's stage
        self.problems: list[str] = []
        self.used: set[str] = set()

    def _group(self, members: tuple[int, ...]) -> Group:
        return Group(members, members.index(self.number), None if self.groups is None else self.groups[members])

    def read(self, name: str) -> torch.Tensor:
        """The tensor on this rank's device, in the dtype that is computed in."""
        self.used.add(name)
        if self.groups is None:
            return torch.empty(self.table[name].info.shape, device="meta")
        row = self.table[name].row
        precise = row is not None and row.precise  # F32 in the engines and in transformers
        # as stored over the bus, and cast where it is used: half the bytes of bf16, and no fp32 copy on the host
        return self.shards.read(self.table[name]).to(self.device).to(torch.float32 if precise else self.dtype)

    def repeated(self, name: str, stage: int) -> None:
        """Some engines hold embedding, norm and head on every pipeline stage; `stage` uses its copy, and this one must be the same bits."""
        mine = self.seat.rank
        tables = [self.tables[seat.rank.number] for seat in self.seats if seat.rank == replace(mine, number=seat.rank.number, pp=stage)]
        found = next((table[name] for table in tables if name in table), None)
        if found is None:
            return
        self.used.add(name)
        if self.groups is not None:  # that was done when the model was looked through
            return
        own, other = (self.shards.read(held) for held in (self.table[name], found))
        if own.shape != other.shape or not torch.equal(own, other):
            self.problem(name, f"is not what {found.file} holds, of the stage that uses it")

    def stored(self, path: str) -> list[str]:
        """Names in files of what any rank holds of the module or tensor at `path`."""
        return list(dict.fromkeys(held.name for table in self.tables for name, held in table.items() if f"{name}.".startswith(f"{path}.")))

    def row(self, path: str) -> Row | None:
        """What the table says of the module at `path`, of which this rank holds a tensor."""
        return self.table[next(iter(self.modules[path].values()))].row

    def along(self, name: str, dim: int) -> list[int]:
        """Sizes of tensor `name` along `dim` on each rank of the tensor-parallel group."""
        found = [self.tables[self.seats[member].rank.number].get(name) for member in self.group.members]
        return [held.info.shape[dim] if held and len(held.info.shape) > dim else 0 for held in found]

    def width(self, name: str, dim: int) -> int | None:
        """Size of matrix `name` along `dim` on this rank; None where it holds none."""
        held = self.table.get(name)
        return held.info.shape[dim] if held and len(held.info.shape) == 2 else None

    def problem(self, name: str, text: str) -> None:
        held: Held | None = self.table.get(name)
        self.problems.append(f"rank {self.seat.rank.number}: {f'{held.name} ({held.file})' if held else name} {text}")

    def fits(self, name: str, expected: tuple[int | None, ...], total: int | None = None) -> bool:
        """Whether the stored shape is `expected` on this rank, where its None is cut over ranks: to `total` in all."""
        shape = self.table[name].info.shape
        shown = "[" + ", ".join("…" if size is None else str(size) for size in expected) + "]"
        if len(shape) != len(expected) or any(e is not None and e != s for e, s in zip(expected, shape)):
            self.problem(name, f"has shape {list(shape)}, the engine takes {shown}")
            return False
        if total is not None and (found := self.along(name, expected.index(None))) and sum(found) != total:
            self.problem(
                name, f"has {' + '.join(map(str, found))} = {sum(found)} on the ranks of its group, the engine takes {total} in all"
            )
            return False
        return True

    def any_columns(self, name: str) -> list[int]:
        """Columns of tensor `name` on each tensor-parallel rank of the stage that holds it, wherever that is; no sizes where none does."""
        for seat in self.seats:
            found = [self.tables[self.seats[member].rank.number].get(name) for member in seat.tensor]
            if all(found):
                return [held.info.shape[-1] for held in found]
        return []
