"""Which weights the methods that train reach, tuning that goes on where it stopped, and --all."""

import gc
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIG, LAYERS, ROOT
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors import SafetensorError
from safetensors.torch import load_file

import baselines
import data
import edits
import evaluation
import hub
import pareto
import robustness
import unlearning
from common import load_hf, load_model, load_sae
from data import UserError, load_benchmark
from runs import read_record, settings

SMALL = dict(limit=6, steps=2, layer=3)


@pytest.fixture
def two_settings(monkeypatch):
    for known in (edits.METHODS, unlearning.METHODS):
        for name, method in known.items():
            monkeypatch.setitem(known, name, replace(method, grid=method.grid[:2]))


@pytest.fixture
def quick_teacher(monkeypatch):
    """UNDO's, which is made by CRISP as usual."""
    monkeypatch.setitem(unlearning.METHODS, "crisp", replace(unlearning.METHODS["crisp"], steps={"": 2}))


def test_help_names_all_methods_and_needs_no_torch():
    said = {kind: set(re.findall(r"[a-z][a-z-]+", part.split(":")[1].split(".")[0]))
            for part in baselines.__doc__.split("\n\n") for kind in ("Edits", "Training") if part.startswith(kind)
            and "(" in part}  # fmt: skip
    assert said == {"Edits": {name for name, method in edits.METHODS.items() if method.grid},
                    "Training": set(unlearning.METHODS)}  # fmt: skip
    assert set(baselines.tunable()) == said["Edits"] | said["Training"]
    code = "import runpy, sys; sys.argv = ['baselines.py', '--help']\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.endswith("False\n") and "adaptive-rmu" in done.stdout


@pytest.mark.slow
def test_a_stopped_tuning_goes_on_and_ends_with_the_same_record(two_settings, monkeypatch, tmp_path):
    flags = dict(method="npo", **SMALL)
    whole = baselines.run(**flags, out=str(tmp_path / "whole.json"))
    npo, calls = unlearning.METHODS["npo"], []

    def stop_at_the_second(*given, **setting):
        calls.append(setting)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return npo.train(*given, **setting)

    monkeypatch.setitem(unlearning.METHODS, "npo", replace(npo, train=stop_at_the_second))
    with pytest.raises(KeyboardInterrupt, match="finished parts are kept"):
        baselines.run(**flags, out=str(tmp_path / "r.json"))
    assert {path.name for path in tmp_path.glob("r*")} == {"r.cache"}
    again = baselines.run(**flags, out=str(tmp_path / "r.json"))
    assert len(calls) == 4  # the second setting, and the chosen one for its folder
    for name in ("rows", "chosen", "log"):
        assert again[name] == whole[name]
    assert {path.name for path in tmp_path.glob("r*")} == {"r.json", "r.csv", "r.model", "r_losses.png"}
    assert (tmp_path / "r.model/README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("method, where, part", [("clamp", evaluation, "firing_rates"),
                                                 ("undo", unlearning, "train_crisp")])  # fmt: skip
def test_the_time_to_make_a_point_has_what_tuning_had_measured(
    two_settings, quick_teacher, monkeypatch, tmp_path, method, where, part
):
    """Features and the model that UNDO starts from are made once for all settings, but nobody has them for nothing. Nor
    do they stay in memory meanwhile, or when all is done."""
    real, calls = getattr(where, part), []

    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, unlearning.Training) for thing in gc.get_objects())

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
def test_gradients_reach_all_weights_and_lora_those_of_its_layers(quick_teacher):
    original, args = load_file(ROOT / "tiny/model/model.safetensors"), settings(baselines.flags, SMALL)
    model, benchmark = load_model("tiny"), load_benchmark("tiny")
    saes = {layer: load_sae(None, layer, model) for layer in (3, 5, 7, 9)}
    training = baselines.prepare(model, benchmark, saes, args)
    lora = {"crisp": range(2, 7), "circuit-breakers": range(13)}
    for kind in ("grad-diff", "npo-sam", "mudman", "undo", "repselect", *lora):
        method, layers = unlearning.METHODS[kind], lora.get(kind, range(CONFIG["num_hidden_layers"]))
        hf, _ = method.train(training, **baselines.grid_of(method, args)[0])
        after = hf.state_dict()
        changed = {name for name in original if not torch.equal(original[name].float(), after[name].float())}
        part = ".mlp." if kind == "repselect" else ".layers."
        matrices = {name for name in original if part in name and original[name].ndim == 2}
        assert {name for name in changed & matrices} == {n for n in matrices if int(n.split(".")[2]) in layers}
        assert ("model.embed_tokens.weight" in changed) == (kind not in (*lora, "repselect"))


