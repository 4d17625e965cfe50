"""Tables and figures: of Measures, features, tokens and training. Figures are returned; tables are printed."""

import itertools
import json
import re
import sys
from contextlib import suppress
from html import escape
from urllib.parse import quote

import matplotlib.pyplot as plt
import numpy as np
import torch
from adjustText import adjust_text
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure

from common import Rates, activation_ratio
from data import UserError, batches, note_once, special_ids, total_of_processes
from edits import Latents, iter_residual_stream, layer_of, logit_lens, residual_stream

try:  # `!python` in a notebook inherits its MPLBACKEND, which this environment may lack
    plt.switch_backend(plt.get_backend())
except ImportError:
    plt.switch_backend("agg")

RETRAINED = "retrained without the facts"  # the row of the model that was trained without the forget set
ABLATED = "#c0392b"
COLOURS = {"unablated": "0.2", RETRAINED: "#1e8449", "SAE patched": "0.45", "SAE reconstruction": "0.65",
           "random": "#2471a3"}  # by the beginning of a row's name; of all other rows ABLATED  # fmt: skip
TABLE_WIDTH = 150  # characters of a line; columns that do not fit are printed below
TOKENS_WIDTH = 88  # characters of a line of token_figure
ARROWS = {ord("\n"): "\u21b5", ord("\t"): "\u2192"}  # how it draws a line's end and a tab
ON_A_PAGE = 50  # features whose Neuronpedia page has an address of at most 8000 characters: many servers take no more


def plain(text: str) -> str:
    """The text, escaped for a figure: matplotlib would take what stands between two $ for mathematics."""
    return text.replace("$", r"\$")


def draws_of(rows) -> dict[str, list[str]]:
    """{name: rows}: draws of a control share one: "random features 2, clamp -40" and "random features, clamp -40"."""
    draws = {}
    for row in rows:
        draws.setdefault(re.sub(r"^(random(?: features)?) \d+", r"\1", row), []).append(row)
    return draws


def number(value: float, unit: str, sign: str = "") -> str:
    """The value as text: in per cent with one digit, in nats with four, else with two. sign: "+" for changes."""
    digits = 1 if unit == "%" else 4 if unit.startswith("nats") else 2
    return f"{100 * value if unit == '%' else value:{sign}.{digits}f}"


def interval_text(mean: float, low: float | None, high: float | None, unit: str, sign: str = "") -> str:
    """ "64.7 [58.0, 71.0]", or the mean alone if there is no interval."""
    ends = "" if low is None else f" [{number(low, unit, sign)}, {number(high, unit, sign)}]"
    return number(mean, unit, sign) + ends


def mean_text(score, unit: str) -> str:
    """A Score's mean with its interval; of probabilities the mean alone."""
    return number(score.mean, unit) if unit == "probability" else interval_text(score.mean, score.low, score.high, unit)


def change_text(score, unit: str) -> str:
    """A Score's paired change: "-33.3 [-40.1, -26.6] p 1e-19"; "" for the first row."""
    if score.change is None:
        return ""
    text = interval_text(score.change, score.change_low, score.change_high, unit, "+")
    return text if score.p is None else f"{text} p {score.p:.1g}"


def ends(score, change: bool = False) -> np.ndarray:
    """(3,) a Score's mean or change, low and high; NaN without an interval, 0 where nothing is compared."""
    values = (score.change, score.change_low, score.change_high) if change else (score.mean, score.low, score.high)
    return np.array([0] * 3 if values[0] is None else values, dtype=float)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def table(measures, rows=None, title: str | None = None) -> None:
    """Print a line for each row and a column for each Measure: means and paired changes against the first row, with 95%
    intervals; then the mean change over several draws of a control. rows: names, if not all."""
    rows = list(rows or dict.fromkeys(row for measure in measures for row in measure.rows))
    columns, width = [column(measure, rows) for measure in measures], max(map(len, rows)) + 3
    if title:
        print(f"\n{title}")
    while columns:
        ends = itertools.accumulate((max(map(len, cells)) + 3 for cells in columns), initial=width)
        fit = max(1, sum(end <= TABLE_WIDTH for end in ends) - 1)
        block, columns = columns[:fit], columns[fit:]
        for before, cells in reversed([*itertools.pairwise(block)]):
            cells[0] = cells[0] if cells[0] != before[0] else ""  # a data set is named once
        print()
        for row, *cells in zip(["", "", *rows], *block):
            line = "".join(f"{cell:{max(map(len, whole)) + 3}}" for cell, whole in zip(cells, block)).rstrip()
            if line:
                print(f"  {row:{width}}{line}")
    for measure in measures:
        for control, draws in draws_of(row for row in rows if row in measure.rows).items():
            if len(draws) > 1 and measure.unit != "probability":
                changes = [measure[row].change for row in draws]
                mean, low, high = (number(of(changes), measure.unit, "+") for of in (np.mean, min, max))
                print(f"\n{measure.title}: {len(draws)} draws of {control} change it by {mean} "
                      f"{'points' if measure.unit == '%' else measure.unit} on average, {low} to {high}")  # fmt: skip


