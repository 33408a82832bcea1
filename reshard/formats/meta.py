"""``meta``: Meta's own files, ``consolidated.NN.pth`` for each model-parallel rank beside ``params.json``; ``mistral``: Mistral's, whole.

Both have the same modules, whose heads are rotated by pairs of neighbours: the descriptors' table ``meta``. Llama 1 and 2 cut the embedding's
columns, Llama 3 its rows: releases 2.0 and 3.0 of Meta's code. With more ranks than key/value heads each head is on several.
Sources: llama-models ``llama3/model.py``, ``args.py``; mistral-inference ``args.py``.
"""

import json
import re
from collections.abc import Mapping
from math import gcd

from reshard.dtypes import TABLE
from reshard.errors import FormatError, LayoutError, PlanError
from reshard.foreign import quote
from reshard.formats import Contents, Folder, Format, OutFile, Target
from reshard.formats.hf import state_dict
from reshard.formats.manifest import read_manifest
from reshard.formats.pieces import Piece, pieces_of
from reshard.geometry.block import Stored
from reshard.layout import Layout, Mesh, Rank, Rules
from reshard.layout.mesh import even_stages, grid
from reshard.stores import safetensors
from reshard.stores.files import AnyPath, read_json, safe_join

_FILE = re.compile(r"consolidated\.([0-9]{2,4})\.pth")
_WHOLE = re.compile(r"consolidated(?:-[0-9]{5}-of-[0-9]{5})?\.safetensors")
_INDEX = "consolidated.safetensors.index.json"
PARAMS = "params.json"
#: a key of params.json and the one of config.json that says the same
KEYS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "hidden_dim": "intermediate_size", "vocab_size": "vocab_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
    "sliding_window": "sliding_window", "max_position_embeddings": "max_position_embeddings", "tied_embeddings": "tie_word_embeddings",
}  # fmt: skip
#: those that Meta's code reads; the rest are Mistral's
_METAS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")
_ROPE = 10000.0  # Meta's, where params.json does not tell
#: what llama-models scales by, whatever params.json says
_SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_NAME_CONFIG = "name the config.json of the same model with --config FILE|DIR"


def _recognise(folder: AnyPath, names: set[str]) -> bool:
    return any(_FILE.fullmatch(name) for name in names)


def _params(folder: AnyPath) -> dict[str, object]:
    """What params.json says; nothing where there is none. Later files of Meta's nest the model's numbers under ``model``."""
    path = folder / PARAMS
    table = read_json(path) if path.is_file() else {}
    table = table.get("model", table) if isinstance(table, dict) else table
    if not isinstance(table, dict):
        raise FormatError(f"{path} holds a {type(table).__name__}, expected an object")
    return table


def _files(folder: AnyPath) -> list[str]:
    found = sorted((int(match[1]), path.name) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name)))
    if not found:
        raise FormatError(f"{folder} holds no consolidated.NN.pth")
    missing = sorted(set(range(found[-1][0] + 1)) - {rank for rank, _ in found})
    if missing or len(found) > found[-1][0] + 1:
        text = ", ".join(f"consolidated.{rank:02d}.pth" for rank in missing[:8]) or "none, but one rank has two"
        raise FormatError(
            f"{folder} holds {len(found)} consolidated.NN.pth of ranks 0 to {found[-1][0]}; missing: {text}", "copy the folder again, whole"
        )
    return [name for _, name in found]


def _read(folder: AnyPath) -> Contents:
    files, manifest = _files(folder), read_manifest(folder)
    pieces = [piece for rank, name in enumerate(files) for piece in pieces_of(name, state_dict(folder / name), rank)]
    first = {piece.name: (piece.dtype, piece.shape) for piece in pieces if piece.rank == 0}
    for rank, name in enumerate(files[1:], 1):
        own = {piece.name: (piece.dtype, piece.shape) for piece in pieces if piece.rank == rank}
        odd = next((each for each in sorted(own.keys() | first.keys()) if own.get(each) != first.get(each)), None)
        if odd:
            raise FormatError(f"{folder}: {quote(odd)} is {_said(first.get(odd))} in {files[0]}, {_said(own.get(odd))} in {name}",
                              "all ranks have alike parts of every tensor: files of several checkpoints were mixed")  # fmt: skip
    return Contents(Mesh(len(files)), pieces, manifest and manifest.get("layout"), settings={PARAMS: _params(folder)},
                    writer="reshard" if manifest else "Meta, or who has its layout")  # fmt: skip


