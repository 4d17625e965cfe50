"""
What the ablation costs in lm-eval, and what lm-eval costs: the same questions asked of lm-eval's `hf`, of `sae-ablated`
and of our own scorer, in one run, taken in turn.

    python tests/bench_lm_eval.py
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench_patched import now, write_smollm_shape
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from common import load_model, load_sae
from data import LETTERS, encode_prompts, prompt
from edits import NONE, ablation
from evaluation import score_letters
from lm_eval_ablated import AblatedLM

ROUNDS, BATCH, FEATURES = 7, 16, list(range(0, 500, 10))


def compare(
    title: str, model: str, sae: str, questions: list[dict], dtype: str, rounds: int = ROUNDS, device: str = "cpu"
) -> dict[str, float]:
    """Time of each way over that of lm-eval's hf, median of the rounds; printed, too."""
    texts = [prompt(row) for row in questions]
    pairs = [(text, f" {letter}") for text in texts for letter in LETTERS]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    same = dict(device=device, dtype=dtype, batch_size=BATCH, attn_implementation="eager")
    hf, ablated, bridge = HFLM(model, **same), AblatedLM(model, **same), load_model(model, device, dtype)
    ablated.set_edit(ablation(load_sae(sae, 7, bridge), FEATURES, -5.0))

    def ours():
        ids, letters = encode_prompts(bridge.tokenizer, texts)
        return score_letters(bridge, ids, letters, [NONE], BATCH)

    ways = {
        "hf": lambda: hf.loglikelihood(requests, disable_tqdm=True),
        "sae-ablated": lambda: ablated.loglikelihood(requests, disable_tqdm=True),
        "our scorer": ours,
    }
    theirs = torch.tensor([value for value, _ in ways["hf"]()]).view(-1, 4)
    worst = (theirs - ways["our scorer"]()[0]).abs().max().item()
    ways["sae-ablated"]()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = now(device)
            way()
            seconds[name].append(now(device) - start)
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["hf"])] for name in ways}
    print(f"{title}, {len(questions)} questions; log-probabilities of hf and our scorer differ by {worst:.1e} at most")
    for name in ways:
        each = sorted(ratios[name])
        print(f"  {name:12}{statistics.median(seconds[name]):7.2f} s, {statistics.median(each):.3f} of hf "
              f"({each[0]:.3f} to {each[-1]:.3f}), {1 / statistics.median(each):.2f} times as fast")  # fmt: skip
    return {name: statistics.median(each) for name, each in ratios.items()}


def questions(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"tiny/data/{name}.jsonl").open()]


if __name__ == "__main__":
    for quiz in ("wmdp_bio", "mmlu"):
        compare(f"tiny, {quiz}, float32", str(ROOT / "tiny/model"), str(ROOT / "tiny/sae/layer_7"), questions(quiz),
                "float32")  # fmt: skip
    for vocabulary in (49_152, 256_000):
        with tempfile.TemporaryDirectory() as folder:
            write_smollm_shape(Path(folder), vocabulary)
            for quiz, dtype in (("wmdp_bio", "float32"), ("wmdp_bio", "bfloat16"), ("mmlu", "float32")):
                title = f"random model of SmolLM2-135M's shape, vocabulary {vocabulary:,}, {quiz}, {dtype}"
                compare(title, f"{folder}/model", f"{folder}/sae", questions(quiz)[:64], dtype, rounds=3)
