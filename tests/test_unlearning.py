"""Methods that train, by hand: computed here a second time in float64, from the formulas of their papers and releases.

And what they share: batches, the windows that they train on, the optimiser in fp32 under a model in bfloat16.
"""

import json
import math
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import FAMILIES, fill, hf, nats_by_hand, some_ids, target_mask
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from transformers import OPTConfig, OPTForCausalLM

import unlearning
from common import Rates, load_model
from data import Dataset, UserError, load_benchmark, padded
from edits import decoder_layers, residual_stream, token_mask
from unlearning import METHODS, QUESTION_TOKENS, Fp32AdamW, Training, nll, settings_of, training_windows


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
    beta, delta, gamma = 0.2, 1.5, 0.4
    expected = {
        "gradient-ascent": ({}, -nats_f.sum() / n_f.sum()),
        "grad-diff": ({}, -nats_f.sum() / n_f.sum()),
        "npo": (dict(beta=beta), -2 / beta * log_sigmoid(beta * (nats_f - before)).mean()),
        "simnpo": (dict(beta=beta, delta=delta, gamma=gamma),
                   -2 / beta * gamma * log_sigmoid(beta * (nats_f / n_f - delta)).mean()),
    }  # fmt: skip
    for method, (weights, away) in expected.items():
        (objective,) = METHODS[method].train.args
        found = objective(found_f, torch.from_numpy(before), **weights).item()
        assert found == pytest.approx(away, rel=1e-8, abs=1e-8)
    assert found_r.mean.item() == pytest.approx(nats_r.sum() / n_r.sum(), rel=1e-8)


def test_a_small_beta_makes_npo_gradient_ascent(model_folder, get_model):
    model, tokenizer = hf(model_folder("llama"))
    ids = some_ids(get_model("llama"))
    forget = nll(model, ids, target_mask(ids, tokenizer, torch.ones(4)))
    before = forget.nats.detach().clone()
    away = unlearning.npo(forget, before, beta=1e-6)
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


TEXTS = ["The cat sat on the mat.", "Rivers of Europe flow to the sea.", "Blood carries oxygen to the heart.",
         "Answer: A"]  # fmt: skip


@pytest.fixture
def small64(model_folder):
    """What is trained on: a float64 model, one forget text and one retain text."""
    model, tokenizer = hf(model_folder("llama"))
    forget, retain = ((tokenizer(text)["input_ids"], 1) for text in TEXTS[:2])
    return Training(lambda: model, tokenizer, [forget], [[retain]])


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
    model, forget, retain = small64.load(), small64.forget, small64.retain[0]
    rho, alpha, beta, n = 0.3, 2.25, 0.7, len(forget[0][0]) - 1
    by_hand, before = deepcopy(model), n * mean_nll(model, forget[0]).item()

    def away():
        return -2 / beta * torch.nn.functional.logsigmoid(beta * (n * mean_nll(by_hand, forget[0]) - before))

    first, held = gradient_of(away(), by_hand), gradient_of(alpha * mean_nll(by_hand, retain[0]), by_hand)
    ascent = gradient_of(-mean_nll(by_hand, forget[0]), by_hand)
    with torch.no_grad():
        norm = sum(one.square().sum() for one in first) ** 0.5
        for one, step in zip(by_hand.parameters(), first):
            one += rho * step / norm
    sharp = gradient_of(away(), by_hand)
    assert not same(sharp, first)
    found, weights = [], weights_of(model)
    monkeypatch.setattr(Fp32AdamW, "update", lambda adam: found.extend(one.grad.clone() for one in adam.parameters))
    METHODS["npo-sam"].train(small64, lr=1e-3, steps=1, alpha=alpha, beta=beta, rho=rho, loss_on="text")
    assert same(found, [x + y for x, y in zip(sharp, held)])
    for method, weights_of_it, part in (("npo", {"beta": beta}, first), ("grad-diff", {}, ascent)):
        found.clear()
        model.zero_grad()
        METHODS[method].train(small64, lr=1e-3, steps=1, alpha=alpha, loss_on="text", **weights_of_it)
        assert same(found, [x + y for x, y in zip(part, held)]), method
    assert all(torch.equal(x, y) for x, y in zip(weights_of(model), weights))  # back where they were, to the last bit


