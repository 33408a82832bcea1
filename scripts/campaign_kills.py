"""Kill conversions, make their system calls fail, and look at what is left. Exit code 1 if anything is lost, mixed or in the way.

    python scripts/campaign_kills.py [--runs 450] [--seed 0] [--calls 1.0] [--folder DIR]

1. SIGKILLs at random moments, and after random shares of the work, over eleven pairs of formats and meshes, a third of them with --overwrite: the destination is absent, or
   the old or the new one, whole; the source is untouched; the same command then gives the same bytes, and leaves nothing else.
2. Every call of the write path once: death before it and after it, torn journal lines, and (3.) calls that fail with ENOSPC
   or EIO, or do less than they were asked to. `--calls` is the share of these points that is tried.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

from campaigns import PAIRS, Child, Pair, fresh, same, sources, stamps, state_of

import reshard
from reshard.conversion import destination
from reshard.demo import make_model
from reshard.text import table

CALLS = ("preadv", "open", "mkdir", "ftruncate", "pwrite", "write", "fsync", "rename", "replace", "unlink", "rmdir", "exchange")
FAULTS = {
    "preadv": (5,),
    "open": (28, 24),
    "mkdir": (28,),
    "ftruncate": (28, 5),
    "pwrite": (28, 5),
    "write": (28, 5),
    "fsync": (28, 5),
    "rename": (28, 5),
    "exchange": (5,),
}


class Lab:
    """Sources, what each pair must give, and a folder where runs are made."""

    def __init__(self, root: Path, seed: int):
        self.root, self.random = root, random.Random(seed)
        self.sources = sources(root / "sources")
        self.violations: list[str] = []
        self.expected: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}

    def expect(self, pair: Pair) -> Path:
        """What an undisturbed run of `pair` gives; timed."""
        if pair.name not in self.expected:
            folder = self.root / "expected" / str(len(self.expected))
            reshard.convert(self.sources[pair.source], folder, fsync=False, **pair.options)
            began = time.monotonic()
            Child(lambda: reshard.convert(self.sources[pair.source], self.root / "timed", **pair.options) and None).wait()
            self.seconds[pair.name] = time.monotonic() - began
            shutil.rmtree(self.root / "timed", ignore_errors=True)
            self.expected[pair.name] = folder
        return self.expected[pair.name]

    def run(self, pair: Pair, out: Path, dies_at: float | None = None, **more):
        """The work of one process, which kills itself when that share of the source was read, if given."""
        total = sum(path.stat().st_size for path in self.sources[pair.source].rglob("*") if path.is_file())
        seen = []

        def progress(size: int) -> None:
            seen.append(size)
            if sum(seen) >= dies_at * total:
                os.kill(os.getpid(), signal.SIGKILL)

        def work() -> dict:
            if dies_at is not None:
                more["progress"] = progress
            report = reshard.convert(self.sources[pair.source], out, **{**pair.options, **more})
            return {"resumed": report.resumed_bytes, "read": report.bytes_read}

        return work

    def again(self, pair: Pair, out: Path, what: str, **more) -> dict:
        """The same command, undisturbed: it must give the same bytes and leave nothing else. Returns what it said."""
        answer = Child(self.run(pair, out, **more)).wait()
        if "result" not in answer:
            self.wrong(f"{what}: the same command again: {answer}")
        elif not same(out, self.expect(pair), ()):
            self.wrong(f"{what}: the same command again gave other bytes")
        left = sorted(path.name for path in out.parent.iterdir() if path != out)
        if left:
            self.wrong(f"{what}: left behind: {left}")
        return answer.get("result", {"resumed": 0, "read": 1})

    def wrong(self, text: str) -> None:
        self.violations.append(text)
        print(f"VIOLATION {text}", flush=True)

    def put_old(self, out: Path) -> Path:
        shutil.copytree(self.sources["other"], out)
        return self.sources["other"]


def random_kills(lab: Lab, runs: int) -> None:
    """Part 1."""
    rows: dict[str, Counter] = defaultdict(Counter)
    shares: dict[str, list[float]] = defaultdict(list)
    for number in range(runs):
        pair = PAIRS[number % len(PAIRS)]
        new = lab.expect(pair)
        room = fresh(lab.root / "room")
        out = room / "dst"
        more = {
            "fsync": lab.random.random() < 0.7,
            "jobs": lab.random.choice((1, 2, 3)),
            "buffer": lab.random.choice((1 << 20, 128_000_000)),
        }
        old = None
        if lab.random.random() < 1 / 3:
            old, more["overwrite"] = lab.put_old(out), True
        before = stamps(lab.sources[pair.source])
        what = f"kill {number}, {pair.name}, {more}"
        row = rows[pair.name]
        row["runs"] += 1
        for _ in range(1 + (lab.random.random() < 0.2)):  # some are killed again on their way on
            if lab.random.random() < 0.5:  # at a random moment, or after a random share of the work
                child = Child(lab.run(pair, out, **more))
                child.kill_after(lab.random.uniform(0.005, 1.15 * lab.seconds[pair.name]))
            else:
                child = Child(lab.run(pair, out, lab.random.random(), **more))
            answer = child.wait()
            row["killed"] += "killed" in answer
            if "error" in answer and not ("not empty" in answer["error"] and state_of(out, old, new) == "new"):  # it had ended before
                lab.wrong(f"{what}: {answer}")
            state = state_of(out, old, new)
            row[state] += 1
            if state == "OTHER":
                lab.wrong(f"{what}: the destination is neither old nor new: {sorted(p.name for p in out.iterdir())}")
            if "killed" not in answer:
                break
        if "killed" in answer:
            said = lab.again(pair, out, what, **more)
            row["resumed"] += said["resumed"] > 0
            shares[pair.name].append(said["resumed"] / (said["resumed"] + said["read"]) if said["resumed"] else 0.0)
        if stamps(lab.sources[pair.source]) != before:
            lab.wrong(f"{what}: the source was touched")
    keys = ("runs", "killed", "absent", "old", "new", "OTHER", "resumed")
    lines = [(name, *(row[key] for key in keys), f"{sum(shares[name]) / max(1, len(shares[name])):.0%}") for name, row in rows.items()]
    total = (
        "all",
        *(sum(row[key] for row in rows.values()) for key in keys),
        f"{sum(map(sum, shares.values())) / max(1, sum(map(len, shares.values()))):.0%}",
    )
    print(table([*lines, total], ("pair", *keys, "share kept")), flush=True)


class Disturbed:
    """Calls of the write path, counted; at call `at` of `name`, `act(real, args)` takes its place."""

    def __init__(self, name: str = "", at: int = -1, act=None):
        self.counts: Counter = Counter()
        self._lock = threading.Lock()
        self._name, self._at, self._act = name, at, act

    def put_in_place(self) -> None:
        """In a child alone: the functions stay replaced."""
        for name in CALLS:
            owner = destination if name == "exchange" else os
            setattr(owner, name, self._wrapped(name, getattr(owner, name)))

    def _wrapped(self, name: str, real):
        def call(*args, **more):
            with self._lock:
                number = self.counts[name]
                self.counts[name] += 1
            if name == self._name and number == self._at:
                return self._act(lambda *given: real(*(given or args), **more), args)
            return real(*args, **more)

        return call


def die(after: bool):
    def act(real, args):
        if after:
            real()
        os.kill(os.getpid(), signal.SIGKILL)

    return act


def tear(real, args):
    """Half a line of the journal (or half of a block), then death."""
    handle, data, *rest = args
    real(handle, data[: len(data) // 2], *rest)
    os.kill(os.getpid(), signal.SIGKILL)


def fail(code: int):
    def act(real, args):
        raise OSError(code, os.strerror(code))

    return act


def short(real, args):
    handle, data, *rest = args
    return real(handle, data[: max(1, len(data) // 3)], *rest)


def every_call(lab: Lab, share: float) -> None:
    """Parts 2 and 3, on a small model."""
    make_model(lab.root / "sources" / "small")
    lab.sources["small"] = lab.root / "sources" / "small"
    rows: dict[str, Counter] = defaultdict(Counter)
    cases = [(Pair("small hf → vllm tp3", "small", {"format": "vllm", "tp": 3}), False, True), (Pair("small hf → megatron tp3", "small", {"format": "megatron", "tp": 3}), True, True),
             (Pair("small hf → tp tp2", "small", {"format": "tp", "tp": 2, "max_file": 400_000}), True, False)]  # fmt: skip
    for pair, overwrite, swap in cases:
        new = lab.expect(pair)
        more = {"overwrite": overwrite, "jobs": 1}

        def attempt(disturbed: Disturbed, out: Path, pair=pair, more=more, swap=swap):
            def work():
                if not swap:  # a system that can't exchange two folders
                    destination.exchange = lambda a, b: False
                disturbed.put_in_place()
                lab.run(pair, out, **more)()
                return dict(disturbed.counts)

            return Child(work)

        out = fresh(lab.root / "room") / "dst"
        if overwrite:
            lab.put_old(out)
        counts = attempt(Disturbed(), out).wait()["result"]
        points = [(name, at, "death", die(after)) for name, count in counts.items() for at in range(count) for after in (False, True)]
        points += [(name, at, "torn", tear) for name in ("write", "pwrite") for at in range(counts.get(name, 0))]
        points += [(name, at, "fault", fail(code)) for name, codes in FAULTS.items() for code in codes for at in range(counts.get(name, 0))]
        points += [(name, at, "short", short) for name in ("write", "pwrite") for at in range(counts.get(name, 0))]
        for name, at, kind, act in points:
            if lab.random.random() >= share:
                continue
            out = fresh(lab.root / "room") / "dst"
            old = lab.put_old(out) if overwrite else None
            what = f"{kind} at {name} {at}, {pair.name}, exchange {swap}"
            answer = attempt(Disturbed(name, at, act), out).wait()
            state = state_of(out, old, new)
            row = rows[kind]
            row["points"] += 1
            row[state] += 1
            row["ended well" if "result" in answer else "error" if "error" in answer else "died"] += 1
            healed = overwrite and not swap and state == "absent" and (out.parent / ".dst.reshard-old").exists()
            row["absent, restored"] += healed
            if state == "OTHER" or (overwrite and state == "absent" and not healed):
                lab.wrong(f"{what}: the destination is {state}")
            if kind == "short" and "result" not in answer:
                lab.wrong(f"{what}: {answer}")
            if "TRACEBACK" in answer.get("kind", ""):
                lab.wrong(f"{what}: {answer['kind']}: {answer['error']}")
            if "result" in answer or ("error" in answer and state == "new" and not overwrite):
                if state != "new":
                    lab.wrong(f"{what}: it ended well, and the destination is {state}")
                continue
            if (
                kind == "death"
                and state == "new"
                and not overwrite
                and not (out / "journal.jsonl").exists()
                and len(list(out.parent.iterdir())) == 1
            ):
                continue  # it died after its very last call: nothing is left to do, and the folder is a checkpoint like any other
            lab.again(pair, out, what, **more)
    keys = ("points", "died", "error", "ended well", "absent", "absent, restored", "old", "new", "OTHER")
    print(table([(kind, *(row[key] for key in keys)) for kind, row in rows.items()], ("kind", *keys)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=450, help="random kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=float, default=1.0, help="share of the calls of the write path that are disturbed")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reshard-kills-", dir=args.folder) as name:
        began = time.monotonic()
        lab = Lab(Path(name), args.seed)
        random_kills(lab, args.runs)
        if args.calls:
            every_call(lab, args.calls)
        print(f"{len(lab.violations)} violations, seed {args.seed}, {time.monotonic() - began:.0f} s")
    sys.exit(1 if lab.violations else 0)


if __name__ == "__main__":
    main()
