"""Every script's path with `--device mps`, on a pretended GPU of Apple's, which has no float64."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, command, write_sae
from sae_lens import SAE
from two_devices import apple_gpu

import baselines
import edits
import robustness
import train_sae
import unlearning
from common import load_hf, load_model, load_sae
from robustness import LastToken, directions, push

SCRIPTS = {
    "feature_ablate_1.py": [], "feature_ablate_2.py": [], "feature_ablate_3.py": [],
    "pareto.py": ["--clamp", "0", "-4", "--n-features", "2", "5"],
    "lm_eval_ablated.py": ["--tasks", "tiny_wmdp_bio", "--unablated"],
}  # fmt: skip
WITHOUT = {"pareto.py": ("n_features", "clamp")}
# the other methods take the path of one of these
METHODS = ["mean-ablation", "dsg", "diff-in-means", "refusal-clamp", "npo", "crisp", "npo-sam", "mudman",
           "circuit-breakers", "undo", "rmu", "repselect"]  # fmt: skip
ASKED_AGAIN = ("dsg", "diff-in-means", "npo")
ALL_WEIGHTS = ("npo", "npo-sam", "mudman", "undo")


@pytest.fixture
def small(model_folder, scale_of, gemma, tmp_path, monkeypatch):
    """Flags of runs on a random model, on some of tiny's questions and texts."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the pretence holds in one thread
    (tmp_path / "data").mkdir()
    for name in ("wmdp_bio", "mmlu", "mmlu_dev", "wikitext", "openwebtext"):
        lines = (TINY / f"data/{name}.jsonl").read_text().splitlines(keepends=True)[:20]
        (tmp_path / f"data/{name}.jsonl").write_text("".join(lines))
    model = str(model_folder("gemma2"))
    sae = str(write_sae(tmp_path / "sae", model, scale_of(gemma), d_sae=512))
    return dict(model=model, sae=sae, layer=1, data=str(tmp_path / "data"), no_sanity=True, limit=4, clamp=-4.0)


def test_the_pretence_is_strict():
    with apple_gpu():
        here = torch.ones(3).to("mps")
        assert (here + 1).tolist() == [2, 2, 2]
        for wide in (here.double, lambda: here.sum(0, dtype=torch.float64), lambda: here.cpu().double().to("mps"),
                     lambda: torch.zeros(3, dtype=torch.float64, device="mps")):  # fmt: skip
            with pytest.raises(TypeError, match="float64"):
                wide()
        with pytest.raises(RuntimeError, match="tensors on"):
            here + torch.ones(3)


def rows_on(device: str, script: str, small: dict, monkeypatch, tmp_path, *more) -> dict:
    """Of the record that the script's command line writes."""
    flags = {**small, "n_features": 4, "device": device, "out": tmp_path / f"{device}.json"}
    for name in WITHOUT.get(script, ()):
        del flags[name]
    given = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in flags.items()]
    assert command(monkeypatch, script, *given, *more) == 0
    return json.loads(flags["out"].read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts(script, small, monkeypatch, tmp_path):
    given = (script, small, monkeypatch, tmp_path, *SCRIPTS[script])
    with apple_gpu():
        found = rows_on("mps", *given)
    assert found == rows_on("cpu", *given)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["dsg", "attribution", "output-score"])
def test_picking(rule, small, monkeypatch, tmp_path):
    with apple_gpu():
        rows_on("mps", "feature_ablate_2.py", small, monkeypatch, tmp_path, "--pick", rule)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods_and_what_survives_of_them(method, small, monkeypatch, tmp_path):
    registry = edits.METHODS if method in edits.METHODS else unlearning.METHODS
    monkeypatch.setitem(registry, method, replace(registry[method], grid=registry[method].grid[:1]))
    monkeypatch.setattr(unlearning, "salient", lambda *rates: [1, 2, 3])  # random features are not
    more = {"refusal_latent": 30} if method == "refusal-clamp" else {}
    flags = dict(method=method, steps=2, **more, **small)
    with apple_gpu():
        out = str(tmp_path / "r.json")
        found = baselines.run(device="mps", out=out, **flags)["rows"]
        if method in ASKED_AGAIN:
            robustness.run(records=[out], relearn=2, shots=1, device="mps", out=str(tmp_path / "robust.json"))
    if method in ALL_WEIGHTS:  # on a pretended device tied weights are two, which are trained apart
        return
    wanted = baselines.run(device="cpu", out=str(tmp_path / "cpu.json"), **flags)["rows"]
    assert found.keys() == wanted.keys()
    for name, row in found.items():
        cost, real = (one["scores"]["openwebtext/loss"]["mean"] for one in (row, wanted[name]))
        assert row["settings"] == wanted[name]["settings"] and cost == pytest.approx(real, abs=1e-5)


@pytest.mark.slow
def test_the_recovery_attack(small):
    """On questions that are lost or not: robustness.py asks the lost ones, and a random model loses few."""
    with apple_gpu():
        sae = load_sae(small["sae"], 1, load_model(small["model"], "mps"))
        model, tokenizer = load_hf(small["model"], "mps")
        edit = edits.ablation(sae, [1, 2, 3], -4.0)
        last = LastToken(model, tokenizer, edit, [[2, 30, 31, 32], [2, 40, 41]], 1)
        letters, wanted = (torch.tensor(ids, device="mps") for ids in ([[20], [21], [22], [23]], [1, 2]))
        found, delta = push(last, letters, wanted, 0.1, directions(edit, 1), steps=2)
    assert found.shape == (2,) and delta.norm(dim=-1).cpu().min() > 0


@pytest.mark.slow
def test_training_an_sae(small, monkeypatch, tmp_path):
    monkeypatch.setattr(train_sae, "BUFFER", 2048)
    with apple_gpu():
        train_sae.run(model=small["model"], text=str(TINY / "data/wikitext.jsonl"), layers=[1], width=64, k=8,
                      tokens=2048, context=16, device="mps", out=str(tmp_path / "saes"))  # fmt: skip
    sae = SAE.load_from_disk(tmp_path / "saes/layer_1")
    assert sae.W_dec.isfinite().all() and 0 < sae.threshold.min() < torch.inf
