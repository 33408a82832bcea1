"""The Hugging Face Hub as a place of checkpoints: ``hf://ORG/NAME[@REV][/SUBDIR]`` wherever a folder may stand.

    location      what such a text names
    failures      the client's exceptions as one line and a hint; patience with what may pass
    repository    one repository at one commit: its files, their places, ranges of their bytes
    folder        a folder of it, as formats see folders
    source        its bytes, as the executor wants them
    checksum      the Hub's sha256 of files that pass by whole
    pull, push, card   whole folders down and up, and the model card

The client library does what it can; ours are the ranged reads, since it has none that are bounded, pinned and resumable.
huggingface_hub takes a third of a second to import, so nothing here is imported before a location is seen to be remote.
"""


def is_remote(path: object) -> bool:
    """Whether `path`, as a user wrote it, names a place on the Hub."""
    text = str(path)
    return text.startswith("hf://") or "://" in text
