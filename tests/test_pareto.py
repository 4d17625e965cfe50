"""The sweep: frontier, area and choice against brute force; what is kept of a stopped run; figures of any records."""

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import CLAMP, ROOT, code_of, command, lesson

import baselines
import edits
import evaluation
import pareto
import runs
from data import HERE
from evaluation import Score
from show import RETRAINED

SMALL = ["--limit", "6", "--n-features", "2", "30", "--clamp", "0", "-60"]

# ------------------------------------------------------------- frontier, area, choice: against brute force


def scores(mmlu, wmdp, tuning=None):
    values = {"mmlu": mmlu, "wmdp_bio": wmdp, **dict(zip(pareto.TUNING, tuning or (mmlu, wmdp)))}
    return {name: Score(value, value - 0.01, value + 0.01, 100) for name, value in values.items()}


def some_settings(seed, n=14):
    """Few different values, so that ties and duplicates are many; above, at and below chance."""
    draw = random.Random(seed)
    values = [0.1, 0.25, 0.4, 0.6, 0.8, 0.9, 0.95]
    others = {f"row {k}": scores(draw.choice(values), draw.choice(values)) for k in range(n)}
    return {"unablated": scores(0.9, 0.8), **others}


@pytest.mark.parametrize("seed", range(20))
def test_frontier_is_what_nothing_dominates(seed):
    pairs = [(-keeps, forgets) for keeps, forgets in pareto.accuracies(some_settings(seed))]
    kept = pareto.frontier(pairs)

    def beats(a, b):
        no_worse = pairs[a][0] <= pairs[b][0] and pairs[a][1] <= pairs[b][1]
        return no_worse and (pairs[a] != pairs[b] or a < b)

    beaten = {b for a, b in itertools.permutations(range(len(pairs)), 2) if beats(a, b)}
    assert sorted(kept) == [i for i in range(len(pairs)) if i not in beaten]
    assert [pairs[i] for i in kept] == sorted(pairs[i] for i in kept)


@pytest.mark.parametrize("seed", range(20))
def test_area_is_the_mean_over_mmlu_levels(seed):
    pairs, steps = pareto.accuracies(some_settings(seed)), 20_000
    levels = 0.25 + (np.arange(steps) + 0.5) * (0.9 - 0.25) / steps
    lowest = [max(0.0, min(forgets for keeps, forgets in pairs if keeps >= level) - 0.25) for level in levels]
    assert pareto.area(pairs) == pytest.approx(np.mean(lowest) / (0.8 - 0.25), abs=2e-4)


def test_area_at_its_ends():
    unablated = (0.9, 0.8)
    assert pareto.area([unablated]) == pytest.approx(1.0)
    assert pareto.area([(0.25, 0.9)]) is None  # at chance there is nothing to forget
    assert pareto.area([unablated, (0.9, 0.2)]) == pytest.approx(0.0)
    assert pareto.area([unablated, (0.575, 0.25)]) == pytest.approx(0.5)  # half of MMLU buys all of the forgetting


def record_of(rows, model="one", saes=(("saes/layer_3", "sha256:aaaaaa"),), asked=(1,)):
    """A record of form 3, as much of it as is drawn; rows: {name: (method, scores)}."""
    about = {"sha256": "x", "asked": list(asked)}
    return {
        "model": f"org/{model}", "identity": {"model": model}, "data": {"wmdp_bio": about, "mmlu": about},
        "saes": [{"source": source, "identity": identity} for source, identity in saes],
        "measures": {f"{name}/any": {"title": f"{name}, any"} for name in ("wmdp_bio", "mmlu", "openwebtext")},
        "rows": {row: {"method": method, "scores": {name: {**vars(one)} for name, one in known.items()}}
                 for row, (method, known) in rows.items()},
    }  # fmt: skip