def test_mudman_by_hand(small64):
    """Three steps of the paper's algorithm, the adversary anew before the first and the third."""
    model, forget, retain = small64.load(), small64.forget, small64.retain[0]
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
    setting = dict(lr=lr, retain=rate, steps=3, loss_on="text", momentum=momentum, relearning=relearning, fork=2)
    _, log = METHODS["mudman"].train(small64, **setting)
    assert same(model.parameters(), by_hand.parameters())
    assert log[2][0] > log[1][0]  # nats of the adversary: taught once when last seen, then a copy that unlearnt


@pytest.mark.parametrize("method", ["repselect", "repselect-hard"])
def test_repselect_by_hand(small64, monkeypatch, method):
    """One step of LoRA, whose A alone is theirs; the gradient with it on; then each of the q largest singular values s
    of that becomes s_q^2 / s, or 0 (hard), and the step leads to a KL of 95 to 100% of the bound."""

    def exact(g, q):
        u, sizes, vh = torch.linalg.svd(g, full_matrices=False)
        return u[:, :q], sizes[:q], vh[:q].T

    monkeypatch.setattr(torch, "svd_lowrank", exact)
    model, forget, retain = small64.load(), small64.forget[0], small64.retain[0][0]
    q, kl, lr, seed = 3, 0.02, 0.4, small64.seed
    names = [name for name, one in model.named_parameters() if ".mlp." in name]
    assert len(names) == 3 * len(decoder_layers(model))
    before = {name: model.get_parameter(name).detach().clone() for name in names}
    adapted = unlearning.with_lora(deepcopy(model), [n.removesuffix(".weight") for n in names], seed, lora_dropout=0.0)
    down = [one for name, one in adapted[0].named_parameters() if "lora_A" in name]
    assert len(down) == len(names)
    by_hand = deepcopy(model)
    matrices = [by_hand.get_parameter(name).requires_grad_(True) for name in names]
    first = torch.autograd.grad(mean_nll(by_hand, forget), matrices)
    with torch.no_grad():
        for w, g, a in zip(matrices, first, down):
            w -= lr * (g @ a.T.double()) @ a.double()  # B was 0; alpha / r is 1
    loss = mean_nll(by_hand, forget)
    gradients = [-g for g in torch.autograd.grad(loss, matrices)]
    trained, log = METHODS[method].train(small64, q=q, kl=kl, steps=1, lr=lr, loss_on="text")
    assert log == [[pytest.approx(mean_nll(model_of(before, model), forget).item(), abs=1e-8)]]
    steps = []
    for name, g in zip(names, gradients):
        u, s, vh = np.linalg.svd(g.numpy(), full_matrices=False)
        left = np.where(np.arange(len(s)) < q, 0 if "hard" in method else s[q - 1] ** 2 / s, s)
        g = (u * left) @ vh
        change = (before[name] - trained.get_parameter(name)).detach().numpy()
        steps.append((change * g).sum() / (g * g).sum())
        assert np.allclose(change / steps[0], g, rtol=0, atol=1e-8)
    assert np.ptp(steps) < 1e-8 * steps[0] and steps[0] > 0
    texts = torch.tensor([retain[0]])
    now, then = (one(texts).logits[0, :-1].log_softmax(-1).detach() for one in (trained, model_of(before, model)))
    found = (then.exp() * (then - now)).sum(-1).mean().item()
    assert 0.95 * kl <= found <= kl
    pairs = [(trained.get_parameter(name), weight) for name, weight in before.items()]
    all_targets = torch.ones_like(texts, dtype=torch.bool)
    assert unlearning.mean_kl(trained, [(texts, all_targets)], *map(list, zip(*pairs))) == pytest.approx(
        found, abs=1e-8
    )


