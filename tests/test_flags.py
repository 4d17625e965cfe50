"""The command line: settings that cannot be, paths, consoles."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import flags
import hub
import lm_eval_ablated
import train_sae
from data import UserError
from flags import command_line, parser, settings


@pytest.mark.parametrize("flags", [dict(clamp=math.nan), dict(clamp=-math.inf), dict(clamp=[-1.0, math.nan])])
def test_a_flag_that_is_not_finite_is_refused(flags):
    with pytest.raises(UserError, match=r"--clamp .*: a finite number is wanted"):
        settings(parser("a script"), flags)


def test_a_last_word_is_said_behind_what_other_packages_hang_in_front(monkeypatch):
    """torch.distributed puts its own excepthook in front as the processes connect, which loses ours on the way."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(flags, "speak_as_one", lambda: setattr(sys, "excepthook", print))
    flags.parse(parser("a script"))
    assert sys.excepthook is flags.ended


@pytest.mark.parametrize("console", ["ipykernel_launcher.py -f kernel.json", "colab_kernel_launcher.py -f x",
                                     "pydevconsole.py --mode=client --port=9"])  # fmt: skip
def test_a_consoles_arguments_are_not_ours(monkeypatch, console):
    monkeypatch.setattr(sys, "argv", console.split())
    p, taken = parser("a script"), []
    command_line(lambda **given: taken.append(given), p)
    assert taken == [vars(p.parse_args([]))]  # what is not given is not made up: a record's own may count


def test_a_console_that_lacks_a_character_is_no_traceback():
    code = "import sys; sys.argv = ['x']; import flags; flags.command_line(lambda **_: print('\u2581\u4e2d'), "
    code += "flags.parser(''))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "\\u2581\\u4e2d"), done.stderr[-500:]


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(seed=-1), "--seed -1: at least 0"),
        (dict(subjects=""), "--subjects: nothing is given"),
        (dict(clamp=float("nan")), "--clamp nan"),
    ],
)
def test_settings_that_cannot_be_are_refused(flags, said):
    p = parser("a script")
    p.add_argument("--subjects")
    with pytest.raises(UserError, match=said):
        settings(p, flags)


def test_paths_lead_to_the_same_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mmlu.jsonl").touch()
    (tmp_path / "tiny").mkdir()  # of a preset's name, and not what --model tiny means
    s = settings(parser("a script"), {"data": "mine", "sae": "mine"})
    assert (s.data, s.sae, s.model) == (str(tmp_path / "mine"), str(tmp_path / "mine"), "tiny")
    assert Path(train_sae.flags.get_default("text")).is_file()
    assert parser("").get_default("out") is None


def test_a_record_of_a_refusal_clamp_has_its_latent():
    with pytest.raises(UserError, match="needs --refusal-latent"):
        settings(lm_eval_ablated.flags, {"method": "refusal-clamp", "clamp": -1.0})
    settings(lm_eval_ablated.flags, {"method": "refusal-clamp", "clamp": -1.0, "features": "record.json"})


def test_the_dtype_is_the_presets_unless_a_flag_says_otherwise():
    """A real model in float32 would take twice the memory."""
    found = {name: settings(parser("a script"), {"model": name}).dtype for name in hub.PRESETS}
    assert found.pop("gemma-2-2b-it") == found["gemma-3-1b-it"] == found["gemma-3-4b-it"] == "bfloat16"
    assert found["tiny"] == found["never-knew"] == found["gpt2"] == "float32"
    assert settings(parser("a script"), {"model": "org/name"}).dtype == "float32"
    assert settings(parser("a script"), {"model": "gemma-3-1b-it", "dtype": "float32"}).dtype == "float32"
    assert all(line.split()[-1] == "bfloat16" for line in hub.listed().splitlines() if line.startswith("gemma"))
