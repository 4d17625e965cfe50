"""
What a sweep of 24 settings costs: in one pass, one after another, and through SAELens's own attached SAE.

    python tests/bench_sweep.py            # about 7 minutes on two cores
    python tests/bench_sweep.py tiny       # about 2 minutes

All four are timed on the same prompts in one run: the stand-ins of WMDP-Bio (where the features fire) and of MMLU
(where they seldom do). u is the share of layers above the hook point. The attached SAE keeps the error term, and a
hook on its latents sets the picked ones, special tokens left out, as users of SAELens would write it.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench_patched import smollm_shape
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

from common import load_model, load_sae
from data import batches, encode_prompts, halves, prompt, special_ids, token_windows
from evaluation import Ablation, OnePass, score_letters
from picking import activation_ratio, firing_rates, largest, residuals

COUNTS = (1, 2, 5, 10, 20, 50, 100, 200)
L0 = 100  # active features per token of the random SAE: what Gemma Scope's canonical SAEs have


def questions(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"tiny/data/{name}.jsonl").open()]


def picked(model, sae) -> list[int]:
    """The features that a sweep on the stand-ins would ablate."""
    tokenizer, wmdp = model.tokenizer, questions("wmdp_bio")
    picking = [wmdp[i] for i in halves(wmdp, 0)[0]]
    windows = [token_windows(tokenizer, [prompt(row) for row in part])[0] for part in (picking, questions("mmlu_dev"))]
    texts = [json.loads(line)["text"] for line in (ROOT / "tiny/data/wikitext.jsonl").open()]
    windows.append(token_windows(tokenizer, texts)[0])
    forget, *retain = (firing_rates(model, sae, part) for part in windows)
    return activation_ratio(forget, largest(retain[::-1])).argsort(descending=True, stable=True)[: max(COUNTS)].tolist()


@torch.inference_mode()
def sparsify(model, sae) -> None:
    """Set the random SAE's threshold so that L0 features are active per token."""
    windows = token_windows(model.tokenizer, [prompt(row) for row in questions("mmlu_dev")[:40]])[0]
    h = torch.cat([chunk for chunk, _ in residuals(model, sae, windows, 16, None)])
    pre = h @ sae.W_enc + sae.b_enc
    sae.threshold.fill_(pre.flatten().kthvalue(pre.numel() - L0 * len(pre)).values)


@torch.inference_mode()
def attached(folder: str, sae, prompts, letters, ablations, batch_size: int = 16) -> torch.Tensor:
    """score_letters as one would write it with SAELens: an attached SAE, a hook on its latents, a run per ablation."""
    model = SAETransformerBridge.boot_transformers(folder, device="cpu")
    model.eval()
    model.add_sae(sae, use_error_term=True)
    special, out = torch.tensor(special_ids(model.tokenizer)), torch.empty(len(ablations), len(prompts), 4)
    for k, ablation in enumerate(ablations):
        features = list(ablation.features)
        for chosen, ids in batches(prompts, batch_size, model.tokenizer, "cpu"):
            ordinary = ~torch.isin(ids, special)[..., None]

            def clamp(acts, hook, features=features, ordinary=ordinary, ablation=ablation):
                some = acts[..., features]
                acts[..., features] = torch.where((some > 0) & ordinary, ablation.clamp, some)
                return acts

            logits = model.run_with_hooks(ids, fwd_hooks=[(model.get_sae_hook_name(sae), clamp)], use_cache=False)
            last = torch.tensor([len(prompts[i]) - 1 for i in chosen])
            out[k, chosen] = logits[torch.arange(len(ids)), last].float().log_softmax(-1)[:, letters]
    model.reset_saes()
    return out


def one_by_one(model, sae, prompts, letters, ablations) -> torch.Tensor:
    return torch.cat([score_letters(model, sae, prompts, letters, [ablation]) for ablation in ablations])


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """Of log-probabilities (n_ablations, n_prompts, 4)."""
    letters, logs = (a.argmax(-1) != b.argmax(-1)).sum(), (a - b).abs().max()
    return f"{letters} letters differ, probabilities by {(a.exp() - b.exp()).abs().max():.1e}, their logs by {logs:.1e}"


def rerun(model, sae, prompts, ablations) -> str:
    """How much there is to run again: edited copies, and their tokens from the first edited one on."""
    run, copies, tokens, whole = OnePass(model, sae, ablations), 0, 0, 0
    for _, ids in batches(prompts, 16, model.tokenizer, model.cfg.device):
        run(ids)
        copies += len(run.edits)
        tokens += sum(ids.shape[1] - start for _, start, *_ in run.edits)
        whole += ids.shape[1] * len(run.edits)
    return f"{copies / len(prompts):.1f} edited copies a prompt, {tokens / max(1, whole):.0%} of their tokens"


def seconds(work, *args) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    result = work(*args)
    return time.perf_counter() - start, result


def bench(model, sae, folder: str, clamp: float, n_prompts: int) -> None:
    features = picked(model, sae)
    settings = [Ablation("x", tuple(features[:n]), c) for n in COUNTS for c in (0.0, clamp / 2, clamp)]
    clean = [Ablation("none")]
    layer = int(sae.hook_point.split(".")[1])
    u = 1 - (layer + 1) / model.cfg.n_layers
    print(f"  {len(settings)} settings, layers above the hook point: u = {u:.2f}, so 1 + 24u = {1 + 24 * u:.1f}")
    for name in ("mmlu", "wmdp_bio"):
        rows = questions(name)
        rows = [rows[i] for i in halves(rows, 0)[1]]
        asked = rows[1 :: max(1, len(rows) // n_prompts)][:n_prompts]
        prompts, letters = encode_prompts(model.tokenizer, [prompt(row) for row in asked])
        score_letters(model, sae, prompts[:16], letters, settings[-1:])  # warm
        before, _ = seconds(score_letters, model, sae, prompts, letters, clean)
        sweep, ours = seconds(score_letters, model, sae, prompts, letters, settings)
        each, single = seconds(one_by_one, model, sae, prompts, letters, settings)
        after, _ = seconds(score_letters, model, sae, prompts, letters, clean)
        theirs_time, theirs = seconds(attached, folder, sae, prompts, letters, settings)
        one = (before + after) / 2
        print(f"  {name}, {len(prompts)} prompts: one unablated pass {one:.2f} s")
        print(f"    24 settings in one pass       {sweep:7.2f} s = {sweep / one:5.2f} unablated passes; "
              f"{rerun(model, sae, prompts, settings)}")  # fmt: skip
        print(f"    24 settings one after another {each:7.2f} s = {each / sweep:5.2f} times the sweep")
        print(f"    through the attached SAE      {theirs_time:7.2f} s = {theirs_time / sweep:5.2f} times the sweep")
        for way, other in (("one after another", single), ("the attached SAE", theirs)):
            print(f"    against {way}: {difference(ours, other)}")


if __name__ == "__main__":
    print("tiny, layer 7")
    tiny = load_model("tiny", "cpu")
    bench(tiny, load_sae(None, 7, tiny), str(ROOT / "tiny/model"), -80.0, 96)
    if sys.argv[1:] != ["tiny"]:
        print("random model of SmolLM2-135M's shape, SAE of 16,384 features at layer 7")
        with tempfile.TemporaryDirectory() as folder:
            model, sae = smollm_shape(Path(folder))
            sparsify(model, sae)
            bench(model, sae, str(Path(folder) / "model"), -5.0, 16)
