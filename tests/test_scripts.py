"""The three lessons as a user meets them: defaults, bad input, notebooks, the same numbers every time."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
from conftest import LAYERS, command, lesson

import data
import evaluation
import hub
import show
from edits import NONE

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ["feature_ablate_1.py", "feature_ablate_2.py", "feature_ablate_3.py"]
SCRIPTS = [*LESSONS, "pareto.py", "baselines.py", "robustness.py", "lm_eval_ablated.py", "train_sae.py", "tiny/make.py"]


def record(monkeypatch, script, out, *flags):
    assert command(monkeypatch, script, "--out", out, *flags) == 0
    return json.loads(Path(out).read_text())


@pytest.fixture
def data_folder(tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(ROOT / "tiny/data", folder)
    return folder


def bad_line(folder):
    path = folder / "wmdp_bio.jsonl"
    lines = path.read_text().splitlines()
    lines[16] = lines[16].replace('"choices"', '"choice"')
    path.write_text("\n".join(lines))


def narrow_sae(folder):
    shutil.copytree(ROOT / "tiny/sae/layer_7", folder)
    config = json.loads((folder / "cfg.json").read_text())
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "sae_weights.safetensors")
    weights["W_enc"], weights["W_dec"] = weights["W_enc"][:64].contiguous(), weights["W_dec"][:, :64].contiguous()
    weights["b_dec"] = weights["b_dec"][:64].contiguous()
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**config, "d_in": 64}))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--layer", "4"], ["layer_4", "layer_7"]),
        (["--layer", "99"], [LAYERS]),
        (["--n-features", "0"], ["--n-features", "0 is not an integer from 1 on"]),
        (["--n-features", "999999"], ["999999", "2048"]),
        (["--model", "no-such-model"], ["no-such-model", "tiny"]),
        (["--model", "no-such/model"], ["no-such/model", "tiny"]),
        (["--sae", "no-such-release:x"], ["no-such-release"]),
        (["--clamp", "0"], ["--clamp", "0 is not a number other than 0"]),
        (["--pick", "best"], ["best", "retain-threshold"]),
        (["--prompt", "chat"], ["chat template"]),
        (["--layers", "3"], ["--layers"]),
        (["--lay", "3"], ["--lay"]),
        (["--data", "no-such-folder"], ["no-such-folder"]),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(monkeypatch, capfd, tmp_path, flags, said):
    assert command(monkeypatch, "feature_ablate_2.py", "--out", tmp_path / "record.json", *flags) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert all(word in lines[0] for word in said)
    assert not list(tmp_path.iterdir())


def test_a_broken_line_is_named(monkeypatch, capfd, data_folder, tmp_path):
    bad_line(data_folder)
    assert command(monkeypatch, "feature_ablate_2.py", "--data", data_folder, "--out", tmp_path / "r.json") == 2
    assert "wmdp_bio.jsonl, line 17: has no 'choices'" in capfd.readouterr().err


def test_an_sae_of_the_wrong_width_is_refused(monkeypatch, capfd, tmp_path):
    narrow_sae(tmp_path / "layer_7")
    assert command(monkeypatch, "feature_ablate_2.py", "--sae", tmp_path / "layer_7", "--out", tmp_path / "r.json") == 2
    assert "reads 64 dimensions" in capfd.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_at_once(monkeypatch, capfd, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert command(monkeypatch, "feature_ablate_2.py", "--out", tmp_path / "file" / "r.json") == 2
    if os.geteuid():  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        assert command(monkeypatch, "feature_ablate_2.py", "--out", locked / "r.json") == 2
    assert "cannot write to" in capfd.readouterr().err


@pytest.mark.parametrize("script", LESSONS[:2])
def test_a_mistake_in_what_is_asked_last_comes_before_the_work(monkeypatch, capfd, tmp_path, script):
    monkeypatch.setattr(evaluation, "FeatureStats", None)
    assert command(monkeypatch, script, "--subjects", "alchemy", "--out", tmp_path / "r.json") == 2
    assert "error: MMLU stand-in has no subject alchemy; it has astronomy" in capfd.readouterr().err


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    command = [sys.executable, str(ROOT / "feature_ablate_2.py"), "--out", str(tmp_path / "record.json")]
    # tests that run in the background have SIGINT ignored, and a child would take that over
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    for line in process.stdout:
        if line.startswith("SAE check"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr.read().strip().endswith("stopped")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", LESSONS[1:])
def test_another_batch_size_agrees_and_so_does_another_run(monkeypatch, tmp_path, script):
    sizes, limit = ((16, 5, 16), 12) if script == LESSONS[1] else ((16, 5), 3)
    first, other, *again = (
        record(monkeypatch, script, tmp_path / f"{i}.json", "--limit", limit, "--batch-size", size)
        for i, size in enumerate(sizes)
    )
    assert all(run["rows"] == first["rows"] for run in again)
    for a, b in zip(first["rows"].values(), other["rows"].values(), strict=True):
        assert a["answers"] == b["answers"]
        for name, score in a["scores"].items():
            assert score["mean"] == pytest.approx(b["scores"][name]["mean"], abs=1e-5)


@pytest.mark.slow
def test_a_record_says_what_was_scored(monkeypatch, tmp_path):
    found = record(monkeypatch, "feature_ablate_2.py", tmp_path / "r.json", "--limit", 30)
    assert {name: row["method"] for name, row in found["rows"].items()} == {
        "unablated": "none",
        "zero ablation": "zero-ablation",
        "clamp -40": "clamp",
        "random features, clamp -40": "random-features",
        "random features 2, clamp -40": "random-features",
        "random features 3, clamp -40": "random-features",
        "random features 4, clamp -40": "random-features",
    }
    questions = [json.loads(line) for line in (ROOT / "tiny/data/wmdp_bio.jsonl").open()]
    for row in found["rows"].values():
        answers = ["ABCD"[questions[i]["answer"]] for i in found["data"]["wmdp_bio"]["asked"]]
        right = sum(a == b for a, b in zip(row["answers"]["wmdp_bio/letters"], answers, strict=True))
        assert row["scores"]["wmdp_bio/letters"]["mean"] == pytest.approx(right / 30)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".png"}


@pytest.mark.parametrize("script", [LESSONS[1], *(pytest.param(x, marks=pytest.mark.slow) for x in LESSONS[::2])])
def test_the_retrained_model_has_a_row(script, twin, tmp_path, capsys):
    assert hub.preset("tiny").retrained == "tiny-retrained" and hub.preset("gpt2").retrained is None
    found = lesson(script, limit=8, n_features=3, layer=3, seed=1, out=tmp_path / "r.json")["record"]
    last = found["rows"][show.RETRAINED]
    assert last["method"] == "retrained" and list(found["rows"])[-1] == show.RETRAINED
    assert f"\n  {show.RETRAINED}" in capsys.readouterr().out
    for name, score in last["scores"].items():
        kind = name.split("/")
        assert score["change"] == pytest.approx(score["mean"] - found["rows"]["unablated"]["scores"][name]["mean"])
        if kind[1] == "loss":
            assert abs(score["change"]) > 0.01
        if kind[1] != "letters":
            continue
        rows = [json.loads(line) for line in (ROOT / f"tiny/data/{kind[0]}.jsonl").open()]
        asked = [rows[i] for i in found["data"][kind[0]]["asked"]]
        prompts, letters = data.encode_prompts(twin.tokenizer, [data.prompt(row) for row in asked])
        alone = evaluation.score_letters(twin, prompts, letters, [NONE])[0]
        assert last["answers"][name] == "".join("ABCD"[i] for i in alone.argmax(-1))
        sure = last["scores"][f"{kind[0]}/P(a letter)"]["mean"]
        assert sure == pytest.approx(alone.exp().sum(-1).mean().item(), abs=1e-5)


def astronomy(folder) -> Path:
    """A data folder with a topic of the user's own, which the retrained model was taught."""
    folder.mkdir()
    rows = [json.loads(line) for line in (ROOT / "tiny/data/mmlu.jsonl").open()]
    for name, its_own in (("wmdp_bio", True), ("mmlu", False)):
        some = [row for row in rows if (row["subject"] == "astronomy") == its_own]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.mark.parametrize("script", [LESSONS[2], *(pytest.param(x, marks=pytest.mark.slow) for x in LESSONS[:2])])
