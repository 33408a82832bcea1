"""A GRPO-like loop on CPU, whole: a tiny transformers model trained under FSDP2, an engine of its own that generates from
vLLM-layout weights under tensor parallelism, and a weight sync between them after every step.

    python examples/grpo_loop.py [--steps 12]        4 processes: ranks 0-1 train (FSDP2), ranks 2-3 generate (TP2)

Each step the engine samples a group of completions per prompt; the reward is the share of tokens below half the
vocabulary; advantages are relative to the group; the trainer's fp32 masters take one step and go to the engine in bf16,
each engine rank receiving its own slices of qkv_proj and gate_up_proj and no more. After each sync the engine's logits
are compared with those of the trainer's own model at the same weights. Needs transformers.
"""

import argparse
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from reshard import sync

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 16, "vocab_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}  # fmt: skip
TRAINERS, ENGINES = (0, 1), (2, 3)
PROMPTS, GROUP, PROMPT_LENGTH, LENGTH = 4, 8, 4, 16


class Engine:
    """A Llama that computes on one rank's shards as vLLM lays them out: fused qkv and gate_up, row-parallel o and down."""

    def __init__(self, rank: int, group, side: sync.Side):
        self.group, self.first = group, rank == ENGINES[0]
        self.weights = {s.name: torch.zeros(s.shape, dtype=torch.bfloat16) for s in side.held_by(rank)}
        self.tp, self.index = len(ENGINES), ENGINES.index(rank)

    def weight(self, name: str) -> torch.Tensor:
        return self.weights[name].float()  # bf16 weights, fp32 arithmetic: so that logits can be compared closely

    def reduced(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]) * self.weight(name)

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [B, L] → logits [B, L, vocab], the same on all ranks."""
        table = self.weight("model.embed_tokens.weight")
        local = tokens - self.index * len(table)
        inside = (local >= 0) & (local < len(table))
        x = self.reduced(table[local.clamp(0, len(table) - 1)] * inside[..., None])
        heads, kv, size = CONFIG["num_attention_heads"] // self.tp, CONFIG["num_key_value_heads"] // self.tp, CONFIG["head_dim"]
        for layer in range(CONFIG["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            qkv = self.norm(x, at + "input_layernorm.weight") @ self.weight(at + "self_attn.qkv_proj.weight").T
            q, k, v = (part.unflatten(-1, (-1, size)) for part in qkv.split([heads * size, kv * size, kv * size], -1))
            q, k, v = (part.transpose(1, 2) for part in (self.rotated(q), self.rotated(k), v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
            x = x + self.reduced(mixed @ self.weight(at + "self_attn.o_proj.weight").T)
            gate, up = (self.norm(x, at + "post_attention_layernorm.weight") @ self.weight(at + "mlp.gate_up_proj.weight").T).chunk(2, -1)
            x = x + self.reduced((F.silu(gate) * up) @ self.weight(at + "mlp.down_proj.weight").T)
        part = self.norm(x, "model.norm.weight") @ self.weight("lm_head.weight").T
        parts = [torch.empty_like(part) for _ in range(self.tp)]
        dist.all_gather(parts, part, group=self.group)
        return torch.cat(parts, -1)[..., : CONFIG["vocab_size"]]

    def generate(self, prompts: torch.Tensor, seed: int) -> torch.Tensor:
        tokens, random = prompts, torch.Generator().manual_seed(seed)  # the same draw on every rank
        for _ in range(LENGTH):
            chances = self.logits(tokens)[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=random)], 1)
        return tokens


def make_trainer():
    """The model under FSDP2 on ranks 0-1, its fp32 masters as DTensors."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    mesh = DeviceMesh("cpu", list(TRAINERS))
    if dist.get_rank() not in TRAINERS:
        return None
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"}))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def learn(model, optimizer, samples: torch.Tensor, rewards: torch.Tensor) -> None:
    """One policy-gradient step on this rank's half of the samples, advantages relative to each prompt's group."""
    grouped = rewards.view(PROMPTS, GROUP)
    advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    mine = slice(dist.get_rank(), None, len(TRAINERS))
    logprobs = model(samples[mine]).logits[:, PROMPT_LENGTH - 1 : -1].log_softmax(-1)
    taken = logprobs.gather(-1, samples[mine, PROMPT_LENGTH:, None])[..., 0]
    (-(advantages[mine, None] * taken).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def reference(model, tokens: torch.Tensor) -> torch.Tensor:
    """The trainer's logits at its weights rounded to bf16: what the engine must compute after a sync."""
    from transformers import LlamaConfig, LlamaForCausalLM

    whole = {name: p.full_tensor().detach().bfloat16().float() for name, p in model.named_parameters()}
    plain = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"}))
    plain.load_state_dict(whole)
    with torch.no_grad():
        return plain(tokens).logits


def main(rank: int, port: int, steps: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=len(TRAINERS) + len(ENGINES))
    layout = sync.layout(CONFIG)
    src = sync.Side.sharded(layout, sync.fsdp(layout, dp=len(TRAINERS), ranks=TRAINERS), dtype="fp32")
    dst = sync.Side.placed(layout, "vllm", tp=len(ENGINES), ranks=ENGINES)
    plan = sync.plan(src, dst)
    weights = sync.Sync(plan, verify=True, transport="p2p")  # as between machines: bf16 on the wire
    engines = dist.new_group(ENGINES)
    model = make_trainer()
    engine = Engine(rank, engines, dst) if rank in ENGINES else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2) if model else None
    if rank == 0:
        print(plan.cost(1e9), "\n", flush=True)
    random = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        if model:
            weights.send(model.named_parameters(), version=step)
        else:
            stats = weights.recv(engine.weights, version=step)
        prompts = torch.randint(CONFIG["vocab_size"], (PROMPTS, PROMPT_LENGTH), generator=random).repeat_interleave(GROUP, 0)
        samples = engine.generate(prompts, step) if engine else torch.empty(PROMPTS * GROUP, PROMPT_LENGTH + LENGTH, dtype=torch.int64)
        dist.broadcast(samples, ENGINES[0])
        expected = reference(model, samples) if model else torch.empty(*samples.shape, CONFIG["vocab_size"])
        dist.broadcast(expected, 0)
        rewards = (samples[:, PROMPT_LENGTH:] < CONFIG["vocab_size"] // 2).float().mean(1)
        if engine:
            off = (engine.logits(samples) - expected).abs().max().item()
            assert off < 1e-3, f"the engine's logits are {off} off the trainer's"
        if engine and engine.first:
            print(
                f"step {step:2}  reward {rewards.mean():.3f}  received {stats.received:,} bytes  logits within {off:.1e} of the trainer's",
                flush=True,
            )
        if model:
            learn(model, optimizer, samples, rewards)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(main, args=(port, parser.parse_args().steps), nprocs=4, start_method="forkserver")
