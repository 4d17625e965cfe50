"""The three lessons as a user meets them: defaults, bad input, notebooks, the same numbers every time."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LAYERS, command, lesson

import data
import evaluation
import hub
import methods
from edits import NONE

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ["feature_ablate_1.py", "feature_ablate_2.py", "feature_ablate_3.py"]
SCRIPTS = [*LESSONS, "pareto.py", "rmu.py", "baselines.py", "robustness.py", "lm_eval_ablated.py", "train_sae.py",
           "make_tiny.py"]  # fmt: skip


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
        (["--n-features", "0"], ["--n-features 0", "at least 1"]),
        (["--n-features", "999999"], ["--n-features 999999", "2048"]),
        (["--model", "no-such-model"], ["no-such-model", "tiny"]),
        (["--model", "no-such/model"], ["no-such/model", "--model tiny"]),
        (["--sae", "no-such-release:x"], ["no-such-release"]),
        (["--clamp", "3"], ["--clamp 3"]),
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
    monkeypatch.setattr(methods, "measure", None)
    assert command(monkeypatch, script, "--subjects", "alchemy", "--out", tmp_path / "r.json") == 2
    assert "error: --subjects: no alchemy; there are" in capfd.readouterr().err


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
    assert process.stderr.read().strip().endswith("stopped: nothing was written")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("script", LESSONS[1:])
def test_another_batch_size_agrees_and_so_does_another_run(monkeypatch, tmp_path, script):
    sizes, limit = ((16, 5, 16), 12) if script == LESSONS[1] else ((16, 5), 3)
    first, other, *again = (
        record(monkeypatch, script, tmp_path / f"{i}.json", "--limit", limit, "--batch-size", size)
        for i, size in enumerate(sizes)
    )
    assert all(run["points"] == first["points"] for run in again)
    for a, b in zip(first["points"], other["points"]):
        for name, score in a["scores"].items():
            if "letters" in score:
                assert score["letters"] == b["scores"][name]["letters"]
            else:
                assert score["nats_per_token"] == pytest.approx(b["scores"][name]["nats_per_token"], abs=1e-5)


@pytest.mark.slow
def test_a_record_says_what_was_scored(monkeypatch, tmp_path):
    found = record(monkeypatch, "feature_ablate_2.py", tmp_path / "r.json", "--limit", 30)
    assert [point["method"] for point in found["points"]] == [
        "none", "sae-patched", "sae-reconstruction", "sae-ablation", "sae-ablation", "random-features",
    ]  # fmt: skip
    questions = [json.loads(line) for line in (ROOT / "tiny/data/wmdp_bio.jsonl").open()]
    for point in found["points"]:
        score = point["scores"]["wmdp_bio"]
        answers = ["ABCD"[questions[i]["answer"]] for i in found["data"]["wmdp_bio"]["questions"]]
        right = sum(a == b for a, b in zip(score["letters"], answers, strict=True))
        assert score["accuracy"] == pytest.approx(right / 30)
    assert found["points"][0]["scores"]["wmdp_bio"]["letters"] == found["points"][1]["scores"]["wmdp_bio"]["letters"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


@pytest.mark.parametrize(
    "script, lines", [(LESSONS[1], 4), *(pytest.param(x, 2, marks=pytest.mark.slow) for x in LESSONS[::2])]
)
def test_the_model_that_never_knew_has_a_row(script, lines, twin, tmp_path, capsys):
    assert hub.never_knew("tiny") == "never-knew" and hub.never_knew("gpt2") is None
    found = lesson(script, limit=8, n_features=3, layer=3, seed=1, out=tmp_path / "r.json")["record"]
    clean, *_, last = found["points"]
    assert last["method"] == "never-knew" and len(found["points"]) == 7
    assert capsys.readouterr().out.count("\n  trained without the facts") == lines
    for name, score in last["scores"].items():
        if "nats_per_token" in score:
            was = clean["scores"][name]["nats_per_token"]
            assert score["loss_added"] == pytest.approx(score["nats_per_token"] - was)
            assert abs(score["loss_added"]) > 0.01
            continue
        rows = [json.loads(line) for line in (ROOT / f"tiny/data/{name}.jsonl").open()]
        asked = [rows[i] for i in found["data"][name]["questions"]]
        prompts, letters = data.encode_prompts(twin.tokenizer, [data.prompt(row) for row in asked])
        alone = evaluation.score_letters(twin, prompts, letters, [NONE])[0]
        assert score["letters"] == "".join("ABCD"[i] for i in alone.argmax(-1))
        assert score["letters_mass"]["mean"] == pytest.approx(alone.exp().sum(-1).mean().item(), abs=1e-5)


@pytest.mark.slow
def test_random_features_are_drawn_several_times(tmp_path, capsys):
    found = lesson("feature_ablate_2.py", controls=3, n_features=4, limit=6, out=tmp_path / "r.json")["record"]
    draws = [point["setting"]["features"] for point in found["points"] if point["method"] == "random-features"]
    assert len(draws) == 3 and len({tuple(ids) for ids in draws}) == 3
    assert "3 draws of random features" in capsys.readouterr().out
    with pytest.raises(data.UserError, match="--controls 0: at least 1"):
        lesson("feature_ablate_2.py", controls=0)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_notebooks(script, tmp_path):
    command = [sys.executable, "-m", "jupytext", "--to", "ipynb", "--test", str(ROOT / script)]
    assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 0


# Each module imports of lines above its own, and of its own line; of the last line, the scripts, none another
HOUSE = [["processes"], ["data"], ["edits", "hub"], ["flags", "common"], ["memory"], ["engine"], ["evaluation"],
         ["pieces"], ["methods", "training", "records", "show"], ["unlearning", "attacks", "survival"],
         ["lm_eval_model", "publish"],
         [script.removesuffix(".py") for script in SCRIPTS]]  # fmt: skip


def imported(source: str) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_imports_go_one_way():
    ours = [name for line in HOUSE for name in line]
    assert sorted(ours) == sorted(path.stem for path in ROOT.glob("*.py"))
    below = set()
    for line in HOUSE:
        for name in line:
            allowed = below | (set() if line is HOUSE[-1] else set(line))  # no script imports another
            assert (imported((ROOT / f"{name}.py").read_text()) & set(ours)) - {name} <= allowed, name
        below |= set(line)


def test_flags_answer_before_the_slow_imports():
    """Nothing that --help and --list need takes long to import: no torch, no SAELens, no transformers."""
    slow = "torch", "sae_lens", "transformers", "transformer_lens", "datasets", "accelerate", "matplotlib", "lm_eval"
    code = f"import sys, flags; flags.listed(); print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
    for script in SCRIPTS:
        source = (ROOT / script).read_text()
        before = source[: re.search(r"answered\(flags, __name__\)|= parse\(flags\)", source).start()]
        assert imported(before) <= {"argparse", "pathlib", "data", "flags"}, script


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(script, monkeypatch, capsys):
    assert command(monkeypatch, script, "--help") == 0
    assert f"python {script}" in capsys.readouterr().out


def test_list_shows_the_presets(monkeypatch, capsys):
    assert command(monkeypatch, "feature_ablate_1.py", "--list") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(rows) == {"tiny", "never-knew", "gemma-2-2b-it", "gemma-3-1b-it", "gemma-3-4b-it", "gpt2"}
    assert "3, 5, 7, 9, 15" in rows["tiny"] and "2048" in rows["tiny"]
    assert "0 to 25" in rows["gemma-2-2b-it"] and "16k" in rows["gemma-2-2b-it"]
    assert "0 to 33" in rows["gemma-3-4b-it"] and "0 to 11" in rows["gpt2"]
