"""lm-eval's own numbers, with nothing ablated and with features ablated: letters, log-probabilities, generated text."""

import glob
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lm_eval
import pytest
import yaml
from conftest import CLAMP, N_QUESTIONS, lesson, listing
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import baselines
import lm_eval_ablated
import pareto
from common import load_model, load_sae
from data import CLOZE, LETTERS, Dataset, UserError, encode_prompts, load, prompt
from edits import METHODS, NONE, Method, SetFeatures, ablation
from evaluation import open_answers, score_letters, score_loss

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
TEMPLATES = Path(lm_eval.__file__).parent / "tasks/mmlu/default"


def template(subject: str) -> dict:
    config = yaml.safe_load((TEMPLATES / "_default_template_yaml").read_text())
    keys = ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target")
    about = subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return {**{key: config[key] for key in keys}, "description": header, "num_fewshot": 0}


def lm_eval_scores(model: HFLM, rows: list[dict], subject: str, folder: Path) -> list[list[float]]:
    """(n, 4) log-likelihoods of the letters, by lm-eval's task and model classes."""
    path = folder / f"{subject}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    task = ConfigurableTask(config={"task": f"local_{subject}", **source, **template(subject)})
    task.build_all_requests(limit=None, rank=0, world_size=1)
    requests = task.instances
    assert requests[0].args[0] == prompt(rows[0])
    values = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
    return [values[start : start + 4] for start in range(0, len(values), 4)]


ROW = f"clamp {CLAMP:g}"


def test_a_data_py_of_the_users_own_does_not_get_in_the_way(tmp_path, monkeypatch):
    """lm-eval is started in a folder with files of our names; they are their own again afterwards."""
    for name in ("data", "hub", "edits"):
        (tmp_path / f"{name}.py").write_text("mine = 1\n")
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("data")
    spec = importlib.util.spec_from_file_location("utils_of_tasks", ROOT / "lm_eval_tasks/utils.py")
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    assert len(utils.quiz("wmdp_bio")["test"]) == N_QUESTIONS["wmdp_bio"] and utils.normalised("The sea.") == "sea"
    assert sys.modules["data"] is mine and importlib.import_module("hub").mine == 1


def tasks_of(name: str):
    return TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False).load([name])["tasks"][name]


