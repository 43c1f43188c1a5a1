"""Fuzz of what others give: each of over 10,000 spoiled archives and folders loads exactly or is refused by name.

The originals are real: written by `write_archive` and `write_peft`. All cases run under a limit on the process's memory, and
around a tree of files that must stay as it is.
"""

import io
import json
import os
import random
import resource
import shutil
import struct
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prompt_bank.archive import MEMBERS, write_archive, write_folder
from prompt_bank.base_model import ModelShape
from prompt_bank.errors import FrontdeskError, SoftPromptError
from prompt_bank.importing import Imported, read_import
from prompt_bank.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_peft, write_peft
from prompt_bank.soft_prompt import KINDS, SoftPrompt
from prompt_bank.store import FolderStore
from prompt_bank.version import CARD_FILE, MANIFEST_FILE, Draft, ServedModel
from tests.prompt_bank.conftest import make_card, make_prompt

SHAPE = ModelShape(num_layers=2, num_kv_heads=2, head_size=4, hidden_size=16)
SERVED = ServedModel("tiny", "f" * 64, "c" * 64, SHAPE)
CASES = 1000  # of each of the sources below
SOURCES = [f"{form} {kind}" for form in ("stored", "deflated", "folder") for kind in (*KINDS, "brief")]
SOURCES += [f"peft {kind}" for kind in (*KINDS, "multitask")]
TASK_ID = 1  # of three
MEMORY_BYTES = 512 * 1024 * 1024  # far less than any of the sizes declared here

Files = dict[str, bytes]

