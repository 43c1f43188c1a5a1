"""A soft prompt's digest and checks."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from prompt_bank.base_model import ModelShape
from prompt_bank.errors import SoftPromptError
from prompt_bank.soft_prompt import KINDS, MAX_VIRTUAL_TOKENS, Kind, SoftPrompt, check_soft_prompt, expected_shape
from tests.prompt_bank.conftest import make_prompt

SHAPE = ModelShape(num_layers=2, num_kv_heads=2, head_size=4, hidden_size=16)

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(floats, min_size=1, max_size=16), st.integers(0, 15), st.sampled_from(KINDS))
def test_digest_depends_on_every_value(values: list[float], index: int, kind: Kind) -> None:
    tensor = torch.tensor(values)
    changed = tensor.clone()
    changed.view(torch.int32)[index % len(values)] ^= 1  # one bit
    assert SoftPrompt(kind, tensor).digest == SoftPrompt(kind, tensor.clone()).digest
    assert SoftPrompt(kind, tensor).digest != SoftPrompt(kind, changed).digest


@given(st.permutations([(2, 8), (8, 2), (1, 16), (16, 1)]))
def test_digest_depends_on_the_shape(shapes: list[tuple[int, int]]) -> None:
    tensor = torch.arange(16.0)
    assert len({SoftPrompt("embeds", tensor.view(shape)).digest for shape in shapes}) == 4


def test_digest_depends_on_kind_and_dtype() -> None:
    zeros = torch.zeros(2, 8)
    same_bytes = [zeros, zeros.view(torch.int32), torch.zeros(2, 8, dtype=torch.int32)]
    digests = {SoftPrompt(kind, tensor).digest for kind in KINDS for tensor in same_bytes}
    assert len(digests) == 4


def test_digest_does_not_depend_on_strides_and_is_pinned() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert SoftPrompt("embeds", tensor.t().contiguous().t()).digest == SoftPrompt("embeds", tensor).digest
    assert SoftPrompt("embeds", tensor).digest == "1830191dc904ccfef9971f2a07597b8efa8839411209e749bb5c9e687151009c"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_virtual_tokens", [1, 5])
def test_blob_round_trip(kind: Kind, num_virtual_tokens: int) -> None:
    prompt = make_prompt(SHAPE, kind, num_virtual_tokens)
    read = SoftPrompt.from_bytes(prompt.to_bytes())
    assert (read.kind, read.digest, read.num_virtual_tokens) == (kind, prompt.digest, num_virtual_tokens)
    assert torch.equal(read.tensor, prompt.tensor)
    assert read.num_bytes == prompt.tensor.numel() * 4


@pytest.mark.parametrize(
    ("blob", "problem"),
    [
        (b"", "not a safetensors blob"),
        (b"\x80\x04pickle", "not a safetensors blob"),
        (make_prompt(SHAPE).to_bytes()[:-1], "not a safetensors blob"),
        (save({"weights": torch.zeros(2)}), r"holds tensors \['weights'\]"),
        (save({"embeds": torch.zeros(2), "prefix_kv": torch.zeros(2)}), "holds tensors"),
        (save({}), r"holds tensors \[\]"),
    ],
)
def test_broken_blob_is_refused(blob: bytes, problem: str) -> None:
    with pytest.raises(SoftPromptError, match=problem):
        SoftPrompt.from_bytes(blob)


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tensor: tensor[0], "has rank"),
        (lambda tensor: tensor[None], "has rank"),
        (lambda tensor: torch.tensor(1.0), "has rank 0"),
        (lambda tensor: tensor[..., :-1], "this base model takes"),
        (lambda tensor: torch.cat([tensor, tensor], dim=-1), "this base model takes"),
        (lambda tensor: tensor.double(), "is torch.float64, expected float32"),
        (lambda tensor: tensor.bfloat16(), "is torch.bfloat16, expected float32"),
        (lambda tensor: tensor.to(torch.int32), "is torch.int32, expected float32"),
        (with_value(math.nan), "values that are not finite"),
        (with_value(math.inf), "values that are not finite"),
        (with_value(-math.inf), "values that are not finite"),
        (with_value(65_520.0), "beyond half precision's range"),
        (with_value(-1e30), "beyond half precision's range"),
    ],
)
def test_unfit_tensor_is_refused_by_name(kind: Kind, change: Callable[[Tensor], Tensor], problem: str) -> None:
    prompt = make_prompt(SHAPE, kind)
    assert check_soft_prompt(prompt, SHAPE) is prompt
    with pytest.raises(SoftPromptError, match=problem):
        check_soft_prompt(SoftPrompt(kind, change(prompt.tensor)), SHAPE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_virtual_tokens", [0, MAX_VIRTUAL_TOKENS + 1])
def test_length_is_bounded(kind: Kind, num_virtual_tokens: int) -> None:
    tensor = torch.zeros(expected_shape(kind, num_virtual_tokens, SHAPE))
    with pytest.raises(SoftPromptError, match=f"{num_virtual_tokens} virtual tokens, expected 1 to 1024"):
        check_soft_prompt(SoftPrompt(kind, tensor), SHAPE)


def test_widest_half_precision_value_is_taken() -> None:
    prompt = SoftPrompt("embeds", torch.full((1, 16), 65_504.0))
    assert check_soft_prompt(prompt, SHAPE).tensor.half().isfinite().all()


@pytest.mark.parametrize(
    "other",
    [ModelShape(3, 2, 4, 16), ModelShape(2, 1, 4, 16), ModelShape(2, 2, 8, 16), ModelShape(2, 2, 4, 32)],
    ids=["layers", "heads", "head size", "hidden size"],
)
def test_prompt_of_another_model_is_refused(other: ModelShape) -> None:
    kind: Kind = "embeds" if other.hidden_size != SHAPE.hidden_size else "prefix_kv"
    with pytest.raises(SoftPromptError, match="this base model takes"):
        check_soft_prompt(make_prompt(SHAPE, kind), other)
