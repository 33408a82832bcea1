"""DeepSpeed's folders: which files there are, of which ranks, and the model states in them, checked to be whole and of one step."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.formats.affine import Share, shares
from reshard.formats.hf import torch_tree
from reshard.stores.files import read_small
from reshard.text import some

MODEL = re.compile(r"(?:zero_pp_rank_([0-9]{1,5})_)?mp_rank_([0-9]{1,5})_model_states\.pt")
OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]{1,5})_mp_rank_([0-9]{1,5})_optim_states\.pt")
_EXPERT = re.compile(r"(?:layer_([0-9]{1,5})_)?expert_([0-9]{1,5})_mp_rank_([0-9]{1,5})_model_states\.pt")
_PIPELINE = re.compile(r"layer_[0-9]+-model_[0-9]+-model_states\.pt")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
UNIVERSAL = "zero"  # of a universal checkpoint: a folder for each parameter
COPY = "copy the folder again, whole"
MIXED = "files of several checkpoints were mixed"
CONVERT = "make a universal checkpoint of it with `python -m deepspeed.checkpoint.ds_to_universal`, and name that folder"


def recognise(folder: Path, names: set[str]) -> bool:
    if any(pattern.fullmatch(name) for name in names for pattern in (MODEL, OPTIMIZER, _EXPERT, _PIPELINE)):
        return True
    if UNIVERSAL in names and (folder / UNIVERSAL).is_dir():
        return any((path / "fp32.pt").exists() for path in (folder / UNIVERSAL).iterdir())
    root = _tagged(folder) if names & {"latest", "latest_universal"} else None
    tags = [] if root is None else [root] if root.is_dir() else [path for path in folder.iterdir() if path.is_dir()]
    return any(recognise(path, {inside.name for inside in path.iterdir()} - {"latest", "latest_universal"}) for path in tags)


def _tagged(folder: Path) -> Path | None:
    """The folder that a run's ``latest`` names, which may be missing; None where that is no name."""
    tracker = next((folder / name for name in ("latest", "latest_universal") if (folder / name).is_file()), None)
    tag = read_small(tracker, 300).decode(errors="replace").strip() if tracker else ""
    return folder / tag if _TAG.fullmatch(tag) else None


def root_of(folder: Path) -> tuple[Path, str]:
    """The folder that holds the files, and its path within `folder`, to be put before theirs."""
    names = {path.name for path in folder.iterdir()}
    if UNIVERSAL in names or any(MODEL.fullmatch(name) for name in names) or not names & {"latest", "latest_universal"}:
        return folder, ""
    root = _tagged(folder)
    if root is None:
        raise FormatError(f"{folder / 'latest'} names no folder beside it", "name the folder of one checkpoint")
    if not root.is_dir():
        there = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise FormatError(
            f"{folder} names {root.name} as its latest checkpoint, which is missing", f"here are: {some(there)}" if there else COPY
        )
    return root, f"{root.name}/"


@dataclass(frozen=True)
class ModelStates:
    """The model states of a folder, each file by the (data-parallel, tensor-parallel) rank that wrote it."""

    root: Path
    inside: str
    names: Mapping[tuple[int, int], str]
    trees: Mapping[tuple[int, int], dict[str, Any]]
    experts: Mapping[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)  # file → tensor-parallel rank, what it holds

    @property
    def first(self) -> dict[str, Any]:
        return self.trees[min(self.trees)]

    @property
    def tp(self) -> int:
        return max(m for _, m in self.trees) + 1

    @property
    def partitioned(self) -> bool:
        """Whether weights lie in partitions alone: ZeRO-3."""
        return any(name.startswith("zero_pp_rank_") for name in self.names.values())

    def share(self, name: str, shape: tuple[int, ...], m: int) -> Share:
        """What rank `m` has of tensor `name`, of which it holds `shape`."""
        if self.tp == 1:
            return Share(shape, shape)
        shared = self.first.get("shared_params") or {}
        names = [name, *(one for pair in shared.items() if name in pair for one in pair)]
        found = next((self._maps[each, m] for each in names if (each, m) in self._maps), None)
        path = self.root / self.names[min(at for at in self.names if at[1] == m)]
        if found is None:
            raise FormatError(f"{path}: nothing says which part of {quote(name)} rank {m} of {self.tp} holds", CONVERT)
        if found.shape != shape:
            raise FormatError(f"{path}: {quote(name)} has shape {list(shape)}, its affine map says {list(found.shape)}", MIXED)
        return found

    @property
    def _maps(self) -> Mapping[tuple[str, int], Share]:
        if "maps" not in self.__dict__:
            info = self.first.get("universal_checkpoint_info") or {}
            table = info.get("affine_map")
            object.__setattr__(self, "maps", shares(self.root / self.names[min(self.names)], table) if table else {})
        return self.__dict__["maps"]

    def writer(self, what: str) -> str:
        stage = "3" if self.partitioned else str((self.first.get("ds_config") or {}).get("zero_optimization", {}).get("stage", 0))
        return quote(
            f"DeepSpeed {self.first.get('ds_version', '')}, ZeRO-{stage}, data parallel {self.first.get('dp_world_size')}, tensor parallel {self.tp}: {what}"
        )


