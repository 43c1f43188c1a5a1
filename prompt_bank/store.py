"""The durable home of versions and of the pointer table: a folder, behind a narrow protocol so that others can follow.

    versions/<domain>/<number>/   one folder a version; it exists once its manifest does
    pointers/<epoch>.json         one file a change of the pointer table; the highest epoch is the table

Both commits are exclusive creations, so a store needs nothing but "create unless it exists". Blocking: call it off the event
loop.
"""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prompt_bank.card import DOMAIN_PATTERN
from prompt_bank.conversation import first_problem
from prompt_bank.errors import PointerConflictError, UnknownVersionError, VersionCorruptError
from prompt_bank.soft_prompt import SoftPrompt
from prompt_bank.version import (
    MANIFEST_FILE,
    Draft,
    ServedModel,
    Version,
    create_exclusively,
    read_soft_prompt,
    read_version,
    write_version,
)

_NUMBER = re.compile(r"[1-9][0-9]*")


class PointerChange(BaseModel):
    """Who moved which live pointer, when and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    fingerprint: str
    version: int
    actor: str
    reason: str
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))


class PointerTable(BaseModel):
    """Which version of each domain is live, for each base model: domain to fingerprint to version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int = 0
    live: dict[str, dict[str, int]] = {}
    change: PointerChange | None = None

    def live_versions(self, fingerprint: str) -> dict[str, int]:
        """Domain to live version for one base model."""
        return {domain: by_model[fingerprint] for domain, by_model in self.live.items() if fingerprint in by_model}

    def with_change(self, change: PointerChange) -> "PointerTable":
        live = {domain: dict(by_model) for domain, by_model in self.live.items()}
        live.setdefault(change.domain, {})[change.fingerprint] = change.version
        return PointerTable(epoch=self.epoch + 1, live=live, change=change)


class Store(Protocol):
    def domains(self) -> list[str]: ...

    def versions(self, domain: str) -> list[int]:
        """Committed versions, oldest first."""
        ...

    def add_version(self, draft: Draft) -> Version:
        """Commits a new version; two writers at once get two numbers."""
        ...

    def read_version(self, domain: str, number: int) -> Version:
        """Raises UnknownVersionError or VersionCorruptError."""
        ...

    def read_soft_prompt(self, version: Version, model: ServedModel) -> SoftPrompt: ...

    def pointer_table(self) -> PointerTable: ...

    def commit_pointers(self, table: PointerTable) -> None:
        """Raises PointerConflictError when this epoch is taken already."""
        ...


class FolderStore:
    """A store in a folder of a local or shared file system that has hard links."""

    def __init__(self, root: Path) -> None:
        self._versions = root / "versions"
        self._pointers = root / "pointers"
        self._versions.mkdir(parents=True, exist_ok=True)
        self._pointers.mkdir(parents=True, exist_ok=True)

    def domains(self) -> list[str]:
        return sorted(folder.name for folder in self._versions.iterdir() if self.versions(folder.name))

    def versions(self, domain: str) -> list[int]:
        if not re.fullmatch(DOMAIN_PATTERN, domain):
            return []  # also keeps a name with separators inside this folder
        return [number for number in self._numbers(domain) if (self._folder(domain, number) / MANIFEST_FILE).is_file()]

    def _numbers(self, domain: str) -> list[int]:
        """The numbers taken, committed or not, oldest first. Anything else that lies there is not ours."""
        folder = self._versions / domain
        if not folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in folder.iterdir() if _NUMBER.fullmatch(entry.name))

    def add_version(self, draft: Draft) -> Version:
        number, folder = self._claim_folder(draft.card.name)
        return write_version(draft, number, folder)

    def _claim_folder(self, domain: str) -> tuple[int, Path]:
        """A new folder with the next number. A writer that died leaves its number unused."""
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

    def read_version(self, domain: str, number: int) -> Version:
        known = self.versions(domain)
        if number not in known:
            raise UnknownVersionError(f"{domain} has no version {number}; it has: {', '.join(map(str, known)) or 'none'}")
        folder = self._folder(domain, number)
        version = read_version(folder)
        if (version.manifest.domain, version.manifest.version) != (domain, number):
            raise VersionCorruptError(f"{folder} holds {version.name}; a version cannot be moved or copied, publish it again")
        return version

    def read_soft_prompt(self, version: Version, model: ServedModel) -> SoftPrompt:
        return read_soft_prompt(self._folder(version.manifest.domain, version.manifest.version), version, model)

    def _folder(self, domain: str, number: int) -> Path:
        return self._versions / domain / str(number)

    def pointer_table(self) -> PointerTable:
        path = max(self._pointers.glob("*.json"), default=None)
        if path is None:
            return PointerTable()
        try:
            return PointerTable.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise VersionCorruptError(f"{path}: {first_problem(error)}; restore it from a backup") from error
        except (OSError, UnicodeDecodeError) as error:
            raise VersionCorruptError(f"{path} cannot be read: {error}; restore it from a backup") from error

    def commit_pointers(self, table: PointerTable) -> None:
        path = self._pointers / f"{table.epoch:012}.json"
        try:
            create_exclusively(path, table.model_dump_json(indent=2) + "\n")
        except FileExistsError as error:
            raise PointerConflictError(f"pointer epoch {table.epoch} was taken by another writer; try again") from error