def _said(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{tensor[0]} {list(tensor[1])}" if tensor else "missing"


def _disagreements(layout: Layout, contents: Contents) -> list[str]:
    """Numbers of params.json that config.json has otherwise: by equal products rows would be mixed up unseen."""
    params, config = contents.settings[PARAMS], layout.scope
    out = []
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim"):
        told, ours = params.get(key), config.get(KEYS[key])
        if key == "n_kv_heads" and type(told) is int and type(ours) is int and told == contents.mesh.tp > ours:
            continue  # repeated: a head for each rank
        if told is not None and ours is not None and told != ours:
            out.append(f"{PARAMS} says {key} {quote(told)}, config.json {KEYS[key]} {quote(ours)}")
    return out


def _config(folder: AnyPath) -> dict[str, object]:
    """A config.json of what params.json and the first rank's shapes tell."""
    files = _files(folder)
    held = state_dict(folder / files[0])
    shapes, params = {name: at.shape for name, at in held.items()}, _params(folder)
    rows = {"hidden_dim": "layers.0.feed_forward.w1.weight", "vocab_size": "output.weight"}
    for key, name in rows.items():
        if (
            key == "hidden_dim" or not isinstance(params.get(key), int) or params[key] == -1
        ):  # Llama 2 leaves the vocabulary to its tokenizer
            if len(shapes.get(name, ())) != 2:
                raise FormatError(f"{folder / files[0]} holds no matrix {name}, by which to know {KEYS[key]}", _NAME_CONFIG)
            params = params | {key: shapes[name][0] * len(files)}
    heads, kv = params.get("n_heads"), params.get("n_kv_heads") or params.get("n_heads")
    if type(heads) is not int or type(kv) is not int or heads < 1 or type(params.get("dim")) is not int:
        raise FormatError(f"{folder / PARAMS} does not tell dim and n_heads", _NAME_CONFIG)
    out = made(
        params | {"n_kv_heads": kv, "rope_theta": params.get("rope_theta", _ROPE)},
        "LlamaForCausalLM",
        "llama",
        next(iter(held.values())).dtype,
    )
    if params.get("use_scaled_rope"):
        factor = params.get("rope_scaling_factor")
        if not isinstance(factor, (int, float)) or factor <= 0:
            raise FormatError(
                f"{folder / PARAMS} has use_scaled_rope, and not by which factor: 8 in Llama 3.1, 32 in the small 3.2", _NAME_CONFIG
            )
        out["rope_scaling"] = _SCALED | {"factor": float(factor)}
    return out


def made(params: Mapping[str, object], architecture: str, kind: str, dtype: str) -> dict[str, object]:
    """A config.json of the numbers of a params.json, of a model whose tensors are of `dtype`."""
    table = {ours: params[key] for key, ours in KEYS.items() if params.get(key) is not None}
    return {"architectures": [architecture], "model_type": kind, "dtype": TABLE[dtype].torch, "tie_word_embeddings": False, **table}


def _write(target: Target, stored: list[Stored]) -> Folder:
    from reshard.stores import torchzip

    files, pieces = [], []
    params = _params_of(target)
    for rank, own in target.by_rank(stored):
        image = torchzip.compose({s.name: torchzip.TensorSpec(s.name, s.dtype, s.shape) for s in own.values()})
        files.append(OutFile(f"consolidated.{rank.number:02d}.pth", image, rank.number))
        pieces += pieces_of(files[-1].path, image.tensors, rank.number)
    return Folder(files, pieces, {PARAMS: (json.dumps(params, indent=1) + "\n").encode()})


def _params_of(target: Target) -> dict[str, object]:
    """params.json for Meta's code. Raises PlanError for a model that it cannot describe."""
    config = target.placement.layout.scope
    rope = {**_table(config, "rope_scaling"), **_table(config, "rope_parameters")}
    known = {"rms_norm_eps": 1e-6, "rope_theta": rope.get("rope_theta", _ROPE)} | dict(config)
    params = {key: known[KEYS[key]] for key in _METAS if KEYS[key] in known}
    hidden, heads, ffn = (_size(known, key) for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    problems = []
    if known.get("head_dim") not in (None, hidden / heads):
        problems.append(f"heads of {quote(known['head_dim'])}: Meta's are hidden_size / num_attention_heads, {hidden / heads:g}")
    scaled = {key: rope.get(key) for key in _SCALED}
    if kind not in ("default", "llama3") or (kind == "llama3" and scaled != {**_SCALED, "rope_type": scaled["rope_type"]}):
        problems.append(f"rotary positions scaled as {quote(kind)} ({quote(dict(rope))})")
    if problems:
        raise PlanError([f"{problem}: params.json has no word for it" for problem in problems], "use --to hf, or --to tp")
    if kind == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": rope["factor"]}
    kv = params.get("n_kv_heads")
    if isinstance(kv, int) and target.mesh.tp > kv:
        params["n_kv_heads"] = target.mesh.tp  # each is repeated, so that every rank has one
    return params | _feed_forward(hidden, ffn)


def _feed_forward(hidden: int, ffn: int) -> dict[str, object]:
    """multiple_of and ffn_dim_multiplier by which Meta's code comes to `ffn`: ceil to a multiple of int(multiplier · int(8/3 · hidden))."""
    base = int(2 * 4 * hidden / 3)
    for multiple in (256, 1024, 4096, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-base // multiple) * multiple == ffn:
            return {"multiple_of": multiple}
    multiple = gcd(ffn, 4096)
    for near in (ffn, ffn - multiple / 2):
        if -(-int(near / base * base) // multiple) * multiple == ffn:
            return {"multiple_of": multiple, "ffn_dim_multiplier": near / base}
    raise PlanError([f"intermediate_size {ffn}: no ffn_dim_multiplier gives it"], "use --to hf, or --to tp")


def _size(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise LayoutError(f"config.json: {key} is {quote(repr(value))}, expected a size")
    return value


def _table(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    table = config.get(name)
    return table if isinstance(table, Mapping) else {}


def _ranks(mesh: Mesh) -> list[Rank]:
    if mesh.pp > 1 or mesh.ep > 1:
        raise PlanError([f"Meta's files are of tensor-parallel ranks alone, not of {mesh}"], "leave --pp and --ep out")
    return grid(mesh)


FORMAT = Format(
    "meta",
    "meta",
    Rules(_ranks, even_stages),
    _recognise,
    _read,
    _write,
    newest="3.0",
    oldest="1.0",
    disagreements=_disagreements,
    forms=("twice",),
    settings=(PARAMS, _config),
    usage="torchrun --nproc-per-node {tp} your_script.py   # with Meta's own model: checkpoint_dir={folder}",
)


def _mistral(folder: AnyPath, names: set[str]) -> bool:
    return PARAMS in names and any(_WHOLE.fullmatch(name) for name in names)


def _read_mistral(folder: AnyPath) -> Contents:
    names = sorted(path.name for path in folder.iterdir() if _WHOLE.fullmatch(path.name))
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        table = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
            raise FormatError(f"{folder / _INDEX} has no weight_map of names to files")
        missing = sorted(set(table.values()) - set(names))
        if missing:
            raise FormatError(
                f"{folder / _INDEX} lists {quote(missing[0])}, which is missing ({len(missing)} such)",
                "download the rest of the checkpoint",
            )
        names = sorted(set(table.values()))
    if not names:
        raise FormatError(f"{folder} holds no consolidated.safetensors")
    pieces: list[Piece] = []
    for name in names:
        pieces += pieces_of(name, safetensors.read(safe_join(folder, name))[0])
    return Contents(Mesh(), pieces, settings={PARAMS: _params(folder)}, writer="Mistral, or who has its layout")


def _config_mistral(folder: AnyPath) -> dict[str, object]:
    file = min(path.name for path in folder.iterdir() if _WHOLE.fullmatch(path.name))
    dtype = next(iter(safetensors.read(folder / file)[0].values())).dtype
    return made(_params(folder), "MistralForCausalLM", "mistral", dtype)


MISTRAL = Format(
    "mistral",
    "meta",
    Rules(_ranks, even_stages),
    _mistral,
    _read_mistral,
    None,
    disagreements=_disagreements,
    settings=(PARAMS, _config_mistral),
)
