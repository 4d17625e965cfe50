"""Features given by hand, features picked by what they do, and the lesson that measures each of them."""

import json
import math
import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import CLAMP, TINY, hf, lesson, listing, nats_by_hand, residual, some_ids, some_windows, target_mask
from matplotlib.colors import to_hex
from safetensors.torch import load_file
from scipy import stats
from test_evaluation import mcnemar

import baselines
import data
import edits
import evaluation
import lm_eval_ablated
import pareto
import robustness
import runs
import show
from common import PICKING_RULES, Rates, ablate, load_model, load_sae
from data import Dataset, UserError
from edits import NONE
from evaluation import FeatureStats, Measure, measured_order
from runs import Run, own_features, parser, settings


@pytest.fixture(scope="module")
def tiny():
    model = load_model("tiny")
    return model, load_sae(None, 7, model)


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def refused(given: str) -> str:
    """What is said of it, which is one line."""
    with pytest.raises(UserError) as caught:
        own_features(given)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------ features of one's own


def neuronpedia(*pairs) -> list[dict]:
    return [{"modelId": "gemma-2-2b", "layer": layer, "index": index} for layer, index in pairs]


LIST = neuronpedia(("7-gemmascope-res-16k", "449"), ("9-gemmascope-res-16k", "31"), ("7-gemmascope-res-16k", "624"))


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("449,624", [449, 624]),
        ("624", [624]),
        ("449, 624\n1334,\n\n31\n", [449, 624, 1334, 31]),
        ("[449, 624]", [449, 624]),
        ('{"7": [449, 624], "9": [31]}', {7: [449, 624], 9: [31]}),
        (json.dumps(LIST), {7: [449, 624], 9: [31]}),
        (json.dumps({"features": LIST}), {7: [449, 624], 9: [31]}),
        (json.dumps({"neurons": LIST[:1]}), {7: [449]}),
        (json.dumps({"features": {"7": [449]}}), {7: [449]}),
        (json.dumps(neuronpedia((7, 449))), {7: [449]}),
    ],
)
def test_features_are_read_as_they_are_written_out_and_from_a_file(tmp_path, text, wanted):
    (tmp_path / "ids.txt").write_text(text)
    assert own_features(text) == own_features(str(tmp_path / "ids.txt")) == wanted


RECORDED = {
    "unablated": {"method": "none", "settings": {}},
    "few": {"method": "clamp", "settings": {"features": [5, 3], "clamp": -4.0, "layers": [7]}},
    "many": {"method": "zero-ablation", "settings": {"features": [9, 8, 1], "layers": [3]}},
    "random": {"method": "random-features", "settings": {"features": [1, 2, 3, 4], "layers": [7]}},
}


def record_of(tmp_path, rows=tuple(RECORDED), form=runs.FORM, **more) -> str:
    content = {"script": "a.py", "form": form, "rows": {row: RECORDED[row] for row in rows}}
    return listing(tmp_path, "record", content | more)


def test_of_a_record_the_chosen_row_counts_else_the_one_of_most_picked_features(tmp_path):
    assert own_features(record_of(tmp_path)) == {3: [9, 8, 1]}
    assert own_features(record_of(tmp_path, chosen="few")) == {7: [5, 3]}


@pytest.mark.parametrize(
    "text",
    ["", " \n", ",", "C", "449;624", "449 # a", "4.5", "-4", "[4.5]", "[]", "[null]", '["x"]', "[[449]]", "[[", "null",
     "{}", '{"7": []}', '{"7": [449], "3": []}',
     '{"features": []}', '{"a": [449]}', '{"7.5": [449]}', '{"7": 449}', '{"7": "449"}', '{"7": {"449": 1}}',
     json.dumps(LIST[0]), '[{"index": "449"}]', '[{"layer": "7-x"}]', '[{"layer": "x7", "index": "449"}]', "é"],
)  # fmt: skip
def test_what_is_no_list_of_features_is_refused_in_a_line(tmp_path, text):
    (tmp_path / "ids.txt").write_text(text)
    refused(str(tmp_path / "ids.txt"))
    if "\n" not in text:
        refused(text)


def test_a_file_or_record_without_features_is_refused_by_name(tmp_path):
    assert refused(str(tmp_path / "none.json")).startswith(str(tmp_path / "none.json"))
    (tmp_path / "ids.bin").write_bytes(b"\xff\xfe\x00")
    assert "ids.bin: give ids as 449,624, or a file" in refused(str(tmp_path / "ids.bin"))
    for path in (record_of(tmp_path, ["unablated"]), record_of(tmp_path, ["unablated", "random"])):
        assert "record.json: it has no list of one layer's features" in refused(path)
    assert "run its command again" in refused(record_of(tmp_path, form=2))


def test_a_setting_of_features_is_what_the_command_line_makes_of_it(tmp_path):
    p = parser("a script")
    for given, wanted in (([449, 624], [449, 624]), ((449,), [449]), (449, [449]), ({7: [449]}, {7: [449]}),
                          ("449,624", [449, 624]), (record_of(tmp_path), {3: [9, 8, 1]})):  # fmt: skip
        args = settings(p, {})
        args.features = given
        assert args.features == settings(p, {"features": given}).features == wanted
        assert settings(p, vars(args)).features == wanted  # handed on, as to run(**settings)
    assert p.parse_args(["--features", "449,624"]).features == [449, 624] and settings(p, {}).features is None
    for wrong in ([449.5], ["x"], [], "", {}, {7: []}, {"a": [1]}, {7: 449}):
        with pytest.raises(UserError):
            settings(p, {"features": wrong})


def run_of(folder, **changes) -> Run:
    return Run("a_script.py", settings(parser("a script"), {"out": str(folder), **changes}))


def test_of_ones_own_features_all_are_meant_and_the_name_has_no_number(tmp_path):
    for own in ([449, 624], {7: [449, 624]}):
        run = run_of(tmp_path, features=own)
        assert run.settings["n_features"] is None and run.settings["clamp"] == CLAMP
        assert run.path.name == f"a_script_tiny_L7_{run.key[:6]}.json"
        json.dumps(run.record({}, []))
    usual = run_of(tmp_path)
    assert usual.settings["n_features"] == 50 and "_tiny_L7_n50_" in usual.path.name
    assert "_tiny_L7_n1_" in run_of(tmp_path, features=[449, 624], n_features=1).path.name


