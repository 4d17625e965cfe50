"""Which weights the training baselines reach, tuning that goes on where it stopped, and --all."""

import gc
import json
import time
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, LAYERS
from safetensors.torch import load_file

import baselines
import evaluation
import methods
import pareto
import rmu
import robustness
from common import load_model
from data import UserError, load_benchmark
from flags import settings
from show import method_name

ROOT = Path(__file__).resolve().parent.parent


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
@pytest.mark.parametrize("method, where, part", [("clamp", methods, "firing_rates"), ("undo", baselines, "by_crisp")])
def test_the_time_to_make_a_point_has_what_tuning_had_measured(
    two_settings, monkeypatch, tmp_path, method, where, part
):
    """Features and the model that UNDO starts from are made once for all settings, but nobody has them for nothing. Nor
    do they stay in memory meanwhile, or when all is done."""
    real, calls = getattr(where, part), []

    def alive() -> int:
        gc.collect()
        return sum(isinstance(one, methods.Measured) for one in gc.get_objects())

    before = alive()

    def slow(*given, **named):
        time.sleep(1)
        calls.append(alive() - before)
        return real(*given, **named)

    monkeypatch.setattr(where, part, slow)
    record = baselines.run(method=method, **SMALL, out=str(tmp_path / "r.json"))
    assert len(calls) % 2 == 0 and record["seconds_to_make"] > len(calls) / 2
    assert set(calls) == {1} and alive() == before


@pytest.mark.slow
def test_gradients_reach_all_weights_and_lora_those_of_its_layers(two_settings, monkeypatch, tmp_path):
    monkeypatch.setitem(baselines.TRAINING, "crisp", [(2, 1.6e-2)])  # UNDO's teacher
    original = load_file(ROOT / "tiny/model/model.safetensors")
    s = settings(baselines.flags, SMALL)
    lm = load_model("tiny")
    texts = load_benchmark(s)[0]
    measured = methods.measure(lm, s.layer, None, texts["forget"], texts["retain"], s.clamp, s)
    lora = {"crisp": range(2, 7), "circuit-breakers": range(13)}
    for method in ("grad-diff", "npo-sam", "mudman", "undo", *lora):
        layers = lora.get(method, range(CONFIG["num_hidden_layers"]))
        setting = baselines.absolute(method, baselines.TRAINED[method][0], s)
        baselines.forgetful(method, setting, tmp_path / "r.model", texts, measured, s)
        after = load_file(tmp_path / "r.model/model.safetensors")
        changed = {name for name in original if not torch.equal(original[name].float(), after[name].float())}
        matrices = {name for name in original if ".layers." in name and original[name].ndim == 2}
        assert {name for name in changed & matrices} == {n for n in matrices if int(n.split(".")[2]) in layers}
        assert ("model.embed_tokens.weight" in changed) == (method not in lora)


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


@pytest.mark.slow
def test_a_foreign_record_and_records_that_differ_are_refused(two_settings, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json is not a record"):
        robustness.run(records=[str(tmp_path / "x.json")], out=str(tmp_path / "o.json"))
    for seed in (0, 1):
        baselines.run(method="zero-ablation", seed=seed, **SMALL, out=str(tmp_path / f"{seed}.json"))
    with pytest.raises(UserError, match="differ in seed"):
        robustness.run(records=[str(tmp_path / "0.json"), str(tmp_path / "1.json")], out=str(tmp_path / "o.json"))


@pytest.mark.slow
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


@pytest.mark.slow
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
