"""``Sync``: a plan, a process group, and the steps that run it. One object per process, for as long as the group lives.

A step is: every rank says what it is about to do (plan's fingerprint, version, whether its tensors fit), and all go on only
if all agree; the bytes move; every rank says whether all went well. What one rank finds wrong, all ranks raise: one that
fails goes on with its messages, so that no other waits for it, and says so at the end. From the first byte to the last word
an engine's weights are ``mixed``, and they stay so when a step fails.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from reshard.errors import PeerLost, PlanError, SyncError
from reshard.sync import agreement
from reshard.sync.agreement import MODES, Intent, Trial
from reshard.sync.binding import ALL, SOURCE, Bindings
from reshard.sync.device import Devices
from reshard.sync.mapping import place
from reshard.sync.messages import RankPlan, rank_plan, windows
from reshard.sync.moving import Bucket, Ready, make, room
from reshard.sync.plan import SyncPlan
from reshard.sync.sharing import Sharing
from reshard.sync.tensors import Tensors
from reshard.sync.transport import Wire


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
        self._bound = Bindings(me, self._devices)
        self._parts: dict[str, list[RankPlan]] = {}
        self._mode = ""  # of the last step
        self._ready: Ready | None = None  # made once, until a tensor moves
        self._staged: frozenset[int] = frozenset()
        self._sharing = Sharing(self._wire, self._transport, self._devices)
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
        self._bound, self._parts, self._ready = Bindings(self._wire.rank, self._devices), {}, None
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
        failure: BaseException | None = None
        try:
            for part in self._parts[mode]:
                bucket, ready = None, self._ready
                if mode == "buckets":
                    bucket, into, ready = self._next_bucket(part, source, into)
                ready.run(self._wire, self._devices)
                for bound in into.values() if mode == "tensors" else ():
                    if bound.padded:
                        bound.zero_padding()
                moved["mapped"] += ready.bytes_mapped
                moved["local"] += ready.bytes_local
                moved["checks"] += 8 * sum(sums.size for sums in ready.sums or ())
                moved["staging"] = max(moved["staging"], ready.staging.bytes)
                if bucket and bucket.tensors:
                    yield bucket
        except PeerLost:
            raise  # no use in telling: the group is broken, and each rank finds out by itself
        except _Told as told:
            raise self._failed(version, told.failures) from told.own
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
        bound, trial = self._bound, Trial()
        intent = Intent(int(self.plan.fingerprint[:15], 16), held=-1 if self.version is None else self.version)
        intent.transport, intent.verify = agreement.TRANSPORTS.index(self._transport), int(self._verify)
        intent.mode = 0 if not self._sides else 1 + MODES.index(mode)
        with trial:
            self._check_roles(source, into, mode)
            bound.bind(source, self.plan.source, into, self._sides[0] if self._sides else None)
            self._devices.synchronize(bound.devices)  # the weights are written, and the engine's old ones read, before anyone goes on
            intent.version = agreement.number((self.version or 0) + 1 if version is None else version)
            intent.source_place = place(bound.source.devices, self._transport, self._devices)
            taking = bound.into.devices or ({self._wire.device} if intent.mode else set())
            intent.into_place = place(taking, self._transport, self._devices)
            intent.fresh, intent.lies = bound.fresh, bound.lies
        table = trial.told(self._wire, "agreeing on a step", intent)
        try:
            agreement.check(table)
            mode = MODES[(set(Intent.column(table, "mode")) - {0}).pop() - 1]
            if any(Intent.column(table, "fresh")) or mode != self._mode:
                self._prepare(table, mode)
        except SyncError as error:
            bound.fresh |= ALL
            raise error from trial.error or error.__cause__
        return bound.source.tensors, bound.into.tensors, mode, intent.version

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

    def _prepare(self, table: torch.Tensor, mode: str) -> None:
        """Lay out messages, map memory, make buffers: what lasts until some rank's tensors move. All ranks come here together."""
        fresh, lies, bound = Intent.column(table, "fresh"), Intent.column(table, "lies"), self._bound
        before = self._wire.device, self._staged, self._sharing.peers, mode
        self._wire.choose({2} >= set(lies) - {0}, next(iter(bound.devices)) if len(bound.devices) == 1 else None)
        staged = frozenset(r for r, own in enumerate(lies) if own not in (0, 1 if self._wire.gloo else 2))
        if staged != self._staged:
            self._parts, self._staged = {}, staged
        own_fresh, bound.fresh = bound.fresh, ALL  # until all have come through
        trial = Trial()
        with trial:
            if mode not in self._parts:
                me = self._wire.rank
                self._parts[mode] = [rank_plan(self.plan, me, staged=staged)] if mode == "tensors" else windows(self.plan, me, staged)
        places = Intent.column(table, "source_place"), Intent.column(table, "into_place")
        if any(new & (SOURCE | ALL) for new in fresh) or places != self._places or mode != self._mode:
            pairs = {pair for part in self._parts.get(mode, ()) for pair in part.pairs}
            agreement.refuse(self._sharing.renew(pairs, *places, bound.source.tensors, trial), trial.error)
            if self._sharing.memory:
                self._ready = None
            if self._sharing.peers.to:
                bound.moved()  # storages went to shared memory
        if own_fresh or before != (self._wire.device, self._staged, self._sharing.peers, self._mode):
            self._ready = None
        self._mode, self._places = mode, places
        if mode == "tensors" and self._ready is None:
            trial.run(lambda: setattr(self, "_ready", self._make(self._parts[mode][0], bound.source.tensors, bound.into.tensors)))
        agreement.refuse(agreement.failures(trial.told(self._wire, "making buffers")), trial.error)
        bound.fresh = 0

    def _end(self, failure: BaseException | None, version: int) -> None:
        """Every rank says whether all went well; raise what any rank failed at, at the failing one from its own error."""
        trial = Trial(failure)
        with trial:  # what a kernel did wrong shows here
            self._devices.synchronize({self._wire.device} | self._bound.devices)
        try:
            table = trial.told(self._wire, "finishing a step")
        except PeerLost:
            if isinstance(failure, GeneratorExit):
                raise failure from None
            raise
        if found := agreement.failures(table):
            error = self._failed(version, found)
            if failure is not None and not isinstance(failure, Exception):
                raise failure
            raise error from trial.error
        self.version = version
        if self._sides:
            self.state = "clean"

    def _failed(self, version: int, found: list[str]) -> SyncError:
        self._bound.fresh = ALL
        hold = "; the engines' weights are mixed: sync again before they are used"
        return SyncError(f"sync of version {version} failed: " + "; ".join(found) + hold)

    def _make(self, part: RankPlan, source: Tensors, into: Tensors) -> Ready:
        first = part is self._parts[self._mode][0]
        return make(part, source, into, self._wire, self._sharing, self._devices, self.plan if self._verify else None, first)

    def _next_bucket(self, part: RankPlan, source: Tensors, into: Tensors) -> tuple[Bucket | None, Tensors, Ready]:
        """Room for the destination tensors of one part; all ranks have theirs before its bytes move."""
        bucket, ready, trial = None, None, Trial()
        with trial:
            if self._sides:
                bucket, into = room(part, self._wire.device)
            ready = self._make(part, source, into)
        if found := agreement.failures(trial.told(self._wire, "agreeing on a bucket")):
            raise _Told(found, trial.error)
        return bucket, into, ready


class _Told(Exception):
    """All ranks know already what failed, and raise it."""

    def __init__(self, failures: list[str], own: BaseException | None):
        super().__init__()
        self.failures, self.own = failures, own
