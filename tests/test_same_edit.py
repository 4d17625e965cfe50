"""Every script puts an edit at the SAE's own hook point: one answer for one SAE, whatever it calls that point."""

import json
from pathlib import Path

import pytest
import torch
from conftest import lesson

import baselines
import common
import lm_eval_ablated
import pareto
import robustness
from common import load_model, load_sae
from edits import layer_of
from flags import settings

TINY = Path(__file__).resolve().parent.parent / "tiny"
N, CLAMP, LIMIT = 20, -160.0, 40
RIGHT = (0.8, 0.975)  # WMDP-Bio and MMLU stand-ins, 40 of each reporting half; one layer late: 0.55, 0.75


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


@pytest.mark.slow
def test_lesson_2(renamed, tmp_path):
    flags = dict(sae=renamed, layer=4, n_features=N, clamp=CLAMP, limit=LIMIT, out=tmp_path / "r.json")
    assert accuracies(lesson("feature_ablate_2.py", **flags)["record"]["points"][4]) == RIGHT


@pytest.mark.slow
def test_pareto(renamed, tmp_path):
    flags = dict(sae=renamed, layer=[4], n_features=[N], clamp=[CLAMP], limit=LIMIT, out=str(tmp_path / "r.json"))
    assert accuracies(pareto.run(**flags)["points"][1]) == RIGHT


def test_baselines(tuned):
    assert accuracies(json.loads(tuned.read_text())["points"][1]) == RIGHT


def test_robustness(tuned):
    s = settings(robustness.flags, {"records": [str(tuned)]})
    subject, record = robustness.subject_of(str(tuned), s)
    s.pick_text, s.layer = "prompt", record["layer"]
    texts, _ = robustness.load_texts([record], s)
    scores = robustness.scores_of(robustness.examine(subject, texts, s, ("as tuned", "MMLU")), texts)
    assert tuple(round(scores[name]["accuracy"], 3) for name in ("as tuned", "MMLU")) == RIGHT


def test_lm_eval(renamed, tmp_path):
    flags = dict(sae=renamed, layer=4, n_features=N, clamp=CLAMP, limit=LIMIT, out=str(tmp_path / "r.json"))
    assert accuracies(lm_eval_ablated.run(**flags)["points"][0]) == RIGHT


def test_the_layer_an_edit_goes_behind_is_decided_in_one_place(renamed, gemma, gemma_sae):
    assert layer_of(load_sae(renamed, 4, load_model("tiny"))) == 3 and layer_of(gemma_sae) == 1
    with common.ablate(gemma, gemma_sae, [0]):
        gemma(torch.tensor([[2, 9, 8]]))
    for source in Path(common.__file__).parent.glob("*.py"):
        assert (source.name == "edits.py") == ('hook_point.split(".")[1]' in source.read_text()), source.name
