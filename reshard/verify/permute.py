"""The proof without processes: merge the shards with their ranks permuted; the model must stay the same.

A cut that falls on heads, groups and ffn columns leaves a model whose heads stand in another order, and computes the same
logits. A cut that goes through them, or that two tensors of a layer make differently, does not. It says nothing of what
is cut by vocabulary (kept in order here), of biases that are summed, of the order inside a rank, and of names.
"""

import gc
import time
from dataclasses import replace

import torch

from reshard import formats
from reshard.api import load
from reshard.checkpoint import Checkpoint, open_checkpoint
from reshard.conversion.placing import place
from reshard.errors import FormatError
from reshard.geometry.block import Stored
from reshard.layout import Rank
from reshard.verify.beyond import Beyond
from reshard.verify.devices import Device, choose, describe
from reshard.verify.exact import exact, refuse_override
from reshard.verify.figures import DTYPES, compare, relative_tolerance
from reshard.verify.model import parts_of
from reshard.verify.reference import load_state, run_reference
from reshard.verify.report import Report, Result, unexercised
from reshard.verify.request import Request
from reshard.verify.routers import replay
from reshard.verify.run import check_budget, read_config, token_ids
from reshard.verify.settings import compare_settings


def permuted_order(tp: int, replicated: int) -> list[int]:
    """Tensor-parallel ranks in reverse; those that share one key/value head (`replicated` of them) keep together, in order."""
    share = tp // replicated if tp > replicated and tp % replicated == 0 else 1
    return [tp - share - t // share * share + t % share for t in range(tp)]


def permuted(checkpoint: Checkpoint, left_out: str | None = None) -> Checkpoint:
    """`checkpoint` with each rank's file taken for another's, layer tensors alone. `left_out` names a tensor that stays: a
    defect. Raises FormatError where ranks hold unlike pieces."""
    placement = place(checkpoint, checkpoint.format, checkpoint.mesh)
    layout = checkpoint.layout
    heads = [layout.sizes[axis] for axis in layout.descriptor.replicate if axis in layout.sizes]
    order = permuted_order(checkpoint.mesh.tp, min(heads, default=checkpoint.mesh.tp))
    at = {(rank.tp, rank.pp, rank.ep): rank for rank in placement.ranks}
    other = {rank.number: at.get((order[rank.tp], rank.pp, rank.ep)) for rank in placement.ranks}
    own = {(s.rank, s.name): s for s in checkpoint.stored}
    out: list[Stored] = []
    for s in checkpoint.stored:
        tensor = layout.descriptor.tensors[s.entry.of[0]]
        dealt = "expert" in tensor.index and checkpoint.mesh.ep > 1  # whole experts can't move without their router
        if "layer" not in tensor.index or dealt or s.entry.only_rank0 or s.name == left_out:
            out.append(s)
            continue
        rank: Rank | None = other[s.rank]
        source = own.get((rank.number, s.name)) if rank else None
        if source is None or source.shape != s.shape:
            raise FormatError(f"{s.name}: rank {s.rank} holds {list(s.shape)}, rank {rank.number if rank else '?'} "
                              f"{list(source.shape) if source else 'no such tensor'}: ranks that hold unlike pieces can't be permuted",
                              "use --method tp, or a tp that deals heads and columns out evenly; `reshard diff` compares elements for any")  # fmt: skip
        parts = s.parts
        if len(source.parts) == len(parts):  # as their file has them: torch files may be strided
            parts = tuple(
                part._replace(block=part.block._replace(offset=theirs.block.offset, strides=theirs.block.strides), step=theirs.step)
                for part, theirs in zip(parts, source.parts)
            )
        out.append(s._replace(parts=parts, file=source.file, start=source.start, dtype=source.dtype))
    return replace(checkpoint, stored=out)


def left_in_order(checkpoint: Checkpoint) -> str | None:
    """A tensor to leave in place as the planted defect, of the layer nearest the middle that has one: it no longer meets what
    comes before or after it. One whose input is cut, else any that is cut; None where no layer has any."""
    tensors, found = checkpoint.layout.descriptor.tensors, []
    middle = checkpoint.layout.layers // 2
    for s in checkpoint.stored:
        tensor = tensors[s.entry.of[0]]
        if tensor.split and tensor.index == ("layer",) and s.blocks:
            by_output = tensor.split[0] in tensor.dims[0]
            found.append((by_output, abs(s.blocks[0][0][1] - middle), len(found), s.name))
    return min(found)[-1] if found else None


def verify_permuted(request: Request) -> Report:
    """Run the proof in this process. Raises ReshardError where there is nothing to permute."""
    refuse_override(request.device)
    with exact(), torch.no_grad():
        device = choose(request.device, 0)
        try:
            return _verify(request, device, [describe(request.device, 0, 0)])
        except torch.cuda.OutOfMemoryError as error:
            raise FormatError(f"{device} is full: {str(error).splitlines()[0]}", "use --dtype bf16, or --device cpu") from error


def _verify(request: Request, device: torch.device, devices: list[Device]) -> Report:
    start, dtype = time.monotonic(), DTYPES[request.dtype]
    config_at = request.config or (None if (request.checkpoint / "config.json").is_file() else request.reference)
    checkpoint = open_checkpoint(request.checkpoint, format=request.format, layout=request.layout, config=config_at)
    if checkpoint.layout.operands:
        raise FormatError(
            f"{request.checkpoint} is quantised as {checkpoint.layout.scheme}: verify does not compute with quantised weights",
            "dequantise both first: reshard convert … --dequantise",
        )
    if checkpoint.mesh.tp == 1:
        raise FormatError(f"{request.checkpoint} is of one tensor-parallel rank: nothing to permute", "use --method tp")
    left_out = left_in_order(checkpoint)
    broken = permuted(checkpoint, left_out) if left_out else None
    config = read_config(request)
    said = formats.get(checkpoint.format).read(request.checkpoint).settings
    differences = compare_settings(request.checkpoint, request.reference, request.config, said)
    ids = token_ids(request, [], config)
    check_budget(request, {}, config, devices, ids, dtype)
    request.say("running the original")
    original = run_reference(request.reference, ids, dtype, device, request.low_memory)
    results = []
    relative = relative_tolerance(dtype, config.get_text_config().num_hidden_layers, config.get_text_config().hidden_size)
    for name, source in (("shards, ranks permuted", permuted(checkpoint)), (f"{left_out} left in order", broken)):
        if source is None:
            continue
        request.say(f"running {name}")
        gc.collect()
        model = load_state(load(source, format="hf"), config, dtype, device)
        replay(parts_of(model), original.routed)
        logits = model(ids.to(device), use_cache=False).logits.float().cpu()
        results.append(Result(name, compare(original.logits, logits, relative), []))
        del model
    return Report(request.checkpoint, request.reference, checkpoint.format, str(checkpoint.mesh), checkpoint.architecture, checkpoint.layout.layers,
                  request.dtype, request.device, "none", 1, 1, tuple(ids.shape), "permute", results[0], results[1:], [], time.monotonic() - start, differences,
                  _unexercised(config.get_text_config(), ids.shape[1], original.reached), original.reached)  # fmt: skip


def _unexercised(config, positions: int, reached: tuple[int, int]) -> list[str]:
    """This proof runs no engine's arithmetic: what it leaves open beside positions."""
    used, every = reached
    idle = [f"{every - used} of {every} experts, that no token of the prompts went to"] if used < every else []
    return [
        *unexercised(config, positions, Beyond()),
        *idle,
        "cuts of the vocabulary, and names and orders inside a rank: --method tp proves these",
    ]
