"""Damage on the way from the Hub: what came of a bad file is fetched and written again, what came of others is kept."""

# ruff: noqa: F811  pytest hands fixtures over by name

import pytest
from hubcases import command, files_of, hub, large, weights  # noqa: F401  fixtures among them
from hubserver import Fault

import reshard
from reshard.conversion.transaction import convert


def flip_in(hub, path, size: int = 1):
    """Flip a bit in a range of the second half of that file's fetching."""
    hub.fault(Fault(path=f"/blob/{hub.store(path, True).oid}", corrupt=True, skip=size))


def test_bad_range_keeps_the_output_files_that_are_sound(hub, large, tmp_path):
    """defects.md A10"""
    hub.add_folder("org/name", large)
    job = reshard.plan("hf://org/name", format="hf", max_file=6_000_000)  # the second source file is in the later output files only
    flip_in(hub, max(large.glob("*.safetensors")), 3)
    with pytest.raises(reshard.HubError, match="sha256 of the bytes that came is [0-9a-f]{64}, the Hub lists") as caught:
        convert(job, tmp_path / "out", jobs=1)
    assert "run the same command again" in caught.value.hint and not (tmp_path / "out").exists()
    hub.clear()
    report = convert(reshard.plan("hf://org/name", format="hf", max_file=6_000_000), tmp_path / "out", jobs=1)
    assert report.resumed_files > 0 and hub.sent() < 0.8 * sum(path.stat().st_size for path in large.iterdir())
    reshard.convert(large, tmp_path / "near", format="hf", max_file=6_000_000)
    assert weights(tmp_path / "out") == weights(tmp_path / "near")


@pytest.mark.parametrize("skip", [1, 4, 7])
def test_bad_range_is_not_in_what_the_next_run_writes(hub, large, tmp_path, skip):
    """defects.md A10: batches that were noted before the checksum was known count no more"""
    hub.add_folder("org/name", large)
    for path in large.glob("*.safetensors"):
        flip_in(hub, path, skip)
    for _ in range(4):
        try:
            reshard.convert("hf://org/name", tmp_path / "out", format="tp", tp=2, jobs=2)
            break
        except reshard.ReshardError:  # a FormatError where it is a header's bit
            continue
    reshard.convert(large, tmp_path / "near", format="tp", tp=2)
    assert weights(tmp_path / "out") == weights(tmp_path / "near")


def test_report_says_what_no_checksum_covers(hub, large, tmp_path):
    """defects.md M10: one rank's ranges can't be checked against the Hub's checksum of whole files; so it is said"""
    hub.add_folder("org/name", large)
    done = command(hub, tmp_path, "convert", "hf://org/name", "one", "--to", "vllm", "--tp", "4", "--rank", "1")
    assert done.returncode == 0 and "not checked: 2 files (ranges only)" in done.stdout, done.stdout
    done = command(hub, tmp_path, "convert", "hf://org/name", "all", "--to", "vllm", "--tp", "4")
    assert "sha256 of 2 files checked" in done.stdout and "not checked" not in done.stdout
    assert files_of(tmp_path / "all").items() >= {(k, v) for k, v in files_of(tmp_path / "one").items() if k.startswith("model-")}


def test_small_file_that_comes_wrong_costs_no_weights(hub, large, tmp_path):
    """defects.md A10: tokenizer.json is read last; what was written until then is kept"""
    hub.add_folder("org/name", large)
    hub.add("org/name", {"merges.txt": b"a b\n" * 1000})
    hub.fault(Fault(host="hub", path="/resolve/.*merges.txt", corrupt=True))
    with pytest.raises(reshard.HubError, match="merges.txt: git's sha1"):
        reshard.convert("hf://org/name", tmp_path / "out", format="tp", tp=2)
    hub.clear()
    reshard.convert("hf://org/name", tmp_path / "out", format="tp", tp=2)
    assert hub.sent() < 500_000 and reshard.diff(large, tmp_path / "out")