def column(measure, rows: list[str]) -> list[str]:
    """A column of `table`: the Measure's data set, what is measured, and a cell for each row, "" where it has none."""
    (data, _, what), unit = measure.title.rpartition(", "), measure.unit
    shown = "" if unit == "probability" else f", {unit}"
    count = f"n {measure.values.shape[1]}" if measure.weights is None else (
        f"{int(sum(measure.weights)):,} tokens of {len(measure.weights)} documents")  # fmt: skip
    chance = f", chance {100 * measure.chance:.0f}%" if measure.chance else ""
    known = {row: score for row, score in measure.scores().items() if row in rows}
    reach = max(len(mean_text(score, unit)) for score in known.values()) + 2
    cells = {row: f"{mean_text(score, unit):{reach}}{change_text(score, unit)}" for row, score in known.items()}
    return [data, f"{what}{shown} ({count}{chance})", *(cells.get(row, "") for row in rows)]


def intervals(measures, title: str):
    """Figure: a panel of rows for each Measure but probabilities; of a loss, what is added to the first row's."""
    panels = []
    for measure in measures:
        scores, first = measure.scores(), measure.rows[0]
        data, _, what = measure.title.rpartition(", ")
        if measure.weights is not None:
            head = f"{data}\n{what}, {scores.pop(first).mean:.2f} nats {first}"
            panels.append((head, f"added, {measure.unit}", True, measure.unit, scores, {first: 0}))
        elif measure.unit != "probability":
            lines = {"chance": measure.chance, "retrained": scores[RETRAINED].mean if RETRAINED in scores else None}
            head = f"{data}\n{what} (n {measure.values.shape[1]})"
            panels.append((head, "right answers, %", False, measure.unit, scores, lines))
    return panels_of_rows(panels, title)


def panels_of_rows(panels: list[tuple], title: str):
    """Figure: panels side by side; for each row a line with a marker, its 95% interval, and its number at the right.
    Draws of a control are dots on one line, beside their mean. A panel is its title; x label; if changes are shown;
    unit; {row: Score}; {name: x of a line or None}, drawn where rows come near it. Panels in % share their x."""
    draws = draws_of(dict.fromkeys(row for panel in panels for row in panel[4]))
    figure, all_axes = plt.subplots(1, len(panels), figsize=(2.4 + 2.4 * len(panels), 1.4 + 0.3 * len(draws)),
                                    sharey=True, squeeze=False, layout="constrained")  # fmt: skip
    known = [{row: ends(score, change) for row, score in scores.items()} for _, _, change, _, scores, _ in panels]
    for axes, (head, label, change, unit, _, lines), values in zip(all_axes[0], panels, known):
        shared = [all_of for all_of, panel in zip(known, panels) if all_of is values or panel[3] == unit == "%"]
        spread, scale = [end for all_of in shared for end in all_of.values()], 100 if unit == "%" else 1
        low, high = np.nanmin(spread), np.nanmax(spread)
        near = {name: x for name, x in lines.items() if x is not None and 2 * low - high <= x <= 2 * high - low}
        for y, (name, rows) in enumerate(draws.items()):
            if drawn := [scale * values[row] for row in rows if row in values]:
                mean, a, b = np.array(drawn).T
                colour = next((value for start, value in COLOURS.items() if name.startswith(start)), ABLATED)
                bar = {"mfc": "none"} if len(rows) > 1 else {"xerr": np.nan_to_num([mean - a, b - mean]).clip(0)}
                axes.errorbar(mean, [y] * len(drawn), fmt="o", ms=5, color=colour, **bar)
                axes.text(1.03, y, number(mean.mean() / scale, unit, "+" * change), va="center", size=9,
                          transform=axes.get_yaxis_transform())  # fmt: skip
        for k, (x, name) in enumerate(sorted((x, name) for name, x in near.items())):
            axes.axvline(scale * x, color="0.3", ls=":" if name == "retrained" else "--", lw=1, zorder=1)
            axes.annotate(plain(name), (scale * x, 1), (4 * k - 2, 2), ("data", "axes fraction"), "offset points",
                          ha="left" if k else "right", size=8)  # fmt: skip
        low, high = min([low, *near.values()]), max([high, *near.values()])
        margin = scale * (0.06 * (high - low) or 0.01)
        axes.set(xlim=(scale * low - margin, scale * high + margin), ylim=(len(draws) - 0.5, -0.5), xlabel=label)
        axes.set_title(plain(head.strip()), size=10, pad=14)
        axes.grid(axis="x", alpha=0.3)
    names = [f"{name},\n{len(rows)} draws and their mean" if len(rows) > 1 else name for name, rows in draws.items()]
    all_axes[0][0].set_yticks(range(len(draws)), map(plain, names))
    figure.suptitle(plain(title), size=10)
    return figure


