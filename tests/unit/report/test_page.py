"""The page of a run: every stage, runs that went wrong, hostile text, and its size."""

from __future__ import annotations

import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gemma_tune.errors import UserError
from gemma_tune.report import write_report
from tests.unit.report.rig import HOSTILE, STAGES, evaluation, make_run, metrics, write, write_lines

_VOID = {"meta", "link", "hr", "input", "path", "circle", "img", "br"}
_TAGS = frozenset(
    re.findall(
        r"\w+",
        """html head meta link title style body a div header p h1 h2 h3 h4 span b i dl dt dd ul li code button nav main
    section figure figcaption article em small mark hr details summary label input table caption thead tbody tr th td
    pre footer script svg path text circle""",
    )
)
"""All that a page may have; a tag of the data would be another one, or a second script."""


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, its text, and whether all tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_page_of_every_stage_stands_alone_and_can_be_walked(tmp_path: Path, stage: str) -> None:
    run = make_run(tmp_path / "mine", stage)
    write(run / "evaluation.json", evaluation())
    page = page_of(run)
    for tag, attributes in page.tags:
        assert not attributes.keys() & {"src", "srcset", "action", "background", "poster"}, "nothing is fetched"
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
        assert not any(name.startswith("on") for name in attributes), "no handler in the markup"
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
        if tag == "svg":
            assert attributes["role"] == "img" and len(attributes["aria-label"] or "") > 20
    raw = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"@import|url\(", raw)
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for link in page.all("a"):
        assert (link["href"] or "")[1:] in names
    for section in ("Curves", "Data", "What carries loss", "Plan", "Memory", "Evaluation", "Provenance"):
        assert section in page.text
    assert "nan" not in page.text.lower().split()


@pytest.mark.parametrize(
    ("stage", "charts"),
    [
        ("sft", ["Loss", "Token accuracy"]),
        ("reward", ["Loss", "Pairs rated right", "Margin", "Reward and length"]),
        ("dpo", ["Loss", "Chosen preferred", "Margin", "Log-probability of answers", "Implicit rewards"]),
        ("kto", ["Loss", "On their side of the KL point", "Rewards of held-out answers", "Margin", "KL point"]),
        (
            "ppo",
            [
                "Reward",
                "Distance from the reference (KL)",
                "Entropy",
                "Clip fraction",
                "Explained variance",
                "Value loss",
            ],
        ),
    ],
)
def test_each_stage_has_its_curves_and_all_have_four(tmp_path: Path, stage: str, charts: list[str]) -> None:
    raw = write_report(make_run(tmp_path, stage)).read_text(encoding="utf-8")
    for title in [*charts, "Learning rate", "Gradient norm", "Speed", "Memory"]:
        assert f"<figcaption><h3>{title}</h3>" in raw, title


def test_the_head_says_what_came_of_it_and_what_to_do(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "mine"))
    assert "Supervised fine-tuning of google/gemma-3-1b-it, QLoRA r=16" in page.text
    assert "finished after 60 steps" in page.text and "23 November 2026, 23:03 UTC" in page.text
    assert "Held-out loss 4.000 → 2.000 −50.0 %; 40 rows, 1,500 tokens" in page.text
    assert "Token accuracy 25.0 % → 12.5 %" in page.text
    assert "Answers that end by themselves 1 → 2 of 3 answers" in page.text
    for command in ("chat", "eval", "merge"):
        assert f"gemma-tune {command} {tmp_path / 'mine'}" in page.text
    assert "--resume" not in page.text.split("Provenance")[0]
    assert "4 min 23 s" in page.text, "both parts of the run, without the hour between them"


def test_a_stopped_run_says_how_to_go_on(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, "dpo", status="stopped"))
    assert "stopped by a signal after 60 steps" in page.text
    assert "gemma-tune dpo recipes/mine.yaml seed=1 --resume auto" in page.text
    assert "gemma-tune chat" not in page.text, "there is no adapter yet"
    assert "Chosen preferred" in page.text, "the newest held-out figures stand for the final ones"


@pytest.mark.parametrize("status", ["failed", "aborted", "running"])
def test_runs_that_did_not_end_well_have_a_page(tmp_path: Path, status: str) -> None:
    page = page_of(make_run(tmp_path, status=status))
    assert f"{status} " in page.text or f"{status}, or ended without a word" in page.text