@pytest.mark.parametrize("device", ["cpu"])
def test_letters_and_log_probabilities_are_lm_evals(tmp_path, monkeypatch, device):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [json.loads(line) for line in (TINY / "data/mmlu.jsonl").open()]
    subjects = sorted({row["subject"] for row in rows})
    asked = [row for subject in subjects for row in rows if row["subject"] == subject][:200:2]
    assert len(asked) == 100
    theirs_model = HFLM(str(TINY / "model"), device=device, dtype="float32", batch_size=8, attn_implementation="eager")
    theirs = []
    for subject in subjects:
        some = [row for row in asked if row["subject"] == subject]
        if some:
            theirs += lm_eval_scores(theirs_model, some, subject, tmp_path)
    model = load_model("tiny", device)
    rows, letters = encode_prompts(model.tokenizer, [prompt(row) for row in asked])
    ours = score_letters(model, rows, letters, [NONE])[0]
    for mine, other in zip(ours.tolist(), theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
        assert LETTERS[mine.index(max(mine))] == LETTERS[other.index(max(other))]


# ------------------------------------------------------------------------------ the lessons' own numbers


@pytest.mark.slow
def test_scores_and_letters_are_the_lessons_on_every_question(tmp_path):
    same = dict(layer=3, n_features=10, pick_on="all")
    lessons = [
        lesson(script, **same, out=tmp_path / f"{script}.json")["record"]
        for script in ("feature_ablate_1.py", "feature_ablate_2.py")
    ]
    theirs = lm_eval_ablated.run(**same, unablated=True, out=str(tmp_path / "lm_eval.json"))
    assert list(theirs["rows"]) == ["unablated", ROW]
    for record in lessons:
        for row, other in theirs["rows"].items():
            for name in set(record["rows"][row]["scores"]) & set(other["scores"]):
                quiz, what = name.split("/")
                assert record["data"][quiz]["asked"] == theirs["data"][quiz]["asked"]
                assert record["data"][quiz]["sha256"] == theirs["data"][quiz]["sha256"]
                mine, score = record["rows"][row]["scores"][name], other["scores"][name]
                assert mine["n"] == score["n"] == N_QUESTIONS[quiz]
                assert mine == (score if what == "letters" else pytest.approx(score, abs=1e-5))  # but for rounding
                if what == "letters":
                    assert record["rows"][row]["answers"][name] == other["answers"][name]
                    assert len(other["answers"][name]) == N_QUESTIONS[quiz]
        assert {f"{quiz}/letters" for quiz in ("wmdp_bio", "mmlu")} & set(record["measures"])
    own = theirs["lm_eval"][ROW]["tiny_wmdp_bio"]["acc,none"]
    assert own == pytest.approx(other["scores"]["wmdp_bio/letters"]["mean"])


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.grid])
def test_every_method_gives_the_letters_of_baselines(method, monkeypatch, tmp_path):
    """On every held-out question: a record's edit as it is, and for DSG one that is picked here."""
    monkeypatch.setitem(METHODS, method, replace(METHODS[method], grid=METHODS[method].grid[1:6:4]))
    latent = dict(refusal_latent=11, refusal_value=-300.0) if method == "refusal-clamp" else {}
    path = str(tmp_path / "tuned.json")
    tuned = baselines.run(method=method, out=path, **latent)
    out = dict(out=str(tmp_path / "r.json"))
    found = lm_eval_ablated.run(record=path, unablated=True, **out)
    assert list(found["rows"]) == ["unablated", tuned["chosen"]]
    same_answers(tuned, found)
    chosen = tuned["rows"][tuned["chosen"]]
    assert found["rows"][tuned["chosen"]]["settings"] == chosen["settings"]
    if method == "dsg":
        name = next(name for name, row in tuned["rows"].items() if len(row["settings"].get("features", [])) == 20)
        row = tuned["rows"][name]
        picked = lm_eval_ablated.run(method="dsg", n_features=20, clamp=row["settings"]["clamp"], **out)["rows"]["DSG"]
        assert picked["settings"] == row["settings"]


def same_answers(one: dict, other: dict) -> None:
    """Of rows and quizzes that both records have, of which there must be some."""
    shared = [(row, name) for row in set(one["rows"]) & set(other["rows"])
              for name in set(one["rows"][row]["answers"]) & set(other["rows"][row]["answers"])]  # fmt: skip
    assert {name for _, name in shared} >= {"wmdp_bio/letters", "mmlu/letters"}
    for row, name in shared:
        assert one["rows"][row]["answers"][name] == other["rows"][row]["answers"][name]


def test_a_method_that_a_user_adds_is_scored_from_a_record(monkeypatch, tmp_path):
    """Without another line: from the record of a run that picked for it, and from a list."""

    def halve(sae, features, share=0.5):
        return SetFeatures(sae, features, lambda acts, mask: acts * share)

    def resolve(stats, n_features):
        return {"features": stats.features(n_features)}

    monkeypatch.setitem(METHODS, "mine", Method("mine, halved", edit=halve, resolve=resolve))
    flags = dict(tasks="tiny_wmdp_bio", limit=20)
    picked = lm_eval_ablated.run(**flags, method="mine", layer=3, n_features=5, out=str(tmp_path / "picked.json"))
    again = lm_eval_ablated.run(**flags, record=str(tmp_path / "picked.json"), out=str(tmp_path / "again.json"))
    assert again["rows"] == picked["rows"] and list(again["rows"]) == ["mine, halved"]
    prompts = [record["data"]["wmdp_bio"]["prompts"] for record in (picked, again)]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 64
    features = picked["rows"]["mine, halved"]["settings"]["features"]
    path = listing(tmp_path, "list", features)
    listed = lm_eval_ablated.run(tasks="tiny_wmdp_bio", method="mine", features=path, setting=["share=0.25"], layer=3,
                                 limit=5, out=str(tmp_path / "list.json"))  # fmt: skip
    assert listed["rows"]["mine, halved"]["settings"] == {"features": features, "share": 0.25, "layers": [3]}
    assert listed["data"]["wmdp_bio"]["prompts"] not in (None, prompts[0])


