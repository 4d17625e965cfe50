"""Two processes give one process's records, lose and double nothing, and end when one of them does."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import accelerate.utils
import pytest
import torch

import processes
import records

ROOT = Path(__file__).resolve().parent.parent
# without GPUs accelerate starts several processes only when it takes them for GPUs (accelerate#2741)
ON_CPU = {**os.environ, "ACCELERATE_USE_CPU": "1"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
# a port of its own: another file's tests launch too, and may run at the same time
TWO = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "29611"]
FLAGS = {
    "feature_ablate_1.py": "--layer 3 --n-features 10 --limit 37",
    "feature_ablate_2.py": "--layer 3 --n-features 10 --limit 37",
    "feature_ablate_3.py": "--layer 3 --n-features 10 --limit 7",
    "pareto.py": "--layers 3 --n-features 2 10 --clamp 0 -80 --limit 67",
    "lm_eval_ablated.py": "--layer 3 --n-features 10 --limit 37 --unablated --tasks "
    "tiny_wmdp_bio,tiny_mmlu,tiny_openwebtext",
}
FREE = ("command", "seconds", "settings")  # what two records of one run may differ in: files, time
DRIVER = """
import runpy, shlex, sys
sys.path.insert(0, {root!r})
for script, flags in {flags!r}.items():
    sys.argv = [script, *shlex.split(flags), "--out", {folder!r} + "/" + script + ".json"]
    runpy.run_path({root!r} + "/" + script, run_name="__main__")
"""


def run_all(launcher: list[str], folder: Path, env: dict) -> tuple[dict, subprocess.CompletedProcess]:
    """Every script's record, all written in one launch, and what it printed."""
    driver = folder / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), flags=FLAGS, folder=str(folder)))
    done = subprocess.run([*launcher, str(driver)], capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return {script: json.loads((folder / f"{script}.json").read_text()) for script in FLAGS}, done


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run_all([sys.executable], tmp_path_factory.mktemp("one"), {**os.environ})


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_all(TWO, tmp_path_factory.mktemp("two"), ON_CPU)


@pytest.mark.slow
@pytest.mark.parametrize("script", FLAGS)
def test_two_processes_write_one_processs_record(one, two, script):
    first, second = ({k: v for k, v in part[0][script].items() if k not in FREE} for part in (one, two))
    assert first == second
    assert all(score["n"] % 2 for score in first["points"][0]["scores"].values() if "n" in score)  # odd counts


@pytest.mark.slow
def test_two_processes_print_once(one, two):
    shown = [done.stdout.replace("/two0/", "/one0/") for _, done in (one, two)]
    assert shown[0].count("record:") == len(FLAGS)
    assert shown[0] == shown[1]
    assert two[1].stderr.count("MMLU:   0%") == one[1].stderr.count("MMLU:   0%") == 2  # lessons 1 and 2, a bar each


@pytest.mark.slow
def test_accelerates_cpu_flag_starts_one_process_and_says_so(tmp_path):
    """`accelerate launch --cpu --num_processes 2` is one process where there is no MPI."""
    flags = "--layer 3 --n-features 10 --limit 37 --tasks tiny_wmdp_bio --out r.json"
    command = [*LAUNCH, "--cpu", "--num_processes", "2", str(ROOT / "lm_eval_ablated.py"), *shlex.split(flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.count("note: without GPUs accelerate launch starts one process only") == 1
    assert json.loads((tmp_path / "r.json").read_text())["points"][0]["scores"]["wmdp_bio"]["n"] == 37


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    done = subprocess.run([*TWO, str(ROOT / "feature_ablate_2.py"), "--layer", "4"], capture_output=True, text=True,
                          env=ON_CPU, cwd=tmp_path)  # fmt: skip
    assert done.returncode
    assert done.stderr.count("error: no SAE folder") == 1
    assert not list(tmp_path.glob("**/*.json"))


LOST = """
import sys, time
sys.path.insert(0, {root!r})
import flags, processes

class Slow:
    def __del__(self):  # Python ignores whatever is raised in here
        time.sleep(5)

flags.parse(flags.parser(""))
first = processes.is_first()
processes.from_all([0])  # both are here
if first:
    time.sleep(1)  # the other one is in its destructor when the launcher stops it
else:
    Slow()
raise flags.UserError("what both meet")
"""


@pytest.mark.slow
def test_a_stop_that_comes_while_an_object_is_deleted_is_a_stop(tmp_path):
    (tmp_path / "lost.py").write_text(LOST.format(root=str(ROOT)))
    done = subprocess.run([*TWO, str(tmp_path / "lost.py")], capture_output=True, text=True, env=ON_CPU, cwd=tmp_path)
    assert done.returncode and done.stderr.count("error: what both meet") == 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_process_ends_the_run(tmp_path, victim):
    command = [*TWO, str(ROOT / "feature_ablate_3.py"), "--out", str(tmp_path / "record.json")]
    with (tmp_path / "said").open("w") as said:
        launcher = subprocess.Popen(command, stdout=said, stderr=said, env=ON_CPU, cwd=tmp_path)
    while "SAE check" not in (tmp_path / "said").read_text():
        time.sleep(0.2)
        assert launcher.poll() is None
    time.sleep(1)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (pid,) = [pid for pid in children if f"LOCAL_RANK={victim}\0" in Path(f"/proc/{pid}/environ").read_text()]
    os.kill(int(pid), signal.SIGKILL)
    start = time.time()
    assert launcher.wait(60) != 0
    assert time.time() - start < 60
    text = (tmp_path / "said").read_text()
    assert f"Signal 9 (SIGKILL) received by PID {pid}" in text
    assert victim == "0" or "stopped: nothing was written" in text or "ended before its part was done" in text
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


# ------------------------------------------------------------------------------- one process, pretending


def test_batches_are_dealt_out_whole(monkeypatch, gemma):
    from data import batches

    rows = [[2, *range(3, 5 + i % 7)] for i in range(23)]
    whole = [(picked, ids.tolist()) for picked, ids in batches(rows, 3, gemma.tokenizer, "cpu")]
    for n in (2, 3, 16):
        parts = []
        for index in range(n):
            monkeypatch.setattr(processes, "own", lambda items, i=index, n=n: items[i::n])
            parts.append([(picked, ids.tolist()) for picked, ids in batches(rows, 3, gemma.tokenizer, "cpu")])
        assert sorted(pair for part in parts for pair in part) == sorted(whole)


def test_a_lost_process_is_told_as_that(monkeypatch):
    def gone(*_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(processes, "count", lambda: 2)
    for name in ("reduce", "broadcast_object_list", "gather_object"):
        monkeypatch.setattr(accelerate.utils, name, gone)
    for call in (
        lambda: processes.total(torch.ones(1)),
        lambda: processes.from_first(1),
        lambda: processes.from_all([1]),
    ):
        with pytest.raises(processes.LostProcess, match="another process"):
            call()


def test_only_the_first_process_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    records.write_record(tmp_path / "r.json", {"points": []}, {})
    assert not list(tmp_path.iterdir())
