# %% [markdown]
"""
Lesson 1 of 3: ablate WMDP-Bio features and score MMLU, subject by subject: what else does the ablation harm?

    python feature_ablate_1.py --layer 7 --n-features 50
    python feature_ablate_1.py --subjects human_anatomy,zoology
    python feature_ablate_1.py --model gemma-2-2b-it --layer 7 --n-features 50 --dtype bfloat16

Features are picked on one half of the WMDP-Bio questions, by how much more often they fire there than on Wikitext and
on MMLU's development questions. One pass scores every row of the table: unablated, patched with nothing ablated, the
SAE's bare reconstruction, zero ablation, a negative clamp, and as many random features of like firing rate on the
retain sets, clamped too. Only MMLU's reporting half is scored, so that a setting can be chosen on the other.
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. Flags come first: --help need not wait for other imports.

# %%
from flags import answered, command_line, parser, quiz_flags, settings

flags = parser(__doc__)
quiz_flags(flags, subjects="all")
answered(flags, __name__)

# %%
import time

import show
from common import firing_rates, largest, load_model, load_never_knew, load_sae, matched_random, pick_features
from data import halves, load_rows, of_subjects, picking_texts, picking_windows
from edits import NEVER_KNEW, layer_of
from engine import check_engine
from evaluation import score_quiz, standard_rows
from hub import sanity_gate

# %% [markdown]
# ## The lesson: load, pick, ablate, score, show


# %%
def run(**changes) -> dict:
    """run(layer=3, clamp=-40.0): any flag by name. Returns the record that it writes; raises UserError."""
    s, started, sources = settings(flags, changes), time.time(), {}
    path = show.outputs("feature_ablate_1.py", s, flags)
    lm = load_model(s.model, s.device, s.dtype, s.device_map, s.edit_special)
    sae = load_sae(s.sae, s.layer, lm, s.model)
    check_engine(lm, [layer_of(sae)])
    never_knew = load_never_knew(s.model, s.device, s.dtype)  # the floor, where there is one

    wmdp, sources["wmdp_bio"] = load_rows("wmdp_bio", s.model, s.data)
    picking, _ = halves(wmdp, s.seed, s.pick_on)
    mmlu, sources["mmlu"] = load_rows("mmlu", s.model, s.data)
    reporting = set(halves(mmlu, s.seed, s.pick_on)[1])
    indices = [i for i in of_subjects(mmlu, s.subjects) if i in reporting]
    texts = picking_texts(wmdp, picking, s, sources)
    forget_windows, retain_windows = picking_windows(lm.tokenizer, *texts, s)
    sanity = sanity_gate(lm, sae, retain_windows[0], insist=not s.no_sanity)
    forget = firing_rates(lm, sae, forget_windows, s.batch_size, "forget rates")
    retain = largest([firing_rates(lm, sae, part, s.batch_size, "retain rates") for part in retain_windows])
    features = pick_features(forget, retain, s.n_features, s.pick)
    control = matched_random(forget, retain, features, s.seed)
    show.print_features(features, forget, retain, show.top_tokens(lm, sae, features, forget_windows), sae)

    rows = standard_rows(sae, features, control, s.clamp)
    scores, asked = score_quiz(lm, "MMLU", mmlu, indices, rows, s, never_knew)
    sources["mmlu"] |= asked
    rows += [NEVER_KNEW] if never_knew else []

    name = show.title_of("mmlu", sources)
    show.print_subjects(rows, scores)
    show.print_quiz(f"{name}, all questions pooled", rows, scores)
    points = [row.point(mmlu=value) for row, value in zip(rows, scores)]
    record = show.make_record("feature_ablate_1.py", s, [sae], sources, sanity, points, time.time() - started)
    title = f"{show.short_name(s.model)}, layer {s.layer}: {s.n_features} features ablated"
    show.write_record(path, record, {
        "features": lambda: show.scatter(features, forget, retain, title),
        "accuracy": lambda: show.quiz_figure({name: scores}, rows, title),
        "subjects": lambda: show.subject_figure(rows, scores, f"{name}: {title}"),
    })  # fmt: skip
    return record


# %%
if __name__ == "__main__":
    command_line(run, flags)
