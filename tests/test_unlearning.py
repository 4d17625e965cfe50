"""The training objectives and their loops by hand.

All is computed here a second time in float64, from the formulas of the methods' papers and released code.
"""

from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import FAMILIES, fill, hf, nats_by_hand, some_ids, target_mask
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

import unlearning
from common import Rates
from data import UserError
from edits import decoder_layers
from training import Master, nll


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_losses_by_hand(model_folder, get_model, family):
    model, tokenizer = hf(model_folder(family))
    forget, retain = some_ids(get_model(family)), some_ids(get_model(family), seed=1)
    answers, whole = (target_mask(ids, tokenizer, torch.tensor(starts))
                      for ids, starts in ((forget, [1, 15, 22, 23]), (retain, [1, 1, 1, 1])))  # fmt: skip
    (nats_f, n_f), (nats_r, n_r) = (nats_by_hand(model, *pair) for pair in ((forget, answers), (retain, whole)))
    assert n_f[3] == 1
    before = nats_f - np.array([3.0, -2.0, 0.5, 0.0])
    found_f, found_r = nll(model, forget, answers), nll(model, retain, whole)
    alpha, beta, delta, gamma = 3.0, 0.2, 1.5, 0.4
    expected = {
        "gradient-ascent": ({}, -nats_f.sum() / n_f.sum(), 0.0),
        "grad-diff": (dict(alpha=alpha), -nats_f.sum() / n_f.sum(), alpha * nats_r.sum() / n_r.sum()),
        "npo": (dict(alpha=alpha, beta=beta), -2 / beta * log_sigmoid(beta * (nats_f - before)).mean(),
                alpha * nats_r.sum() / n_r.sum()),
        "simnpo": (dict(alpha=alpha, beta=beta, delta=delta, gamma=gamma),
                   -2 / beta * gamma * log_sigmoid(beta * (nats_f / n_f - delta)).mean(),
                   alpha * nats_r.sum() / n_r.sum()),
    }  # fmt: skip
    expected["npo-sam"] = expected["npo"]
    assert set(expected) == set(unlearning.LOSSES)
    for method, (weights, away, back) in expected.items():
        parts = unlearning.LOSSES[method](found_f, found_r, torch.from_numpy(before), **weights)
        assert [float(part.detach()) for part in parts] == pytest.approx([away, back], rel=1e-8, abs=1e-8)


def test_a_small_beta_makes_npo_gradient_ascent(model_folder, get_model):
    model, tokenizer = hf(model_folder("llama"))
    ids = some_ids(get_model("llama"))
    forget = nll(model, ids, target_mask(ids, tokenizer, torch.ones(4)))
    before = forget.nats.detach().clone()
    away, _ = unlearning.npo(forget, forget, before, beta=1e-6)
    matrix = decoder_layers(model)[1].mlp.down_proj.weight
    found, wanted = (torch.autograd.grad(loss, matrix, retain_graph=True)[0]
                     for loss in (away, -forget.nats.mean()))  # fmt: skip
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-12)


def rates(fires, total, n):
    return Rates(torch.tensor(fires), torch.tensor(total, dtype=torch.float64), n)


def test_crisp_picks_what_is_frequent_and_strong_on_forget_text():
    forget = rates([50, 40, 30, 90, 0], [100.0, 10.0, 90.0, 400.0, 0.0], 100)
    retain = rates([10, 10, 10, 980, 0], [50.0, 90.0, 10.0, 900.0, 0.0], 1000)
    # 0: strength 100 / (5 + 1); 1: 10 / (9 + 1), too weak; 2: 90 / (1 + 1); 3: more often on retain text; 4: never
    assert unlearning.salient(forget, retain, 5) == [0, 2, 3]  # 3: its strength is 400 / (90 + 1)
    assert unlearning.salient(forget, retain, 1) == [0]
    # ten that are more frequent, and too weak, stand before the eleventh: a release of k = 1 finds none
    forget = rates([50] * 10 + [40], [1.0] * 10 + [99.0], 100)
    retain = rates([0] * 11, [1.0] * 10 + [0.0], 100)
    assert unlearning.salient(forget, retain, 1) == [] and unlearning.salient(forget, retain, 2) == [10]


@pytest.fixture
def sae64():
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=32, d_sae=64, dtype="float64"))
    fill(sae, 1.0, 0)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("pull", [0.0, 5.0])
