"""A version as one file: the same bytes each time, everything in it comes back, and nothing else gets in."""

import errno
import io
import os
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prompt_bank.archive import BRIEF_MEMBERS, MEMBERS, copy_members, unpack_archive, write_archive, write_folder
from prompt_bank.base_model import ModelShape
from prompt_bank.errors import ArchiveError
from prompt_bank.peft_format import WEIGHTS_FILE
from prompt_bank.soft_prompt import KINDS, Kind
from prompt_bank.store import FolderStore
from prompt_bank.version import CARD_FILE, Draft, ServedModel
from tests.prompt_bank.conftest import make_card, make_prompt

SHAPE = ModelShape(num_layers=2, num_kv_heads=2, head_size=4, hidden_size=16)
SERVED = ServedModel("tiny", "f" * 64, "c" * 64, SHAPE)


def version_folder(store: FolderStore, kind: Kind | None = "prefix_kv") -> Path:
    prompt = make_prompt(SHAPE, kind) if kind else None
    version = store.add_version(Draft(make_card(), SERVED, prompt), "tester", "a test")
    return store._folder("banking", version.manifest.version)


def files_in(folder: Path) -> dict[str, bytes]:
    """As the store gives them."""
    store = FolderStore(folder.parents[2])
    return store.read_files(store.read_version("banking", int(folder.name)))


@pytest.fixture
def folder(store: FolderStore) -> Path:
    return version_folder(store)


@pytest.fixture
def archive(folder: Path, tmp_path: Path) -> Path:
    write_archive(files_in(folder), tmp_path / "banking.zip")
    return tmp_path / "banking.zip"


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_round_trip_is_exact(store: FolderStore, tmp_path: Path, scratch: Path, kind: Kind | None) -> None:
    folder, path = version_folder(store, kind), tmp_path / "version.zip"
    write_archive(files_in(folder), path)
    unpack_archive(path, scratch, SHAPE)
    assert sorted(contents(scratch)) == sorted(MEMBERS if kind else BRIEF_MEMBERS)
    assert contents(scratch).items() <= contents(folder).items()


def test_one_version_always_gives_the_same_bytes(folder: Path, tmp_path: Path, archive: Path) -> None:
    for member in folder.iterdir():
        os.utime(member, (0, 0))
    write_archive(files_in(folder), tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == archive.read_bytes()


def test_what_else_lies_in_the_folder_stays_there(folder: Path, tmp_path: Path, scratch: Path) -> None:
    (folder / ".manifest.json-left-over").write_text("x")
    write_archive(files_in(folder), tmp_path / "version.zip")
    write_folder(files_in(folder), tmp_path / "version")
    with zipfile.ZipFile(tmp_path / "version.zip") as written:
        assert written.namelist() == list(MEMBERS)
    assert sorted(contents(tmp_path / "version")) == sorted(MEMBERS)


def test_nothing_is_overwritten(folder: Path, archive: Path, tmp_path: Path) -> None:
    before = archive.read_bytes()
    with pytest.raises(ArchiveError, match="exists already; give another name"):
        write_archive(files_in(folder), archive)
    assert archive.read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ArchiveError, match="is not empty"):
        write_folder(files_in(folder), tmp_path / "full")
    assert contents(tmp_path / "full") == {"mine.txt": b"mine"}
    (tmp_path / "empty").mkdir()
    write_folder(files_in(folder), tmp_path / "empty")
    assert len(contents(tmp_path / "empty")) == 4


def test_a_place_that_cannot_be_written_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="cannot be written: No such file or directory; give a path"):
        write_archive(files_in(folder), tmp_path / "none" / "version.zip")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArchiveError, match=r"cannot be written: .*; give a folder"):
        write_folder(files_in(folder), tmp_path / "file" / "version")


def test_a_failed_archive_is_not_left_behind(folder: Path, tmp_path: Path) -> None:
    class Full(dict[str, bytes]):
        def items(self) -> Iterator[tuple[str, bytes]]:  # type: ignore[override]
            yield CARD_FILE, self[CARD_FILE]
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ArchiveError, match="cannot be written: No space left on device"):
        write_archive(Full(files_in(folder)), tmp_path / "version.zip")
    assert not (tmp_path / "version.zip").exists()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_of_another_zip_program_is_taken(folder: Path, tmp_path: Path, scratch: Path, compression: int) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w", compression) as other:
        for name in reversed(MEMBERS):
            other.write(folder / name, name)
    unpack_archive(tmp_path / "other.zip", scratch, SHAPE)
    assert contents(scratch) == contents(folder)


