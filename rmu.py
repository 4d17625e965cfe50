# %% [markdown]
"""
RMU, Representation Misdirection for Unlearning: train a model to forget, save it, and score it as the lessons do.

    python rmu.py
    python rmu.py --adaptive
    python rmu.py --sweep
    python rmu.py --multiple 4 --alpha 300 --layer 3
    python rmu.py --model gemma-2-2b-it

At one layer the residual stream of forget text is pushed to a fixed random direction, that of retain text is held
where it was; only the down-projections of that layer and the two before it are trained (Li et al., arXiv 2403.03218).
How far to push there are two variants:

    RMU                     one coefficient: a multiple of the mean norm of the first batch of forget text. The release
                            of RMU takes a number instead, which does nothing on a model of another scale; that of
                            Adaptive RMU (github.com/RebelsNLU-jaist/llm-unlearning) does this, with multiple 5
    --adaptive              Adaptive RMU by its paper (Dang et al., arXiv 2408.06223): each token by a multiple of its
                            own norm before training

Otherwise as the releases, but for this: they average the loss over BOS and padding too, here only ordinary tokens
count, in the norms as well (BOS has a norm of its own, and stands before retain text alike); they train on two topics
in turn, bio and cyber, each with a control vector, here is one; they take texts once, in their corpus's order, here
as often as the steps need them, each pass in a new random order. The forget set is the picking half of the WMDP-Bio
questions, or --forget-corpus; the retain sets, one a step in turn, are Wikitext and MMLU's development questions. The
trained model is saved as a folder that the lessons, pareto.py and lm-eval load with --model.

--sweep trains with eight settings and chooses one on the tuning half; stopped, it goes on where it was. What comes out
on tiny, and how long it takes: docs/results.md.
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. Flags come first: --help need not wait for other imports.

# %%
from flags import PUSH, answered, command_line, parser, settings

WITHOUT = ("--sae", "--n-features", "--clamp", "--pick", "--no-sanity", "--device-map", "--edit-special")
flags = parser(__doc__, quiz=True, without=WITHOUT)
flags.add_argument("--layer", type=int, help="whose residual stream is steered (default: the model's setting)")
flags.add_argument("--multiple", type=float, help="how far, in norms of forget text (default: the model's setting)")
flags.add_argument("--alpha", type=float, help="weight of the retain loss (default: the model's setting)")
flags.add_argument("--steps", "--max-batches", type=int, help="of training (default: the model's setting)")
flags.add_argument("--lr", type=float, help="learning rate of AdamW (default: the model's setting)")
flags.add_argument("--adaptive", action="store_true", help="Adaptive RMU by its paper: each token by its own norm "
                   "before training, not all by the first batch's mean norm")  # fmt: skip
flags.add_argument("--sweep", action="store_true", help="train with every multiple and alpha of a grid, and choose")
flags.add_argument("--push", metavar="ORG/NAME", help=PUSH)
answered(flags, __name__)

# %%
import random
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import memory
import pieces
import processes
import publish
import records
import show
from common import load_hf, load_model
from data import UserError, load_benchmark, padded, picking_windows
from edits import NEVER_KNEW, NONE, decoder_layers, hidden, watch_tokens
from evaluation import answers, answers_of_never_knew, best_setting, keep_robust, scores_of
from hub import identity, model_source
from training import Master, passes, wide

# What a log holds; the first two are mean squared distances
LOG = ("forget text: to the control vector", "retain sets: to what it was, times alpha", "forget text: cosine to it")
MULTIPLES, ALPHAS = (2.0, 4.0, 8.0, 16.0), (10.0, 30.0)  # of --sweep


@dataclass(frozen=True)
class Setting:
    """layer whose residual stream is steered, multiple of its norm on forget text, weight of the retain loss, steps of
    `batch` forget and `batch` retain texts, learning rate of AdamW."""

    layer: int
    multiple: float
    alpha: float
    steps: int
    lr: float
    batch: int = 4


# zephyr: the CAIS release, c 6.5 over a norm of about 2.8 there. gemma-2-2b-it: c 400 over a norm of about 92, the best
# of AMindToThink/sae_jailbreak_unlearning's runs (WMDP-Bio 64.9 to 30.9; 300 batches of 3). Of zephyr's 150 steps every
# other one was on cyber. tiny: multiple and alpha are --sweep's choice; layer, steps and rate that of 21 trial runs at
# layers 3 to 9, with 100 to 600 steps and rates of 1e-3 to 4e-3; both by the tuning half
SETTINGS = {
    "tiny": Setting(layer=7, multiple=8.0, alpha=10.0, steps=300, lr=4e-3),
    "gemma-2-2b-it": Setting(layer=3, multiple=4.3, alpha=100.0, steps=300, lr=5e-5, batch=3),
    "HuggingFaceH4/zephyr-7b-beta": Setting(layer=7, multiple=2.3, alpha=1200.0, steps=75, lr=5e-5),
}
# What a family calls the matrix by which an MLP writes to the residual stream. By name: the one at place 6 of a block's
# parameters, the release's param_ids, is another matrix in Qwen2, Qwen3, Gemma-3, OLMo2, GPT-2 and GPT-NeoX
DOWN_PROJECTIONS = ("mlp.down_proj.weight", "mlp.c_proj.weight", "mlp.dense_4h_to_h.weight")

# %% [markdown]
# ## The loss, and what it needs


# %%
def rmu_loss(
    forget, target, retain, frozen, forget_mask, retain_mask, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(forget loss, alpha times retain loss): mean squared distance over real tokens and dimensions of the residual
    stream (batch, pos, d_model) to `target`, of the retain text's to `frozen`, what it was before training.

    The release (github.com/centerforaisafety/wmdp) also averages over BOS and padding; masks (batch, pos) leave them
    out here.
    """
    away, back = ((x - y).square()[mask].mean()
                  for x, y, mask in ((forget, target, forget_mask), (retain, frozen, retain_mask)))  # fmt: skip
    return away, alpha * back