def test_crisp_forgetting_term_by_hand(sae64, pull):
    """The release: JumpReLU(pre + |lambda mean(pre over all features)|) where active before, the mean of positives."""
    noise = torch.Generator().manual_seed(3)
    features, was, now = [1, 4, 9, 30], *torch.randn(2, 3, 7, 32, generator=noise, dtype=torch.float64)
    ordinary = torch.ones(3, 7, dtype=torch.bool)
    ordinary[:, 0], ordinary[1, 5:] = False, False

    def pre_of(h):
        x = h.numpy() - sae64.b_dec.numpy() * sae64.cfg.apply_b_dec_to_input
        return x @ sae64.W_enc.numpy() + sae64.b_enc.numpy()

    before, pre = pre_of(was)[..., features], pre_of(now)
    shift = np.abs(pull * pre.mean(-1, keepdims=True))
    threshold = sae64.threshold.numpy()[features]
    moved = pre[..., features] + shift * (before > np.maximum(threshold, 0))
    acts = np.maximum(moved, 0) * (moved > threshold) * ordinary.numpy()[..., None]
    found = unlearning.crisp_forget(sae64, features, was, now, ordinary, pull)
    assert found.item() == pytest.approx(acts[acts > 0].mean(), abs=1e-8)
    silent = unlearning.crisp_forget(sae64, features, was, now, torch.zeros_like(ordinary), pull)
    assert silent == 0  # and never below: a feature that is off is let alone


@pytest.mark.parametrize("family", FAMILIES)
def test_crisp_reads_behind_a_layer_and_behind_the_final_norm(model_folder, get_model, family):
    model, _ = hf(model_folder(family), torch.float32)
    kept, ids = {}, some_ids(get_model(family))
    for layer, block in enumerate(decoder_layers(model)[:3]):
        block.register_forward_hook(
            lambda module, args, out, layer=layer: kept.update({layer: out[0] if isinstance(out, tuple) else out})
        )
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: kept.update(end=args[0]))
    found = model(ids, use_cache=False, output_hidden_states=True).hidden_states
    assert all(torch.equal(found[layer + 1], kept[layer]) for layer in range(3))
    assert torch.equal(found[-1], kept["end"])


def test_crisp_refuses_other_saes(gemma, make_sae):
    with pytest.raises(UserError, match="standard or JumpReLU"):
        h = torch.zeros(1, 1, 32)
        unlearning.crisp_forget(make_sae(gemma, "topk"), [0], h, h, torch.ones(1, 1, dtype=torch.bool), 5.0)


TEXTS = ["The cat sat on the mat.", "Rivers of Europe flow to the sea."]


@pytest.fixture
def small64(model_folder):
    """A float64 model, its tokenizer, a forget and a retain window, and a retain set of it."""
    model, tokenizer = hf(model_folder("llama"))
    forget, retain = ((tokenizer(text)["input_ids"], 1) for text in TEXTS)
    return model, tokenizer, [forget], [[retain]]


def mean_nll(model, window):
    return torch.nn.functional.cross_entropy(
        model(torch.tensor([window[0]])).logits[0, :-1], torch.tensor(window[0][1:])
    )


def weights_of(model):
    return [one.detach().clone() for one in model.parameters()]


