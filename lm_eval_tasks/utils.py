"""
What the task files beside this one need: their data, and the metrics that lm-eval lacks.

lm-eval calls the functions named in a task file's `custom_dataset` with the file's dataset_kwargs and with all metadata
of the run, from which `data` (a folder, as --data) is taken.
"""

import sys
from itertools import groupby
from pathlib import Path

from datasets import Dataset, DatasetDict

sys.path.append(str(Path(__file__).resolve().parent.parent))  # lm-eval may be started anywhere
from data import load_rows
from evaluation import PERMUTATIONS, normalised

WINDOW = 64  # words, 85 to 130 tokens: about lesson 3's windows of 128 tokens, without knowing the tokenizer
WORDS = 12_000  # of the texts, in order: about lesson 3's 20,000 tokens


def quiz(name: str, model: str = "tiny", data=None, orders=False, question=True, **_) -> DatasetDict:
    """A quiz of data.py (`test`) and development questions for few-shot prompts (`dev`: MMLU's).

    orders: each question 24 times, with its options in every order. question: False leaves the question out.
    """
    rows, dev = (load_rows(part, model, data)[0] for part in (name, "mmlu_dev"))
    rows = [{**row, "subject": row.get("subject") or "biology", "number": n} for n, row in enumerate(rows)]
    if not question:
        rows = [{**row, "question": "", "left_out": row["question"]} for row in rows]
    if orders:
        rows = [reordered(row, order) for row in rows for order in PERMUTATIONS]
    return DatasetDict({"test": Dataset.from_list(rows), "dev": Dataset.from_list(dev)})


def reordered(row: dict, order: tuple[int, ...]) -> dict:
    return {**row, "choices": [row["choices"][i] for i in order], "answer": order.index(row["answer"])}


def in_its_order(doc: dict, results: list[tuple[float, bool]]) -> dict:
    """Right or not, and for which question. results: log-likelihood of each letter."""
    values = [value for value, _ in results]
    right = float(values.index(max(values)) == doc["answer"])
    return {"acc": right, "all_orders": (doc["number"], right)}


def right_in_all_orders(items: list[tuple[int, float]]) -> float:
    """Share of questions that are right in all of their orders. items: (question, right)."""
    whole = [min(right for _, right in group) for _, group in groupby(sorted(items), key=lambda item: item[0])]
    return sum(whole) / len(whole)


def is_right(doc: dict, results: list[str]) -> dict:
    """Is what was written the right option, graded as evaluation.score_open does? results: the text."""
    return {"exact_match": float(normalised(results[0]) == normalised(doc["choices"][doc["answer"]]))}


def texts(model: str = "tiny", data=None, **_) -> DatasetDict:
    """OpenWebText's documents in windows of WINDOW words, as many as WORDS words fill."""
    windows, left = [], WORDS
    for number, row in enumerate(load_rows("openwebtext", model, data)[0]):
        words = row["text"].split(" ")[:left]
        windows += [{"text": " ".join(words[at : at + WINDOW]), "document": number}
                    for at in range(0, len(words), WINDOW)]  # fmt: skip
        left -= len(words)
        if left <= 0:
            break
    return DatasetDict({"test": Dataset.from_list([row for row in windows if row["text"].strip()])})


def loss(doc: dict, results: tuple[float, bool]) -> dict:
    """Log-likelihood in nats and length in bytes, of which lm-eval makes bits per byte."""
    (log_likelihood, _) = results[0] if isinstance(results[0], tuple) else results
    return {"bits_per_byte": (log_likelihood, len(doc["text"].encode()))}
