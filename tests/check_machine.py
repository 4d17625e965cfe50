"""
What a machine makes of all this: every script in small on a random model of gemma-2-2b-it's true shape with an SAE of
16k features, in bfloat16, nothing downloaded. By hand, on any machine:

    python tests/check_machine.py                     # on the GPU, where there is one; 5 GB of disk
    python tests/check_machine.py --device cuda:1
    python tests/check_machine.py --shape small       # a small model: a few minutes on two CPU cores

Printed, and written to one JSON report: time and peak memory of every script, on prompts of up to 900 tokens, of
lm-eval also in vLLM where it is installed; whether tiny gives in float32 what it gives on the CPU; what other batches
change in bfloat16; the ratios of the benches. Exit code 1 where a script failed or tiny answered otherwise. What it
says of a card belongs into docs/real_models.md.
"""

import argparse
import gc
import json
import os
import platform
import random
import runpy
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import bench_lm_eval
import bench_patched
import bench_sweep
import psutil
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from common import load_model, load_sae, usable_device
from data import Dataset, encode_prompts, first_line, prompt, ran_out
from edits import NONE, ablation, patched, reconstruction
from evaluation import rounding_noise, score_letters, score_words
from runs import peak_gb

TINY, LAYER = bench_patched.ROOT / "tiny", 7
HEADS = dict(num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192)
SHAPES = {  # shape of the model; features of the SAE; questions of a quiz; tokens of the longest
    "gemma-2-2b-it": (
        dict(hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, head_dim=256, query_pre_attn_scalar=256,
             vocab_size=256_000, sliding_window=4096, **HEADS), 16_384, 64, 900),
    "small": (
        dict(hidden_size=64, intermediate_size=128, num_hidden_layers=10, head_dim=64, query_pre_attn_scalar=64,
             vocab_size=4096, sliding_window=64, **HEADS), 512, 12, 300),
}  # fmt: skip
SOME = ["--no-sanity", "--n-features=50"]
SCRIPTS = {
    "lesson 1": ["feature_ablate_1.py", *SOME],
    "lesson 2": ["feature_ablate_2.py", *SOME],
    "lesson 3": ["feature_ablate_3.py", *SOME],
    "sweep of 24 settings, and controls": ["pareto.py", "--no-sanity", "--pick", "any-ratio"],
    "lm-eval": ["lm_eval_ablated.py", *SOME, "--tasks=tiny_wmdp_bio,tiny_mmlu", "--unablated"],
    "RMU, 5 steps": ["baselines.py", "--method=rmu", "--steps=5", "--setting", "layer=7"],
    "NPO, 8 settings of 5 steps": ["baselines.py", "--no-sanity", "--method=npo", "--steps=5", "--limit=8"],
}
IN_VLLM = ["lm_eval_ablated.py", *SOME, "--engine=vllm", "--tasks=tiny_wmdp_bio,tiny_wmdp_bio_open", "--unablated"]

# ------------------------------------------------------------------------------------ a model, an SAE, questions


def read(folder: Path | str, name: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, f"{name}.jsonl").open(encoding="utf-8")]


def write_data(folder: Path, tokenizer, n: int, longest: int) -> None:
    """Of each quiz n questions, of texts n, in folder: behind so much of Wikitext that prompts have lengths up to
    `longest` tokens."""
    text = "\n".join(row["text"] for row in read(TINY / "data", "wikitext"))
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    folder.mkdir()
    for name in ("wmdp_bio", "mmlu", "mmlu_dev", "wikitext", "openwebtext"):
        rows, rng = read(TINY / "data", name), random.Random(0)
        rows = rows if name == "mmlu_dev" else rng.sample(rows, min(n, len(rows)))
        for place, row in enumerate(rows if name in ("wmdp_bio", "mmlu") else []):
            length = len(tokenizer(prompt(row))["input_ids"])
            more = int((longest - length) * place / (len(rows) - 1)) - 2  # the seam may cost a token
            if more > 0:
                start = rng.randrange(len(words) - more)
                row["question"] = f"{tokenizer.decode(words[start : start + more])} {row['question']}"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_all(folder: Path, shape: str, device: str) -> dict[str, str]:
    """Model, SAE and data in the folder; the flags that name them."""
    config, width, n, longest = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model = Gemma2ForCausalLM._from_config(Gemma2Config(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")
    del model
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder / "model")
    metadata = SAEMetadata(hook_name=f"blocks.{LAYER}.hook_resid_post", model_name="model")
    d_in = config["hidden_size"]
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=width, apply_b_dec_to_input=False, metadata=metadata))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.W_dec.copy_(sae.W_enc.T / sae.W_enc.norm(dim=0)[:, None])
    sae.save_model(folder / "sae")
    lm = load_model(str(folder / "model"), device, "bfloat16")
    sae = load_sae(str(folder / "sae"), LAYER, lm)
    bench_sweep.sparsify(lm, sae)
    sae.cpu().save_model(folder / "sae")
    write_data(folder / "data", lm.tokenizer, n, longest)
    return {"--layer": str(LAYER), **{f"--{name}": str(folder / name) for name in ("model", "sae", "data")}}


