"""The house is as its plan says: whoever follows the source from `api.convert` to the disk goes down the stairs and never up."""

import configparser
import os
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import reshard
import reshard.conversion.transaction
import reshard.executor.rearrange
from reshard import api
from reshard.checkpoint import Checkpoint, find_config
from reshard.conversion.job import Job
from reshard.demo import make_model
from reshard.executor import sources
from reshard.executor.sources import Source
from reshard.formats import manifest

ROOT = Path(reshard.__file__).parent
MOST = 2
DOOR = "reshard.stores.files"  # to the disk: each file of the source is opened there, by whoever knows its kind, and nobody goes further


def levels() -> dict[str, int]:
    """The floor of each room, counted from the top, as `.importlinter` draws them."""
    plan = configparser.ConfigParser()
    plan.read(ROOT.parent / ".importlinter")
    lines = plan["importlinter:contract:house"]["layers"].split("\n")
    return {room.strip(): number for number, line in enumerate(filter(None, lines)) for room in line.split("|")}


@dataclass
class Walk:
    """Calls from one module of reshard to another that hand on what is followed: a path in the source's folder, its Checkpoint, the Job or the Source.

    A call of a method or property of those values themselves (`job.source.files`) is a look at them, and no step: they are handed on, and
    all rooms may read them. Nor are callbacks, which hand on no source (`write`, `progress`).
    """

    source: Path
    steps: list[tuple[str, str, str, str]] = field(default_factory=list)  # module and function that calls, module and function called
    reads: list[tuple[str, ...]] = field(default_factory=list)  # the modules on the stack, from the outermost, when source bytes are read
    floors: dict[str, int] = field(default_factory=levels)

    def __enter__(self) -> "Walk":
        self._main = threading.get_ident()
        threading.setprofile(self._look)
        sys.setprofile(self._look)
        return self

    def __exit__(self, *error) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def floor(self, module: str) -> int:
        while module not in self.floors:
            module = module.rpartition(".")[0]
        return self.floors[module]

    def up(self) -> list[tuple[str, str, str, str]]:
        return [step for step in self.steps if self.floor(step[2]) < self.floor(step[0])]

    def entrances(self) -> dict[str, set[tuple[str, str, str]]]:
        """Per module, the ways in which it is entered: who calls which function of it."""
        found = defaultdict(set)
        for caller, calls, module, called in self.steps:
            if module != DOOR:
                found[module].add((caller, calls, called))
        return found

    def _look(self, frame, event: str, what) -> None:
        if (
            event == "c_call"
            and _module(frame)
            and (what is os.preadv or (what is os.open and any(map(self._inside, frame.f_locals.values()))))
        ):
            self.reads.append(self._stack(frame))
        elif event == "call" and (module := _module(frame)) and not frame.f_code.co_name.startswith("<") and self._carries(frame):
            above = next((f for f in _outwards(frame.f_back) if _module(f)), None)
            if above is not None and _module(above) != module:
                self.steps.append((_module(above), above.f_code.co_qualname, module, frame.f_code.co_qualname))

    def _carries(self, frame) -> bool:
        code = frame.f_code
        names = [name for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if name != "self"]
        values = [frame.f_locals.get(name) for name in names]
        return any(isinstance(value, Checkpoint | Job | Source) or self._inside(value) for value in values)

    def _inside(self, value: object) -> bool:
        return isinstance(value, Path) and value.is_relative_to(self.source)

    def _stack(self, frame) -> tuple[str, ...]:
        frames = list(_outwards(frame))
        if threading.get_ident() != self._main:  # a worker's calls stand below those of the thread that waits for it
            frames += list(_outwards(sys._current_frames()[self._main]))
        names = [name for f in reversed(frames) if (name := _module(f))]
        return tuple(name for i, name in enumerate(names) if i == 0 or name != names[i - 1])


def _outwards(frame):
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame) -> str | None:
    path = Path(frame.f_code.co_filename)
    return (
        None if ROOT not in path.parents else ".".join(("reshard", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    )


FORMATS = [{"format": "hf"}, {"format": "vllm", "tp": 3}, {"format": "megatron", "tp": 3}, {"format": "tp", "tp": 2}]


@pytest.fixture
def walk(tmp_path):
    def made(options: dict, to: dict) -> Walk:
        make_model(tmp_path / "hf")
        reshard.convert(tmp_path / "hf", tmp_path / "src", fsync=False, **options)
        with Walk(tmp_path / "src") as found:
            api.convert(tmp_path / "src", tmp_path / "out", fsync=False, jobs=1, **to)
        return found

    return made


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: options["format"])
def test_the_source_goes_down_the_stairs(walk, options):
    """Of each call that hands the source on from one module to another: it goes to the same floor of `.importlinter` or to a lower one, and no
    module is entered in more than two ways (a way: who calls which function; the door to the disk aside). Whenever source bytes are read, the modules on the stack stand floor under floor."""
    found = walk(options, {"format": "vllm", "tp": 3} if options["format"] != "vllm" else {"format": "hf"})
    print("\n".join(f"{caller}.{calls} → {module}.{called}" for caller, calls, module, called in dict.fromkeys(found.steps)))
    assert found.up() == []
    assert {module: ways for module, ways in found.entrances().items() if len(ways) > MOST} == {}
    headers, bytes_ = (
        [s for s in found.reads if "reshard.executor.sources" not in s],
        [s for s in found.reads if "reshard.executor.sources" in s],
    )
    assert headers and bytes_
    for stack in found.reads:
        floors = [found.floor(module) for module in stack]
        assert floors == sorted(floors), stack


def test_a_way_back_up_and_a_winding_one_are_found(walk, monkeypatch):
    """Controls: a file's reader that asks for the config.json, as every source file is opened, and three more ways to the manifest."""
    text = "def {0}(read, path):\n    return read(path)\n"
    ways: dict[str, object] = {}
    for name in ("one", "two", "three"):
        exec(compile(text.format(name), ROOT / "executor/handles.py", "exec"), ways)
    real = sources.Source._place

    def place(self, file: str) -> Path:
        find_config(self.folder, None)
        for name in ("one", "two", "three"):
            ways[name](manifest.read_manifest, self.folder)
        return real(self, file)

    monkeypatch.setattr(sources.Source, "_place", place)
    found = walk({"format": "hf"}, {"format": "vllm", "tp": 3})
    assert {called for *_, called in found.up()} == {"find_config"}
    assert len(found.entrances()["reshard.formats.manifest"]) > MOST
