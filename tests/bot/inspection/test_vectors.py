"""What is said of a prompt's vectors, against prompts whose contents are known."""

import pytest
import torch

from bot.inspection.vectors import nearest_words, pooled, prefix_kv_of, similarity
from prompt_bank.base_model import BaseModel
from prompt_bank.soft_prompt import Kind, SoftPrompt
from tests.bot.inspection.conftest import prompt_of_words, word_ids
from tests.prompt_bank.conftest import make_prompt


@pytest.mark.parametrize("kind", ["embeds", "prefix_kv"])
def test_a_prompt_made_of_words_is_read_back_word_by_word(tiny: BaseModel, kind: Kind) -> None:
    prompt = prompt_of_words(tiny, kind)
    expected = [tiny.tokenizer.decode([token_id]) for token_id in word_ids(tiny)]
    nearest = nearest_words(tiny, prompt, prefix_kv_of(tiny, prompt))
    compared = ["input embeddings", "layer-0 values"] if kind == "embeds" else ["layer-0 values"]
    assert [each.compared for each in nearest] == compared
    for each in nearest:
        assert [words[0].text for words in each.words] == expected
        assert all(words[0].cosine > 0.999 for words in each.words)
        assert all(words[0].cosine > words[1].cosine >= words[2].cosine for words in each.words)
        assert each.by_chance < 0.9


def test_words_are_read_back_from_values_in_every_architecture(architecture: BaseModel) -> None:
    prompt = prompt_of_words(architecture, "prefix_kv")
    (nearest,) = nearest_words(architecture, prompt, prompt.tensor)
    found = [words[0].text for words in nearest.words]
    expected = [architecture.tokenizer.decode([token_id]) for token_id in word_ids(architecture)]
    # GPT-2 adds a position to each word before it takes values, so that only the first stands as it does alone.
    assert found[:1] == expected[:1]
    assert architecture.name == "gpt2" or found == expected


def test_a_random_prompt_is_no_nearer_to_words_than_chance(tiny: BaseModel) -> None:
    prompt = make_prompt(tiny.shape, "prefix_kv", num_virtual_tokens=16, seed=5)
    (nearest,) = nearest_words(tiny, prompt, prompt.tensor)
    mean = sum(words[0].cosine for words in nearest.words) / len(nearest.words)
    assert mean == pytest.approx(nearest.by_chance, abs=0.05)


def test_a_piece_of_a_character_is_shown_as_the_vocabulary_spells_it(tiny: BaseModel) -> None:
    token_id = next(i for i in range(len(tiny.tokenizer)) if tiny.tokenizer.decode([i]) == "\ufffd")
    prompt = SoftPrompt("embeds", tiny.model.get_input_embeddings()(torch.tensor([token_id])))
    words = nearest_words(tiny, prompt, prefix_kv_of(tiny, prompt))[0].words[0]
    assert words[0].text == tiny.tokenizer.convert_ids_to_tokens(token_id)
    assert words[0].quoted == repr(words[0].text)


def test_numbers_of_a_virtual_token_are_its_own(tiny: BaseModel) -> None:
    prompt = make_prompt(tiny.shape, "prefix_kv", num_virtual_tokens=3)
    expected = torch.stack([prompt.tensor[:, :, :, index].flatten() for index in range(3)])
    assert torch.equal(prompt.by_token, expected)
    embeds = make_prompt(tiny.shape, "embeds", num_virtual_tokens=3)
    assert torch.equal(embeds.by_token, embeds.tensor)


def test_similarity_knows_a_prompt_in_its_other_kind_and_length(tiny: BaseModel) -> None:
    embeds, prefix = prompt_of_words(tiny, "embeds"), prompt_of_words(tiny, "prefix_kv")
    twice = SoftPrompt("prefix_kv", torch.cat([prefix.tensor, prefix.tensor], dim=3))
    other = make_prompt(tiny.shape, "prefix_kv", num_virtual_tokens=5)
    vectors = [pooled(prefix_kv_of(tiny, prompt)) for prompt in (embeds, prefix, twice, other)]
    same, in_other_kind, in_other_length, of_other = similarity(vectors[0], vectors)
    assert same == in_other_kind == in_other_length == pytest.approx(1, abs=1e-4)
    assert of_other < 0.5
