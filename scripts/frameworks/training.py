"""Training goes on: FSDP2 on 4 gloo ranks, saved by DCP with its optimizer, put by reshard into files for 2 ranks and for 3, and continued there.

Every rank trains on the same batch, so that the mean over 2 or 4 ranks is exact, and losses can be the same to the last bit. Of 3 ranks the mean is
rounded: there the run that torch itself continues from its own files is the measure.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from frameworks import SAMPLES, Differs, check, on_ranks

TITLE = "Training goes on (FSDP2, AdamW)"
INSTALL = ()
VERSIONS = ("torch", "transformers")
STEPS = 3
MODEL = "llama"


def rows(scratch: Path, quick: bool) -> Iterator[dict]:
    saved = scratch / "saved"
    never = [on_ranks(4, train, str(saved), 2 * STEPS, STEPS)[0]]  # trained on without an interruption, saved on the way
    for ranks in (2,) if quick else (2, 3):
        what = f"{STEPS} steps on 4 ranks, resharded to {ranks}, {STEPS} more steps"
        yield check(what, partial(_goes_on, saved, scratch / str(ranks), ranks, never[0]), partial(_fresh, scratch / str(ranks), ranks))


def _goes_on(saved: Path, folder: Path, ranks: int, never: list[float]) -> str:
    import reshard

    source = reshard.open(saved, config=SAMPLES / "hf" / MODEL)
    reshard.convert(source, folder, format="dcp", tp=ranks, optimizer=True, fsync=False, overwrite=True)
    losses = on_ranks(ranks, train, str(folder), STEPS, None, True)[0]
    torchs = on_ranks(ranks, train, str(saved), STEPS, None, True)[0]
    off = max(abs(a - b) for a, b in zip(losses, never[STEPS:]))
    if losses != torchs or (ranks == 2 and off):
        raise Differs(f"losses {losses}; torch from its own files {torchs}; never interrupted {never[STEPS:]}")
    (folder / "losses.txt").write_text(repr(losses))
    same = (
        "and those of the run never interrupted"
        if not off
        else f"the run never interrupted is {off:.1e} away: a mean over 3 ranks is rounded"
    )
    return f"losses {', '.join(f'{loss:.9g}' for loss in losses)} are those of torch from its own files to the last bit; {same}"


def _fresh(folder: Path, ranks: int) -> None:
    """The control: the same weights with an optimizer that knows nothing."""
    losses = on_ranks(ranks, train, str(folder), STEPS, None, True, False)[0]
    if repr(losses) != (folder / "losses.txt").read_text():
        raise Differs(f"without the optimizer's state the losses are {', '.join(f'{loss:.9g}' for loss in losses)}")


def train(rank: int, folder: str, steps: int, save_after: int | None, go_on: bool = False, optimizer_too: bool = True) -> list[float]:
    """On one rank: the losses of `steps` steps; `go_on`: from what lies in `folder`, where it is saved otherwise."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model = AutoModelForCausalLM.from_pretrained(SAMPLES / "hf" / MODEL, dtype=torch.float32, attn_implementation="eager")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    first = 0
    if go_on:
        weights, state = get_state_dict(model, optimizer)
        held = {"model": weights, "optim": state} if optimizer_too else {"model": weights}
        dcp.load(held, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        first = STEPS
    losses = []
    for step in range(first, first + steps):
        tokens = torch.randint(3, 300, (4, 24), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step + 1 == save_after:
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optim": state}, checkpoint_id=folder)
    return losses
