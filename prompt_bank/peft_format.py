"""PEFT checkpoint folders in and out: `adapter_config.json` and `adapter_model.safetensors`.

`PeftModel.from_pretrained` loads what `write_peft` wrote, as it is. PEFT 0.21 keeps one tensor, `prompt_embeddings`, of every
prompt method: [P, H] for prompt tuning, P-tuning (after its encoder), CPT and multitask prompt tuning, which adds two factors
a task; [P, 2L * H_kv * D] for prefix tuning (after its projection) and cartridges, where index 2l is the key and 2l + 1 the
value of layer l. A folder may come from anybody: nothing in it is run or followed, and nothing is read before its size is
known to fit. Of the configuration only the method and the sizes count.
"""

import os
import reprlib
import stat
import struct
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, TypeAdapter, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from prompt_bank.base_model import ModelShape
from prompt_bank.conversation import first_problem
from prompt_bank.errors import SoftPromptError
from prompt_bank.soft_prompt import MAX_VIRTUAL_TOKENS, Kind, SoftPrompt, check_soft_prompt

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_TEXT_BYTES = 1_000_000  # a configuration, a card or a manifest has some kilobytes
_PICKLE_FILE = "adapter_model.bin"
_MAX_HEADER_BYTES = 1_000_000
_TENSOR, _TASK_COLS, _TASK_ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
_MULTITASK = "MULTITASK_PROMPT_TUNING"
_KIND_OF_METHOD: dict[str, Kind] = {
    "PROMPT_TUNING": "embeds",
    "P_TUNING": "embeds",
    "CPT": "embeds",
    _MULTITASK: "embeds",
    "PREFIX_TUNING": "prefix_kv",
    "CARTRIDGE": "prefix_kv",
}
_VALUE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

_Shapes = dict[str, list[int]]


class _Config(BaseModel):
    """What counts of an adapter_config.json. PEFT leaves sizes out, or null, where the base model gives them."""

    model_config = ConfigDict(strict=True, extra="ignore")

    peft_type: str
    task_type: str | None = None
    num_transformer_submodules: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    token_dim: int | None = None


class _Entry(BaseModel):
    """A tensor's entry in a safetensors header; the library checks its offsets."""

    model_config = ConfigDict(strict=True, extra="ignore")

    dtype: Literal["F32", "F16", "BF16"]
    shape: list[PositiveInt]


_HEADER = TypeAdapter(dict[str, _Entry])