def test_loss_is_our_own_scorers(tmp_path):
    """One BOS in front of every window, every token of it a target."""
    flags = dict(layer=3, n_features=10, tasks="tiny_openwebtext", limit=12, unablated=True)
    record = lm_eval_ablated.run(**flags, out=str(tmp_path / "r.json"))
    docs = [dict(doc) for doc in tasks_of("tiny_openwebtext").eval_docs]
    docs = [docs[i] for i in record["data"]["openwebtext"]["asked"]]
    model = load_model("tiny", "cpu")
    windows = [model.tokenizer(doc["text"])["input_ids"] for doc in docs]
    features = record["rows"][ROW]["settings"]["features"]
    nats, targets = score_loss(model, windows, [NONE, ablation(load_sae(None, 3, model), features, CLAMP)])
    mean = (nats.sum(1) / targets.sum()).tolist()
    clean, ablated = (row["scores"]["openwebtext/loss"] for row in record["rows"].values())
    assert [clean["mean"], ablated["mean"]] == pytest.approx(mean, abs=1e-5)
    assert ablated["change"] == pytest.approx(mean[1] - mean[0], abs=1e-5)
    assert ablated["n"] == len({doc["document"] for doc in docs})


# -------------------------------------------------------------------------- several processes, caches


@pytest.mark.slow
def test_the_command_line_keeps_caches_apart(tmp_path):
    features = listing(tmp_path, "list", [45, 78, 286])
    flags = dict(features=features, layer=3, tasks="tiny_wmdp_bio", limit=9, use_cache=str(tmp_path / "cache"))
    first = lm_eval_ablated.run(**flags, unablated=True, out=str(tmp_path / "1.json"))
    assert len(list((tmp_path / "cache").glob("*.db"))) == 2
    again = lm_eval_ablated.run(**flags, unablated=True, out=str(tmp_path / "2.json"))
    other = lm_eval_ablated.run(**flags, clamp=0.0, unablated=True, out=str(tmp_path / "3.json"))
    fresh = lm_eval_ablated.run(**{**flags, "use_cache": None}, clamp=0.0, unablated=True, out=str(tmp_path / "4.json"))
    assert len(list((tmp_path / "cache").glob("*.db"))) == 3
    assert first["rows"] == again["rows"]
    assert other["rows"] == fresh["rows"] and list(other["rows"]) == ["unablated", "zero ablation"]
    assert other["rows"]["zero ablation"]["scores"] != first["rows"][ROW]["scores"]


# ------------------------------------------------------------------------ features, tasks, subsets


@pytest.mark.slow
def test_features_come_from_picking_a_list_layers_or_a_record(tmp_path):
    flags = dict(tasks="tiny_wmdp_bio", limit=20, unablated=True)
    picked = lm_eval_ablated.run(**flags, layer=3, n_features=10, out=str(tmp_path / "picked.json"))
    features = picked["rows"][ROW]["settings"]["features"]
    of_record = lm_eval_ablated.run(**flags, record=str(tmp_path / "picked.json"), out=str(tmp_path / "a.json"))
    assert of_record["rows"] == picked["rows"]
    assert of_record["saes"] == picked["saes"] and of_record["data"]["wmdp_bio"] == picked["data"]["wmdp_bio"]
    every = {**flags, "limit": None}
    path = listing(tmp_path, "list", features)
    of_list = lm_eval_ablated.run(**every, features=path, layer=3, out=str(tmp_path / "b.json"))
    # as everywhere the held-out half is asked: a list may have been picked on the other
    assert of_list["rows"][ROW]["scores"]["wmdp_bio/letters"]["n"] == len(load("wmdp_bio").held_out)
    fewer = lm_eval_ablated.run(**flags, features=path, n_features=3, layer=3, out=str(tmp_path / "f.json"))
    assert fewer["rows"][ROW]["settings"]["features"] == features[:3]
    path = listing(tmp_path, "layers", {"3": features, "7": [1, 2]})
    both = lm_eval_ablated.run(**{**flags, "tasks": None}, features=path, out=str(tmp_path / "c.json"))
    parts = both["rows"][ROW]["settings"]["edits"]
    assert [part["settings"]["features"] for part in parts] == [features, [1, 2]]
    assert {part["method"] for part in parts} == {"clamp"} and set(both["quality"]) == {3, 7}
    again = lm_eval_ablated.run(**flags, record=str(tmp_path / "c.json"), out=str(tmp_path / "d.json"))
    assert again["rows"][ROW]["scores"]["wmdp_bio/letters"] == both["rows"][ROW]["scores"]["wmdp_bio/letters"]
    drawn = pareto.run(plot=[str(tmp_path / "c.json")], out=str(tmp_path / "plot.json"))
    assert drawn


