"""A version as one file, for moving it between installations: a zip of exactly the members of its folder.

Nothing in an archive is believed. Its directory is bounded before zipfile parses it, its members are known by exact name, and
each is read no further than its kind can need, into files that we name.
"""

import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from prompt_bank.base_model import ModelShape
from prompt_bank.errors import ArchiveError
from prompt_bank.peft_format import CONFIG_FILE, MAX_TEXT_BYTES, WEIGHTS_FILE, max_weights_bytes, open_regular
from prompt_bank.version import CARD_FILE, MANIFEST_FILE

BRIEF_MEMBERS = (CARD_FILE, MANIFEST_FILE)  # all that a version has that is served by its brief
MEMBERS = (*BRIEF_MEMBERS, CONFIG_FILE, WEIGHTS_FILE)
_ONE_DATE = (1980, 1, 1, 0, 0, 0)  # so that one version always gives the same bytes
_MAX_CARD_BYTES = 200_000  # a thousand examples and a brief; tomllib takes hundreds of times as much to read it
_MAX_DIRECTORY_BYTES = 4096  # four members need some 300
_END_BYTES, _LOCATOR_BYTES = 22, 20


def write_archive(files: Mapping[str, bytes], path: Path) -> None:
    """Writes a version's files as the new file `path`. Raises ArchiveError when it exists or cannot be written."""
    try:
        with path.open("xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, content in files.items():
                info = zipfile.ZipInfo(name, _ONE_DATE)
                info.external_attr = 0o644 << 16
                archive.writestr(info, content)
    except FileExistsError as error:
        raise ArchiveError(f"{path} exists already; give another name") from error
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise ArchiveError(f"{path} cannot be written: {error.strerror}; give a path in a folder you may write to") from error


def write_folder(files: Mapping[str, bytes], path: Path) -> None:
    """Writes a version's files into `path`, new or empty: a PEFT folder with card and manifest beside. ArchiveError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ArchiveError(f"{path} is not empty; give a new folder, or a name that ends in .zip")
        for name, content in files.items():
            (path / name).write_bytes(content)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be written: {error}; give a folder you may write to") from error


def unpack_archive(path: Path, folder: Path, model: ModelShape) -> None:
    """Writes the members of an archive into the empty `folder`. Raises ArchiveError when it is not one of a version."""
    try:
        with path.open("rb") as file:
            _check_directory(path, file)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                names = sorted(info.orig_filename for info in members)
                if names not in (sorted(BRIEF_MEMBERS), sorted(MEMBERS)):
                    raise ArchiveError(f"{path} holds {names}, expected {list(MEMBERS)} once each (the last two may be absent)")
                for info in members:
                    _check_member(path, info, max_bytes(info.orig_filename, model))
                    with archive.open(info) as member, (folder / info.orig_filename).open("xb") as copy:
                        shutil.copyfileobj(member, copy)  # zipfile gives no more than the size it declares
    except (OSError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, EOFError) as error:
        raise ArchiveError(f"{path} is not a whole archive of a version: {error}; export or copy it again") from error


def copy_members(source: Path, folder: Path, model: ModelShape) -> None:
    """Copies the members that a folder from elsewhere has into the empty `folder`: regular files of bounded size."""
    for name in MEMBERS:
        limit, path = max_bytes(name, model), source / name
        try:
            with open_regular(path) as member, (folder / name).open("xb") as copy:
                size = os.fstat(member.fileno()).st_size
                if size > limit:
                    raise ArchiveError(f"{path} has {size} bytes, {limit} are the most it may have")
                shutil.copyfileobj(member, copy)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ArchiveError(f"{path} cannot be read: {error}; expected a regular file, no link") from error


def max_bytes(name: str, model: ModelShape) -> int:
    """The most that a member of this name can need."""
    if name == CARD_FILE:
        return _MAX_CARD_BYTES
    return max_weights_bytes(model) if name == WEIGHTS_FILE else MAX_TEXT_BYTES


def _check_directory(path: Path, file: BinaryIO) -> None:
    """zipfile reads a directory whole, a kilobyte for each of its entries: it must be small and end the file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_BYTES - _LOCATOR_BYTES))
    tail = file.read()
    end = tail[-_END_BYTES:]
    if len(end) < _END_BYTES or end[:4] != b"PK\x05\x06" or end[-2:] != b"\0\0" or tail[:4] == b"PK\x06\x07":
        raise ArchiveError(
            f"{path} is not an archive of `frontdesk bank export`: it does not end as a plain zip file does; export or copy it "
            "again"
        )
    (directory_bytes,) = struct.unpack("<L", end[12:16])
    if directory_bytes > _MAX_DIRECTORY_BYTES:
        raise ArchiveError(
            f"{path} has a directory of {directory_bytes} bytes, at most {_MAX_DIRECTORY_BYTES} are expected; export it again"
        )


def _check_member(path: Path, info: zipfile.ZipInfo, limit: int) -> None:
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveError(f"{info.orig_filename} in {path} is encrypted or oddly compressed; expected stored or deflated")
    if info.file_size > limit:
        raise ArchiveError(f"{path} holds {info.orig_filename} of {info.file_size} bytes, {limit} are the most it may have")
