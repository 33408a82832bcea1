"""Tiny random models of the families in families.toml, made by transformers: what the engines are given to read.

Every number of them is random, norms and biases too: a tensor in the wrong place shows.
"""

import json
import re
import tomllib
from pathlib import Path

TABLE = Path(__file__).with_name("families.toml")


def families(path: Path = TABLE) -> dict[str, dict]:
    """{name: its table}, the config complete."""
    table = tomllib.loads(Path(path).read_text())
    sizes = table.pop("sizes")
    for name, family in table.items():
        own = family.get("config", {})
        base = {key: value for key, value in sizes.items() if key in family.get("keep", sizes)}
        if "text_config" in own:  # a wrapper: the sizes are the language model's
            own = {**own, "text_config": {**base, **own["text_config"]}}
            base = {"tie_word_embeddings": own["text_config"]["tie_word_embeddings"]}
        family["config"] = {"model_type": name, **base, **own}
    return table


def make(config: dict, folder: Path, *, seed: int = 0, dtype: str = "bfloat16"):
    """A model of random weights, saved to `folder` as transformers publishes it; the model. Of `config`, `class` names transformers'
    class where it has several, `published` are keys that the published config.json has beside transformers' own, those in `unpublished` are not; `rename`
    are pairs of a pattern and what takes its place in the published names, `turned` a pattern of those that are published with the last two
    dimensions exchanged."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = dict(config)
    own, published, unpublished = settings.pop("class", None), settings.pop("published", {}), settings.pop("unpublished", [])
    rename, turned = settings.pop("rename", []), settings.pop("turned", None)
    bound = AutoConfig.for_model(settings.pop("model_type"), **settings)
    if own:
        model = getattr(transformers, own)._from_config(bound, dtype=getattr(torch, dtype))
    else:
        try:
            model = AutoModelForCausalLM.from_config(bound, dtype=getattr(torch, dtype))
        except ValueError:  # a wrapper of several modalities
            from transformers import AutoModelForImageTextToText

            model = AutoModelForImageTextToText.from_config(bound, dtype=getattr(torch, dtype))
    randomise(model)
    model.eval().save_pretrained(folder)
    as_published(folder, published, unpublished, rename, turned)
    return model


def as_published(folder: Path, keys: dict, without: list, rename: list, turned: str | None) -> None:
    """Give the files in `folder` the names, and config.json the keys, that the published ones have."""
    from safetensors.torch import load_file, save_file

    path = folder / "config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | keys).items() if key not in without}
    path.write_text(json.dumps(config))
    for file in folder.glob("*.safetensors") if rename or turned else ():
        tensors = {
            name: tensor.transpose(-1, -2).contiguous() if turned and re.fullmatch(turned, name) else tensor
            for name, tensor in load_file(file).items()
        }
        for pattern, name in rename:
            tensors = {re.sub(pattern, name, key): tensor for key, tensor in tensors.items()}
        save_file(tensors, file, metadata={"format": "pt"})


def randomise(model) -> None:
    """Fill every parameter, and every floating buffer that is saved, with numbers of its own."""
    import torch

    saved = model.state_dict().keys()
    buffers = [(name, tensor) for name, tensor in model.named_buffers() if name in saved and tensor.is_floating_point()]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            std, mean = (0.15, 0) if tensor.dim() > 1 else (0.05, float("norm" in name and name.endswith("weight")))
            tensor.copy_(torch.randn(tensor.shape) * std + mean)


def exchange(source: Path, folder: Path) -> tuple[str, str] | None:
    """A copy of the checkpoint in which two tensors of one shape and of other content have changed places; their names."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True)
    files = {path.name: load_file(path) for path in sorted(source.glob("*.safetensors"))}
    where = {name: file for file, tensors in files.items() for name in tensors}
    pair = exchangeable({name: files[file][name] for name, file in where.items()})
    if pair is None:
        return None
    a, b = pair
    one, other = files[where[a]][a], files[where[b]][b]
    files[where[a]][a], files[where[b]][b] = other, one
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    return pair


def exchangeable(tensors: dict) -> tuple[str, str] | None:
    """Two tensors that could be taken for each other: k and v, gate and up, or any two of one shape in one layer."""
    import torch

    likely = (("k_proj.weight", "v_proj.weight"), ("gate_proj.weight", "up_proj.weight"), ("w1.weight", "w3.weight"))
    for one, other in likely:
        for name in tensors:
            twin = name.removesuffix(one) + other
            if name.endswith(one) and twin in tensors and tensors[name].shape == tensors[twin].shape:
                return name, twin
    names = sorted(tensors, key=lambda name: (-tensors[name].dim(), name))
    for i, name in enumerate(names):
        for twin in names[i + 1 :]:
            a, b = tensors[name], tensors[twin]
            if a.shape == b.shape and a.dtype == b.dtype and not torch.equal(a, b):
                return name, twin
    return None


def native(folder: Path) -> dict:
    """config.json of a checkpoint."""
    return json.loads((folder / "config.json").read_text())
