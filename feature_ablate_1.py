# %% [markdown]
"""
Lesson 1 of 3: what is a feature, and what does it cost to remove some?

    python feature_ablate_1.py --layer 7 --n-features 50
    python feature_ablate_1.py --model gemma-2-2b-it --layer 7 --n-features 50

A language model hands each token from layer to layer as one vector, the residual stream. A sparse autoencoder (SAE)
writes that vector as a sum of a few out of thousands of fixed directions, its features: on any one token most of them
are inactive. We find those that belong to biology, write the hook that removes them, and see what other subjects lose.
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. To change a setting, add a line such as `args.layer = 3` to
# the next cell and run everything below it. Numbers in **bold** are what the first command above gives.

# %%
from runs import Run, parse, parser

args = parse(parser(__doc__, quiz=True))

import torch

import data
import evaluation
import show
from common import NONE, ablate, ablation, load_model, load_retrained, load_sae, matched_random, patched, reconstruction

# %% [markdown]
# ## One question
# WMDP-Bio is the forget set: what a model should not know any more. The embedded model has a harmless stand-in,
# textbook microbiology. One half of its questions serves to find features, the other to report.

# %%
model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
sae = load_sae(args.sae, args.layer, model, args.model)
halves = {"seed": args.seed, "pick_on": args.pick_on}
wmdp = data.load("wmdp_bio", args.model, args.data, variant=args.wmdp, topic=args.topic, **halves)
mmlu = data.load("mmlu", args.model, args.data, **halves).of(args.subjects).held_out
mmlu = data.drop_too_long(model.tokenizer, mmlu.sample(args.limit), args.prompt, args.skip_long)  # asked last
if args.robust:
    mmlu = evaluation.robust_only(model, mmlu, style=args.prompt)
question = wmdp.held_out.rows[0]
right = question["answer"]
print(data.prompt(question, style=args.prompt))

# %% [markdown]
# The model answers with the next token: one of four letters, if it has understood what it is asked for.


# %%
@torch.inference_mode()
def probabilities(question):
    """Of the next tokens " A", " B", " C" and " D"; (4,)."""
    ids, letter_ids = data.encode_question(model, question, args.prompt)
    return model(ids)[0, -1].float().softmax(-1)[letter_ids].amax(-1).cpu()


print("  ".join(f"{letter} {p:.2f}" for letter, p in zip("ABCD", probabilities(question))), " right:", "ABCD"[right])

# %% [markdown]
# ## Its features
# Behind the SAE's layer each token is a vector `h`. `encode` says how active each feature is on it, `decode` adds up
# activation times direction again. How many of the features does a token need, and how much of `h` do they explain?

# %%
ids, _ = data.encode_question(model, question, args.prompt)
ordinary = ~torch.isin(ids, torch.tensor(model.tokenizer.all_special_ids, device=ids.device))[..., None]
h = model.run_with_cache(ids, names_filter=sae.hook_point)[1][sae.hook_point].float()  # (1, pos, d_model)
a = sae.encode(h)  # (1, pos, d_sae), activations: 0 or positive
missed = (h - sae.decode(a))[0, 1:].pow(2).sum() / (h - h[0, 1:].mean(0))[0, 1:].pow(2).sum()
active = (a[0, 1:] > 0).sum(-1).float().mean()
print(f"{active:.0f} of {a.shape[2]} features active on a token; variance explained {1 - missed:.2f}")

# %% [markdown]
# **36** features are active on a token and explain **97**% of what sets it apart. <!-- active, 100 * (1 - missed) -->
# Which features are about biology? For each, take the share of tokens on which it fires (a) in the tuning half, (b) in
# Wikitext, (c) in quizzes on other subjects. Rank by a / max(b, c), with one token added to each count:
#
#     ratio = ((fires on forget + 1) / (forget tokens + 1)) / ((fires on retain + 1) / (retain tokens + 1))

# %%
wikitext, mmlu_dev = (data.load(name, args.model, args.data) for name in ("wikitext", "mmlu_dev"))
corpus = data.load_corpus(args.forget_corpus, args.model, args.data)
texts = data.picking_texts(wmdp.tuning, corpus, wikitext, mmlu_dev, args.pick_text)
run = Run("feature_ablate_1.py", args, [wmdp.tuning, mmlu, corpus, wikitext, mmlu_dev], [sae])
windows = data.picking_windows(model.tokenizer, *texts, args.context)
stats = evaluation.FeatureStats(model, sae, args.layer, *windows, rule=args.pick, questions=wmdp.tuning, seed=args.seed,
                                style=args.prompt, batch_size=args.batch_size, insist=not args.no_sanity)  # fmt: skip
forget, retain = stats.rates
features = stats.features(args.n_features)
show.print_features(features, forget, retain, show.top_tokens(model, sae, features, stats.forget), sae, most=8)
title = f"{run.name}, layer {args.layer}: {args.n_features} features ablated"
figures = {"features": show.scatter(features, forget, retain, f"{run.name}, layer {args.layer}")}

# %% [markdown]
# Each dot is a feature; the picked ones lie far above the dotted line. The one with the highest ratio, on our question
# and on the three texts where it is most active: what is its name?

# %%
best = features[0]
figures["question"] = show.token_figure(model, ids.tolist(), [a[0, :, best]], f"feature {best}", "activation")
figures["contexts"] = show.contexts_figure(model, sae, best, stats.forget)

# %% [markdown]
# No word of biology: it is the letter C before an option, in quizzes on biology only, **1.6**% of the forget tokens and
# **0.0**% of the retain tokens. A high ratio tells what is particular to the forget set, and that may be its form.
# <!-- 100 * forget.rate[best], 100 * retain.rate[best] -->
# ## The hook
# To ablate is to replace activations and leave all else: `h` gets only the difference that this makes, so what the SAE
# cannot explain stays, and so do special tokens such as BOS. Clamp 0 takes features away (zero ablation); a negative
# one pushes the other way (Farrell et al., arXiv 2410.19278). SAEs that rescale `h` take two lines more (`edits.py`).


# %%
def edit(h, hook=None, clamp=0.0):
    a = sae.encode(h.float())[..., features]  # (batch, pos, n)
    wanted = torch.where(a > 0, clamp, a)  # only where a feature is active
    change = (wanted - a) @ sae.W_dec[features]  # (batch, pos, d_model)
    return torch.where(ordinary, h + change, h).to(h.dtype)


print(f"zeroing changes {(edit(h) != h).any(-1).sum()} of {h.shape[1]} tokens")

# %% [markdown]
# Guess first: with the features gone from every token, which letter comes, and how surely? And pushed below zero?

# %%
tried, clamp = {"unablated": probabilities(question)}, run.settings["clamp"]
for value, name in ((0.0, "zero ablation"), (clamp, "clamp")):
    with model.hooks(fwd_hooks=[(sae.hook_point, lambda h, hook, value=value: edit(h, hook, value))]):
        tried[name] = probabilities(question)
    with ablate(model, sae, features, value):  # that hook, for any SAE; it encodes the picked features alone
        off = (probabilities(question) - tried[name]).abs().max()
    print(f"{name} {value:g}: right letter {tried[name][right]:.2f}; common.ablate differs by {off:.0e}")
figures["letters"] = show.letter_figure(tried, right, f"layer {args.layer}, one question")

# %% [markdown]
# Zeroed, they leave the right letter at **1.00**; pushed below zero, at **0.78**. <!-- tried["zero ablation"][right],
# tried["clamp"][right] -->
# ## MMLU: what else is harmed?
# Now every question of MMLU's held-out half. Controls: nothing changed must equal the unablated model; the SAE's bare
# reconstruction shows what its error costs; random features, what any would. Last: a twin, trained without the facts.

# %%
control = matched_random(forget, retain, features, args.seed)
rows = {
    "unablated": NONE,
    "SAE patched, nothing ablated": patched(sae, features),
    "SAE reconstruction, no error term": reconstruction(sae),
    "zero ablation": ablation(sae, features),
    f"clamp {clamp:g}": ablation(sae, features, clamp),
    f"random features, clamp {clamp:g}": ablation(sae, control, clamp, "random-features"),
}
if retrained := load_retrained(args.model, wmdp, args.device, args.dtype):
    rows[show.RETRAINED] = retrained
letters, *sure = evaluation.letters(model, mmlu, rows, style=args.prompt, batch_size=args.batch_size)
show.table([letters, *sure])
figures["accuracy"] = show.intervals([letters, *sure], title)

# %% [markdown]
# Of **98.8**% the clamp takes **2.4** points, random features **3.6**: biology's do no more harm elsewhere than any do.
# Guess by subject: are its neighbours, zoology and human anatomy, hit first?
# <!-- 100 * letters["unablated"].mean, -100 * letters["clamp -40"].change,
# -100 * letters["random features, clamp -40"].change -->

# %%
show.group_table(letters)
figures["subjects"] = show.group_figure(letters, f"{mmlu.title}: {title}")

# %% [markdown]
# No: world history loses most, **8.9** points, anatomy and zoology an answer each; without a star none of it is
# certain. The record keeps all of the above. <!-- -100 * letters.by_group()["world_history"]["clamp -40"].change -->

# %%
record = run.write(rows, [letters, *sure], figures, quality=stats.quality)

# %% [markdown]
# ## Make it your own
# Change one line and run what is below it again. With `args.layer = 9` the clamp leaves MMLU at **96.7**%. Fewer
# features, or a question of your own? <!-- --layer 9: 100 * letters["clamp -40"].mean -->

# %%
for n in (1, 5, 20):
    with ablate(model, sae, features[:n], clamp):
        print(f"the first {n}: right letter {probabilities(question)[right]:.2f}")
mine = {"question": "Which organ pumps the blood?", "choices": ["lung", "heart", "liver", "spleen"], "answer": 1}
with ablate(model, sae, features, clamp):
    print(f"our question: right letter {probabilities(mine | {'subject': 'human_anatomy'})[1]:.2f}")
