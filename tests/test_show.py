"""Tables and figures: what they say of Measures, and what titles, text and single documents may hold."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from urllib.parse import parse_qs, urlparse

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT
from sae_lens.analysis.neuronpedia_integration import get_neuronpedia_quick_list
from safetensors.torch import load_file

import show
from common import Rates, load_model, load_sae
from data import UserError
from edits import logit_lens
from evaluation import Measure

ROWS = ("unablated", "SAE patched, nothing ablated", "zero ablation", "clamp -40", "random features, clamp -40",
        show.RETRAINED)  # fmt: skip
RIGHT = (0.9, 0.9, 0.8, 0.3, 0.7, 0.25)


def quiz(name="wmdp_bio/letters", title="WMDP-Bio, in letters", rows=ROWS, right=RIGHT, n=40, **more):
    """A quiz of n questions; rows get the first of them right, as many as their share says."""
    values = np.array([np.arange(n) < round(share * n) for share in right])
    return Measure(name, title, "%", rows, values, chance=0.25, **more)


def probability(name, values, n=40):
    return Measure(f"wmdp_bio/{name}", f"WMDP-Bio, {name}", "probability", ROWS,
                   np.array([np.full(n, value) + 0.01 * (np.arange(n) % 2 - 0.5) for value in values]))  # fmt: skip


def loss(documents=4, rows=ROWS):
    tokens = np.arange(1, documents + 1) * 100
    return Measure("openwebtext/loss", "OpenWebText, loss", "nats per token", rows,
                   np.array([tokens * (3 + 0.1 * k) for k in range(len(rows))]), weights=tokens)  # fmt: skip


def marks(axes):
    """{line: x of its markers}"""
    return {line.get_ydata()[0]: np.round(line.get_xdata(), 6).tolist()
            for line in axes.lines if line.get_marker() == "o"}  # fmt: skip


def numbers(axes):
    """What stands at the lines' right."""
    return [text.get_text() for text in axes.texts if text.get_position()[0] == 1.03]


