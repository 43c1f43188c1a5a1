"""Samplers against hand-computed distributions and against transformers' own processors."""

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from bot.engine.request import SamplingParams
from bot.engine.sampling import keep_top_k, keep_top_p, likeliest, penalize_repetition, sample

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    assert torch.isfinite(keep_top_p(LOGITS, 0.5)).tolist() == [True, False, False, False]
    assert torch.isfinite(keep_top_p(LOGITS, 0.51)).tolist() == [True, True, False, False]
    assert torch.isfinite(keep_top_p(LOGITS, 0.01)).tolist() == [True, False, False, False]
    assert torch.equal(keep_top_p(LOGITS, 1.0), LOGITS)


@pytest.mark.parametrize("seed", range(5))
def test_filters_equal_those_of_transformers(seed: int) -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 3
    seen = [3, 7, 7, 999, 0]
    ids = torch.tensor([seen])
    assert torch.equal(keep_top_k(logits, 20), TopKLogitsWarper(20)(ids, logits[None])[0])
    assert torch.equal(keep_top_p(logits, 0.8), TopPLogitsWarper(0.8)(ids, logits[None])[0])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, logits[None].clone())[0]
    assert torch.allclose(penalize_repetition(logits, seen, 1.3, frozenset()), expected)


def test_stop_tokens_are_not_penalised() -> None:
    penalised = penalize_repetition(LOGITS, [0, 1], 2.0, frozenset({1}))
    assert penalised[0] == LOGITS[0] * 2
    assert penalised[1] == LOGITS[1]


def test_samples_follow_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [sample(LOGITS, SamplingParams(), generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    # Four standard deviations of a share of 0.5 over 4,000 draws: a false failure is rarer than one in 10,000.
    assert torch.allclose(shares, LOGITS.exp(), atol=0.032)


def test_the_likeliest_come_first_and_are_never_more_than_there_are() -> None:
    ids, values = zip(*likeliest(LOGITS, 9), strict=True)
    assert ids == (0, 1, 2, 3)
    assert torch.allclose(torch.tensor(values), LOGITS)
    assert [token_id for token_id, _ in likeliest(LOGITS, 2)] == [0, 1]
    assert likeliest(LOGITS, 0) == ()


def test_temperature_zero_is_greedy_and_low_temperature_nearly_so() -> None:
    generator = torch.Generator().manual_seed(0)
    assert sample(LOGITS, SamplingParams(temperature=0), generator) == 0
    assert {sample(LOGITS, SamplingParams(temperature=0.02), generator) for _ in range(100)} == {0}
    assert sample(LOGITS, SamplingParams(temperature=1e-40), generator) == 0
