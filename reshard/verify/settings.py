"""Settings beside the shards held against the original's, field by field.

Engines compute by config.json, Megatron by the ``args`` in its files. A prompt shows a wrong setting only where the setting
acts: a window of 4096 or a rotary scaling for long texts never does in 32 tokens. So every field is compared that
can make an engine compute, or stop, otherwise.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from reshard.errors import FormatError, ReshardError
from reshard.foreign import quote

#: fields of config.json that no engine computes a token by: of training, of transformers' own output, of who wrote the file
HARMLESS = frozenset((
    "transformers_version", "torch_dtype", "dtype", "use_cache", "_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation",
    "attn_implementation", "_attn_implementation_autoset", "_experts_implementation", "experts_implementation", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "return_dict_in_generate", "torchscript", "gradient_checkpointing",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "classifier_dropout",
    "initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop",
    "router_aux_loss_coef", "router_jitter_noise", "aux_loss_alpha", "seq_aux", "pretraining_tp", "use_bfloat16", "pruned_heads",
    "architectures_original", "license",
))  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """A setting in which the shards and the original differ. `where` is the file; None stands for a field that is not there."""

    where: str
    field: str
    found: object
    expected: object

    def __str__(self) -> str:
        return f"{self.where}: {self.field} is {_shown(self.found)}, the original's is {_shown(self.expected)}"

    def to_json(self) -> dict:
        return {"where": self.where, "field": self.field, "found": _shown(self.found), "expected": _shown(self.expected)}


def compare_settings(
    checkpoint: Path, reference: Path, config: Path | None = None, args: Mapping[str, Mapping] | None = None
) -> list[Difference]:
    """Every setting of `checkpoint` that is not the one of `reference`: of its config.json (or `config`, a file or folder, in
    its place), and of Megatron's `args` by file. Raises FormatError for a config.json that can't be read."""
    return [*_configs(checkpoint, reference, config), *_args(args or {}, reference)]


def compare_configs(found: Mapping, expected: Mapping, where: str = "config.json") -> list[Difference]:
    """Fields of two config.json, as transformers gives them, that differ and matter. A field that is null is as good as none."""
    one, other = _flat(found), _flat(expected)
    names = sorted(name for name in one.keys() | other.keys() if not HARMLESS & set(name.split(".")))
    return [Difference(where, name, one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)]


def _configs(checkpoint: Path, reference: Path, config: Path | None) -> list[Difference]:
    own = _file(config or checkpoint)
    if not own.is_file():
        return []  # a format without settings: it is run by the original's
    out = compare_configs(_normal(own), _normal(_file(reference)), own.name)
    # what transformers knows under another name than the engine that reads the file
    raw, theirs = _flat(_read(own)), _flat(_read(_file(reference)))
    known = {difference.field for difference in out}
    return out + [
        Difference(own.name, name, raw[name], theirs[name])
        for name in sorted(raw.keys() & theirs.keys())
        if name not in known and not HARMLESS & set(name.split(".")) and None not in (raw[name], theirs[name]) and raw[name] != theirs[name]
        and not name.startswith(("rope_scaling.", "rope_parameters."))
    ]  # fmt: skip


def _args(args: Mapping[str, Mapping], reference: Path) -> list[Difference]:
    """Every rank's args against those that the original's config.json implies, or where no descriptor tells those, the first's."""
    from reshard.checkpoint import model_config, read_config
    from reshard.formats.megatron_args import model_args
    from reshard.formats.megatron_compare import compare_args
    from reshard.layout import find_descriptor

    found = {file: fields for file, fields in args.items() if fields}
    if not found:
        return []
    settings = read_config(_file(reference))
    descriptor = find_descriptor(settings)
    expected = None
    if descriptor is not None:
        try:
            expected = model_args(descriptor.bind(model_config(settings)))
        except ReshardError:  # no Megatron layout of it: the ranks can still be held against one another
            expected = None
    out = []
    for file, fields in found.items():
        against = next(iter(found.values())) if expected is None else expected
        out += [Difference(f"args in {file}", d.name, d.found, d.expected) for d in compare_args(fields, against)]
    return _together(out, len(found))


def _together(differences: list[Difference], count: int) -> list[Difference]:
    """One line for what all `count` files say alike."""
    groups: dict[tuple[str, str], list[Difference]] = {}
    for d in differences:
        groups.setdefault((d.field, _shown(d.found)), []).append(d)
    out = []
    for same in groups.values():
        out += (
            [Difference("args in every file", same[0].field, same[0].found, same[0].expected)] if count > 1 and len(same) == count else same
        )
    return out


def _file(place: Path) -> Path:
    return place / "config.json" if place.is_dir() else place


def _read(path: Path) -> dict:
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} can't be read: {error}") from None
    return settings if isinstance(settings, dict) else {}


def _normal(path: Path) -> dict:
    """A config.json with transformers' defaults, in its words of today: writers of other years say the same in other words."""
    return transformers_config(path if path.name != "config.json" else path.parent).to_dict()


def transformers_config(place: Path):
    """transformers' configuration of a folder or file. Raises FormatError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place, local_files_only=True)
    except Exception as error:  # noqa: BLE001  whatever a wrong value makes transformers' checks say
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(
            f"transformers cannot read the config.json of {place if place.is_dir() else place.parent}: {text}", NOT_TRANSFORMERS
        ) from None


NOT_TRANSFORMERS = ("verify runs the original with transformers, which must know its model_type; for another model, "
                    "`reshard diff CKPT REFERENCE --layout FILE` compares every element")  # fmt: skip


def _flat(settings: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested tables as dotted names; without fields that are null."""
    out: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out


def _shown(value: object) -> str:
    text = (
        "absent" if value is None else json.dumps(value, default=str) if isinstance(value, (bool, int, float, str, list)) else repr(value)
    )
    return quote(text if len(text) <= 100 else f"{text[:97]}...")
