"""TRL's DPOTrainer, with what Gemma and we need changed. Pairs come in tokenised; the reference is ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from transformers import GenerationConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer

from gemma_tune.data.collate import PairCollator
from gemma_tune.gemma.families import Family
from gemma_tune.models.roles import policy_adapters, speak_as
from gemma_tune.train.evaluate import eval_mode, lent_settings, pad_left, shares
from gemma_tune.train.loss_head import use_frozen_head
from gemma_tune.train.reference import answer_log_probs, drop_copy_of_trl, reference_answers, reference_log_probs
from gemma_tune.train.session import RunFolder
from gemma_tune.train.trainer import RunTrainer, Surroundings, sheltered

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True, slots=True)
class DpoFigures:
    """Held-out pairs under the policy. Each pair weighs the same.

    Attributes:
        loss: TRL's, of the recipe's kind.
        accuracy: share of pairs whose chosen answer has the larger implicit reward, beta (log p - log p_reference).
        margin: mean difference of the two implicit rewards.
        chosen_logps, rejected_logps: mean log p of the answers, summed over their tokens (nats).
        chosen_rewards, rejected_rewards: mean implicit rewards.
        pairs: how many.
    """

    loss: float
    accuracy: float
    margin: float
    chosen_logps: float
    rejected_logps: float
    chosen_rewards: float
    rejected_rewards: float
    pairs: int

    def metrics(self) -> dict[str, float]:
        """What is logged."""
        return {key: value for key, value in asdict(self).items() if key != "pairs"}

    def to_json(self) -> dict[str, Any]:
        """What stands in run.json."""
        return asdict(self)


class DpoTrainer(RunTrainer, DPOTrainer):
    """Trains the adapter of `model` on pairs.

    Args:
        model: from `attach` or `begin_with`; a frozen adapter `roles.REFERENCE` is the reference, without one the plain
            base is.
        tokenizer: only its special tokens are used.
        collator: pairs -> batch.
        train: rows of `prompt_ids`, `chosen_ids`, `rejected_ids`; where they bring `ref_chosen_logps` and
            `ref_rejected_logps`, the reference is not asked.
        config: keywords of the plan, as a DPOConfig.
        around: what the run gives it.
        mode: how the model's start adapter is used, `continue` or `stack`.
    """

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        collator: PairCollator,
        train: Any,
        config: DPOConfig,
        around: Surroundings,
        mode: str = "continue",
    ) -> None:
        with sheltered(model):
            super().__init__(
                model=model, args=config, data_collator=collator, train_dataset=train, processing_class=tokenizer
            )
            drop_copy_of_trl(self.model)
        speak_as(self.model, policy_adapters(self.model, mode))
        self.settle(around)
        use_frozen_head(self.plain_model())
        # From here on TRL reads the reference's log-probabilities from the batch.
        self.precompute_ref_logps = True
        self._sft_weight = dict(zip(self.loss_types, self.loss_weights, strict=True)).get("sft", 0.0)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """The rows are token ids already: TRL would make them again, from text, and end them behind the turn end."""
        return dataset

    def set_held_out(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace the held-out rows by ones that bring the reference's scores."""
        self._held_out = rows

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss. The reference is asked first: what it keeps is gone before the policy keeps anything."""
        if REFERENCE_COLUMNS[0] not in inputs:
            inputs = inputs | dict(zip(REFERENCE_COLUMNS, reference_log_probs(self.model, inputs), strict=True))
        if self._sft_weight:
            self.loss_weights = [1.0, self._sft_weight * self._sft_share()]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _sft_share(self) -> float:
        """By what the usual loss is multiplied so that each chosen token of a step weighs the same in it.

        TRL's is the mean over the tokens of one pass, which is then weighted as the pairs are (`RunTrainer`). Of
        held-out pairs it is added when all are read.
        """
        if not self.model.training:
            return 0.0
        pairs = self.weight_in_step(_pairs, together=self._uneven)
        tokens = self.weight_in_step(_chosen_tokens, together=True)  # also where there is none: others wait for it
        return tokens / pairs if pairs else 0.0

    def batch_tokens(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Non-padding tokens of both sequences, and those of the answers."""
        return batch["attention_mask"].sum(), batch["completion_mask"].sum()

    # --- held-out pairs -----------------------------------------------------------------------------------------------

    def score_held_out(self, rows: Sequence[Mapping[str, Any]]) -> DpoFigures | None:
        """`DpoFigures` over the rows."""
        names = [field for field in DpoFigures.__dataclass_fields__ if field != "pairs"]
        sums = torch.zeros(len(names) + 2, dtype=torch.float64)
        with eval_mode(self.model):
            for chosen, counts in self._shares(rows):
                if self._stop_alone():
                    return None
                batch = self.data_collator([rows[index] for index in chosen])
                counted = torch.tensor([_chosen_tokens(batch), len(chosen)], dtype=torch.float64)
                part = torch.cat([self._score_pairs(batch), counted])
                if counts:
                    sums += part
        self._metrics["eval"].clear()  # TRL's: means of batch means
        *values, tokens, pairs = self._total(sums).tolist()
        if not pairs:
            return None
        found = DpoFigures(**dict(zip(names, (value / pairs for value in values), strict=True)), pairs=int(pairs))
        return replace(found, loss=found.loss - self._sft_weight * found.chosen_logps * pairs / tokens)

    def _shares(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]
        return shares(lengths, self.args.per_device_eval_batch_size, self.args.process_index, self.args.world_size)

    def _score_pairs(self, batch: dict[str, Any]) -> torch.Tensor:
        """The sums of one batch, in the order of `DpoFigures`, fp64."""
        inputs = self._prepare_inputs(batch)
        if REFERENCE_COLUMNS[0] not in inputs:
            inputs |= dict(zip(REFERENCE_COLUMNS, reference_log_probs(self.model, inputs), strict=True))
        heard = _Heard(self.model)
        loss = self.compute_loss(heard, inputs)
        chosen, rejected = heard.output.log_probs.sum(dim=1).chunk(2)
        gained, lost = (
            self.beta * (one - inputs[key]) for one, key in zip((chosen, rejected), REFERENCE_COLUMNS, strict=True)
        )
        each = (gained > lost, gained - lost, chosen, rejected, gained, lost)
        return torch.stack([loss.double() * len(chosen), *(value.double().sum() for value in each)]).cpu()

    def score_reference(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
        """(chosen, rejected) log-probabilities of the reference for each row, in order. Processes share the work."""
        found: dict[int, tuple[float, float]] = {}
        # The model is not yet wrapped for autocast here, as it is in the training (fp16).
        with eval_mode(self.model), self.accelerator.autocast():
            for numbers, _ in self._shares(rows):
                batch = self._prepare_inputs(self.data_collator([rows[index] for index in numbers]))
                scored = zip(*(part.tolist() for part in reference_log_probs(self.model, batch)), strict=True)
                found |= dict(zip(numbers, scored, strict=True))
        if self.args.world_size > 1:
            parts: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(parts, found)
            found = {index: score for part in parts for index, score in part.items()}
        return [found[index] for index in range(len(rows))]


def _pairs(batch: Mapping[str, torch.Tensor]) -> int:
    return len(batch["input_ids"]) // 2


def _chosen_tokens(batch: Mapping[str, torch.Tensor]) -> int:
    """Tokens of the chosen answers."""
    return int(batch["completion_mask"].chunk(2)[0].sum())


class _Heard:
    """A model that is called through, and what it said last: TRL's loss does not hand it on."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self._model(*args, **kwargs)
        return self.output


# --- the policy and its reference -----------------------------------------------------------------------------------


def sampled_kl(
    model: Any,
    prompts: Sequence[Sequence[int]],
    family: Family,
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 8,
) -> dict[str, Any]:
    """KL(policy || reference) in nats an answer, from one answer a prompt that the policy draws at temperature 1.

    The mean of log p(y) - log p_reference(y) over y ~ p is the KL; it is unbiased and may come out slightly below 0
    where the two are close. An answer that is cut counts as far as it goes.

    Returns:
        `kl`, `kl_per_token` and `kl_answers`. The global random state is left as it was.
    """
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(family.stop_ids),
        pad_token_id=family.pad_id,
        bos_token_id=family.bos_id,
        use_cache=True,
    )
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64)
    with eval_mode(model), lent_settings(model, settings), torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            ids, mask = pad_left(prompts[start : start + batch_size], family.pad_id)
            made = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            ).cpu()
            drawn = [_until_stop(row, family) for row in made[:, ids.shape[1] :].tolist()]
            rows = list(zip(prompts[start : start + batch_size], drawn, strict=True))
            batch = {key: value.to(device) for key, value in _answers_batch(rows, family.pad_id).items()}
            policy = answer_log_probs(model, batch)
            total[0] += (policy - reference_answers(model, batch)).double().sum().cpu()
            total[1] += batch["completion_mask"].sum().cpu()
    kl, tokens = total.tolist()
    return {"kl": kl / len(prompts), "kl_per_token": kl / max(tokens, 1), "kl_answers": len(prompts)}


def _until_stop(ids: Sequence[int], family: Family) -> list[int]:
    """Generated ids up to and with the first stop token; the padding behind it goes."""
    end = next((place + 1 for place, token in enumerate(ids) if token in family.stop_ids), len(ids))
    return list(ids[:end])


def _answers_batch(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """(prompt, answer) ids -> tensors [B, T], padded on the right."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    batch = torch.zeros(3, len(rows), width, dtype=torch.long)
    batch[0] = pad_id
    for number, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        batch[0, number, :end] = torch.tensor([*prompt, *answer])
        batch[1, number, :end] = 1
        batch[2, number, len(prompt) : end] = 1
    return dict(zip(("input_ids", "attention_mask", "completion_mask"), batch, strict=True))


class ChosenAlarm(TrainerCallback):
    """Says once when the chosen answers themselves only become less likely.

    DPO rewards the difference of two log-probabilities: both may fall (Pal et al., "Smaug", arXiv 2402.13228), and a
    policy that finds its good answers less and less likely says something else instead.
    """

    EVALUATIONS = 3
    """Falls in a row that are needed; one or two are noise."""

    def __init__(self, folder: RunFolder, console: Console) -> None:
        self._folder = folder
        self._console = console
        self._seen: list[float] = _logged(folder)
        self._said = False

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        if "eval_chosen_logps" not in (metrics or {}):
            return
        self._seen.append(metrics["eval_chosen_logps"])  # type: ignore[index]
        falls = all(after < before for before, after in zip(self._seen, self._seen[1:], strict=False))
        if self._said or len(self._seen) <= self.EVALUATIONS or not falls:
            return
        self._said = True
        text = (
            f"the chosen answers become less likely with every evaluation (log p {self._seen[0]:.1f} -> "
            f"{self._seen[-1]:.1f} by step {state.global_step:,}): raise dpo.sft_weight or dpo.beta, or lower "
            "optim.learning_rate"
        )
        self._folder.write_record(alarms=[*self._folder.record.get("alarms", []), text])
        if state.is_world_process_zero:
            self._console.print(f"warning: {text}", highlight=False)


def _logged(folder: RunFolder) -> list[float]:
    """The values of a run that is resumed, from metrics.jsonl."""
    file = folder.path / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [row["eval_chosen_logps"] for row in rows if "eval_chosen_logps" in row]
