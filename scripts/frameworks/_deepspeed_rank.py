"""Trains a tiny model for a step under DeepSpeed on CPU, and saves it: run by ``deepspeed.py``, once for each rank, in deepspeed's environment.

    python _deepspeed_rank.py RANK WORLD PORT CONFIG_JSON OUT SETTINGS_JSON

SETTINGS: stage, tp, freeze (names that contain it are not trained). Rank 0 writes beside the checkpoint what its model holds, gathered
by DeepSpeed itself, as expected.safetensors.
"""

import json
import os
import sys
from pathlib import Path

rank, world, port, config_file, out, settings = *map(int, sys.argv[1:4]), *sys.argv[4:]
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
               "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}  # fmt: skip

import torch  # noqa: E402

torch.set_num_threads(1)
import deepspeed  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

chosen = json.loads(settings)
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
torch.manual_seed(0)
config = AutoConfig.from_pretrained(Path(config_file).parent)
config._attn_implementation = "eager"
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
for name, parameter in model.named_parameters():
    parameter.requires_grad_(not (chosen.get("freeze") and chosen["freeze"] in name))
groups = [[p for n, p in model.named_parameters() if p.requires_grad and ("bias" in n or "norm" in n) == small] for small in (False, True)]
parameters = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.01, 0.0)) if group]
told = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": chosen["stage"], "stage3_param_persistence_threshold": 0, **chosen.get("zero", {})},
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    **({"tensor_parallel": {"autotp_size": chosen["tp"]}} if chosen.get("tp", 1) > 1 else {}),
}
if chosen.get("ep"):
    told["expert_parallel"] = {"enabled": True, "autoep_size": chosen["ep"], "preset_model": chosen["preset"]}
engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=told)
tokens = torch.arange(12).reshape(1, 12) % config.vocab_size
loss = engine(input_ids=tokens, labels=tokens).loss
engine.backward(loss)
engine.step()
engine.save_checkpoint(out, tag="global_step1")
if chosen["stage"] == 3:
    state = engine._zero3_consolidated_16bit_state_dict()
elif chosen.get("tp", 1) > 1:
    state = engine._replace_module_consolidated_state_dict()
else:
    state = engine.module.state_dict()
if rank == 0:
    save_file({name: value.contiguous().clone() for name, value in state.items()}, Path(out, "expected.safetensors"))
torch.distributed.barrier()
