"""check_machine.py on this machine's CPU, with its small model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_the_small_shape_on_a_cpu(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, HERE / "check_machine.py", "--shape", "small", "--device", "cpu", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["machine"]["device"] == "cpu" and not report["faults"]
    assert len(report["scripts"]) >= 7
    for name, found in report["scripts"].items():
        assert found["exit_code"] == 0 and 0.3 < found["peak_gb"] < 8 and found["seconds"] > 1, name
        assert f"{name}: {found['seconds']} s, {found['peak_gb']} GB" in done.stdout
    assert report["tiny"].pop("features picked that differ") == 0
    for found in report["tiny"].values():
        assert found["asked"] == 6 * 64 and found["answers"] == found["log_probability"] == 0
    assert report["ratios"]["24 one at a time over the sweep"] > 1.2
    assert 0.5 < report["ratios"]["patched pass over unpatched"] < 3


def test_what_is_a_fault(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    from check_machine import faults

    fine = {"exit_code": 0}
    refused = {"exit_code": 2, "said": "error: no memory is left (CUDA out of memory): take a smaller model"}
    tiny = {name: {"answers": 0} for name in ("letters", "words")}
    report = {"scripts": {"lesson 1": fine, "NPO": refused}, "tiny": tiny}
    assert faults(report) == []
    report["scripts"]["lesson 2"] = {"exit_code": 1, "said": "RuntimeError: no kernel"}
    report["scripts"]["lesson 3"] = {"exit_code": 2, "said": "error: no SAE folder"}
    tiny["words"]["answers"] = 3
    assert [fault.split(":")[0] for fault in faults(report)] == ["lesson 2", "lesson 3", "tiny"]


def test_a_script_that_is_killed_and_memory_that_runs_out_lose_no_report(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(HERE))
    import check_machine

    (tmp_path / "peak.json").write_text("7.5")  # the script's before it
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(check_machine.subprocess, "run", lambda *args, **more: killed)
    found = check_machine.run_script("pareto.py", [], {}, tmp_path)
    assert found["exit_code"] == -9 and found["peak_gb"] is None
    tiny = {name: {"answers": 0} for name in ("letters", "words")}
    assert len(check_machine.faults({"scripts": {"sweep": found}, "tiny": tiny})) == 1

    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert "no memory is left" in check_machine.told("ratios", exhausted)["not measured"]
    assert "not measured: no memory is left (CUDA out of memory" in capsys.readouterr().out
