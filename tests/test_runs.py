"""The command line, and what a run leaves behind: names, records, finished parts, models, exit codes."""

import copy
import importlib
import io
import json
import math
import os
import pickle
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, code_of
from huggingface_hub import ModelCard

import hub
import runs
from data import Dataset, UserError
from edits import NONE, Edit
from evaluation import Measure
from runs import Run, parser, read_record, settings, write_whole

QUIZ = Dataset(
    "mmlu", [{"question": q, "choices": list("abcd"), "answer": 0, "subject": "law"} for q in ("x", "y", "z")]
)
ROWS = {"unablated": NONE, "clamp -40": Edit("clamp", {"features": [1, 2], "clamp": -40.0})}
RIGHT = np.array([[True, True, False], [False, True, False]])


def letters(**changes) -> Measure:
    about = dict(chance=0.25, groups=("law", "law", "art"), answers=("AAB", "BAB"))
    return Measure("mmlu/letters", "MMLU, in letters", "%", tuple(ROWS), RIGHT, **{**about, **changes})


def loss() -> Measure:
    return Measure("openwebtext/loss", "OpenWebText, loss", "nats per token", tuple(ROWS),
                   np.array([[1.5, 2.0], [1.625, 2.25]]), weights=np.array([1, 2]))  # fmt: skip


def run_of(folder, data=(QUIZ,), saes=(), also=(), **changes) -> Run:
    return Run("a_script.py", settings(parser("a script"), {"out": str(folder), **changes}), data, saes, also)


# --------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("clamp", math.nan, "--clamp: nan is not a number other than 0"),
        ("clamp", -math.inf, "--clamp"),
        ("clamp", 0.0, "--clamp"),
        ("seed", -1, "--seed: -1 is not an integer from 0 to"),
        ("n_features", 0, "--n-features: 0 is not an integer from 1 on"),
        ("limit", 2.5, "--limit: 2.5 is not an integer"),
        ("batch_size", "many", "--batch-size"),
        ("pick_on", "some", "--pick-on: invalid choice: 'some'"),
        ("seed", 2**70, r"--seed: 1180591620717411303424 is not an integer from 0 to 2\*\*63 - 1"),
        ("seed", "9" * 400, "--seed: 9+ is not an integer"),
        ("sae", "", "--sae: nothing is given; leave it out, or say what"),
    ],
)
def test_a_value_that_a_flag_does_not_take_is_refused_however_it_is_given(monkeypatch, name, value, said):
    p = parser("a script")
    with pytest.raises(UserError, match=said):
        settings(p, {name: value})
    args = settings(p, {})
    with pytest.raises(UserError, match=said):
        setattr(args, name, value)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", [__file__, f"--{name.replace('_', '-')}={value}"])
    with pytest.raises(UserError, match=said):
        runs.parse(p)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("seed", None, "--seed: None is not an integer"),
        ("layer", 7.0, "--layer: 7.0 is not an integer"),
        ("layer", [3, 7], "--layer: 3,7 is not an integer"),
        ("n_features", True, "--n-features: True is not an integer"),
        ("robust", "no", "--robust: True or False is wanted"),
        ("robust", 1, "--robust: True or False is wanted"),
        ("clamp", 0, "--clamp: 0 is not a number other than 0"),
        ("limit", 0, "--limit: 0 is not an integer from 1 on"),
    ],
)
def test_a_notebooks_setting_is_held_to_what_the_flag_takes(name, value, said):
    """Also where it equals the default (7.0 is 7), or would be true ("no")."""
    args = settings(parser("a script", quiz=True), {})
    before = dict(vars(args))
    with pytest.raises(UserError, match=said):
        setattr(args, name, value)
    assert vars(args) == before
    args.subjects, args.clamp = ["law", "art"], -1e-5
    assert (args.subjects, args.clamp) == ("law,art", -1e-5)


@pytest.mark.parametrize("text, value", [("-1e1", -10.0), ("-5e-1", -0.5), ("-.5", -0.5), ("-1E+2", -100.0)])
def test_a_negative_number_may_have_an_exponent(monkeypatch, text, value):
    p = parser("a script")
    p.add_argument("--many", type=runs.finite_float, nargs="+")
    assert p.parse_args(["--clamp", text]).clamp == value
    assert p.parse_args(["--many", "0", text, "-3"]).many == [0, value, -3]
    for strange in ("-inf", "-nan"):
        with pytest.raises(UserError, match=f"--clamp: {strange} is not a number other than 0"):
            p.parse_args(["--clamp", strange])
    with pytest.raises(UserError, match="--clamp: expected one argument"):
        p.parse_args(["--clamp", "--layer", "3"])


