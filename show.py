"""
Show results: tables and figures.
"""

import json
from collections import Counter
from urllib.parse import quote

import matplotlib.pyplot as plt
import torch

import processes
from common import Rates, activation_ratio
from edits import NEVER_KNEW, Edit, Latents, hidden, layer_of, residuals


def plain(text: str) -> str:
    """The text for a figure, where matplotlib would take what stands between two $ for mathematics."""
    return text.replace("$", r"\$")


NAMES = {"wmdp_bio": "WMDP-Bio", "mmlu": "MMLU", "wikitext": "Wikitext", "openwebtext": "OpenWebText"}


def title_of(name: str, sources: dict) -> str:
    """A data set's name, with what it really is where a stand-in was scored."""
    which = f" {sources[name]['wmdp'].capitalize()}" if "wmdp" in sources[name] else ""
    return NAMES.get(name, name) + which + (" stand-in" if sources[name]["stand_in"] else "")


NAMES_OF_METHODS = {
    "none": "unablated",
    "never-knew": "trained without the facts",
    "sae-patched": "SAE patched, nothing ablated",
    "sae-reconstruction": "SAE reconstruction, no error term",
    "grad-diff": "GradDiff",
    "diff-in-means": "difference of means",
    "rmu": "RMU, first batch's norm",
    "adaptive-rmu": "Adaptive RMU, each token's norm",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "dsg": "DSG",
    "crisp": "CRISP",
    "npo-sam": "sharpness-aware NPO",
    "mudman": "MUDMAN",
    "undo": "UNDO",
}


def method_name(method: str) -> str:
    return NAMES_OF_METHODS.get(method, method.replace("-", " "))


def label(row: Edit) -> str:
    """What a row of a table or figure is called."""
    if row.method not in ("sae-ablation", "random-features"):
        return method_name(row.method)
    clamp = row.setting["clamp"]
    edit = "zero ablation" if clamp == 0 else f"clamp {clamp:g}"
    return f"random features, {edit}" if row.method == "random-features" else edit


def accuracy_cell(score: dict) -> str:
    return f"{100 * score['accuracy']:5.1f} [{100 * score['low']:5.1f}, {100 * score['high']:5.1f}]"


def change_cell(score: dict) -> str:
    if "change" not in score:
        return ""
    return (f"{100 * score['change']:+6.1f} [{100 * score['change_low']:+6.1f}, {100 * score['change_high']:+6.1f}]"
            f"  p {score['p_value']:.1g}")  # fmt: skip


def mean_cell(score: dict) -> str:
    """A mean and its change: "0.61  -0.39 [-0.42, -0.36]"."""
    text = f"{score['mean']:.2f}"
    if "change" in score:
        text += f"  {score['change']:+.2f}"
    if score.get("change_low") is not None:  # one question has no interval
        text += f" [{score['change_low']:+.2f}, {score['change_high']:+.2f}]"
    return text


def print_quiz(title: str, edits: list[Edit], scores: list[dict]) -> None:
    """A line per edit: accuracy with 95% interval, paired change against the first line. Then a line per edit on what
    the accuracy hides: does the model answer with a letter at all, how sure is it, and does it know in words?"""
    print(f"\n{title}: n {scores[0]['n']}, chance {100 * scores[0]['chance']:.0f}%\n")
    print(f"  {'':36}{'accuracy, %':<22}change, points")
    for edit, score in zip(edits, scores):
        print(f"  {label(edit):36}{accuracy_cell(score):22}{change_cell(score)}")
    shares = {"letters_mass": "P(a letter), change", "right_probability": "P(right letter), change"}
    shares = {name: head for name, head in shares.items() if name in scores[0]}  # not of questions without letters
    in_words = "in_words" in scores[0]
    if not shares and not in_words:
        return
    head = f"  {'':36}{''.join(f'{head:<30}' for head in shares.values())}{'in words, %' * in_words}"
    print(f"\n{head.rstrip()}")
    for edit, score in zip(edits, scores):
        cells = "".join(f"{mean_cell(score[name]):30}" for name in shares)
        worded = f"{accuracy_cell(score['in_words'])} {change_cell(score['in_words'])}" if in_words else ""
        print(f"  {label(edit):36}{cells}{worded}".rstrip())


def print_published(sources: dict, name: str = "wmdp_bio") -> None:
    """What others have published of a set that a real model was asked, a line below its table."""
    if note := sources[name].get("published"):
        print(f"\n{note}")


