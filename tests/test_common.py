import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    BOS,
    D_SAE,
    EOS,
    FAMILIES,
    HOOK,
    KINDS,
    MARKER,
    NORMS,
    PAD,
    residual,
    some_ids,
    train_tokenizer,
    write_sae,
)
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from tokenizers import processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import common
import edits
import evaluation
import hub
from common import Rates, ablate, matched_random
from data import UserError, batches, special_ids, token_windows
from edits import Latents
from flags import parser, settings

CANONICAL = "blocks.1.hook_out"
FEATURES = list(range(0, D_SAE, 3))
CENTRED = {"center_writing_weights": True}


def ordinary(model, ids):
    special = [model.tokenizer.convert_tokens_to_ids(token) for token in (BOS, EOS, PAD, MARKER)]
    return ~torch.isin(ids, torch.tensor(special))


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


def dead(sae):
    sae.threshold[:8] = 1e9


def rates(fires, n, total=None):
    fires = torch.tensor(fires)
    return Rates(fires, fires.double() if total is None else torch.tensor(total, dtype=torch.float64), n)


# ---------------------------------------------------------------------------------------- the edit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("b_dec", [False, True])
def test_edit_is_difference_of_saelens_decodings(gemma, make_sae, kind, norm, b_dec):
    sae, ids = make_sae(gemma, kind, norm, b_dec=b_dec), some_ids(gemma)
    h = residual(gemma, ids)
    for clamp in (0.0, -2.0):
        with ablate(gemma, sae, FEATURES, clamp):
            found = next_layer_input(gemma, ids)
        wanted = edited_by_saelens(sae, h, ordinary(gemma, ids), FEATURES, clamp)
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
    torch.testing.assert_close(edits.passed(sae, h)[1], sae(h))


@pytest.mark.parametrize("kind", KINDS)
def test_edit_for_every_family(model, make_sae, kind):
    sae, ids = make_sae(model, kind), some_ids(model)
    h = residual(model, ids)
    with ablate(model, sae, FEATURES, -1.0):
        found = next_layer_input(model, ids)
    wanted = edited_by_saelens(sae, h, ordinary(model, ids), FEATURES, -1.0)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_clamp_zero_is_zero_ablation_by_hand(model, make_sae):
    sae, ids = make_sae(model, "jumprelu"), some_ids(model)
    h = residual(model, ids)
    acts = sae.encode(h)[..., FEATURES] * ordinary(model, ids)[..., None]
    with ablate(model, sae, FEATURES):
        found = next_layer_input(model, ids)
    torch.testing.assert_close(found, h - acts @ sae.W_dec[FEATURES], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_centred_sae(gemma, make_sae, norm):
    sae = make_sae(gemma, "standard", norm)
    centred = copy.copy(sae)
    centred.cfg = copy.deepcopy(sae.cfg)
    centred.cfg.metadata.model_from_pretrained_kwargs = CENTRED
    ids = some_ids(gemma)
    h = residual(gemma, ids)
    mean = h.mean(-1, keepdim=True)
    torch.testing.assert_close(Latents(centred, FEATURES).encode(h)[0], sae.encode(h - mean)[..., FEATURES])
    torch.testing.assert_close(edits.passed(centred, h)[1], sae(h - mean) + mean)
    with ablate(gemma, centred, FEATURES):
        found = next_layer_input(gemma, ids)
    wanted = edited_by_saelens(sae, h - mean, ordinary(gemma, ids), FEATURES) + mean
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    if norm == "none":  # with it, layer_norm would hide a mean that was left in
        with ablate(gemma, sae, FEATURES):
            assert (next_layer_input(gemma, ids) - found).abs().max() > 0.01


def test_centring_is_read_from_the_saved_metadata(gemma, tmp_path):
    write_sae(tmp_path, "gemma2", model_from_pretrained_kwargs=CENTRED)
    assert Latents(common.load_sae(str(tmp_path), 1, gemma), [0]).centre
    write_sae(tmp_path, "gemma2")
    assert not Latents(common.load_sae(str(tmp_path), 1, gemma), [0]).centre


# ---------------------------------------------------------------------------- nothing changes, bit by bit


@pytest.mark.parametrize("features", [[], list(range(8))])
def test_empty_edit_is_bit_identical(model, make_sae, features):
    sae, ids = make_sae(model, spoil=dead), some_ids(model)
    with ablate(model, sae, features, -5.0):
        found = model(ids)
    assert torch.equal(found, model(ids))


@pytest.mark.parametrize("features", [[], list(range(8))])
def test_empty_edit_is_bit_identical_in_bfloat16(half_model, make_sae, features):
    sae, ids = make_sae(half_model, spoil=dead), some_ids(half_model)
    with ablate(half_model, sae, features, -5.0):
        found = half_model(ids)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, half_model(ids))


