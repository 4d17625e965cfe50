"""Edits at inference time: each formula by hand in float64, special tokens, gradients, and the hook."""

import numpy as np
import pytest
import torch
from conftest import residual, some_ids
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

import common
import edits

CLAMP, THRESHOLD = -3.0, 0.8


@pytest.fixture(scope="module")
def sae():
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


def test_every_edit_by_hand(sae, h, ordinary):
    acts = activations(sae, h)[..., FEATURES]
    assert 0.2 < (acts > 0).mean() < 0.8
    rho = gate(acts, ordinary)
    between = float(np.sort(rho)[1])  # the highest of three sequences is over it, the others are not
    means = [0.5, 0.1, 0.0, 2.0]
    any_active = (acts > 0).any(-1, keepdims=True)
    cases = [
        (edits.clamp(sae, FEATURES, 0.0), lambda a: np.zeros_like(a)),
        (edits.clamp(sae, FEATURES, CLAMP), lambda a: np.where(a > 0, CLAMP, a)),
        (edits.clamp(sae, FEATURES, CLAMP, THRESHOLD), lambda a: np.where(a > THRESHOLD, CLAMP, a)),
        (edits.mean_ablation(sae, FEATURES, means), lambda a: np.broadcast_to(means, a.shape)),
        (edits.dsg(sae, FEATURES, CLAMP, between),
         lambda a: np.where(any_active & (rho > between)[:, None, None], CLAMP, a)),
    ]  # fmt: skip
    for edit, wanted in cases:
        found = edit(h, ordinary)
        assert found.dtype == h.dtype
        assert np.abs(found.numpy() - by_hand(sae, h, ordinary, wanted)).max() < 1e-8
        assert torch.equal(found[~ordinary], h[~ordinary])
    assert (rho > between).sum() == 1


def test_the_gate_is_a_share_of_ordinary_tokens(sae, h, ordinary):
    acts = activations(sae, h)[..., FEATURES]
    assert np.allclose(edits.gate_of(torch.from_numpy(acts), ordinary).numpy(), gate(acts, ordinary), atol=1e-7)
    # a padded end changes nothing
    longer = torch.cat([torch.from_numpy(acts), torch.ones(3, 4, 4)], 1)
    mask = torch.cat([ordinary, torch.zeros(3, 4, dtype=torch.bool)], 1)
    assert torch.equal(edits.gate_of(longer, mask), edits.gate_of(torch.from_numpy(acts), ordinary))


def test_refusal_clamp_by_hand(sae, h, ordinary):
    """As the authors' clamp_refusal: the refusal latent is set, the features that call for it are left as they are."""
    refusal = 7
    acts = activations(sae, h)
    over = (acts[..., FEATURES] > THRESHOLD).any(-1) & ordinary.numpy()
    change = (-9.0 - acts[..., refusal]) * over
    expected = h.numpy() + change[..., None] * sae.W_dec.numpy()[refusal]
    found = edits.refusal_clamp(sae, FEATURES, THRESHOLD, refusal, -9.0)(h, ordinary)
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


def test_bare_reconstruction_is_saelens_own(gemma, make_sae):
    sae, h = make_sae(gemma, "standard"), residual(gemma, some_ids(gemma))
    ordinary = some_ids(gemma) > 10
    found = edits.bare_reconstruction(sae)(h, ordinary)
    assert torch.equal(found[~ordinary], h[~ordinary])
    torch.testing.assert_close(found[ordinary], sae(h)[ordinary])


def test_gradients_pass_through_every_edit(sae, h, ordinary):
    for method, arguments in {
        "clamp": dict(features=FEATURES, clamp=CLAMP),
        "mean-ablation": dict(features=FEATURES, means=[0.1] * 4),
        "dsg": dict(features=FEATURES, clamp=CLAMP, gate=0.0),
        "diff-in-means": dict(direction=[1.0] * 8),
    }.items():
        x = h.clone().requires_grad_(True)
        edits.METHODS[method](sae, **arguments)(x, ordinary).square().sum().backward()
        assert torch.isfinite(x.grad).all() and not torch.equal(x.grad[ordinary], 2 * h[ordinary])
        assert torch.equal(x.grad[~ordinary], 2 * h[~ordinary])


def test_applied_is_ablate_on_every_family(model, make_sae):
    sae, ids = make_sae(model), some_ids(model)
    features = list(range(0, 64, 2))
    with torch.inference_mode():
        clean = model(ids)
        for clamp in (0.0, -2.0):
            edit = edits.edit_of("clamp", sae, features=features, clamp=clamp)
            with common.ablate(model, sae, features, clamp):
                expected = model(ids)
            with edits.applied(model.original_model, model.tokenizer, edit):
                found = model(ids)
            assert not torch.equal(found, clean) and torch.allclose(found, expected, atol=1e-5)
        assert torch.equal(model(ids), clean)


def test_an_edit_of_nothing_is_exact_in_bfloat16(half_model, make_sae):
    ids = some_ids(half_model)
    arguments = dict(features=[0, 1, 2], clamp=-9.0, threshold=1e9)
    nothing = edits.edit_of("conditional-clamp", make_sae(half_model), **arguments)
    with torch.inference_mode():
        clean = half_model(ids)
        with edits.applied(half_model.original_model, half_model.tokenizer, nothing):
            assert torch.equal(half_model(ids), clean)


def test_several_layers_and_a_layer_that_never_ran(gemma):
    seen = []

    def look(h, ordinary):
        seen.append(h.shape)
        return h

    ids = some_ids(gemma)
    edit = edits.Edit("look", {1: look, 3: look})
    for model in (gemma, gemma.original_model):
        seen.clear()
        with edits.applied(model, gemma.tokenizer, edit):
            model(ids)
        assert len(seen) == 2 and seen[0] == residual(gemma, ids).shape
        hooks = edits.applied(model, gemma.tokenizer, edit)
        with pytest.raises(RuntimeError, match=r"layers \[3\] never ran"), hooks:
            gemma(ids, stop_at_layer=2)
