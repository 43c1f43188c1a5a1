"""Whether a version could answer once it is pointed at, as far as manifests tell. Blocking: these read the store."""

import logging

from prompt_bank.errors import ChatFormatMismatchError, VersionCorruptError
from prompt_bank.manifest import Manifest
from prompt_bank.store import Store
from prompt_bank.version import ServedModel

log = logging.getLogger(__name__)


def check_chat_format(
    store: Store, domain: str, number: int, fingerprint: str, live: int | None, served: ServedModel | None
) -> None:
    """Raises ChatFormatMismatchError when a version could answer nobody: its soft prompt knows one chat format only.

    A bank does not know what the services serve. Callers that do say so; for the others the live version stands for it,
    since it answers now. It no longer does after an upgrade that changed the chat format: then a version is promoted by
    who knows, and a rollback to one of before is refused. A brief is text, and is served in any format.
    """
    manifest = store.read_manifest(domain, number)
    if manifest.soft_prompt is None:
        return
    if served is not None and served.fingerprint == fingerprint:
        expected, whose = served.chat_format, f"{served.name} is served here with"
    elif live is not None and live in store.versions(domain) and (now := readable_manifest(store, domain, live)):
        expected, whose = now.chat_format, f"the live v{live} has"
    else:
        return  # there is none, or what is there is broken and must be replaced
    if manifest.chat_format != expected:
        raise ChatFormatMismatchError(
            f"{domain} v{number} was made for chat format {manifest.chat_format[:12]}, {whose} {expected[:12]}, so it "
            f"could answer nobody; train it again with `frontdesk train {domain} --data FILE.jsonl`"
        )


def readable_manifest(store: Store, domain: str, number: int) -> Manifest | None:
    """None when it is broken: just such a version must be got rid of. Raises UnknownVersionError."""
    try:
        return store.read_manifest(domain, number)
    except VersionCorruptError as error:
        log.warning("%s v%d: %s", domain, number, error)
        return None


def made_for(manifest: Manifest | None) -> str:
    """A base model's fingerprint; empty for a version whose manifest is broken, which is taken from all of them."""
    return manifest.base_model.fingerprint if manifest else ""
