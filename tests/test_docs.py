"""What the documents quote is what their commands give, to the point."""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import jupytext
import pytest
import torch
from conftest import ROOT

import show
from common import load_model, load_sae
from data import CLOZE, halves, load_rows
from edits import NONE, Edit, edit_of
from evaluation import score_open, score_words

LESSONS = ["feature_ablate_1.py", "feature_ablate_2.py", "feature_ablate_3.py"]
MAIN = "--layer 7 --n-features 50"
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
            commands = re.findall(r"python feature_ablate_2\.py (.*)$", text[: table.start()], re.MULTILINE)
            found.append((commands[-1], table[0].strip()))
    return found


def marked(script: str) -> dict[str, list[tuple[str, str]]]:
    """{flags: [(number, expression)]} of a lesson's prose: numbers in bold, and in the comment of their cell, in order,
    what they are in the names of the lesson when it has run; the comment may begin with flags."""
    found = {}
    for cell in jupytext.read(ROOT / script).cells:
        numbers = re.findall(r"\*\*([+-]?\d[\d.]*)\*\*", cell.source if cell.cell_type == "markdown" else "")
        comments = re.findall(r"<!-- (.*?) -->", cell.source, re.DOTALL)
        assert len(comments) == bool(numbers), cell.source
        for comment in comments:
            *flags, expressions = re.fullmatch(r"(?:(--.*?): )?(.*)", " ".join(comment.split())).groups()
            pairs = zip(numbers, expressions.split(", "), strict=True)
            found.setdefault(flags[0] or MAIN, []).extend(pairs)
    return found


@cache
def run_of(script: str, flags: str) -> tuple[dict, list[float]]:
    """A lesson's record, and the values of what is marked in it, from a process of its own."""
    expressions = [expression for _, expression in marked(script).get(flags, [])]
    with tempfile.TemporaryDirectory() as folder:
        sys_argv = [script, *shlex.split(flags), "--out", f"{folder}/r.json"]
        code = f"import json, runpy, sys; sys.argv = {sys_argv}; names = runpy.run_path({script!r})\n" \
               f"values = [float(eval(one, names)) for one in {expressions}]\n" \
               f"open({folder!r} + '/values.json', 'w').write(json.dumps(values))"  # fmt: skip
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
        return tuple(json.loads((Path(folder) / name).read_text()) for name in ("r.json", "values.json"))


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [(script, flags) for script in LESSONS for flags in marked(script)])
def test_numbers_of_a_lessons_prose_are_those_of_its_run(script, flags):
    pairs = marked(script)[flags]
    for (quoted, expression), value in zip(pairs, run_of(script, flags)[1], strict=True):
        answers = "accuracy" in expression or "change" in expression  # a close one may be rounded otherwise
        unit = 10.0 ** -len(quoted.partition(".")[2])
        assert value == pytest.approx(float(quoted), abs=1.0 if answers else 0.6 * unit), expression


def test_there_are_tables_and_marked_numbers():
    flags = [flags for flags, _ in documented()]
    assert flags[0] == MAIN and len(flags) == 2
    assert all(len(marked(script)[MAIN]) >= 5 for script in LESSONS)


@pytest.mark.slow
@pytest.mark.parametrize("flags, table", documented())
def test_a_table_is_what_its_command_gives(flags, table):
    found = table_of(run_of("feature_ablate_2.py", flags)[0])
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


@pytest.mark.slow
def test_what_tiny_gets_right_in_the_cloze_prompt():
    text = " ".join((ROOT / "docs/real_models.md").read_text().split())
    quoted = re.search(r"([\d.]+)% of (\d+), its twin that never knew ([\d.]+)%", text).groups()
    rows = load_rows("wmdp_bio_cloze")[0]
    answers = torch.tensor([row["answer"] for row in rows])
    for name, share in zip(("tiny", "never-knew"), quoted[::2]):
        chosen = score_words(load_model(name, "cpu"), rows, [NONE], 64, form=CLOZE)[0].argmax(-1)
        assert 100 * (chosen == answers).float().mean().item() == pytest.approx(float(share), abs=0.5)
    assert len(rows) == int(quoted[1])


@pytest.mark.slow
def test_what_is_written_right_is_quoted():
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    shares = re.search(r"writes ([\d.]+)% right and .* none; .*, leaves ([\d.]+)% \[32", text).groups()
    costs = re.search(r"answer costs ([\d.]+), ([\d.]+) and ([\d.]+) nats", text).groups()
    setting = run_of("feature_ablate_2.py", MAIN)[0]["points"][4]["setting"]
    rows, model = load_rows("wmdp_bio")[0], load_model("tiny", "cpu")
    rows = [rows[i] for i in halves(rows, 0)[1]]
    clamp = edit_of("sae-ablation", load_sae(None, 7, model), features=setting["features"], clamp=setting["clamp"])
    clean, clamped = score_open(model, rows, [NONE, clamp], 64)
    (never,) = score_open(load_model("never-knew", "cpu"), rows, [NONE], 64)
    found = [100 * score["exact"]["accuracy"] for score in (clean, clamped)]
    assert found == pytest.approx([float(share) for share in shares], abs=1.0) and never["exact"]["accuracy"] == 0
    found = [score["right_nats_per_token"]["mean"] for score in (clean, never, clamped)]
    assert found == pytest.approx([float(cost) for cost in costs], abs=0.006)