def print_controls(edits: list[Edit], panels: dict[str, list[dict]]) -> None:
    """Where random features were drawn several times, what they change on average; {title: scores}."""
    draws = [number for number, edit in enumerate(edits) if edit.method == "random-features"]
    for title, scores in panels.items() if len(draws) > 1 else ():
        changes = [100 * scores[number]["change"] for number in draws]
        mean, low, high = sum(changes) / len(draws), min(changes), max(changes)
        print(f"\n{title}: {len(draws)} draws of random features change it by {mean:+.1f} points on average, {low:+.1f}"
              f" to {high:+.1f}")  # fmt: skip


def beside(score: dict) -> dict:
    """{"in_words": accuracy, "letters_mass": probability of the four letters} of a quiz's score that has them, as those
    of records of earlier versions do not."""
    return {name: score[name][value] for name, value in (("in_words", "accuracy"), ("letters_mass", "mean"))
            if name in score}  # fmt: skip


def print_subjects(edits: list[Edit], scores: list[dict]) -> None:
    """One line per subject, one column per edit: accuracy in per cent, a star where it has changed."""
    print(f"\naccuracy by subject, %; * changed, with false discoveries over the {len(scores[0]['subjects'])} subjects "
          "held to 5%\n")  # fmt: skip
    for number, edit in enumerate(edits, 1):
        print(f"  ({number}) {label(edit)}")
    print(f"\n  {'':36}{'n':>5}" + "".join(f"{f'({k})':>8}" for k in range(1, len(edits) + 1)))
    for name in scores[0]["subjects"]:
        cells = [score["subjects"][name] for score in scores]
        stars = ["*" if cell.get("q_value", 1) < 0.05 else " " for cell in cells]
        shown = "".join(f"{100 * cell['accuracy']:7.1f}{star}" for cell, star in zip(cells, stars))
        print(f"  {name:36}{cells[0]['n']:5}{shown.rstrip()}")


def print_loss(title: str, edits: list[Edit], scores: list[dict]) -> None:
    """One line per edit: nats per token, and the loss added with 95% interval."""
    print(f"\n{title}: {scores[0]['n_tokens']:,} tokens of {scores[0]['n_documents']} documents\n")
    print(f"  {'':34}{'nats/token':<12}loss added")
    for edit, score in zip(edits, scores):
        added = ""
        if "loss_added" in score:
            added = f"{score['loss_added']:+.4f}"
            if score["loss_added_low"] is not None:  # one document has no interval
                added += f" [{score['loss_added_low']:+.4f}, {score['loss_added_high']:+.4f}]"
        print(f"  {label(edit):34}{score['nats_per_token']:<12.4f}{added}")


def setting_text(setting: dict) -> str:
    numbers = [f"{name} {value:g}" for name, value in setting.items() if type(value) in (int, float)]
    numbers += [f"loss on {setting['loss_on']}"] if "loss_on" in setting else []
    return ", ".join(numbers) + (", all layers from there on" if setting.get("behind") else "")


def print_tuning(points: list[dict]) -> None:
    """A line for each setting: accuracies on both halves in per cent, loss added."""
    print("\n  WMDP-Bio tuning, reporting   MMLU tuning, reporting   loss added   setting")
    for point in points[1:]:
        score = point["scores"]
        cells = [100 * score[name + half]["accuracy"] for name in ("wmdp_bio", "mmlu") for half in ("_tuning", "")]
        print("  {:15.1f}{:11.1f}{:16.1f}{:11.1f}".format(*cells)
              + f"{score['openwebtext']['loss_added']:+13.4f}   {setting_text(point['setting'])}")  # fmt: skip


def print_chosen(points: list[dict], sources: dict) -> None:
    """The tables of a tuned method on the reporting halves, by the unablated model's point and the chosen one."""
    rows = [Edit(point["method"], setting=point["setting"]) for point in points]
    for name in ("wmdp_bio", "mmlu"):
        print_quiz(title_of(name, sources), rows, [point["scores"][name] for point in points])
        print_published(sources, name)
    print_loss(title_of("openwebtext", sources), rows, [point["scores"]["openwebtext"] for point in points])


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


@torch.inference_mode()
def top_tokens(model, sae, features: list[int], windows: list[list[int]], k: int = 4) -> list[list[str]]:
    """For each feature the k tokens on which it is most active in sum."""
    latents = Latents(sae, features)
    strength = torch.zeros(model.cfg.d_vocab, len(features))
    for h, ids in residuals(model, layer_of(sae), windows, 16):
        strength.index_add_(0, ids.cpu(), latents.encode(h)[0].cpu().float())
    best = processes.total(strength).topk(k, dim=0)
    return [
        [model.tokenizer.decode(i) for i, s in zip(ids.tolist(), sums.tolist()) if s > 0]
        for ids, sums in zip(best.indices.T, best.values.T)
    ]


