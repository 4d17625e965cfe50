import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    D_MODEL,
    D_SAE,
    HOOK,
    MARKER,
    QUESTIONS,
    ordinary_mask,
    residual,
    some_ids,
    some_windows,
    train_tokenizer,
    write_sae,
)
from peft import LoraConfig, get_peft_model
from sae_lens import JumpReLUSAE
from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import common
import data
import edits
import evaluation
import hub
import show
from common import Rates, ablate, largest, matched_random
from data import Dataset, UserError, batches, load, token_windows

FEATURES = list(range(0, D_SAE, 3))


def rates(fires, n, total=None):
    fires = torch.tensor(fires)
    return Rates(fires, fires.double() if total is None else torch.tensor(total, dtype=torch.float64), n)


# ----------------------------------------------------------------------------------------- loading


def test_imports_do_not_look_for_garbage():
    """And garbage is looked for again behind them, whatever was alive before among it; at the end nothing is left to
    be looked through."""
    program = """if True:
        import atexit, gc, weakref
        import torch, transformers
        class Old: pass
        old = Old()
        old.itself, gone = old, weakref.ref(old)
        seen = []
        gc.callbacks.append(lambda phase, about: seen.append(about["generation"]) if phase == "start" else None)
        atexit.register(lambda: print(gc.get_freeze_count() > 500_000))
        import common
        print(seen.count(2), gc.isenabled(), gc.get_freeze_count())
        del old
        gc.collect()
        print(gone())
    """
    here = Path(common.__file__).parent
    run = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["0 True 0", "None", "True"]


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
    "several hooks": (dict(hook_name=["blocks.1.hook_resid_post"]), "does not say which hook point"),
    "an L0 in words": (dict(l0="about 40"), "cannot load the SAE .*about 40"),
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


def test_an_l0_written_as_text_is_a_number_and_a_page_that_is_none_is_not_shown(gemma, tmp_path, capsys):
    write_sae(tmp_path, "gemma2", spoil=perfect, l0="31", neuronpedia_id="gemma-2-2b-1-res")
    sae = common.load_sae(str(tmp_path), 1, gemma)
    assert evaluation.check_sae_quality(gemma, sae, some_windows(gemma))["promised_l0"] == 31
    stats = evaluation.FeatureStats(gemma, sae, 1, some_windows(gemma), [some_windows(gemma)], insist=False)
    show.print_features(stats, [3, 4])
    assert "Neuronpedia" not in capsys.readouterr().out


def test_an_l0_beyond_all_numbers_does_not_fit(gemma, tmp_path):
    write_sae(tmp_path, "gemma2", spoil=perfect, l0=10**400)
    with pytest.raises(UserError, match="does not fit this model"):
        evaluation.check_sae_quality(gemma, common.load_sae(str(tmp_path), 1, gemma), some_windows(gemma))


# ----------------------------------------------------------------------------------- rates and picking


def same_rates(a, b):
    assert torch.equal(a.fires, b.fires) and a.n_tokens == b.n_tokens
    torch.testing.assert_close(a.total, b.total, rtol=1e-5, atol=1e-5)


def test_firing_rates_by_hand(model, sae):
    windows = some_windows(model)
    fires, total, n = torch.zeros(D_SAE, dtype=torch.int64), torch.zeros(D_SAE, dtype=torch.float64), 0
    for row in windows:
        ids = torch.tensor([row])
        acts = sae.encode(residual(model, ids))[ordinary_mask(model, ids)]
        fires, total, n = fires + (acts > 0).sum(0), total + acts.double().sum(0), n + len(acts)
    found = common.firing_rates(model, sae, windows)
    same_rates(found, Rates(fires, total, n))
    torch.testing.assert_close(found.rate, fires / float(n), check_dtype=False)