def test_bfloat16_residual_keeps_its_type_and_is_rounded_once(half_model, make_sae):
    sae, ids = make_sae(half_model), some_ids(half_model)
    h = residual(half_model, ids)
    with ablate(half_model, sae, FEATURES):
        found = next_layer_input(half_model, ids)
    assert h.dtype == found.dtype == torch.bfloat16
    wanted = edited_by_saelens(sae, h, ordinary(half_model, ids), FEATURES)
    # a sum that lies between two bfloat16 numbers may fall to either side
    assert (found == wanted).float().mean() > 0.99
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)


def test_special_tokens_stay_bit_identical_wherever_they_stand(model, make_sae):
    sae, ids = make_sae(model), some_ids(model)
    special = ~ordinary(model, ids)
    assert special[:, 1:-5].sum() >= 4
    h = residual(model, ids)
    assert (sae.encode(h)[special][:, FEATURES] > 0).any(-1).all()
    with ablate(model, sae, FEATURES, -3.0):
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


def test_special_ids_know_the_added_marker(gemma):
    marker = gemma.tokenizer.convert_tokens_to_ids(MARKER)
    assert marker not in gemma.tokenizer.all_special_ids
    assert special_ids(gemma.tokenizer) == [0, 1, 2, marker]


def test_mask_follows_each_forward_pass(gemma):
    ids = some_ids(gemma)
    with edits.watch_tokens(gemma.original_model, gemma.tokenizer) as seen:
        for part in (ids, ids[:2, :7]):
            gemma(part)
            assert torch.equal(seen["ordinary"], ordinary(gemma, part))


def test_sequence_of_ablated_and_clean_runs(model, sae):
    ids = some_ids(model)
    clean = model(ids)
    with ablate(model, sae, FEATURES):
        first = model(ids)
    assert torch.equal(model(ids), clean)
    with ablate(model, sae, FEATURES):
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
    clean, watched = model(ids), model.original_model.get_input_embeddings()
    before = len(watched._forward_pre_hooks)
    with pytest.raises(ZeroDivisionError), ablate(model, sae, FEATURES):
        assert len(watched._forward_pre_hooks) == before + 1
        assert not torch.equal(model(ids), clean)
        raise ZeroDivisionError
    assert torch.equal(model(ids), clean)
    assert len(watched._forward_pre_hooks) == before
    assert not model.hook_dict[HOOK].fwd_hooks


# --------------------------------------------------------------------------------- hooks that miss


def test_no_forward_pass_raises(model, sae):
    with pytest.raises(RuntimeError, match=r"layers \[1\] never ran"), ablate(model, sae, FEATURES):
        pass


@pytest.mark.parametrize("name", [HOOK, CANONICAL])
def test_hook_fires_once_per_forward_by_either_name(model, sae, monkeypatch, name):
    calls, encode = [], Latents.encode
    monkeypatch.setattr(Latents, "encode", lambda self, h: calls.append(h.shape) or encode(self, h))
    ids = some_ids(model)
    with ablate(model, sae, FEATURES):
        wanted = model(ids)
    monkeypatch.setattr(sae, "hook_point", name)
    calls.clear()
    with ablate(model, sae, FEATURES):
        found = [model(ids) for _ in range(3)]
    assert len(calls) == 3
    assert torch.equal(found[2], wanted)


def test_zeroing_the_hook_point_changes_the_logits(model):
    ids = some_ids(model)
    clean = model(ids)
    with model.hooks(fwd_hooks=[(HOOK, lambda h, hook: h * 0)]):
        assert (model(ids) - clean).abs().max() > 0.1


@pytest.mark.parametrize(
    "bad", [dict(clamp=0.5), dict(clamp=math.nan), dict(clamp=-math.inf), dict(features=[D_SAE]), dict(features=[-1])]
)
def test_bad_arguments_raise(gemma, gemma_sae, bad):
    with pytest.raises(ValueError), ablate(gemma, gemma_sae, **{"features": [1], **bad}):
        gemma(some_ids(gemma))


# ------------------------------------------------------------------------- against plain Hugging Face


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
        new = edited_by_saelens(sae, h, ordinary(model, ids), FEATURES, -1.0)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    with torch.inference_mode():
        clean = plain(ids).logits
        hugging_face_layers(plain)[1].register_forward_hook(edit)
        wanted = plain(ids).logits
    with ablate(model, sae, FEATURES, -1.0):
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
    with ablate(model, sae, FEATURES, -3.0):
        found = model.original_model.generate(start, **settings)
        wanted = start
        for _ in range(8):
            logits = model(wanted, use_cache=False)[:, -1]
            logits[:, 1] = -torch.inf  # min_new_tokens rules out the end of text
            wanted = torch.cat([wanted, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, plain)


# ----------------------------------------------------------------------------------------- loading


def test_everything_is_frozen_and_saes_are_float32(half_model, tmp_path):
    write_sae(tmp_path, "x", spoil=lambda sae: sae.to(dtype=torch.bfloat16))
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == "bfloat16"
    sae = common.load_sae(str(tmp_path), 1, half_model)
    assert sae.dtype == torch.float32
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in [*sae.parameters(), *half_model.parameters()])
    assert not half_model.training and not sae.training
    with ablate(half_model, sae, FEATURES):
        assert not half_model(some_ids(half_model)).requires_grad


