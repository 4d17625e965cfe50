# %% [markdown]
"""
What feature ablation competes with: other edits at inference time, and training that unlearns; one function a method.

    python baselines.py --method npo
    python baselines.py --method dsg --layer 5
    python baselines.py --all                     # every method, RMU too, and all their frontiers on one figure
    python baselines.py --all --relearn 100       # and then: does what was forgotten come back?

Each method is tuned with the same number of settings, eight. The tuning half of the quizzes chooses one of them, the
lowest on WMDP-Bio that keeps 99% of MMLU; the reporting half says what it is worth. Finished settings are kept as they
are finished: the same command, given again after a stop, goes on from there. A trained model is saved as a folder that
the lessons, pareto.py and lm-eval load with --model. --all starts every method as a process of its own, so that its
time and memory are its own, and leaves out those whose record is there already. --layer is the SAE's and the
direction's; RMU steers the layer of its own setting (rmu.py).

Training on next-token losses lies on the answers, as in open-unlearning, or with --loss-on text on whole questions. The
tuning half's questions are those that are trained on: where a method scores far better on them than on the reporting
half, it unlearnt questions, not what they ask for.

The edits are in edits.py, the training is in unlearning.py. ELM (arXiv 2410.02760) is not here: it needs a model that
answers differently as a novice and as an expert, and tiny does not (docs/methods.md); on real models use its authors'
code, and --model with the folder it saves.
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. Flags come first: --help need not wait for other imports.

# %%
from flags import BY_FEATURES, GRIDS, PUSH, answered, command_line, grid, latent_flags, parser, settings

# Eight settings a method, as flags.py has them for edits; learning rates are multiples of the model's. The ranges lie
# between doing nothing and losing MMLU, by the tuning half alone: in a hundred trial runs on a tiny of 12 layers (rates
# over a factor of 64, 3 to 240 steps, alpha 1 to 1,000, beta 0.02 to 1, gamma 0.125 to 1, delta 0 to 4; of CRISP k 10
# to 100, alpha 0.01 to 0.3, pull 1 to 30), and in 19 on today's, after which NPO and GradDiff had lower rates. The
# releases' own are among them: alpha 1 and beta 0.1; gamma 0.125 and delta 0; alpha 0.01 and pull 5 (30 in CRISP's
# paper, with k 30). Those of the last four come of 4 to 6 trial runs each: gamma 2.25 (here alpha) and rho 0.1;
# step 0.1 and retaining rate 1e-3; retain 1; alpha 0.25 and beta 0.1 are their releases'
TRAINED = {
    "gradient-ascent": grid(lr=(1, 1.5, 2, 3), steps=(10, 20)),
    "grad-diff": grid(lr=(0.125, 0.25, 0.5, 1), alpha=(1, 1000)),
    "npo": grid(lr=(0.25, 0.5), alpha=(1, 30), beta=(0.1, 1)),
    "simnpo": grid(lr=(0.7, 1, 1.4, 2), gamma=(0.125, 0.25)),
    "crisp": grid(lr=(0.5, 1), k=(30,), alpha=(0.01, 0.1), pull=(5, 30)),
    "npo-sam": grid(lr=(0.5, 1, 1.4, 2), alpha=(2.25, 30), beta=(1,), rho=(0.1,)),
    "mudman": grid(lr=(1, 2, 4, 8), retain=(1e-3, 1e-2)),
    "circuit-breakers": grid(lr=(0.5, 0.7, 1, 1.4), retain=(0.3, 1)),
    "undo": grid(lr=(0.25, 1), alpha=(0.05, 0.1, 0.25, 0.5), beta=(0.1,)),
}
# Steps, and the learning rate that a grid's `lr` multiplies, on tiny, whose thin matrices need more, and elsewhere.
# 1e-5: open-unlearning's; 4e-5: the CRISP paper's on Gemma-2-2B; below them the releases' own
OTHERS = (120, 4e-4), (120, 1e-5)
TRAINING = {
    "crisp": ((60, 1.6e-2), (60, 4e-5)),
    "npo-sam": ((60, 4e-4), (125, 1e-5)),
    "mudman": ((60, 0.1), (100, 0.1)),
    "circuit-breakers": ((40, 1.6e-2), (150, 1e-4)),
    "undo": ((60, 8e-4), (3000, 2e-5)),
}
BESIDE = {"npo-sam": 4, "undo": 4, "mudman": 8}  # bytes a weight: perturbed; the teacher; adversary and running mean
TAUGHT = {"lr": 1, "k": 30, "alpha": 0.1, "pull": 5}  # what UNDO starts from: CRISP, with what it chose on tiny
flags = parser(__doc__, quiz=True, without=("--n-features", "--device-map"))
flags.add_argument("--method", choices=[*GRIDS, *TRAINED], default="clamp", help="(default: %(default)s)")
flags.add_argument("--all", action="store_true", help="every method in turn, RMU too, then the figure and a table")
flags.add_argument("--steps", type=int, help="of training (default: each method's own)")
flags.add_argument("--lr", type=float, help="learning rate that the grid multiplies (default: each method's own)")
flags.add_argument("--loss-on", default="answer", choices=["answer", "text"], help="of objectives on next-token "
                   "losses: of questions on the answer only, as in open-unlearning, or on all their text; a forget "
                   "corpus and Wikitext have no answers and count whole (default: %(default)s)")  # fmt: skip
flags.add_argument("--relearn", type=int, metavar="STEPS", help="then run robustness.py on what came out")
flags.add_argument("--push", metavar="ORG/NAME", help=PUSH)
latent_flags(flags)
answered(flags, __name__)

# %%
import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import memory
import pieces
import processes
import publish
import records
import show
from common import load_hf, load_model, load_sae
from data import HERE, UserError, load_benchmark
from edits import NEVER_KNEW, NONE, layer_of
from engine import check_engine
from evaluation import answers, answers_of_never_knew, best_setting, keep_robust, scores_of
from hub import identity, identity_of_never_knew, model_source, sae_source
from methods import Measured, edit_for, kept, measure
from training import reach, training_windows
from unlearning import (
    LOSSES,
    RANKS,
    adapted_layers,
    by_circuit_breakers,
    by_crisp,
    by_mudman,
    by_nll,
    by_undo,
    lora_matrices,
)

NLL_LOG = ("forget text, nats per token", "retain text, nats per token")  # what logs hold
LOGS = {
    "crisp": ("active features on forget text, L_unl", "squared distance of retain text, L_ret"),
    "circuit-breakers": ("forget text: cosine to what it was", "retain text: distance from what it was"),
    "undo": ("forget text, forward KL per token", "retain text, forward KL per token"),
}
# Where CRISP reads features; Gemma-2's are the paper's. Elsewhere: --layer
CRISP_LAYERS = {"tiny": (3, 5, 7, 9), "gemma-2-2b-it": (4, 6, 8, 10, 12, 14)}

# %% [markdown]
# ## CRISP reads SAEs of several layers


# %%
def crisp_layers(s) -> tuple[int, ...]:
    """Those whose SAEs CRISP reads."""
    return (s.layer,) if s.sae else CRISP_LAYERS.get(s.model, (s.layer,))


@kept
def read_by_crisp(m: Measured) -> tuple[dict, dict]:
    """SAEs, and (forget, retain) rates, by the layer whose output they read."""
    loaded = [load_sae(m.s.sae, layer, m.lm, m.s.model) for layer in crisp_layers(m.s)]
    saes = {layer_of(sae): sae for sae in loaded}
    return saes, {layer: replace(m, sae=sae, sanity={}).rates for layer, sae in saes.items()}


# %% [markdown]
# ## The run


# %%
def by_lora(train, setting: dict, texts: dict, measured: Measured, *rest) -> tuple:
    """What `train`, which takes token ids alone, makes of the model, and its log."""
    s, tokenizer = measured.s, measured.lm.tokenizer
    forget, retain = training_windows(tokenizer, texts, s)
    forget, *retain = [[ids for ids, _ in part] for part in (forget, *retain)]
    return train(setting, load_hf(s.model, s.device, s.dtype)[0], tokenizer, forget, retain, s.seed, *rest)


@kept
def taught(measured: Measured):
    """The model that UNDO starts from, trained once a run."""
    s = argparse.Namespace(**{**vars(measured.s), "steps": None, "lr": None})
    return by_lora(by_crisp, absolute("crisp", TAUGHT, s), load_benchmark(s)[0], measured, *read_by_crisp(measured))[0]


def forgetful(method: str, setting: dict, folder: Path, texts: dict, measured: Measured, s) -> list:
    """Load the model, train it, save it to the folder; the log of training."""
    tokenizer = measured.lm.tokenizer
    if method == "crisp":
        model, log = by_lora(by_crisp, setting, texts, measured, *read_by_crisp(measured))
    elif method == "circuit-breakers":
        model, log = by_lora(by_circuit_breakers, setting, texts, measured)
    else:
        model = taught(measured) if method == "undo" else load_hf(s.model, s.device, s.dtype)[0]
        windows = training_windows(tokenizer, texts, s, setting.get("loss_on", "text"))
        if method == "undo":
            model, log = by_undo(setting, model, tokenizer, *windows, s.seed)
        elif method == "mudman":
            log = by_mudman(setting, model, tokenizer, *windows, s.seed)
        else:
            log = by_nll(method, setting, model, tokenizer, *windows, s.seed)
    records.save_model(model, tokenizer, folder)
    return log


def absolute(method: str, one: dict, s) -> dict:
    """A training setting of the grid with its learning rate, its number of steps, and where its loss lies."""
    steps, rate = TRAINING.get(method, OTHERS)[s.model != "tiny"]
    where = {"loss_on": s.loss_on} if method in LOSSES or method == "mudman" else {}
    return {"steps": s.steps or steps, **one, "lr": one["lr"] * (s.lr or rate), **where}


def try_edits(method: str, folder: Path, texts: dict, measured: Measured, s) -> list[dict]:
    """The unablated model's answers, then those under each setting of an edit's grid, all in one pass: what it is and
    what the model answers; kept in pieces in the folder."""
    edits = [NONE, *(edit_for(method, one, measured) for one in GRIDS[method])]
    clean, *found = answers(measured.lm, texts, edits, s, pieces.piecewise(measured.lm, folder, s))
    return [clean, *({"point": edit.point(), "answers": one} for edit, one in zip(edits[1:], found))]


def try_training(method: str, one: dict, passing: Path, texts: dict, measured: Measured, s) -> dict:
    """One setting of training, as try_edits has them."""
    setting = absolute(method, one, s)
    forgetful(method, setting, passing, texts, measured, s)
    found = answers(load_model(str(passing), s.device, s.dtype), texts, [NONE], s)[0]
    return {"point": {"method": method, "setting": setting}, "answers": found}


def tune(method: str, folder: Path, texts: dict, measured: Measured, s) -> list[dict]:
    """The unablated model's answers, then what is found for each setting of the grid; kept in pieces in the folder."""
    if method in GRIDS:
        return try_edits(method, folder, texts, measured, s)
    passing, jobs = folder / "tried", {"none": lambda: answers(measured.lm, texts, [NONE], s)[0]}
    for number, one in enumerate(TRAINED[method]):
        jobs[str(number)] = lambda one=one: try_training(method, one, passing, texts, measured, s)
    try:
        return pieces.resumed(folder, jobs)
    finally:
        shutil.rmtree(passing, ignore_errors=True)


