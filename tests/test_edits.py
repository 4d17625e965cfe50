"""Edits at inference time: each formula by hand in float64, special tokens, gradients, and the hook."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import D_SAE, FAMILIES, HOOK, KINDS, NORMS, dead_features, ordinary_mask, residual, some_ids, write_sae
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from transformers import AutoModelForCausalLM

import common
import edits
import evaluation
import show
from common import ablate
from data import UserError, special_ids
from edits import Latents

CLAMP, THRESHOLD = -3.0, 0.8


@pytest.fixture(scope="module")
def small():
    """A JumpReLU SAE of 16 features on 8 dimensions in float64, of which about half fire."""
    noise = torch.Generator().manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=16, dtype="float64"))
    for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
        parameter = getattr(sae, name)
        values = torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
        parameter.data = values.abs() * 0.3 if name == "threshold" else values
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def h():
    return torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(scope="module")
def ordinary():
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[:, 0], mask[0, -2:] = False, False
    return mask


FEATURES = [2, 5, 11, 14]
MANY = list(range(0, D_SAE, 3))  # of conftest's SAEs


def activations(sae, h):
    """(3, 7, 16) by hand: x W_enc + b_enc where it exceeds the threshold."""
    x = h.numpy() - sae.b_dec.numpy() * sae.cfg.apply_b_dec_to_input
    pre = x @ sae.W_enc.numpy() + sae.b_enc.numpy()
    return pre * (pre > np.maximum(sae.threshold.numpy(), 0))


def by_hand(sae, h, ordinary, wanted):
    """h with the activations of FEATURES replaced by wanted(acts), (3, 7, 4)."""
    acts = activations(sae, h)[..., FEATURES]
    change = (wanted(acts) - acts) * ordinary.numpy()[..., None]
    return h.numpy() + change @ sae.W_dec.numpy()[FEATURES]


def gate(acts, ordinary):
    firing = (acts > 0).any(-1) & ordinary.numpy()
    return firing.sum(1) / ordinary.numpy().sum(1)


def test_every_edit_by_hand(small, h, ordinary):
    acts = activations(small, h)[..., FEATURES]
    assert 0.2 < (acts > 0).mean() < 0.8
    rho = gate(acts, ordinary)
    between = float(np.sort(rho)[1])  # the highest of three sequences is over it, the others are not
    means = [0.5, 0.1, 0.0, 2.0]
    any_active = (acts > 0).any(-1, keepdims=True)
    cases = [
        (edits.clamp(small, FEATURES, 0.0), lambda a: np.zeros_like(a)),
        (edits.clamp(small, FEATURES, CLAMP), lambda a: np.where(a > 0, CLAMP, a)),
        (edits.clamp(small, FEATURES, CLAMP, THRESHOLD), lambda a: np.where(a > THRESHOLD, CLAMP, a)),
        (edits.mean_ablation(small, FEATURES, means), lambda a: np.broadcast_to(means, a.shape)),
        (edits.dsg(small, FEATURES, CLAMP, between),
         lambda a: np.where(any_active & (rho > between)[:, None, None], CLAMP, a)),
    ]  # fmt: skip
    for edit, wanted in cases:
        found = edit(h, ordinary)
        assert found.dtype == h.dtype
        assert np.abs(found.numpy() - by_hand(small, h, ordinary, wanted)).max() < 1e-8
        assert torch.equal(found[~ordinary], h[~ordinary])
    assert (rho > between).sum() == 1


def test_the_gate_is_a_share_of_ordinary_tokens(small, h, ordinary):
    acts = activations(small, h)[..., FEATURES]
    assert np.allclose(edits.gate_of(torch.from_numpy(acts), ordinary).numpy(), gate(acts, ordinary), atol=1e-7)
    # a padded end changes nothing
    longer = torch.cat([torch.from_numpy(acts), torch.ones(3, 4, 4)], 1)
    mask = torch.cat([ordinary, torch.zeros(3, 4, dtype=torch.bool)], 1)
    assert torch.equal(edits.gate_of(longer, mask), edits.gate_of(torch.from_numpy(acts), ordinary))


def test_refusal_clamp_by_hand(small, h, ordinary):
    """As the authors' clamp_refusal: the refusal latent is set, the features that call for it are left as they are."""
    refusal = 7
    acts = activations(small, h)
    over = (acts[..., FEATURES] > THRESHOLD).any(-1) & ordinary.numpy()
    change = (-9.0 - acts[..., refusal]) * over
    expected = h.numpy() + change[..., None] * small.W_dec.numpy()[refusal]
    found = edits.refusal_clamp(small, FEATURES, THRESHOLD, refusal, -9.0)(h, ordinary)
    assert over.any() and not over.all() and np.abs(found.numpy() - expected).max() < 1e-8


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_diff_in_means_by_hand(h, ordinary, strength):
    direction = torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    u = direction.numpy() / np.linalg.norm(direction.numpy())
    expected = h.numpy() - strength * (h.numpy() @ u)[..., None] * u * ordinary.numpy()[..., None]
    found = edits.diff_in_means(None, direction.tolist(), strength)(h, ordinary)
    assert np.abs(found.numpy() - expected).max() < 1e-8
    if strength == 1.0:  # nothing is left along the direction
        assert np.abs(found.numpy() @ u)[ordinary.numpy()].max() < 1e-8