def test_batchtopk_is_loaded_as_jumprelu(gemma, make_sae):
    assert make_sae(gemma, "batchtopk").cfg.architecture() == "jumprelu"


BAD_SAES = {
    "misspelt hook": (dict(hook_name="blocks.1.hook_resid_pots"), "hook"),
    "no such block": (dict(hook_name="blocks.9.hook_resid_post"), "hook"),
    "no hook name": (dict(hook_name=None), "hook"),
    "resid_mid": (dict(hook_name="blocks.1.hook_resid_mid"), "resid_mid"),
    "attention": (dict(hook_name="blocks.1.attn.hook_z"), "hook_z"),
    "first resid_pre": (dict(hook_name="blocks.0.hook_resid_pre"), "resid_pre"),
    "other layer": (dict(hook_name="blocks.2.hook_resid_post"), "layer 2"),
    "width": (dict(d_in=16), "16"),
    "unscaled": (dict(norm="expected_average_only_in"), "expected_average_only_in"),
}


@pytest.mark.parametrize("case", BAD_SAES)
def test_sae_that_does_not_fit_is_refused(gemma, tmp_path, case):
    options, told = BAD_SAES[case]
    layer = 0 if case == "first resid_pre" else 1
    write_sae(tmp_path, "gemma2", **options)
    with pytest.raises(UserError, match=told):
        common.load_sae(str(tmp_path), layer, gemma)


@pytest.mark.parametrize("layer", [-1, 4])
def test_layer_outside_the_model_is_refused(gemma, tmp_path, layer):
    with pytest.raises(UserError, match="0 to 3"):
        common.load_sae(str(write_sae(tmp_path, "gemma2")), layer, gemma)


def test_architectures_that_cannot_be_cut_are_refused(gemma, tmp_path):
    metadata = SAEMetadata(hook_name=HOOK, model_name="gemma2")
    MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=32, d_sae=8, metadata=metadata)).save_model(tmp_path / "a")
    Transcoder(TranscoderConfig(32, 8, apply_b_dec_to_input=False, metadata=metadata, d_out=32)).save_model(
        tmp_path / "b"
    )
    for name, told in (("a", "matching_pursuit"), ("b", "transcoder")):
        with pytest.raises(UserError, match=told):
            common.load_sae(str(tmp_path / name), 1, gemma)


def test_unusable_places_are_refused(gemma, tmp_path):
    (tmp_path / "empty").mkdir()
    for spec in (tmp_path / "empty", tmp_path / "absent", "no-such-release:layer_1"):
        with pytest.raises(UserError, match=str(spec).split(":")[0]):
            common.load_sae(str(spec), 1, gemma)
    for place in ("nomodel", str(tmp_path / "empty")):
        with pytest.raises(UserError, match=place):
            common.load_model(place, "cpu")
    with pytest.raises(UserError, match="no SAE is known"):
        common.load_sae(None, 1, gemma, preset="some/model")


def test_other_models_sae_is_noted(gemma, tmp_path, capsys):
    common.load_sae(str(write_sae(tmp_path, "org/gemma2")), 1, gemma)
    assert capsys.readouterr().err == ""
    common.load_sae(str(write_sae(tmp_path, "other-model")), 1, gemma)
    assert "other-model" in capsys.readouterr().err


def test_resid_pre_is_resid_post_of_the_layer_before(model, scale_of, sae, tmp_path):
    write_sae(tmp_path, "x", scale_of(model), hook_name="blocks.2.hook_resid_pre")
    pre = common.load_sae(str(tmp_path), 2, model)
    assert pre.hook_point == sae.hook_point == HOOK
    ids, logits = some_ids(model), []
    for one in (sae, pre):
        with ablate(model, one, FEATURES):
            logits.append(model(ids))
    assert torch.equal(*logits)
    with pytest.raises(UserError):
        common.load_sae(str(tmp_path), 1, model)


# --------------------------------------------------------------------------------- windows and batches


def test_token_windows(tokenizer):
    texts = ["The cat sat on the mat and looked at the moon over the sea. " * 2, "A", "Rivers flow to the sea."]
    windows, sources = token_windows(tokenizer, texts, context=10)
    assert all(row[0] == 2 and row.count(2) == 1 and 3 <= len(row) <= 10 for row in windows)
    assert sorted(set(sources)) == [0, 2]
    for index in (0, 2):
        joined = [i for row, source in zip(windows, sources) if source == index for i in row[1:]]
        whole = tokenizer(texts[index], add_special_tokens=False)["input_ids"]
        assert joined == whole[: len(joined)] and len(whole) - len(joined) <= 1


def test_token_windows_stop_at_the_budget(tokenizer):
    texts = ["The cat sat on the mat.", "The moon is over the sea and the sea is deep."]
    first = len(tokenizer(texts[0])["input_ids"]) - 1
    windows, sources = token_windows(tokenizer, texts, context=64, max_tokens=first + 4)
    assert [len(row) for row in windows] == [first + 1, 5] and sources == [0, 1]
    assert token_windows(tokenizer, texts, context=64, max_tokens=first)[1] == [0]