def decides(s, method: str) -> list:
    """All that a method's record depends on, besides the data."""
    settled = {name: value for name, value in vars(s).items() if name not in (*records.FREE, "method")}
    layers = crisp_layers(s) if method in ("crisp", "undo") else (s.layer,) if method in BY_FEATURES else ()
    saes = [identity(sae_source(s.sae, layer, s.model)) for layer in layers]
    models = [identity(model_source(s.model)), identity_of_never_knew(s.model)]
    grids = {**GRIDS, **TRAINED}.get(method), *([TAUGHT] if method == "undo" else [])
    return [pieces.FORM, method, settled, *grids, models, saes]


def run(**changes) -> dict:
    """run(method="npo"): any flag by name. Returns the record that it writes; raises UserError."""
    s, started = settings(flags, changes), time.time()
    if processes.count() > 1:
        raise UserError("baselines.py is one process: start it without accelerate launch")
    if s.push and (s.all or s.method not in TRAINED):
        what = "--all trains many models" if s.all else f"{s.method} is an edit, which trains no model"
        raise UserError(f"--push: {what}; it takes one --method of {', '.join(TRAINED)}")
    publish.check_repo(s.push)
    if s.all:
        return run_all(s)
    path = records.outputs(f"baselines_{s.method}.py", s, flags, without=("method",))
    if record := publish.pushed_before(path, s):
        return record
    lm = load_model(s.model, s.device, s.dtype, edit_special=s.edit_special)
    texts, sources = load_benchmark(s, lm.tokenizer)
    keep_robust(lm, texts, sources, s)
    if not 0 <= s.layer < lm.cfg.n_layers:
        raise UserError(f"--layer {s.layer}: the model has layers 0 to {lm.cfg.n_layers - 1}")
    sae = load_sae(s.sae, s.layer, lm, s.model) if s.method in BY_FEATURES else None
    if s.method in (*LOSSES, "mudman", "undo"):
        memory.check_room(s.method, s.model, s.device, s.dtype, BESIDE.get(s.method, 0))
    elif s.method in RANKS:
        layers = reach(crisp_layers(s)) if s.method == "crisp" else adapted_layers(lm.cfg.n_layers)
        memory.check_room(s.method, s.model, s.device, s.dtype,
                          trained=lambda empty: lora_matrices(empty, layers, RANKS[s.method]))  # fmt: skip
    measured = measure(lm, s.layer, sae, texts["forget"], texts["retain"], s.clamp, s)
    check_engine(lm, [measured.place] if s.method in GRIDS else [])
    with pieces.keeping(path, [decides(s, s.method), sources]) as folder:
        clean, *tried = tune(s.method, folder, texts, measured, s)
        floor = answers_of_never_knew(texts, s)
        scores = scores_of([clean, *(one["answers"] for one in tried), *floor], texts, s.seed)
        points = [NONE.point(**scores[0])]
        points += [{**one["point"], "scores": score} for one, score in zip(tried, scores[1:])]
        show.print_tuning(points)
        best = best_setting(points[0], points[1:])
        floor = [NEVER_KNEW.point(**score) for score in scores[len(points) :]]
        points += floor
        print(f"\nchosen on the tuning half: {show.setting_text(best['setting'])}")
        extra, figures = {"chosen": points.index(best), "decides": decides(s, s.method)}, {}
        measured = replace(measured, sanity={})  # without what tuning has measured, and the models that it started from
        seconds, log = make_chosen(extra["chosen"] - 1, best, path.with_suffix(".model"), texts, measured, s)
        if s.method in TRAINED:
            extra |= {"folder": path.with_suffix(".model").name, "log": log}
            title = f"{records.short_name(s.model)}: {s.method}, {show.setting_text(best['setting'])}"
            names = LOGS.get(s.method, NLL_LOG)
            figures["losses"] = lambda: show.curves(dict(zip(names, zip(*log))), title)
        show.print_chosen([points[0], best, *floor], sources)
        saes = [] if sae is None else [sae]
        record = records.make_record("baselines.py", s, saes, sources, {}, points, started)
        if "folder" in extra:
            record["identity"]["folder"] = identity(str(path.with_name(extra["folder"])))
        record |= extra | {"seconds_to_make": round(seconds, 2), "peak_gb": records.peak_gb()}
        records.write_record(path, record, figures)
    publish.push_model(record, path, s.push)
    return record


