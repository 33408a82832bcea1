"""SGLang's entry point: ``--load-format reshard``. Every SGLang process calls ``register`` unless SGLANG_PLUGINS names others alone.

SGLang has a closed list of load formats, and lets a loader's class stand in their place: the name is added to the list, and what would look
it up is given the class. Read in SGLang 0.5.23 (srt/plugins, srt/configs/load_config.py, srt/model_loader/loader.py), not run.
"""

import logging


def register() -> None:
    """Tell SGLang of the loader. Never raises."""
    try:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
        from sglang.srt.server_args import LOAD_FORMAT_CHOICES, add_load_format_choices

        if "reshard" not in LOAD_FORMAT_CHOICES:
            add_load_format_choices(["reshard"])
            HookRegistry.register("sglang.srt.configs.load_config.LoadConfig._verify_load_format", as_class, HookType.AROUND)
    except Exception as error:  # noqa: BLE001  SGLang goes on without it
        logging.getLogger("sglang.reshard").warning("--load-format reshard is not available: %s: %s", type(error).__name__, error)


def as_class(verify, config, *args, **options):
    """Around LoadConfig's check of its load format: ours becomes the loader's class, which get_model_loader calls."""
    if isinstance(config.load_format, str) and config.load_format.lower() == "reshard":
        from reshard.plugins.sglang_loader import ReshardModelLoader

        config.load_format = ReshardModelLoader
    return verify(config, *args, **options)
