"""What reshard does not read, called by its name, with the way to something that it does read. By names of files alone."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.stores.files import AnyPath

Names = set[str]


@dataclass(frozen=True)
class Kind:
    """A layout of files that is recognised and not read: what it is, and the way to one that is."""

    what: str
    way: str
    found: Callable[[Names], bool]


def _any(pattern: str) -> Callable[[Names], bool]:
    match = re.compile(pattern, re.ASCII).fullmatch
    return lambda names: any(map(match, names))


def _all(*wanted: str) -> Callable[[Names], bool]:
    tests = [_any(pattern) for pattern in wanted]
    return lambda names: all(test(names) for test in tests)


#: asked in this order, the more particular first
KINDS = (
    Kind(
        "a LoRA adapter without its weights",
        "copy it again, whole: adapter_model.safetensors stands beside adapter_config.json",
        _any(r"adapter_config\.json"),
    ),
    Kind(
        "a folder of GGUF files",
        "name the original Hugging Face checkpoint instead, or save what `AutoModelForCausalLM.from_pretrained(DIR, gguf_file=…)` opens",
        _any(r".*\.gguf"),
    ),
    Kind("a diffusers pipeline", "reshard moves language models; name a folder of one of those inside", _any(r"model_index\.json")),
    Kind(
        "a NeMo 2 checkpoint",
        "name the folder weights inside, with the model's config.json (--config)",
        _all("context", "weights"),
    ),
    Kind(
        "a NeMo checkpoint",
        "export it with NeMo's own export to Hugging Face, and name what that writes",
        _any(r".*\.nemo|model_weights|model_config\.yaml"),
    ),
    Kind(
        "a folder of TensorRT engines, which are programs for one kind of GPU",
        "name the checkpoint that they were built from",
        _any(r".*\.(?:engine|plan)"),
    ),
    Kind(
        "a TensorRT-LLM checkpoint",
        "name the Hugging Face checkpoint that it was converted from",
        _all(r"rank\d+\.safetensors", r"config\.json"),
    ),
    Kind(
        "a folder of Lightning checkpoints",
        "save the model's part of one, `torch.save(torch.load(FILE, weights_only=True)['state_dict'], 'DIR/pytorch_model.bin')`, and name DIR "
        "with its config.json",
        _any(r".*\.ckpt"),
    ),
    Kind(
        "an Orbax checkpoint of JAX",
        "export it to Hugging Face with the trainer's own script (MaxText: `to_huggingface`), and name what that writes",
        _any(r"manifest\.ocdbt|_CHECKPOINT_METADATA|ocdbt\.process_\d+"),
    ),
    Kind("an MLX model", "name the Hugging Face checkpoint that it was converted from", _any(r"weights(?:\.\d+)?\.npz")),
    Kind(
        "a repository in the Hub's cache",
        "name one of its snapshots, snapshots/COMMIT, or the repository as hf://ORG/NAME",
        _all("blobs", "snapshots"),
    ),
    Kind(
        "a TensorFlow, Flax or ONNX model",
        "save it with `AutoModelForCausalLM.from_pretrained(DIR, from_tf=True or from_flax=True).save_pretrained(OUT)`",
        _any(r"tf_model\.h5|flax_model.*\.msgpack|.*\.onnx"),
    ),
)
#: files that are checkpoints by themselves: by suffix, what one is and what to do
_FILES = {
    ".gguf": ("a GGUF file", "reshard reads folders of Hugging Face and engine checkpoints: name the original model's instead"),
    ".nemo": ("a NeMo archive", "export it with NeMo's own export to Hugging Face, and name what that writes"),
    ".ckpt": (
        "a Lightning checkpoint",
        "save its model alone, `torch.save(torch.load(FILE, weights_only=True)['state_dict'], 'DIR/pytorch_model.bin')`, and name DIR",
    ),
    ".engine": ("a TensorRT engine", "name the checkpoint that it was built from"),
    ".plan": ("a TensorRT engine", "name the checkpoint that it was built from"),
    ".onnx": ("an ONNX model", "name the checkpoint that it was exported from"),
    ".npz": ("an archive of numpy arrays", "name the checkpoint that it was made from"),
    ".h5": (
        "a TensorFlow model",
        "save it with `AutoModelForCausalLM.from_pretrained(DIR, from_tf=True).save_pretrained(OUT)`, and name OUT",
    ),
    ".msgpack": (
        "a Flax model",
        "save it with `AutoModelForCausalLM.from_pretrained(DIR, from_flax=True).save_pretrained(OUT)`, and name OUT",
    ),
    ".safetensors": ("a single file", "name the folder that holds it"),
    ".json": ("a single file", "name the folder that holds it"),
    ".distcp": ("one file of a torch DCP checkpoint", "name the folder that holds it and its .metadata"),
    ".pth": ("a single file", "as pytorch_model.bin in a folder with a config.json, reshard reads a state dict of Hugging Face names"),
    ".pt": ("a single file", "as pytorch_model.bin in a folder with a config.json, reshard reads a state dict of Hugging Face names"),
    ".bin": ("a single file", "name the folder that holds it"),
}
#: subfolders of one training run, by the number of their step
_STEP = re.compile(r"(?:checkpoint|step|global_step|iter|epoch|ckpt)[-_]?([0-9]{1,15})(?:_.*)?", re.ASCII)
_LISTED = 5
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def refuse_file(path: AnyPath) -> FormatError:
    """The error for a file where a folder is due."""
    what, way = _FILES.get(path.suffix.lower(), ("a file", "name the folder of a checkpoint"))
    return FormatError(f"{path} is not a folder but {what}", way)


def refuse_folder(folder: AnyPath, names: Names) -> FormatError:
    """The error for a folder that no format recognises: what it is, if that can be told, or what is in it."""
    kind = next((kind for kind in KINDS if kind.found(names)), None)
    if kind:
        return FormatError(f"{folder} is {kind.what}, which reshard does not read yet", kind.way)
    inside = {path.name: path for path in folder.iterdir() if path.is_dir()}
    steps = sorted((int(match[1]), len(name), name) for name in inside if (match := _STEP.fullmatch(name)))
    if steps:
        newest = steps[-1][0]
        name = min((length, name) for number, length, name in steps if number == newest)[1]
        what = f"holds {len(steps)} checkpoints of a run" if len(steps) > 1 else "holds a checkpoint of a run"
        return FormatError(
            f"{folder} {what}, in {', '.join(quote(n) for _, _, n in steps[-_LISTED:])}", f"name one of them; the newest is {folder / name}"
        )
    if "config.json" in names and not any(name.endswith(_WEIGHTS) for name in names):
        return FormatError(f"{folder} holds a config.json and no weights", "download the weights too, or name the folder that holds them")
    below = next((inside[name] for name in ("actor", "huggingface", "hf", "model", "weights", "policy") if name in inside), None)
    some = quote(", ".join(sorted(names)[:_LISTED])) or "nothing"
    return FormatError(
        f"{folder} holds no checkpoint that reshard knows (it holds {some})",
        f"is it in {below}?" if below else "say which with --from, or see `reshard convert --help`",
    )
