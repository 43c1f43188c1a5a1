"""Reads what others give: a PEFT folder, a version exported here or elsewhere (folder or archive), or a prompt on the hub.

Whatever it is, it is copied file by file, bounded, into a folder of our own before the ordinary readers see it.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, XetDownloadError
from huggingface_hub.errors import HTTPError as HubHTTPError  # type: ignore[attr-defined]  # its HTTP library's

from prompt_bank.archive import copy_members, max_bytes, unpack_archive
from prompt_bank.card import Card
from prompt_bank.errors import ArchiveError, FrontdeskError, HubError, SoftPromptError, VersionCorruptError
from prompt_bank.manifest import TrainingRecord
from prompt_bank.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_peft
from prompt_bank.soft_prompt import SoftPrompt
from prompt_bank.version import MANIFEST_FILE, ServedModel, read_soft_prompt, read_version

_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_MAX_ERROR_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Imported:
    """What a source holds: `prompt` is None for a version served by its brief, the rest unless a version was exported."""

    prompt: SoftPrompt | None
    card: Card | None
    training: TrainingRecord | None
    origin: str


def read_import(source: str, model: ServedModel, task_id: int | None = None, hub_endpoint: str | None = None) -> Imported:
    """Reads `source`: a folder, an archive, or a hub id `owner/name[@revision]`. Blocking.

    A soft prompt with a manifest must have been made for `model` (BaseModelMismatchError, ChatFormatMismatchError); of one
    without only the sizes can be checked. Raises SoftPromptError, ArchiveError or HubError as well.
    """
    path = Path(os.path.expanduser(source))  # Path's own raises for a user that does not exist
    with TemporaryDirectory(prefix="frontdesk-") as name:
        scratch = Path(name)
        try:
            if os.path.isfile(path):  # no error where no path can be so long, nor below for folders
                unpack_archive(path, scratch, model.shape)
                return _read_exported(source, scratch, model, task_id)
            if os.path.lexists(path / MANIFEST_FILE):
                copy_members(path, scratch, model.shape)
                return _read_exported(source, scratch, model, task_id)
            if os.path.isdir(path):
                return Imported(read_peft(path, model.shape, task_id), None, None, f"PEFT folder {source}")
            commit = _download(source, scratch, model, hub_endpoint)
            return Imported(read_peft(scratch, model.shape, task_id), None, None, f"hub {source}, commit {commit}")
        except FrontdeskError as error:
            kind = ArchiveError if isinstance(error, VersionCorruptError) else type(error)
            text = str(error).replace(name, source).replace("publish it again", "export it again")
            raise kind(_printable(text)) from error


def _printable(text: str) -> str:
    """A terminal obeys control characters, and names in the source may be as long as their file."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)[:_MAX_ERROR_CHARS]


def _read_exported(source: str, folder: Path, model: ServedModel, task_id: int | None) -> Imported:
    version = read_version(folder)
    if task_id is not None:
        raise SoftPromptError(f"{source} is an exported version, which has no tasks; leave the task id out")
    if version.digest is None and (folder / WEIGHTS_FILE).exists():
        raise ArchiveError(f"{source} holds a soft prompt that its manifest does not name; export it again")
    prompt = None if version.digest is None else read_soft_prompt(folder, version, model)
    origin = f"{version.name} in {source}"
    training = version.manifest.training
    return Imported(prompt, version.card, training and training.model_copy(update={"imported_from": origin}), origin)


def _download(source: str, folder: Path, model: ServedModel, endpoint: str | None) -> str:
    """Fetches both files of a PEFT checkpoint, once their sizes are known to fit, and says of which commit they are."""
    named = _HUB_ID.fullmatch(source)
    if named is None:
        raise HubError(f"{source!r} is no file or folder here, and no hub id such as owner/name or owner/name@revision")
    repo, revision = named["repo"], named["revision"]
    try:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            found = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision, endpoint=endpoint), endpoint=endpoint)
            revision = found.commit_hash  # both files of one commit, whoever pushes meanwhile
            limit = max_bytes(name, model.shape)
            if found.size is None or found.size > limit:
                raise HubError(f"{name} of {source} has {found.size} bytes, {limit} are the most it may have")
            hf_hub_download(repo, name, revision=revision, local_dir=folder, endpoint=endpoint)
    except (OSError, EntryNotFoundError, HFValidationError, HubHTTPError, XetDownloadError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HubError(
            f"{source} is no file or folder here, and the hub did not give it: {reason}; where no hub can be reached, download "
            f"its {CONFIG_FILE} and {WEIGHTS_FILE} elsewhere and import their folder"
        ) from error
    return str(revision)