def test_a_record_settles_what_its_edit_was_made_under(tmp_path, monkeypatch):
    made = dict(layer=3, n_features=2, limit=5, tasks="tiny_wmdp_bio")
    first = lm_eval_ablated.run(**made, seed=5, pick_on="all", edit_special="all-but-bos", out=str(tmp_path / "1.json"))
    seen = []
    load = lm_eval_ablated.load_ablated
    monkeypatch.setattr(lm_eval_ablated, "load_ablated", lambda *args: seen.append(load(*args)) or seen[0])
    flags = dict(limit=5, tasks="tiny_wmdp_bio", out=str(tmp_path / "2.json"))
    again = lm_eval_ablated.run(record=str(tmp_path / "1.json"), **flags)
    assert again["rows"] == first["rows"] and again["data"]["wmdp_bio"] == first["data"]["wmdp_bio"]
    assert seen[0].tokenizer.edit_special == "all-but-bos" and set(seen[0].edit.at) == {3}


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(tasks="tiny_wmpd_bio"), "'tiny_wmpd_bio' is not a registered task"),
        (dict(tasks="tiny_mmlu", subjects="zoology,alchemy"), "no alchemy; there are astronomy"),
        (dict(samples="FILE", file={"tiny_mmlu": [700]}), f"{N_QUESTIONS['mmlu']} documents, there is no 700"),
        (dict(samples="FILE", file={"tiny_mmlu": []}), "leave no question"),
        (dict(samples="FILE", file=[1, 2]), "give JSON {task: [indices]}"),
        (dict(samples="FILE", file={"mmlu": [1]}), "mmlu is none of the tasks"),
        (dict(features="FILE", file=[1, 1]), "named twice"),
        (dict(features="FILE", file=[1], setting=["gate=0.1"]), "clamp: got an unexpected keyword argument 'gate'"),
        (dict(features="FILE", file=[1], setting=["gate"]), "NAME=NUMBER"),
        (dict(setting=["gate=0.1"]), "clamp takes clamp, n_features"),
        (dict(method="dsg", setting=["gate=0.5"]), "dsg takes clamp, n_features"),
        (dict(method="dgs"), "the methods are"),
        (dict(method="sae-patched"), "no features are picked for it"),
        (dict(method="refusal-clamp"), "refusal latent"),
        (dict(features="FILE", file=[5000]), "0..2047"),
        (dict(features="FILE", file={"4": [1]}), "layer_3, layer_5"),
        (dict(features="FILE", file={"3": [1], "7": [2]}, sae=str(TINY / "sae/layer_3")), "not at layer 7"),
        (dict(features="FILE", file="x"), "give ids as 449,624, or a file"),
        (dict(features="FILE", file=[1.5]), "a list of feature ids is needed"),
        (dict(features="no-such-file.json"), "no-such-file.json"),
        (dict(features="FILE", file={}), "no features"),
        (dict(features="FILE", file=[]), "no features"),
        (dict(features="FILE", file={"3": [1], "7": []}), "no features"),
        (dict(features=""), "features: nothing is given"),
        (dict(subjects=""), "subjects: nothing is given"),
        (dict(clamp=float("nan")), "not a finite number"),
        (dict(clamp=-float("inf")), "not a finite number"),
        (dict(clamp=2.0), "clamp 2 amplifies features"),
        (dict(model_args="dtype=bfloat16"), "multiple values for keyword argument 'dtype'"),
        (dict(model_args="max_lenght=8"), "unexpected keyword argument 'max_lenght'"),
        (dict(model_args="features=f.json"), "unexpected keyword argument 'features'"),
        (dict(model_args="trust_remote_code=True"), "never run here"),
        (dict(tasks="tiny_openwebtext", robust=True), "four-way"),
        (dict(tasks="wmdp_bio"), "cannot load task wmdp_bio"),
        (dict(record="FILE", file=[1]), "is no record"),
        (dict(record="FILE", file={"script": "x.py", "form": 3}, clamp=-4.0), "choose it with --row"),
    ],
)
def test_mistakes_are_named(tmp_path, flags, said):
    flags = dict(flags)
    path = listing(tmp_path, "file", flags.pop("file", None))
    flags = {k: path if v == "FILE" else v for k, v in flags.items()}
    usual = {} if "record" in flags else {"layer": 3, "n_features": 5}
    with pytest.raises(UserError) as caught:
        lm_eval_ablated.run(**usual | flags, out=str(tmp_path / "out/r.json"))
    assert said in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