def test_the_order_of_ones_own_features_decides_about_the_name(tmp_path):
    keys = {run_of(tmp_path, features=own).key for own in ([449, 624], [624, 449], [449], {7: [449]}, None)}
    assert len(keys) == 5


@pytest.mark.parametrize("own", [[9, 3, 30], {1: [9, 3, 30], 2: [4]}])
def test_the_first_n_of_ones_own_features_or_all_without_a_rate(gemma, gemma_sae, own):
    stats = FeatureStats(gemma, gemma_sae, 1, None, None, own=own)
    assert [stats.features(n) for n in (None, 1, 2, 3, 50)] == [[9, 3, 30], [9], [9, 3], [9, 3, 30], [9, 3, 30]]
    assert all(stats.features(2, rule) == [9, 3] for rule in PICKING_RULES)
    assert not {"rates", "quality"} & set(vars(stats))


def test_ones_own_features_of_other_layers_are_not_left_out_in_silence(gemma, gemma_sae, capsys):
    for own in ([9, 3], {1: [9, 3]}, {1: [9, 3], 4: [5], 2: [4]}):
        assert FeatureStats(gemma, gemma_sae, 1, None, None, own=own).features(None) == [9, 3]
    assert capsys.readouterr().err == "note: features given of layer 2, 4 are left out at layer 1\n"


@pytest.mark.parametrize(
    "own, said",
    [
        ([3, 64], "feature ids must lie in 0..63"),
        ([-1], "feature ids must lie in 0..63"),
        ([3, 3], "a feature is named twice"),
        ({1: [3, 9, 3]}, "a feature is named twice"),
        ({3: [4], 5: [6]}, "no features of layer 1 are given, only of 3, 5"),
        ({1: [], 3: [4]}, "no features of layer 1 are given"),
    ],
)
def test_features_that_the_sae_lacks_are_refused_in_a_line(gemma, gemma_sae, own, said):
    with pytest.raises(UserError, match=said) as caught:
        FeatureStats(gemma, gemma_sae, 1, None, None, own=own).features(1)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ amplification


def test_a_positive_clamp_by_hand(gemma, gemma_sae):
    h, features = residual(gemma, some_ids(gemma)), [3, 11, 40]
    weights = {name: value.detach().double().numpy() for name, value in gemma_sae.named_parameters()}
    pre = h.double().numpy() @ weights["W_enc"][:, features] + weights["b_enc"][features]
    active = pre > np.maximum(weights["threshold"][features], 0)
    assert 0.05 < active.mean() < 0.95
    expected = h.double().numpy() + np.where(active, 30.0 - pre, 0) @ weights["W_dec"][features]
    everywhere = torch.ones(h.shape[:2], dtype=torch.bool)
    found = edits.clamp(gemma_sae, features, 30.0)(h, everywhere)
    assert np.abs(found.numpy() - expected).max() < 1e-4
    same = edits.ablation(gemma_sae, features, 30.0)
    assert same.method == "clamp" and torch.equal(same.at[1](h, everywhere), found)
    assert torch.equal(found[~torch.from_numpy(active.any(-1))], h[~torch.from_numpy(active.any(-1))])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_clamp_is_finite(gemma_sae, value):
    with pytest.raises(ValueError, match="clamp must be a finite number"):
        edits.clamp(gemma_sae, [1], value)


def test_only_ones_own_features_are_amplified(tmp_path):
    with pytest.raises(UserError, match="clamp 30 amplifies features: for that give your own"):
        run_of(tmp_path, clamp=30)
    assert run_of(tmp_path, clamp=30, features=[449]).settings["clamp"] == 30

    def sweep(**changes):
        return Run("pareto.py", settings(pareto.flags, {"out": str(tmp_path), **changes}))

    with pytest.raises(UserError, match="clamp 30 amplifies features"):
        sweep(clamp=[-40, 30, 0])
    assert sweep(clamp=[-40, 30, 0], features=[449]).settings["clamp"] == [-40.0, 30.0, 0.0]
    assert sweep(clamp=[-40, 0]).settings["clamp"] == [-40.0, 0.0]


# --------------------------------------------------------------------------------------------- false discoveries


def benjamini_hochberg(p: list[float]) -> list[float]:
    """The smallest p * m / rank over this rank and those above it."""
    order, q, least = np.argsort(p), np.empty(len(p)), 1.0
    for rank in range(len(p), 0, -1):
        least = min(least, p[order[rank - 1]] * len(p) / rank)
        q[order[rank - 1]] = least
    return q.tolist()


def test_q_of_rows_of_right_and_wrong_by_hand():
    pairs = [(12, 0), (6, 1), (0, 1), (7, 0)]  # lost, won
    right = np.array([np.arange(40) < 38] * 5)
    for row, (lost, won) in zip(right[1:], pairs):
        row[:lost], row[38 : 38 + won] = False, True
    found = Measure("mmlu/letters", "MMLU, in letters", "%", tuple("abcde"), right).q_of_rows()
    expected = benjamini_hochberg([mcnemar(*pair) for pair in pairs])
    assert list(found) == list("bcde") and list(found.values()) == pytest.approx(expected, rel=1e-9)
    assert found["b"] == pytest.approx(4 * 2 * 0.5**12) and found["e"] == pytest.approx(4 / 2 * 2 * 0.5**7)


def test_q_of_rows_of_numbers_by_hand():
    values = np.random.default_rng(0).normal(2, 1, (4, 12)) + np.array([[0], [0.1], [2], [0]])
    values[3] = values[0]
    found = Measure("mmlu/nats", "MMLU, nats", "nats", tuple("abcd"), values).q_of_rows()
    change = values[1:3] - values[0]
    t = change.mean(1) / (change.std(1, ddof=1) / 12**0.5)
    expected = benjamini_hochberg([*(2 * stats.t.sf(abs(t), 11)), 1.0])
    assert list(found.values()) == pytest.approx(expected, rel=1e-9) and found["d"] == 1.0
    assert found["c"] < 0.01 < found["b"]


