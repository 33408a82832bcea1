"""The schemes' own libraries are the judge: weights by compressed-tensors, shards by vLLM's loader.

    python scripts/check_quantised.py                      every case
    python scripts/check_quantised.py --case awq --no-vllm

Run it with the Python of an environment that has vLLM (which brings compressed-tensors); reshard is taken from this checkout. Each case is
a tiny Llama of tests/quantised_cases.py in one scheme. compressed-tensors' converters dequantise it, tensor by tensor; vLLM's classes are
built for two ranks on the CPU and filled by vLLM's loader, and names, dtypes, shapes and bytes of every rank must be those that
``reshard.convert`` writes. A control beside each: one scale halved, which must be seen. What vLLM cannot build here is told with its reason.

Exit status: 0 when all that was built is equal and every control was found.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
SAMPLES = HERE.parent.parent / "shared/samples"
#: models of the samples, beside the cases: as they are, or quantised by reshard
GENUINE = {"llama fp8": ("vllm/hf/llama-fp8", None), "deepseek fp8, dequantised": ("hf/deepseek_v3-fp8", None),
           "gpt-oss mxfp4": ("hf/gpt_oss-mxfp4", None), "deepseek, --quantise": ("vllm/hf/deepseek-v3", "fp8"),
           "qwen3-moe, --quantise": ("vllm/hf/qwen3-moe", "fp8")}  # fmt: skip

from engines_common import EQUAL, NOT_BUILT, differences, forked  # noqa: E402


def make(case: str, folder: Path) -> Path:
    if case in GENUINE:
        import reshard

        sample, recipe = GENUINE[case]
        reshard.convert(SAMPLES / sample, folder / "hf", format="hf", quantise=recipe, fsync=False)
        if "gpt-oss" in case:  # vLLM's class wants a rope of the published kind
            config = json.loads((folder / "hf/config.json").read_text())
            config["rope_parameters"] = json.loads((SAMPLES / "vllm/hf/gpt-oss/config.json").read_text())["rope_parameters"]
            (folder / "hf/config.json").write_text(json.dumps(config))
        return folder / "hf"
    import quantised_cases

    quantised_cases.write(folder / "hf", case)
    return folder / "hf"


def damaged(source: Path, folder: Path) -> Path:
    """The checkpoint with one scale halved (or, of one byte, another)."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        state = load_file(path)
        name = next((n for n in sorted(state) if "layers" in n and n.endswith(("_scale", "_scale_inv", ".scales", "_scales"))), None)
        if name:
            raw = state[name].clone().reshape(-1)
            raw.view(torch.uint8)[raw.element_size() - 1] ^= 1
            state[name] = raw.view(state[name].shape)
        save_file(state, folder / path.name, {"format": "pt"})
    return folder


def library(source: Path, folder: Path) -> dict | None:
    """The differences of reshard's weights from compressed-tensors'; None where that has no converter."""
    import torch
    from safetensors.torch import load_file

    import reshard

    config = json.loads((source / "config.json").read_text())["quantization_config"]
    state = {n: t for path in sorted(source.glob("*.safetensors")) for n, t in load_file(path).items()}
    if config["quant_method"] == "compressed-tensors":
        from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import CompressedTensorsDequantizer

        converter = CompressedTensorsDequantizer(str(source), ignore=["re:.*embed_tokens", "re:.*norm"])
    elif config["quant_method"] == "fp8" and config.get("weight_block_size"):
        from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer

        converter = FP8BlockDequantizer(targets=["re:.*_proj$", "re:.*_mqa$"], weight_block_size=tuple(config["weight_block_size"]))
    else:
        return None
    theirs = {name: t.to(torch.bfloat16) for name, t in converter.process(dict(state)).items() if not name.endswith("input_scale")}
    reshard.convert(source, folder / "plain", format="hf", dequantise=True, dtype="bf16", fsync=False)
    mine = {n: t for path in sorted((folder / "plain").glob("*.safetensors")) for n, t in load_file(path).items()}
    return {"lines": differences({name: t for name, t in theirs.items() if "global_scale" not in name}, mine), "tensors": len(mine)}


def convert(source: Path, out: Path, tp: int) -> None:
    import engines_vllm

    import reshard

    reshard.convert(source, out, format="vllm", tp=tp, fsync=False, **engines_vllm.options())


class Kernel:
    """In the place of a kernel that this machine's processor has none of: layers are registered and filled all the same."""

    def __init__(self, *args, **more):
        pass

    def input_quant_key(self):
        return None


