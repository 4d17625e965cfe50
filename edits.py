"""
Edits of the residual stream at inference time: what an edit is, every method, and the context that puts one in place.

A method's edit is a function of h (batch, pos, d_model), the residual stream behind a layer, and of the (batch, pos)
mask of ordinary tokens; it returns h', in h's shape and dtype. With a = SAE.encode(h) and F the picked features

    h' = h + sum over i in F of (a'_i - a_i) * W_dec[i]

on ordinary tokens: the SAE's error term is kept, special tokens are never edited. The methods differ in a'_i, and in
where it applies. All are differentiable, so that a model can be fine-tuned under its edit.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from sae_lens import SAE
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from data import UserError, batches, first_line, pad_id, special_ids

# ------------------------------------------------------------------------------------- layers and tokens


def layer_of(sae: SAE) -> int:
    """The layer whose output is the SAE's hook point: the one place that decides where an edit goes.

    Not always --layer: an SAE of blocks.4.hook_resid_pre is named by layer 4 and reads what layer 3 writes.
    """
    return int(sae.hook_point.split(".")[1])


def decoder_layers(model) -> torch.nn.ModuleList:
    """The blocks of a Hugging Face language model: output L is TransformerLens's blocks.L.hook_resid_post."""
    n = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n]
    if len(lists) != 1:
        raise UserError(f"cannot tell which modules of {type(model).__name__} are its {n} layers")
    return lists[0]