def test_limit_is_a_seeded_sample_and_subsets_are_what_was_asked_for():
    tasks = lm_eval_ablated.find_tasks(["tiny_mmlu"])
    docs = [*tasks["tiny_mmlu"][1][0].eval_docs]

    def chosen(seed=0, **options):
        return lm_eval_ablated.choose(tasks, True, seed, **options)["tiny_mmlu"]

    whole, some = chosen(), chosen(limit=21)
    assert whole == load("mmlu").held_out.indices
    assert len(whole) > 170 and some == load("mmlu").held_out.sample(21).indices
    assert some == chosen(limit=21) != chosen(limit=21, seed=1)
    assert some != whole[:21]
    assert {docs[i]["subject"] for i in chosen(subjects="zoology,astronomy")} == {"zoology", "astronomy"}
    assert chosen(samples={"tiny_mmlu": [5, 3, 3, 8]}) == [3, 5, 8]


# ---------------------------------------------------------------------------------- the task files


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False)


@pytest.mark.slow
def test_our_tasks_take_no_name_of_lm_evals_and_group_tasks_that_it_has(manager):
    ours, theirs = {path.stem for path in (ROOT / "lm_eval_tasks").glob("*.yaml")}, TaskManager()
    assert ours == set(manager.all_tasks) and not ours & set(theirs.all_tasks)
    for group, n in (("sae_mmlu_saebench", 4), ("sae_mmlu_biology", 9)):
        parts = manager.task_index[group].cfg["task"]
        assert set(parts) <= set(theirs.all_subtasks) and len(parts) == n


def test_prompts_are_ours_and_every_question_comes_in_24_orders(manager):
    task = manager.load(["tiny_wmdp_bio_24"])["tasks"]["tiny_wmdp_bio_24"]
    docs = task.eval_docs
    questions = [json.loads(line) for line in (TINY / "data/wmdp_bio.jsonl").open()]
    assert len(docs) == 24 * len(questions)
    for number in (0, 100):
        some = [docs[i] for i in range(24 * number, 24 * number + 24)]
        assert len({tuple(doc["choices"]) for doc in some}) == 24
        assert {doc["choices"][doc["answer"]] for doc in some} == {
            questions[number]["choices"][questions[number]["answer"]]
        }
    assert task.fewshot_context(docs[0], 0) == prompt(questions[0])
    bare = manager.load(["tiny_wmdp_bio_24_no_question"])["tasks"]["tiny_wmdp_bio_24_no_question"]
    assert bare.fewshot_context(bare.eval_docs[0], 0) == prompt({**questions[0], "question": ""})


@pytest.mark.slow
def test_the_24_orders_agree_with_robust(tmp_path):
    """The share right in all 24 orders by the task, and the subset by the cascade, of the same questions, both asked
    with an example in front."""
    flags = dict(layer=3, n_features=10, unablated=True, num_fewshot=1)
    orders = "tiny_wmdp_bio_24,tiny_wmdp_bio_24_no_question"
    by_task = lm_eval_ablated.run(**flags, tasks=orders, limit=5, out=str(tmp_path / "a.json"))
    clean = by_task["rows"]["unablated"]["scores"]
    in_all, bare = clean["tiny_wmdp_bio_24/all orders"], clean["tiny_wmdp_bio_24_no_question/all orders"]
    assert in_all["n"] == 5 and len(by_task["data"]["tiny_wmdp_bio_24"]["asked"]) == 120
    own = by_task["lm_eval"]["unablated"]["tiny_wmdp_bio_24"]["all_orders,none"]
    assert own == pytest.approx(in_all["mean"]) and bare["mean"] < own
    kept = lm_eval_ablated.run(**flags, tasks="tiny_wmdp_bio", limit=5, robust=True, out=str(tmp_path / "b.json"))
    score = kept["rows"]["unablated"]["scores"]["wmdp_bio/letters"]
    assert score["n"] <= round(5 * own) and score["mean"] == 1.0


