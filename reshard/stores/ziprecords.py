"""The zip container of torch.save files: records found by its directory, or laid out; all stored, none compressed.

Source: caffe2/serialize/inline_container.cc, and APPNOTE.TXT for zip64.
"""

import struct
import zlib
from typing import BinaryIO

from reshard.errors import FormatError
from reshard.foreign import quote
from reshard.stores.files import AnyPath, is_lfs_pointer

ALIGNMENT = 64
RESAVE = "re-save it with a current torch: torch.save(torch.load(path, weights_only=True), path)"
COPY = "the file is damaged; copy it again"
_DIRECTORY_LIMIT = 64 << 20  # of a million tensors

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_FULL32, _FULL16 = 0xFFFFFFFF, 0xFFFF


class Archive:
    """The records of one zip, by name without the leading folder, as its directory lists them; offsets are the file's."""

    def __init__(self, path: AnyPath, file: BinaryIO, start: int, end: int):
        self.path, self.file, self.start, self.end = path, file, start, end
        at, size, count = self._directory()
        self.data_end = at
        raw = self._at(at, size)
        self.records: dict[str, tuple[int, int, int, int]] = {}  # length of the name, header, size, checksum
        folder, at = None, 0
        for _ in range(count):
            if at + _CENTRAL.size > size:
                raise self.error(f"directory ends after {len(self.records)} of {count} records")
            sign, _, _, flags, method, _, _, crc, packed, unpacked, n, e, c, _, _, _, header = _CENTRAL.unpack_from(raw, at)
            name_at = at + _CENTRAL.size
            at = name_at + n + e + c
            if sign != b"PK\1\2" or at > size:
                raise self.error(f"record {len(self.records)} of the directory is malformed")
            full = raw[name_at : name_at + n].decode("utf-8", "backslashreplace")
            name = quote(full)
            if _FULL32 in (packed, unpacked, header):
                unpacked, packed, header = self._wide(raw[name_at + n : name_at + n + e], name, unpacked, packed, header)
            if method or flags & 1 or packed != unpacked:
                raise self.error(f"record {name} is compressed or encrypted (method {method}, {packed} for {unpacked} bytes)", RESAVE)
            head, slash, rest = full.partition("/")
            folder = head if folder is None else folder
            if not slash or head != folder or ".." in rest.split("/"):
                raise self.error(f"record {name} lies outside the folder {quote(folder)}", "this is a zip, but not of torch.save")
            if rest in self.records:
                raise self.error(f"record {name} stands twice in the directory")
            self.records[rest] = (n, start + header, unpacked, crc)

    def _at(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        raw = self.file.read(size) if size else b""
        if len(raw) != size:
            raise self.error(f"has {len(raw)} bytes at {offset}, {size} are needed")
        return raw

    def error(self, message: str, hint: str | None = COPY) -> FormatError:
        return FormatError(f"{self.path}: {message}", hint)

    def _directory(self) -> tuple[int, int, int]:
        """Offset, size and number of records of the zip's directory."""
        tail_at = max(self.start, self.end - _END.size - _FULL16)
        tail = self._at(tail_at, self.end - tail_at)
        found = tail.rfind(b"PK\5\6")
        if found < 0 or found + _END.size > len(tail):
            raise self._foreign()
        _, _, _, _, count, size, at, comment = _END.unpack_from(tail, found)
        if found + _END.size + comment != len(tail):
            raise self.error(f"has {len(tail) - found - _END.size} bytes after its end, {comment} are declared")
        limit = tail_at + found
        if found >= _LOCATOR.size and tail[found - _LOCATOR.size :][:4] == b"PK\6\7":
            (_, _, end64, _) = _LOCATOR.unpack_from(tail, found - _LOCATOR.size)
            limit -= _LOCATOR.size + _END64.size
            if self.start + end64 != limit:
                raise self.error(f"zip64 end record is said to lie at {end64}, expected {limit - self.start}")
            sign, _, _, _, _, _, _, count, size, at = _END64.unpack(self._at(limit, _END64.size))
            if sign != b"PK\6\6":
                raise self.error(f"no zip64 end record at {end64}")
        if self.start + at + size != limit or size > _DIRECTORY_LIMIT or count * _CENTRAL.size > size:
            raise self.error(
                f"directory of {count} records is said to span bytes {at} to {at + size}, expected to end at {limit - self.start}"
            )
        return self.start + at, size, count

    def _foreign(self) -> FormatError:
        head = self._at(self.start, min(512, self.end - self.start))
        if head[:1] == b"\x80" or head[257:262] == b"ustar":
            return self.error("is in torch's format of before 1.6 (a bare pickle or a tar)", RESAVE)
        if is_lfs_pointer(head):
            return self.error("is a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`")
        if head[:4] == b"PK\3\4":
            return self.error(f"zip of {self.end - self.start} bytes has no end record: it is truncated")
        return self.error("is not a torch.save file", "expected a zip that holds a data.pkl")

    def _wide(self, extra: bytes, name: str, *numbers: int) -> list[int]:
        """`numbers` with those that do not fit 32 bits taken from the zip64 extra field, in the order of the specification."""
        while len(extra) >= 4:
            kind, size = struct.unpack_from("<2H", extra)
            if kind == 1:
                wide = iter(struct.unpack_from(f"<{min(size, len(extra) - 4) // 8}Q", extra, 4))
                return [next(wide, _FULL32) if n == _FULL32 else n for n in numbers]
            extra = extra[4 + size :]
        raise self.error(f"record {name} lacks its zip64 sizes")

    def locate(self, key: str) -> tuple[int, int]:
        """Offset and size of a record's content, by its own header."""
        name = quote(key)
        if key not in self.records:
            raise self.error(f"record {name} is missing; the zip has {len(self.records)} records")
        length, header, size, _ = self.records[key]
        if header + _LOCAL.size > self.data_end:
            raise self.error(f"record {name} is said to lie at {header}, the data ends at {self.data_end}")
        sign, *_, n, e = _LOCAL.unpack(self._at(header, _LOCAL.size))
        at = header + _LOCAL.size + n + e
        if sign != b"PK\3\4" or n != length:
            raise self.error(f"record {name} has no header at {header}")
        if at + size > self.data_end:
            raise self.error(f"record {name} spans bytes {at} to {at + size}, the data ends at {self.data_end}")
        return at, size

    def content(self, key: str, limit: int) -> bytes:
        at, size = self.locate(key)
        if size > limit:
            raise self.error(f"record {key} has {size} bytes, more than the {limit} allowed", "this is no checkpoint of tensors")
        raw, crc = self._at(at, size), self.records[key][3]
        # torch writes 0 when told not to compute checksums, so 0 says nothing
        if crc and zlib.crc32(raw) != crc:
            raise self.error(f"record {key} has checksum {zlib.crc32(raw):08x}, its directory says {crc:08x}")
        return raw


def _zip64(numbers: list[int]) -> bytes:
    """The extra field for numbers that do not fit 32 bits."""
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


class Layout:
    """A zip growing record by record; content that is only reserved parts its bytes into segments."""

    def __init__(self, folder: str):
        self.folder = folder
        self.segments: list[tuple[int, bytes]] = []
        self.at, self.bytes = 0, bytearray()  # of the segment in work
        self.directory = bytearray()
        self.count = 0

    def add(self, name: str, content: bytes) -> None:
        self._header(name, len(content), zlib.crc32(content))
        self.bytes += content
        self._descriptor(len(content), zlib.crc32(content))

    def reserve(self, name: str, size: int) -> int:
        self._header(name, size, 0)
        offset = self.at + len(self.bytes)
        if size:
            self.segments.append((self.at, bytes(self.bytes)))
            self.at, self.bytes = offset + size, bytearray()
            self._descriptor(size, 0)
        return offset

    def _header(self, name: str, size: int, crc: int) -> None:
        """The record's own header, padded so that its content is aligned, and its line in the directory.

        As torch's writer: sizes in the header are 0 and follow the content (flag 8), except where there is no content; zip64
        fields appear only where a number needs them, and padding is a field `FB` of Zs.
        """
        start = self.at + len(self.bytes)
        full = f"{self.folder}/{name}".encode()
        big, far = size >= _FULL32, start >= _FULL32
        wide = _zip64(([size, size] if big else []) + ([start] if far else []))
        padding = -(start + _LOCAL.size + len(full) + len(wide) + 4) % ALIGNMENT
        # the packed size is 0 here as all sizes are, by torch's reading of the specification
        extra = _zip64(([size, 0] if big else []) + ([start] if far else [])) + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        flags = 0x0808 if size else 0x0800  # UTF-8 name, sizes after the content
        self.wide = big or far
        self.bytes += _LOCAL.pack(b"PK\3\4", 0, flags, 0, 0, 0, 0, 0, 0, len(full), len(extra)) + full + extra
        short = _FULL32 if big else size
        self.directory += _CENTRAL.pack(b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, short, short, len(full), len(wide),
                                        0, 0, 0, 0, _FULL32 if far else start) + full + wide  # fmt: skip
        self.count += 1

    def _descriptor(self, size: int, crc: int) -> None:
        self.bytes += struct.pack("<4sL2Q" if self.wide else "<4s3L", b"PK\7\x08", crc, size, size)

    def finish(self) -> tuple[int, tuple[tuple[int, bytes], ...]]:
        """Size of the whole file and its segments."""
        at, size, count = self.at + len(self.bytes), len(self.directory), self.count
        self.bytes += self.directory
        self.bytes += _END64.pack(b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, at)
        self.bytes += _LOCATOR.pack(b"PK\6\7", 0, at + size, 1)
        short = min(count, _FULL16)
        self.bytes += _END.pack(b"PK\5\6", 0, 0, short, short, min(size, _FULL32), min(at, _FULL32), 0)
        self.segments.append((self.at, bytes(self.bytes)))
        return self.at + len(self.bytes), tuple(self.segments)
