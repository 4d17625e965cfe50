# %% [markdown]
"""
# Lesson 1 of 3: what is a feature, and what does it cost to remove some?

    python feature_ablate_1.py --layer 7 --n-features 50
    python feature_ablate_1.py --model gemma-2-2b-it --layer 7 --n-features 50

A language model hands each token from layer to layer as one vector, the residual stream. A sparse
autoencoder (SAE) writes that vector, up to an error, as a sum of a few out of thousands of fixed
directions, its features. Each is multiplied by a number, its activation. We look at some features,
find those of biology, write the hook that removes them, and see what other subjects lose.
"""

# %% [markdown]
# After this you can read off which features are active on a token, find those of a subject, write the hook that
# ablates them, and tell its damage from that of random features. You need Python, PyTorch, and what a language model
# is.
#
# Start a notebook in this folder, beside the helper files. What begins with `args.` is a flag, explained by `--help`;
# skip it at first reading. To change a setting, add a line such as `args.layer = 3` to the next cell and run
# everything below it. Where it says guess, guess before you read on. Point at a coloured token to see its value.
# Numbers in **bold** are what the first command above gives.

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
# WMDP-Bio is the forget set: questions that a model should no longer be able to answer. MMLU, questions on other
# subjects, should stay as it is. The model in this folder, `tiny`, has harmless stand-ins; that of WMDP-Bio is
# textbook microbiology. Each quiz has two halves: features are picked on a tuning half, scores come from a held-out
# half.

# %%
model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
halves = {"seed": args.seed, "pick_on": args.pick_on}
wmdp = data.load("wmdp_bio", args.model, args.data, variant=args.wmdp, topic=args.topic, **halves)
mmlu = data.load("mmlu", args.model, args.data, **halves).of(args.subjects, wmdp.topic)
ask = {"style": args.prompt, "batch_size": args.batch_size}
which = args.limit, args.prompt, args.skip_long, args.robust
mmlu, mmlu_tuning = evaluation.questions(model, mmlu.held_out, *which), mmlu.tuning
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
# With options it answers in one token, the letter:

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
# The SAE belongs to one layer, after which each token is a vector `h`. Its `encode` gives every feature's activation
# on the token. Most are 0; above 0 a feature is active, it "fires". `decode` adds up activation times direction. Look
# at the token before the question mark. A feature "promotes" the tokens that its direction makes likelier next.

# %%
sae = load_sae(args.sae, args.layer, model, args.model)
ids, _ = data.encode_question(model, question, args.prompt)
tokens = [model.tokenizer.decode(token) for token in ids[0]]
h = model.run_with_cache(ids, names_filter=sae.hook_point)[1][sae.hook_point].float()
a = sae.encode(h)  # h is (1, pos, d_model), a is (1, pos, d_sae), a number per feature
at = next((place for place, token in enumerate(tokens) if "?" in token), len(tokens)) - 1
active, five = a[0, at] > 0, a[0, at].topk(5).indices.tolist()
print(f"token {tokens[at]!r}: {active.sum()} of {len(active)} features are active; five strongest:")
for feature, promoted in zip(five, show.promoted_tokens(model, sae, five)):
    print(f"  {feature:5}, activation {a[0, at, feature]:4.1f}, promotes {promoted}")

# %% [markdown]
# Few of these lists have one clear meaning. How many features are active on a token, on average? This number is the
# SAE's L0. And which share of the variance of `h` between tokens do they explain? The first token, BOS (beginning of
# sequence), is left out.

# %%
l0 = (a[0, 1:] > 0).sum(-1).float().mean()
missed = (h - sae.decode(a))[0, 1:].pow(2).sum() / (h - h[0, 1:].mean(0))[0, 1:].pow(2).sum()
print(f"on this question: L0 {l0:.0f}, variance explained {1 - missed:.2f}")

# %% [markdown]
# On this question **36** features a token explain **97**% of the variance. The next cell measures both on Wikitext:
# **48**, where the SAE promises 40, and **94**%. <!-- l0, 100 * (1 - missed), stats.quality["l0"], 100 *
# stats.quality["variance_explained"] -->
# ## Which features are about biology?
# A feature's firing rate is the share of tokens on which it fires. The forget rate is that on WMDP-Bio's tuning half,
# the retain rate that on Wikitext or on quizzes on other subjects, whichever is larger. Rank by their ratio:
#
#     ratio = ((fires on forget + 1) / (tokens + 1)) / ((fires on retain + 1) / (tokens + 1))
#
# The + 1 keeps a feature that fires once or twice, by chance, from ranking first.

# %%
texts = data.picking_texts(wmdp.tuning, corpus, wikitext, mmlu_dev, args.pick_text)
run = Run("feature_ablate_1.py", args, [wmdp.tuning, mmlu, corpus, wikitext, mmlu_dev], [sae])
stats = evaluation.FeatureStats(
    model, sae, args.layer, *data.picking_windows(model.tokenizer, *texts, args.context),
    rule=args.pick, own=args.features, questions=wmdp.tuning, seed=args.seed,
    utility=data.utility_subset(mmlu_tuning, args.subjects),
    clamp=run.settings["clamp"], insist=not args.no_sanity, **ask,
)  # fmt: skip
forget, retain = stats.rates
features = stats.features(run.settings["n_features"])

