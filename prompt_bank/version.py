"""A domain version and its folder on disk: card.toml, a PEFT checkpoint when it is trained, and manifest.json, written last.

The manifest appears by an exclusive hard link, whole or not at all, so a folder without one is no version, and two writers
cannot both commit. A version is never changed after that.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from pydantic import ValidationError

from prompt_bank.base_model import BaseModel, ModelShape
from prompt_bank.card import Card
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import first_problem
from prompt_bank.errors import BaseModelMismatchError, CardError, ChatFormatMismatchError, SoftPromptError, VersionCorruptError
from prompt_bank.manifest import BaseModelRecord, Manifest, SoftPromptRecord, TrainingRecord
from prompt_bank.peft_format import CONFIG_FILE, WEIGHTS_FILE, declared_shape, read_peft, write_peft
from prompt_bank.soft_prompt import SoftPrompt

CARD_FILE = "card.toml"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a version must have been made for, to be served: base model by fingerprint, chat format by digest."""

    name: str
    fingerprint: str
    chat_format: str
    shape: ModelShape

    @classmethod
    def of(cls, base: BaseModel, chat_format: ChatFormat) -> "ServedModel":
        return cls(base.name, base.fingerprint, chat_format.digest, base.shape)


@dataclass(frozen=True, slots=True)
class Version:
    """A version as it is served: its manifest and card; the soft prompt is fetched by digest when it is needed."""

    manifest: Manifest
    card: Card

    @property
    def name(self) -> str:
        return f"{self.manifest.domain} v{self.manifest.version}"

    @property
    def digest(self) -> str | None:
        return self.manifest.soft_prompt.digest if self.manifest.soft_prompt else None

    @property
    def content_digest(self) -> str:
        """What tells candidates apart: soft prompt and card together."""
        return _sha256(f"{self.digest} {self.manifest.card_sha256}")


@dataclass(frozen=True, slots=True)
class Draft:
    """All of a version but its number."""

    card: Card
    model: ServedModel
    soft_prompt: SoftPrompt | None = None
    training: TrainingRecord | None = None
    parent: int | None = None


def version_files(version: Version) -> tuple[str, ...]:
    """The names of the files it is made of, in one order."""
    return (CARD_FILE, MANIFEST_FILE) if version.digest is None else (CARD_FILE, MANIFEST_FILE, CONFIG_FILE, WEIGHTS_FILE)


def write_version(draft: Draft, number: int, folder: Path, actor: str, reason: str) -> Version:
    """Writes a version into the existing, empty `folder`; the last step commits it. Raises FileExistsError when it is taken."""
    card_text = draft.card.to_toml()
    (folder / CARD_FILE).write_text(card_text, encoding="utf-8")
    if draft.soft_prompt is not None:
        write_peft(draft.soft_prompt, folder, draft.model.shape, draft.model.name)
    manifest = Manifest(
        domain=draft.card.name,
        version=number,
        actor=actor,
        reason=reason,
        base_model=BaseModelRecord(name=draft.model.name, fingerprint=draft.model.fingerprint),
        chat_format=draft.model.chat_format,
        card_sha256=_sha256(card_text),
        soft_prompt=_record_of(draft.soft_prompt),
        parent=draft.parent,
        training=draft.training,
    )
    for entry in [*folder.iterdir(), *folder.parents[:2]]:  # the two above: a new domain and this folder are entries in them
        _sync(entry)
    create_exclusively(folder / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
    return Version(manifest, draft.card)


def _record_of(prompt: SoftPrompt | None) -> SoftPromptRecord | None:
    if prompt is None:
        return None
    return SoftPromptRecord(
        kind=prompt.kind,
        digest=prompt.digest,
        num_virtual_tokens=prompt.num_virtual_tokens,
        num_bytes=prompt.num_bytes,
    )


def create_exclusively(path: Path, text: str) -> None:
    """Creates `path` with all of `text`, durably. Raises FileExistsError, and leaves the file alone, when it exists."""
    # Not mkstemp(), whose files only their owner reads: the service need not run as the operator's user.
    scratch = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> Manifest:
    """Raises VersionCorruptError when it is not what was written."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except ValidationError as error:
        raise VersionCorruptError(f"{folder / MANIFEST_FILE}: {first_problem(error)}; publish it again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise VersionCorruptError(f"the version in {folder} cannot be read: {error}; publish it again") from error


def read_version(folder: Path) -> Version:
    """Raises VersionCorruptError when manifest or card are not what was written."""
    manifest = read_manifest(folder)
    try:
        card_text = (folder / CARD_FILE).read_text(encoding="utf-8")
        card = Card.from_toml(card_text, str(folder / CARD_FILE))
    except (OSError, UnicodeDecodeError, CardError) as error:
        raise VersionCorruptError(f"the version in {folder} cannot be read: {error}; publish it again") from error
    if _sha256(card_text) != manifest.card_sha256 or card.name != manifest.domain:
        raise VersionCorruptError(f"{folder / CARD_FILE} was changed after it was published; add it as a new version")
    return Version(manifest, card)


def read_soft_prompt(folder: Path, version: Version, model: ServedModel) -> SoftPrompt:
    """The version's soft prompt, once it fits `model` and its digest is the manifest's.

    Raises BaseModelMismatchError, ChatFormatMismatchError, SoftPromptError or VersionCorruptError.
    """
    check_served_model(version, model)
    prompt = read_peft(folder, model.shape)
    if prompt.digest != version.digest:
        raise VersionCorruptError(
            f"the soft prompt of {version.name} has digest {prompt.digest[:12]}, its manifest says "
            f"{str(version.digest)[:12]}; publish it again"
        )
    return prompt


def check_soft_prompt_file(folder: Path, version: Version) -> None:
    """Raises VersionCorruptError when the soft prompt in `folder` is not the manifest's; needs no base model."""
    if version.digest is None:
        return
    try:
        digest = read_peft(folder, declared_shape(folder)).digest
    except SoftPromptError as error:
        raise VersionCorruptError(f"the soft prompt of {version.name} cannot be read: {error}; publish it again") from error
    if digest != version.digest:
        raise VersionCorruptError(f"the soft prompt of {version.name} is not the one that was published; publish it again")


def check_served_model(version: Version, model: ServedModel) -> None:
    """Raises BaseModelMismatchError or ChatFormatMismatchError, each naming the version and both sides.

    A version of a brief alone is text, which is served in any chat format.
    """
    made_for = version.manifest.base_model
    if made_for.fingerprint != model.fingerprint:
        raise BaseModelMismatchError(
            f"{version.name} was made for base model {made_for.name} ({made_for.fingerprint[:12]}), this service runs "
            f"{model.name} ({model.fingerprint[:12]}); train the domain again"
        )
    if version.digest is not None and version.manifest.chat_format != model.chat_format:
        raise ChatFormatMismatchError(
            f"{version.name} was made for chat format {version.manifest.chat_format[:12]}, this service uses "
            f"{model.chat_format[:12]}; train the domain again"
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
