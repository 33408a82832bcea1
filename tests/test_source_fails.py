"""A source whose disk fails: one clear error with file and place, what was done is kept, and the same command goes on."""

import errno
import os
import pickle
import shutil

import pytest

import reshard
from reshard.conversion.journal import notes_in
from reshard.demo import CONFIG, make_model

CONFIG = {**CONFIG, "hidden_size": 288, "intermediate_size": 768, "vocab_size": 4224, "num_hidden_layers": 12, "num_attention_heads": 12,
          "num_key_value_heads": 6, "head_dim": 24}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of 27 MB: many portions."""
    folder = tmp_path_factory.mktemp("fails") / "hf"
    make_model(folder, CONFIG)
    return folder


def failing(monkeypatch, name: str, after: int, code: int = errno.EIO):
    """Call `name` of os fails on files of a source, from the call numbered `after` on. Returns what counts them."""
    real, calls = getattr(os, name), []

    def call(where, *args):
        path = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else str(where)
        if "/src" in path:
            calls.append(path)
            if len(calls) > after:
                raise OSError(code, os.strerror(code))
        return real(where, *args)

    monkeypatch.setattr(os, name, call)
    return calls


@pytest.mark.parametrize("options, to", [({"format": "hf"}, {"format": "vllm", "tp": 3}), ({"format": "megatron", "tp": 2}, {"format": "hf"}),
                                         ({"format": "vllm", "tp": 3}, {"format": "megatron", "tp": 3, "dtype": "fp32"})])  # fmt: skip
def test_the_same_command_goes_on_when_the_disk_is_well_again(model, tmp_path, monkeypatch, options, to):
    source, out = tmp_path / "src", tmp_path / "out"
    reshard.convert(model, source, fsync=False, **options)
    calls = failing(monkeypatch, "preadv", 1 << 60)
    reshard.convert(source, tmp_path / "whole", fsync=False, jobs=1, **to)
    monkeypatch.undo()
    failing(monkeypatch, "preadv", len(calls) // 2)
    with pytest.raises(reshard.SourceError, match=r"/src/.* can't be read at byte [0-9,]+, inside .*: Input/output error") as caught:
        reshard.convert(source, out, fsync=False, jobs=1, **to)
    monkeypatch.undo()
    assert "same command" in caught.value.hint and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not out.exists() and any("batch" in note for note in notes_in(tmp_path / ".out.reshard"))
    report = reshard.convert(source, out, fsync=False, jobs=1, **to)
    assert 0 < report.resumed_bytes < report.resumed_bytes + report.bytes_read == reshard.plan(source, **to).bytes_read
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert not (tmp_path / ".out.reshard").exists()


@pytest.mark.parametrize("call, code", [("preadv", errno.EIO), ("preadv", errno.ESTALE), ("open", errno.EACCES), ("open", errno.ESTALE)])
def test_every_reader_says_which_file(model, tmp_path, monkeypatch, call, code):
    shutil.copytree(model, tmp_path / "src")
    ckpt = reshard.open(tmp_path / "src")
    failing(monkeypatch, call, 0, code)
    for work in (lambda: reshard.convert(ckpt, tmp_path / "out", format="tp", tp=2), lambda: reshard.load(ckpt, format="vllm", tp=3),
                 lambda: reshard.diff(ckpt, model)):  # fmt: skip
        with pytest.raises(reshard.SourceError, match=f"src/model.safetensors can't be read.*{os.strerror(code)}"):
            work()


def test_headers_and_side_files_too(model, tmp_path):
    """/proc/self/mem is a plain file that fails when it is read."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = tmp_path / name
        folder.mkdir()
        for path in model.iterdir():
            (folder / path.name).symlink_to(path)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/proc/self/mem")
        with pytest.raises(reshard.SourceError, match="can't be read"):
            reshard.convert(folder, tmp_path / "out", format="tp", tp=2)
        assert not (tmp_path / "out").exists()
