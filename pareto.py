# %% [markdown]
"""
Sweep the number of ablated features and the clamp: how much forgetting is to be had for how much damage?

    python pareto.py
    python pareto.py --layers 3 5 7 9 --clamp 0 -10 -20 -40 -80
    python pareto.py --method clamp dsg diff-in-means --layers 3 5
    python pareto.py --plot results/*.json        # the rows of any records on one figure

Every combination, and as many random features that fire as often on the retain sets, is scored on WMDP-Bio, MMLU and
OpenWebText; with --method, every setting in these methods' grids (edits.METHODS). Features are picked on the tuning
half of WMDP-Bio, settings chosen on the tuning half of both quizzes, and the figure shows the held-out half. A run that
was stopped goes on where it was when its command is given again. What comes out on tiny: docs/results.md.
"""

# %% Flags come first, so that --help answers at once
import runs

flags = runs.parser(__doc__, quiz=True)
flags.add_argument("--layer", "--layers", type=runs.natural_int, nargs="+", default=[7],
                   help="layers whose output the SAEs read (default: 7)")  # fmt: skip
flags.add_argument("--n-features", type=runs.positive_int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100, 200],
                   help="numbers of features (default: 1 2 5 10 20 50 100 200)")  # fmt: skip
flags.add_argument("--clamp", type=runs.finite_float, nargs="+",
                   help="values to set features to (default: 0, half the preset's, and the preset's)")  # fmt: skip
flags.add_argument("--method", nargs="+", metavar="NAME", help="sweep the grids of these methods instead, such as dsg")
flags.add_argument("--refusal-latent", type=runs.natural_int, help="for refusal-clamp: a latent active when declining")
flags.add_argument("--refusal-value", type=runs.finite_float, default=-500.0, help="what it is set to (default: -500)")
flags.add_argument("--plot", nargs="+", metavar="RECORD", help="score nothing: draw the rows of these record files")
runs.help_before_imports(flags, __name__)

# %%
import itertools
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import edits
import evaluation
import show
from common import load_model, load_retrained, load_sae
from data import UserError, digest_of, load_benchmark, note_once, picking_windows
from evaluation import CHANCE, KEEP, FeatureStats, Score
from hub import preset
from show import RETRAINED
from unlearning import title_of

# %% What a method's settings are worth: the frontier, the area under it, the best setting that keeps MMLU
# A method's settings are {row: {name: Score}}, the unablated row first: doing nothing is a setting, too. "mmlu" and
# "wmdp_bio" are the accuracies on the held-out halves, "mmlu/tuning" and "wmdp_bio/tuning" those on the others.
LOSS, HELD_OUT, TUNING = "openwebtext/loss", ("mmlu", "wmdp_bio"), ("mmlu/tuning", "wmdp_bio/tuning")


def accuracies(settings: dict, quizzes: tuple[str, str] = HELD_OUT) -> list[tuple[float, float]]:
    """(MMLU, WMDP-Bio) of each setting; quizzes: HELD_OUT or TUNING."""
    return [tuple(scores[quiz].mean for quiz in quizzes) for scores in settings.values()]


def frontier(costs: list[tuple[float, float]]) -> list[int]:
    """Indices of the pairs, lower being better, that no other beats in one without losing in the other; sorted."""
    lowest, kept = float("inf"), []
    for i in sorted(range(len(costs)), key=lambda i: (*costs[i], i)):
        if costs[i][1] < lowest:
            lowest = costs[i][1]
            kept.append(i)
    return kept