def without_kernels() -> None:
    import importlib

    from vllm.model_executor.kernels import linear

    def chooser(real):
        def chosen(*args, **more):
            try:
                return real(*args, **more)
            except ValueError:
                return Kernel

        return chosen

    for name in ("choose_scaled_mm_linear_kernel", "choose_mp_linear_kernel"):
        setattr(linear, name, chooser(getattr(linear, name)))
    at = "vllm.model_executor.layers.quantization"
    for module in ("compressed_tensors.compressed_tensors", "modelopt"):
        importlib.import_module(f"{at}.{module}")
    for name in ("init_mxfp8_linear_kernel", "init_mxfp4_linear_kernel", "init_nvfp4_linear_kernel"):
        for module in [each for each in sys.modules.values() if (each.__name__ or "").startswith("vllm.") and hasattr(each, name)]:
            setattr(module, name, Kernel)


def rank(source: Path, folder: Path, tp: int, number: int, work: Path) -> dict:
    import engines_vllm
    import torch
    from engines_common import NotBuilt

    without_kernels()
    dtype = json.loads((source / "config.json").read_text()).get("dtype") or "bfloat16"
    try:
        state, before = engines_vllm.loaded(source, {"tp": tp}, number, tp, work, dtype=dtype)
    except Exception as error:  # noqa: BLE001  whatever vLLM cannot do here is told
        raise NotBuilt(engines_vllm.reason(error)) from error
    mesh = {"tp": tp}
    files, narrower = engines_vllm.read(folder, "hf", mesh, 0, number), []
    for name, tensor in files.items():  # vLLM's loader of such shards fills the front of what is larger, which is zero
        own = state.get(name)
        if (
            own is not None
            and own.dim() == tensor.dim()
            and own.shape != tensor.shape
            and all(a >= b for a, b in zip(own.shape, tensor.shape))
        ):
            files[name] = torch.zeros_like(own)
            files[name][tuple(slice(0, size) for size in tensor.shape)] = tensor
            narrower.append(name)
    found = differences(state, files, before)
    control = differences(state, engines_vllm.read(folder, "control", mesh, 0, number))
    return {"lines": found, "control": len(control) > len(found), "tensors": len(state), "narrower": len(narrower)}


def main() -> int:
    import quantised_cases
    from engines_common import label

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--no-vllm", action="store_true")
    args = parser.parse_args()
    if not args.no_vllm:
        import engines_vllm

        engines_vllm.warm()
    bad = 0
    for case in args.case or [*quantised_cases.SCHEMES, *GENUINE]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            source = make(case, folder)
            answer, error = forked(library, source, folder)()
            text = f"compressed-tensors: {error[1].strip().splitlines()[-1]}" if error else ""
            if answer:
                text = f"compressed-tensors: {'equal' if not answer['lines'] else answer['lines'][:3]} ({answer['tensors']} tensors)"
            bad += bool(error or (answer and answer["lines"]))
            print(f"{case:<26} {text or 'compressed-tensors has no converter'}", flush=True)
            if args.no_vllm:
                continue
            control = damaged(source, folder / "damaged")
            for tp in (1, 2):
                out = {name: folder / f"{name}-{label({'tp': tp})}" for name in ("hf", "control")}
                errors = [
                    error for name, at in (("hf", source), ("control", control)) if (error := forked(convert, at, out[name], tp)()[1])
                ]
                if errors:
                    print(f"{'':<26} vLLM tp{tp}: not converted: {errors[0][1].strip().splitlines()[-1][:300]}", flush=True)
                    bad += 1
                    continue
                work = folder / f"group{tp}"
                work.mkdir()
                answers = [wait() for wait in [forked(rank, source, folder, tp, number, work) for number in range(tp)]]
                failed = next((error for _, error in answers if error), None)
                if failed:
                    print(f"{'':<26} vLLM tp{tp}: {failed[0]}: {failed[1].strip().splitlines()[-1][:400]}", flush=True)
                    bad += failed[0] != NOT_BUILT
                    continue
                lines = [f"rank {i}: {line}" for i, (rank_, _) in enumerate(answers) for line in rank_["lines"]]
                seen = any(rank_["control"] for rank_, _ in answers)
                total = sum(rank_["tensors"] for rank_, _ in answers)
                narrower = sum(rank_["narrower"] for rank_, _ in answers)
                total = f"{total} tensors" + (f", {narrower} of which the engine has wider, zero behind" if narrower else "")
                print(f"{'':<26} vLLM tp{tp}: {EQUAL if not lines else 'DIFFERS'} ({total}), control {'seen' if seen else 'MISSED'}")
                print("".join(f"{'':<28} {line}\n" for line in lines[:12]), end="", flush=True)
                bad += bool(lines) or not seen
    print(f"{bad} at fault")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
