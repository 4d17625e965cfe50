"""The other forms of a question, answers in words, and fine-tuning under an edit."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import baselines
import common
import edits
import robustness
from data import LETTERS, UserError, prompt
from edits import Edit
from flags import settings
from hub import check_same, identity, identity_of_never_knew
from robustness import Subject

TINY = Path(__file__).resolve().parent.parent / "tiny"

ROWS = [
    {"question": "Which is an organ?", "choices": ["The moon", "The heart", "The sea", "The stone"], "answer": 1},
    {"question": "Where do rivers flow?", "choices": ["The moon", "The heart", "The sea", "The stone"], "answer": 2},
]
OTHERS = [{**ROWS[0], "question": "Which of these is an organ?"}, {**ROWS[1], "question": "Where does a river flow?"}]


def test_forms():
    found = robustness.forms(ROWS, OTHERS, [1], [ROWS[0]])
    assert list(found) == ["as tuned", "other wording", "options reversed", "no header", "1 solved before"]
    texts = {name: form[0][0] for name, form in found.items()}
    assert texts["as tuned"] == prompt(ROWS[1])
    assert texts["other wording"] == prompt(OTHERS[1])
    assert "A. The stone\nB. The sea\nC. The heart\nD. The moon\nAnswer:" in texts["options reversed"]
    assert found["options reversed"][1][LETTERS.index("B")] == 2  # the letter B is the option of place 2
    assert texts["no header"] == prompt(ROWS[1]).split("\n\n")[1] and "biology" not in texts["no header"]
    assert texts["1 solved before"] == (
        "The following are multiple choice questions (with answers) about biology.\n\nWhich is an organ?\n"
        "A. The moon\nB. The heart\nC. The sea\nD. The stone\nAnswer: B\n\nWhere do rivers flow?\n"
        "A. The moon\nB. The heart\nC. The sea\nD. The stone\nAnswer:"
    )
    assert "other wording" not in robustness.forms(ROWS, [], [1], [ROWS[0]])


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_fine_tuning_goes_through_an_edit_that_stays(model_folder, make_sae, get_model, family):
    """The loss under the edit falls, all weights that it depends on move, and the edit is what it was."""
    model, tokenizer = common.load_hf(str(model_folder(family)))
    sae = make_sae(get_model(family))
    edit = edits.edit_of("clamp", sae, features=list(range(32)), clamp=-5.0)
    windows = [
        tokenizer(text)["input_ids"] for text in ["The cat sat on the mat.", "Rivers of Europe flow to the sea."]
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss():
        with torch.no_grad(), edits.applied(model, tokenizer, edit):
            return sum(model(torch.tensor([row]), labels=torch.tensor([row])).loss.item() for row in windows)

    start = loss()
    with edits.applied(model, tokenizer, edit):
        steps = robustness.fine_tune(model, tokenizer, [[(ids, 1) for ids in windows]], [7, 20], 1e-3, 0)
        assert list(steps) == [7, 20]
    assert loss() < 0.8 * start
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert any(".0." in name for name in moved) and any(".3." in name for name in moved)  # below and above the edit
    ids = torch.tensor([windows[1]])
    with edits.applied(model, tokenizer, edit), torch.no_grad():
        edited = model(ids).logits
    assert not torch.equal(edited, model(ids).logits)


# ------------------------------------------------------------------------- what is kept knows what it is of


def test_a_record_of_what_has_been_trained_again_is_not_taken_up(monkeypatch, tmp_path):
    """The SAE in the same folder, of the same size and time, is another one: neither script goes by the record."""
    monkeypatch.setitem(baselines.GRIDS, "clamp", [{"n_features": 10, "clamp": 1}])
    folder = shutil.copytree(TINY / "sae/layer_3", tmp_path / "sae")
    path = tmp_path / "r.json"
    flags = dict(method="clamp", limit=6, layer=3, sae=str(folder))
    record = baselines.run(**flags, out=str(path))
    known = {"model": identity(str(TINY / "model")), "sae": identity(str(folder))}
    assert record["identity"] == {**known, "never_knew": identity_of_never_knew("tiny")}
    s, sources = settings(baselines.flags, flags), record["data"]
    assert baselines.is_there(path, "clamp", s, sources)
    check_same(str(path), record, "sae", str(folder))
    path.write_text(json.dumps({**record, "dtype": "bfloat16"}))
    for given, taken in ((None, "bfloat16"), ("float32", "float32")):  # its own, where no flag says another
        own = settings(robustness.flags, {"dtype": given})
        robustness.subject_of(str(path), own)
        assert own.dtype == taken
    path.write_text(json.dumps(record))
    weights = folder / "sae_weights.safetensors"
    times, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not baselines.is_there(path, "clamp", s, sources)
    with pytest.raises(UserError, match=r"of another SAE than .*sae holds now"):
        robustness.run(records=[str(path)], out=str(tmp_path / "o.json"))
    path.write_text(json.dumps({**record, "identity": {**record["identity"], "model": "another"}}))
    with pytest.raises(UserError, match="of another model"):
        robustness.run(records=[str(path)], out=str(tmp_path / "o.json"))


@pytest.mark.slow
def test_who_is_back_first(twin, monkeypatch, tmp_path):
    """Learning the asked facts themselves, looked at on the way, beside the model that never knew them."""
    monkeypatch.setitem(baselines.GRIDS, "clamp", [{"n_features": 2, "clamp": 1}])
    tuned = baselines.run(method="clamp", limit=6, layer=3, out=str(tmp_path / "r.json"))
    assert [point["method"] for point in tuned["points"]] == ["none", "clamp", "never-knew"] and tuned["chosen"] == 1
    s = settings(baselines.flags, dict(method="clamp", limit=6, layer=3))
    assert baselines.is_there(tmp_path / "r.json", "clamp", s, tuned["data"])
    with monkeypatch.context() as other:  # trained again, it is another model
        other.setattr(baselines, "identity_of_never_knew", lambda name: "another")
        assert not baselines.is_there(tmp_path / "r.json", "clamp", s, tuned["data"])
    record = robustness.run(records=[str(tmp_path / "r.json")], relearn=4, out=str(tmp_path / "o.json"))
    assert [point["method"] for point in record["points"]] == ["none", "never-knew", "clamp"]
    for point in record["points"]:
        assert list(point["curve"]) == ["0", "1", "2", "4"] and set(point["relearned"]) == {"retain", "forget"}
        assert point["curve"]["0"]["letters"] == point["scores"]["as tuned"]["letters"]
    assert record["points"][1]["scores"] != record["points"][0]["scores"]
    assert "Learning the asked facts themselves" in (tmp_path / "o.md").read_text()
    assert (tmp_path / "o_curves.png").stat().st_size > 10_000


def test_steps_until_a_model_is_back():
    curve = {mark: {"accuracy": value} for mark, value in (("0", 0.3), ("5", 0.7), ("10", 0.95))}
    clean = {"curve": {"0": {"accuracy": 0.8}}}
    assert robustness.back_after({"curve": curve}, clean) == "10"
    assert robustness.back_after({"curve": {"0": {"accuracy": 0.71}}}, clean) == "-"
    assert robustness.marks_of(100) == [5, 10, 20, 50, 100] and robustness.marks_of(1) == [1]


def test_an_edit_of_other_features_has_other_pieces():
    s = SimpleNamespace(relearn=0, out=None)
    made = [Subject("tiny", Edit("clamp", {}, {"n_features": 2}, {"features": ids})) for ids in ([1, 2], [1, 3])]
    one, other = (json.dumps(robustness.decides([subject], [{}], {}, s)) for subject in made)
    saes = [json.dumps(robustness.decides([made[0]], [{"identity": {"sae": sae}}], {}, s)) for sae in "ab"]
    assert len({one, other, *saes}) == 4
    s.out = "elsewhere"
    assert json.dumps(robustness.decides([made[0]], [{}], {}, s)) == one


def test_all_takes_every_tuned_record_of_the_folder(monkeypatch, tmp_path):
    for name, text in {"b": '{"chosen": 1}', "a": '{"chosen": 2}', "lesson": '{"points": []}', "half": '{"cho'}.items():
        (tmp_path / f"{name}.json").write_text(text)
    wanted = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert robustness.tuned_records(str(tmp_path)) == robustness.tuned_records(str(tmp_path / "o.json")) == wanted
    monkeypatch.chdir(tmp_path)  # where there is no results/
    with pytest.raises(UserError, match="give one or several records"):
        robustness.run(all=True)
