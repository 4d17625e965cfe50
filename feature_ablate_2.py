# %% [markdown]
"""
Lesson 2 of 3: ablate WMDP-Bio features, score WMDP-Bio, and MMLU beside it.

    python feature_ablate_2.py --layer 7 --n-features 50
    python feature_ablate_2.py --layer 9 --n-features 20 --clamp -80
    python feature_ablate_2.py --model gemma-2-2b-it --layer 7 --n-features 50 --dtype bfloat16

Features are picked on one half of the WMDP-Bio questions, by how much more often they fire there than on Wikitext and
on MMLU's development questions; the other half is scored. One pass scores every row of the table: unablated, patched
with nothing ablated, the SAE's bare reconstruction, zero ablation, a negative clamp, and as many random features of
like firing rate on the retain sets, clamped too. A second table says what accuracy hides: does the model answer with a
letter at all, how sure is it of the right one, and does it know the answer in words, without options?

README.md shows what the first command prints, docs/results.md what other settings do.
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. Flags come first: --help need not wait for other imports.

# %%
from flags import answered, command_line, parser, quiz_flags, settings

flags = parser(__doc__)
quiz_flags(flags)
flags.add_argument("--controls", type=int, default=1, help="how many draws of random features (default: %(default)s)")
answered(flags, __name__)

# %%
import time

import show
from common import firing_rates, largest, load_model, load_never_knew, load_sae, matched_random, pick_features
from data import halves, load_rows, picking_texts, picking_windows, utility
from edits import NEVER_KNEW, layer_of
from engine import check_engine
from evaluation import of_features, score_quiz, standard_rows
from hub import sanity_gate

# %% [markdown]
# ## The lesson: load, pick, ablate, score, show


# %%
def run(**changes) -> dict:
    """run(layer=3, clamp=-40.0): any flag by name. Returns the record that it writes; raises UserError."""
    s, started, sources = settings(flags, changes), time.time(), {}
    path = show.outputs("feature_ablate_2.py", s, flags)
    lm = load_model(s.model, s.device, s.dtype, s.device_map, s.edit_special)
    sae = load_sae(s.sae, s.layer, lm, s.model)
    check_engine(lm, [layer_of(sae)])
    never_knew = load_never_knew(s.model, s.device, s.dtype)  # the floor, where there is one

    wmdp, sources["wmdp_bio"] = load_rows("wmdp_bio", s.model, s.data)
    picking, reporting = halves(wmdp, s.seed, s.pick_on)
    mmlu, sources["mmlu"] = load_rows("mmlu", s.model, s.data)
    reported = set(halves(mmlu, s.seed, s.pick_on)[1])
    beside = [i for i in utility(mmlu, s.subjects) if i in reported]
    texts = picking_texts(wmdp, picking, s, sources)
    forget_windows, retain_windows = picking_windows(lm.tokenizer, *texts, s)
    sanity = sanity_gate(lm, sae, retain_windows[0], insist=not s.no_sanity)
    forget = firing_rates(lm, sae, forget_windows, s.batch_size, "forget rates")
    retain = largest([firing_rates(lm, sae, part, s.batch_size, "retain rates") for part in retain_windows])
    features = pick_features(forget, retain, s.n_features, s.pick)
    controls = [matched_random(forget, retain, features, s.seed + draw) for draw in range(s.controls)]
    show.print_features(features, forget, retain, show.top_tokens(lm, sae, features, forget_windows), sae)

    rows = standard_rows(sae, features, controls[0], s.clamp)
    rows += [of_features("random-features", sae, control, s.clamp) for control in controls[1:]]
    bio, asked = score_quiz(lm, "WMDP-Bio", wmdp, reporting, rows, s, never_knew, in_words=True)
    sources["wmdp_bio"] |= asked
    rest, asked = score_quiz(lm, "MMLU", mmlu, beside, rows, s, never_knew)
    sources["mmlu"] |= asked
    rows += [NEVER_KNEW] if never_knew else []

    titles = [show.title_of(name, sources) for name in ("wmdp_bio", "mmlu")]
    show.print_quiz(titles[0], rows, bio)
    show.print_quiz(titles[1], rows, rest)
    show.print_controls(rows, dict(zip(titles, (bio, rest))))
    points = [row.point(wmdp_bio=a, mmlu=b) for row, a, b in zip(rows, bio, rest)]
    record = show.make_record("feature_ablate_2.py", s, [sae], sources, sanity, points, time.time() - started)
    title = f"{show.short_name(s.model)}, layer {s.layer}: {s.n_features} features ablated"
    show.write_record(path, record, {
        "features": lambda: show.scatter(features, forget, retain, title),
        "accuracy": lambda: show.quiz_figure(dict(zip(titles, (bio, rest))), rows, title),
    })  # fmt: skip
    return record


# %%
if __name__ == "__main__":
    command_line(run, flags)