def test_a_setting_is_what_the_command_line_would_make_of_it(tmp_path, monkeypatch):
    p = parser("a script")
    p.add_argument("--layer", type=runs.natural_int, nargs="+", default=[7])
    p.add_argument("--robust", nargs="?", const="all")
    p.add_argument("records", nargs="*")
    args = settings(p, {"layer": [3, 5], "clamp": -3, "robust": "question", "records": ["-", "b c"]})
    args.n_features = 20
    assert (args.layer, args.clamp, args.n_features) == ([3, 5], -3.0, 20)
    assert (args.robust, args.records, args.limit) == ("question", ["-", "b c"], None)
    args.clamp, args.no_sanity = None, True
    assert args.clamp is None and args.no_sanity is True
    assert list(vars(settings(p, {}))) == list(vars(p.parse_args([])))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mmlu.jsonl").touch()
    (tmp_path / "tiny").mkdir()  # of a preset's name, and not what --model tiny means
    args = settings(parser(""), {"data": "mine", "sae": "mine", "model": "tiny"})
    assert (args.data, args.sae, args.model) == (str(tmp_path / "mine"), str(tmp_path / "mine"), "tiny")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_settings_can_be_copied_and_only_their_values_pickled(copied):
    args = settings(parser("a script"), {"layer": 5})
    other = copied(args)
    other.layer = 3
    assert (args.layer, other.layer, other.started) == (5, 3, args.started) and type(other) is settings
    with pytest.raises(UserError, match="--layer: -1 is not"):
        other.layer = -1
    with pytest.raises(AttributeError, match="no setting 'flags'"):
        other.flags = None
    with pytest.raises(UserError, match=r"settings cannot be pickled.* pickle vars\(args\)"):
        pickle.dumps(args)
    assert pickle.loads(pickle.dumps(vars(args))) == vars(args)


def test_a_name_that_no_flag_has_is_refused_with_near_ones():
    args = settings(parser("a script"), {})
    with pytest.raises(AttributeError, match="no setting 'modle'; did you mean model"):
        args.modle = "gpt2"
    with pytest.raises(AttributeError, match=r"'n_feature'; did you mean n_features"):
        settings(parser("a script"), {"n_feature": 3})


@pytest.mark.parametrize(
    "console",
    [
        "ipykernel_launcher.py -f kernel.json",
        "/opt/bin/xpython -f kernel.json",
        "",
        "/usr/bin/marimo edit book.py --port 2718",
        "pydevconsole.py --mode=client",
    ],
)
def test_a_kernels_arguments_are_not_ours_whichever_it_is(monkeypatch, tmp_path, console):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", console.split())
    p, taken = parser("a script"), []
    cell = {"__name__": "__main__", "main": runs.main, "parse": runs.parse, "run": lambda **g: taken.append(g), "p": p}
    exec("main(run, p)\nargs = parse(p)", cell)  # as in a cell: there is no __file__
    assert taken == [vars(p.parse_args([]))] == [vars(cell["args"])]
    assert run_of(tmp_path).record({}, [])["command"].split() == [
        Path(word).name if n == 0 else word for n, word in enumerate(console.split())
    ]


def test_a_scripts_arguments_are_its_own_however_it_is_started(monkeypatch, tmp_path):
    """`python x.py`, `%run x.py`, a debugger, a launcher: they all leave the script in argv[0], by some path."""
    (tmp_path / "mine.py").write_text("import runs\nargs = runs.parse(runs.parser(''))\n")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for path in ("mine.py", str(tmp_path / "mine.py")):
        monkeypatch.setattr(sys, "argv", [path, "--layer", "3"])
        assert runpy.run_path(str(tmp_path / "mine.py"))["args"].layer == 3


