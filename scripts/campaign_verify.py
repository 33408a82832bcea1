"""Plant defects in sound checkpoints, one at a time, and see whether `reshard verify` finds each: shards, config.json, Megatron's args.

    python scripts/campaign_verify.py [--runs N] [--only KIND] [--seed S]

Ranks are real processes that stay between cases. Prints a table of planted, found and missed, every miss with the reason why
neither a longer prompt nor a comparison of settings could find it, and harmless changes that failed. Exit code 1: a miss without
such a reason, or a false alarm. Needs the test suite beside it (its planters) and the sample checkpoints in ../shared.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from shutil import copytree, rmtree
from tempfile import mkdtemp

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import ranks
import test_verify_defects as planters

import reshard
from reshard.formats.megatron_compare import SIZES, VALUES
from reshard.verify.report import Report
from reshard.verify.settings import HARMLESS

SAMPLES = ROOT.parent / "shared/samples/hf"
#: fields whose value these models never use, so that no engine computes otherwise: (kind, family or *, field) → why
EXPLAINED = {
    ("config.json", family, "sliding_window"): "use_sliding_window is off, and neither transformers nor vLLM reads the window then"
    for family in ("qwen2", "qwen3", "qwen3_moe")
}


@dataclass(frozen=True)
class Case:
    """`plant` makes a folder from a sound one, or raises Nothing; `harmless` changes must pass, all others must not; `unread` is why
    this one changes nothing that is computed."""

    kind: str
    family: str
    name: str
    plant: Callable[[Path], None]
    sound: tuple[str, tuple] = ("tp", (("tp", 2),))  # format and mesh
    harmless: bool = False
    unread: str = ""


class Nothing(Exception):
    """The change changed nothing: there is no defect to find."""


# --- shards ---


def _rewritten(change: Callable) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        if not planters.rewrite(folder, change):
            raise Nothing

    return plant


def listed_defects() -> list[Case]:
    return [Case("shards, listed", d.family, d.name, _rewritten(d.change), (d.format, tuple(d.mesh.items()))) for d in planters.DEFECTS]


#: ways to break any tensor; in its first rows, for the last of a vocabulary may be padding
BREAKS: dict[str, Callable] = {
    "zeroed": torch.zeros_like,
    "negated": lambda x: -x,
    "off by a hundredth": lambda x: 1.01 * x,
    "rows rolled": lambda x: x.roll(1, 0),
    "one row zeroed": lambda x: x.index_fill(0, torch.tensor([min(1, len(x) - 1)]), 0),
    "last dimension reversed": lambda x: x.flip(-1),
    "one element set to 1": lambda x: x.flatten().index_fill(0, torch.tensor([1]), 1.0).view(x.shape),
}
PLACES = [
    (family, format, mesh)
    for family, formats in {
        "llama": ("tp", "vllm", "megatron"),
        "llama-tied": ("tp", "vllm"),
        "llama-oddvocab": ("megatron",),
        "qwen2": ("vllm", "megatron"),
        "qwen3": ("sglang",),
        "phi3": ("vllm", "rank-pt"),
        "gpt_neox": ("tp",),
        "gpt_oss": ("vllm", "megatron"),
        "qwen3_moe": ("vllm", "megatron"),
        "mixtral": ("tp",),
        "deepseek_v3": ("vllm", "megatron"),
    }.items()
    for format in formats
    for mesh in ((("tp", 2),), (("tp", 2), ("pp", 2)))
    if format == "megatron" or mesh == (("tp", 2),)
]


def random_defects(count: int, rng: random.Random) -> list[Case]:
    """A random tensor of a random rank, broken in a random way."""
    cases = []
    for number in range(count):
        family, format, mesh = rng.choice(PLACES)
        way, seed = rng.choice(list(BREAKS)), rng.randrange(10**9)

        def change(states, way=way, seed=seed):
            rng = random.Random(seed)
            state = rng.choice(states)
            weights = sorted(
                name
                for name, x in state.items()
                if torch.is_tensor(x) and x.is_floating_point() and x.numel() > 1 and not name.endswith(IGNORED)
            )
            name = rng.choice(weights)
            state[name] = BREAKS[way](state[name]).to(state[name].dtype).contiguous()

        cases.append(
            Case("shards, random", family, f"#{number} {format}: a tensor {way} (seed {seed})", _rewritten(change), (format, mesh))
        )
    return cases


IGNORED = ("_scale", "inv_freq", "_extra_state")


def idle_experts(count: int, rng: random.Random) -> list[Case]:
    """One of 128 experts zeroed, whether a token goes to it or not."""
    cases = []
    for expert in rng.sample(range(128), count):
        layer = rng.randrange(2)

        def change(states, layer=layer, expert=expert):
            for state in states:
                next(x for name, x in state.items() if f"layers.{layer}." in name and name.endswith("w2_weight"))[expert] = 0

        cases.append(
            Case("shards, idle experts", MANY, f"expert {expert} of layer {layer} zeroed", _rewritten(change), ("vllm", (("tp", 2),)))
        )
    return cases


MANY = "128 experts"


@cache
def scratch() -> Path:
    return Path(mkdtemp(prefix="campaign-verify-"))


@cache
def original(family: str) -> Path:
    if family != MANY:
        return SAMPLES / family
    import test_verify_direct

    return test_verify_direct.many_experts()


@cache
def sound(family: str, format: str, mesh: tuple) -> Path:
    """A converted checkpoint that passes."""
    folder = scratch() / "-".join([family.replace(" ", "-"), format, *map(str, sum(mesh, ()))])
    reshard.convert(original(family), folder, format=format, fsync=False, **dict(mesh))
    planters.rewrite(folder, lambda states: None)
    report = ranks.verify(folder, original(family))
    if not (isinstance(report, Report) and report.passed):
        raise SystemExit(f"{folder} is sound, and verify says: {report.verdict() if isinstance(report, Report) else report}")
    return folder


# --- settings ---


def otherwise(name: str, value: object) -> list:
    """Wrong values for a field that has `value`."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2] if value else [1]
    if isinstance(value, float):
        return [value * 1.5 if value else 0.5]
    if isinstance(value, str):
        return [{"silu": "gelu", "float32": "bfloat16", "bfloat16": "float32"}.get(value, f"{value}x")]
    if isinstance(value, list):
        return [value[::-1]] if value != value[::-1] else [[*value, value[0]]] if value else []
    return [64] if name == "sliding_window" else []


