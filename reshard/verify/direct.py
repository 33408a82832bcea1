"""What prompts don't reach, compared without them: every expert's output on given tokens, and the vectors that routers add.

A prompt of 64 tokens leaves most of 128 experts idle, and a router's correction bias that is rounded to bf16 may turn no decision
of those that it takes. So each expert of either model is given the same tokens, through the module and the collectives of a
forward, and what a router adds is compared bit for bit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite

import torch
from torch import nn

from reshard.verify.model import Model
from reshard.verify.routers import hooked, routers
from reshard.verify.trace import Point

#: tokens that each expert is given
TOKENS = 2


def experts_of(m: Model) -> list[tuple[str, nn.Module]]:
    """The modules of `m`, by path, that hold a layer's experts (of those that this rank runs)."""
    found = [(f"{m.layers}.{path}", module) for path, module in m.at(m.layers).named_modules() if type(module).__name__.endswith("Experts")]
    return [(path, module) for path, module in found if not path.endswith(".inner")]


@contextmanager
def reached(m: Model) -> Iterator[dict[str, set[int]]]:
    """The experts that tokens go to in the forward in ``with``, by path of their layer's module."""
    used: dict[str, set[int]] = {}
    with hooked(experts_of(m), lambda path, args, _: used.setdefault(path, set()).update(args[1].unique().tolist())):
        yield used


@torch.no_grad()
def run_experts(m: Model, dtype: torch.dtype, device: torch.device, counts: Mapping[str, int] | None = None) -> dict[str, torch.Tensor]:
    """Every expert's outputs, [experts, tokens, hidden], by path of its layer's module, on the CPU. `counts` are experts in all, where
    `m` holds a rank's share; the ranks of a stage call this together. Tokens are random, but the same for every expert, always."""
    out = {}
    for path, module in experts_of(m):
        count = module.num_experts if counts is None else counts[path]
        tokens = torch.randn(TOKENS, m.config.hidden_size, generator=torch.Generator().manual_seed(0)).repeat(count, 1).to(device, dtype)
        index = torch.arange(count, device=device).repeat_interleave(TOKENS)[:, None]
        found = module(tokens, index, torch.ones_like(index, dtype=dtype))
        out[path] = found.float().cpu().unflatten(0, (count, TOKENS))
    return out


def routing_vectors(m: Model) -> dict[str, torch.Tensor]:
    """What routers, and the blocks that they are in, have beside matrices, by path: correction biases and the like, flat, on the CPU."""
    from accelerate.utils import align_module_device

    out = {}
    for path, router in routers(m):
        block = path.rpartition(".")[0]
        for at, part in ((block, m.at(f"{m.layers}.{block}")), *router.named_modules(prefix=path)):
            with align_module_device(part):  # of a model that is streamed from disk, its tensors are there in here alone
                for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                    if tensor.numel() == max(tensor.shape, default=1):
                        out[f"{m.layers}.{at}.{name}"] = tensor.detach().cpu().flatten().clone()
    return out


@torch.no_grad()
def router_rows(m: Model) -> dict[str, torch.Tensor]:
    """Each row of every router's matrix as a few numbers, [experts, 4], by the path of the block that it is in, on the CPU: by its row an
    expert is known, whatever its number."""
    from accelerate.utils import align_module_device

    vectors = torch.randn(m.config.hidden_size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = {}
    for path, router in routers(m):
        with align_module_device(router):
            out[f"{m.layers}.{path}".rpartition(".")[0]] = router.weight.detach().cpu().double() @ vectors
    return out


def orders(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The number that each of the original's experts has among the shards', by path of their block: experts in another order compute the
    same when the rows of their router are in that order too. Where rows don't tell, an expert keeps its number."""
    out = {}
    for path, theirs in expected.items():
        order = torch.arange(len(theirs))
        if path in found and found[path].shape == theirs.shape:
            apart = torch.cdist(theirs, found[path])
            apart.diagonal().mul_(1 - 1e-9)
            nearest = apart.argmin(1)
            order = nearest if len(nearest.unique()) == len(order) else order
        out[path] = order
    return out


def compare_experts(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], numbers: Mapping[str, torch.Tensor], tolerance: float
) -> list[Point]:
    """For each layer its worst expert, by the number of it where that one is off, relative to that expert's largest output; `numbers`
    are the shards' of the original's experts."""
    points = []
    for path, theirs in expected.items():
        if path not in found or found[path].shape != theirs.shape:
            points.append(Point(path, float("inf"), True, decides=True))
            continue
        largest = theirs.abs().amax((1, 2))
        own = found[path][numbers.get(path.rpartition(".")[0], slice(None))]
        off = (own - theirs).abs().amax((1, 2)) / torch.where(largest > 0, largest, 1.0)
        off = torch.where(off.isfinite(), off, float("inf"))
        worst = int(off.argmax())
        apart = off[worst].item() > tolerance
        points.append(Point(f"{path}.{worst}" if apart else path, off[worst].item(), apart, decides=True))
    return points


def compare_vectors(
    expected: Mapping[str, torch.Tensor], ranks: list[Mapping[str, torch.Tensor]], numbers: Mapping[str, torch.Tensor]
) -> list[Point]:
    """Each vector of the original's routers with that of every rank that has it: equal in every bit, or off. `numbers` as above."""
    points = []
    for path, theirs in expected.items():
        off = 0.0
        same = True
        for vectors in ranks:
            if (found := vectors.get(path)) is None:
                continue
            if found.shape != theirs.shape:
                same, off = False, float("inf")
                continue
            order = next((own for block, own in numbers.items() if path.startswith(f"{block}.")), None)
            found = found if order is None or len(order) != len(found) else found[order]
            same = same and torch.equal(found.view(torch.uint8), theirs.to(found.dtype).contiguous().view(torch.uint8))
            off = max(off, ((found.double() - theirs.double()).abs().max() / (theirs.double().abs().max() or 1.0)).item())
        points.append(Point(path, off if isfinite(off) else float("inf"), not same, decides=True))
    return points
