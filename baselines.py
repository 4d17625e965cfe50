# %% [markdown]
"""
Tune every method on one half of the quizzes, and say what its chosen setting is worth on the other half.

    python baselines.py --method npo
    python baselines.py --method dsg --layer 5
    python baselines.py --method rmu --setting layer=7 multiple=4 alpha=300
    python baselines.py --all                     # every method, and all their frontiers on one figure

Edits, which work while the model runs (edits.py): zero-ablation, clamp, measured-clamp, random-features,
conditional-clamp, refusal-clamp, mean-ablation, dsg, diff-in-means.

Training that unlearns (unlearning.py): gradient-ascent, grad-diff, npo, simnpo, npo-sam, mudman, circuit-breakers,
crisp, undo, repselect, repselect-hard, rmu, adaptive-rmu. The trained model is saved as a folder that every script
loads with --model.

Each method is tuned with eight settings. The tuning half chooses the one of lowest WMDP-Bio accuracy that keeps 99% of
MMLU. Training is on that half's questions: a method that takes far more of them than of the held-out half unlearned
questions, not facts. Finished settings are kept: after a stop the same command goes on from there. --all runs each
method as a process of its own, so that time and memory are its own, and skips those whose record is there.

--setting tries one setting in place of the eight, in the grid's names and numbers: `clamp` is a multiple of --clamp,
`threshold` of the features' mean activation, `refusal` of --refusal-value, `lr` of the method's learning rate (--lr),
`multiple` of a residual norm; all else is absolute. What is left out is as usual for the method and model. --layer is
the SAE's and the direction's; the layer that RMU steers is one of its settings.
"""

# %% Flags come first, so that --help answers at once
from runs import finite_float, help_before_imports, main, natural_int, parser, positive_int, settings

flags = parser(__doc__, quiz=True, without=("--n-features", "--device-map"))
flags.add_argument("--method", default="clamp", help="one of those above (default: %(default)s)")
flags.add_argument("--setting", nargs="+", metavar="NAME=NUMBER", help="one setting in place of the method's grid")
flags.add_argument("--all", action="store_true", help="every method in turn, then the figure and a table of costs")
flags.add_argument("--steps", type=positive_int, help="of training (default: each method's own)")
flags.add_argument("--lr", type=finite_float, help="rate that the grid's multiply (default: each method's own)")
flags.add_argument("--loss-on", default="answer", choices=["answer", "text"], help="part of a question with a loss")
flags.add_argument("--refusal-latent", type=natural_int, help="for refusal-clamp: one active when the model declines")
flags.add_argument("--refusal-value", type=finite_float, default=-500.0, help="its value (default: %(default)g)")
help_before_imports(flags, __name__)

# %%
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from tqdm import tqdm

import edits
import hub
import show
import unlearning
from common import as_bridge, load_hf, load_model, load_retrained, load_sae
from data import HERE, Benchmark, UserError, by_layer, load_benchmark, n_processes, picking_windows
from edits import NONE, Edit, Method, label
from evaluation import FeatureStats, best_row, joined, on_benchmark, robust_only
from runs import FREE, Run, benchmark_options, forget_title, peak_gb, read_record, write_whole


def tunable() -> dict[str, Method]:
    """The methods, by name, that there are now and that have settings to choose from."""
    return {name: method for name, method in {**edits.METHODS, **unlearning.METHODS}.items() if method.grid}


def grid_of(method: Method, args) -> list[dict]:
    """The settings to try: of training as `train` takes them, of edits as the grid has them. Raises UserError where a
    name in --setting is none of the method's, and where one is missing."""
    grid, usual = list(method.grid), {*method.usual, *(("lr", "steps") if method.train else ())}
    if args.setting:
        try:
            grid = [{name: json.loads(value) for name, value in (part.split("=") for part in args.setting)}]
        except ValueError as error:
            raise UserError(f"--setting {' '.join(args.setting)}: give NAME=NUMBER, as in n_features=20") from error
        known, said = {*method.grid[0]} | usual, {*grid[0]}
        for problem, names in (("has no", said - known), ("needs", known - usual - said)):
            if names:
                raise UserError(f"--setting: {method.title} {problem} {', '.join(names)}: {', '.join(sorted(known))}")
    if args.features:  # of which there may be fewer than the grid has
        most = len(by_layer(args.features, args.layer).get(args.layer, ()))
        grid = [{**one, "n_features": min(one["n_features"], most)} if "n_features" in one else one for one in grid]
        grid = [setting for k, setting in enumerate(grid) if setting not in grid[:k]]
    if not method.train:
        return grid
    said = {"loss_on": args.loss_on} if "loss_on" in method.usual else {}
    if "layers" in method.usual and (args.sae or args.model not in unlearning.CRISP_LAYERS):
        said["layers"] = [args.layer]  # an SAE of the user's is of one layer
    return [unlearning.settings_of(method, said | setting, args.model, args.steps, args.lr) for setting in grid]


