"""The CPU loss head against autograd in double precision, and against TRL's own head."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig
from trl.trainer.utils import add_fused_lm_head

from gemma_tune.train import loss_head
from gemma_tune.train.loss_head import FrozenHeadLogProbs, head_is_frozen, use_frozen_head


def reference(hidden, weight, labels, softcap):
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("softcap", [None, 30.0, 2.0])
@pytest.mark.parametrize("tile_rows", [1, 3, 1000])
def test_log_probs_entropy_and_gradient_are_those_of_autograd(softcap, tile_rows, monkeypatch):
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=torch.float64)
    weight, labels = torch.randn(50, 16, dtype=torch.float64), torch.randint(0, 50, (7,))
    per_token = torch.randn(7)
    monkeypatch.setattr(loss_head, "TILE_BYTES", tile_rows * 4 * 50)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    log_probs, entropy, is_top1, mean_logits = FrozenHeadLogProbs.apply(ours, weight, labels, softcap)
    expected = reference(theirs, weight, labels, softcap)
    own = expected.gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), own, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=1e-5)
    assert is_top1.tolist() == (expected.argmax(-1) == labels).tolist()
    logits = hidden.double() @ weight.double().T
    capped = logits if softcap is None else softcap * (logits / softcap).tanh()
    torch.testing.assert_close(mean_logits.double(), capped.mean(-1), atol=1e-5, rtol=1e-5)
    (log_probs * per_token).sum().backward()
    (own * per_token.double()).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 30.0, 2.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("tile_rows", [2, 1000])
def test_at_a_temperature_and_with_the_gradient_of_the_entropy(softcap, temperature, tile_rows, monkeypatch):
    """In fp64, but for the logits: log-probabilities and entropies are fp32, and so is what hangs on them."""
    torch.manual_seed(0)
    hidden = torch.randn(7, 16, dtype=torch.float64)
    weight, labels = torch.randn(50, 16, dtype=torch.float64), torch.randint(0, 50, (7,))
    of_log_probs, of_entropy = torch.randn(7), torch.randn(7)
    monkeypatch.setattr(loss_head, "TILE_BYTES", tile_rows * 4 * 50)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    log_probs, entropy, is_top1, mean_logits = FrozenHeadLogProbs.apply(
        ours, weight, labels, softcap, temperature, True
    )
    capped = theirs @ weight.T if softcap is None else softcap * (theirs @ weight.T / softcap).tanh()
    expected = (capped / temperature).log_softmax(-1)
    own, spent = expected.gather(-1, labels[:, None])[:, 0], -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(log_probs.double(), own, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy.double(), spent, atol=1e-5, rtol=1e-6)
    assert is_top1.tolist() == (capped.argmax(-1) == labels).tolist()
    torch.testing.assert_close(mean_logits.double(), capped.mean(-1), atol=1e-5, rtol=1e-5)
    for mine, plain in (
        ((log_probs * of_log_probs).sum(), (own * of_log_probs).sum()),
        ((entropy * of_entropy).sum(), (spent * of_entropy).sum()),
        ((log_probs * of_log_probs + entropy * of_entropy).sum(), (own * of_log_probs + spent * of_entropy).sum()),
    ):
        [found] = torch.autograd.grad(mine, ours, retain_graph=True)
        [exact] = torch.autograd.grad(plain, theirs, retain_graph=True)
        torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)
        assert exact.abs().max() > 1e-2


def test_without_being_asked_the_entropy_has_no_gradient():
    hidden = torch.randn(3, 8, requires_grad=True)
    scored = FrozenHeadLogProbs.apply(hidden, torch.randn(20, 8), torch.tensor([1, 2, 3]), None, 0.5)
    assert [tensor.requires_grad for tensor in scored] == [True, False, False, False]
    with torch.no_grad():
        scored = FrozenHeadLogProbs.apply(hidden, torch.randn(20, 8), torch.tensor([1, 2, 3]), None, 0.5, True)
    assert not any(tensor.requires_grad for tensor in scored)


@pytest.mark.parametrize(("softcap", "most"), [(None, 16), (30.0, 24)])
def test_the_gradient_of_a_well_predicted_token_is_not_rounded_away(softcap, most):
    torch.manual_seed(0)
    weight = (torch.randn(4000, 64) / 8).bfloat16()
    labels = torch.randint(0, 4000, (32,))
    near = torch.nn.functional.normalize(weight[labels].float(), dim=-1)
    hidden = (torch.linspace(4, most, 32)[:, None] * near + 0.3 * torch.randn(32, 64)).bfloat16()
    ours, theirs = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    log_probs, *_ = FrozenHeadLogProbs.apply(ours, weight, labels, softcap)
    log_probs.sum().backward()
    expected = reference(theirs, weight.double(), labels, softcap).gather(-1, labels[:, None])[:, 0]
    expected.sum().backward()
    assert 0.99 < expected.exp().max() < 1 and expected.exp().min() < 0.5
    error = (ours.grad.double() - theirs.grad).norm(dim=-1) / theirs.grad.norm(dim=-1)
    assert error.max() < 0.15, "each token's own gradient, in bf16"


def tiny(kind):
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2, "sliding_window": 8}
    torch.manual_seed(1)
    if kind == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**shape))
    else:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape))
    model.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_the_model_with_our_head_gives_trls_loss_and_gradient(kind):
    ids = torch.randint(3, 300, (2, 12))
    labels = ids.clone()
    labels[:, :5] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    seen = []
    for ours in (False, True):
        model = tiny(kind)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if ours:
            assert use_frozen_head(model)
        out = model(**batch, fused_lm_head=True)
        (-out.log_probs.sum() / out.label_mask.sum()).backward()
        seen.append((out, model.model.layers[0].mlp.up_proj.weight.grad))
    (theirs, their_grad), (mine, my_grad) = seen
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(my_grad, their_grad, atol=1e-6, rtol=1e-4)


def test_a_batch_without_trained_tokens_gives_a_zero_gradient_instead_of_an_error():
    model = tiny("gemma3")
    add_fused_lm_head(model)
    use_frozen_head(model)
    ids = torch.randint(3, 300, (1, 6))
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss.item() == 0
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() == 0


def test_a_trained_head_is_left_to_trl():
    model = tiny("gemma3")
    model.lm_head.weight.requires_grad_(True)
    before = model.forward
    assert not head_is_frozen(model)
    assert not use_frozen_head(model)
    assert model.forward == before


def test_generation_is_untouched():
    model = tiny("gemma3").eval()
    ids = torch.randint(3, 300, (1, 6))
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    add_fused_lm_head(model)
    use_frozen_head(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