@contextmanager
def watch_tokens(module: torch.nn.Module, tokenizer):
    """Yields a dict whose "ordinary" is the (batch, pos) mask of the running forward pass's tokens that are counted:
    all but special tokens and the first token of each sequence, whatever it is; "edited" are the same, or with
    `tokenizer.edit_special` "all-but-bos" (SAEBench) special tokens too, the first one and padding left out.

    module: the Hugging Face model. A hook on the residual stream does not see tokens, and special tokens may stand
    anywhere, not only first. The first token is an attention sink, its residual of another size than all others; where
    a tokenizer adds no BOS it is a word. Behind a cache no token is the first, behind left padding (which the
    attention mask tells) it is the first real one.
    """
    special = torch.tensor(special_ids(tokenizer))
    seen, given, pad = {}, {}, pad_id(tokenizer)

    def remember_call(module, args, kwargs):
        given.update(cache=kwargs.get("past_key_values"), mask=kwargs.get("attention_mask"))

    def remember(module, args):
        ids, cache, mask = args[0], given.pop("cache", None), given.pop("mask", None)
        ordinary = ~torch.isin(ids, special.to(ids.device))
        first = None
        if cache is None or not cache.get_seq_length():
            first = mask.argmax(1) if mask is not None and mask.shape == ids.shape else 0
            ordinary[torch.arange(len(ids)), first] = False
        seen["ordinary"] = seen["edited"] = ordinary
        if getattr(tokenizer, "edit_special", "never") == "all-but-bos":
            # not the padding: a share of tokens, as DSG's gate is, must not depend on the batch
            if mask is not None and mask.shape == ids.shape:
                seen["edited"] = mask.bool()
            else:
                seen["edited"] = (ids != pad).int().flip(1).cummax(1).values.flip(1).bool()
            if first is not None:
                seen["edited"][torch.arange(len(ids)), first] = False

    handles = [
        module.register_forward_pre_hook(remember_call, with_kwargs=True),
        module.get_input_embeddings().register_forward_pre_hook(remember),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def unwatched_parts(model) -> list[tuple]:
    """(module, name, part) for what TransformerLens has put around the parts of each block, where nobody listens at a
    hook point inside and it computes nothing by a formula of its own. model: a TransformerBridge."""
    # TransformerLens listens to norms itself, but only with a fork of a block's input does it do anything with it
    forks = any(getattr(model.cfg, name, False) for name in ("use_attn_in", "use_split_qkv_input", "use_hook_mlp_in"))
    handles = [] if forks else [getattr(block, "_capture_hook_handles", []) for block in model.blocks]
    own = {handle.id for some in handles for handle in some}

    def needed(part):
        listeners = (set(m._forward_hooks) | set(m._forward_pre_hooks) for m in part.modules()
                     if isinstance(m, HookPoint | GeneralizedComponent))  # fmt: skip
        return any(some - own for some in listeners) or not getattr(part, "use_native_layernorm_autograd", True)

    return [(module, name, part) for block in model.blocks for module in block.modules()
            if not isinstance(module, GeneralizedComponent) for name, part in module.named_children()
            if isinstance(part, GeneralizedComponent) and not needed(part)]  # fmt: skip


@contextmanager
def without(parts: list[tuple]):
    """Within it Hugging Face's own modules stand in the place of these `unwatched_parts`: the same numbers to the bit,
    on a small model about a fifth sooner (norms are not computed twice). Hooks of whole blocks still work."""
    for module, name, part in parts:
        module._modules[name] = part.original_component
    try:
        yield
    finally:
        for module, name, part in parts:
            module._modules[name] = part


class Reached(Exception):
    pass


def hidden(model, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """Residual stream (batch, pos, d_model) behind the layer; later layers are not run."""
    kept = {}

    def stop(module, args, output):
        kept["h"] = output[0] if isinstance(output, tuple) else output
        raise Reached

    handle = decoder_layers(model)[layer].register_forward_hook(stop)
    try:
        model(ids, use_cache=False)
    except Reached:
        return kept["h"]
    finally:
        handle.remove()
    raise RuntimeError(f"layer {layer} never ran")


@torch.inference_mode()
def residuals(lm, layer: int, windows: list, batch_size: int, desc: str | None = None, shared: bool = True):
    """Yield, batch by batch, the ordinary tokens' residual stream (n, d_model) behind the layer and their ids (n,).

    shared: as in data.batches.
    """
    parts = unwatched_parts(lm)
    with watch_tokens(lm.original_model, lm.tokenizer) as seen:
        for _, ids in batches(windows, batch_size, lm.tokenizer, lm.cfg.device, desc, shared):
            with without(parts):
                h = hidden(lm.original_model, ids, layer)
            ordinary = seen["ordinary"]
            yield h[ordinary.to(h.device)], ids[ordinary.to(ids.device)]


# ---------------------------------------------------------------------------- is it the model it should be

CLOSE = 1e-3  # nats, at most, by which log-probabilities differ where float32 sums in another order
ROUNDINGS = 4.0  # and else root mean squares, in those of what rounding every module's output otherwise does


def random_ids(model, shape: tuple = (2, 12)) -> torch.Tensor:
    """Token ids (batch, pos) that say nothing, the same ones each time. model: a Hugging Face model."""
    table = model.get_input_embeddings().weight
    noise = torch.Generator().manual_seed(0)
    return torch.randint(len(table), shape, generator=noise).to(table.device if table.device.type != "meta" else "cpu")


@torch.inference_mode()
def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    """(batch, pos, d_vocab) in fp32 on the CPU, from a plain pass of a Hugging Face model.

    Raises UserError where they are no numbers, or the model does not run.
    """
    try:
        found = model(ids, use_cache=False).logits.float().log_softmax(-1).cpu()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{type(model).__name__} does not run here: {first_line(error)}") from error
    if found.isnan().any():
        raise UserError(f"{type(model).__name__} gives log-probabilities that are no numbers (NaN)")
    return found


def alike(found: torch.Tensor, wanted: torch.Tensor, model, run) -> bool:
    """Do two sets of log-probabilities differ by no more than rounding explains?

    How much that is in the model's dtype, run() tells: it computes `wanted` once more, while the output of every module
    with weights is off by one unit in its last place, up or down. Measured on 27 families of random weights and on
    tiny, in float32 and bfloat16, differences without a fault stayed below 0.9 of that.
    """
    gap = found - wanted
    if gap.abs().max() <= CLOSE:
        return True
    noise = torch.Generator().manual_seed(0)

    def round_otherwise(module, args, output):
        if torch.is_tensor(output) and output.is_floating_point():
            signs = torch.randint(2, output.shape, generator=noise).to(output.device) * 2 - 1
            return output * (1 + torch.finfo(output.dtype).eps * signs).to(output.dtype)

    weighty = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    handles = [module.register_forward_hook(round_otherwise) for module in weighty]
    try:
        rounding = run() - wanted
    finally:
        for handle in handles:
            handle.remove()
    return bool(gap.pow(2).mean() <= ROUNDINGS**2 * rounding.pow(2).mean())


# ----------------------------------------------------------------------------------------------- latents

AT_ONCE = 2**25  # activations of all features, at most; an SAE's pass holds them four times over, 0.5 GB in all


def few_rows(sae: SAE, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """h (..., d_model) as pieces (n, d_model), of so few tokens that the SAE makes no more than AT_ONCE activations of
    one: a batch's (batch, pos, d_sae) may take more memory than the model."""
    return h.flatten(0, -2).split(max(1, AT_ONCE // sae.cfg.d_sae))


class Latents:
    """Some of an SAE's features: encodes and decodes only these, so that an edit costs next to nothing.

    features: their ids, (n,); of range(d_sae), which is all of them, no weights are copied. The formulas are SAELens's
    own, per architecture and normalisation (tests compare). Raises ValueError for features the SAE lacks and for one
    named twice.
    """

    def __init__(self, sae: SAE, features: list[int]):
        if len(set(features)) != len(features):
            raise ValueError("a feature is named twice")
        if len(features) and not 0 <= min(features) <= max(features) < sae.cfg.d_sae:
            raise ValueError(f"feature ids must lie in 0..{sae.cfg.d_sae - 1}")
        self.sae, self.features = sae, torch.as_tensor(features, dtype=torch.long)
        self.arch, self.all = sae.cfg.architecture(), features == range(sae.cfg.d_sae)
        self.take(sae.W_dec.device)
        # GPT-2's SAEs were trained with centred writing weights: each residual vector had mean zero
        kwargs = sae.cfg.metadata.model_from_pretrained_kwargs or {}
        self.centre = bool(kwargs.get("center_writing_weights"))

    def take(self, device: torch.device) -> None:
        """Take the features' weights from the SAE, which is on the device."""
        self.features = self.features.to(device)
        self.rows = self.sae.W_dec if self.all else self.sae.W_dec[self.features]
        whole = self.all or self.arch == "topk"
        self.W_enc = self.sae.W_enc if whole else self.sae.W_enc[:, self.features].contiguous()

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """Of x (..., d_sae) what is the features', (..., n)."""
        return x if self.all else x[..., self.features]

    @property
    def W_dec(self) -> torch.Tensor:
        """(n, d_model), what a feature's activation of 1 adds."""
        rescaled = self.arch == "topk" and self.sae.cfg.rescale_acts_by_decoder_norm
        return self.rows / self.rows.norm(dim=-1, keepdim=True) if rescaled else self.rows

    def follow(self, device: torch.device) -> None:
        """Move, once, to where the residual stream is: a large model's layers are spread over devices."""
        if self.rows.device != device:
            self.sae.to(device)
            self.take(device)

    def encode(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """h: (..., d_model), any dtype. Returns activations (..., n) in fp32 and the run-time scale of the decoder."""
        self.follow(h.device)
        sae, own, x, scale = self.sae, self.own, h.to(self.sae.dtype), 1.0
        if self.centre:
            x = x - x.mean(-1, keepdim=True)
        if sae.cfg.normalize_activations == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / sae.cfg.d_in**0.5
            x = x / scale
        elif sae.cfg.normalize_activations == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            scale = x.std(-1, keepdim=True)
            x = x / (scale + 1e-5)
        if sae.cfg.apply_b_dec_to_input:
            x = x - sae.b_dec
        if self.arch == "topk":
            norms = sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else 1.0
            acts = [own(sae.activation_fn((rows @ self.W_enc + sae.b_enc) * norms)) for rows in few_rows(sae, x)]
            return torch.cat(acts).unflatten(0, x.shape[:-1]), scale
        pre = x @ self.W_enc
        if self.arch == "gated":
            return (pre + own(sae.b_gate) > 0) * torch.relu(pre * own(sae.r_mag).exp() + own(sae.b_mag)), scale
        pre = pre + own(sae.b_enc)
        acts = torch.relu(pre)
        return (acts * (pre > own(sae.threshold)) if self.arch == "jumprelu" else acts), scale

    def moved(self, h: torch.Tensor, change: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
        """h (..., d_model) with `change` (..., n) added to the activations, in h's dtype."""
        return (h + change @ self.W_dec * scale).to(h.dtype)  # added in fp32, rounded once


def passed(sae: SAE, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many features are active (...,) at h (..., d_model), and what the SAE makes of it in fp32, by SAELens.

    But a gated SAE's activations are Latents': SAELens would copy the whole W_enc for each of the pieces.
    """
    gated = sae.cfg.architecture() == "gated"
    latents, found = Latents(sae, range(sae.cfg.d_sae) if gated else []), []
    for rows in few_rows(sae, h.float()):
        mean = rows.mean(-1, keepdim=True) if latents.centre else 0.0
        if gated:
            sae.process_sae_in(rows - mean)  # decode goes by the norms that it leaves behind
            acts, _ = latents.encode(rows)
        else:
            acts = sae.encode(rows - mean)
        found.append(((acts > 0).sum(-1), sae.decode(acts) + mean))
    active, back = (torch.cat(parts).unflatten(0, h.shape[:-1]) for parts in zip(*found))
    return active, back


# ----------------------------------------------------------------------------------------------- methods


@dataclass(eq=False)
class OfLatents:
    """An edit that sets latents: `wanted` (acts, ordinary) -> a', both (batch, pos, n), on ordinary tokens.

    whole: it looks at a whole prompt before it edits the first token. always: it is run on prompts too on which it
    changes nothing.
    """

    latents: Latents
    wanted: Callable
    whole: bool = False
    always: bool = False

    def change(self, acts: torch.Tensor, ordinary: torch.Tensor) -> torch.Tensor:
        """a' - a (batch, pos, n), 0 where nothing is edited."""
        return torch.where(ordinary[..., None], self.wanted(acts, ordinary) - acts, 0)

    def __call__(self, h: torch.Tensor, ordinary: torch.Tensor) -> torch.Tensor:
        acts, scale = self.latents.encode(h)
        return self.latents.moved(h, self.change(acts, ordinary), scale)


def clamp(sae, features: list[int], clamp: float = 0.0, threshold: float = 0.0) -> OfLatents:
    """a'_i = clamp where a_i > threshold: 0 ablates, a negative clamp overshoots (Farrell et al., arXiv 2410.19278;
    SAEBench, arXiv 2503.09532). A positive threshold is the conditional clamp of Khoriaty et al., arXiv 2503.11127.

    features: ids, (n,); clamp and threshold in units of the SAE's activations. Not so: SAEBench edits all tokens but
    the first (watch_tokens' "all-but-bos"), and methods.py makes Khoriaty et al.'s threshold, one number there, a share
    of the features' mean activation. Raises ValueError for a clamp that is not finite or positive.
    """
    if not -math.inf < clamp <= 0:
        raise ValueError(f"clamp must be 0 (zero ablation) or negative, not {clamp}")
    return OfLatents(Latents(sae, features), lambda acts, ordinary: torch.where(acts > threshold, clamp, acts))


def nothing(sae, features: list[int]) -> OfLatents:
    """a'_i = a_i: goes all the way of an edit, and must change nothing."""
    return OfLatents(Latents(sae, features), lambda acts, ordinary: acts, always=True)


def refusal_clamp(sae, features: list[int], threshold: float, refusal: int, refusal_value: float) -> OfLatents:
    """Where any feature exceeds the threshold the latent `refusal`, one that is active when the model declines, is set
    to refusal_value; the features themselves stay as they are.

    So the released code of Khoriaty et al., arXiv 2503.11127 (clamp_refusal in github.com/AMindToThink/
    sae_jailbreak_unlearning), with threshold 0.05 and refusal_value -500; a third party's port clamps the features too.
    features: ids, (n,); refusal: one id. Nothing differs but that special tokens are left alone.
    """

    def wanted(acts, ordinary):
        called = (acts[..., :-1] > threshold).any(-1, keepdim=True)
        return torch.cat([acts[..., :-1], torch.where(called, refusal_value, acts[..., -1:])], -1)

    return OfLatents(Latents(sae, [*features, refusal]), wanted)


def mean_ablation(sae, features: list[int], means: list[float]) -> OfLatents:
    """a'_i = its mean over retain tokens, on every token: what it carries is gone, its average effect is not.

    features: ids, (n,); means: (n,), inactive tokens counted as 0. No release: the usual control of ablation studies.
    """
    values = torch.tensor(means)
    return OfLatents(Latents(sae, features), lambda acts, ordinary: values.to(acts).expand_as(acts))


def gate_of(acts: torch.Tensor, ordinary: torch.Tensor) -> torch.Tensor:
    """rho (batch,): the share of a sequence's ordinary tokens on which any of the features is active."""
    firing = (acts > 0).any(-1) & ordinary
    return firing.sum(1) / ordinary.sum(1).clamp(min=1)


def dsg(sae, features: list[int], clamp: float, gate: float) -> OfLatents:
    """Dynamic SAE Guardrails (Muhamed et al., arXiv 2504.08192): a sequence whose rho exceeds the gate has ALL features
    set to `clamp` on every token on which any of them is active; other sequences are left alone.

    features: ids, (n,); gate: a share of tokens, 0 to 1. Not so: the release (github.com/aashiqmuhamed/
    DynamicSAEGuardrails) counts BOS among the tokens that rho is a share of, and clamps to -500; selection and tau, the
    95th percentile of rho over retain sequences, are its own. It looks at a whole sequence before it edits the first
    token, so it is for scoring, not for generating with a cache.
    """

    def wanted(acts, ordinary):
        blocked = (gate_of(acts, ordinary) > gate)[:, None, None] & (acts > 0).any(-1, keepdim=True)
        return torch.where(blocked, clamp, acts)

    return OfLatents(Latents(sae, features), wanted, whole=True)


def diff_in_means(sae, direction: list[float], strength: float = 1.0) -> Callable:
    """h' = h - strength * (u . h) u, u the unit vector along mean(forget tokens) - mean(retain tokens); strength 1
    projects it out (Arditi et al., arXiv 2406.11717). Needs no SAE.

    direction: (d_model,), of any length. Not so: Arditi et al. take harmful less harmless instructions, and project the
    difference out at every layer (in methods.py a choice of the grid, `behind`).
    """
    u = torch.tensor(direction, dtype=torch.float64)
    u = u / u.norm()

    def edit(h, ordinary):
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        along = u.to(x.dtype).to(x.device)  # in this order: Apple's GPUs have no fp64
        change = (x @ along)[..., None] * along * -strength
        return (x + change * ordinary[..., None]).to(h.dtype)

    return edit


def bare_reconstruction(sae) -> Callable:
    """h' = SAE(h), the error term thrown away: what the SAE alone costs."""
    return lambda h, ordinary: torch.where(ordinary[..., None], passed(sae, h)[1].to(h.dtype), h)


METHODS = {
    "sae-patched": nothing,
    "sae-reconstruction": bare_reconstruction,
    "sae-ablation": clamp,
    "random-features": clamp,
    "zero-ablation": clamp,
    "clamp": clamp,
    "conditional-clamp": clamp,
    "refusal-clamp": refusal_clamp,
    "mean-ablation": mean_ablation,
    "dsg": dsg,
    "diff-in-means": diff_in_means,
}


# ------------------------------------------------------------------------------------------------- edits


@dataclass(frozen=True, eq=False)
class Edit:
    """One row of a table: a method's name, and {layer: function (h, ordinary) -> h'}, empty for the model as it is.

    setting: what sets it apart from others of its method, for tables and records; arguments: what METHODS makes the
    functions from.
    """

    method: str
    at: dict[int, Callable] = field(default_factory=dict)
    setting: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        return any(getattr(function, "whole", False) for function in self.at.values())

    def point(self, **scores) -> dict:
        """The record's entry for this row: method, setting, {"layers", "arguments"} of the edit, scores by data set."""
        edit = {"edit": {"layers": list(self.at), "arguments": self.arguments}} if self.arguments else {}
        return {"method": self.method, "setting": self.setting, **edit, "scores": scores}


NEVER_KNEW = Edit("never-knew")  # a row of tables: another model, that was trained without the forget set
NONE = Edit("none")


def edit_of(method: str, sae, setting: dict | None = None, layers: list[int] | None = None, **arguments) -> Edit:
    """METHODS[method](sae, **arguments) behind each of the layers (None: the SAE's own). Raises ValueError for features
    that the SAE lacks, one named twice, and a clamp that is not finite or positive."""
    function = METHODS[method](sae, **arguments)
    at = dict.fromkeys([layer_of(sae)] if layers is None else layers, function)
    return Edit(method, at, setting or {}, arguments)


@contextmanager
def applied(model, tokenizer, edit: Edit):
    """Within this context the model runs with the edit: a TransformerBridge at its hook points, a Hugging Face model
    behind its decoder layers. Raises RuntimeError if a layer to be edited never ran."""
    bridge, ran = hasattr(model, "original_model"), set()

    def edited(layer, h):
        ran.add(layer)
        return edit.at[layer](h, seen["edited"].to(h.device))

    def behind(layer):
        def hook(module, args, output):  # transformers 5 returns h, earlier versions (h, ...)
            return (edited(layer, output[0]), *output[1:]) if isinstance(output, tuple) else edited(layer, output)

        return hook

    def at(layer):
        return f"blocks.{layer}.hook_resid_post", lambda h, hook: edited(layer, h)

    with watch_tokens(model.original_model if bridge else model, tokenizer) as seen, ExitStack() as hooks:
        if bridge:
            hooks.enter_context(model.hooks(fwd_hooks=[at(layer) for layer in edit.at]))
        for layer in () if bridge else edit.at:
            hooks.callback(decoder_layers(model)[layer].register_forward_hook(behind(layer)).remove)
        yield
    if missing := sorted(set(edit.at) - ran):
        raise RuntimeError(f"layers {missing} never ran: nothing was edited there")
