"""Distributed checkpoints that are not whole, not one, or not what they say: which file, which rank, both numbers."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import reshard
from reshard.demo import make_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 33, "num_hidden_layers": 1, "tie_word_embeddings": False,
}  # fmt: skip
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    make_model(tmp_path / "hf", CONFIG)
    reshard.convert(tmp_path / "hf", tmp_path / "dcp", format="dcp", tp=3)
    (tmp_path / "dcp/reshard.json").unlink()
    return tmp_path / "dcp"


def changed(folder: Path, change) -> None:
    """torch's own metadata, changed by `change`, in the place of what is there."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(reshard.ReshardError) as told:
        reshard.open(folder)
    assert all(word in f"{told.value} {told.value.hint}" for word in words), told.value


def test_the_control_is_read(folder, tmp_path):
    changed(folder, lambda metadata: None)
    assert reshard.diff(folder, tmp_path / "hf")


def test_files_that_are_missing_are_named_with_their_ranks(folder):
    (folder / "__1_0.distcp").unlink()
    (folder / "__2_0.distcp").unlink()
    refused(folder, "names 3 files, 2 of them are missing", "__1_0.distcp (rank 1)", "__2_0.distcp (rank 2)")


def test_a_truncated_file_is_named_with_both_sizes(folder):
    path = folder / "__1_0.distcp"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "__1_0.distcp", f"has {size - 100} bytes", f"{size}")


def test_a_save_that_was_not_finished(folder):
    (folder / ".metadata").unlink()
    refused(folder, "no .metadata", "not finished")


def test_files_of_another_checkpoint(folder, tmp_path):
    make_model(tmp_path / "other", CONFIG | {"vocab_size": 39})
    reshard.convert(tmp_path / "other", tmp_path / "theirs", format="dcp", tp=3)
    shutil.copy(tmp_path / "theirs/__0_0.distcp", folder)
    refused(folder, "__0_0.distcp", "copy the folder again, whole")


def test_another_dtype_than_metadata_says(folder):
    weights = {name: tensor.to(torch.float16) for name, tensor in load_file(folder.parent / "hf/model.safetensors").items()}
    (folder / ".metadata").unlink()
    shutil.rmtree(folder)
    dcp.save(weights, checkpoint_id=str(folder), no_dist=True)
    shutil.copy(folder.parent / "hf/config.json", folder)

    def lie(metadata):
        for tensor in metadata.state_dict_metadata.values():
            tensor.properties.dtype = torch.bfloat16

    changed(folder, lie)
    refused(folder, "is F16, .metadata says BF16")


def chunks_of(metadata, name=NORM):
    return metadata.state_dict_metadata[name].chunks


CHANGES = {
    "a chunk that no file holds": (lambda m: chunks_of(m).append(type(chunks_of(m)[0])(torch.Size([3]), torch.Size([1]))), ["no file is named for model.norm.weight at [3]"]),
    "a hole": (lambda m: chunks_of(m).pop(1), ["model.norm.weight", "rank 0, 2", "10 of 16", "[6:12]"]),
    "compressed": (lambda m: setattr(next(iter(m.storage_data.values())), "transform_descriptors", ["stream.zstd/1"]), ["compressed", "zstd"]),
    "out of the folder": (lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "../../etc/passwd"), ["leads out of the folder"]),
    "a negative place": (lambda m: setattr(next(iter(m.storage_data.values())), "offset", -1), ["is said to lie at -1"]),
    "another size": (lambda m: setattr(m.state_dict_metadata[NORM], "size", torch.Size([17])), ["shape [17], expected [16]"]),
    "no tensors": (lambda m: m.state_dict_metadata.clear(), ["missing"]),
    "no places": (lambda m: setattr(m, "storage_data", None), ["no metadata of torch.distributed.checkpoint"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_metadata_that_says_what_is_not_so(folder, case):
    change, words = CHANGES[case]
    changed(folder, change)
    refused(folder, *words)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


def test_nothing_that_a_pickle_names_is_run(folder, tmp_path):
    changed(folder, lambda metadata: setattr(metadata, "planner_data", Evil(tmp_path / "was run")))
    refused(folder, ".metadata", "which reshard neither needs nor runs")
    assert not (tmp_path / "was run").exists()
    (folder / ".metadata").write_bytes(b"\x80\x04garbage")
    refused(folder, ".metadata", "damaged")
    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))
    refused(folder, "no metadata of torch.distributed.checkpoint")


def test_every_cut_of_the_metadata_is_an_error_of_ours(folder):
    """No traceback, whatever stands in the file."""
    raw = (folder / ".metadata").read_bytes()
    for stop in range(0, len(raw), 97):
        (folder / ".metadata").write_bytes(raw[:stop])
        with pytest.raises(reshard.ReshardError):
            reshard.open(folder)
    for at in range(0, len(raw), 61):
        (folder / ".metadata").write_bytes(raw[:at] + bytes([raw[at] ^ 0x55]) + raw[at + 1 :])
        try:
            reshard.open(folder)
        except reshard.ReshardError:
            pass
