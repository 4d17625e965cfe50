"""What the methods' edits are made of: by hand, and read where they are put."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONFIG, D_SAE, QUESTIONS, fill, hf, ordinary_mask, residual, some_windows
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

import edits
import evaluation
from common import Rates, activation_ratio, load_model, load_sae
from data import Dataset, UserError, prompt
from evaluation import FeatureStats


def test_what_reads_the_stream_reads_it_where_it_is_edited(renamed):
    """DSG's gate, and the layers from which a direction is taken out, of an SAE of hook_resid_pre."""
    model = load_model("tiny")
    windows = [model.tokenizer(row["question"])["input_ids"] for row in QUESTIONS]
    later, straight = (
        FeatureStats(model, load_sae(folder, layer, model), layer, windows, [windows[::-1]], insist=False)
        for layer, folder in ((4, renamed), (3, None))
    )
    features = later.features(5, "ratio")
    later.features = straight.features = lambda n, rule=None: features
    assert later.gate(5) == straight.gate(5) > 0
    edit = edits.from_grid("diff-in-means", {"strength": 1, "behind": True}, later)
    assert list(edit.at) == edit.settings["layers"] == list(range(3, CONFIG["num_hidden_layers"]))
    assert list(edits.from_grid("clamp", {"n_features": 5}, later).at) == [3]


@pytest.fixture
def small(gemma, make_sae):
    """FeatureStats of random windows, two retain sets of another length, and all residual streams, by hand."""
    sae, sets = make_sae(gemma), [some_windows(gemma, seed) for seed in range(3)]
    sets[2] = sets[2][:4]
    streams = []
    for windows in sets:
        rows = [torch.tensor([window]) for window in windows]
        streams.append(
            [residual(gemma, ids)[ordinary_mask(gemma, ids) & (torch.arange(ids.shape[1]) > 0)] for ids in rows]
        )
    options = dict(batch_size=4, insist=False, refusal_latent=5, refusal_value=-50.0, clamp=-40.0)
    return FeatureStats(gemma, sae, 1, sets[0], sets[1:], **options), streams


def test_how_many_tokens_stand_behind_a_rate_is_said_and_too_few_are_refused(small, monkeypatch, capsys):
    stats, streams = small
    forget, *retain = (sum(map(len, rows)) for rows in streams)
    assert stats.rates[0].n_tokens == forget and max(retain) > min(retain)
    said = f"rates on {forget} forget tokens and on {retain[0]} and {retain[1]} retain tokens\n"
    assert said in capsys.readouterr().out and stats.rates[1].n_tokens == max(retain)
    monkeypatch.setattr(evaluation, "LEAST_TOKENS", min(retain) + 1)
    for insist in (True, False):
        again = FeatureStats(stats.model, stats.sae, 1, stats.forget, stats.retain, insist=insist)
        again.quality = {}
        if insist:
            with pytest.raises(UserError, match=f"too few tokens to pick .*: give {min(retain) + 1} of each"):
                _ = again.rates
        else:
            assert again.rates[0].n_tokens == forget
    with pytest.raises(UserError, match=f"{retain[0]} tokens .* too few to check the SAE on: give 10000"):
        monkeypatch.setattr(evaluation, "LEAST_TOKENS", 10_000)
        evaluation.check_sae_quality(stats.model, stats.sae, stats.retain[0])