def make_chosen(number: int, best: dict, folder: Path, texts: dict, measured: Measured, s) -> tuple[float, list | None]:
    """Make the chosen point, of that number in the grid, once more: how many seconds that takes, with all that
    `measured` does not know yet, as which features are picked. A trained model is saved in the folder, and its log
    returned."""
    begun = time.time()
    if s.method in GRIDS:
        edit_for(s.method, GRIDS[s.method][number], measured)
        return time.time() - begun, None
    log = forgetful(s.method, best["setting"], folder, texts, measured, s)
    print(f"trained again and saved: {folder}")
    return time.time() - begun, log


# %% [markdown]
# ## All methods: a process and a record for each, then one figure and one table


# %%
# Not --layer, which is the SAE's: whose residual stream RMU steers is its own setting
RMU_FLAGS = ("model", "data", "limit", "batch_size", "seed", "device", "dtype", "subjects", "pick_on",
             "pick_text", "forget_corpus", "skip_long", "prompt", "robust", "wmdp", "context")  # fmt: skip


def command_of(method: str, out: Path, s) -> list[str]:
    """The command line that tunes one method with the settings that differ from the defaults."""
    known, given = vars(flags.parse_args([])), []
    for name, value in vars(s).items():
        taken = name in RMU_FLAGS if "rmu" in method else name not in ("all", "method", "relearn", "out")
        if taken and value != known[name]:
            given += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    if "rmu" in method:
        script = ["rmu.py", "--sweep", *(["--adaptive"] if method == "adaptive-rmu" else [])]
    else:
        script = ["baselines.py", "--method", method]
    return [sys.executable, str(HERE / script[0]), *script[1:], *given, "--out", str(out)]


