"""``doctor``: what this machine has for reshard, what is missing, and what each part is for."""

import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import click

from reshard import __version__
from reshard.cli.options import json_option
from reshard.text import human, table

#: packages that are not always installed: what needs them, and how to get them
_OPTIONAL = {
    "transformers": ("reshard verify", "pip install 'reshard[verify]'"),
    "accelerate": ("reshard verify --low-memory", "pip install 'reshard[verify]'"),
    "safetensors": ("verify, and reading with other tools", "pip install safetensors"),
    "hf_xet": ("faster uploads to the Hub", "pip install hf_xet"),
}
_REQUIRED = ("torch", "numpy", "ml_dtypes", "huggingface_hub", "click", "tqdm")


@click.command()
@click.option("--offline", is_flag=True, help="Don't ask the Hub.")
@json_option
def doctor(offline, as_json):
    """Tell what this machine has for reshard: versions, devices, free space, access to the Hub, and what is missing."""
    found = {
        "reshard": {"version": __version__, "python": platform.python_version(), "platform": platform.platform(), "cores": os.cpu_count()},
        "packages": {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)},
        "devices": _devices(),
        "free": {place: shutil.disk_usage(place).free for place in (os.getcwd(), "/dev/shm") if os.path.isdir(place)},
        "hub": _hub(offline),
    }
    if as_json:
        click.echo(json.dumps({"ok": True, **found}))
        return
    about = found["reshard"]
    rows = [("reshard", f"{about['version']}, Python {about['python']}, {about['platform']}, {about['cores']} cores", "")]
    for name, own in found["packages"].items():
        use, way = _OPTIONAL.get(name, ("", ""))
        rows.append((name, own or "not installed", "" if own else f"{use}: {way}"))
    rows += [("device", text, "") for text in found["devices"] or ["no GPU: verify, sync and load run on the CPU"]]
    rows += [("free", f"{human(size)} in {place}", "") for place, size in found["free"].items()]
    rows.append(("Hub", found["hub"], ""))
    click.echo(table(rows, ("what", "found", "needed for")))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    known = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"cuda:{i} {device.name}, {human(device.total_memory)}" for i, device in enumerate(known)]


def _hub(offline: bool) -> str:
    """Who the Hub says we are; never the token."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    where, token = constants.ENDPOINT, get_token()
    if offline or constants.HF_HUB_OFFLINE:
        return f"{where}, not asked; {'a token is set' if token else 'no token'}"
    if not token:
        return f"{where}: no token (hf auth login, or HF_TOKEN); public models only"
    try:
        return f"{where}, as {HfApi().whoami()['name']}"
    except HfHubHTTPError as error:
        return f"{where} refuses the token: {error.response.status_code}"
    except (OSError, HTTPError) as error:
        return f"{where} can't be reached: {type(error).__name__}"