def test_a_backend_that_is_not_installed_costs_no_figure():
    """`!python` in a notebook inherits MPLBACKEND, perhaps into an environment without that package."""
    code = "import show; show.plt.figure(); print(show.plt.get_backend())"
    environment = {**os.environ, "MPLBACKEND": "module://of_a_notebook.backend_inline"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.stdout.strip() == "agg", done.stderr[-500:]


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


# ------------------------------------------------------------------------------------------------- tables


def test_a_table_has_a_line_a_row_with_intervals_and_paired_changes(capsys):
    measure = quiz()
    show.table([measure])
    lines = {line.strip()[: line.strip().index("   ")]: line for line in capsys.readouterr().out.splitlines()[3:]}
    assert list(lines) == list(ROWS)
    score = measure["clamp -40"]
    ends = [f"{100 * end:.1f}" for end in (score.low, score.high)]
    changes = [f"{100 * end:+.1f}" for end in (score.change, score.change_low, score.change_high)]
    assert f"30.0 [{', '.join(ends)}]" in lines["clamp -40"]
    assert f"{changes[0]} [{changes[1]}, {changes[2]}] p {score.p:.1g}" in lines["clamp -40"]
    assert lines["unablated"].count("[") == 1  # it is what others are compared with


def test_a_table_says_unit_number_and_chance_and_wraps(capsys):
    show.table([quiz(), probability("P(a letter)", [0.99] * 6), quiz("mmlu/letters", "MMLU, in letters", n=60), loss()])
    text = capsys.readouterr().out
    for head in ("in letters, % (n 40, chance 25%)", "P(a letter) (n 40)", "in letters, % (n 60, chance 25%)",
                 "loss, nats per token (1,000 tokens of 4 documents)"):  # fmt: skip
        assert head in text
    assert max(map(len, text.splitlines())) <= show.TABLE_WIDTH and text.count("  unablated") == 2
    assert "3.3000" in text and "+0.3000 [+0.3000, +0.3000]" in text


def test_what_an_accuracy_hides_is_shown(capsys):
    sure = [
        probability("P(a letter)", (1, 1, 1, 0.5, 1, 1)),
        probability("P(right letter)", (0.8, 0.8, 0.7, 0.25, 0.6, 0.2)),
    ]
    show.table([quiz(), *sure])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  clamp -40")]
    assert "0.50  -0.50 [-0.50, -0.50]" in line and "0.25  -0.55 [-0.55, -0.55]" in line


def test_rows_can_be_left_out_and_measures_may_lack_some(capsys):
    show.table([quiz(), loss(rows=ROWS[:3])], rows=["clamp -40", "unablated"], title="two of them")
    text = capsys.readouterr().out
    assert "two of them" in text and "zero" not in text and text.index("clamp -40") < text.index("unablated")


def test_draws_of_random_features_are_averaged_and_share_a_row(capsys):
    rows = (
        "unablated",
        "random features, clamp -5",
        "random features 2, clamp -5",
        "random features 3, clamp -5",
        "clamp -5",
    )
    measure = quiz(rows=rows, right=(0.9, 0.8, 0.7, 0.9, 0.2))
    show.table([measure])
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == ("WMDP-Bio, in letters: 3 draws of random features, clamp -5 change it by -10.0 points on average, "
                    "-20.0 to +0.0")  # fmt: skip
    (axes,) = show.intervals([measure], "title").axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["unablated", "random features, clamp -5,\n3 draws and their mean", "clamp -5"]
    assert (
        marks(axes) == {0: [90.0], 1: [80.0, 70.0, 90.0], 2: [20.0]} and len(axes.collections) == 2
    )  # no bars of draws
    assert numbers(axes) == ["90.0", "80.0", "20.0"]
    show.table([measure.select(rows[:2])])
    assert "draws" not in capsys.readouterr().out


def test_two_clamps_of_random_features_are_no_draws_of_one():
    rows = [
        "random features, layer 7, n_features 2, clamp 0",
        "random features, layer 7, n_features 2, clamp -40",
        "clamp 0",
    ]
    assert all(family == [row] for row, family in zip(rows, show.draws_of(rows).values(), strict=True))
    assert list(show.draws_of(["random 0", "random 1"])) == ["random"]


def test_a_subject_that_changed_has_a_star(capsys):
    groups = tuple("law" if k < 20 else "art" for k in range(40))
    measure = quiz(right=(1.0, 1.0, 1.0, 0.5, 1.0, 1.0), groups=groups)  # the clamp takes all of art
    show.group_table(measure)
    lines = capsys.readouterr().out.splitlines()
    art, law = lines[-2:]
    assert art.split()[:2] == ["art", "20"] and art.split()[5] == "0.0*" and art.count("*") == 1
    assert law.split()[5] == "100.0" and "*" not in law and "over the 2 subjects" in lines[1]


def test_groups_are_drawn_for_edits_alone():
    figure = show.group_figure(quiz(groups=tuple("ab"[k % 2] for k in range(40))), "title")
    assert [axes.get_title() for axes in figure.axes] == list(ROWS[2:4])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
    assert marks(figure.axes[1]) == {0: [-60.0], 1: [-60.0]} and numbers(figure.axes[1]) == ["-60.0", "-60.0"]


# ------------------------------------------------------------------------------------------------- figures


def test_an_interval_figure_has_a_panel_a_measure_with_chance_and_the_retrained_model():
    figure = show.intervals([quiz(), quiz("mmlu/letters", "MMLU, in letters", right=(*RIGHT[:5], 0.95), n=60)], "title")
    assert [axes.get_title() for axes in figure.axes] == ["WMDP-Bio\nin letters (n 40)", "MMLU\nin letters (n 60)"]
    for axes, retrained in zip(figure.axes, (25.0, 95.0)):
        named = {text.get_text(): round(text.xy[0], 6) for text in axes.texts if hasattr(text, "xy")}
        lines = [round(line.get_xdata()[0], 6) for line in axes.lines if len(line.get_xdata()) == 2]
        assert named == {"chance": 25.0, "retrained": retrained} and sorted(lines) == [25.0, retrained]


def test_a_row_has_one_marker_a_bar_without_caps_and_its_number():
    (axes,) = show.intervals([quiz(), probability("P(a letter)", [0.5] * 6)], "title").axes  # no probabilities
    shares = [round(100 * share, 1) for share in RIGHT]
    assert marks(axes) == {y: [share] for y, share in enumerate(shares)}
    assert numbers(axes) == [f"{share:.1f}" for share in shares]
    assert len(axes.collections) == len(ROWS) and {line.get_marker() for line in axes.lines} <= {"o", "None"}


def test_the_data_fill_a_panel_and_panels_in_per_cent_share_their_range():
    high = quiz("mmlu/letters", "MMLU, in letters", right=(1.0, 1.0, 0.99, 0.98, 0.97, 1.0), n=400)
    (axes,) = show.intervals([high], "title").axes
    left, right = axes.get_xlim()
    ends = [100 * end for score in high.scores().values() for end in (score.low, score.high)]
    assert max(ends) - min(ends) > 0.85 * (right - left) and left < min(ends) and right > max(ends)
    assert "chance" not in [text.get_text() for text in axes.texts]  # too far away
    first, second, third = show.intervals([quiz(), high, loss()], "title").axes
    assert (
        first.get_xlim() == second.get_xlim() != third.get_xlim()
        and first.get_xlim()[0] < 25 < 100 < second.get_xlim()[1]
    )


def test_of_a_loss_what_is_added_is_drawn():
    (axes,) = show.intervals([loss()], "title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(ROWS[1:])
    assert marks(axes) == {0: [0.1], 1: [0.2], 2: [0.3], 3: [0.4], 4: [0.5]} and numbers(axes)[0] == "+0.1000"
    assert axes.get_title().endswith("3.00 nats unablated") and "unablated" in [text.get_text() for text in axes.texts]
    accuracy, added = show.intervals([quiz(), loss()], "title").axes
    assert len(accuracy.get_yticks()) == len(ROWS) and sorted(marks(added)) == [1, 2, 3, 4, 5]


def test_titles_with_dollars_and_losses_without_intervals_are_drawn(tmp_path, capsys):
    title, one = r"$\no_such$ model", loss(documents=1)
    groups = tuple(r"a$\b$" if k % 2 else "b" for k in range(40))
    rows = (*ROWS[:-1], r"mine, $\no_such$")
    figures = [show.intervals([quiz(rows=rows)], title), show.intervals([one], title),
               show.group_figure(quiz(groups=groups), title), show.curves({"loss": [1.0, 2.0]}, title)]  # fmt: skip
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
    show.table([one])
    assert "3.1000" in capsys.readouterr().out


def test_numbers_are_written_by_their_unit():
    assert show.number(0.1234, "%", "+") == "+12.3" and show.number(0.1234, "probability") == "0.12"
    assert show.interval_text(1.0, None, None, "nats per token") == "1.0000"


WORDS = ["<bos>", "It", " cost", " 5$", " <b>\n", "noon", "x" * 86]
READER = SimpleNamespace(tokenizer=SimpleNamespace(decode=WORDS.__getitem__))
VALUES = [9.0, 0.0, 2.0, 1.0, 0.0, 4.0, 0.0]  # of BOS, too


def tokens(values=VALUES):
    return show.token_figure(READER, [[*range(7)]], [torch.tensor(values)], "a & b", "nats")


def test_tokens_stand_where_they_are_read_and_are_as_dark_as_their_value(tmp_path):
    figure = tokens()
    axes, bar = figure.axes
    drawn = [(text.get_text(), *text.get_position()) for text in axes.texts]
    assert drawn == [("It", 0, 0), (" cost", 2, 0), (r" 5\$", 7, 0), (" <b>\u21b5", 10, 0), ("noon", 0, 1),
                     ("x" * 86, 0, 2)]  # fmt: skip
    boxes = {(box.get_x(), round(box.get_y() + 0.5)): box for box in axes.patches}
    assert {at: box.get_width() for at, box in boxes.items()} == {(2, 0): 5, (7, 0): 3, (0, 1): 4}  # no BOS, no 0
    dark = {at: sum(box.get_facecolor()[:3]) for at, box in boxes.items()}
    assert dark[0, 1] < dark[2, 0] < dark[7, 0]
    assert bar.get_xlabel() == "nats" and bar.get_xlim() == (0, 4)
    assert not plt.get_fignums()  # a notebook shows what is pyplot's
    figure.savefig(tmp_path / "tokens.png", format="png", dpi=150)


def test_what_is_below_0_is_blue_and_0_is_white():
    axes, bar = tokens([9.0, 0.0, 2.0, -1.0, 0.0, 4.0, 0.0]).axes
    boxes = {box.get_x(): box.get_facecolor() for box in axes.patches if box.get_y() == -0.5}
    assert sorted(boxes) == [2, 7] and boxes[2][0] > boxes[2][2] and boxes[7][0] < boxes[7][2]
    assert bar.get_xlim() == (-4, 4)
    assert len(tokens([0.0] * 7).axes[0].patches) == 0


def test_any_token_leaves_the_figure_whole(tmp_path, recwarn):
    """One that is longer than a line, and control characters, which the font lacks; and no token at all."""
    texts = ["", "-" * 120, "a\tb\r\n", "\x00\x1b", " the"]
    model = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda token: texts[token]))
    figure = show.token_figure(model, [[0, 1, 2, 3, 4]], [torch.ones(5)], "title", "nats")
    figure.savefig(tmp_path / "tokens.png", format="png", dpi=150)
    assert not [str(warned.message) for warned in recwarn]
    axes = figure.axes[0]
    assert axes.get_position().width > 0.95
    assert [text.get_text() for text in axes.texts][1:] == ["a\u2192b\ufffd\u21b5", "\ufffd\ufffd", " the"]
    for windows in ([], [[]], [[0]]):
        show.token_figure(model, windows, [torch.ones(len(ids)) for ids in windows], "title", "nats")


