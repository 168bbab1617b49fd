"""Rules over several keys: values that are fine one by one and contradict each other, and secrets.

Each clash names both keys with their places. What depends on the machine or on the Gemma generation is `plan/`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gemma_tune.console import TOKEN
from gemma_tune.recipe.clash import Clash, Place
from gemma_tune.recipe.names import SECRETS, owner_of
from gemma_tune.recipe.rules_ppo import PPO_RULES
from gemma_tune.recipe.schema import Recipe


def clashes(recipe: Recipe, place: Place) -> Iterator[Clash]:
    """Every contradiction in `recipe`. `place` says where a key was written."""
    for rule in _RULES:
        yield from rule(recipe, place)


def _adapter(recipe: Recipe, place: Place) -> Iterator[Clash]:
    quantization = recipe.model.quantization
    if recipe.adapter is None and quantization != "none":
        yield Clash(
            ("adapter", "model.quantization"),
            f"adapter: null ({place('adapter')}) trains all weights, but model.quantization: {quantization} "
            f"({place('model.quantization')}) holds them in a form that cannot be trained",
            "set model.quantization: none, or keep an adapter (remove `adapter: null`)",
        )


def _schedule(recipe: Recipe, place: Place) -> Iterator[Clash]:
    warmup = recipe.optim.warmup_ratio
    if recipe.optim.schedule == "constant" and warmup > 0:
        yield Clash(
            ("optim.schedule", "optim.warmup_ratio"),
            f"optim.schedule: constant ({place('optim.schedule')}) has no warm-up, "
            f"but optim.warmup_ratio: {warmup:g} "
            f"({place('optim.warmup_ratio')}) asks for one",
            "set optim.schedule: constant_with_warmup, or optim.warmup_ratio: 0",
        )


def _batch(recipe: Recipe, place: Place) -> Iterator[Clash]:
    size, micro = recipe.batch.size, recipe.batch.micro
    if micro == "auto" or size % micro == 0:
        return
    lower = size // micro * micro
    choices = f"{lower} or {lower + micro}" if lower else f"{micro}"
    yield Clash(
        ("batch.size", "batch.micro"),
        f"batch.size: {size} ({place('batch.size')}) is no multiple of batch.micro: {micro} ({place('batch.micro')})",
        f"set batch.size to {choices}, or batch.micro: auto",
    )


def _streaming(recipe: Recipe, place: Place) -> Iterator[Clash]:
    data = recipe.data
    if not data.streaming or recipe.stage != "sft":
        return
    here = f"data.streaming: true ({place('data.streaming')})"
    if recipe.optim.max_steps is None:
        yield Clash(
            ("data.streaming", "optim.max_steps"),
            f"{here} has no known end, but optim.max_steps ({place('optim.max_steps')}) is not set",
            "set optim.max_steps",
        )
    if 0 < data.holdout < 1:
        yield Clash(
            ("data.streaming", "data.holdout"),
            f"{here} has no known length, but data.holdout: {data.holdout:g} ({place('data.holdout')}) is a share",
            "set data.holdout to a number of rows, such as 200, or to 0",
        )


def _canaries(recipe: Recipe, place: Place) -> Iterator[Clash]:
    """Canaries are planted at random places among rows whose number is known."""
    if recipe.data.canaries is None:
        return
    here = f"data.canaries ({place('data.canaries')})"
    if recipe.stage != "sft":
        yield Clash(
            ("data.canaries", "stage"),
            f"{here} plants rows for stage: sft, but the recipe has stage: {recipe.stage} ({place('stage')})",
            "remove data.canaries; plant them in the SFT that this run begins with",
        )
    elif recipe.data.streaming:
        yield Clash(
            ("data.canaries", "data.streaming"),
            f"{here} are planted among all rows, but data.streaming: true ({place('data.streaming')}) never has all",
            "set data.streaming: false; data.sources.0.limit takes the first rows of a large set",
        )


def _holdout(recipe: Recipe, place: Place) -> Iterator[Clash]:
    holdout = recipe.data.holdout
    if holdout > 1 and holdout != int(holdout):
        yield Clash(
            ("data.holdout",),
            f"data.holdout: {holdout:g} ({place('data.holdout')}) is no share below 1 and no number of rows",
            f"write {int(holdout)}",
        )
    if holdout == 0 and recipe.evaluation.every is not None:
        yield Clash(
            ("evaluation.every", "data.holdout"),
            f"evaluation.every: {recipe.evaluation.every} ({place('evaluation.every')}) asks for evaluations, but "
            f"data.holdout: 0 ({place('data.holdout')}) leaves no rows for them",
            "set data.holdout, or remove evaluation.every",
        )


def _kto_batch(recipe: Recipe, place: Place) -> Iterator[Clash]:
    """KTO compares an answer with answers to other prompts of the same pass."""
    if recipe.stage != "kto":
        return
    for key, value in (("size", recipe.batch.size), ("micro", recipe.batch.micro)):
        if value == 1:
            yield Clash(
                (f"batch.{key}", "stage"),
                f"batch.{key}: 1 ({place(f'batch.{key}')}), but stage: kto ({place('stage')}) compares each answer "
                "with answers to other prompts of the same pass",
                f"set batch.{key} to 2 or more",
            )


def _betas(recipe: Recipe, place: Place) -> Iterator[Clash]:
    for key in ("beta1", "beta2"):
        if getattr(recipe.optim, key) == 1:
            yield Clash(
                (f"optim.{key}",),
                f"optim.{key}: 1 ({place(f'optim.{key}')}) would never forget, so AdamW could not learn",
                f"set optim.{key} below 1, such as {0.9 if key == 'beta1' else 0.999}",
            )


def _trainer(recipe: Recipe, place: Place) -> Iterator[Clash]:
    for keyword in recipe.advanced.trainer:
        owner = owner_of(keyword, recipe.stage)
        if owner is not None:
            key = f"advanced.trainer.{keyword}"
            origin = f" ({place(owner)})" if "." in owner or owner in Recipe.model_fields else ""
            yield Clash(
                (key,),
                f"{key} ({place(key)}) repeats what {owner}{origin} decides",
                f"remove it and use {owner}",
            )


def _other_stage(recipe: Recipe, place: Place) -> Iterator[Clash]:
    """Sections and keys that another stage would read, and this one would not."""
    stage = f"stage: {recipe.stage} ({place('stage')})"
    for section in ("reward", "dpo", "kto", "ppo"):
        if section in recipe.model_fields_set and recipe.stage != section:
            yield Clash(
                (section, "stage"),
                f"{section} ({place(section)}) is a section of stage: {section}, but the recipe has {stage}",
                f"set stage: {section}, or remove the section",
            )
    if recipe.stage == "sft":
        return
    rows = {"kto": "single answers", "ppo": "prompts"}.get(recipe.stage, "pairs")
    if recipe.data.packing and "packing" in recipe.data.model_fields_set:
        yield Clash(
            ("data.packing", "stage"),
            f"data.packing: true ({place('data.packing')}), but {stage} has {rows}, which are not packed",
            "remove data.packing",
        )
    for key in ("train_on", "shuffle_buffer"):
        if key in recipe.data.model_fields_set:
            answers = "its own responses" if recipe.stage == "ppo" else "the answers"
            why = f"trains on {answers}" if key == "train_on" else "reads no streams"
            yield Clash(
                (f"data.{key}", "stage"),
                f"data.{key} ({place(f'data.{key}')}) is for stage: sft, but {stage} {why}",
                f"remove data.{key}",
            )
    if recipe.data.streaming:
        yield Clash(
            ("data.streaming", "stage"),
            f"data.streaming: true ({place('data.streaming')}) is for stage: sft, but {stage} reads no streams",
            "remove data.streaming; data.sources.0.limit takes the first rows of a large set",
        )
    if recipe.stage == "reward" and recipe.samples.model_fields_set:
        yield Clash(
            ("samples", "stage"),
            f"samples ({place('samples')}) asks for answers, but the model of {stage} rates answers and gives none",
            "remove the section",
        )


_ONE_NETWORK = {"ppo": "the policy that learns from a response must be the one that gave it"}
"""Why a stage has no dropout, where it is not the usual reason."""


def _pairs_adapter(recipe: Recipe, place: Place) -> Iterator[Clash]:
    if recipe.stage == "sft":
        return
    stage = f"stage: {recipe.stage} ({place('stage')})"
    if recipe.adapter is None:
        why = {
            "reward": "a reward model is an adapter and a small head, so that it can share its base",
            "dpo": "the reference is the base with the adapter switched off, never a second model",
            "kto": "the reference is the base with the adapter switched off, never a second model",
            "ppo": "policy, reference, reward model and critic are adapters on one base",
        }
        yield Clash(
            ("adapter", "stage"),
            f"adapter: null ({place('adapter')}) trains all weights, but {stage} needs an adapter: {why[recipe.stage]}",
            "keep an adapter (remove `adapter: null`)",
        )
    elif recipe.adapter.dropout and "dropout" in recipe.adapter.model_fields_set:
        yield Clash(
            ("adapter.dropout", "stage"),
            f"adapter.dropout: {recipe.adapter.dropout:g} ({place('adapter.dropout')}), but {stage} trains without "
            f"dropout: {_ONE_NETWORK.get(recipe.stage, 'all answers must be seen by the same network')}",
            "remove adapter.dropout",
        )


def _saved_adapter(recipe: Recipe, place: Place) -> Iterator[Clash]:
    """`model.adapter` with `adapter_mode` and the keys of a new adapter."""
    model = recipe.model
    mode = f"model.adapter_mode: {model.adapter_mode} ({place('model.adapter_mode')})"
    if model.adapter is None:
        if "adapter_mode" in model.model_fields_set:
            yield Clash(
                ("model.adapter_mode", "model.adapter"),
                f"{mode} is about a saved adapter, but model.adapter ({place('model.adapter')}) names none",
                "set model.adapter to a run folder, or remove model.adapter_mode",
            )
        return
    here = f"model.adapter ({place('model.adapter')})"
    if recipe.adapter is None:
        yield Clash(
            ("model.adapter", "adapter"),
            f"{here} begins with a saved adapter, but adapter: null ({place('adapter')}) trains all weights",
            "remove one of the two",
        )
    elif model.adapter_mode == "continue":
        for key in sorted(recipe.adapter.model_fields_set):
            if key == "dropout" and recipe.stage != "sft":
                continue  # _pairs_adapter says more about it
            if recipe.stage == "ppo" and recipe.ppo.new_critic:
                continue  # it is the critic's
            yield Clash(
                (f"adapter.{key}", "model.adapter"),
                f"adapter.{key} ({place(f'adapter.{key}')}) is for a new adapter, but {here} is trained on as it was "
                "saved",
                f"remove adapter.{key}, or set model.adapter_mode: stack",
            )
    elif recipe.stage == "reward":
        yield Clash(
            ("model.adapter_mode", "stage"),
            f"{mode} saves the sum of two adapters, but stage: reward ({place('stage')}) trains the one that its head "
            "reads",
            "set model.adapter_mode: continue",
        )
    else:
        for key in ("dora", "rslora"):
            if getattr(recipe.adapter, key):
                yield Clash(
                    (f"adapter.{key}", "model.adapter_mode"),
                    f"adapter.{key}: true ({place(f'adapter.{key}')}) cannot be added up with another adapter, but "
                    f"{mode} saves the sum of two",
                    f"remove adapter.{key}, or set model.adapter_mode: continue",
                )


def _dpo_loss(recipe: Recipe, place: Place) -> Iterator[Clash]:
    dpo = recipe.dpo
    loss = f"dpo.loss: {dpo.loss} ({place('dpo.loss')})"
    smoothing = f"dpo.label_smoothing: {dpo.label_smoothing:g} ({place('dpo.label_smoothing')})"
    if dpo.label_smoothing and dpo.loss not in ("sigmoid", "robust"):
        yield Clash(
            ("dpo.label_smoothing", "dpo.loss"),
            f"{smoothing} has no meaning in {loss}",
            "set dpo.loss: sigmoid or robust, or remove dpo.label_smoothing",
        )
    if dpo.loss == "robust" and not dpo.label_smoothing:
        yield Clash(
            ("dpo.loss", "dpo.label_smoothing"),
            f"{loss} with {smoothing} is the loss sigmoid",
            "set dpo.label_smoothing, such as 0.1, or dpo.loss: sigmoid",
        )


def _sharding(recipe: Recipe, place: Place) -> Iterator[Clash]:
    """Keys of `distributed` that only sharding reads, and stages that cannot be sharded."""
    asked, written = recipe.distributed, recipe.distributed.model_fields_set
    strategy = f"distributed.strategy: {asked.strategy} ({place('distributed.strategy')})"
    if asked.strategy == "ddp":
        for key in ("checkpoint", "offload", "reshard_after_forward"):
            if key in written and getattr(asked, key) != type(asked).model_fields[key].default:
                yield Clash(
                    (f"distributed.{key}", "distributed.strategy"),
                    f"distributed.{key} ({place(f'distributed.{key}')}) is for sharded weights, but with {strategy} "
                    "every process holds the whole model",
                    f"remove distributed.{key}, or set distributed.strategy: fsdp2",
                )
    if asked.replicas is not None and asked.strategy != "hsdp":
        yield Clash(
            ("distributed.replicas", "distributed.strategy"),
            f"distributed.replicas: {asked.replicas} ({place('distributed.replicas')}) is for groups that each hold "
            f"the whole model, but there is {strategy}",
            "set distributed.strategy: hsdp, or remove distributed.replicas",
        )
    if asked.strategy in ("fsdp2", "hsdp") and (why := NOT_SHARDED.get(recipe.stage)):
        yield Clash(
            ("distributed.strategy", "stage"),
            f"{strategy}, but stage: {recipe.stage} ({place('stage')}) is not sharded: {why}",
            "set distributed.strategy: ddp",
        )


NOT_SHARDED = {
    "ppo": "its roles take turns on one base, and responses of different lengths would wait for each other's layers",
    "kto": "its KL rows go through the policy outside the pass that gathers the layers",
}
"""Stages that do not run under FSDP -> why."""

_RULES = (
    _adapter,
    _schedule,
    _batch,
    _streaming,
    _canaries,
    _holdout,
    _betas,
    _trainer,
    _other_stage,
    _pairs_adapter,
    _saved_adapter,
    _dpo_loss,
    _kto_batch,
    _sharding,
    *PPO_RULES,
)

_VARIABLE = re.compile(r"\$(\{\w+\}|[A-Z_][A-Z0-9_]*$)")
_SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")


def secret_in(path: tuple[str, ...], text: str) -> tuple[str, str] | None:
    """(what, fix) when the value `text` at `path` is a secret or stands for an environment variable; else None.

    A prompt may speak of `${NAME}`. Forty hex digits are a W&B key, but in a `revision` they are a commit.
    """
    advice = (
        "remove it and set HF_TOKEN or WANDB_API_KEY, or run `hf auth login` or `wandb login`; revoke what was shared"
    )
    secret = "secrets do not belong in recipes, which are copied into run folders"
    if path and path[-1].lower() in SECRETS:
        return secret, advice
    if TOKEN.search(text) or (_WANDB_KEY.fullmatch(text) and path[-1:] != ("revision",)):
        return f"this looks like an access token: {secret}", advice
    found = None if path[:2] == ("samples", "prompts") else _VARIABLE.search(text)
    if not found:
        return None
    if _SECRET_NAME.search(found[0]):
        return f"{found[0]} is not expanded: {secret}", advice
    return (
        f"{found[0]} is not expanded: a recipe holds plain values",
        f'write the value, or give it on the command line: {".".join(path)}="{found[0]}"',
    )
