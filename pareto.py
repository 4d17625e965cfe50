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
flags.add_argument("--clamp", type=runs.number(float, "0 or negative", lambda x: x <= 0), nargs="+",
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
from adjustText import adjust_text
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

import edits
import evaluation
import show
import unlearning
from common import load_model, load_retrained, load_sae
from data import UserError, digest_of, load_benchmark, note_once, picking_windows
from evaluation import CHANCE, KEEP, FeatureStats, Score
from hub import preset
from show import RETRAINED

# %% What a method's settings are worth: the frontier, the area under it, the best setting that keeps MMLU
# A method's settings are {row: {name: Score}}, the unablated row first: doing nothing is a setting, too. "mmlu" and
# "wmdp_bio" are the accuracies on the held-out halves, "mmlu/tuning" and "wmdp_bio/tuning" those on the others.
LOSS, HELD_OUT, TUNING = "openwebtext/loss", ("mmlu", "wmdp_bio"), ("mmlu/tuning", "wmdp_bio/tuning")


def accuracies(settings: dict, quizzes: tuple[str, str] = HELD_OUT) -> list[tuple[float, float]]:
    """(MMLU, WMDP-Bio) of each setting; quizzes: HELD_OUT or TUNING."""
    return [tuple(scores[quiz].mean for quiz in quizzes) for scores in settings.values()]


def frontier(costs: list[tuple[float, float]]) -> list[int]:
    """Indices of the pairs that no other beats in one coordinate without losing in the other; lower is better in both.
    Sorted by the first coordinate; of equal pairs the first one counts."""
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
    """For each method the areas, the frontier, and the setting chosen on the tuning half with its scores on both.
    forget: what the forget set is called."""
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
    text = show.markdown(heads, [[cell(head, line.get(head)) for head in heads] for line in lines])
    text += "\n\nAccuracies in %. Frontiers on the held-out half, each setting with its MMLU and "
    text += f"{forget} accuracy:\n\n"
    for line in lines:
        at = [f"{row.removeprefix(line['method'] + ', ')} ({100 * mmlu:.1f}, {100 * wmdp:.1f})"
              for row, mmlu, wmdp in line["frontier"]]  # fmt: skip
        text += f"- {line['method']}: {'; '.join(at)}\n"
    return text


def title_of(method: str) -> str:
    """As tables name a method; of an unknown one the name in the record."""
    return getattr({**unlearning.METHODS, **edits.METHODS}.get(method), "title", method)


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
    """{method: settings} of all records, but for rows that ablate nothing. If a method has rows of several origins, the
    settings are those of one each, and these are part of the name."""
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
LABEL_STEP = 4.0  # points of WMDP-Bio accuracy between two labels on a frontier
FEW = 6  # methods at most whose settings are named on the figure
COLOURS = ["#c0392b", "#1f618d", "0.6", "#7d6608", "#6c3483", "#48c9b0", "#873600", "#2e4053", "#f5b041", "#e377c2",
           "#17becf", "#8fbc5a", "#b03060", "#5d6dde", "#145a32", "#ff6f00", "#4a148c", "#795548", "#000080",
           "#c2185b"]  # fmt: skip
MARKERS = [*"Dos^vPX<>ph*dH8", (4, 1, 0), (3, 1, 0), (6, 1, 0), (8, 1, 0), (5, 0, 180)]
STYLES = [*zip(COLOURS, MARKERS, itertools.cycle(["-", "--", ":", "-."]))]


def interval(score: Score, scale: float = 1, change: bool = False) -> list[float]:
    """[mean, low, high], or those of the change, 0 for the unablated row; without an interval the ends are the mean."""
    mean, *ends = (score.change, score.change_low, score.change_high) if change else (score.mean, score.low, score.high)
    return [scale * (mean if end is None else end) for end in (mean, *ends)] if mean is not None else [0.0] * 3


def label(row: str, method: str) -> str:
    """ "L7 n50 c-80" for "layer 7, n_features 50, clamp -80"."""
    for long, short in ((f"{method}, ", ""), ("layer ", "L"), ("n_features ", "n"), ("clamp ", "c"), (",", "")):
        row = row.replace(long, short)
    return show.plain(row)


def panel(axes, methods: dict[str, dict], styles: dict, cost) -> tuple[list, list]:
    """Draw WMDP-Bio accuracy over cost(scores): mean, low, high. Returns labels, and points they must not cover."""
    labels, places, unablated = [], [], set()
    for method, settings in methods.items():
        colour, marker, line = styles[method]
        xs = np.array([cost(scores) for scores in settings.values()])
        ys = np.array([interval(scores["wmdp_bio"], 100) for scores in settings.values()])
        xerr, yerr = (np.abs(values[1:, 1:] - values[1:, :1]).T for values in (xs, ys))
        axes.errorbar(xs[1:, 0], ys[1:, 0], yerr, xerr, fmt="none", ecolor=colour, elinewidth=0.5, alpha=0.3)
        axes.scatter(xs[1:, 0], ys[1:, 0], 16, colour, marker=marker, label=show.plain(method), linewidths=0, zorder=3)
        sign = -1 if axes.xaxis_inverted() else 1
        best = frontier([(sign * x, y) for x, y in zip(xs[:, 0], ys[:, 0])])
        axes.step(xs[best, 0], ys[best, 0], where="post", color=colour, ls=line, lw=1.2)
        places += [*zip(xs[:, 0], ys[:, 0])]
        unablated.add((xs[0, 0], ys[0, 0]))
        last, rows = ys[0, 0], list(settings)
        for i in best if len(methods) <= FEW else ():
            if last - ys[i, 0] >= LABEL_STEP:
                last = ys[i, 0]
                labels.append(axes.text(xs[i, 0], last, label(rows[i], method), size=7, color=colour, zorder=2.5,
                                        path_effects=[withStroke(linewidth=2, foreground="white")]))  # fmt: skip
    axes.scatter(*zip(*sorted(unablated)), s=70, marker="*", color="0", label="unablated", zorder=4)
    axes.axhline(100 * CHANCE, color="0.4", ls="--", lw=0.8, label="chance")
    axes.set(title="better: down and left", ylim=(0, 103))
    axes.grid(alpha=0.25)
    return labels, places


def pareto_figure(records: list[dict], title: str):
    """Figure: WMDP-Bio accuracy against MMLU accuracy, and against loss added where it was measured."""
    methods = by_method(records)
    with_loss = {method: kept for method, settings in methods.items()
                 if len(kept := {row: scores for row, scores in settings.items() if LOSS in scores}) > 1}  # fmt: skip
    n = 1 + bool(with_loss)
    figure, all_axes = plt.subplots(1, n, figsize=(5.4 * n, 4.8), squeeze=False, layout="constrained")
    first, *rest = all_axes[0]
    # harm grows to the right in both panels; most settings do little, so the scale is finer there
    first.set_xscale("function", functions=(lambda x: -np.sqrt(np.maximum(103 - x, 0)), lambda y: 103 - y * y))
    first.set(xlim=(101, 20), xticks=(100, 98, 95, 90, 80, 60, 40, 25))
    first.axvline(100 * CHANCE, color="0.4", ls="--", lw=0.8)
    floors = {scores_of(record, RETRAINED)["wmdp_bio"].mean for record in records if RETRAINED in record["rows"]}
    measures = [pair for record in records for pair in record["measures"].items() if "/tuning/" not in pair[0]]
    titles = {name.partition("/")[0]: measure["title"].rpartition(", ")[0] for name, measure in measures}
    for axes, (number, floor) in itertools.product(all_axes[0], enumerate(sorted(floors))):
        axes.axhline(100 * floor, color=show.colour(RETRAINED), ls=":", lw=1.2, label=None if number else RETRAINED)
    styles = dict(zip(methods, itertools.cycle(STYLES)))
    labels = [panel(first, methods, styles, lambda scores: interval(scores["mmlu"], 100))]
    for axes in rest:
        axes.set_xscale("symlog", linthresh=0.01)
        labels.append(panel(axes, with_loss, styles, lambda scores: interval(scores[LOSS], change=True)))
        axes.set_xlabel(f"loss added on {titles['openwebtext']}, nats per token")
    first.set(xlabel=f"{titles['mmlu']} accuracy, %", ylabel=f"{titles['wmdp_bio']} accuracy, %")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(f"{show.plain(title)}; lines are frontiers, bars 95% intervals", size=10)
    figure.canvas.draw()  # settles the layout; labels are spread when nothing moves the axes any more
    for axes, (texts, places) in zip(all_axes[0], labels):
        boxes = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(places)]
        if texts:
            adjust_text(texts, objects=boxes, ax=axes, iter_lim=300, force_static=(0.3, 0.5),
                        arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.5})  # fmt: skip
    return figure


