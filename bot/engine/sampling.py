"""From one row's logits to its next token. Pure functions over logits [V]; the order is that of transformers' generate."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bot.engine.request import SamplingParams


def penalize_repetition(logits: Tensor, seen: Sequence[int], penalty: float, exempt: frozenset[int]) -> Tensor:
    """Makes every token in `seen` less likely (Keskar et al. 2019, CTRL, section 4.1).

    Stop tokens are exempt: every earlier turn of a chat ends with one, and penalising it would keep answers from ending.
    """
    if penalty == 1.0:
        return logits
    ids = torch.tensor(sorted(set(seen) - exempt), device=logits.device, dtype=torch.long)
    picked = logits[ids]
    penalized = logits.clone()
    penalized[ids] = torch.where(picked > 0, picked / penalty, picked * penalty)
    return penalized


def likeliest(logprobs: Tensor, num_tokens: int) -> tuple[tuple[int, float], ...]:
    """(token id, log probability) of the `num_tokens` likeliest of `logprobs` [V], likeliest first."""
    values, ids = logprobs.topk(min(num_tokens, logprobs.shape[0]))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    if not 0 < top_k < logits.shape[0]:
        return logits
    threshold = torch.topk(logits, top_k).values[-1]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of tokens whose probability reaches `top_p` (Holtzman et al. 2020), always at least one."""
    if top_p >= 1.0:
        return logits
    ordered, order = logits.sort(descending=True)
    probabilities = ordered.softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities  # the mass ahead of each token
    return logits.index_fill(0, order[before >= top_p], -torch.inf)


_GREEDY_BELOW = 1e-4  # logits divided by less would overflow


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """The next token id. `generator` is the row's own, so its draws do not depend on the batch."""
    if params.temperature < _GREEDY_BELOW:
        return int(logits.argmax())
    scaled = keep_top_p(keep_top_k(logits.float() / params.temperature, params.top_k), params.top_p)
    probabilities = scaled.softmax(dim=0).cpu()
    return int(torch.multinomial(probabilities, 1, generator=generator))
