# %% [markdown]
"""
Lesson 2 of 3: does the model forget WMDP-Bio, and would you notice if it did not?

    python feature_ablate_2.py --layer 7 --n-features 50
    python feature_ablate_2.py --layer 9 --n-features 20 --clamp -80
    python feature_ablate_2.py --model gemma-2-2b-it --layer 7 --n-features 50

Features of a sparse autoencoder (SAE; lesson 1 shows what they are) that fire on WMDP-Bio and not on ordinary text are
ablated, and the other half of WMDP-Bio is asked, with MMLU beside it. Then the same facts are asked for in words: has
the model lost them, or only the letters A to D?
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files; there a line like `args.layer = 3` below the flags changes a
# setting. Numbers in **bold** are what the first command above gives.

# %%
from flags import parse, parser

flags = parser(__doc__, quiz=True)
flags.add_argument("--controls", type=int, default=1, help="how many draws of random features (default: %(default)s)")
args = parse(flags)

# %%
import time

import torch

import data
import evaluation
import methods
import records
import show
from common import matched_random

# %% [markdown]
# ## Pick
# By the ratio of how often a feature fires on the picking half of WMDP-Bio to how often it does on Wikitext and on
# MMLU's development questions (lesson 1 counts it out). The questions of the other half are not seen before they are
# scored.

# %%
path, started, sources = records.outputs("feature_ablate_2.py", args, flags), time.time(), {}
model, sae = methods.load(args)
wmdp, picking, reporting = data.load_quiz("wmdp_bio", args, sources)
mmlu, _, half = data.load_quiz("mmlu", args, sources)  # asked last, but a mistake in --subjects shows now
kept = [i for i in data.utility(mmlu, args.subjects) if i in half]
measured = methods.measure(model, args.layer, sae, *data.picking_texts(wmdp, picking, args, sources), args.clamp, args)
forget, retain = measured.rates
features = measured.features(args.n_features)
show.print_features(features, forget, retain, show.top_tokens(model, sae, features, measured.forget), sae)
title = f"{records.short_name(args.model)}, layer {args.layer}: {args.n_features} features ablated"
figures = {"features": show.scatter(features, forget, retain, title)}

# %% [markdown]
# On how many tokens of a question is any of them active at all? The darker, the stronger in sum.

# %%
question = wmdp[reporting[0]]
ids, _ = data.encode_question(model, question, args.prompt)
h = model.run_with_cache(ids, names_filter=sae.hook_point)[1][sae.hook_point].float()  # (1, pos, d_model)
a = sae.encode(h)[0, :, features]  # (pos, n)
figures["question"] = show.token_figure(model, ids.tolist(), [a.sum(-1)], f"layer {args.layer}: all picked features")
print(f"active on {(a[1:] > 0).any(-1).sum()} of {len(a) - 1} tokens, {(a[1:] > 0).sum(-1).max()} at most at once")

# %% [markdown]
# ## Zero ablation
# All rows are scored in one pass; here are the first. Guess before you look: with every one of these features gone, how
# many questions does the model still get right?

# %%
controls = [matched_random(forget, retain, features, args.seed + draw) for draw in range(args.controls)]
rows = evaluation.standard_rows(sae, features, controls, args.clamp, args.model)
scores, asked = evaluation.score_quiz(model, "WMDP-Bio", wmdp, reporting, rows, args, in_words=True)
sources["wmdp_bio"] |= asked
name = show.title_of("wmdp_bio", sources)
show.print_quiz(name, rows[:4], scores[:4])

# %% [markdown]
# Nothing happens: **98.0**% before, **98.0**% after. On real models it is next to nothing (20 features a layer moved
# gemma-2-2b-it from 63.6 to 62.5%: Farrell et al.'s published notebooks). The features are there when biology is, but
# the answer does not hang on them. How far does zeroing move a token's vector, and how far does a clamp?
# <!-- 100 * scores[0]["accuracy"], 100 * scores[3]["accuracy"] -->

# %%
shares = {}
for clamp in (0.0, args.clamp):
    moved = torch.where(a > 0, clamp - a, 0) @ sae.W_dec[features]  # (pos, d_model)
    shares[clamp] = 100 * (moved.norm(dim=-1) / h[0].norm(dim=-1))[1:].mean()
    print(f"clamp {clamp:g} moves a token by {shares[clamp]:.0f}% of its length on average")

# %% [markdown]
# ## A negative clamp, and random features
# By **38**% of a token's length, not **2**%: pushed far below zero, the same features do damage. But would any? The row
# with random features pushes as many as far, that fire as often on ordinary text.
# <!-- shares[args.clamp], shares[0.0] -->

# %%
show.print_quiz(name, rows, scores)
show.print_published(sources)
show.print_controls(rows, {name: scores})

# %% [markdown]
# ## Forgotten, or only silent?
# From **98.0** to **64.7**%, by random features to **94.6**%: it is these. A model that has lost the facts gives a
# wrong letter; one that has lost the form gives none. So look at the probability of all four letters together (**1.00**
# under the clamp), and ask without options: "Answer in words:". The dotted line is a model trained in the same way, but
# never on these facts: **22.5**%, and no forgetting is better than that. <!-- 100 * scores[0]["accuracy"],
# 100 * scores[4]["accuracy"], 100 * scores[5]["accuracy"], scores[4]["letters_mass"]["mean"],
# 100 * scores[6]["accuracy"] -->

# %%
panels = {data.how_asked(wmdp): scores, "in words": [score["in_words"] for score in scores]}
figures["words"] = show.quiz_figure(panels, rows, f"{name}: {title}")

# %% [markdown]
# ## And the rest?
# In words it falls from **97.5** to **56.4**%, so facts are lost, and not the quiz alone; but half of them are still
# there. MMLU, the quiz on all else, should stay as it is.
# <!-- 100 * scores[0]["in_words"]["accuracy"], 100 * scores[4]["in_words"]["accuracy"] -->

# %%
beside, asked = evaluation.score_quiz(model, "MMLU", mmlu, kept, rows, args)
sources["mmlu"] |= asked
show.print_quiz(show.title_of("mmlu", sources), rows, beside)
show.print_controls(rows, {show.title_of("mmlu", sources): beside})
figures["accuracy"] = show.quiz_figure({name: scores, show.title_of("mmlu", sources): beside}, rows, title)

# %% [markdown]
# Under the clamp it loses **2.4** points, with random features **3.6**: biology's do no more harm than any do. The
# record keeps all of the above, to compare with other runs.
# <!-- -100 * beside[4]["change"], -100 * beside[5]["change"] -->

# %%
points = [row.point(wmdp_bio=one, mmlu=other) for row, one, other in zip(rows, scores, beside)]
record = records.make_record("feature_ablate_2.py", args, [sae], sources, measured.sanity, points, started)
records.write_record(path, record, figures)

# %% [markdown]
# ## Make it your own
# Change one line and run what is below it again. With `args.layer, args.n_features, args.clamp = 9, 20, -80.0`:
# **57.8**% in letters, but **85.8**% in words, so there it is the quiz that suffers.
# <!-- --layer 9 --n-features 20 --clamp -80: 100 * scores[4]["accuracy"], 100 * scores[4]["in_words"]["accuracy"] -->

# %% [markdown]
# With another rule, `args.pick = "dsg"`: **51.0**% in letters and **51.0**% in words, but MMLU falls to **92.3**%.
# <!-- --pick dsg: 100 * scores[4]["accuracy"], 100 * scores[4]["in_words"]["accuracy"], 100 * beside[4]["accuracy"] -->

# %% [markdown]
# And how much does a single feature do? The first one fires on the letter C before an option (lesson 1). Guess: how
# many points does it cost alone, with letters and in words? Every third question is enough to see it.

# %%
first = evaluation.of_features("sae-ablation", sae, features[:1], args.clamp)
found, _ = evaluation.score_quiz(model, "WMDP-Bio", wmdp, reporting[::3], [rows[0], first], args, in_words=True)
for row, score in zip(("unablated", "the first alone"), found):
    print(f"{row}: {100 * score['accuracy']:.1f}%, in words {100 * score['in_words']['accuracy']:.1f}%")

# %% [markdown]
# **17.6** points with letters, **0.0** in words: half of what the clamp takes from the quiz is its form, and no fact is
# lost by it. The answers in words fall with the other features.
# <!-- 100 * (found[0]["accuracy"] - found[1]["accuracy"]),
# 100 * (found[0]["in_words"]["accuracy"] - found[1]["in_words"]["accuracy"]) -->