def prepare(model, benchmark: Benchmark, saes: dict, args) -> unlearning.Training:
    """What methods are made from, none of it measured yet. saes: by layer."""
    tokenizer, forget = model.tokenizer, benchmark.corpus if benchmark.corpus.rows else benchmark.wmdp.tuning
    picking = picking_windows(tokenizer, benchmark.forget, benchmark.retain, args.context)
    stats = cache(lambda layer: FeatureStats(
        model, saes.get(layer), layer, *picking, rule=args.pick, own=args.features, questions=benchmark.wmdp.tuning,
        utility=benchmark.mmlu.tuning, style=args.prompt, seed=args.seed, batch_size=args.batch_size,
        insist=not args.no_sanity, clamp=args.clamp or hub.preset(args.model).clamp,
        refusal_latent=args.refusal_latent, refusal_value=args.refusal_value))  # fmt: skip
    windows = unlearning.training_windows(tokenizer, forget, benchmark.wikitext, benchmark.mmlu_dev)
    return unlearning.Training(lambda: load_hf(args.model, args.device, args.dtype)[0], tokenizer, *windows, picking,
                               stats, args.model, args.seed)  # fmt: skip


# %% The run
def tune(model, method: Method, grid: list[dict], saes: dict, benchmark, args, cached) -> tuple[dict, list]:
    """({row: Edit} of the grid; Measures of the unablated model, of these rows and of the retrained model, if any)."""
    training = prepare(model, benchmark, saes, args)
    scored = partial(on_benchmark, benchmark=benchmark, style=args.prompt, batch_size=args.batch_size)
    made = [Edit(args.method, setting) if method.train else
            edits.from_grid(args.method, setting, training.stats(args.layer)) for setting in grid]  # fmt: skip
    rows = {label(args.method, edit.settings) or method.title: edit for edit in made}
    parts = [scored(model, rows={"unablated": NONE, **({} if method.train else rows)}, cached=cached)]
    for name in tqdm(rows if method.train else (), desc="settings", unit="setting", leave=False):
        train = partial(method.train, training, **rows[name].settings)
        parts += [cached(name, lambda: scored(as_bridge(train()[0], model.tokenizer, args.model), rows={name: NONE}))]  # noqa: B023
    if twin := load_retrained(args.model, benchmark.wmdp, args.device, args.dtype):
        parts += [cached(show.RETRAINED, lambda: scored(twin, rows={show.RETRAINED: NONE}))]
    return rows, [joined(same) for same in zip(*parts)]


def run(**changes) -> dict:
    """run(method="npo"): any flag by name. Returns the record that it writes; raises UserError."""
    args, methods = settings(flags, changes), tunable()
    if n_processes() > 1:
        raise UserError("baselines.py is one process: start it without accelerate launch")
    if args.all:
        return run_all(args, methods)
    if args.method not in methods:
        raise UserError(f"--method {args.method}: there are {', '.join(methods)}")
    method = methods[args.method]
    grid = grid_of(method, args)
    model = load_model(args.model, args.device, args.dtype, edit_special=args.edit_special)
    if not 0 <= args.layer < model.cfg.n_layers:
        raise UserError(f"--layer {args.layer}: the model has layers 0 to {model.cfg.n_layers - 1}")
    layers = sorted({layer for setting in grid for layer in setting.get("layers", [args.layer])})
    saes = {layer: load_sae(args.sae, layer, model, args.model) for layer in layers if method.needs_sae}
    benchmark = load_benchmark(args.model, model.tokenizer, **benchmark_options(vars(args)))
    if args.robust:
        narrowed = {name: robust_only(model, quiz, style=args.prompt, batch_size=args.batch_size)
                    for name, quiz in benchmark.quizzes.items()}  # fmt: skip
        benchmark = replace(benchmark, quizzes=narrowed)
    job = Run("baselines.py", args, benchmark.datasets, saes.values(), also=grid)
    rows, measures = tune(model, method, grid, saes, benchmark, args, job.cached)
    right = {measure.name: measure for measure in measures if measure.name.endswith(("/letters", "/cloze"))}
    chosen = best_row(*(of.select(["unablated", *rows]).scores() for name, of in right.items() if "/tuning/" in name))
    show.table([*right.values(), measures[-1]], title=f"{method.title}, all settings, on both halves")
    held_out = [measure for measure in measures if "/tuning/" not in measure.name]
    shown = [row for row in measures[0].rows if row == chosen or row not in rows]
    show.table(held_out, shown, title=f"chosen on the tuning half: {chosen}")
    if benchmark.wmdp.published:
        print(f"\n{benchmark.wmdp.published}")
    started, training = time.time(), prepare(model, benchmark, saes, args)  # without what tuning has measured
    more, figures = {"chosen": chosen, "grid": grid}, {}
    if method.train:
        hf, log = method.train(training, **rows[chosen].settings)
        folder = job.path.with_suffix(".model")
        more |= {"log": log, "log_names": list(method.log)}
        try:
            write_whole(folder, lambda to: [part.save_pretrained(to) for part in (hf, model.tokenizer)])
            more["folder"] = folder.name
        except UserError as error:  # a full disk: the record says what was measured
            print(f"note: {error}; the trained model is lost", file=sys.stderr)
        figures["losses"] = lambda: show.curves(dict(zip(method.log, zip(*log))), f"{method.title}, {chosen}")
    else:
        edits.from_grid(args.method, grid[list(rows).index(chosen)], training.stats(args.layer))
    more |= {"seconds_to_make": round(time.time() - started, 2), "peak_gb": peak_gb()}
    rows |= {"unablated": NONE, show.RETRAINED: Edit("retrained")}
    return job.write({row: rows[row] for row in measures[0].rows}, measures, figures, **more)


