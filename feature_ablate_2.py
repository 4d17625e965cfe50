# %% [markdown]
"""
# Lesson 2 of 3: does the model forget WMDP-Bio, and would you notice if it did not?

    python feature_ablate_2.py --layer 7 --n-features 50
    python feature_ablate_2.py --layer 9 --n-features 20 --clamp -80
    python feature_ablate_2.py --model gemma-2-2b-it --layer 7 --n-features 50

Features of a sparse autoencoder (SAE; lesson 1 shows what they are) that fire on WMDP-Bio and not on
ordinary text are ablated, and the other half of WMDP-Bio is asked, with MMLU beside it. Then the same
facts are asked for in words: has the model lost them, or only the letters A to D? Last: which of the
features do it?
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. To change a setting, add a line such as `args.layer = 3`
# to the next cell and run everything below it. Numbers in **bold** are what the first command above gives.

# %%
from runs import Run, parse, parser

args = parse(parser(__doc__, quiz=True, controls=4))

import torch

import data
import evaluation
import show
from common import NONE, ablate, ablation, load_model, load_retrained, load_sae, random_features

# %% [markdown]
# ## A model, an SAE, two quizzes
# Each quiz has two halves. Features are picked on one of WMDP-Bio's, and scores are those of the other halves, which
# are "held out". The embedded model's WMDP-Bio is a harmless stand-in on microbiology.

# %%
model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
sae = load_sae(args.sae, args.layer, model, args.model)
print(f"{model.cfg.n_layers} layers; {sae.cfg.d_sae} features of {sae.hook_point}")

# %%
halves = {"seed": args.seed, "pick_on": args.pick_on}
wmdp = data.load("wmdp_bio", args.model, args.data, variant=args.wmdp, topic=args.topic, **halves)
mmlu = data.utility_subset(data.load("mmlu", args.model, args.data, **halves), args.subjects)
ask = {"style": args.prompt, "batch_size": args.batch_size}
wikitext, mmlu_dev = (data.load(name, args.model, args.data) for name in ("wikitext", "mmlu_dev"))
corpus = data.load_corpus(args.forget_corpus, args.model, args.data)
which = args.limit, args.prompt, args.skip_long, args.robust
bio, other = (evaluation.questions(model, quiz.held_out, *which) for quiz in (wmdp, mmlu))
print(f"{bio.title}: {len(bio)} questions held out; {other.title}: {len(other)}")

# %% [markdown]
# ## Pick
# By the ratio of how often a feature fires on the tuning half of WMDP-Bio to how often it does on Wikitext and on
# MMLU's development questions (lesson 1 counts it out).

# %%
texts = data.picking_texts(wmdp.tuning, corpus, wikitext, mmlu_dev, args.pick_text)
run = Run("feature_ablate_2.py", args, [wmdp.tuning, bio, other, corpus, wikitext, mmlu_dev], [sae])
stats = evaluation.FeatureStats(
    model, sae, args.layer, *data.picking_windows(model.tokenizer, *texts, args.context),
    rule=args.pick, questions=wmdp.tuning, seed=args.seed, style=args.prompt,
    batch_size=args.batch_size, insist=not args.no_sanity,
)  # fmt: skip
features = stats.features(args.n_features)
show.print_features(stats, features)

# %%
title = f"{run.name}, layer {args.layer}, {args.n_features} features"
figures = {"features": show.scatter(features, *stats.rates, title)}

# %% [markdown]
# ## The model speaks
# A question of each quiz, answered in words: by the model as it is, with the features set to zero where they are
# active (zero ablation), and with a negative value in place of zero (a clamp). Guess first: which of the six answers
# will be wrong?

# %%
clamp = run.settings["clamp"]
ablations = {"unablated": ([], 0.0), "zeroed": (features, 0.0), "clamped": (features, clamp)}
question = bio.rows[min(1, len(bio) - 1)]
for row in (question, other.rows[0]):
    print(row["question"])
    asked = data.IN_WORDS.format(row["question"].strip())
    for name, (some, value) in ablations.items():
        with ablate(model, sae, some, value):
            said = model.generate(asked, max_new_tokens=6, do_sample=False, verbose=False)
        print(f"    {name:10}", said[len(asked) :].split("\n")[0])

# %% [markdown]
# Zeroed, it says what it always says. Clamped, it says a metal in place of a microbe, and to other questions "which
# which which": that is broken, not only forgetful. The moon keeps its planet. On how many tokens of the question is
# any of the features active? And how far does each push a token's vector?

# %%
ids, _ = data.encode_question(model, question, args.prompt)
h = model.run_with_cache(ids, names_filter=sae.hook_point)[1][sae.hook_point].float()
a = sae.encode(h)[0, :, features]  # h is (1, pos, d_model), a is (pos, n)
print(f"active on {(a[1:] > 0).any(-1).sum()} of {len(a) - 1} tokens")
picture = "all picked features", "activation"
figures["question"] = show.token_figure(model, ids.tolist(), [a.sum(-1)], *picture)

# %%
shares = {}
for value in (0.0, clamp):
    moved = torch.where(a > 0, value - a, 0) @ sae.W_dec[features]  # (pos, d_model)
    shares[value] = 100 * (moved.norm(dim=-1) / h[0].norm(dim=-1))[1:].mean()
    print(f"clamp {value:g} moves a token by {shares[value]:.0f}% of its length on average")

# %% [markdown]
# ## The quiz
# A clamp of -40 moves a token's vector by **26**% of its length; zeroing moves it by **2**%. Now count, with a name
# for each row. The control: random features, drawn several times among those that fire as often on ordinary text, and
# pushed equally far. And what no real model has: the same model, trained again without the facts. Guess: how many
# questions will the model still get right with the features at zero? <!-- shares[clamp], shares[0.0] -->

# %%
clamped = f"clamp {clamp:g}"
rows = {"unablated": NONE, "zero ablation": ablation(sae, features)}
rows[clamped] = ablation(sae, features, clamp)
rows |= random_features(sae, stats.rates, features, clamp, args.controls, args.seed)
if retrained := load_retrained(args.model, wmdp, args.device, args.dtype):
    rows[show.RETRAINED] = retrained
letters, *sure = evaluation.letters(model, bio, rows, **ask)
show.table([letters], ["unablated", "zero ablation"])

# %% [markdown]
# Nothing happens: **98.0**% before, **98.0**% after. On real models it is next to nothing (20 features a layer moved
# gemma-2-2b-it from 63.6 to 62.5%: Farrell et al.'s published notebooks). The features are there when biology is, but
# the answer does not hang on them. And the clamp? <!-- 100 * letters["unablated"].mean, 100 * letters["zero
# ablation"].mean -->

# %%
show.table([letters, *sure])
print(bio.published or "")
rounding = None
if run.dtype != "float32":
    rounding = evaluation.rounding_noise(model, bio, style=args.prompt)
    print(f"answers that change with the batch size alone: {rounding}")

# %% [markdown]
# The clamp takes accuracy from **98.0** to **64.7**%, which is further than random features take it. So it matters
# which features are clamped. No forgetting is better than that of the retrained model: **22.5**%, which is chance.
#
# ## Forgotten, or only silent?
# A model that has lost the facts gives a wrong letter; one that has lost the form gives none. So look at the
# probability of all four letters together, **1.00** under the clamp, and ask without options. <!-- 100 *
# letters["unablated"].mean, 100 * letters[clamped].mean, 100 * letters[show.RETRAINED].mean, sure[0][clamped].mean
# -->

# %%
words = evaluation.words(model, bio, rows, batch_size=args.batch_size)
show.table([words])

# %% [markdown]
# In words it falls from **97.5** to **56.4**%, again further than under random features. So the model has lost facts,
# not only the quiz's form; about half of them remain. MMLU, the quiz on all else, should stay as it is. <!-- 100 *
# words["unablated"].mean, 100 * words[clamped].mean -->

# %%
mmlu_letters, *mmlu_sure = evaluation.letters(model, other, rows, **ask)
show.table([mmlu_letters, *mmlu_sure])
figures["accuracy"] = show.intervals([letters, words, mmlu_letters], title)

# %% [markdown]
# Under the clamp it loses **2.4** points; most draws of random features cost less. <!-- -100 *
# mmlu_letters[clamped].change -->

# %% [markdown]
# ## Which of the features do it?
# Clamp each of them alone, and ask every third question, in letters and in words. Guess: are the same features behind
# both?

# %%
third = bio.only(range(0, len(bio), 3))
alone = {f"{feature}": ablation(sae, [feature], clamp) for feature in features}
alone = {"unablated": NONE} | alone
in_letters = evaluation.letters(model, third, alone, **ask)[0]
in_words = evaluation.words(model, third, alone, batch_size=args.batch_size)
for measure in (in_letters, in_words):
    effects = sorted((100 * measure[name].change, name) for name in alone if name != "unablated")
    print(measure.title, *(f"{name}: {change:+.1f}" for change, name in effects[:3]), sep="   ")
strongest = int(effects[0][1])

# %% [markdown]
# One feature takes **17.6** points in letters and nothing in words: 624, the letter C before an option (lesson 1). It
# is the form that is lost there, no fact. Another takes **23.5** points in words and nothing in letters: 449, which
# is most active in questions on the parts of a microbe (lesson 1). Where is it active when a question is asked in
# words? <!-- -100 * in_letters["624"].change, -100 * in_words["449"].change -->

# %%
asked = [data.IN_WORDS.format(row["question"].strip()) for row in third.rows]
asked = [data.encode(model.tokenizer, text) for text in asked]
figures |= show.contexts_figures(model, sae, [strongest], asked, n=6)

# %% [markdown]
# On the colon at the end, each time. There the model is about to answer, and a push of the vector changes what it
# says next. In the quiz this feature is hardly ever active on the last token. So these words are lost where they are
# spoken, and that says little about where the facts are kept.

# %%
measures = [letters, *sure, words, mmlu_letters, *mmlu_sure]
record = run.write(rows, measures, figures, quality=stats.quality, rounding=rounding)

# %% [markdown]
# ## Two exercises
# **Exercise 1.** Leave the two features out. How much of the damage remains, in letters and in words?
#
# <details><summary>Answer</summary>
#
# ```python
# others = {"unablated": NONE, "all": rows[clamped], "without the two": ablation(
#     sae, [feature for feature in features if feature not in (624, 449)], clamp)}
# rest = [evaluation.letters(model, bio, others)[0], evaluation.words(model, bio, others)]
# show.table(rest)
# ```
#
# **22.5** of 33 points in letters and **28.9** of 41 in words: single effects do not add up to the whole.
#
# </details>
# <!-- -100 * rest[0]["without the two"].change, -100 * rest[1]["without the two"].change -->

# %% [markdown]
# **Exercise 2.** Clamp features of two layers at once.
#
# <details><summary>Answer</summary>
#
# ```python
# from edits import together
#
# early = load_sae(None, 3, model)
# early_stats = evaluation.FeatureStats(model, early, 3, stats.forget, stats.retain)
# first, second = ablation(early, early_stats.features(20), clamp), ablation(sae, features[:20], clamp)
# two = {"unablated": NONE, "layer 3": first, "layer 7": second, "both": together(first, second)}
# both = [evaluation.letters(model, bio, two)[0], evaluation.words(model, bio, two)]
# show.table(both)
# ```
#
# In letters layer 3 alone leaves **89.2**%, layer 7 **72.1**%, both **65.2**%; in words **85.3**, **83.3** and
# **77.5**%.
#
# </details>
# <!-- 100 * both[0]["layer 3"].mean, 100 * both[0]["layer 7"].mean, 100 * both[0]["both"].mean, 100 * both[1]["layer
# 3"].mean, 100 * both[1]["layer 7"].mean, 100 * both[1]["both"].mean -->

# %% [markdown]
# What next? `args.layer, args.n_features, args.clamp = 9, 20, -80.0`: **57.8**% in letters, but **85.8**% in words,
# so there it is the quiz that suffers. <!-- --layer 9 --n-features 20 --clamp -80: 100 * letters[clamped].mean, 100 *
# words[clamped].mean -->

# %% [markdown]
# Another rule, `args.pick = "dsg"`: **51.0**% in letters and **51.0**% in words, but MMLU falls to **92.3**%. <!--
# --pick dsg: 100 * letters[clamped].mean, 100 * words[clamped].mean, 100 * mmlu_letters[clamped].mean -->