def test_the_tuning_half_chooses_and_the_held_out_half_reports():
    rows = {
        "unablated": ("none", scores(0.9, 0.8)),
        "n 5": ("clamp", scores(0.9, 0.7, tuning=(0.9, 0.3))),
        "n 9": ("clamp", scores(0.9, 0.2, tuning=(0.9, 0.5))),
        "zero": ("zero-ablation", scores(0.9, 0.6)),
        "random": ("random-features", scores(0.5, 0.2)),
    }
    lines = {line["method"]: line for line in pareto.summary(pareto.by_method([record_of(rows)]))}
    assert list(lines) == ["clamp", "zero ablation", "random features"]
    (chosen,) = {key for key in lines["clamp"] if key.startswith("chosen")}
    assert lines["clamp"]["settings"] == 2 and lines["clamp"][chosen] == "n 5"
    assert (lines["clamp"]["WMDP-Bio, tuning"], lines["clamp"]["WMDP-Bio, held-out"]) == (0.3, 0.7)
    assert lines["random features"][chosen] == "unablated"  # better do nothing than lose half of MMLU
    text = pareto.table([lines["clamp"]])
    assert "| n 5 | 30.0 | 70.0 |" in text and "- clamp: n 9 (90.0, 20.0)\n" in text  # it beats doing nothing, too


def test_a_sweep_of_a_topic_of_ones_own_says_so(tmp_path, capsys, monkeypatch):
    rows = {"unablated": ("none", scores(0.9, 0.8)), "n 5": ("clamp", scores(0.9, 0.7))}
    record = record_of(rows)
    record["data"]["wmdp_bio"] = {**record["data"]["wmdp_bio"], "topic": "astronomy"}
    monkeypatch.setattr(runs, "read_record", lambda path: record)
    pareto.plot(["any.json"], str(tmp_path / "r.json"))
    said, kept = capsys.readouterr().out, (tmp_path / "r.md").read_text()
    assert "astronomy, held-out" in said and "its MMLU and astronomy accuracy" in kept
    assert "WMDP-Bio" not in said + kept


@pytest.mark.parametrize("seed", range(5))
def test_the_printed_frontier_is_the_brute_force_one(seed):
    settings = some_settings(seed)
    (line,) = pareto.summary({"clamp": settings})
    pairs = {*pareto.accuracies(settings)}
    best = [a for a in pairs if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in pairs)]
    best.sort(reverse=True)
    assert [tuple(pair) for _, *pair in line["frontier"]] == best
    assert all(f"({100 * a:.1f}, {100 * b:.1f})" in pareto.table([line]) for a, b in best)


# ------------------------------------------------------------------------------------------------- the sweep