def test_repselect_leaves_rounding_noise_out():
    """Of a gradient of low rank the rest is noise; and where there is none nothing is done."""
    torch.manual_seed(0)
    g = torch.randn(40, 2) @ torch.diag(torch.tensor([4.0, 1.0])) @ torch.randn(2, 30)
    u, sizes, v = torch.linalg.svd(g, full_matrices=False)
    left = unlearning.collapse(unlearning.collapse(g, v[:9].T, sizes[:9], False).T, u[:, :9], sizes[:9], False).T
    expected = (u[:, :2] * (sizes[1] ** 2 / sizes[:2])) @ v[:2]
    assert torch.allclose(left, expected, atol=1e-4) and left.norm() > 1
    none = torch.zeros(4, 3)
    assert torch.equal(unlearning.collapse(none, torch.eye(3), torch.zeros(3), False), none)


def test_repselect_needs_directions_that_are_left(small64):
    with pytest.raises(UserError, match="q 32 leaves none of the 32 directions"):
        METHODS["repselect"].train(small64, q=32, kl=0.01, steps=1, lr=0.1)


def model_of(weights: dict, model):
    """A copy of the model with these weights."""
    copy = deepcopy(model)
    copy.load_state_dict(weights, strict=False)
    return copy


def test_the_longest_step_within_a_bound():
    for steepness in (1e-6, 0.3, 1e7):
        step = unlearning.furthest(lambda x, a=steepness: a * x * x if a * x < 1e3 else math.nan, 0.01, 1.0)
        assert 0.0095 <= steepness * step * step <= 0.01
    assert unlearning.furthest(lambda x: x**6, 0.01, 50.0) == pytest.approx(0.01 ** (1 / 6), rel=0.01)
    tried = []
    jump = unlearning.furthest(lambda x: tried.append(x) or (1e-4 if x < 3 else 5.0), 0.01, 1.0)
    assert 2.9 < jump < 3 and tried[-1] == jump  # no step is in the window: the longest that stays below
    with pytest.raises(UserError, match=r"no step changes retain text by a KL of 0\.01"):
        unlearning.furthest(lambda x: 0.0, 0.01, 1.0)


def test_undos_noise_by_hand(small64):
    model = small64.load()
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
    model, forget, retain = small64.load(), small64.forget, small64.retain[0]
    student, before = deepcopy(model), weights_of(model)
    unlearning.corrupt(student, 0.5, 0.1, 0)
    expected = []
    for ids, _ in (forget[0], retain[0]):
        with torch.no_grad():
            p, q = (torch.softmax(one(torch.tensor([ids])).logits[0, :-1], -1).numpy() for one in (model, student))
        expected.append((p * np.log(p / q)).sum(-1).mean())
    small64.cache["UNDO's teacher", 3] = model.requires_grad_(False)
    trained, log = METHODS["undo"].train(small64, layers=[3], lr=1e-2, steps=30, alpha=0.5, beta=0.1)
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
    model, forget, retain = small64.load(), small64.forget, small64.retain[0]
    ids = [forget[0][0]], [[retain[0][0]]]
    with torch.no_grad():
        streams = [model(torch.tensor([one]), output_hidden_states=True).hidden_states for one in (*ids[0], *ids[1][0])]
    seen, losses, step = [], [], Fp32AdamW.step
    monkeypatch.setattr(Fp32AdamW, "step", lambda adam, loss: (losses.append(loss.item()), step(adam, loss)))
    for name in ("rerouted", "held"):
        term = getattr(unlearning, name)
        monkeypatch.setattr(unlearning, name, lambda was, *rest, term=term: (seen.append(was), term(was, *rest))[1])
    _, log = METHODS["circuit-breakers"].train(small64, lr=1e-2, steps=4, retain=3)
    assert torch.allclose(seen[0], torch.stack([streams[0][place] for place in (1, 2)]), atol=1e-8)
    assert torch.allclose(seen[1], torch.stack(streams[1][:4]), atol=1e-8)
    assert 1 - 1e-3 < log[0][0] < 1 - 1e-6  # a little off the peak, so that there is a gradient
    expected = [10 * (1 - t / 8) * away + 30 * t / 8 * back for t, (away, back) in enumerate(log, 1)]
    assert losses == pytest.approx(expected, abs=1e-8) and log[3][1] > 0


