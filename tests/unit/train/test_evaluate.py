"""Held-out loss against a plain loop, answers against one-by-one generation, prompts of held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from trl.trainer.utils import add_fused_lm_head

from gemma_tune.data.collate import Collator
from gemma_tune.gemma.conversation import Conversation, Document, Message
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.load import load_base
from gemma_tune.models.tokenizer import GemmaEncoder, load_tokenizer
from gemma_tune.train.evaluate import (
    answers,
    eval_mode,
    held_out_loss,
    prompt_ids,
    prompt_of,
    read_answer,
    sample_prompts,
    stop_rate,
)
from gemma_tune.train.loss_head import use_frozen_head

FAMILY = FAMILIES["gemma3_text"]


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return tiny("gemma3_text")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    loaded = load_base({"name": str(folder), "dtype": "float32"}, {}, FAMILY)
    add_fused_lm_head(loaded, outputs=("log_probs", "entropy", "is_top1"))
    return loaded


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder), None, FAMILY)


def some_rows(lengths: tuple[int, ...] = (5, 30, 8, 21, 13)) -> list[dict[str, list[int]]]:
    made = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(500, 900, (length,), generator=made).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows


def slow_loss(model: Any, rows: list[dict[str, list[int]]]) -> tuple[float, float, int]:
    total, right, count = 0.0, 0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        for place in range(len(row["labels"]) - 1):
            wanted = row["labels"][place + 1]
            if wanted != -100:
                total -= logits[place].log_softmax(-1)[wanted].item()
                right += int(logits[place].argmax() == wanted)
                count += 1
    return total / count, right / count, count


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_token_weighs_the_same_whatever_the_batches(model: Any, batch_size: int) -> None:
    rows = some_rows()
    loss, accuracy, tokens = slow_loss(model, rows)
    found = held_out_loss(model, rows, Collator(0), batch_size=batch_size)
    assert found is not None and (found.tokens, found.rows) == (tokens, 5)
    assert found.loss == pytest.approx(loss, rel=1e-5) and found.token_accuracy == pytest.approx(accuracy)


def test_shares_of_several_processes_add_up(model: Any) -> None:
    rows = some_rows()
    parts: list[torch.Tensor] = []
    for rank in range(4):  # three batches: the fourth process has nothing of its own
        held_out_loss(
            model, rows, Collator(0), batch_size=2, rank=rank, world_size=4, total=lambda s: (parts.append(s), s)[1]
        )
    whole: list[torch.Tensor] = []
    held_out_loss(model, rows, Collator(0), batch_size=2, total=lambda s: (whole.append(s), s)[1])
    assert torch.allclose(sum(parts), whole[0])  # type: ignore[arg-type]
    assert parts[3].tolist() == [0, 0, 0]


def test_nothing_to_score_is_none_and_a_stop_gives_up(model: Any) -> None:
    masked = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]
    assert held_out_loss(model, masked, Collator(0), batch_size=1) is None
    assert held_out_loss(model, [], Collator(0), batch_size=1) is None
    assert held_out_loss(model, some_rows(), Collator(0), batch_size=1, stop=lambda: True) is None


def test_the_lean_head_of_the_cpu_scores_the_same(folder: Path, model: Any) -> None:
    lean = load_base({"name": str(folder), "dtype": "float32"}, {}, FAMILY)
    lean.requires_grad_(False)
    add_fused_lm_head(lean, outputs=("log_probs", "entropy", "is_top1"))
    assert use_frozen_head(lean)
    first = held_out_loss(model, some_rows(), Collator(0), batch_size=2)
    second = held_out_loss(lean, some_rows(), Collator(0), batch_size=2)
    assert first is not None and second is not None
    assert second.loss == pytest.approx(first.loss, rel=1e-5) and second.token_accuracy == first.token_accuracy


def test_modes_come_back_module_by_module(model: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    held_out_loss(model, some_rows(), Collator(0), batch_size=2)
    with pytest.raises(ValueError, match="x"), eval_mode(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise ValueError("x")
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), state), "nothing random was drawn"
    model.eval()


def test_batched_answers_equal_single_ones_in_the_order_of_the_prompts(model: Any, tokenizer: Any) -> None:
    encoder = GemmaEncoder(tokenizer, FAMILY)
    texts = ["Hello", "What is the capital of France? " * 4, "Write a poem about the sea."]
    ids = prompt_ids(sample_prompts(texts, [], 0), FAMILY, encoder)
    model.train()
    together = answers(model, tokenizer, FAMILY, ids, max_new_tokens=12)
    assert model.training
    alone = [answers(model, tokenizer, FAMILY, [row], max_new_tokens=12)[0] for row in ids]
    assert together == alone
    in_twos = answers(model, tokenizer, FAMILY, ids, max_new_tokens=12, batch_size=2)
    assert in_twos == alone
    assert answers(model, tokenizer, FAMILY, ids, max_new_tokens=12, stop=lambda: True) == []
    model.eval()


def test_prompts_end_with_the_opened_model_turn(tokenizer: Any) -> None:
    [ids] = prompt_ids(sample_prompts(["Hi"], [], 0), FAMILY, GemmaEncoder(tokenizer, FAMILY))
    assert ids[0] == FAMILY.bos_id and ids.count(FAMILY.bos_id) == 1
    assert tokenizer.decode(ids).endswith("<start_of_turn>model\n")


@pytest.mark.parametrize("stop", FAMILY.stop_ids)
def test_an_answer_ends_before_its_first_stop_token(tokenizer: Any, stop: int) -> None:
    ids = tokenizer.encode("Paris", add_special_tokens=False)
    found = read_answer([*ids, stop, 0, 0], tokenizer, FAMILY)
    assert (found.text, found.ended, found.tokens) == ("Paris", True, len(ids) + 1)
    cut = read_answer(ids, tokenizer, FAMILY)
    assert (cut.text, cut.ended, cut.tokens) == ("Paris", False, len(ids))
    assert stop_rate([found, cut]) == 0.5 and stop_rate([]) is None


def test_the_first_user_turn_of_a_held_out_row_and_what_follows() -> None:
    row = Conversation(
        (
            Message("system", "Be brief."),
            Message("user", "One?"),
            Message("model", "Two."),
            Message("user", "Three?"),
            Message("model", "Four."),
        ),
        thinking=True,
    )
    found = prompt_of(row)
    assert found is not None and (found.label, found.reference, found.held_out) == ("One?", "Two.", True)
    assert isinstance(found.example, Conversation)
    assert [message.content for message in found.example.messages] == ["Be brief.", "One?"] and found.example.thinking


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_conversation_that_ends_before_an_answer_is_the_whole_prompt(role: Literal["user", "tool"]) -> None:
    turns = (Message("user", "One?"), Message("model", "Two."), Message(role, "Three?"))
    row = Conversation(turns, tools=({"function": {"name": "f"}},), thinking=True)
    found = prompt_of(row)
    assert found is not None and found.example == row
    assert (found.label, found.reference, found.held_out) == ("Three?", "", True)
    [first, second] = sample_prompts(["Three?"], [row, row], 2)
    assert (first.held_out, second.example) == (False, row), "it is no other prompt's repetition but its own"


def test_a_document_is_continued_from_its_first_words(tokenizer: Any) -> None:
    found = prompt_of(Document("one two three four five six seven eight"))
    assert found is not None and found.label == "one two three four five six" and found.reference == "seven eight"
    [ids] = prompt_ids([found], FAMILY, GemmaEncoder(tokenizer, FAMILY))
    assert ids[0] == FAMILY.bos_id and tokenizer.decode(ids[1:]) == found.label
    assert prompt_of(Document("too short")) is None
    assert prompt_of(Conversation((Message("model", "x"),))) is None


def test_fixed_prompts_first_then_as_many_held_out_as_asked() -> None:
    rows = [Conversation((Message("user", str(n)), Message("model", "x"))) for n in range(5)]
    found = sample_prompts(["fixed"], rows, 2)
    assert [(prompt.label, prompt.held_out) for prompt in found] == [("fixed", False), ("0", True), ("1", True)]
    openings = [Conversation((Message("user", "Hello!"), Message("model", str(n)))) for n in range(3)] + rows
    labels = [prompt.label for prompt in sample_prompts(["1"], openings, 3)]
    assert labels == ["1", "Hello!", "0", "2"], "the same prompt is shown once"
    [text, _] = sample_prompts(["Once upon"], [Document("a b c d e f g h")], 1)
    assert text.example == Document("Once upon"), "among documents a fixed prompt is a beginning too"