def area(pairs: list[tuple[float, float]]) -> float | None:
    """Area between chance and the frontier: 0 forgets all at no cost, 1 forgets nothing that MMLU does not pay for. For
    each MMLU accuracy from chance to the unablated one, the lowest WMDP-Bio accuracy among the settings that keep as
    much, less chance; the mean over MMLU accuracies as a share of the unablated WMDP-Bio accuracy less chance. pairs:
    from `accuracies`; None if the first, the unablated model's, is no better than chance."""
    top, height = upper, lowest = pairs[0]
    total = 0.0
    for keeps, forgets in [*sorted(pairs, reverse=True), (CHANCE, 0.0)]:
        total += max(0.0, upper - max(keeps, CHANCE)) * max(0.0, lowest - CHANCE)
        upper, lowest = min(upper, max(keeps, CHANCE)), min(lowest, forgets)
    room = (top - CHANCE) * (height - CHANCE)
    return total / room if room > 0 else None


def summary(methods: dict[str, dict], forget: str = "WMDP-Bio") -> list[dict]:
    """For each method the areas, the frontier, and the setting chosen on the tuning half with its scores on both."""
    columns = {f"{forget}, tuning": "wmdp_bio/tuning", f"{forget}, held-out": "wmdp_bio", "in words": "wmdp_bio/words",
               "P(a letter)": "wmdp_bio/P(a letter)", "MMLU, tuning": "mmlu/tuning",
               "MMLU, held-out": "mmlu"}  # fmt: skip
    lines = []
    for method, settings in methods.items():
        pairs, rows, line = accuracies(settings), list(settings), {"method": method, "settings": len(settings) - 1}
        if tuned := all(quiz in scores for scores in settings.values() for quiz in TUNING):
            line["area, tuning half"] = area(accuracies(settings, TUNING))
        line["area, held-out half"] = area(pairs)
        if tuned:
            compared = {"(compared with)": settings[rows[0]], **settings}  # doing nothing may be chosen, too
            retain, forget = ({row: scores[quiz] for row, scores in compared.items()} for quiz in TUNING)
            line[f"chosen to keep {KEEP:.0%} of MMLU"] = chosen = evaluation.best_row(forget, retain)
            scores = settings[chosen]
            line |= {head: scores[name].mean for head, name in columns.items() if name in scores}
        best = frontier([(-mmlu, wmdp) for mmlu, wmdp in pairs])
        lines.append({**line, "frontier": [(rows[i], *pairs[i]) for i in best]})
    return lines


def table(lines: list[dict], forget: str = "WMDP-Bio") -> str:
    """The summary as a Markdown table and a list of frontiers, accuracies in per cent."""

    def cell(head, value):
        if not isinstance(value, float):
            return "" if value is None else str(value)
        return f"{value:.3f}" if "area" in head else f"{value:.2f}" if "P(" in head else f"{100 * value:.1f}"

    heads = [head for head in max(lines, key=len) if head != "frontier"]
    text = show.markdown(heads, [[cell(head, line.get(head)) for head in heads] for line in lines]) + "\n\n"
    text += f"Accuracies in %. Frontiers on the held-out half, each setting with its MMLU and {forget} accuracy:\n\n"
    for line in lines:
        at = [f"{row.removeprefix(line['method'] + ', ')} ({100 * mmlu:.1f}, {100 * wmdp:.1f})"
              for row, mmlu, wmdp in line["frontier"]]  # fmt: skip
        text += f"- {line['method']}: {'; '.join(at)}\n"
    return text


def scores_of(record: dict, row: str) -> dict[str, Score]:
    """{measure: Score} of a record's row, accuracies under the names of the quizzes alone."""
    return {measure.removesuffix("/letters").removesuffix("/cloze"): Score(**{"low": None, "high": None, **score})
            for measure, score in record["rows"][row]["scores"].items()}  # fmt: skip


def origin_of(record: dict) -> tuple[str, ...]:
    """What rows of a method must share: names of model and SAEs, hashes of their content and of the questions asked."""
    content = [record["identity"]["model"], *(sae["identity"] for sae in record["saes"])]
    asked = [[record["data"][quiz][key] for key in ("sha256", "asked")] for quiz in HELD_OUT]
    names = [Path(name).name for name in (record["model"], *(sae["source"] for sae in record["saes"]))]
    return *names, f"content {digest_of(content)[:6]}", f"questions {digest_of(asked)[:6]}"


