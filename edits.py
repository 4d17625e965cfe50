"""
Edits of the residual stream at inference time: one short function a method, and the context that puts an edit in.

An edit is a function of h (batch, pos, d_model), the residual stream behind a layer, and of the (batch, pos) mask of
ordinary tokens; it returns h', in h's shape and dtype. With a = SAE.encode(h) and F the picked features

    h' = h + sum over i in F of (a'_i - a_i) * W_dec[i]

on ordinary tokens: the SAE's error term is kept, special tokens are never edited. The methods differ in a'_i, and in
where it applies. All are differentiable, so that a model can be fine-tuned under its edit.
"""

from contextlib import ExitStack, contextmanager

import torch

from common import Latents, decoder_layers, watch_tokens


def moved(h, latents: Latents, acts, scale, wanted, where, ordinary):
    """h with the latents' activations acts (batch, pos, n) set to `wanted` at `where` (both broadcast to acts)."""
    change = torch.where(where & ordinary[..., None], wanted - acts, 0)
    return (h + change @ latents.W_dec * scale).to(h.dtype)  # added in fp32, rounded once


def clamp(sae, features: list[int], clamp: float, threshold: float = 0.0):
    """a'_i = clamp where a_i > threshold: 0 ablates, a negative clamp overshoots (Farrell et al., arXiv 2410.19278;
    SAEBench, arXiv 2503.09532). A positive threshold is the conditional clamp of Khoriaty et al., arXiv 2503.11127."""
    latents = Latents(sae, features)

    def edit(h, ordinary):
        acts, scale = latents.encode(h)
        return moved(h, latents, acts, scale, clamp, acts > threshold, ordinary)

    return edit


def refusal_clamp(sae, features: list[int], threshold: float, refusal: int, refusal_value: float):
    """Where any feature exceeds the threshold the latent `refusal`, one that is active when the model declines, is set
    to refusal_value; the features themselves stay as they are.

    So the released code of Khoriaty et al., arXiv 2503.11127 (clamp_refusal in github.com/AMindToThink/
    sae_jailbreak_unlearning), with threshold 0.05 and refusal_value -500; a third party's port clamps the features too.
    """
    latents = Latents(sae, [*features, refusal])

    def edit(h, ordinary):
        acts, scale = latents.encode(h)
        where = torch.zeros_like(acts, dtype=torch.bool)
        where[..., -1] = (acts[..., :-1] > threshold).any(-1)
        return moved(h, latents, acts, scale, refusal_value, where, ordinary)

    return edit


def mean_ablation(sae, features: list[int], means: list[float]):
    """a'_i = its mean over retain tokens, on every token: what it carries is gone, its average effect is not."""
    latents, wanted = Latents(sae, features), torch.tensor(means)

    def edit(h, ordinary):
        acts, scale = latents.encode(h)
        return moved(h, latents, acts, scale, wanted.to(acts), torch.ones_like(acts, dtype=torch.bool), ordinary)

    return edit


def gate_of(acts, ordinary):
    """rho (batch,): the share of a sequence's ordinary tokens on which any of the features is active."""
    firing = (acts > 0).any(-1) & ordinary
    return firing.sum(1) / ordinary.sum(1).clamp(min=1)


def dsg(sae, features: list[int], clamp: float, gate: float):
    """Dynamic SAE Guardrails (Muhamed et al., arXiv 2504.08192): a sequence whose rho exceeds the gate has ALL features
    set to `clamp` on every token on which any of them is active; other sequences are left alone.

    It looks at a whole sequence before it edits the first token, so it is for scoring, not for generating with a cache.
    """
    latents = Latents(sae, features)

    def edit(h, ordinary):
        acts, scale = latents.encode(h)
        blocked = gate_of(acts, ordinary) > gate  # (batch,)
        where = blocked[:, None, None] & (acts > 0).any(-1, keepdim=True)
        return moved(h, latents, acts, scale, clamp, where, ordinary)

    return edit


def diff_in_means(sae, direction: list[float], strength: float = 1.0):
    """h' = h - strength * (u . h) u, u the unit vector along mean(forget tokens) - mean(retain tokens); strength 1
    projects it out (Arditi et al., arXiv 2406.11717). Needs no SAE."""
    u = torch.tensor(direction, dtype=torch.float64)
    u = u / u.norm()

    def edit(h, ordinary):
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        along = u.to(x.dtype).to(x.device)  # in this order: Apple's GPUs have no fp64
        change = (x @ along)[..., None] * along * -strength
        return (x + change * ordinary[..., None]).to(h.dtype)

    return edit


EDITS = {
    "zero-ablation": clamp,
    "clamp": clamp,
    "random-features": clamp,
    "conditional-clamp": clamp,
    "refusal-clamp": refusal_clamp,
    "mean-ablation": mean_ablation,
    "dsg": dsg,
    "diff-in-means": diff_in_means,
}


@contextmanager
def applied(model, tokenizer, layers: list[int], edit):
    """Within this context the Hugging Face model runs with the edit behind each of the layers.

    Raises RuntimeError if one of them never ran.
    """
    ran, blocks = set(), decoder_layers(model)

    def at(layer):
        def hook(module, args, output):  # transformers 5 returns h, earlier versions (h, ...)
            ran.add(layer)
            h = output[0] if isinstance(output, tuple) else output
            new = edit(h, seen["edited"].to(h.device))
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    with watch_tokens(model, tokenizer) as seen, ExitStack() as handles:
        for layer in layers:
            handles.callback(blocks[layer].register_forward_hook(at(layer)).remove)
        yield
    if missing := sorted(set(layers) - ran):
        raise RuntimeError(f"layers {missing} never ran: nothing was edited there")
