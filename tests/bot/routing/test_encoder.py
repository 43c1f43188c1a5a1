"""The encoder with its real weights: unit vectors, any text, and broken files refused by name."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from bot.routing.encoder import Encoder
from prompt_bank.errors import ModelCorruptError
from prompt_bank.model_files import MINILM, find_model


@pytest.fixture(scope="module")
def encoder_dir(models_dir: Path) -> Path:
    return find_model(MINILM.name, models_dir)


@pytest.fixture(scope="module")
def encoder(encoder_dir: Path) -> Encoder:
    return Encoder(encoder_dir)


@pytest.fixture
def own_copy(encoder_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(encoder_dir, tmp_path / "encoder"))


def test_vectors_have_length_one_and_near_meanings_are_near(encoder: Encoder) -> None:
    vectors = encoder.encode(["I lost my bank card", "my debit card is gone", "how long does an egg take to boil"])
    assert vectors.shape == (3, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.6 > 0.3 > vectors[0] @ vectors[2]


def test_a_text_has_the_same_vector_alone_and_in_a_batch_with_a_longer_one(encoder: Encoder) -> None:
    short, long = "my card", "a much longer message about something else, so that the short one is padded " * 3
    np.testing.assert_allclose(encoder.encode([short])[0], encoder.encode([short, long])[0], atol=1e-5)
    assert np.abs(encoder.encode([short])[0] - encoder.encode(["my cat"])[0]).max() > 1e-3


def test_no_texts_give_no_vectors(encoder: Encoder) -> None:
    assert encoder.encode([]).shape == (0, 384)


def test_examples_are_remembered_and_equal_to_encoded_ones(encoder: Encoder) -> None:
    first = encoder.encode_examples(["one", "two", "one"])
    again = encoder.encode_examples(["two", "three", "one"])
    np.testing.assert_array_equal(first[[0, 1]], again[[2, 0]])
    np.testing.assert_allclose(again, encoder.encode(["two", "three", "one"]), atol=1e-5)


def test_truncated_weights_are_corrupt(own_copy: Path) -> None:
    weights = own_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    with pytest.raises(ModelCorruptError, match="cannot be loaded"):
        Encoder(own_copy)


def test_absent_weights_are_corrupt_not_random(own_copy: Path) -> None:
    """transformers fills a tensor that is not in the file with random numbers: the router would guess."""
    weights = own_copy / "model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.layer.3.attention.self.query.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelCorruptError, match="lacks 1 of its weights"):
        Encoder(own_copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_garbled_files_are_corrupt(own_copy: Path, name: str) -> None:
    (own_copy / name).write_text("{not json")
    with pytest.raises(ModelCorruptError, match="cannot be loaded"):
        Encoder(own_copy)