def by_method(records: list[dict]) -> dict[str, dict]:
    """{method: settings} of all records, but for rows that ablate nothing; one for each of several origins."""
    groups = {}
    for record in records:
        first, *others = record["rows"]
        for row in others:
            if row != RETRAINED and (method := record["rows"][row]["method"]) != "sae-patched":
                origins = groups.setdefault(title_of(method), {})
                settings = origins.setdefault(origin_of(record), {first: scores_of(record, first)})
                settings[f"{row} ({len(settings)})" if row in settings else row] = scores_of(record, row)
    return {f"{method} ({', '.join(origin)})" if len(origins) > 1 else method: settings
            for method, origins in groups.items() for origin, settings in origins.items()}  # fmt: skip


# %%
LABEL_STEP = 7.0  # points of WMDP-Bio accuracy between two labels on a frontier
FEW = 4  # methods at most whose settings are named, and also drawn against the loss


def label(row: str, method: str) -> str:
    """ "L7 n50 c-80" for "layer 7, n_features 50, clamp -80"."""
    for long, short in ((f"{method}, ", ""), ("layer ", "L"), ("n_features ", "n"), ("clamp ", "c"), (",", "")):
        row = row.replace(long, short)
    return show.plain(row)


def panel(axes, method: str, settings: dict[str, tuple], chosen: str | None, named: bool) -> None:
    """Draw a method's settings, {row: (x, y)} of [mean, low, high] each, the unablated row first. Grey is what the
    frontier beats; settings on it have 95% intervals, and names if `named`; the chosen one has a ring."""
    rows, (xs, ys) = list(settings), np.array(list(settings.values())).swapaxes(0, 1)
    left, right = axes.get_xlim()
    best = frontier([(x if left < right else -x, y) for x, y in zip(xs[:, 0], ys[:, 0])])
    axes.fill_between([*xs[best, 0], right], [*ys[best, 0], ys[best[-1], 0]], 103, step="post", color="0.93", zorder=0)
    on = [i for i in best if i]
    xerr, yerr = (np.abs(values[on, 1:] - values[on, :1]).T for values in (xs, ys))
    axes.errorbar(xs[on, 0], ys[on, 0], yerr, xerr, fmt="none", ecolor=show.ABLATED, elinewidth=0.6, alpha=0.5)
    axes.plot(xs[1:, 0], ys[1:, 0], "o", ms=3.5, color=show.ABLATED)
    axes.plot(xs[0, 0], ys[0, 0], "*", ms=8, color="k")
    at = [row == chosen for row in rows]
    axes.plot(xs[at, 0], ys[at, 0], "o", ms=9, mfc="none", color="k")
    last = ys[0, 0]
    for i in on if named else ():
        if last - ys[i, 0] >= LABEL_STEP:
            last, (across, _) = ys[i, 0], (axes.transScale + axes.transLimits).transform((xs[i, 0], ys[i, 0]))
            ha, offset = ("right", -5) if across > 0.5 else ("left", 5)
            axes.annotate(label(rows[i], method), (xs[i, 0], last), (offset, 2 if last > 100 * CHANCE else -9),
                          textcoords="offset points", ha=ha, size=8)  # fmt: skip


