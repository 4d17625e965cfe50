"""What the documents quote is what their commands give, to the point."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import show
from edits import Edit

HEAD = ["row", "WMDP-Bio stand-in, %", "change, points", "in words, %", "MMLU stand-in, %", "change, points"]


def cells(score: dict) -> list[str]:
    """Accuracy and change, in per cent and points; the intervals are of what was measured first and of changes."""

    def of(*names, form):
        middle, low, high = (f"{100 * score[name]:{form}}" for name in names)
        return f"{middle} [{low}, {high}]"

    if "change" not in score:
        return [of("accuracy", "low", "high", form=".1f"), ""]
    return [f"{100 * score['accuracy']:.1f}", of("change", "change_low", "change_high", form="+.1f")]


def table_of(record: dict) -> str:
    """Lesson 2's record as README and docs/results.md show it."""
    rows = []
    for point in record["points"]:
        bio, mmlu = point["scores"]["wmdp_bio"], point["scores"]["mmlu"]
        label = show.label(Edit(point["method"], setting=point["setting"]))
        rows.append([label, *cells(bio), f"{100 * bio['in_words']['accuracy']:.1f}", *cells(mmlu)])
    return show.markdown(HEAD, rows)


def documented() -> list[tuple[str, str]]:
    """(flags, table) of each such table, made by the last command before it."""
    found = []
    for path in (ROOT / "README.md", ROOT / "docs/results.md"):
        text = path.read_text()
        for table in re.finditer(re.escape(f"| {' | '.join(HEAD)} |\n") + r"(?:\|.*\n)+", text):
            commands = re.findall(r"^python feature_ablate_2\.py (.*)$", text[: table.start()], re.MULTILINE)
            found.append((commands[-1], table[0].strip()))
    return found


def test_there_are_tables():
    flags = [flags for flags, _ in documented()]
    assert flags[0] == "--layer 7 --n-features 50" and len(flags) == 2


@pytest.mark.slow
@pytest.mark.parametrize("flags, table", documented())
def test_a_table_is_what_its_command_gives(flags, table, tmp_path):
    command = [sys.executable, ROOT / "feature_ablate_2.py", *shlex.split(flags), "--out", tmp_path / "r.json"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    found = table_of(json.loads((tmp_path / "r.json").read_text()))
    number = r"[+-]?\d+\.\d"
    assert re.sub(number, "#", found) == re.sub(number, "#", table)
    for mine, quoted in zip(re.findall(number, found), re.findall(number, table), strict=True):
        assert float(mine) == pytest.approx(float(quoted), abs=1.0)  # a close answer may be rounded otherwise


def test_what_was_measured_of_tiny_is_quoted():
    text = (ROOT / "docs/results.md").read_text()
    measured = json.loads((ROOT / "tiny/measured.json").read_text())
    model, twin = measured["model"], measured["never_knew"]
    for quiz, title in (("wmdp_bio", "WMDP-Bio"), ("mmlu", "MMLU")):
        shares = ["accuracy", "right_in_all_24_orders", *["accuracy_unseen_wording"] * (quiz == "wmdp_bio"), "in_words"]
        pairs = [[f"{100 * scores[quiz][share]:.1f}%" for scores in (model, twin)] for share in shares]
        pairs[0][0] += " right"
        table = text[text.index(f"| {title} stand-in, {model[quiz]['n']} questions |") :].splitlines()
        assert [line.split(" | ")[1:] for line in table[: len(pairs)]] == [[one, f"{other} |"] for one, other in pairs]
    losses = " | ".join(f"{scores['wikitext_held_out_loss']:.3f}" for scores in (model, twin))
    assert f"| held-out Wikitext, nats per token | {losses} |" in text
    for name, sae in measured["sae"].items():
        shares = f"{sae['variance_explained']:.3f} | {sae['loss_recovered']:.3f} | {sae['l0']:.1f}"
        assert f"| {name.replace('_', ' ')} | {shares} | {100 * sae['dead_share']:.1f}% |" in text