def test_batches_hold_each_row_once(tokenizer):
    rows = [[2, *range(5, 5 + n)] for n in (3, 9, 1, 4, 9, 2, 7)]
    seen = []
    for picked, ids in batches(rows, 3, tokenizer, "cpu"):
        seen += picked
        for index, row in zip(picked, ids.tolist()):
            assert row == rows[index] + [0] * (len(row) - len(rows[index]))
    assert sorted(seen) == list(range(len(rows)))


# ----------------------------------------------------------------------------------- rates and picking


def some_windows(model, seed=0):
    ids = some_ids(model, (9, 20), seed).tolist()
    return [row[: 5 + 2 * k] for k, row in enumerate(ids)]


def same_rates(a, b):
    assert torch.equal(a.fires, b.fires) and a.n_tokens == b.n_tokens
    torch.testing.assert_close(a.total, b.total, rtol=1e-5, atol=1e-5)


def test_firing_rates_by_hand(model, sae):
    windows = some_windows(model)
    fires, total, n = torch.zeros(D_SAE, dtype=torch.int64), torch.zeros(D_SAE, dtype=torch.float64), 0
    for row in windows:
        ids = torch.tensor([row])
        acts = sae.encode(residual(model, ids))[ordinary(model, ids)]
        fires, total, n = fires + (acts > 0).sum(0), total + acts.double().sum(0), n + len(acts)
    found = common.firing_rates(model, sae, windows)
    same_rates(found, Rates(fires, total, n))
    torch.testing.assert_close(found.rate, fires / float(n), check_dtype=False)


def test_an_edits_weights_follow_the_residual_stream(gemma, make_sae):
    latents = Latents(make_sae(gemma, seed=3), FEATURES)
    acts, _ = latents.encode(torch.ones(2, 3, 32, device="meta"))
    assert {x.device.type for x in (acts, latents.W_dec, latents.W_enc, latents.features, latents.sae.b_dec)} == {
        "meta"
    }


def test_firing_rates_at_the_last_layer(model, make_sae):
    """Behind the last layer there is nothing to stop at: TransformerLens would go on to the logits."""
    sae = make_sae(model, layer=3, hook_name="blocks.3.hook_resid_post")
    ids, seen = some_ids(model), {}
    with model.hooks(fwd_hooks=[(sae.hook_point, lambda h, hook: seen.update(h=h))]), torch.inference_mode():
        model(ids)
    fires = (sae.encode(seen["h"].float()) > 0) & ordinary(model, ids)[..., None]
    assert torch.equal(common.firing_rates(model, sae, ids.tolist()).fires, fires.sum((0, 1)))


def test_firing_rates_do_not_depend_on_the_batch_size(model, sae):
    windows = some_windows(model)
    wanted = common.firing_rates(model, sae, windows, batch_size=16)
    for size in (1, 4):
        same_rates(common.firing_rates(model, sae, windows, batch_size=size), wanted)


def test_firing_rates_leave_out_special_tokens(model, sae):
    windows = some_windows(model)
    marker = model.tokenizer.convert_tokens_to_ids(MARKER)
    longer = [row + [2, 0, 1, marker, 0] for row in windows]
    same_rates(common.firing_rates(model, sae, longer), common.firing_rates(model, sae, windows))


def test_firing_rates_add_up_over_shards(gemma, make_sae):
    sae, windows = make_sae(gemma, "topk_rescaled", "layer_norm"), some_windows(gemma)
    parts = [common.firing_rates(gemma, sae, part) for part in (windows[:4], windows[4:])]
    whole = Rates(sum(p.fires for p in parts), sum(p.total for p in parts), sum(p.n_tokens for p in parts))
    same_rates(common.firing_rates(gemma, sae, windows), whole)


def test_activation_ratio_by_hand():
    found = common.activation_ratio(rates([9, 0, 2], 99), rates([3, 0, 0], 199))
    torch.testing.assert_close(found, torch.tensor([0.1 / 0.02, 0.01 / 0.005, 0.03 / 0.005]))


FORGET, RETAIN = rates([9, 0, 5, 5, 1], 100), rates([0, 0, 4, 4, 50], 200)


def test_pick_by_ratio():
    # feature 1, dead on both, has the ratio 2, above that of feature 4: it is left out for being dead
    assert common.pick_features(FORGET, RETAIN, 4) == [0, 2, 3, 4]
    assert common.pick_features(FORGET, RETAIN, 2) == [0, 2]
    with pytest.raises(UserError, match="leaves only 4"):
        common.pick_features(FORGET, RETAIN, 5)


def test_pick_by_retain_threshold():
    assert common.pick_features(FORGET, RETAIN, 3, "retain-threshold", tau=0.03) == [0, 2, 3]
    assert common.pick_features(FORGET, RETAIN, 1, "retain-threshold", tau=0.02) == [0]  # 4/200 is not below
    with pytest.raises(UserError, match="leaves only 1"):
        common.pick_features(FORGET, RETAIN, 2, "retain-threshold", tau=0.02)


