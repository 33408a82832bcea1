"""A running vLLM engine on the CPU, updated by two FSDP2 trainers through vLLM's own weight transfer API, backend ``reshard``.

    python scripts/sync_vllm.py [--family llama] [--tp 1] [--updates 3]

After each update the engine's log-probabilities of the prompts must be those that transformers computes from the trainers' weights
(float32, within 1e-3); before it they must not be. At last one trainer lacks a tensor: all must hear of it, and the engine be as it was. The engine's control calls go over a socket, as its HTTP client's would.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
PROMPT = [5, 17, 101, 3, 44, 200, 9, 77, 31, 8, 61, 150]
CALLS = ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update")


class Remote:
    """vLLM's VLLMWeightSyncClient over a socket."""

    def __init__(self, address: str):
        self.connection = Client(address)

    def _call(self, *message):
        self.connection.send(message)
        answer = self.connection.recv()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]

    def init_weight_transfer_engine(self, info):
        self._call("init_weight_transfer_engine", {"request": {"init_info": info}})

    def start_weight_update(self):
        self._call("start_weight_update", {})

    def update_weights(self, info):
        self._call("update_weights", {"request": {"update_info": info}})

    def finish_weight_update(self, weight_version=None):
        self._call("finish_weight_update", {"weight_version": weight_version})


def trainer(folder: str, rank: int, told: dict) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from reshard.plugins.vllm import register
    from reshard.plugins.vllm_transfer import ReshardTrainerInit

    register()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{told['scratch']}/trainers", rank=rank, world_size=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    client = Remote(told["control"]) if rank == 0 else None
    info = ReshardTrainerInit(address=told["address"], config=folder, trainer={"format": "fsdp", "ranks": 2, "dp": 2, "dtype": "fp32"},
                              engine={"ranks": told["tp"], "tp": told["tp"], "dtype": "fp32", "backend": "gloo"}, rank=rank, verify=True)  # fmt: skip
    engine = WeightTransferTrainerFactory.trainer_init(info, client=client, source=model)
    for step in range(told["updates"]):
        with torch.no_grad():
            for parameter in model.parameters():
                local = parameter.to_local()
                local.add_(torch.randn(local.shape, generator=torch.Generator().manual_seed(10 * step + rank)) * 0.02)
        whole = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
        if rank == 0:
            torch.save(whole, f"{told['scratch']}/step{step}.pt")
            client._call("check", {"step": step, "after": False})
        stats = engine.send_weights()
        if rank == 0:
            client._call("check", {"step": step, "after": True, "sent": stats.sent, "seconds": stats.seconds})
        dist.barrier()
    held = dict(model.named_parameters())
    if rank:
        held.pop("model.layers.0.mlp.down_proj.weight")
    engine.source = held
    try:
        engine.send_weights()
        refused = False
    except Exception as error:  # noqa: BLE001  of Sync here, of the engine's answer on rank 0
        refused = "down_proj" in f"{error} {error.__context__}"
    if rank == 0:
        client._call("check", {"step": told["updates"] - 1, "after": True, "refused": refused})
        client._call("bye", {})
    engine.shutdown()
    sys.exit(0 if refused else 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="llama")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--updates", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return run(args, scratch)


def run(args, scratch: str) -> int:
    import torch
    from check_vllm import entry_points
    from tiny_models import families, make
    from transformers import AutoModelForCausalLM

    entry_points(Path(scratch) / "site")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), f"{scratch}/site"])
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    folder = f"{scratch}/hf"
    make(families()[args.family]["config"], Path(folder), dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    from vllm import LLM, SamplingParams

    engine = LLM(folder, load_format="dummy", tensor_parallel_size=args.tp, dtype="float32", enforce_eager=True, max_model_len=64, max_logprobs=-1,
                 skip_tokenizer_init=True, disable_log_stats=True, enable_prefix_caching=False, weight_transfer_config={"backend": "reshard"})  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        "scratch": scratch,
        "control": f"{scratch}/control",
        "address": f"tcp://127.0.0.1:{port}",
        "tp": args.tp,
        "updates": args.updates,
    }
    rows = []
    with Listener(told["control"]) as listener:
        script = f"import sys, json; sys.path[:0] = {sys.path[:2]!r}; import sync_vllm; sync_vllm.trainer({folder!r}, int(sys.argv[1]), json.loads(sys.argv[2]))"
        ranks = [subprocess.Popen([sys.executable, "-c", script, str(rank), json.dumps(told)]) for rank in range(2)]
        with listener.accept() as control:
            while True:
                name, options = control.recv()
                began = time.monotonic()
                try:
                    if name == "bye":
                        control.send({"value": None})
                        break
                    if name == "check":
                        reference.load_state_dict(torch.load(f"{scratch}/step{options['step']}.pt"), strict=False)
                        with torch.no_grad():
                            wanted = torch.log_softmax(reference(torch.tensor([PROMPT])).logits[0], -1)
                        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
                        told_by = engine.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)[0].prompt_logprobs
                        pairs = [(log.logprob, float(wanted[i, t])) for i, table in enumerate(told_by[1:]) for t, log in table.items()]
                        rows.append({**options, "max_abs_dlogprob": max(abs(a - b) for a, b in pairs), "over": len(pairs)})
                        print(json.dumps(rows[-1]), flush=True)
                        control.send({"value": None})
                    else:
                        assert name in CALLS
                        control.send({"value": getattr(engine, name)(**options)})
                        print(f"{name}: {time.monotonic() - began:.3f} s", flush=True)
                except Exception as error:  # noqa: BLE001  the trainer is told, and ends
                    control.send({"error": repr(error)})
        codes = [process.wait(120) for process in ranks]
    good = [row["max_abs_dlogprob"] < 1e-3 if row["after"] else row["max_abs_dlogprob"] > 1e-2 for row in rows]
    passed = codes == [0, 0] and len(rows) == 2 * args.updates + 1 and all(good) and rows[-1]["refused"]
    print(json.dumps({"passed": passed, "family": args.family, "tp": args.tp, "updates": args.updates}))
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