def test_reconstruction_as_an_edit_is_saelens_own(gemma, make_sae):
    sae, h = make_sae(gemma, "standard"), residual(gemma, some_ids(gemma))
    ordinary = some_ids(gemma) > 10
    found = edits.METHODS["sae-reconstruction"].edit(sae)(h, ordinary)
    assert torch.equal(found[~ordinary], h[~ordinary])
    torch.testing.assert_close(found[ordinary], sae(h)[ordinary])


def test_gradients_pass_through_every_edit(small, h, ordinary):
    for method, arguments in {
        "clamp": dict(features=FEATURES, clamp=CLAMP),
        "mean-ablation": dict(features=FEATURES, means=[0.1] * 4),
        "dsg": dict(features=FEATURES, clamp=CLAMP, gate=0.0),
        "diff-in-means": dict(direction=[1.0] * 8),
    }.items():
        x = h.clone().requires_grad_(True)
        edits.METHODS[method].edit(small, **arguments)(x, ordinary).square().sum().backward()
        assert torch.isfinite(x.grad).all() and not torch.equal(x.grad[ordinary], 2 * h[ordinary])
        assert torch.equal(x.grad[~ordinary], 2 * h[~ordinary])


def test_applied_is_ablate_on_every_family(model, make_sae):
    sae, ids = make_sae(model), some_ids(model)
    features = list(range(0, 64, 2))
    with torch.inference_mode():
        clean = model(ids)
        for clamp in (0.0, -2.0):
            edit = edits.ablation(sae, features, clamp)
            with common.ablate(model, sae, features, clamp):
                expected = model(ids)
            with edits.applied(model.original_model, model.tokenizer, edit):
                found = model(ids)
            assert not torch.equal(found, clean) and torch.allclose(found, expected, atol=1e-5)
        assert torch.equal(model(ids), clean)


def test_an_edit_of_nothing_is_exact_in_bfloat16(half_model, make_sae):
    ids = some_ids(half_model)
    arguments = dict(features=[0, 1, 2], clamp=-9.0, threshold=1e9)
    nothing = edits.make("conditional-clamp", make_sae(half_model), **arguments)
    with torch.inference_mode():
        clean = half_model(ids)
        with edits.applied(half_model.original_model, half_model.tokenizer, nothing):
            assert torch.equal(half_model(ids), clean)


SETTINGS = {
    "sae-patched": dict(features=[1, 2]),
    "sae-reconstruction": {},
    "zero-ablation": dict(features=[3, 1]),
    "clamp": dict(features=[1, 2], clamp=-0.1),
    "measured-clamp": dict(features=[1, 4], clamp=-3.0),
    "random-features": dict(features=[4], clamp=-3.0),
    "conditional-clamp": dict(features=[1, 2], clamp=-3.0, threshold=0.3),
    "refusal-clamp": dict(features=[1, 2], threshold=0.05, refusal=7, refusal_value=-50.0),
    "mean-ablation": dict(features=[1, 2], means=[0.1, 1 / 3]),
    "dsg": dict(features=[1, 2], clamp=-3.0, gate=0.036),
    "diff-in-means": dict(direction=[1 / 3] * 32, strength=1.5, layers=[1, 2, 3]),
}
LABELS = {
    "sae-patched": "n_features 2",
    "sae-reconstruction": "",
    "zero-ablation": "n_features 2",
    "clamp": "n_features 2, clamp -0.1",
    "measured-clamp": "n_features 2, clamp -3",
    "random-features": "n_features 1, clamp -3",
    "conditional-clamp": "n_features 2, clamp -3, threshold 0.3",
    "refusal-clamp": "n_features 2, threshold 0.05, refusal 7, refusal_value -50",
    "mean-ablation": "n_features 2",
    "dsg": "n_features 2, clamp -3, gate 0.036",
    "diff-in-means": "strength 1.5, layers 1 to 3",
}


def same_edit(gemma, one, other):
    ids = some_ids(gemma)
    h, mask = residual(gemma, ids), ordinary_mask(gemma, ids)
    assert (one.method, one.settings, list(one.at)) == (other.method, other.settings, list(other.at))
    assert all(torch.equal(one.at[layer](h, mask), other.at[layer](h, mask)) for layer in one.at)
    return any(not torch.equal(f(h, mask), h) for f in one.at.values())


