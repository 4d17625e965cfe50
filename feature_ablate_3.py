# %% [markdown]
"""
# Lesson 3 of 3: what does the ablation cost on ordinary text, and where?

    python feature_ablate_3.py --layer 7 --n-features 50
    python feature_ablate_3.py --layer 9 --n-features 20 --clamp -80
    python feature_ablate_3.py --model gpt2 --layer 7 --n-features 50

Quizzes are a narrow view of a model. What it does all day is to predict the next token. So the price
of an ablation is the loss that it adds on text that has nothing to do with the forget set. The text
is OpenWebText, the unit is nats (natural logarithm) per token. We measure this loss, look at the
passage that suffers most, token by token, and then ask which features it comes from. Lesson 1 shows
what a feature of a sparse autoencoder (SAE) is.
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. To change a setting, add a line such as `args.layer = 3`
# to the next cell and run everything below it. Numbers in **bold** are what the first command above gives.

# %%
from runs import Run, parse, parser

args = parse(parser(__doc__, controls=4))

import torch

import data
import evaluation
import show
from common import NONE, ablate, ablation, load_model, load_retrained, load_sae
from common import patched, random_features, reconstruction

# %% [markdown]
# ## A model, an SAE, and features
# The features are picked as in lesson 1, on the tuning half of WMDP-Bio. `tiny`, the model in this folder, has a
# harmless stand-in for WMDP-Bio, and Sherlock Holmes stories for OpenWebText.

# %%
model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
sae = load_sae(args.sae, args.layer, model, args.model)
halves = {"seed": args.seed, "pick_on": args.pick_on, "topic": args.topic}
wmdp, mmlu = (data.load(name, args.model, args.data, **halves) for name in ("wmdp_bio", "mmlu"))
web = data.load("openwebtext", args.model, args.data, seed=args.seed)
wikitext, mmlu_dev = (data.load(name, args.model, args.data) for name in ("wikitext", "mmlu_dev"))
corpus = data.load_corpus(args.forget_corpus, args.model, args.data)
texts = data.picking_texts(wmdp.tuning, corpus, wikitext, mmlu_dev, args.pick_text)
bio = wmdp.held_out.only(range(len(wmdp.held_out))[: args.limit])
print(f"{web.title}: {len(web)} documents; {wmdp.title}: {len(bio)} questions held out")

# %%
run = Run("feature_ablate_3.py", args, [wmdp.tuning, bio, web, corpus, wikitext, mmlu_dev], [sae])
stats = evaluation.FeatureStats(
    model, sae, args.layer, *data.picking_windows(model.tokenizer, *texts, args.context),
    rule=args.pick, own=args.features, questions=wmdp.tuning, seed=args.seed,
    utility=data.utility_subset(mmlu, but=wmdp.topic).tuning,
    clamp=run.settings["clamp"], insist=not args.no_sanity, batch_size=args.batch_size,
)  # fmt: skip
features, clamp = stats.features(run.settings["n_features"]), run.settings["clamp"]
show.print_features(stats, features, most=8)

# %%
title = f"{run.name}, layer {args.layer}, {len(features)} features"
figures = {"features": show.scatter(features, *stats.rates, title)}

# %% [markdown]
# ## The model speaks
# It continues the beginning of a document, and that of a question on biology: first unablated, then with the features
# clamped. Guess: which of the two will go on as before?

# %%
for text in (web.rows[min(1, len(web) - 1)]["text"], bio.rows[0]["question"]):
    start = " ".join(text.split()[:8])
    print(f"{start} ...")
    for name, some in (("unablated", []), ("clamped", features)):
        with ablate(model, sae, some, clamp):
            said = model.generate(start, max_new_tokens=12, do_sample=False, verbose=False)
        print(f"    {name:10}", repr(said[len(start) :]))

# %% [markdown]
# ## The loss, in all
# The first documents, 20,000 tokens of them, are cut into windows of 128 tokens. The loss of a token is -log of the
# probability that the model gives to it, from the tokens before it. The rows are those of lesson 1. Guess: these
# features fire on biology and hardly on Wikitext. What will clamping them cost on detective stories?

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
loss = evaluation.loss(model, web, rows, batch_size=args.batch_size, limit=args.limit)
show.table([loss])

# %% [markdown]
# Little: **+0.015** nats per token. The right next token is exp(-0.015) = 98.5% as likely as before, as a geometric
# mean. Most draws of random features cost more. Now the subject itself: WMDP-Bio's held-out questions with their
# answers, as prose. Here a high loss is what was wanted. <!-- loss[clamped].change -->

# %%
prose = [{"text": data.as_prose(row)} for row in bio.rows]
about = {"stand_in": bio.stand_in, "seed": args.seed, "topic": bio.topic}
prose = data.Dataset("wmdp_bio_prose", prose, **about)
subject = evaluation.loss(model, prose, rows, batch_size=args.batch_size)
show.table([subject])
figures["loss"] = show.intervals([loss, subject], title)

# %% [markdown]
# **+0.79**: the right token is less than half as likely as before. The model retrained without the facts has
# **+5.14**: 170 times less likely. The clamp is far from that. <!-- subject[clamped].change,
# subject[show.RETRAINED].change -->
# ## By document
# Back to ordinary text. Do all documents lose, or only a few?

# %%
pair = {"unablated": NONE, clamped: rows[clamped]}
how = {"batch_size": args.batch_size, "limit": args.limit}
nats, windows, documents, _ = evaluation.window_losses(model, web, pair, **how)
added = nats[1] - nats[0]  # (windows,), what the clamp adds, summed over a window's tokens
figures["documents"] = show.documents_figure(added, windows, documents, f"{web.title}: {title}")
per = torch.zeros(max(documents) + 1).index_add_(0, torch.tensor(documents), added.float())
dearer, same = (per > 0).sum(), (added.abs() < 1e-4).sum()
print(f"{dearer} of {len(set(documents))} documents lose, {same} of {len(added)} windows nothing")

# %% [markdown]
# ## Token by token
# Most documents lose, **30** of 36, but at few places: **92** of 174 windows do not change. Look at the window that
# loses most. <!-- dearer, same --> Guess: on which tokens? On words of biology that it happens to have?

# %%
worst = torch.tensor([windows[added.argmax()]], device=model.cfg.device)


@torch.inference_mode()
def losses():
    """In nats, of each token but the first; (pos - 1,)."""
    return -model(worst)[0, :-1].float().log_softmax(-1).gather(1, worst[0, 1:, None])[:, 0].cpu()


before = losses()
with ablate(model, sae, features, clamp):
    rise = torch.cat([torch.zeros(1), losses() - before])  # nothing predicts the first token
figures["tokens"] = show.token_figure(model, worst.tolist(), [rise], "loss added", "nats")

# %% [markdown]
# What was clamped there? The same window, by how strongly the picked features are active (BOS is left out):

# %%
h = model.run_with_cache(worst, names_filter=sae.hook_point)[1][sae.hook_point].float()
a = sae.encode(h)[0, :, features]  # h is (1, pos, d_model), a is (pos, n)
after = (a[1:-1] > 0).any(-1).cpu()  # tokens that follow one on which a feature is active
print(f"{rise[2:][after].sum():.1f} of {rise.sum():.1f} nats on {after.sum()} tokens")
picture = "all picked features", "activation"
figures["active"] = show.token_figure(model, worst.tolist(), [a.sum(-1)], *picture)

# %% [markdown]
# A token's vector serves to predict the next token. So where a feature fires, the loss rises on the token after it:
# three such tokens carry **11.1** of **12.3** nats. Later tokens change a little, up or down, because they attend to
# the changed one. The activations are only about 1, but the clamp sets them to -40 all the same. No biology in sight:
# a feature that is rare on Wikitext can fire on other text, too. <!-- rise[2:][after].sum(), rise.sum() -->
# ## Which features does it come from?
# Clamp each feature alone, on all windows. Guess: is it all of them a little, or a few?

# %%
alone = {f"{feature}": ablation(sae, [feature], clamp) for feature in features}
each = evaluation.loss(model, web, {"unablated": NONE} | alone, **how)
costs = sorted(((each[f"{feature}"].change, feature) for feature in features), reverse=True)
dearest = [feature for _, feature in costs[:3]]
forget, retain = stats.rates
for cost, feature in costs[:3]:
    shares = f"{forget.rate[feature]:.2%} of forget and {retain.rate[feature]:.3%} of retain tokens"
    print(f"{feature}: {cost:+.4f} nats; active on {shares}")
total = sum(cost for cost, _ in costs)
print(f"the sum of all alone is {total:+.4f}, all together cost {loss[clamped].change:+.4f}")

# %% [markdown]
# A few: three of fifty cost half of it. And the parts add up to the whole, **0.015** and **0.015**. On ordinary text
# the picked features fire seldom and far apart, even in the window above on only 3 tokens. So each does its damage
# alone, and the price can be lowered feature by feature. In lesson 2's question they fire on 11 of 60 tokens, and in
# that quiz the parts do not add up. <!-- total, loss[clamped].change -->

# %%
record = run.write(rows, [loss, subject], figures, quality=stats.quality)

# %% [markdown]
# ## Two exercises
# **Exercise 1.** Leave these three out and clamp the others. What do ordinary text and the subject's text cost then?
#
# <details><summary>Answer</summary>
#
# ```python
# kept = [feature for feature in features if feature not in dearest]
# pair = {"unablated": NONE, "all": rows[clamped], "without the three": ablation(sae, kept, clamp)}
# both = [evaluation.loss(model, texts, pair) for texts in (web, prose)]
# show.table(both)
# ```
#
# Ordinary text costs **0.007** nats in place of 0.015, the subject's text **0.56** in place of 0.79: half of the
# price, and 70% of the effect. But the three were chosen on the text that is scored here.
#
# </details>
# <!-- both[0]["without the three"].change, both[1]["without the three"].change -->

# %% [markdown]
# **Exercise 2.** A text of your own: what does the clamp cost on a sentence about disease?
#
# <details><summary>Answer</summary>
#
# ```python
# mine = data.Dataset("mine", [{"text": "The disease was caused by a bacterium in the water."}])
# own = evaluation.loss(model, mine, {"unablated": NONE, "clamp": rows[clamped]})
# show.table([own])
# ```
#
# The loss falls, by **0.23** nats per token. The sentence has a dozen tokens, and the unablated model predicts it
# badly already, with **6.2** nats. There a push can help by chance. So the tables above are over many texts, with an
# interval.
#
# </details>
# <!-- -own["clamp"].change, own["unablated"].mean -->

# %% [markdown]
# What next? `args.layer, args.n_features, args.clamp = 9, 20, -80.0`: **+0.016** nats on the same text, about as much
# as here. <!-- --layer 9 --n-features 20 --clamp -80: loss[clamped].change -->

# %% [markdown]
# **In short.** On ordinary text the clamp costs less than most draws of random features, and most of the text nothing
# at all. What it costs comes from a few features that fire where they were not expected, and from each of them alone.
