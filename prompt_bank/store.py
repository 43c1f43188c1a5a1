"""The durable home of versions and of the pointer table: a folder, behind a narrow protocol so that others can follow.

    store.json                    the store's id
    versions/<domain>/<number>/   one folder a version; it exists once its manifest does
    changes/<epoch>.json          one file a change of the pointer table; the table is their fold
    tables/<epoch>.json           the table after some of the changes, to start from; may be deleted

All commits are exclusive creations, so a store needs nothing but "create unless it exists". Blocking: call it off the event
loop.
"""

import logging
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from prompt_bank.card import DOMAIN_PATTERN
from prompt_bank.conversation import first_problem
from prompt_bank.errors import PointerConflictError, UnknownVersionError, VersionCorruptError
from prompt_bank.manifest import Manifest
from prompt_bank.pointers import PointerChange, PointerTable
from prompt_bank.settings import BankSettings
from prompt_bank.soft_prompt import SoftPrompt
from prompt_bank.version import (
    MANIFEST_FILE,
    Draft,
    ServedModel,
    Version,
    check_soft_prompt_file,
    create_exclusively,
    read_manifest,
    read_soft_prompt,
    read_version,
    version_files,
    write_version,
)

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"[1-9][0-9]*")
_EPOCH_FILE = re.compile(r"[0-9]{12}\.json")
_CHANGES_A_TABLE = 64  # so many changes at most are folded when a store is opened

ModelT = TypeVar("ModelT", bound=BaseModel)


class Store(Protocol):
    @property
    def id(self) -> str:
        """Names this store among others that share one Redis; never changes."""
        ...

    def domains(self) -> list[str]: ...

    def versions(self, domain: str) -> list[int]:
        """Committed versions, oldest first."""
        ...

    def add_version(self, draft: Draft, actor: str, reason: str) -> Version:
        """Commits a new version; two writers at once get two numbers, and no number is given twice."""
        ...

    def read_manifest(self, domain: str, number: int) -> Manifest:
        """Raises UnknownVersionError or VersionCorruptError."""
        ...

    def read_version(self, domain: str, number: int) -> Version:
        """Manifest and card. Raises UnknownVersionError or VersionCorruptError."""
        ...

    def check_version(self, domain: str, number: int) -> Version:
        """Like read_version, and reads the soft prompt too: raises VersionCorruptError when it is not what was published."""
        ...

    def read_soft_prompt(self, version: Version, model: ServedModel) -> SoftPrompt: ...

    def read_files(self, version: Version) -> dict[str, bytes]:
        """What a version is made of, by file name, for those who copy it. Raises UnknownVersionError or VersionCorruptError."""
        ...

    def delete_version(self, domain: str, number: int) -> None:
        """Removes a version's files, its manifest first; again after a crash, it removes the rest."""
        ...

    def pointer_table(self) -> PointerTable: ...

    def commit(self, change: PointerChange, epoch: int) -> PointerTable:
        """Makes `change` the one of `epoch`. Raises PointerConflictError when another was first, or what `check` raises."""
        ...

    def changes(self) -> Iterator[PointerChange]:
        """All changes, oldest first."""
        ...


def open_store(settings: BankSettings) -> Store:
    """The store of an installation. Blocking."""
    return FolderStore(settings.data_dir / "bank")


class _StoreRecord(BaseModel):
    id: str