LONGEST_ADDRESS = 8000  # characters; many servers take no more


def quick_list(source: str, features: list[int]) -> tuple[str, int]:
    """Address of one Neuronpedia page of the first features, as many as it has room for, and how many those are.
    source: MODEL/SAE, as Neuronpedia calls them. SAELens's own function opens a browser."""
    model, sae = source.split("/")
    rows = [{"modelId": model, "layer": sae, "index": str(feature)} for feature in features]
    while True:
        asked = quote(json.dumps(rows, separators=(",", ":")), safe=":,")
        address = f"https://neuronpedia.org/quick-list/?name=picked%20features&features={asked}"
        if len(address) <= LONGEST_ADDRESS:
            return address, len(rows)
        rows.pop()


def print_features(features, forget: Rates, retain: Rates, tokens: list[list[str]], sae, most: int = 20) -> None:
    """The chosen features: firing rates, ratio, the tokens they are most active on, a Neuronpedia page of them."""
    ratio = activation_ratio(forget, retain)
    print(f"\n  {'feature':>8}{'forget rate':>13}{'retain rate':>13}{'ratio':>9}   most active on")
    for feature, words in list(zip(features, tokens))[:most]:
        print(f"  {feature:8}{100 * forget.rate[feature]:12.3f}%{100 * retain.rate[feature]:12.3f}%"
              f"{ratio[feature]:9.1f}   {' '.join(map(repr, words))}")  # fmt: skip
    if len(features) > most:
        print(f"  ... and {len(features) - most} more, all in the record")
    if source := sae.cfg.metadata.neuronpedia_id:
        address, n = quick_list(source, features)
        print(f"\nNeuronpedia, {'all' if n == len(features) else f'the first {n}'} of these features: {address}")


def scatter(features: list[int], forget: Rates, retain: Rates, title: str):
    """Figure: forget rate against retain rate of every feature that fires, the chosen ones marked."""
    figure, axes = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    floor = 0.5 / torch.tensor([retain.n_tokens, forget.n_tokens])  # where "never" is drawn on logarithmic axes
    alive = (forget.fires + retain.fires) > 0
    x, y = retain.rate.clamp(min=floor[0].item()), forget.rate.clamp(min=floor[1].item())
    chosen = torch.zeros_like(alive)
    chosen[features] = True
    axes.scatter(x[alive & ~chosen], y[alive & ~chosen], s=8, c="0.65", label="other features", linewidths=0)
    axes.scatter(x[chosen], y[chosen], s=18, c="#c0392b", marker="D", label=f"chosen ({len(features)})", linewidths=0)
    span = [min(floor).item(), 1]
    axes.plot(span, span, color="0.4", lw=0.8, ls=":", label="equal rates")
    axes.set(xscale="log", yscale="log", title=plain(title))
    axes.set_xlabel("firing rate on the retain set (leftmost: never)")
    axes.set_ylabel("firing rate on the forget set")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


WIDTH = 88  # characters of a line of tokens


def token_figure(model, windows: list[list[int]], values: list[torch.Tensor], title: str):
    """Figure: each window's tokens in reading order, the darker the larger its value; values: (pos,) each, of which
    what is below 0 is drawn as 0, and the first token's, usually BOS, is not drawn."""
    most = max([value[1:].max().item() for value in values] + [1e-9])
    lines, at, y = [], 0, 0
    for ids, value in zip(windows, values):
        for token, strength in list(zip(ids, value.tolist()))[1:]:
            text = model.tokenizer.decode(token)
            shown = text.replace("\n", "\u21b5")
            if at and at + len(shown) > WIDTH:
                at, y = 0, y + 1
            lines.append((at, y, shown, max(0.0, strength) / most))
            at = at + len(shown)
            if "\n" in text:
                at, y = 0, y + 1
        at, y = 0, y + (2 if at else 1)
    size = 8  # points; a character of the monospaced font is 0.602 as wide
    figure, axes = plt.subplots(figsize=(WIDTH * size * 0.602 / 72, 0.5 + 0.19 * (y + 1)), layout="constrained")
    for x, row, text, share in lines:
        if share:
            axes.add_patch(plt.Rectangle((x, row - 0.5), len(text), 1, color=plt.cm.Oranges(0.1 + 0.75 * share), lw=0))
        axes.text(x, row, plain(text), family="monospace", size=size, va="center", c="w" if share > 0.75 else "k")
    axes.set(xlim=(0, WIDTH), ylim=(y - 0.5, -0.5))
    axes.axis("off")
    figure.suptitle(plain(f"{title} (white 0, darkest {most:.1f})"), size=10)
    return figure