def changes(measures, most: int = 20) -> None:
    """Print a column for each Measure: the first row's mean, and for each other row, `most` at most, the change against
    it, with a star where it stands out among all rows (Measure.q_of_rows below 0.05)."""
    first, *rows = measures[0].rows
    known, names = [measure.q_of_rows() for measure in measures], max(map(len, rows)) + 2
    print(f"\n  change against {first!r}; * where false discoveries over {len(rows)} rows are held to 5%\n")
    heads = [[*measure.title.split(", tuning half")[0].split(", ")[:1], measure.title.rpartition(", ")[2], measure.unit]
             for measure in measures]  # fmt: skip
    for line in zip(*heads):
        print(" " * (names + 2) + "".join(f"{text:>22}" for text in line))
    cells = [f"{number(measure[first].mean, measure.unit)} " for measure in measures]
    print(f"  {first:{names}}" + "".join(f"{cell:>22}" for cell in cells).rstrip())
    for row in rows[:most]:
        cells = [f"{number(measure[row].change, measure.unit, '+')}{'*' if q[row] < 0.05 else ' '}"
                 for measure, q in zip(measures, known)]  # fmt: skip
        print(f"  {row:{names}}" + "".join(f"{cell:>22}" for cell in cells).rstrip())
    if len(rows) > most:
        print(f"  ... and {len(rows) - most} more, all in the record")


def spread(names, x, y, axes) -> None:
    """Move the names of points (texts) apart."""
    with suppress(RuntimeError):  # of a LaTeX that is set and missing: the figure is told of, and costs no result
        adjust_text(names, x, y, ax=axes, arrowprops={"arrowstyle": "-", "color": "0.4", "lw": 0.5})


def effects_figure(forget, retain, features: list[int], title: str):
    """Figure: a panel for each Measure of the forget set: what each feature takes alone (the row "I alone"), against
    what it takes of `retain`, in points; those that stand out are red, the strongest have their number."""
    figure, all_axes = plt.subplots(1, len(forget), figsize=(4.6 * len(forget), 4.2), sharex=True, layout="constrained")
    x = np.array([-100 * retain[f"{one} alone"].change for one in features])
    for axes, measure in zip(np.atleast_1d(all_axes), forget):
        rows = [f"{one} alone" for one in features]
        q = measure.select([measure.rows[0], *rows]).q_of_rows()
        y = np.array([-100 * measure[row].change for row in rows])
        axes.scatter(x, y, s=16, c=[ABLATED if q[row] < 0.05 else "0.6" for row in rows], linewidths=0)
        best = sorted(range(len(features)), key=lambda i: -max(y[i], x[i]))[:10]
        axes.axhline(0, color="0.4", ls="--", lw=0.8)
        axes.axvline(0, color="0.4", ls="--", lw=0.8)
        lost = [f"{plain(of.title.replace(', tuning half', ''))}, points lost" for of in (retain, measure)]
        axes.set(xlabel=lost[0], ylabel=lost[1])
        spread([axes.text(x[i], y[i], f"{features[i]}", size=8) for i in best if max(y[i], x[i]) > 0], x, y, axes)
    figure.suptitle(f"{plain(title)}: each alone; red: stands out among all, false discoveries 5%", size=10)
    return figure