def test_rows_that_change_nothing_have_q_1():
    for values in (np.ones((3, 9), dtype=bool), np.full((3, 9), 0.25)):
        assert Measure("x", "x", "%", tuple("abc"), values).q_of_rows() == {"b": 1.0, "c": 1.0}


# ------------------------------------------------------------------------------------- nats of the right answers


def first_questions(n: int) -> Dataset:
    return data.load("wmdp_bio", "tiny").tuning.only(range(n))


def test_words_and_nats_are_log_probabilities_by_hand(tiny):
    """Of the plain model in float64, with and without an edit of what goes into the last layers."""
    model, sae = tiny
    quiz, rows = first_questions(4), {"unablated": NONE, "clamp": edits.ablation(sae, [449, 1334], CLAMP)}
    words, nats = evaluation.words_and_nats(model, quiz, rows)
    assert (words.name, nats.name, nats.unit) == (
        "wmdp_bio/tuning/words", "wmdp_bio/tuning/words/nats", "nats per character")  # fmt: skip
    plain, tokenizer = hf(TINY / "model")
    for k, row in enumerate(quiz.rows):
        losses = []
        for choice in row["choices"]:
            asked = f"{row['question'].strip()}\nAnswer in words:"
            start, ids = len(tokenizer(asked)["input_ids"]), torch.tensor([tokenizer(f"{asked} {choice}")["input_ids"]])
            total, _ = nats_by_hand(plain, ids, target_mask(ids, tokenizer, torch.tensor([start])))
            losses.append(total[0] / len(choice))
        assert nats.values[0, k] == pytest.approx(losses[row["answer"]], abs=1e-5)
        assert words.values[0, k] == (np.argmin(losses) == row["answer"])
    assert (nats.values[1] > nats.values[0] + 0.01).any()
    alone = evaluation.words(model, quiz, rows)
    assert (alone.values == words.values).all() and alone.answers == words.answers


def test_nats_of_the_right_letter_by_hand(tiny):
    model, sae = tiny
    quiz, rows = first_questions(4), {"unablated": NONE, "clamp": edits.ablation(sae, [624], CLAMP)}
    nats = evaluation.nats_of(evaluation.letters(model, quiz, rows)[2])
    assert nats.name == "wmdp_bio/tuning/P(right letter)/nats" and nats.unit == "nats"
    assert "right letter" in nats.title and "P(" not in nats.title
    plain, tokenizer = hf(TINY / "model")
    for k, row in enumerate(quiz.rows):
        asked = data.prompt(row)
        right = tokenizer(f"{asked} {'ABCD'[row['answer']]}")["input_ids"][-1]
        with torch.no_grad():
            logits = plain(torch.tensor([tokenizer(asked)["input_ids"]])).logits[0, -1]
        assert nats.values[0, k] == pytest.approx(-logits.log_softmax(-1)[right].item(), abs=1e-5)


# -------------------------------------------------------------------------- the order in which features are worth it

QUESTIONS, UTILITY = Dataset("wmdp_bio", [{}] * 20), Dataset("mmlu", [{}] * 200)


def truth(monkeypatch, letters: dict[int, set], words: dict[int, set] | None = None, harm: dict[int, set] | None = None,
          alone: int = 200) -> list[list[int]]:  # fmt: skip
    """Have features take these questions: together they take what any of them does. alone: how many of the utility
    quiz are right without an edit. Returns a list that fills with the features that are asked about."""
    asked = []

    def right(quiz, rows, taken):
        values = np.array([[q < (alone if quiz is UTILITY else 20) for q in range(len(quiz))]] * len(rows))
        for row, edit in zip(values, rows.values()):
            for feature in edit.settings.get("features", []):
                row[sorted(taken.get(feature, ()))] = False
        return Measure(quiz.name, quiz.name, "%", tuple(rows), values)

    def fake_letters(model, quiz, rows, **_):
        if quiz is QUESTIONS:
            asked.extend(edit.settings["features"] for edit in rows.values() if edit is not NONE)
        return right(quiz, rows, letters if quiz is QUESTIONS else harm or {}), None, None

    monkeypatch.setattr(evaluation, "letters", fake_letters)
    monkeypatch.setattr(evaluation, "words", lambda model, quiz, rows, **_: right(quiz, rows, words or {}))
    return asked


def order_of(sae, features, n=None) -> list[int]:
    found = measured_order(None, sae, features, -5.0, QUESTIONS, UTILITY)
    return [feature for _, feature in zip(range(len(features) if n is None else n), found)]


OVERLAP = {4: {*range(6)}, 9: {*range(5)}, 2: {6, 7, 8}, 7: {8, 9}, 1: set()}  # 9 adds nothing to 4


def test_what_counts_is_what_a_feature_takes_beside_the_others(gemma_sae, monkeypatch):
    truth(monkeypatch, OVERLAP)
    assert order_of(gemma_sae, [1, 2, 4, 7, 9]) == [4, 2, 7, 1, 9]


def test_few_are_tried_for_a_place_and_what_they_took_there_is_their_promise(gemma_sae, monkeypatch):
    """1, of which 2 and 3 are parts, comes first, then one of the two that are tried; 3, which was tried too and added
    nothing, waits for 5, which had promised less than it."""
    monkeypatch.setattr(evaluation, "TRIED", 2)
    asked = truth(monkeypatch, {1: {*range(6)}, 2: {*range(5)}, 3: {*range(4)}, 4: {*range(4)}, 5: {7, 8, 9}})
    assert order_of(gemma_sae, [1, 2, 3, 4, 5]) == [1, 2, 5, 3, 4]
    assert asked[5:] == [[1], [2], [1, 2], [1, 3], [1, 2, 4], [1, 2, 5], [1, 2, 5, 3], [1, 2, 5, 4], [1, 2, 5, 3, 4]]


def test_letters_and_words_count_alike(gemma_sae, monkeypatch):
    truth(monkeypatch, {1: {0, 1}, 2: {2}, 3: set()}, {1: set(), 2: {0, 1}, 3: {3}})
    assert order_of(gemma_sae, [1, 2, 3]) == [2, 1, 3]


def test_of_features_that_take_as_much_the_one_that_keeps_more_comes_first(gemma_sae, monkeypatch):
    truth(monkeypatch, {1: {0}, 2: {1}}, harm={1: {0}})
    assert order_of(gemma_sae, [1, 2]) == [2, 1]


