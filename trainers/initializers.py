"""Where a soft prompt starts: from the operator's own text, or from random numbers.

Names follow google-research/prompt-tuning. That a prefix starts best as the KV of a text is the finding of Cartridges (Hazy
Research) and of PEFT's benchmark. Knows nothing of training.

Notation: P virtual tokens, H hidden size, L layers, H_kv key-value heads, D head size.
"""

from itertools import chain, cycle, islice

import torch

from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.soft_prompt import Kind, SoftPrompt, expected_shape
from trainers.serving_layout import prefix_kv_of

# PEFT's benchmark found a random prefix far worse than one of zeros, which in turn cannot tell its tokens apart.
_RANDOM_PREFIX_STD = 0.02


@torch.no_grad()
def from_text(base: BaseModel, chat_format: ChatFormat, kind: Kind, num_virtual_tokens: int, text: str) -> SoftPrompt:
    """What the frozen model makes of `text` as it would be served, as a system message, cut or repeated to P tokens.

    `embeds` [P, H] are the tokens' input embeddings; `prefix_kv` [L, 2, H_kv, P, D] their keys, after rotary embedding at
    positions 0 to P - 1, and values.
    """
    token_ids = torch.tensor(system_token_ids(base, chat_format, num_virtual_tokens, text), device=base.device)
    embeds = base.model.get_input_embeddings()(token_ids)
    if kind == "prefix_kv":
        return SoftPrompt(kind, prefix_kv_of(base, embeds))
    return SoftPrompt(kind, embeds.float().cpu())


def system_token_ids(base: BaseModel, chat_format: ChatFormat, num_virtual_tokens: int, text: str) -> list[int]:
    """P token ids: the markup that opens a system message, the start of `text` (again, when it is short), and what closes it.

    Without its end the message would run into the person's first turn, which starts worse than no message at all. So few
    virtual tokens that the markup alone fills them get the opening only.
    """
    markup = chat_format.markup
    closing = markup.user_after_system.removesuffix(markup.first_user)
    is_closed = closing != markup.user_after_system
    before = _ids(base, markup.system)
    after = _ids(base, closing) if is_closed else []
    if len(before) + len(after) >= num_virtual_tokens:
        after = []
    body = cycle(chat_format.text_ids(text))
    return [*islice(chain(before, body), num_virtual_tokens - len(after)), *after]


def _ids(base: BaseModel, text: str) -> list[int]:
    return [int(token) for token in base.tokenizer(text, add_special_tokens=False)["input_ids"]]


def from_random(base: BaseModel, kind: Kind, num_virtual_tokens: int, seed: int) -> SoftPrompt:
    """Normal numbers: `embeds` [P, H] as spread as the model's own embeddings, `prefix_kv` [L, 2, H_kv, P, D] close to zero."""
    std = _RANDOM_PREFIX_STD
    if kind == "embeds":
        std = float(base.model.get_input_embeddings().weight.float().std())
    generator = torch.Generator().manual_seed(seed)
    return SoftPrompt(kind, torch.randn(expected_shape(kind, num_virtual_tokens, base.shape), generator=generator) * std)