@torch.inference_mode()
def contexts_figure(model, sae, feature: int, windows: list[list[int]], n: int = 3):
    """Figure: the n windows in which a feature is most active, as token_figure shows them."""
    latents, found = Latents(sae, [feature]), []
    for index, ids in enumerate(windows):
        h = hidden(model.original_model, torch.tensor([ids], device=model.cfg.device), layer_of(sae))
        found.append((latents.encode(h)[0][0, :, 0].cpu(), index))
    found.sort(key=lambda pair: -pair[0][1:].max().item())
    values, best = zip(*found[:n])
    return token_figure(model, [windows[i] for i in best], values, f"feature {feature}, where it is most active")


def letter_figure(tried: dict[str, torch.Tensor], right: int, title: str):
    """Figure: the probabilities (4,) of the letters under each {name: probabilities}, the right one marked."""
    figure, axes = plt.subplots(figsize=(5.2, 2.8), layout="constrained")
    for number, (name, values) in enumerate(tried.items()):
        places = [letter + 0.27 * (number - (len(tried) - 1) / 2) for letter in range(4)]
        axes.bar(
            places,
            values,
            0.25,
            label=f"{name} (together {values.sum():.2f})",
            color=("0.2", "#e59866", "#c0392b")[number % 3],
        )
    axes.set_xticks(range(4), [f"{letter}{' (right)' if k == right else ''}" for k, letter in enumerate("ABCD")])
    axes.set(ylabel="probability", ylim=(0, 1))
    figure.suptitle(plain(title), size=10)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=8)
    return figure


def documents_figure(added: torch.Tensor, windows: list[list[int]], documents: list[int], title: str):
    """Figure: each document's loss added, nats per token, in order of size; added: (windows,), summed over tokens."""
    total, count = Counter(), Counter()
    for loss, ids, document in zip(added.tolist(), windows, documents):
        total[document] += loss
        count[document] += len(ids) - 1
    found = sorted(total[document] / count[document] for document in total)
    figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    axes.plot(range(1, len(found) + 1), found, "o", ms=3.5, color=COLOURS["sae-ablation"])
    axes.axhline(0, color="0.4", ls="--", lw=1)
    axes.set(xlabel="document, in order of the loss added", ylabel="loss added, nats per token")
    axes.grid(axis="y", alpha=0.3)
    figure.suptitle(plain(title), size=10)
    return figure


COLOURS = {"none": "0.2", "never-knew": "#1e8449", "sae-patched": "0.45", "sae-reconstruction": "0.65",
           "sae-ablation": "#c0392b", "random-features": "#2471a3"}  # fmt: skip


def colour_of(edit: Edit) -> str:
    return COLOURS.get(edit.method, COLOURS["sae-ablation"])


