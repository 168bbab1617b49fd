"""The exact oracle: on a world small enough to enumerate, the expected gradient of PPO is that of what it maximises.

    J = E[score] - beta KL(policy || reference)

A vocabulary of three words, of which one ends the response, and at most four tokens: 31 responses. The policy is a
table of logits, one row for each beginning that a response can have. Every response is listed and counts by its
probability, so that nothing is sampled. The gradient of J is autograd's, of J as it is written above; it knows
nothing of rewards by token, of advantages or of ratios.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch

from gemma_tune.train.ppo.advantages import gae, rewards_to_go, rloo
from gemma_tune.train.ppo.losses import policy_terms, value_terms
from gemma_tune.train.ppo.rewards import k3, token_rewards

STOP, WORDS, LONGEST = 0, 3, 4
BETA = 0.3
EXACT = 1e-10

BEGINNINGS = [
    beginning for length in range(LONGEST) for beginning in product(range(1, WORDS), repeat=length)
]  # 1 + 2 + 4 + 8
RESPONSES = [(*beginning, STOP) for beginning in BEGINNINGS] + list(product(range(1, WORDS), repeat=LONGEST))


@dataclass
class World:
    """A random policy, reference and score. Tensors [31, 4] have a row for each response, padded with NaN."""

    logits: torch.Tensor  # [15, 3], the parameters
    reference_logits: torch.Tensor  # [15, 3]
    scores: torch.Tensor  # [31]

    def __post_init__(self) -> None:
        lengths = torch.tensor([len(response) for response in RESPONSES])
        self.mask = torch.arange(LONGEST) < lengths[:, None]
        self.state = torch.zeros(len(RESPONSES), LONGEST, dtype=torch.long)
        self.word = torch.zeros_like(self.state)
        for row, response in enumerate(RESPONSES):
            for t, word in enumerate(response):
                self.state[row, t] = BEGINNINGS.index(response[:t])
                self.word[row, t] = word

    def by_token(self, table: torch.Tensor) -> torch.Tensor:
        """table [15] -> [31, 4]: what it says of the beginning before each token."""
        return table[self.state].masked_fill(~self.mask, torch.nan)

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """log p of each token."""
        return logits.log_softmax(-1)[self.state, self.word].masked_fill(~self.mask, torch.nan)

    @property
    def policy(self) -> torch.Tensor:
        return self.log_probs(self.logits)

    @property
    def reference(self) -> torch.Tensor:
        return self.log_probs(self.reference_logits)

    @property
    def probability(self) -> torch.Tensor:
        """[31], with a gradient."""
        return self.policy.nansum(1).exp()

    @property
    def rewards(self) -> torch.Tensor:
        return token_rewards(self.scores, self.policy.detach(), self.reference, self.mask, coefficient=BETA)

    def objective(self) -> torch.Tensor:
        """J, as it is written."""
        kl = (self.probability * (self.probability.log() - self.reference.nansum(1))).sum()
        return (self.probability * self.scores).sum() - BETA * kl

    def true_gradient(self) -> torch.Tensor:
        return torch.autograd.grad(self.objective(), self.logits)[0]

    def surrogate_gradient(
        self, advantages: torch.Tensor, rows: torch.Tensor | None = None, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The expected gradient of PPO at its first step: that of -loss, each response weighted by its probability.

        The loss is linear in an advantage times a positive number, so that the weight can stand there.

        Args:
            advantages: [N, 4], as PPO would make them.
            rows: [N], which response each is; by default all 31 in their order.
            weight: [N], by default their probabilities.
        """
        rows = torch.arange(len(RESPONSES)) if rows is None else rows
        weight = self.probability.detach() if weight is None else weight
        log_probs = self.policy[rows]
        terms = policy_terms(log_probs, log_probs.detach(), weight[:, None] * advantages, self.mask[rows], clip=0.2)
        assert terms.clipped == 0 and terms.ratio_max == 1
        return torch.autograd.grad(-terms.loss, self.logits)[0]

    def exact_values(self) -> torch.Tensor:
        """[15]: what is still to come in the mean, from each beginning, worked out from the ends."""
        probability = self.logits.detach().softmax(-1)
        gain = BETA * (self.logits.detach().log_softmax(-1) - self.reference_logits.log_softmax(-1))
        values: dict[tuple[int, ...], float] = {}
        for beginning in sorted(BEGINNINGS, key=len, reverse=True):
            state, value = BEGINNINGS.index(beginning), 0.0
            for word in range(WORDS):
                longer = (*beginning, word)
                after = self.scores[RESPONSES.index(longer)] if longer in RESPONSES else values[longer]
                value += float(probability[state, word] * (after - gain[state, word]))
            values[beginning] = value
        return torch.tensor([values[beginning] for beginning in BEGINNINGS], dtype=torch.float64)