def test_help_begins_with_what_most_people_use_and_answers_at_once():
    page = parser("a script", quiz=True).format_help()
    flags = [line.split()[0] for line in page.splitlines() if line.startswith("  --")]
    assert flags[:6] == ["--model", "--layer", "--n-features", "--clamp", "--limit", "--list"]
    heads = [line.rstrip(":") for line in page.splitlines() if line.endswith(":") and line[0] != " "]
    assert heads == ["options", "model and SAE", "picking", "scoring", "machine", "output"]
    assert "--robust" not in parser("a script", without=("--robust",)).format_help()
    slow = "torch", "sae_lens", "transformers", "transformer_lens", "datasets", "accelerate", "matplotlib", "pandas"
    code = f"import sys, runs; runs.hub.listed(); print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------------------ how a run ends


def ends(error: BaseException) -> int:
    """The exit code of a process that raises it."""

    def run():
        raise error

    return code_of(run)


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("what to do"), 2, "error: what to do\n"),
        (KeyboardInterrupt(), 130, "\nstopped\n"),
        (KeyboardInterrupt("2 finished parts are kept"), 130, "\nstopped: 2 finished parts are kept\n"),
        (torch.OutOfMemoryError("tried to allocate\nmore"), 2, "error: no memory is left (tried to allocate): --dtype"),
        (ZeroDivisionError("by zero"), 1, "Traceback"),
    ],
)
def test_how_a_run_ends(monkeypatch, capsys, error, code, said):
    monkeypatch.setattr(sys, "excepthook", runs.ended)
    assert ends(error) == code
    text = capsys.readouterr().err
    assert text.startswith(said) and ("by zero" in text) == (code == 1)


