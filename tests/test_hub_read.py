"""Reading from the Hub: bytes, requests, tokens, and what goes wrong on the way. The real client against tests/hubserver.py."""

# ruff: noqa: F811  pytest hands fixtures over by name

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hubcases import command, environment, files_of, hub, large, model, no_token_elsewhere, one_resolve_per_file, weights  # noqa: F401  fixtures among them
from hubserver import Fault
from safetensors.torch import load_file, save_file

import reshard
from reshard import cli
from reshard.conversion.transaction import convert
from reshard.demo import make_model

# bytes and requests


@pytest.mark.parametrize("target", [{"format": "vllm", "tp": 3}, {"format": "megatron", "tp": 3, "pp": 2}, {"format": "tp", "tp": 2}, {"format": "hf"},
                                    {"format": "rank-pt", "tp": 9}, {"format": "hf", "dtype": "fp32"}])  # fmt: skip
def test_conversion_from_the_hub_is_that_of_the_folder(hub, model, tmp_path, target):
    commit = hub.add_folder("org/name", model)
    report = reshard.convert("hf://org/name", tmp_path / "far", **target)
    reshard.convert(model, tmp_path / "near", **target)
    assert weights(tmp_path / "far") == weights(tmp_path / "near")
    assert json.loads((tmp_path / "far" / "reshard.json").read_text())["source"] == {"repo": "org/name", "revision": commit}
    whole = sum(path.stat().st_size for path in model.iterdir())
    assert hub.sent() == report.bytes_received <= 1.02 * whole
    assert report.checked_files == 3  # all three files passed by whole
    assert one_resolve_per_file(hub) and no_token_elsewhere(hub)


@pytest.mark.parametrize(("source", "target"), [
    ({"format": "megatron", "tp": 3, "pp": 2}, {"format": "vllm", "tp": 1}), ({"format": "vllm", "tp": 3}, {"format": "hf"}),
    ({"format": "tp", "tp": 9}, {"format": "megatron", "tp": 1}), ({"format": "rank-pt", "tp": 3}, {"format": "tp", "tp": 2}),
    ({"format": "transformers", "tp": 2}, {"format": "dcp", "tp": 2}),
])  # fmt: skip
def test_every_format_is_read_from_the_hub(hub, model, tmp_path, source, target):
    reshard.convert(model, tmp_path / "shards", **source)
    hub.add_folder("org/name", tmp_path / "shards")
    reshard.convert("hf://org/name", tmp_path / "far", **target)
    assert reshard.diff(model, tmp_path / "far") and reshard.diff("hf://org/name", model) and reshard.diff(model, "hf://org/name")
    assert no_token_elsewhere(hub)


def test_a_distributed_checkpoint_is_read_from_the_hub(hub, model, tmp_path):
    """Its metadata whole, its items by ranges; these small files are no LFS files, so that no other host is asked."""
    reshard.convert(model, tmp_path / "dcp", format="dcp", tp=3)
    hub.add_folder("org/name", tmp_path / "dcp")
    reshard.convert("hf://org/name", tmp_path / "far", format="hf")
    assert reshard.diff(model, tmp_path / "far") and reshard.diff("hf://org/name", model)
    reshard.push(tmp_path / "dcp", "hf://ada/name")
    assert ".metadata" in hub.files("ada/name") and reshard.diff("hf://ada/name", model)


def test_diff_finds_a_changed_element(hub, model, tmp_path):
    file = sorted(model.glob("*.safetensors"))[1]
    state = load_file(file)
    name = min(state)
    state[name].view(-1)[-1] += 1
    save_file(state, tmp_path / "changed.safetensors", {"format": "pt"})
    hub.add_folder("org/name", model)
    hub.add("org/name", {file.name: tmp_path / "changed.safetensors"})
    report = reshard.diff(model, "hf://org/name")
    assert [d.name for d in report.differing] == [name] and report.differing[0].elements == 1