def gradient_of(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def same(found, expected):
    return all(torch.allclose(x, y, rtol=0, atol=1e-8) for x, y in zip(found, expected, strict=True))


def test_sharpness_aware_npo_by_hand(small64, monkeypatch):
    """A gradient of the forget part rho along that part's own, one of the retain part where the model is."""
    model, tokenizer, forget, (retain,) = small64
    rho, alpha, beta, n = 0.3, 2.25, 0.7, len(forget[0][0]) - 1
    by_hand, before = deepcopy(model), n * mean_nll(model, forget[0]).item()

    def away():
        return -2 / beta * torch.nn.functional.logsigmoid(beta * (n * mean_nll(by_hand, forget[0]) - before))

    first, held = gradient_of(away(), by_hand), gradient_of(alpha * mean_nll(by_hand, retain[0]), by_hand)
    with torch.no_grad():
        norm = sum(one.square().sum() for one in first) ** 0.5
        for one, step in zip(by_hand.parameters(), first):
            one += rho * step / norm
    sharp = gradient_of(away(), by_hand)
    assert not same(sharp, first)
    found, weights = [], weights_of(model)
    monkeypatch.setattr(Master, "update", lambda master: found.extend(one.grad.clone() for one in master.parameters))
    setting = dict(lr=1e-3, steps=1, alpha=alpha, beta=beta, rho=rho, loss_on="text")
    unlearning.by_nll("npo-sam", setting, model, tokenizer, forget, [retain], 0)
    assert same(found, [x + y for x, y in zip(sharp, held)])
    assert all(torch.equal(x, y) for x, y in zip(weights_of(model), weights))  # back where they were, to the last bit


def test_mudman_by_hand(small64):
    """Three steps of the paper's algorithm, the adversary anew before the first and the third."""
    model, tokenizer, forget, (retain,) = small64
    lr, rate, momentum, relearning = 0.05, 0.02, 0.8, 0.03
    by_hand, adversary, kept = deepcopy(model), None, None
    for number in range(3):
        if number % 2 == 0:
            adversary = deepcopy(by_hand)
        back = gradient_of(mean_nll(by_hand, retain[0]), by_hand)
        kept = [(1 - momentum) * new + (momentum * kept[i] if kept else 0) for i, new in enumerate(back)]
        away = gradient_of(-mean_nll(adversary, forget[0]), adversary)
        norm = sum(one.square().sum() for one in away) ** 0.5
        with torch.no_grad():
            for w, v, r, g in zip(by_hand.parameters(), adversary.parameters(), kept, away):
                w -= rate * r
                w -= lr / norm * torch.where(r * g > 0, g, 0)
                v += relearning * g
    setting = dict(lr=lr, retain=rate, steps=3)
    log = unlearning.by_mudman(setting, model, tokenizer, forget, [retain], 0, momentum, relearning, fork=2)
    assert same(model.parameters(), by_hand.parameters())
    assert log[2][0] > log[1][0]  # nats of the adversary: taught once when last seen, then a copy that unlearnt


def test_a_masked_step_disturbs_no_retain_weight():
    away, back = (torch.randn(2, 50, generator=torch.Generator().manual_seed(6), dtype=torch.float64)).unbind()
    found = unlearning.undisrupting(away, back)
    assert torch.equal(found != 0, away * back > 0) and torch.equal(found[found != 0], away[found != 0])


def test_undos_noise_by_hand(small64):
    model, *_ = small64
    alpha, beta, before = 0.3, 0.2, weights_of(model)
    unlearning.corrupt(model, alpha, beta, 5)
    torch.manual_seed(5)
    for was, now in zip(before, model.parameters()):
        noise = torch.zeros_like(was)
        if was.ndim == 2:
            noise = torch.empty_like(was).uniform_(-1, 1) * (6 / sum(was.shape)) ** 0.5  # Xavier's bound
        assert torch.allclose(now, 0.7 * was + 0.06 * noise, rtol=0, atol=1e-8)


def test_undo_distils_what_the_unlearned_model_says(small64):
    """Forward KL by hand, at the first step that of the noised copy; the unlearned model itself stays as it is."""
    model, tokenizer, forget, (retain,) = small64
    student, before = deepcopy(model), weights_of(model)
    unlearning.corrupt(student, 0.5, 0.1, 0)
    expected = []
    for ids, _ in (forget[0], retain[0]):
        with torch.no_grad():
            p, q = (torch.softmax(one(torch.tensor([ids])).logits[0, :-1], -1).numpy() for one in (model, student))
        expected.append((p * np.log(p / q)).sum(-1).mean())
    setting = dict(lr=1e-2, steps=30, alpha=0.5, beta=0.1)
    trained, log = unlearning.by_undo(setting, model, tokenizer, forget, [retain], 0)
    assert log[0] == pytest.approx(expected, abs=1e-8)
    assert sum(log[-1]) < 0.3 * sum(log[0])
    assert all(torch.equal(x, y) for x, y in zip(weights_of(model), before))
    assert not same(trained.parameters(), before)


def test_circuit_breakers_by_hand():
    was, now = torch.randn(2, 3, 4, 7, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    now = now + 0.3 * was
    ordinary = torch.rand(4, 7, generator=torch.Generator().manual_seed(5)) > 0.3
    x, y, real = was.numpy(), now.numpy(), ordinary.numpy()
    cosine = (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    assert cosine.min() < 0 < cosine.max()
    assert unlearning.rerouted(was, now, ordinary).item() == pytest.approx(
        np.maximum(cosine, 0)[:, real].mean(), abs=1e-8
    )
    distance = np.sqrt(((x - y) ** 2).sum(-1))[:, real].mean()
    assert unlearning.held(was, now, ordinary).item() == pytest.approx(distance, abs=1e-8)


def test_circuit_breakers_read_two_layers_and_their_weights_move_in_a_line(small64, monkeypatch):
    """Of a model of 4 layers what enters layers 1 and 2, and the retain text's embeddings and layers up to there."""
    assert list(map(unlearning.broken_layers, (32, 20, 26))) == [[10, 20], [6, 12], [8, 16]]
    model, tokenizer, forget, (retain,) = small64
    ids = [forget[0][0]], [[retain[0][0]]]
    with torch.no_grad():
        streams = [model(torch.tensor([one]), output_hidden_states=True).hidden_states for one in (*ids[0], *ids[1][0])]
    seen, losses, step = [], [], Master.step
    monkeypatch.setattr(Master, "step", lambda master, loss: (losses.append(loss.item()), step(master, loss)))
    for name in ("rerouted", "held"):
        term = getattr(unlearning, name)
        monkeypatch.setattr(unlearning, name, lambda was, *rest, term=term: (seen.append(was), term(was, *rest))[1])
    setting = dict(lr=1e-2, steps=4, retain=3)
    _, log = unlearning.by_circuit_breakers(setting, model, tokenizer, *ids, 0)
    assert torch.allclose(seen[0], torch.stack([streams[0][place] for place in (1, 2)]), atol=1e-8)
    assert torch.allclose(seen[1], torch.stack(streams[1][:4]), atol=1e-8)
    assert 1 - 1e-3 < log[0][0] < 1 - 1e-6  # a little off the peak, so that there is a gradient
    expected = [10 * (1 - t / 8) * away + 30 * t / 8 * back for t, (away, back) in enumerate(log, 1)]
    assert losses == pytest.approx(expected, abs=1e-8) and log[3][1] > 0
