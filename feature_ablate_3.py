# %% [markdown]
"""
# Lesson 3 of 3: what does the ablation cost on ordinary text, and where?

    python feature_ablate_3.py --layer 7 --n-features 50
    python feature_ablate_3.py --layer 9 --n-features 20 --clamp -80
    python feature_ablate_3.py --model gpt2 --layer 7 --n-features 50

Quizzes are a narrow view of a model. What it does all day is to predict the next token, so the price of
an ablation is how much worse it predicts text that has nothing to do with what was to be forgotten: the
loss added on OpenWebText, in nats per token. We add it up, look at the passage that suffers most, token
by token, and then ask which features it comes from. What a feature of a sparse autoencoder (SAE) is,
lesson 1 shows.
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
# Picked on one half of WMDP-Bio against ordinary text (lesson 1 counts it out).

# %%
model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
sae = load_sae(args.sae, args.layer, model, args.model)
halves = {"seed": args.seed, "pick_on": args.pick_on}
wmdp = data.load("wmdp_bio", args.model, args.data, topic=args.topic, **halves)
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
    rule=args.pick, questions=wmdp.tuning, seed=args.seed, batch_size=args.batch_size,
    insist=not args.no_sanity,
)  # fmt: skip
features, clamp = stats.features(args.n_features), run.settings["clamp"]
show.print_features(stats, features, most=8)
title = f"{run.name}, layer {args.layer}, {args.n_features} features"
figures = {"features": show.scatter(features, *stats.rates, title)}

# %% [markdown]
# ## The model speaks
# It continues the beginning of a document, and that of a question on biology: first as it is, then with the features
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
# Every document is cut into windows of 128 tokens, and each window is read once, for all rows of the table. The loss
# is -log of the probability of the token that really comes next. Guess: these features fire on biology and hardly on
# Wikitext. What will clamping them cost on detective stories?

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
# Little: **+0.015** nats per token. The right next token is exp(-0.015) = 98.5% as likely as before, on (geometric)
# average; the model is as unsure as if it chose among 1.5% more tokens. Most draws of random features cost more. Now
# the subject itself, the questions with their answers as prose: here a high loss is what was wanted. <!--
# loss[clamped].change -->

# %%
prose = [{"text": data.as_prose(row)} for row in bio.rows]
about = {"stand_in": bio.stand_in, "seed": args.seed, "topic": bio.topic}
prose = data.Dataset("wmdp_bio_prose", prose, **about)
subject = evaluation.loss(model, prose, rows, batch_size=args.batch_size)
show.table([subject])
figures["loss"] = show.intervals([loss, subject], title)

# %% [markdown]
# **+0.79**: the right token is less than half as likely. A model that was never trained on these facts has **+5.14**,
# where it is 170 times less likely: the clamp is far from that. <!-- subject[clamped].change,
# subject[show.RETRAINED].change -->
# ## By document
# Is it all of them, or a few?

# %%
pair = {"unablated": NONE, clamped: rows[clamped]}
how = {"batch_size": args.batch_size, "limit": args.limit}
nats, windows, documents, _ = evaluation.window_losses(model, web, pair, **how)
added = nats[1] - nats[0]  # (windows,), what the clamp adds, summed over a window's tokens
figures["documents"] = show.documents_figure(added, windows, documents, f"{web.title}: {title}")

# %% [markdown]
# ## Token by token
# The window that suffers most. Guess: where in it? On the words of biology that it happens to have?

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
# What was clamped there? The same window, by how strongly the picked features are active.

# %%
h = model.run_with_cache(worst, names_filter=sae.hook_point)[1][sae.hook_point].float()
a = sae.encode(h)[0, :, features]  # h is (1, pos, d_model), a is (pos, n)
picture = "all picked features", "activation"
figures["active"] = show.token_figure(model, worst.tolist(), [a.sum(-1)], *picture)

# %% [markdown]
# The loss rises on the token after one where a feature fires, and then on all that follow a little, by attention. No
# biology in sight: what is rare on Wikitext fires on other text, too.
# ## Which features does it come from?
# Clamp each alone. Guess: is it all of them a little, or a few?

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
# the picked features are rare, and almost never two of them are active on one token, so each does its own damage. In
# a quiz on biology several are, and there the parts do not add up (lesson 2). So the price on ordinary text can be
# lowered feature by feature. <!-- total, loss[clamped].change -->

# %%
record = run.write(rows, [loss, subject], figures, quality=stats.quality)

# %% [markdown]
# ## Two exercises
# **Exercise 1.** Leave these three out. What do ordinary text and the subject's text cost then?
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
# price for two thirds of the effect.
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
# It becomes cheaper, by **0.23** nats per token. A sentence is a dozen tokens, and on this one the model is at a loss
# before anything is clamped, with **6.2** nats: where a model knows nothing, a push may as well help. So the table
# above is of many texts, with an interval.
#
# </details>
# <!-- -own["clamp"].change, own["unablated"].mean -->

# %% [markdown]
# What next? `args.layer, args.n_features, args.clamp = 9, 20, -80.0`: **+0.016** nats on the same text. <!-- --layer
# 9 --n-features 20 --clamp -80: loss[clamped].change -->