def write_peft(prompt: SoftPrompt, folder: Path, model: ModelShape, base_model: str) -> None:
    """Writes both files into `folder`, which must exist."""
    from peft import PrefixTuningConfig, PromptTuningConfig, TaskType  # seconds to import, and only publishing needs it

    sizes = {
        "task_type": TaskType.CAUSAL_LM,
        "base_model_name_or_path": base_model,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        "num_layers": model.num_layers,
        "inference_mode": True,
        "num_transformer_submodules": 1,
    }
    if prompt.kind == "embeds":
        config: Any = PromptTuningConfig(**sizes, token_dim=model.hidden_size, num_attention_heads=model.num_kv_heads)
    else:
        kv_width = model.num_kv_heads * model.head_size
        config = PrefixTuningConfig(
            **sizes, token_dim=kv_width, num_attention_heads=model.num_kv_heads, encoder_hidden_size=kv_width
        )
    config.save_pretrained(folder)
    save_file({_TENSOR: prompt.by_token.contiguous()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_peft(folder: Path, model: ModelShape, task_id: int | None = None) -> SoftPrompt:
    """The soft prompt in `folder` as float32, checked against `model`.

    `task_id` chooses the task of a multitask prompt and must be left out for the other methods. Raises SoftPromptError
    naming what was seen, what was expected and what to do.
    """
    method = _read_method(folder / CONFIG_FILE, model)
    kind = _KIND_OF_METHOD[method]
    path = folder / WEIGHTS_FILE
    if method != _MULTITASK and task_id is not None:
        raise SoftPromptError(f"{folder} is of PEFT method {method}, which has no tasks; leave the task id out")
    if not path.exists() and (folder / _PICKLE_FILE).exists():
        raise SoftPromptError(
            f"{folder} has no {WEIGHTS_FILE}, only {_PICKLE_FILE}; a pickle can run code and is never opened: load it with "
            "PEFT where you trust it and save it with save_pretrained(..., safe_serialization=True)"
        )
    tensors = _read_tensors(path, kind, method == _MULTITASK, model)
    tensor = tensors[_TENSOR]
    if method == _MULTITASK:
        num_tasks = tensors[_TASK_COLS].shape[0]
        if task_id is None or not 0 <= task_id < num_tasks:
            raise SoftPromptError(f"{folder} holds prompts of {num_tasks} tasks; give a task id of 0 to {num_tasks - 1}")
        tensor = tensor * (tensors[_TASK_COLS][task_id] @ tensors[_TASK_ROWS][task_id])
    elif kind == "prefix_kv":
        tensor = _unflatten_prefix(tensor, model)
    return check_soft_prompt(SoftPrompt(kind, tensor), model)


def max_weights_bytes(model: ModelShape) -> int:
    """The largest weights file a prompt of `model` can have, of either kind."""
    return 8 + _MAX_HEADER_BYTES + 4 * MAX_VIRTUAL_TOKENS * max(_width("embeds", model), _width("prefix_kv", model))


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError for all else: a link may lead anywhere, a pipe never ends."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


def _width(kind: Kind, model: ModelShape) -> int:
    return model.hidden_size if kind == "embeds" else 2 * model.num_layers * model.num_kv_heads * model.head_size


def declared_shape(folder: Path) -> ModelShape:
    """The sizes of the model that a folder written by `write_peft` was made for. Raises SoftPromptError."""
    path = folder / CONFIG_FILE
    config = _read_config(path)
    heads, width = config.num_attention_heads, config.token_dim
    if not (config.num_layers and heads and width) or min(config.num_layers, heads, width) < 1 or width % heads:
        raise SoftPromptError(f"{path} does not say the sizes of its model; export or publish it again")
    return ModelShape(config.num_layers, heads, head_size=width // heads, hidden_size=width)


def _read_config(path: Path) -> _Config:
    try:
        with open_regular(path) as file:
            text = file.read(MAX_TEXT_BYTES + 1)
        if len(text) > MAX_TEXT_BYTES:
            raise SoftPromptError(f"{path} is not a PEFT configuration: it has more than {MAX_TEXT_BYTES} bytes")
        return _Config.model_validate_json(text)
    except ValidationError as error:
        raise SoftPromptError(f"{path} is not a PEFT configuration: {_problem(error)}") from error
    except OSError as error:
        raise SoftPromptError(f"{path} cannot be read: {error}; expected a PEFT configuration, no link") from error


def _read_method(path: Path, model: ModelShape) -> str:
    """The PEFT method, once the configuration is of a causal language model with the sizes of `model`."""
    config = _read_config(path)
    if config.peft_type not in _KIND_OF_METHOD:
        raise SoftPromptError(
            f"{path} is of PEFT method {reprlib.repr(config.peft_type)}, expected one of {sorted(_KIND_OF_METHOD)}"
        )
    if config.task_type != "CAUSAL_LM" or config.num_transformer_submodules not in (None, 1):
        raise SoftPromptError(
            f"{path} is for task type {reprlib.repr(config.task_type)} with {config.num_transformer_submodules} transformer "
            "submodules, expected 'CAUSAL_LM' with 1; train it on a causal language model"
        )
    sizes = {"num_layers": model.num_layers, "token_dim": model.hidden_size}
    if _KIND_OF_METHOD[config.peft_type] == "prefix_kv":
        # Keys and values of one width may be split into other heads: the tensor's shape would not tell.
        sizes |= {"token_dim": model.num_kv_heads * model.head_size, "num_attention_heads": model.num_kv_heads}
    for name, expected in sizes.items():
        if getattr(config, name) not in (None, expected):
            raise SoftPromptError(
                f"{path} has {name} {getattr(config, name)}, this base model has {expected}; it was trained for another model"
            )
    return config.peft_type


def _read_tensors(path: Path, kind: Kind, is_multitask: bool, model: ModelShape) -> dict[str, Tensor]:
    """The tensors as float32. The header is read first: nothing is allocated for shapes that do not fit the model."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(_MAX_HEADER_BYTES, size - 8):
                raise SoftPromptError(f"{path} declares a header of {header_bytes} bytes; expected a safetensors file")
            header = from_json(file.read(header_bytes))
            if not isinstance(header, dict):
                raise SoftPromptError(f"{path} has a header that is no JSON object; expected a safetensors file")
            header.pop("__metadata__", None)
            _check_names(path, sorted(header), is_multitask)
            entries = _HEADER.validate_python(header)
            shapes = {name: entry.shape for name, entry in entries.items()}
            _check_shapes(path, shapes, kind, model)
            declared = 8 + header_bytes + sum(prod(entry.shape) * _VALUE_BYTES[entry.dtype] for entry in entries.values())
            if not size == declared <= max_weights_bytes(model):
                raise SoftPromptError(
                    f"{path} has {size} bytes, its header declares {declared}, and {max_weights_bytes(model)} are the most for "
                    "this base model; save or download it again"
                )
            file.seek(0)
            tensors = load(file.read(size))
    except ValidationError as error:
        raise SoftPromptError(f"{path} has an unfit header: {_problem(error)}") from error
    except (OSError, SafetensorError, struct.error, ValueError, AttributeError) as error:
        raise SoftPromptError(f"{path} cannot be read: {error}; expected a safetensors file, no link") from error
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != shapes:  # a name declared twice
        raise SoftPromptError(f"{path} holds other tensors than its header declares; save it again")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise SoftPromptError(f"{path} has values that are not finite; train it again")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _check_names(path: Path, names: list[str], is_multitask: bool) -> None:
    expected = [_TENSOR, _TASK_COLS, _TASK_ROWS] if is_multitask else [_TENSOR]
    if names != sorted(expected):
        raise SoftPromptError(f"{path} holds tensors {reprlib.repr(names)}, expected {expected}")


def _check_shapes(path: Path, shapes: _Shapes, kind: Kind, model: ModelShape) -> None:
    width, shape = _width(kind, model), shapes[_TENSOR]
    if len(shape) != 2 or shape[0] > MAX_VIRTUAL_TOKENS or shape[1] != width:
        raise SoftPromptError(
            f"{path} has shape {reprlib.repr(shape)}, this base model takes [1 to {MAX_VIRTUAL_TOKENS}, {width}] for {kind}"
        )
    if _TASK_COLS in shapes:
        cols, rows = shapes[_TASK_COLS], shapes[_TASK_ROWS]
        if len(cols) != 3 or cols[1] != shape[0] or rows != [cols[0], cols[2], width]:
            raise SoftPromptError(
                f"{path} has task factors {reprlib.repr(cols)} and {reprlib.repr(rows)}, expected [tasks, {shape[0]}, ranks] "
                f"and [tasks, ranks, {width}]"
            )


def _problem(error: ValidationError) -> str:
    return f"{first_problem(error)}, seen {reprlib.repr(error.errors(include_url=False)[0]['input'])}"


def _unflatten_prefix(tensor: Tensor, model: ModelShape) -> Tensor:
    """PEFT's [P, 2L * H_kv * D] to [L, 2, H_kv, P, D]."""
    split = tensor.view(tensor.shape[0], model.num_layers, 2, model.num_kv_heads, model.head_size)
    return split.permute(1, 2, 3, 0, 4).contiguous()
