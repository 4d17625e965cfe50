# %% [markdown]
"""
Sweep the number of ablated features and the clamp: how much forgetting is to be had for how much damage?

    python pareto.py
    python pareto.py --layers 3 5 7 9 --clamp 0 -10 -20 -40 -80
    python pareto.py --method clamp dsg diff-in-means --layers 3 5
    python pareto.py --model gemma-2-2b-it --layers 3 7 --clamp 0 -25 -100
    python pareto.py --plot results/*.json        # the points of any records on one figure

Every combination, and as many random features of like firing rate on the retain sets, is scored on WMDP-Bio, MMLU and
OpenWebText in one pass per batch of prompts; with --method every setting of these methods' grids (methods.py) is. One
half of the WMDP-Bio questions is picked on; the tuning half of each quiz chooses a setting, the reporting half says
what it is worth, and the figure shows the latter. Finished pieces are kept as they are finished: the same command,
given again after a stop, goes on from there.

What comes out on tiny, and how long it takes: docs/results.md.
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. Flags come first: --help need not wait for other imports.

# %%
from flags import BY_FEATURES, GRIDS, answered, command_line, latent_flags, parser, settings

COUNTS = [1, 2, 5, 10, 20, 50, 100, 200]
flags = parser(__doc__, quiz=True)
flags.add_argument("--layer", "--layers", type=int, nargs="+", default=[7], help="one or several (default: 7)")
flags.add_argument("--n-features", type=int, nargs="+", default=COUNTS, help="(default: 1 2 5 10 20 50 100 200)")
flags.add_argument("--clamp", type=float, nargs="+", help="0 or negative (default: 0, half the preset's, the preset's)")
flags.add_argument("--method", nargs="+", choices=list(GRIDS), metavar="NAME", help="sweep the grids of these methods "
                   f"instead: {', '.join(GRIDS)}")  # fmt: skip
latent_flags(flags)
flags.add_argument("--plot", nargs="+", metavar="RECORD", help="score nothing: draw the points of these record files")
answered(flags, __name__)

# %%
import hashlib
import itertools
import json
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from adjustText import adjust_text
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

import pieces
import records
import show
from common import load_model, load_sae
from data import UserError, load_benchmark
from edits import NEVER_KNEW, NONE, Edit
from engine import check_engine
from evaluation import CHANCE, KEEP, answers, answers_of_never_knew, best_setting, keep_robust, of_features, scores_of
from hub import identity, model_source
from methods import Measured, edit_for, measure

LABEL_STEP = 4.0  # points of WMDP-Bio accuracy between two labels on a frontier

# %% [markdown]
# ## One list of edits: every layer's, every method's


# %%
def edits_of(m: Measured, s) -> list[Edit]:
    """Of one layer: each method's grid, or every number of features with every clamp, then as many control features
    likewise."""
    if s.method:
        return [edit_for(method, one, m) for method in s.method for one in GRIDS[method]]
    most, rows = max(s.n_features), []
    for method, ids in (("sae-ablation", m.features(most)), ("random-features", m.control(most, most))):
        rows += [of_features(method, m.sae, ids[:n], clamp, layer=m.layer) for n in s.n_features for clamp in s.clamp]
    return rows


# %% [markdown]
# ## What a set of settings is worth: the frontier, the area under it, the best setting that keeps MMLU


# %%
def frontier(costs: list[tuple[float, float]]) -> list[int]:
    """Indices of the pairs that no other beats in one coordinate without losing in the other; lower is better in both.

    Sorted by the first coordinate; of equal pairs the first one counts.
    """
    best, kept = float("inf"), []
    for i in sorted(range(len(costs)), key=lambda i: (*costs[i], i)):
        if costs[i][1] < best:
            best = costs[i][1]
            kept.append(i)
    return kept


def area(points: list[dict], half: str = "") -> float | None:
    """Area between chance and the frontier: 0 forgets all at no cost, 1 forgets nothing that MMLU does not pay for.

    For each MMLU accuracy from chance to the unablated one, the lowest WMDP-Bio accuracy among the settings that keep
    as much, less chance; the mean over MMLU accuracies as a share of the unablated WMDP-Bio accuracy less chance.
    The first of `points` is the unablated model; None where that does no better than chance.
    """
    pairs = [(point["scores"]["mmlu" + half]["accuracy"], point["scores"]["wmdp_bio" + half]["accuracy"])
             for point in points]  # fmt: skip
    top, height = pairs[0]
    total, upper, lowest = 0.0, top, pairs[0][1]
    for keeps, forgets in sorted(pairs, reverse=True):
        total += max(0.0, upper - max(keeps, CHANCE)) * max(0.0, lowest - CHANCE)
        upper, lowest = min(upper, max(keeps, CHANCE)), min(lowest, forgets)
    total += (upper - CHANCE) * max(0.0, lowest - CHANCE)
    room = (top - CHANCE) * (height - CHANCE)
    return total / room if room > 0 else None


def method_of(point: dict) -> str:
    """What a point counts as in table and figure: SAE ablation is two methods, by its clamp."""
    if point["method"] == "sae-ablation":
        return "negative clamp" if point["setting"]["clamp"] < 0 else "zero ablation"
    return show.method_name(point["method"])


def by_method(points: list[dict]) -> dict[str, list[dict]]:
    """Points per method, each list with its record's unablated point (a setting too: doing nothing) in front.

    What was measured on different models, SAEs or data (`origin`) is never one method's: names then say which.
    """
    methods, named = {}, {}
    for point in points:
        if point["method"] not in ("none", "sae-patched", "never-knew"):
            groups = methods.setdefault(method_of(point), {})
            groups.setdefault(point.get("origin", ()), [point["clean"]]).append(point)
    for method, groups in methods.items():
        for origin, group in groups.items():
            named[method + told_apart(origin, list(groups))] = group
    return named


def told_apart(origin: tuple, origins: list[tuple]) -> str:
    """What sets an origin apart from the others: " (tiny, layer_3)", and where names are alike what they stand for."""
    parts = []
    for own, *others in zip(origin, *origins):
        if len(set(others)) > 1:
            name, what = own
            parts.append(name if len({other[0] for other in others}) == len(set(others)) else f"{name} {what[-6:]}")
    return f" ({', '.join(parts)})" if parts else ""


def origin_of(record: dict) -> tuple:
    """(name, what it is) of a record's model, SAE and data; earlier versions' records have no identities."""
    known, sae = record.get("identity", {}), record.get("sae")
    saes = "+".join(Path(one).name for one in ([sae] if isinstance(sae, str) else sae or ["no SAE"]))
    asked = [(source.get("sha256"), source.get("questions"))
             for source in (record["data"].get(name, {}) for name in ("wmdp_bio", "mmlu"))]  # fmt: skip
    data = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    return ((records.short_name(str(record.get("model"))), str(known.get("model", record.get("model")))),
            (saes, str(known.get("sae", sae))), ("data", data))  # fmt: skip


def label(point: dict) -> str:
    """A setting in few letters: "L7 n50 c-80" for layer 7, 50 features, clamp -80."""
    setting = point["setting"]
    if not setting:
        return "unablated"
    parts = [f"L{setting['layer']}"] if "layer" in setting else []
    parts += [f"n{setting['n_features']}"] if "n_features" in setting else []
    parts += [f"c{setting['clamp']:g}"] if setting.get("clamp") else []
    known = ("layer", "n_features", "clamp", "features", "pick")
    return " ".join(parts + [f"{k} {v:g}" for k, v in setting.items() if k not in known and isinstance(v, int | float)])


def summary(points: list[dict]) -> list[dict]:
    """One row per method: area on both halves, the setting chosen on the tuning half and its scores on both."""
    rows = []
    for method, group in by_method(points).items():
        pairs = [tuple(p["scores"][name]["accuracy"] for name in ("mmlu", "wmdp_bio")) for p in group]
        best = frontier([(-mmlu, wmdp) for mmlu, wmdp in pairs])
        row = {"method": method, "settings": len(group) - 1, "area": area(group)}
        row["frontier"] = [{"setting": label(group[i]), "mmlu": pairs[i][0], "wmdp_bio": pairs[i][1]} for i in best]
        if all("mmlu_tuning" in point["scores"] for point in group):
            chosen = best_setting(group[0], group)
            row |= {"area_tuning": area(group, "_tuning"), "chosen": label(chosen)}
            for name in ("wmdp_bio", "mmlu"):
                for half in ("_tuning", ""):
                    row[name + half] = chosen["scores"][name + half]["accuracy"]
            row |= show.beside(chosen["scores"]["wmdp_bio"])
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The summary as a Markdown table and a list of frontiers, accuracies in per cent."""
    head = ["method", "settings", "area, tuning half", "area, reporting half", f"chosen to keep {KEEP:.0%} of MMLU",
            "WMDP-Bio %, tuning", "reporting", "in words", "P(a letter)", "MMLU %, tuning", "reporting"]  # fmt: skip

    def cell(row, key, scale=1.0, digits=3):
        return f"{row[key] * scale:.{digits}f}" if row.get(key) is not None else ""

    lines = []
    for row in rows:
        forget, retain = ([cell(row, name + half, 100, 1) for half in ("_tuning", "")] for name in ("wmdp_bio", "mmlu"))
        forget += [cell(row, "in_words", 100, 1), cell(row, "letters_mass", 1, 2)]
        areas = [cell(row, "area_tuning"), cell(row, "area")]
        lines.append([row["method"], str(row["settings"]), *areas, row.get("chosen", ""), *forget, *retain])
    text = show.markdown(head, lines)
    text += "\n\nFrontiers on the reporting half, each setting with its MMLU and WMDP-Bio accuracy in per cent:\n\n"
    for row in rows:
        at = [f"{p['setting']} ({100 * p['mmlu']:.1f}, {100 * p['wmdp_bio']:.1f})" for p in row["frontier"]]
        text += f"- {row['method']}: {'; '.join(at)}\n"
    return text


