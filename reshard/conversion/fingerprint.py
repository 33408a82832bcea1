"""What decides the bytes of a conversion, as digests: only equal work is continued, and only ranks of one conversion share a folder."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from reshard import __version__
from reshard.conversion.job import Job
from reshard.planner.batches import BATCH, GAP
from reshard.planner.plan import digest as digest_of
from reshard.planner.tiles import MOST_PORTION, PORTION


def first_note(job: Job) -> dict[str, Any]:
    """How the journal of `job` begins: whose work it is, for comparison and for messages."""
    return {
        "fingerprint": fingerprint(job),
        "reshard": __version__,
        "source": job.source.name,
        "options": options(job),
        "state": source_state(job),
    }


def fingerprint(job: Job) -> str:
    """A digest of all that decides the output's bytes and their division into portions.

    That is the conversion (see ``conversion``), the rank, and where each element lies: every block of every stored tensor on
    both sides, and all that the output's files hold besides.
    """
    digest = hashlib.sha256(conversion(job).encode())
    _add(digest, job.rank, PORTION, MOST_PORTION)
    if job.batches is not None:
        _add(digest, GAP, BATCH, [batch.size for batch in job.batches])
    _add(digest, job.plan.fingerprint)
    for file in job.folder.files:
        _add(digest, file.path, file.image.size)
        for offset, content in file.image.segments:
            _add(digest, offset, len(content))
            digest.update(content)
    return digest.hexdigest()


def conversion(job: Job) -> str:
    """A digest of source, layout and options: what all ranks of one conversion have in common."""
    digest = hashlib.sha256()
    _add(
        digest,
        __version__,
        options(job) | {"rank": None},
        source_state(job),
        plain(job.layout.section(job.section)),
        dict(job.layout.sizes),
    )
    _add(digest, digest_of(job.source.stored))
    return digest.hexdigest()


def options(job: Job) -> dict[str, object]:
    """What the user asked for, for messages too."""
    mesh = job.mesh
    return {"format": job.format, "tp": mesh.tp, "pp": mesh.pp, "ep": mesh.ep, "etp": mesh.etp, "dtype": job.dtype,
            "dequantise": job.dequantises or None, "quantised": job.quantised_anew,
            "engine_version": job.engine_version, "engine_platform": job.engine_platform, "max_file": job.max_file, "rank": job.rank}  # fmt: skip


def source_state(job: Job) -> str:
    """The source, and which files it consists of: those of a commit never change."""
    digest = hashlib.sha256()
    _add(digest, job.source.name)
    for file in job.source.files if not job.source.remote else ():
        status = (job.source.path / file).stat()
        _add(digest, file, status.st_size, status.st_mtime_ns, status.st_ino)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", *values: object) -> None:
    digest.update(json.dumps(values, default=str).encode() + b"\n")


def plain(value: object) -> object:
    """A value as lists, texts and numbers; of what is none, the name of its kind."""
    if dataclasses.is_dataclass(value):
        return [plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.repr]
    if isinstance(value, Mapping):
        return [[plain(key), plain(item)] for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value).__name__