def test_firing_rates_at_the_last_layer(model, make_sae):
    """Behind the last layer there is nothing to stop at: TransformerLens would go on to the logits."""
    sae = make_sae(model, layer=3, hook_name="blocks.3.hook_resid_post")
    ids, seen = some_ids(model), {}
    with model.hooks(fwd_hooks=[(sae.hook_point, lambda h, hook: seen.update(h=h))]), torch.inference_mode():
        model(ids)
    fires = (sae.encode(seen["h"].float()) > 0) & ordinary_mask(model, ids)[..., None]
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
    assert common.pick_features(FORGET, RETAIN, 4, "any-ratio") == [0, 2, 3, 4]
    assert common.pick_features(FORGET, RETAIN, 2) == [0, 2]
    with pytest.raises(UserError, match="leaves only 4"):
        common.pick_features(FORGET, RETAIN, 5, "any-ratio")


def test_a_feature_below_a_ratio_of_1_is_picked_only_where_asked_for():
    forget, retain = rates([9, 5, 8, 1], 99), rates([19, 5, 30, 1], 199)  # ratios 1, 2, 0.58, 2
    assert common.pick_features(forget, retain, 3) == [1, 3, 0]
    with pytest.raises(UserError, match="of 4 the rule 'ratio' leaves only 3"):
        common.pick_features(forget, retain, 4)
    assert common.pick_features(forget, retain, 4, "any-ratio") == [1, 3, 0, 2]


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


def test_draws_of_random_features_have_seeds_in_a_row(gemma, gemma_sae):
    sae, picked = gemma_sae, [3, 5, 8]
    rates = Rates(torch.arange(sae.cfg.d_sae) + 1, torch.ones(sae.cfg.d_sae), 1000)
    rows = common.random_features(sae, (rates, rates), picked, -2.5, 3, seed=4)
    assert list(rows) == [f"random features{k}, clamp -2.5" for k in ("", " 2", " 3")]
    drawn = [edit.settings["features"] for edit in rows.values()]
    assert drawn == [matched_random(rates, rates, picked, seed) for seed in (4, 5, 6)] and drawn[0] != drawn[1]
    assert {(edit.method, edit.settings["clamp"]) for edit in rows.values()} == {("random-features", -2.5)}


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


# ---------------------------------------------------------------------------------------- the SAE check


def perfect(sae):
    """Two features per dimension, its positive and its negative part: exact, and 32 are active on each token."""
    eye = torch.eye(32)
    sae.W_enc.copy_(torch.cat([eye, -eye], 1))
    sae.W_dec.copy_(torch.cat([eye, -eye]))
    sae.b_enc.zero_(), sae.b_dec.zero_(), sae.threshold.zero_()


def broken(sae):
    perfect(sae)
    sae.threshold.fill_(1e3)


def test_sae_check_passes_a_fitting_sae(model, tmp_path, capsys):
    sae = common.load_sae(str(write_sae(tmp_path, "x", spoil=perfect, l0=31.0)), 1, model)
    found = evaluation.check_sae_quality(model, sae, some_windows(model))
    assert found["l0"] == pytest.approx(32, abs=0.1) and found["variance_explained"] > 0.999
    assert found["promised_l0"] == 31.0
    assert found["n_tokens"] == sum(int(ordinary_mask(model, torch.tensor(row)).sum()) for row in some_windows(model))
    assert "L0 32.0 (promised 31.0)" in capsys.readouterr().out


@pytest.mark.parametrize("always,told", [(20, True), (8, False)])
def test_an_l0_of_features_that_are_always_active_is_said(gemma, tmp_path, capsys, always, told):
    """Of the 32 that `perfect` has active on a token, `always` are the same on every one."""

    def constant(sae):
        perfect(sae)
        sae.b_enc[:always], sae.b_enc[32 : 32 + always] = 1e6, -1e6

    sae = common.load_sae(str(write_sae(tmp_path, "x", spoil=constant)), 1, gemma)
    found = evaluation.check_sae_quality(gemma, sae, some_windows(gemma), insist=False)
    assert found["l0"] == pytest.approx(32, abs=0.1) and found["always_on"] == always
    note = f"note: {always}.0 of this L0 are {always} features active on more than nine"
    assert (note in capsys.readouterr().out) == told