def zipped(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")  # zipfile warns of a duplicate name
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


GOOD = [(name, b"x") for name in MEMBERS]


@pytest.mark.parametrize(
    "members",
    [
        [],
        GOOD[:1],
        GOOD[:3],
        [*GOOD, GOOD[0]],
        [*GOOD[:3], GOOD[0]],
        [*GOOD, ("more.txt", b"x")],
        *(
            [*GOOD[:3], (name, b"x")]
            for name in ("../adapter_model.safetensors", "/tmp/adapter_model.safetensors", "a/card.toml")
        ),
        *([*GOOD[:3], (name, b"x")] for name in ("./card.toml", "CARD.TOML", "..\\card.toml", "adapter_model.safetensors/")),
        [*GOOD[:3], ("adapter_model.bin", b"x")],
    ],
)
def test_other_members_are_refused_and_nothing_is_unpacked(
    tmp_path: Path, scratch: Path, members: list[tuple[str, bytes]]
) -> None:
    path = tmp_path / "bad.zip"
    path.write_bytes(zipped(members))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ArchiveError, match=r"bad.zip holds \[.*\], expected \['card.toml'"):
        unpack_archive(path, scratch, SHAPE)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_cut_by_a_null_is_refused(archive: Path, scratch: Path) -> None:
    archive.write_bytes(archive.read_bytes().replace(b"card.toml", b"card.to\0l"))
    with pytest.raises(ArchiveError, match=r"holds .*card\.to\\x00l"):
        unpack_archive(archive, scratch, SHAPE)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_odd_compression_is_refused(tmp_path: Path, scratch: Path, compression: int) -> None:
    path = tmp_path / "odd.zip"
    path.write_bytes(zipped(GOOD, compression))
    with pytest.raises(ArchiveError, match="is encrypted or oddly compressed; expected stored or deflated"):
        unpack_archive(path, scratch, SHAPE)


def test_encrypted_members_are_refused(archive: Path, scratch: Path) -> None:
    content = bytearray(archive.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(ArchiveError, match=r"card\.toml in .* is encrypted"):
        unpack_archive(archive, scratch, SHAPE)


def peak_of(call: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_refused_cheaply(path: Path, scratch: Path, problem: str) -> None:
    def refuse() -> None:
        with pytest.raises(ArchiveError, match=problem):
            unpack_archive(path, scratch, SHAPE)

    assert peak_of(refuse) < 5_000_000
    assert sum(member.stat().st_size for member in scratch.iterdir()) < 5_000_000


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Good but for its card: a gigabyte of zeros in a megabyte."""
    path = tmp_path_factory.mktemp("bomb") / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(CARD_FILE, "w", force_zip64=False) as card:
            for _ in range(1000):
                card.write(bytes(1_000_000))
        for name in MEMBERS[1:]:
            archive.writestr(name, b"x")
    return path.read_bytes()


def test_a_zip_bomb_is_refused_unread(tmp_path: Path, scratch: Path, bomb: bytes) -> None:
    path = tmp_path / "bomb.zip"
    path.write_bytes(bomb)
    assert_refused_cheaply(path, scratch, r"holds card.toml of 1000000000 bytes, \d+ are the most it may have")
    assert not list(scratch.iterdir())


def test_a_zip_bomb_that_declares_little_is_read_no_further(tmp_path: Path, scratch: Path, bomb: bytes) -> None:
    content = bytearray(bomb)
    entry = content.index(b"PK\x01\x02")
    for header, field in ((0, 22), (entry, 24)):  # the size in the member's own header and in the directory
        struct.pack_into("<L", content, header + field, 1000)
    path = tmp_path / "bomb.zip"
    path.write_bytes(content)
    assert_refused_cheaply(path, scratch, "is not a whole archive of a version: Bad CRC-32")


def test_a_directory_of_many_entries_is_refused_unread(tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "many.zip"
    path.write_bytes(zipped([(f"{number}", b"") for number in range(20_000)]))
    assert_refused_cheaply(path, scratch, r"has a directory of \d+ bytes, at most 4096 are expected")


def test_a_second_larger_directory_is_refused_unread(archive: Path, scratch: Path) -> None:
    """zipfile prefers a zip64 record over the plain one, so a small plain directory could hide a large one."""
    content = archive.read_bytes()
    record = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 10**6, 10**6, 46 * 10**6, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, len(content) - 22, 1)
    archive.write_bytes(content[:-22] + record + locator + content[-22:])
    assert_refused_cheaply(archive, scratch, "does not end as a plain zip file does; export or copy it again")


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x05\x06" + bytes(17), b"not a zip" * 100, b"PK\x05\x06" + bytes(18) + b"!"]
)
def test_what_is_no_archive_is_refused(tmp_path: Path, scratch: Path, content: bytes) -> None:
    path = tmp_path / "no.zip"
    path.write_bytes(content)
    with pytest.raises(ArchiveError, match="is not an archive of `frontdesk bank export`"):
        unpack_archive(path, scratch, SHAPE)


def test_members_of_a_folder_are_copied_bounded(folder: Path, scratch: Path) -> None:
    (folder / "more.txt").write_text("x")
    copy_members(folder, scratch, SHAPE)
    assert sorted(contents(scratch)) == sorted(MEMBERS)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_folder_with_a_link_or_a_huge_member_is_refused(folder: Path, scratch: Path, name: str, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArchiveError, match=f"{name} cannot be read: .* no link"):
        copy_members(folder, scratch, SHAPE)
    (folder / name).unlink()
    with (folder / name).open("wb") as file:
        file.truncate(2**40)
    for member in scratch.iterdir():
        member.unlink()
    with pytest.raises(ArchiveError, match=rf"{name} has 1099511627776 bytes, \d+ are the most it may have"):
        copy_members(folder, scratch, SHAPE)


def test_weights_may_be_as_large_as_the_largest_prompt(store: FolderStore, tmp_path: Path, scratch: Path) -> None:
    draft = Draft(make_card(), SERVED, make_prompt(SHAPE, num_virtual_tokens=1024))
    folder = store._folder("banking", store.add_version(draft, "tester", "a test").manifest.version)
    write_archive(files_in(folder), tmp_path / "large.zip")
    unpack_archive(tmp_path / "large.zip", scratch, SHAPE)
    assert (scratch / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()