def test_of_several_processes_the_first_reports_a_mistake(monkeypatch, capfd):
    monkeypatch.setattr(sys, "excepthook", runs.ended)
    monkeypatch.setattr(runs.data, "n_processes", lambda: 2)
    monkeypatch.setattr(runs.data, "is_first_process", lambda: False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # where `parse` leaves the bars of all but the first
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert ends(UserError("what only this one meets")) == 2
    assert waited == [runs.PATIENCE] and "error: what only this one meets" in capfd.readouterr().err


def test_a_console_that_lacks_a_character_is_no_traceback():
    code = "import sys; sys.argv = ['x']; import runs; runs.main(lambda **_: print('\u2581\u4e2d'), runs.parser(''))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "\\u2581\\u4e2d"), done.stderr[-500:]


TALK = """import sys; sys.argv = ['x']; import runs; runs.parse(runs.parser(''))
for k in range(50_000): print('a line of a table', k); print('a bar', k, file=sys.stderr, end='\\r')
open('written', 'w').close()"""
HELP = """import sys; sys.argv[1:] = ['--help']; import runs
runs.help_before_imports(runs.parser('long ' * 9999), __name__)"""


FULL = [">/dev/full", "&>/dev/full"] * Path("/dev/full").exists()  # a disk without room, where there is one


@pytest.mark.parametrize("shell", ["| head -1", "2>&1 | head -1", ">&-", ">&- 2>&-", *FULL])
def test_a_closed_pipe_loses_no_record(tmp_path, shell):
    """The reader is gone before the run has said all, or there is none, or a log has no room."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TALK": TALK, "HELP": HELP, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f'"$PYTHON" -c "$TALK" {shell}'], cwd=tmp_path, text=True,
                          env=environment, capture_output=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and (tmp_path / "written").exists()
    assert "Error" not in done.stderr + done.stdout
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f'"$PYTHON" -c "$HELP" {shell}'], cwd=tmp_path, text=True,
                          env=environment, capture_output=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and "Error" not in done.stderr + done.stdout


# ----------------------------------------------------------------------------------- names, and finished parts


def test_whatever_decides_about_results_is_in_the_name(tmp_path, monkeypatch):
    first = run_of(tmp_path)
    assert first.path.parent == tmp_path and first.path.name == f"a_script_tiny_L7_n50_{first.key[:6]}.json"
    same = [
        run_of(tmp_path, clamp=-40),
        run_of(tmp_path, dtype="float32"),
        run_of(tmp_path, batch_size=3, device="cpu"),
    ]
    assert {run.key for run in same} == {first.key}
    sae = type("AnSAE", (), {"identity": "of an SAE", "layer": 7})
    changes = [dict(clamp=-41), dict(seed=1), dict(layer=3), dict(model="gpt2"), dict(dtype="bfloat16"), dict(also="x")]
    changes += [dict(saes=[sae]), dict(data=()), dict(data=[QUIZ.only([0])]), dict(data=[QUIZ, QUIZ.tuning])]
    other = [run_of(tmp_path, **change) for change in changes]
    monkeypatch.setattr(hub, "identity", lambda source: "another model in the same place")
    other.append(run_of(tmp_path))
    assert len({first.key, *(run.key for run in other)}) == 1 + len(other)
    assert len({first.path, *(run.path for run in other)}) == 1 + len(other)


def test_a_model_that_is_set_below_the_flags_has_its_own_dtype_and_clamp(tmp_path):
    args = settings(parser("a script"), {"out": str(tmp_path)})
    for model, dtype, clamp in (
        ("tiny", "float32", -40),
        ("gemma-2-2b-it", "bfloat16", -100),
        ("gpt2", "float32", -10),
    ):
        args.model = model
        run = Run("a_script.py", args)
        assert (run.dtype, run.settings["dtype"], run.settings["clamp"]) == (dtype, dtype, clamp)
    assert args.dtype is args.clamp is None


def test_models_saes_and_data_of_one_name_have_records_of_their_own(tmp_path):
    """`--model runs1/ckpt`, then `runs2/ckpt`: what they are decides, not the last part of the path."""
    text, taken = Dataset("mmlu", QUIZ.rows[:2]), set()
    for place in ("runs1", "runs2"):
        folder = tmp_path / place / "ckpt"
        folder.mkdir(parents=True)
        for content in ("weights", "weights after another epoch"):  # also in the same folder, trained on
            (folder / "model.safetensors").write_text(content + place)
            sae = type("AnSAE", (), {"identity": hub.identity(str(folder)), "layer": 7})
            for data, saes in (((QUIZ,), ()), ((text,), ()), ((QUIZ,), (sae,))):
                taken.add(run_of(tmp_path, data, saes, model=str(folder)).path)
            taken.add(run_of(tmp_path, saes=(sae,)).path)
    assert len(taken) == 2 * 2 * 4 and all(len(path.name) < 50 for path in taken)


def test_a_long_name_is_cut_and_refused_before_the_run(tmp_path):
    (tmp_path / ("m" * 200)).mkdir()
    assert len(run_of(tmp_path, model=str(tmp_path / ("m" * 200))).path.name) < 100
    with pytest.raises(UserError, match=r"cannot write to .*: File name too long; give another --out"):
        run_of(tmp_path / ("r" * 260 + ".json"))


def test_the_name_of_a_run_without_some_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    p = parser("", without=("--model", "--layer", "--n-features", "--clamp", "--dtype"))
    run = Run("robust.py", settings(p, {}), model="tiny", dtype="bfloat16")
    assert run.path == Path(f"results/robust_tiny_{run.key[:6]}.json") and run.dtype == "bfloat16"
    p = parser("")
    p.add_argument("--method")
    p.add_argument("--all", action="store_true")
    assert Run("s.py", settings(p, {"method": "dsg"})).path.name.startswith("s_dsg_tiny_L7_n50_")
    assert Run("s.py", settings(p, {"method": "dsg", "all": True})).path.name.startswith("s_tiny_L7_n50_")
    p = parser("")
    p.add_argument("--layer", nargs="+", type=runs.natural_int)
    assert "_L3-5_n50_" in Run("s.py", settings(p, {"layer": [3, 5]})).path.name
    assert Run("s.py", settings(p, {"out": "here/r.json"})).path == Path("here/r.json")


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write to .*file: .*; give another --out"):
        run_of(tmp_path / "file" / "r.json")


def test_what_is_cached_is_made_once_and_read_back_alike(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"measures": (letters(), loss()), "log": [0.1, None, "x"], "array": np.arange(3, dtype=np.float32),
                "tensor": torch.ones(2, dtype=torch.float64), "n": np.int64(3), "nested": [[letters()]]}  # fmt: skip

    first, again = run_of(tmp_path).cached("NPO: lr 0.5/2", make), run_of(tmp_path).cached("NPO: lr 0.5/2", make)
    assert made == [1]
    for found in (first, again):
        one, other = found["measures"]
        assert vars(one).keys() == vars(letters()).keys() and one.rows == tuple(ROWS) and one.answers == ("AAB", "BAB")
        assert one.values.dtype == bool and (one.values == RIGHT).all() and one.scores() == letters().scores()
        assert other.scores() == loss().scores() and other.weights.dtype == loss().weights.dtype
        assert found["array"].dtype == np.float32 and found["tensor"].tolist() == [1.0, 1.0]
        assert (found["n"], found["log"]) == (3, [0.1, None, "x"]) and found["nested"][0][0].name == "mmlu/letters"
    assert run_of(tmp_path).cached("another", lambda: 5) == 5
    assert run_of(tmp_path, seed=1).cached("NPO: lr 0.5/2", lambda: 6) == 6  # of another run
    with pytest.raises(TypeError, match="cannot keep"):
        run_of(tmp_path).cached("an object", object)


def test_a_damaged_part_is_a_mistake_of_one_line(tmp_path):
    run = run_of(tmp_path)
    run.cached("part", lambda: {"x": 1})
    (path,) = run.cache.iterdir()
    for text in (path.read_text()[:-3], path.read_text().replace("1}", "2}"), "", "\0"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"part\.json is damaged: delete it") as said:
            run.cached("part", lambda: None)
        assert "\n" not in str(said.value)


def test_a_stopped_run_goes_on_and_says_so(tmp_path):
    def stop():
        raise KeyboardInterrupt

    run = run_of(tmp_path)
    run.cached("a", lambda: 1)
    with pytest.raises(KeyboardInterrupt, match="1 finished parts are kept; the same command goes on from there"):
        run.cached("b", stop)
    other = run_of(tmp_path / run.path.name, seed=1)  # written to the same file
    other.cached("a", lambda: 2)
    run = run_of(tmp_path)
    assert [run.cached(name, lambda: 3) for name in "ab"] == [1, 3]
    run.write(ROWS, [letters()])
    assert not run.cache.exists() and other.cached("a", stop) == 2
    other.write(ROWS, [letters()])
    assert not other.cache.parent.exists()


# ------------------------------------------------------------------------------------------------ records


def test_a_record_says_what_was_run_on_what_and_what_came_out(tmp_path, capsys):
    run = run_of(tmp_path, data=(QUIZ.tuning, QUIZ.held_out, Dataset("forget_corpus", [])))
    record = run.write(ROWS | {"retrained": object()}, [letters(), loss()], {"one": lambda: figure()}, extra=[1])
    assert read_record(run.path) == json.loads(json.dumps(record)) and record["form"] == 3 and record["extra"] == [1]
    assert list(record["data"]) == ["mmlu/tuning", "mmlu"] and record["data"]["mmlu"]["half"] == "held-out"
    assert record["settings"]["clamp"] == -40.0 and record["settings"]["dtype"] == record["dtype"] == "float32"
    assert record["identity"]["model"].startswith("sha256:") and record["saes"] == []
    clamp = record["rows"]["clamp -40"]
    assert (clamp["method"], clamp["settings"]) == ("clamp", {"features": [1, 2], "clamp": -40.0})
    assert clamp["answers"] == {"mmlu/letters": "BAB"} and clamp["scores"]["mmlu/letters"]["change"] == -1 / 3
    assert "change" not in record["rows"]["unablated"]["scores"]["openwebtext/loss"]
    assert set(clamp["groups"]["mmlu/letters"]) == {"law", "art"} and "q" in clamp["groups"]["mmlu/letters"]["law"]
    assert record["rows"]["retrained"] == {
        "method": "retrained",
        "settings": {},
        "scores": {},
        "answers": {},
        "groups": {},
    }
    assert record["measures"]["mmlu/letters"] == {"title": "MMLU, in letters", "unit": "%", "chance": 0.25}
    lines = run.path.with_suffix(".csv").read_text().splitlines()
    assert lines[0] == "row,method,measure,unit,mean,low,high,n,change,change_low,change_high,p" and len(lines) == 5
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"figure: {run.path.with_suffix('')}_one.png",
        f"record: {run.path}",
    ]
    assert run.record({"a": {"method": "npo", "settings": {"lr": 1}}}, [])["rows"]["a"]["method"] == "npo"


def figure():
    import matplotlib.pyplot as plt

    return plt.figure()


def test_a_figure_that_cannot_be_drawn_loses_no_result_and_no_other_figure(tmp_path, capsys, monkeypatch):
    import matplotlib

    run, tex = run_of(tmp_path), figure()
    with matplotlib.rc_context({"text.usetex": True}):
        tex.suptitle("needs LaTeX")
    monkeypatch.setenv("PATH", "")  # where there is none
    run.write(ROWS, [letters()], {"one": lambda: 1 / 0, "tex": tex, "three": figure}, table="| a |")
    assert read_record(run.path)["rows"].keys() == ROWS.keys()
    assert {path.name[len(run.path.stem) :] for path in tmp_path.iterdir()} == {".json", ".csv", ".md", "_three.png"}
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == f"record: {run.path}"
    assert "note: no figure one: ZeroDivisionError: division by zero\nnote: no figure tex: " in err


def test_a_full_disk_after_scoring_prints_the_record(tmp_path, capsys, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    run = run_of(tmp_path)
    monkeypatch.setattr(runs.os, "replace", full)
    assert run.cached("part", lambda: [1, 2]) == [1, 2]  # it goes on without the cache
    with pytest.raises(UserError, match=r"cannot write .*\.json: No space left on device"):
        run.write(ROWS, [letters()])
    out, err = capsys.readouterr()
    assert "part.json: No space left on device; the run goes on" in err
    head, text = out.splitlines()
    assert head == f"record, to be saved as {run.path}:"
    assert json.loads(text)["rows"]["clamp -40"]["answers"] == {"mmlu/letters": "BAB"}
    assert not list(tmp_path.rglob("*.json*"))


@pytest.mark.parametrize(
    "text, said",
    [
        (
            '{"script": "pareto.py", "points": []}',
            "an earlier pareto.py wrote it .form 2, now 3.; run its command again",
        ),
        ("[1]", "is no record"),
        ("{}", "is no record: has no 'script'"),
        ("no JSON", "is no record"),
        ("[" * 99999, "is no record: maximum recursion depth"),
        (None, "is no record: .*No such file"),
    ],
)
def test_another_file_is_no_record(tmp_path, text, said):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_record(path)
    assert "\n" not in str(error.value)


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*x\.json: No space left on device"):
        write_whole(tmp_path / "x.json", fails)
    assert not list(tmp_path.iterdir())
    for content in ("old", "new"):
        write_whole(tmp_path / "model", lambda path, content=content: (path.mkdir(), (path / content).touch()))
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


def test_only_the_first_process_writes(monkeypatch, tmp_path):
    run = run_of(tmp_path)
    monkeypatch.setattr(runs.data, "is_first_process", lambda: False)
    run.write(ROWS, [letters()], {"one": lambda: 1 / 0})
    assert not list(tmp_path.iterdir())


def test_records_say_what_their_forget_set_is_called():
    of = [{"data": {"wmdp_bio": {"topic": topic}}} for topic in (None, "law", "law")]
    assert runs.forget_title(*of[:1]) == runs.forget_title({"data": {}}) == "WMDP-Bio"
    assert runs.forget_title(*of[1:]) == "law" and runs.forget_title(*of) == "WMDP-Bio, law"
    for of in ({"topic": None, "stand_in": True}, {"topic": "WMDP-Bio", "stand_in": True}):
        assert runs.forget_title({"data": {"wmdp_bio": of}}) == "WMDP-Bio stand-in"


def test_a_trained_model_has_a_card_of_its_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["/home/me/a_script.py", "--out", str(tmp_path / "r.json"), "--data", "here/mine"])
    run = run_of(tmp_path / "r.json", model="gpt2", data=())
    (tmp_path / "r.model").mkdir()
    (tmp_path / "r.model/weights").touch()
    rows = {
        "unablated": NONE,
        "tried": {"method": "npo", "settings": {}},
        "NPO, lr 0.5": {"method": "npo", "settings": {}},
    }
    measure = Measure("wmdp_bio/letters", "WMDP-Bio, in letters", "%", tuple(rows), RIGHT[[0, 0, 1]])
    tuning = Measure("wmdp_bio/tuning/letters", "tuning", "%", tuple(rows), RIGHT[[0, 0, 1]])
    record = run.write(rows, [measure, tuning], chosen="NPO, lr 0.5", folder="r.model")
    text = (tmp_path / "r.model/README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model == "openai-community/gpt2" and card.data.tags == ["unlearning", "npo"]
    assert "- WMDP-Bio, in letters (%): 33.3 [6.1, 79.2], before 66.7 [" in text and "- tuning" not in text
    assert "`a_script.py --out r.json --data here/mine`" in text and "tried" not in text.split("---")[-1]
    assert record["identity"]["folder"] == hub.identity(str(tmp_path / "r.model"))
    assert f"hf upload ORG/NAME {tmp_path / 'r.model'}" in capsys.readouterr().out


def test_a_folder_of_the_records_name_is_left_alone(tmp_path):
    (tmp_path / "kept.json").mkdir()
    (tmp_path / "kept.json/mine").touch()
    with pytest.raises(UserError, match=r"kept\.json is a folder there"):
        run_of(tmp_path / "kept.json")
    assert (tmp_path / "kept.json/mine").exists()


def test_a_layer_that_is_not_the_saes_is_refused(tmp_path):
    sae = SimpleNamespace(identity="one", layer=3, source="x", hook_point="blocks.3.hook_resid_post")
    run_of(tmp_path, saes=[sae], layer=3)
    with pytest.raises(UserError, match="the setting layer is 9, and the SAE is layer 3's"):
        run_of(tmp_path, saes=[sae], layer=9)


def test_a_model_that_is_not_the_loaded_one_is_refused(gemma_sae, model_folder, tmp_path):
    """In a notebook a setting may be changed after the model is loaded."""
    folder = str(model_folder("gemma2"))
    assert gemma_sae.loaded_for == (folder, "torch.float32")
    run_of(tmp_path, saes=[gemma_sae], model=folder, layer=1)
    for change, said in (({"model": "gpt2"}, "gpt2 in float32"), ({"dtype": "bfloat16"}, f"{folder} in bfloat16")):
        with pytest.raises(UserError, match=f"settings say {said}, loaded is {folder} in torch.float32: load again"):
            run_of(tmp_path, saes=[gemma_sae], layer=1, **{"model": folder, **change})


def test_where_no_clamp_was_chosen_a_line_names_a_sweep(capsys):
    """For a preset or any other model; the line is a command that pareto.py takes."""
    unsaid = {"layer": 0, "n_features": None, "sae": None, "data": None, "clamp": None}
    notes = []
    for model, more in (("qwen3-1.7b-base", {}), ("my model", {"layer": [3, 5], "n_features": [2, 9], "sae": "r:i d"})):
        for _ in range(2):
            runs.note_clamp(model, unsaid | more)
        notes += capsys.readouterr().err.splitlines()
    assert len(notes) == 2
    assert notes[0].startswith("note: no clamp was chosen on qwen3-1.7b-base, so it is -100; to choose one: ")
    assert "pareto.py --model qwen3-1.7b-base --n-features 50 --layers 0 --clamp -10 " in notes[0]
    words = [shlex.split(note.partition("python pareto.py ")[2]) for note in notes]
    flags = importlib.import_module("pareto").flags
    first, other = (settings(flags, vars(flags.parse_args(given))) for given in words)
    assert (first.model, first.layer, first.n_features, first.sae) == ("qwen3-1.7b-base", [0], [50], None)
    assert (other.model, other.layer, other.n_features, other.sae) == ("my model", [3, 5], [2, 9], "r:i d")
    assert min(first.clamp) <= -1000 and max(first.clamp) >= -10
    others = (
        {"clamp": -5.0},
        {"record": "r.json"},
        {"method": "crisp"},
        {"plot": None},
    )  # pareto.py has its own clamps
    for model, more in (("tiny", {}), ("gemma-2-2b-it", {}), *(("gpt2", one) for one in others)):
        runs.note_clamp(model, unsaid | more)
    runs.note_clamp("gpt2", {})
    assert not capsys.readouterr().err
    for features in ([3, 5], {3: [4], 7: [5, 6]}):
        runs.note_clamp("gpt2", unsaid | {"features": features, "prompt": "chat", "wmdp": "all", "seed": 2})
        note = capsys.readouterr().err
        assert "so it is -10;" in note and "n-features" not in note
        args = settings(flags, vars(flags.parse_args(shlex.split(note.partition("python pareto.py ")[2]))))
        assert (args.features, args.prompt, args.seed, args.wmdp) == (features, "chat", 2, "all")