def counts_figure(measures, orders, counts: list[int], title: str):
    """Figure: a panel for each Measure, a line for each of the orders, of its rows "first N by ORDER" over N."""
    figure, all_axes = plt.subplots(1, len(measures), figsize=(3.4 * len(measures), 3.4), sharey=True,
                                    layout="constrained")  # fmt: skip
    for axes, measure in zip(np.atleast_1d(all_axes), measures):
        for name, shade in zip(orders, ("0.35", ABLATED, "#2471a3")):
            mean, low, high = 100 * np.array([ends(measure[f"first {n} by {name}"]) for n in counts]).T
            axes.plot(counts, mean, "o-", ms=3.5, color=shade, label=f"in the order of the {name}")
            axes.fill_between(counts, low, high, color=shade, alpha=0.15, linewidth=0)
        axes.axhline(100 * measure[measure.rows[0]].mean, color="0.3", ls="--", lw=0.8)
        axes.axhline(100 * measure.chance, color="0.3", ls=":", lw=0.8)
        axes.set(xscale="log", xlabel="features clamped", ylim=(0, 103))
        axes.set_xticks(counts, map(str, counts))
        axes.minorticks_off()
        axes.set_title(plain(measure.title.replace(", ", "\n")), size=9)
    np.atleast_1d(all_axes)[0].set_ylabel("right answers, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(orders), frameon=False)
    figure.suptitle(f"{plain(title)}; dashed: unablated, dotted: chance", size=10)
    return figure


def group_table(measure) -> None:
    """Print a line for each group (a subject), a column for each row: per cent right, with a star where it changed."""
    groups, q = measure.by_group(), measure.q_values()
    print(f"\n{measure.title}, by subject, %; * changed, with false discoveries over the {len(groups)} subjects held "
          "to 5%\n")  # fmt: skip
    for k, row in enumerate(measure.rows, 1):
        print(f"  ({k}) {row}")
    print(f"\n  {'':36}{'n':>5}" + "".join(f"{f'({k})':>8}" for k in range(1, len(measure.rows) + 1)))
    for group, scores in groups.items():
        stars = ["*" if q[group].get(row, 1) < 0.05 else " " for row in scores]
        cells = "".join(f"{100 * score.mean:7.1f}{star}" for score, star in zip(scores.values(), stars))
        print(f"  {group:36}{scores[measure.rows[0]].n:5}{cells.rstrip()}")


def group_figure(measure, title: str):
    """Figure: a panel for each ablation but controls, a line for each group (subject): its change in accuracy."""
    groups = {group.replace("_", " "): scores for group, scores in measure.by_group().items()}
    rows = [row for row in measure.rows[1:] if row != RETRAINED and not row.startswith(("SAE", "random"))]
    panels = [(row, "change in accuracy, points", True, "%", {group: of[row] for group, of in groups.items()},
               {measure.rows[0]: 0}) for row in rows]  # fmt: skip
    return panels_of_rows(panels, title)


def shaded(rows, columns, values, title: str):
    """Figure: a table of shares (n_rows, n_columns) in per cent, each on a ground as dark as it is large; None: "-"."""
    values = np.array(values, dtype=float)
    figure, axes = plt.subplots(figsize=(3.0 + 0.62 * len(columns), 1.4 + 0.27 * len(rows)), layout="constrained")
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1.2, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        text, ink = ("-", "k") if np.isnan(value) else (round(100 * value), "w" if value > 0.7 else "k")
        axes.text(x, y, text, ha="center", va="center", size=9, color=ink)
    axes.set_yticks(range(len(rows)), map(plain, rows))
    axes.set_xticks(range(len(columns)), [plain(str(name).replace(" ", "\n")) for name in columns])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.suptitle(plain(title), size=10)
    return figure


@torch.inference_mode()
def top_tokens(model, sae, features: list[int], windows: list[list[int]], k: int = 4) -> list[list[str]]:
    """For each feature the k tokens on which its activation summed over the windows is largest."""
    latents = Latents(sae, features)
    strength = torch.zeros(model.cfg.d_vocab, len(features))
    for h, ids in iter_residual_stream(model, layer_of(sae), windows, 16):
        strength.index_add_(0, ids.cpu(), latents.encode(h)[0].cpu().float())
    best = total_of_processes(strength).topk(k, dim=0)
    return [[model.tokenizer.decode(i) for i, s in zip(ids.tolist(), sums.tolist()) if s > 0]
            for ids, sums in zip(best.indices.T, best.values.T)]  # fmt: skip


def promoted_tokens(model, sae, features: list[int], k: int = 5, suppressed: bool = False) -> list[list[str]]:
    """For each feature the k tokens whose logits its decoder direction raises most, or lowers (edits.logit_lens, less
    the biases that all directions share); none where the model's final norm cannot be told."""
    try:
        vectors = Latents(sae, features).W_dec
        raised = logit_lens(model, vectors) - logit_lens(model, 0 * vectors)
        ids = raised.topk(k, largest=not suppressed).indices.tolist()
    except UserError as error:
        note_once(f"note: no promoted tokens: {error}")
        ids = [[]] * len(features)
    return [[*map(model.tokenizer.decode, best)] for best in ids]


def print_features(stats, features: list[int], most: int = 20) -> None:
    """Print features' firing rates, their ratio, the tokens on which they are most active and those that they promote,
    and Neuronpedia's page of them. stats: a FeatureStats; most: lines."""
    (forget, retain), sae, shown = stats.rates, stats.sae, features[:most]
    ratio, active = activation_ratio(forget, retain), top_tokens(stats.model, sae, shown, stats.forget)
    print(f"\n  {'feature':>8}{'forget rate':>13}{'retain rate':>13}{'ratio':>9}   {'most active on':36}promotes")
    for feature, words, promoted in zip(shown, active, promoted_tokens(stats.model, sae, shown)):
        rates = "".join(f"{100 * part.rate[feature]:12.3f}%" for part in (forget, retain))
        tokens = f"{' '.join(map(repr, words)):34}  {' '.join(map(repr, promoted))}".rstrip()
        print(f"  {feature:8}{rates}{ratio[feature]:9.1f}   {tokens}")
    if len(features) > most:
        print(f"  ... and {len(features) - most} more, all in the record")
    if isinstance(source := sae.cfg.metadata.neuronpedia_id, str) and source.count("/") == 1:
        at = dict(zip(("modelId", "layer"), source.split("/")))  # SAELens has such a function, which opens a browser
        rows = [{**at, "index": str(feature)} for feature in features[:ON_A_PAGE]]
        asked = quote(json.dumps(rows, separators=(",", ":")), safe=":,")
        which = "all" if len(rows) == len(features) else f"the first {ON_A_PAGE}"
        address = f"https://neuronpedia.org/quick-list/?name=picked%20features&features={asked}"
        print(f"\nNeuronpedia, {which} of these features: {address}")


def scatter(features: list[int], forget: Rates, retain: Rates, title: str):
    """Figure: forget against retain rate of all features that fire, picked ones marked; a rate of 0 lies at "never"."""
    figure, axes = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    never = [0.5 / rates.n_tokens for rates in (retain, forget)]  # logarithmic axes cannot show a rate of 0
    x, y = (rates.rate.clamp(min=least) for rates, least in zip((retain, forget), never))
    others = (forget.fires + retain.fires) > 0
    others[features] = False
    axes.scatter(x[others], y[others], s=8, c="0.65", label="other features", linewidths=0)
    axes.scatter(x[features], y[features], s=18, c=ABLATED, marker="D", label=f"picked ({len(features)})", linewidths=0)
    axes.plot([max(never), 1], [max(never), 1], color="0.4", lw=0.8, ls=":", label="equal rates")
    axes.set(xscale="log", yscale="log", title=plain(title))
    axes.set(xlabel="tokens of the retain set on which it fires", ylabel="tokens of the forget set on which it fires")
    for axis, least in zip((axes.xaxis, axes.yaxis), never):
        shares = [10.0**k for k in range(-6, 1) if 10.0**k > 2 * least]
        axis.set_ticks([least, *shares], ["never", *(f"{100 * share:g}%" for share in shares)])
        axis.set_minor_locator(plt.NullLocator())
    spread([axes.text(x[i], y[i], f"{i}", size=8) for i in features[:5]], x[features], y[features], axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def token_figure(model, windows: list[list[int]], values: list[torch.Tensor], title: str, unit: str):
    """Figure: the windows' tokens in reading order, on a ground as dark as their values, (pos,) a window: red, or blue
    below 0. A window's first token, usually BOS, is left out. A notebook shows it as text, values as tooltips."""
    shown = [strength for value in values for strength in value[1:].tolist()]
    most = max(map(abs, shown), default=0) or 1
    tones = ["#1f618d"] * (min(shown, default=0) < 0) + ["#ffffff", ABLATED]
    low = -most if len(tones) > 2 else 0
    shades = ScalarMappable(Normalize(low, most), LinearSegmentedColormap.from_list("", tones, 257))
    cells, spans, x, y = [], [], 0, 0
    for ids, value in zip(windows, values):
        for token, strength in zip(ids[1:], value[1:].tolist()):
            text = model.tokenizer.decode(token)
            drawn, ground = re.sub(r"[\x00-\x1f]", "\ufffd", text.translate(ARROWS)), to_hex(shades.to_rgba(strength))
            ink = "black" if np.dot(to_rgb(ground), (0.3, 0.6, 0.1)) > 0.5 else "white"
            if x and x + len(drawn) > TOKENS_WIDTH:
                x, y = 0, y + 1
            cells.append((x, y, drawn, ground, ink))
            spans.append(f'<span title="{strength:.3g} {unit}" style="background:{ground};color:{ink}">'
                         f"{escape(drawn)}</span>{chr(10) * text.count(chr(10))}")  # fmt: skip
            x, y = (0, y + 1) if "\n" in text else (x + len(drawn), y)
        spans.append("\n\n")
        x, y = 0, y + (2 if x else 1)
    size = 8  # points; a character of the monospaced font is 0.602 as wide
    figure = Figure((TOKENS_WIDTH * size * 0.602 / 72, 0.9 + 0.19 * (y + 1)), layout="constrained")  # not pyplot's,
    axes = figure.subplots()  # which a notebook would show, too
    for x, row, text, ground, ink in cells:
        if ground != "#ffffff":
            axes.add_patch(plt.Rectangle((x, row - 0.5), len(text), 1, color=ground, lw=0))
        axes.text(x, row, plain(text), family="monospace", size=size, va="center", c=ink, clip_on=True)
    axes.set(xlim=(0, TOKENS_WIDTH), ylim=(y - 0.5, -0.5))
    axes.axis("off")
    figure.colorbar(shades, ax=axes, location="bottom", aspect=60, shrink=0.5, label=plain(unit))
    figure.suptitle(plain(title), size=10)
    if getattr(getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)(), "kernel", None):
        from IPython.display import HTML, display

        bar = f'<span style="background:linear-gradient(90deg,{",".join(tones)});padding:0 5em"></span>'
        page = f'<pre style="white-space:pre-wrap;background:#fff">{"".join(spans)}</pre>'
        display(HTML(f"<p>{escape(title)}: {low:.3g} {bar} {most:.3g} {escape(unit)}</p>{page}"))
    return figure


@torch.inference_mode()
def print_contexts(model, sae, features: list[int], windows: list[list[int]], n: int = 3, reach: int = 8) -> None:
    """Print what features are: the nearest other one by the cosine of their decoder directions, what they suppress, and
    of the n windows in which each is most active its strongest token, in brackets, with `reach` tokens around it."""
    latents, found, special = Latents(sae, features), {}, torch.tensor(special_ids(model.tokenizer))
    for indices, ids in batches(windows, 16, model.tokenizer, model.cfg.device, shared=False):
        acts, _ = latents.encode(residual_stream(model.original_model, ids, layer_of(sae)))
        acts[:, 0] = acts[torch.isin(ids, special.to(ids.device))] = 0  # these are never edited
        found |= {i: acts[k, : len(windows[i])].cpu().max(0) for k, i in enumerate(indices)}
    vectors = torch.nn.functional.normalize(latents.W_dec, dim=-1)
    cosines = (vectors @ vectors.T).fill_diagonal_(-torch.inf)
    for k, (feature, low) in enumerate(zip(features, promoted_tokens(model, sae, features, suppressed=True))):
        near = f"nearest {features[cosines[k].argmax()]} (cosine {cosines[k].max():.2f}); " if len(features) > 1 else ""
        print(f"\n  {feature}: {near}suppresses {' '.join(map(repr, low))}")
        for i in sorted((i for i in found if found[i].values[k] > 0), key=lambda i: (-found[i].values[k], i))[:n]:
            at, decode = int(found[i].indices[k]), model.tokenizer.decode
            before, after = windows[i][max(0, at - reach) : at], windows[i][at + 1 : at + 1 + reach]
            text = f"{decode(before)}[{decode(windows[i][at])}]{decode(after)}"
            print(f"    {found[i].values[k]:6.1f}  {text.translate(ARROWS)}")


@torch.inference_mode()
def contexts_figures(model, sae, features: list[int], windows: list[list[int]], n: int = 3) -> dict:
    """{"feature_I": figure}: each feature's activations on the n windows in which it is most active."""
    features = list(dict.fromkeys(features))
    latents, found, figures = Latents(sae, features), {}, {}
    for indices, ids in batches(windows, 16, model.tokenizer, model.cfg.device, shared=False):
        acts, _ = latents.encode(residual_stream(model.original_model, ids, layer_of(sae)))  # (batch, pos, n_features)
        found |= {i: acts[k, : len(windows[i])].cpu() for k, i in enumerate(indices)}
    for k, feature in enumerate(features):
        best = sorted(found, key=lambda i: (-max(found[i][1:, k].tolist(), default=0), i))[:n]
        title = f"feature {feature}, where it is most active"
        tokens, values = [windows[i] for i in best], [found[i][:, k] for i in best]
        figures[f"feature_{feature}"] = token_figure(model, tokens, values, title, "activation")
    return figures


def letter_figure(tried: dict[str, torch.Tensor], right: int, title: str):
    """Figure: bars of the letters' probabilities, {name: (4,)}; right: the index of the letter that is marked."""
    figure, axes = plt.subplots(figsize=(5.2, 2.8), layout="constrained")
    for k, (name, values) in enumerate(tried.items()):
        places = [letter + 0.27 * (k - (len(tried) - 1) / 2) for letter in range(4)]
        axes.bar(places, values, 0.25, label=f"{plain(name)} (together {values.sum():.2f})",
                 color=("0.2", "#e59866", ABLATED)[k % 3])  # fmt: skip
    axes.set_xticks(range(4), [f"{letter}{' (right)' if k == right else ''}" for k, letter in enumerate("ABCD")])
    axes.set(ylabel="probability", ylim=(0, 1))
    figure.suptitle(plain(title), size=10)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=8)
    return figure


