"""What a soft prompt's vectors are like: their lengths, the vocabulary words nearest to them, the prompts most like it.

Notation: P virtual tokens, H hidden size, L layers, H_kv key-value heads, D head size, N vocabulary tokens, W any width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import DynamicCache

from bot.engine.kv import kv_of_embeds
from prompt_bank.base_model import BaseModel
from prompt_bank.soft_prompt import SoftPrompt

NUM_WORDS = 3
_WORDS_AT_ONCE = 4096
_NUM_RANDOM = 32


@dataclass(frozen=True, slots=True)
class Word:
    text: str
    cosine: float

    @property
    def quoted(self) -> str:
        """Spaces show, and control characters do no harm."""
        return repr(self.text)


@dataclass(frozen=True, slots=True)
class NearestWords:
    """For each virtual token its words, nearest first, by the cosine of what was `compared`.

    `by_chance` is the mean cosine of a random vector's nearest word: what is not above it says nothing.
    """

    compared: str
    by_chance: float
    words: list[list[Word]]


@torch.inference_mode()
def prefix_kv_of(base: BaseModel, prompt: SoftPrompt) -> Tensor:
    """[L, 2, H_kv, P, D] in the serving dtype, on the device: what the model reads of a prompt of either kind."""
    if prompt.kind == "embeds":
        return kv_of_embeds(base, prompt.tensor)
    return prompt.tensor.to(base.device, base.dtype)


@torch.inference_mode()
def nearest_words(base: BaseModel, prompt: SoftPrompt, prefix_kv: Tensor) -> list[NearestWords]:
    """The vocabulary words of highest cosine.

    A virtual token of `prefix_kv` is no embedding, so its layer-0 value is compared with that of every vocabulary token alone.
    Values know no position (but in models that add positions to embeddings, like GPT-2, where it is 0). `embeds` are compared
    with the input embeddings, and by the layer-0 values they give as well, so that prompts of both kinds can be compared.
    """
    values = prefix_kv[0, 1].transpose(0, 1).flatten(1)  # [P, H_kv * D]
    nearest = [_nearest(base, "layer-0 values", values, lambda token_ids: _first_values(base, token_ids))]
    if prompt.kind == "embeds":
        nearest.insert(0, _nearest(base, "input embeddings", prompt.tensor, base.model.get_input_embeddings()))
    return nearest


def _nearest(base: BaseModel, compared: str, vectors: Tensor, of_words: Callable[[Tensor], Tensor]) -> NearestWords:
    """`vectors` [P, W] among those [N, W] that `of_words` gives for token ids [N], some at a time to bound the memory."""
    random = torch.randn(_NUM_RANDOM, vectors.shape[1], generator=torch.Generator().manual_seed(0))
    wanted = normalize(torch.cat([vectors.float(), random.to(vectors.device)]).to(base.device))  # [P + R, W]
    cosines = torch.full((len(wanted), NUM_WORDS), -torch.inf, device=base.device)
    token_ids = torch.zeros_like(cosines, dtype=torch.long)
    num_words = min(len(base.tokenizer), base.model.get_input_embeddings().weight.shape[0])
    for start in range(0, num_words, _WORDS_AT_ONCE):
        words = torch.arange(start, min(start + _WORDS_AT_ONCE, num_words), device=base.device)
        found = wanted @ normalize(of_words(words).float()).T  # [P + R, N]
        cosines, kept = torch.cat([cosines, found], dim=1).topk(NUM_WORDS)
        token_ids = torch.cat([token_ids, words.expand(len(wanted), -1)], dim=1).gather(1, kept)
    rows = zip(token_ids[:-_NUM_RANDOM].tolist(), cosines.tolist(), strict=False)
    words_by_token = [[_word(base, *pair) for pair in zip(*row, strict=True)] for row in rows]
    return NearestWords(compared, round(float(cosines[-_NUM_RANDOM:, 0].mean()), 4), words_by_token)


def _word(base: BaseModel, token_id: int, cosine: float) -> Word:
    text = base.tokenizer.decode([token_id])
    if "\ufffd" in text:  # a piece of a character: as the vocabulary spells it
        text = base.tokenizer.convert_ids_to_tokens(token_id)
    return Word(text, round(cosine, 4))


class _FirstLayerReached(Exception):  # noqa: N818  it is how the forward ends, not an error
    def __init__(self, values: Tensor) -> None:
        self.values = values


class _FirstLayer(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """Ends a forward at its first layer's values, whatever the architecture."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise _FirstLayerReached(value_states)


def _first_values(base: BaseModel, token_ids: Tensor) -> Tensor:
    """The layer-0 values [N, H_kv * D] of vocabulary tokens [N], each alone in its sequence."""
    try:
        base.model(input_ids=token_ids[:, None], past_key_values=_FirstLayer(), use_cache=True)
    except _FirstLayerReached as reached:
        return reached.values.flatten(1)
    raise AssertionError("the engine serves no model that leaves its cache unused")


def pooled(prefix_kv: Tensor) -> Tensor:
    """[L * H_kv * D]: the mean over a prompt's virtual tokens (Vu et al. 2022, SPoT), of the values.

    Without the keys: rotated by position and much alike in all prompts, they bring any two to a cosine of 0.97 or more, where
    values tell the starter domains apart (0.69 to 0.89). Not centred: the figure would depend on which domains are live, and
    be -1 for any two.
    """
    return prefix_kv[:, 1].float().mean(dim=2).flatten()


def similarity(one: Tensor, vectors: Sequence[Tensor]) -> list[float]:
    """Cosines of a vector [W] with others."""
    return [round(cosine, 4) for cosine in cosine_similarity(one, torch.stack(list(vectors))).tolist()]
