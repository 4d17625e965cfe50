"""The sweep: frontier, area and choice against brute force; kept pieces; figures of any records."""

import argparse
import itertools
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import CLAMP, code_of, command, lesson

import baselines
import evaluation
import pareto
import pieces
from common import load_model, load_sae
from data import HERE, UserError
from edits import NONE
from flags import command_line

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
SMALL = ["--limit", "6", "--n-features", "2", "30", "--clamp", "0", "-60"]

# ------------------------------------------------------------- frontier, area, choice: against brute force


def point(mmlu, wmdp, tuning=None, method="sae-ablation", clamp=-5.0, **setting):
    scores = {"mmlu": {"accuracy": mmlu}, "wmdp_bio": {"accuracy": wmdp}}
    for name, value in zip(("mmlu_tuning", "wmdp_bio_tuning"), tuning or (mmlu, wmdp)):
        scores[name] = {"accuracy": value}
    return {"method": method, "setting": {"clamp": clamp, **setting}, "scores": scores}


def some_points(seed, n=14):
    """Few different values, so that ties and duplicates are many; above, at and below chance."""
    draw = random.Random(seed)
    return [point(0.9, 0.8)] + [point(*(draw.choice([0.1, 0.25, 0.4, 0.6, 0.8, 0.9, 0.95]) for _ in range(2)))
                                for _ in range(n)]  # fmt: skip


def accuracies(points):
    return [(p["scores"]["mmlu"]["accuracy"], p["scores"]["wmdp_bio"]["accuracy"]) for p in points]


@pytest.mark.parametrize("seed", range(20))
def test_frontier_is_what_nothing_dominates(seed):
    pairs = [(-keeps, forgets) for keeps, forgets in accuracies(some_points(seed))]
    kept = pareto.frontier(pairs)

    def beats(a, b):
        no_worse = pairs[a][0] <= pairs[b][0] and pairs[a][1] <= pairs[b][1]
        return no_worse and (pairs[a] != pairs[b] or a < b)

    beaten = {b for a, b in itertools.permutations(range(len(pairs)), 2) if beats(a, b)}
    assert sorted(kept) == [i for i in range(len(pairs)) if i not in beaten]
    assert [pairs[i] for i in kept] == sorted(pairs[i] for i in kept)


@pytest.mark.parametrize("seed", range(20))
def test_area_is_the_mean_over_mmlu_levels(seed):
    points = some_points(seed)
    pairs, steps = accuracies(points), 20_000
    levels = 0.25 + (np.arange(steps) + 0.5) * (0.9 - 0.25) / steps
    lowest = [max(0.0, min(forgets for keeps, forgets in pairs if keeps >= level) - 0.25) for level in levels]
    assert pareto.area(points) == pytest.approx(np.mean(lowest) / (0.8 - 0.25), abs=2e-4)


def test_area_at_its_ends():
    clean = point(0.9, 0.8)
    assert pareto.area([clean]) == pytest.approx(1.0)
    assert pareto.area([point(0.25, 0.9)]) is None  # at chance there is nothing to forget
    assert pareto.area([clean, point(0.9, 0.2)]) == pytest.approx(0.0)
    assert pareto.area([clean, point(0.575, 0.25)]) == pytest.approx(0.5)  # half of MMLU buys all of the forgetting


@pytest.mark.parametrize("seed", range(20))
def test_choice_is_the_lowest_that_keeps_mmlu(seed):
    draw = random.Random(seed)
    clean, forgets = point(0.9, 0.8), [0.3, 0.4] if seed % 2 else [0.2 + 0.01 * k for k in range(50)]  # ties, or none
    points = [clean] + [point(draw.choice([0.85, 0.89, 0.891, 0.9, 0.95]), draw.choice(forgets), number=k)
                        for k in range(10)]  # fmt: skip
    allowed = [p for p in points if p["scores"]["mmlu"]["accuracy"] >= 0.891]
    low = min(p["scores"]["wmdp_bio"]["accuracy"] for p in allowed)
    tied = [p for p in allowed if p["scores"]["wmdp_bio"]["accuracy"] == low]
    high = max(p["scores"]["mmlu"]["accuracy"] for p in tied)
    assert pareto.best_setting(clean, points, "") is next(p for p in tied if p["scores"]["mmlu"]["accuracy"] == high)