def test_an_edits_settings_make_it_again(gemma, make_sae):
    sae, other = make_sae(gemma), make_sae(gemma, layer=3, hook_name="blocks.3.hook_resid_post")
    assert set(SETTINGS) == set(LABELS) == set(edits.METHODS)
    for method, settings in SETTINGS.items():
        saes = None if method == "diff-in-means" else sae
        edit = edits.make(method, saes, **settings)
        assert edit.settings == {"layers": [1], **settings} and edit.method == method
        for given in (saes, {1: sae, 3: other}):
            back = edits.make(edit.method, given, **json.loads(json.dumps(edit.settings)))
            assert same_edit(gemma, edit, back) == (method != "sae-patched")
        assert edit.needs_whole_prompt == (method == "dsg")
        assert edits.label(edit.method, edit.settings) == LABELS[method]
    both = edits.together(edits.ablation(sae, [5], -2), edits.make("dsg", other, **SETTINGS["dsg"]))
    assert list(both.at) == [1, 3] and both.needs_whole_prompt
    assert edits.label(both.method, both.settings) == "clamp, n_features 1, clamp -2; dsg, " + LABELS["dsg"]
    again = edits.make(both.method, {1: sae, 3: other}, **json.loads(json.dumps(both.settings)))
    assert same_edit(gemma, both, again)
    assert edits.make("none", None) is edits.NONE and not edits.NONE.at
    with pytest.raises(ValueError, match="after one layer"):
        edits.together(edits.ablation(sae, [5]), edits.reconstruction(sae))


def test_the_rows_that_every_lesson_shows(gemma_sae):
    rows = edits.ablation(gemma_sae, [1]), edits.ablation(gemma_sae, [1], -4.0), edits.patched(gemma_sae, [1])
    assert [row.method for row in rows] == ["zero-ablation", "clamp", "sae-patched"]
    assert edits.ablation(gemma_sae, torch.tensor([1]), -4.0, "random-features").settings == {
        "features": [1], "clamp": -4.0, "layers": [1]
    }  # fmt: skip
    assert edits.reconstruction(gemma_sae).settings == {"layers": [1]}


@pytest.mark.parametrize("method,saes,settings,told", [
    ("clmap", True, dict(features=[1]), "no method 'clmap'; the methods are .*clamp"),
    ("clamp", True, dict(features=[1], gate=0.1), "clamp: got an unexpected keyword argument 'gate'"),
    ("dsg", True, dict(features=[1], clamp=-1.0), "dsg: missing a required argument: 'gate'"),
    ("clamp", True, dict(features=[1], layers=[2]), r"clamp after layers \[2\]: SAEs are given of layers \[1\]"),
    ("clamp", False, dict(features=[1]), "none is said"),
    ("diff-in-means", False, dict(direction=[1.0] * 32), "none is said"),
    ("clamp", True, dict(features={1: [3], 2: [5]}), "a list of feature ids is needed, not dict '{1: "),
    ("clamp", True, dict(features="12"), "a list of feature ids is needed, not str '12'"),
    ("clamp", True, dict(features=5), "a list of feature ids is needed, not int '5'"),
    ("clamp", True, dict(features=[[1, 2], [3]]), r"a list of feature ids is needed, not list '\[\[1, 2"),
    ("clamp", True, dict(features=[1.7, 2.2]), r"a list of feature ids is needed, not list '\[1.7"),
    ("clamp", True, dict(features=torch.tensor([0.2, 0.9])), "a list of feature ids is needed, not Tensor"),
    ("clamp", True, dict(features=[1], layers="1"), "a list of layers is needed, not str '1'"),
    ("mean-ablation", True, dict(features=[1, 2], means=[0.5]), "mean-ablation: 2 features need as many means"),
    ("mean-ablation", True, dict(features=[1, 2], means=0.5), "mean-ablation: 2 features need as many means"),
    ("mean-ablation", True, dict(features=[1], means=[[0.5]]), "mean-ablation: 1 features need as many means"),
    ("mean-ablation", True, dict(features=[1, 2], means=[0.5] * 3), "mean-ablation: 2 features need as many means"),
    ("clamp", True, dict(features=[1], layers=[1, 2]), r"clamp after layers \[1, 2\]: SAEs are given of layers \[1\]"),
])  # fmt: skip
def test_settings_that_make_no_edit_are_refused(gemma_sae, method, saes, settings, told):
    with pytest.raises(UserError, match=told):
        edits.make(method, gemma_sae if saes else None, **settings)


