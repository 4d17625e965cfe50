# %% [markdown]
"""
# Lesson 2 of 3: does the model forget WMDP-Bio, and would you notice if it did not?

    python feature_ablate_2.py --layer 7 --n-features 50
    python feature_ablate_2.py --layer 9 --n-features 20 --clamp -80
    python feature_ablate_2.py --model gemma-2-2b-it --layer 7 --n-features 50

We pick features of a sparse autoencoder (SAE; lesson 1 shows what they are) that fire on one half
of WMDP-Bio, the forget set, and not on ordinary text. We ablate them, and ask the other half, and
MMLU. Then we ask for the same facts in words: has the model lost them, or only the letters A to D?
Last: which of the features do it?
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. To change a setting, add a line such as `args.layer = 3`
# to the next cell and run everything below it. Numbers in **bold** are what the first command above gives.

# %%
from runs import Run, parse, parser

args = parse(parser(__doc__, quiz=True, controls=4))

from functools import partial

import torch

import data
import evaluation
import show
from common import NONE, ablate, ablation, load_model, load_retrained, load_sae, random_features

# %% [markdown]
# ## A model, an SAE, two quizzes
# Each quiz has two halves. Features are picked on the tuning half of WMDP-Bio. Scores come from the held-out halves.
# The model in this folder, `tiny`, has a harmless stand-in for WMDP-Bio, on microbiology.

# %%
model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
sae = load_sae(args.sae, args.layer, model, args.model)
print(f"{model.cfg.n_layers} layers; {sae.cfg.d_sae} features of {sae.hook_point}")

# %%
halves = {"seed": args.seed, "pick_on": args.pick_on}
wmdp = data.load("wmdp_bio", args.model, args.data, variant=args.wmdp, topic=args.topic, **halves)
mmlu = data.load("mmlu", args.model, args.data, **halves)
mmlu = data.utility_subset(mmlu, args.subjects, wmdp.topic)
ask = {"style": args.prompt, "batch_size": args.batch_size}
wikitext, mmlu_dev = (data.load(name, args.model, args.data) for name in ("wikitext", "mmlu_dev"))
corpus = data.load_corpus(args.forget_corpus, args.model, args.data)
which = args.limit, args.prompt, args.skip_long, args.robust
bio, other = (evaluation.questions(model, quiz.held_out, *which) for quiz in (wmdp, mmlu))
print(f"{bio.title}: {len(bio)} questions held out; {other.title}: {len(other)}")

# %% [markdown]
# ## Pick
# Features are ranked by a ratio of firing rates: that on the tuning half of WMDP-Bio, over that on Wikitext or on
# MMLU's development questions, whichever is larger (lesson 1 has the formula).

# %%
texts = data.picking_texts(wmdp.tuning, corpus, wikitext, mmlu_dev, args.pick_text)
run = Run("feature_ablate_2.py", args, [wmdp.tuning, bio, other, corpus, wikitext, mmlu_dev], [sae])
stats = evaluation.FeatureStats(
    model, sae, args.layer, *data.picking_windows(model.tokenizer, *texts, args.context),
    rule=args.pick, own=args.features, questions=wmdp.tuning, utility=mmlu.tuning, seed=args.seed,
    clamp=run.settings["clamp"], insist=not args.no_sanity, **ask,
)  # fmt: skip
features = stats.features(run.settings["n_features"])
show.print_features(stats, features, most=8)

# %%
title = f"{run.name}, layer {args.layer}, {len(features)} features"
figures = {"features": show.scatter(features, *stats.rates, title)}

# %% [markdown]
# ## The model speaks
# The model answers a question of each quiz in words, three times: unablated; with the picked features set to zero
# where they are active (zero ablation); and with them set to a negative value there (clamp). Guess first: which of
# the six answers will be wrong?

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
# Zeroed, it answers as before. Clamped, it names a metal in place of a microbe. (Lesson 1's question got "which which
# which": that is broken, not only forgetful.) The moon keeps its planet. On how many tokens of the question, BOS left
# out, is a picked feature active? And how far do zero ablation and clamp move the vectors of these tokens?

# %%
ids, _ = data.encode_question(model, question, args.prompt)
h = model.run_with_cache(ids, names_filter=sae.hook_point)[1][sae.hook_point].float()
a = sae.encode(h)[0, :, features]  # h is (1, pos, d_model), a is (pos, n)
fires = (a[1:] > 0).any(-1)
print(f"a picked feature is active on {fires.sum()} of {len(fires)} tokens")
picture = "all picked features", "activation"
figures["question"] = show.token_figure(model, ids.tolist(), [a.sum(-1)], *picture)

# %%
shares = {}
everywhere = torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
for value in (0.0, clamp):
    (edit,) = ablation(sae, features, value).at.values()  # lesson 1's hook
    moved = (edit(h, everywhere) - h)[0]  # (pos, d_model)
    shares[value] = 100 * (moved.norm(dim=-1) / h[0].norm(dim=-1))[1:][fires].mean()
    print(f"clamp {value:g} moves these vectors by {shares[value]:.0f}% of their length on average")

# %% [markdown]
# ## The quiz
# On these tokens a clamp of -40 moves the vector by **139**% of its length; zeroing moves it by **9**%. Now ask all
# held-out questions, with a row of the table for each ablation. The control is random features that fire as often on
# retain text, drawn several times and clamped to the same value. The last row, which no real model has, is the same
# model, trained again without the facts. Guess: how many questions will the model still get right with the features
# at zero? <!-- shares[clamp], shares[0.0] -->

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
# Nothing happens: **98.0**% before, **98.0**% after. On real models it is next to nothing (20 features at every layer
# moved gemma-2-2b-it from 63.6 to 62.5%: Farrell et al.'s published notebooks). The features fire on biology, but the
# answers do not depend on their firing. And the clamp? <!-- 100 * letters["unablated"].mean, 100 * letters["zero
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
# which features are clamped. The retrained model shows what full forgetting looks like: **22.5**%, which is chance.
#
# ## Forgotten, or only silent?
# A model that has lost a fact still gives a letter, often a wrong one. A broken model gives none. The clamped model
# gives one: P(a letter), the probability of all four together, is **1.00**. But it may have lost only the use of the
# letters. So ask in words, without showing options or letters. The answer is the option whose text is likeliest per
# character, so chance is 25% again. <!-- 100 * letters["unablated"].mean, 100 * letters[clamped].mean, 100 *
# letters[show.RETRAINED].mean, sure[0][clamped].mean -->

# %%
words = evaluation.words(model, bio, rows, batch_size=args.batch_size)
show.table([words])

# %% [markdown]
# In words it falls from **97.5** to **56.4**%, again further than under random features. So more is lost than the use
# of letters. The last section asks whether that is facts. First MMLU, which should stay as it is. <!-- 100 *
# words["unablated"].mean, 100 * words[clamped].mean -->

# %%
mmlu_letters, *mmlu_sure = evaluation.letters(model, other, rows, **ask)
show.table([mmlu_letters, *mmlu_sure])
figures["accuracy"] = show.intervals([letters, words, mmlu_letters], title)

# %% [markdown]
# Under the clamp MMLU loses **2.4** points; most draws of random features cost less. <!-- -100 *
# mmlu_letters[clamped].change -->

# %% [markdown]
# ## Which of the features do it?
# Clamp each of them alone, and ask every third question, in letters and in words. Printed, in points: the three
# largest losses of each kind, then a table of the largest. Guess: are the same features behind both?

# %%
third = bio.only(range(0, len(bio), 3))
alone = {"unablated": NONE} | {f"{one}": ablation(sae, [one], clamp) for one in features}
in_letters = evaluation.letters(model, third, alone, **ask)[0]
in_words = evaluation.words(model, third, alone, batch_size=args.batch_size)
strongest = []  # in letters, in words
for measure in (in_letters, in_words):
    effects = sorted((100 * measure[name].change, name) for name in alone if name != "unablated")
    print(measure.title, "each alone:", *(f" {name} {change:+.1f}" for change, name in effects[:3]))
    strongest.append(effects[0][1])
show.table([in_letters, in_words], ["unablated", *dict.fromkeys(strongest)])

# %% [markdown]
# Feature 624 takes **17.6** points in letters and nothing in words. It fires on the letter C before an option (lesson
# 1), so it is the use of letters that suffers, no fact. Feature 449 takes **23.5** points in words and nothing in
# letters. It is most active in questions on the parts of a microbe (lesson 1). Where is it active when a question is
# asked in words? <!-- -100 * in_letters["624"].change, -100 * in_words["449"].change -->

# %%
asked = [data.IN_WORDS.format(row["question"].strip()) for row in third.rows]
asked = [data.encode(model.tokenizer, text) for text in asked]
figures |= show.contexts_figures(model, sae, [int(strongest[1])], asked, n=6)

# %% [markdown]
# It is strongest on small words, and in these six it is also active on the colon at the end, where the model is about
# to answer. Which of its tokens do the harm? Clamp it on the last token alone, then on all others, and see how many
# answers begin with another token. Guess first.

# %%
some = asked[:32]
place, end = torch.arange(max(map(len, some))), torch.tensor([[len(ids) - 1] for ids in some])
spots = {"nowhere": place + end < 0, "last": place == end, "others": (place > 0) & (place < end)}
(edit,), begun = alone[strongest[1]].at.values(), {}  # edit(h, mask) -> h, as lesson 1's hook
batch = data.padded(some, model.tokenizer, model.cfg.device)  # (n, pos), padded on the right
for name, spot in spots.items():
    push = partial(lambda h, hook, spot: edit(h, spot), spot=spot.to(batch.device))
    with torch.inference_mode(), model.hooks([(sae.hook_point, push)]):
        begun[name] = model(batch).argmax(-1).cpu().gather(1, end)[:, 0]
    print(f"{name}: {(begun[name] != begun['nowhere']).sum()} of {len(some)} answers change")

# %% [markdown]
# On the last token alone **11** of 32 answers change, on all others **0**. So these answers are lost at the place
# where they are spoken, and that says little about where the facts are kept. In the quiz the feature is active on
# small words, too, and costs no answer. <!-- (begun["last"] != begun["nowhere"]).sum(), (begun["others"] !=
# begun["nowhere"]).sum() -->

# %%
measures = [letters, *sure, words, mmlu_letters, *mmlu_sure]
record = run.write(rows, measures, figures, quality=stats.quality, rounding=rounding)

# %% [markdown]
# ## Two exercises
# **Exercise 1.** Leave 624 and 449 out and clamp the others. How much of the damage remains, in letters and in words?
# Then ask a question of your own.
#
# <details><summary>Answer</summary>
#
# ```python
# others = {"unablated": NONE, "all": rows[clamped], "without the two": ablation(
#     sae, [feature for feature in features if f"{feature}" not in strongest], clamp)}
# rest = [evaluation.letters(model, bio, others)[0], evaluation.words(model, bio, others)]
# show.table(rest)
#
# choices = ["Plasmodium", "Giardia", "Vibrio", "Candida"]
# mine = {"question": "Which organism causes malaria?", "choices": choices, "answer": 0}
# own = data.Dataset("own", [mine])
# show.table([*evaluation.letters(model, own, others)[1:], evaluation.words(model, own, others)])
# ```
#
# **22.5** of 33 points remain in letters, **28.9** of 41 in words. If single effects added up, it would be about 16
# and 18.
#
# </details>
# <!-- -100 * rest[0]["without the two"].change, -100 * rest[1]["without the two"].change -->

# %% [markdown]
# **Exercise 2.** Clamp 20 features of layer 3 and 20 of layer 7, alone and at once (`edits.together`).
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
# **77.5**%. Two layers take more than either alone.
#
# </details>
# <!-- 100 * both[0]["layer 3"].mean, 100 * both[0]["layer 7"].mean, 100 * both[0]["both"].mean, 100 * both[1]["layer
# 3"].mean, 100 * both[1]["layer 7"].mean, 100 * both[1]["both"].mean -->

# %% [markdown]
# What next? `args.layer, args.n_features, args.clamp = 9, 20, -80.0`: **57.8**% in letters, but **85.8**% in words,
# so there it is mostly the letters that suffer. <!-- --layer 9 --n-features 20 --clamp -80: 100 *
# letters[clamped].mean, 100 * words[clamped].mean -->

# %% [markdown]
# Another rule to pick features, `args.pick = "dsg"` (Muhamed et al., arXiv 2504.08192): **51.0**% in letters and
# **51.0**% in words, but MMLU falls to **92.3**%. <!-- --pick dsg: 100 * letters[clamped].mean, 100 *
# words[clamped].mean, 100 * mmlu_letters[clamped].mean -->

# %% [markdown]
# **In short.** Features at zero change nothing. Clamped far below zero they take a third of the answers in letters
# and two fifths in words, more than random features do. Two of fifty do much of it: one through the letters of the
# quiz, one at the place where the answer is spoken. The retrained model shows what forgetting looks like, and this is
# far from it. See also [Farrell et al.](https://arxiv.org/abs/2410.19278), whose experiment this is, and
# [SAEBench](https://arxiv.org/abs/2503.09532), which scores SAEs by it.