def test_a_pick_that_is_none_is_said(small, capsys):
    """Features that are no more frequent on the forget set."""
    stats, _ = small
    fires = torch.tensor([95, 96, 50, 9, 3, 2] + [0] * (D_SAE - 6))
    rates = Rates(fires, fires.double(), 100)
    stats.rates = rates, rates
    assert stats.features(4) == [0, 1, 2, 3]
    note = "note: 4 of 4 features picked by ratio are no more frequent on forget tokens"
    assert note in capsys.readouterr().err
    stats.rates = rates, Rates(fires // 2, fires.double(), 100)
    stats.features(3)
    assert "no more frequent" not in capsys.readouterr().err


def test_edits_are_made_of_what_the_texts_say(small):
    stats, streams = small
    sae, (forget, *retain) = stats.sae, streams
    acts = [edits.Latents(sae, range(D_SAE)).encode(torch.cat(rows))[0].double() for rows in streams]

    def made(method, **setting):
        return edits.from_grid(method, setting, stats).settings

    features = stats.features(4)
    assert made("zero-ablation", n_features=4) == {"features": features, "clamp": 0.0, "layers": [1]}
    assert made("clamp", n_features=4) == {"features": features, "clamp": -40.0, "layers": [1]}  # by the usual clamp
    threshold = made("conditional-clamp", n_features=4, clamp=2, threshold=0.25)
    active = torch.stack([acts[0][:, i][acts[0][:, i] > 0].mean() for i in features]).mean()
    assert threshold["threshold"] == pytest.approx(0.25 * active.item(), rel=1e-5) and threshold["clamp"] == -80.0
    means = made("mean-ablation", n_features=4)["means"]
    total = [part.sum(0) for part in acts[1:]]  # of the retain sets the larger, at the first one's number of tokens
    grown = torch.maximum(total[0], total[1] * len(acts[1]) / len(acts[2])) / len(acts[1])
    assert means == pytest.approx(grown[features].tolist(), rel=1e-4)
    direction = torch.cat(forget).double().mean(0)
    direction -= torch.stack([torch.cat(part).double().mean(0) for part in retain]).mean(0)
    one = made("diff-in-means", strength=2, behind=False)
    assert one["direction"] == pytest.approx(direction.tolist(), rel=1e-4, abs=1e-5)
    assert (one["strength"], one["layers"]) == (2, [1])
    assert made("diff-in-means", behind=True)["layers"] == [1, 2, 3]
    refusal = made("refusal-clamp", n_features=4, refusal=0.5)
    assert (refusal["refusal"], refusal["refusal_value"], refusal["threshold"]) == (5, -25.0, 0.05)
    stats.refusal_latent = None
    with pytest.raises(UserError, match="refusal latent"):
        made("refusal-clamp", n_features=4)


def test_controls_of_few_features_are_the_first_of_those_of_many(small):
    stats, _ = small
    most, fewer = (edits.from_grid("random-features", {"n_features": n}, stats).settings["features"] for n in (20, 4))
    assert fewer == most[:4] == stats.control(4, 20) and not set(most) & set(stats.features(20))
    assert len(edits.from_grid("random-features", {"n_features": 25}, stats).settings["features"]) == 25


def test_every_point_of_every_grid_is_an_edit_with_a_label_of_its_own(small):
    stats, _ = small
    stats.features = lambda n, rule=None, clamp=None: list(range(10, 10 + n))  # the rule "dsg" leaves four
    for method, about in edits.METHODS.items():
        points = [setting for setting in about.grid if setting.get("n_features", 0) <= 50]
        made = [edits.from_grid(method, setting, stats) for setting in points]
        assert len({edits.label(edit.method, edit.settings) for edit in made}) == len(made), method
        assert bool(about.grid) == bool(about.resolve) and about.edit and not about.train


def test_a_gate_is_the_share_that_one_retain_text_in_twenty_exceeds(small):
    stats, (_, *retain) = small
    stats.features = lambda n, rule=None: [3, 17][:n]
    latents = edits.Latents(stats.sae, [3, 17])
    shares = [(latents.encode(h)[0] > 0).any(1).double().mean().item() for part in retain for h in part]
    assert stats.gate(2) == pytest.approx(np.quantile(shares, 0.95), abs=1e-6)


@pytest.fixture
def wide(model_folder):
    """A float64 model and a float64 SAE of its layer 1."""
    model, tokenizer = hf(model_folder("gemma2"))
    model.requires_grad_(False)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=32, d_sae=64, dtype="float64"))
    fill(sae, 3.0, 0)
    sae.hook_point = "blocks.1.hook_resid_post"
    bridge = SimpleNamespace(original_model=model, tokenizer=tokenizer, cfg=SimpleNamespace(device="cpu"))
    return bridge, sae.requires_grad_(False)