# %% [markdown]
# ## Draw

# %%
STYLES = [  # colours of different lightness, so that grey tells them apart too
    ("#c0392b", "D", "-"), ("#1f618d", "o", "--"), ("0.6", "s", ":"), ("#7d6608", "^", "-."), ("#6c3483", "v", "-"),
    ("#48c9b0", "P", "--"), ("#873600", "X", ":"), ("#2e4053", "<", "-."), ("#f5b041", ">", "-"),
    ("#e377c2", "p", "--"), ("#17becf", "h", ":"), ("#8fbc5a", "*", "-."), ("#b03060", "d", "-"),
    ("#5d6dde", "H", "--"), ("#145a32", "8", ":"), ("#ff6f00", (4, 1, 0), "-."), ("#4a148c", (3, 1, 0), "-"),
    ("#795548", (6, 1, 0), "--"), ("#000080", (8, 1, 0), ":"), ("#c2185b", (5, 0, 180), "-."),
]  # fmt: skip
FEW = 6  # methods at most whose settings are named on the figure


def panel(axes, groups: dict, styles: dict, cost) -> tuple[list, list]:
    """WMDP-Bio accuracy over a cost: cost(point) -> (value, low, high). Returns the labels and the points' places."""
    texts, places = [], []  # labels, and the points that they are to keep clear of
    for method, group in groups.items():
        colour, marker, line = styles[method]
        xs = np.array([cost(point) for point in group])
        ys = np.array([[100 * point["scores"]["wmdp_bio"][k] for k in ("accuracy", "low", "high")] for point in group])
        spread = [np.abs(x[:, 1:] - x[:, :1]).T for x in (xs, ys)]
        axes.errorbar(xs[1:, 0], ys[1:, 0], yerr=spread[1][:, 1:], xerr=spread[0][:, 1:], fmt="none", ecolor=colour,
                      elinewidth=0.5, alpha=0.3)  # fmt: skip
        style = {"s": 16, "color": colour, "marker": marker, "linewidths": 0, "zorder": 3}
        axes.scatter(xs[1:, 0], ys[1:, 0], label=show.plain(method), **style)
        sign = -1 if axes.xaxis_inverted() else 1
        best = frontier([(sign * x, y) for x, y in zip(xs[:, 0], ys[:, 0])])
        axes.step(xs[best, 0], ys[best, 0], where="post", color=colour, ls=line, lw=1.2)
        places += [*zip(xs[:, 0], ys[:, 0])]
        labelled = ys[0, 0]
        for i in best if len(groups) <= FEW else ():
            if labelled - ys[i, 0] >= LABEL_STEP:
                labelled = ys[i, 0]
                texts.append(axes.text(xs[i, 0], labelled, label(group[i]), size=7, color=colour, zorder=2.5,
                                       path_effects=[withStroke(linewidth=2, foreground="white")]))  # fmt: skip
    clean = {(cost(group[0])[0], 100 * group[0]["scores"]["wmdp_bio"]["accuracy"]) for group in groups.values()}
    axes.scatter(*zip(*sorted(clean)), s=70, marker="*", color="0", label="unablated", zorder=4)
    axes.axhline(100 * CHANCE, color="0.4", ls="--", lw=0.8, label="chance")
    axes.set(title="better: down and left", ylim=(0, 103))
    axes.grid(alpha=0.25)
    return texts, places