# %% All methods: a process and a record for each, then one figure and one table
def is_there(path: Path, method: str, grid: list[dict], job: Run) -> bool:
    """Is the file a record of the method and grid with the job's settings, of the same model, SAEs and data?"""
    try:
        record = read_record(path)
    except UserError:
        return False

    def decides(settings, grid, data, identity):
        settings = json.loads(json.dumps({name: value for name, value in settings.items() if name not in FREE}))
        return settings, grid, {name: part["sha256"] for name, part in data.items()}, identity["model"]

    then = decides(record["settings"], record.get("grid"), record["data"], record["identity"])
    saes = [(HERE / sae["source"], sae["source"], sae["identity"]) for sae in record["saes"]]
    same = all(hub.identity(str(at) if at.is_dir() else source) == known for at, source, known in saes)
    return same and then == decides({**job.settings, "method": method}, grid, job.about(), job.identity)


def run_all(args, methods: dict) -> dict:
    """Tune every method; returns {"records": paths}."""
    if args.setting:
        raise UserError("--setting is of one method: leave out --all")
    job, given = Run("baselines.py", args, load_benchmark(args.model, **benchmark_options(vars(args))).datasets), []
    for name, value in vars(args).items():
        if name not in ("all", "method", "out") and value != flags.get_default(name):
            value = json.dumps(value) if isinstance(value, dict) else value
            given += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    names = [name for name in methods if name != "refusal-clamp" or args.refusal_latent is not None]
    paths = {name: job.path.with_name(f"{job.path.stem}_{name}.json") for name in names}
    for name, path in tqdm(paths.items(), desc="methods", unit="method"):
        if is_there(path, name, grid_of(methods[name], args), job):
            print(f"there already: {path}")
        else:
            call("baselines.py", "--method", name, *given, "--out", path)
    call("pareto.py", "--model", args.model, "--plot", *paths.values(), "--out", job.path)
    table = cost_table([read_record(path) for path in paths.values()], methods)
    path = job.path.with_name(f"{job.path.stem}_costs.md")
    write_whole(path, lambda file: file.write_text(table + "\n", encoding="utf-8"))
    print(f"\n{table}\ntable: {path}")
    return {"records": list(map(str, paths.values()))}


def call(script: str, *given) -> None:
    """Run another script of this folder. Raises UserError where it fails; it has said why."""
    given = list(map(str, given))
    print(f"\n$ python {' '.join([script, *given])}", flush=True)
    if code := subprocess.run([sys.executable, str(HERE / script), *given]).returncode:
        raise UserError(f"{script} ended with exit code {code}, see above; what was finished is kept")


def cost_table(records: list[dict], methods: dict) -> str:
    """Markdown: each method's chosen setting, its scores, and what it costs to make."""
    columns = {f"{forget_title(*records)} %, tuning": "wmdp_bio/tuning/letters", "held-out": "wmdp_bio/letters",
               "in words": "wmdp_bio/words", "P(a letter)": "wmdp_bio/P(a letter)", "MMLU %, held-out": "mmlu/letters",
               "loss added": "openwebtext/loss"}  # fmt: skip
    lines = []
    for record in records:
        row, cells = record["rows"][record["chosen"]], []
        for name in columns.values():
            name = name if name in row["scores"] else name.replace("/letters", "/cloze")
            if score := row["scores"].get(name):  # a cloze has no P(a letter)
                value, form = (score["change"], "+") if name == "openwebtext/loss" else (score["mean"], "")
            cells.append(show.number(value, record["measures"][name]["unit"], form) if score else "")
        cells += ["" if record[name] is None else f"{record[name]:.2f}" for name in ("seconds_to_make", "peak_gb")]
        lines.append([methods[row["method"]].title, record["chosen"], *cells])
    return show.markdown(["method", "chosen on the tuning half", *columns, "s to make", "peak GB"], lines)


# %%
if __name__ == "__main__":
    main(run, flags)