def model_states(folder: Path) -> ModelStates:
    root, inside = root_of(folder)
    listed = sorted(path.name for path in root.iterdir())
    if any(_PIPELINE.fullmatch(name) for name in listed):
        raise FormatError(f"{root} holds layers of DeepSpeed's pipeline engine, whose names are its modules' numbers", CONVERT)
    names = {(int(match[1] or 0), int(match[2])): name for name in listed if (match := MODEL.fullmatch(name))}
    if not names:
        raise FormatError(f"{root} holds no …model_states.pt, which tells names and shapes", COPY)
    zero3 = any(name.startswith("zero_pp_rank_") for name in names.values())
    if len(names) < sum(1 for name in listed if MODEL.fullmatch(name)):
        raise FormatError(f"{root} holds both mp_rank_… and zero_pp_rank_… model states", MIXED)
    trees = {at: tree_of(root / name, "module") for at, name in names.items()}
    first = trees[min(trees)]
    for key in ("ds_version", "global_steps", "dp_world_size", "mp_world_size"):
        other = next((at for at in sorted(trees) if trees[at].get(key) != first.get(key)), None)
        if other:
            said = f"{key} is {quote(first.get(key))} in {names[min(trees)]}, {quote(trees[other].get(key))} in {names[other]}"
            raise FormatError(f"{root}: {said}", MIXED)
    dp, tp = (count_of(root, first, key, max(at[i] for at in names) + 1) for i, key in enumerate(("dp_world_size", "mp_world_size")))
    expected = [(d, m) for d in range(dp if zero3 else 1) for m in range(tp)]
    missing = [
        f"zero_pp_rank_{d}_mp_rank_{m:02d}_model_states.pt" if zero3 else f"mp_rank_{m:02d}_model_states.pt"
        for d, m in expected
        if (d, m) not in names
    ]
    if missing or len(names) > len(expected):
        raise FormatError(f"{root} holds the model states of {len(names)} ranks, they say {len(expected)}; missing: {some(missing) or 'none'}",
                          COPY if missing else MIXED)  # fmt: skip
    return ModelStates(root, inside, names, trees, _experts(root, listed, first.get("num_experts")))


def _experts(root: Path, listed: list[str], count: object) -> dict[str, tuple[int, dict[str, Any]]]:
    """The files of a mixture's experts, all of them."""
    found: dict[tuple[str | None, str], set[int]] = defaultdict(set)
    out = {}
    for name in listed:
        if match := _EXPERT.fullmatch(name):
            found[match[1], match[3]].add(int(match[2]))
            out[name] = int(match[3]), tree_of(root / name)
    most = max(count) if isinstance(count, list) and count and all(type(n) is int for n in count) else 0
    for (layer, rank), numbers in sorted(found.items(), key=str):
        size = min(most, 1 << 16) if len(found) == 1 or isinstance(count, list) and len(set(count)) == 1 else 0
        lacking = sorted(set(range(max(size, max(numbers) + 1))) - numbers)
        if lacking:
            prefix = "" if layer is None else f"layer_{layer}_"
            raise FormatError(f"{root} lacks {some([f'{prefix}expert_{n}_mp_rank_{rank}_model_states.pt' for n in lacking])}", COPY)
    return out


def count_of(root: Path, tree: Mapping[str, Any], key: str, seen: int) -> int:
    """How many ranks a file says there are."""
    told = tree.get(key, seen)
    if type(told) is not int or not 0 < told <= 1 << 16:
        raise FormatError(f"{root}: {key} is {quote(told)}, not a number of ranks")
    return told


def tree_of(path: Path, *keys: str) -> dict[str, Any]:
    tree = torch_tree(path)
    lacking = [key for key in keys if not isinstance(tree, dict) or not isinstance(tree.get(key), dict)]
    if not isinstance(tree, dict) or lacking:
        raise FormatError(f"{path} holds no {lacking[0] if lacking else 'state'} of DeepSpeed's", "the file is damaged, or of another kind")
    return tree
