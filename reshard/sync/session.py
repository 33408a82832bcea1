"""``Sync``: a plan, a process group, and the steps that run it. One object per process, for as long as the group lives.

A step is: every rank says what it is about to do (plan's fingerprint, version, whether its tensors fit), and all go on only
if all agree; the bytes move; every rank says whether all went well. What one rank finds wrong, all ranks raise. From the
first byte to the last word an engine's weights are ``mixed``, and they stay so when a step fails.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from reshard.api import torch_dtypes
from reshard.errors import PeerLost, PlanError, ReshardError, SyncError
from reshard.stores import DTYPE_SIZE
from reshard.sync.checks import sums
from reshard.sync.messages import RankPlan, rank_plan, windows
from reshard.sync.plan import SyncPlan
from reshard.sync.staging import Copies, Peers, Staging, source_view, straight
from reshard.sync.tensors import DTYPES, Bound, bind, named
from reshard.sync.transport import Mapped, Wire, can_share, node, publish

_TEXT = 480  # bytes of a refusal that all ranks get to read
_MODES = ("tensors", "buckets")


@dataclass(frozen=True)
class Stats:
    """What one step moved at this rank, in bytes: `sent` and `taken` in messages, `mapped` out of peers' memory, `local`
    within the process. `staging` is what its buffers take, `checks` the bytes of sums that ``verify`` exchanged."""

    version: int
    sent: int
    taken: int
    mapped: int
    local: int
    staging: int
    checks: int
    seconds: float

    @property
    def received(self) -> int:
        return self.taken + self.mapped


@dataclass(frozen=True)
class Bucket:
    """Some of the weights, whole, under Hugging Face names: views of one flat buffer that nothing writes to again.

    `flat` is uint8; `layout` lists (name, shape, dtype, first byte, past the last), offsets aligned to the dtype.
    """

    tensors: list[tuple[str, torch.Tensor]]
    flat: torch.Tensor
    layout: list[tuple[str, tuple[int, ...], torch.dtype, int, int]]


class Sync:
    """Runs a plan between torch tensors.

    `group`: its ranks are the plan's ranks; all of them take part in each step (one that neither sends nor takes calls
    ``exchange()``). `transport`: ``p2p`` sends messages; ``mapped`` lets processes of one node copy out of each other's memory
    (shared memory on the CPU: a sender's tensors are moved there in place, as ``Module.share_memory`` does; CUDA IPC);
    ``auto`` maps where both tensors are in CPU memory of one node or on one GPU, and sends otherwise. `timeout`: seconds
    after which a silent peer is an error. `verify`: compare sums of every tensor after every step.
    """

    def __init__(self, plan: SyncPlan, group: "dist.ProcessGroup | None" = None, *, transport: str = "auto", timeout: float = 60.0, verify: bool = False):
        if transport not in ("auto", "p2p", "mapped"):
            raise PlanError([f"unknown transport {transport!r}"], "use auto, p2p or mapped")
        self._wire = Wire(group, timeout)
        self._transport, self._verify = transport, verify
        self.version: int | None = None
        self.state = "empty"
        self.replan(plan)

    def replan(self, plan: SyncPlan) -> None:
        """Go on with another plan: other meshes, other ranks. The engine's weights and version stay what they are."""
        if plan.processes[-1] >= self._wire.size:
            raise PlanError([f"the plan has rank {plan.processes[-1]}, the process group {self._wire.size} ranks"])
        self.plan = plan
        me = self._wire.rank
        self._sides = [side for side in plan.destinations if me in side.processes]
        if len(self._sides) > 1:
            raise PlanError([f"rank {me} is in {len(self._sides)} destinations"], "sync them one after another")
        self._is_source = me in plan.source.processes
        self._bound: dict[str, tuple[tuple, dict[int, Bound]]] = {}
        self._parts: dict[str, list[RankPlan]] = {}
        self._given: dict[str, dict[str, torch.Tensor]] = {}
        self._ready: tuple[Staging, Copies, Copies] | None = None  # made once, until a tensor moves
        self._peers: dict[int, Mapped] = {}
        self._mapping = Peers()
        self._published = False

    # ------------------------------------------------------------------------------------------------------ the steps

    def send(self, tensors, version: int | None = None) -> Stats:
        """Give this rank's weights: {name: tensor}, (name, tensor) pairs, or a module. Returns when they may be changed again."""
        return self.exchange(tensors, None, version)

    def recv(self, tensors, version: int | None = None) -> Stats:
        """Take weights into the engine's own tensors, in place. Returns when they are whole."""
        return self.exchange(None, tensors, version)

    def exchange(self, source=None, into=None, version: int | None = None) -> Stats:
        """Both at once, for a rank that is trainer and engine. Raises, on every rank, what any rank found wrong."""
        for _ in self._step(source, into, version, "tensors"):
            pass
        return self.stats

    def buckets(self, source=None, version: int | None = None) -> Iterator[Bucket]:
        """Take weights as buckets of (HF name, whole tensor), for engines that load by name: the plan's destination is format
        ``hf``. A rank that is a trainer too passes its tensors. Ranks that only send call ``send``, and wait, for `timeout` at
        most, while the engine works on a bucket."""
        yield from self._step(source, None, version, "buckets")

    def _step(self, source, into, version, mode: str) -> Iterator[Bucket]:
        began = time.perf_counter()
        version = (self.version or 0) + 1 if version is None else version
        taking = bool(self._sides)
        source_bound, into_bound, mode = self._begin(source, into, version, mode)
        if taking:
            self.state = "mixed"
        moved = [0, 0, 0, 0, 0]  # sent, taken, mapped, local, checks
        staging = 0
        sent, taken = self._wire.bytes_sent, self._wire.bytes_taken
        try:
            whole = taking and mode == "buckets"
            for part, made, copies, own in self._prepared(mode, source_bound, into_bound):
                if whole:
                    bucket, into_bound = self._bucket(part)
                    made, copies, own = self._make(part, source_bound, into_bound)
                self._run(made, copies, own)
                for number, size in enumerate((0, 0, *self._copied(part))):
                    moved[number] += size
                staging = max(staging, made.bytes)
                if self._verify:
                    moved[4] += self._compare(part, source_bound, into_bound)
                if whole and bucket.tensors:
                    yield bucket
            failure = ""
        except PeerLost:
            raise  # no use in telling: the group is broken, and each rank finds out by itself
        except Exception as error:  # noqa: BLE001  all ranks must hear of it
            failure = str(error) if isinstance(error, ReshardError) else f"{type(error).__name__}: {error}"
        self._end(failure, version)
        _, _, mapped, local, checks = moved
        self.stats = Stats(version, self._wire.bytes_sent - sent, self._wire.bytes_taken - taken, mapped, local, staging, checks, time.perf_counter() - began)

    # ------------------------------------------------------------------------------------------- agreement, before and after

    def _begin(self, source, into, version: int, mode: str):
        """Bind the tensors, and go on only if every rank can, for the same plan and version."""
        failure, shares = "", False
        source_bound: dict[int, Bound] = {}
        into_bound: dict[int, Bound] = {}
        me = self._wire.rank
        if self._wire.device.type == "cuda":
            torch.cuda.synchronize()  # the weights are written before anyone reads them
        try:
            if self._is_source != (source is not None):
                raise PlanError([f"rank {me} {'is' if self._is_source else 'is not'} among the source's ranks: it {'has to pass' if self._is_source else 'passes'} the weights it sends"])
            takes = mode == "tensors" and bool(self._sides)
            if takes != (into is not None):
                raise PlanError([f"rank {me} {'is' if self._sides else 'is not'} among the destination's ranks: it {'has to pass' if self._sides else 'passes'} tensors to fill"])
            if mode == "buckets" and (not self._sides or self._sides[0].format != "hf" or len(self._sides[0].members) != 1):
                raise PlanError([f"buckets() yields whole tensors under HF names; rank {me} takes no such"], 'make the plan for Side.placed(layout, "hf", ranks=…)')
            if source is not None:
                source_bound = self._bind("source", source, self.plan.source)
                shares = self._transport != "p2p" and can_share(source_bound)
            if takes:
                into_bound = self._bind("destination", into, self._sides[0])
        except ReshardError as error:
            failure = str(error) + (f"; {error.hint}" if error.hint else "")
        except Exception as error:  # noqa: BLE001  whatever a framework passed, all ranks must hear of it
            failure = f"{type(error).__name__}: {error}"
        rows = self._wire.gather(self._row(failure, [
            int(self.plan.fingerprint[:15], 16), version, -1 if self.version is None else self.version,
            0 if not self._sides else 1 + _MODES.index(mode), self._place(source_bound or into_bound), int(shares), int(shares and not self._published),
        ]), "agreeing on a step")  # fmt: skip
        self._agreed(rows)
        self._share(rows, source_bound, shares)
        modes = set(rows[:, 4].tolist()) - {0}
        return source_bound, into_bound, _MODES[modes.pop() - 1]

    def _agreed(self, rows: torch.Tensor) -> None:
        """Raise what any rank refused, or any two ranks disagree on."""
        refused = [f"rank {r}: {_text(row)}" for r, row in enumerate(rows) if row[0]]
        if refused:
            raise SyncError("the sync was refused before its first byte: " + "; ".join(refused))
        fingerprints, versions, held, modes = (rows[:, i].tolist() for i in (1, 2, 3, 4))
        if len(set(fingerprints)) > 1:
            groups = {f: [r for r, other in enumerate(fingerprints) if other == f] for f in dict.fromkeys(fingerprints)}
            text = ", ".join(f"{f:015x} on ranks {ranks}" for f, ranks in groups.items())
            raise SyncError(f"ranks made different plans: {text}", "make the plan from the same layout, meshes, dtypes and bucket_bytes everywhere")
        if len(set(versions)) > 1:
            raise SyncError(f"ranks are at different versions: {', '.join(f'rank {r} at {v}' for r, v in enumerate(versions))}", "call send and recv with the step's number")
        if max(held) >= versions[0]:
            raise SyncError(f"version {versions[0]} is stale: rank {held.index(max(held))} already holds {max(held)}", "versions must grow")
        if len(set(modes) - {0}) != 1:
            raise SyncError("some ranks take buckets, others tensors" if len(set(modes)) > 1 else "no rank takes anything")

    def _end(self, failure: str, version: int) -> None:
        rows = self._wire.gather(self._row(failure, []), "finishing a step")
        failed = [f"rank {r}: {_text(row)}" for r, row in enumerate(rows) if row[0]]
        if failed:
            hold = "; the engines' weights are mixed: sync again before they are used"
            raise SyncError(f"sync of version {version} failed: " + "; ".join(failed) + hold)
        self.version = version
        if self._sides:
            self.state = "clean"

    def _row(self, failure: str, numbers: list[int]) -> torch.Tensor:
        text = failure.encode()[:_TEXT].ljust(_TEXT, b"\0")
        return torch.cat([torch.tensor([int(bool(failure)), *numbers]), torch.frombuffer(bytearray(text), dtype=torch.int64)])

    # -------------------------------------------------------------------------------------------------- tensors, peers

    def _bind(self, role: str, tensors, side) -> dict[int, Bound]:
        """As ``bind``; tensors that lie where they lay are not looked at twice."""
        given = named(tensors)
        if role not in self._bound or self._bound[role][0] != _lying(given):
            self._bound[role] = _lying(given), bind(given, side, self._wire.rank, role)
            self._given[role] = given
            self._ready = None
            if role == "source":
                self._published = False
        return self._bound[role][1]

    def _place(self, bound: dict[int, Bound]) -> int:
        """Equal on ranks that may map each other's memory."""
        device = next((b.tensor.device for b in bound.values()), self._wire.device)
        here = node()
        if device.type == "cuda" and self._transport == "auto":
            here ^= int.from_bytes(str(torch.cuda.get_device_properties(device).uuid).encode()[-7:], "big")
        return here

    def _share(self, rows: torch.Tensor, source: dict[int, Bound], shares: bool) -> None:
        """Find out whose memory is mapped by whom; exchange handles where they are new."""
        places, sharing = rows[:, 5].tolist(), rows[:, 6].tolist()
        me = self._wire.rank
        together = [r for r in range(self._wire.size) if places[r] == places[me] and r != me]
        peers = Peers(frozenset(together) if shares else frozenset(), frozenset(r for r in together if sharing[r]))
        if rows[:, 7].any():
            mine = b""
            if shares and not self._published:
                mine = json.dumps(publish(source)).encode()
                self._bound["source"] = _lying(self._given["source"]), source  # storages may have moved to shared memory
                self._published = True
            for r, data in enumerate(self._wire.gather_bytes(mine, "exchanging handles")):
                if data and r in peers.out_of and self._sides:
                    self._peers[r] = Mapped(json.loads(data), DTYPES)
                    self._ready = None
        if self._mapping != peers:
            self._mapping, self._ready = peers, None

    def _prepared(self, mode: str, source: dict[int, Bound], into: dict[int, Bound]):
        """(RankPlan, Staging, mapped copies, local copies) of each part of the plan; made once, until a tensor moves."""
        if mode not in self._parts:
            me = self._wire.rank
            self._parts[mode] = [rank_plan(self.plan, me)] if mode == "tensors" else windows(self.plan, me)
        if mode == "buckets":
            for part in self._parts[mode]:
                yield part, *((None, None, None) if self._sides else self._make(part, source, into))
            return
        if self._ready is None:
            self._ready = self._make(self._parts[mode][0], source, into)
        yield self._parts[mode][0], *self._ready

    def _make(self, part: RankPlan, source: dict[int, Bound], into: dict[int, Bound]) -> tuple[Staging, Copies, Copies]:
        made = Staging(part, source, into, self._wire.device, self._mapping)
        mapped = Copies()
        for (sender, taker), copies in part.pairs.items():
            if taker == part.process and sender in self._mapping.out_of:
                more = straight(copies, self._peers[sender].view, into)
                mapped.into += more.into
                mapped.values += more.values
                mapped.quantised += more.quantised
        return made, mapped, straight(part.local, lambda copy: source_view(copy, source), into)

    def _bucket(self, part: RankPlan) -> tuple[Bucket, dict[int, Bound]]:
        """Room for the destination tensors of one part."""
        kinds, wanted = torch_dtypes(), {}
        for t in part.transfers:
            if t.taker == part.process:
                wanted[id(t.dst)] = t.dst
        at, layout = 0, []
        for s in wanted.values():
            kind = kinds[s.dtype]
            at = -(-at // 16) * 16
            layout.append((s.name, s.shape, kind, at, at + s.size * kind.itemsize))
            at = layout[-1][-1]
        flat = torch.empty(at, dtype=torch.uint8, device=self._wire.device)
        tensors = [(name, flat[low:high].view(kind).view(shape)) for name, shape, kind, low, high in layout]
        return Bucket(tensors, flat, layout), {id(s): Bound(s, t) for s, (_, t) in zip(wanted.values(), tensors)}

    # ---------------------------------------------------------------------------------------------------- moving, checking

    def _run(self, made: Staging, mapped: Copies, own: Copies) -> None:
        mapped.run()
        own.run()
        self._wire.run(made)
        if self._sides:
            for bound in self._bound.get("destination", ((), {}))[1].values():
                if bound.padded:
                    bound.zero_padding()

    def _copied(self, part: RankPlan) -> tuple[int, int]:
        """Bytes read out of peers' memory (a cast reads the wider source), and those copied within the process."""
        mapped = sum(prod(c.shape) * DTYPE_SIZE[c.src.dtype] for (s, t), copies in part.pairs.items() if t == part.process and s in self._mapping.out_of for c in copies)
        return mapped, sum(c.bytes for c in part.local)

    def _compare(self, part: RankPlan, source: dict[int, Bound], into: dict[int, Bound]) -> int:
        """Exchange the sums of every tensor and compare. Returns their bytes; raises SyncError naming what differs."""
        wire = self._wire
        mine, theirs = sums(part, source, taker=False), sums(part, into, taker=True)
        works, arrived = [], {}
        for (sender, taker), (labels, values) in theirs.items():
            arrived[sender, taker] = torch.empty(len(labels), dtype=torch.int64, device=wire.device)
            works.append((dist.irecv(arrived[sender, taker], wire._global(sender), wire.group), sender))
        for (_, taker), (_, values) in mine.items():
            works.append((dist.isend(values.to(wire.device), wire._global(taker), wire.group), taker))
        for work, peer in works:
            wire.wait(work, f"comparing sums with rank {peer}")
        wire.drain("comparing sums")
        wrong = [f"{label} from rank {sender}" for (sender, taker), (labels, values) in theirs.items()
                 for label, same in zip(labels, (values.cpu() == arrived[sender, taker].cpu()).tolist()) if not same]  # fmt: skip
        if wrong:
            raise SyncError(f"{len(wrong)} tensors arrived with other values than were sent: {', '.join(wrong[:8])}{' …' if len(wrong) > 8 else ''}")
        return 8 * sum(len(labels) for labels, _ in (*mine.values(), *theirs.values()))


def _text(row: torch.Tensor) -> str:
    return bytes(row[-_TEXT // 8 :].contiguous().view(torch.uint8).tolist()).rstrip(b"\0").decode(errors="replace")


def _lying(given: dict[str, torch.Tensor]) -> list:
    """Where tensors lie: as long as this is equal, views made of them are good."""
    locals_ = [getattr(t, "_local_tensor", t) for t in given.values()]
    return [list(given), [t.data_ptr() for t in locals_], [t.numel() for t in locals_]]
