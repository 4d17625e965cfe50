"""
What a sweep of 24 settings costs: in one pass, one after another, and through SAELens's own attached SAE.

    python tests/bench_sweep.py            # about 7 minutes on two cores
    python tests/bench_sweep.py tiny       # about 2 minutes
    python tests/bench_sweep.py profile    # and where the sweep's time goes, operator by operator

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
from bench_patched import now, smollm_shape
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch.profiler import ProfilerActivity, profile

from common import activation_ratio, firing_rates, largest, load_model, load_sae
from data import batches, encode_prompts, half_of, prompt, special_ids, token_windows
from edits import NONE, ablation, iter_residual_stream, layer_of
from engine import OnePass
from evaluation import score_letters

COUNTS = (1, 2, 5, 10, 20, 50, 100, 200)
L0 = 100  # active features per token of the random SAE: what Gemma Scope's canonical SAEs have


def questions(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"tiny/data/{name}.jsonl").open()]


def picked(model, sae) -> list[int]:
    """The features that a sweep on the stand-ins would ablate."""
    tokenizer, wmdp = model.tokenizer, questions("wmdp_bio")
    picking = [row for row in wmdp if half_of(row, 0) == "tuning"]
    windows = [token_windows(tokenizer, [prompt(row) for row in part])[0] for part in (picking, questions("mmlu_dev"))]
    texts = [json.loads(line)["text"] for line in (ROOT / "tiny/data/wikitext.jsonl").open()]
    windows.append(token_windows(tokenizer, texts)[0])
    forget, *retain = (firing_rates(model, sae, part) for part in windows)
    return activation_ratio(forget, largest(retain[::-1])).argsort(descending=True, stable=True)[: max(COUNTS)].tolist()


@torch.inference_mode()
def sparsify(model, sae) -> None:
    """Set the random SAE's threshold so that L0 features are active per token."""
    windows = token_windows(model.tokenizer, [prompt(row) for row in questions("mmlu_dev")[:40]])[0]
    h = torch.cat([chunk for chunk, _ in iter_residual_stream(model, layer_of(sae), windows, 16)])
    pre = h.to(sae.W_enc.dtype) @ sae.W_enc + sae.b_enc
    sae.threshold.fill_(pre.flatten().kthvalue(pre.numel() - L0 * len(pre)).values)


@torch.inference_mode()
def attached(folder: str, sae, prompts, letters, edits, batch_size: int = 16) -> torch.Tensor:
    """score_letters as one would write it with SAELens: an attached SAE, a hook on its latents, a run per edit."""
    model = SAETransformerBridge.boot_transformers(folder, device="cpu")
    model.eval()
    model.add_sae(sae, use_error_term=True)
    special, out = torch.tensor(special_ids(model.tokenizer)), torch.empty(len(edits), len(prompts), 4)
    for k, edit in enumerate(edits):
        features, value = edit.settings["features"], edit.settings["clamp"]
        for chosen, ids in batches(prompts, batch_size, model.tokenizer, "cpu"):
            ordinary = ~torch.isin(ids, special)[..., None]

            def clamp(acts, hook, features=features, ordinary=ordinary, value=value):
                some = acts[..., features]
                acts[..., features] = torch.where((some > 0) & ordinary, value, some)
                return acts

            logits = model.run_with_hooks(ids, fwd_hooks=[(model.get_sae_hook_name(sae), clamp)], use_cache=False)
            last = torch.tensor([len(prompts[i]) - 1 for i in chosen])
            out[k, chosen] = logits[torch.arange(len(ids)), last].float().log_softmax(-1)[:, letters]
    model.reset_saes()
    return out


def one_by_one(model, prompts, letters, edits) -> torch.Tensor:
    return torch.cat([score_letters(model, prompts, letters, [edit]) for edit in edits])


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """Of log-probabilities (n_ablations, n_prompts, 4)."""
    letters, logs = (a.argmax(-1) != b.argmax(-1)).sum(), (a - b).abs().max()
    return f"{letters} letters differ, probabilities by {(a.exp() - b.exp()).abs().max():.1e}, their logs by {logs:.1e}"


