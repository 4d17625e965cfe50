# %% [markdown]
"""
# Feature importance: which of the features do it?

    python feature_importance.py --layer 7 --n-features 100
    python feature_importance.py --layer 9 --clamp -80
    python feature_importance.py --features 624,449,1334     # your own
    python feature_importance.py --model gemma-2-2b-it --layer 7

Lesson 2 clamps fifty features of a sparse autoencoder (SAE) at once, and the model loses answers. Here each of them is
clamped alone, and each is left out while all others are clamped. Which of them take answers on the forget set,
WMDP-Bio? Which harm MMLU or ordinary text? Do their effects add up? Would a few do what all do?
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. To change a setting, add a line such as `args.layer = 3` to
# the next cell and run everything below it. A run that was stopped goes on where it was when its command is given
# again. Numbers in **bold** are what the first command above gives.

# %%
from runs import Run, parse, parser

args = parse(parser(__doc__, quiz=True, without=("--robust", "--wmdp")))

import data
import evaluation
import show
from common import NONE, ablation, load_model, load_sae

# %% [markdown]
# ## Features, and questions to measure them on
# Features are picked as in lesson 2, on the tuning half of WMDP-Bio, by how often they fire. Their effects are measured
# on the tuning half, too. What is chosen by these effects is then judged on the other half, the held-out one.

# %%
model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
sae = load_sae(args.sae, args.layer, model, args.model)
benchmark = data.load_benchmark(
    args.model, model.tokenizer, folder=args.data, corpus=args.forget_corpus, topic=args.topic,
    subjects=args.subjects, seed=args.seed, pick_on=args.pick_on, pick_text=args.pick_text,
    limit=args.limit, skip_long=args.skip_long, style=args.prompt,
)  # fmt: skip
bio_held_out, bio, mmlu_held_out, mmlu = benchmark.quizzes.values()
print(f"{bio.title}: {len(bio)} questions to measure on, {len(bio_held_out)} held out")

# %%
run = Run("feature_importance.py", args, benchmark.datasets, [sae])
clamp, size = run.settings["clamp"], {"batch_size": args.batch_size}
ask = {"style": args.prompt, **size}
stats = evaluation.FeatureStats(
    model, sae, args.layer,
    *data.picking_windows(model.tokenizer, benchmark.forget, benchmark.retain, args.context),
    rule=args.pick, own=args.features, questions=benchmark.wmdp.tuning, seed=args.seed,
    utility=benchmark.mmlu.tuning, insist=not args.no_sanity, clamp=clamp, **ask,
)  # fmt: skip
features = stats.features(run.settings["n_features"])

# %% [markdown]
# ## Each alone, each left out
# A row for each edit: all features clamped, each of them alone, all but each. Guess: of a hundred features, how many
# take more than one answer in a hundred, in letters or in words?

# %%
rows = {"unablated": NONE, "all": ablation(sae, features, clamp)}
rows |= {f"{one} alone": ablation(sae, [one], clamp) for one in features}
others = {one: [feature for feature in features if feature != one] for one in features}
rows |= {f"all but {one}": ablation(sae, others[one], clamp) for one in features}
letters, _, right = run.cached("letters", lambda: evaluation.letters(model, bio, rows, **ask))
words, word_nats = run.cached("words", lambda: evaluation.words_and_nats(model, bio, rows, **size))
kept, _, kept_right = run.cached("mmlu", lambda: evaluation.letters(model, mmlu, rows, **ask))
(loss,) = run.cached("loss", lambda: [evaluation.loss(model, benchmark.web, rows, **size)])

# %% [markdown]
# A feature's effect is how many answers it takes alone, in letters and in words together. Of two features that take
# equally many, the one counts more that makes the right answers less likely: accuracy counts an answer only once it has
# become wrong, nats rise before that. (So harm lowers accuracy and raises nats.) A star marks a change that stands out
# among all features, with at most 5% false discoveries expected.

# %%
nats = [evaluation.nats_of(right), word_nats, evaluation.nats_of(kept_right)]
measures = [letters, nats[0], words, nats[1], kept, nats[2], loss]
taken = {one: [measure[f"{one} alone"].change for measure in measures[:4]] for one in features}
effect = {one: (-(a + c), b + d) for one, (a, b, c, d) in taken.items()}  # answers, then nats
order = sorted(features, key=effect.get, reverse=True)
alone = ["unablated", *(f"{one} alone" for one in order)]
show.changes([measure.select(alone) for measure in measures])

# %%
for measure in (letters, words):
    change = {one: 100 * measure[f"{one} alone"].change for one in features}
    over, most = [one for one in features if change[one] < -1], sorted(features, key=change.get)[:5]
    print(f"\n{measure.title}: {len(over)} features take over a point alone:",
          *(f" {one} {change[one]:+.1f}" for one in most))  # fmt: skip

# %% [markdown]
# 624, the letter C before an option, takes **25.1** points in letters and none in words. 449 and 1334 take **17.4** and
# **18.3** in words and none in letters (lesson 2 asks where). None of the three costs MMLU an answer. Now the other way
# round: what comes back when a feature is left out while all others are clamped? <!-- -100 * letters["624
# alone"].change, -100 * words["449 alone"].change, -100 * words["1334 alone"].change -->

# %%
left_out = ["all", *(f"all but {one}" for one in order)]
show.changes([measure.select(left_out) for measure in measures])

# %% [markdown]
# The three give back less than they take alone: other features take some of the same answers.
#
# ## Do the effects add up?
# If each feature did its work by itself, the effects of single features would sum to that of all. Guess for which of
# the measures they do.

# %%
pairs = {"all": [("all", "unablated")]}
pairs["alone, summed"] = [(f"{one} alone", "unablated") for one in features]
pairs["left out, summed"] = [("all", f"all but {one}") for one in features]
for measure in measures:
    mean = {row: measure[row].mean for row in rows}
    for name, some in pairs.items():
        total = sum(mean[after] - mean[before] for after, before in some)
        print(f"{name:>18}{show.number(total, measure.unit, '+'):>9}", end="")
    print(f"  {measure.title}, {measure.unit}")

# %% [markdown]
# On ordinary text they do: **0.098** and **0.098** nats, and on MMLU nearly. On the forget set they do not: the single
# effects sum to more than that of all, in words to twice as much, and those left out to less. An answer that several
# features take is lost once. In the figure a feature is worth clamping if it lies high and far to the left.
# <!-- loss["all"].change, sum(loss[f"{one} alone"].change for one in features) -->

# %%
title = f"{run.name}, layer {args.layer}, {len(features)} features at {clamp:g}"
figures = {"effects": show.effects_figure([letters, words], kept, features, title)}

# %% [markdown]
# ## What are they?
# For the twenty of largest effect: how often they fire, the picked feature whose decoder direction is nearest (cosine),
# the tokens that their own direction promotes and suppresses, and the texts of the forget set where they are most
# active, each with its strongest token in brackets.

# %%
top = order[:20]
show.print_features(stats, top)
show.print_contexts(model, sae, top, stats.forget)

# %% [markdown]
# ## A few of them
# Add them one by one, once in the order of the picking rule, once in that of their effects, and ask the half of the
# questions that neither has seen. Guess: how many are needed for half of what all take in words?

# %%
counts = [n for n in (1, 2, 3, 5, 10, 20, 50, 100, 200) if n < len(features)] + [len(features)]
orders = {"list" if args.features else args.pick: features, "effect": order}
few = {"unablated": NONE} | {f"first {n} by {name}": ablation(sae, ids[:n], clamp)
                             for name, ids in orders.items() for n in counts}  # fmt: skip
held_out = run.cached("held-out", lambda: [
    evaluation.letters(model, bio_held_out, few, **ask)[0],
    evaluation.words(model, bio_held_out, few, **size),
    evaluation.letters(model, mmlu_held_out, few, **ask)[0]])  # fmt: skip
show.table(held_out)
figures["curves"] = show.counts_figure(held_out, orders, counts, title)

# %% [markdown]
# Three: in the order of their effects they take **28.4** of 56 points, and MMLU keeps **98.8**%. Two of them do it, 449
# and 1334: 624 takes letters only. With five MMLU suffers, as an effect on the forget set does not tell what a feature
# costs on MMLU. <!-- -100 * held_out[1]["first 3 by effect"].change, 100 * held_out[2]["first 3 by effect"].mean -->

# %%
rows["all"] = ablation(sae, order, clamp)  # in the record by their effects, for --features
record = run.write(rows | few, [*measures, *held_out], figures, quality=stats.quality)

# %% [markdown]
# ## Two exercises
# **Exercise 1.** Would any three do? Compare the three of largest effect with any three of those picked, and with
# random features that fire as often on ordinary text.
#
# <details><summary>Answer</summary>
#
# ```python
# from common import random_features
#
# three = {"unablated": NONE, "of largest effect": ablation(sae, order[:3], clamp)}
# three |= {f"picked {k}": ablation(sae, features[k : k + 3], clamp) for k in (10, 20, 30, 40)}
# three |= random_features(sae, stats.rates, order[:3], clamp, draws=8)
# any_three = [evaluation.letters(model, bio_held_out, three)[0], evaluation.words(model, bio_held_out, three)]
# show.table(any_three)
# ```
#
# </details>

# %% [markdown]
# **Exercise 2.** These effects are those of single features. Choose five one after another, each measured beside those
# that are chosen already, and MMLU kept (`--pick measured`).
#
# <details><summary>Answer</summary>
#
# ```python
# together = stats.features(5, "measured")
# five = {"unablated": NONE, "by single effects": ablation(sae, order[:5], clamp),
#         "measured together": ablation(sae, together, clamp)}
# both = [evaluation.letters(model, bio_held_out, five)[0], evaluation.words(model, bio_held_out, five)]
# show.table([*both, evaluation.letters(model, mmlu_held_out, five)[0]])
# ```
#
# </details>