def test_of_many_windows_the_sae_check_reads_some(gemma, tmp_path):
    sae, windows = common.load_sae(str(write_sae(tmp_path, "x", spoil=perfect)), 1, gemma), some_windows(gemma) * 4
    tokens = sum(map(len, windows))
    whole, half = (
        evaluation.check_sae_quality(gemma, sae, windows, most=most)["n_tokens"] for most in (tokens, tokens // 2)
    )
    assert 0 < half < 0.7 * whole


@pytest.mark.parametrize("spoil,promised", [(broken, None), (perfect, 200.0), (perfect, 5.0)])
def test_sae_check_stops_a_broken_sae(gemma, tmp_path, spoil, promised):
    sae = common.load_sae(str(write_sae(tmp_path, "gemma2", spoil=spoil, l0=promised)), 1, gemma)
    with pytest.raises(UserError, match="does not fit"):
        evaluation.check_sae_quality(gemma, sae, some_windows(gemma))
    assert evaluation.check_sae_quality(gemma, sae, some_windows(gemma), insist=False)["n_tokens"] > 50


def lopsided(sae):
    """As `perfect`, but nothing of the first dimension is written back."""
    perfect(sae)
    sae.W_dec[:, 0] = 0


def too_large(sae):
    lopsided(sae)
    sae.W_dec.mul_(2.5)


def check_on(monkeypatch, sae, h):
    """The SAE check on a residual stream h (n, 32) that comes in windows of 100, longest, if any, first."""
    batches = [(part, None) for part in h.split(100)]
    monkeypatch.setattr(edits, "iter_residual_stream", lambda *args, **kwargs: batches)
    return evaluation.check_sae_quality(None, sae, [[0] * len(part) for part, _ in batches])


def test_a_few_sink_tokens_do_not_decide_the_variance_explained(gemma, make_sae, monkeypatch, capsys):
    h = torch.randn(6096, 32, generator=torch.Generator().manual_seed(0)) + 3
    fits = make_sae(gemma, spoil=lopsided)
    plain = check_on(monkeypatch, fits, h)
    by_hand = 1 - h[:, 0].square().sum() / (h - h.mean(0)).square().sum()
    assert plain["variance_explained"] == pytest.approx(by_hand.item(), abs=3e-3) and plain["n_tokens"] == 6096
    sinks = h.clone()
    sinks[[7, 2222, 6000]] = torch.eye(32)[0] * 50 * h.norm(dim=1).mean()
    found = check_on(monkeypatch, fits, sinks)
    assert found["variance_explained"] == pytest.approx(plain["variance_explained"], abs=3e-3)
    assert "the thousandth of largest norm left out" in capsys.readouterr().out
    for spoil in (broken, too_large):
        with pytest.raises(UserError, match="does not fit"):
            check_on(monkeypatch, make_sae(gemma, spoil=spoil), sinks)


def test_the_sae_check_looks_at_all_windows(gemma, make_sae, monkeypatch):
    h = torch.randn(6096, 32, generator=torch.Generator().manual_seed(0))
    h[4096:, 0] *= 20  # the shorter windows, which come last
    with pytest.raises(UserError, match="does not fit"):
        check_on(monkeypatch, make_sae(gemma, spoil=lopsided), h)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_residual_stream_that_is_not_finite_passes_no_sae_check(gemma, make_sae, monkeypatch, value):
    h = torch.randn(300, 32)
    h[120, 5] = value
    batches = [(part, None) for part in h.split(100)]
    monkeypatch.setattr(edits, "iter_residual_stream", lambda *args, **kwargs: batches)
    with pytest.raises(UserError, match="not finite"):
        evaluation.check_sae_quality(None, make_sae(gemma, spoil=lopsided), [[0] * 100] * 3, insist=False)


def test_sae_check_stops_a_sae_read_with_the_wrong_architecture(gemma, tmp_path):
    # a JumpReLU SAE whose cfg.json calls it standard loses its thresholds: far too many features fire
    write_sae(tmp_path, "gemma2", spoil=lambda sae: sae.threshold.fill_(2.5), l0=1.0)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "architecture": "standard"}))
    try:
        sae = common.load_sae(str(tmp_path), 1, gemma)
    except UserError:  # SAELens may already refuse the unknown weight
        return
    with pytest.raises(UserError, match="does not fit"):
        evaluation.check_sae_quality(gemma, sae, some_windows(gemma))