def test_the_cloze_tasks_ask_as_their_release_does(manager):
    """EleutherAI/unlearn, unlearn/lm_eval_tasks/wmdp_bio_cloze_verified."""
    task = manager.load(["tiny_wmdp_bio_cloze"])["tasks"]["tiny_wmdp_bio_cloze"]
    doc = {**task.eval_docs[0], "question": " Which organ pumps blood? "}
    asked = "Complete the following biology questions with the correct answer.\n\n"
    asked += "Question: Which organ pumps blood?\nAnswer:"
    assert task.fewshot_context(doc, 0) == asked == CLOZE.format(doc["question"].strip(), topic="biology")
    assert [request.args for request in task.construct_requests(doc, asked)] == [
        (asked, f" {x}") for x in doc["choices"]
    ]


def test_a_topic_of_ones_own_is_asked_about(tmp_path):
    row = {"choices": ["Io", "Deimos", "Titan", "Triton"], "answer": 1}
    lines = "".join(json.dumps({**row, "question": f"Q{k}?"}) + "\n" for k in range(9))
    names = ["tiny_wmdp_bio", "tiny_wmdp_bio_cloze"]
    for name in names:
        (tmp_path / f"{name.removeprefix('tiny_')}.jsonl").write_text(lines)
    for topic, said in ((None, tmp_path.name.replace("_", " ")), ("solar_system", "solar system")):
        tasks = lm_eval_ablated.find_tasks(names, None, str(tmp_path), topic)
        contexts = [task.fewshot_context(task.eval_docs[0], 0) for _, (task,) in tasks.values()]
        assert contexts[0].startswith(
            f"The following are multiple choice questions (with answers) about {said}.\n\nQ0?"
        )
        assert contexts[1].startswith(f"Complete the following {said} questions with")
        for name, title in zip(names, (said, f"{said} Cloze")):
            asked = lm_eval_ablated.data_set(name, set(), tasks[name][1], {name: [0, 1]}, str(tmp_path), 0, topic)
            assert asked.title == title and asked.about()["asked"] == [0, 1]


@pytest.mark.slow
def test_a_lessons_cloze_answers_are_lm_evals(tmp_path, capsys):
    """In lesson 2, and in a sweep, of the same questions; the second half of what lesson 2 shows stays in our words."""
    same = dict(layer=3, n_features=10, limit=25)
    shown = lesson("feature_ablate_2.py", **same, wmdp="cloze", out=tmp_path / "lesson.json")
    mine, printed = shown["record"], capsys.readouterr().out
    theirs = lm_eval_ablated.run(limit=25, tasks="tiny_wmdp_bio_cloze", record=str(tmp_path / "lesson.json"),
                                 unablated=True, out=str(tmp_path / "lm_eval.json"))  # fmt: skip
    for record in (mine, theirs):  # a digest of ids, and one of lm-eval's requests
        assert record["data"]["wmdp_bio"].pop("prompts") and record["data"]["wmdp_bio"]["variant"] == "cloze"
    assert mine["data"]["wmdp_bio"] == theirs["data"]["wmdp_bio"]
    for name, row in theirs["rows"].items():
        other = mine["rows"][name]
        assert row["scores"]["wmdp_bio/cloze"] == other["scores"]["wmdp_bio/cloze"]
        assert row["answers"]["wmdp_bio/cloze"] == other["answers"]["wmdp_bio/cloze"]
        assert other["answers"]["wmdp_bio/cloze"] != other["answers"]["wmdp_bio/words"]
        assert "wmdp_bio/P(a letter)" not in row["scores"] | other["scores"]
    assert "WMDP-Bio Cloze stand-in" in printed and "in words, %" in printed and "published" not in printed
    sweep = pareto.run(layer=[3], n_features=[10], limit=25, clamp=[CLAMP], wmdp="cloze", out=str(tmp_path / "s.json"))
    clean, row = sweep["rows"]["unablated"], mine["rows"]["unablated"]
    assert sweep["data"]["wmdp_bio"]["asked"] == mine["data"]["wmdp_bio"]["asked"]
    for name in ("wmdp_bio/cloze", "wmdp_bio/words"):
        assert clean["answers"][name] == row["answers"][name]
    assert "mmlu/P(a letter)" in clean["scores"]


