"""The training baselines' losses by hand, which weights they reach, tuning that goes on where it stopped, and --all.

Losses are computed here a second time in float64, from the formulas of the methods' released code.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, FAMILIES, LAYERS, fill, hf, nats_by_hand, some_ids, target_mask
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from safetensors.torch import load_file

import baselines
import evaluation
import methods
import pareto
import rmu
import robustness
from common import Rates, load_model
from data import UserError, load_benchmark
from edits import decoder_layers
from flags import settings
from show import method_name
from training import nll

ROOT = Path(__file__).resolve().parent.parent


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
    assert set(expected) == set(baselines.LOSSES)
    for method, (weights, away, back) in expected.items():
        parts = baselines.LOSSES[method](found_f, found_r, torch.from_numpy(before), **weights)
        assert [float(part.detach()) for part in parts] == pytest.approx([away, back], rel=1e-8, abs=1e-8)


def test_a_small_beta_makes_npo_gradient_ascent(model_folder, get_model):
    model, tokenizer = hf(model_folder("llama"))
    ids = some_ids(get_model("llama"))
    forget = nll(model, ids, target_mask(ids, tokenizer, torch.ones(4)))
    before = forget.nats.detach().clone()
    away, _ = baselines.npo(forget, forget, before, beta=1e-6)
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
    assert baselines.salient(forget, retain, 5) == [0, 2, 3]  # 3: its strength is 400 / (90 + 1)
    assert baselines.salient(forget, retain, 1) == [0]
    # ten that are more frequent, and too weak, stand before the eleventh: a release of k = 1 finds none
    forget = rates([50] * 10 + [40], [1.0] * 10 + [99.0], 100)
    retain = rates([0] * 11, [1.0] * 10 + [0.0], 100)
    assert baselines.salient(forget, retain, 1) == [] and baselines.salient(forget, retain, 2) == [10]


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
    found = baselines.crisp_forget(sae64, features, was, now, ordinary, pull)
    assert found.item() == pytest.approx(acts[acts > 0].mean(), abs=1e-8)
    silent = baselines.crisp_forget(sae64, features, was, now, torch.zeros_like(ordinary), pull)
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
        baselines.crisp_forget(make_sae(gemma, "topk"), [0], h, h, torch.ones(1, 1, dtype=torch.bool), 5.0)


@pytest.fixture
def two_settings(monkeypatch):
    """Two settings a method, short training, little text."""
    for grids in (baselines.GRIDS, baselines.TRAINED):
        for method, grid in grids.items():
            monkeypatch.setitem(grids, method, grid[:2])
    monkeypatch.setattr(rmu, "MULTIPLES", (4.0,))


SMALL = dict(limit=6, steps=2, layer=3)


@pytest.mark.slow
def test_a_stopped_tuning_goes_on_and_ends_with_the_same_record(two_settings, monkeypatch, tmp_path):
    flags = dict(method="npo", **SMALL)
    whole = baselines.run(**flags, out=str(tmp_path / "whole.json"))
    train, calls = baselines.by_nll, []

    def stop_at_the_second(method, setting, *rest):
        calls.append(setting)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(method, setting, *rest)

    monkeypatch.setattr(baselines, "by_nll", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt, match="2 finished pieces are kept"):  # the unablated model's is one
        baselines.run(**flags, out=str(tmp_path / "r.json"))
    assert {path.name for path in tmp_path.glob("r*")} == {"r.pieces"}
    again = baselines.run(**flags, out=str(tmp_path / "r.json"))
    assert len(calls) == 4  # the second setting, and the chosen one for its folder
    for name in ("points", "chosen", "log"):
        assert json.dumps(again[name]) == json.dumps(whole[name])
    assert {path.name for path in tmp_path.glob("r*")} == {"r.json", "r.model", "r_losses.png"}


@pytest.mark.slow
def test_gradients_reach_all_weights_and_crisp_those_of_its_layers(two_settings, tmp_path):
    original = load_file(ROOT / "tiny/model/model.safetensors")
    s = settings(baselines.flags, SMALL)
    lm = load_model("tiny")
    texts = load_benchmark(s)[0]
    measured = methods.measure(lm, s.layer, None, texts["forget"], texts["retain"], s.clamp, s)
    for method, layers in (("grad-diff", range(CONFIG["num_hidden_layers"])), ("crisp", range(2, 7))):
        setting = baselines.absolute(method, baselines.TRAINED[method][0], s)
        baselines.forgetful(method, setting, tmp_path / "r.model", texts, measured, s)
        after = load_file(tmp_path / "r.model/model.safetensors")
        changed = {name for name in original if not torch.equal(original[name].float(), after[name].float())}
        matrices = {name for name in original if ".layers." in name and original[name].ndim == 2}
        assert {name for name in changed & matrices} == {n for n in matrices if int(n.split(".")[2]) in layers}
        assert ("model.embed_tokens.weight" in changed) == (method == "grad-diff")


def test_the_saes_layer_is_not_the_one_that_rmu_steers():
    s = settings(baselines.flags, {"layer": 9, "limit": 6})
    words = {method: baselines.command_of(method, Path("r.json"), s) for method in ("dsg", "rmu", "adaptive-rmu")}
    assert [method for method in words if "--layer" in words[method]] == ["dsg"]
    assert all("--limit" in line for line in words.values())


@pytest.mark.slow
def test_all_methods_one_figure_and_relearning(two_settings, monkeypatch, tmp_path):
    for grids in (baselines.GRIDS, baselines.TRAINED):
        for method in set(grids) - {"dsg", "npo"}:
            monkeypatch.delitem(grids, method)
    scripts, started = {"baselines.py": baselines, "rmu.py": rmu, "pareto.py": pareto, "robustness.py": robustness}, []

    def in_this_process(command):  # what baselines.call starts as a process of its own
        script = scripts[Path(command[1]).name]
        given = vars(script.flags.parse_args(command[2:]))
        started.append(Path(command[1]).name)
        if script is rmu:
            given["steps"] = 2
        script.run(**given)

    monkeypatch.setattr(baselines, "call", in_this_process)
    flags = dict(all=True, relearn=2, **SMALL, out=str(tmp_path / "b.json"))
    done = baselines.run(**flags)
    every = [*baselines.GRIDS, *baselines.TRAINED, "rmu", "adaptive-rmu"]
    records = [json.loads(Path(path).read_text()) for path in done["records"]]
    assert [record["points"][record["chosen"]]["method"] for record in records] == every
    assert len({json.dumps(record["data"]["mmlu"]["questions"]) for record in records}) == 1
    assert len({len(record["points"]) for record in records}) == 1  # as many settings each
    assert (tmp_path / "b_frontier.png").stat().st_size > 10_000
    costs = (tmp_path / "b_costs.md").read_text().splitlines()
    names = [method_name(method) for method in every]
    assert [line.split(" | ")[0].strip("| ") for line in costs[2 : 2 + len(every)]] == names
    assert "loss on answer" in costs[2 + every.index("npo")] and "first batch's norm" in costs[-2]
    report = json.loads((tmp_path / "b_robustness.json").read_text())
    assert [point["method"] for point in report["points"]] == ["none", *every]
    for point in report["points"]:
        assert set(point["relearned"]) == {"retain", "forget"}
        assert sum(point["letters"].values()) == pytest.approx(1)
        assert {"as tuned", "other wording", "options reversed", "no header", "in words", "MMLU"} < set(point["scores"])
    # as tuned, each answers what its record says
    for record, point in zip(records, report["points"][1:]):
        letters = record["points"][record["chosen"]]["scores"]["wmdp_bio"]["letters"]
        assert point["scores"]["as tuned"]["letters"] == letters, point["method"]
    started.clear()
    Path(done["records"][1]).unlink()
    baselines.run(**flags)  # only what is missing
    assert started.count("baselines.py") == 1 and "rmu.py" not in started


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(method="refusal-clamp"), "--refusal-latent"),
        (dict(method="diff-in-means", layer=40), LAYERS),
        (dict(method="clamp", layer=4), "layer_3"),
    ],
)
def test_mistakes_are_named(two_settings, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        baselines.run(**SMALL | flags, out=str(tmp_path / "r.json"))
    assert not list(tmp_path.glob("*.json"))


def test_a_foreign_record_and_records_that_differ_are_refused(two_settings, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json is not a record"):
        robustness.run(records=[str(tmp_path / "x.json")], out=str(tmp_path / "o.json"))
    for seed in (0, 1):
        baselines.run(method="zero-ablation", seed=seed, **SMALL, out=str(tmp_path / f"{seed}.json"))
    with pytest.raises(UserError, match="differ in seed"):
        robustness.run(records=[str(tmp_path / "0.json"), str(tmp_path / "1.json")], out=str(tmp_path / "o.json"))


def test_robust_keeps_what_the_model_gets_right_in_all_orders(two_settings, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "PERMUTATIONS", evaluation.PERMUTATIONS[:3])
    flags = dict(method="zero-ablation", **SMALL)
    whole = baselines.run(**flags, out=str(tmp_path / "whole.json"))
    found = baselines.run(**flags, robust=True, out=str(tmp_path / "r.json"))
    for name in ("wmdp_bio", "mmlu"):
        asked, kept = (set(record["data"][name]["questions"]) for record in (whole, found))
        assert kept <= asked and found["points"][0]["scores"][name]["accuracy"] == 1
        assert found["points"][0]["scores"][f"{name}_tuning"]["accuracy"] == 1
    with pytest.raises(UserError, match="--prompt or --robust"):
        robustness.run(records=[str(tmp_path / "r.json")], out=str(tmp_path / "o.json"))


def test_a_method_is_tuned_on_other_sets_and_asked_again_on_the_robust_one(two_settings, tmp_path):
    """The cloze set's answers have no letters, so the forms of robustness.py, which ask for some, are not theirs."""
    flags = dict(method="zero-ablation", **SMALL)
    cloze = baselines.run(**flags, wmdp="cloze", out=str(tmp_path / "cloze.json"))
    table = baselines.cost_table([cloze]).splitlines()
    cells = dict(zip(table[0].split(" | "), table[2].split(" | ")))
    assert cells["P(a letter)"] == "" and float(cells["in words"]) >= 50
    with pytest.raises(UserError, match="--wmdp cloze"):
        robustness.run(records=[str(tmp_path / "cloze.json")], out=str(tmp_path / "o.json"))
    rows = (ROOT / "tiny/data/wmdp_bio.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "wmdp_bio_robust.jsonl").write_text("".join(rows[:100]))
    robust = baselines.run(**flags, wmdp="robust", data=str(tmp_path), out=str(tmp_path / "robust.json"))
    assert max(robust["data"]["wmdp_bio"]["questions"]) < 100
    again = robustness.run(records=[str(tmp_path / "robust.json")], out=str(tmp_path / "o.json"))
    assert again["settings"]["wmdp"] == again["data"]["wmdp_bio"]["wmdp"] == "robust"
    letters = robust["points"][robust["chosen"]]["scores"]["wmdp_bio"]["letters"]
    assert again["points"][1]["scores"]["as tuned"]["letters"] == letters
    assert "other wording" not in again["points"][1]["scores"]
