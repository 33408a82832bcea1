"""``Sync``: a plan, a process group, and the steps that run it. One object per process, for as long as the group lives.

A step is: every rank says what it is about to do (plan's fingerprint, version, whether its tensors fit), and all go on only
if all agree; the bytes move; every rank says whether all went well. What one rank finds wrong, all ranks raise: one that
fails goes on with its messages, so that no other waits for it, and says so at the end. From the first byte to the last word
an engine's weights are ``mixed``, and they stay so when a step fails.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from reshard.errors import PeerLost, PlanError, SyncError
from reshard.sync import agreement
from reshard.sync.agreement import MODES, Intent
from reshard.sync.device import Devices
from reshard.sync.mapping import place
from reshard.sync.messages import RankPlan, rank_plan, windows
from reshard.sync.moving import Bucket, Ready, compare, make, room
from reshard.sync.plan import SyncPlan
from reshard.sync.sharing import Sharing
from reshard.sync.staging import Copies, Staging
from reshard.sync.tensors import Tensors, bind, identity, named, unchanged
from reshard.sync.transport import Wire, attempt


@dataclass
class Binding:
    """Tensors that were given, what they were then, and what they are on a side; `devices` where they lie."""

    given: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: list[tuple] = field(default_factory=list)
    bound: Tensors = field(default_factory=dict)
    devices: frozenset[torch.device] = frozenset()


#: what is new since the last step, added up: the source's tensors, the destination's, all (a plan, or what a failed step left)
_SOURCE, _INTO, _ALL = 1, 2, 4


@dataclass(frozen=True)
class Stats:
    """What one step moved at this rank, in bytes: `sent` and `taken` in messages, `mapped` out of peers' memory, `local`
    within the process. `staging` is what its buffers take, `checks` the bytes of sums that ``verify`` exchanged. `note` says why
    messages were sent where memory should have been mapped, or is empty."""

    version: int
    sent: int
    taken: int
    mapped: int
    local: int
    staging: int
    checks: int
    seconds: float
    note: str = ""

    @property
    def received(self) -> int:
        return self.taken + self.mapped


class Sync:
    """Runs a plan between torch tensors.

    `group`: its ranks are the plan's ranks; all of them take part in each step (one that neither sends nor takes calls
    ``exchange()``). `transport`: ``p2p`` sends messages; ``mapped`` lets processes of one node copy out of each other's memory
    (shared memory on the CPU: a sender's tensors are moved there in place, as ``Module.share_memory`` does; CUDA IPC);
    ``auto`` maps where both tensors are in CPU memory of one node or on one GPU, and where that can be had; it sends otherwise.
    `timeout`: seconds after which a silent peer is an error. `verify`: compare sums of every tensor after every step, between
    sender and taker and between the trainer's replicas. `devices` is what is asked of accelerators (for tests).
    """

    def __init__(
        self,
        plan: SyncPlan,
        group: "dist.ProcessGroup | None" = None,
        *,
        transport: str = "auto",
        timeout: float = 60.0,
        verify: bool = False,
        devices: Devices | None = None,
    ):
        if transport not in agreement.TRANSPORTS:
            raise PlanError([f"unknown transport {transport!r}"], "use auto, p2p or mapped")
        self._devices = devices or Devices()
        self._wire = Wire(group, timeout, self._devices)
        self._transport, self._verify = transport, verify
        self.version: int | None = None
        self.state = "empty"
        self._over = ""  # why no step can be taken any more
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
        self._bound: dict[str, Binding] = {}
        self._parts: dict[str, list[RankPlan]] = {}
        self._mode = ""  # of the last step
        self._ready: Ready | None = None  # made once, until a tensor moves
        self._staged: frozenset[int] = frozenset()
        self._sharing = Sharing(self._wire, self._transport, self._devices)
        self._fresh = _ALL
        self._places: tuple[list[int], list[int]] = [], []

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
        most, while the engine works on a bucket. To stop before the last one fails the step on all ranks."""
        yield from self._step(source, None, version, "buckets")

    def close(self) -> None:
        """Let go of buffers and of peers' memory; the engine's and trainer's tensors stay as they are. No step follows."""
        self._over = self._over or "this Sync was closed"
        self._bound, self._parts, self._ready = {}, {}, None
        self._sharing = Sharing(self._wire, self._transport, self._devices)

    def abort(self, why: str = "it gave up") -> None:
        """Take part no more, and let peers know: those in a step raise PeerLost at once. The process group is of no further use
        (connections are closed, an NCCL communicator is aborted): ``destroy_process_group`` returns at once, make a new one."""
        if not self._over:
            self._over = f"this Sync was aborted: {why}"
            self._wire.abort(why)
        self.close()

    def _step(self, source, into, version, mode: str) -> Iterator[Bucket]:
        if self._over:
            raise SyncError(self._over, "make a new process group and a new Sync")
        began = time.perf_counter()
        try:
            source_bound, into_bound, mode, version = self._begin(source, into, version, mode)
            yield from self._moved(source_bound, into_bound, mode, version, began)
        except PeerLost as error:
            self._over = f"the process group is broken: {error}"
            self._wire.abort(str(error))  # those that have not noticed yet
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            self.abort(agreement.words(error))  # others may wait for messages that will not come
            raise

    def _moved(self, source: Tensors, into: Tensors, mode: str, version: int, began: float) -> Iterator[Bucket]:
        taking = bool(self._sides)
        if taking:
            self.state = "mixed"
        moved = {"mapped": 0, "local": 0, "checks": 0, "staging": 0}
        sent, taken = self._wire.bytes_sent, self._wire.bytes_taken
        whole = mode == "buckets"
        failure: BaseException | None = None
        try:
            for part in self._parts[mode]:
                bucket, ready = None, self._ready
                if whole:
                    bucket, into, ready = self._next_bucket(part, source, into)
                self._move(ready)
                moved["mapped"] += ready.bytes_mapped
                moved["local"] += ready.bytes_local
                moved["checks"] += 8 * sum(sums.size for sums in ready.sums or ())
                moved["staging"] = max(moved["staging"], ready.staging.bytes)
                if bucket and bucket.tensors:
                    yield bucket
        except PeerLost:
            raise  # no use in telling: the group is broken, and each rank finds out by itself
        except _Told as told:
            raise self._failed(version, told.failures, told.own) from told.own
        except (Exception, GeneratorExit) as error:  # noqa: BLE001  all ranks must hear of it
            failure = error
        self._end(failure, version)
        used = time.perf_counter() - began
        self.stats = Stats(
            version, self._wire.bytes_sent - sent, self._wire.bytes_taken - taken, **moved, seconds=used, note=self._sharing.note
        )

    # ------------------------------------------------------------------------------------------- agreement, before and after

    def _begin(self, source, into, version, mode: str) -> tuple[Tensors, Tensors, str, int]:
        """Bind the tensors, and go on only if every rank can, for the same plan and version."""
        failure: Exception | None = None
        own, fill = Binding(), Binding()
        intent = Intent(int(self.plan.fingerprint[:15], 16), held=-1 if self.version is None else self.version)
        intent.transport, intent.verify = agreement.TRANSPORTS.index(self._transport), int(self._verify)
        try:
            intent.mode = 0 if not self._sides else 1 + MODES.index(mode)
            self._check_roles(source, into, mode)
            if source is not None:
                own = self._bind("source", source, self.plan.source)
            if into is not None:
                fill = self._bind("destination", into, self._sides[0])
            found = own.devices | fill.devices
            self._devices.synchronize(found)  # the weights are written, and the engine's old ones read, before anyone goes on
            intent.version = agreement.number((self.version or 0) + 1 if version is None else version)
            intent.source_place = place(own.devices, self._transport, self._devices)
            taking = fill.devices or ({self._wire.device} if intent.mode else set())
            intent.into_place = place(taking, self._transport, self._devices)
            intent.fresh, intent.lies = self._fresh, self._lies(found)
        except Exception as error:  # noqa: BLE001  whatever a framework passed, all ranks must hear of it
            failure = error
        table = self._wire.gather(agreement.row(agreement.words(failure) if failure else "", intent), "agreeing on a step")
        self._refuse(failure, table, first=True)
        mode = MODES[(set(Intent.column(table, "mode")) - {0}).pop() - 1]
        if any(Intent.column(table, "fresh")) or mode != self._mode:
            self._prepare(table, mode, own.bound, fill.bound, found)
        return own.bound, fill.bound, mode, intent.version

    def _check_roles(self, source, into, mode: str) -> None:
        me = self._wire.rank
        if self._is_source != (source is not None):
            is_, has = ("is", "has to pass") if self._is_source else ("is not", "passes")
            raise PlanError([f"rank {me} {is_} among the source's ranks: it {has} the weights it sends"])
        if (mode == "tensors" and bool(self._sides)) != (into is not None):
            is_, has = ("is", "has to pass") if self._sides else ("is not", "passes")
            raise PlanError([f"rank {me} {is_} among the destination's ranks: it {has} tensors to fill"])
        if mode == "buckets" and (not self._sides or self._sides[0].format != "hf" or len(self._sides[0].members) != 1):
            text = f"buckets() yields whole tensors under HF names; rank {me} takes no such"
            raise PlanError([text], 'make the plan for Side.placed(layout, "hf", ranks=…)')

    def _prepare(self, table: torch.Tensor, mode: str, source: Tensors, into: Tensors, found: set[torch.device]) -> None:
        """Lay out messages, map memory, make buffers: what lasts until some rank's tensors move. All ranks come here together."""
        fresh, lies = Intent.column(table, "fresh"), Intent.column(table, "lies")
        before = self._wire.device, self._staged, self._sharing.peers, mode
        self._wire.choose({2} >= set(lies) - {0}, next(iter(found)) if len(found) == 1 else None)
        staged = frozenset(r for r, own in enumerate(lies) if own not in (0, 1 if self._wire.gloo else 2))
        if staged != self._staged:
            self._parts, self._staged = {}, staged
        own_fresh, self._fresh = self._fresh, _ALL  # until all have come through
        failure: Exception | None = None
        parts: list[RankPlan] = []
        try:
            if mode not in self._parts:
                me = self._wire.rank
                self._parts[mode] = [rank_plan(self.plan, me, staged=staged)] if mode == "tensors" else windows(self.plan, me, staged)
            parts = self._parts[mode]
        except Exception as error:  # noqa: BLE001  told at the next agreement
            failure = error
        places = Intent.column(table, "source_place"), Intent.column(table, "into_place")
        if any(new & (_SOURCE | _ALL) for new in fresh) or places != self._places or mode != self._mode:
            refused = self._sharing.renew({pair for part in parts for pair in part.pairs}, *places, source, failure)
            if refused:
                raise SyncError("the sync was refused before its first byte: " + "; ".join(refused)) from failure
            if self._sharing.memory:
                self._ready = None
            for known in self._bound.values() if self._sharing.peers.to else ():
                known.keys = identity(known.given)  # storages may have moved to shared memory
        if own_fresh or before != (self._wire.device, self._staged, self._sharing.peers, self._mode):
            self._ready = None
        self._mode, self._places = mode, places
        try:
            if failure is None and mode == "tensors" and self._ready is None:
                self._ready = self._make(parts[0], source, into)
        except Exception as error:  # noqa: BLE001  no memory for a buffer, say
            failure = error
        told = self._wire.gather(agreement.row(agreement.words(failure) if failure else ""), "making buffers")
        self._refuse(failure, told)
        self._fresh = 0

    def _refuse(self, failure: Exception | None, table: torch.Tensor, first: bool = False) -> None:
        try:
            if first:
                agreement.check(table)
            elif refused := agreement.failures(table):
                raise SyncError("the sync was refused before its first byte: " + "; ".join(refused))
        except SyncError as error:
            self._fresh |= _ALL
            raise error from failure

    def _end(self, failure: BaseException | None, version: int) -> None:
        """Every rank says whether all went well; raise what any rank failed at, at the failing one from its own error."""
        try:
            self._devices.synchronize({self._wire.device}.union(*(own.devices for own in self._bound.values())))
        except Exception as error:  # noqa: BLE001  what a kernel did wrong shows here
            failure = failure or error
        try:
            table = self._wire.gather(agreement.row(_ended(failure) if failure else ""), "finishing a step")
        except PeerLost:
            if isinstance(failure, GeneratorExit):
                raise failure from None
            raise
        if found := agreement.failures(table):
            error = self._failed(version, found, failure)
            if failure is not None and not isinstance(failure, Exception):
                raise failure
            raise error from failure
        self.version = version
        if self._sides:
            self.state = "clean"

    def _failed(self, version: int, found: list[str], own: BaseException | None) -> SyncError:
        self._fresh = _ALL
        hold = "; the engines' weights are mixed: sync again before they are used"
        return SyncError(f"sync of version {version} failed: " + "; ".join(found) + hold)

    # -------------------------------------------------------------------------------------------------- tensors, peers

    def _bind(self, role: str, tensors, side) -> Binding:
        """As ``bind``; tensors that are what they were are not looked at twice."""
        given = named(tensors)
        known = self._bound.pop(role, None)
        if known is None or not unchanged(given, known.keys):
            bound = bind(given, side, self._wire.rank, role)
            known = Binding(given, identity(given), bound, frozenset(b.tensor.device for b in bound.values()))
            self._fresh |= _SOURCE if role == "source" else _INTO
        self._bound[role] = known
        return known

    def _lies(self, found: set[torch.device]) -> int:
        if not found:
            return 0
        fast = [self._devices.accelerated(device) for device in found]
        return 1 if not any(fast) else 2 if len(found) == 1 else 3

    def _make(self, part: RankPlan, source: Tensors, into: Tensors) -> Ready:
        first = part is self._parts[self._mode][0]
        return make(part, source, into, self._wire, self._sharing, self._devices, self.plan if self._verify else None, first)

    def _next_bucket(
        self, part: RankPlan, source: Tensors, into: Tensors
    ) -> tuple[Bucket | None, Tensors, Ready]:
        """Room for the destination tensors of one part; all ranks have theirs before its bytes move."""
        failure, bucket, ready = None, None, None
        try:
            if self._sides:
                bucket, into = room(part, self._wire.device)
            ready = self._make(part, source, into)
        except Exception as error:  # noqa: BLE001  all ranks must hear of it
            failure = error
        table = self._wire.gather(agreement.row(agreement.words(failure) if failure else ""), "agreeing on a bucket")
        if found := agreement.failures(table):
            raise _Told(found, failure)
        return bucket, into, ready

    # ---------------------------------------------------------------------------------------------------- moving, checking

    def _move(self, ready: Ready) -> None:
        """Move one part's bytes and compare them. An error is raised when this rank has sent all that others wait for."""
        failed: Exception | None = None
        try:
            self._run(ready.staging, ready.mapped, ready.own)
        except PeerLost:
            raise
        except Exception as error:  # noqa: BLE001
            failed = error
        if ready.sums:
            compare(ready.sums, self._wire, self._devices, ready, failed is not None)
        if failed is not None:
            raise failed

    def _run(self, staging: Staging, mapped: Copies, own: Copies) -> None:
        failed: list[Exception] = []
        attempt(failed, mapped, own)
        try:
            self._wire.run(staging)
        except PeerLost:
            raise
        except Exception as error:  # noqa: BLE001
            failed.append(error)
        if failed:
            raise failed[0]
        if self._sides:
            for bound in self._bound["destination"].bound.values() if "destination" in self._bound else ():
                if bound.padded:
                    bound.zero_padding()


class _Told(Exception):
    """All ranks know already what failed, and raise it."""

    def __init__(self, failures: list[str], own: Exception | None):
        super().__init__()
        self.failures, self.own = failures, own


def _ended(error: BaseException) -> str:
    return "it stopped before the last bucket" if isinstance(error, GeneratorExit) else agreement.words(error)