def pareto_figure(records: list[dict], title: str):
    """Figure: WMDP-Bio against MMLU accuracy, a panel a method; of FEW also against the loss added, where measured."""
    methods = by_method(records)
    measures = [pair for record in records for pair in record["measures"].items() if "/tuning/" not in pair[0]]
    titles = {name.partition("/")[0]: measure["title"].rpartition(", ")[0] for name, measure in measures}
    floors = {scores_of(record, RETRAINED)["wmdp_bio"].mean for record in records if RETRAINED in record["rows"]}
    lines = sorted([(CHANCE, "chance", "--"), *((floor, RETRAINED, ":") for floor in floors)])
    chosen = {line["method"]: line.get(f"chosen to keep {KEEP:.0%} of MMLU") for line in summary(methods)}
    few, costs = len(methods) <= FEW, {"mmlu": f"{titles['mmlu']} accuracy, %"}
    if few and any(LOSS in scores for settings in methods.values() for scores in settings.values()):
        costs[LOSS] = f"loss added on {titles['openwebtext']}, nats per token (linear up to 0.01, then logarithmic)"
    columns = len(methods) if few else 5
    n = -(-len(methods) // columns) * len(costs)
    figure, all_axes = plt.subplots(n, columns, figsize=(1 + max(6.5, 1.8 * columns), 0.8 + (3 if few else 1.7) * n),
                                    sharey=True, sharex="row", squeeze=False, layout="constrained")  # fmt: skip
    panels = iter(all_axes.flat)
    for cost, said in costs.items():
        scale = 1 if cost == LOSS else 100
        places = {method: {row: (scale * show.ends(scores[cost], cost == LOSS), 100 * show.ends(scores["wmdp_bio"]))
                           for row, scores in settings.items() if cost in scores}
                  for method, settings in methods.items()}  # fmt: skip
        xs, ys = zip(*[(x[0], y[0]) for settings in places.values() for x, y in settings.values()])
        for (method, settings), axes in zip(places.items(), panels):
            axes.set_xscale("symlog", linthresh=0.01) if cost == LOSS else None
            axes.set(xlim=(min(xs) - 0.003, 2 * max(*xs, 0.01)) if cost == LOSS else (102, min(xs) - 4), ylim=(0, 103))
            axes.scatter(xs, ys, s=4, c="0.75", linewidths=0, zorder=1)
            for k, (y, name, style) in enumerate(lines):
                axes.axhline(100 * y, color="0.3", ls=style, lw=0.8, label=name, zorder=1)
                axes.text(0.98, 100 * y, name if axes is all_axes[0][0] else "", ha="right", size=7,
                          va="bottom" if k else "top", transform=axes.get_yaxis_transform())  # fmt: skip
            panel(axes, method, settings, chosen[method], few) if settings else None
            axes.set_title(show.plain(method), size=9)
        if few:
            middle = all_axes[axes.get_subplotspec().rowspan.start][(columns - 1) // 2]
            middle.set_xlabel(said, x=0.5 if columns % 2 else 1.05)
    if not few:  # whose last row may be short
        figure.supxlabel(costs["mmlu"], size=10)
    for axes in panels:
        axes.axis("off")
    figure.supylabel(f"{show.plain(titles['wmdp_bio'])} accuracy, %", size=10)
    said = "ring: chosen on the tuning half; grey: what a setting beats; bars: 95% intervals; star: unablated"
    said += "\nL: layer, n: number of features, c: clamp" * few
    figure.suptitle(f"{show.plain(title)}; better: down and left\n{said}", size=9)
    return figure


# %%
def rows_of(stats: FeatureStats, counts: list[int], clamps: list[float], methods: list[str]) -> dict[str, edits.Edit]:
    """One layer's rows: all settings in the methods' grids, or all counts with all clamps, then of random features."""
    if methods:
        of_grids = [edits.from_grid(name, setting, stats) for name in methods for setting in edits.METHODS[name].grid]
        return {f"{title_of(edit.method)}, layer {stats.layer}, {edits.label(edit.method, edit.settings)}": edit
                for edit in of_grids}  # fmt: skip
    rows, most = {}, len(stats.features(max(counts)))  # of one's own there may be fewer
    for start, method, ids in (("", None, stats.features(most)),
                               ("random features, ", "random-features", stats.control(most, most))):  # fmt: skip
        for n, clamp in itertools.product(sorted({min(n, most) for n in counts}), clamps):
            row = f"{start}layer {stats.layer}, n_features {n}, clamp {clamp:g}"
            rows[row] = edits.ablation(stats.sae, ids[:n], clamp, method=method)
    return rows


def plot(paths: list[str], out: str) -> dict:
    """Draw the rows of record files. Raises UserError if none has both quizzes' held-out scores."""
    records = {path: runs.read_record(path) for path in paths}
    for path, record in list(records.items()):
        if not scores_of(record, next(iter(record["rows"]))).keys() >= set(HELD_OUT):
            note_once(f"note: {path} has no scores of both quizzes, and is left out")
            del records[path]
    if not records:
        raise UserError("none of these records has scores of both quizzes")
    records, names = list(records.values()), [Path(path).stem for path in records]
    if len({origin_of(record)[-1] for record in records}) > 1:
        note_once("note: these records were not scored on the same questions")
    path = Path(out) if out.endswith(".json") else Path(out) / f"pareto_plot_{digest_of(records)[:6]}.json"
    forget, title = runs.forget_title(*records), ", ".join(names) if len(names) <= 3 else f"{len(names)} records"
    text = table(lines := summary(by_method(records), forget), forget)
    print(f"\n{text}")
    runs.write_whole(path.with_suffix(".md"), lambda file: file.write_text(text, encoding="utf-8"))
    print(f"table: {path.with_suffix('.md')}")
    runs.draw_all(path, {"frontier": lambda: pareto_figure(records, title)})
    return {"summary": lines}


def run(**changes) -> dict:
    """run(layer=[3, 7], clamp=[0, -50]): any flag by name. Returns the record that it writes; raises UserError."""
    args = runs.settings(flags, changes)
    if args.plot:
        return plot(args.plot, args.out or "results")
    usual, methods, layers = preset(args.model).clamp, args.method or [], sorted(set(args.layer))
    clamps = sorted(set(args.clamp or (0.0, usual / 2, usual)), reverse=True)
    known = {name: method for name, method in edits.METHODS.items() if method.grid}
    if unknown := set(methods) - set(known):
        raise UserError(f"--method {' '.join(sorted(unknown))}: the methods with a grid are {', '.join(known)}")
    model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
    needed = not methods or any(known[name].needs_sae for name in methods)
    saes = {layer: load_sae(args.sae, layer, model, args.model) for layer in layers if needed}
    benchmark = load_benchmark(args.model, model.tokenizer, **runs.benchmark_options(vars(args)))
    how = {"style": args.prompt, "batch_size": args.batch_size}
    if args.robust:
        robust = {name: evaluation.robust_only(model, quiz, **how) for name, quiz in benchmark.quizzes.items()}
        benchmark = replace(benchmark, quizzes=robust)
    also = [clamps, [known[name].grid for name in methods]]
    job = runs.Run("pareto.py", args, benchmark.datasets, saes.values(), also=also)
    windows = picking_windows(model.tokenizer, benchmark.forget, benchmark.retain, args.context)
    rows = {"unablated": edits.NONE}
    for layer in layers:
        stats = FeatureStats(model, saes.get(layer), layer, *windows, rule=args.pick, own=args.features, seed=args.seed,
                             questions=benchmark.wmdp.tuning, utility=benchmark.mmlu.tuning, insist=not args.no_sanity,
                             clamp=max(clamps, key=abs), refusal_latent=args.refusal_latent,
                             refusal_value=args.refusal_value, **how)  # fmt: skip
        rows |= rows_of(stats, sorted(set(args.n_features)), clamps, methods)
    title = f"{Path(args.model).name}, layer {', '.join(map(str, layers))}: {len(rows) - 1} settings"
    if retrained := load_retrained(args.model, benchmark.wmdp, args.device, args.dtype):
        rows[RETRAINED] = retrained
    measures = evaluation.on_benchmark(model, benchmark, rows, cached=job.cached, **how)
    record = job.record(rows, measures)
    forget = runs.forget_title(record)
    text = table(lines := summary(by_method([record]), forget), forget)
    print(f"\n{text}")
    if benchmark.wmdp.published:
        print(f"\n{benchmark.wmdp.published}")
    return job.write(rows, measures, {"frontier": lambda: pareto_figure([record], title)}, table=text, summary=lines)


# %%
if __name__ == "__main__":
    runs.main(run, flags)
