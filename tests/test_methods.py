"""What the methods' edits are made of: by hand, and read where they are put."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONFIG, D_SAE, QUESTIONS, fill, hf, ordinary_mask, residual, some_windows
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

import baselines
import edits
import methods
from common import activation_ratio, load_model, load_sae
from data import UserError, load_benchmark, prompt
from flags import settings


def test_what_reads_the_stream_reads_it_there_too(renamed, monkeypatch):
    """DSG's gate, CRISP's layers, and the layers from which a direction is taken out."""
    s, lm = settings(baselines.flags, dict(sae=renamed, layer=4, limit=6)), load_model("tiny")
    texts = load_benchmark(s)[0]
    texts["retain"] = [part[:200] for part in texts["retain"]]
    measured, straight = (
        methods.measure(lm, layer, load_sae(place, layer, lm), texts["forget"], texts["retain"], s.clamp, s)
        for layer, place in ((4, renamed), (3, None))
    )
    features = measured.features(50, "dsg")
    assert features == straight.features(50, "dsg")
    assert methods.gate_for(measured, 50, 1.0) == methods.gate_for(straight, 50, 1.0) > 0
    assert list(baselines.read_by_crisp(measured)[0]) == [3]
    edit = methods.edit_for("diff-in-means", {"strength": 1, "behind": True}, measured)
    assert list(edit.at) == list(range(3, CONFIG["num_hidden_layers"]))


@pytest.fixture
def small(gemma, make_sae):
    """Measured on random windows, two retain sets of another length, and all that it was measured on, by hand."""
    sae, sets = make_sae(gemma), [some_windows(gemma, seed) for seed in range(3)]
    sets[2] = sets[2][:4]
    s = SimpleNamespace(batch_size=4, pick="ratio", seed=0, no_sanity=True, refusal_latent=5, refusal_value=-50.0)
    streams = []
    for windows in sets:
        rows = [torch.tensor([window]) for window in windows]
        streams.append(
            [residual(gemma, ids)[ordinary_mask(gemma, ids) & (torch.arange(ids.shape[1]) > 0)] for ids in rows]
        )
    return methods.Measured(gemma, sae, 1, sets[0], sets[1:], -40.0, s), streams


def test_edits_are_made_of_what_the_texts_say(small, gemma):
    measured, streams = small
    sae, (forget, *retain) = measured.sae, streams
    acts = [edits.Latents(sae, range(D_SAE)).encode(torch.cat(rows))[0].double() for rows in streams]

    def made(method, **one):
        return methods.edit_for(method, one, measured)

    features = measured.features(4)
    threshold = made("conditional-clamp", n_features=4, clamp=2, threshold=0.25)
    active = torch.stack([acts[0][:, i][acts[0][:, i] > 0].mean() for i in features]).mean()
    assert threshold.arguments["threshold"] == pytest.approx(0.25 * active.item(), rel=1e-5)
    assert threshold.arguments["clamp"] == threshold.setting["clamp"] == -80.0
    means = made("mean-ablation", n_features=4).arguments["means"]
    total = [part.sum(0) for part in acts[1:]]  # of the retain sets the larger, at the first one's number of tokens
    grown = torch.maximum(total[0], total[1] * len(acts[1]) / len(acts[2])) / len(acts[1])
    assert means == pytest.approx(grown[features].tolist(), rel=1e-4)
    direction = torch.cat(forget).double().mean(0)
    direction -= torch.stack([torch.cat(part).double().mean(0) for part in retain]).mean(0)
    assert made("diff-in-means", strength=2, behind=False).arguments["direction"] == pytest.approx(
        direction.tolist(), rel=1e-4, abs=1e-5
    )
    behind = made("diff-in-means", strength=2, behind=True)
    assert list(behind.at) == [1, 2, 3] and behind.setting == {"layer": 1, "strength": 2, "behind": True}
    refusal = made("refusal-clamp", n_features=4, refusal=0.5).arguments
    assert (refusal["refusal"], refusal["refusal_value"], refusal["threshold"]) == (5, -25.0, 0.05)
    control = made("random-features", n_features=4, clamp=1).arguments["features"]
    assert len(control) == 4 and not set(control) & set(measured.features(20))


def test_a_gate_is_the_share_that_one_retain_text_in_twenty_exceeds(small, monkeypatch):
    measured, (_, *retain) = small
    monkeypatch.setattr(measured, "features", lambda n, rule=None: [3, 17][:n])
    latents = edits.Latents(measured.sae, [3, 17])
    shares = [(latents.encode(h)[0] > 0).any(1).double().mean().item() for part in retain for h in part]
    assert methods.gate_for(measured, 2) == pytest.approx(np.quantile(shares, 0.95), abs=1e-6)


@pytest.fixture
def wide(model_folder, monkeypatch):
    """Measured on a float64 model with a float64 SAE, whose picking half is conftest's questions."""
    model, tokenizer = hf(model_folder("gemma2"))
    model.requires_grad_(False)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=32, d_sae=64, dtype="float64"))
    fill(sae, 3.0, 0)
    sae.hook_point = "blocks.1.hook_resid_post"
    monkeypatch.setattr(methods, "load_rows", lambda *asked: (QUESTIONS, {}))
    s = SimpleNamespace(batch_size=2, pick="ratio", seed=0, pick_on="all", model="tiny", data=None)
    lm = SimpleNamespace(original_model=model, tokenizer=tokenizer, cfg=SimpleNamespace(device="cpu"))
    return methods.Measured(lm, sae.requires_grad_(False), 1, [], [], -1.0, s)