def test_the_sae_check_of_tiny():
    """By another formula, which held one batch at a time, it was 0.94015648."""
    model = common.load_model("tiny", "cpu")
    sae, (windows, _) = common.load_sae(None, 7, model), token_windows(model.tokenizer, load("wikitext").texts, 128)
    assert evaluation.check_sae_quality(model, sae, windows)["variance_explained"] == 0.9402
    with pytest.raises(UserError, match="no token"):
        evaluation.check_sae_quality(model, sae, [])


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


def with_generation(**ids):
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(ids))


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


def rewritten(change):
    """A folder's weights, {name: tensor}, as `change` returns them."""

    def write(folder):
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return write


def without(*names):
    return rewritten(lambda weights: {name: value for name, value in weights.items() if name not in names})


def with_lora_names(weights):
    return {name.replace("q_proj.", "q_proj.base_layer."): value for name, value in weights.items()}


def lost_from_the_index(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink()
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    lost = index["weight_map"]["lm_head.weight"]
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != lost}
    file.write_text(json.dumps(index))


def shards_beside_an_old_file(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data.mul_(-1)
    model.save_pretrained(folder, max_shard_size="50KB")
    assert (folder / "model.safetensors").exists()


def merged_beside_its_adapter(folder):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(folder)


NOT_ITS_FILES = {
    "left-over LoRA names": (
        rewritten(with_lora_names), r"lack model\.layers\.0\.self_attn\.q_proj\.weight, .* and 2 more; "
        r"have beyond the model's model\.layers\.0\.self_attn\.q_proj\.base_layer"),
    "an untied head that is not there": (without("lm_head.weight"), r"the files lack lm_head\.weight$"),
    "a shard lost from the index": (lost_from_the_index, r"the files lack .*lm_head\.weight"),
    "fewer layers in the config": (with_config(num_hidden_layers=3), r"beyond the model's model\.layers\.3\."),
    "more layers in the config": (with_config(num_hidden_layers=5), r"lack model\.layers\.4\."),
    "another width": (with_config(intermediate_size=48), r"shape .*down_proj\.weight \(32, 64\) for \(32, 48\)"),
    "biases that the config denies": (rewritten(lambda weights: {
        **weights, "model.layers.0.self_attn.o_proj.bias": torch.ones(D_MODEL)}), r"beyond the model's .*o_proj\.bias"),
    "whole numbers without a scale": (rewritten(lambda weights: {
        **weights, "model.layers.1.mlp.up_proj.weight": torch.ones(64, D_MODEL, dtype=torch.int8)}),
        r"model\.layers\.1\.mlp\.up_proj\.weight holds whole numbers, and config.json has no quantization_config"),
    "whole numbers and a config that is null": (lambda folder: (
        NOT_ITS_FILES["whole numbers without a scale"][0](folder), with_config(quantization_config=None)(folder)),
        "holds whole numbers"),
    "an old file beside newer shards": (shards_beside_an_old_file, r"model\.safetensors and model\.safetensors\.index"),
    "merged weights beside their adapter": (merged_beside_its_adapter, "adapter_config.json beside weights"),
}  # fmt: skip
BAD_MODELS = NOT_ITS_FILES | {
    "text for the token that ends": (with_generation(eos_token_id="1"), "eos_token_id of its gen.* number: '1'"),
    "text among such tokens": (with_generation(eos_token_id=[1, "2"]), "eos_token_id of its gen"),
    "nothing that opens": (with_generation(bos_token_id={}), "bos_token_id of its generation config"),
    "a broken link to weights": (
        lambda folder: (folder / "extra.bin").symlink_to("nowhere"), "extra.bin is a folder or a broken link"),
    "a broken link": (lambda folder: (folder / "extra.json").symlink_to("nowhere"), "extra.json is a folder or a brok"),
    "a folder of that name": (lambda folder: (folder / "a.safetensors").mkdir(), "a.safetensors is a folder or a"),
    "an unknown activation": (with_config(hidden_act="no such"), "not a model folder that transformers can read"),
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


def test_whole_numbers_on_the_hub_are_refused(model_folder, stand_in):
    for name in ("good", "bad"):
        shutil.copytree(model_folder("llama"), stand_in.root / "models/some" / name)
    NOT_ITS_FILES["whole numbers without a scale"][0](stand_in.root / "models/some/bad")
    common.load_hf("some/good", "cpu")
    with pytest.raises(UserError, match=r"some--bad.*up_proj\.weight holds whole numbers"):
        common.load_hf("some/bad", "cpu")


def test_what_families_leave_out_or_keep_from_old_versions_is_no_fault(model_folder, tmp_path):
    """A tied head; masks and rotary tables that older versions of transformers saved; a part for images."""

    def old(weights):
        own = {"rotary_emb.inv_freq": 8, "attn.bias": 1, "attn.masked_bias": 1, "attention.masked_bias": 1}
        more = {f"model.layers.{layer}.self_attn.{name}": torch.ones(size)
                for layer in range(4) for name, size in own.items()}  # fmt: skip
        kept = {name: value for name, value in weights.items() if name != "lm_head.weight"}
        return {**kept, **more, "vision_tower.embeddings.weight": torch.ones(2)}

    def tied(folder):
        with_config(tie_word_embeddings=True)(folder)
        rewritten(old)(folder)

    model, _ = common.load_hf(spoiled(model_folder, tmp_path, tied), "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_transformers_warns_of_reaches_the_user(model_folder, tmp_path):
    """Nothing is silenced for the whole process; of loading, only the report whose lines load_weights raises itself."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        folder = spoiled(model_folder, tmp_path, with_config(tie_word_embeddings=True))  # the file has another head
        common.load_hf(folder, "cpu")
        log = logging.getLogger("transformers.modeling_utils")
        with hub.without_lines(log.name, "REPORT"):
            log.warning("a REPORT"), log.warning("another line")
        log.warning("a REPORT afterwards")
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert "we will NOT tie them" in said[0] and said[1:] == ["another line", "a REPORT afterwards"]


@pytest.mark.parametrize("device", ["gpu", "mps:7", "cuda:77", "meta"])
def test_a_device_that_is_not_there_is_refused_in_a_line(device):
    with pytest.raises(UserError, match=f"there is no device '{device}' here") as caught:
        common.load_model("tiny", device)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_the_bridge_encodes_and_scores_as_the_models_own_tokenizer(wordy, get_model):
    """A notebook's model(text): by default with a BOS where the tokenizer adds one; prepend_bos does what it says."""
    text = "The cat sat on the mat"
    for model, adds in ((get_model("gpt2"), True), (wordy, False)):
        plain = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenizer(text)["input_ids"] == [2] * adds + plain
        for prepend_bos, wanted in ((None, [2] * adds + plain), (False, plain), (True, [2, *plain])):
            assert model.to_tokens(text, prepend_bos=prepend_bos).tolist() == [wanted]
            with torch.inference_mode():
                found = model(text, return_type="loss", prepend_bos=prepend_bos)
                log_probs = model.original_model(torch.tensor([wanted])).logits[0, :-1].log_softmax(-1)
            assert found.item() == pytest.approx(-log_probs[range(len(wanted) - 1), wanted[1:]].mean().item(), abs=1e-5)


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


# ------------------------------------------------------------------------- is the bridge its own model


def test_a_bridge_that_is_not_its_hugging_face_model_is_refused(model_folder):
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match="CohereForCausalLM gives other probabilities than Hugging Face"):
            common.load_model(str(model_folder("cohere")), "cpu", dtype)


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_model_in_memory_becomes_the_bridge_that_its_folder_gives(model_folder, get_model, family):
    hf, tokenizer = common.load_hf(str(model_folder(family)), "cpu")
    hf.requires_grad_(True)
    ids = some_ids(get_model(family))
    with torch.inference_mode():
        plain = hf(ids).logits
        bridge = common.as_bridge(hf, tokenizer, str(model_folder(family)))
        assert torch.equal(bridge(ids), get_model(family)(ids)) and torch.equal(hf(ids).logits, bridge(ids))
        torch.testing.assert_close(bridge(ids), plain, atol=1e-5, rtol=1e-5)
    assert bridge.original_model is hf and bridge.tokenizer is tokenizer
    assert str(bridge.cfg.device) == "cpu" and bridge.cfg.dtype == torch.float32
    assert not any(p.requires_grad for p in bridge.parameters())


def test_the_dtype_and_the_retrained_model_are_the_presets(without_twin, monkeypatch):
    model, own = common.load_model("tiny", "cpu"), data.load("wmdp_bio")
    assert model.cfg.dtype == torch.float32 and common.load_retrained("tiny", own, "cpu") is None
    monkeypatch.setitem(hub.PRESETS, "tiny", replace(hub.PRESETS["tiny"], retrained="tiny-retrained"))
    weights, others = (one.original_model.state_dict() for one in (model, common.load_retrained("tiny", own, "cpu")))
    assert weights.keys() == others.keys() and any(not torch.equal(w, others[name]) for name, w in weights.items())
    assert common.load_retrained("tiny-retrained", own) is None and common.load_retrained("gpt2", own) is None


def test_an_sae_that_saelens_encodes_otherwise_is_refused(gemma, tmp_path, monkeypatch):
    write_sae(tmp_path, "gemma2")
    monkeypatch.setattr(JumpReLUSAE, "encode", lambda self, x: torch.relu(x @ self.W_enc + self.b_enc))
    with pytest.raises(UserError, match="another formula"):
        common.load_sae(str(tmp_path), 1, gemma)


@pytest.mark.slow
def test_a_family_that_transformerlens_cannot_run_is_refused_in_a_line(model_folder):
    for family, dtype in (("qwen3_next", "float32"), ("olmo2", "bfloat16")):
        with pytest.raises(UserError, match="does not run here"):
            common.load_model(str(model_folder(family)), "cpu", dtype)


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


def test_a_feature_must_be_rare_in_every_retain_set():
    first = Rates(torch.tensor([5, 0, 1]), torch.tensor([1.0, 0, 2.0]).double(), 100)
    second = Rates(torch.tensor([0, 2, 3]), torch.tensor([0.0, 1.0, 0.5]).double(), 50)
    for both in (largest([first, second]), largest([second, first])):
        assert both.fires.tolist() == [5, 4, 6] and both.n_tokens == 100
        assert both.total.tolist() == [1.0, 2.0, 2.0]
    same_rates(largest([first]), first)


def test_a_short_retain_set_takes_nothing_from_a_long_one():
    """Whichever comes first, and however short: each feature has its larger rate, to a token of the longer set."""
    noise = torch.Generator().manual_seed(0)
    share = torch.rand(2000, generator=noise).double() ** 8
    short, long, forget = (Rates(torch.binomial(torch.full((2000,), float(n)).double(), share, generator=noise).long(),
                                 torch.zeros(2000), n) for n in (500, 40_000, 40_000))  # fmt: skip
    exact = torch.maximum(short.rate, long.rate)
    for order in ([short, long], [long, short]):
        both = largest(order)
        assert both.n_tokens == 40_000 and float((both.rate - exact).abs().max()) < 1 / 40_000
        assert float((both.rate - exact).min()) > -1e-12
    assert common.pick_features(forget, largest([short, long]), 50) == common.pick_features(
        forget, largest([long, short]), 50)  # fmt: skip


def test_the_retrained_model_stands_beside_the_data_it_lacks_alone(without_twin, monkeypatch):
    monkeypatch.setitem(hub.PRESETS, "tiny", replace(hub.PRESETS["tiny"], retrained="tiny-retrained"))
    monkeypatch.setattr(common, "load_model", lambda name, *_: name)
    own = data.load("wmdp_bio")
    assert common.load_retrained("tiny", own) == common.load_retrained("tiny", own.held_out) == "tiny-retrained"
    assert common.load_retrained("tiny", Dataset("wmdp_bio", own.rows[:3] + QUESTIONS)) is None