# %%
def rows_of(stats: FeatureStats, counts: list[int], clamps: list[float], methods: list[str]) -> dict[str, edits.Edit]:
    """One layer's rows: all settings in the methods' grids, or all counts with all clamps, then of random features."""
    if methods:
        of_grids = [edits.from_grid(name, setting, stats) for name in methods for setting in edits.METHODS[name].grid]
        return {f"{title_of(edit.method)}, layer {stats.layer}, {edits.label(edit.method, edit.settings)}": edit
                for edit in of_grids}  # fmt: skip
    rows, most = {}, max(counts)
    for start, method, ids in (("", None, stats.features(most)),
                               ("random features, ", "random-features", stats.control(most, most))):  # fmt: skip
        for n, clamp in itertools.product(counts, clamps):
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
    benchmark = load_benchmark(
        args.model, model.tokenizer, folder=args.data, corpus=args.forget_corpus, variant=args.wmdp, seed=args.seed,
        subjects=args.subjects, pick_on=args.pick_on, pick_text=args.pick_text, limit=args.limit,
        skip_long=args.skip_long, style=args.prompt, topic=args.topic,
    )  # fmt: skip
    how = {"style": args.prompt, "batch_size": args.batch_size}
    if args.robust:
        robust = {name: evaluation.robust_only(model, quiz, **how) for name, quiz in benchmark.quizzes.items()}
        benchmark = replace(benchmark, quizzes=robust)
    also = [clamps, [known[name].grid for name in methods]]
    job = runs.Run("pareto.py", args, benchmark.datasets, saes.values(), also=also)
    windows = picking_windows(model.tokenizer, benchmark.forget, benchmark.retain, args.context)
    rows = {"unablated": edits.NONE}
    for layer in layers:
        stats = FeatureStats(
            model, saes.get(layer), layer, *windows, rule=args.pick, questions=benchmark.wmdp.tuning, seed=args.seed,
            insist=not args.no_sanity, clamp=clamps[-1], refusal_latent=args.refusal_latent,
            refusal_value=args.refusal_value, **how,
        )  # fmt: skip
        rows |= rows_of(stats, sorted(set(args.n_features)), clamps, methods)
    title = f"{Path(args.model).name}, layer {', '.join(map(str, layers))}: {len(rows) - 1} settings"
    if retrained := load_retrained(args.model, benchmark.wmdp, args.device, args.dtype):
        rows[RETRAINED] = retrained
    measures = []
    for name, quiz in benchmark.quizzes.items():
        measures += job.cached(name, lambda quiz=quiz: evaluation.letters(model, quiz, rows, **how))
        if quiz.name == "wmdp_bio":
            measures += job.cached(f"{name} in words", lambda quiz=quiz: [
                evaluation.words(model, quiz, rows, batch_size=args.batch_size)])  # fmt: skip
    measures += job.cached(LOSS, lambda: [evaluation.loss(model, benchmark.web, rows, batch_size=args.batch_size)])
    record = job.record(rows, measures)
    forget = runs.forget_title(record)
    text = table(lines := summary(by_method([record]), forget), forget)
    print(f"\n{text}")
    if benchmark.wmdp.published:
        print(f"\n{benchmark.wmdp.published}")
    figures = {"frontier": lambda: pareto_figure([record], title)}
    return job.write(rows, measures, figures, table=text, summary=lines)


# %%
if __name__ == "__main__":
    runs.main(run, flags)
