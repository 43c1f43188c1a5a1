"""From a token id to the bytes of its text. A decoder hides them where the bytes of one character lie in several tokens."""

import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how a SentencePiece vocabulary spells the bytes it has no character for

_WORD_START = "\u2581"  # SentencePiece's sign for the blank before a word


class TokenBytes:
    """Of one tokenizer, byte-level or SentencePiece. Immutable; safe to use from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added: dict[int, bytes] = {id_: token.content.encode() for id_, token in tokenizer.added_tokens_decoder.items()}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)  # a slow SentencePiece has none
        self._is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    def __call__(self, token_id: int) -> bytes:
        """Nothing for an id that has no token: a model's vocabulary may be larger than its tokenizer's."""
        if (added := self._added.get(token_id)) is not None:
            return added
        token: str = self._tokenizer.convert_ids_to_tokens(token_id) or ""
        if self._is_byte_level:
            return b"".join(_BYTE_OF.get(char) or char.encode() for char in token)
        if found := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(found[1])
        return token.replace(_WORD_START, " ").encode()


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's characters for bytes: a printable byte of Latin-1 is its own, the others follow from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    return {char: bytes([byte]) for byte, char in chars.items()}


_BYTE_OF = _byte_alphabet()