# ------------------------------------------------------------------------------------ the scripts


def child(peak: str, script: str, *flags: str) -> None:
    """Run a script as its own command, and leave its peak memory in a file."""
    sys.argv = [script, *flags]
    try:
        runpy.run_path(str(bench_patched.ROOT / script), run_name="__main__")
    finally:
        Path(peak).write_text(json.dumps(peak_gb()))


def run_script(script: str, own: list[str], flags: dict[str, str], folder: Path) -> dict:
    """Time, peak memory in GB, exit code, and the last line of one script, started as a user would."""
    given = {**flags, "--dtype": "bfloat16", "--out": str(folder / "record.json")}
    started, peak = time.perf_counter(), folder / "peak.json"
    peak.write_text("null")  # of a script that is killed
    command = [sys.executable, __file__, "child", str(peak), script, *own, *(f"{k}={v}" for k, v in given.items())]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment)
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    found = {"seconds": round(time.perf_counter() - started, 1), "peak_gb": json.loads(peak.read_text()),
             "exit_code": done.returncode}  # fmt: skip
    return found | ({"said": said[-1] if said else "not a word"} if done.returncode else {})


# ------------------------------------------------------------------------------------ the same as on the CPU


def tiny_answers(device: str) -> dict:
    """What tiny says in float32: features picked, letters and words under the lessons' rows, on the CPU."""
    model = load_model("tiny", device)
    sae = load_sae(None, LAYER, model)
    features = bench_sweep.picked(model, sae)
    rows = [NONE, patched(sae, features[:50]), reconstruction(sae), ablation(sae, features[:50]),
            ablation(sae, features[:50], -40.0), ablation(sae, features[50:100], -40.0)]  # fmt: skip
    questions = read(TINY / "data", "wmdp_bio")[:64]
    prompts, letters = encode_prompts(model.tokenizer, [prompt(row) for row in questions])
    letters = score_letters(model, prompts, letters, rows)
    return {"features": features, "letters": letters, "words": score_words(model, questions, rows)}


def difference(one: torch.Tensor, other: torch.Tensor) -> dict:
    """Between two sets of scores, (..., n_questions, 4): how many answers there are, how many differ, and by how
    much a log-probability does at most, in nats."""
    differ = one.argmax(-1) != other.argmax(-1)
    return {"asked": differ.numel(), "answers": int(differ.sum()), "log_probability": (one - other).abs().max().item()}


def same_as_cpu(device: str) -> dict:
    """How far tiny in float32 is from what the CPU gives."""
    here, there = tiny_answers(device), tiny_answers("cpu")
    found = {"features picked that differ": len(set(here["features"]) - set(there["features"]))}
    return found | {name: difference(here[name], there[name]) for name in ("letters", "words")}


def of_batches(flags: dict, device: str) -> dict:
    """In bfloat16, unablated: tiny's questions, and the model's long ones."""
    found = {}
    for name, folder, data in (("tiny", "tiny", TINY / "data"), ("the model", flags["--model"], flags["--data"])):
        model = load_model(folder, device, "bfloat16")
        found[name] = rounding_noise(model, Dataset("wmdp_bio", read(data, "wmdp_bio")[:64]))
    return found