def spread_labels(axes, texts: list, places: list) -> None:
    """Move labels off the points and off each other; call it when nothing moves the axes any more."""
    if texts:
        boxes = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(places)]
        line = {"arrowstyle": "-", "color": "0.6", "lw": 0.5}
        adjust_text(texts, objects=boxes, ax=axes, iter_lim=300, force_static=(0.3, 0.5), arrowprops=line)


def pareto_figure(points: list[dict], titles: list[str], title: str):
    """Figure: forget accuracy against MMLU accuracy, and against loss added where it was measured."""
    with_loss = [p for p in points if "openwebtext" in p["scores"]]
    wide = any(p["method"] != "none" for p in with_loss)
    figure, all_axes = plt.subplots(1, 1 + wide, figsize=(5.4 * (1 + wide), 4.8), squeeze=False, layout="constrained")
    first, *rest = all_axes[0]
    # harm grows to the right in both panels; most settings do little, so the scale is finer there
    first.set_xscale("function", functions=(lambda x: -np.sqrt(np.maximum(103 - x, 0)), lambda y: 103 - y * y))
    first.set(xlim=(101, 20), xticks=(100, 98, 95, 90, 80, 60, 40, 25))

    def mmlu(point):
        return [100 * point["scores"]["mmlu"][key] for key in ("accuracy", "low", "high")]

    def loss(point):
        score = point["scores"]["openwebtext"]
        return show.loss_added(score) if "loss_added" in score else [0.0, 0.0, 0.0]

    styles = dict(zip(by_method(points), itertools.cycle(STYLES)))
    floors = {100 * p["scores"]["wmdp_bio"]["accuracy"] for p in points if p["method"] == "never-knew"}
    for axes in all_axes[0]:
        for number, floor in enumerate(sorted(floors)):
            name = None if number else show.method_name("never-knew")
            axes.axhline(floor, color=show.COLOURS["never-knew"], ls=":", lw=1.2, label=name)
    labels = [panel(first, by_method(points), styles, mmlu)]
    first.axvline(100 * CHANCE, color="0.4", ls="--", lw=0.8)
    first.set(xlabel=f"{titles[1]} accuracy, %", ylabel=f"{titles[0]} accuracy, %")
    for axes in rest:
        axes.set_xscale("symlog", linthresh=0.01)
        labels.append(panel(axes, by_method(with_loss), styles, loss))
        axes.set_xlabel(f"loss added on {titles[2]}, nats per token")
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.suptitle(f"{show.plain(title)}; lines are frontiers, bars 95% intervals", size=10)
    figure.canvas.draw()  # settles the layout
    for axes, (texts, places) in zip(all_axes[0], labels):
        spread_labels(axes, texts, places)
    return figure


