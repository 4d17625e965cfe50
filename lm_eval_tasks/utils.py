"""
What the task files in this folder need: their data, and the metrics that lm-eval lacks.

lm-eval calls the function named in a task file's `custom_dataset` with the file's dataset_kwargs and the metadata of
the run, of which `data` (a folder with data files) and `topic` (what its forget set is about) are used.
"""

import sys
from itertools import groupby
from pathlib import Path

from datasets import Dataset, DatasetDict

# lm-eval may be started anywhere, and a data.py or hub.py there is not ours: our files are imported under their names,
# which are the others' again afterwards
ROOT = Path(__file__).resolve().parent.parent
NAMES = {path.stem for path in ROOT.glob("*.py")}
before = {name: sys.modules[name] for name in NAMES & {*sys.modules}}
for name, module in before.items():
    if Path(getattr(module, "__file__", None) or ".").resolve().parent != ROOT:
        del sys.modules[name]
sys.path.insert(0, str(ROOT))
try:
    from data import PERMUTATIONS, load, reordered
    from evaluation import normalised
finally:
    sys.path.remove(str(ROOT))
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)

WINDOW = 64  # words, 85 to 130 tokens: about lesson 3's windows of 128 tokens, without knowing the tokenizer
WORDS = 12_000  # of the texts, in order: about lesson 3's 20,000 tokens


def quiz(name: str, preset="tiny", data=None, topic=None, orders=False, question=True, **_) -> DatasetDict:
    """A quiz of data.py (`test`), and development questions for few-shot prompts (`dev`, MMLU's).

    preset: whose data are meant (lm-eval's metadata has a `model` of its own). orders: ask each question 24 times, with
    its options in every order. question: False leaves the question out.
    """
    rows, dev = load(name, preset, data, topic=topic).rows, load("mmlu_dev", preset, data).rows
    rows = [{"asked_about": "biology", **row, "number": n} for n, row in enumerate(rows)]
    rows = [{**row, "subject": row.get("subject") or row["asked_about"]} for row in rows]
    if not question:
        rows = [{**row, "question": "", "left_out": row["question"]} for row in rows]
    if orders:
        rows = [reordered(row, order) for row in rows for order in PERMUTATIONS]
    return DatasetDict({"test": Dataset.from_list(rows), "dev": Dataset.from_list(dev)})


def in_its_order(doc: dict, results: list[tuple[float, bool]]) -> dict:
    """Whether the answer is right, and to which question. results: (log-likelihood, greedy) of each letter."""
    values = [value for value, _ in results]
    right = float(values.index(max(values)) == doc["answer"])
    return {"acc": right, "all_orders": (doc["number"], right)}


def right_in_all_orders(items: list[tuple[int, float]]) -> float:
    """Share of questions answered right in all of their orders. items: (question, right)."""
    always = [min(right for _, right in group) for _, group in groupby(sorted(items), key=lambda item: item[0])]
    return sum(always) / len(always)


def is_right(doc: dict, results: list[str]) -> dict:
    """Is the generated text the right option, graded as in evaluation.open_answers? results: the text."""
    return {"exact_match": float(normalised(results[0]) == normalised(doc["choices"][doc["answer"]]))}


def texts(preset: str = "tiny", data=None, **_) -> DatasetDict:
    """OpenWebText's documents in windows of WINDOW words, as many as WORDS words fill."""
    windows, left = [], WORDS
    for number, text in enumerate(load("openwebtext", preset, data).texts):
        words = text.split(" ")[:left]
        windows += [{"text": " ".join(words[start : start + WINDOW]), "document": number}
                    for start in range(0, len(words), WINDOW)]  # fmt: skip
        left -= len(words)
        if left <= 0:
            break
    return DatasetDict({"test": Dataset.from_list([row for row in windows if row["text"].strip()])})


def loss(doc: dict, results: tuple[float, bool]) -> dict:
    """Log-likelihood in nats and length in bytes, from which lm-eval computes bits per byte."""
    (log_likelihood, _) = results[0] if isinstance(results[0], tuple) else results
    return {"bits_per_byte": (log_likelihood, len(doc["text"].encode()))}
