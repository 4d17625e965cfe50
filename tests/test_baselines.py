"""The training baselines' losses by hand, which weights they reach, tuning that goes on where it stopped, and --all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import some_ids
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import baselines
import pareto
import rmu
import robustness
from common import decoder_layers, load_model, settings
from data import UserError, load_benchmark, special_ids
from picking import Rates

ROOT = Path(__file__).resolve().parent.parent


def hf(folder, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def nats_by_hand(model, ids, special):
    """Summed next-token losses and number of targets of each row, from the logits in numpy."""
    with torch.no_grad():
        logits = model(ids).logits.numpy()[:, :-1]
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    goal = ids.numpy()[:, 1:]
    real = ~np.isin(goal, special)
    losses = -np.take_along_axis(log_probs, goal[..., None], -1)[..., 0] * real
    return losses.sum(1), real.sum(1)


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_losses_by_hand(model_folder, get_model, family):
    model, tokenizer = hf(model_folder(family))
    special = special_ids(tokenizer)
    forget, retain = some_ids(get_model(family)), some_ids(get_model(family), seed=1)
    nats_f, n_f = nats_by_hand(model, forget, special)
    nats_r, n_r = nats_by_hand(model, retain, special)
    before = nats_f - np.array([3.0, -2.0, 0.5, 0.0])
    found_f, found_r = (baselines.nll(model, ids, torch.tensor(special)) for ids in (forget, retain))
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
    special = torch.tensor(special_ids(tokenizer))
    forget = baselines.nll(model, some_ids(get_model("llama")), special)
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
    assert baselines.salient(forget, retain, 5) == [0, 2]
    assert baselines.salient(forget, retain, 1) == [0]


def test_crisp_loss_and_pre_activations_by_hand(gemma_sae):
    noise = torch.Generator().manual_seed(3)
    features, h = [1, 4, 9], torch.randn(2, 5, 32, generator=noise)
    pre = baselines.pre_activations(gemma_sae, features, h)
    assert torch.allclose(pre, h @ gemma_sae.W_enc[:, features] + gemma_sae.b_enc[features], atol=1e-6)
    acts, active = pre.relu(), torch.rand(2, 5, 3, generator=noise) > 0.5
    a, c = acts.double().numpy(), pre.double().numpy().mean(-1, keepdims=True)
    expected = (a + 30 * c)[active.numpy()].mean()
    assert baselines.crisp_forget(acts.double(), pre.double(), active, 30.0).item() == pytest.approx(expected, abs=1e-8)
    assert baselines.crisp_forget(acts, pre, torch.zeros_like(active), 30.0) == 0


def test_crisp_refuses_other_saes(gemma, make_sae):
    with pytest.raises(UserError, match="standard or JumpReLU"):
        baselines.pre_activations(make_sae(gemma, "topk"), [0], torch.zeros(1, 1, 32))


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_crisp_adapts_attention_and_mlp_of_its_layers_only(model_folder, family):
    model, _ = hf(model_folder(family))
    names = baselines.linear_modules(model, [1, 2])
    blocks = decoder_layers(model)
    assert len(names) == 2 * sum(isinstance(m, (torch.nn.Linear, baselines.Conv1D)) for m in blocks[1].modules())
    assert all(".1." in name or ".2." in name for name in names)


@pytest.fixture
def two_settings(monkeypatch):
    """Two settings a method, and short training."""
    for method, grid in baselines.GRIDS.items():
        monkeypatch.setitem(baselines.GRIDS, method, grid[:2])
    monkeypatch.setattr(rmu, "MULTIPLES", (4.0,))


SMALL = dict(limit=6, steps=2, layer=3)


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
    with pytest.raises(KeyboardInterrupt, match="2 finished settings are kept"):  # the unablated model's is one
        baselines.run(**flags, out=str(tmp_path / "r.json"))
    assert {path.name for path in tmp_path.glob("r*")} == {"r.pieces"}
    again = baselines.run(**flags, out=str(tmp_path / "r.json"))
    assert len(calls) == 4  # the second setting, and the chosen one for its folder
    for name in ("points", "chosen", "log"):
        assert json.dumps(again[name]) == json.dumps(whole[name])
    assert {path.name for path in tmp_path.glob("r*")} == {"r.json", "r.model", "r_losses.png"}


def test_gradients_reach_all_weights_and_crisp_those_of_its_layers(two_settings, tmp_path):
    original = load_file(ROOT / "tiny/model/model.safetensors")
    s = settings(baselines.flags, SMALL)
    lm = load_model("tiny")
    measured = baselines.Measured(lm, None, load_benchmark(s)[0], s)
    for method, layers in (("grad-diff", range(12)), ("crisp", range(2, 9))):
        setting = baselines.absolute(method, baselines.GRIDS[method][0], s)
        baselines.forgetful(method, setting, tmp_path / "r.model", measured, s)
        after = load_file(tmp_path / "r.model/model.safetensors")
        changed = {name for name in original if not torch.equal(original[name].float(), after[name].float())}
        matrices = {name for name in original if ".layers." in name and original[name].ndim == 2}
        assert {name for name in changed & matrices} == {n for n in matrices if int(n.split(".")[2]) in layers}
        assert ("model.embed_tokens.weight" in changed) == (method == "grad-diff")


def test_all_methods_one_figure_and_relearning(two_settings, monkeypatch, tmp_path):
    for method in set(baselines.GRIDS) - {"dsg", "npo"}:
        monkeypatch.delitem(baselines.GRIDS, method)
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
    methods = [*baselines.GRIDS, "rmu", "adaptive-rmu"]
    records = [json.loads(Path(path).read_text()) for path in done["records"]]
    assert [record["points"][record["chosen"]]["method"] for record in records] == methods
    assert len({json.dumps(record["data"]["mmlu"]["questions"]) for record in records}) == 1
    assert len({len(record["points"]) for record in records}) == 1  # as many settings each
    assert (tmp_path / "b_frontier.png").stat().st_size > 10_000
    costs = (tmp_path / "b_costs.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in costs[2:]] == methods
    report = json.loads((tmp_path / "b_robustness.json").read_text())
    assert [point["method"] for point in report["points"]] == ["none", *methods]
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
        (dict(method="diff-in-means", layer=12), "layers 0 to 11"),
        (dict(method="clamp", layer=4), "layer_3"),
    ],
)
def test_mistakes_are_named(two_settings, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        baselines.run(**SMALL | flags, out=str(tmp_path / "r.json"))
    assert not list(tmp_path.glob("*.json"))


def test_a_loss_that_is_no_number_ends_training():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=1.0)
    with pytest.raises(UserError, match="the loss is no number"):
        baselines.step((weight * torch.nan).sum(), optimizer, [weight])
    assert torch.equal(weight.detach(), torch.ones(2))


def test_a_foreign_record_and_records_that_differ_are_refused(two_settings, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json is not a record"):
        robustness.run(records=[str(tmp_path / "x.json")], out=str(tmp_path / "o.json"))
    for seed in (0, 1):
        baselines.run(method="zero-ablation", seed=seed, **SMALL, out=str(tmp_path / f"{seed}.json"))
    with pytest.raises(UserError, match="differ in seed"):
        robustness.run(records=[str(tmp_path / "0.json"), str(tmp_path / "1.json")], out=str(tmp_path / "o.json"))