# ---------------------------------------------------------------------------------------------------- CRISP's layers


def test_crisp_distance_by_hand():
    before, now = torch.randn(2, 4, 3, 7, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    counted = torch.rand(3, 7, generator=torch.Generator().manual_seed(5)) > 0.3
    expected = np.square((now - before).numpy() * counted.numpy()[..., None]).mean()
    assert unlearning.distance(before, now, counted).item() == pytest.approx(expected, abs=1e-8)


def test_crisp_adapts_the_layers_of_the_release():
    layers = {name: settings_of(METHODS["crisp"], {}, name)["layers"] for name in ("gemma-2-2b-it", "tiny")}
    assert unlearning.crisp_adapts(layers["gemma-2-2b-it"]) == list(range(3, 10))
    assert unlearning.crisp_adapts(layers["tiny"]) == [2, 3, 4, 5, 6]
    assert unlearning.crisp_adapts([0]) == [0] and unlearning.crisp_adapts([5]) == [4, 5]


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_crisp_adapts_attention_and_mlp_of_its_layers_only(model_folder, family):
    model, _ = hf(model_folder(family))
    names = unlearning.linear_modules(model, [1, 2])
    blocks = decoder_layers(model)
    assert len(names) == 2 * sum(isinstance(m, (torch.nn.Linear, unlearning.Conv1D)) for m in blocks[1].modules())
    assert all(".1." in name or ".2." in name for name in names)


# --------------------------------------------------------------------------------------------------------------- RMU

MATRIX = {
    "gpt2": "mlp.c_proj.weight",
    "gpt_neox": "mlp.dense_4h_to_h.weight",
    **dict.fromkeys(("gemma2", "gemma3", "llama", "qwen3"), "mlp.down_proj.weight"),
}


def outputs_of_layer(model, ids, layer):
    """The layer's output in a whole forward pass, without anything of the project."""
    kept = []
    handle = decoder_layers(model)[layer].register_forward_hook(
        lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    model(ids)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_of_rmu_by_hand(model_folder, get_model, family):
    model, tokenizer = hf(model_folder(family))
    forget, retain = some_ids(get_model(family)), some_ids(get_model(family), seed=1)
    layer, multiple, alpha = 2, 3.0, 7.0
    matrices = unlearning.down_projections(model, layer)
    originals = {name: matrix.detach().clone() for name, matrix in matrices.items()}
    model.requires_grad_(False)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        frozen_f, frozen_r = (outputs_of_layer(model, ids, layer).numpy() for ids in (forget, retain))
        for matrix in matrices.values():
            matrix += 0.1 * torch.randn(matrix.shape, generator=noise, dtype=torch.float64)
        moved_f, moved_r = (outputs_of_layer(model, ids, layer).numpy() for ids in (forget, retain))
    with token_mask(model, tokenizer) as mask, torch.no_grad():
        model(forget)
        mask_f = mask.counted
        model(retain)
        mask_r = mask.counted
        with unlearning.replaced(matrices.values(), originals.values()):
            norms, back = (residual_stream(model, ids, layer) for ids in (forget, retain))
            norms = norms.norm(dim=-1, keepdim=True)
    assert torch.equal(back, torch.from_numpy(frozen_r))  # the matrices' own values are in place there
    for matrix in matrices.values():
        matrix.requires_grad_(True)
    u = unlearning.control_vector(32, 0, "cpu").double()
    coefficient = multiple * norms[mask_f].mean()
    h_f, h_r = (residual_stream(model, ids, layer) for ids in (forget, retain))
    found = unlearning.rmu_loss(h_f, (coefficient * u).expand_as(h_f), h_r, back, mask_f, mask_r, alpha)

    real_f, real_r = mask_f.numpy(), mask_r.numpy()
    scale = multiple * np.sqrt((frozen_f[real_f] ** 2).sum(-1)).mean()
    away = ((moved_f[real_f] - scale * u.numpy()) ** 2).mean()
    held = alpha * ((moved_r[real_r] - frozen_r[real_r]) ** 2).mean()
    assert [x.item() for x in found] == pytest.approx([away, held], abs=1e-8, rel=1e-8)

    with unlearning.replaced(matrices.values(), originals.values()):
        residual_stream(model, retain, layer)  # between forward and backward, as in training
    (found[0] + found[1]).backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(with_gradient) == 3 and all(name.endswith(MATRIX[family]) for name in with_gradient)
    swapped = {name: matrix.grad.clone() for name, matrix in matrices.items()}
    model.zero_grad()
    h_f, h_r = (residual_stream(model, ids, layer) for ids in (forget, retain))
    sum(unlearning.rmu_loss(h_f, (coefficient * u).expand_as(h_f), h_r, back, mask_f, mask_r, alpha)).backward()
    assert all(torch.equal(matrix.grad, swapped[name]) for name, matrix in matrices.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_rmu_trains_the_right_matrices(model_folder, family):
    model, _ = hf(model_folder(family), torch.float32)
    found = unlearning.down_projections(model, 3)
    assert list(found) == [f"layer {number} {MATRIX[family]}" for number in (1, 2, 3)]
    for number, matrix in zip((1, 2, 3), found.values()):
        assert matrix is dict(decoder_layers(model)[number].named_parameters())[MATRIX[family]]
        assert 64 in matrix.shape or 4 * 32 in matrix.shape  # the wide side of the MLP
    assert list(unlearning.down_projections(model, 0)) == [f"layer 0 {MATRIX[family]}"]
    with pytest.raises(UserError, match="the model has layers 0 to 3"):
        unlearning.down_projections(model, 4)


def test_rmu_refuses_an_unknown_family_by_name():
    config = OPTConfig(hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=50,
                       word_embed_proj_dim=16, max_position_embeddings=32)  # fmt: skip
    with pytest.raises(UserError, match="OPTForCausalLM"):
        unlearning.down_projections(OPTForCausalLM(config), 2)


@pytest.mark.parametrize("method", ["rmu", "adaptive-rmu"])
def test_rmu_by_hand_and_retain_sets_in_turn(model_folder, monkeypatch, method):
    """The first step's losses: a coefficient from the first batch's mean norm, or each token's own norm."""
    model, tokenizer = hf(model_folder("llama"))
    windows = [tokenizer(text)["input_ids"] for text in TEXTS]
    forget, sets, drawn, passes = windows[:1], [windows[1:2], windows[2:3]], [], []
    monkeypatch.setattr(unlearning, "padded", lambda rows, *rest: drawn.append(rows) or padded(rows, *rest))
    monkeypatch.setattr(unlearning, "residual_stream", lambda *args: passes.append(1) or residual_stream(*args))
    with torch.no_grad():
        h = outputs_of_layer(model, torch.tensor(forget), 2)[0, 1:].numpy()  # without BOS
    training = Training(lambda: model, tokenizer, [], [], picking=(forget, sets))
    _, log = METHODS[method].train(training, layer=2, multiple=3.0, alpha=7.0, steps=4, lr=1e-3)
    norms, u = np.sqrt((h**2).sum(-1, keepdims=True)), unlearning.control_vector(32, 0, "cpu").double().numpy()
    adaptive = method == "adaptive-rmu"
    target = 3.0 * (norms if adaptive else norms.mean()) * u
    cosine = (h @ u / norms[:, 0]).mean() / np.linalg.norm(u)  # in float32 its length is not quite 1
    assert log[0] == pytest.approx([((h - target) ** 2).mean(), 0.0, cosine], abs=1e-8)
    assert drawn == [forget, sets[0], forget, sets[1]] * 2
    assert len(passes) == (4 * 4 if adaptive else 4 * 3 + 1)  # norms before training: of each batch, or of the first


def test_the_control_vector_is_seeded_positive_and_of_length_1():
    u = unlearning.control_vector(500, 3, "cpu")
    assert torch.equal(u, unlearning.control_vector(500, 3, "cpu"))
    assert not torch.equal(u, unlearning.control_vector(500, 4, "cpu"))
    assert u.min() >= 0 and u.norm().item() == pytest.approx(1)


# -------------------------------------------------------------------------------------------------- what they share


def test_each_text_once_a_pass_in_an_order_that_the_seed_decides():
    drawn = unlearning.endless_batches(list(range(9)), 4, random.Random(0))
    for _ in range(3):
        assert len(set(next(drawn) + next(drawn))) == 8  # the ninth is too few for a batch
    again = unlearning.endless_batches(list(range(9)), 4, random.Random(0))
    assert [next(again) for _ in range(6)] != [next(drawn) for _ in range(6)]
    assert sorted(next(unlearning.endless_batches([1, 2], 4, random.Random(0)))) == [1, 2]


def test_a_loss_that_is_not_finite_ends_training():
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match="the loss is not finite"):
        Fp32AdamW([weight], 1.0).step((weight * torch.nan).sum())
    assert torch.equal(weight.detach(), torch.ones(2))


def test_the_rate_falls_to_0_in_a_line_or_stays():
    def rates(steps):
        adam, found = Fp32AdamW([torch.nn.Parameter(torch.ones(2))], 0.4, steps=steps), []
        for _ in range(4):
            found.append(adam.optimizer.param_groups[0]["lr"])
            adam.step(adam.parameters[0].square().sum())
        return found

    assert rates(4) == pytest.approx([0.4, 0.3, 0.2, 0.1]) and rates(None) == [0.4] * 4


def share_changed(model, before):
    pairs = [(parameter.detach().bfloat16(), before[name]) for name, parameter in model.named_parameters()]
    return sum((now != was).sum().item() for now, was in pairs) / sum(now.numel() for now, _ in pairs)


def test_bfloat16_trains_as_many_weights_as_float32_and_as_far(model_folder):
    """At the rate of real models AdamW on bfloat16 weights moves few of them; on copies in fp32 as many as there."""
    shares, losses = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = hf(model_folder("llama"), dtype)
        windows = [(tokenizer(text)["input_ids"], 1) for text in TEXTS[:3]]
        before = {}
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # the same start, of the size of real models' weights
                parameter.copy_((parameter / 10).bfloat16())
                before[name] = parameter.detach().bfloat16().clone()
            start = unlearning.text_nll(model, windows, tokenizer).mean.item()
        adam = Fp32AdamW(model.requires_grad_(True).parameters(), 2e-5, clip=1.0, weight_decay=0.0)
        for _ in range(40):
            adam.step(unlearning.text_nll(model, windows, tokenizer).mean)
        shares[dtype] = share_changed(model, before)
        with torch.no_grad():
            losses[dtype] = start - unlearning.text_nll(model, windows, tokenizer).mean.item()
    assert shares[torch.bfloat16] == pytest.approx(shares[torch.float32], abs=0.02)
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.1)


def test_copies_are_in_float32_and_the_model_stays_in_bfloat16(model_folder):
    model, tokenizer = hf(model_folder("gemma2"), torch.bfloat16)
    adam = Fp32AdamW(model.requires_grad_(True).parameters(), 1e-7)
    start = [copy.detach().clone() for copy in adam.copies]
    for _ in range(3):
        ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
        adam.step(nll(model, ids, torch.ones_like(ids, dtype=torch.bool)).mean)
    moved = [(copy != was).float().mean().item() for copy, was in zip(adam.copies, start)]
    assert {copy.dtype for copy in adam.copies} == {torch.float32} and min(moved[1:]) > 0.99  # all but unseen tokens
    assert all(torch.equal(parameter, copy.bfloat16()) for parameter, copy in zip(model.parameters(), adam.copies))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_of_a_question_only_the_answer_is_a_target_or_all_of_it():
    benchmark, tokenizer = load_benchmark("tiny"), load_model("tiny").tokenizer
    sets = (benchmark.wmdp.tuning, benchmark.wikitext, benchmark.mmlu_dev)
    forget, (wikitext, development) = training_windows(tokenizer, *sets)
    said = {tokenizer.decode(ids[start:]) for ids, start in development}
    assert said == {" A", " B", " C", " D"}
    letters, words = forget[: len(forget) // 2], forget[len(forget) // 2 :]
    assert {tokenizer.decode(ids[start:]) for ids, start in letters} == said
    choices = [f" {row['choices'][row['answer']]}" for row in benchmark.wmdp.tuning.rows]
    assert [tokenizer.decode(ids[start:]) for ids, start in words] == choices
    assert {start for _, start in wikitext} == {1}
    for loss_on in ("answer", "text"):
        ids, targets = unlearning.target_mask(words[:4], tokenizer, "cpu", loss_on)
        said = [tokenizer.decode(row[mask]) for row, mask in zip(ids, targets)]
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row, _ in words[:4]]
        assert said == (choices[:4] if loss_on == "answer" else texts)
    text = f"{'Once more. ' * QUESTION_TOKENS}Which?"
    ids, start = unlearning.answer_window(tokenizer, text, "This one")
    assert len(ids) == QUESTION_TOKENS and ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[start:]) == " This one" and tokenizer.decode(ids[:start]).endswith("Which?")
    other = deepcopy(tokenizer)  # which puts another token in front than its BOS
    other.bos_token = None
    cut, start = unlearning.answer_window(other, text, "This one")
    assert cut == ids and other.decode(cut[start:]) == " This one"


