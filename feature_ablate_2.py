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
# Start a notebook in this folder, beside the helper files. To change a setting, add a line such as `args.layer = 3` to
# the next cell and run everything below it. Numbers in **bold** are what the first command above gives.

# %%
from runs import Run, parse, parser, positive_int

flags = parser(__doc__, quiz=True)
flags.add_argument("--controls", type=positive_int, default=1, help="draws of random features (default: %(default)s)")
args = parse(flags)

import torch

import data
import evaluation
import show
from common import NONE, ablation, load_model, load_retrained, load_sae, matched_random, patched, reconstruction

# %% [markdown]
# ## Pick
# By the ratio of how often a feature fires on the tuning half of WMDP-Bio to how often it does on Wikitext and on
# MMLU's development questions (lesson 1 counts it out). The questions of the other half are not seen before they are
# scored.

# %%
model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
sae = load_sae(args.sae, args.layer, model, args.model)
halves = {"seed": args.seed, "pick_on": args.pick_on}
wmdp = data.load("wmdp_bio", args.model, args.data, variant=args.wmdp, topic=args.topic, **halves)
mmlu = data.load("mmlu", args.model, args.data, **halves)
wikitext, mmlu_dev = (data.load(name, args.model, args.data) for name in ("wikitext", "mmlu_dev"))
corpus = data.load_corpus(args.forget_corpus, args.model, args.data)
bio, other = (data.drop_too_long(model.tokenizer, quiz.held_out.sample(args.limit), args.prompt, args.skip_long)
              for quiz in (wmdp, data.utility_subset(mmlu, args.subjects)))  # fmt: skip
if args.robust:  # only what the model gets right in all orders of the options
    bio, other = (evaluation.robust_only(model, quiz, style=args.prompt) for quiz in (bio, other))
run = Run("feature_ablate_2.py", args, [wmdp.tuning, bio, other, corpus, wikitext, mmlu_dev], [sae])
texts = data.picking_texts(wmdp.tuning, corpus, wikitext, mmlu_dev, args.pick_text)
windows = data.picking_windows(model.tokenizer, *texts, args.context)
stats = evaluation.FeatureStats(model, sae, args.layer, *windows, rule=args.pick, questions=wmdp.tuning, seed=args.seed,
                                style=args.prompt, batch_size=args.batch_size, insist=not args.no_sanity)  # fmt: skip
forget, retain = stats.rates
features = stats.features(args.n_features)
show.print_features(features, forget, retain, show.top_tokens(model, sae, features, stats.forget), sae)
title = f"{run.name}, layer {args.layer}: {args.n_features} features ablated"
figures = {"features": show.scatter(features, forget, retain, f"{run.name}, layer {args.layer}")}

# %% [markdown]
# On how many tokens of a question is any of them active at all? The darker, the stronger in sum.

# %%
ids, _ = data.encode_question(model, wmdp.held_out.rows[0], args.prompt)
h = model.run_with_cache(ids, names_filter=sae.hook_point)[1][sae.hook_point].float()  # (1, pos, d_model)
a = sae.encode(h)[0, :, features]  # (pos, n)
figures["question"] = show.token_figure(model, ids.tolist(), [a.sum(-1)], "all picked features", "activation")
print(f"active on {(a[1:] > 0).any(-1).sum()} of {len(a) - 1} tokens, {(a[1:] > 0).sum(-1).max()} at most at once")

# %% [markdown]
# ## Zero ablation
# All rows are scored in one pass; here are the first. Guess before you look: with every one of these features gone, how
# many questions does the model still get right?

# %%
clamp = run.settings["clamp"]
rows = {
    "unablated": NONE,
    "SAE patched, nothing ablated": patched(sae, features),
    "SAE reconstruction, no error term": reconstruction(sae),
    "zero ablation": ablation(sae, features),
    f"clamp {clamp:g}": ablation(sae, features, clamp),
}
for draw in range(args.controls):
    control = matched_random(forget, retain, features, args.seed + draw)
    name = f"random features{f' {draw + 1}' * (draw > 0)}, clamp {clamp:g}"
    rows[name] = ablation(sae, control, clamp, "random-features")
if retrained := load_retrained(args.model, wmdp, args.device, args.dtype):
    rows[show.RETRAINED] = retrained
letters, *sure = evaluation.letters(model, bio, rows, style=args.prompt, batch_size=args.batch_size)
show.table([letters], list(rows)[:4])

# %% [markdown]
# Nothing happens: **98.0**% before, **98.0**% after. On real models it is next to nothing (20 features a layer moved
# gemma-2-2b-it from 63.6 to 62.5%: Farrell et al.'s published notebooks). The features are there when biology is, but
# the answer does not hang on them. How far does zeroing move a token's vector, and how far does a clamp?
# <!-- 100 * letters["unablated"].mean, 100 * letters["zero ablation"].mean -->