def config_cases() -> list[Case]:
    """Every field of every family's config.json with another value; fields of HARMLESS must pass."""
    cases = []
    for family in ("llama", "llama-tied", "qwen2", "qwen3", "phi3", "gpt_neox", "gpt_oss", "qwen3_moe", "mixtral", "deepseek_v3"):
        config = json.loads((SAMPLES / family / "config.json").read_text())
        fields = [(name, new) for name, value in config.items() for new in otherwise(name, value)]
        fields += [
            (f"{table}.{name}", new)
            for table, values in config.items()
            if isinstance(values, dict)
            for name, value in values.items()
            for new in otherwise(name, value)[:1]
        ]
        fields += [("scoring_func", "tanh"), ("quantization_config", {"quant_method": "fp8"})]
        for field, new in fields:
            leaf = field.rpartition(".")[2]
            cases.append(
                Case(
                    "config.json, harmless" if leaf in HARMLESS else "config.json",
                    family,
                    f"{field} = {new!r}",
                    _config(field, new),
                    ("tp" if family == "gpt_neox" else "vllm", (("tp", 2),)),
                    leaf in HARMLESS,
                )
            )
    return cases


def _config(field: str, value: object) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        table, _, leaf = field.rpartition(".")
        place = config[table] if table else config
        if place.get(leaf) == value:
            raise Nothing
        place[leaf] = value
        (folder / "config.json").write_text(json.dumps(config))

    return plant