def test_subfolder_branch_and_commit(hub, model, tmp_path):
    make_model(tmp_path / "other")
    hub.add("org/name", {f"sub/{p.name}": p for p in model.iterdir()})
    first = hub.add("org/name", {"README.md": b"later"})
    hub.add_folder("org/name", tmp_path / "other", branch="a/b")
    assert reshard.open("hf://org/name/sub").files == reshard.open(model).files
    assert reshard.open("hf://org/name@a%2Fb").files == ["model.safetensors"]
    assert reshard.open(f"hf://org/name@{first}/sub").revision == first
    assert reshard.diff("hf://org/name/sub", model)


def test_one_rank_fetches_its_ranges_only(hub, large, tmp_path):
    hub.add_folder("org/name", large)
    whole = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    job = reshard.plan("hf://org/name", format="vllm", tp=4, rank=1)
    hub.clear()
    report = reshard.convert("hf://org/name", tmp_path / "out", format="vllm", tp=4, rank=1)
    assert report.bytes_read == job.bytes_read < 0.65 * whole
    small = sum(path.stat().st_size for path in large.glob("*.json"))
    assert hub.sent() <= 1.02 * (job.bytes_read + small) + 2 * 100_001  # two headers, read at the start
    assert one_resolve_per_file(hub) and no_token_elsewhere(hub)
    with pytest.raises(reshard.FormatError, match="out holds 1 of the 4 ranks of tp4"):
        reshard.open(tmp_path / "out")
    reshard.convert(large, tmp_path / "all", format="vllm", tp=4)
    name = "model-rank-1-part-0.safetensors"
    assert [path.name for path in (tmp_path / "out").glob("model-*")] == [name]
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    state, held = reshard.load("hf://org/name", format="vllm", tp=4, rank=1), load_file(tmp_path / "all" / name)
    assert state.keys() == held.keys() and all(torch.equal(state[key], held[key]) for key in held)


def test_everything_asks_for_the_pinned_commit(hub, model, tmp_path):
    """The branch moves between plan and run: what was planned is what comes."""
    first = hub.add_folder("org/name", model)
    job = reshard.plan("hf://org/name", format="tp", tp=2)
    hub.add("org/name", {p.name: b"gone" for p in model.iterdir()})
    convert(job, tmp_path / "out")
    assert reshard.diff(model, tmp_path / "out")
    assert {r.path.split("/resolve/")[1].split("/")[0] for r in hub.requests(path="/resolve/")} == {first}


# faults


def test_faults_that_pass_by_themselves(hub, large, tmp_path):
    hub.add_folder("org/name", large)
    job = reshard.plan("hf://org/name", format="tp", tp=2)
    for fault in (
        Fault(status=503, headers={"Retry-After": "0"}),
        Fault(status=429, headers={"Retry-After": "1"}),
        Fault(cut=5000, times=2),
        Fault(cut=0),
    ):
        hub.fault(fault)
    convert(job, tmp_path / "out")
    assert reshard.diff(large, tmp_path / "out")
    assert not [f for f in hub.faults if f.times]
    whole = sum(path.stat().st_size for path in large.iterdir())
    assert hub.sent() <= 1.02 * whole  # what came before a cut is not asked for again
    assert one_resolve_per_file(hub) and no_token_elsewhere(hub)


def test_server_that_asks_for_time_gets_it(hub, model, tmp_path):
    hub.add_folder("org/name", model)
    hub.fault(Fault(host="hub", path="/api/models/org/name$", status=429, headers={"Retry-After": "2"}))
    hub.fault(Fault(host="hub", path="/resolve/", status=503, headers={"Retry-After": "1"}))
    began = time.monotonic()
    assert reshard.open("hf://org/name").format == "hf"
    assert time.monotonic() - began >= 3


def test_expired_links_are_renewed_once_for_all(hub, large, tmp_path):
    hub.add_folder("org/name", large)
    job = reshard.plan("hf://org/name", format="tp", tp=2)
    hub.expire()
    hub.clear()
    convert(job, tmp_path / "out")
    assert reshard.diff(large, tmp_path / "out")
    assert len(hub.requests(path="/resolve/.*safetensors$")) == 2  # one more for each of two files, whatever the number of workers
    assert no_token_elsewhere(hub)


