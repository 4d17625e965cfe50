# %% [markdown]
"""
Lesson 3 of 3: what does the ablation cost on ordinary text, and where?

    python feature_ablate_3.py --layer 7 --n-features 50
    python feature_ablate_3.py --layer 9 --n-features 20 --clamp -80
    python feature_ablate_3.py --model gpt2 --layer 7 --n-features 50

Quizzes are a narrow view of a model. What it does all day is to predict the next token, so the price of an ablation is
how much worse it predicts text that has nothing to do with what was to be forgotten: the loss added on OpenWebText, in
nats per token. We add it up, by document too, and then look at the passage that suffers most, token by token. What a
feature of a sparse autoencoder (SAE) is, lesson 1 shows.
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. To change a setting, add a line such as `args.layer = 3` to
# the next cell and run everything below it. Numbers in **bold** are what the first command above gives.

# %%
from runs import Run, parse, parser

args = parse(parser(__doc__))

import torch

import data
import evaluation
import show
from common import NONE, ablate, ablation, load_model, load_retrained, load_sae, matched_random, patched, reconstruction

# %% [markdown]
# ## Pick features, on biology against ordinary text (lesson 1 counts it out)

# %%
model = load_model(args.model, args.device, args.dtype, args.device_map, args.edit_special)
sae = load_sae(args.sae, args.layer, model, args.model)
wmdp = data.load("wmdp_bio", args.model, args.data, seed=args.seed, pick_on=args.pick_on, topic=args.topic)
web = data.load("openwebtext", args.model, args.data, seed=args.seed)
wikitext, mmlu_dev = (data.load(name, args.model, args.data) for name in ("wikitext", "mmlu_dev"))
corpus = data.load_corpus(args.forget_corpus, args.model, args.data)
bio = wmdp.held_out.only(range(len(wmdp.held_out))[: args.limit])
run = Run("feature_ablate_3.py", args, [wmdp.tuning, bio, web, corpus, wikitext, mmlu_dev], [sae])
texts = data.picking_texts(wmdp.tuning, corpus, wikitext, mmlu_dev, args.pick_text)
windows = data.picking_windows(model.tokenizer, *texts, args.context)
stats = evaluation.FeatureStats(model, sae, args.layer, *windows, rule=args.pick, questions=wmdp.tuning, seed=args.seed,
                                batch_size=args.batch_size, insist=not args.no_sanity)  # fmt: skip
forget, retain = stats.rates
features = stats.features(args.n_features)
show.print_features(features, forget, retain, show.top_tokens(model, sae, features, stats.forget), sae)
title = f"{run.name}, layer {args.layer}: {args.n_features} features ablated"
figures = {"features": show.scatter(features, forget, retain, f"{run.name}, layer {args.layer}")}

# %% [markdown]
# ## The loss, in all
# Every document is cut into windows of 128 tokens, and each window is read once, for all rows of the table. Guess:
# these features fire on biology and hardly on Wikitext. What will clamping them cost on detective stories?

# %%
clamp = run.settings["clamp"]
clamped, control = f"clamp {clamp:g}", matched_random(forget, retain, features, args.seed)
rows = {
    "unablated": NONE,
    "SAE patched, nothing ablated": patched(sae, features),
    "SAE reconstruction, no error term": reconstruction(sae),
    "zero ablation": ablation(sae, features),
    clamped: ablation(sae, features, clamp),
    f"random features, {clamped}": ablation(sae, control, clamp, "random-features"),
}
if retrained := load_retrained(args.model, wmdp, args.device, args.dtype):
    rows[show.RETRAINED] = retrained
loss = evaluation.loss(model, web, rows, batch_size=args.batch_size, limit=args.limit)
show.table([loss])

# %% [markdown]
# Little: **+0.015** nats per token, so the right next token is 1.5% less likely on (geometric) average; random features
# cost **+0.048**. Now the subject itself, the questions with their answers as prose: here a high loss is what was
# wanted. <!-- loss["clamp -40"].change, loss["random features, clamp -40"].change -->

# %%
prose = [{"text": data.as_prose(row)} for row in bio.rows]
prose = data.Dataset("wmdp_bio_prose", prose, stand_in=bio.stand_in, seed=args.seed, topic=bio.topic)
subject = evaluation.loss(model, prose, rows, batch_size=args.batch_size)
show.table([subject])
figures["loss"] = show.intervals([loss, subject], title)

# %% [markdown]
# **+0.79**, where a model that was never trained on these facts has **+5.14**: the clamp is far from that.
# <!-- subject["clamp -40"].change, subject[show.RETRAINED].change -->
# ## The loss, by document: is it all of them, or a few?

# %%
pair = {"unablated": NONE, clamped: rows[clamped]}
nats, windows, documents, _ = evaluation.window_losses(model, web, pair, batch_size=args.batch_size, limit=args.limit)
added = nats[1] - nats[0]  # (windows,), what the clamp adds, summed over a window's tokens
figures["documents"] = show.documents_figure(added, windows, documents, f"{web.title}: {title}")

# %% [markdown]
# ## The loss, token by token: the window that suffers most
# Guess: where in it? On the words of biology that it happens to have?

# %%
worst = torch.tensor([windows[added.argmax()]], device=model.cfg.device)


@torch.inference_mode()
def losses():
    """In nats, of each token but the first; (pos - 1,)."""
    return -model(worst)[0, :-1].float().log_softmax(-1).gather(1, worst[0, 1:, None])[:, 0].cpu()


before = losses()
with ablate(model, sae, features, clamp):
    rise = torch.cat([torch.zeros(1), losses() - before])  # nothing predicts the first token
figures["tokens"] = show.token_figure(model, worst.tolist(), [rise], "loss added by the clamp", "nats")

# %% [markdown]
# What was clamped there? The same window, by how strongly the picked features are active.

# %%
h = model.run_with_cache(worst, names_filter=sae.hook_point)[1][sae.hook_point].float()  # (1, pos, d_model)
a = sae.encode(h)[0, :, features]  # (pos, n)
figures["active"] = show.token_figure(model, worst.tolist(), [a.sum(-1)], "all picked features", "activation")
guilty = features[a[1:].sum(0).argmax()]
print(f"most active here: feature {guilty}, on {100 * retain.rate[guilty]:.2f}% of the retain tokens and "
      f"{100 * forget.rate[guilty]:.2f}% of the forget tokens")  # fmt: skip

# %% [markdown]
# The loss rises on the token after one where a feature fires, and then on all that follow a little, by attention. No
# biology in sight: what is rare on Wikitext (**0.03**%) and less rare in quizzes (**0.75**%) fires on other text, too.
# <!-- 100 * retain.rate[guilty], 100 * forget.rate[guilty] -->

# %%
# The record: everything above, to compare with other runs
record = run.write(rows, [loss, subject], figures, quality=stats.quality)

# %% [markdown]
# ## Make it your own
# Change one line and run what is below it again. With `args.layer, args.n_features, args.clamp = 9, 20, -80.0`:
# **+0.016** nats on the same text. <!-- --layer 9 --n-features 20 --clamp -80: loss["clamp -80"].change -->
#
# Here without the feature that was most active above, and then a text of yours:

# %%
others = [feature for feature in features if feature != guilty]
pair[f"without feature {guilty}"] = ablation(sae, others, clamp)
mine = data.Dataset("mine", [{"text": "The disease was caused by a bacterium in the water."}])
for some in (web, mine):
    show.table([evaluation.loss(model, some, pair, limit=args.limit)])
