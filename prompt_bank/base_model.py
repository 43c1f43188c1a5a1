"""The frozen base model: loads it once, freezes it and says which one it is.

The fingerprint is taken over named tensors and the tokenizer's behaviour, never over files, so the same weights have the same
fingerprint whatever folder, file format or serving dtype they come in.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from prompt_bank.errors import ModelCorruptError
from prompt_bank.settings import DTypeName

_DEFAULT_CONTEXT_TOKENS = 2048

FINGERPRINT_FILE = "fingerprint.txt"  # beside an embedded model: what it was when it was fetched

_TOKENIZER_PROBES = (
    "Hello, how can I help you today?",
    "  two  spaces\n\n1. one\n12. twelve\t1,234.50",
    "Où est la gare ? naïve façade 你好 🙂",
    "def f(x):\n    return x ** 2",
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes a soft prompt must fit: L layers, H_kv key-value heads, D head size, H hidden size."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    hidden_size: int

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        num_heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            hidden_size=config.hidden_size,
        )


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded, frozen causal language model with its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    fingerprint: str
    shape: ModelShape
    device: torch.device
    dtype: torch.dtype

    @property
    def context_tokens(self) -> int:
        config = self.model.config
        declared = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None)
        # BLOOM may declare none, and a tokenizer that knows no limit says 10^30.
        limit = int(declared or min(self.tokenizer.model_max_length, _DEFAULT_CONTEXT_TOKENS))
        # The engine's masks are causal; within its window, sliding attention is too.
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        return min(limit, window or limit)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The ids that end an answer, by the model's generation settings and its tokenizer."""
        configured = self.model.generation_config.eos_token_id
        ids = [*(configured if isinstance(configured, list) else [configured]), self.tokenizer.eos_token_id]
        return frozenset(token for token in ids if token is not None)


def load_base_model(name: str, folder: Path, device: str = "auto", dtype: DTypeName = "auto") -> BaseModel:
    """Loads and freezes the model in `folder`. Never runs code from the folder.

    Raises ModelCorruptError when weights, configuration or tokenizer cannot be read.
    """
    target = torch.device(pick_device() if device == "auto" else device)
    disable_progress_bar()  # loading takes about a second; the bar would stand in every command's output
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelCorruptError(
            f"the model in {folder} cannot be loaded: {reason}; delete the folder to fetch it again"
        ) from error
    if loading["missing_keys"]:  # transformers would give them random weights
        raise ModelCorruptError(f"the model in {folder} lacks weights: {', '.join(sorted(loading['missing_keys'])[:3])}")
    fingerprint = fingerprint_of(model, tokenizer)
    recorded = folder / FINGERPRINT_FILE
    if recorded.is_file() and recorded.read_text(encoding="utf-8") != fingerprint:
        raise ModelCorruptError(f"the model in {folder} was changed after it was fetched; delete the folder to fetch it again")
    serving_dtype = pick_dtype(target) if dtype == "auto" else getattr(torch, dtype)
    model.to(device=target, dtype=serving_dtype).eval().requires_grad_(False)
    return BaseModel(name, model, tokenizer, fingerprint, ModelShape.of(model.config), target, serving_dtype)


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    has_bf16 = "avx512_bf16" in _cpu_flags()
    return torch.bfloat16 if has_bf16 else torch.float32


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def fingerprint_of(model: Any, tokenizer: Any) -> str:
    """SHA-256 over every distinct named tensor (name, shape, dtype, bytes) and the ids of fixed probe texts."""
    digest = hashlib.sha256()
    tensors = list(_distinct_tensors(model))
    with ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock
        for (name, tensor), tensor_digest in zip(tensors, pool.map(_tensor_digest, tensors), strict=True):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + tensor_digest)
    for text in _TOKENIZER_PROBES:
        digest.update(repr(tokenizer(text, add_special_tokens=True)["input_ids"]).encode())
    return digest.hexdigest()


def _distinct_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name; tied ones once, under the name that comes first. Buffers are derived from the configuration."""
    yield from sorted(model.named_parameters())


def _tensor_digest(named: tuple[str, Tensor]) -> bytes:
    raw = named[1].detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).digest()