@pytest.mark.parametrize("alone", [200, 100])
def test_none_is_picked_with_which_the_utility_quiz_falls_below_99_per_cent(gemma_sae, monkeypatch, alone):
    """Of what the model gets right: alone, or beside those picked before it. Just 99 per cent is enough."""
    most = alone // 100
    takes = {1: {*range(9)}, 2: {9, 10, 11}, 3: {12, 13}, 4: {14}, 5: set()}
    harm = {1: {*range(most + 1)}, 2: {0}, 3: {*range(1, most + 1)}, 4: {*range(most)}}
    truth(monkeypatch, takes, harm=harm, alone=alone)
    assert order_of(gemma_sae, [1, 2, 3, 4, 5]) == [2, 4, 5]  # 1 alone, 3 beside 2


def test_all_the_others_come_in_the_end_each_once(gemma_sae, monkeypatch):
    rng = np.random.default_rng(0)
    features = list(range(30))
    truth(monkeypatch, {i: {*rng.integers(0, 20, 3).tolist()} for i in features}, harm={4: {0, 1, 2}, 17: {*range(9)}})
    found = order_of(gemma_sae, features)
    assert sorted(found) == sorted({*features} - {4, 17}) and len(found) == len(set(found))


@pytest.mark.parametrize("n, tried", [(1, 8), (4, 8), (5, 3), (26, 8)])
def test_few_features_cost_few_questions(gemma_sae, monkeypatch, n, tried):
    monkeypatch.setattr(evaluation, "TRIED", tried)
    rng = np.random.default_rng(1)
    features = list(range(26))
    asked = truth(monkeypatch, {i: {*rng.integers(0, 20, 4).tolist()} for i in features})
    found = order_of(gemma_sae, features, n)
    assert len(found) == n and len(asked) <= len(features) + tried * n
    assert asked[:26] == [[i] for i in features]
    assert all(ids[:-1] == found[: len(ids) - 1] for ids in asked[26:])


def stats_of(gemma, sae, fires=range(8), **more) -> FeatureStats:
    """As if these features were active on the forget texts, and no others."""
    found = FeatureStats(gemma, sae, 1, None, None, rule="measured",
                         **{"questions": QUESTIONS, "utility": UTILITY, "clamp": -5.0, **more})  # fmt: skip
    counts = torch.zeros(64, dtype=torch.int64)
    counts[list(fires)] = 50
    vars(found)["rates"] = (Rates(counts, counts.double(), 1000), Rates(0 * counts, 0.0 * counts, 1000))
    return found


def test_more_features_by_measured_effect_go_on_from_fewer(gemma, gemma_sae, monkeypatch):
    rng = np.random.default_rng(2)
    takes = {i: {*rng.integers(0, 20, 3).tolist()} for i in range(8)}
    asked = truth(monkeypatch, takes)
    at_once, again = stats_of(gemma, gemma_sae), stats_of(gemma, gemma_sae)
    wanted, cost = at_once.features(5), len(asked)
    asked.clear()
    assert again.features(2) == wanted[:2] and again.features(5) == wanted and again.features(3) == wanted[:3]
    assert len(asked) == cost
    assert again.features(5, clamp=-9.0) == wanted and len(asked) == 2 * cost  # another clamp is another question
    assert {i for ids in asked for i in ids} == set(range(8))  # of those that never fire none is asked about


def test_the_clamp_at_which_features_are_measured_is_the_one_that_is_meant(gemma, gemma_sae, monkeypatch):
    clamps = []

    def order(model, sae, features, clamp, questions, utility, style, batch_size):
        clamps.append((clamp, questions, utility, style, batch_size))
        yield from features

    monkeypatch.setattr(evaluation, "measured_order", order)
    stats = stats_of(gemma, gemma_sae, style="chat", batch_size=3)
    assert stats.features(2) == [0, 1] and stats.features(2, clamp=-9.0) == [0, 1]
    assert clamps == [(-5.0, QUESTIONS, UTILITY, "chat", 3), (-9.0, QUESTIONS, UTILITY, "chat", 3)]
    edit = edits.from_grid("measured-clamp", {"n_features": 3, "clamp": 0.5}, stats)
    assert clamps[-1][0] == -2.5 and edit.settings == {"features": [0, 1, 2], "clamp": -2.5, "layers": [1]}
    monkeypatch.setattr(evaluation, "CANDIDATES", 4)
    assert stats.features(4, clamp=-1.0) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="no 5 features"):
        stats.features(5, clamp=-1.0)


def test_fewer_features_than_asked_for_are_refused_in_a_line(gemma, gemma_sae, monkeypatch):
    truth(monkeypatch, {}, harm={0: {*range(9)}, 1: {*range(9)}})
    stats = stats_of(gemma, gemma_sae)
    with pytest.raises(UserError, match=r"no 7 features: with 6 picked .* none is left that keeps 99% of MMLU") as said:
        stats.features(7)
    assert "\n" not in str(said.value) and len(stats.features(6)) == 6


@pytest.mark.parametrize("missing", ["questions", "utility"])
def test_without_questions_nothing_can_be_measured(gemma, gemma_sae, missing):
    for nothing in (None, Dataset("mmlu", [])):
        with pytest.raises(UserError, match="needs questions to forget and questions to keep"):
            stats_of(gemma, gemma_sae, **{missing: nothing}).features(1)


# ------------------------------------------------------------------------------------------- tables and figures

SOME = ("unablated", "5 alone", "9 alone", "3 alone")


def taken(title="WMDP-Bio, tuning half, in letters", lost=(0, 30, 1, 0), n=40, rows=SOME) -> Measure:
    values = np.array([np.arange(n) >= k for k in lost])
    return Measure(title, title, "%", rows, values, chance=0.25)


def nats(rows=SOME) -> Measure:
    values = np.array([np.zeros(8), 0.5 + 0.01 * np.arange(8), np.arange(8) % 2 - 0.4, np.zeros(8)])
    return Measure("nats", "MMLU, tuning half, right letter", "nats", rows, values)