@pytest.mark.slow
def test_open_answers_are_graded_as_our_own_scorer_grades_them(manager, tmp_path):
    flags = dict(layer=3, n_features=10, tasks="tiny_wmdp_bio_open", limit=30, unablated=True)
    record = lm_eval_ablated.run(**flags, out=str(tmp_path / "r.json"))
    docs = [dict(doc) for doc in tasks_of("tiny_wmdp_bio_open").eval_docs]
    quiz = Dataset("wmdp_bio", [docs[i] for i in record["data"]["tiny_wmdp_bio_open"]["asked"]])
    model, features = load_model("tiny", "cpu"), record["rows"][ROW]["settings"]["features"]
    rows = {"unablated": NONE, ROW: ablation(load_sae(None, 3, model), features, CLAMP)}
    exact, _ = open_answers(model, quiz, rows)
    for name in rows:
        found = record["rows"][name]["scores"]["tiny_wmdp_bio_open/exact_match"]
        assert found == {key: value for key, value in vars(exact[name]).items() if value is not None}
    assert found["mean"] < 0.9 < exact["unablated"].mean


def test_few_shot_examples_are_development_questions(manager):
    task = manager.load(["tiny_mmlu"])["tasks"]["tiny_mmlu"]
    dev = [json.loads(line) for line in (TINY / "data/mmlu_dev.jsonl").open()]
    text = task.fewshot_context(task.eval_docs[0], 2)
    assert text.count("Answer:") == 3 and dev[0]["question"] in text
    assert text.endswith(prompt(task.eval_docs[0]).split("\n\n")[1])


def test_other_tasks_are_scored_too(tmp_path):
    """A task with one answer of its own that is generated, and one whose metric is no right or wrong."""
    (tmp_path / "tasks").mkdir()
    shared = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n" % (
        TINY / "data/wmdp_bio.jsonl"
    )
    (tmp_path / "tasks/gen.yaml").write_text(
        "task: my_generation\noutput_type: generate_until\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: '{{choices[answer]}}'\ngeneration_kwargs: {max_gen_toks: 5, until: ['.']}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n" + shared
    )
    flags = dict(layer=3, n_features=5, limit=5, unablated=True, include_path=str(tmp_path / "tasks"))
    logs = dict(output_path=str(tmp_path / "logs"), log_samples=True)
    record = lm_eval_ablated.run(**flags, **logs, tasks="my_generation,tiny_mmlu", out=str(tmp_path / "r.json"))
    plain = lm_eval_ablated.run(**flags, tasks="tiny_mmlu", out=str(tmp_path / "plain.json"))["rows"][ROW]
    row, name = record["rows"][ROW], "my_generation/exact_match"
    assert row["answers"] == plain["answers"] and {*plain["scores"]} == {*row["scores"]} - {name}
    assert row["scores"][name]["n"] == 5 and name not in row["answers"] and record["measures"][name]["chance"] == 0.0
    for kind in ("unablated", "ablated"):
        files = [path.name for path in (tmp_path / "logs" / kind).rglob("*.json*")]
        assert sum(name.startswith("results_") for name in files) == 1
        assert sum(name.startswith("samples_") for name in files) == 2


NORMED = """task: normed_{metric}
output_type: multiple_choice
doc_to_text: "{{{{question.strip()}}}}\\nAnswer in words:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
test_split: test
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
"""


