"""What the documents quote is what their commands give, to the point."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from statistics import mean

import jupytext
import pytest
from conftest import ROOT

import data
import evaluation
import show
from common import load_model, load_sae
from edits import NONE, make

LESSONS = ["feature_ablate_1.py", "feature_ablate_2.py", "feature_ablate_3.py", "feature_importance.py"]
MAIN, MAIN_OF = "--layer 7 --n-features 50", {"feature_importance.py": "--layer 7 --n-features 100"}
HEAD = ["row", "WMDP-Bio stand-in, %", "change, points", "in words, %", "MMLU stand-in, %", "change, points"]


def cells(scores: list[dict]) -> list[str]:
    """Accuracy and change, in per cent and points: the first row's with the interval of the accuracy, others with that
    of the change; of several draws of a control the mean, and the range of the change."""
    score = evaluation.Score(**scores[0])
    if score.change is None:
        return [show.mean_text(score, "%"), ""]
    if len(scores) == 1:
        change = show.interval_text(score.change, score.change_low, score.change_high, "%", "+")
        return [show.number(score.mean, "%"), change]
    changes = [of([score["change"] for score in scores]) for of in (mean, min, max)]
    texts = [show.number(change, "%", "+") for change in changes]
    return [show.number(mean(score["mean"] for score in scores), "%"), f"{texts[0]} ({texts[1]} to {texts[2]})"]


def table_of(record: dict) -> str:
    """Lesson 2's record as README and docs/results.md show it."""
    rows = []
    for name, draws in show.draws_of(record["rows"]).items():
        scores = [record["rows"][row]["scores"] for row in draws]
        measures = ("wmdp_bio/letters", "wmdp_bio/words", "mmlu/letters")
        in_letters, in_words, mmlu = ([of[measure] for of in scores] for measure in measures)
        name = f"{name}, {len(draws)} draws" if len(draws) > 1 else name
        words = show.number(mean(score["mean"] for score in in_words), "%")
        rows.append([name, *cells(in_letters), words, *cells(mmlu)])
    return show.markdown(HEAD, rows)


def documented() -> list[tuple[str, str]]:
    """(flags, table) of each such table, made by the last command before it."""
    tables = []
    for path in (ROOT / "README.md", ROOT / "docs/results.md"):
        text = path.read_text()
        for table in re.finditer(re.escape(f"| {' | '.join(HEAD)} |\n") + r"(?:\|.*\n)+", text):
            commands = re.findall(r"python feature_ablate_2\.py (.*)$", text[: table.start()], re.MULTILINE)
            tables.append((commands[-1], table[0].strip()))
    return tables


def marked(script: str) -> dict[str, list[tuple[str, str]]]:
    """{flags: [(number, expression)]} of a lesson's prose: the numbers in bold, and in the comment of their cell, in
    order, what they are in the names of the lesson when it has run; the comment may begin with flags and a colon."""
    pairs = {}
    for cell in jupytext.read(ROOT / script).cells:
        numbers = re.findall(r"\*\*([+-]?\d[\d.]*)\*\*", cell.source if cell.cell_type == "markdown" else "")
        comments = re.findall(r"<!--\s(.*?)\s-->", cell.source, re.DOTALL)
        assert len(comments) == bool(numbers), cell.source
        for comment in comments:
            flags, text = re.fullmatch(r"(?:(--.*?): )?(.*)", " ".join(comment.split())).groups()
            expressions = [*map(ast.unparse, ast.parse(f"({text},)", mode="eval").body.elts)]
            assert len(numbers) == len(expressions), cell.source
            pairs.setdefault(flags or MAIN_OF.get(script, MAIN), []).extend(zip(numbers, expressions, strict=True))
    return pairs


def answers(script: str) -> str:
    """The code of a lesson's folded answers."""
    cells = [cell.source for cell in jupytext.read(ROOT / script).cells if cell.cell_type == "markdown"]
    return "\n".join(re.findall(r"```python\n(.*?)```", "\n".join(cells), re.DOTALL))


@cache
def run_of(script: str, flags: str) -> tuple[dict, list[float]]:
    """A lesson's record, and the values of what is marked in it, from a process of its own; in the main setting its
    exercises' answers are run, too."""
    expressions = [expression for _, expression in marked(script).get(flags, [])]
    with tempfile.TemporaryDirectory() as folder:
        sys_argv = [script, *shlex.split(flags), "--out", f"{folder}/r.json"]
        code = f"import json, runpy, sys; sys.argv = {sys_argv}; names = runpy.run_path({script!r})\n" \
               f"exec({answers(script) if flags == MAIN_OF.get(script, MAIN) else ''!r}, names)\n" \
               f"values = [float(eval(text, names)) for text in {expressions}]\n" \
               f"open({folder!r} + '/values.json', 'w').write(json.dumps(values))"  # fmt: skip
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
        return tuple(json.loads((Path(folder) / name).read_text()) for name in ("r.json", "values.json"))


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [(script, flags) for script in LESSONS for flags in marked(script)])
def test_numbers_of_a_lessons_prose_are_those_of_its_run(script, flags):
    pairs = marked(script)[flags]
    for (quoted, expression), value in zip(pairs, run_of(script, flags)[1], strict=True):
        # a close answer may be rounded otherwise, and change what is a mean over answers, or their number
        answers = re.search(r"^-?100 \* .*\.(mean|change)$|begun|^(dearer|same)$", expression)
        of_a_third = expression.startswith(("-100 * in_", "(begun", "dearer", "same"))
        unit = 10.0 ** -len(quoted.partition(".")[2])
        tolerance = (2.0 if of_a_third else 1.0) if answers else 0.6 * unit
        assert value == pytest.approx(float(quoted), abs=tolerance), expression