# %%
shares = {}
for value in (0.0, clamp):
    moved = torch.where(a > 0, value - a, 0) @ sae.W_dec[features]  # (pos, d_model)
    shares[value] = 100 * (moved.norm(dim=-1) / h[0].norm(dim=-1))[1:].mean()
    print(f"clamp {value:g} moves a token by {shares[value]:.0f}% of its length on average")

# %% [markdown]
# ## A negative clamp, and random features
# A clamp of -40 moves a token's vector by **38**% of its length; zeroing moves it by **2**%. Pushed this far,
# the same features do damage. But would any? The row "random features" pushes the same number of features equally far.
# They are drawn among those that fire as often on ordinary text. <!-- shares[clamp], shares[0.0] -->

# %%
show.table([letters, *sure])
rounding = None if run.dtype == "float32" else evaluation.rounding_noise(model, bio, style=args.prompt)
print(bio.published or "", f"answers that change with the batch size alone: {rounding}" if rounding else "")

# %% [markdown]
# ## Forgotten, or only silent?
# The clamp takes accuracy from **98.0** to **64.7**%; on random features it takes it only to **94.6**%. So it matters
# which features are clamped. A model that has lost the facts gives a wrong letter; one that has lost the form gives
# none. So look at the probability of all four letters together (**1.00** under the clamp), and ask without options:
# "Answer in words:". The dotted line is a model trained in the same way, but never on these facts: **22.5**%, and no
# forgetting is better than that. <!-- 100 * letters["unablated"].mean, 100 * letters["clamp -40"].mean,
# 100 * letters["random features, clamp -40"].mean, sure[0]["clamp -40"].mean, 100 * letters[show.RETRAINED].mean -->

# %%
words = evaluation.words(model, bio, rows, batch_size=args.batch_size)
show.table([words])
figures["words"] = show.intervals([letters, *sure, words], title)

# %% [markdown]
# ## And the rest?
# In words it falls from **97.5** to **56.4**%, so the model has lost facts, not only the quiz's form; about half of
# them remain. MMLU, the quiz on all else, should stay as it is. <!-- 100 * words["unablated"].mean,
# 100 * words["clamp -40"].mean -->

# %%
mmlu_letters, *mmlu_sure = evaluation.letters(model, other, rows, style=args.prompt, batch_size=args.batch_size)
show.table([mmlu_letters, *mmlu_sure])
figures["accuracy"] = show.intervals([letters, words, mmlu_letters], title)

# %% [markdown]
# Under the clamp it loses **2.4** points, with random features **3.6**: biology's do no more harm than any do. The
# record keeps all of the above, to compare with other runs.
# <!-- -100 * mmlu_letters["clamp -40"].change, -100 * mmlu_letters["random features, clamp -40"].change -->

# %%
record = run.write(rows, [letters, *sure, words, mmlu_letters, *mmlu_sure], figures, quality=stats.quality,
                   rounding=rounding)  # fmt: skip

# %% [markdown]
# ## Make it your own
# Change one line and run what is below it again. With `args.layer, args.n_features, args.clamp = 9, 20, -80.0`:
# **57.8**% in letters, but **85.8**% in words, so there it is the quiz that suffers.
# <!-- --layer 9 --n-features 20 --clamp -80: 100 * letters["clamp -80"].mean, 100 * words["clamp -80"].mean -->

# %% [markdown]
# With another rule, `args.pick = "dsg"`: **51.0**% in letters and **51.0**% in words, but MMLU falls to **92.3**%.
# <!-- --pick dsg: 100 * letters["clamp -40"].mean, 100 * words["clamp -40"].mean,
# 100 * mmlu_letters["clamp -40"].mean -->

# %% [markdown]
# And how much does a single feature do? The first one fires on the letter C before an option (lesson 1). Guess: how
# many points does it cost alone, with letters and in words? Every third question is enough to see it.

# %%
third = bio.only(range(0, len(bio), 3))
alone = {"unablated": NONE, "the first alone": ablation(sae, features[:1], clamp)}
first = [evaluation.letters(model, third, alone, style=args.prompt)[0], evaluation.words(model, third, alone)]
show.table(first)

# %% [markdown]
# **17.6** points with letters, **0.0** in words: half of what the clamp takes from the quiz is its form, and no fact is
# lost by it. The answers in words fall with the other features.
# <!-- -100 * first[0]["the first alone"].change, -100 * first[1]["the first alone"].change -->