def stream_and_rest(model, tokenizer, ids, layer=1):
    """What the layer puts out, (pos, d_model), and a function from another to the next token's log-probabilities."""
    h = edits.residual_stream(model, ids, layer)[0]

    def rest(stream):
        with edits.applied(model, tokenizer, edits.Edit("", at={layer: lambda h, ordinary: stream[None]})):
            return model(ids).logits[0, -1].log_softmax(-1)

    return h, rest


def test_attribution_by_hand(wide):
    """Activations as the leaf of the graph, question by question."""
    bridge, sae = wide
    model, tokenizer = bridge.original_model, bridge.tokenizer
    total = torch.zeros(D_SAE, dtype=torch.float64)
    for question in QUESTIONS:
        ids = torch.tensor([tokenizer(prompt(question))["input_ids"]])
        h, rest = stream_and_rest(model, tokenizer, ids)
        acts = sae.encode(h).requires_grad_(True)
        (right,) = tokenizer(f" {'ABCD'[question['answer']]}", add_special_tokens=False)["input_ids"][-1:]
        (slope,) = torch.autograd.grad(rest(h + (acts - acts.detach()) @ sae.W_dec)[right], acts)
        total += (acts.detach() * slope)[1:].sum(0)  # without BOS
    found = evaluation.attribution(bridge, sae, Dataset("wmdp_bio", QUESTIONS), batch_size=2)
    assert (total > 0.01).sum() > 5 and (total < -0.01).sum() > 5
    assert found.tolist() == pytest.approx((total / len(QUESTIONS)).tolist(), rel=1e-4, abs=1e-6)


def test_output_scores_by_hand(wide):
    bridge, sae = wide
    model, tokenizer = bridge.original_model, bridge.tokenizer
    found = evaluation.output_scores(bridge, sae, "The cat sat on", top=3, factor=2.0)
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
    stats, _ = small
    with pytest.raises(UserError, match="needs questions"):
        stats.features(5, "attribution")
    score = torch.arange(D_SAE).double() - 40
    for name in ("attribution", "output_scores"):
        monkeypatch.setattr(evaluation, name, lambda *args: score)
    stats.questions = Dataset("wmdp_bio", QUESTIONS)
    fires, ratio = stats.rates[0].fires > 0, activation_ratio(*stats.rates)
    by_score = [i for i in range(63, 40, -1) if fires[i]]
    assert stats.features(5, "attribution") == by_score[:5]
    best = sorted((i for i in range(48, 64) if fires[i]), key=lambda i: -ratio[i])
    assert stats.features(3, "output-score") == best[:3]
    with pytest.raises(UserError, match="leaves only"):
        stats.features(60, "attribution")  # what hinders the right answer is not picked
    stats.rule = "attribution"
    assert not set(stats.control(5, 5)) & set(by_score[:5])


def test_each_thing_is_computed_once_and_the_sae_is_checked_first(small, monkeypatch):
    stats, _ = small
    calls = []
    for module, name in ((evaluation, "check_sae_quality"), (evaluation, "firing_rates"),
                         (evaluation, "residual_stream"), (edits, "iter_residual_stream")):  # fmt: skip
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, n=name, f=function, **named: calls.append(n) or f(*given, **named)
        )
    for _ in range(2):
        stats.features(4), stats.gate(2), stats.direction
    assert calls[0] == "check_sae_quality" and calls.count("firing_rates") == 3
    assert calls.count("iter_residual_stream") == 7  # of the check, the rates, and the means
    assert calls.count("residual_stream") == sum(-(-len(part) // 4) for part in stats.retain)  # of the gate
