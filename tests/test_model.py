"""GPT against Hugging Face's GPT-2, and the Gauss-Newton-Bartlett estimate against the exact
diagonal."""
import math
from dataclasses import replace

import hessian_estimates
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig, sample_labels, sample_next
from script import UserError

TINY = GPTConfig(vocab_size=65, block_size=16, n_layer=3, n_head=4, n_embd=32)


def build(config, seed=0):
    torch.manual_seed(seed)
    return GPT(config).eval()


@pytest.mark.parametrize("scaled", [False, True])
def test_logits_equal_those_of_hugging_faces_gpt2(scaled):
    config = replace(TINY, vocab_size=128, bias=True, scale_attn_by_inverse_layer_idx=scaled)
    model = build(config)
    for p in model.parameters():   # biases and norms start at trivial values
        torch.nn.init.normal_(p, std=0.3)
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=128, n_positions=16, n_embd=32, n_layer=3, n_head=4, bos_token_id=0,
        eos_token_id=0, scale_attn_by_inverse_layer_idx=scaled)).eval()
    state = model.state_dict()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            p.copy_(state[name].t() if transposed else state[name])
        idx = torch.randint(0, 128, (2, 16))
        wanted = theirs(idx).logits
        assert wanted.std() > 0.3
        torch.testing.assert_close(model(idx), wanted, atol=1e-4, rtol=0)


def full_logits(model, idx):
    """Logits (B, T, vocab_size), from a head without chunks."""
    return F.linear(model._hidden(idx), model.lm_head.weight)[..., :model.config.vocab_size]


def test_loss_and_gradients_equal_those_of_full_logits():
    model = build(TINY)
    idx, targets = torch.randint(0, 65, (2, 40, 16))
    gradients = []
    for loss in (lambda: model(idx, targets=targets),
                 lambda: F.cross_entropy(full_logits(model, idx).flatten(0, 1),
                                         targets.flatten())):
        model.zero_grad()
        value = loss()
        value.backward()
        gradients.append([value.detach(), *(p.grad for p in model.parameters())])
    for ours, wanted in zip(*gradients):
        torch.testing.assert_close(ours, wanted)
    per_token = model.token_losses(idx, targets)
    assert per_token.shape == targets.shape
    torch.testing.assert_close(per_token.mean(), gradients[1][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_loss_is_close_to_float32(dtype):
    model = build(TINY)
    idx, targets = torch.randint(0, 65, (2, 4, 16))
    wanted = model(idx, targets=targets)
    with torch.autocast("cpu", dtype):
        loss = model(idx, targets=targets)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - wanted) < 0.02
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_padded_classes_have_no_logits():
    model = build(TINY)
    assert model.lm_head.weight.shape[0] == 128
    assert model(torch.zeros(1, 4, dtype=int)).shape[-1] == 65
    assert GPTConfig().padded_vocab_size == 50304


def test_sampled_labels_are_real_classes_drawn_from_the_softmax():
    """The loss on sampled labels equals the loss on the labels that inverting the softmax's CDF in
    float64 gives for the same noise."""
    model = build(TINY)
    idx, noise = torch.randint(0, 65, (40, 16)), torch.rand(40, 16)
    noise[0, 0], noise[0, 1] = 0, 1 - 2**-24
    cdf = model(idx).double().softmax(-1).cumsum(-1).detach()
    labels = (cdf <= noise[..., None]).sum(-1).clamp(max=64)
    torch.testing.assert_close(model(idx, label_noise=noise), model(idx, targets=labels))


def test_sampled_labels_have_the_frequencies_of_the_softmax():
    """A chi-square test over 65 classes, summed over distributions of very different entropy."""
    torch.manual_seed(0)
    n, chi2, freedom = 20_000, 0.0, 0
    for scale in [0.1, 2.0, 6.0] * 10:
        probs = (torch.randn(65) * scale).softmax(0)
        labels = sample_labels(probs.expand(n, 65), torch.rand(n))
        counts = np.bincount(labels.numpy(), minlength=65)
        expected = probs.double().numpy() * n
        common = expected > 5   # rarer classes would distort the statistic
        chi2 += np.sum((counts[common] - expected[common]) ** 2 / expected[common])
        freedom += common.sum() - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_label_noise_at_a_boundary_never_gives_a_class_of_probability_zero():
    """Noise u gives the first class whose CDF exceeds u."""
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]]).expand(6, 6)
    noise = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.76, 1 - 2**-24])
    assert sample_labels(probs, noise).tolist() == [1, 1, 3, 3, 4, 4]


def exact_gauss_newton_diagonal(model, idx):
    """diag(mean over tokens of J^T (diag(p) - p p^T) J), by autograd. J is the Jacobian of the
    logits of one token."""
    params = list(model.parameters())
    logits = full_logits(model, idx).flatten(0, 1)
    diagonal = [torch.zeros_like(p) for p in params]
    for z in logits:
        p = z.detach().softmax(0)
        rows = [torch.autograd.grad(z_c, params, retain_graph=True) for z_c in z]
        for i in range(len(params)):
            jacobian = torch.stack([row[i] for row in rows])                # (classes, *shape)
            expectation = torch.tensordot(p, jacobian, 1)
            diagonal[i] += torch.tensordot(p, jacobian ** 2, 1) - expectation ** 2
    return torch.cat([d.flatten() for d in diagonal]) / len(logits)


