"""PEFT folders in and out: PEFT itself reads what we write, and nothing broken or hostile gets in."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache

from prompt_bank.base_model import BaseModel, ModelShape
from prompt_bank.errors import SoftPromptError
from prompt_bank.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_peft, write_peft
from prompt_bank.soft_prompt import KINDS, Kind, SoftPrompt
from tests.conftest import random_llama
from tests.prompt_bank.conftest import make_prompt

TOLERANCE = 1e-4
TEXT_IDS = torch.tensor([[1, 500, 11, 12, 600, 7]])
SHAPE = ModelShape(num_layers=2, num_kv_heads=2, head_size=4, hidden_size=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a good prefix of SHAPE, for a test to spoil."""
    write_peft(make_prompt(SHAPE), tmp_path, SHAPE, "tiny")
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_virtual_tokens", [1, 7])
def test_round_trip_is_exact(tmp_path: Path, tiny: BaseModel, kind: Kind, num_virtual_tokens: int) -> None:
    prompt = make_prompt(tiny.shape, kind, num_virtual_tokens)
    write_peft(prompt, tmp_path, tiny.shape, tiny.name)
    read = read_peft(tmp_path, tiny.shape)
    assert (read.kind, read.digest) == (kind, prompt.digest)


def logits_with(prompt: SoftPrompt, base: BaseModel) -> Any:
    """[T, V] of the text with the prompt in front, run on the model itself."""
    model, num_text = base.model, TEXT_IDS.shape[1]
    if prompt.kind == "embeds":
        embeds = torch.cat([prompt.tensor[None], model.get_input_embeddings()(TEXT_IDS)], dim=1)
        return model(inputs_embeds=embeds).logits[0, -num_text:]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(prompt.tensor):
        cache.update(key[None], value[None], layer)
    positions = torch.arange(prompt.num_virtual_tokens, prompt.num_virtual_tokens + num_text)[None]
    return model(TEXT_IDS, past_key_values=cache, position_ids=positions).logits[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 asks for it
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_folder_as_it_is(tmp_path: Path, smollm2_dir: Path, kind: Kind) -> None:
    base = random_llama(smollm2_dir)  # PEFT changes the model it wraps
    prompt = make_prompt(base.shape, kind, num_virtual_tokens=5)
    write_peft(prompt, tmp_path, base.shape, base.name)
    with torch.no_grad():
        direct, other = logits_with(prompt, base), logits_with(make_prompt(base.shape, kind, 5, seed=1), base)
        moved = logits_with(SoftPrompt(kind, prompt.tensor.flip(0 if kind == "embeds" else 3)), base)
        peft_model = PeftModel.from_pretrained(base.model, tmp_path).eval()
        by_peft = peft_model(TEXT_IDS, attention_mask=torch.ones_like(TEXT_IDS)).logits[0, -TEXT_IDS.shape[1] :]
    assert (by_peft - direct).abs().max() < TOLERANCE
    assert (by_peft - other).abs().max() > 10 * TOLERANCE
    if kind == "embeds":  # keys carry their positions, so a prefix may be permuted
        assert (by_peft - moved).abs().max() > 10 * TOLERANCE


def spoil_header(change: Callable[[dict[str, dict[str, object]]], None]) -> Callable[[bytes], bytes]:
    """Rewrites the safetensors header and leaves the data alone."""

    def spoil(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return spoil


def declare(**fields: object) -> Callable[[bytes], bytes]:
    return spoil_header(lambda header: header["prompt_embeddings"].update(fields))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-1],
        lambda content: content[:20],
        lambda content: b"",
        lambda content: content + b"more",
        lambda content: b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93.",
        lambda content: struct.pack("<Q", 2**62) + content[8:],
        declare(shape=[2**40, 32]),
        declare(shape=[4, 2**60]),
        declare(shape=[-4, 32]),
        declare(data_offsets=[0, 2**50]),
        declare(dtype="F128"),
    ],
    ids=[
        "truncated",
        "header only",
        "empty",
        "longer",
        "pickle",
        "huge header",
        "huge",
        "huge width",
        "negative",
        "offsets",
        "dtype",
    ],
)
def test_broken_weights_are_refused(folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(SoftPromptError, match=WEIGHTS_FILE):
        read_peft(folder, SHAPE)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"weights": torch.zeros(4, 32)}, r"holds tensors \['weights'\]"),
        ({"prompt_embeddings": torch.zeros(4, 32), "more": torch.zeros(1)}, "holds tensors"),
        ({"prompt_embeddings": torch.zeros(4, 31)}, r"has shape \[4, 31\], this base model takes \[1 to 1024, 32\]"),
        ({"prompt_embeddings": torch.zeros(4, 2, 16)}, "has shape"),
        ({"prompt_embeddings": torch.zeros(0, 32)}, "has shape"),
        ({"prompt_embeddings": torch.zeros(1025, 32)}, "has shape"),
        ({"prompt_embeddings": torch.zeros(4, 32, dtype=torch.float64)}, "float64, expected float32"),
        ({"prompt_embeddings": torch.full((4, 32), torch.nan)}, "not finite"),
    ],
)
def test_unfit_weights_are_refused(folder: Path, tensors: dict[str, Tensor], problem: str) -> None:
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(SoftPromptError, match=problem):
        read_peft(folder, SHAPE)


def test_embeds_are_not_taken_for_a_prefix(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(SoftPromptError, match=r"has shape \[4, 32\], this base model takes \[1 to 1024, 16\] for embeds"):
        read_peft(folder, SHAPE)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (b"", "is not a PEFT configuration"),
        (b"[]", "is not a PEFT configuration"),
        (b"\xff\xfe", "is not a PEFT configuration"),
        (b"{}", "is not a PEFT configuration"),
        (b"[" * 200_000, "is not a PEFT configuration"),
        (b'{"peft_type": "LORA"}', "is of PEFT method 'LORA', expected one of"),
        (b'{"peft_type": ["PREFIX_TUNING"]}', "is of PEFT method"),
        (b'{"peft_type": null}', "is of PEFT method None"),
    ],
)
def test_broken_configuration_is_refused(folder: Path, config: bytes, problem: str) -> None:
    (folder / CONFIG_FILE).write_bytes(config)
    with pytest.raises(SoftPromptError, match=problem):
        read_peft(folder, SHAPE)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(SoftPromptError, match=name):
        read_peft(folder, SHAPE)


def test_pickled_checkpoint_beside_is_never_opened(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(SoftPromptError, match="cannot be read"):
        read_peft(folder, SHAPE)


def test_what_a_configuration_says_beyond_its_method_is_ignored(folder: Path) -> None:
    """peft#2896: an adapter's configuration could make PEFT run code or fetch another tokenizer."""
    expected = read_peft(folder, SHAPE).digest
    config = json.loads((folder / CONFIG_FILE).read_text())
    hostile = {
        "trust_remote_code": True,
        "auto_mapping": {"base_model_class": "os", "parent_library": "os"},
        "tokenizer_name_or_path": "/etc",
        "tokenizer_kwargs": {"trust_remote_code": True},
        "prompt_tuning_init": "TEXT",
        "base_model_name_or_path": "/nowhere",
        "num_virtual_tokens": 10**9,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config | hostile))
    assert read_peft(folder, SHAPE).digest == expected
