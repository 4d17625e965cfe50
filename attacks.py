"""
Attacks: what may bring an answer back that is gone: fine-tuning, rounded weights, a push of the residual stream.

The push is the recovery attack of Cui, Shen and Yang (arXiv 2606.18322; github.com/Mingyuee88/
sae-post-intervention-recovery): does the answer come back with the edit that took it still on? What an edit makes of
the residual stream h behind its layer is held fixed; to the prompt's last token there a perturbation delta is added,
orthogonal to the encoder directions of the edited features, so that none of them can tell, and of bounded length. Adam
looks for the delta that raises

    margin = logit of the wanted letter - mean logit of the other three

Without the projection it is the release's own, step by step (run side by side: the same delta to a millionth of its
length). Not so: the release projects the gradient, after which Adam, which scales each coordinate, leaves the subspace
again (a quarter of its delta's length lay along edited features' directions); here delta itself is projected after
each step. Its bound, 20 at any token of Gemma-2-2B, is here a share of the length of h, and its rate, 0.08, the same
multiple of the bound (0.192 of it over sqrt(d_model)). And it is asked what the paper's main text does not ask: how
often the same push brings a wrong option. Only what comes beyond that can have been in the model; the rest is in the
push.
"""

import random
from contextlib import ExitStack
from unittest.mock import patch

import torch
from tqdm import tqdm
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

from data import pad_id, special_ids
from edits import Edit, OfLatents, applied, decoder_layers
from training import Master, linear_modules, passes, text_nll

BATCH = 8  # texts a step of fine-tuning
STEPS = 150  # the release's
RATE = 0.192  # its 0.08 * sqrt(2304) / 20


def fine_tune(model, tokenizer, sets: list[list], marks: list[int], lr: float, seed: int):
    """Train all weights in place on (ids, start) windows of the sets, one set a step in turn, with the plain next-token
    loss; yields the number of steps whenever it is one of the marks, the last of which is the end."""
    special, rng = torch.tensor(special_ids(tokenizer)), random.Random(seed)
    texts = [passes(part, BATCH, rng) for part in sets]
    model.requires_grad_(True)
    master = Master(model.parameters(), lr, clip=1.0, weight_decay=0.0)
    for number in tqdm(range(max(marks)), desc="relearning", unit="step", leave=False):
        master.step(text_nll(model, next(texts[number % len(texts)]), tokenizer, special).mean)
        if number + 1 in marks:
            yield number + 1


@torch.no_grad()
def round_weights(model, bits: int) -> None:
    """In place, every matrix of attention and MLP: w -> s * round(w / s), s = max |w| / (2^(bits - 1) - 1) of each row,
    the plainest of the quantisations by which Zhang et al. (arXiv 2410.16454) saw unlearnt knowledge come back. Norms
    and embeddings stay as they are, and so does the arithmetic: only the weights lose their lower bits."""
    names = set(linear_modules(model, range(len(decoder_layers(model)))))
    for name, module in model.named_modules():
        if name in names:
            weight, row = module.weight.float(), 0 if isinstance(module, Conv1D) else 1
            step = weight.abs().amax(row, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
            module.weight.copy_((weight / step).round() * step)


# ------------------------------------------------------------------------------------- recovery


def directions(edit: Edit, layer: int) -> torch.Tensor | None:
    """An orthonormal basis (d_model, k) of what the edit behind `layer` looks at, None where there is no such edit. In
    a TopK SAE others may still push an edited feature out, which no direction rules out."""
    function = edit.at.get(layer)
    if function is None:
        return None
    if isinstance(function, OfLatents):
        latents = function.latents
        columns = latents.sae.W_enc[:, latents.features].detach().cpu().double()  # Apple's GPUs have no fp64
        columns = columns - columns.mean(0) if latents.centre else columns
    else:
        columns = torch.tensor(edit.arguments["direction"], dtype=torch.float64)[:, None]
    u, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, sizes > 1e-9 * sizes[0]]


