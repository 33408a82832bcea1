"""Tens of thousands of broken and hostile inputs through every reader: each must be refused by name, or read rightly.

    python scripts/campaign_fuzz.py --inputs 75000 --seed 1 --jobs 2

Worker processes, each with 1 GB of memory beyond what Python and torch take and 10 s for an input, make mutants (``tests/bad``),
read them with reshard, and compare what it reads with the safetensors library, torch, or the unharmed original. Prints a
table of outcomes by reader. Exit code 1 if any input gave a wrong read, another error than ReshardError, an error that
does not name the file, or no answer in time or memory. ``--only READER --first N --inputs 1`` repeats one.
"""

import argparse
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from bad.inputs import READERS, outcome

SECONDS, MEMORY = 10, 1 << 30
#: of a hundred inputs, how many are each reader's
SHARES = {"safetensors": 16, "index": 10, "zip": 16, "pickle": 20, "args": 6, "config": 10, "manifest": 10, "descriptor": 10, "journal": 2}
GOOD = ("refused", "right")


class TooSlow(BaseException):
    """No Exception, so that no reader catches it."""


def _late(*_: object) -> None:
    raise TooSlow


def _memory() -> int:
    """Bytes of address space that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def one(name: str, seed: int, number: int, folder: Path) -> tuple[str, str]:
    """Outcome of input `number` of a reader, and why."""
    reader = READERS[name]
    reader.make(random.Random(f"{seed}-{name}-{number}"), folder)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return outcome(reader, folder)
    except TooSlow:
        return "stalled", f"no answer in {SECONDS} s"
    except MemoryError:
        return "memory", f"more than {MEMORY} bytes"
    except Exception as error:  # noqa: BLE001 - what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def work(tasks: list[tuple[str, int]], seed: int, scratch: str, results, at) -> None:
    """One worker: goes through `tasks` from `at`[0] on, and says in `at` where it is and since when."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    resource.setrlimit(resource.RLIMIT_AS, (_memory() + MEMORY, resource.RLIM_INFINITY))
    folders: dict[str, Path] = {}
    while int(at[0]) < len(tasks):
        name, number = tasks[int(at[0])]
        if name not in folders:
            folders[name] = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=scratch))
            READERS[name].prepare(folders[name])
        at[1] = time.time()
        kind, why = one(name, seed, number, folders[name])
        results.put((name, number, kind, why if kind not in GOOD else ""))
        at[1] = 0
        at[0] += 1


def campaign(inputs: int, seed: int, jobs: int = 1, only: str | None = None, first: int = 0) -> tuple[dict[str, Counter], list[tuple]]:
    """Counts of outcomes by reader, and every violation as (reader, number, kind, why)."""
    shares = {only: 1} if only else {name: share for name, share in SHARES.items() if name in READERS}
    tasks = [(name, first + i) for name, share in shares.items() for i in range(max(1, inputs * share // sum(shares.values())))]
    random.Random(seed).shuffle(tasks)
    context = multiprocessing.get_context("fork")
    results, counts, violations = context.Queue(), {name: Counter() for name in shares}, []
    scratch = tempfile.mkdtemp(prefix="campaign-fuzz-")
    workers = []
    for job in range(jobs):
        own, at = tasks[job::jobs], context.Array("d", [0, 0])
        workers.append([own, at, context.Process(target=work, args=(own, seed, scratch, results, at), daemon=True)])
        workers[-1][2].start()

    def drain() -> None:
        while not results.empty():
            name, number, kind, why = results.get()
            counts[name][kind] += 1
            if kind not in GOOD:
                violations.append((name, number, kind, why))

    try:
        while any(int(at[0]) < len(own) for own, at, _ in workers):
            time.sleep(0.1)
            drain()
            for worker in workers:
                own, at, process = worker
                stalled = at[1] and time.time() - at[1] > 3 * SECONDS  # in C, where no signal reaches it
                if int(at[0]) < len(own) and (stalled or not process.is_alive()):
                    name, number = own[int(at[0])]
                    process.kill()
                    process.join()
                    counts[name]["stalled" if stalled else "died"] += 1
                    violations.append((name, number, "stalled" if stalled else "died", f"exit code {process.exitcode}"))
                    at[0] += 1
                    at[1] = 0
                    worker[2] = context.Process(target=work, args=(own, seed, scratch, results, at), daemon=True)
                    worker[2].start()
        while sum(sum(c.values()) for c in counts.values()) < len(tasks) and any(process.is_alive() for *_, process in workers):
            drain()
        drain()
    finally:
        for *_, process in workers:
            process.join(5)
            process.kill()
        shutil.rmtree(scratch, ignore_errors=True)
    return counts, violations


def table(counts: dict[str, Counter]) -> str:
    kinds = [*GOOD, *sorted({kind for c in counts.values() for kind in c} - set(GOOD))]
    lines = [f"{'reader':12}" + "".join(f"{kind:>11}" for kind in kinds) + f"{'inputs':>11}"]
    for name, c in {**counts, "all": sum(counts.values(), Counter())}.items():
        lines.append(f"{name:12}" + "".join(f"{c[kind]:>11}" for kind in kinds) + f"{sum(c.values()):>11}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=75_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=sorted(READERS), help="this reader alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    options = parser.parse_args()
    began = time.time()
    counts, violations = campaign(options.inputs, options.seed, options.jobs, options.only, options.first)
    print(table(counts))
    for name, number, kind, why in violations[:50]:
        print(f"{kind}: --only {name} --first {number} --seed {options.seed}: {why}")
    print(f"{sum(map(sum, (c.values() for c in counts.values())))} inputs in {time.time() - began:.0f} s, {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