def down_projections(model, layer: int) -> dict[str, torch.nn.Parameter]:
    """{name: matrix} of the layer and the two before it. Raises UserError for a family without a known one, and for a
    layer that the model lacks."""
    found, blocks = {}, decoder_layers(model)
    if not 0 <= layer < len(blocks):
        raise UserError(f"--layer {layer}: the model has layers 0 to {len(blocks) - 1}")
    for number in range(max(0, layer - 2), layer + 1):
        for name, matrix in blocks[number].named_parameters():
            if name in DOWN_PROJECTIONS:
                found[f"layer {number} {name}"] = matrix
    if len(found) != layer + 1 - max(0, layer - 2):
        raise UserError(f"{type(model).__name__}: no down-projection known by name in layers {layer - 2} to {layer}")
    return found


@contextmanager
def as_they_were(matrices: dict, originals: dict):
    """Within this context the untrained matrices are in place: a frozen copy of the model at the price of three."""
    trained = {name: matrix.data for name, matrix in matrices.items()}
    try:
        for name, matrix in matrices.items():
            matrix.data = originals[name]
        yield
    finally:
        for name, matrix in matrices.items():
            matrix.data = trained[name]


# %% [markdown]
# ## Training


# %%
def control_vector(d_model: int, seed: int, device) -> torch.Tensor:
    """Uniform on [0, 1) in every dimension, of length 1, as in the release: all its entries are positive."""
    u = torch.rand(d_model, generator=torch.Generator().manual_seed(seed))
    return (u / u.norm()).to(device)


