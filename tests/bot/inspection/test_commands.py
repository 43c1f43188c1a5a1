"""`frontdesk bank inspect|diff` as an operator runs them, on the tiny model and once on the shipped starters."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from prompt_bank.base_model import BaseModel
from prompt_bank.card import Card, Sampling
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import Message
from prompt_bank.manifest import TrainingRecord
from prompt_bank.pointers import PointerChange
from prompt_bank.settings import BankSettings
from prompt_bank.soft_prompt import SoftPrompt
from prompt_bank.starter import STARTER_DIR, TRAINED, starter_domains
from prompt_bank.store import FolderStore
from prompt_bank.version import Draft, ServedModel, read_soft_prompt, read_version
from tests.bot.conftest import Frontdesk
from tests.bot.inspection.conftest import prompt_of_words
from tests.prompt_bank.conftest import make_card, make_prompt

EVIL = "<script>alert(1)</script>"
DRIFT = (0.5, 0.25, 0.125, 0.75)


def add(store: FolderStore, draft: Draft) -> int:
    return store.add_version(draft, "ann", "test").manifest.version


def promote(store: FolderStore, model: ServedModel, domain: str, number: int) -> None:
    change = PointerChange(
        action="promote", domain=domain, fingerprint=model.fingerprint, version=number, actor="ann", reason="test"
    )
    store.commit(change, store.pointer_table().epoch + 1)


def training() -> TrainingRecord:
    return TrainingRecord(
        seed=7, data_digest="d" * 64, num_conversations=12, settings={}, metrics={}, seconds=61.0, drift=DRIFT
    )


@pytest.fixture
def filled(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, tiny: BaseModel, tiny_served: ServedModel, redis_url: str
) -> FolderStore:
    """banking: v1 trained and live, v2 of words, v3 by its brief. loans: v1 live, of the same prompt as banking v2."""
    settings = {"BASE_MODEL": str(tiny_model_dir), "DTYPE": "float32", "DEVICE": "cpu", "REDIS_URL": redis_url}
    for name, value in settings.items():
        monkeypatch.setenv(f"FRONTDESK_{name}", value)
    monkeypatch.setenv("COLUMNS", "200")
    store = FolderStore(BankSettings.load().data_dir / "bank")
    card = make_card().model_copy(update={"title": EVIL, "description": f"{EVIL} [red]", "suggested_prompts": (EVIL, "Hello?")})
    words = prompt_of_words(tiny, "prefix_kv")
    add(store, Draft(card, tiny_served, make_prompt(tiny_served.shape), training()))
    add(store, Draft(make_card(), tiny_served, words, parent=1))
    add(store, Draft(make_card(), tiny_served))
    add(store, Draft(make_card("loans"), tiny_served, words))
    promote(store, tiny_served, "banking", 1)
    promote(store, tiny_served, "loans", 1)
    return store


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = {"src", "href", "xlink:href", "data", "action", "srcset"}
        self.loads += [value or "" for name, value in attributes if name in loading]
        self.loads += [url for _, value in attributes for url in re.findall(r"url\(([^)]*)\)", value or "")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read_page(path: Path) -> Page:
    """A page that loads nothing and runs nothing."""
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert all(url.startswith(("data:image/png;base64,", "#")) for url in page.loads)
    assert "@import" not in page.text
    return page


def test_inspect_shows_the_live_version(frontdesk: Frontdesk, filled: FolderStore) -> None:
    status, out, err = frontdesk("bank", "inspect", "banking")
    assert (status, err) == (0, "")
    assert f"{EVIL}  banking v1" in out
    assert "4 virtual tokens receive" in out
    assert "on 4 sample turns" in out  # the two suggested prompts, and two examples
    assert "Training moved them by 41% of their length (12% to 75%)" in out
    assert "cosine of layer-0 values; by chance 0." in out
    assert str(filled.read_version("banking", 1).digest) in out
    assert [line.split()[1] for line in out.splitlines() if re.match(r"│ \d", line)] == ["0", "1", "2", "3"]
    assert re.search(r"│ loans +│ -?0\.\d{3} +│", out)


def test_inspect_as_json(frontdesk: Frontdesk, filled: FolderStore, tiny_served: ServedModel) -> None:
    status, out, _ = frontdesk("bank", "inspect", "banking", "2", "--json")
    shown = json.loads(out)
    prompt = shown["prompt"]
    assert (status, shown["version"], prompt["kind"]) == (0, 2, "prefix_kv")
    assert [words[0]["text"] for words in prompt["nearest"][0]["words"]][:3] == ["The", " quick", " brown"]
    assert [token["drift"] for token in prompt["tokens"]] == [None] * len(prompt["tokens"])
    assert prompt["similarity"] == {"domains": ["banking", "loans"], "matrix": [[1.0, 1.0], [1.0, 1.0]]}
    shares = [token["attention"] for token in prompt["tokens"]]
    assert sum(shares) == pytest.approx(prompt["attention"]["share"])
    assert len(prompt["attention"]["by_layer"]) == 2
    assert prompt["num_bytes"] == filled.read_soft_prompt(filled.read_version("banking", 2), tiny_served).num_bytes


def test_page_has_everything_and_nothing_of_it_runs(frontdesk: Frontdesk, filled: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    status, _, err = frontdesk("bank", "inspect", "banking", "--html", str(path))
    assert (status, err) == (0, f"wrote {path}\n")
    page = read_page(path)
    assert page.tags.count("svg") == 3
    for part in (EVIL, "banking v1", "loans", "Attention", "layer-0 values", "75.0%", "drift", "virtual token"):
        assert part in page.text, part
    assert list(tmp_path.glob(".page*")) == []


def test_a_domain_without_a_prompt_is_shown_by_its_brief(frontdesk: Frontdesk, filled: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    status, out, _ = frontdesk("bank", "inspect", "banking", "3", "--html", str(path))
    assert status == 0
    assert "banking v3 has no soft prompt: it is served by its brief, 6 tokens before every conversation" in out
    assert make_card().brief in out
    page = read_page(path)
    assert make_card().brief in page.text
    assert "svg" not in page.tags
    status, out, _ = frontdesk("bank", "inspect", "banking", "3", "--json")
    assert (status, json.loads(out)["prompt"]) == (0, None)


def test_inspect_refuses_by_name(frontdesk: Frontdesk, filled: FolderStore, tiny_served: ServedModel, tmp_path: Path) -> None:
    add(filled, Draft(make_card("travel"), tiny_served))
    for arguments, expected in (
        (["nothing"], "no domain 'nothing' in the bank; there are: banking, loans, travel"),
        (["banking", "9"], "banking has no version 9; it has: 1, 2, 3"),
        (["travel"], "travel has no live version for"),
        (["banking", "--html", str(tmp_path / "no" / "page.html")], f"there is no folder {tmp_path / 'no'}"),
    ):
        status, out, err = frontdesk("bank", "inspect", *arguments)
        assert (status, out) == (1, "")
        assert expected in err


def test_a_corrupt_other_domain_is_left_out(frontdesk: Frontdesk, filled: FolderStore) -> None:
    (filled._folder("loans", 1) / "adapter_model.safetensors").write_bytes(b"gone")
    status, out, _ = frontdesk("bank", "inspect", "banking")
    assert status == 0
    assert "No other live domain has a soft prompt to compare with" in out


def test_diff_of_a_prompt_moved_by_a_known_distance(
    frontdesk: Frontdesk, filled: FolderStore, tiny_served: ServedModel
) -> None:
    tensor = make_prompt(tiny_served.shape).tensor.clone()
    tensor[:, :, :, 2] *= 1.5
    moved = add(filled, Draft(make_card(), tiny_served, SoftPrompt("prefix_kv", tensor)))
    status, out, _ = frontdesk("bank", "diff", "banking", "1", str(moved), "--json", "--max-tokens", "4")
    assert status == 0
    diff = json.loads(out)
    assert diff["vectors"]["distances"] == pytest.approx([0, 0, 0.5, 0], abs=1e-3)
    assert diff["vectors"]["cosines"] == pytest.approx([1] * 4, abs=1e-3)
    assert diff["facts"]["digest"][0] != diff["facts"]["digest"][1]
    assert diff["facts"]["training data"] == ["d" * 64, "none"]
    assert f'-title = "{EVIL}"' in diff["card"]
    # Questions of both cards, each once; v1's are its suggested prompts and then examples, the other's its examples.
    assert [row["question"] for row in diff["answers"]] == [EVIL, "Hello?", *make_card().examples]
    assert all(row["a"] for row in diff["answers"])


def test_diff_of_a_version_with_itself_is_none(frontdesk: Frontdesk, filled: FolderStore) -> None:
    status, out, _ = frontdesk("bank", "diff", "banking", "v2", "2", "--max-tokens", "4")
    assert status == 0
    assert "3 of 3 greedy answers are the same." in out
    assert (
        "Similarity of the pooled prompts: 1.000. Per virtual token, mean cosine 1.000 and mean relative distance 0.000." in out
    )
    assert "The cards are the same." in out


def test_diff_of_prompts_of_other_lengths_and_of_a_brief(frontdesk: Frontdesk, filled: FolderStore) -> None:
    status, out, _ = frontdesk("bank", "diff", "banking", "1", "2", "--json", "--max-tokens", "2")
    vectors = json.loads(out)["vectors"]
    assert status == 0
    assert -1 < vectors["similarity"] < 0.9
    assert vectors["cosines"] == vectors["distances"] == []
    status, out, _ = frontdesk("bank", "diff", "banking", "2", "3", "--max-tokens", "8")
    assert status == 0
    assert "There are no vectors to compare: at least one of the two is served by its brief." in out
    assert "0 of 3 greedy answers are the same." in out


def test_diff_gives_a_brief_s_answer_as_it_is_served(
    frontdesk: Frontdesk, filled: FolderStore, tiny: BaseModel, tiny_served: ServedModel
) -> None:
    card = make_card().model_copy(update={"sampling": Sampling(temperature=2, repetition_penalty=1)})
    number = add(filled, Draft(card, tiny_served))
    _, out, _ = frontdesk("bank", "diff", "banking", "2", str(number), "--json", "--max-tokens", "8")
    row = json.loads(out)["answers"][0]

    def likeliest(*messages: Message) -> str:
        chat_format = ChatFormat(tiny.tokenizer)
        ids = chat_format.render(messages, 512).token_ids
        answer = tiny.model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        return chat_format.decode(answer.tolist())

    question = Message(role="user", content=row["question"])
    assert row["b"] == likeliest(Message(role="system", content=card.brief), question)
    assert row["b"] != likeliest(question)


def test_diff_says_which_message_does_not_fit(
    frontdesk: Frontdesk, filled: FolderStore, tiny_served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRONTDESK_CONTEXT_TOKENS", "128")
    number = add(filled, Draft(make_card(brief="word " * 400), tiny_served))
    status, out, err = frontdesk("bank", "diff", "banking", "3", str(number))
    assert (status, out) == (1, "")
    assert err.startswith("error: the last message takes")


def test_the_shipped_banking_prompt_on_the_real_model(
    frontdesk: Frontdesk, smollm2: BaseModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    served = ServedModel.of(smollm2, ChatFormat(smollm2.tokenizer))
    store = FolderStore(BankSettings.load().data_dir / "bank")
    cards: dict[str, Card] = {}
    for domain in starter_domains():
        folder = STARTER_DIR / domain / TRAINED
        version = read_version(folder)
        cards[domain] = version.card
        prompt = read_soft_prompt(folder, version, served)
        promote(store, served, domain, add(store, Draft(version.card, served, prompt, version.manifest.training)))
    path = tmp_path / "page.html"
    status, out, _ = frontdesk("bank", "inspect", "banking", "--html", str(path))
    assert status == 0
    assert "Training moved them by 18% of their length" in out
    page = read_page(path)
    assert cards["banking"].suggested_prompts[0] in page.text
    # The domains that are of a kind come first, and the figure tells them apart.
    healthcare, translation = (float(found) for found in re.findall(r"(?:healthcare|translation) \((0\.\d+)\)", out))
    assert healthcare > translation + 0.1
    strongest, share = re.findall(r"tokens (\d+) \((\d+\.\d)%\)", out)[0]
    assert strongest == "0"  # the first position is this model's sink
    assert 20 < float(share) < 60