TOKENS = [
    *(b"NaN", b"Infinity", b"-1", b"1e999", b"9" * 400, b"1" + b"0" * 5000, b"[" * 3000, b'{"a":' * 3000, b"null", b"true"),
    *(b'"\\ud800"', b"\xff\xfe", b"\x00", b"\x1b[31m", b"../", b'"shape":[1099511627776,32]', b'"dtype":"F64"'),
    *(b'"prompt_embeddings":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},', b"a" + b".a" * 50_000 + b"=1\n"),
    *(b'"peft_type":"LORA",', b'"peft_type":"MULTITASK_PROMPT_TUNING",', b'"num_layers":2,', b'"soft_prompt":null,'),
    *(struct.pack("<Q", 2**63), struct.pack("<L", 2**32 - 1), b"PK\x05\x06", b"PK\x06\x07", b"PK\x01\x02"),
]


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """An allocation beyond the limit raises MemoryError, which is no FrontdeskError."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for the spoiled sources: beside it files that must not change, and the temporary folder, to be left empty."""
    for name in ("around/secret.txt", "around/card.toml", "around/deeper/adapter_model.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} is not to be touched")
    for name in ("scratch", "cases"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    return tmp_path


def surroundings(ground: Path) -> dict[str, tuple[int, bytes]]:
    """Everything but the cases themselves."""
    seen = dict.fromkeys(os.listdir(ground), (0, b""))
    for path in [*(ground / "around").rglob("*"), *(ground / "scratch").rglob("*")]:
        seen[str(path)] = (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
    return seen


def originals(ground: Path, kind: str) -> Files:
    """The files of a real version of this kind, or of a brief."""
    prompt = None if kind == "brief" else prompt_of(kind)
    store = FolderStore(ground / "bank")
    version = store.read_files(store.add_version(Draft(make_card(), SERVED, prompt), "tester", "a test"))
    write_archive(version, ground / "original.zip")
    write_folder(version, ground / "original")
    files = {name: (ground / "original" / name).read_bytes() for name in MEMBERS if (ground / "original" / name).exists()}
    with zipfile.ZipFile(ground / "original.zip") as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
    for path in (ground / "bank", ground / "original"):
        shutil.rmtree(path)
    (ground / "original.zip").unlink()
    return files


def multitask_originals(ground: Path) -> Files:
    """The files of a multitask prompt as PEFT saves one: embeddings and two factors a task."""
    from peft import MultitaskPromptTuningConfig

    folder, generator = ground / "original", torch.Generator().manual_seed(3)
    sizes = {"token_dim": 16, "num_layers": 2, "num_attention_heads": 2, "num_transformer_submodules": 1}
    config = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=2, **sizes)
    config.save_pretrained(folder)
    shapes = {"prompt_embeddings": (4, 16), "prefix_task_cols": (3, 4, 2), "prefix_task_rows": (3, 2, 16)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    shutil.rmtree(folder)
    return files


def prompt_of(kind: str) -> SoftPrompt:
    return make_prompt(SHAPE, "embeds" if kind == "embeds" else "prefix_kv")


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to three of: flip, set, truncate, splice, insert, duplicate; half of them near the start, where headers are."""
    spoiled = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        near = min(len(spoiled), 300) if rng.random() < 0.5 else len(spoiled)
        start = rng.randrange(near + 1)
        end = min(len(spoiled), start + rng.choice([1, 2, 8, 64, 1000]))
        chunk = bytes(spoiled[start:end])
        match rng.randrange(7):
            case 0 if chunk:
                spoiled[start] ^= 1 << rng.randrange(8)
            case 1 if chunk:
                spoiled[start:end] = rng.randbytes(len(chunk))
            case 2:
                del spoiled[start:]
            case 3:
                del spoiled[start:end]
            case 4:
                other = rng.randrange(len(spoiled) + 1)
                spoiled[other:other] = chunk
            case 5:
                spoiled[start:start] = rng.choice(TOKENS)
            case _:
                spoiled[start:start] = rng.randbytes(rng.choice([1, 4, 100]))
    return bytes(spoiled)


def spoiled_files(files: Files, rng: random.Random) -> Files:
    """One file's bytes changed, two swapped, or one left out."""
    name, other = rng.choice(sorted(files)), rng.choice(sorted(files))
    match rng.randrange(8):
        case 0:
            return files | {name: files[other], other: files[name]}
        case 1:
            return {key: content for key, content in files.items() if key != name}
        case _:
            return files | {name: mutate(files[name], rng)}


def zip_bytes(members: list[tuple[str, bytes]], compression: int) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")  # zipfile warns of duplicate names
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            info.external_attr = 0o644 << 16
            if name.endswith(".link"):
                info.filename = info.orig_filename = name.removesuffix(".link")
                info.external_attr = 0o120777 << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def write_spoiled_archive(path: Path, files: Files, rng: random.Random, compression: int) -> None:
    """Half the cases spoil the archive's bytes, which its checksums may tell; half spoil its members and write it anew."""
    members, around = list(files.items()), path.parent.parent / "around"
    index = rng.randrange(len(members))
    name, content = members[index]
    match rng.randrange(8):
        case 0:
            hostile = [
                f"../{name}",
                f"../../around/{name}",
                f"{around}/{name}",
                f"{around}/secret.txt",
                f"a/{name}",
                f"{name}/",
            ]
            members[index] = (
                rng.choice([*hostile, f"..\\{name}", name.upper(), f"./{name}", f"{name}\0.txt", "\u202e" + name]),
                content,
            )
        case 1:
            members.append((rng.choice([name, *MEMBERS, "../around/secret.txt"]), rng.choice([content, b"x"])))
        case 2:
            members[index] = (f"{name}.link", str(around / "secret.txt").encode())
        case 3 | 4:
            members = list(spoiled_files(files, rng).items())
        case _:
            path.write_bytes(mutate(zip_bytes(members, compression), rng))
            return
    path.write_bytes(zip_bytes(members, compression))


def write_spoiled_folder(path: Path, files: Files, rng: random.Random) -> None:
    path.mkdir()
    around, name = path.parent.parent / "around", rng.choice(sorted(files))
    placed = files if rng.randrange(8) == 0 else spoiled_files(files, rng)
    for each, content in placed.items():
        (path / each).write_bytes(content)
    if placed is files:
        (path / name).unlink()
        make: Callable[[Path], Any] = rng.choice(
            [
                lambda place: place.symlink_to(around / "secret.txt"),
                lambda place: place.symlink_to(rng.choice(["/dev/zero", "..", "nowhere", CARD_FILE])),
                os.mkfifo,
                Path.mkdir,
            ]
        )
        make(path / name)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def as_the_library_reads_it(folder: Path) -> torch.Tensor:
    """[P, width] as safetensors itself reads the file, times the factors of the task where it has any."""
    tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    embeddings = tensors["prompt_embeddings"]
    if "prefix_task_cols" not in tensors:
        return embeddings
    return embeddings * (tensors["prefix_task_cols"][TASK_ID] @ tensors["prefix_task_rows"][TASK_ID])


def flat(prompt: SoftPrompt) -> torch.Tensor:
    tensor = prompt.tensor
    return tensor if prompt.kind == "embeds" else tensor.permute(3, 0, 1, 2, 4).reshape(prompt.num_virtual_tokens, -1)


def assert_exact(read: Imported, source: Path, kind: str) -> None:
    """What was loaded is the original, where a manifest says what that is; else what the file holds."""
    if source.is_dir() and not (source / MANIFEST_FILE).exists():
        assert read.prompt is not None
        assert torch.equal(flat(read.prompt), as_the_library_reads_it(source))
        assert bool(torch.isfinite(read.prompt.tensor).all())
        return
    assert read.card == make_card()
    assert (read.prompt and read.prompt.digest) == (None if kind == "brief" else prompt_of(kind).digest)


def test_there_are_ten_thousand_cases() -> None:
    assert len(SOURCES) * CASES >= 10_000


@pytest.mark.parametrize("source", SOURCES)
def test_a_spoiled_source_loads_exactly_or_is_refused(ground: Path, source: str) -> None:
    form, kind = source.split()
    files = multitask_originals(ground) if kind == "multitask" else originals(ground, kind)
    if form == "peft":
        files = {name: files[name] for name in (CONFIG_FILE, WEIGHTS_FILE)}
    rng, before = random.Random(source), surroundings(ground)
    num_loaded = 0
    refusals: set[str] = set()
    for case in range(CASES):
        path = ground / "cases" / f"case{case}"
        if form in ("folder", "peft"):
            write_spoiled_folder(path, files, rng)
        else:
            write_spoiled_archive(path, files, rng, zipfile.ZIP_STORED if form == "stored" else zipfile.ZIP_DEFLATED)
        try:
            read = read_import(str(path), SERVED, TASK_ID if kind == "multitask" else None)
        except FrontdeskError as error:
            refusals.add(str(error))
        else:
            num_loaded += 1
            assert_exact(read, path, kind)
        assert surroundings(ground) == before, f"case {case}"
        remove(path)
    assert 0 < num_loaded < CASES, "neither side of the property may go untested"
    assert all(text.isprintable() and len(text) <= 1000 for text in refusals)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=8,
)
config_names = ["peft_type", "task_type", "num_transformer_submodules", "num_layers", "num_attention_heads", "token_dim"]
likely = st.sampled_from(["PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING", "LORA", "CAUSAL_LM", "SEQ_CLS", None, 0, 1, 2, 8, 16])


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder with a good prefix, for Hypothesis to spoil again and again."""
    folder = tmp_path_factory.mktemp("spoilt")
    write_peft(prompt_of("prefix_kv"), folder, SHAPE, "tiny")
    shutil.copy(folder / CONFIG_FILE, folder / "good_config.json")
    shutil.copy(folder / WEIGHTS_FILE, folder / "good_weights")
    return folder


@settings(max_examples=400)
@given(
    fields=st.dictionaries(st.sampled_from(config_names), likely | json_values, max_size=3),
    more=st.dictionaries(st.text(max_size=12), json_values, max_size=3),
)
def test_any_configuration_gives_the_same_prompt_or_none(spoilt: Path, fields: dict[str, Any], more: dict[str, Any]) -> None:
    config = json.loads((spoilt / "good_config.json").read_text())
    (spoilt / CONFIG_FILE).write_text(json.dumps(more | config | fields))
    shutil.copy(spoilt / "good_weights", spoilt / WEIGHTS_FILE)
    taken = {
        "peft_type": {"PREFIX_TUNING", "CARTRIDGE"},
        "task_type": {"CAUSAL_LM"},
        "num_transformer_submodules": {1, None},
        "num_layers": {2, None},
        "num_attention_heads": {2, None},
        "token_dim": {8, None},
    }
    fits = all(not isinstance(value, (list, dict, bool, float)) and value in taken[name] for name, value in fields.items())
    try:
        read = read_peft(spoilt, SHAPE)
    except SoftPromptError:
        assert not fits
    else:
        assert fits
        assert read.digest == prompt_of("prefix_kv").digest


numbers = (
    st.sampled_from([0, 1, 2, 4, 16, 32, 64, 128, 512, -1, 1024, 2**31, 2**40, 2**63, 2**64, 2**70, 10**30]) | st.integers()
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "", "f32"]) | json_values,
        "shape": st.just([4, 32]) | st.lists(numbers, max_size=4) | json_values,
        "data_offsets": st.just([0, 512]) | st.lists(numbers, min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(
    st.sampled_from(["prompt_embeddings", "__metadata__", "prefix_task_cols"]) | st.text(max_size=5),
    entries | json_values,
    max_size=3,
)


@settings(max_examples=400)
@given(
    header=json_values | headers | st.fixed_dictionaries({"prompt_embeddings": entries}),
    size=st.none() | numbers,
    num_bytes=st.sampled_from([0, 1, 256, 511, 512, 513]),
)
def test_any_header_is_read_as_the_library_reads_it_or_refused(
    spoilt: Path, header: Any, size: int | None, num_bytes: int
) -> None:
    text = json.dumps(header).encode()
    content = struct.pack("<Q", (len(text) if size is None else size) % 2**64) + text + bytes(num_bytes)
    (spoilt / WEIGHTS_FILE).write_bytes(content)
    shutil.copy(spoilt / "good_config.json", spoilt / CONFIG_FILE)
    try:
        read = read_peft(spoilt, SHAPE)
    except SoftPromptError:
        good = {"prompt_embeddings": {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}}
        assert (header, size, num_bytes) != (good, None, 512)
    else:
        assert torch.equal(flat(read), as_the_library_reads_it(spoilt))


@settings(max_examples=400)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool]),
    shape=st.lists(st.sampled_from([1, 2, 4, 31, 32, 33]), min_size=1, max_size=3) | st.tuples(st.integers(1, 40), st.just(32)),
    value=st.floats(width=32),
    place=st.integers(0, 10**6),
)
def test_exactly_the_tensors_that_fit_are_taken(
    spoilt: Path, dtype: torch.dtype, shape: list[int], value: float, place: int
) -> None:
    tensor = torch.zeros(tuple(shape), dtype=dtype)
    if dtype.is_floating_point:
        tensor.view(-1)[place % tensor.numel()] = torch.tensor(value).to(dtype)
    save_file({"prompt_embeddings": tensor}, spoilt / WEIGHTS_FILE)
    shutil.copy(spoilt / "good_config.json", spoilt / CONFIG_FILE)
    fits = dtype in (torch.float32, torch.float16, torch.bfloat16) and len(shape) == 2 and shape[1] == 32
    fits = fits and bool(torch.isfinite(tensor).all()) and float(tensor.float().abs().max()) <= 65504
    try:
        read = read_peft(spoilt, SHAPE)
    except SoftPromptError:
        assert not fits
    else:
        assert fits
        assert torch.equal(flat(read), tensor.float())


def huge_header(files: Files) -> Files:
    """Declares a terabyte, with a file that says it has one."""
    header = json.dumps({"prompt_embeddings": {"dtype": "F32", "shape": [2**33, 32], "data_offsets": [0, 2**40]}}).encode()
    return files | {WEIGHTS_FILE: struct.pack("<Q", len(header)) + header}


CRAFTED: dict[str, Callable[[Files], Files]] = {
    "a tensor of a terabyte": huge_header,
    "a header of an exabyte": lambda files: files | {WEIGHTS_FILE: struct.pack("<Q", 2**60) + files[WEIGHTS_FILE][8:]},
    "a configuration that never ends": lambda files: files | {CONFIG_FILE: b"[" * 900_000},
    "a card with a key of a hundred thousand parts": lambda files: files | {CARD_FILE: b"a" + b".a" * 90_000 + b" = 1"},
    "a card with a deep list": lambda files: files | {CARD_FILE: b"a = " + b"[" * 190_000},
    "a card of many tables": lambda files: files | {CARD_FILE: b"".join(b"[a%d]\n" % number for number in range(20_000))},
    "a card with a long number": lambda files: files | {CARD_FILE: b"a = 1" + b"0" * 100_000},
    "a manifest that never ends": lambda files: files | {MANIFEST_FILE: b'{"a":' * 150_000},
    "a manifest with a long number": lambda files: (
        files | {MANIFEST_FILE: files[MANIFEST_FILE].replace(b'"version": 1', b'"version": 1' + b"0" * 5000)}
    ),
    "a gigabyte of zeros": lambda files: files | {CARD_FILE: bytes(1_000_000)},
}


@pytest.mark.parametrize("crafted", CRAFTED)
@pytest.mark.parametrize("form", ["archive", "folder"])
def test_a_huge_declaration_is_refused_in_little_memory(ground: Path, crafted: str, form: str) -> None:
    files = CRAFTED[crafted](originals(ground, "prefix_kv"))
    path, before = ground / "cases" / "crafted", surroundings(ground)
    if form == "archive":
        path.write_bytes(zip_bytes(list(files.items()), zipfile.ZIP_DEFLATED))
    else:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
        if "terabyte" in crafted:
            os.truncate(path / WEIGHTS_FILE, 2**40)
        if "gigabyte" in crafted:
            os.truncate(path / CARD_FILE, 2**30)
    tracemalloc.start()
    with pytest.raises(FrontdeskError):
        read_import(str(path), SERVED)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000
    assert surroundings(ground) == before