def test_a_notebook_shows_tokens_as_text_with_tooltips(monkeypatch):
    import IPython
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda page: shown.append(page.data))
    tokens()
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=None))  # a terminal
    tokens()
    assert not shown
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    tokens()
    (page,) = shown
    spans = re.findall(r'<span title="(.*?)" style="background:(#\w+);color:\w+">(.*?)</span>', page)
    assert [(value, text) for value, _, text in spans] == [
        ("0 nats", "It"), ("2 nats", " cost"), ("1 nats", " 5$"), ("0 nats", " &lt;b&gt;\u21b5"), ("4 nats", "noon"),
        ("0 nats", "x" * 86)]  # fmt: skip
    assert [ground == "#ffffff" for _, ground, _ in spans] == [True, False, False, True, False, True]
    assert "a &amp; b: 0 <" in page and "4 nats</p>" in page and "</span>\n<span" in page


@pytest.fixture(scope="module")
def tiny():
    model = load_model("tiny")
    return model, load_sae(None, 7, model)


FEATURES = [624, 1902, 449]


def test_promoted_tokens_are_those_of_the_final_norm_and_the_unembedding(tiny):
    model, sae = tiny
    vectors = sae.W_dec[FEATURES].detach().cpu().double()
    weights = {name: value.double() for name, value in load_file(ROOT / "tiny" / "model" / "model.safetensors").items()}
    normed = vectors / (vectors.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weights["model.norm.weight"])
    by_hand = normed @ weights["model.embed_tokens.weight"].T  # the unembedding, too
    best = by_hand.topk(5)
    found = logit_lens(model, sae.W_dec[FEATURES])
    assert torch.allclose(found.gather(1, best.indices).double(), best.values, atol=1e-5)
    tokens = [[model.tokenizer.decode(i) for i in ids] for ids in best.indices.tolist()]
    assert show.promoted_tokens(model, sae, FEATURES) == tokens
    assert show.promoted_tokens(model, sae, FEATURES[:1], k=2) == [tokens[0][:2]]


