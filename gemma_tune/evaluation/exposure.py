"""How much a model knows of made-up secrets (`data.canaries`): exposure, and whether it says them by itself.

Exposure is Carlini et al. 2019 (arXiv 1802.08232), section 4: log2 of the number of secrets that could have been drawn,
less log2 of the rank that the model gives the one that was. A secret that the model never saw has any rank with the
same chance: 1.44 bits on average.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gemma_tune.data.canaries import SPACE, Canary, Form, Planted, alternatives, example, lead, question
from gemma_tune.evaluation.rates import rate
from gemma_tune.gemma.chat import Encoder, render_many, render_prompt
from gemma_tune.gemma.conversation import Document
from gemma_tune.gemma.families import Family
from gemma_tune.train.evaluate import answers, eval_mode

ALTERNATIVES = 63
"""Other secrets that a canary is ranked among."""
BITS = math.log2(SPACE)
"""Exposure of a secret that the model finds likelier than any other."""
_TOGETHER = 32
"""Sequences in one forward pass: with Gemma's vocabulary 0.3 GB of logits for each 10 tokens in fp32."""
_SPARE_TOKENS = 8
"""That an answer may have beyond those of the trained one."""


@dataclass(frozen=True, slots=True)
class Found:
    """What the model knows of one canary.

    Attributes:
        name, repeats: of the canary.
        exposure: in bits, estimated from the rank among sampled alternatives, so at most log2(alternatives + 1).
        at_least: bits below which its exposure is certainly not: no more than 1 / p secrets can be as likely as one
            of probability p, whatever the rest of the space looks like.
        log_prob: of the secret and the end behind it, in nats, after the beginning of the answer.
        extracted: whether the greedy answer to the canary's question holds the secret, digit for digit.
        answer: that answer.
    """

    name: str
    repeats: int
    exposure: float
    at_least: float
    log_prob: float
    extracted: bool
    answer: str


def audit_canaries(
    model: Any,
    tokenizer: Any,
    family: Family,
    encoder: Encoder,
    planted: Planted,
    *,
    limit: int | None = None,
    count: int = ALTERNATIVES,
) -> dict[str, Any]:
    """Every canary of `planted` and its controls, one by one and by number of repeats, as JSON.

    Works on any model, also on one that was not trained with them.

    Args:
        limit: canaries for each number of repeats at most, the first ones.
        count: alternatives for each.
    """
    canaries = [canary for some in _by_repeats(planted.canaries()).values() for canary in some[:limit]]
    said = _greedy(model, tokenizer, family, encoder, canaries, planted.form)
    found = []
    for canary, answer in zip(canaries, said, strict=True):
        secrets = [canary.secret, *alternatives(canary, count, planted.seed)]
        own, *others = secret_log_probs(model, family, encoder, canary, secrets, planted.form)
        found.append(
            Found(
                canary.name,
                canary.repeats,
                exposure(own, others),
                certain(own),
                own,
                canary.secret in answer,
                answer,
            )
        )
    return {
        **asdict(planted),
        "repeats": list(planted.repeats),
        "space_bits": BITS,
        "alternatives": count,
        "ceiling": math.log2(count + 1),
        "by_repeats": [_summary(repeats, some) for repeats, some in sorted(_by_repeats(found).items())],
        "each": [asdict(one) for one in found],
    }


def exposure(own: float, others: Sequence[float]) -> float:
    """Bits of exposure of a secret of log-probability `own` among sampled `others`, of which an equal one goes first.

    The estimate of arXiv 1802.08232, section 4.3: a rank of r among n + 1 stands for r / (n + 1) of the space.
    NaN where a model that has overflowed gives no number: it is above no other and below none.
    """
    if any(map(math.isnan, (own, *others))):
        return math.nan
    rank = 1 + sum(other >= own for other in others)
    return math.log2(len(others) + 1) - math.log2(rank)


def certain(log_prob: float) -> float:
    """Bits of exposure that a secret of this log-probability (nats) has at the least: its rank is at most 1 / p.

    NaN has NaN.
    """
    if math.isnan(log_prob):
        return math.nan
    return max(0.0, BITS + min(0.0, log_prob) / math.log(2))


