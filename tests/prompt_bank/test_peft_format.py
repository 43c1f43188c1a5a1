"""PEFT folders in and out: PEFT itself reads what we write, and nothing broken or hostile gets in."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
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
        ({"prompt_embeddings": torch.zeros(0, 32)}, r"prompt_embeddings.shape.0: Input should be greater than 0, seen 0"),
        ({"prompt_embeddings": torch.zeros(1025, 32)}, "has shape"),
        (
            {"prompt_embeddings": torch.zeros(4, 32, dtype=torch.float64)},
            "prompt_embeddings.dtype: Input should be 'F32', 'F16' or 'BF16', seen 'F64'",
        ),
        ({"prompt_embeddings": torch.zeros(4, 32, dtype=torch.int32)}, "dtype: .* seen 'I32'"),
        ({"prompt_embeddings": torch.full((4, 32), torch.inf, dtype=torch.float16)}, "not finite"),
        ({"prompt_embeddings": torch.full((4, 32), 1e30, dtype=torch.bfloat16)}, "beyond half precision's range"),
        ({"prompt_embeddings": torch.full((4, 32), torch.nan)}, "not finite"),
    ],
)
def test_unfit_weights_are_refused(folder: Path, tensors: dict[str, Tensor], problem: str) -> None:
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(SoftPromptError, match=problem):
        read_peft(folder, SHAPE)


def test_embeds_are_not_taken_for_a_prefix(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"peft_type": "PROMPT_TUNING", "token_dim": None}))
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
        (b'{"peft_type": ["PREFIX_TUNING"]}', "peft_type: Input should be a valid string, seen"),
        (b'{"peft_type": null}', "peft_type: Input should be a valid string, seen None"),
        (b'{"peft_type": "\\ud800"}', "is not a PEFT configuration"),
        (b'{"peft_type": "' + b"A" * 900_000 + b'"}', r"is of PEFT method 'A{12}\.\.\.A+', expected"),
        (b'{"peft_type": "PREFIX_TUNING"}' + b" " * 1_000_000, "more than 1000000 bytes"),
        (b'{"peft_type": "PREFIX_TUNING", "num_layers": 1' + b"0" * 5000 + b"}", "is not a PEFT configuration"),
        (b'{"peft_type": "PREFIX_TUNING", "num_layers": 2.0}', "num_layers: Input should be a valid integer, seen 2.0"),
        (b'{"peft_type": "PREFIX_TUNING", "num_layers": true}', "num_layers: Input should be a valid integer, seen True"),
        (b'{"peft_type": "PREFIX_TUNING"}', "is for task type None with None transformer submodules, expected 'CAUSAL_LM'"),
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


def test_pickled_checkpoint_is_never_opened(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(SoftPromptError, match=r"only adapter_model\.bin; a pickle can run code and is never opened"):
        read_peft(folder, SHAPE)


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2}, "for task type 'SEQ_2_SEQ_LM' with 2"),
        ({"task_type": "SEQ_CLS"}, "for task type 'SEQ_CLS'"),
        ({"num_transformer_submodules": 2}, "with 2 transformer submodules"),
        ({"num_layers": 3}, "has num_layers 3, this base model has 2; it was trained for another model"),
        ({"num_attention_heads": 4}, "has num_attention_heads 4, this base model has 2"),  # the tensor has the same shape
        ({"token_dim": 16}, "has token_dim 16, this base model has 8"),
    ],
)
def test_prompt_of_another_task_or_model_is_refused(folder: Path, fields: dict[str, object], problem: str) -> None:
    change_config(folder, **fields)
    with pytest.raises(SoftPromptError, match=problem):
        read_peft(folder, SHAPE)


def test_sizes_that_peft_left_out_are_taken_from_the_model(folder: Path) -> None:
    expected = read_peft(folder, SHAPE).digest
    change_config(folder, num_layers=None, num_attention_heads=None, token_dim=None, num_transformer_submodules=None)
    assert read_peft(folder, SHAPE).digest == expected


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_links_pipes_and_folders_are_refused(folder: Path, name: str) -> None:
    moved = folder / "elsewhere"
    (folder / name).rename(moved)
    for make in (lambda path: path.symlink_to(moved), os.mkfifo, Path.mkdir):
        make(folder / name)
        with pytest.raises(SoftPromptError, match=rf"{name} cannot be read: .* no link"):
            read_peft(folder, SHAPE)
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
    moved.rename(folder / name)
    assert read_peft(folder, SHAPE).num_virtual_tokens == 4


@pytest.mark.parametrize("declared", [[2**40, 32], [4, 2**60], [1024, 2**50], [1] * 1000])
def test_a_huge_declaration_costs_no_memory(folder: Path, declared: list[int]) -> None:
    path = folder / WEIGHTS_FILE
    path.write_bytes(declare(shape=declared)(path.read_bytes()))
    with path.open("r+b") as file:
        file.truncate(2**40)  # sparse: the file system says a terabyte
    tracemalloc.start()
    with pytest.raises(SoftPromptError, match="has shape"):
        read_peft(folder, SHAPE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_a_file_beyond_its_declared_shapes_is_not_read(folder: Path) -> None:
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(SoftPromptError, match=r"has 1099511627776 bytes, its header declares \d{3}, and \d+ are the most"):
        read_peft(folder, SHAPE)


def test_a_long_tensor_name_is_cut_in_the_error(folder: Path) -> None:
    save_file({"x" * 100_000: torch.zeros(4, 32)}, folder / WEIGHTS_FILE)
    with pytest.raises(SoftPromptError, match="holds tensors") as refused:
        read_peft(folder, SHAPE)
    assert len(str(refused.value)) < 1000


PEFT_METHODS = {
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "P_TUNING": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    "CPT": CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3, 4, 5], cpt_mask=[1] * 5, cpt_tokens_type_mask=[1, 2, 3, 4, 4]
    ),
    "MULTITASK_PROMPT_TUNING": MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, num_tasks=3, num_ranks=2
    ),
    "PREFIX_TUNING": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "PREFIX_TUNING projected": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
    "CARTRIDGE": CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=2),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_what_each_method_of_peft_saves_is_what_it_runs(tmp_path: Path, smollm2_dir: Path, method: str) -> None:
    """The tensors in front of the text, PEFT's own and ours, exactly; another task's, or another seed's, differ."""
    base = random_llama(smollm2_dir)
    peft_model = get_peft_model(base.model, PEFT_METHODS[method])
    with torch.no_grad():
        for parameter in peft_model.prompt_encoder.parameters():  # PEFT starts some of them at zero
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    peft_model.eval()
    peft_model.save_pretrained(tmp_path)
    task = 1 if "MULTITASK" in method else None
    read = read_peft(tmp_path, base.shape, task)
    with torch.no_grad():
        if read.kind == "prefix_kv":
            layers = peft_model.get_prompt(1).layers
            by_peft = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
        else:
            by_peft = peft_model.get_prompt(1, torch.tensor([task]) if task else None)[0]
    assert read.num_virtual_tokens == 5
    assert (read.tensor - by_peft).abs().max() < 1e-6
    assert (read.tensor.flip(-1) - by_peft).abs().max() > 1e-2
    if task is not None:
        assert (read_peft(tmp_path, base.shape, 2).tensor - by_peft).abs().max() > 1e-2