def aligned(rows: list[list[int]], tokenizer, device) -> dict:
    """ids, attention mask and positions (batch, pos), padded in front, so that every prompt ends at the last place."""
    width, pad = max(map(len, rows)), pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


class LastToken:
    """A Hugging Face model under an edit, at the last token of some prompts: what came before it is kept, `h` (batch,
    d_model) is its residual stream behind `layer` as the edit leaves it, and calling it with h' (batch, d_model) in
    h's place gives its logits, (batch, d_vocab). Edits behind later layers stay on, earlier layers are not run."""

    def __init__(self, model, tokenizer, edit: Edit, rows: list[list[int]], layer: int):
        self.model, self.tokenizer, self.blocks = model, tokenizer, list(decoder_layers(model)[: layer + 1])
        self.later = Edit(edit.method, {at: function for at, function in edit.at.items() if at > layer})
        whole, cache, kept = aligned(rows, tokenizer, model.device), DynamicCache(), {}
        with torch.no_grad(), applied(model, tokenizer, edit):
            handle = self.blocks[-1].register_forward_hook(lambda *call: kept.update(output=call[-1]))
            try:
                model(**whole, past_key_values=cache, use_cache=True)
            finally:
                handle.remove()
        self.in_tuples = isinstance(kept["output"], tuple)
        self.h = (kept["output"][0] if self.in_tuples else kept["output"])[:, -1]
        cache.crop(-1)
        self.cache, self.before = cache, [(one.keys, one.values) for one in cache.layers]
        self.last = whole | {name: whole[name][:, -1:] for name in ("input_ids", "position_ids")}

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        for one, (keys, values) in zip(self.cache.layers, self.before):  # the pass before has added to them
            one.keys, one.values = keys, values

        def put(*args, **kwargs):
            return (h[:, None],) if self.in_tuples else h[:, None]

        with applied(self.model, self.tokenizer, self.later), ExitStack() as skipped:
            for block in self.blocks:
                skipped.enter_context(patch.object(block, "forward", put))
            return self.model(**self.last, past_key_values=self.cache, use_cache=True).logits[:, -1]


def margin(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """(batch,): the wanted letter's logit less the mean of the others'; logits: (batch, 4), wanted: (batch,)."""
    own = logits.gather(1, wanted[:, None])[:, 0]
    return own - (logits.sum(1) - own) / (logits.shape[1] - 1)


def pushed(last: LastToken, letters: torch.Tensor, wanted: torch.Tensor, share: float, basis=None, steps: int = STEPS):
    """The letter (batch,) of the highest logit under the perturbation that was found for each prompt, and the
    perturbations (batch, d_model).

    letters: ids (4, k), of which the likeliest counts; wanted: (batch,), the letter to be reached; share: the bound, of
    the length of h; basis: `directions`', to which they are orthogonal.
    """
    h = last.h.float()
    bound, basis = share * h.norm(dim=-1, keepdim=True), None if basis is None else basis.to(h)
    unit = torch.zeros_like(h, requires_grad=True)  # the perturbation, in units of the bound
    adam = torch.optim.Adam([unit], lr=RATE / h.shape[1] ** 0.5)

    def logits():
        return last((h + bound * unit).to(last.h.dtype)).float()[:, letters].amax(-1)

    for _ in range(steps):
        adam.zero_grad()
        (-margin(logits(), wanted)).sum().backward()
        adam.step()
        with torch.no_grad():
            if basis is not None:
                unit -= unit @ basis @ basis.T
            unit /= unit.norm(dim=-1, keepdim=True).clamp(min=1)
    with torch.no_grad():
        return logits().argmax(-1), (bound * unit).detach()


def other_option(right: list[int], now: list[int], seed: int) -> list[int]:
    """For each question an option that is neither right nor what is answered now: the control's target."""
    rng = random.Random(seed)
    return [rng.choice([k for k in range(4) if k not in pair]) for pair in zip(right, now)]
