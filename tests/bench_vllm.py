"""
What an edit costs in vLLM, and what vLLM saves: 64 prompts of 32 tokens and 64 new ones each, on a random model of
SmolLM2-135M's shape, in one run, taken in turn. By hand, where vLLM is installed:

    python tests/bench_vllm.py
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
from bench_patched import now, smollm_shape
from vllm import LLM, SamplingParams, TokensPrompt

import vllm_edit
from edits import NONE, ablation, applied

ROUNDS, PROMPTS, NEW = 3, 64, 64


def compare(folder: Path) -> dict[str, float]:
    """Time of each way over that of vLLM with the edit, median of the rounds; printed, too."""
    model, sae = smollm_shape(folder)
    hf, edit = model.original_model, ablation(sae, list(range(0, 500, 10)), -5.0)
    ids = torch.randint(10, 4000, (PROMPTS, 32), generator=torch.Generator().manual_seed(0))
    llm = LLM(str(folder / "model"), dtype="float32", max_model_len=512, **vllm_edit.ENGINE)
    how = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)

    def in_vllm(on):
        llm.collective_rpc("install_edit", args=(vllm_edit.write(on, [sae], model.tokenizer, folder / "edit"),))
        start = now("cpu")
        found = llm.generate([TokensPrompt(prompt_token_ids=row) for row in ids.tolist()], how, use_tqdm=False)
        return now("cpu") - start, [list(answer.outputs[0].token_ids) for answer in found]

    @torch.inference_mode()
    def in_hugging_face():
        start = now("cpu")
        with applied(hf, model.tokenizer, edit):
            found = hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                                min_new_tokens=NEW)  # fmt: skip
        return now("cpu") - start, found[:, ids.shape[1] :].tolist()

    ways = {"vLLM with the edit": lambda: in_vllm(edit), "vLLM without": lambda: in_vllm(NONE),
            "Hugging Face's generate with it": in_hugging_face}  # fmt: skip
    (_, ours), (_, plain), (_, theirs) = (way() for way in ways.values())  # the first of each also warms up
    same = sum(map(list.__eq__, ours, theirs))
    print(f"{same} of {PROMPTS} prompts have the same {NEW} tokens with the edit in both; it changes "
          f"{sum(map(list.__ne__, ours, plain))}")  # fmt: skip
    rounds = [[way()[0] for way in ways.values()] for _ in range(ROUNDS)]
    medians = dict(zip(ways, map(statistics.median, zip(*rounds))))
    ratios = {way: seconds / medians["vLLM with the edit"] for way, seconds in medians.items()}
    for way, seconds in medians.items():
        print(f"  {way}: {seconds:.1f} s, {PROMPTS * NEW / seconds:.0f} tokens/s, ratio {ratios[way]:.2f}")
    return ratios


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder))