def test_only_run_json_is_needed_and_what_is_missing_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", prompts=0)
    for name in ("plan.json", "metrics.jsonl", "samples.jsonl", "recipe.yaml"):
        (run / name).unlink()
    page = page_of(run)
    for name in ("plan.json", "metrics.jsonl", "recipe.yaml"):
        assert f"{name} is missing" in page.text
    assert "Held-out loss" in page.text and not page.all("svg")
    (run / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.json cannot be read"):
        write_report(run)
    with pytest.raises(UserError, match=r"no run\.json"):
        write_report(tmp_path / "elsewhere")


def test_a_run_that_never_made_a_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="failed", results={}, segments=[{"from_step": 0, "started": "yesterday"}])
    write_lines(run / "metrics.jsonl", [])
    (run / "samples.jsonl").unlink()
    page = page_of(run)
    assert "failed after 0 steps" in page.text and "There are no held-out figures" in page.text


def test_a_line_that_was_cut_is_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 61, "lo')
    assert "metrics.jsonl: 1 line cannot be read and is left out" in page_of(run).text


def test_a_run_of_several_processes_is_not_resumed_by_one_unawares(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="stopped", machine={"name": "h100", "world_size": 8})
    assert "go on where it stopped; add what started its 8 processes" in page_of(run).text
    assert "processes" not in page_of(make_run(tmp_path / "one", status="stopped")).text.split("Curves")[0]


def test_figures_of_a_run_that_did_not_end_say_their_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="failed", steps=60, every=25)
    assert "at step 50; −" in page_of(run).text and "before the training and on the way" in page_of(run).text
    assert "at step" not in page_of(make_run(tmp_path / "finished")).text.split("Curves")[0]


def test_what_no_run_writes_is_left_out_and_named(tmp_path: Path) -> None:
    """A record of other kinds, numbers that no float holds, documents deeper than Python reads."""
    run = make_run(tmp_path)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(f'{{"step": 61, "loss": 1{"0" * 400}}}\n{{"step": 62, "loss": 1e308}}\n{"[" * 100_000}\n')
    with open(run / "samples.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 60, "prompt": "odd", "answer": 7, "reference": ["x"]}\n')
    (run / "evaluation.json").write_text('{"x":' * 100_000, encoding="utf-8")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record |= {"machine": "a laptop", "segments": 3}
    record["data"]["report"]["first"] = "row 7"
    write(run / "run.json", record)
    text = page_of(run).text
    for part in ("machine", "segments", "data.report.first"):
        assert f"run.json: `{part}` is not what a run writes, and is left out" in text
    assert "2 steps have no finite value (training): 61, 62" in text
    assert "metrics.jsonl: 1 line cannot be read" in text and "evaluation.json is not the JSON" in text
    assert "Held-out loss" in text and "odd" in text


def test_commands_of_a_folder_with_a_blank_can_be_typed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "my run", "reward")
    text = page_of(run).text
    assert f"load_reward({str(run)!r})" in text and text.count(f"gemma-tune eval '{run}'") >= 2
    assert "12,000 in answers (60 %)" in text, "the loss of a reward model is read at one token of an answer"


def test_a_report_that_cannot_be_written_is_no_bug_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_tune.commands import report
    from gemma_tune.errors import AccessError

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma_tune.train.checkpoint.write_atomically", full)
    with pytest.raises(AccessError, match="No space left on device"):
        report.run(str(make_run(tmp_path)), None)