def is_there(path: Path, method: str, s, sources: dict) -> bool:
    """Is the file a record of the method with these data and settings?"""
    try:
        record = json.loads(path.read_text())
        same = {name: source["sha256"] for name, source in record["data"].items() if name in sources}
        if same != {name: source["sha256"] for name, source in sources.items()}:
            return False
        if "rmu" in method:  # its other settings are its own
            alike = all(record["settings"][name] == vars(s)[name] for name in RMU_FLAGS if name != "batch_size")
            models = {"model": identity(model_source(s.model)), "never_knew": identity_of_never_knew(s.model)}
            return alike and all(record["identity"][name] == known for name, known in models.items())
        return json.dumps(record["decides"]) == json.dumps(decides(s, method))
    except (OSError, ValueError, KeyError):
        return False


def run_all(s) -> dict:
    """Tune every method; returns {"records": paths}."""
    path = records.outputs("baselines.py", s, flags)
    _, sources = load_benchmark(s)
    methods = [name for name in (*GRIDS, *TRAINED) if name != "refusal-clamp" or s.refusal_latent is not None]
    paths = []
    for method in tqdm([*methods, "rmu", "adaptive-rmu"], desc="methods", unit="method"):
        paths.append(path.with_name(f"{path.stem}_{method}.json"))
        if is_there(paths[-1], method, s, sources):
            print(f"there already: {paths[-1]}")
        else:
            call(command_of(method, paths[-1], s))
    drawn = ["--model", s.model, "--plot", *map(str, paths), "--out", str(path)]
    call([sys.executable, str(HERE / "pareto.py"), *drawn])
    text = cost_table([json.loads(one.read_text()) for one in paths])
    print(f"\n{text}")
    costs = path.with_name(f"{path.stem}_costs.md")
    pieces.write_whole(costs, lambda file: file.write_text(text + "\n"))
    print(f"table: {costs}")
    if s.relearn:
        out = path.with_name(f"{path.stem}_robustness.json")
        given = ["--relearn", str(s.relearn), "--dtype", s.dtype, "--batch-size", str(s.batch_size), "--out", str(out)]
        given += ["--device", s.device] if s.device else []
        call([sys.executable, str(HERE / "robustness.py"), *map(str, paths), *given])
    return {"records": [str(one) for one in paths]}


