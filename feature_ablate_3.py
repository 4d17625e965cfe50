# %% [markdown]
"""
Lesson 3 of 3: ablate WMDP-Bio features and measure the loss added on OpenWebText, in nats per token.

    python feature_ablate_3.py --layer 7 --n-features 50
    python feature_ablate_3.py --model gemma-2-2b-it --layer 7 --n-features 50 --dtype bfloat16

Features are picked on one half of the WMDP-Bio questions, by how much more often they fire there than on Wikitext and
on MMLU's development questions; the other half, as prose, is scored beside OpenWebText. One pass scores every row of
the table: unablated, patched with nothing ablated, the SAE's bare reconstruction, zero ablation, a negative clamp, and
as many random features of like firing rate on the retain sets, clamped too. Every window starts with BOS, which is
never a target.
"""

# %% [markdown]
# Start a notebook in this folder, beside the helper files. Flags come first: --help need not wait for other imports.

# %%
from flags import answered, command_line, parser, settings

flags = parser(__doc__)
answered(flags, __name__)

# %%
import time

import torch

import show
from common import firing_rates, largest, load_model, load_never_knew, load_sae, matched_random, pick_features
from data import as_prose, halves, load_rows, picking_texts, picking_windows, token_windows
from edits import NEVER_KNEW, NONE, layer_of
from engine import check_engine
from evaluation import SCORED_TOKENS, foretell, loss_scores, score_loss, standard_rows
from hub import sanity_gate

# %% [markdown]
# ## Score: one forward pass a window, for all rows of the table at once


# %%
def score(lm, title, texts, rows, never_knew, s):
    """One score per row: nats per token, and the loss added with a bootstrap over documents; then never_knew's."""
    windows, documents = token_windows(lm.tokenizer, texts[: s.limit], max_tokens=SCORED_TOKENS, bos=True)

    def losses(some, desc=None):
        return score_loss(lm, some, rows, s.batch_size, desc, s.max_rows)

    foretell(lm, title, windows, losses, s.batch_size)  # says how long it will take, if long
    nats, targets = losses(windows, title)  # (rows, windows), (windows,)
    if never_knew:
        nats = torch.cat([nats, score_loss(never_knew, windows, [NONE], s.batch_size)[0]])
    return loss_scores(nats, targets, documents, s.seed)


# %% [markdown]
# ## The lesson: load, pick, ablate, score, show


# %%
def run(**changes) -> dict:
    """run(layer=3, clamp=-40.0): any flag by name. Returns the record that it writes; raises UserError."""
    s, started, sources = settings(flags, changes), time.time(), {}
    path = show.outputs("feature_ablate_3.py", s, flags)
    lm = load_model(s.model, s.device, s.dtype, s.device_map, s.edit_special)
    sae = load_sae(s.sae, s.layer, lm, s.model)
    check_engine(lm, [layer_of(sae)])
    never_knew = load_never_knew(s.model, s.device, s.dtype)  # the floor, where there is one

    wmdp, sources["wmdp_bio"] = load_rows("wmdp_bio", s.model, s.data)
    picking, reporting = halves(wmdp, s.seed, s.pick_on)
    texts = picking_texts(wmdp, picking, s, sources)
    forget_windows, retain_windows = picking_windows(lm.tokenizer, *texts, s)
    sanity = sanity_gate(lm, sae, retain_windows[0], insist=not s.no_sanity)
    forget = firing_rates(lm, sae, forget_windows, s.batch_size, "forget rates")
    retain = largest([firing_rates(lm, sae, part, s.batch_size, "retain rates") for part in retain_windows])
    features = pick_features(forget, retain, s.n_features, s.pick)
    control = matched_random(forget, retain, features, s.seed)
    show.print_features(features, forget, retain, show.top_tokens(lm, sae, features, forget_windows), sae)

    rows = standard_rows(sae, features, control, s.clamp)
    web, sources["openwebtext"] = load_rows("openwebtext", s.model, s.data)
    texts = {show.title_of("openwebtext", sources): [row["text"] for row in web],
             f"{show.title_of('wmdp_bio', sources)} as prose": [as_prose(wmdp[i]) for i in reporting]}  # fmt: skip
    sources["wmdp_bio"]["questions"] = reporting[: s.limit]
    panels = {title: score(lm, title, part, rows, never_knew, s) for title, part in texts.items()}
    rows += [NEVER_KNEW] if never_knew else []

    for title, scores in panels.items():
        show.print_loss(title, rows, scores)
    points = [row.point(openwebtext=a, wmdp_bio_prose=b) for row, a, b in zip(rows, *panels.values())]
    record = show.make_record("feature_ablate_3.py", s, [sae], sources, sanity, points, time.time() - started)
    title = f"{show.short_name(s.model)}, layer {s.layer}: {s.n_features} features ablated"
    show.write_record(path, record, {
        "features": lambda: show.scatter(features, forget, retain, title),
        "loss": lambda: show.loss_figure(panels, rows, title),
    })  # fmt: skip
    return record


# %%
if __name__ == "__main__":
    command_line(run, flags)
