"""Every script puts an edit at the SAE's own hook point: one answer for one SAE, whatever it calls that point."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import baselines
import common
import feature_ablate_2
import lm_eval_ablated
import methods
import pareto
import robustness
from common import load_model, load_sae
from data import load_benchmark
from edits import layer_of
from flags import settings

TINY = Path(__file__).resolve().parent.parent / "tiny"
N, CLAMP, LIMIT = 10, -160.0, 40
RIGHT = (0.275, 1.0)  # WMDP-Bio and MMLU stand-ins, 40 of each reporting half; one layer late: 0.3, 0.9


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """tiny's SAE of layer 3, under the other name of its hook point: what goes into layer 4."""
    folder = tmp_path_factory.mktemp("saes") / "renamed"
    shutil.copytree(TINY / "sae/layer_3", folder)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.4.hook_resid_pre"
    (folder / "cfg.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def one_setting():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(baselines.GRIDS, "clamp", [{"n_features": N, "clamp": 1}])
        yield


def accuracies(point) -> tuple:
    return tuple(round(point["scores"][name]["accuracy"], 3) for name in ("wmdp_bio", "mmlu"))


@pytest.fixture(scope="module")
def tuned(renamed, tmp_path_factory):
    """The record of baselines.py."""
    path = tmp_path_factory.mktemp("records") / "clamp.json"
    baselines.run(method="clamp", sae=renamed, layer=4, clamp=CLAMP, limit=LIMIT, out=str(path))
    return path


def test_lesson_2(renamed, tmp_path):
    record = feature_ablate_2.run(
        sae=renamed, layer=4, n_features=N, clamp=CLAMP, limit=LIMIT, out=str(tmp_path / "r.json")
    )
    assert accuracies(record["points"][4]) == RIGHT


def test_pareto(renamed, tmp_path):
    flags = dict(sae=renamed, layer=[4], n_features=[N], clamp=[CLAMP], limit=LIMIT, out=str(tmp_path / "r.json"))
    assert accuracies(pareto.run(**flags)["points"][1]) == RIGHT


def test_baselines(tuned):
    assert accuracies(json.loads(tuned.read_text())["points"][1]) == RIGHT


def test_robustness(tuned, tmp_path):
    record = robustness.run(records=[str(tuned)], out=str(tmp_path / "r.json"))
    scores = record["points"][1]["scores"]
    assert tuple(round(scores[name]["accuracy"], 3) for name in ("as tuned", "MMLU")) == RIGHT


def test_lm_eval(renamed, tmp_path):
    flags = dict(sae=renamed, layer=4, n_features=N, clamp=CLAMP, limit=LIMIT, out=str(tmp_path / "r.json"))
    assert accuracies(lm_eval_ablated.run(**flags)["points"][0]) == RIGHT


def test_what_reads_the_stream_reads_it_there_too(renamed, monkeypatch):
    """DSG's gate, CRISP's layers, and the layers from which a direction is taken out."""
    s, lm = settings(baselines.flags, dict(sae=renamed, layer=4, limit=6)), load_model("tiny")
    texts = load_benchmark(s)[0]
    texts["retain"] = [part[:30] for part in texts["retain"]]
    measured, straight = (
        methods.measure(lm, layer, load_sae(place, layer, lm), texts["forget"], texts["retain"], s.clamp, s)
        for layer, place in ((4, renamed), (3, None))
    )
    features = measured.features(20, "dsg")
    assert features == straight.features(20, "dsg")
    assert methods.gate_for(measured, 20) == methods.gate_for(straight, 20) > 0
    assert list(baselines.read_by_crisp(measured)[0]) == [3]
    edit = methods.edit_for("diff-in-means", {"strength": 1, "behind": True}, measured)
    assert list(edit.at) == list(range(3, 12))


def test_the_layer_an_edit_goes_behind_is_decided_in_one_place(renamed, gemma, gemma_sae):
    assert layer_of(load_sae(renamed, 4, load_model("tiny"))) == 3 and layer_of(gemma_sae) == 1
    with common.ablate(gemma, gemma_sae, [0]):
        gemma(torch.tensor([[2, 9, 8]]))
    for source in Path(common.__file__).parent.glob("*.py"):
        assert (source.name == "edits.py") == ('hook_point.split(".")[1]' in source.read_text()), source.name