# %% [markdown]
# In the figure each dot is a feature, and on the dotted line both rates are equal. The picked ones, in red, lie far
# above it: they fire on biology, and hardly on the retain text. Guess: what will the first one be, a microbe's name?

# %%
show.print_features(stats, features, most=8)
title = f"{run.name}, layer {args.layer}, {len(features)} features"
figures = {"features": show.scatter(features, forget, retain, title)}

# %% [markdown]
# No: it fires most on the token "C". Pieces of names, "illus" and "acterium", come later. Here are the texts on which
# it is most active; then those of the second feature, and of the one that fires most often, the diamond on the right.

# %%
frequent = max(features, key=lambda feature: forget.rate[feature])
figures |= show.contexts_figures(model, sae, [*features[:2], frequent], stats.forget)

# %% [markdown]
# Feature 624 fires on the letter C before an option, in quizzes on biology only. So a high ratio can come from the
# form of the forget set, not from its content. 1902 fires most on "disease", and promotes it and "vaccine". 449 fires
# on **5.8**% of the forget tokens, on small words, letters and dots, and most strongly in one kind of question: what
# job a part of a microbe does. Lesson 2 shows what clamping it does. <!-- 100 * forget.rate[frequent] -->
# ## The hook
# A hook is a function that the model calls with `h` after the SAE's layer; what it returns takes the place of `h`. To
# ablate features is to give them a new activation, the clamp, where they are active. Our hook adds only the change,
# (new - old activation) times direction. So the part of `h` that the SAE cannot explain stays. Special tokens such as
# BOS are not edited. A clamp of 0 removes features (zero ablation); a negative one pushes `h` against them (Farrell
# et al., arXiv 2410.19278). SAEs that rescale `h` take two lines more (`edits.py`).

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
# Guess first: with the features zeroed, which letter comes, and how surely? And clamped to -40? That default was
# chosen on the tuning half. `common.ablate` is the same hook for any SAE; it encodes the picked features alone.

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
# Zeroed, the features leave the right letter at **1.00**; clamped, at **0.78**. In words the clamped model no longer
# names a microbe. The moon still has its planet. <!-- tried["zero ablation"][right], tried["clamp"][right] -->
# ## MMLU: what else is harmed?
# Now all held-out questions of MMLU, with controls. "Patched" runs the hook with no change, and must equal the
# unablated model. "Reconstruction" puts `decode(encode(h))` in the place of `h`: the cost of the SAE's error. Random
# features, drawn several times among those that fire as often on retain text, show what any would cost. "Retrained"
# is the same model, trained again without WMDP-Bio's facts. Brackets are 95% intervals; the second number is the
# change from the first row, with McNemar's p. P(a letter) is the probability of all four letters together.

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
# Of **98.8**% the clamp takes **2.4** points. Most draws of random features take less. Guess by subject: do zoology
# and human anatomy, the neighbours of microbiology, lose most? <!-- 100 * letters["unablated"].mean, -100 *
# letters[clamped].change -->

# %%
show.group_table(letters)
figures["subjects"] = show.group_figure(letters, f"{mmlu.title}: {title}")

# %% [markdown]
# No: world history loses most, **8.9** points; anatomy and zoology lose one answer each. No change has a star, so all
# of them may be chance. The record, a file, keeps all of the above, to compare with other runs. <!-- -100 *
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
# The first 20 leave **0.12**, all 50 leave **0.78**: here 30 more features undo harm. All pushes act on one residual
# stream, where they can offset each other. So the effects of single features do not simply add up.
#
# </details>
# <!-- some[20], some[50] -->

# %% [markdown]
# **Exercise 2.** Ask a question of your own on another subject, unablated and clamped. `question` shows its form.
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
# From **1.00** to **1.00**: the clamp does not touch it. Try one on microbes, too.
#
# </details>
# <!-- before[1], after[1] -->

# %% [markdown]
# What next? Try `args.layer = 9`, where the clamp leaves MMLU at **96.7**%, or fewer features. Then read lesson 2.
# <!-- --layer 9: 100 * letters[clamped].mean -->
#
# Read on: [Towards Monosemanticity](https://transformer-circuits.pub/2023/monosemantic-features/index.html), on what
# a feature is; [Farrell et al.](https://arxiv.org/abs/2410.19278), whose experiment lessons 1 and 2 are; the quizzes
# [WMDP](https://arxiv.org/abs/2403.03218) and [MMLU](https://arxiv.org/abs/2009.03300); SAEs of a real model, [Gemma
# Scope](https://arxiv.org/abs/2408.05147), each feature shown at [Neuronpedia](https://www.neuronpedia.org).
