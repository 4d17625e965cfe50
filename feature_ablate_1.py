# %% [markdown]
"""
# Lesson 1 of 3: what is a feature, and what does it cost to remove some?

    python feature_ablate_1.py --layer 7 --n-features 50
    python feature_ablate_1.py --model gemma-2-2b-it --layer 7 --n-features 50

A language model hands each token from layer to layer as one vector, the residual stream. A sparse
autoencoder (SAE) writes that vector as a sum of a few out of thousands of fixed directions, its
features. We look at some, find those of biology, write the hook that removes them, and see what
other subjects lose.
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
from common import NONE, ablate, ablation, load_model, load_retrained, load_sae
from common import patched, random_features, reconstruction

# %% [markdown]
# ## The model speaks
# WMDP-Bio is the forget set: what a model should not know any more. The embedded model has a harmless stand-in,
# textbook microbiology. MMLU, quizzes on other subjects, should stay as it is. One half of each quiz is kept apart
# ("held out"): nothing is chosen on it, and all is reported on it.

# %%
model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
halves = {"seed": args.seed, "pick_on": args.pick_on}
wmdp = data.load("wmdp_bio", args.model, args.data, variant=args.wmdp, topic=args.topic, **halves)
mmlu = data.load("mmlu", args.model, args.data, **halves).of(args.subjects)
ask = {"style": args.prompt, "batch_size": args.batch_size}
which = args.limit, args.prompt, args.skip_long, args.robust
mmlu = evaluation.questions(model, mmlu.held_out, *which)
wikitext, mmlu_dev = (data.load(name, args.model, args.data) for name in ("wikitext", "mmlu_dev"))
corpus = data.load_corpus(args.forget_corpus, args.model, args.data)
print(f"{wmdp.title}: {len(wmdp.held_out)} questions held out; {mmlu.title}: {len(mmlu)}")

# %% [markdown]
# A question of each, and what the model says to it:


# %%
def say(question):
    """The model's answer in words, the likeliest token each time."""
    asked = data.IN_WORDS.format(question["question"].strip())
    said = model.generate(asked, max_new_tokens=6, do_sample=False, verbose=False)
    return said[len(asked) :].split("\n")[0]


question, other = wmdp.held_out.rows[0], mmlu.rows[0]
for row in (question, other):
    print(row["question"], say(row))

# %% [markdown]
# In a quiz it answers with one token, the letter of an option:

# %%
print(data.prompt(question, style=args.prompt))


@torch.inference_mode()
def probabilities(question):
    """Of the next tokens " A", " B", " C" and " D"; (4,)."""
    ids, letter_ids = data.encode_question(model, question, args.prompt)
    return model(ids)[0, -1].float().softmax(-1)[letter_ids].amax(-1).cpu()


right = question["answer"]
print("  ".join(f"{letter} {p:.2f}" for letter, p in zip("ABCD", probabilities(question))))

# %% [markdown]
# ## One token, and its features
# Behind the SAE's layer each token is a vector `h`. The SAE's `encode` says how active each feature is on it: most
# are at 0. Its `decode` adds up activation times direction again. Look at the token before the question mark. A
# feature "promotes" the tokens that its direction makes likelier as the next one.

# %%
sae = load_sae(args.sae, args.layer, model, args.model)
ids, _ = data.encode_question(model, question, args.prompt)
tokens = [model.tokenizer.decode(token) for token in ids[0]]
h = model.run_with_cache(ids, names_filter=sae.hook_point)[1][sae.hook_point].float()
a = sae.encode(h)  # h is (1, pos, d_model), a is (1, pos, d_sae)
at = next((place for place, token in enumerate(tokens) if "?" in token), len(tokens)) - 1
active, five = a[0, at] > 0, a[0, at].topk(5).indices.tolist()
print(f"token {tokens[at]!r}: {active.sum()} of {len(active)} features are active; five strongest:")
for feature, promoted in zip(five, show.promoted_tokens(model, sae, five)):
    print(f"  {feature:5}, activation {a[0, at, feature]:4.1f}, promotes {promoted}")

# %% [markdown]
# How many features are active on a token, on average? This number is the SAE's L0. And how much of what sets one
# token apart from another do they explain?

