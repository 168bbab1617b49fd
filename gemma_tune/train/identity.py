"""What a run is made of: two runs with the same identity follow the same mathematics, and one may continue the other.

Stock resuming compares next to nothing: a changed learning rate is silently ignored, changed data are silently mixed
in. Here everything in the plan counts, except what is named below as free to change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_tune.plan.types import Plan

# Keys of the trainer section that change where, how fast or how often, but not what is computed.
_FREE_TRAINER = frozenset(
    {
        "output_dir",
        "run_name",
        "report_to",
        "disable_tqdm",
        "log_level",
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "logging_nan_inf_filter",
        "logging_dir",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "eval_strategy",
        "eval_steps",
        "eval_on_start",
        "per_device_eval_batch_size",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "use_cpu",
        "ddp_find_unused_parameters",
        "ddp_timeout",
        "fsdp",
        "fsdp_config",
        "include_num_input_tokens_seen",
        # Their product counts, below: another micro batch with the same global batch is the same mathematics.
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
    }
)
# When gradients of all weights are added up, not what they are: the plan's, where the model is sharded.
_SUMMED_EACH_PASS = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
_FREE = {
    "model": frozenset({"attn_implementation"}),
    "quantization": frozenset[str](),
    "lora": frozenset[str](),
    "trainer": _FREE_TRAINER,
    "data": frozenset({"workers"}),
}


def identity_of(
    plan: Plan,
    *,
    fingerprint: str,
    revision: str | None,
    start: str | None = None,
    rewards: Sequence[str] = (),
    world_size: int = 1,
) -> dict[str, Any]:
    """A flat dictionary `section.key -> JSON value`.

    Args:
        plan: the plan of the run.
        fingerprint: of the prepared data.
        revision: of the base model, as resolved (commit or content hash); None where it has none.
        start: content hash of the adapter that the training begins with.
        rewards: content hash of each source of rewards, a model or the file of a function.
        world_size: processes that share the global batch.
    """
    flat: dict[str, Any] = {"stage": plan.stage, "family": plan.family}
    for section, free in _FREE.items():
        flat |= {f"{section}.{key}": value for key, value in plan.values(section).items() if key not in free}
    trainer = plan.values("trainer")
    if trainer.get("accelerator_config") == _SUMMED_EACH_PASS:
        del flat["trainer.accelerator_config"]
    micro = trainer.get("per_device_train_batch_size") or 1
    flat["batch.size"] = micro * (trainer.get("gradient_accumulation_steps") or 1) * world_size
    flat["model.revision"] = revision
    flat["data.fingerprint"] = fingerprint
    if start is not None:
        flat["adapter.start"] = start
        flat["adapter.mode"] = (plan.values("session").get("adapter") or {}).get("mode")
    if plan.stage == "ppo":  # a process draws with noise of its own, which responses that are drawn together share
        flat["world_size"] = world_size
        flat["trainer.per_device_eval_batch_size"] = trainer.get("per_device_eval_batch_size")
    if rewards:
        weights = [source["weight"] for source in plan.values("session")["rewards"]]
        flat["ppo.reward"] = [[content, weight] for content, weight in zip(rewards, weights, strict=True)]
    return json.loads(json.dumps(flat, sort_keys=True, default=str))


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`key: saved -> now` for each key that differs, in order of the key. Empty when the identities agree."""
    lines = []
    for key in sorted({*saved, *now}):
        if saved.get(key) != now.get(key):
            lines.append(f"{key}: {_short(saved.get(key))} -> {_short(now.get(key))}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-16:]}"