def without_time(path):
    record = json.loads(Path(path).read_text())
    return {name: value for name, value in record.items() if name not in ("seconds", "command", "settings")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "sweep.json"
    pareto.run(limit=6, n_features=[2, 30], clamp=[0.0, -60.0], out=str(out))
    return out


def test_a_sweep_writes_record_table_and_figure_and_leaves_nothing_else(undisturbed):
    assert sorted(path.name for path in undisturbed.parent.iterdir()) == [
        "sweep.csv", "sweep.json", "sweep.md", "sweep_frontier.png",
    ]  # fmt: skip
    record = json.loads(undisturbed.read_text())
    rows = [f"layer 7, n_features {n}, clamp {clamp}" for n in (2, 30) for clamp in (0, -60)]
    assert list(record["rows"]) == ["unablated", *rows, *(f"random features, {row}" for row in rows)]
    for row in record["rows"].values():
        assert all(row["scores"][f"{quiz}/letters"]["n"] == 6 for quiz in ("mmlu", "mmlu/tuning", "wmdp_bio"))
    assert not set(record["data"]["mmlu"]["asked"]) & set(record["data"]["mmlu/tuning"]["asked"])


def test_a_rows_settings_make_its_edit_again(undisturbed, tiny_sae_7):
    row = json.loads(undisturbed.read_text())["rows"]["random features, layer 7, n_features 30, clamp -60"]
    edit = edits.make(row["method"], tiny_sae_7, **row["settings"])
    assert list(edit.at) == [7] and len(row["settings"]["features"]) == 30 and row["settings"]["clamp"] == -60


@pytest.fixture(scope="module")
def tiny_sae_7():
    return pareto.load_sae(None, 7, pareto.load_model("tiny", "cpu"))


def test_a_sweep_finds_the_words_that_are_found_alone(undisturbed):
    """Whatever batches its questions came in, and whatever stood before an answer."""
    record, model = json.loads(undisturbed.read_text()), pareto.load_model("tiny")
    rows = [json.loads(line) for line in (HERE / "tiny/data/wmdp_bio.jsonl").open()]
    for half in ("", "/tuning"):
        asked = [rows[i] for i in record["data"][f"wmdp_bio{half}"]["asked"]]
        alone = evaluation.score_words(model, asked, [edits.NONE])[0].argmax(-1)
        answers = record["rows"]["unablated"]["answers"][f"wmdp_bio{half}/words"]
        assert answers == "".join("ABCD"[i] for i in alone)


@pytest.mark.slow
def test_the_retrained_model_is_a_line(twin, tmp_path):
    """In a sweep's figure, and in one of records; it is no method, and nothing is chosen from it."""
    record = pareto.run(limit=6, n_features=[2], clamp=[-60.0], out=str(tmp_path / "s.json"))
    assert list(record["rows"])[-1] == RETRAINED and len(record["rows"]) == 4
    assert [line["method"] for line in record["summary"]] == ["clamp", "random features"]
    figure = pareto.pareto_figure([runs.read_record(tmp_path / "s.json")], "title")
    floor = 100 * record["rows"][RETRAINED]["scores"]["wmdp_bio/letters"]["mean"]
    for axes in figure.axes:
        assert [line.get_ydata()[0] for line in axes.lines if line.get_label() == RETRAINED] == [floor]
    plt.close("all")


@pytest.mark.slow
def test_methods_and_layers_are_swept_in_one_pass(monkeypatch, tmp_path):
    """What baselines.py finds of each, at each layer, and a figure of all."""
    for name in ("dsg", "diff-in-means"):
        shorter = replace(edits.METHODS[name], grid=edits.METHODS[name].grid[2:4])
        monkeypatch.setitem(edits.METHODS, name, shorter)
    alone = [baselines.run(method=name, limit=6, layer=3, out=str(tmp_path / f"{name}.json"))["rows"]
             for name in ("dsg", "diff-in-means")]  # fmt: skip
    record = pareto.run(
        limit=6, layer=[5, 3], method=["dsg", "diff-in-means"], clamp=[CLAMP], out=str(tmp_path / "r.json")
    )
    methods = [(row["method"], name.split(", ")[1]) for name, row in list(record["rows"].items())[1:]]
    assert methods == [(name, f"layer {layer}") for layer in (3, 5) for name in ("dsg", "diff-in-means") for _ in "12"]
    swept = [row for name, row in record["rows"].items() if "layer 3" in name]
    expected = [row for rows in alone for row in list(rows.values())[1:3]]
    for mine, other in zip(swept, expected, strict=True):
        assert (mine["method"], mine["settings"]) == (other["method"], other["settings"])
        assert mine["answers"].items() <= other["answers"].items() or mine["answers"] == other["answers"]
    assert [sae["layer"] for sae in record["saes"]] == [3, 5]
    assert [line["method"] for line in record["summary"]] == [edits.METHODS[name].title for name in
                                                              ("dsg", "diff-in-means")]  # fmt: skip
    assert (tmp_path / "r_frontier.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_sweep_scores_what_the_lessons_score(undisturbed, tmp_path):
    flags = dict(n_features=30, clamp=-60.0, limit=6, out=tmp_path / "r.json")
    quiz, loss = (lesson(f"feature_ablate_{k}.py", **flags)["record"]["rows"] for k in (2, 3))
    swept = json.loads(undisturbed.read_text())["rows"]
    for clamp, name in ((0, "zero ablation"), (-60, "clamp -60")):
        row = swept[f"layer 7, n_features 30, clamp {clamp}"]
        assert row["settings"]["features"] == quiz[name]["settings"]["features"]
        for measure in ("wmdp_bio/letters", "wmdp_bio/words", "mmlu/letters"):
            assert row["answers"][measure] == quiz[name]["answers"][measure]
        for key, value in loss[name]["scores"]["openwebtext/loss"].items():
            assert row["scores"]["openwebtext/loss"][key] == pytest.approx(value, abs=1e-5)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_record(tmp_path_factory, tmp_path):
    out, undisturbed = tmp_path / "sweep.json", tmp_path_factory.mktemp("undisturbed") / "sweep.json"
    command = [sys.executable, str(ROOT / "pareto.py"), *SMALL, "--out"]
    assert subprocess.run([*command, str(undisturbed)], capture_output=True).returncode == 0
    command.append(str(out))
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.rglob("*.json")):
            time.sleep(0.05)
        time.sleep(random.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert without_time(out) == without_time(undisturbed)


@pytest.mark.slow
def test_a_stopped_sweep_says_what_it_kept_and_takes_it_up(monkeypatch, capfd, tmp_path):
    done, real = [], evaluation.letters

    def stop_at_the_second(*args, **options):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args, **options)

    settings = dict(limit=6, n_features=[2], clamp=[0.0], out=str(tmp_path / "sweep.json"))
    monkeypatch.setattr(evaluation, "letters", stop_at_the_second)
    monkeypatch.setattr(sys, "argv", ["pareto.py"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert code_of(lambda: runs.main(lambda **_: pareto.run(**settings), pareto.flags)) == 130
    assert "stopped: 2 finished parts are kept" in capfd.readouterr().err  # one half of WMDP-Bio, letters and words
    done.clear()
    monkeypatch.setattr(evaluation, "letters", lambda *args, **options: done.append(1) or real(*args, **options))
    pareto.run(**{**settings, "batch_size": 4})
    assert len(done) == 3  # the other half of WMDP-Bio, and MMLU's two


# -------------------------------------------------------------------------------------- plots and mistakes


def test_plot_shows_the_rows_of_any_records(monkeypatch, capfd, undisturbed, tmp_path):
    record, other, only_loss = json.loads(undisturbed.read_text()), tmp_path / "other.json", tmp_path / "loss.json"
    first, second, *_ = record["rows"].values()
    loss = {**first, "scores": {pareto.LOSS: first["scores"][pareto.LOSS]}}
    only_loss.write_text(json.dumps({**record, "rows": {"unablated": loss, "clamp": loss}}))
    for row in (first, second):
        for name in ("mmlu/tuning/letters", pareto.LOSS):
            del row["scores"][name]
    other.write_text(json.dumps({**record, "rows": {"unablated": first, "mine": {**second, "method": "my method"}}}))
    flags = ("--plot", undisturbed, other, only_loss, "--out", tmp_path / "all.json")
    assert command(monkeypatch, "pareto.py", *flags) == 0
    said = capfd.readouterr()
    assert "| my method | 1 |" in said.out and "loss.json has no scores of both quizzes" in said.err
    assert {"all_frontier.png", "all.md"} <= {path.name for path in tmp_path.iterdir()}


ROWS = {"unablated": ("none", scores(0.9, 0.9)), "clamp -5": ("clamp", scores(0.65, 0.3))}


def test_records_of_two_models_share_no_frontier():
    """Each method of each model starts at its own model's unablated row, and its name says whose it is."""
    other = {"unablated": ("none", scores(0.8, 0.8)), "clamp -5": ("clamp", scores(0.55, 0.3))}
    records = [record_of(ROWS), record_of(other, "two")]
    methods = pareto.by_method(records)
    assert [name.split(", ")[:2] for name in methods] == [["clamp (one", "layer_3"], ["clamp (two", "layer_3"]]
    found = [[mmlu for mmlu, _ in pareto.accuracies(settings)] for settings in methods.values()]
    assert found == [[0.9, 0.65], [0.8, 0.55]]
    assert [line["settings"] for line in pareto.summary(methods)] == [1, 1]
    assert list(pareto.by_method(records[:1])) == ["clamp"]  # one record needs no more


def test_an_sae_or_a_model_trained_again_and_other_questions_are_told_apart():
    trained_again = record_of(ROWS, saes=[("saes/layer_3", "sha256:bbbbbb")])
    records = [record_of(ROWS), trained_again, record_of(ROWS, asked=(2,)), record_of(ROWS, "two")]
    assert len(pareto.by_method(records)) == 4
    assert len(pareto.by_method([records[0], record_of(ROWS)])) == 1
    assert len({name[name.index("content") :] for name in pareto.by_method(records)}) == 4


def test_labels_of_a_figure_do_not_overlap(undisturbed):
    figure = pareto.pareto_figure([runs.read_record(undisturbed)], "title")
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        frame = axes.get_window_extent()
        assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in boxes)
    plt.close(figure)


def test_a_chosen_setting_has_a_ring_and_grey_is_what_the_frontier_beats():
    rows = {
        "unablated": ("none", scores(0.9, 0.8)),
        "n 5": ("clamp", scores(0.88, 0.7, tuning=(0.9, 0.3))),
        "n 9": ("clamp", scores(0.8, 0.4, tuning=(0.5, 0.2))),
    }
    figure = pareto.pareto_figure([record_of(rows)], "title")
    (axes,) = figure.axes
    (ring,) = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert np.allclose([*ring.get_xdata(), *ring.get_ydata()], [88, 70])
    corners = {tuple(map(round, point)) for point in axes.collections[1].get_paths()[0].vertices.tolist()}
    assert {(90, 80), (88, 80), (88, 70), (80, 70), (80, 40)} <= corners
    assert axes.get_xscale() == "linear" and [text.get_text() for text in axes.texts][-2:] == ["n 5", "n 9"]
    plt.close(figure)


def test_axes_are_called_by_the_data_sets_of_the_held_out_half(undisturbed):
    figure = pareto.pareto_figure([runs.read_record(undisturbed)], "title")
    said = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert said[0] == "MMLU stand-in accuracy, %" and "nats per token (linear up to 0.01, then log" in said[1]
    assert figure.get_supylabel() == "WMDP-Bio stand-in accuracy, %"
    plt.close(figure)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 11, 12])