def train(
    model, tokenizer, forget: list, retain_sets: list[list], setting: Setting, adaptive: bool, seed: int
) -> tuple:
    """Train the matrices in place. Returns the log, a row a step: forget loss, weighted retain loss, cosine of forget
    text to the control vector; the control vector; the coefficient; and what was trained. Raises UserError where a loss
    is no number.

    adaptive: each token's target is multiple * its own norm before training * u, the formula of Adaptive RMU's paper;
    else the coefficient is multiple * the mean norm of the first batch, as in its release. Retain sets take turns.
    """
    model.requires_grad_(False)
    matrices = down_projections(model, setting.layer)
    originals = {name: matrix.detach().clone() for name, matrix in matrices.items()}
    for matrix in matrices.values():
        matrix.requires_grad_(True)
    device, rng = next(model.parameters()).device, random.Random(seed)
    u = control_vector(model.config.get_text_config().hidden_size, seed, device)
    away_texts, *back_texts = (passes(texts, setting.batch, rng) for texts in (forget, *retain_sets))
    master, log, coefficient = Master(matrices.values(), setting.lr), [], None
    with watch_tokens(model, tokenizer) as seen:
        for number in tqdm(range(setting.steps), desc="RMU", unit="step", leave=False):
            ids = padded(next(away_texts), tokenizer, device)
            if adaptive or coefficient is None:
                with torch.no_grad(), as_they_were(matrices, originals):
                    norms = wide(hidden(model, ids, setting.layer)).norm(dim=-1, keepdim=True)  # (batch, pos, 1)
            h_forget, forget_mask = hidden(model, ids, setting.layer), seen["ordinary"]
            if coefficient is None:
                coefficient = setting.multiple * norms[forget_mask].mean().item()
            ids = padded(next(back_texts[number % len(back_texts)]), tokenizer, device)
            with torch.no_grad(), as_they_were(matrices, originals):
                frozen = hidden(model, ids, setting.layer)
            h_retain = hidden(model, ids, setting.layer)
            target = (setting.multiple * norms if adaptive else coefficient) * u.to(norms.dtype)
            target = target.expand_as(h_forget)
            states = (wide(h_forget), target, wide(h_retain), wide(frozen))  # bfloat16 would round the squares
            away, back = rmu_loss(*states, forget_mask, seen["ordinary"], setting.alpha)
            master.step(away + back)
            cosine = torch.cosine_similarity(wide(h_forget.detach()), u, dim=-1)[forget_mask].mean()
            log.append([away.item(), back.item(), cosine.item()])
    return log, u, coefficient, list(matrices)


# %% [markdown]
# ## The run


# %%
def points_of(tried: list[Setting], scores: list[dict], s) -> list[dict]:
    """The record's points: the untrained model's, a point for each setting, that of a model that never knew."""
    points = [NONE.point(**scores[0])]
    for one, score in zip(tried, scores[1:]):
        rest = asdict(one)
        setting = {name: rest.pop(name) for name in ("layer", "multiple", "alpha")} | {"training": rest}
        points.append({"method": "adaptive-rmu" if s.adaptive else "rmu", "setting": setting, "scores": score})
    return points + [NEVER_KNEW.point(**score) for score in scores[1 + len(tried) :]]


def setting_of(s) -> Setting:
    """The model's setting, with what flags change. Raises UserError for a layer that the model lacks."""
    known = SETTINGS.get(s.model, SETTINGS["gemma-2-2b-it"])
    given = {name: vars(s)[name] for name in ("layer", "multiple", "alpha", "steps", "lr")}
    return replace(known, **{name: value for name, value in given.items() if value is not None})


def forgetful(setting: Setting, folder: Path, texts: dict, s) -> tuple:
    """Load the model, train it, save it to the folder; what `train` returns."""
    model, tokenizer = load_hf(s.model, s.device, s.dtype)
    forget, retain = picking_windows(tokenizer, texts["forget"], texts["retain"], s)
    result = train(model, tokenizer, forget, retain, setting, s.adaptive, s.seed)
    records.save_model(model, tokenizer, folder)
    return result


def scored(folder: Path, texts: dict, s) -> dict:
    """What the model in the folder answers."""
    return answers(load_model(str(folder), s.device, s.dtype), texts, [NONE], s)[0]