def rerun(model, layer: int, prompts, edits) -> tuple[str, float]:
    """How much there is to run again: edited copies, and their tokens from the first edited one on; and the arithmetic
    limit of a sweep in unablated passes, 1 + copies x share of their tokens x share of layers above the hook point."""
    engine, copies, again, ran = OnePass(model, edits), 0, 0, 0
    for _, ids in batches(prompts, 16, model.tokenizer, model.cfg.device):
        engine.run(ids)
        first = engine.stages[0][0].ids.shape[1] if len(engine.stages) > 1 else 0  # tokens that are run for one row
        ran += first + len(ids) * (ids.shape[1] - first)
        planned = [copy for group in engine.plan() for copy in group]
        copies += len(planned)
        again += sum(ids.shape[1] - copy.start for copy in planned)
    limit = 1 + again / ran * (1 - (layer + 1) / model.cfg.n_layers)
    return f"{copies / len(prompts):.1f} edited copies a prompt, {again / ran:.1f} times the tokens", limit


def seconds(work, model, *args) -> tuple[float, torch.Tensor]:
    start = now(model.cfg.device)
    result = work(model, *args)
    return now(model.cfg.device) - start, result


def sweep_settings(sae, features: list[int], clamp: float) -> list:
    """24 of them."""
    return [ablation(sae, features[:n], c) for n in COUNTS for c in (0.0, clamp / 2, clamp)]


def sweep_times(model, prompts, letters, settings) -> tuple:
    """The sweep in unablated passes before and after it, median of three, the seconds of both; and its answers."""
    score_letters(model, prompts[:16], letters, settings[-1:])  # warm
    times = []
    for _ in range(3):
        one, _ = seconds(score_letters, model, prompts, letters, [NONE])
        sweep, ours = seconds(score_letters, model, prompts, letters, settings)
        after, _ = seconds(score_letters, model, prompts, letters, [NONE])
        times.append((sweep / ((one + after) / 2), sweep, (one + after) / 2))
    return *sorted(times)[1], ours


def bench(model, sae, folder: str, clamp: float, n_prompts: int) -> None:
    settings = sweep_settings(sae, picked(model, sae), clamp)
    layer = layer_of(sae)
    u = 1 - (layer + 1) / model.cfg.n_layers
    print(f"  {len(settings)} settings, layers above the hook point: u = {u:.2f}, so 1 + 24u = {1 + 24 * u:.1f}")
    for name in ("mmlu", "wmdp_bio"):
        rows = questions(name)
        rows = [row for row in rows if half_of(row, 0) == "held-out"]
        asked = rows[1 :: max(1, len(rows) // n_prompts)][:n_prompts]
        prompts, letters = encode_prompts(model.tokenizer, [prompt(row) for row in asked])
        ratio, sweep, one, ours = sweep_times(model, prompts, letters, settings)
        each, single = seconds(one_by_one, model, prompts, letters, settings)
        start = time.perf_counter()
        theirs = attached(folder, sae, prompts, letters, settings)
        theirs_time = time.perf_counter() - start
        what, limit = rerun(model, layer, prompts, settings)
        print(f"  {name}, {len(prompts)} prompts: one unablated pass {one:.2f} s; {what}")
        print(f"    24 settings in one pass       {sweep:7.2f} s = {ratio:5.2f} unablated passes (median of 3); the "
              f"arithmetic limit is {limit:.2f}, so {ratio / limit:.2f} times it")  # fmt: skip
        print(f"    24 settings one after another {each:7.2f} s = {each / sweep:5.2f} times the sweep")
        print(f"    through the attached SAE      {theirs_time:7.2f} s = {theirs_time / sweep:5.2f} times the sweep")
        for way, other in (("one after another", single), ("the attached SAE", theirs)):
            print(f"    against {way}: {difference(ours, other)}")
        if "profile" in sys.argv:
            with profile(activities=[ProfilerActivity.CPU]) as watched:
                score_letters(model, prompts, letters, settings)
            print(watched.key_averages().table(sort_by="self_cpu_time_total", row_limit=15))


if __name__ == "__main__":
    print("tiny, layer 7")
    tiny = load_model("tiny", "cpu")
    bench(tiny, load_sae(None, 7, tiny), str(ROOT / "tiny/model"), -80.0, 96)
    if "tiny" not in sys.argv:
        print("random model of SmolLM2-135M's shape, SAE of 16,384 features at layer 7")
        with tempfile.TemporaryDirectory() as folder:
            model, sae = smollm_shape(Path(folder))
            sparsify(model, sae)
            bench(model, sae, str(Path(folder) / "model"), -5.0, 16)
