"""What is printed: error blocks, masking, escaping."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune import console
from gemma_tune.errors import GemmaTuneError, Problem, UserError

TOKEN = "hf_" + "aB3" * 11 + "x"


@pytest.fixture(autouse=True)
def fresh_consoles(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NO_COLOR", "FORCE_COLOR", *console.SECRET_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    console.stdout.cache_clear()
    console.stderr.cache_clear()


def said(error: GemmaTuneError, capsys: pytest.CaptureFixture[str]) -> str:
    console.print_error(error)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_an_error_has_place_what_and_fix(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("unknown key", where="r.yaml:3: optim.x", fix="write y")
    assert said(error, capsys) == "error: r.yaml:3: optim.x: unknown key\n  fix: write y\n"
    assert said(GemmaTuneError("broken"), capsys) == "error: broken\n"


def test_all_problems_are_printed_and_too_many_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(UserError.of([Problem(f"p{number}") for number in range(25)]), capsys)
    assert text.count("error: ") == 20
    assert text.endswith("error: p19\n... and 5 more\n")


def test_long_lines_are_not_wrapped_and_markup_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    what = "[bold]x[/bold] :smile: " + "word " * 60
    assert said(UserError(what.strip()), capsys) == f"error: {what.strip()}\n"
    console.out(what)
    assert capsys.readouterr().out == f"{what}\n"


def test_colour_only_where_it_is_wanted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    error = UserError("x", fix="y")
    assert "\x1b" not in said(error, capsys)
    monkeypatch.setenv("FORCE_COLOR", "1")
    console.stderr.cache_clear()
    assert "\x1b[1;31merror:\x1b[0m x" in said(error, capsys)
    monkeypatch.setenv("NO_COLOR", "1")
    console.stderr.cache_clear()
    assert "\x1b[1;31m" not in said(error, capsys)


def test_control_characters_and_tokens_never_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(UserError(f"a\x1b[2Jb\u202ec\x00d\ud800e {TOKEN}", where="x\x07", fix="\x9b"), capsys)
    assert text == "error: x\\x07: a\\x1b[2Jb\\u202ec\\x00d\\ud800e hf_***\n  fix: \\x9b\n"


def test_tables_in_a_pipe_are_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console.stdout().width == console.PIPE_WIDTH
    monkeypatch.setenv("COLUMNS", "50")
    console.stdout.cache_clear()
    assert console.stdout().width == 50


def test_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    console.note("half\x1b done")
    assert capsys.readouterr().err == "note: half\\x1b done\n"


@pytest.mark.parametrize("variable", console.SECRET_VARIABLES)
def test_the_values_of_secret_variables_are_masked(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "swordfish-1234\n")
    assert console.masked("my swordfish-1234!") == "my ***!"
    monkeypatch.setenv(variable, "no")
    assert console.masked("now") == "now"


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        ("hf_", "aB3" * 11),
        ("wandb_v1_", "aB3_" * 11),
        ("sk-", "aB3" * 16),
        ("sk-proj-", "aB3-_" * 12),
        ("sk-ant-", "api03-aB3-" * 5),
        ("ghp_", "aB3" * 12),
        ("github_pat_", "aB3" * 8 + "_" + "aB3" * 16),
        ("AKIA", "IOSFODNN7EXAMPLE"),
        ("AIza", "aB3-_" * 7),
    ],
)
def test_the_tokens_of_services_are_masked(kind: str, rest: str) -> None:
    assert console.masked(f'key: "{kind}{rest}"') == f'key: "{kind}***"'
    assert console.masked(f"url?key={kind}{rest}&n=1") == f"url?key={kind}***&n=1"


HARMLESS = ["hf_hub", "hf_xet", "HF_TOKEN", "google/gemma-3-1b-it", "hf_short123"]
HARMLESS += ["sk-learn", "task-specific-instructions-for-models", "sk-learn-pipelines-of-many-words", "AKIA", "ghp_x"]
HARMLESS += ["AKIAS-AND-OTHER-CAPITALS", "AKIAIOSFODNN7EXAMPLESOMEWHATLONGER"]


@pytest.mark.parametrize("harmless", HARMLESS)
def test_harmless_words_are_not_masked(harmless: str) -> None:
    assert console.masked(harmless) == harmless


@pytest.mark.parametrize("text", ["😀", "👨‍👩‍👧", "שלום", "नमस्ते", "tab\tand\nline", "ﬁ"])
def test_ordinary_text_stays(text: str) -> None:
    assert console.escaped(text) == text


@given(st.text(alphabet=st.characters()))
def test_escaped_text_can_be_written_and_holds_no_control_character(text: str) -> None:
    escaped = console.escaped(text)
    escaped.encode("utf-8")
    assert all(character in "\n\t" or character >= " " for character in escaped)
    assert not any("\x7f" <= character <= "\x9f" for character in escaped)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "'a'"),
        ("a\nb\tc", "'a\\nb\\tc'"),
        ("x" * 100, f"'{'x' * 80}...' (100 characters)"),
        (3, "3"),
        (None, "None"),
    ],
)
def test_quoted(value: object, text: str) -> None:
    assert console.quoted(value) == text