def subject_figure(edits: list[Edit], scores: list[dict], title: str):
    """Figure: each subject's change in accuracy under each edit, in points, with 95% intervals."""
    edits = [pair for pair in zip(edits, scores) if pair[0].method in ("sae-ablation", "random-features")]
    names = list(scores[0]["subjects"])
    figure, axes = plt.subplots(figsize=(6.5, 1.4 + 0.32 * len(names)), layout="constrained")
    for number, (edit, score) in enumerate(edits):
        cells = [score["subjects"][name] for name in names]
        change, low, high = ([100 * cell[key] for cell in cells] for key in ("change", "change_low", "change_high"))
        rows = [row + 0.2 * (number - (len(edits) - 1) / 2) for row in range(len(names))]
        spread = [[max(0, c - x) for c, x in zip(change, low)], [max(0, x - c) for c, x in zip(change, high)]]
        colour, marker = colour_of(edit), "osD"[number % 3]
        fill = "none" if edit.setting["clamp"] == 0 else colour
        axes.errorbar(change, rows, xerr=spread, fmt=marker, ms=4.5, color=colour, mfc=fill, capsize=2,
                      label=label(edit))  # fmt: skip
    axes.set_yticks(range(len(names)), [plain(name.replace("_", " ")) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(0, color="0.4", ls="--", lw=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(plain(title), size=10)
    axes.set_xlabel("change in accuracy, points")
    figure.legend(loc="outside lower center", ncols=len(edits), frameon=False, fontsize=8)
    return figure


def panels_of_rows(panels: dict[str, list[dict]], edits: list[Edit], columns, title: str):
    """Figure: a panel a data set {title: scores}, a row an edit; columns(score) -> value, low, high. And its axes."""
    figure, all_axes = plt.subplots(1, len(panels), figsize=(4.6 + 2.9 * (len(panels) - 1), 3.2), sharey=True,
                                    squeeze=False, layout="constrained")  # fmt: skip
    for axes, scores in zip(all_axes[0], panels.values()):
        for row, (edit, score) in enumerate(zip(edits, scores)):
            value, low, high = columns(score)
            spread = [[max(0, value - low)], [max(0, high - value)]]
            axes.errorbar(value, row, xerr=spread, fmt="o", color=colour_of(edit), capsize=3)
        axes.set_yticks(range(len(edits)), map(label, edits))
        axes.set_ylim(len(edits) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(plain(title), size=10)
    return figure, all_axes[0]


HIDDEN = {  # what a quiz's accuracy hides: marker, and where a score has it
    "in words": ("s", "in_words", "accuracy"),
    "P(right letter)": ("|", "right_probability", "mean"),
    "P(a letter)": ("x", "letters_mass", "mean"),
}


def quiz_figure(panels: dict[str, list[dict]], edits: list[Edit], title: str):
    """Figure: one panel per data set {title: scores}, accuracy with 95% intervals, chance dashed, and below each what
    it hides."""
    columns = lambda score: [100 * score[key] for key in ("accuracy", "low", "high")]  # noqa: E731
    figure, all_axes = panels_of_rows(panels, edits, columns, title)
    style = {"mfc": "none", "ms": 5, "ls": ""}
    all_axes[0].plot([], [], "o", color="0.3", label="accuracy")
    for name, (marker, part, value) in HIDDEN.items():
        for axes, scores in zip(all_axes, panels.values()):
            for row, (edit, score) in enumerate(zip(edits, scores)):
                if part in score:
                    axes.plot(100 * score[part][value], row + 0.28, marker=marker, color=colour_of(edit), **style)
        all_axes[0].plot([], [], marker=marker, color="0.3", label=name, **style)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    for axes, (name, scores) in zip(all_axes, panels.items()):
        chance = 100 * scores[0]["chance"]
        axes.axvline(chance, color="0.4", ls="--", lw=1)
        axes.annotate("chance", (chance, len(edits) - 0.55), xytext=(3, 0), textcoords="offset points", size=8)
        for edit, score in zip(edits, scores):
            if edit == NEVER_KNEW:
                axes.axvline(100 * score["accuracy"], color=colour_of(edit), ls=":", lw=1)
        axes.set(title=f"{name} (n {scores[0]['n']})", xlabel="accuracy, %", xlim=(0, 103))
    return figure


def loss_added(score: dict) -> list[float]:
    """The loss added and its interval; of a single document there is none, and the loss itself stands in for it."""
    ends = [score["loss_added_low"], score["loss_added_high"]]
    return [score["loss_added"], *(score["loss_added"] if end is None else end for end in ends)]


def loss_figure(panels: dict[str, list[dict]], edits: list[Edit], title: str):
    """Figure: one panel per text {title: scores}, loss added with 95% intervals."""
    behind = {name: scores[1:] for name, scores in panels.items()}
    figure, all_axes = panels_of_rows(behind, edits[1:], loss_added, title)
    for axes, (name, scores) in zip(all_axes, panels.items()):
        axes.axvline(0, color="0.4", ls="--", lw=1)
        unablated = f"{scores[0]['nats_per_token']:.2f} nats/token unablated"
        axes.set(title=f"{name}\n{unablated}", xlabel="loss added, nats/token")
    return figure


def curves(series: dict[str, list[float]], title: str, logarithmic: tuple[str, ...] = ()):
    """Figure: what training did, a panel for each {name: values}, a point a step."""
    figure, all_axes = plt.subplots(1, len(series), figsize=(4.2 * len(series), 3.2), layout="constrained")
    for axes, (name, values), colour in zip(all_axes, series.items(), ("#c0392b", "#1f618d", "0.3")):
        axes.plot(range(1, len(values) + 1), values, color=colour)
        axes.set(title=name, xlabel="step", yscale="log" if name in logarithmic else "linear")
        axes.grid(alpha=0.3)
    figure.suptitle(plain(title), size=10)
    return figure