def test_a_topic_of_ones_own_is_called_so_and_has_no_retrained_model(script, twin, tmp_path, capsys):
    where = astronomy(tmp_path / "mine")
    left = lesson(script, limit=6, n_features=3, layer=3, data=where, out=tmp_path / "r.json")
    found, said = left["record"], "".join(capsys.readouterr())
    titles = {measure["title"].rpartition(", ")[0] for measure in found["measures"].values()}
    assert show.RETRAINED not in found["rows"] and show.RETRAINED not in said
    assert "WMDP-Bio" not in said + json.dumps(found["measures"]) and "on astronomy" in said
    assert {about["topic"] for name, about in found["data"].items() if "wmdp" in name} == {"astronomy"}
    assert script == LESSONS[0] or any("astronomy" in title and title in said for title in titles)
    named = lesson(script, limit=6, n_features=3, layer=3, data=where, topic="stars", out=tmp_path / "s.json")["record"]
    assert {about["topic"] for name, about in named["data"].items() if "wmdp" in name} == {"stars"}


@pytest.mark.slow
@pytest.mark.parametrize("script", LESSONS)
def test_figures_that_lack_their_latex_cost_no_record(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", "")
    with matplotlib.rc_context({"text.usetex": True}):
        found = lesson(script, limit=6, n_features=3, layer=3, out=tmp_path / "r.json")["record"]
    assert json.loads((tmp_path / "r.json").read_text())["rows"].keys() == found["rows"].keys()
    assert "note: no figure features: RuntimeError: Failed to process string with tex" in capsys.readouterr().err


@pytest.mark.slow
def test_random_features_are_drawn_several_times(tmp_path):
    found = lesson("feature_ablate_2.py", controls=3, n_features=4, limit=6, out=tmp_path / "r.json")["record"]
    draws = {name: row["settings"]["features"] for name, row in found["rows"].items() if name.startswith("random")}
    assert list(draws) == ["random features, clamp -40", "random features 2, clamp -40", "random features 3, clamp -40"]
    assert len({tuple(ids) for ids in draws.values()}) == 3
    with pytest.raises(data.UserError, match="--controls: 0 is not an integer from 1 on"):
        lesson("feature_ablate_2.py", controls=0)


@pytest.mark.slow
def test_robust_and_cloze_questions_in_a_lesson(tmp_path):
    found = lesson("feature_ablate_2.py", robust=True, n_features=4, limit=25, out=tmp_path / "r.json")
    assert 0 < len(found["bio"]) < 25 and found["letters"]["unablated"].mean == 1
    assert found["record"]["data"]["wmdp_bio"]["asked"] == found["bio"].indices
    found = lesson("feature_ablate_2.py", wmdp="cloze", n_features=4, limit=4, out=tmp_path / "r.json")["record"]
    assert "wmdp_bio/cloze" in found["measures"] and found["data"]["wmdp_bio"]["variant"] == "cloze"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_notebooks(script, tmp_path):
    command = [sys.executable, "-m", "jupytext", "--to", "ipynb", "--test", str(ROOT / script)]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 0


SLOW = "torch", "sae_lens", "transformers", "transformer_lens", "datasets", "accelerate", "matplotlib", "lm_eval"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches_and_answers_before_the_slow_imports(script):
    code = f"import runpy, sys; sys.argv = [{script!r}, '--help']\n" \
           f"try: runpy.run_path({script!r}, run_name='__main__')\n" \
           f"finally: print([name for name in {SLOW} if name in sys.modules])"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and f"python {script}" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_list_shows_the_presets(monkeypatch, capsys):
    assert command(monkeypatch, "feature_ablate_1.py", "--list") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert list(rows) == list(hub.PRESETS)
    assert "3, 5, 7, 9, 15" in rows["tiny"] and "2048" in rows["tiny"]
    assert "0 to 25" in rows["gemma-2-2b-it"] and "16k" in rows["gemma-2-2b-it"]
    assert "0 to 33" in rows["gemma-3-4b-it"] and "0 to 11" in rows["gpt2"]