def test_the_gauss_newton_bartlett_estimate_is_unbiased():
    """Over many draws, B times the squared gradient of the sampled-label loss averages to the exact
    Gauss-Newton diagonal: the z-scores of all coordinates are those of chance."""
    model = hessian_estimates.build().double()
    idx = torch.randint(0, 64, (2, 4))
    exact = exact_gauss_newton_diagonal(model, idx)
    draws, generator = 1000, torch.Generator().manual_seed(1)
    total = torch.zeros_like(exact)
    squares = torch.zeros_like(exact)
    for _ in range(draws):
        model.zero_grad()
        model(idx, label_noise=torch.rand(2, 4, generator=generator)).backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        estimate = idx.numel() * g * g
        total += estimate
        squares += estimate ** 2
    mean = total / draws
    error = ((squares / draws - mean ** 2) / draws).sqrt()
    used = exact > exact.max() * 1e-6
    z = ((mean - exact) / error)[used]
    assert used.sum() > 500 and (~used).sum() < exact.numel() / 2
    assert abs(mean.sum() / exact.sum() - 1) < 0.05
    assert z.abs().max() < 6 and abs(z.mean()) < 0.5 and 0.5 < z.std() < 1.5


def test_parameter_count_and_flops_of_the_three_sizes():
    for shape, millions in [(dict(), 124), (dict(n_layer=24, n_head=16, n_embd=1024), 354),
                            (dict(n_layer=36, n_head=20, n_embd=1280), 774)]:
        config = GPTConfig(**shape)
        with torch.device("meta"):
            model = GPT(config)
        count = sum(p.numel() for p in model.parameters())
        assert model.num_params() == count and abs(count / 1e6 - millions) < 1
        attention = 12 * config.n_layer * config.n_embd * 1024
        assert model.flops_per_token() == 6 * (count - 1024 * config.n_embd) + attention


def test_initialization_follows_gpt2():
    model = build(GPTConfig(vocab_size=1000, n_layer=8, n_head=4, n_embd=128, bias=True))
    for name, p in model.named_parameters():
        wanted = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
        if p.dim() == 2:
            assert abs(p.std() / wanted - 1) < 0.05, name
        else:
            assert (p == (1.0 if "ln" in name and name.endswith("weight") else 0.0)).all(), name


def test_dropout_is_active_only_in_training():
    model = GPT(replace(TINY, dropout=0.5))
    idx = torch.zeros(1, 8, dtype=int)
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_evaluation_and_generation_keep_off_cudnns_attention(monkeypatch):
    """They have many shapes, and cuDNN plans each. PyTorch's choice for training stays."""
    allowed, attention = [], F.scaled_dot_product_attention

    def recorded(*args, **settings):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    model, idx = GPT(TINY), torch.zeros(1, 8, dtype=int)
    model(idx, targets=idx).backward()
    model(idx, label_noise=torch.rand(1, 8)).backward()
    assert allowed == [True] * 2 * TINY.n_layer
    allowed.clear()
    with torch.no_grad():
        model.token_losses(idx, idx)
    model.generate(idx, 3)
    assert allowed == [False] * 4 * TINY.n_layer and torch.backends.cuda.cudnn_sdp_enabled()


def test_crop_block_size_does_not_change_the_logits():
    model = build(TINY)
    idx = torch.randint(0, 65, (2, 8))
    before = model(idx)
    model.crop_block_size(8)
    assert torch.equal(model(idx), before) and model.transformer.wpe.weight.shape[0] == 8
    with pytest.raises(UserError, match="block_size"):
        model.crop_block_size(9)


def test_greedy_generation_is_the_argmax_with_a_sliding_context():
    model = build(TINY)
    start = torch.randint(0, 65, (2, 3))
    out = model.generate(start, 30, temperature=0)
    idx = start
    for _ in range(30):
        logits = full_logits(model, idx[:, -16:])[:, -1]
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, idx)


def test_generation_repeats_with_its_seed_and_respects_top_k():
    model = build(TINY)
    start = torch.zeros(3, 1, dtype=int)
    draws = [model.generate(start, 12, generator=torch.Generator().manual_seed(s), top_k=5)
             for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    logits = full_logits(model, draws[0][:, :-1])
    fifth = logits.topk(5).values[..., -1]
    assert (logits.gather(2, draws[0][:, 1:, None])[..., 0] >= fifth).all()


def test_top_p_keeps_the_most_likely_tokens_that_sum_to_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[[2, 0, 3, 1]].expand(4000, 4)
    generator = torch.Generator().manual_seed(0)
    for p, wanted in (0.4, {1}), (0.7, {1, 3}), (0.9, {0, 1, 3}), (None, {0, 1, 2, 3}):
        tokens = sample_next(logits, 1.0, None, p, generator)
        assert set(tokens.tolist()) == wanted
    counts = torch.bincount(tokens, minlength=4) / 4000
    torch.testing.assert_close(counts, logits[0].exp(), atol=0.03, rtol=0)


def test_greedy_tokens_with_the_cache_are_the_argmax_of_one_pass_without_it():
    model = build(TINY)
    idx = torch.randint(0, 65, (2, 5))
    tokens = torch.stack(list(model.stream(idx, 11, temperature=0)), 1)
    again = torch.cat([idx, tokens], 1)
    assert torch.equal(model(again[:, :-1])[:, 4:].argmax(-1), tokens)


def test_generation_stops_at_end_of_text():
    model = build(TINY)
    start = torch.zeros(4, 1, dtype=int)
    generator = torch.Generator().manual_seed(0)
    out = model.generate(start, 2000, eot_id=64, generator=generator)
    assert out.shape[1] < 2000
    for row in out[:, 1:].tolist():
        first = row.index(64)
        assert all(token == 64 for token in row[first:])
