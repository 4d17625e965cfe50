"""Two processes give one process's records, lose and double nothing, and end when one of them does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data

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
    "pareto.py": "--layers 3 --n-features 2 10 --clamp 0 -80 --limit 35",
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
    assert all(score["n"] % 2 for score in first["rows"]["unablated"]["scores"].values())  # one has more to do


@pytest.mark.slow
def test_two_machines_write_one_processs_record(tmp_path):
    """Two launches, as on two machines, that find each other at an address; the second writes nothing."""
    script = [str(ROOT / "lm_eval_ablated.py"), *FLAGS["lm_eval_ablated.py"].split(), "--out"]
    both, said = (
        [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--num_machines", "2"],
        [tmp_path / "0", tmp_path / "1"],
    )
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", "29631"]
    launches = [[*both, *where, "--machine_rank", out.name, *script, f"{out}.json"] for out in said]
    machines = [subprocess.Popen(launch, env=ON_CPU, cwd=tmp_path, stdout=out.open("w"), stderr=subprocess.STDOUT)
                for launch, out in zip(launches, said)]  # fmt: skip
    assert [machine.wait(600) for machine in machines] == [0, 0], [out.read_text()[-1500:] for out in said]
    subprocess.run([sys.executable, *script, str(tmp_path / "one.json")], check=True, capture_output=True, cwd=tmp_path)
    two, one = ({k: v for k, v in json.loads((tmp_path / f"{name}.json").read_text()).items() if k not in FREE}
                for name in ("0", "one"))  # fmt: skip
    assert one == two and not (tmp_path / "1.json").exists() and "record:" not in said[1].read_text()


@pytest.mark.slow
def test_two_processes_print_once(one, two):
    shown = [done.stdout.replace("/two0/", "/one0/") for _, done in (one, two)]
    assert shown[0].count("record:") == len(FLAGS)
    assert shown[0] == shown[1]
    bars = [done.stderr.count("MMLU stand-in:   0%") for _, done in (one, two)]
    assert bars[0] == bars[1] > 0


@pytest.mark.slow
def test_a_mistake_is_told_once(tmp_path):
    done = subprocess.run([*TWO, str(ROOT / "feature_ablate_2.py"), "--layer", "4"], capture_output=True, text=True,
                          env=ON_CPU, cwd=tmp_path)  # fmt: skip
    assert done.returncode
    assert done.stderr.count("error: no SAE folder") == 1
    assert not list(tmp_path.glob("**/*.json"))


CACHED = """
import sys
sys.path.insert(0, {root!r})
import data, runs
from accelerate.utils import gather_object

args, made = runs.parse(runs.parser("")), []
run = runs.Run("script.py", args)

def make(name):
    made.append(name)
    return data.process_state().process_index

found = [run.cached(name, lambda: make(name)) for name in "ab"]
gather_object([0])
if data.is_first_process():
    (run.cache / "a.json").unlink()  # as if it had been stopped there
gather_object([0])
found += [run.cached(name, lambda: make(name)) for name in "ba"]
assert (found, made) == ([0, 0, 0, 0], ["a", "b", "a"]), (found, made)
run.write({{}}, [])
"""


@pytest.mark.slow
def test_what_is_cached_is_the_same_on_all_processes(tmp_path):
    (tmp_path / "cached.py").write_text(CACHED.format(root=str(ROOT)))
    command = [*TWO, str(tmp_path / "cached.py"), "--out", "r.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=ON_CPU, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cached.py", "r.csv", "r.json"]


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
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


# ------------------------------------------------------------------------------- one process, pretending


LEFT = ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"},
        {f"OMPI_COMM_WORLD_{name}": n for name, n in dict(SIZE="2", RANK="1", LOCAL_RANK="1", LOCAL_SIZE="2").items()},
        {"PMI_SIZE": "8", "PMI_RANK": "3", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "8"},
        {"WORLD_SIZE": "of another program", "MV2_COMM_WORLD_SIZE": "2"})  # fmt: skip


@pytest.mark.parametrize("left", LEFT)
def test_ranks_that_no_launcher_gave_are_taken_out(monkeypatch, left, capsys):
    others = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "MY_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (left | others).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as accelerate launch and torchrun say
    data.forget_ranks()
    assert left.items() <= os.environ.items() and not capsys.readouterr().err
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    data.forget_ranks()
    assert not {name for name in left if not name.startswith("MASTER")} & set(os.environ)
    assert others.items() <= os.environ.items()
    assert "in the environment, but no launcher has started this process: it is alone" in capsys.readouterr().err


def test_a_run_with_another_jobs_ranks_runs_alone():
    """It would wait for three other processes that never come."""
    code = "import data; assert (data.n_processes(), data.is_first_process()) == (1, True), data.n_processes()"
    environment = {**os.environ, **LEFT[0], **LEFT[1], "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT,
                          timeout=60)  # fmt: skip
    assert done.returncode == 0 and "note: LOCAL_RANK, OMPI_COMM_WORLD_LOCAL_RANK, " in done.stderr, done.stderr[-800:]


def test_batches_are_dealt_out_whole(monkeypatch, gemma):
    from data import batches

    rows = [[2, *range(3, 5 + i % 7)] for i in range(23)]
    whole = [(picked, ids.tolist()) for picked, ids in batches(rows, 3, gemma.tokenizer, "cpu")]
    for n in (2, 3, 16):
        parts = []
        for index in range(n):
            monkeypatch.setattr(data, "own_share", lambda items, i=index, n=n: items[i::n])
            parts.append([(picked, ids.tolist()) for picked, ids in batches(rows, 3, gemma.tokenizer, "cpu")])
        assert sorted(pair for part in parts for pair in part) == sorted(whole)