def test_a_bias_that_all_features_share_promotes_nothing(get_model, make_sae):
    """GPT-2's final norm has one."""
    model = get_model("gpt2")
    sae, norm, head = make_sae(model), model.original_model.transformer.ln_f, model.original_model.lm_head
    before = show.promoted_tokens(model, sae, [1, 5, 9])
    with torch.no_grad():
        norm.bias.add_(100 * head.weight[7])
    try:
        assert show.promoted_tokens(model, sae, [1, 5, 9]) == before
    finally:
        with torch.no_grad():
            norm.bias.zero_()


def test_contexts_may_be_of_one_token(tiny):
    model, sae = tiny
    assert list(show.contexts_figures(model, sae, [624], [[2], [2, 5, 6]])) == ["feature_624"]


def test_a_final_norm_that_cannot_be_told_promotes_nothing(tiny, monkeypatch):
    model, sae = tiny
    decoder = model.original_model.get_decoder()
    monkeypatch.setitem(decoder._modules, "another", torch.nn.LayerNorm(4))
    with pytest.raises(UserError, match=r"cannot tell which module of .* is its final norm"):
        logit_lens(model, sae.W_dec[FEATURES])
    assert show.promoted_tokens(model, sae, FEATURES) == [[]] * len(FEATURES)


def test_a_feature_that_never_fires_lies_at_never_and_the_first_five_have_their_number():
    fires = torch.tensor([0, 10, 500, 30, 5, 6, 7, 8])
    forget, retain = Rates(fires, fires, 1000), Rates(fires.flip(0), fires, 1000)
    figure = show.scatter([1, 3, 4, 5, 6, 7], forget, retain, "title")
    (axes,) = figure.axes
    for axis, place in ((axes.xaxis, 0), (axes.yaxis, 1)):
        ticks = dict(zip([label.get_text() for label in axis.get_ticklabels()], axis.get_ticklocs()))
        points = np.concatenate([dots.get_offsets()[:, place] for dots in axes.collections])
        assert ticks["never"] == pytest.approx(min(points)) and ticks["1%"] == pytest.approx(0.01)
    assert [text.get_text() for text in axes.texts] == ["1", "3", "4", "5", "6"]
    assert "ablated" not in axes.get_xlabel() + axes.get_ylabel()