class FolderStore:
    """A store in a folder of a local or shared file system that has hard links. Any thread may call it."""

    def __init__(self, root: Path) -> None:
        self._versions = root / "versions"
        self._changes = root / "changes"
        self._tables = root / "tables"
        for folder in (self._versions, self._changes, self._tables):
            folder.mkdir(parents=True, exist_ok=True)
        self.id = _store_id(root / "store.json")
        self._table: PointerTable | None = None
        self._folding = threading.Lock()

    def domains(self) -> list[str]:
        return sorted(folder.name for folder in self._versions.iterdir() if self.versions(folder.name))

    def versions(self, domain: str) -> list[int]:
        return [number for number in self._numbers(domain) if (self._folder(domain, number) / MANIFEST_FILE).is_file()]

    def _numbers(self, domain: str) -> list[int]:
        """The numbers taken, committed or not, oldest first. Anything else that lies there is not ours."""
        folder = self._versions / domain
        # The pattern also keeps a name with separators inside this folder.
        if not re.fullmatch(DOMAIN_PATTERN, domain) or not folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in folder.iterdir() if _NUMBER.fullmatch(entry.name))

    def add_version(self, draft: Draft, actor: str, reason: str) -> Version:
        number, folder = self._claim_folder(draft.card.name)
        return write_version(draft, number, folder, actor, reason)

    def _claim_folder(self, domain: str) -> tuple[int, Path]:
        """A new folder with the next number. A writer that died, or a deleted version, leaves its number taken."""
        parent = self._versions / domain
        parent.mkdir(exist_ok=True)
        number = max(self._numbers(domain), default=0)
        while True:
            number += 1
            folder = parent / str(number)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return number, folder

    def read_manifest(self, domain: str, number: int) -> Manifest:
        folder = self._committed(domain, number)
        return _of(domain, number, read_manifest(folder), folder)

    def read_version(self, domain: str, number: int) -> Version:
        folder = self._committed(domain, number)
        version = read_version(folder)
        _of(domain, number, version.manifest, folder)
        return version

    def check_version(self, domain: str, number: int) -> Version:
        version = self.read_version(domain, number)
        check_soft_prompt_file(self._folder(domain, number), version)
        return version

    def _committed(self, domain: str, number: int) -> Path:
        folder = self._folder(domain, number)
        if not re.fullmatch(DOMAIN_PATTERN, domain) or not (folder / MANIFEST_FILE).is_file():
            known = ", ".join(map(str, self.versions(domain)))
            if not known:
                domains = ", ".join(self.domains()) or "none"
                raise UnknownVersionError(
                    f"{domain} has no version {number}, nor any other; the bank has the domains: {domains}"
                )
            raise UnknownVersionError(f"{domain} has no version {number}; it has: {known}")
        return folder

    def read_soft_prompt(self, version: Version, model: ServedModel) -> SoftPrompt:
        return read_soft_prompt(self._folder(version.manifest.domain, version.manifest.version), version, model)

    def read_files(self, version: Version) -> dict[str, bytes]:
        folder = self._committed(version.manifest.domain, version.manifest.version)
        try:
            return {name: (folder / name).read_bytes() for name in version_files(version)}
        except OSError as error:
            raise VersionCorruptError(f"{version.name} cannot be read: {error}; publish it again") from error

    def delete_version(self, domain: str, number: int) -> None:
        folder = self._folder(domain, number)
        if not re.fullmatch(DOMAIN_PATTERN, domain) or not folder.is_dir():
            return
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        for entry in folder.iterdir():  # the empty folder stays: it keeps the number taken
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _folder(self, domain: str, number: int) -> Path:
        return self._versions / domain / str(number)

    def pointer_table(self) -> PointerTable:
        with self._folding:
            if self._table is None or not self._is_still(self._table):
                last = _last_epoch(self._changes)
                table = self._folded(self._newest_table(last))
                if table.epoch < last:
                    missing = self._change_file(table.epoch + 1)
                    raise VersionCorruptError(f"{missing} is missing, but later changes are there; restore it from a backup")
                self._table = table
            else:
                self._table = self._folded(self._table)
            return self._table

    def _is_still(self, table: PointerTable) -> bool:
        """Whether the store still holds the change that led to `table`: it may have been restored from a backup."""
        path = self._change_file(table.epoch)
        return table.epoch == 0 or (path.exists() and _read(path, PointerChange) == table.change)

    def _folded(self, table: PointerTable) -> PointerTable:
        while (path := self._change_file(table.epoch + 1)).exists():
            table = table.with_change(_read(path, PointerChange))
        return table

    def _newest_table(self, last: int) -> PointerTable:
        """The newest table up to epoch `last` that can be read; one that cannot is only a longer fold."""
        for path in sorted(self._tables.iterdir(), reverse=True):
            if _EPOCH_FILE.fullmatch(path.name) and _epoch(path) <= last:
                try:
                    return _read(path, PointerTable)
                except VersionCorruptError:
                    continue
        return PointerTable()

    def _change_file(self, epoch: int) -> Path:
        return self._changes / f"{epoch:012}.json"

    def commit(self, change: PointerChange, epoch: int) -> PointerTable:
        before = self.pointer_table()
        if before.epoch != epoch - 1:
            raise PointerConflictError(f"the pointer table is at epoch {before.epoch}, not {epoch - 1}; try again")
        before.check(change)
        after = before.with_change(change)  # first: what cannot be applied must not be written
        try:
            create_exclusively(self._change_file(epoch), change.model_dump_json(indent=2, exclude_none=True) + "\n")
        except FileExistsError as error:
            raise PointerConflictError(f"pointer epoch {epoch} was taken by another writer; try again") from error
        if epoch % _CHANGES_A_TABLE == 0:
            try:
                (self._tables / f"{epoch:012}.json").write_text(after.model_dump_json(exclude_none=True), encoding="utf-8")
            except OSError as error:  # the change is committed; only opening the store takes longer without it
                log.warning("no table of epoch %d is kept: %s", epoch, error)
        return after

    def changes(self) -> Iterator[PointerChange]:
        for epoch in range(1, self.pointer_table().epoch + 1):
            yield _read(self._change_file(epoch), PointerChange)


def _of(domain: str, number: int, manifest: Manifest, folder: Path) -> Manifest:
    if (manifest.domain, manifest.version) != (domain, number):
        raise VersionCorruptError(
            f"{folder} holds {manifest.domain} v{manifest.version}; a version cannot be moved or copied, publish it again"
        )
    return manifest


def _store_id(path: Path) -> str:
    if not path.exists():
        with suppress(FileExistsError):  # another process was first: its id counts
            create_exclusively(path, _StoreRecord(id=uuid4().hex).model_dump_json() + "\n")
    return _read(path, _StoreRecord).id


def _last_epoch(folder: Path) -> int:
    return max((_epoch(path) for path in folder.iterdir() if _EPOCH_FILE.fullmatch(path.name)), default=0)


def _epoch(path: Path) -> int:
    return int(path.stem)


def _read(path: Path, model: type[ModelT]) -> ModelT:
    try:
        return model.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise VersionCorruptError(f"{path}: {first_problem(error)}; restore it from a backup") from error
    except (OSError, UnicodeDecodeError) as error:
        raise VersionCorruptError(f"{path} cannot be read: {error}; restore it from a backup") from error
