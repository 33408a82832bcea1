"""The model's config.json: where it is, and the numbers of its language model."""

from collections.abc import Mapping

from reshard.errors import FormatError
from reshard.hub import folder_of
from reshard.stores.files import AnyPath, read_json


def find_config(folder: AnyPath, config: str | AnyPath | None) -> AnyPath:
    if config is not None:
        path = folder_of(config)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise FormatError(f"--config: {path} does not exist")
        return path
    path = next(
        (path for path in (folder / "config.json", folder / "huggingface" / "config.json") if path.is_file()), None
    )  # the latter: verl
    if path is None and (folder / "adapter_config.json").is_file():
        raise FormatError(f"{folder} is a LoRA adapter; the config.json of the model that it adapts gives the sizes",
                          f"name it with --config FILE|DIR; to merge the two: reshard merge BASE {folder} DST --to …")  # fmt: skip
    if path is None:
        raise FormatError(f"{folder} has no config.json, which gives the model's sizes", "name the original model's with --config FILE|DIR")
    return path


def read_config(path: AnyPath) -> Mapping[str, object]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise FormatError(f"{path} holds a {type(settings).__name__}, expected an object")
    return settings


def model_config(settings: Mapping[str, object]) -> Mapping[str, object]:
    """The language model's numbers: those of text_config laid over the rest where a model nests them."""
    nested = settings.get("text_config")
    return {**settings, **nested, "architectures": settings.get("architectures")} if isinstance(nested, dict) else settings