def test_an_saes_features_stay_behind_its_own_layer(gemma, gemma_sae, make_sae):
    other = make_sae(gemma, layer=2, hook_name="blocks.2.hook_resid_post")
    for method, settings in (("clamp", {"features": [1]}), ("sae-reconstruction", {})):
        with pytest.raises(UserError, match=rf"{method} after layers \[1\]: SAEs are given of layers \[2\]"):
            edits.make(method, {1: other}, **settings)
    with pytest.raises(UserError, match="clamp: features are of one layer's SAE"):
        edits.make("clamp", {1: gemma_sae, 2: other}, features=[1])
    both = edits.together(edits.ablation(gemma_sae, [1]), edits.ablation(other, [5]))
    assert {layer: f.latents.features.tolist() for layer, f in both.at.items()} == {1: [1], 2: [5]}
    assert sorted(edits.make("sae-reconstruction", {1: gemma_sae, 2: other}).at) == [1, 2]


@pytest.mark.parametrize("features", ["12", {1: [3]}, [1.5]])
def test_features_in_another_form_are_refused_wherever_they_are_given(gemma, gemma_sae, features):
    for given in (lambda: Latents(gemma_sae, features), lambda: ablate(gemma, gemma_sae, features),
                  lambda: edits.patched(gemma_sae, features), lambda: edits.clamp(gemma_sae, features),
                  lambda: show.top_tokens(gemma, gemma_sae, features, [[2, 5, 6]])):  # fmt: skip
        with pytest.raises(UserError, match="feature ids"):
            given()


def test_a_method_of_ones_own_is_made_as_any_other(gemma, gemma_sae, monkeypatch):
    def scaled(sae, features, factor=0.5):
        return edits.SetFeatures(sae, features, lambda acts, mask: acts * factor)

    def resolve(stats, n_features, factor):
        return {"features": list(range(n_features)), "factor": factor}

    mine = edits.Method("mine", edits.grid(n_features=(1, 2)), scaled, resolve, usual={"factor": 0.1})
    monkeypatch.setitem(edits.METHODS, "mine", mine)
    stats = SimpleNamespace(sae=gemma_sae)
    edit = edits.from_grid("mine", {"n_features": 2}, stats)
    assert edit.settings == {"features": [0, 1], "factor": 0.1, "layers": [1]}
    assert same_edit(gemma, edit, edits.make("mine", gemma_sae, **edit.settings))


def test_several_layers_and_a_layer_that_never_ran(gemma):
    seen = []

    def look(h, ordinary):
        seen.append(h.shape)
        return h

    ids = some_ids(gemma)
    edit = edits.Edit("look", at={1: look, 3: look})
    for model in (gemma, gemma.original_model):
        seen.clear()
        with edits.applied(model, gemma.tokenizer, edit):
            model(ids)
        assert len(seen) == 2 and seen[0] == residual(gemma, ids).shape
        hooks = edits.applied(model, gemma.tokenizer, edit)
        with pytest.raises(RuntimeError, match=r"layers \[3\] never ran"), hooks:
            gemma(ids, stop_at_layer=2)


CANONICAL = "blocks.1.hook_out"


CENTRED = {"center_writing_weights": True}


def edited_by_saelens(sae, h, mask, features, clamp=0.0):
    """h + decode(a') - decode(a) with SAELens's own functions; its run-time norm is used up by each decode."""
    acts = sae.encode(h.float())
    before = sae.decode(acts)
    changed = acts.clone()
    changed[..., features] = torch.where(acts[..., features] > 0, clamp, acts[..., features])
    sae.encode(h.float())
    after = sae.decode(changed)
    return torch.where(mask[..., None], h + (after - before), h.float()).to(h.dtype)