def test_where_nothing_keeps_mmlu_the_choice_is_what_keeps_most():
    lossy = [point(0.5, 0.2, number=0), point(0.7, 0.6, number=1), point(0.6, 0.1, number=2)]
    assert pareto.best_setting(point(0.9, 0.8), lossy, "") is lossy[1]


def test_the_tuning_half_chooses_and_the_reporting_half_reports():
    clean = point(0.9, 0.8)
    points = [{**p, "clean": clean} for p in (
        clean | {"method": "none", "setting": {}},
        point(0.9, 0.7, tuning=(0.9, 0.3), n_features=5), point(0.9, 0.2, tuning=(0.9, 0.5), n_features=9),
        point(0.9, 0.6, clamp=0.0), point(0.9, 0.8, method="random-features"),
    )]  # fmt: skip
    clamp, zero, control = sorted(pareto.summary(points), key=lambda row: -row["settings"])[:3]
    assert (clamp["method"], zero["method"], control["method"]) == (
        "negative clamp",
        "zero ablation",
        "random features",
    )
    assert clamp["settings"] == 2 and "n5" in clamp["chosen"]
    assert (clamp["wmdp_bio_tuning"], clamp["wmdp_bio"]) == (0.3, 0.7)
    assert "n5 c-5" in pareto.table([clamp]) and "70.0" in pareto.table([clamp])
    assert "- negative clamp: n9 c-5 (90.0, 20.0)\n" in pareto.table([clamp])  # it beats doing nothing, too


@pytest.mark.parametrize("seed", range(5))
def test_the_printed_frontier_is_the_brute_force_one(seed):
    points = [{**p, "clean": point(0.9, 0.8)} for p in some_points(seed)[1:]]
    (row,) = pareto.summary(points)
    pairs = {(0.9, 0.8), *accuracies(points)}
    best = [a for a in pairs if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in pairs)]
    best.sort(reverse=True)
    assert [(p["mmlu"], p["wmdp_bio"]) for p in row["frontier"]] == best
    assert "; ".join(f"c-5 ({100 * a:.1f}, {100 * b:.1f})" for a, b in best) in pareto.table([row])


# ----------------------------------------------------------------------------------- pieces that are kept