def ratios(flags: dict, device: str, shape: str) -> dict:
    """Those of bench_patched, bench_sweep and bench_lm_eval, on the model."""
    model = load_model(flags["--model"], device, "bfloat16")
    sae = load_sae(flags["--sae"], LAYER, model)
    found = {"patched pass over unpatched": bench_patched.ratio(model, sae, 4, 128)}
    settings = bench_sweep.sweep_settings(sae, bench_sweep.picked(model, sae), -5.0)
    rows = read(flags["--data"], "wmdp_bio")
    rows = rows[: len(rows) // 2]  # the shorter ones
    prompts, letters = encode_prompts(model.tokenizer, [prompt(row) for row in rows])
    sweep, seconds, _, ours = bench_sweep.sweep_times(model, prompts, letters, settings)
    _, limit = bench_sweep.rerun(model, LAYER, prompts, settings)
    each, alone = bench_sweep.seconds(bench_sweep.one_by_one, model, prompts, letters, settings)
    found |= {"sweep of 24 over an unablated pass": sweep, "and over the arithmetic limit": sweep / limit,
              "24 one at a time over the sweep": each / seconds,
              "letters that differ one at a time": difference(ours, alone)["answers"]}  # fmt: skip
    del model, sae
    times = bench_lm_eval.compare(shape, flags["--model"], flags["--sae"], rows, "bfloat16", 3, device)
    return found | {f"{name} over lm-eval's hf": times[name] for name in ("sae-ablated", "our scorer")}


# ------------------------------------------------------------------------------------ the report


def machine(device: str) -> dict:
    """What there is."""
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    on_card = device.startswith("cuda")
    free = (torch.cuda.mem_get_info(device)[0] if on_card else psutil.virtual_memory().available) / 1e9
    return {"device": device, "cards": cards, "mps": torch.backends.mps.is_available(), "cores": os.cpu_count(),
            "free_gb": round(free, 2), "python": platform.python_version(), "torch": torch.__version__,
            "system": platform.platform()}  # fmt: skip


def told(title: str, make) -> dict:
    """What make() finds, printed; where memory runs out that is said, and the rest goes on."""
    print(f"\n{title}")
    try:
        found = make()
    except RuntimeError as error:
        if not ran_out(error):
            raise
        found = {"not measured": f"no memory is left ({first_line(error)})"}
    for name, value in found.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        said = (f"{part} {f'{x:.4g}' if isinstance(x, float) else x}".strip() for part, x in parts)
        print(f"  {name}: {', '.join(said)}", flush=True)
    let_go()
    return found


def let_go() -> None:
    """The scripts are processes of their own: what this one keeps of a GPU, they lack."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check(device: str, shape: str) -> dict:
    report = {"machine": told("machine", lambda: machine(device)), "shape": shape}
    report["tiny"] = told("tiny in float32, against the CPU", lambda: same_as_cpu(device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = write_all(folder, shape, device)
        let_go()
        print(f"\nscripts on a random model, {shape}, bfloat16, prompts of up to {SHAPES[shape][3]} tokens")
        runs = {name: (*SCRIPTS[name], f"--device={device}") for name in SCRIPTS}
        if find_spec("vllm"):
            runs["lm-eval in vLLM, answers written"] = IN_VLLM
        if torch.cuda.device_count() > 1:
            runs["lesson 2 over all GPUs"] = (*SCRIPTS["lesson 2"], "--device-map=balanced")
        report["scripts"] = {}
        for name, (script, *own) in runs.items():
            found = report["scripts"][name] = run_script(script, own, flags, folder)
            print(f"  {name}: {found['seconds']} s, {found['peak_gb']} GB", found.get("said", ""), flush=True)
        report["rounding"] = told("in bfloat16, batches of 16 against batches of 5", lambda: of_batches(flags, device))
        report["ratios"] = told("ratios", lambda: ratios(flags, device, shape))
    return report


def faults(report: dict) -> list[str]:
    """What should not be: a refusal is none where it is memory that lacks."""
    bad = [f"{name}: {found['said']}" for name, found in report["scripts"].items()
           if found["exit_code"] and not (found["exit_code"] == 2 and "no memory" in found["said"])]  # fmt: skip
    return bad + [
        f"tiny: other answers, {name}" for name in ("letters", "words") if report["tiny"].get(name, {}).get("answers")
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
        sys.exit()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="mps" if torch.backends.mps.is_available() else usable_device())
    p.add_argument("--shape", choices=SHAPES, default="gemma-2-2b-it")
    p.add_argument("--out", default="results/check_machine.json")
    args = p.parse_args()
    report = check(args.device, args.shape)
    report["faults"] = faults(report)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nreport: {args.out}", *report["faults"], sep="\n")
    sys.exit(bool(report["faults"]))