@pytest.mark.slow
def test_what_is_said_of_random_features_holds_for_most_of_eight_draws():
    """Lessons and README: a clamp costs more than random features in letters, in words, and on MMLU; on ordinary text
    less, and on the subject's text more."""

    def draws_below(record, measure):
        """Of how many draws the score is below the clamp's."""
        scores = {row: about["scores"][measure]["mean"] for row, about in record["rows"].items()}
        draws = [score for row, score in scores.items() if row.startswith("random")]
        assert len(draws) == 8
        return sum(score < scores["clamp -40"] for score in draws), sum(score > scores["clamp -40"] for score in draws)

    quizzes, text = (run_of(script, f"{MAIN} --controls 8")[0] for script in LESSONS[1:3])
    for measure in ("wmdp_bio/letters", "wmdp_bio/words", "mmlu/letters"):
        assert draws_below(quizzes, measure)[1] >= 6, measure
    assert draws_below(text, "openwebtext/loss")[1] >= 6 and draws_below(text, "wmdp_bio_prose/loss")[0] >= 6


def test_there_are_tables_and_marked_numbers():
    flags = [flags for flags, _ in documented()]
    assert flags[0] == MAIN and len(flags) == 2
    assert all(len(marked(script)[MAIN_OF.get(script, MAIN)]) >= 5 for script in LESSONS)


@pytest.mark.slow
@pytest.mark.parametrize("flags, table", documented())
def test_a_table_is_what_its_command_gives(flags, table):
    measured = table_of(run_of("feature_ablate_2.py", flags)[0])
    number = r"[+-]?\d+\.\d"
    assert re.sub(number, "#", measured) == re.sub(number, "#", table)
    for mine, quoted in zip(re.findall(number, measured), re.findall(number, table), strict=True):
        assert float(mine) == pytest.approx(float(quoted), abs=1.0)  # a close answer may be rounded otherwise


def test_what_was_measured_of_tiny_is_quoted():
    text = (ROOT / "docs/results.md").read_text()
    measured = json.loads((ROOT / "tiny/measured.json").read_text())
    both = measured["model"], measured["retrained"]
    for quiz, title in (("wmdp_bio", "WMDP-Bio"), ("mmlu", "MMLU")):
        shares = ["accuracy", "right_in_all_24_orders", *["accuracy_unseen_wording"] * (quiz == "wmdp_bio"), "in_words"]
        pairs = [[f"{100 * scores[quiz][share]:.1f}%" for scores in both] for share in shares]
        pairs[0][0] += " right"
        table = text[text.index(f"| {title} stand-in, {both[0][quiz]['n']} questions |") :].splitlines()
        lines = [line.removesuffix(" |").split(" | ")[1:] for line in table[: len(pairs)]]
        assert lines == pairs
    losses = " | ".join(f"{scores['wikitext_held_out_loss']:.3f}" for scores in both)
    assert f"| held-out Wikitext, nats per token | {losses} |" in text
    for name, sae in measured["sae"].items():
        shares = f"{sae['variance_explained']:.3f} | {sae['loss_recovered']:.3f} | {sae['l0']:.1f}"
        assert f"| {name.replace('_', ' ')} | {shares} | {100 * sae['dead_share']:.1f}% |" in text


@pytest.mark.slow
def test_what_tiny_gets_right_in_the_cloze_prompt():
    text = " ".join((ROOT / "docs/real_models.md").read_text().split())
    tiny, n, retrained = re.search(r"([\d.]+)% of (439), .*? ([\d.]+)%", text).groups()
    quiz, rows = (
        data.load("wmdp_bio", variant="cloze"),
        {"tiny": NONE, "retrained": load_model("tiny-retrained", "cpu")},
    )
    (right,) = evaluation.letters(load_model("tiny", "cpu"), quiz, rows, batch_size=64)
    assert 100 * right["tiny"].mean == pytest.approx(float(tiny), abs=0.5) and len(quiz) == int(n)
    assert 100 * right["retrained"].mean == pytest.approx(float(retrained), abs=0.5)


@pytest.mark.slow
def test_what_is_written_right_is_quoted():
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    shares = re.search(r"writes ([\d.]+)% right and .* none; .*, leaves ([\d.]+)% \[32", text).groups()
    costs = re.search(r"answer costs ([\d.]+), ([\d.]+) and ([\d.]+) nats", text).groups()
    clamp, model = run_of("feature_ablate_2.py", MAIN)[0]["rows"]["clamp -40"], load_model("tiny", "cpu")
    clamp = make(clamp["method"], load_sae(None, 7, model), **clamp["settings"])
    rows = {"unablated": NONE, "retrained": load_model("tiny-retrained", "cpu"), "clamp": clamp}
    exact, nats = evaluation.open_answers(model, data.load("wmdp_bio").held_out, rows, batch_size=64)
    right = [100 * exact[row].mean for row in ("unablated", "clamp")]
    assert right == pytest.approx([float(share) for share in shares], abs=1.0) and exact["retrained"].mean == 0
    assert [nats[row].mean for row in rows] == pytest.approx([float(cost) for cost in costs], abs=0.006)


def test_what_the_readme_ablates_by_hand_is_what_it_says(capsys):
    text = (ROOT / "README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "with ablate" in block)
    exec(code, {})
    said = re.findall(r"Answer in words: (.+)", capsys.readouterr().out)
    assert re.search(r'answers "(.+)" first, and "(.+)" with feature 449 clamped', text).groups() == tuple(said)