def secret_log_probs(
    model: Any, family: Family, encoder: Encoder, canary: Canary, secrets: Sequence[str], form: Form
) -> list[float]:
    """log p of each of `secrets` in place of the canary's own, with the end of the turn, after the lead, in nats.

    The prompt and the lead are read once, and kept in the cache.
    """
    start = _start(family, encoder, canary, form)
    rows = _rendered(family, encoder, canary, secrets, form)
    device = next(model.parameters()).device
    found: list[float] = []
    with eval_mode(model):
        read = torch.tensor([rows[0][: start - 1]], device=device)
        begun = model(input_ids=read, use_cache=True, logits_to_keep=1)
        for place in range(0, len(rows), _TOGETHER):
            some = [row[start - 1 :] for row in rows[place : place + _TOGETHER]]
            found += _scored(model, some, begun.past_key_values, family.pad_id, device)
    return found


def _scored(model: Any, rows: list[list[int]], begun: Any, pad_id: int, device: Any) -> list[float]:
    """Sum of log p of all but the first token of each of `rows`, which go on behind the cache `begun`."""
    longest = max(map(len, rows))
    # Padded on the right: what comes after a token is hidden from it, so nothing needs a mask.
    ids = torch.tensor([row + [pad_id] * (longest - len(row)) for row in rows], device=device)
    cache = copy.deepcopy(begun)
    cache.batch_repeat_interleave(len(rows))
    logits = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits.float()
    targets = ids[:, 1:, None]
    log_probs = logits.gather(2, targets)[..., 0] - logits.logsumexp(2)
    real = torch.tensor([[1] * (len(row) - 1) + [0] * (longest - len(row)) for row in rows], device=device)
    return (log_probs * real).sum(1).tolist()


def _start(family: Family, encoder: Encoder, canary: Canary, form: Form) -> int:
    """Where the secret begins, in tokens: where rows part whose secrets differ from the first digit on."""
    rows = _rendered(family, encoder, canary, [digit * 4 + "-" + digit * 4 for digit in "0123456789"], form)
    return next(place for place, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)


def _rendered(family: Family, encoder: Encoder, canary: Canary, secrets: Sequence[str], form: Form) -> list[list[int]]:
    """Token ids of rows of `canary` with other secrets, up to the token at which the model stops."""
    rendered = render_many([example(canary, form, secret) for secret in secrets], family, encoder)
    return [row.ids[: row.turns[-1]] if row.turns else row.ids for row in rendered]


def _greedy(
    model: Any, tokenizer: Any, family: Family, encoder: Encoder, canaries: Sequence[Canary], form: Form
) -> list[str]:
    """The model's greedy answer to the question of each canary; of a plain text, how it goes on behind the lead."""
    rows = [_rendered(family, encoder, canary, [canary.secret], form)[0] for canary in canaries]
    prompts = [prompt_of(canary, family, encoder, form) for canary in canaries]
    new = max(len(row) - len(prompt) for row, prompt in zip(rows, prompts, strict=True)) + _SPARE_TOKENS
    return [one.text for one in answers(model, tokenizer, family, prompts, max_new_tokens=new)]


def prompt_of(canary: Canary, family: Family, encoder: Encoder, form: Form) -> list[int]:
    """Token ids after which the model would say the secret."""
    if form == "document":
        return render_many([Document(lead(canary))], family, encoder)[0].ids[:-1]  # without the end
    return render_prompt(question(canary), family, encoder)


def _by_repeats(found: Sequence[Any]) -> dict[int, list[Any]]:
    groups: dict[int, list[Any]] = {}
    for one in found:
        groups.setdefault(one.repeats, []).append(one)
    return groups


def _summary(repeats: int, found: Sequence[Found]) -> dict[str, Any]:
    return {
        "repeats": repeats,
        **rate(sum(one.extracted for one in found), len(found), "canaries", "extracted"),
        "exposure": sum(one.exposure for one in found) / len(found),
        "at_least": sum(one.at_least for one in found) / len(found),
    }


def render_canaries(found: dict[str, Any]) -> Iterator[str]:
    """For people."""
    yield (
        f"canaries: {found['count']} secrets of {found['space']:,} ({found['space_bits']:.1f} bits) for each number of "
        f"repeats; exposure by rank among {found['alternatives']} others (at most {found['ceiling']:.1f} bits)"
    )
    yield f"{'in rows':>9}  {'said verbatim':<28}{'exposure':>9}{'at least':>10}"
    for row in found["by_repeats"]:
        low, high = row["interval"]
        said = f"{row['extracted']} of {row['canaries']} ({low:.0%} to {high:.0%})"
        where = f"{row['repeats']:,}" if row["repeats"] else "none"
        yield f"{where:>9}  {said:<28}{row['exposure']:>9.1f}{row['at_least']:>10.1f}"
