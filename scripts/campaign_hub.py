"""Kill reshard while it works with the Hub, again and again, and look at what is left: a destination must be absent, wholly old, or wholly new.

    python scripts/campaign_hub.py [--runs 120] [--seed 0] [--jobs 2] [--folder DIR]

Each run draws a case (pull, push, convert from hf://, convert to hf://; a destination that is absent or old; LFS or Xet; one
signal; sometimes two kills in a row), starts the command against a Hub on loopback, and kills it at a random moment of its
life. Then the source must be unchanged and the destination as it was or as it shall be; the same command, run again, must
succeed and leave the very bytes of a run that nobody killed, and nothing beside them. Prints one JSON line of counts.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from hubcases import environment, files_of, make_large
from hubserver import Hub

import reshard
from reshard.demo import make_model

RATE = 40_000_000  # bytes per second: a run lasts long enough to be killed on its way
CASES = ("pull", "push", "from", "to")


@dataclass(frozen=True)
class Case:
    """One run: what is killed, and when (a part of an undisturbed run's time)."""

    number: int
    kind: str
    old: bool  # whether the destination holds another checkpoint, to be replaced
    xet: bool
    sign: int
    moments: tuple[float, ...]


def draw(number: int, seed: int) -> Case:
    random_ = random.Random(f"{seed}-{number}")
    kind = CASES[number % len(CASES)]
    moments = tuple(random_.uniform(0.0, 1.0) for _ in range(random_.choice((1, 1, 1, 2))))
    return Case(
        number,
        kind,
        random_.random() < 0.5,
        random_.random() < 0.3,
        random_.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)),
        moments,
    )


class World:
    """Models, and what each case yields when nobody kills it; made once."""

    def __init__(self, folder: Path):
        self.model, self.other = folder / "model", folder / "other"
        make_large(self.model, layers=3)
        make_model(self.other)
        self.shards = folder / "shards"
        reshard.convert(self.model, self.shards, format="vllm", tp=2, fsync=False)
        reshard.convert(self.model, folder / "tp", format="tp", tp=2, fsync=False)
        self.bytes, self.vllm, self.tp = files_of(self.model), files_of(self.shards), files_of(folder / "tp")
        self.seconds: dict[str, float] = {}  # from the first request to the end, undisturbed


def run(case: Case, world: World, folder: Path) -> str:
    """One run; returns what was found after the (first) kill: absent, old, new, or done (it was faster). Raises AssertionError."""
    with Hub(folder / "hub", xet=case.xet) as hub:
        source = hub.add_folder("org/name", world.model)
        env = {**os.environ, **environment(hub, folder), "HF_HUB_DISABLE_XET": "" if case.xet else "1"}
        args = {"pull": ["pull", "hf://org/name", "dst"], "from": ["convert", "hf://org/name", "dst", "--to", "tp", "--tp", "2"],
                "push": ["push", str(world.shards), "hf://ada/dst"], "to": ["convert", str(world.model), "hf://ada/dst", "--to", "vllm", "--tp", "2"]}[case.kind]  # fmt: skip
        args = [sys.executable, "-m", "reshard", *args, *(["--overwrite"] if case.old else [])]
        local = case.kind in ("pull", "from")
        old = None
        if case.old and local:
            shutil.copytree(world.other, folder / "dst")
            old = files_of(folder / "dst")
        elif case.old:
            hub.add("ada/dst", {path.name: path for path in world.other.iterdir()}, private=True)
            old = hub.files("ada/dst")

        def now():
            if local:
                return files_of(folder / "dst") if (folder / "dst").exists() else None
            repo = hub.repos.get("ada/dst")
            held = hub.files("ada/dst") if repo and "main" in repo.refs else {}
            return None if set(held) <= {".gitattributes"} else held

        first = None
        for moment in case.moments:
            hub.rate = RATE
            process = subprocess.Popen(args, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            asked = len(hub.log)
            while process.poll() is None and len(hub.log) == asked:
                time.sleep(0.005)
            until = time.monotonic() + moment * world.seconds.get(case.kind, 2.0)
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.005)
            process.send_signal(case.sign)
            _, err = process.communicate()
            assert b"Traceback" not in err or process.returncode < 0, err.decode()
            hub.rate = 0
            hub.idle()
            held = now()
            assert files_of(world.model) == world.bytes and hub.repos["org/name"].refs["main"] == source, "the source changed"
            new = expected(case, world, hub, held) if held is not None and held != old else None
            assert held is None or held == old or new, f"the destination is neither old nor new: {sorted(held)}"
            outcome = "done" if process.returncode == 0 else "absent" if held is None else "old" if held == old else "new"
            first = first or outcome
        done = subprocess.run(args, cwd=folder, env=env, capture_output=True, text=True, check=False)
        if done.returncode and local and outcome in ("done", "new") and not case.old:  # it was finished: not empty, and rightly refused
            assert "not empty" in done.stderr, done.stderr
        else:
            assert done.returncode == 0, done.stderr
        held = now()
        assert held is not None and expected(case, world, hub, held), f"not the bytes of an undisturbed run: {held and sorted(held)}"
        left = [path.name for path in folder.iterdir() if path.name not in ("hub", "home", "dst")]
        assert not left, f"left behind: {left}"
        return first


def measure(world: World, folder: Path) -> None:
    """How long each kind of run lasts when nobody kills it."""
    for kind in CASES:
        at = folder / f"measure-{kind}"
        at.mkdir()
        began = time.monotonic()
        run(Case(0, kind, False, False, signal.SIGKILL, (1.0,)), world, at)
        world.seconds[kind] = max(0.5, (time.monotonic() - began) / 2)
        shutil.rmtree(at)


def expected(case: Case, world: World, hub: Hub, held: dict[str, bytes]) -> bool:
    """Whether `held` is what an undisturbed run leaves."""
    wanted = {"pull": world.bytes, "from": world.tp, "push": world.vllm, "to": world.vllm}[case.kind]
    extra = {"README.md", ".gitattributes", "reshard.json"} | ({"generation_config.json"} if case.old else set())
    names = {name for name in wanted if name != "reshard.json"}
    return all(held.get(name) == wanted[name] for name in names) and set(held) - names <= extra


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="campaign-hub-", dir=options.folder) as made:
        world = World(Path(made))
        if options.runs >= 20:
            measure(world, Path(made))
        counts, failed = Counter(), []

        def one(number: int) -> None:
            case, folder = draw(number, options.seed), Path(made) / f"run-{number}"
            folder.mkdir()
            try:
                counts[f"{case.kind} {run(case, world, folder)}"] += 1
            except AssertionError as error:
                failed.append(f"{case}: {error}")
                print(f"FAILED {case}: {error}", file=sys.stderr, flush=True)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(one, range(options.runs)))
    print(json.dumps({"runs": options.runs, "seed": options.seed, "failed": len(failed), **dict(sorted(counts.items()))}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
