"""A step over pairs is one step, however many passes it takes, and also where the data end within it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.cli import main
from tests.integration.test_preferences_tiny import pair_recipe
from tests.integration.tiny_runs import COLOURS, THINGS, document, lines

Tiny = Callable[..., Path]


def uneven_pairs(path: Path, count: int) -> Path:
    """Pairs whose prompts and answers have many lengths."""
    rows = [
        {
            "prompt": f"What is the colour of the {THINGS[number % 8]} number {number}?" + " please" * (number % 4),
            "chosen": f"The {THINGS[number % 8]} is {COLOURS[number % 5]}" + ", as all know" * (number % 5),
            "rejected": f"The fox is {COLOURS[number % 5]}" + " who would care" * (2 * number % 7),
            "margin": 0.5 + number % 3,
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def epoch_recipe(folder: Path, base: Path, stage: str, *, pairs: int, holdout: int, **changes: Any) -> Path:
    """One pass over the pairs that are not held out, in steps of four."""
    folder.mkdir(exist_ok=True)
    data = {"sources": [{"name": str(uneven_pairs(folder / "uneven.jsonl", pairs))}], "holdout": holdout}
    path = pair_recipe(folder, base, stage, data=data, checkpoint={"every": 100}, **changes)
    recipe = json.loads(path.read_text())
    recipe["optim"] = {"learning_rate": 1e-3, "epochs": 1, "schedule": "constant", "warmup_ratio": 0}
    if holdout:
        recipe["evaluation"] = {"every": 1}
    else:
        del recipe["evaluation"]
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "stage", "changes"),
    [
        ("gemma4", "dpo", {}),
        ("gemma4", "reward", {}),
        ("gemma3n_text", "dpo", {}),
        ("gemma3n_text", "reward", {}),
        ("gemma3_text", "dpo", {"dpo": {"sft_weight": 0.5}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(value) or "plain",
)
def test_passes_of_any_size_make_the_same_steps(
    tiny: Tiny, tmp_path: Path, name: str, stage: str, changes: dict[str, Any]
) -> None:
    """Seven pairs in steps of four: the last step has three, which passes of two read as two and one."""
    found: dict[int, dict[str, list[float]]] = {}
    for micro in (1, 2, 4):
        batch = {"size": 4, "micro": micro}
        recipe = epoch_recipe(tmp_path / str(micro), tiny(name), stage, pairs=9, holdout=2, batch=batch, **changes)
        assert main([stage, str(recipe)]) == 0
        rows = lines(tmp_path / str(micro) / "run" / "metrics.jsonl")
        found[micro] = {key: [row[key] for row in rows if key in row] for key in ("loss", "grad_norm", "eval_loss")}
    assert [len(found[1][key]) for key in ("loss", "grad_norm", "eval_loss")] == [2, 2, 3]
    for micro in (2, 4):
        for key, values in found[micro].items():
            assert values == pytest.approx(found[1][key], rel=1e-4, abs=1e-5), (micro, key)


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_fewer_pairs_than_a_batch_and_none_held_out(tiny: Tiny, tmp_path: Path, stage: str) -> None:
    """One step, and figures where there is something to take them from."""
    recipe = epoch_recipe(tmp_path, tiny("gemma3_text"), stage, pairs=3, holdout=0, batch={"size": 16, "micro": 2})
    assert main([stage, str(recipe)]) == 0
    results = document(tmp_path / "run" / "run.json")["results"]
    assert results["steps"] == 1
    if stage == "reward":
        assert results["reward_stats"]["held_out"] is False and results["reward_stats"]["pairs"] == 3
    else:
        assert "kl" not in results["tuned"]


def test_the_distance_from_the_reference_takes_any_number_of_answers(tiny: Tiny, tmp_path: Path) -> None:
    """They are no pairs: a batch of one answer has no second half."""
    recipe = epoch_recipe(tmp_path, tiny("gemma3_text"), "dpo", pairs=5, holdout=1)
    assert main(["dpo", str(recipe)]) == 0
    tuned = document(tmp_path / "run" / "run.json")["results"]["tuned"]
    assert tuned["kl_answers"] == 1 and tuned["kl"] is not None


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_what_is_scored_beside_the_training_has_its_types(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """fp16 trains under autocast, which accelerate puts around the model's forward pass, and only once it trains."""
    from accelerate import Accelerator

    from gemma_tune.models.reward import RewardModel
    from gemma_tune.train.reference import reference_log_probs

    @contextmanager
    def autocast(*_: Any, **__: Any) -> Iterator[None]:
        with torch.autocast("cpu", torch.bfloat16):
            yield

    seen: list[bool] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():  # no step: held-out pairs, or scores that are kept
                seen.append(torch.is_autocast_enabled("cpu"))
            return function(*args, **kwargs)

        return called

    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Accelerator, "autocast", autocast)
    changes: dict[str, Any] = {}
    if stage == "dpo":
        changes = {"dpo": {"precompute_reference": True}}
        # With kept scores it is asked for nothing else, but the answers that the policy draws at the end.
        monkeypatch.setattr("gemma_tune.train.dpo_trainer.reference_log_probs", watched(reference_log_probs))
        monkeypatch.setattr("gemma_tune.train.dpo.sampled_kl", lambda *_, **__: {})
    else:
        monkeypatch.setattr(RewardModel, "rewards", watched(RewardModel.rewards))
    recipe = epoch_recipe(tmp_path, tiny("gemma3_text"), stage, pairs=6, holdout=2, **changes)
    assert main([stage, str(recipe)]) == 0
    assert seen and all(seen)


def test_a_damaged_or_foreign_reward_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from gemma_tune.errors import UserError
    from gemma_tune.models.reward import load_reward

    recipe = epoch_recipe(tmp_path, tiny("gemma3_text"), "reward", pairs=4, holdout=0)
    assert main(["reward", str(recipe)]) == 0
    adapter = tmp_path / "run" / "adapter"
    stats, head = adapter / "reward_stats.json", adapter / "reward_head.safetensors"
    whole = {file: file.read_bytes() for file in (stats, head)}
    known, tensors = json.loads(whole[stats]), load_file(head)

    def written(file: Path, content: bytes | dict[str, Any]) -> None:
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif file == stats:
            file.write_text(json.dumps(content))
        else:
            save_file(content, file)

    cases: list[tuple[Path, bytes | dict[str, Any], str]] = [
        (stats, b"", "empty"),
        (stats, b"[]", "not a JSON object"),
        (stats, known | {"family": "gemma4"}, "family"),
        (stats, known | {"template_sha256": "0"}, "template_sha256"),
        (stats, known | {"token_id": 107}, "token_id"),
        (head, whole[head][:-4], "damaged"),
        (head, tensors | {"score.weight": torch.zeros(1, 3)}, "damaged"),
        (head, tensors | {"score.bias": torch.tensor([float("nan")])}, "not finite"),
    ]
    for file, content, said in cases:
        written(file, content)
        with pytest.raises(UserError, match=said):
            load_reward(adapter)
        file.write_bytes(whole[file])
    moved = adapter.rename(tmp_path / "elsewhere")
    assert load_reward(moved)[3] == known
    (moved / "reward_head.safetensors").unlink()
    with pytest.raises(UserError, match=r"reward_head\.safetensors is missing"):
        load_reward(moved)