def test_pick_by_dsg():
    # 41 features, so that the 5 and 95 per cent quantiles are the third lowest and the third highest value
    mine = [float(i + 1) for i in range(41)]
    other = [0.01 if i in (0, 17, 30) else 100.0 for i in range(41)]
    forget, retain = rates([5] * 41, 100, mine), rates([5] * 41, 100, other)
    assert common.pick_features(forget, retain, 2, "dsg") == [30, 17]  # feature 0 is too weak
    with pytest.raises(UserError, match="leaves only 2"):
        common.pick_features(forget, retain, 3, "dsg")


def test_dsg_squares_the_mean_activation():
    forget, retain = rates([5] * 3, 10, [3.0, 2.0, 1.0]), rates([5] * 3, 20, [2.0, 1.0, 4.0])
    # ratios (0.3/0.1)^2 = 9, (0.2/0.05)^2 = 16, (0.1/0.2)^2 = 0.25: only feature 1 is in the top 5 per cent
    assert common.pick_features(forget, retain, 1, "dsg") == [1]


@pytest.mark.parametrize("rule", ["ratio", "retain-threshold"])
def test_ties_go_to_the_lower_index_and_dead_features_are_never_picked(rule):
    forget, retain = rates([0, *[7] * 60, 0], 100), rates([0] * 62, 100)
    assert common.pick_features(forget, retain, 60, rule) == list(range(1, 61))
    with pytest.raises(UserError):
        common.pick_features(forget, retain, 61, rule)


def test_unknown_rule_is_refused():
    with pytest.raises(UserError, match="nonsense"):
        common.pick_features(FORGET, RETAIN, 1, "nonsense")


def test_matched_random():
    values = rates([3 * (i % 50) for i in range(200)], 1000)
    picked = [5, 40, 120, 7]
    some = rates([1] * 200, 1000)
    control = matched_random(some, values, picked, seed=0)
    assert control == matched_random(some, values, picked, seed=0)
    assert control != matched_random(some, values, picked, seed=1)
    assert len(set(control)) == len(picked) and not set(control) & set(picked)
    # each rate occurs four times, so ten unused neighbours lie within three steps
    assert all(abs(values.fires[a] - values.fires[b]) <= 9 for a, b in zip(picked, control))


def test_matched_random_draws_from_all_that_are_equally_near():
    values = rates([0] * 100 + [500] * 100, 1000)
    drawn = {matched_random(rates([1] * 200, 1000), values, [3], seed)[0] for seed in range(200)}
    assert len(drawn) > 60 and max(drawn) < 100
    with pytest.raises(UserError, match="too few"):
        matched_random(values, values, list(range(101)), 0)


def test_a_feature_that_never_fires_is_no_control():
    forget, retain = rates([0] * 50 + [1] * 50, 1000), rates([0] * 100, 1000)
    assert all(min(matched_random(forget, retain, [60, 70], seed)) >= 50 for seed in range(50))


# ------------------------------------------------------------------------------------------ sanity gate


def perfect(sae):
    """Two features per dimension, its positive and its negative part: exact, and 32 are active on each token."""
    eye = torch.eye(32)
    sae.W_enc.copy_(torch.cat([eye, -eye], 1))
    sae.W_dec.copy_(torch.cat([eye, -eye]))
    sae.b_enc.zero_(), sae.b_dec.zero_(), sae.threshold.zero_()


def broken(sae):
    perfect(sae)
    sae.threshold.fill_(1e3)


def test_sanity_gate_passes_a_fitting_sae(model, tmp_path, capsys):
    sae = common.load_sae(str(write_sae(tmp_path, "x", spoil=perfect, l0=31.0)), 1, model)
    found = hub.sanity_gate(model, sae, some_windows(model))
    assert found["l0"] == pytest.approx(32, abs=0.1) and found["variance_explained"] > 0.999
    assert found["promised_l0"] == 31.0
    assert found["n_tokens"] == sum(int(ordinary(model, torch.tensor(row)).sum()) for row in some_windows(model))
    assert "L0 32.0 (promised 31.0)" in capsys.readouterr().out


@pytest.mark.parametrize("spoil,promised", [(broken, None), (perfect, 200.0), (perfect, 5.0)])
def test_sanity_gate_stops_a_broken_sae(gemma, tmp_path, spoil, promised):
    sae = common.load_sae(str(write_sae(tmp_path, "gemma2", spoil=spoil, l0=promised)), 1, gemma)
    with pytest.raises(UserError, match="does not fit"):
        hub.sanity_gate(gemma, sae, some_windows(gemma))
    assert hub.sanity_gate(gemma, sae, some_windows(gemma), insist=False)["n_tokens"] > 50


def lopsided(sae):
    """As `perfect`, but nothing of the first dimension is written back."""
    perfect(sae)
    sae.W_dec[:, 0] = 0


def too_large(sae):
    lopsided(sae)
    sae.W_dec.mul_(2.5)


def gate_on(monkeypatch, sae, h):
    """The gate on a residual stream h (n, 32) that comes in windows of 100, longest, if any, first."""
    chunks = [(part, None) for part in h.split(100)]
    monkeypatch.setattr(edits, "residuals", lambda *args, **kwargs: chunks)
    return hub.sanity_gate(None, sae, [[0] * len(part) for part, _ in chunks])


