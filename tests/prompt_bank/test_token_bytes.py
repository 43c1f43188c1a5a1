"""Token bytes against the texts they make, for every token, and against the grammar library's own reading of a vocabulary."""

import llguidance.hf
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from prompt_bank.base_model import BaseModel
from prompt_bank.token_bytes import TokenBytes


def test_a_character_split_over_tokens_keeps_its_bytes(tiny: BaseModel) -> None:
    text = "Où 🙂🏳️‍🌈 là\n\x00 你好"
    ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = [TokenBytes(tiny.tokenizer)(token_id) for token_id in ids]
    assert b"".join(pieces) == text.encode()
    broken = [piece for piece in pieces if "\ufffd" in piece.decode(errors="replace")]
    assert len(broken) > 4  # or nothing was split and nothing is tested


def test_every_token_of_the_vocabulary(tiny: BaseModel) -> None:
    token_bytes, other = TokenBytes(tiny.tokenizer), llguidance.hf.from_tokenizer(tiny.tokenizer)
    control = set(tiny.tokenizer.added_tokens_decoder)
    wrong = [n for n in range(len(tiny.tokenizer)) if n not in control and token_bytes(n) != other.decode_bytes([n])]
    assert wrong == []
    assert token_bytes(2) == b"<|im_end|>"
    assert token_bytes(len(tiny.tokenizer) + 7) == b""


def test_a_sentencepiece_vocabulary() -> None:
    vocabulary = {"<unk>": 0, "\u2581Hello": 1, "<0xF0>": 2, "<0x9F>": 3, "ä": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    token_bytes = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [token_bytes(n) for n in range(1, 5)] == [b" Hello", b"\xf0", b"\x9f", "ä".encode()]
