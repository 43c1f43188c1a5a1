"""PEFT checkpoint folders in and out: `adapter_config.json` and `adapter_model.safetensors`.

`PeftModel.from_pretrained` loads what `write_peft` wrote, as it is. PEFT keeps one tensor, `prompt_embeddings`: [P, H] for
prompt tuning, [P, 2L * H_kv * D] for prefix tuning, where index 2l is the key and 2l + 1 the value of layer l. Reading takes
nothing from the configuration but the method and the sizes.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prompt_bank.base_model import ModelShape
from prompt_bank.errors import SoftPromptError
from prompt_bank.soft_prompt import MAX_VIRTUAL_TOKENS, Kind, SoftPrompt, check_soft_prompt

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1_000_000
_TENSOR = "prompt_embeddings"
_KIND_OF_METHOD: dict[str, Kind] = {"PROMPT_TUNING": "embeds", "PREFIX_TUNING": "prefix_kv"}


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
        tensor = prompt.tensor
    else:
        kv_width = model.num_kv_heads * model.head_size
        config = PrefixTuningConfig(
            **sizes, token_dim=kv_width, num_attention_heads=model.num_kv_heads, encoder_hidden_size=kv_width
        )
        tensor = _flatten_prefix(prompt.tensor)
    config.save_pretrained(folder)
    save_file({_TENSOR: tensor.contiguous()}, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read_peft(folder: Path, model: ModelShape) -> SoftPrompt:
    """The soft prompt in `folder`, checked against `model`. Reads no more than the declared sizes allow.

    Raises SoftPromptError naming what was seen and what was expected.
    """
    kind = _read_kind(folder / CONFIG_FILE)
    width = model.hidden_size if kind == "embeds" else 2 * model.num_layers * model.num_kv_heads * model.head_size
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as weights:
            if list(weights.keys()) != [_TENSOR]:
                raise SoftPromptError(f"{path} holds tensors {sorted(weights.keys())}, expected [{_TENSOR!r}]")
            shape = weights.get_slice(_TENSOR).get_shape()
            if len(shape) != 2 or not 1 <= shape[0] <= MAX_VIRTUAL_TOKENS or shape[1] != width:
                raise SoftPromptError(
                    f"{path} has shape {shape}, this base model takes [1 to {MAX_VIRTUAL_TOKENS}, {width}] for {kind}"
                )
            tensor = weights.get_tensor(_TENSOR)
    except (OSError, SafetensorError) as error:
        raise SoftPromptError(f"{path} cannot be read: {error}; expected a safetensors file") from error
    if kind == "prefix_kv":
        tensor = _unflatten_prefix(tensor, model)
    return check_soft_prompt(SoftPrompt(kind, tensor), model)


def _read_kind(path: Path) -> Kind:
    try:
        with path.open("rb") as file:
            method = json.loads(file.read(_MAX_CONFIG_BYTES))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SoftPromptError(f"{path} is not a PEFT configuration: {error!r}") from error
    if not isinstance(method, str) or method not in _KIND_OF_METHOD:
        raise SoftPromptError(f"{path} is of PEFT method {method!r}, expected one of {sorted(_KIND_OF_METHOD)}")
    return _KIND_OF_METHOD[method]


def _flatten_prefix(tensor: Tensor) -> Tensor:
    """[L, 2, H_kv, P, D] to PEFT's [P, 2L * H_kv * D]."""
    return tensor.permute(3, 0, 1, 2, 4).reshape(tensor.shape[3], -1)


def _unflatten_prefix(tensor: Tensor, model: ModelShape) -> Tensor:
    """PEFT's [P, 2L * H_kv * D] to [L, 2, H_kv, P, D]."""
    split = tensor.view(tensor.shape[0], model.num_layers, 2, model.num_kv_heads, model.head_size)
    return split.permute(1, 2, 3, 0, 4).contiguous()