@pytest.mark.parametrize("task", [None, -1, 3, 2**70])
def test_task_must_be_one_of_the_file(tmp_path: Path, task: int | None) -> None:
    write_multitask(tmp_path, (3, 4, 2), (3, 2, 16))
    assert read_peft(tmp_path, SHAPE, 2).tensor.shape == (4, 16)
    with pytest.raises(SoftPromptError, match="holds prompts of 3 tasks; give a task id of 0 to 2"):
        read_peft(tmp_path, SHAPE, task)


def write_multitask(folder: Path, cols: tuple[int, ...], rows: tuple[int, ...]) -> None:
    write_peft(make_prompt(SHAPE, "embeds"), folder, SHAPE, "tiny")
    change_config(folder, peft_type="MULTITASK_PROMPT_TUNING")
    tensors = {
        "prompt_embeddings": torch.ones(4, 16),
        "prefix_task_cols": torch.ones(cols),
        "prefix_task_rows": torch.ones(rows),
    }
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("cols", "rows"),
    [((3, 4, 2), (2, 2, 16)), ((3, 4, 2), (3, 1, 16)), ((3, 5, 2), (3, 2, 16)), ((3, 4, 2), (3, 2, 15)), ((3, 4), (3, 2, 16))],
)
def test_task_factors_must_fit_each_other(tmp_path: Path, cols: tuple[int, ...], rows: tuple[int, ...]) -> None:
    write_multitask(tmp_path, cols, rows)
    with pytest.raises(SoftPromptError, match="has task factors"):
        read_peft(tmp_path, SHAPE, 0)


def test_task_factors_that_overflow_are_refused(tmp_path: Path) -> None:
    write_multitask(tmp_path, (1, 4, 1), (1, 1, 16))
    tensors = {"prompt_embeddings": torch.full((4, 16), 1e30)}
    tensors |= {"prefix_task_cols": torch.full((1, 4, 1), 1e30), "prefix_task_rows": torch.ones(1, 1, 16)}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(SoftPromptError, match="not finite"):
        read_peft(tmp_path, SHAPE, 0)


def test_task_of_a_method_without_tasks_is_refused(folder: Path) -> None:
    with pytest.raises(SoftPromptError, match="is of PEFT method PREFIX_TUNING, which has no tasks; leave the task id out"):
        read_peft(folder, SHAPE, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(folder: Path, dtype: torch.dtype) -> None:
    halved = torch.randn(4, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    save_file({"prompt_embeddings": halved}, folder / WEIGHTS_FILE)
    read = read_peft(folder, SHAPE)
    assert read.tensor.dtype == torch.float32
    assert torch.equal(read.tensor.permute(3, 0, 1, 2, 4).reshape(4, 32), halved.float())


def test_what_a_configuration_says_beyond_its_method_is_ignored(folder: Path) -> None:
    """peft#2896: an adapter's configuration could make PEFT run code or fetch another tokenizer."""
    expected = read_peft(folder, SHAPE).digest
    hostile = {
        "trust_remote_code": True,
        "auto_mapping": {"base_model_class": "os", "parent_library": "os"},
        "tokenizer_name_or_path": "/etc",
        "tokenizer_kwargs": {"trust_remote_code": True},
        "prompt_tuning_init": "TEXT",
        "base_model_name_or_path": "/nowhere",
        "num_virtual_tokens": 10**9,
    }
    change_config(folder, **hostile)
    assert read_peft(folder, SHAPE).digest == expected