def documents_figure(added: torch.Tensor, windows: list[list[int]], documents: list[int], title: str):
    """Figure: the loss added to each document, in nats per token, in order of size. added: (n_windows,) nats, summed
    over a window's tokens; documents: the document of each window."""
    member = np.unique(documents, return_inverse=True)[1]
    per_token = np.sort(np.bincount(member, added) / np.bincount(member, [len(ids) - 1 for ids in windows]))
    figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    axes.plot(range(1, len(per_token) + 1), per_token, "o", ms=3.5, color=ABLATED)
    axes.axhline(0, color="0.4", ls="--", lw=1)
    axes.set(xlabel="document, in order of the loss added", ylabel="loss added, nats per token")
    axes.grid(axis="y", alpha=0.3)
    figure.suptitle(plain(title), size=10)
    return figure


def curves(series: dict[str, list[float]], title: str):
    """Figure: a panel for each of {name: values}, one value per step of training."""
    n = len(series)
    figure, all_axes = plt.subplots(1, n, figsize=(4.2 * n, 3.2), squeeze=False, layout="constrained")
    for axes, (name, values), shade in zip(all_axes[0], series.items(), itertools.cycle((ABLATED, "#1f618d", "0.3"))):
        axes.plot(range(1, len(values) + 1), values, color=shade)
        axes.set(title=plain(name), xlabel="step")
        axes.grid(alpha=0.3)
    figure.suptitle(plain(title), size=10)
    return figure