# %% [markdown]
# ## The sweep, or the plot of what others have written


# %%
def read_points(path: str) -> tuple[list[dict], dict]:
    """Points of a record that have scores of both quizzes, each with its unablated point; and the record's sources."""
    try:
        record = json.loads(Path(path).read_text())
        points = [point for point in record["points"] if {"wmdp_bio", "mmlu"} <= set(point["scores"])]
        clean = next((point for point in points if point["method"] == "none"), None)
        return [{**point, "clean": clean, "origin": origin_of(record)} for point in points if clean], record["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result record: {error}") from error


def plot(s) -> dict:
    """Draw the points of the records `s.plot`; returns {"points", "summary"}."""
    points, asked, first = [], set(), None
    for path in s.plot:
        found, sources = read_points(path)
        if not found:
            print(f"note: {path} has no scores of both quizzes, and is left out", file=sys.stderr)
            continue
        points, first = points + found, first or sources
        of_quizzes = [sources.get(name, {}) for name in ("wmdp_bio", "mmlu")]
        asked.add(json.dumps([(source.get("sha256"), source.get("questions")) for source in of_quizzes]))
    if not points:
        raise UserError("--plot: none of these records has scores of both quizzes")
    if len(asked) > 1:
        print("note: these records were not scored on the same questions", file=sys.stderr)
    s.layer, s.n_features = "all", "all"
    path = records.outputs("pareto.py", s, flags)
    names = [Path(name).stem for name in s.plot]
    present(path, points, first, ", ".join(names) if len(names) <= 3 else f"{len(names)} records")
    return {"points": points, "summary": summary(points)}