def call(command: list[str]) -> None:
    """Run another script of this folder; its mistake, already told, is ours."""
    print(f"\n$ python {' '.join([Path(command[1]).name, *command[2:]])}", flush=True)
    code = subprocess.run(command).returncode
    if code == 130:
        raise KeyboardInterrupt("finished methods and settings are kept; the same command goes on from there")
    if code:
        raise UserError(f"{Path(command[1]).name} ended with exit code {code}, see above; what was finished is kept")


RMU_NOTE = """

RMU, first batch's norm: one coefficient, a multiple of that norm, as the released code of Adaptive RMU has it;
RMU's own takes a number. Each token's norm: Adaptive RMU as its paper has it, arXiv 2408.06223."""


def cost_table(tuned: list[dict]) -> str:
    """Markdown: each method's chosen setting, its scores on the reporting half, and what it costs."""
    head = ["method", "chosen on the tuning half", "WMDP-Bio %, tuning", "reporting", "in words", "P(a letter)",
            "MMLU %, reporting", "loss added", "s to make", "peak GB"]  # fmt: skip
    lines = []
    for record in tuned:
        point = record["points"][record["chosen"]]
        score, setting = point["scores"], {k: v for k, v in point["setting"].items() if k not in ("training", "layer")}
        cells = [f"{100 * score[name]['accuracy']:.1f}" for name in ("wmdp_bio_tuning", "wmdp_bio", "mmlu")]
        hidden = show.beside(score["wmdp_bio"])
        sure = f"{hidden['letters_mass']:.2f}" if "letters_mass" in hidden else ""  # cloze questions have no letters
        cells[2:2] = [f"{100 * hidden['in_words']:.1f}", sure]
        cells += [f"{score['openwebtext']['loss_added']:+.3f}", f"{record['seconds_to_make']:.1f}"]
        name = show.method_name(point["method"])
        peak = "" if record["peak_gb"] is None else f"{record['peak_gb']:.2f}"
        lines.append([name, show.setting_text(setting), *cells, peak])
    return show.markdown(head, lines) + RMU_NOTE


# %%
if __name__ == "__main__":
    command_line(run, flags)
