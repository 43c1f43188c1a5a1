"""Loading and fingerprinting: the same weights have the same name wherever they lie, other weights never."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import BloomConfig, BloomForCausalLM

from prompt_bank.base_model import FINGERPRINT_FILE, BaseModel, ModelShape, fingerprint_of, load_base_model
from prompt_bank.errors import ModelCorruptError
from tests.conftest import random_llama


@pytest.fixture(scope="module")
def saved(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny, tmp_path_factory.mktemp("saved"))


def save(base: BaseModel, folder: Path, **options: object) -> Path:
    base.model.save_pretrained(folder, **options)
    base.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def spoiled(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model for a test to spoil."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fingerprint_does_not_depend_on_the_serving_dtype(saved: Path, tiny: BaseModel, dtype: str) -> None:
    loaded = load_base_model("tiny", saved, "cpu", dtype)  # type: ignore[arg-type]
    assert loaded.fingerprint == tiny.fingerprint
    assert loaded.dtype == loaded.model.dtype == getattr(torch, dtype)
    assert loaded.shape == tiny.shape == ModelShape(num_layers=2, num_kv_heads=2, head_size=16, hidden_size=64)


def test_fingerprint_does_not_depend_on_the_layout_of_files(tiny: BaseModel, tmp_path: Path) -> None:
    folder = save(tiny, tmp_path, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "README.md").write_text("other words")
    assert load_base_model("another name", folder, "cpu", "float32").fingerprint == tiny.fingerprint


def test_fingerprint_changes_with_one_weight(tiny: BaseModel) -> None:
    model = copy.deepcopy(tiny.model)
    assert fingerprint_of(model, tiny.tokenizer) == tiny.fingerprint
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.view(torch.int32)[3, 5] ^= 1
    assert fingerprint_of(model, tiny.tokenizer) != tiny.fingerprint


def test_fingerprint_changes_with_exchanged_tensors_and_with_dtype(tiny: BaseModel) -> None:
    model = copy.deepcopy(tiny.model)
    model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
    assert fingerprint_of(model, tiny.tokenizer) != tiny.fingerprint
    assert fingerprint_of(copy.deepcopy(tiny.model).bfloat16(), tiny.tokenizer) != tiny.fingerprint


def test_fingerprint_changes_with_the_tokenizer(tiny: BaseModel) -> None:
    """GGUF's tokenizer as transformers 5.23 reads it must not pass for the mended one."""
    unmended = copy.deepcopy(tiny.tokenizer)
    assert fingerprint_of(tiny.model, unmended) == tiny.fingerprint
    unmended.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    assert fingerprint_of(tiny.model, unmended) != tiny.fingerprint


def test_other_seeds_are_other_models(tiny: BaseModel, smollm2_dir: Path) -> None:
    assert random_llama(smollm2_dir, seed=0).fingerprint == tiny.fingerprint
    assert random_llama(smollm2_dir, seed=1).fingerprint != tiny.fingerprint


def test_loaded_model_is_frozen(saved: Path) -> None:
    loaded = load_base_model("tiny", saved, "cpu", "float32")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_default_model(smollm2: BaseModel) -> None:
    assert smollm2.shape == ModelShape(num_layers=30, num_kv_heads=3, head_size=64, hidden_size=576)
    assert smollm2.context_tokens == 8192
    assert smollm2.stop_token_ids == {2}
    # As converted on this machine: another torch or GGUF reader must not give other weights unnoticed.
    assert smollm2.fingerprint == "e7928a20469601efbd288fb1e17ae4a2cf1b9a2ce2a079a56838dda02a8f2992"


def test_bloom_without_a_declared_context_gets_a_finite_one(tiny: BaseModel) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.model_max_length = int(1e30)
    base = BaseModel("bloom", model, tokenizer, "", ModelShape.of(model.config), tiny.device, tiny.dtype)
    assert base.shape == ModelShape(num_layers=2, num_kv_heads=4, head_size=8, hidden_size=32)
    assert base.context_tokens == 2048
    model.config.seq_length = 512
    assert base.context_tokens == 512


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def edit_config(**fields: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))  # type: ignore[return-value]


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("model.safetensors", truncate),
        ("model.safetensors", drop_tensor),
        ("model.safetensors", lambda path: path.write_bytes(b"")),
        ("model.safetensors", lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}")),
        ("model.safetensors", Path.unlink),
        ("config.json", lambda path: path.write_text("{")),
        ("config.json", edit_config(model_type="unheard-of")),
        ("config.json", edit_config(hidden_size=128)),
        ("config.json", Path.unlink),
        ("tokenizer.json", lambda path: path.write_text("{}")),
        ("tokenizer.json", lambda path: path.write_bytes(path.read_bytes()[:-1000])),
    ],
    ids=[
        "truncated",
        "a tensor less",
        "empty",
        "huge header",
        "no weights",
        "config",
        "type",
        "width",
        "no config",
        "tok",
        "tok cut",
    ],
)
@pytest.mark.filterwarnings("ignore")  # what transformers says about a broken file is its own matter
def test_broken_model_is_refused_by_its_folder_in_one_line(spoiled: Path, name: str, spoil: Callable[[Path], None]) -> None:
    spoil(spoiled / name)
    with pytest.raises(ModelCorruptError) as refused:
        load_base_model("tiny", spoiled, "cpu", "float32")
    assert str(spoiled) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_was_changed_after_it_was_fetched_is_refused(spoiled: Path, tiny: BaseModel) -> None:
    (spoiled / FINGERPRINT_FILE).write_text(tiny.fingerprint, encoding="utf-8")
    assert load_base_model("tiny", spoiled, "cpu", "float32").fingerprint == tiny.fingerprint
    weights = bytearray((spoiled / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (spoiled / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelCorruptError, match="was changed after it was fetched"):
        load_base_model("tiny", spoiled, "cpu", "float32")


def test_code_in_a_model_s_folder_is_never_run(spoiled: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    trace = tmp_path_factory.mktemp("trace") / "ran"
    (spoiled / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Config: ...\nclass Model: ...\n")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(auto_map=auto_map, model_type="evil")(spoiled / "config.json")
    with pytest.raises(ModelCorruptError, match=r"trust_remote_code|custom code"):
        load_base_model("tiny", spoiled, "cpu", "float32")
    assert not trace.exists()