@pytest.fixture(params=range(5))
def world(request: pytest.FixtureRequest) -> World:
    generator = torch.Generator().manual_seed(request.param)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return World(normal(len(BEGINNINGS), WORDS).requires_grad_(), normal(len(BEGINNINGS), WORDS), normal(31))


def random_values(seed: int) -> torch.Tensor:
    return 3 * torch.randn(len(BEGINNINGS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(ours: torch.Tensor, true: torch.Tensor) -> float:
    """The largest difference of an entry."""
    return float((ours - true).abs().max())


def relative(ours: torch.Tensor, true: torch.Tensor) -> float:
    return float((ours - true).norm() / true.norm())


def test_the_responses_are_all_there_are(world: World) -> None:
    assert len(BEGINNINGS) == 15 and len(RESPONSES) == len(set(RESPONSES)) == 31
    assert sorted(set(world.mask.sum(1).tolist())) == [1, 2, 3, 4]
    assert world.probability.sum().item() == pytest.approx(1, abs=1e-14)


def test_the_rewards_of_a_response_add_up_to_what_is_maximised(world: World) -> None:
    mean = (world.probability * world.rewards.sum(1)).sum()
    assert mean.item() == pytest.approx(world.objective().item(), abs=1e-13)
    assert world.exact_values()[0].item() == pytest.approx(world.objective().item(), abs=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_with_lambda_one_any_critic_gives_the_true_gradient(world: World, seed: int) -> None:
    values = world.by_token(random_values(seed))
    advantages, _ = gae(world.rewards, values, world.mask, gamma=1.0, lam=1.0)
    assert distance(world.surrogate_gradient(advantages), world.true_gradient()) < EXACT


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_with_the_exact_critic_any_lambda_gives_the_true_gradient(world: World, lam: float) -> None:
    values = world.by_token(world.exact_values())
    advantages, _ = gae(world.rewards, values, world.mask, gamma=1.0, lam=lam)
    assert distance(world.surrogate_gradient(advantages), world.true_gradient()) < EXACT


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_with_a_wrong_critic_a_smaller_lambda_does_not(world: World, lam: float) -> None:
    """So it is the critic that the test above depends on."""
    values = world.by_token(random_values(0))
    advantages, _ = gae(world.rewards, values, world.mask, gamma=1.0, lam=lam)
    assert relative(world.surrogate_gradient(advantages), world.true_gradient()) > 0.01


def test_rewards_to_go_give_the_true_gradient(world: World) -> None:
    advantages = rewards_to_go(world.rewards, world.mask, gamma=1.0)
    assert distance(world.surrogate_gradient(advantages), world.true_gradient()) < EXACT


@pytest.mark.parametrize("group", [2, 3])
def test_rloo_gives_the_true_gradient(world: World, group: int) -> None:
    """Over all groups of independent responses: 961 pairs, 29,791 groups of three."""
    groups = torch.cartesian_prod(*[torch.arange(len(RESPONSES))] * group)
    rows = groups.reshape(-1)
    probability = world.probability.detach()[groups].prod(1)
    advantages = rloo(world.rewards.sum(1)[rows], group)[:, None].expand(-1, LONGEST)
    weight = probability.repeat_interleave(group) / group
    assert distance(world.surrogate_gradient(advantages, rows, weight), world.true_gradient()) < EXACT


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_the_critics_loss_rests_at_the_exact_values(world: World, lam: float) -> None:
    """What GAE calls returns has the exact values as its mean, once the critic is right."""
    table = world.exact_values()
    old = world.by_token(table)
    _, returns = gae(world.rewards, old, world.mask, gamma=1.0, lam=lam)
    trained = table.clone().requires_grad_()
    values = world.by_token(trained)
    expected_loss = sum(
        probability
        * value_terms(values[row : row + 1], old[row : row + 1], returns[row : row + 1], mask, clip=0.2).loss
        for row, (probability, mask) in enumerate(zip(world.probability.detach(), world.mask[:, None, :], strict=True))
    )
    (gradient,) = torch.autograd.grad(expected_loss, trained)
    assert distance(gradient, torch.zeros_like(gradient)) < EXACT


def test_with_k3_in_the_reward_the_gradient_is_another(world: World) -> None:
    """k3 has the same mean as k1, and still it is wrong by more than a tenth. No recipe has it."""
    policy, reference, mask = world.policy.detach(), world.reference, world.mask
    penalty = BETA * k3(policy, reference).masked_fill(~mask, 0)
    only_scores = token_rewards(world.scores, policy, policy, mask, coefficient=0.0)
    rewards = only_scores - penalty
    mean = (world.probability * rewards.sum(1)).sum()
    assert mean.item() == pytest.approx(world.objective().item(), abs=1e-13), "the same objective"

    advantages = rewards_to_go(rewards, mask, gamma=1.0)
    assert relative(world.surrogate_gradient(advantages), world.true_gradient()) > 0.1