def present(path: Path, points: list[dict], sources: dict, title: str, record: dict | None = None) -> None:
    """Print and write the table, draw the figure, write the record where there is one."""
    rows = summary(points)
    names = ("wmdp_bio", "mmlu", "openwebtext")
    titles = [show.title_of(name, sources) if name in sources else name for name in names]
    print(f"\n{table(rows)}")
    show.print_published({"wmdp_bio": {}} | sources)
    pieces.write_whole(path.with_suffix(".md"), lambda file: file.write_text(table(rows)))
    print(f"table: {path.with_suffix('.md')}")
    records.write_record(path, record, {"frontier": lambda: pareto_figure(points, titles, title)}, ("png", "svg"))


def decides(saes: list, sources: dict, s) -> list:
    """All that scores depend on."""
    settled = {name: value for name, value in vars(s).items() if name not in records.FREE}
    grids = [GRIDS[method] for method in s.method or ()]
    return [identity(model_source(s.model)), [sae.identity for sae in saes], settled, grids, sources]


def run(**changes) -> dict:
    """run(layer=[3, 7], clamp=[0, -50]): any flag by name. Returns the record that it writes; raises UserError."""
    s, started = settings(flags, changes), time.time()
    if s.plot:
        return plot(s)
    s.layer, s.n_features = sorted(set(s.layer)), sorted(set(s.n_features))
    path = records.outputs("pareto.py", s, flags)
    clamps = s.clamp if isinstance(s.clamp, list) else [0.0, s.clamp / 2, s.clamp]
    s.clamp = sorted(set(clamps), reverse=True)
    if bad := [clamp for clamp in s.clamp if clamp > 0]:
        raise UserError(f"--clamp {bad[0]:g}: 0 or negative")
    lm = load_model(s.model, s.device, s.dtype, s.device_map, s.edit_special)
    needed = not s.method or set(s.method) & set(BY_FEATURES)
    saes = [load_sae(s.sae, layer, lm, s.model) for layer in s.layer if needed]
    texts, sources = load_benchmark(s, lm.tokenizer)
    keep_robust(lm, texts, sources, s)
    with pieces.keeping(path, decides(saes, sources, s)) as folder:
        measured = [measure(lm, layer, sae, texts["forget"], texts["retain"], min(s.clamp), s)
                    for layer, sae in zip(s.layer, saes or [None] * len(s.layer))]  # fmt: skip
        check_engine(lm, {one.place for one in measured})
        edits = [NONE, *(edit for one in measured for edit in edits_of(one, s))]
        found = answers(lm, texts, edits, s, pieces.piecewise(lm, folder, s))
        scores = scores_of(found + answers_of_never_knew(texts, s), texts, s.seed)
        points = [edit.point(**score) for edit, score in zip([*edits, NEVER_KNEW], scores)]
        sanity = [one.sanity for one in measured]
        record = records.make_record("pareto.py", s, saes, sources, sanity, points, started)
        with_clean = [{**point, "clean": points[0]} for point in points]
        record["summary"] = summary(with_clean)
        title = f"{records.short_name(s.model)}, layer {', '.join(map(str, s.layer))}: {len(edits) - 1} settings"
        present(path, with_clean, sources, title, record)
    return record


# %%
if __name__ == "__main__":
    command_line(run, flags)