def test_a_few_sink_tokens_do_not_decide_the_variance_explained(gemma, make_sae, monkeypatch, capsys):
    h = torch.randn(6096, 32, generator=torch.Generator().manual_seed(0)) + 3
    fits = make_sae(gemma, spoil=lopsided)
    plain = gate_on(monkeypatch, fits, h)
    by_hand = 1 - h[:, 0].square().sum() / (h - h.mean(0)).square().sum()
    assert plain["variance_explained"] == pytest.approx(by_hand.item(), abs=3e-3) and plain["n_tokens"] == 6096
    sinks = h.clone()
    sinks[[7, 2222, 6000]] = torch.eye(32)[0] * 50 * h.norm(dim=1).mean()
    found = gate_on(monkeypatch, fits, sinks)
    assert found["variance_explained"] == pytest.approx(plain["variance_explained"], abs=3e-3)
    assert "the thousandth of largest norm left out" in capsys.readouterr().out
    for spoil in (broken, too_large):
        with pytest.raises(UserError, match="does not fit"):
            gate_on(monkeypatch, make_sae(gemma, spoil=spoil), sinks)


def test_the_gate_looks_at_all_windows(gemma, make_sae, monkeypatch):
    h = torch.randn(6096, 32, generator=torch.Generator().manual_seed(0))
    h[4096:, 0] *= 20  # the shorter windows, which come last
    with pytest.raises(UserError, match="does not fit"):
        gate_on(monkeypatch, make_sae(gemma, spoil=lopsided), h)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_residual_stream_that_is_not_finite_passes_no_gate(gemma, make_sae, monkeypatch, value):
    h = torch.randn(300, 32)
    h[120, 5] = value
    chunks = [(part, None) for part in h.split(100)]
    monkeypatch.setattr(edits, "residuals", lambda *args, **kwargs: chunks)
    with pytest.raises(UserError, match="not finite"):
        hub.sanity_gate(None, make_sae(gemma, spoil=lopsided), [[0] * 100] * 3, insist=False)


def test_sanity_gate_stops_a_sae_read_with_the_wrong_architecture(gemma, tmp_path):
    # a JumpReLU SAE whose cfg.json calls it standard loses its thresholds: far too many features fire
    write_sae(tmp_path, "gemma2", spoil=lambda sae: sae.threshold.fill_(2.5), l0=1.0)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "architecture": "standard"}))
    try:
        sae = common.load_sae(str(tmp_path), 1, gemma)
    except UserError:  # SAELens may already refuse the unknown weight
        return
    with pytest.raises(UserError, match="does not fit"):
        hub.sanity_gate(gemma, sae, some_windows(gemma))


def test_offline_loading(model_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = common.load_model(str(model_folder("gpt2")), "cpu")
    assert model.original_model.config._attn_implementation == "eager"


def test_a_feature_named_twice_is_refused(gemma, tmp_path):
    sae = common.load_sae(str(write_sae(tmp_path, "gemma2")), 1, gemma)
    with pytest.raises(ValueError, match="twice"), ablate(gemma, sae, [4, 4]):
        pass


def test_a_hook_name_without_a_layer_number_is_refused(gemma, tmp_path):
    with pytest.raises(UserError, match="hook point"):
        common.load_sae(str(write_sae(tmp_path, "gemma2", hook_name="blocks.x.hook_resid_post")), 1, gemma)


def spoiled(model_folder, tmp_path, change) -> str:
    """A copy of the Llama's folder that `change(folder)` has spoiled."""
    shutil.copytree(model_folder("llama"), tmp_path / "llama")
    change(tmp_path / "llama")
    return str(tmp_path / "llama")


def pointer(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 209\n")


def cut_short(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def with_config(**more):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **more}))

    return change


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_special_tokens(folder):
    tokenizer = train_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.bos_token = None
    tokenizer.save_pretrained(folder)