# %%
l0 = (a[0, 1:] > 0).sum(-1).float().mean()
missed = (h - sae.decode(a))[0, 1:].pow(2).sum() / (h - h[0, 1:].mean(0))[0, 1:].pow(2).sum()
print(f"on this question: L0 {l0:.0f}, variance explained {1 - missed:.2f}")

# %% [markdown]
# **36** features explain **97**%. (The check below says **48** and **94**%: it is made on Wikitext, which is less
# uniform than a question.) <!-- l0, 100 * (1 - missed), stats.quality["l0"], 100 *
# stats.quality["variance_explained"] -->
# ## Which features are about biology?
# For each, take the share of tokens on which it fires (a) in the tuning half of WMDP-Bio, (b) in Wikitext, (c) in
# quizzes on other subjects. Rank by a / max(b, c), with one token added to each count:
#
#     ratio = ((fires on forget + 1) / (tokens + 1)) / ((fires on retain + 1) / (tokens + 1))

# %%
texts = data.picking_texts(wmdp.tuning, corpus, wikitext, mmlu_dev, args.pick_text)
run = Run("feature_ablate_1.py", args, [wmdp.tuning, mmlu, corpus, wikitext, mmlu_dev], [sae])
stats = evaluation.FeatureStats(
    model, sae, args.layer, *data.picking_windows(model.tokenizer, *texts, args.context),
    rule=args.pick, questions=wmdp.tuning, seed=args.seed, style=args.prompt,
    batch_size=args.batch_size, insist=not args.no_sanity,
)  # fmt: skip
forget, retain = stats.rates
features = stats.features(args.n_features)

# %% [markdown]
# Each dot is a feature. The picked ones lie far above the dotted line: they fire on biology, and hardly anywhere
# else. Guess: what will the first one be, the name of a microbe?

# %%
show.print_features(stats, features, most=8)
title = f"{run.name}, layer {args.layer}, {args.n_features} features"
figures = {"features": show.scatter(features, forget, retain, title)}

# %% [markdown]
# Here are the texts on which it is most active, and the same for the second one and for the one that fires most
# often, the diamond on the right.

# %%
frequent = max(features, key=lambda feature: forget.rate[feature])
figures |= show.contexts_figures(model, sae, [*features[:2], frequent], stats.forget)

# %% [markdown]
# Feature 624 is the letter C before an option, in quizzes on biology only. A high ratio tells what is particular to
# the forget set, and that may be its form. 1902 is the word "disease", and promotes it and "vaccine". 449 fires on
# **5.8**% of the forget tokens, on small words and dots, but most in one kind of question: what job a part of a
# microbe does. Lesson 2 finds out what it is good for. <!-- 100 * forget.rate[frequent] -->
# ## The hook
# To ablate is to replace activations and leave all else: `h` gets only the difference that this makes. So what the
# SAE cannot explain stays, and so do special tokens such as BOS. Clamp 0 takes features away (zero ablation); a
# negative one pushes the other way (Farrell et al., arXiv 2410.19278). SAEs that rescale `h` take two lines more
# (`edits.py`).

# %%
special = torch.tensor(model.tokenizer.all_special_ids, device=ids.device)
ordinary = ~torch.isin(ids, special)[..., None]


def edit(h, hook=None, clamp=0.0):
    a = sae.encode(h.float())[..., features]  # (batch, pos, n)
    wanted = torch.where(a > 0, clamp, a)  # only where a feature is active
    change = (wanted - a) @ sae.W_dec[features]  # (batch, pos, d_model)
    return torch.where(ordinary, h + change, h).to(h.dtype)


print(f"zeroing changes {(edit(h) != h).any(-1).sum()} of {h.shape[1]} tokens")

# %% [markdown]
# Guess first: with the features gone from every token, which letter comes, and how surely? And pushed below zero?
# `common.ablate` is that hook, for any SAE; it encodes the picked features alone.

