"""The router's encoder, all-MiniLM-L6-v2: short English texts to unit vectors, whose dot product is their cosine.

Blocking, on the CPU: the accelerator is the engine's. Knows nothing of domains.

Notation: N texts, T tokens, H hidden size (384).
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from prompt_bank.errors import ModelCorruptError
from prompt_bank.model_files import MINILM, find_model

Vectors = NDArray[np.float32]

_MAX_TOKENS = 128  # what a message is about stands in its first hundred words; the model was trained on no more
_MAX_CHARS = 4000  # more than _MAX_TOKENS words; tokenising a pasted book would hold the lock for seconds
_BATCH_SIZE = 32


class Encoder:
    """Any thread may call it; calls take turns, a long one after every batch."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelCorruptError when the model in `folder` cannot be read or lacks weights."""
        self._tokenizer, self._model = _load(folder)
        self._lock = threading.Lock()  # the tokenizer sets padding and truncation on itself, so it is not thread safe
        self._examples: dict[str, Vectors] = {}

    @classmethod
    def from_models_dir(cls, models_dir: Path) -> Self:
        """The embedded encoder, fetched when it is not there. Raises ModelFetchError, DiskFullError or ModelCorruptError."""
        return cls(find_model(MINILM.name, models_dir))

    def encode(self, texts: Sequence[str]) -> Vectors:
        """[N, H], each row of length 1."""
        batches = [self._encode_batch(texts[start : start + _BATCH_SIZE]) for start in range(0, len(texts), _BATCH_SIZE)]
        return np.concatenate(batches) if batches else np.empty((0, self._model.config.hidden_size), np.float32)

    def encode_examples(self, texts: Sequence[str]) -> Vectors:
        """[N, H], like `encode`, but remembers these texts until the next call, so that a refit encodes only what is new."""
        known = self._examples
        new = [text for text in dict.fromkeys(texts) if text not in known]
        encoded = {**known, **dict(zip(new, self.encode(new), strict=True))}
        self._examples = {text: encoded[text] for text in texts}
        return np.stack([encoded[text] for text in texts])

    def _encode_batch(self, texts: Sequence[str]) -> Vectors:
        with self._lock, torch.inference_mode():
            tokens = self._tokenizer(
                [_readable(text) for text in texts],
                padding=True,
                truncation=True,
                max_length=_MAX_TOKENS,
                return_tensors="pt",
            )
            hidden: Tensor = self._model(**tokens).last_hidden_state  # [N, T, H]
        mask = tokens["attention_mask"].unsqueeze(-1)  # [N, T, 1]
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)  # [N, H]; never empty: [CLS] and [SEP] are always there
        vectors: Vectors = torch.nn.functional.normalize(mean, dim=1).numpy()
        return vectors


def _readable(text: str) -> str:
    """JSON can carry half a surrogate pair, which the tokenizer refuses."""
    return text[:_MAX_CHARS].encode("utf-8", "replace").decode("utf-8")


def _load(folder: Path) -> tuple[Any, Any]:
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, loading = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelCorruptError(
            f"the encoder in {folder} cannot be loaded: {str(error).splitlines()[0]}; delete the folder to fetch it again"
        ) from error
    # transformers fills weights that are not in the file with random numbers and only warns.
    if loading["missing_keys"]:
        raise ModelCorruptError(
            f"the encoder in {folder} lacks {len(loading['missing_keys'])} of its weights, "
            f"{min(loading['missing_keys'])} among them; delete the folder to fetch it again"
        )
    return tokenizer, model.eval().requires_grad_(False)