def next_layer_input(model, ids, layer=1):
    """What the layer after the hook point reads."""
    seen = []
    handle = model.blocks[layer + 1].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        model(ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("b_dec", [False, True])
def test_edit_is_difference_of_saelens_decodings(gemma, make_sae, kind, norm, b_dec):
    sae, ids = make_sae(gemma, kind, norm, b_dec=b_dec), some_ids(gemma)
    h = residual(gemma, ids)
    for clamp in (0.0, -2.0):
        with ablate(gemma, sae, MANY, clamp):
            found = next_layer_input(gemma, ids)
        wanted = edited_by_saelens(sae, h, ordinary_mask(gemma, ids), MANY, clamp)
        assert (wanted - h).abs().max() > 0.1
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("b_dec", [False, True])
def test_latents_of_a_subset_are_those_of_saelens(gemma, make_sae, kind, norm, b_dec):
    sae, h = make_sae(gemma, kind, norm, b_dec=b_dec), residual(gemma, some_ids(gemma))
    wanted = sae.encode(h)
    assert 0.1 < (wanted > 0).float().mean() < 0.7
    for subset in ([5], [40, 3, 17], list(range(D_SAE))):
        found, _ = Latents(sae, subset).encode(h)
        torch.testing.assert_close(found, wanted[..., subset], atol=1e-5, rtol=1e-5)
        assert torch.equal(found > 0, wanted[..., subset] > 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
def test_reconstruction_is_saelens_own(gemma, make_sae, kind, norm):
    sae, h = make_sae(gemma, kind, norm), residual(gemma, some_ids(gemma))
    torch.testing.assert_close(edits.run_sae(sae, h)[1], sae(h))


@pytest.mark.parametrize("kind", KINDS)
def test_edit_for_every_family(model, make_sae, kind):
    sae, ids = make_sae(model, kind), some_ids(model)
    h = residual(model, ids)
    with ablate(model, sae, MANY, -1.0):
        found = next_layer_input(model, ids)
    wanted = edited_by_saelens(sae, h, ordinary_mask(model, ids), MANY, -1.0)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_clamp_zero_is_zero_ablation_by_hand(model, make_sae):
    sae, ids = make_sae(model, "jumprelu"), some_ids(model)
    h = residual(model, ids)
    acts = sae.encode(h)[..., MANY] * ordinary_mask(model, ids)[..., None]
    with ablate(model, sae, MANY):
        found = next_layer_input(model, ids)
    torch.testing.assert_close(found, h - acts @ sae.W_dec[MANY], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_centred_sae(gemma, make_sae, norm):
    sae = make_sae(gemma, "standard", norm)
    centred = copy.copy(sae)
    centred.cfg = copy.deepcopy(sae.cfg)
    centred.cfg.metadata.model_from_pretrained_kwargs = CENTRED
    ids = some_ids(gemma)
    h = residual(gemma, ids)
    mean = h.mean(-1, keepdim=True)
    torch.testing.assert_close(Latents(centred, MANY).encode(h)[0], sae.encode(h - mean)[..., MANY])
    torch.testing.assert_close(edits.run_sae(centred, h)[1], sae(h - mean) + mean)
    with ablate(gemma, centred, MANY):
        found = next_layer_input(gemma, ids)
    wanted = edited_by_saelens(sae, h - mean, ordinary_mask(gemma, ids), MANY) + mean
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    if norm == "none":  # with it, layer_norm would hide a mean that was left in
        with ablate(gemma, sae, MANY):
            assert (next_layer_input(gemma, ids) - found).abs().max() > 0.01


def test_centring_is_read_from_the_saved_metadata(gemma, tmp_path):
    write_sae(tmp_path, "gemma2", model_from_pretrained_kwargs=CENTRED)
    assert Latents(common.load_sae(str(tmp_path), 1, gemma), [0]).centre
    write_sae(tmp_path, "gemma2")
    assert not Latents(common.load_sae(str(tmp_path), 1, gemma), [0]).centre


@pytest.mark.parametrize("features", [[], list(range(8))])
def test_empty_edit_is_bit_identical(model, make_sae, features):
    sae, ids = make_sae(model, spoil=dead_features), some_ids(model)
    with ablate(model, sae, features, -5.0):
        found = model(ids)
    assert torch.equal(found, model(ids))


@pytest.mark.parametrize("features", [[], list(range(8))])
def test_empty_edit_is_bit_identical_in_bfloat16(half_model, make_sae, features):
    sae, ids = make_sae(half_model, spoil=dead_features), some_ids(half_model)
    with ablate(half_model, sae, features, -5.0):
        found = half_model(ids)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, half_model(ids))


def test_bfloat16_residual_keeps_its_type_and_is_rounded_once(half_model, make_sae):
    sae, ids = make_sae(half_model), some_ids(half_model)
    h = residual(half_model, ids)
    with ablate(half_model, sae, MANY):
        found = next_layer_input(half_model, ids)
    assert h.dtype == found.dtype == torch.bfloat16
    wanted = edited_by_saelens(sae, h, ordinary_mask(half_model, ids), MANY)
    # a sum that lies between two bfloat16 numbers may fall to either side
    assert (found == wanted).float().mean() > 0.99
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)


def test_special_tokens_stay_bit_identical_wherever_they_stand(model, make_sae):
    sae, ids = make_sae(model), some_ids(model)
    special = ~ordinary_mask(model, ids)
    assert special[:, 1:-5].sum() >= 4
    h = residual(model, ids)
    assert (sae.encode(h)[special][:, MANY] > 0).any(-1).all()
    with ablate(model, sae, MANY, -3.0):
        found = next_layer_input(model, ids)
    assert torch.equal(found[special], h[special])
    assert (found != h).any(-1)[~special].all()


def test_tokens_without_active_features_stay_bit_identical(gemma, gemma_sae):
    ids = some_ids(gemma)
    h = residual(gemma, ids)
    silent = ~(gemma_sae.encode(h)[..., [7]] > 0).any(-1)
    assert silent.any() and not silent.all()
    with ablate(gemma, gemma_sae, [7], -3.0):
        found = next_layer_input(gemma, ids)
    assert torch.equal(found[silent], h[silent])


def test_mask_follows_each_forward_pass(gemma):
    ids = some_ids(gemma)
    with edits.token_mask(gemma.original_model, gemma.tokenizer) as mask:
        for part in (ids, ids[:2, :7]):
            gemma(part)
            assert torch.equal(mask.counted, ordinary_mask(gemma, part))


def test_sequence_of_ablated_and_clean_runs(model, sae):
    ids = some_ids(model)
    clean = model(ids)
    with ablate(model, sae, MANY):
        first = model(ids)
    assert torch.equal(model(ids), clean)
    with ablate(model, sae, MANY):
        third = model(ids)
    assert torch.equal(first, third)
    assert (first - clean).abs().max() > 0.1


def test_edit_in_compared_feature_sets_differs(gemma, gemma_sae):
    ids, logits = some_ids(gemma), []
    for features in ([1, 2, 3], [4, 5, 6], [1, 2, 3, 4, 5, 6]):
        with ablate(gemma, gemma_sae, features):
            logits.append(gemma(ids))
    assert all((a - b).abs().max() > 0.01 for a, b in zip(logits, logits[1:] + logits[:1]))


def test_hooks_are_gone_after_an_exception(model, sae):
    ids = some_ids(model)
    clean, watched = model(ids), model.original_model
    before = len(watched._forward_pre_hooks)
    with pytest.raises(ZeroDivisionError), ablate(model, sae, MANY):
        assert len(watched._forward_pre_hooks) == before + 1
        assert not torch.equal(model(ids), clean)
        raise ZeroDivisionError
    assert torch.equal(model(ids), clean)
    assert len(watched._forward_pre_hooks) == before
    assert not model.hook_dict[HOOK].fwd_hooks


def test_no_forward_pass_raises(model, sae):
    with pytest.raises(RuntimeError, match=r"layers \[1\] never ran"), ablate(model, sae, MANY):
        pass


@pytest.mark.parametrize("name", [HOOK, CANONICAL])
def test_hook_fires_once_per_forward_by_either_name(model, sae, monkeypatch, name):
    calls, encode = [], Latents.encode
    monkeypatch.setattr(Latents, "encode", lambda self, h: calls.append(h.shape) or encode(self, h))
    ids = some_ids(model)
    with ablate(model, sae, MANY):
        wanted = model(ids)
    monkeypatch.setattr(sae, "hook_point", name)
    calls.clear()
    with ablate(model, sae, MANY):
        found = [model(ids) for _ in range(3)]
    assert len(calls) == 3
    assert torch.equal(found[2], wanted)


def test_zeroing_the_hook_point_changes_the_logits(model):
    ids = some_ids(model)
    clean = model(ids)
    with model.hooks(fwd_hooks=[(HOOK, lambda h, hook: h * 0)]):
        assert (model(ids) - clean).abs().max() > 0.1


@pytest.mark.parametrize(
    "bad", [dict(clamp=math.inf), dict(clamp=math.nan), dict(features=[D_SAE]), dict(features=[-1])]
)
def test_bad_arguments_raise(gemma, gemma_sae, bad):
    with pytest.raises(ValueError), ablate(gemma, gemma_sae, **{"features": [1], **bad}):
        gemma(some_ids(gemma))


def hugging_face_layers(model):
    inner = getattr(model, "transformer", None) or getattr(model, "gpt_neox", None) or model.model
    return inner.h if hasattr(inner, "h") else inner.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_bridge_edit_equals_hugging_face_hook(get_model, make_sae, model_folder, family):
    model = get_model(family)
    sae, ids = make_sae(model), some_ids(model)
    plain = AutoModelForCausalLM.from_pretrained(model_folder(family), attn_implementation="eager").eval()
    seen = []

    def edit(module, args, output):  # a tensor in transformers 5, a tuple in older versions
        h = output[0] if isinstance(output, tuple) else output
        seen.append(h)
        new = edited_by_saelens(sae, h, ordinary_mask(model, ids), MANY, -1.0)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with torch.inference_mode():
        clean = plain(ids).logits
        hugging_face_layers(plain)[1].register_forward_hook(edit)
        wanted = plain(ids).logits
    with ablate(model, sae, MANY, -1.0):
        found = model(ids)
    torch.testing.assert_close(model(ids), clean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(residual(model, ids), seen[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - clean).abs().max() > 0.1


@pytest.mark.parametrize("length", [4, 14])  # shorter and longer than the sliding window
def test_generation_with_cache_equals_recomputation(model, sae, length):
    start = torch.tensor([[2, *range(50, 50 + length)]])
    settings = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(start))
    plain = model.original_model.generate(start, **settings)
    with ablate(model, sae, MANY, -3.0):
        found = model.original_model.generate(start, **settings)
        wanted = start
        for _ in range(8):
            logits = model(wanted, use_cache=False)[:, -1]
            logits[:, 1] = -torch.inf  # min_new_tokens rules out the end of text
            wanted = torch.cat([wanted, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, plain)


def test_bridge_and_hugging_face_model_write_the_same_with_and_without_a_cache(model, sae, model_folder):
    """Under an edit, each by its own generate."""
    start, features = torch.tensor([[2, *range(50, 62)]]), list(range(D_SAE))
    edit = edits.ablation(sae, features, -3.0)
    hf = common.load_hf(model.original_model.config._name_or_path, "cpu")[0]

    def written(edit):
        how = dict(max_new_tokens=8, do_sample=False)
        with edits.applied(model, model.tokenizer, edit):
            found = [model.generate(start, **how, use_past_kv_cache=cached, verbose=False) for cached in (True, False)]
        with edits.applied(hf, model.tokenizer, edit):
            found += [hf.generate(start, **how, use_cache=cached) for cached in (True, False)]
        return [ids.tolist() for ids in found]

    found = written(edit)
    assert found[1:] == found[:1] * 3 and found[0] != written(edits.NONE)[0]


def test_an_edit_that_looks_at_a_whole_prompt_writes_without_a_cache_alone(gemma, gemma_sae):
    """With one it would look at a token at a time, and write something else."""
    start, hf = torch.tensor([[2, *range(50, 62)]]), gemma.original_model
    dsg = edits.make("dsg", gemma_sae, features=MANY, clamp=-9.0, gate=0.05)
    with edits.applied(gemma, gemma.tokenizer, dsg):
        found = gemma.generate(start, 4, do_sample=False, use_past_kv_cache=False, verbose=False)
        assert torch.equal(found, hf.generate(start, max_new_tokens=4, do_sample=False, use_cache=False))
    for write in (lambda: gemma.generate(start, 4, verbose=False), lambda: hf.generate(start, max_new_tokens=4)):
        with pytest.raises(UserError, match="dsg looks at a whole prompt"), edits.applied(gemma, gemma.tokenizer, dsg):
            write()


def test_an_edits_weights_follow_the_residual_stream(gemma, make_sae):
    latents = Latents(make_sae(gemma, seed=3), MANY)
    acts, _ = latents.encode(torch.ones(2, 3, 32, device="meta"))
    assert {x.device.type for x in (acts, latents.W_dec, latents.W_enc, latents.features, latents.sae.b_dec)} == {
        "meta"
    }


def test_same_up_to_rounding_allows_rounding_in_the_models_dtype_and_no_more(half_model):
    plain, ids = half_model.original_model, edits.random_ids(half_model.original_model)
    wanted = edits.log_probs(plain, ids)
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    assert edits.same_up_to_rounding(wanted + 0.01 * noise, wanted, plain, lambda: edits.log_probs(plain, ids))
    assert not edits.same_up_to_rounding(wanted + noise, wanted, plain, lambda: edits.log_probs(plain, ids))
    assert torch.equal(edits.log_probs(plain, ids), wanted)  # the roundings are gone again


def test_a_sequences_first_token_is_neither_counted_nor_edited(wordy, make_sae):
    sae, ids = make_sae(wordy), torch.tensor([[30, 31, 32, 33, 34], [40, 41, 2, 43, 44]])
    h = residual(wordy, ids)
    assert (sae.encode(h)[:, 0, MANY] > 0).any(-1).all()
    with ablate(wordy, sae, MANY, -3.0):
        found = next_layer_input(wordy, ids)
    kept = torch.tensor([[False, True, True, True, True], [False, True, False, True, True]])
    assert torch.equal((found != h).any(-1), kept)
    counted = common.firing_rates(wordy, sae, ids.tolist())
    assert counted.n_tokens == 7 and torch.equal(counted.fires, (sae.encode(h)[kept] > 0).sum(0))


def test_the_first_token_of_a_cached_or_padded_pass(wordy):
    plain, ids = wordy.original_model, torch.tensor([[30, 31, 32, 33], [0, 0, 42, 43]])
    with edits.token_mask(plain, wordy.tokenizer) as mask, torch.inference_mode():
        cache = plain(ids[:1, :2], use_cache=True).past_key_values
        assert mask.counted.tolist() == [[False, True]]
        plain(ids[:1, 2:], past_key_values=cache)
        assert mask.counted.tolist() == [[True, True]]
        plain(ids, attention_mask=(ids != 0).long())
        assert mask.counted.tolist() == [[False, True, True, True], [False, False, False, True]]


def test_generation_without_bos_equals_recomputation(wordy, make_sae):
    """Prompts of two lengths, left-padded, with a cache: each answer is that of the prompt alone."""
    sae, prompts = make_sae(wordy), [[30, 31, 32, 33, 34, 35, 36], [47, 48, 49, 50]]
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    ids = torch.tensor([[0] * (7 - len(row)) + row for row in prompts])
    clean = wordy.original_model.generate(ids, attention_mask=(ids != 0).long(), **settings)[:, 7:]
    with ablate(wordy, sae, MANY, -3.0):
        found = wordy.original_model.generate(ids, attention_mask=(ids != 0).long(), **settings)[:, 7:]
        for row, answer in zip(prompts, found.tolist()):
            for _ in range(6):
                logits = wordy(torch.tensor([row]), use_cache=False)[0, -1]
                logits[1] = -torch.inf
                row = [*row, logits.argmax().item()]
            assert row[-6:] == answer
    assert not torch.equal(found, clean)


@pytest.mark.parametrize("way", ["never", "all-but-bos"])
def test_special_tokens_are_edited_where_saebench_edits_them(model_folder, make_sae, way):
    """All tokens but the first, chat markers too, not the padding of a row's end; what is counted does not change."""
    folder = str(model_folder("gemma2"))
    model = common.load_model(folder, "cpu", edit_special=way)
    sae = make_sae(model)
    ids = some_ids(model)
    special = torch.isin(ids, torch.tensor(special_ids(model.tokenizer)))
    with edits.token_mask(model.original_model, model.tokenizer) as mask:
        model(ids)
    first = torch.zeros_like(special)
    first[:, 0] = True
    end = torch.zeros_like(special)
    end[0, -4:] = True
    assert torch.equal(mask.counted, ~special & ~first)
    assert torch.equal(mask.edited, ~first & ~end if way == "all-but-bos" else ~special & ~first)
    features = list(range(D_SAE))
    with common.ablate(model, sae, features, -5.0):
        there = residual(model, ids)
    moved = (there != residual(model, ids)).any(-1)
    assert not moved[first].any() and moved[~special & ~first].any()
    assert moved[special & ~first & ~end].any() == (way == "all-but-bos") and not moved[end].any()
    edit = edits.make("clamp", sae, features=features, clamp=-5.0)
    with torch.inference_mode(), edits.applied(model, model.tokenizer, edit):
        alone = model(ids).log_softmax(-1)[:, -1, 20:24]
    found = evaluation.score_letters(model, ids.tolist(), [20, 21, 22, 23], [edits.NONE, edit])[1]
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=0, check_dtype=False)


def test_without_hook_points_inside_blocks_the_numbers_are_the_same(model):
    ids = some_ids(model)
    with torch.inference_mode():
        wanted = model(ids)
        parts = edits.idle_wrappers(model)
        with edits.unwrapped(parts):
            left = [part for block in model.blocks for part in block.original_component.modules()
                    if isinstance(part, edits.GeneralizedComponent)]  # fmt: skip
            assert not [part for part in left if getattr(part, "use_native_layernorm_autograd", True)]
            assert not edits.idle_wrappers(model)  # all are out
            assert torch.equal(model(ids), wanted)
        assert len(parts) >= 4 * model.cfg.n_layers and len(edits.idle_wrappers(model)) == len(parts)


def test_a_hook_inside_a_block_is_not_passed_over(gemma, monkeypatch):
    """Scored with somebody's own hook in place, it is the hooked model that is scored."""
    ids, pushed = some_ids(gemma).tolist(), lambda x, hook: x + 1.0
    usual = evaluation.score_letters(gemma, ids, [20, 21, 22, 23], [edits.NONE])
    everything = len(edits.idle_wrappers(gemma))
    for point in ("blocks.1.mlp.hook_out", "blocks.2.attn.q.hook_out", "blocks.1.hook_mlp_in"):
        monkeypatch.setattr(gemma.cfg, "use_hook_mlp_in", point.endswith("mlp_in"))
        with gemma.hooks(fwd_hooks=[(point, pushed)]):
            assert 0 < len(edits.idle_wrappers(gemma)) < everything
            found = evaluation.score_letters(gemma, ids, [20, 21, 22, 23], [edits.NONE])
            with torch.inference_mode():
                alone = gemma(torch.tensor(ids))[:, -1].log_softmax(-1)[:, 20:24]
        assert (found - usual).abs().max() > 1e-3
        torch.testing.assert_close(found[0], alone, atol=2e-5, rtol=0)