# -------------------------------------------------------------------------------------------------- one setting: RMU

RMU = dict(method="rmu", setting=["multiple=8", "alpha=10"], steps=40)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short training of tiny: its record, and the folder that it was written to."""
    folder = tmp_path_factory.mktemp("rmu")
    return baselines.run(**RMU, limit=30, out=str(folder / "r.json")), folder


def test_the_record_has_everything_and_the_folder_three_other_matrices(trained):
    record, folder = trained
    assert read_record(folder / "r.json")["rows"] == record["rows"]
    assert list(record["rows"]) == ["unablated", record["chosen"]]
    row = record["rows"][record["chosen"]]
    usual = {"layer": 7, "multiple": 8, "alpha": 10, "batch": 4, "steps": 40, "lr": 4e-3}
    assert (row["method"], row["settings"]) == ("rmu", usual)
    of_wmdp = {f"wmdp_bio/{half}{what}" for half in ("", "tuning/")
               for what in ("letters", "P(a letter)", "P(right letter)", "words")}  # fmt: skip
    of_mmlu = {name.replace("wmdp_bio", "mmlu") for name in of_wmdp if "words" not in name}
    assert set(row["scores"]) == set(record["measures"]) == of_wmdp | of_mmlu | {"openwebtext/loss"}
    assert len(record["log"]) == 40 and len(record["log_names"]) == len(record["log"][0]) == 3
    assert record["log"][-1][2] > record["log"][0][2] + 0.1  # turns to the control vector
    before, after = (load_file(path / "model.safetensors") for path in (ROOT / "tiny/model", folder / "r.model"))
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {f"model.layers.{i}.mlp.down_proj.weight" for i in (5, 6, 7)}
    assert {path.name for path in folder.iterdir()} == {"r.json", "r.csv", "r.model", "r_losses.png"}
    assert record["identity"]["folder"] == hub.identity(str(folder / "r.model"))
    assert record["seconds_to_make"] > 1 and record["peak_gb"] > 0.1


def test_the_saved_folder_gives_the_same_letters_through_lm_eval(trained):
    record, folder = trained
    lm = HFLM(str(folder / "r.model"), device="cpu", dtype="float32", batch_size=16, attn_implementation="eager")
    manager = TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False)
    for name in ("wmdp_bio", "mmlu"):
        asked = record["data"][name]["asked"]
        results = simple_evaluate(lm, tasks=[f"tiny_{name}"], samples={f"tiny_{name}": asked}, task_manager=manager)
        rows = sorted(results["samples"][f"tiny_{name}"], key=lambda row: row["doc_id"])
        letters = ["ABCD"[int(np.argmax([value for value, _ in row["filtered_resps"]]))] for row in rows]
        assert "".join(letters) == record["rows"][record["chosen"]]["answers"][f"{name}/letters"]


@pytest.mark.slow
def test_the_same_seed_trains_the_same_weights_and_another_does_not(trained, tmp_path):
    _, folder = trained
    for seed, equal in ((0, True), (1, False)):
        baselines.run(**RMU, limit=2, seed=seed, out=str(tmp_path / "again.json"))
        files = [load_file(path / "model.safetensors") for path in (folder / "r.model", tmp_path / "again.model")]
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0]) == equal


@pytest.mark.slow
def test_adaptive_pushes_each_token_by_its_own_norm(trained, tmp_path):
    fixed, _ = trained
    adaptive = baselines.run(**RMU | {"method": "adaptive-rmu"}, limit=2, out=str(tmp_path / "a.json"))
    assert adaptive["log"][0][0] != fixed["log"][0][0] and adaptive["log"][-1][2] > adaptive["log"][0][2] + 0.1


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(method="refusal-clamp"), "refusal latent"),
        (dict(method="diff-in-means", layer=40), LAYERS),
        (dict(method="clamp", layer=4), "layer_3"),
        (dict(method="never"), "--method never: there are "),
        (dict(method="rmu", setting=["layer=40"]), LAYERS),
        (dict(method="rmu", setting=["multiple=1e30"]), "the loss is not finite"),
        (dict(method="rmu", setting=["layers=4"]), "norm has no layers: alpha, batch, layer, lr, multiple, steps"),
        (dict(method="clamp", setting=["clamp=1"]), "clamp needs n_features"),
        (dict(method="clamp", setting=["n_features"]), "NAME=NUMBER"),
        (dict(all=True, setting=["n_features=3"]), "--setting is of one method"),
        (dict(model="no-such-model"), "no-such-model"),
    ],
)
def test_mistakes_are_named(two_settings, tmp_path, flags, said):
    with pytest.raises(UserError, match=said):
        baselines.run(**SMALL | flags, out=str(tmp_path / "r.json"))
    assert not list(tmp_path.glob("*.json"))


# ------------------------------------------------------------------------------------------------- methods from outside


def train_embeddings(training, *, lr, steps, scale):
    """Down the loss on forget text, with the wrong sign, of the embeddings alone."""
    model, log = training.load(), []
    matrix = model.get_input_embeddings().weight.requires_grad_(True)
    adam = unlearning.Fp32AdamW([matrix], lr)
    for (texts,) in training.batches(steps, "my training", [training.forget]):
        nll = unlearning.text_nll(model, texts, training.tokenizer).mean
        adam.step(-scale * nll)
        log.append([nll.item()])
    return model, log


@pytest.fixture
def mine(monkeypatch):
    """A method that trains and one that edits, of one object each."""
    method = edits.Method("my training", edits.grid(lr=(1, 3), scale=(2,)), train=train_embeddings, needs_sae=False,
                          usual={"scale": 2}, steps={"": 2}, lr={"": 1e-3}, log=("forget text",))  # fmt: skip
    monkeypatch.setitem(unlearning.METHODS, "my-training", method)
    shrink = edits.Method("my edit", edits.grid(share=(0.5, 0.9)), needs_sae=False,
                          edit=lambda sae, share: lambda h, mask: torch.where(mask[..., None], h * share, h),
                          resolve=lambda stats, share: {"share": share, "layers": [stats.layer]})  # fmt: skip
    monkeypatch.setitem(edits.METHODS, "my-edit", shrink)


def test_a_method_from_outside_is_tuned_drawn_and_attacked(mine, tmp_path):
    paths = {name: str(tmp_path / f"{name}.json") for name in ("my-training", "my-edit")}
    for name, path in paths.items():
        record = baselines.run(method=name, limit=6, layer=3, out=path)
        rows = [row for row in record["rows"].values() if row["method"] == name]
        assert len(rows) == 2 and record["rows"][record["chosen"]] in rows
    record = read_record(paths["my-training"])
    settings = [row["settings"] for row in record["rows"].values() if row["method"] == "my-training"]
    assert settings == [{"steps": 2, "scale": 2, "lr": rate} for rate in (1e-3, 3e-3)]
    assert len(record["log"]) == 2 and record["log_names"] == ["forget text"]
    embeddings = load_hf(str(tmp_path / "my-training.model"))[0].get_input_embeddings().weight
    assert not torch.equal(embeddings, load_hf("tiny")[0].get_input_embeddings().weight)
    pareto.run(plot=list(paths.values()), out=str(tmp_path / "p.json"))
    assert all(title in (tmp_path / "p.md").read_text() for title in ("my training", "my edit"))
    robustness.run(records=list(paths.values()), out=str(tmp_path / "o.json"))


def test_a_trained_model_that_finds_no_room_costs_no_score(mine, tmp_path, monkeypatch, capsys):
    def full(model, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    baselines.run(method="my-training", setting=["scale=1"], limit=2, steps=1, out=str(tmp_path / "r.json"))
    record = read_record(tmp_path / "r.json")
    assert record["chosen"] in record["rows"] and "folder" not in record and not (tmp_path / "r.model").exists()
    assert "r.model: Error while serializing: I/O error: No space left on device (os error 28); the trained model is " \
           "lost" in capsys.readouterr().err  # fmt: skip


# --------------------------------------------------------------------------------------------------------- --all


@pytest.mark.slow
def test_all_methods_one_figure_and_relearning(two_settings, monkeypatch, tmp_path):
    for known in (edits.METHODS, unlearning.METHODS):
        for name in set(known) - {"dsg", "npo", "rmu"}:
            monkeypatch.setitem(known, name, replace(known[name], grid=()))
    scripts, started = {"baselines.py": baselines, "pareto.py": pareto, "robustness.py": robustness}, []

    def in_this_process(script, *given):  # what baselines.call starts as a process of its own
        started.append(script)
        scripts[script].run(**vars(scripts[script].flags.parse_args(list(map(str, given)))))

    monkeypatch.setattr(baselines, "call", in_this_process)
    flags = dict(all=True, **SMALL, out=str(tmp_path / "b.json"))
    done, names = baselines.run(**flags), list(baselines.tunable())
    records = [read_record(path) for path in done["records"]]
    assert [record["rows"][record["chosen"]]["method"] for record in records] == names
    assert len({json.dumps(record["data"]["mmlu"]["asked"]) for record in records}) == 1
    assert len({len(record["rows"]) for record in records}) == 1  # as many settings each
    assert (tmp_path / "b_frontier.png").stat().st_size > 10_000
    costs = (tmp_path / "b_costs.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in costs[2:]] == [
        method.title for method in baselines.tunable().values()
    ]
    report = robustness.run(records=done["records"], relearn=2, out=str(tmp_path / "b_robustness.json"))
    # as tuned, each answers what its record says
    for record in records:
        letters = record["rows"][record["chosen"]]["answers"]["wmdp_bio/letters"]
        assert any(letters in row["answers"].values() for row in report["rows"].values())
    started.clear()
    Path(done["records"][1]).unlink()
    baselines.run(**flags)  # only what is missing
    assert started.count("baselines.py") == 1
    started.clear()
    baselines.run(**flags | {"seed": 1})
    assert started.count("baselines.py") == 3


@pytest.mark.slow
def test_a_foreign_record_and_records_that_differ_are_refused(two_settings, tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json is no record"):
        robustness.run(records=[str(tmp_path / "x.json")], out=str(tmp_path / "o.json"))
    for seed in (0, 1):
        baselines.run(method="zero-ablation", seed=seed, **SMALL, out=str(tmp_path / f"{seed}.json"))
    with pytest.raises(UserError, match="differ in seed"):
        robustness.run(records=[str(tmp_path / "0.json"), str(tmp_path / "1.json")], out=str(tmp_path / "o.json"))


@pytest.mark.slow
def test_robust_keeps_what_the_model_gets_right_in_all_orders(two_settings, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "PERMUTATIONS", data.PERMUTATIONS[:3])
    flags = dict(method="zero-ablation", **SMALL)
    whole = baselines.run(**flags, out=str(tmp_path / "whole.json"))
    found = baselines.run(**flags, robust=True, out=str(tmp_path / "r.json"))
    for name in ("wmdp_bio", "wmdp_bio/tuning", "mmlu", "mmlu/tuning"):
        asked, kept = (set(record["data"][name]["asked"]) for record in (whole, found))
        assert kept <= asked and found["rows"]["unablated"]["scores"][f"{name}/letters"]["mean"] == 1
    with pytest.raises(UserError, match="robust"):
        robustness.run(records=[str(tmp_path / "r.json")], out=str(tmp_path / "o.json"))


@pytest.mark.slow
def test_a_method_is_tuned_on_other_sets_and_asked_again_on_the_robust_one(two_settings, tmp_path):
    """The cloze set's answers have no letters, so the forms of robustness.py, which ask for some, are not theirs."""
    flags = dict(method="zero-ablation", **SMALL)
    cloze = baselines.run(**flags, wmdp="cloze", out=str(tmp_path / "cloze.json"))
    table = baselines.cost_table([cloze], baselines.tunable()).splitlines()
    cells = dict(zip(table[0].split(" | "), table[2].split(" | ")))
    assert cells["P(a letter)"] == "" and float(cells["in words"]) >= 50
    with pytest.raises(UserError, match="cloze"):
        robustness.run(records=[str(tmp_path / "cloze.json")], out=str(tmp_path / "o.json"))
    rows = (ROOT / "tiny/data/wmdp_bio.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "wmdp_bio_robust.jsonl").write_text("".join(rows[:100]))
    robust = baselines.run(**flags, wmdp="robust", data=str(tmp_path), out=str(tmp_path / "robust.json"))
    assert max(robust["data"]["wmdp_bio"]["asked"]) < 100
    again = robustness.run(records=[str(tmp_path / "robust.json")], out=str(tmp_path / "o.json"))
    letters = robust["rows"][robust["chosen"]]["answers"]["wmdp_bio/letters"]
    assert any(letters in row["answers"].values() for row in again["rows"].values())