def sweep(setting: Setting, folder: Path, texts: dict, s) -> tuple[list[Setting], list[dict]]:
    """Every multiple with every alpha: the settings and what the models trained with them answer, kept in pieces."""
    tried = [replace(setting, multiple=m, alpha=a) for m in MULTIPLES for a in ALPHAS]
    passing = folder / "tried"

    def make(one):
        forgetful(one, passing, texts, s)
        return scored(passing, texts, s)

    try:
        jobs = {f"m{one.multiple:g}_a{one.alpha:g}": lambda one=one: make(one) for one in tried}
        return tried, pieces.resumed(folder, jobs)
    finally:
        shutil.rmtree(passing, ignore_errors=True)


def decides(setting: Setting, sources: dict, s) -> list:
    """All that a sweep depends on."""
    settled = {name: value for name, value in vars(s).items() if name not in (*records.FREE, "multiple", "alpha")}
    return [settled, asdict(setting), sources, identity(model_source(s.model))]


def run(**changes) -> dict:
    """run(multiple=6, alpha=100.0): any flag by name. Returns the record that it writes; raises UserError."""
    s, started = settings(flags, changes), time.time()
    if processes.count() > 1:
        raise UserError("RMU is trained by one process: start rmu.py without accelerate launch")
    publish.check_repo(s.push)
    setting = setting_of(s)
    s.layer = setting.layer
    path = records.outputs("rmu.py", s, flags)
    if record := publish.pushed_before(path, s):
        return record
    lm = load_model(s.model, s.device, s.dtype)
    memory.check_room("RMU", s.model, s.device, s.dtype, trained=lambda empty: down_projections(empty, setting.layer))
    texts, sources = load_benchmark(s, lm.tokenizer)
    keep_robust(lm, texts, sources, s)
    clean, floor = answers(lm, texts, [NONE], s)[0], answers_of_never_knew(texts, s)
    del lm
    tried, folder = [setting], path.with_suffix(".model")
    with pieces.keeping(path, decides(setting, sources, s)) as kept:
        if s.sweep:
            tried, found = sweep(setting, kept, texts, s)
            points = points_of(tried, scores_of([clean, *found, *floor], texts, s.seed), s)
            show.print_tuning(points[: 1 + len(tried)])
            setting = tried[points.index(best_setting(points[0], points[1 : 1 + len(tried)])) - 1]
            print(f"chosen: multiple {setting.multiple:g}, alpha {setting.alpha:g}, which is trained again and saved")
        begun = time.time()
        log, u, coefficient, matrices = forgetful(setting, folder, texts, s)
        seconds = time.time() - begun
        print(f"trained: {', '.join(matrices)}\ncoefficient: {coefficient:.1f}, {setting.multiple:g} times the norm")
        if not s.sweep:
            points = points_of(tried, scores_of([clean, scored(folder, texts, s), *floor], texts, s.seed), s)
        chosen = 1 + tried.index(setting)
        show.print_chosen([points[0], points[chosen], *points[1 + len(tried) :]], sources)
        record = records.make_record("rmu.py", s, [], sources, {}, points, started)
        print(f"model: {folder}")
        record["identity"]["folder"] = identity(str(folder))
        record |= {"chosen": chosen, "folder": folder.name, "matrices": matrices, "coefficient": coefficient}
        record |= {
            "seconds_to_make": round(seconds, 2),
            "peak_gb": records.peak_gb(),
            "control_vector": u.tolist(),
            "log": log,
        }
        how = f"layer {setting.layer}, {setting.multiple:g} norms, alpha {setting.alpha:g}"
        title = f"{records.short_name(s.model)}: {points[chosen]['method']}, {how}"
        records.write_record(path, record, {"losses": lambda: show.curves(dict(zip(LOG, zip(*log))), title, LOG[:2])})
    publish.push_model(record, path, s.push)
    return record


# %%
if __name__ == "__main__":
    command_line(run, flags)