def test_values_that_are_not_finite_are_shown_as_such(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = list(metrics("sft", 60, 20))
    for row in rows:
        if "loss" in row and row["step"] in (7, 8):
            row["loss"] = None if row["step"] == 7 else float("nan")
        if "grad_norm" in row:
            row["grad_norm"] = None
    write_lines(run / "metrics.jsonl", rows)  # json writes NaN as NaN, which strict readers refuse and ours takes
    raw = write_report(run).read_text(encoding="utf-8")
    assert "2 steps have no finite value (training): 7, 8" in raw and "step 8: not finite" in raw
    assert "<h3>Gradient norm</h3>" not in raw, "no curve without a point"
    drawn = re.findall(r' d="([^"]*)"', raw)
    assert drawn and not [path for path in drawn if "nan" in path or "inf" in path]


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a<b>&'c", text=HOSTILE, gap=HOSTILE)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["model"]["name"] = record["git"]["commit"] = record["versions"][HOSTILE] = HOSTILE
    record["data"]["report"]["read"] = {HOSTILE: 3}
    write(run / "run.json", record)
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    plan["data"]["sources"]["value"] = [{"name": HOSTILE, "licence": HOSTILE}]
    plan["notes"] = [HOSTILE]
    plan["memory"][0]["name"] = HOSTILE
    write(run / "plan.json", plan)
    write(run / "evaluation.json", evaluation(HOSTILE) | {HOSTILE: {HOSTILE: HOSTILE}})
    raw = write_report(run).read_text(encoding="utf-8")
    page = Page(raw)
    assert len(page.all("script")) == 1 and not page.all("img"), "ours is the only script"
    assert {name for name, _ in page.tags} <= _TAGS
    hidden = {character for character in raw if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert hidden <= {"\n"}
    assert page.text.count("</script><script>document.title='taken'</script>") >= 10
    assert r"\u202egnp.exe\u202c" in page.text and "{{ 7 * 7 }}" in page.text and "مرحبا" in page.text


def test_tokens_of_accounts_are_masked(tmp_path: Path) -> None:
    run = make_run(tmp_path, text="hf_" + "a1" * 17)
    raw = write_report(run).read_text(encoding="utf-8")
    assert "hf_a1" not in raw and "hf_***" in raw


def test_what_run_json_masks_is_masked_in_answers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "swordfish-123")
    run = make_run(tmp_path, text="swordfish-123 at https://bob:hunter2@host/x")
    raw = write_report(run).read_text(encoding="utf-8")
    assert "swordfish" not in raw and "hunter2" not in raw and "https://***@host/x" in raw


def test_the_page_stays_small(tmp_path: Path) -> None:
    """100,000 lines, and answers of which each letter takes six in HTML."""
    run = make_run(tmp_path, steps=100_000, every=500, prompts=3)
    texts = [f"{number} " + "<\u202e&" * 1000 for number in range(100)]
    samples = [
        {"step": step, "prompt": text, "answer": text, "ended": True, "tokens": 9, "reference": text}
        for step in range(0, 40_001, 10_000)
        for text in texts
    ]
    write_lines(run / "samples.jsonl", samples)
    write(run / "run.json", json.loads((run / "run.json").read_text()) | {"command": ["x" * 10**6]})
    path = write_report(run)
    assert path.stat().st_size < 1_500_000
    page = Page(path.read_text(encoding="utf-8"))
    left = re.search(r"(\d+) more prompts are in samples\.jsonl", page.text)
    assert left and int(left[1]) + len(page.all("article")) == 100 and page.all("article")
    assert "characters more)" in page.text


def test_the_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    before = write_report(run).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_evaluation_is_shown_with_errors_and_doubts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write(run / "evaluation.json", evaluation())
    text = page_of(run).text
    assert "arc_easy acc 0.7120 ± 0.013 5 570 0.7350 (shots not stated)" in text
    assert "Loss, nats a token 4.000 2.000 −50.0 %" in text
    assert "Pairs rated right 71.0 %" in text
    assert "16 times 4 75.0 % 30.0 % to 95.0 % 9.10" in text and "do not print" not in text
    assert "training rows 100 0.0 % 7.0 % 1.0 % 11.0 %" in text
    assert "loss 2.100 2.000 −0.100 −0.150 to −0.0500 40" in text and "A is runs/a, B is runs/b." in text
    assert "deep, er 1.500" in text and "1 z" in text, "what is not known yet is shown all the same"
    assert "24 November 2026, 08:00 UTC" in text


def test_memory_is_held_against_what_was_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    plan["memory"] = [{"name": "weights", "bytes": 6 * 10**9, "formula": "f"}, {"name": "rest", "bytes": 4 * 10**9}]
    write(run / "plan.json", plan)
    text = page_of(run).text
    assert "measured peak 8.38 GiB" in text and "estimated 9.31 GiB" in text
    assert "The measured peak is 10 % below the estimate." in text and "for CUDA" not in text
    plan["memory"].append({"name": "CUDA and allocator", "bytes": 2**30, "formula": "assumption"})
    write(run / "plan.json", plan)
    assert "1.00 GiB of the estimate is for CUDA and the allocator" in page_of(run).text