def test_changes_are_printed_with_a_star_where_they_stand_out(capsys):
    show.changes([taken(), nats()])
    lines = capsys.readouterr().out.splitlines()
    assert "change against 'unablated'" in lines[1] and "over 3 rows are held to 5%" in lines[1]
    heads = [line.split("  ") for line in lines[3:6]]
    assert [[cell.strip() for cell in line if cell.strip()] for line in heads] == [
        ["WMDP-Bio", "MMLU"], ["in letters", "right letter"], ["%", "nats"]]  # fmt: skip
    assert lines[6].split() == ["unablated", "100.0", "0.0000"]
    assert [line.split() for line in lines[7:]] == [
        ["5", "alone", "-75.0*", "+0.5350*"], ["9", "alone", "-2.5", "+0.1000"], ["3", "alone", "+0.0", "+0.0000"]
    ]  # fmt: skip
    show.changes([taken()], most=2)
    assert capsys.readouterr().out.splitlines()[-1] == "  ... and 1 more, all in the record"


def test_a_star_counts_all_rows_also_those_that_are_not_printed(capsys):
    """6 of 40 lost: p 0.031, which stands out alone and not among ten."""
    for others in (0, 9):
        rows = ("unablated", "5 alone", *(f"{i} alone" for i in range(10, 10 + others)))
        show.changes([taken(lost=(0, 6, *[0] * others), rows=rows)], most=1)
        assert ("-15.0*" in capsys.readouterr().out) == (others == 0)


def test_the_figure_of_effects_has_points_lost_and_reds_that_stand_out():
    """Among the features alone: 7 of 40 lost, p 0.016, stand out of three rows, and would not of four."""
    rows = (*SOME, "all but 5")
    retain = taken("MMLU", (0, 2, 0, 0, 0), rows=rows)
    letters, words = taken(lost=(0, 7, 1, 0, 0), rows=rows), taken("in $words$", (0, 0, 20, 0, 0), rows=rows)
    figure = show.effects_figure([letters, words], retain, [9, 5, 3], "a title")
    for axes, y, red in zip(figure.axes, ([2.5, 17.5, 0], [50, 0, 0]), ([False, True, False], [True, False, False])):
        (dots,) = axes.collections
        assert np.allclose(dots.get_offsets(), np.stack([[0, 5, 0], y], 1))
        assert [to_hex(colour) == show.ABLATED for colour in dots.get_facecolor()] == red
        assert {text.get_text() for text in axes.texts if text.get_text()} == {"5", "9"}  # 3 takes nothing
        assert axes.get_xlabel().startswith("MMLU") and axes.get_xlabel().endswith("points lost")
    assert figure.axes[1].get_ylabel().startswith(r"in \$words\$")
    figure.canvas.draw()


def test_the_ten_strongest_of_many_features_have_their_number():
    features, lost = list(range(100, 112)), [0, *range(1, 13)]
    rows = ("unablated", *(f"{one} alone" for one in features))
    figure = show.effects_figure([taken(lost=lost, rows=rows)], taken("MMLU", [0] * 13, rows=rows), features, "")
    names = {text.get_text() for text in figure.axes[0].texts if text.get_text()}
    assert names == {str(one) for one in features[2:]}


def test_the_figure_of_counts_has_a_line_for_each_order():
    rows = ("unablated", *(f"first {n} by {name}" for name in ("rate", "effect") for n in (1, 2, 5)))
    measures = [taken("WMDP-Bio, in letters", (4, 10, 12, 20, 16, 24, 30), rows=rows),
                taken("MMLU, in letters", (0, 1, 2, 3, 4, 5, 6), rows=rows)]  # fmt: skip
    figure = show.counts_figure(measures, {"rate": [], "effect": []}, [1, 2, 5], "a title")
    for axes, by_order in zip(figure.axes, (([75, 70, 50], [60, 40, 25]), ([97.5, 95, 92.5], [90, 87.5, 85]))):
        lines = [line for line in axes.lines if line.get_marker() == "o"]
        assert [line.get_xdata().tolist() for line in lines] == [[1, 2, 5]] * 2
        assert [line.get_ydata().tolist() for line in lines] == [pytest.approx(values) for values in by_order]
        assert [line.get_label().split()[-1] for line in lines] == ["rate", "effect"]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "5"]
    levels = [sorted({line.get_ydata()[0] for line in axes.lines if line.get_marker() != "o"}) for axes in figure.axes]
    assert levels == [[25, 90], [25, 100]]
    score, band = measures[0]["first 2 by effect"], figure.axes[0].collections[1].get_paths()[0].vertices
    assert {round(y, 6) for x, y in band if x == 2} == {round(100 * end, 6) for end in (score.low, score.high)}
    figure.canvas.draw()


def test_contexts_have_the_strongest_token_in_brackets(gemma, make_sae, capsys):
    """Of the tokens but the first and special ones, which are never edited, however strong the feature is there."""
    sae, windows, features, reach = make_sae(gemma), some_windows(gemma), [3, 11, 40], 2
    special = torch.tensor(data.special_ids(gemma.tokenizer))

    def encoded(ids):
        acts = sae.encode(residual(gemma, torch.tensor([ids])))[0]
        return torch.where(torch.isin(torch.tensor(ids), special)[:, None], 0, acts)

    strongest = 1 + int(encoded(windows[0])[1:, 40].argmax())
    windows.append([*windows[0][strongest:], *windows[0][1:strongest]])
    acts = [encoded(ids) for ids in windows]
    assert acts[-1][0, 40] > max(one[1:, 40].max() for one in acts)
    show.print_contexts(gemma, sae, features, windows, n=2, reach=reach)
    blocks, decode = capsys.readouterr().out.split("\n\n"), gemma.tokenizer.decode
    directions = torch.nn.functional.normalize(sae.W_dec[features].detach(), dim=-1)
    for k, (feature, block) in enumerate(zip(features, blocks, strict=True)):
        head, *lines = block.strip("\n").split("\n")
        cosine = (directions @ directions[k]).tolist()
        cosine[k] = -2.0
        near = int(np.argmax(cosine))
        assert head.strip().startswith(f"{feature}: nearest {features[near]} (cosine {cosine[near]:.2f}); suppresses ")
        found = sorted(((one[1:, feature].max().item(), i) for i, one in enumerate(acts)), key=lambda x: (-x[0], x[1]))
        for (strength, i), line in zip(found[:2], lines, strict=True):
            at, ids = 1 + int(acts[i][1:, feature].argmax()), windows[i]
            text = f"{decode(ids[max(0, at - reach) : at])}[{decode(ids[at])}]{decode(ids[at + 1 : at + 1 + reach])}"
            assert line.strip() == f"{strength:.1f}  {text.translate(show.ARROWS)}".strip()
            assert strength > 0
    show.print_contexts(gemma, sae, [3], windows, n=1)
    assert "nearest" not in capsys.readouterr().out