# %%
tried, clamp = {"unablated": probabilities(question)}, run.settings["clamp"]
for value, name in ((0.0, "zero ablation"), (clamp, "clamp")):
    with model.hooks(fwd_hooks=[(sae.hook_point, partial(edit, clamp=value))]):
        tried[name] = probabilities(question)
    with ablate(model, sae, features, value):
        off = (probabilities(question) - tried[name]).abs().max()
        print(f"{name} {value:g}: says {say(question)}, and {say(other)};", end=" ")
    print(f"right letter {tried[name][right]:.2f}; common.ablate differs by {off:.0e}")
figures["letters"] = show.letter_figure(tried, right, f"layer {args.layer}, one question")

# %% [markdown]
# Zeroed, they leave the right letter at **1.00**; pushed below zero, at **0.78**. In words the answer is gone: what
# comes now is no microbe at all. The moon still has its planet. <!-- tried["zero ablation"][right],
# tried["clamp"][right] -->
# ## MMLU: what else is harmed?
# Now every question of MMLU's held-out half. Controls: "patched" changes nothing and must equal the unablated model;
# "reconstruction" shows what the SAE's own error costs; random features, drawn several times among those that fire as
# often on ordinary text, show what any would cost. The last row is the same model, trained again without the facts.

# %%
clamped = f"clamp {clamp:g}"
rows = {
    "unablated": NONE,
    "SAE patched, nothing ablated": patched(sae, features),
    "SAE reconstruction, no error term": reconstruction(sae),
    "zero ablation": ablation(sae, features),
    clamped: ablation(sae, features, clamp),
}
rows |= random_features(sae, stats.rates, features, clamp, args.controls, args.seed)
print(*rows, sep=", ")

# %%
if retrained := load_retrained(args.model, wmdp, args.device, args.dtype):
    rows[show.RETRAINED] = retrained
letters, *sure = evaluation.letters(model, mmlu, rows, **ask)
show.table([letters, *sure])
figures["accuracy"] = show.intervals([letters], title)

# %% [markdown]
# Of **98.8**% the clamp takes **2.4** points. Most draws of random features take less. Guess by subject: are the
# neighbours of microbiology, zoology and human anatomy, hit first? <!-- 100 * letters["unablated"].mean, -100 *
# letters[clamped].change -->

# %%
show.group_table(letters)
figures["subjects"] = show.group_figure(letters, f"{mmlu.title}: {title}")

# %% [markdown]
# No: world history loses most, **8.9** points, anatomy and zoology an answer each; without a star none of it is
# certain. The record keeps all of the above, to compare with other runs. <!-- -100 *
# letters.by_group()["world_history"][clamped].change -->

# %%
record = run.write(rows, [letters, *sure], figures, quality=stats.quality)

# %% [markdown]
# ## Two exercises
# **Exercise 1.** How many features does it take? Guess how sure the model is of the right letter with the first 1, 5
# and 20 of the 50 clamped.
#
# <details><summary>Answer</summary>
#
# ```python
# some = {}
# for n in (1, 5, 20, 50):
#     with ablate(model, sae, features[:n], clamp):
#         some[n] = probabilities(question)[right]
#     print(f"the first {n}: right letter {some[n]:.2f}")
# ```
#
# The first 20 leave **0.12**, all 50 leave **0.78**: more features do less harm here. Pushes add up in one vector,
# and some cancel others; effects of single features do not add up.
#
# </details>
# <!-- some[20], some[50] -->

# %% [markdown]
# **Exercise 2.** Ask a question of your own on another subject, unablated and clamped.
#
# <details><summary>Answer</summary>
#
# ```python
# mine = {"question": "Which organ pumps the blood?", "choices": ["lung", "heart", "liver", "spleen"],
#         "answer": 1, "subject": "human_anatomy"}
# before = probabilities(mine)
# with ablate(model, sae, features, clamp):
#     after = probabilities(mine)
# print(f"heart: {before[1]:.2f} unablated, {after[1]:.2f} clamped")
# ```
#
# From **1.00** to **1.00**. Try one on microbes, too.
#
# </details>
# <!-- before[1], after[1] -->

# %% [markdown]
# What next: `args.layer = 9`, where the clamp leaves MMLU at **96.7**%; fewer features; lesson 2. <!-- --layer 9: 100
# * letters[clamped].mean -->
