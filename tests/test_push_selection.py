"""What a push publishes: weights and the files known to go with them; never what a link, a pattern or a folder drags along."""

# ruff: noqa: F811  pytest hands fixtures over by name

import json
import os
import shutil

import pytest
from hubcases import command, files_of, hub, model  # noqa: F401  fixtures among them

import reshard

CODE = b"class Model: pass\n"


@pytest.fixture
def folder(model, tmp_path):
    """A working folder as people have them: a checkpoint among other things."""
    place = tmp_path / "work" / "hf"
    shutil.copytree(model, place)
    for name, content in {
        ".venv/lib/x.py": CODE, "secrets/keys.py": b"KEY = 1", "sub/tokenizer.json": b"{}", ".env": b"TOKEN=1", ".git/config": b"x", "modeling_own.py": CODE,
        "tokenizer.key": b"private", "tokenizer_old/vocab.txt": b"a", "notes.txt": b"secret plans", "optimizer.pt": b"o" * 5000, "tokenizer.json": b"{}",
        "LICENSE": b"MIT", "LICENSE-SERVER.key": b"k", "vocab.key": b"k", "README.md": b"# mine\n", ".config.json": b"{}",
    }.items():  # fmt: skip
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


PUBLISHED = {"tokenizer.json", "LICENSE", "README.md", "config.json", "model.safetensors.index.json"}


def test_push_publishes_only_what_is_known(hub, model, folder, tmp_path):
    """defects.md A3, M4"""
    done = reshard.push(folder, "hf://ada/name")
    weights = {path.name for path in model.glob("*.safetensors")}
    assert set(hub.files("ada/name")) - {".gitattributes"} == {*weights, *PUBLISHED, *(path.name for path in model.iterdir())}
    assert done.left_out == {".venv/": 18, "secrets/": 7, "sub/": 2, ".env": 7, ".git/": 1, "modeling_own.py": 18, "tokenizer.key": 7, "tokenizer_old/": 1,
                             "notes.txt": 12, "optimizer.pt": 5000, "LICENSE-SERVER.key": 1, "vocab.key": 1, ".config.json": 2}  # fmt: skip


def test_what_is_left_out_is_told_with_names_and_bytes(hub, folder, tmp_path):
    done = command(hub, tmp_path, "push", str(folder), "hf://ada/name")
    assert (
        done.returncode == 0
        and "modeling_own.py (18 B)" in done.stderr
        and ".venv/ (18 B)" in done.stderr
        and "--include-code" in done.stderr
    )
    result = json.loads(command(hub, tmp_path, "push", str(folder), "hf://ada/again", "--json").stdout)
    assert {"path": "optimizer.pt", "bytes": 5000} in result["left_out"] and not [r for r in hub.log if "secret" in r.path]


def test_code_goes_up_on_request_only(hub, folder, tmp_path):
    reshard.push(folder, "hf://ada/name")
    assert "modeling_own.py" not in hub.files("ada/name")
    done = command(hub, tmp_path, "push", str(folder), "hf://ada/name", "--include-code")
    assert done.returncode == 0, done.stderr
    names = set(hub.files("ada/name"))
    assert "modeling_own.py" in names and not {name for name in names if name.endswith(".py") and "/" in name}


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "config.json", "model-00001-of-00003.safetensors", "LICENSE"])
def test_link_that_leads_out_of_the_folder_is_refused_by_name(hub, folder, tmp_path, name):
    """defects.md M4"""
    target = tmp_path / "id_rsa"
    if (folder / name).exists():
        shutil.move(folder / name, target)
    else:
        target.write_bytes(b"PRIVATE KEY")
    (folder / name).symlink_to(target)
    with pytest.raises(reshard.DestinationError, match=f"{name} leads to .*id_rsa") as caught:
        reshard.push(folder, "hf://ada/name")
    assert "remove the link" in caught.value.hint and not hub.log
    if name in ("tokenizer.json", "LICENSE"):
        with pytest.raises(reshard.DestinationError, match=f"{name} leads to"):
            reshard.convert(folder, "hf://ada/name", format="tp", tp=2)
        assert "ada/name" not in hub.repos


def test_folder_that_is_a_link_inside_the_folder_is_refused(hub, model, tmp_path):
    reshard.convert(model, tmp_path / "m", format="megatron", tp=1)
    inside = next(path.parent for path in (tmp_path / "m").rglob("*.pt"))
    shutil.move(inside, tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(reshard.DestinationError, match="leads to .*elsewhere"):
        reshard.push(tmp_path / "m", "hf://ada/name")


def test_links_within_the_folder_and_into_the_cache_are_followed(hub, model, tmp_path):
    cache = tmp_path / "cache" / "models--org--name"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, cache / "blobs" / f"{number:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    reshard.push(snapshot, "hf://ada/name")
    assert {name: hub.files("ada/name")[name] for name in files_of(model)} == files_of(model)
    shutil.copytree(model, tmp_path / "hf")
    (tmp_path / "hf" / "real").mkdir()
    shutil.move(tmp_path / "hf" / "config.json", tmp_path / "hf" / "real" / "config.json")
    (tmp_path / "hf" / "config.json").symlink_to("real/config.json")
    assert not reshard.push(tmp_path / "hf", "hf://ada/name").committed


def test_blobs_of_another_place_are_no_cache(hub, model, tmp_path):
    shutil.copytree(model, tmp_path / "hf")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_bytes(b"x")
    (tmp_path / "hf" / "LICENSE").symlink_to(tmp_path / "blobs" / "secret")
    with pytest.raises(reshard.DestinationError, match="LICENSE leads to"):
        reshard.push(tmp_path / "hf", "hf://ada/name")


def test_pipes_are_neither_read_nor_waited_for(hub, model, tmp_path):
    shutil.copytree(model, tmp_path / "hf")
    os.mkfifo(tmp_path / "hf" / "tokenizer.json")
    done = reshard.push(tmp_path / "hf", "hf://ada/name")
    assert "tokenizer.json" in done.left_out and "tokenizer.json" not in hub.files("ada/name")


def test_conversion_to_the_hub_publishes_only_what_is_known(hub, folder, tmp_path):
    """defects.md M4: job.companions took tokenizer.key and code along"""
    done = reshard.convert(folder, "hf://ada/name", format="tp", tp=2)
    names = set(hub.files("ada/name"))
    assert not {name for name in names if name.endswith((".py", ".key"))} and {"config.json", "tokenizer.json", "LICENSE"} <= names
    assert done.left_out.keys() >= {"modeling_own.py", "tokenizer.key", "vocab.key", "LICENSE-SERVER.key"}
    again = command(hub, tmp_path, "convert", str(folder), "hf://ada/name", "--to", "tp", "--tp", "2", "--include-code")
    assert again.returncode == 0 and "tokenizer.key (7 B)" in again.stderr and "modeling_own.py" in hub.files("ada/name"), again.stderr


def test_weights_beside_the_checkpoint_are_not_published(hub, model, tmp_path):
    """Training leaves optimizer states and older weights beside the model."""
    shutil.copytree(model, tmp_path / "hf")
    for name in ("training_args.bin", "optimizer.bin", "consolidated.00.pth", "scheduler.pt"):
        (tmp_path / "hf" / name).write_bytes(b"x")
    done = reshard.push(tmp_path / "hf", "hf://ada/name")
    assert set(done.left_out) == {"training_args.bin", "optimizer.bin", "consolidated.00.pth", "scheduler.pt"}
    assert not [name for name in hub.files("ada/name") if name.endswith((".bin", ".pth", ".pt"))]