def test_measures_of_one_item_or_of_equal_ones_have_no_p():
    one = Measure("m", "m", "nats", ("a", "b"), np.array([[1.0], [2.0]]))
    same = Measure("m", "m", "nats", ("a", "b"), np.ones((2, 5)))
    assert one.q_of_rows() == same.q_of_rows() == {"b": 1.0}


def test_features_of_a_record_belong_to_their_saes_layer(tmp_path):
    """An SAE of layer 4 that reads what layer 3 writes edits there."""
    row = {"method": "clamp", "settings": {"features": [5, 3], "clamp": -1.0, "layers": [3]}}
    saes = [{"layer": 4, "hook_point": "blocks.3.hook_resid_post"}]
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"form": runs.FORM, "script": "s.py", "rows": {"clamp": row}, "saes": saes}))
    assert own_features(str(path)) == {4: [5, 3]}


def test_measuring_that_is_stopped_begins_again(monkeypatch):
    rates = Rates(torch.tensor([9, 8, 7, 6]), torch.ones(4), 10), Rates(torch.zeros(4).long(), torch.zeros(4), 10)
    quiz = Dataset("q", [{"question": "?", "choices": list("abcd"), "answer": 0}])
    stats = FeatureStats(None, None, 7, [], [], questions=quiz, utility=quiz)
    stats.__dict__["rates"] = rates
    stopped = [True]

    def order(*_):
        yield 0
        if stopped.pop() if stopped else False:
            raise KeyboardInterrupt
        yield from (1, 2)

    monkeypatch.setattr(evaluation, "measured_order", order)
    with pytest.raises(KeyboardInterrupt):
        stats.measured(2, -1.0)
    assert stats.measured(3, -1.0) == [0, 1, 2]
    with pytest.raises(UserError, match="no 5 features: the rule 'measured' chooses among the 4 of highest ratio"):
        stats.measured(5, -1.0)


def test_suppressed_tokens_are_those_of_lowest_logits(tiny):
    model, sae = tiny
    vectors = sae.W_dec[[624, 449]].detach().double()
    weights = {name: value.double() for name, value in load_file(TINY / "model/model.safetensors").items()}
    normed = vectors / (vectors.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weights["model.norm.weight"])
    lowest = (normed @ weights["model.embed_tokens.weight"].T).topk(5, largest=False).indices.tolist()
    found = show.promoted_tokens(model, sae, [624, 449], suppressed=True)
    assert found == [[model.tokenizer.decode(i) for i in ids] for ids in lowest]
    assert not {*found[0]} & {*show.promoted_tokens(model, sae, [624, 449])[0]}


# ---------------------------------------------------------------------------------------------------- the lesson


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """What the lesson leaves behind, of ten features and six questions."""
    out = tmp_path_factory.mktemp("ten") / "r.json"
    return SimpleNamespace(**lesson("feature_importance.py", n_features=10, limit=6, out=out)), out


def logits_of(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0].double()


def nats_of(logits: torch.Tensor, ids: list[int], first: int = 1) -> list[float]:
    """Of each token from index `first` on."""
    log_probs = logits[first - 1 : len(ids) - 1].log_softmax(-1)
    return (-log_probs.gather(1, torch.tensor(ids[first:])[:, None])[:, 0]).tolist()


def features_of(row: str, features: list[int]) -> list[int]:
    """Of "unablated", "all", "I alone" and "all but I"."""
    if row in ("unablated", "all"):
        return features * (row == "all")
    one = int(row.removesuffix(" alone").removeprefix("all but "))
    return [one] if row.endswith("alone") else [feature for feature in features if feature != one]


@pytest.mark.slow
def test_every_row_is_a_plain_pass_under_ablate(ten):
    names, _ = ten
    model, quiz, features = names.model, names.bio, names.features
    assert len(features) == 10 and len(quiz) == 6
    rows = ["unablated", "all", *(f"{i} alone" for i in features), *(f"all but {i}" for i in features)]
    assert set(names.letters.rows) == set(rows) == set(names.loss.rows) == set(names.kept.rows) and len(rows) == 22
    prompts, letter_ids = data.encode_prompts(model.tokenizer, [data.prompt(row) for row in quiz.rows])
    words, first = data.encode_words(model.tokenizer, quiz.rows)
    right = [row["answer"] for row in quiz.rows]
    windows, documents = data.token_windows(model.tokenizer, names.benchmark.web.texts, max_tokens=1000, bos=True)
    tokens = np.bincount(documents, [len(ids) - 1 for ids in windows])  # but for the BOS all are words
    assert len(tokens) > 1 and (names.loss.weights == tokens).all()
    for row in rows:
        k = names.letters.rows.index(row)
        with ablate(model, names.sae, features_of(row, features), CLAMP):
            for i, ids in enumerate(prompts):
                found = logits_of(model, ids)[-1].log_softmax(-1)[list(letter_ids)]
                assert "ABCD"[int(found.argmax())] == names.letters.answers[k][i]
                assert names.letters.values[k, i] == (found.argmax() == right[i])
                assert names.nats[0].values[k, i] == pytest.approx(-found[right[i]].item(), abs=1e-5)
                at, answer = 4 * i + right[i], quiz.rows[i]["choices"][right[i]]
                in_words = sum(nats_of(logits_of(model, words[at]), words[at], first[at])) / len(answer)
                assert names.nats[1].values[k, i] == pytest.approx(in_words, abs=1e-5)
            losses = [sum(nats_of(logits_of(model, ids), ids)) for ids in windows]
            assert names.loss.values[k] / tokens == pytest.approx(np.bincount(documents, losses) / tokens, abs=1e-5)