@pytest.mark.parametrize("metric", ["acc_norm", "acc"])
def test_the_letters_are_those_that_the_accuracy_counts(tmp_path, metric):
    """Whatever lm-eval divides or subtracts: of questions on which a length, or a word alone, decides."""
    asked = [("Which organ pumps blood?", ["the cat", "the heart of an animal", "e", "é"], 1),
             ("What is cholera caused by?", ["e", "a bacterium of the genus Vibrio", "a", "o"], 1),
             ("What do lungs take in?", ["air from around the body", "x", "é", "é é é"], 0)]  # fmt: skip
    rows = [dict(zip(("question", "choices", "answer"), row)) for row in asked]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "normed.yaml").write_text(NORMED.format(metric=metric, path=path))
    flags = dict(layer=3, features=listing(tmp_path, "f", [45]), include_path=str(tmp_path), tasks=f"normed_{metric}")
    flags["pick_on"] = "all"
    record = lm_eval_ablated.run(**flags, out=str(tmp_path / "r.json"))
    name = f"normed_{metric}/{metric}"
    score, answers = record["rows"][ROW]["scores"][name]["mean"], record["rows"][ROW]["answers"][name]
    right = [letter == LETTERS[row["answer"]] for letter, row in zip(answers, rows, strict=True)]
    assert score == pytest.approx(sum(right) / 3)
    assert score == pytest.approx(record["lm_eval"][ROW][f"normed_{metric}"][f"{metric},none"])
    assert record["measures"][name]["chance"] == 0.25
    (tmp_path / "normed.yaml").write_text(NORMED.format(metric="acc", path=path))
    plain = lm_eval_ablated.run(**{**flags, "tasks": "normed_acc"}, out=str(tmp_path / "r.json"))
    same = plain["rows"][ROW]["answers"]["normed_acc/acc"] == answers
    assert same == (metric == "acc")  # else the questions show nothing


# ----------------------------------------------------------------------- the commands that we tell users


def commands(blocks: list[str]) -> list[str]:
    """Commands, continued lines joined; those for GPUs that we do not have left out."""
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(" +", " ", line.strip()) for line in lines if line.strip() and "gemma" not in line]


SECTION = (ROOT / "docs/real_models.md").read_text().split("## Through lm-eval\n")[1]
SECTION = re.sub(r"## Which engine\?\n.*?(?=\n## )", "", SECTION, flags=re.DOTALL)  # test_vllm.py's
README = commands(re.findall(r"```\n(.*?)```", SECTION, re.DOTALL))
HELP = commands(re.findall(r"^    (?:.*\\\n)*.*$", lm_eval_ablated.__doc__, re.MULTILINE))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files as a user has them, and what earlier commands of the README have written."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "lm_eval_tasks", ROOT / "tiny"]:
        (folder / path.name).symlink_to(path)
    (folder / "features.json").write_text("[45, 78, 286]")
    out = folder / "results/feature_ablate_2_tiny_L7_n50_1.json"
    lesson("feature_ablate_2.py", layer=7, n_features=50, limit=20, out=out)
    return folder


def test_a_served_models_name_is_no_preset():
    """lm-eval's own command line hands the arguments of its model, `model` among them, to the tasks."""
    given = {"include_path": str(ROOT / "lm_eval_tasks"), "include_defaults": False, "metadata": {"model": "served"}}
    tasks = TaskManager(**given).load(["tiny_openwebtext", "tiny_wmdp_bio"])["tasks"]
    assert len(tasks["tiny_wmdp_bio"].eval_docs) == 439 and len(tasks["tiny_openwebtext"].eval_docs) > 100


def test_the_readme_and_help_name_the_same_commands():
    assert len(README) == 8 and set(HELP) <= set(README)
    assert any(line.startswith("ACCELERATE_USE_CPU=1 accelerate launch") for line in README)


@pytest.mark.slow
@pytest.mark.parametrize("command", README)
def test_commands_run_as_written(clone, monkeypatch, capsys, command):
    monkeypatch.chdir(clone)
    if "baselines_dsg" in command:
        baselines.run(method="dsg", limit=6, out=str(clone / "results"))
    if command.startswith("python lm_eval_ablated.py"):  # without a new process, whose imports take half of the time
        words = [(glob.glob(word) or [word])[0] for word in shlex.split(command)]
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path("lm_eval_ablated.py", run_name="__main__")
        shown = capsys.readouterr().out
    else:
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        shown = done.stdout
    if command.startswith("echo"):
        return
    assert ("tiny_wmdp_bio" if "--tasks list" in command or " -c " in command else "record: ") in shown
