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
# Start a notebook in this folder, beside the helper files; there a line like `args.layer = 3` below the flags changes a
# setting. Numbers in **bold** are what the first command above gives.

# %%
from flags import parse, parser

flags = parser(__doc__)
args = parse(flags)

# %%
import time

import torch

import data
import evaluation
import methods
import records
import show
from common import ablate, matched_random

# %% [markdown]
# ## Pick features, on biology against ordinary text (lesson 1 counts it out)

# %%
path, started, sources = records.outputs("feature_ablate_3.py", args, flags), time.time(), {}
model, sae = methods.load(args)
wmdp, picking, reporting = data.load_quiz("wmdp_bio", args, sources)
web, sources["openwebtext"] = data.load_rows("openwebtext", args.model, args.data)
measured = methods.measure(model, args.layer, sae, *data.picking_texts(wmdp, picking, args, sources), args.clamp, args)
forget, retain = measured.rates
features = measured.features(args.n_features)
show.print_features(features, forget, retain, show.top_tokens(model, sae, features, measured.forget), sae)
title = f"{records.short_name(args.model)}, layer {args.layer}: {args.n_features} features ablated"
figures = {"features": show.scatter(features, forget, retain, title)}

# %% [markdown]
# ## The loss, in all
# Every document is cut into windows of 128 tokens, and each window is read once, for all rows of the table. Guess:
# these features fire on biology and hardly on Wikitext. What will clamping them cost on detective stories?

# %%
control = matched_random(forget, retain, features, args.seed)
rows = evaluation.standard_rows(sae, features, [control], args.clamp, args.model)
name, texts = show.title_of("openwebtext", sources), [row["text"] for row in web]
scores, (nats, windows, documents) = evaluation.score_texts(model, name, texts, rows, args)
show.print_loss(name, rows, scores)

# %% [markdown]
# Little: **+0.015** nats per token, so the right next token is 1.5% less likely on (geometric) average; random features
# cost **+0.048**. Now the subject itself, the questions with their answers as prose: here a high loss is what was
# wanted. <!-- scores[4]["loss_added"], scores[5]["loss_added"] -->

# %%
prose = f"{show.title_of('wmdp_bio', sources)} as prose"
sources["wmdp_bio"]["questions"] = reporting[: args.limit]
wanted, _ = evaluation.score_texts(model, prose, [data.as_prose(wmdp[i]) for i in reporting], rows, args)
show.print_loss(prose, rows, wanted)
figures["loss"] = show.loss_figure({name: scores, prose: wanted}, rows, title)

# %% [markdown]
# **+0.79**, where a model that was never trained on these facts has **+5.14**: the clamp is far from that.
# <!-- wanted[4]["loss_added"], wanted[6]["loss_added"] -->
# ## The loss, by document: is it all of them, or a few?

# %%
added = nats[4] - nats[0]  # (windows,), what the clamp adds, summed over a window's tokens
figures["documents"] = show.documents_figure(added, windows, documents, f"{name}: {title}")

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
with ablate(model, sae, features, args.clamp):
    rise = torch.cat([torch.zeros(1), losses() - before])  # nothing predicts the first token
figures["tokens"] = show.token_figure(model, worst.tolist(), [rise], "loss added by the clamp, nats")

# %% [markdown]
# What was clamped there? The same window, by how strongly the picked features are active.

# %%
h = model.run_with_cache(worst, names_filter=sae.hook_point)[1][sae.hook_point].float()  # (1, pos, d_model)
a = sae.encode(h)[0, :, features]  # (pos, n)
figures["active"] = show.token_figure(model, worst.tolist(), [a.sum(-1)], "activation of all picked features")
guilty = features[a[1:].sum(0).argmax()]
print(f"most active here: feature {guilty}, on {100 * retain.rate[guilty]:.2f}% of the retain tokens and "
      f"{100 * forget.rate[guilty]:.2f}% of the forget tokens")  # fmt: skip

# %% [markdown]
# The loss rises on the token after one where a feature fires, and then on all that follow a little, by attention. No
# biology in sight: what is rare on Wikitext (**0.03**%) and less rare in quizzes (**0.75**%) fires on other text, too.
# <!-- 100 * retain.rate[guilty], 100 * forget.rate[guilty] -->

# %%
# The record: everything above, to compare with other runs
points = [row.point(openwebtext=one, wmdp_bio_prose=other) for row, one, other in zip(rows, scores, wanted)]
record = records.make_record("feature_ablate_3.py", args, [sae], sources, measured.sanity, points, started)
records.write_record(path, record, figures)

# %% [markdown]
# ## Make it your own
# Change one line and run what is below it again. With `args.layer, args.n_features, args.clamp = 9, 20, -80.0`:
# **+0.016** nats on the same text. <!-- --layer 9 --n-features 20 --clamp -80: scores[4]["loss_added"] -->
#
# Here without the feature that was most active above, and then a text of yours:

# %%
others = [feature for feature in features if feature != guilty]
edits = [rows[0], rows[4], evaluation.of_features("sae-ablation", sae, others, args.clamp)]
for what, some in ((name, texts), ("mine", ["The disease was caused by a bacterium in the water."])):
    found, _ = evaluation.score_texts(model, what, some, edits, args)
    print(f"{what}: loss added {found[1]['loss_added']:+.4f}, without feature {guilty} {found[2]['loss_added']:+.4f}")