def effects(record: dict) -> dict[str, tuple]:
    """{feature: (answers lost alone in letters and in words, nats added)}, from the record's scores."""
    found = {}
    for row, about in record["rows"].items():
        if row.endswith(" alone"):
            change = {name: score["change"] for name, score in about["scores"].items()}
            lost = -change["wmdp_bio/tuning/letters"] - change["wmdp_bio/tuning/words"]
            nats = change["wmdp_bio/tuning/P(right letter)/nats"] + change["wmdp_bio/tuning/words/nats"]
            found[int(row.removesuffix(" alone"))] = lost, nats
    return found


@pytest.mark.slow
def test_the_record_has_features_by_their_effect_as_they_are_taken_from_it(ten):
    names, path = ten
    record, effect = runs.read_record(path), effects(names.record)
    wanted = sorted(names.features, key=effect.get, reverse=True)
    assert len(effect) == 10 and wanted != names.features and effect[wanted[0]][0] > 0
    assert record["rows"]["all"]["settings"]["features"] == wanted and own_features(str(path)) == {7: wanted}
    for n in (1, 2, 3, 5, 10):
        for name, ids in (("ratio", names.features), ("effect", wanted)):
            assert record["rows"][f"first {n} by {name}"]["settings"] == {
                "features": ids[:n], "clamp": CLAMP, "layers": [7]}  # fmt: skip
    for row in names.rows:
        assert set(record["rows"][row]["settings"].get("features", [])) == set(features_of(row, wanted))
    seen = {name for row in ("all", "first 10 by effect") for name in record["rows"][row]["scores"]}
    assert len(seen) == 10 and {"wmdp_bio/letters", "wmdp_bio/words", "mmlu/letters"} <= seen
    assert {figure.name for figure in path.parent.glob("*.png")} == {"r_effects.png", "r_curves.png"}


@pytest.mark.slow
def test_what_is_printed_is_what_was_measured(ten, tmp_path, capsys):
    """Effects alone, effects left out, and their sums."""
    names, path = ten
    again = lesson("feature_importance.py", features=path, limit=6, out=tmp_path / "r.json")
    text, measure = capsys.readouterr().out, names.letters
    lines = [line.split() for line in text.splitlines()]
    for one in names.features:
        for row in (f"{one} alone", f"all but {one}"):
            before = "unablated" if row.endswith("alone") else "all"
            points = 100 * (measure[row].mean - measure[before].mean)
            (line,) = [line for line in lines if line[: len(row.split())] == row.split()]
            assert line[len(row.split())].rstrip("*") == f"{points:+.1f}"
    mean = {row: measure[row].mean for row in measure.rows}
    alone = sum(mean[f"{one} alone"] - mean["unablated"] for one in names.features)
    left_out = sum(mean["all"] - mean[f"all but {one}"] for one in names.features)
    sums = [100 * (mean["all"] - mean["unablated"]), 100 * alone, 100 * left_out]
    (line,) = [line for line in text.splitlines() if line.endswith("WMDP-Bio stand-in, tuning half, in letters, %")]
    printed = [float(number) for number in re.findall(r"[+-]\d+\.\d", line)]
    assert printed == pytest.approx(sums, abs=0.051)
    assert again["features"] == own_features(str(path))[7]
    assert again["record"]["rows"]["all"]["answers"] == names.record["rows"]["all"]["answers"]
    contexts = [line for line in text.splitlines() if "; suppresses " in line or ": suppresses" in line]
    assert [int(line.split(":")[0]) for line in contexts] == again["order"]


@pytest.mark.slow
def test_a_stopped_lesson_goes_on_and_ends_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    flags, asked, letters, loss = dict(n_features=3, limit=4), [], evaluation.letters, evaluation.loss

    def spied(model, quiz, rows, **how):
        asked.append((quiz.name, quiz.half))
        return letters(model, quiz, rows, **how)

    def stopped(*given, **how):
        monkeypatch.setattr(evaluation, "loss", loss)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "letters", spied)
    whole = lesson("feature_importance.py", **flags, out=tmp_path / "whole.json")["record"]
    tuning, held_out = ([(name, half) for name in ("wmdp_bio", "mmlu")] for half in ("tuning", "held-out"))
    assert asked == tuning + held_out
    asked.clear()
    monkeypatch.setattr(evaluation, "loss", stopped)
    with pytest.raises(KeyboardInterrupt, match="3 finished parts are kept"):
        lesson("feature_importance.py", **flags, out=tmp_path / "r.json")
    assert asked == tuning and not (tmp_path / "r.json").exists()
    asked.clear()
    again = lesson("feature_importance.py", **flags, out=tmp_path / "r.json")["record"]
    assert asked == held_out and not (tmp_path / "r.cache").exists()
    for part in ("rows", "measures", "data", "saes", "quality", "identity"):
        assert again[part] == whole[part]


@pytest.mark.slow
def test_amplified_features_are_measured_too(tmp_path):
    names = lesson("feature_importance.py", features="449,624", clamp=40, limit=4, out=tmp_path / "r.json")
    rows = names["record"]["rows"]
    assert all(row["settings"]["clamp"] == 40 for name, row in rows.items() if name != "unablated")
    with pytest.raises(UserError, match="clamp 40 amplifies features"):
        lesson("feature_importance.py", n_features=2, clamp=40, limit=4, out=tmp_path / "r.json")


# ----------------------------------------------------------------------------------- features in the other scripts

OWN, LESSONS = [449, 624], ["feature_ablate_1.py", "feature_ablate_2.py", "feature_ablate_3.py"]