def args_cases() -> list[Case]:
    """Every field of Megatron's args that says something of the model, with another value; fields of training must pass."""
    cases = []
    harmless = {
        "seq_length": 17,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "tokenizer_type": "NullTokenizer",
        "bf16": False,
        "iteration": 9,
    }
    for family in ("llama", "qwen2", "gpt_oss", "qwen3_moe", "deepseek_v3", "mixtral"):
        file = next(sound(family, "megatron", (("tp", 2),)).glob("release/*/*.pt"))
        args = vars(torch.load(file, weights_only=False)["args"])
        for field in (*VALUES, *SIZES):
            for new in otherwise(field, args.get(field))[:1]:
                cases.append(
                    Case("args", family, f"{field} = {new!r}", _args({field: new}), ("megatron", (("tp", 2),)), False, unread(field, args))
                )
        cases.append(Case("args", family, "rotary_base of one rank", _args({"rotary_base": 777}, 1), ("megatron", (("tp", 2),))))
        for field, new in harmless.items():
            cases.append(Case("args, harmless", family, f"{field} = {new!r}", _args({field: new}), ("megatron", (("tp", 2),)), True))
    return cases


def _args(change: dict, only: int | None = None) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        for number, file in enumerate(sorted(folder.glob("release/*/*.pt"))):
            if only in (None, number):
                blob = torch.load(file, weights_only=False)
                vars(blob["args"]).update(change)
                torch.save(blob, file)
        (folder / "reshard.json").unlink()

    return plant