def test_link_that_is_refused_again_is_an_error(hub, model, tmp_path):
    hub.add_folder("org/name", model)
    hub.fault(Fault(path="/blob/", status=403, times=99))
    with pytest.raises(reshard.HubError, match="answers 403, with a fresh link too"):
        reshard.convert("hf://org/name", tmp_path / "out", format="tp", tp=2)


@pytest.mark.parametrize(("fault", "message"), [
    (Fault(ignore_range=True, times=99), "200: it sends the whole file, whatever range is asked for"),
    (Fault(status=416, times=99), "answers 416"),
    (Fault(status=404, times=99), "answers 404"),
])  # fmt: skip
def test_answers_that_are_not_the_range(hub, large, tmp_path, fault, message):
    hub.add_folder("org/name", large)
    hub.fault(fault)
    with pytest.raises(reshard.HubError, match=message):
        reshard.convert("hf://org/name", tmp_path / "out", format="tp", tp=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("skip", [0, 4, 9])
def test_files_are_checked_though_one_range_is_slow(hub, large, tmp_path, skip):
    hub.add_folder("org/name", large)
    job = reshard.plan("hf://org/name", format="tp", tp=2)
    hub.fault(Fault(delay=1.5, skip=skip))
    assert convert(job, tmp_path / "out", jobs=2).checked_files == 2


def test_flipped_bit_is_found_by_the_hubs_sha256(hub, large, tmp_path):
    hub.add_folder("org/name", large)
    job = reshard.plan("hf://org/name", format="tp", tp=2)
    hub.fault(Fault(corrupt=True, skip=5))
    with pytest.raises(reshard.HubError, match="sha256 of the bytes that came is [0-9a-f]{64}, the Hub lists"):
        convert(job, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    convert(reshard.plan("hf://org/name", format="tp", tp=2), tmp_path / "out")  # what is kept of it: test_hub_damage.py
    reshard.convert(large, tmp_path / "near", format="tp", tp=2)
    assert weights(tmp_path / "out") == weights(tmp_path / "near")


def test_flipped_bit_in_a_small_file_is_found(hub, model, tmp_path):
    hub.add_folder("org/name", model)
    hub.fault(Fault(host="hub", path="/resolve/.*/config.json", corrupt=True))
    with pytest.raises(reshard.HubError, match="config.json: git's sha1 of the bytes"):
        reshard.open("hf://org/name")


# killed, and continued


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_of_a_file_and_continued(hub, large, tmp_path, sign):
    hub.add_folder("org/name", large)
    whole = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    hub.pause_after(whole // 2)
    args = [sys.executable, "-m", "reshard", "convert", "hf://org/name", "out", "--to", "tp", "--tp", "2", "-j", "3"]
    process = subprocess.Popen(
        args, cwd=tmp_path, env={**os.environ, **environment(hub, tmp_path)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    hub.paused(process)
    process.send_signal(sign)
    hub.rate = 1_000_000  # half a minute for the rest: it must stop by itself
    hub.resume()
    _, err = process.communicate(timeout=120)
    if sign == signal.SIGINT:
        assert process.returncode == 130 and "run the same command to go on" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    hub.rate = 0
    hub.idle()
    came = hub.sent()
    hub.clear()
    done = command(hub, tmp_path, *args[3:], "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    missing, a_batch, heads = whole - came, 4 << 20, 2 * 100_001
    small = sum(path.stat().st_size for path in large.glob("*.json"))
    assert hub.sent() <= missing + 3 * a_batch + heads + small
    assert hub.sent() < 0.85 * whole and result["bytes_received"] == hub.sent()
    assert one_resolve_per_file(hub)
    reshard.convert(large, tmp_path / "near", format="tp", tp=2)
    assert weights(tmp_path / "out") == weights(tmp_path / "near")


def test_continuing_after_the_branch_moved_says_so(hub, large, tmp_path):
    first = hub.add_folder("org/name", large)
    hub.fault(Fault(status=404, times=99, skip=6))
    with pytest.raises(reshard.HubError):
        reshard.convert("hf://org/name", tmp_path / "out", format="tp", tp=2)
    hub.faults.clear()
    hub.add("org/name", {"README.md": b"moved"})
    with pytest.raises(reshard.DestinationError, match=f"unfinished conversion of hf://org/name@{first}; hf://org/name is at") as caught:
        reshard.convert("hf://org/name", tmp_path / "out", format="tp", tp=2)
    assert f"hf://org/name@{first}" in caught.value.hint
    reshard.convert(f"hf://org/name@{first}", tmp_path / "out", format="tp", tp=2)
    assert reshard.diff(large, tmp_path / "out")


# the cache, offline, access


def test_cache_is_filled_and_read(hub, model, tmp_path):
    hub.add_folder("org/name", model)
    assert command(hub, tmp_path, "convert", "hf://org/name", "out", "--to", "tp", "--tp", "2", "--cache").returncode == 0
    hub.clear()
    assert command(hub, tmp_path, "convert", "hf://org/name", "again", "--to", "vllm", "--tp", "3").returncode == 0
    assert hub.sent() == 0  # all from the cache
    hub.clear()
    done = command(hub, tmp_path, "convert", "hf://org/name", "offline", "--to", "vllm", "--tp", "3", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and not hub.log, done.stderr
    assert files_of(tmp_path / "again") == files_of(tmp_path / "offline") and reshard.diff(model, tmp_path / "again")
    code = "from huggingface_hub import snapshot_download as s; print(s('org/name', local_files_only=True))"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment(hub, tmp_path)}, capture_output=True, text=True, check=True
    )
    assert (Path(found.stdout.strip()) / "config.json").is_file()  # others find it there too


def test_offline_without_a_cache(hub, model, tmp_path):
    hub.add_folder("org/name", model)
    done = command(hub, tmp_path, "inspect", "hf://org/name", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "HF_HUB_OFFLINE is set" in done.stderr and "hint: unset HF_HUB_OFFLINE" in done.stderr and not hub.log


def test_a_hub_that_is_not_there(hub, model, tmp_path, monkeypatch):
    monkeypatch.setattr("reshard.hub.patience.TRIES", 1)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(reshard.HubError, match="can't be reached") as caught:
        reshard.open("hf://org/name")
    assert "HF_ENDPOINT" in caught.value.hint


@pytest.mark.parametrize(("place", "token", "message", "hint"), [
    ("hf://org/gated", "hf_bob", "is gated, and this account has no access to it yet (a token was sent)", "ask for access at"),
    ("hf://org/gated", "", "is gated", "hf auth login"),
    ("hf://org/private", "", "no such model, or no access to it (no token was sent)", "hf auth login"),
    ("hf://org/private", "hf_bob", "no such model, or no access to it (a token was sent)", "check the name"),
    ("hf://org/private", "hf_nonsense", "no such model, or no access", "check the name"),
    ("hf://org/absent", "hf_ada", "no such model", "check the name"),
    ("hf://org/open@nobranch", "hf_ada", "no branch, tag or commit 'nobranch'", "/org/open/tree/main"),
    ("hf://org/open/nofolder", "hf_ada", "nofolder does not exist in org/open", "leave /nofolder out"),
    ("hf://org/open/config.json", "hf_ada", "config.json is a file in org/open", None),
])  # fmt: skip
def test_access(hub, model, tmp_path, monkeypatch, capsys, place, token, message, hint):
    hub.add_folder("org/gated", model, gated=True)
    hub.add_folder("org/private", model, private=True)
    hub.add_folder("org/open", model)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["inspect", place])
    out, err = capsys.readouterr()
    head, _, advice = err.partition("\n\nhint: ")
    assert exit_.value.code == 1 and out == "" and message in head and head.count("\n") == 0 and (hint is None or hint in advice)
    assert "hf_nonsense" not in err and "Traceback" not in err


def test_members_read_gated_and_private(hub, model):
    hub.add_folder("org/gated", model, gated=True)
    hub.add_folder("org/private", model, private=True)
    assert reshard.diff("hf://org/gated", "hf://org/private")


@pytest.mark.parametrize("name", ["../config.json", "/etc/model.safetensors", "a/../../b"])
def test_names_that_lead_out_of_the_folder(hub, model, name):
    hub.add_folder("org/name", model)
    hub.add("org/name", {name: b"{}"})
    for act in (reshard.open, lambda place: reshard.pull(place, "out")):
        with pytest.raises(reshard.FormatError, match="leads out of the folder"):
            act("hf://org/name")


def test_rate_limit_that_stays(hub, model, monkeypatch):
    monkeypatch.setattr("reshard.hub.patience.TRIES", 2)
    hub.add_folder("org/name", model)
    hub.fault(Fault(host="hub", status=429, headers={"Retry-After": "0"}, times=99))
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(reshard.HubError, match="rate limit is used up") as caught:
        reshard.open("hf://org/name")
    assert "log in" in caught.value.hint


def test_no_secret_is_printed_logged_or_journalled(hub, large, tmp_path):
    hub.add_folder("org/name", large)
    hub.fault(Fault(status=404, times=99, skip=12))
    done = command(hub, tmp_path, "convert", "hf://org/name", "out", "--to", "tp", "--tp", "2", "-v")
    assert done.returncode == 1 and "answers 404" in done.stderr
    left = b"".join(files_of(tmp_path / ".out.reshard")[name] for name in ("journal.jsonl",))
    assert b"batch" in left
    for text in (done.stdout, done.stderr, left.decode()):
        assert "hf_ada" not in text and "X-Amz-Signature" not in text and "secret" not in text


def test_dry_run_plan_and_inspect_read_headers_only(hub, large, tmp_path):
    commit = hub.add_folder("org/name", large)
    for args in (
        ["convert", "hf://org/name", "out", "--to", "vllm", "--tp", "4", "-n", "--json"],
        ["plan", "hf://org/name", "--to", "vllm", "--tp", "4", "--json"],
    ):
        hub.clear()
        done = command(hub, tmp_path, *args)
        result = json.loads(done.stdout)
        assert result["source"] | {"path": "hf://org/name", "revision": commit} == result["source"]
        assert hub.sent() < 300_000 and one_resolve_per_file(hub)
    assert "hf tp1, LlamaForCausalLM" in command(hub, tmp_path, "inspect", "hf://org/name").stdout


@pytest.fixture
def shards(hub, model, tmp_path):
    """A Megatron folder, which has no config.json of its own; that is on the Hub."""
    hub.add_folder("org/name", model)
    hub.add("org/name", {"tokenizer.json": b"{}"})
    reshard.convert(model, tmp_path / "megatron", format="megatron", tp=3, fsync=False)
    for name in ("config.json", "reshard.json"):
        (tmp_path / "megatron" / name).unlink()
    return tmp_path / "megatron"


def test_a_config_on_the_hub_for_shards_that_are_here(model, shards, tmp_path):
    """Its companions are on the Hub too: asked for their real paths on this machine, they ended in a traceback."""
    report = reshard.convert(shards, tmp_path / "out", format="hf", config="hf://org/name", fsync=False)
    assert (tmp_path / "out" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert report.files and reshard.diff(model, tmp_path / "out")


def test_the_same_pushed(hub, model, shards):
    reshard.convert(shards, "hf://ada/name", format="hf", config="hf://org/name")
    assert hub.files("ada/name")["config.json"] == (model / "config.json").read_bytes() and reshard.diff(model, "hf://ada/name")


def test_a_comparison_takes_the_config_of_an_opened_checkpoint_on_the_hub(shards):
    assert reshard.diff(shards, reshard.open("hf://org/name"))
