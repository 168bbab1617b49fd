"""The format of an answer, on answers that are right and on hostile ones."""

from __future__ import annotations

import time

import pytest

from gemma_tune.evaluation.formats import count_faults, faults, format_rate, repeats
from gemma_tune.gemma.families import FAMILIES

GEMMA = FAMILIES["gemma3_text"]
END, EOS, START = GEMMA.turn_end_id, GEMMA.eos_id, GEMMA.turn_start_id


def of(text: str, ids: tuple[int, ...] = (500, END), ended: bool = True, document: bool = False) -> tuple[str, ...]:
    return faults(text, ids, ended, GEMMA, document=document)


@pytest.mark.parametrize(
    "text",
    [
        "Paris.",
        "user",  # a word may be an answer
        "The user\nand the model\nagree.",
        "Every user: knows it.\nA model is a model.",
        "very very very very good",
        "| a | b | c | d | e | f | g | h |\n" + "|---" * 8 + "|\n" + "| 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 |",
        ", ".join(map(str, range(1, 60))),
        "-" * 300,
        "1" * 500,
        "\n".join(f"{number}. Step number {number} is about {'abcdefghij'[number]}." for number in range(10)),
        "We will, we will rock you. " * 3,
        "I am <b>not</b> a <turn> of Gemma.",
        "日本の首都は東京です。",
    ],
)
def test_an_answer_that_is_right_has_no_fault(text: str) -> None:
    assert of(text) == ()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty"),
        (" \n\t\u00a0", "empty"),
        ("Paris.<end_of_turn>", "marker"),
        ("<start_of_turn>user\nAnd you?", "marker"),
        ("<|turn>", "marker"),  # another generation's
        ("a <eos> b", "marker"),
        ("Paris.\nuser\nAnd of Spain?", "role"),
        ("model\nParis.", "role"),
        ("Paris.\n\n  assistant: \nMadrid.", "role"),
        ("Paris.\nuser", "role"),
        ("What is the capital of France?\nleap\n" * 4, "repetition"),
        ("Begin well. " + "and on and on " * 20, "repetition"),
        ("ha" * 60, "repetition"),
        ("東京です" * 25, "repetition"),
        ("x " * 100, "repetition"),
        ("A first line.\n" + "The same sentence, of some length, once more.\n" * 30, "repetition"),
    ],
)
def test_each_fault_is_found(text: str, fault: str) -> None:
    assert fault in of(text)


def test_how_it_has_to_end() -> None:
    assert of("Paris.", (700, 800), ended=False) == ("cut",)
    assert of("Paris.", (), ended=True) == ("cut",)
    assert of("Paris.", (700, EOS)) == ("wrong end",)
    assert of("Paris.", (700, EOS), document=True) == ()
    assert of("Paris.", (700, END), document=True) == ("wrong end",)


def test_control_tokens_are_seen_although_the_text_leaves_them_out() -> None:
    assert of("Paris. user Madrid", (700, START, 800, END)) == ("marker",)
    assert of("Paris.", (700, next(iter(GEMMA.control_ids - set(GEMMA.tokens.values()))), END)) == ("marker",)
    assert of("Paris.", (700, END, END)) == ("marker",)


def test_thoughts_and_calls_of_gemma_4_are_no_fault_and_its_turns_are() -> None:
    gemma4 = FAMILIES["gemma4"]
    channel, call = gemma4.tokens["<|channel>"], gemma4.tokens["<|tool_call>"]
    assert faults("Paris.", (channel, 700, gemma4.turn_end_id), True, gemma4) == ()
    after_call = next(stop for stop in gemma4.stop_ids if stop not in (gemma4.eos_id, gemma4.turn_end_id))
    assert faults("call:x", (call, 700, after_call), True, gemma4) == ()
    assert faults("Paris.", (gemma4.turn_start_id, 700, gemma4.turn_end_id), True, gemma4) == ("marker",)


def test_the_rate_counts_answers_without_a_fault() -> None:
    found = [(), ("cut", "repetition"), (), ("cut",)]
    assert format_rate(found) == 0.5
    assert count_faults(found) == {"cut": 2, "repetition": 1}
    assert format_rate([]) is None


def test_the_thresholds_of_repetition() -> None:
    unit = "abcdefghijklmnopqrstuvwxyz,"  # 27 characters
    assert repeats(unit * 4) and not repeats(unit * 3)
    assert repeats("abcdefghij" * 8) and not repeats("abcdefghij" * 7 + "abcdefghi")  # 80 characters, and 79


def test_a_long_answer_takes_no_long_time() -> None:
    text = " ".join(f"word{number * number % 7919}" for number in range(20_000))
    begin = time.perf_counter()
    assert not repeats(text)
    assert time.perf_counter() - begin < 2
