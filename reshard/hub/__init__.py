"""The Hugging Face Hub as a place of checkpoints: ``hf://ORG/NAME[@REV][/SUBDIR]`` wherever a folder may stand.

    location      what such a text names
    client        the client library, set up and watched: no token to another host, no wait without end
    failures      its exceptions, and answers that make no sense, as one line and a hint
    patience      failures that pass by themselves: how long, how often, how slow
    answers       what the Hub says of a repository, checked before it is believed
    repository    one repository at one commit: its files, and what of them was fetched and checked
    ranges        ranges of their bytes over the network
    folder        a folder of it, as formats see folders
    source        its bytes, as the executor wants them
    checksum      the Hub's sha256 of files that are read whole
    wording       texts from the network, fit to be shown

Whole folders go up and down in ``reshard.publish``.

The client library creates repositories, uploads and commits. Listings and ranged reads are ours: its own follow any link with the
token, and are not bounded, pinned and resumable.
huggingface_hub takes a third of a second to import, so nothing here is imported before a location is seen to be remote.
"""

from pathlib import Path

from reshard.stores.files import AnyPath


def is_remote(path: object) -> bool:
    """Whether `path`, as a user wrote it, names a place on the Hub: with a scheme, hf:// or that of a URL pasted from the browser."""
    return "://" in str(path)


def folder_of(path: str | AnyPath, cache: bool = False) -> AnyPath:
    """`path` as a pathlib.Path, or as a HubPath if it names a place on the Hub (or is one). `cache`: its files are put into the Hub's cache first."""
    if not isinstance(path, str):
        return path
    if not is_remote(path):
        return Path(path)
    from reshard.hub.folder import open_folder

    return open_folder(str(path), cache)
