"""How long feature_importance.py takes to score each feature alone and each left out, against a pass for each.

    python tests/bench_importance.py

Prints seconds for 2 * 100 + 2 edits on all measures, the same for one edit in a pass of its own (the mean of several,
the first left out), and the ratio of a pass for each to what the script does.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import evaluation
from common import NONE, ablation, load_model, load_sae
from edits import applied

N, CLAMP, PASSES = 100, -40.0, 6


def score(model, benchmark, rows: dict) -> float:
    """Seconds that all measures of the rows take."""
    started, (_, bio, _, mmlu) = time.perf_counter(), benchmark.quizzes.values()
    evaluation.letters(model, bio, rows)
    evaluation.words_and_nats(model, bio, rows)
    evaluation.letters(model, mmlu, rows)
    evaluation.loss(model, benchmark.web, rows)
    return time.perf_counter() - started


def main() -> None:
    model = load_model("tiny")
    sae, benchmark = load_sae(None, 7, model), data.load_benchmark("tiny", model.tokenizer)
    windows = data.picking_windows(model.tokenizer, benchmark.forget, benchmark.retain)
    features = evaluation.FeatureStats(model, sae, 7, *windows).features(N)
    alone = {f"{one} alone": ablation(sae, [one], CLAMP) for one in features}
    but = {f"all but {one}": ablation(sae, [i for i in features if i != one], CLAMP) for one in features}
    rows, seconds = {"unablated": NONE, "all": ablation(sae, features, CLAMP)} | alone | but, []
    for name in [*alone, *but][:: 2 * N // PASSES]:
        with applied(model, model.tokenizer, rows[name]):
            seconds.append(score(model, benchmark, {name: NONE}))
    each = sum(seconds[1:]) / len(seconds[1:])
    together = score(model, benchmark, rows)
    print(f"{len(rows)} edits together {together:.1f} s; a pass for each {each:.2f} s each: "
          f"{len(rows) * each / together:.1f} times as long")  # fmt: skip


if __name__ == "__main__":
    main()