YARN = ("rotary_scaling_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings", "beta_fast", "beta_slow")
LATENT = ("rope_type", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")


def unread(field: str, args: dict) -> str:
    """Why Megatron does not read `field` of a model of these args, which then no comparison of two models need see; or nothing."""
    latent, experts = args.get("multi_latent_attention"), args.get("num_experts")
    yarn = "yarn" in (args.get("position_embedding_type"), args.get("rope_type"))
    groups = (args.get("moe_router_num_groups") or 1) > 1
    cases = (
        (field == "layernorm_epsilon", "arguments.py fills it from norm_epsilon, which is compared"),
        (not experts and field.startswith("moe_"), "the model has no experts"),
        (not yarn and (field in YARN or field.startswith("yarn_")), "the model does not scale by YaRN, which alone reads it"),
        (not latent and field in LATENT, "the model has no latent attention, which alone reads it"),
        (latent and field in ("num_query_groups", "kv_channels"), "latent attention has sizes of its own"),
        (not args.get("use_rope_scaling") and field == "rope_scaling_factor", "use_rope_scaling is off, which alone reads it"),
        (
            not args.get("quick_geglu") and field in ("glu_linear_offset", "activation_func_clamp_value"),
            "quick_geglu is off, which alone reads it",
        ),
        (not args.get("window_size") and field == "window_attn_skip_freq", "the model has no window"),
        (not groups and field == "moe_router_group_topk", "the router has no groups of experts"),
        (args.get("moe_router_score_function") == "sigmoid" and field == "moe_router_pre_softmax", "the router has no softmax"),
        (experts and field == "ffn_hidden_size" and args.get("moe_layer_freq") in (1, [1] * args["num_layers"]), "no layer is dense"),
    )
    return next((why for holds, why in cases if holds), "")


def reason(case: Case) -> str:
    """Why a miss can't be found, or nothing."""
    field = case.name.split(" = ")[0]
    return case.unread or EXPLAINED.get((case.kind, case.family, field), "")


def harmless_shards() -> list[Case]:
    """Other bits, the same function."""
    a, m, between, whole = planters.A, planters.L + "mlp.", planters.between, planters.whole
    twice = planters.both(planters.each(a + "v_proj.weight", lambda x: 2 * x), planters.each(a + "o_proj.weight", lambda x: x / 2))
    pad = whole("embedding.word_embeddings.weight", 0, lambda x: torch.cat([x[:259], torch.full_like(x[259:], 9.0)]))
    table = [
        ("llama", "tp", "heads of two ranks exchanged everywhere", between(*(a + f"{name}_proj.weight" for name in "qkvo"))),
        ("llama", "vllm", "ffn columns of two ranks exchanged everywhere", between(m + "gate_up_proj.weight", m + "down_proj.weight")),
        ("llama", "tp", "values twice, outputs half", twice),
        ("mixtral", "tp", "experts with their router's rows", planters.experts_and_router),
        ("llama-oddvocab", "megatron", "padding of the embedding", pad),
    ]
    return [
        Case("shards, harmless", family, name, _rewritten(change), (format, (("tp", 2),)), True) for family, format, name, change in table
    ]


# --- running ---


def run(case: Case) -> str:
    """found, missed, passed, false alarm, or nothing where the change changed nothing."""
    good = sound(case.family, *case.sound)
    folder = scratch() / "case"
    rmtree(folder, ignore_errors=True)
    copytree(good, folder)
    try:
        case.plant(folder)
    except Nothing:
        return "nothing"
    outcome = ranks.verify(folder, original(case.family))
    if isinstance(outcome, ranks.Crash):
        return f"crashed: {outcome.text}"
    passed = isinstance(outcome, Report) and outcome.passed
    if case.harmless:
        return "passed" if passed else f"false alarm: {outcome.verdict() if isinstance(outcome, Report) else outcome}"
    if isinstance(outcome, Report) and not passed and outcome.verdict().startswith("INCONCLUSIVE"):
        return "inconclusive"
    return "missed" if passed else "found"


def chosen(kinds: dict[str, list[Case]], runs: int | None, rng: random.Random) -> list[Case]:
    """All cases, or `runs` of them, of every kind its share."""
    every = [case for cases in kinds.values() for case in cases]
    if runs is None or runs >= len(every):
        return every
    out = []
    for cases in kinds.values():
        share = max(1, round(runs * len(cases) / len(every)))
        out += rng.sample(cases, min(share, len(cases)))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, help="cases to run, of every kind its share (default: all)")
    parser.add_argument("--only", help="kinds whose name begins so: shards, config.json, args")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, start = random.Random(options.seed), time.monotonic()
    makers = (listed_defects, lambda: random_defects(80, rng), lambda: idle_experts(12, rng), config_cases, args_cases, harmless_shards)
    kinds: dict[str, list[Case]] = defaultdict(list)
    for case in (case for make in makers for case in make()):
        if not options.only or case.kind.startswith(options.only):
            kinds[case.kind].append(case)
    cases = chosen(kinds, options.runs, rng)
    counts: dict[str, Counter] = defaultdict(Counter)
    bad = 0
    for number, case in enumerate(cases):
        outcome = run(case)
        counts[case.kind][outcome.split(":")[0]] += 1
        if outcome in ("found", "passed", "nothing"):
            continue
        why = reason(case) if outcome == "missed" else ""
        bad += not why
        print(f"{outcome}: {case.kind}, {case.family}: {case.name}: {why or 'NOT EXPLAINED'}", flush=True)
        if why:
            counts[case.kind]["explained"] += 1
        if number % 50 == 49:
            print(f"{number + 1} of {len(cases)}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"\n{'kind':24}{'planted':>9}{'found':>8}{'missed':>8}{'of these explained':>20}   harmless that passed / failed")
    for kind, count in counts.items():
        ran = sum(count[name] for name in ("found", "missed", "inconclusive", "crashed"))
        print(
            f"{kind:24}{ran:9}{count['found']:8}{ran - count['found']:8}{count['explained']:20}   "
            f"{count['passed']} / {count['false alarm']}"
        )
    total = sum(sum(count[name] for name in ("found", "missed", "inconclusive", "crashed")) for count in counts.values())
    print(
        f"{total} defects planted, {sum(count['found'] for count in counts.values())} found; "
        f"seed {options.seed}, {time.monotonic() - start:.0f} s"
    )
    rmtree(scratch(), ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