def test_the_scatter_is_made_without_the_latex_that_is_set_and_missing(monkeypatch):
    """Placing its labels measures text; a lesson makes it before it has scored anything."""
    monkeypatch.setenv("PATH", "")  # where there is none
    fires = torch.tensor([0, 10, 500, 30, 5, 6, 7, 8])
    with plt.rc_context({"text.usetex": True}):
        figure = show.scatter([1, 3, 4, 5, 6, 7], Rates(fires.flip(0), fires, 1000), Rates(fires, fires, 1000), "title")
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "3", "4", "5", "6"]


def test_shares_are_a_table_shaded_by_size():
    figure = show.shaded(["a$b$", "b"], ["as tuned", 25], [[0.999, None], [-0.001, 0.5]], "title")
    (axes,) = figure.axes
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [
        ("100", (0, 0)), ("-", (1, 0)), ("0", (0, 1)), ("50", (1, 1))]  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == ["as\ntuned", "25"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"a\$b\$", "b"]
    grey = axes.images[0].to_rgba(axes.images[0].get_array()) @ (0.3, 0.6, 0.1, 0)
    assert grey[0, 0] < grey[1, 1] < grey[1, 0]
    figure.canvas.draw()


def test_a_documents_loss_is_per_token_over_its_windows():
    figure = show.documents_figure(torch.tensor([3.0, -1.0, 0.5]), [[0] * 5, [0] * 5, [0] * 6], [7, 7, 2], "title")
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([0.5 / 5, 2.0 / 8])
    plt.close("all")


def test_letters_are_bars_and_the_right_one_is_marked():
    tried = {"unablated": torch.tensor([0.1, 0.7, 0.1, 0.1]), "clamp": torch.tensor([0.4, 0.2, 0.2, 0.0])}
    figure = show.letter_figure(tried, 1, "title")
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.1, 0.7, 0.1, 0.1, 0.4, 0.2, 0.2, 0.0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["A", "B (right)", "C", "D"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["unablated (together 1.00)",
                                                                     "clamp (together 0.80)"]  # fmt: skip
    plt.close("all")


def test_one_neuronpedia_page_has_the_picked_features(monkeypatch, capsys):
    rates, picked = Rates(torch.ones(64), torch.ones(64), 100), list(range(50, 0, -1))
    about = SimpleNamespace(neuronpedia_id=None, model_name="gemma-2-2b")
    sae = SimpleNamespace(cfg=SimpleNamespace(metadata=about))
    stats = SimpleNamespace(rates=(rates, rates), model=None, sae=sae, forget=[])
    for name in ("top_tokens", "promoted_tokens"):
        monkeypatch.setattr(show, name, lambda model, sae, features, *_: [["x"]] * len(features))
    show.print_features(stats, picked)
    assert "euronpedia" not in capsys.readouterr().out
    about.neuronpedia_id = "gemma-2-2b/12-gemmascope-res-16k"
    show.print_features(stats, picked)
    said = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr("webbrowser.open", lambda address: None)
    theirs, ours = urlparse(get_neuronpedia_quick_list(sae, picked)), urlparse(said.split()[-1])
    assert said.startswith("Neuronpedia, all of these features: ") and ours[:3] == theirs[:3]
    theirs, ours = (json.loads(parse_qs(address.query)["features"][0]) for address in (theirs, ours))
    assert ours == theirs and len(ours) == 50

    about.neuronpedia_id = "deepseek-r1-distill-llama-8b/15-llamascope-slimpj-res-32k"  # a long name
    show.print_features(stats, [31000 + i for i in range(384)], most=0)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("Neuronpedia, the first 50 of these features: ") and len(said.split()[-1]) <= 8000
    rows = json.loads(parse_qs(urlparse(said).query)["features"][0])
    assert [row["index"] for row in rows] == [str(31000 + i) for i in range(50)]
