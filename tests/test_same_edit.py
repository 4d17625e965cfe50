"""Every script puts an edit at the SAE's own hook point: one answer for one SAE, whatever it calls that point."""

from pathlib import Path

import pytest
import torch
from conftest import lesson

import baselines
import common
import lm_eval_ablated
import pareto
import robustness
import runs
from common import load_model, load_sae
from data import load_benchmark
from edits import layer_of
from evaluation import letters

N, CLAMP, LIMIT = 20, -160.0, 40
RIGHT = {"wmdp_bio/letters": 0.8, "mmlu/letters": 0.975}  # 40 held-out stand-ins; one layer late: 0.55, 0.75
ROW = f"n_features {N}, clamp {CLAMP:g}"


def right(record: dict, row: str) -> bool:
    scores = record["rows"][row]["scores"]
    return {name: round(scores[name]["mean"], 3) for name in RIGHT} == RIGHT


@pytest.fixture(scope="module")
def tuned(renamed, tmp_path_factory):
    """baselines.py's record of one setting, and its path."""
    path, setting = str(tmp_path_factory.mktemp("records") / "clamp.json"), [f"n_features={N}", "clamp=1"]
    flags = dict(method="clamp", sae=renamed, layer=4, clamp=CLAMP, limit=LIMIT)
    return baselines.run(**flags, setting=setting, out=path), path


@pytest.mark.slow
def test_lesson_2(renamed, tmp_path):
    flags = dict(sae=renamed, layer=4, n_features=N, clamp=CLAMP, limit=LIMIT, out=tmp_path / "r.json")
    assert right(lesson("feature_ablate_2.py", **flags)["record"], f"clamp {CLAMP:g}")


@pytest.mark.slow
def test_pareto(renamed, tmp_path):
    flags = dict(sae=renamed, layer=[4], n_features=[N], clamp=[CLAMP], limit=LIMIT, out=str(tmp_path / "r.json"))
    record = pareto.run(**flags)
    assert right(record, next(row for row in record["rows"] if row.endswith(ROW)))


def test_baselines(tuned):
    record, _ = tuned
    assert right(record, ROW)
    assert record["rows"][ROW]["settings"]["layers"] == [3]


def test_robustness(tuned):
    record, path = tuned
    (subject,) = (s for s in robustness.subjects_of([path], [record], None, "float32") if s.edit.at)
    model = subject.load()
    quizzes = load_benchmark("tiny", **runs.benchmark_options(record["settings"])).quizzes
    found = {quiz: letters(model, quizzes[quiz], {"clamp": subject.edit})[0]["clamp"] for quiz in ("wmdp_bio", "mmlu")}
    assert {f"{quiz}/letters": round(score.mean, 3) for quiz, score in found.items()} == RIGHT


def test_lm_eval(renamed, tmp_path):
    flags = dict(sae=renamed, layer=4, n_features=N, clamp=CLAMP, limit=LIMIT, out=str(tmp_path / "r.json"))
    record = lm_eval_ablated.run(**flags)
    assert right(record, next(iter(record["rows"])))


def test_the_layer_after_which_an_edit_goes_is_decided_in_one_place(renamed, gemma, gemma_sae):
    assert layer_of(load_sae(renamed, 4, load_model("tiny"))) == 3 and layer_of(gemma_sae) == 1
    with common.ablate(gemma, gemma_sae, [0]):
        gemma(torch.tensor([[2, 9, 8]]))
    for source in Path(common.__file__).parent.glob("*.py"):
        assert (source.name == "edits.py") == ('hook_point.split(".")[1]' in source.read_text()), source.name
