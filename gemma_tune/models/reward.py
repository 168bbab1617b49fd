"""A reward model: a Gemma with an adapter, and a scalar head that reads its last token.

One class for every generation. transformers has no sequence-classification class for Gemma 3n and 4
(transformers#45373, #46966), and its classes for the others read the last token that is not padding, which TRL makes
the newline behind the turn end: a token that no rollout ever holds. Here the language model's trunk is used as it is,
sequences end at the turn end, and the head is a module beside the model, so that several roles can share one base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from gemma_tune.errors import TrainingError, UserError
from gemma_tune.gemma.families import Family
from gemma_tune.models.saved import load_adapted
from gemma_tune.plan.starts import REWARD_HEAD, STATS_FILE, adapter_folder, check_stats, read_stats

if TYPE_CHECKING:
    from peft import PeftModel


class RewardHead(nn.Module):
    """hidden [..., D] of any type -> reward [...] fp32.

    The hidden state is scaled to a mean square of 1: what leaves Gemma's last norm is many times larger and differs
    from size to size, so that the first step of AdamW alone would move a reward by several units.

    The weight starts at N(0, 1 / (D + 1)), the bias at 0, so that the first rewards are of size 1 (Huang et al., arXiv
    2403.17031, "The N+ Implementation Details of RLHF with PPO").
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(width + 1))
        nn.init.zeros_(self.score.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # fp32 also inside autocast: differences of rewards are small against the rewards.
        with torch.autocast(hidden.device.type, enabled=False):
            scaled = nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)
            return self.score(scaled).squeeze(-1)


class RewardModel(nn.Module):
    """The model that `gemma-tune reward` trains and PPO asks.

    Attributes:
        trunk: the base with its adapter. Its LM head is not used.
        head: the scalar head, fp32.
    """

    def __init__(self, trunk: PeftModel, head: RewardHead | None = None) -> None:
        super().__init__()
        self.trunk = trunk
        width = base_of(trunk).config.get_text_config().hidden_size
        device = next(trunk.parameters()).device
        self.head = (head or RewardHead(width)).to(device)

    @property
    def config(self) -> Any:
        """The base's."""
        return base_of(self.trunk).config

    # What the Trainer and TRL call of a model besides its forward pass.

    def add_model_tags(self, tags: Any) -> None:
        """TRL marks what it trains; our card says it."""

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        base_of(self.trunk).gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        base_of(self.trunk).activation_checkpointing_enable(*args, **kwargs)

    def rewards(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The reward of each sequence, read at its last token: [B, T] ids and 0/1 mask -> [B] fp32.

        Padding may stand on either side.
        """
        return self.head(last_hidden(self.trunk, input_ids, attention_mask))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool = False, **_: Any
    ) -> SequenceClassifierOutput:
        """As a sequence-classification class: `logits` [B, 1]. It is what TRL's RewardTrainer calls."""
        return SequenceClassifierOutput(logits=self.rewards(input_ids, attention_mask)[:, None])


def base_of(model: PeftModel) -> Any:
    """The model below the adapter."""
    return model.get_base_model()


def last_hidden(model: PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The hidden state at the last token of each sequence, after the final norm: [B, T] -> [B, D].

    Positions count from the first token, so that padding on the left changes nothing.
    """
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    hidden = (
        base_of(model)
        .base_model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        .last_hidden_state
    )
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (places * attention_mask).argmax(-1)
    return hidden[torch.arange(len(last), device=last.device), last]


# --- on disk


def save_head(model: RewardModel, folder: Path, stats: Mapping[str, Any]) -> None:
    """Write the head and what its rewards are like beside the adapter: `reward_head.safetensors`, `reward_stats.json`.

    Raises:
        TrainingError: the head is not finite. Nothing is written then.
    """
    state = {name: tensor.contiguous() for name, tensor in model.head.state_dict().items()}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(f"{name} is not finite", where=str(folder), fix="lower optim.learning_rate")
    save_file(state, str(folder / REWARD_HEAD))
    (folder / STATS_FILE).write_text(json.dumps(stats, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    card = folder / "README.md"
    card.write_text(_with_usage(card.read_text(encoding="utf-8"), stats), encoding="utf-8")


_USAGE = """
It is a reward model: it rates an answer, and writes none. The reward is read at `{token}`, the end of the answer. On
the pairs that it was measured with it has a mean of {mean:.3g} and a deviation of {std:.3g} (reward_stats.json).

```python
from gemma_tune.models.reward import load_reward

model, tokenizer, family, stats = load_reward("this-folder")
```
"""


def _with_usage(card: str, stats: Mapping[str, Any]) -> str:
    """The adapter's card with the way to load a reward model instead of a policy."""
    before, _, after = card.partition("```python")
    notes = after.partition("```")[2].partition("(generation_config.json).")[2]
    return before.rstrip().replace("pipeline_tag: text-generation", "pipeline_tag: text-classification") + (
        "\n" + _USAGE.format(**stats) + notes
    )


def load_reward(target: str | Path, **changes: Any) -> tuple[RewardModel, Any, Family, dict[str, Any]]:
    """Open the result of `gemma-tune reward`.

    Args:
        target: run folder or adapter folder.
        changes: as in `saved.load_run`.

    Returns:
        The model in evaluation mode, its tokenizer, the family, and the contents of reward_stats.json.

    Raises:
        UserError: not a reward model, damaged, or made for another base or template than it finds.
    """
    folder = adapter_folder(target, where=str(target))
    stats = read_stats(folder)
    trunk, tokenizer, family = load_adapted(folder, **changes)
    check_stats(stats, family, str(folder))
    head = open_head(folder, base_of(trunk).config.get_text_config().hidden_size)
    return RewardModel(trunk, head).eval(), tokenizer, family, stats


def open_head(folder: Path, width: int) -> RewardHead:
    """The head in the adapter folder of a reward model whose base has hidden states of `width`.

    Raises:
        UserError: it is damaged, not finite, or of another width.
    """
    head = RewardHead(width)
    try:
        head.load_state_dict(load_file(str(folder / REWARD_HEAD)))
    except (SafetensorError, RuntimeError) as exc:
        raise UserError(
            f"the reward head is damaged: {str(exc).splitlines()[0]}",
            where=str(folder / REWARD_HEAD),
            fix="copy the adapter again",
        ) from exc
    if not all(torch.isfinite(tensor).all() for tensor in head.state_dict().values()):
        raise UserError("the reward head is not finite", where=str(folder / REWARD_HEAD), fix="train it again")
    return head
