"""With nothing ablated our letters and log-probabilities are lm-eval's own."""

import json
from pathlib import Path

import lm_eval
import pytest
import yaml
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from common import load_model, load_sae
from data import LETTERS, encode_prompts, prompt
from evaluation import Ablation, score_letters

TINY = Path(__file__).resolve().parent.parent / "tiny"
TEMPLATES = Path(lm_eval.__file__).parent / "tasks/mmlu/default"


def template(subject: str) -> dict:
    config = yaml.safe_load((TEMPLATES / "_default_template_yaml").read_text())
    keys = ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target")
    about = subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return {**{key: config[key] for key in keys}, "description": header, "num_fewshot": 0}


def lm_eval_scores(model: HFLM, rows: list[dict], subject: str, folder: Path) -> list[list[float]]:
    """(n, 4) log-likelihoods of the letters, by lm-eval's task and model classes."""
    path = folder / f"{subject}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    task = ConfigurableTask(config={"task": f"local_{subject}", **source, **template(subject)})
    task.build_all_requests(limit=None, rank=0, world_size=1)
    requests = task.instances
    assert requests[0].args[0] == prompt(rows[0])
    values = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
    return [values[start : start + 4] for start in range(0, len(values), 4)]


@pytest.mark.parametrize("device", ["cpu"])
def test_letters_and_log_probabilities_are_lm_evals(tmp_path, monkeypatch, device):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [json.loads(line) for line in (TINY / "data/mmlu.jsonl").open()]
    subjects = sorted({row["subject"] for row in rows})
    asked = [row for subject in subjects for row in rows if row["subject"] == subject][:200:2]
    assert len(asked) == 100
    theirs_model = HFLM(str(TINY / "model"), device=device, dtype="float32", batch_size=8, attn_implementation="eager")
    theirs = []
    for subject in subjects:
        some = [row for row in asked if row["subject"] == subject]
        if some:
            theirs += lm_eval_scores(theirs_model, some, subject, tmp_path)
    model = load_model("tiny", device)
    sae = load_sae(None, 7, model)
    rows, letters = encode_prompts(model.tokenizer, [prompt(row) for row in asked])
    ours = score_letters(model, sae, rows, letters, [Ablation("none")])[0]
    for mine, other in zip(ours.tolist(), theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
        assert LETTERS[mine.index(max(mine))] == LETTERS[other.index(max(other))]
