"""`run_tasks` on a tiny Gemma: stock tasks on local rows, tasks of the user, what is returned and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'gemma-tune[eval]'")

import datasets

from gemma_tune.errors import AccessError, UserError
from gemma_tune.evaluation import harness
from gemma_tune.evaluation.harness_tasks import definitions, find_tasks
from gemma_tune.models.saved import load_run

Tiny = Callable[..., Path]
HUB = str(Path(__file__).parents[2] / "data" / "hub")


@pytest.fixture(scope="module")
def opened(tiny: Tiny) -> tuple[Any, Any, Any]:
    return load_run(tiny("gemma3_text"), dtype="float32")


def write_task(folder: Path, name: str, **changes: Any) -> Path:
    """A multiple-choice task of the user on rows of his own. JSON is YAML."""
    rows = [{"q": f"Is {n} more than 5?", "right": int(n <= 5), "hint": f"h{n}"} for n in range(12)]
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task), encoding="utf-8")
    return path


def test_a_stock_task_on_local_rows(opened: Any) -> None:
    found = harness.run_tasks(*opened, ["arc_easy"], include_path=HUB, limit=10, chat=False)
    rows = found.pop("rows")
    json.dumps(found)
    entry = found["arc_easy"]
    assert (entry["shots"], entry["items"], entry["chat"], entry["card"]) == (0, 10, False, None)
    assert entry["of"] > 10
    assert set(entry["metrics"]) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert [row["item"] for row in rows] == list(range(10))
    assert {(row["part"], row["task"], row["metric"]) for row in rows} == {("task", "arc_easy", "acc")}
    assert sum(row["correct"] for row in rows) / 10 == pytest.approx(entry["metrics"]["acc"])
    assert found["harness"]["limit"] == 10
    assert any(line.startswith("arc_easy: 0-shot, 10 items, plain text") for line in harness.render(found))


def test_a_config_that_is_not_there_is_not_taken_from_another(opened: Any) -> None:
    """`ai2_arc` is here as ARC-Easy alone."""
    with pytest.raises(AccessError, match="allenai/ai2_arc"):
        harness.run_tasks(*opened, ["arc_challenge"], include_path=HUB, chat=False)


def test_tasks_of_the_user_with_shots(opened: Any, tmp_path: Path) -> None:
    write_task(tmp_path, "mine")
    plain = harness.run_tasks(*opened, ["mine"], include_path=str(tmp_path), shots=2, chat=False)
    talk = harness.run_tasks(*opened, ["mine"], include_path=str(tmp_path), shots=2, chat=True)
    assert plain["mine"]["shots"] == talk["mine"]["shots"] == 2
    assert (plain["mine"]["chat"], talk["mine"]["chat"]) == (False, True)
    assert len(plain["rows"]) == len(talk["rows"]) == 12


def test_shots_of_a_conversation_are_turns(opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gemma_tune.evaluation.harness_model import GemmaLM

    seen: list[Any] = []
    real = GemmaLM.apply_chat_template

    def look(self: GemmaLM, history: Any, add_generation_prompt: bool = True) -> str:
        seen.append([turn["role"] for turn in history])
        return real(self, history, add_generation_prompt)

    monkeypatch.setattr(GemmaLM, "apply_chat_template", look)
    write_task(tmp_path, "mine", description="Answer yes or no.")
    harness.run_tasks(*opened, ["mine"], include_path=str(tmp_path), shots=2, limit=1, chat=True)
    assert seen == [["system", "user", "assistant", "user", "assistant", "user"]]


def test_a_group_has_its_parts(opened: Any, tmp_path: Path) -> None:
    write_task(tmp_path, "one", tag=["both"])
    write_task(tmp_path, "two", tag=["both"])
    (tmp_path / "pair.yaml").write_text(
        "group: pair\ntask: [one, two]\naggregate_metric_list:\n- metric: acc\n", encoding="utf-8"
    )
    found = harness.run_tasks(*opened, ["pair"], include_path=str(tmp_path), limit=4, chat=False)
    assert set(found) == {"pair", "rows", "harness"}
    assert found["pair"]["items"] == 8 and set(found["pair"]["parts"]) == {"one", "two"}
    assert found["pair"]["metrics"]["acc"] == pytest.approx(sum(row["correct"] for row in found["rows"]) / 8)
    tagged = harness.run_tasks(*opened, ["both"], include_path=str(tmp_path), limit=4, chat=False)
    assert set(tagged) == {"one", "two", "rows", "harness"}


def test_generation_and_perplexity(opened: Any, tmp_path: Path) -> None:
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    how = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    said = {"doc_to_target": "{{hint}}", "metric_list": exact, "generation_kwargs": how}
    write_task(tmp_path, "said", output_type="generate_until", doc_to_choice=None, **said)
    read = {"doc_to_text": "", "doc_to_target": "{{q}}", "metric_list": [{"metric": "byte_perplexity"}]}
    write_task(tmp_path, "read", output_type="loglikelihood_rolling", doc_to_choice=None, **read)
    found = harness.run_tasks(*opened, ["said", "read"], include_path=str(tmp_path), limit=3, chat=False)
    assert 0 <= found["said"]["metrics"]["exact_match"] <= 1
    assert found["read"]["metrics"]["byte_perplexity"] > 1
    assert {row["task"] for row in found["rows"]} == {"said"}  # no single row of a perplexity is right or wrong


def test_results_leave_stdout_alone(opened: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path, "mine")
    harness.run_tasks(*opened, ["mine"], include_path=str(tmp_path), limit=2, chat=False)
    assert capsys.readouterr().out == ""


def test_the_users_definition_wins(tmp_path: Path) -> None:
    mine = write_task(tmp_path, "arc_easy")
    assert find_tasks(["arc_easy"], str(tmp_path)).task_index["arc_easy"].yaml_path == mine


def test_only_folders_of_wanted_tasks_are_read() -> None:
    manager = find_tasks(["minerva_math", "bold"], None)
    assert len(manager.all_tasks) < 200
    assert {"minerva_math_algebra", "winobias_type1"} <= set(manager.all_tasks)
    assert len(definitions()) > 5000


@pytest.mark.slow
def test_a_wrong_name_is_looked_for_in_the_whole_index() -> None:
    with pytest.raises(UserError, match="there is no task 'hella_swag'") as caught:
        find_tasks(["hella_swag"], None)
    assert "hellaswag" in str(caught.value)


# --- what is refused


def test_a_dataset_that_cannot_be_had_is_named(opened: Any) -> None:
    with pytest.raises(AccessError, match=r"Rowan/hellaswag: offline mode is set") as caught:
        harness.run_tasks(*opened, ["hellaswag"], chat=False)
    assert "--include-path, under <owner>/<name>/" in str(caught.value)
    assert datasets.load_dataset.__module__.startswith("datasets")  # put back


def test_code_of_the_model_needs_consent(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(UserError, match=r"runs code that the model writes.*\n.*HF_ALLOW_CODE_EVAL=1"):
        harness.run_tasks(*opened, ["mbpp"], include_path=HUB, chat=False)


def test_consent_is_passed_on(opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_task(tmp_path, "risky", unsafe_code=True)
    with pytest.raises(UserError, match="risky: this task runs code"):
        harness.run_tasks(*opened, ["risky"], include_path=str(tmp_path), limit=2, chat=False)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert harness.run_tasks(*opened, ["risky"], include_path=str(tmp_path), limit=2, chat=False)["risky"]["items"] == 2


def test_more_shots_than_rows(opened: Any, tmp_path: Path) -> None:
    write_task(tmp_path, "mine")
    with pytest.raises(UserError, match="mine: it has fewer than 13 rows to show as shots"):
        harness.run_tasks(*opened, ["mine"], include_path=str(tmp_path), shots=13, chat=False)
    with pytest.raises(UserError, match="arc_easy: it has fewer than 1 rows"):
        harness.run_tasks(*opened, ["arc_easy"], include_path=HUB, shots=1, chat=False)


def test_no_rows_of_the_split_that_is_asked(opened: Any, tmp_path: Path) -> None:
    place = tmp_path / "Rowan" / "hellaswag"
    place.mkdir(parents=True)
    (place / "train.jsonl").write_bytes((Path(HUB) / "Rowan" / "hellaswag" / "validation.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"hellaswag: lm-eval cannot build the task from these rows: IndexError"):
        harness.run_tasks(*opened, ["hellaswag"], include_path=str(tmp_path), chat=False)


def test_rows_that_cannot_be_read(opened: Any, tmp_path: Path) -> None:
    place = tmp_path / "Rowan" / "hellaswag"
    place.mkdir(parents=True)
    (place / "validation.jsonl").write_text("{broken\n", encoding="utf-8")
    with pytest.raises(UserError, match="these rows cannot be read"):
        harness.run_tasks(*opened, ["hellaswag"], include_path=str(tmp_path), chat=False)


def test_yaml_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("task: [\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"broken\.yaml: lm-eval cannot read it"):
        find_tasks(["arc_easy"], str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        find_tasks(["arc_easy"], str(tmp_path / "none"))


def test_without_lm_eval(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "gemma_tune.evaluation.harness_model", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(AccessError, match=r"lm-evaluation-harness is not installed\n.*gemma-tune\[eval\]"):
        harness.run_tasks(*opened, ["arc_easy"], chat=False)


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (ImportError("please install via pip install lm-eval[math]"), "lm-eval[math]"),
        (ModuleNotFoundError("No module named 'sympy'", name="sympy"), "lm-eval[math]"),
        (ModuleNotFoundError("No module named 'vaderSentiment'", name="vaderSentiment.x"), "gemma-tune[eval]"),
        (ModuleNotFoundError("No module named 'immutabledict'", name="immutabledict"), "pip install immutabledict"),
    ],
)
def test_what_to_install(error: ImportError, fix: str) -> None:
    with pytest.raises(AccessError) as caught, harness.needed_packages():
        raise error
    assert fix in str(caught.value)


def test_all_items_of_a_task_have_one_metric() -> None:
    """crows_pairs gives each item a difference of likelihoods first, which is below 1 for some of them."""
    samples = [
        {"doc_id": number, "filter": "none", "metrics": ["diff", "pct"], "diff": diff, "pct": pct}
        for number, (diff, pct) in enumerate([(0.5, 1.0), (7.0, 0.0), (0.1, 1.0)])
    ]
    assert [(row["metric"], row["correct"]) for row in harness.items("t", samples)] == [
        ("pct", score) for score in (1, 0, 1)
    ]
    assert harness.items("t", []) == [] and harness.items("t", [samples[1] | {"pct": float("nan")}]) == []


def test_where_nobody_watches_there_are_no_bars_and_git_is_not_asked(
    opened: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.api.task
    import lm_eval.evaluator

    before = lm_eval.api.task.tqdm, lm_eval.evaluator.get_git_commit_hash
    write_task(tmp_path, "mine")
    monkeypatch.chdir(tmp_path)  # no repository: git would say so
    found = harness.run_tasks(*opened, ["mine"], include_path=str(tmp_path), limit=2, chat=True)
    assert capfd.readouterr() == ("", "")
    assert (lm_eval.api.task.tqdm, lm_eval.evaluator.get_git_commit_hash) == before
    assert {(row["shots"], row["chat"]) for row in found["rows"]} == {(0, True)}