def without_time(path):
    record = json.loads(Path(path).read_text())
    return {name: value for name, value in record.items() if name not in ("seconds", "command")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "sweep.json"
    pareto.run(limit=6, n_features=[2, 30], clamp=[0.0, -60.0], out=str(out))
    return out


def test_a_sweep_writes_record_table_and_figures_and_no_piece(undisturbed):
    assert sorted(path.name for path in undisturbed.parent.iterdir()) == [
        "sweep.json", "sweep.md", "sweep_frontier.png", "sweep_frontier.svg",
    ]  # fmt: skip
    record = json.loads(undisturbed.read_text())
    assert [p["method"] for p in record["points"]] == ["none"] + ["sae-ablation"] * 4 + ["random-features"] * 4
    assert all(p["scores"]["mmlu"]["n"] == 6 and p["scores"]["mmlu_tuning"]["n"] == 6 for p in record["points"])
    assert not set(record["data"]["mmlu"]["questions"]) & set(record["data"]["mmlu"]["tuning_questions"])


def test_a_sweep_finds_the_words_that_are_found_alone(undisturbed):
    """Whatever pieces its questions came in, and whatever stood before an answer."""
    record, lm = json.loads(undisturbed.read_text()), load_model("tiny")
    rows = [json.loads(line) for line in (HERE / "tiny/data/wmdp_bio.jsonl").open()]
    for half, name in (("", "questions"), ("_tuning", "tuning_questions")):
        asked = [rows[i] for i in record["data"]["wmdp_bio"][name]]
        alone = evaluation.score_words(lm, asked, [NONE])[0].argmax(-1)
        found = record["points"][0]["scores"][f"wmdp_bio{half}"]["in_words"]
        assert found["letters"] == "".join("ABCD"[i] for i in alone)


@pytest.mark.slow
def test_the_model_that_never_knew_is_a_line(twin, tmp_path):
    """In a sweep's figure, and in one of records; it is no method, and nothing is chosen from it."""
    record = pareto.run(limit=6, n_features=[2], clamp=[-60.0], out=str(tmp_path / "s.json"))
    assert [point["method"] for point in record["points"]] == ["none", "sae-ablation", "random-features", "never-knew"]
    assert [row["method"] for row in record["summary"]] == ["negative clamp", "random features"]
    points, _ = pareto.read_points(str(tmp_path / "s.json"))
    figure = pareto.pareto_figure(points, ["a", "b", "c"], "title")
    floor = 100 * points[-1]["scores"]["wmdp_bio"]["accuracy"]
    for axes in figure.axes:
        assert [line.get_ydata()[0] for line in axes.lines if line.get_label() == "trained without the facts"] == [
            floor
        ]
    plt.close("all")


@pytest.mark.slow
def test_methods_and_layers_are_swept_in_one_pass(monkeypatch, tmp_path):
    """What baselines.py finds of each, at each layer, and a figure of all."""
    for method in ("dsg", "diff-in-means"):
        monkeypatch.setitem(baselines.GRIDS, method, baselines.GRIDS[method][2:4])
    same = dict(limit=6, layer=3)
    wanted = [baselines.run(method=method, **same, out=str(tmp_path / f"{method}.json"))["points"]
              for method in ("dsg", "diff-in-means")]  # fmt: skip
    flags = dict(same, layer=[5, 3], method=["dsg", "diff-in-means"], clamp=[CLAMP])
    record = pareto.run(**flags, out=str(tmp_path / "r.json"))
    clean, *points = record["points"]
    assert [(point["method"], point["setting"]["layer"]) for point in points] == [
        (method, layer) for layer in (3, 5) for method in ("dsg", "diff-in-means") for _ in range(2)
    ]  # fmt: skip
    wanted = [wanted[0][0], *wanted[0][1:], *wanted[1][1:]]
    found, wanted = (json.loads(json.dumps(rows), parse_float=lambda number: round(float(number), 4))
                     for rows in ([clean, *points[:4]], wanted))  # fmt: skip
    assert found == wanted  # but for rounding: another list of edits is run in other batches
    assert record["layer"] == [3, 5] and len(record["sanity"]) == len(record["identity"]["sae"]) == 2
    assert [row["method"] for row in record["summary"]] == ["DSG", "difference of means"]
    assert (tmp_path / "r_frontier.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_sweep_scores_what_the_lessons_score(undisturbed, tmp_path):
    flags = dict(n_features=30, clamp=-60.0, limit=6, out=tmp_path / "r.json")
    quiz, loss = (lesson(f"feature_ablate_{k}.py", **flags)["record"]["points"] for k in (2, 3))
    swept = json.loads(undisturbed.read_text())["points"]
    for place, setting in ((3, (30, 0.0)), (4, (30, -60.0))):
        point = next(p for p in swept[1:5] if (p["setting"]["n_features"], p["setting"]["clamp"]) == setting)
        assert point["setting"]["features"] == quiz[place]["setting"]["features"]
        for name in ("wmdp_bio", "mmlu"):
            assert point["scores"][name]["letters"] == quiz[place]["scores"][name]["letters"]
        for name, value in loss[place]["scores"]["openwebtext"].items():
            assert point["scores"]["openwebtext"][name] == pytest.approx(value, abs=1e-5)


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
    resumed, whole = without_time(out), without_time(undisturbed)
    resumed["settings"].pop("out"), whole["settings"].pop("out")
    assert resumed == whole


@pytest.mark.slow
def test_a_stopped_sweep_says_what_it_kept_and_takes_it_up(monkeypatch, capfd, tmp_path):
    done, real = [], evaluation.score_letters

    def stop_at_the_second(*args, **options):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(1)
        return real(*args, **options)

    settings = dict(limit=6, n_features=[2], clamp=[0.0], out=str(tmp_path / "sweep.json"))
    monkeypatch.setattr(evaluation, "score_letters", stop_at_the_second)
    monkeypatch.setattr(sys, "argv", ["pareto.py"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert code_of(lambda: command_line(lambda **_: pareto.run(**settings), pareto.flags)) == 130
    assert "stopped: 1 finished pieces are kept" in capfd.readouterr().err
    done.clear()
    pareto.run(**{**settings, "batch_size": 4})  # WMDP-Bio is not scored again: MMLU is the first and only call
    assert len(done) == 1


@pytest.fixture
def piece(tmp_path):
    path = tmp_path / "mmlu_0000.json"
    pieces.write_piece(path, [[0, 1, 2], [3, 2, 1]])
    return path


def test_a_piece_is_read_as_it_was_written(piece):
    assert pieces.read_piece(piece) == [[0, 1, 2], [3, 2, 1]]
    nats = [[3.0000000000000004, 1e-17], [2.5, 1 / 3]]
    pieces.write_piece(piece, nats)
    assert pieces.read_piece(piece) == nats


def test_a_damaged_piece_is_refused_and_named(piece):
    whole = piece.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 7
        piece.write_bytes(flipped)
        if json_or_none(flipped) == json.loads(whole):
            continue  # a blank became another blank
        with pytest.raises(UserError, match=r"mmlu_0000\.json is damaged"):
            pieces.read_piece(piece)
        piece.write_bytes(whole[:position])
        with pytest.raises(UserError, match=r"mmlu_0000\.json is damaged"):
            pieces.read_piece(piece)


def json_or_none(text):
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_a_damaged_piece_ends_the_run_in_one_line(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(Path, "exists", lambda path: True if path.suffix == ".json" else path.is_dir())
    monkeypatch.setattr(Path, "read_text", lambda path, real=Path.read_text, **options:
                        "{" if ".pieces" in str(path) else real(path, **options))  # fmt: skip
    assert command(monkeypatch, "pareto.py", *SMALL, "--out", tmp_path / "r.json") == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and "wmdp_bio_0000.json is damaged" in errors[0]


def test_another_model_sae_data_grid_or_setting_has_another_fingerprint(tmp_path, monkeypatch):
    model = shutil.copytree(TINY / "model", tmp_path / "model")
    s = argparse.Namespace(model=str(model), layer=[7], clamp=[0.0], out="a", batch_size=16, method=None)
    sae, sources = load_sae(None, 7, load_model("tiny", "cpu")), {"mmlu": {"sha256": "x"}}

    def known(sources=sources, **changes):
        return json.dumps(pareto.decides([sae], sources, argparse.Namespace(**{**vars(s), **changes})))

    first = known()
    assert first == known(out="b", batch_size=4)
    others = [known({"mmlu": {"sha256": "y"}}), known(clamp=[-1.0]), known(method=["dsg"])]
    monkeypatch.setitem(pareto.GRIDS, "dsg", pareto.GRIDS["dsg"][:2])
    others.append(known(method=["dsg"]))
    sae.identity = "another"
    others.append(known())
    with (model / "config.json").open("a") as file:
        file.write(" ")
    others.append(known())
    assert len({first, *others}) == 7


# -------------------------------------------------------------------------------------- plots and mistakes


def test_plot_shows_the_points_of_any_records(monkeypatch, capfd, undisturbed, tmp_path):
    of_lesson = tmp_path / "lesson.json"
    clean, other = json.loads(undisturbed.read_text())["points"][:2]
    other = {**other, "method": "rmu", "setting": {"alpha": 100.0}}
    for score in (other["scores"], clean["scores"]):
        del score["mmlu_tuning"], score["openwebtext"]
    of_lesson.write_text(json.dumps({"points": [clean, other], "data": json.loads(undisturbed.read_text())["data"]}))
    only_loss = tmp_path / "loss.json"
    only_loss.write_text(json.dumps({"points": [{"method": "none", "scores": {"openwebtext": {}}}], "data": {}}))
    flags = ("--plot", undisturbed, of_lesson, only_loss, "--out", tmp_path / "all.json")
    assert command(monkeypatch, "pareto.py", *flags) == 0
    said = capfd.readouterr()
    assert "| RMU, first batch's norm | 1 |" in said.out and "loss.json has no scores of both quizzes" in said.err
    assert {"all_frontier.png", "all_frontier.svg", "all.md"} <= {path.name for path in tmp_path.iterdir()}


def test_records_of_two_models_share_no_frontier(tmp_path):
    """Each method of each model starts at its own model's unablated point, and its name says whose it is."""
    paths = []
    for name, top, forgets in (("one", 0.9, 0.5), ("two", 0.8, 0.3)):
        points = [point(top, top, method="none", clamp=0), point(top - 0.25, forgets)]
        record = {"model": f"org/{name}", "sae": "saes/layer_3", "points": points, "data": {},
                  "identity": {"model": name, "sae": "same"}}  # fmt: skip
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(record))
    points = [p for path in paths for p in pareto.read_points(str(path))[0]]
    groups = pareto.by_method(points)
    assert list(groups) == ["negative clamp (one)", "negative clamp (two)"]
    assert [[p["scores"]["mmlu"]["accuracy"] for p in group] for group in groups.values()] == [[0.9, 0.65], [0.8, 0.55]]
    assert [row["settings"] for row in pareto.summary(points)] == [1, 1]
    assert list(pareto.by_method(points[:2])) == ["negative clamp"]  # one record needs no more


def test_an_sae_or_a_model_trained_again_is_told_apart():
    record = {"model": "m", "sae": "saes/layer_3", "data": {}, "identity": {"model": "m1", "sae": "sha256:aaaaaa"}}
    again = {**record, "identity": {"model": "m1", "sae": "sha256:bbbbbb"}}
    other = {**record, "data": {"mmlu": {"sha256": "x", "questions": [1]}}}
    origins = [pareto.origin_of(one) for one in (record, again, other)]
    assert [pareto.told_apart(origin, origins[:2]) for origin in origins[:2]] == [
        " (layer_3 aaaaaa)", " (layer_3 bbbbbb)"
    ]  # fmt: skip
    names = {pareto.told_apart(origin, origins) for origin in origins}
    assert len(names) == 3 and all("data " in name for name in names)
    assert pareto.told_apart(origins[0], [origins[0]]) == ""


def test_labels_of_a_figure_do_not_overlap(undisturbed):
    points = json.loads(undisturbed.read_text())["points"]
    points = [{**p, "clean": points[0]} for p in points]
    figure = pareto.pareto_figure(points, ("WMDP-Bio", "MMLU", "OpenWebText"), "title")
    figure.canvas.draw()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        legend = figure.legends[0].get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
    plt.close(figure)


def test_a_method_looks_the_same_in_both_panels_and_none_is_left_out(undisturbed):
    clean, other = json.loads(undisturbed.read_text())["points"][:2]
    points = [{**other, "method": f"method {k}", "clean": clean} for k in range(12)]
    points[0] = {**points[0], "scores": {name: points[0]["scores"][name] for name in ("wmdp_bio", "mmlu")}}
    figure = pareto.pareto_figure(points, ("WMDP-Bio", "MMLU", "OpenWebText"), "title")
    first, second = (dict(zip(*axes.get_legend_handles_labels()[::-1])) for axes in figure.axes)
    assert {f"method {k}" for k in range(12)} <= set(first) and "method 0" not in second
    for k in range(1, 12):
        one, other = first[f"method {k}"], second[f"method {k}"]
        assert one.get_facecolor().tolist() == other.get_facecolor().tolist()
    plt.close(figure)


@pytest.mark.parametrize(
    "given, said",
    [
        (["--clamp", "3"], ["--clamp 3"]),
        (["--n-features", "0"], ["--n-features 0"]),
        (["--n-features", "1", "999999"], ["999999"]),
        (["--layers", "3", "4"], ["layer_4"]),
        (["--plot", "no-such.json"], ["no-such.json"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(monkeypatch, capfd, tmp_path, given, said):
    assert command(monkeypatch, "pareto.py", *given, "--out", tmp_path / "r.json") == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and all(word in errors[0] for word in said)
    assert not list(tmp_path.iterdir())


def test_every_method_looks_like_itself():
    """All that baselines.py tunes, RMU's two and the sweep's own, on one figure."""
    methods = {*baselines.GRIDS, *baselines.TRAINED, "rmu", "adaptive-rmu"}
    colours, markers, _ = map(set, zip(*pareto.STYLES))
    assert len(colours) == len(markers) >= len(methods)