def edited(record: dict) -> list[list[int]]:
    """The features of each row that are not random."""
    return [row["settings"]["features"] for row in record["rows"].values()
            if "features" in row["settings"] and row["method"] != "random-features"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("script", LESSONS)
def test_a_lesson_edits_ones_own_features(script, tmp_path):
    record = lesson(script, features="449,624", limit=20, out=tmp_path)["record"]
    assert len(edited(record)) >= 2 and all(features == OWN for features in edited(record))
    controls = [row["settings"]["features"] for row in record["rows"].values() if row["method"] == "random-features"]
    assert controls and all(len(features) == 2 and not {*features} & {*OWN} for features in controls)
    (path,) = tmp_path.glob("*.json")
    assert record["settings"]["features"] == OWN and "_n" not in path.name.removeprefix("feature_ablate")


@pytest.mark.slow
def test_pareto_sweeps_ones_own_features(tmp_path):
    record = pareto.run(features=OWN, clamp=[-40.0, 20.0], limit=20, out=str(tmp_path))
    picked = [(row["settings"]["features"], row["settings"]["clamp"]) for row in record["rows"].values()
              if row["method"] == "clamp"]  # fmt: skip
    assert picked == [([449], 20.0), ([449], -40.0), (OWN, 20.0), (OWN, -40.0)]
    assert [len(row["settings"]["features"]) for row in record["rows"].values() if row["method"] == "random-features"
            ] == [1, 1, 2, 2]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("own", [OWN, {7: OWN, 3: [5]}])
def test_baselines_tunes_ones_own_features(own, tmp_path):
    record = baselines.run(method="clamp", features=own, limit=20, out=str(tmp_path))
    assert edited(record) == [OWN] * 4 and len(record["rows"]) == 5 and record["chosen"] in record["rows"]
    assert [setting["n_features"] for setting in record["grid"]] == [2] * 4
    assert {row["settings"]["clamp"] for row in record["rows"].values() if row["method"] == "clamp"} == {
        CLAMP / 4, CLAMP / 2, CLAMP, 2 * CLAMP}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("own", [OWN, {7: OWN}])
def test_lm_eval_scores_ones_own_features(own, tmp_path):
    record = lm_eval_ablated.run(features=own, tasks="tiny_wmdp_bio", limit=20, out=str(tmp_path))
    assert edited(record) == [OWN] and record["rows"][f"clamp {CLAMP:g}"]["settings"]["clamp"] == CLAMP
    assert [sae["layer"] for sae in record["saes"]] == [7]
    of_record = lm_eval_ablated.run(features=str(next(tmp_path.glob("*.json"))), clamp=20.0, tasks="tiny_wmdp_bio",
                                    limit=20, out=str(tmp_path / "r.json"))  # fmt: skip
    assert edited(of_record) == [OWN] and of_record["rows"]["clamp 20"]["settings"]["clamp"] == 20


@pytest.mark.slow
def test_robustness_examines_ones_own_features(tmp_path):
    record = robustness.run(features=OWN, limit=20, out=str(tmp_path))
    assert edited(record) == [OWN] and [row["method"] for row in record["rows"].values()].count("clamp") == 1
    layers = robustness.run(features={7: [449], 3: [5]}, clamp=-20.0, limit=4, out=str(tmp_path / "r.json"))
    (both,) = [row["settings"]["edits"] for row in layers["rows"].values() if row["method"] == "together"]
    assert [(part["settings"]["layers"], part["settings"]["features"], part["settings"]["clamp"]) for part in both] == [
        ([7], [449], -20.0), ([3], [5], -20.0)]  # fmt: skip


def test_robustness_takes_records_or_ones_own_features(tmp_path):
    for more in (dict(features=OWN), dict(layer=3), dict(clamp=-20.0), dict(limit=4)):
        with pytest.raises(UserError, match=f"{next(iter(more))}: the records say it"):
            robustness.run(records=[str(tmp_path / "r.json")], **more)
    with pytest.raises(UserError, match=r"no record of baselines\.py is there"):
        robustness.run(out=str(tmp_path))


@pytest.mark.slow
def test_every_script_can_pick_by_measured_effect(tmp_path, monkeypatch):
    """From few candidates, at one clamp, on a quarter of the questions: all pick the same."""
    monkeypatch.setattr(evaluation, "CANDIDATES", 5)
    monkeypatch.setattr(evaluation, "TRIED", 2)
    for name in ("wmdp_bio", "mmlu", "mmlu_dev", "wikitext", "openwebtext"):
        lines = (TINY / f"data/{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines[:: 4 if name in ("wmdp_bio", "mmlu") else 1]))
    flags = dict(pick="measured", limit=6, data=str(tmp_path))
    picked = lesson("feature_ablate_2.py", **flags, n_features=2, out=tmp_path / "l.json")["record"]
    swept = pareto.run(**flags, n_features=[2], clamp=[CLAMP], out=str(tmp_path / "p.json"))
    scored = lm_eval_ablated.run(**flags, n_features=2, tasks="tiny_wmdp_bio", out=str(tmp_path / "e.json"))
    first, *others = [*edited(picked), *edited(swept), *edited(scored)]
    assert len(first) == 2 and len(others) >= 3 and all(features == first for features in others)
    flags["pick"] = "ratio"
    by_ratio = lesson("feature_ablate_2.py", **flags, n_features=5, out=tmp_path / "r.json")["features"]
    assert {*first} <= {*by_ratio} and first != by_ratio[:2]


def test_pick_features_says_where_measuring_is_done():
    rates = Rates(torch.tensor([3, 2]), torch.ones(2), 10)
    with pytest.raises(UserError, match="the rule 'measured' asks questions"):
        evaluation.pick_features(rates, rates, 1, "measured")


@pytest.mark.slow
def test_all_scripts_measure_on_the_same_questions(tmp_path, monkeypatch):
    """Those of SAEBench's subjects, where the data have them: also lesson 1, which asks all subjects."""
    seen = []
    monkeypatch.setattr(data, "SUBJECTS", "astronomy,chemistry")
    monkeypatch.setattr(evaluation, "measured_order", lambda *given: seen.append(given[4:6]) or iter([624, 449]))
    flags = dict(pick="measured", n_features=2, limit=4)
    for script in ("feature_ablate_1.py", "feature_ablate_2.py", "feature_ablate_3.py", "feature_importance.py"):
        lesson(script, **flags, out=tmp_path / "r.json")
    pareto.run(**{**flags, "n_features": [2]}, clamp=[-40.0], out=str(tmp_path / "p.json"))
    lm_eval_ablated.run(**flags, tasks="tiny_wmdp_bio", out=str(tmp_path / "l.json"))
    asked = {tuple(tuple(row["question"] for row in quiz.rows) for quiz in pair) for pair in seen}
    assert len(seen) == 6 and len(asked) == 1
    assert {row["subject"] for row in seen[0][1].rows} == {"astronomy", "chemistry"}