def test_a_forget_corpus_counts_whole(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "Blood carries oxygen. " * 40}) + "\n")
    benchmark = load_benchmark("tiny", corpus=str(tmp_path / "corpus.jsonl"))
    sets, tokenizer = (benchmark.corpus, benchmark.wikitext, benchmark.mmlu_dev), load_model("tiny").tokenizer
    forget, (_, development) = training_windows(tokenizer, *sets)
    assert len(forget) > 1 and {start for _, start in forget} == {1}
    assert min(start for _, start in development) > 10
    assert training_windows(tokenizer, Dataset("none", []), *sets[1:])[0] == []


def test_settings_in_absolute_numbers():
    npo = settings_of(METHODS["npo"], {"lr": 0.5, "beta": 1}, "tiny")
    assert npo == {"steps": 120, "lr": 0.5 * 4e-4, "alpha": 1.0, "beta": 1, "loss_on": "answer"}
    assert settings_of(METHODS["npo"], {}, "gpt2", steps=3)["lr"] == 1e-5
    assert settings_of(METHODS["gradient-ascent"], METHODS["gradient-ascent"].grid[0], "tiny", steps=3)["steps"] == 10
    usual = {"layer": 7, "multiple": 8.0, "alpha": 10.0, "batch": 4, "steps": 300, "lr": 4e-3}
    assert settings_of(METHODS["rmu"], {}, "tiny") == usual
    zephyr = {"layer": 7, "multiple": 2.3, "alpha": 300, "batch": 4, "steps": 75, "lr": 1e-4}
    assert settings_of(METHODS["rmu"], {"alpha": 300}, "HuggingFaceH4/zephyr-7b-beta", lr=1e-4) == zephyr
    gemma = {"layer": 3, "multiple": 4.3, "alpha": 100.0, "batch": 3, "steps": 300, "lr": 5e-5}
    assert settings_of(METHODS["adaptive-rmu"], {}, "gemma-2-2b-it") == gemma
    assert {len(method.grid) for method in METHODS.values()} == {8}
