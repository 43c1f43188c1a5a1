import pytest
import torch

from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat, Rendered
from prompt_bank.conversation import Conversation
from trainers.evaluate import chrf, score, score_before


def test_a_score_is_what_the_model_gives_each_answer_token(tiny: BaseModel, rows: list[Rendered]) -> None:
    losses, hits = [], []
    for row in rows:
        log_probabilities = tiny.model(torch.tensor([row.token_ids])).logits[0].log_softmax(dim=-1)
        for place, token in enumerate(row.token_ids):
            if row.loss_mask[place]:
                losses.append(-float(log_probabilities[place - 1, token]))
                hits.append(int(log_probabilities[place - 1].argmax()) == token)
    measured = score(tiny, rows, None)
    assert measured.loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert measured.accuracy == pytest.approx(sum(hits) / len(hits))


def test_the_brief_stands_before_the_same_answers(
    tiny: BaseModel, chat_format: ChatFormat, conversations: list[Conversation], rows: list[Rendered]
) -> None:
    scores = score_before(tiny, chat_format, conversations, "Answer in one short sentence.")
    assert scores["frozen"] == score(tiny, rows, None)
    assert scores["brief"].loss != scores["frozen"].loss
    assert set(scores["brief"].metrics) == {"loss", "accuracy"}


def test_chrf_is_full_for_the_reference_and_low_for_another_text() -> None:
    assert chrf(["Où est la gare ?"], ["Où est la gare ?"]) == pytest.approx(100)
    assert chrf(["Where is the station?"], ["Où est la gare ?"]) < 30