def stream_and_rest(model, tokenizer, ids, layer=1):
    """What the layer puts out, (pos, d_model), and a function from another to the next token's log-probabilities."""
    h = edits.hidden(model, ids, layer)[0]

    def rest(stream):
        with edits.applied(model, tokenizer, edits.Edit("", {layer: lambda h, ordinary: stream[None]})):
            return model(ids).logits[0, -1].log_softmax(-1)

    return h, rest


def test_attribution_by_hand(wide):
    """Activations as the leaf of the graph, question by question."""
    model, tokenizer, sae = wide.lm.original_model, wide.lm.tokenizer, wide.sae
    total = torch.zeros(D_SAE, dtype=torch.float64)
    for question in QUESTIONS:
        ids = torch.tensor([tokenizer(prompt(question))["input_ids"]])
        h, rest = stream_and_rest(model, tokenizer, ids)
        acts = sae.encode(h).requires_grad_(True)
        (right,) = tokenizer(f" {'ABCD'[question['answer']]}", add_special_tokens=False)["input_ids"][-1:]
        (slope,) = torch.autograd.grad(rest(h + (acts - acts.detach()) @ sae.W_dec)[right], acts)
        total += (acts.detach() * slope)[1:].sum(0)  # without BOS
    found = methods.attributions(wide)
    assert (total > 0.01).sum() > 5 and (total < -0.01).sum() > 5
    assert found.tolist() == pytest.approx((total / len(QUESTIONS)).tolist(), rel=1e-4, abs=1e-6)


def test_output_scores_by_hand(wide):
    model, tokenizer, sae = wide.lm.original_model, wide.lm.tokenizer, wide.sae
    found = methods.output_scores(wide, "The cat sat on", top=3, factor=2.0)
    h, rest = stream_and_rest(model, tokenizer, torch.tensor([tokenizer("The cat sat on")["input_ids"]]))
    step = 2.0 * sae.encode(h[-1]).max()
    for feature in range(D_SAE):
        moved = h.clone()
        moved[-1] += step * sae.W_dec[feature]
        says = rest(moved).exp()
        own = model.lm_head(model.model.norm(sae.W_dec[feature])).topk(3).indices.tolist()
        order = says.argsort(descending=True).tolist()
        rank = min(order.index(token) for token in own)
        assert found[feature].item() == pytest.approx((1 - rank / len(order)) * says[own].max().item(), rel=1e-5)


def test_rules_that_look_at_more_than_rates_are_asked_by_name(small, monkeypatch):
    measured, _ = small
    score = torch.arange(D_SAE).double() - 40
    monkeypatch.setattr(methods, "SCORES", dict.fromkeys(methods.SCORES, lambda m: score))
    fires, ratio = measured.rates[0].fires > 0, activation_ratio(*measured.rates)
    by_score = [i for i in range(63, 40, -1) if fires[i]]
    assert measured.features(5, "attribution") == by_score[:5]
    best = sorted((i for i in range(48, 64) if fires[i]), key=lambda i: -ratio[i])
    assert measured.features(3, "output-score") == best[:3]
    with pytest.raises(UserError, match="leaves only"):
        measured.features(60, "attribution")  # what hinders the right answer is not picked
    measured.s.pick = "attribution"
    assert not set(measured.control(5, 5)) & set(by_score[:5])