def not_a_number(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(folder)


BAD_MODELS = {
    "weights are a git-LFS pointer": (lambda folder: pointer(folder / "model.safetensors"), "git lfs pull"),
    "tokenizer is a git-LFS pointer": (lambda folder: pointer(folder / "tokenizer.json"), "git lfs pull"),
    "weights cut short": (lambda folder: cut_short(folder / "model.safetensors"), "model.safetensors is damaged"),
    "bitsandbytes": (
        with_config(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)), "quantised"
    ),
    "GPTQ": (with_config(quantization_config=dict(quant_method="gptq", bits=4)), "quantised"),
    "no tokenizer": (without_tokenizer, "tokenizer"),
    "no pad, EOS or BOS": (without_special_tokens, "no padding, EOS or BOS"),
    "a NaN among the weights": (not_a_number, r"model\.layers\.2\.mlp\.up_proj\.weight holds .* not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_model_that_cannot_be_used_is_refused_in_a_line(model_folder, tmp_path, case):
    change, told = BAD_MODELS[case]
    with pytest.raises(UserError, match=told) as caught:
        common.load_model(spoiled(model_folder, tmp_path, change), "cpu")
    assert "\n" not in str(caught.value) and "llama" in str(caught.value)
    if case.startswith("a NaN"):
        with pytest.raises(UserError, match=told):
            common.load_hf(str(tmp_path / "llama"), "cpu")


def test_a_padding_token_that_the_model_lacks_is_not_used(model_folder, tmp_path):
    def add_padding(folder):
        tokenizer = train_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(folder)

    model = common.load_model(spoiled(model_folder, tmp_path, add_padding), "cpu")
    _, ids = next(batches([[2, 5, 6], [2, 7]], 2, model.tokenizer, "cpu"))
    assert ids.tolist() == [[2, 5, 6], [2, 7, model.tokenizer.eos_token_id]]


@pytest.mark.parametrize("kind", ["jumprelu", "gated", "topk"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_sae_that_is_not_finite_is_refused_by_the_tensors_name(gemma, tmp_path, kind, value):
    names = [
        name for name, _ in common.load_sae(str(write_sae(tmp_path, "gemma2", kind=kind)), 1, gemma).named_parameters()
    ]
    assert {"W_enc", "W_dec", "b_dec"} < set(names)
    for name in names:
        write_sae(
            tmp_path, "gemma2", kind=kind, spoil=lambda sae, name=name: getattr(sae, name).view(-1)[5].fill_(value)
        )
        with pytest.raises(UserError, match=f"{name} holds values that are not finite"):
            common.load_sae(str(tmp_path), 1, gemma)


def sparsify(folder):
    (folder / "sae_weights.safetensors").rename(folder / "sae.safetensors")
    (folder / "cfg.json").write_text(
        json.dumps(dict(activation="topk", expansion_factor=2, num_latents=64, k=8, d_in=32))
    )


@pytest.mark.parametrize("change,told", [
    (lambda folder: pointer(folder / "sae_weights.safetensors"), "git lfs pull"),
    (lambda folder: cut_short(folder / "sae_weights.safetensors"), "damaged or cut short"),
    (sparsify, "sparsify"),
])  # fmt: skip
def test_sae_file_that_cannot_be_read_is_refused_in_a_line(gemma, tmp_path, change, told):
    change(write_sae(tmp_path, "gemma2"))
    with pytest.raises(UserError, match=told) as caught:
        common.load_sae(str(tmp_path), 1, gemma)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [dict(clamp=math.nan), dict(clamp=-math.inf), dict(clamp=[-1.0, math.nan])])
def test_a_flag_that_is_not_finite_is_refused(flags):
    with pytest.raises(UserError, match=r"--clamp .*: a finite number is wanted"):
        settings(parser("a script"), flags)


# ------------------------------------------------------------------------- is the bridge its own model


def test_a_bridge_that_is_not_its_hugging_face_model_is_refused(model_folder):
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match="CohereForCausalLM gives other probabilities than Hugging Face"):
            common.load_model(str(model_folder("cohere")), "cpu", dtype)


@pytest.mark.slow
def test_a_family_that_transformerlens_cannot_run_is_refused_in_a_line(model_folder):
    for family, dtype in (("qwen3_next", "float32"), ("olmo2", "bfloat16")):
        with pytest.raises(UserError, match="does not run here"):
            common.load_model(str(model_folder(family)), "cpu", dtype)


def test_alike_allows_rounding_in_the_models_dtype_and_no_more(half_model):
    plain, ids = half_model.original_model, edits.random_ids(half_model.original_model)
    wanted = edits.log_probs(plain, ids)
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    assert edits.alike(wanted + 0.01 * noise, wanted, plain, lambda: edits.log_probs(plain, ids))
    assert not edits.alike(wanted + noise, wanted, plain, lambda: edits.log_probs(plain, ids))
    assert torch.equal(edits.log_probs(plain, ids), wanted)  # the roundings are gone again


# ------------------------------------------------------------------------------------ the first token


@pytest.fixture(scope="session")
def wordy(model_folder, tmp_path_factory):
    """A GPT-2 whose tokenizer adds no BOS."""
    tokenizer, folder = train_tokenizer(), tmp_path_factory.mktemp("wordy") / "gpt2"
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    shutil.copytree(model_folder("gpt2"), folder)
    tokenizer.save_pretrained(folder)
    model = common.load_model(str(folder), "cpu")
    assert model.tokenizer("a")["input_ids"][0] != 2
    return model


def test_a_sequences_first_token_is_neither_counted_nor_edited(wordy, make_sae):
    sae, ids = make_sae(wordy), torch.tensor([[30, 31, 32, 33, 34], [40, 41, 2, 43, 44]])
    h = residual(wordy, ids)
    assert (sae.encode(h)[:, 0, FEATURES] > 0).any(-1).all()
    with ablate(wordy, sae, FEATURES, -3.0):
        found = next_layer_input(wordy, ids)
    kept = torch.tensor([[False, True, True, True, True], [False, True, False, True, True]])
    assert torch.equal((found != h).any(-1), kept)
    counted = common.firing_rates(wordy, sae, ids.tolist())
    assert counted.n_tokens == 7 and torch.equal(counted.fires, (sae.encode(h)[kept] > 0).sum(0))


def test_the_first_token_of_a_cached_or_padded_pass(wordy):
    plain, ids = wordy.original_model, torch.tensor([[30, 31, 32, 33], [0, 0, 42, 43]])
    with edits.watch_tokens(plain, wordy.tokenizer) as seen, torch.inference_mode():
        cache = plain(ids[:1, :2], use_cache=True).past_key_values
        assert seen["ordinary"].tolist() == [[False, True]]
        plain(ids[:1, 2:], past_key_values=cache)
        assert seen["ordinary"].tolist() == [[True, True]]
        plain(ids, attention_mask=(ids != 0).long())
        assert seen["ordinary"].tolist() == [[False, True, True, True], [False, False, False, True]]


def test_generation_without_bos_equals_recomputation(wordy, make_sae):
    """Prompts of two lengths, left-padded, with a cache: each answer is that of the prompt alone."""
    sae, prompts = make_sae(wordy), [[30, 31, 32, 33, 34, 35, 36], [47, 48, 49, 50]]
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    ids = torch.tensor([[0] * (7 - len(row)) + row for row in prompts])
    clean = wordy.original_model.generate(ids, attention_mask=(ids != 0).long(), **settings)[:, 7:]
    with ablate(wordy, sae, FEATURES, -3.0):
        found = wordy.original_model.generate(ids, attention_mask=(ids != 0).long(), **settings)[:, 7:]
        for row, answer in zip(prompts, found.tolist()):
            for _ in range(6):
                logits = wordy(torch.tensor([row]), use_cache=False)[0, -1]
                logits[1] = -torch.inf
                row = [*row, logits.argmax().item()]
            assert row[-6:] == answer
    assert not torch.equal(found, clean)


def test_windows_begin_as_scored_prompts_do(tokenizer, wordy):
    texts = ["The cat sat on the mat."]
    for one, asked in ((tokenizer, True), (wordy.tokenizer, False)):
        window = token_windows(one, texts)[0][0]
        assert window == one(texts[0])["input_ids"] and (window[0] == 2) == asked
        assert token_windows(one, texts, bos=True)[0] == [[2, *window[asked:]]]


def test_windows_are_no_longer_than_the_models_positions(wordy):
    one = copy.copy(wordy.tokenizer)
    assert one.model_max_length == 512
    one.model_max_length = 5
    assert max(map(len, token_windows(one, ["The cat sat on the mat and looked at the moon."])[0])) == 5


# ------------------------------------------------------------------------------------------------ memory

LOAD = """
import sys
sys.path.insert(0, {root!r})
import torch
import common

def own_memory():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

before = own_memory()
model = common.load_model({folder!r}, "cpu", "bfloat16")
after = own_memory()
with torch.inference_mode():
    model(torch.tensor([[2, 5, 6, 7]]), use_cache=False)
print(after - before, torch.nn.utils.parameters_to_vector(model.original_model.parameters()).dtype)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory is a process's own")
@pytest.mark.slow
def test_a_bfloat16_model_is_loaded_without_a_copy_of_it(tokenizer, tmp_path):
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=8, bos_token_id=2, eos_token_id=1)  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    program = LOAD.format(root=str(Path(common.__file__).parent), folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    out = run.stdout.split()[-2:]
    assert out[1] == "torch.bfloat16"
    assert int(out[0]) < size / 2, f"{int(out[0]):,} bytes for a file of {size:,}"


@pytest.mark.parametrize("way", ["never", "all-but-bos"])
def test_special_tokens_are_edited_where_saebench_edits_them(model_folder, make_sae, way):
    """All tokens but the first, chat markers too, not the padding of a row's end; what is counted does not change."""
    folder = str(model_folder("gemma2"))
    model = common.load_model(folder, "cpu", edit_special=way)
    sae = make_sae(model)
    ids = some_ids(model)
    special = torch.isin(ids, torch.tensor(special_ids(model.tokenizer)))
    with edits.watch_tokens(model.original_model, model.tokenizer) as seen:
        model(ids)
    first = torch.zeros_like(special)
    first[:, 0] = True
    end = torch.zeros_like(special)
    end[0, -4:] = True
    assert torch.equal(seen["ordinary"], ~special & ~first)
    assert torch.equal(seen["edited"], ~first & ~end if way == "all-but-bos" else ~special & ~first)
    features = list(range(D_SAE))
    with common.ablate(model, sae, features, -5.0):
        there = residual(model, ids)
    moved = (there != residual(model, ids)).any(-1)
    assert not moved[first].any() and moved[~special & ~first].any()
    assert moved[special & ~first & ~end].any() == (way == "all-but-bos") and not moved[end].any()
    run = evaluation.OnePass(model, [edits.edit_of("clamp", sae, features=features, clamp=-5.0)])
    run(ids)
    edited = run.edited(run.copies, 1, 0)
    torch.testing.assert_close(edited, there[[copy.prompt for copy in run.copies]], atol=1e-5, rtol=1e-5)
