"""``Sync``: a plan, a process group, and the steps that run it. One object per process, for as long as the group lives.

A step is: every rank says what it is about to do (plan's fingerprint, version, whether its tensors fit), and all go on only
if all agree; the bytes move; every rank says whether all went well. What one rank finds wrong, all ranks raise: one that
fails goes on with its messages, so that no other waits for it, and says so at the end. From the first byte to the last word
an engine's weights are ``mixed``, and they stay so when a step fails.
"""

import time
from collections.abc import Iterator
from contextlib import closing

import torch
import torch.distributed as dist

from reshard.errors import PeerLost, PlanError, SyncError
from reshard.sync import agreement
from reshard.sync.agreement import MODES, Intent, Trial
from reshard.sync.binding import ALL, SOURCE, Bindings
from reshard.sync.device import Devices
from reshard.sync.mapping import place
from reshard.sync.messages import RankPlan, windows
from reshard.sync.moving import Ready, Stats, make
from reshard.sync.plan import SyncPlan
from reshard.sync.sharing import Sharing
from reshard.sync.staging import Buffers
from reshard.sync.tensors import Tensors, named
from reshard.sync.transport import Wire
from reshard.sync.windows import Bucket, Complete, Give, Rooms, Stream, Taking


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
        sides = [side for side in plan.destinations if me in side.processes]
        if len(sides) > 1:
            raise PlanError([f"rank {me} is in {len(sides)} destinations"], "sync them one after another")
        self._side = sides[0] if sides else None
        self._is_source = me in plan.source.processes
        self._bound = Bindings(me, self._devices)
        self._parts: dict[str, list[RankPlan]] = {}
        self._mode = ""  # of the last step
        self._ready: Ready | None = None  # made once, until a tensor moves
        self._buffers = Buffers(self._devices)
        self._staged: frozenset[int] = frozenset()
        self._sharing = Sharing(self._wire, self._transport, self._devices)
        self._places: tuple[list[int], list[int]] = [], []

    # ------------------------------------------------------------------------------------------------------ the steps

    def send(self, tensors, version: int | None = None, *, windows: bool = False) -> Stats:
        """Give this rank's weights: {name: tensor}, (name, tensor) pairs, or a module. Returns when they may be changed again.

        `windows`: take the pairs one after another, as a generator that gathers each tensor makes them, send them a window of
        `bucket_bytes` at a time, and let go of them. Embeddings, layer by layer, the rest is the order of windows: what comes before its turn waits.
        """
        source = Stream(tensors, self.plan.source, self._wire.rank) if windows and self._is_source else tensors
        return self.exchange(source, None, version)

    def recv(self, tensors, version: int | None = None, *, complete: Complete | None = None) -> Stats:
        """Take weights into the engine's own tensors, in place. Returns when they are whole.

        `tensors` may be a function that is given names and gives {name: tensor}: it is asked when their window comes, and they are
        let go when they are whole. `complete` is told the names of tensors that are whole, each once. An engine that packs its
        weights can so make, pack and free them layer by layer; no other rank goes on before it returns, for `timeout` at most.
        """
        give: Give | None = tensors if callable(tensors) and not isinstance(tensors, torch.nn.Module) else None
        if give is None and complete is not None:
            whole = named(tensors)
            give = lambda _: whole  # noqa: E731
        return self.exchange(None, tensors if give is None else Taking(self._side, self._wire.rank, {}, give, complete), version)

    def exchange(self, source=None, into=None, version: int | None = None) -> Stats:
        """Both at once, for a rank that is trainer and engine. Raises, on every rank, what any rank found wrong."""
        for _ in self._step(source, into, version):
            pass
        return self.stats

    def buckets(self, source=None, version: int | None = None) -> Iterator[Bucket]:
        """Take weights as buckets of (name, tensor), for engines that load by name: whole tensors under HF names, where the plan's
        destination is format ``hf``. A rank that is a trainer too passes its tensors. Ranks that only send call ``send``, and wait,
        for `timeout` at most, while the engine works on a bucket. To stop before the last one fails the step on all ranks."""
        rooms = Rooms(self._side, self._wire.rank, lambda: self._wire.device)
        with closing(self._step(source, Taking(self._side, self._wire.rank, {}, rooms.give, rooms.complete), version)) as step:
            for _ in step:
                yield from rooms.filled()

    def close(self, *, leave: bool = False) -> None:
        """Let go of buffers and of peers' memory; the engine's and trainer's tensors stay as they are. No step follows. `leave`: the
        process group too, which no other Sync may use then (``joined`` can make another at the same address)."""
        self._over = self._over or "this Sync was closed"
        self._bound, self._parts, self._ready = Bindings(self._wire.rank, self._devices), {}, None
        self._sharing, self._buffers = Sharing(self._wire, self._transport, self._devices), Buffers(self._devices)
        if leave and self._wire.group is not None:
            group, self._wire.group = self._wire.group, None
            dist.destroy_process_group(group)

    def abort(self, why: str = "it gave up") -> None:
        """Take part no more, and let peers know: those in a step raise PeerLost at once. The process group is of no further use
        (connections are closed, an NCCL communicator is aborted): ``destroy_process_group`` returns at once, make a new one."""
        if not self._over:
            self._over = f"this Sync was aborted: {why}"
            self._wire.abort(why)
        self.close()

    def _step(self, source, into, version) -> Iterator[None]:
        """One step, window by window."""
        if self._over:
            raise SyncError(self._over, "make a new process group and a new Sync")
        began = time.perf_counter()
        try:
            taking, version = self._begin(source, into, version)
            yield from self._moved(source if isinstance(source, Stream) else None, taking, version, began)
        except PeerLost as error:
            self._over = f"the process group is broken: {error}"
            self._wire.abort(str(error))  # those that have not noticed yet
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            self.abort(agreement.words(error))  # others may wait for messages that will not come
            raise

    def _moved(self, stream: Stream | None, taking: Taking, version: int, began: float) -> Iterator[None]:
        if self._side:
            self.state = "mixed"
        moved = {"mapped": 0, "local": 0, "checks": 0, "staging": 0}
        sent, taken = self._wire.bytes_sent, self._wire.bytes_taken
        failure: BaseException | None = None
        try:
            for part in self._parts[self._mode]:
                ready = self._ready if self._mode == "tensors" else self._next(part, stream, taking)
                ready.run(self._wire, self._devices)
                moved["mapped"] += ready.bytes_mapped
                moved["local"] += ready.bytes_local
                moved["checks"] += 8 * sum(sums.size for sums in ready.sums or ())
                moved["staging"] = max(moved["staging"], ready.staging.bytes)
                del ready  # and the views in it, so that tensors which are whole can be freed
                taking.close(part)
                yield
        except PeerLost:
            raise  # no use in telling: the group is broken, and each rank finds out by itself
        except _Told as told:
            raise self._failed(version, told.failures) from told.own
        except (Exception, GeneratorExit) as error:  # noqa: BLE001  all ranks must hear of it
            failure = error
        self._end(failure, version)
        sent, taken = self._wire.bytes_sent - sent, self._wire.bytes_taken - taken
        seconds, held = time.perf_counter() - began, stream.held if stream else 0
        self.stats = Stats(version, sent, taken, **moved, held=held, seconds=seconds, note=self._sharing.note)

    # ------------------------------------------------------------------------------------------- agreement, before and after

    def _begin(self, source, into, version) -> tuple[Taking, int]:
        """Bind the tensors, and go on only if every rank can, for the same plan and version."""
        bound, trial, me = self._bound, Trial(), self._wire.rank
        streams, asks = isinstance(source, Stream), isinstance(into, Taking)
        intent = Intent(int(self.plan.fingerprint[:15], 16), held=-1 if self.version is None else self.version)
        intent.transport, intent.verify, intent.streams = agreement.TRANSPORTS.index(self._transport), int(self._verify), int(streams)
        intent.mode = 0 if not self._side else 1 + MODES.index("windows" if asks else "tensors")
        with trial:
            self._check_roles(source, into)
            bound.bind(None if streams else source, self.plan.source, None if asks else into, self._side)
            coming = source.begin() if streams else frozenset()
            self._devices.synchronize(bound.devices | coming)  # the weights are written, the engine's old ones read, before anyone goes on
            intent.version = agreement.number((self.version or 0) + 1 if version is None else version)
            intent.source_place = place(bound.source.devices, self._transport, self._devices)
            takes_at = bound.into.devices or ({self._wire.device} if intent.mode else set())
            intent.into_place = place(takes_at, self._transport, self._devices)
            intent.fresh, intent.lies = bound.fresh, bound.lies(coming)
        table = trial.told(self._wire, "agreeing on a step", intent)
        try:
            agreement.check(table)
            mode = agreement.layout_of(table)
            if any(Intent.column(table, "fresh")) or mode != self._mode:
                self._prepare(table, mode, bound.devices | coming)
        except SyncError as error:
            bound.fresh |= ALL
            raise error from trial.error or error.__cause__
        return into if asks else Taking(self._side, me, bound.into.tensors), intent.version

    def _check_roles(self, source, into) -> None:
        for of, given, gives, is_one in (
            ("source", source, "the weights it sends", self._is_source),
            ("destination", into, "tensors to fill", bool(self._side)),
        ):
            if is_one != (given is not None):
                is_, has = ("is", "has to pass") if is_one else ("is not", "passes")
                raise PlanError([f"rank {self._wire.rank} {is_} among the {of}'s ranks: it {has} {gives}"])

    def _prepare(self, table: torch.Tensor, mode: str, devices: frozenset[torch.device]) -> None:
        """Lay out messages, map memory, make buffers: what lasts until some rank's tensors move. All ranks come here together."""
        fresh, lies, bound = Intent.column(table, "fresh"), Intent.column(table, "lies"), self._bound
        before = self._wire.device, self._staged, self._sharing.peers, mode
        self._wire.choose({2} >= set(lies) - {0}, next(iter(devices)) if len(devices) == 1 else None)
        staged = frozenset(r for r, own in enumerate(lies) if own not in (0, 1 if self._wire.gloo else 2))
        if staged != self._staged:
            self._parts, self._staged = {}, staged
        own_fresh, bound.fresh = bound.fresh, ALL  # until all have come through
        trial = Trial()
        with trial:
            if mode not in self._parts:
                self._parts[mode] = windows(self.plan, self._wire.rank, staged, mode)
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
        if self._side:
            self.state = "clean"

    def _failed(self, version: int, found: list[str]) -> SyncError:
        self._bound.fresh = ALL
        hold = "; the engines' weights are mixed: sync again before they are used"
        return SyncError(f"sync of version {version} failed: " + "; ".join(found) + hold)

    def _make(self, part: RankPlan, source: Tensors, into: Tensors) -> Ready:
        first, verify = part is self._parts[self._mode][0], self.plan if self._verify else None
        self._buffers.release()
        return make(part, source, into, self._wire, self._sharing, self._devices, verify, first, self._buffers)

    def _next(self, part: RankPlan, stream: Stream | None, taking: Taking) -> Ready:
        """The tensors of one window; all ranks have theirs before its bytes move."""
        trial, ready = Trial(), None
        with trial:
            last = part is self._parts[self._mode][-1]
            source = stream.window(part, last=last) if stream else self._bound.source.tensors
            taking.open(part)
            self._devices.synchronize({b.tensor.device for b in (*source.values(), *taking.tensors.values())} if stream else ())
            ready = self._make(part, source, taking.tensors)
        if found := agreement.failures(trial.told(self._wire, "agreeing on a window")):
            raise _Told(found, trial.error)
        return ready


class _Told(Exception):
    """All ranks know already what failed, and raise it."""

    def __init__(self, failures: list[str], own: BaseException | None):
        super().__init__()
        self.failures, self.own = failures, own
