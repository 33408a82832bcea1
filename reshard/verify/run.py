"""One process's work: its rank's shard, the reference on the first rank, the forward, and the comparison."""

import gc
import os
import resource
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from reshard.errors import FormatError, ReshardError
from reshard.verify.beyond import compare_beyond
from reshard.verify.build import build
from reshard.verify.controls import controls, planted
from reshard.verify.devices import Device, check_memory, choose, forward_bytes, ranks_to_a_device
from reshard.verify.direct import compare_experts, compare_vectors, experts_of, orders, router_rows, routing_vectors, run_experts
from reshard.verify.exact import exact
from reshard.verify.figures import DTYPES, Figures, compare, relative_tolerance, worst
from reshard.verify.group import CONTROL, Seat, agree, agreed, control_group, is_agreed, process_groups, seats
from reshard.verify.model import Model, empty_model, hush
from reshard.verify.prompts import built_in, tokenized
from reshard.verify.reference import Original, run_reference
from reshard.verify.report import RankMemory, Report, Result, unexercised
from reshard.verify.request import Request
from reshard.verify.routers import replay
from reshard.verify.settings import Difference, compare_settings, transformers_config
from reshard.verify.shards import Shards, open_shards
from reshard.verify.slices import Slices
from reshard.verify.tables import table
from reshard.verify.trace import Point, every_row, follow, traced

#: what this does not run of an engine that computes with codes
ROUNDED = "codes and scales were run as the weights that they stand for: an engine may round activations, too"


def verify_rank(request: Request, number: int, world: int, local: int, locals_: int, devices: list[Device] | None = None) -> Report | None:
    """Be process `number` of `world` in torch.distributed's default group, the `local`-th of `locals_` on this machine; `devices` are
    all ranks' (``devices.agree``), where they are GPUs.

    Returns the report on process 0, None elsewhere. What is wrong with the input raises ReshardError on all of them, the same.
    """
    control = control_group()
    threads = torch.get_num_threads()
    groups: dict = {}
    try:
        with exact():
            if request.device == "cpu":
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // locals_))
            problems: list = []
            try:
                device = choose(request.device, local)
                shards, places, config = _opened(request, world)
                differences = compare_settings(request.checkpoint, request.reference, request.config, shards.settings)
                if shards.quantised:  # the twin says nothing of how these weights are held
                    differences = [each for each in differences if not each.field.startswith("quantization_config")]
            except ReshardError as error:
                problems = [error]
            agree(problems, control)
            groups = process_groups(places, control)
            return _verify(request, shards, places, number, config, differences, groups, device, devices or [])
    except BaseException as error:
        if not is_agreed(error):
            groups, control = {}, None  # of a rank that failed alone: its peers may still wait in them
        raise
    finally:
        torch.set_num_threads(threads)
        for group in dict.fromkeys((*groups.values(), control)):
            if group not in (None, dist.group.WORLD):
                dist.destroy_process_group(group)


def _opened(request: Request, world: int):
    shards = open_shards(request.checkpoint, request.format)
    places = seats(shards.mesh, shards.ranks)
    if len(places) != world:
        raise FormatError(
            f"{request.checkpoint} has {len(places)} ranks ({shards.mesh}), but {world} processes run",
            f"start {len(places)}, or leave --nproc out",
        )
    config = read_config(request)
    return shards.named(table(config.get_text_config().model_type, shards.engine.name)), places, config