def test_what_is_said_below_and_beside_the_panels_is_whole(undisturbed, n):
    """In the middle of any number of panels, and with the dollars of a topic's name."""
    record = runs.read_record(undisturbed)
    first, other, *_ = record["rows"].values()
    rows = {"unablated": first, **{f"row {k}": {**other, "method": f"method {k}"} for k in range(n)}}
    measures = {name: {**about, "title": about["title"].replace("WMDP-Bio stand-in", "5$ and x_1$")}
                for name, about in record["measures"].items()}  # fmt: skip
    figure = pareto.pareto_figure([{**record, "rows": rows, "measures": measures}], "title")
    figure.canvas.draw()
    labels = [axes.xaxis.label for axes in figure.axes if axes.axison and axes.get_xlabel()]
    labels += [figure._supxlabel] if figure.get_supxlabel() else []
    assert labels[0].get_text() == "MMLU stand-in accuracy, %" and len(labels) == (2 if n <= 4 else 1)
    for label in labels:
        box = label.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert figure.get_supylabel() == r"5\$ and x_1\$ accuracy, %"
    plt.close(figure)


@pytest.mark.parametrize("n", [2, 12])
def test_a_method_has_a_panel_and_few_methods_one_of_the_loss_too(undisturbed, n):
    record = runs.read_record(undisturbed)
    first, other, *_ = record["rows"].values()
    rows = {"unablated": first, **{f"row {k}": {**other, "method": f"method {k}"} for k in range(n)}}
    without_loss = {name: score for name, score in other["scores"].items() if name != pareto.LOSS}
    rows["row 0"] = {"method": "method 0", "scores": without_loss}
    figure = pareto.pareto_figure([{**record, "rows": rows}], "title")
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert titles == [f"method {k}" for k in range(n)] * (2 if n == 2 else 1)
    points = [sum(len(line.get_xdata()) for line in axes.lines if line.get_color() == pareto.show.ABLATED)
              for axes in figure.axes if axes.axison]  # fmt: skip
    assert points == ([1, 1, 0, 1] if n == 2 else [1] * 12)
    plt.close(figure)


@pytest.mark.parametrize(
    "given, said",
    [
        (["--clamp", "-9", "3"], ["clamp 3 amplifies features"]),
        (["--n-features", "0"], ["--n-features", "0"]),
        (["--n-features", "1", "999999"], ["999999"]),
        (["--layers", "3", "4"], ["layer_4"]),
        (["--method", "no-such"], ["no-such", "dsg"]),
        (["--plot", "no-such.json"], ["no-such.json"]),
        (["--batch-size", "0"], ["--batch-size", "0"]),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(monkeypatch, capfd, tmp_path, given, said):
    assert command(monkeypatch, "pareto.py", *given, "--out", tmp_path / "r.json") == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and all(word in errors[0] for word in said)
    assert not list(tmp_path.iterdir())
