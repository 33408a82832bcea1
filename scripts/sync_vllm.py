"""Running vLLM servers on the CPU, updated over HTTP by trainers that come and go: backend ``reshard`` of vLLM's own weight transfer.

    python scripts/sync_vllm.py [--family llama] [--tp 1] [--updates 3]

With the Python of an environment that has vLLM and transformers. Two FSDP2 trainers update a server that knows nothing; then a trainer that lacks
a tensor, one that dies in the middle of an update, a second pair after the first, a second server that joins, and the first that leaves. After
each, the servers' log-probabilities of a prompt, over the whole vocabulary, must be those that transformers computes from what the trainers hold
(float32, within 1e-3), or still be those of before; before each they must not be.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "examples")]
PROMPT = [5, 17, 101, 3, 44, 200, 9, 77, 31, 8, 61, 150]


class Pair:
    """One rank of two trainers: FSDP2 over gloo, weights of their own, an end of the transfer."""

    def __init__(self, folder: str, rank: int, meeting: str, seed: int):
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from transformers import AutoModelForCausalLM

        from reshard.plugins.vllm import register

        register()
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        self.folder, self.rank, self.seed = folder, rank, seed
        self.model, self.whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), None
        mesh = init_device_mesh("cpu", (2,))
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def join(self, urls: list[str], address: str, source=None, trainer=""):
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        from reshard.plugins.vllm_transfer import ReshardTrainerInit, Servers

        servers = Servers(*urls)
        info = ReshardTrainerInit(address, self.folder, servers.engines("gloo"), trainer, rank=self.rank, verify=True, timeout=20)
        self.transfer = WeightTransferTrainerFactory.trainer_init(
            info, client=servers if self.rank == 0 else None, source=source or self.model
        )
        return self.transfer

    def step(self) -> None:
        """Other weights, and the whole of them for the reference."""
        import torch

        self.seed += 1
        with torch.no_grad():
            for parameter in self.model.parameters():
                local = parameter.to_local()
                local.add_(torch.randn(local.shape, generator=torch.Generator().manual_seed(10 * self.seed + self.rank)) * 0.02)
        self.whole = {name: parameter.full_tensor().detach() for name, parameter in self.model.named_parameters()}

    def off(self, url: str) -> float:
        """How far the server's log-probabilities are from transformers' with this pair's weights; the first rank asks."""
        if self.rank:
            return 0.0
        import torch
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        reference.load_state_dict(self.whole, strict=False)
        with torch.no_grad():
            wanted = torch.log_softmax(reference(torch.tensor([PROMPT])).logits[0], -1)
        asked = {"model": "policy", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": -1}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            tables = json.load(answer)["choices"][0]["prompt_logprobs"]
        pairs = [(one["logprob"], float(wanted[i, int(token)])) for i, table in enumerate(tables[1:]) for token, one in table.items()]
        assert len(pairs) >= (len(PROMPT) - 1) * wanted.shape[1], "not the whole vocabulary"
        return max(abs(a - b) for a, b in pairs)


class Whole:
    """What a framework that gathers hands over: (name, whole tensor), anew for each pass; the second rank may die on the way."""

    def __init__(self, pair: Pair, dies_at: int = -1):
        self.pair, self.dies_at = pair, dies_at

    def __iter__(self):
        for number, (name, parameter) in enumerate(self.pair.model.named_parameters()):
            if number == self.dies_at and self.pair.rank == 1:
                os._exit(9)
            yield name, parameter.full_tensor().detach()


def said(call) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001  vLLM's, requests', reshard's
        return f"{error} {error.__cause__ or ''}"
    return ""


def updates(rank: int, told: dict) -> list[dict]:
    """FSDP2's shards, read from the module; then a trainer that lacks a tensor."""
    pair, rows, [url] = Pair(told["folder"], rank, told["meeting"], 0), [], told["urls"]
    transfer = pair.join([url], told["address"])
    for number in range(told["updates"]):
        pair.step()
        before = pair.off(url)
        began = time.perf_counter()
        stats = transfer.send_weights()
        rows.append({"case": f"update {number + 1}, shards as they lie", "before": before, "after": pair.off(url), "sent": stats.sent + stats.mapped,
                     "sync_s": round(stats.seconds, 3), "seconds": round(time.perf_counter() - began, 3)})  # fmt: skip
    held = dict(pair.model.named_parameters())
    if rank:
        held.pop("model.layers.0.mlp.down_proj.weight")
    transfer.source = held
    words = said(transfer.send_weights)
    if rank == 0:
        transfer.client.resume()  # it was left paused
    rows.append(
        {
            "case": "a trainer lacks a tensor: refused, and the engine as it was",
            "before": 1.0,
            "after": pair.off(url),
            "said": "down_proj" in words,
        }
    )
    transfer.shutdown()
    return rows


def dies(rank: int, told: dict) -> list[dict]:
    """A second pair after the first: whole tensors, one after another. Its second rank dies in the middle of the second update."""
    pair, [url] = Pair(told["folder"], rank, told["meeting"], 100), told["urls"]
    transfer = pair.join([url], told["address"], Whole(pair), {"format": "hf", "ranks": 2, "dtype": "fp32"})
    pair.step()
    before = pair.off(url)
    stats = transfer.send_weights()
    rows = [
        {
            "case": "a second pair after the first, gathered tensors",
            "before": before,
            "after": pair.off(url),
            "sent": stats.sent + stats.mapped,
        }
    ]
    transfer.source = Whole(pair, dies_at=8)
    began = time.perf_counter()
    words = said(transfer.send_weights)
    paused = json.load(urllib.request.urlopen(f"{url}/is_paused"))["is_paused"]
    return [*rows, {"case": "a trainer dies in the middle: told, and the engine stays paused", "before": 1.0, "after": 0.0, "said": bool(words) and paused,
                    "seconds": round(time.perf_counter() - began, 1)}]  # fmt: skip


def elastic(rank: int, told: dict) -> list[dict]:
    """A third pair; a second server joins, the first leaves."""
    pair, (one, two) = Pair(told["folder"], rank, told["meeting"], 200), told["urls"]
    rows = []
    for urls, what in (
        ([one], "after the dead trainer, another"),
        ([one, two], "a second engine joins"),
        ([two], "the first engine leaves"),
    ):
        transfer = pair.join(urls, told["address"])
        pair.step()
        if rank == 0:
            transfer.client.resume()  # the dead trainer's update left it paused
        before = [pair.off(url) for url in urls]
        transfer.send_weights()
        rows.append({"case": what, "before": min(before), "after": max(pair.off(url) for url in urls)})
        transfer.shutdown()
    return rows


def pair_of(work, told: dict) -> list[dict]:
    """What the first of two ranks that do `work` returns."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    ranks = [context.Process(target=_rank, args=(work, rank, told, there if rank == 0 else None)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        rows = here.recv() if here.poll(400) else [{"case": f"{work.__name__}: no answer", "before": 0.0, "after": 1.0}]
    except EOFError:
        rows = [{"case": f"{work.__name__}: ended", "before": 0.0, "after": 1.0}]
    for process in ranks:
        process.join(30)
        process.kill()
    return rows


def _rank(work, rank: int, told: dict, pipe) -> None:
    try:
        rows = work(rank, told)
    except BaseException as error:
        if pipe:
            pipe.send([{"case": f"{work.__name__}: {type(error).__name__}: {error}", "before": 0.0, "after": 1.0}])
        raise
    if pipe:
        pipe.send(rows)
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="llama")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--only", help="updates, dies or elastic")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end, too
    from check_vllm import entry_points
    from grpo_vllm import free_port, serve, words
    from tiny_models import families, make

    with tempfile.TemporaryDirectory() as scratch:
        entry_points(Path(scratch) / "site")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), f"{scratch}/site", os.environ.get("PYTHONPATH", "")])
        folder = Path(scratch) / "model"
        make(families()[args.family]["config"], folder, dtype="float32")
        words(json.loads((folder / "config.json").read_text())["vocab_size"]).save_pretrained(folder)
        ports, servers, rows = [free_port() for _ in range(1 if args.only in ("updates", "dies") else 2)], [], []
        try:
            for number, port in enumerate(ports):
                servers.append(serve(str(folder), port, args.tp, Path(scratch) / f"server{number}.log", "--max-logprobs", "-1"))
            urls = [f"http://127.0.0.1:{port}" for port in ports]
            for work, which in ((updates, urls[:1]), (dies, urls[:1]), (elastic, urls)):
                if args.only not in (None, work.__name__):
                    continue
                told = {"folder": str(folder), "urls": which, "updates": args.updates, "meeting": f"tcp://127.0.0.1:{free_port()}",
                        "address": f"tcp://127.0.0.1:{free_port()}"}  # fmt: skip
                for row in pair_of(work, told):
                    rows.append({**row, "good": row["after"] < 1e-3 and row["before"] > 1e-2 and row.get("said", True)})
                    print(json.dumps(rows[-1]), flush=True)
        finally:
            if not rows or not all(row["good"] for row in rows):
                for log in sorted(Path(scratch).glob("server*.log")):
                    print(log.read_text()[-3000:], file=sys.stderr)
            for server in servers:
                os.killpg(server.pid, signal.SIGTERM)
                server.wait(60)
    passed = len(rows) == {None: args.updates + 6, "updates": args.updates + 1, "dies": 2, "elastic": 3}.get(args.only) and all(
        row["good"] for row in rows
    )
    print(json.dumps({"passed": passed, "family": args.family, "tp": args.tp, "updates": args.updates}))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