def _verify(
    request,
    shards: Shards,
    places: list[Seat],
    number: int,
    config,
    differences: list[Difference],
    groups,
    device: torch.device,
    devices: list[Device],
) -> Report | None:
    start, dtype, control = time.monotonic(), DTYPES[request.dtype], groups[CONTROL]
    try:
        problems = check(shards, places, number, config)
    except ReshardError as error:
        problems = [error]
    agree([*problems, *map(str, differences)] if problems and number == 0 else problems, control)
    ids = token_ids(request, vocabulary_edges(shards), config)
    check_budget(request, {rank: shards.elements(seat.rank) for rank, seat in enumerate(places)}, config, devices, ids, dtype)
    expected: Original | None = None
    problem: list = []
    if number == 0:
        request.say("running the original")
        try:
            expected = run_reference(request.reference, ids, dtype, device, request.low_memory)
        except ReshardError as error:
            problem = [error]
        except Exception as error:  # noqa: BLE001 the other ranks wait: they must hear of whatever stopped transformers
            problem = [FormatError(f"transformers cannot run the reference {request.reference}: {type(error).__name__}: {error}")]
    agree(problem, control)
    if device.type == "cuda":
        gc.collect()  # the original is gone before the shards come
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    m = empty_model(config)
    counts = {path: module.num_experts for path, module in experts_of(m)}
    s = Slices(shards, places, number, m, groups, device, dtype)
    linears = build(s, m)
    m.module.to(device)
    routed = [expected and expected.routed]
    dist.broadcast_object_list(routed, src=0, group=control)
    replay(m, routed[0])
    if number == 0:
        request.say(f"running the shards on {len(places)} process{'es' * (len(places) > 1)}")
    try:
        names, runs = ["shards"], [_forward(m, s, ids, control)]
    except RuntimeError as error:
        if not differences:
            raise
        said = "; ".join(map(str, differences[:5]))
        raise FormatError(
            f"the shards cannot be run by the settings beside them ({str(error).splitlines()[0]}): {said}", "correct these settings"
        ) from error
    experts = run_experts(m, dtype, device, counts)
    direct = gather(
        (experts if s.stage.index == 0 else {}, routing_vectors(m), router_rows(m)), control
    )  # a stage's ranks have the same sums
    for defect in controls(s, m):
        if number == 0:
            request.say(f"planting a defect: {defect.name}")
        with planted(defect, linears):
            names, runs = [*names, defect.name], [*runs, _forward(m, s, ids, control, parts=False)]
    memory = gather(RankMemory(number, shards.bytes(s.seat.rank), _held(m), _peak(device)), control)
    if expected is None:
        return None
    text = m.config
    relative = relative_tolerance(dtype, text.num_hidden_layers, text.hidden_size)
    results = [_judge(name, run, expected, relative, s) for name, run in zip(names, runs)]
    beyond = compare_beyond(shards, request.reference, m)
    points = [*_directly(expected, direct, relative), *beyond.points]
    results[0] = replace(results[0], points=[*results[0].points, *points], suspects=results[0].suspects or _stored(s, points))
    return Report(request.checkpoint, request.reference, shards.format, str(shards.mesh), (config.architectures or [type(m.module).__name__])[0],
                  text.num_hidden_layers, request.dtype, request.device, dist.get_backend(), len(places), ranks_to_a_device(devices),
                  tuple(ids.shape), "tp", results[0], results[1:], memory, time.monotonic() - start, differences,
                  [*unexercised(text, ids.shape[1], beyond), *([ROUNDED] if shards.quantised else [])], expected.reached)  # fmt: skip


def _directly(expected: Original, direct: list[tuple[dict, dict, dict]], relative: float) -> list[Point]:
    """Experts and routing vectors, as every rank has them, against the original's."""
    experts = {path: outputs for own, _, _ in direct for path, outputs in own.items()}
    numbers = orders(expected.rows, {path: rows for _, _, own in reversed(direct) for path, rows in own.items()})
    vectors = [own for _, own, _ in direct]
    return [*compare_experts(expected.experts, experts, numbers, relative), *compare_vectors(expected.vectors, vectors, numbers)]


def _stored(s: Slices, points: list[Point]) -> list[str]:
    """The stored tensors of the first of `points` that is off."""
    off = next((point.path for point in points if point.apart), None)
    if off is None:
        return []
    return s.stored(off) or s.stored(off.rpartition(".")[0]) or [off]  # of a stack of experts, all are one tensor


