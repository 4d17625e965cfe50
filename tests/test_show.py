"""Records and figures: names, what is written first, what other programs can read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlparse

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import CLAMP
from sae_lens.analysis.neuronpedia_integration import get_neuronpedia_quick_list

import baselines
import lm_eval_ablated
import pareto
import records
import show
import train_sae
from common import Rates
from data import UserError
from edits import NONE, Edit
from flags import parser, settings

ROOT = Path(__file__).resolve().parent.parent


def name(**changes):
    flags = parser("a script")
    flags.add_argument("--prompt", default="plain")
    return records.outputs("lesson.py", settings(flags, changes), flags).name


def test_a_record_of_other_settings_has_another_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name() == name(batch_size=3, device="cpu", clamp=CLAMP) == "lesson_tiny_L7_n50.json"
    assert name(layer=3, n_features=10) == "lesson_tiny_L3_n10.json"
    assert name(clamp=-4.0, seed=1) == "lesson_tiny_L7_n50_c-4_seed1.json"
    assert name(pick="dsg", prompt="chat") == "lesson_tiny_L7_n50_pickdsg_promptchat.json"
    for folder in ("a/mine", "b/mine"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "mmlu.jsonl").touch()
    others = [{"data": "a/mine"}, {"data": "b/mine"}, {"sae": "a/layer_7"}, {"sae": "b/layer_7"}, {"limit": 8},
              {"sae": "gemma-scope:layer_7/width_16k"}, {"pick_on": "all"}, {"pick_text": "prose"},
              {"dtype": "bfloat16"}, {"forget_corpus": "x/y"}, {"pick": "x" * 300}, {"pick": "x" * 301}]  # fmt: skip
    names = {name(), *(name(**other) for other in others)}
    assert len(names) == 1 + len(others) and max(map(len, names)) < 140
    assert not any(set(text) & set('/:\\"$ ') for text in names)


def test_a_sweep_or_an_evaluation_of_another_method_has_another_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def name(script, **changes):
        return records.outputs(f"{script.__name__}.py", settings(script.flags, changes), script.flags).name

    swept = [name(pareto), name(pareto, method=["dsg"]), name(pareto, method=["dsg", "clamp"])]
    assert len(set(swept)) == 3 and swept[1].endswith("_dsg.json")
    rest = {"layer": 3, "n_features": 10, "clamp": CLAMP}
    scored = [name(lm_eval_ablated, **rest, **more) for more in ({}, {"method": "dsg"}, {"setting": ["gate=1"]})]
    assert len(set(scored)) == 3
    assert "None" not in name(lm_eval_ablated, **rest | {"n_features": None}, method="diff-in-means")
    s = settings(baselines.flags, {"method": "dsg"})
    tuned = records.outputs("baselines_dsg.py", s, baselines.flags, without=("method",)).name
    assert tuned == "baselines_dsg_tiny_L7.json"


def test_a_record_is_written_before_a_figure_that_fails(tmp_path, capsys):
    def fail():
        raise ValueError("ParseException: unknown symbol")

    with pytest.raises(ValueError, match="unknown symbol"):
        records.write_record(tmp_path / "r.json", {"points": []}, {"accuracy": fail})
    assert json.loads((tmp_path / "r.json").read_text()) == {"points": []}
    assert f"record: {tmp_path / 'r.json'}" in capsys.readouterr().out


def test_a_record_is_valid_json_or_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        records.write_record(tmp_path / "r.json", {"points": [float("nan")]}, {})
    assert not list(tmp_path.iterdir())


SCORE = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9, "chance": 0.25}
SURE = {**SCORE, "letters_mass": {"mean": 0.75}, "right_probability": {"mean": 0.375}, "in_words": SCORE}
LOSS = {"nats_per_token": 3.0, "n_tokens": 90, "n_documents": 1}
LOST = {**LOSS, "loss_added": 0.2, "loss_added_low": None, "loss_added_high": None}
ROWS = [NONE, Edit("sae-ablation", setting={"n_features": 1, "clamp": -5.0})]


def test_titles_with_dollars_and_losses_without_intervals_are_drawn(tmp_path, capsys):
    title = r"$\no_such$ model"
    change = {**SCORE, "change": 0.0, "change_low": -0.1, "change_high": 0.1, "p_value": 1.0, "q_value": 1.0}
    by_subject = [{"subjects": {r"a$\b$": score}} for score in (SCORE, change)]
    figures = {"accuracy": lambda: show.quiz_figure({"MMLU": [SCORE, SCORE]}, ROWS, title),
               "loss": lambda: show.loss_figure({"web": [LOSS, LOST]}, ROWS, title),
               "subjects": lambda: show.subject_figure(ROWS, by_subject, title)}  # fmt: skip
    records.write_record(tmp_path / "r.json", {"points": [LOST]}, figures)
    assert len(list(tmp_path.glob("*.png"))) == 3
    show.print_loss("web", ROWS, [LOSS, LOST])
    assert "+0.2000\n" in capsys.readouterr().out
    plt.close("all")


def test_tokens_stand_where_they_are_read_and_are_as_dark_as_their_value():
    words = ["<bos>", "It", " cost", " 5$", " at\n", "noon", "x" * 86]
    model = SimpleNamespace(tokenizer=SimpleNamespace(decode=words.__getitem__))
    figure = show.token_figure(model, [[*range(7)]], [torch.tensor([9.0, 0.0, 2.0, 1.0, -3.0, 4.0, 0.0])], "title")
    (axes,) = figure.axes
    drawn = [(text.get_text(), *text.get_position()) for text in axes.texts]
    assert drawn == [("It", 0, 0), (" cost", 2, 0), (r" 5\$", 7, 0), (" at\u21b5", 10, 0), ("noon", 0, 1),
                     ("x" * 86, 0, 2)]  # fmt: skip
    boxes = {(box.get_x(), round(box.get_y() + 0.5)): box for box in axes.patches}
    assert {at: box.get_width() for at, box in boxes.items()} == {(2, 0): 5, (7, 0): 3, (0, 1): 4}  # above 0, no BOS
    dark = {at: sum(box.get_facecolor()[:3]) for at, box in boxes.items()}
    assert dark[0, 1] < dark[2, 0] < dark[7, 0] and "darkest 4.0" in figure.get_suptitle()
    plt.close("all")


def test_a_documents_loss_is_per_token_over_its_windows():
    figure = show.documents_figure(torch.tensor([3.0, -1.0, 0.5]), [[0] * 5, [0] * 5, [0] * 6], [7, 7, 2], "title")
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([0.5 / 5, 2.0 / 8])
    plt.close("all")


def test_letters_are_bars_and_the_right_one_is_marked():
    tried = {"unablated": torch.tensor([0.1, 0.7, 0.1, 0.1]), "clamp": torch.tensor([0.4, 0.2, 0.2, 0.0])}
    figure = show.letter_figure(tried, 1, "title")
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.1, 0.7, 0.1, 0.1, 0.4, 0.2, 0.2, 0.0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["A", "B (right)", "C", "D"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["unablated (together 1.00)",
                                                                     "clamp (together 0.80)"]  # fmt: skip
    plt.close("all")


def test_what_a_quiz_hides_is_shown(capsys):
    moved = {"mean": 0.5, "change": -0.25, "change_low": -0.3, "change_high": -0.2}
    show.print_quiz("quiz", ROWS, [SURE, {**SURE, "letters_mass": moved}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split()[1:3] == ["0.75", "0.38"] and "50.0 [ 40.0," in lines[-2]
    assert "0.50  -0.25 [-0.30, -0.20]" in lines[-1]
    figure = show.quiz_figure({"quiz": [SURE, {**SCORE, "letters_mass": moved}]}, ROWS, "title")
    drawn = {(line.get_marker(), *line.get_xdata()) for line in figure.axes[0].lines if len(line.get_xdata()) == 1}
    assert {("x", 75.0), ("x", 50.0), ("|", 37.5), ("s", 50.0)} <= drawn
    show.print_quiz("quiz", ROWS, [SCORE, SCORE])
    assert "P(a letter)" not in capsys.readouterr().out
    plt.close("all")


def test_draws_of_random_features_are_averaged(capsys):
    rows = [*ROWS, *[Edit("random-features", setting={"clamp": -5.0})] * 2]
    scores = [SCORE, *({**SCORE, "change": change} for change in (-0.4, -0.1, 0.02))]
    show.print_controls(rows, {"quiz": scores})
    wanted = "quiz: 2 draws of random features change it by -4.0 points on average, -10.0 to +2.0\n"
    assert capsys.readouterr().out == f"\n{wanted}"
    show.print_controls(rows[:3], {"quiz": scores})
    assert capsys.readouterr().out == ""


def test_a_subject_that_changed_has_a_star(capsys):
    scores = [{"subjects": {"law": SCORE, "art": SCORE}},
              {"subjects": {"law": {**SCORE, "q_value": 0.01}, "art": {**SCORE, "q_value": 0.2}}}]  # fmt: skip
    show.print_subjects(ROWS, scores)
    law, art = capsys.readouterr().out.splitlines()[-2:]
    assert law.endswith("50.0    50.0*") and art.endswith("50.0    50.0")


@pytest.mark.slow
def test_what_windows_lacks_is_not_needed():
    # other packages take what Linux has: they come first
    program = "import sys, evaluation; sys.modules['resource'] = None; import records; print(records.peak_gb())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "None\n", done.stderr


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(k=40, width=32), "--k 40: of --width 32"),
        (dict(context=1), "--context 1: at least 3"),
        (dict(tokens=100), "--tokens 100: at least 1024"),
        (dict(lr=0.0), "--lr 0: above 0"),
        (dict(layers=[3, 3]), "--layers 3 3: each once"),
        (dict(seed=-1), "--seed -1"),
        (dict(batch_size=0), "--batch-size 0: at least 1"),
    ],
)
def test_an_sae_that_cannot_be_trained_is_refused_before_the_work(monkeypatch, tmp_path, flags, said):
    monkeypatch.setattr(train_sae, "read_texts", None)  # the work
    with pytest.raises(UserError, match=said):
        train_sae.run(**flags, out=str(tmp_path))


def test_one_neuronpedia_page_has_the_picked_features(monkeypatch, capsys):
    rates, picked = Rates(torch.ones(64), torch.ones(64), 100), list(range(60, 0, -1))
    about = SimpleNamespace(neuronpedia_id=None, model_name="gemma-2-2b")
    sae = SimpleNamespace(cfg=SimpleNamespace(metadata=about))
    show.print_features(picked, rates, rates, [["x"]] * 60, sae)
    assert "euronpedia" not in capsys.readouterr().out
    about.neuronpedia_id = "gemma-2-2b/12-gemmascope-res-16k"
    show.print_features(picked, rates, rates, [["x"]] * 60, sae)
    said = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr("webbrowser.open", lambda address: None)
    theirs, ours = urlparse(get_neuronpedia_quick_list(sae, picked)), urlparse(said.split()[-1])
    assert said.startswith("Neuronpedia, all of these features: ") and ours[:3] == theirs[:3]
    theirs, ours = (json.loads(parse_qs(address.query)["features"][0]) for address in (theirs, ours))
    assert ours == theirs and len(ours) == 60


def test_an_address_has_no_more_features_than_there_is_room_for():
    address, n = show.quick_list("gemma-2-2b/12-gemmascope-res-16k", list(range(16000, 16384)))
    assert 50 < n < 384 and len(address) <= 8000
    rows = json.loads(parse_qs(urlparse(address).query)["features"][0])
    assert [row["index"] for row in rows] == [str(16000 + i) for i in range(n)]