def check_budget(request: Request, held: dict[int, int], config, devices: list[Device], ids: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise FormatError, the same on every rank, where a GPU can't hold what it must; `held` are elements of weights by rank, or of a
    rank that it lacks the whole model's."""
    if request.device == "cpu" or not devices:
        return
    m, text, size = empty_model(config), config.get_text_config(), dtype.itemsize
    weights = [tensor.numel() for tensor in m.module.parameters()]
    original = sum(weights)
    if request.low_memory:
        layers = [sum(tensor.numel() for tensor in layer.parameters()) for layer in m.at(m.layers)]
        original = max(layers) + sum(tensor.numel() for path in {m.embedding, m.head} for tensor in m.at(path).parameters())
    widest = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    running = forward_bytes(tuple(ids.shape), text.vocab_size, text.hidden_size, widest, text.num_attention_heads, size) + max(weights) * 4
    try:
        check_memory(devices, {device.rank: held.get(device.rank, sum(weights)) * size for device in devices}, original * size, running)
    except ReshardError as error:
        raise agreed(error) from None


def check(shards: Shards, places: list[Seat], number: int, config) -> list[str]:
    """What doesn't fit in one rank's shard, by headers alone."""
    m = empty_model(config)
    s = Slices(shards, places, number, m, None, torch.device("meta"), torch.float32)
    build(s, m)
    return s.problems


def read_config(request: Request):
    """transformers' configuration of the checkpoint: its own config.json, or --config's, or else the reference's."""
    hush()
    own = request.config or (request.checkpoint if (request.checkpoint / "config.json").is_file() else request.reference)
    configs = [transformers_config(place) for place in (own, request.reference)]
    ours, theirs = (config.get_text_config().vocab_size for config in configs)
    if ours != theirs:
        raise FormatError(
            f"{own} has a vocabulary of {ours}, the reference {request.reference} one of {theirs}", "is --reference the same model?"
        )
    return configs[0]


def token_ids(request: Request, edges: list[int], config) -> torch.Tensor:
    """The ids to run, [sequences, positions], the same on every rank; built-in ones reach both sides of `edges`."""
    text = config.get_text_config()
    if not request.prompts:
        return built_in(text.vocab_size, edges, text.max_position_embeddings)
    rows = [tokenized(request.reference, prompt) for prompt in request.prompts]
    shortest = min(row.shape[1] for row in rows)
    if not shortest:
        raise FormatError("a prompt of --prompt has no tokens")
    return torch.cat([row[:, :shortest] for row in rows])


def vocabulary_edges(shards: Shards) -> list[int]:
    """Where each rank's rows of the embedding end (of tied models perhaps stored as the output layer, whose rows are the same)."""
    tables = {rank.tp: shards.tables[rank.number] for rank in shards.ranks if rank.pp == 0}
    rows = [
        next((held.info.shape[0] for held in tables[t].values() if held.row and held.row.cut == "vocabulary"), 0) for t in sorted(tables)
    ]
    return [sum(rows[: i + 1]) for i in range(len(rows))]


@torch.no_grad()
def _forward(m: Model, s: Slices, ids: torch.Tensor, control, parts: bool = True) -> list[tuple[torch.Tensor | None, dict]]:
    """Logits of every dense model in the last stage and its traces, one for each slice of a stage; on process 0 alone."""
    rows = every_row(m, s.device) if parts else {}
    with traced(m) as outputs:
        logits = m.module(ids.to(s.device), use_cache=False).logits
    outputs |= rows
    leader = s.group.index == 0
    own = (s.seat.slice, logits.float().cpu() if leader and s.computes_logits else None, outputs if leader and parts else {})
    merged: dict[int, tuple[torch.Tensor | None, dict]] = {}
    for slice_, found, traces in gather(own, control):
        before, all_traces = merged.get(slice_, (None, {}))
        merged[slice_] = (found if found is not None else before, {**traces, **all_traces})
    return list(merged.values())


def _judge(name: str, run: list[tuple[torch.Tensor, dict]], expected: Original, relative: float, s: Slices) -> Result:
    figures: list[Figures] = [compare(expected.logits, logits, relative) for logits, _ in run]
    chosen = worst(figures)
    points = follow(expected.outputs, run[figures.index(chosen)][1], relative, s.model.embedding)
    off = next((point.path for point in points if point.apart), None)
    return Result(name, chosen, points, s.stored(off) if off else [])


def gather(own, control) -> list:
    """Every process's object, on process 0; nothing elsewhere."""
    out = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, out, dst=0, group=control)
    return out or []


def _held(m: Model) -> int:
    """Bytes of this rank's weights as computed with; each storage once."""
    tensors = [*m.module.parameters(), *m.module.buffers()]
    for part in m.module.modules():
        tensors += [value for value in vars(part).values() if torch.is_tensor(value)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _peak(device: torch.device) -> int:
    """The most that this process has held on its device; on CPU with Python and torch, and on process 0 with the original."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
