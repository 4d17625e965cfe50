"""
Edits of the residual stream while a model runs: what an edit is, every method, and the context that puts one in place.

A method's edit is a function of h (batch, pos, d_model), the residual stream after a layer, and of the (batch, pos)
mask of tokens to be edited. It returns h', in h's shape and dtype. With a = SAE.encode(h) and F the picked features

    h' = h + sum over i in F of (a'_i - a_i) * W_dec[i]

on these tokens, so the SAE's error term is kept. The methods differ in a'_i. All are differentiable, for fine-tuning.
"""

import inspect
import itertools
import math
import operator
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import torch
from sae_lens import SAE
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.exceptions import StopAtLayerException
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from data import UserError, as_list, batches, in_a_line, pad_id, special_ids


# ------------------------------------------------------------------------------------- layers and tokens
def layer_of(sae: SAE) -> int:
    """The layer whose output the SAE reads, which is where its edits go: not always the layer in the SAE's name, as an
    SAE of blocks.4.hook_resid_pre reads what layer 3 writes."""
    return int(sae.hook_point.split(".")[1])


def decoder_layers(model) -> torch.nn.ModuleList:
    """The blocks of a Hugging Face language model; the output of block L is TransformerLens's blocks.L.hook_resid_post.
    Raises UserError if they cannot be told from other lists of modules."""
    n = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n]
    if len(lists) != 1:
        raise UserError(f"cannot tell which modules of {type(model).__name__} are its {n} layers")
    return lists[0]


def final_norm(model) -> torch.nn.Module:
    """The norm after the last block of a Hugging Face language model. Raises UserError if it cannot be told."""
    norms = [part for part in model.get_decoder().children() if {p.ndim for p in part.parameters()} == {1}]
    if len(norms) != 1:
        raise UserError(f"cannot tell which module of {type(model).__name__} is its final norm")
    return norms[0]


@contextmanager
def token_mask(model: torch.nn.Module, tokenizer):
    """Yields an object with two (batch, pos) masks of a Hugging Face model's current forward pass. counted: neither
    special nor first. edited: the same, or with the tokenizer's edit_special "all-but-bos" (SAEBench) all tokens but
    the first and padding.

    The first token is left out because it is an attention sink, whose residual is of another size than all others;
    where a tokenizer adds no BOS it is a word. After left padding, known from the attention mask, it is the first real
    token; in a pass that continues a cache there is none.
    """
    special, pad, mask = torch.tensor(special_ids(tokenizer)), pad_id(tokenizer), SimpleNamespace()

    def fill(module, inputs, kwargs):
        ids = inputs[0] if inputs else kwargs["input_ids"]
        cache, attention = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        padded = attention is not None and attention.shape == ids.shape
        mask.counted = mask.edited = ~torch.isin(ids, special.to(ids.device))
        mask.whole = cache is None or not cache.get_seq_length()
        if getattr(tokenizer, "edit_special", "never") == "all-but-bos":
            # padding is left out: a share of tokens, such as DSG's gate, must not depend on the batch
            mask.edited = attention.bool() if padded else (ids != pad).int().flip(1).cummax(1).values.flip(1).bool()
        if mask.whole:
            first = torch.arange(len(ids)), attention.argmax(1) if padded else 0
            mask.counted[first] = mask.edited[first] = False

    with model.register_forward_pre_hook(fill, with_kwargs=True):
        yield mask


def idle_wrappers(model) -> list[tuple]:
    """(parent module, name, wrapper) of a bridge's wrappers inside blocks that have no hooks and only call a module."""
    # TransformerLens itself hooks norms, but uses what it captures only where a block's input is forked
    forks = any(getattr(model.cfg, name, False) for name in ("use_attn_in", "use_split_qkv_input", "use_hook_mlp_in"))
    handles = [] if forks else [h for block in model.blocks for h in getattr(block, "_capture_hook_handles", [])]
    its_own = {handle.id for handle in handles}

    def needed(part):
        hooks = (set(m._forward_hooks) | set(m._forward_pre_hooks) for m in part.modules()
                 if isinstance(m, HookPoint | GeneralizedComponent))  # fmt: skip
        return any(ids - its_own for ids in hooks) or not getattr(part, "use_native_layernorm_autograd", True)

    return [(module, name, part) for block in model.blocks for module in block.modules()
            if not isinstance(module, GeneralizedComponent) for name, part in module.named_children()
            if isinstance(part, GeneralizedComponent) and not needed(part)]  # fmt: skip


@contextmanager
def unwrapped(wrappers: list[tuple]):
    """Within this context Hugging Face's own modules stand in the place of these `idle_wrappers`: the same numbers to
    the bit, 13% faster on tiny (norms are not computed twice). Hooks of whole blocks still work."""
    for module, name, part in wrappers:
        module._modules[name] = part.original_component
    try:
        yield
    finally:
        for module, name, part in wrappers:
            module._modules[name] = part


def residual_stream(model, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """Residual stream (batch, pos, d_model) after the layer of a Hugging Face model; later layers are not run."""

    def stop(module, inputs, output):
        raise StopAtLayerException(output[0] if isinstance(output, tuple) else output)

    with decoder_layers(model)[layer].register_forward_hook(stop):
        try:
            model(ids, use_cache=False)
        except StopAtLayerException as reached:
            return reached.layer_output
    raise RuntimeError(f"layer {layer} never ran")


@torch.inference_mode()
def iter_residual_stream(model, layer: int, windows: list, batch_size: int, desc: str | None = None, shared=True):
    """Yield, batch by batch, the residual stream (n, d_model) after the layer and the ids (n,) of the counted tokens.

    model: a TransformerBridge; windows: lists of ids; desc, shared: see data.batches.
    """
    with token_mask(model.original_model, model.tokenizer) as mask:
        for _, ids in batches(windows, batch_size, model.tokenizer, model.cfg.device, desc, shared):
            h = residual_stream(model.original_model, ids, layer)
            yield h[mask.counted.to(h.device)], ids[mask.counted.to(ids.device)]


CLOSE = 1e-3  # nats: log-probabilities that differ by no more are the same, summed in another order in float32
ROUNDINGS = 4.0  # otherwise root mean squares may differ by this many times what rounding differently changes


@torch.inference_mode()
def logit_lens(model, vectors: torch.Tensor) -> torch.Tensor:
    """(n, d_vocab) logits of directions (n, d_model) in the residual stream, by the logit lens (nostalgebraist, 2020):
    W_U @ norm(vector), with a bridge's final norm and unembedding. Differs in that the norm sees the direction alone,
    not the stream it is added to: only the order of the tokens counts. Softcaps are left out, as they keep the order.
    Raises UserError as final_norm does."""
    head = model.original_model.get_output_embeddings()
    return head(final_norm(model.original_model)(vectors.to(next(head.parameters()))[:, None]))[:, 0]


def random_ids(model, shape: tuple = (2, 12)) -> torch.Tensor:
    """Random token ids (batch, pos), the same in every run. model: a Hugging Face model."""
    table = model.get_input_embeddings().weight
    ids = torch.randint(len(table), shape, generator=torch.Generator().manual_seed(0))
    return ids if table.device.type == "meta" else ids.to(table.device)


@torch.inference_mode()
def log_probs(model, ids: torch.Tensor) -> torch.Tensor:
    """(batch, pos, d_vocab), fp32 on the CPU, from a plain pass of a Hugging Face model. Raises UserError for NaN."""
    with in_a_line(f"{type(model).__name__} does not run here"):
        found = model(ids, use_cache=False).logits.float().log_softmax(-1).cpu()
    if found.isnan().any():
        raise UserError(f"{type(model).__name__} gives log-probabilities that are no numbers (NaN)")
    return found


def rounded_differently(model, run: Callable) -> torch.Tensor:
    """What run() returns while the output of each of the model's modules with weights is off by one unit in its last
    place, up or down: by how much rounding changes log-probabilities in the model's dtype."""
    noise = torch.Generator().manual_seed(0)

    def round_differently(module, inputs, output):
        if torch.is_tensor(output) and output.is_floating_point():
            signs = torch.randint(2, output.shape, generator=noise).to(output.device) * 2 - 1
            return output * (1 + torch.finfo(output.dtype).eps * signs).to(output.dtype)

    with ExitStack() as hooks:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hooks.enter_context(module.register_forward_hook(round_differently))
        return run()


def explained_by_rounding(gap: torch.Tensor, rounding: Callable) -> bool:
    """Whether log-probabilities that differ by `gap` are the same up to rounding.

    rounding: returns by how much `rounded_differently` changes them; called where it is needed. On 27 families of
    random weights and on tiny, in float32 and bfloat16, differences without a fault stayed below 0.9 of that.
    """
    return bool(gap.abs().max() <= CLOSE or gap.pow(2).mean() <= ROUNDINGS**2 * rounding().pow(2).mean())


def same_up_to_rounding(found: torch.Tensor, expected: torch.Tensor, model, run: Callable) -> bool:
    """Whether log-probabilities are what run() computes with a Hugging Face model, `expected`, up to rounding in its
    dtype."""
    return explained_by_rounding(found - expected, lambda: rounded_differently(model, run) - expected)


# ----------------------------------------------------------------------------------------------- latents
AT_ONCE = 2**25  # most activations of all features at a time; an SAE's pass holds them four times over, 0.5 GB


def chunks(sae: SAE, h: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """h (..., d_model) in parts (n, d_model) of AT_ONCE activations at most: a batch's may outgrow the model."""
    return h.flatten(0, -2).split(max(1, AT_ONCE // sae.cfg.d_sae))


class Latents:
    """Some of an SAE's features: encodes and decodes only these, so that an edit costs next to nothing.

    features: their ids, (n,); for range(d_sae), all of them, no weights are copied. The formulas are SAELens's own, by
    architecture and normalisation. Raises ValueError for features that the SAE lacks and for one named twice.
    """

    def __init__(self, sae: SAE, features: list[int] | range):
        features = features if isinstance(features, range) else as_list(features, "feature ids", operator.index)
        if len(set(features)) != len(features):
            raise ValueError("a feature is named twice")
        if len(features) and not 0 <= min(features) <= max(features) < sae.cfg.d_sae:
            raise ValueError(f"feature ids must lie in 0..{sae.cfg.d_sae - 1}")
        self.sae, self.features = sae, torch.as_tensor(features, dtype=torch.long)
        self.arch, self.every = sae.cfg.architecture(), features == range(sae.cfg.d_sae)
        self.copy_weights()
        # GPT-2's SAEs were trained with centred writing weights: each residual vector had mean zero
        kwargs = sae.cfg.metadata.model_from_pretrained_kwargs or {}
        self.centre = bool(kwargs.get("center_writing_weights"))

    def copy_weights(self) -> None:
        """Copy the features' weights from the SAE, on the device where it is."""
        W_enc, W_dec = self.sae.W_enc, self.sae.W_dec
        self.features = self.features.to(W_dec.device)
        self.index = slice(None) if self.every else self.features
        self.rows = W_dec[self.index]
        # whether a feature is among the top k depends on all others
        self.W_enc = W_enc if self.arch == "topk" else W_enc[:, self.index].contiguous()

    @property
    def W_dec(self) -> torch.Tensor:
        """(n, d_model), what a feature's activation of 1 adds."""
        rescaled = self.arch == "topk" and self.sae.cfg.rescale_acts_by_decoder_norm
        return self.rows / self.rows.norm(dim=-1, keepdim=True) if rescaled else self.rows

    def encode(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """h (..., d_model), any dtype -> activations (..., n) in fp32, and the scale (..., 1) of what they add."""
        if self.rows.device != h.device:  # a large model's layers are spread over devices
            self.sae.to(h.device)
            self.copy_weights()
        sae, at, x = self.sae, self.index, h.to(self.sae.dtype)
        scale = torch.ones_like(x[..., :1])
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
            acts = [sae.activation_fn((rows @ self.W_enc + sae.b_enc) * norms)[:, at] for rows in chunks(sae, x)]
            return torch.cat(acts).unflatten(0, x.shape[:-1]), scale
        pre = x @ self.W_enc
        if self.arch == "gated":
            acts = torch.relu(pre * sae.r_mag[at].exp() + sae.b_mag[at])
            return (pre + sae.b_gate[at] > 0) * acts, scale
        pre = pre + sae.b_enc[at]
        acts = torch.relu(pre)
        return (acts * (pre > sae.threshold[at]) if self.arch == "jumprelu" else acts), scale

    def moved(self, h: torch.Tensor, change: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """h (..., d_model) with `change` (..., n) added to the activations, in h's dtype."""
        return (h + change @ self.W_dec * scale).to(h.dtype)  # added in fp32, rounded once


def run_sae(sae: SAE, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """At how many places of h (..., d_model) each feature is active (d_sae,), and the SAE's reconstruction in fp32."""
    latents, fires, found = Latents(sae, range(sae.cfg.d_sae)), 0, []
    for rows in chunks(sae, h.float()):
        mean = rows.mean(-1, keepdim=True) if latents.centre else 0.0
        sae.process_sae_in(rows - mean)  # leaves the norms behind that decode uses
        acts, _ = latents.encode(rows)  # SAELens's encode would copy a gated SAE's W_enc for each chunk
        fires = fires + (acts > 0).sum(0)
        found.append(sae.decode(acts) + mean)
    return fires, torch.cat(found).unflatten(0, h.shape[:-1])


@torch.inference_mode()
def encodes_like_saelens(sae: SAE) -> bool:
    """Whether Latents computes the activations that SAELens's own encode does, on 16 random rows of all sizes."""
    noise = torch.Generator().manual_seed(0)
    picked = torch.randperm(sae.cfg.d_sae, generator=noise)[:16].tolist()
    h = torch.nn.functional.normalize(sae.W_enc.T[picked], dim=-1)  # so that the picked features are active
    h = (h + 0.1 * torch.randn(h.shape, generator=noise)) * torch.logspace(-1, 3, len(h))[:, None]
    latents = Latents(sae, picked)
    acts = sae.encode(h - h.mean(-1, keepdim=True) if latents.centre else h)[:, picked]
    gap = latents.encode(h)[0] - acts
    return bool((gap.norm(dim=-1) <= 1e-3 * acts.norm(dim=-1)).all())


# ------------------------------------------------------------------------------------------------- edits
@dataclass(frozen=True, eq=False)
class Edit:
    """One row of a table: a method, its settings (JSON, enough for `make` to make the edit again), and
    {layer: f(h, mask) -> h'}, empty for the model as it is."""

    method: str
    settings: dict = field(default_factory=dict)
    at: dict[int, Callable] = field(default_factory=dict)

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether it looks at a whole prompt before it edits the first token."""
        return any(getattr(f, "needs_whole_prompt", False) for f in self.at.values())


NONE = Edit("none")


@dataclass(frozen=True, eq=False)
class Method:
    """All there is to know of a method; exactly one of `edit` and `train` is given."""

    title: str  # in tables: "DSG"
    grid: tuple[dict, ...] = ()  # the settings that it is tuned by; clamps, rates and thresholds as multiples
    edit: Callable | None = None  # (sae, **settings) -> f(h, mask) -> h', which edits while the model runs
    resolve: Callable | None = None  # (stats, **grid setting) -> settings of `edit`; stats: a FeatureStats
    train: Callable | None = None  # (training, **grid setting) -> (Hugging Face model, log); see unlearning.py
    usual: dict = field(default_factory=dict)  # what a grid setting has where nothing else is said
    needs_sae: bool = True
    steps: dict = field(default_factory=dict)  # of training: {"tiny": ..., "": on any other model}
    lr: dict = field(default_factory=dict)  # likewise; a grid's lr multiplies it
    log: tuple[str, ...] = ()  # what the columns of a training log are


def make(method: str, saes, layers: list[int] | None = None, **settings) -> Edit:
    """The edit of METHODS[method] with these settings; edit.settings makes it again.

    saes: an SAE, None, or {layer whose output it reads: SAE}; layers: after which the edit goes (default: those of the
    SAEs); settings: those of the method's function, as features and clamp. Raises UserError for an unknown method, a
    setting that it does not take or lacks, a layer that no SAE reads, features of several layers, and ids that are no
    whole numbers; ValueError for features that the SAE lacks, one named twice, a clamp that is not finite.
    """
    if method == "none":
        return NONE
    if method == "together":
        return together(*(make(part["method"], saes, **part["settings"]) for part in settings["edits"]))
    if method not in METHODS:
        raise UserError(f"no method {method!r}; the methods are {', '.join(METHODS)}")
    saes = saes if isinstance(saes, dict) else {} if saes is None else {layer_of(saes): saes}
    layers, kind = list(saes) if layers is None else as_list(layers, "layers", operator.index), METHODS[method]
    of = [layer_of(sae) for sae in saes.values()]  # each is its own layer's, whatever it is given as
    if not layers or of != list(saes) or (kind.needs_sae and not set(layers) <= set(of)):
        raise UserError(f"{method} after layers {layers or '(none is said)'}: SAEs are given of layers {of}")
    if "features" in settings and len(layers) > 1:
        raise UserError(f"{method}: features are of one layer's SAE; put edits of several layers together")
    if "features" in settings:
        settings["features"] = as_list(settings["features"], "feature ids", operator.index)
    with in_a_line(method):
        inspect.signature(kind.edit).bind(None, **settings)
    return Edit(method, {**settings, "layers": layers}, {at: kind.edit(saes.get(at), **settings) for at in layers})


def together(*edits: Edit) -> Edit:
    """Several edits at different layers as one. Raises ValueError where two are at the same layer."""
    layers = [layer for edit in edits for layer in edit.at]
    if len(set(layers)) < len(layers):
        raise ValueError(f"several edits after one layer: {sorted(layers)}")
    parts = [{"method": edit.method, "settings": edit.settings} for edit in edits]
    return Edit("together", {"edits": parts}, {layer: f for edit in edits for layer, f in edit.at.items()})


def from_grid(method: str, setting: dict, stats) -> Edit:
    """The edit for one point of a grid: n_features becomes the best features, multiples become absolute. setting: may
    leave out what the method's `usual` has; stats: a FeatureStats."""
    about = METHODS[method]
    return make(method, stats.sae, **about.resolve(stats, **about.usual | setting))


def label(method: str, settings: dict) -> str:
    """The settings that are numbers, to tell edits of a method apart: "n_features 20, clamp -40, gate 0.036"."""
    if method == "together":
        return "; ".join(", ".join(filter(None, [part["method"], label(**part)])) for part in settings["edits"])
    numbers = {"n_features": len(settings["features"])} if "features" in settings else {}
    numbers |= {name: value for name, value in settings.items() if type(value) in (int, float)}
    if method == "zero-ablation":
        numbers.pop("clamp", None)
    shown = [f"{name} {f'{value:.4g}' if type(value) is float else value}" for name, value in numbers.items()]
    layers = settings.get("layers", ())
    return ", ".join(shown + ([f"layers {min(layers)} to {max(layers)}"] if len(layers) > 1 else []))


@contextmanager
def applied(model, tokenizer, edit: Edit):
    """Within this context the model runs with the edit: a TransformerBridge at its hook points, a Hugging Face model
    after its decoder layers. Raises RuntimeError if a layer to be edited never ran, UserError for an edit that needs a
    whole prompt and a pass that goes on from a cache."""
    bridge, ran = hasattr(model, "original_model"), set()

    def edited(layer, module, inputs, output):  # transformers 5 returns h, earlier versions (h, ...)
        ran.add(layer)
        h, *rest = output if isinstance(output, tuple) else (output,)
        if edit.needs_whole_prompt and not mask.whole:
            raise UserError(f"{edit.method} looks at a whole prompt before it edits, and this pass goes on from a "
                            "cache: run it without (use_past_kv_cache=False; use_cache=False)")  # fmt: skip
        h = edit.at[layer](h, mask.edited.to(h.device))
        return (h, *rest) if isinstance(output, tuple) else h

    with token_mask(model.original_model if bridge else model, tokenizer) as mask, ExitStack() as hooks:
        for layer in edit.at:
            place = model.hook_dict[f"blocks.{layer}.hook_resid_post"] if bridge else decoder_layers(model)[layer]
            hooks.enter_context(place.register_forward_hook(partial(edited, layer)))
        yield
    if missing := sorted(set(edit.at) - ran):
        raise RuntimeError(f"layers {missing} never ran: nothing was edited there")


# ----------------------------------------------------------------------------------------------- methods
class SetFeatures:
    """An edit that sets features (ids, (n,)): target(acts, mask) -> a', both (batch, pos, n), where the mask is on.

    needs_whole_prompt: it looks at a whole prompt before it edits the first token. always: it is run on any prompt.
    """

    def __init__(self, sae, features: list[int], target: Callable, needs_whole_prompt=False, always=False):
        self.latents, self.target = Latents(sae, features), target
        self.needs_whole_prompt, self.always = needs_whole_prompt, always

    def change(self, acts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """a' - a (batch, pos, n), 0 where nothing is edited."""
        return torch.where(mask[..., None], self.target(acts, mask) - acts, 0)

    def __call__(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        acts, scale = self.latents.encode(h)
        return self.latents.moved(h, self.change(acts, mask), scale)


def clamp(sae, features: list[int], clamp: float = 0.0, threshold: float = 0.0) -> SetFeatures:
    """a'_i = clamp where a_i > threshold: 0 ablates, a negative clamp overshoots (Farrell et al., arXiv 2410.19278;
    SAEBench, arXiv 2503.09532), a positive one steers where the feature is active. A positive threshold is the
    conditional clamp of Khoriaty et al., arXiv 2503.11127.

    features: ids, (n,); clamp and threshold in units of the SAE's activations. Raises ValueError for a clamp that is
    not finite. Differs from the releases: SAEBench edits all tokens but the first (token_mask's
    "all-but-bos"), and Khoriaty et al.'s threshold is one number, here in a grid a share of the mean activation.
    """
    if not math.isfinite(clamp):
        raise ValueError(f"clamp must be a finite number, not {clamp}")
    return SetFeatures(sae, features, lambda acts, mask: torch.where(acts > threshold, clamp, acts))


def resolve_clamp(stats, n_features: int, clamp: float = 0.0) -> dict:
    return {"features": stats.features(n_features), "clamp": clamp * stats.clamp if clamp else 0.0}


def resolve_measured(stats, n_features: int, clamp: float) -> dict:
    value = clamp * stats.clamp
    return {"features": stats.features(n_features, "measured", value), "clamp": value}


def resolve_random(stats, n_features: int, clamp: float) -> dict:
    """The first n_features of one draw, of as many as the grid has at most: rows differ by number alone."""
    most = max(n_features, *(setting["n_features"] for setting in CLAMPS))
    return {"features": stats.control(n_features, most), "clamp": clamp * stats.clamp}


def resolve_conditional(stats, n_features: int, clamp: float, threshold: float) -> dict:
    """threshold: a share of the features' mean activation on the forget tokens on which they are active."""
    settings, forget = resolve_clamp(stats, n_features, clamp), stats.rates[0]
    mean = (forget.total / forget.fires.clamp(min=1))[settings["features"]].mean().item()
    return {**settings, "threshold": threshold * mean}


def refusal_clamp(sae, features: list[int], threshold: float, refusal: int, refusal_value: float) -> SetFeatures:
    """Where any feature exceeds the threshold the latent `refusal`, one that is active when the model declines, is set
    to refusal_value; the features themselves stay as they are.

    features: ids, (n,); refusal: one id. This is the released code of Khoriaty et al., arXiv 2503.11127 (clamp_refusal
    in github.com/AMindToThink/sae_jailbreak_unlearning), with threshold 0.05 and refusal_value -500; a third party's
    port clamps the features too. Differs from the release: special tokens are left alone.
    """

    def target(acts, mask):
        called = (acts[..., :-1] > threshold).any(-1, keepdim=True)
        return torch.cat([acts[..., :-1], torch.where(called, refusal_value, acts[..., -1:])], -1)

    return SetFeatures(sae, [*features, refusal], target)


def resolve_refusal(stats, n_features: int, refusal: float) -> dict:
    """Khoriaty et al.: threshold 0.05, latent 15,864 of Gemma Scope's layer 7 at -500."""
    if stats.refusal_latent is None:
        raise UserError("refusal-clamp needs a refusal latent: one that is active when the model declines")
    return {"features": stats.features(n_features), "threshold": 0.05, "refusal": stats.refusal_latent,
            "refusal_value": refusal * stats.refusal_value}  # fmt: skip


def mean_ablation(sae, features: list[int], means: list[float]) -> SetFeatures:
    """a'_i = its mean over retain tokens, on every token: what it carries is gone, its average effect is not.

    features: ids, (n,); means: (n,), inactive tokens counted as 0. No release: the usual control of ablation studies.
    """
    values = torch.tensor(means)
    if values.shape != (len(features),):  # one mean would be all features'
        raise UserError(f"mean-ablation: {len(features)} features need as many means, not {str(means)[:40]}")
    return SetFeatures(sae, features, lambda acts, mask: values.to(acts).expand_as(acts))


def resolve_mean(stats, n_features: int) -> dict:
    features, retain = stats.features(n_features), stats.rates[1]
    return {"features": features, "means": (retain.total / retain.n_tokens)[features].tolist()}


def gate_of(acts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """rho (batch,): the share of a sequence's tokens of the mask on which any of the features is active."""
    firing = (acts > 0).any(-1) & mask
    return firing.sum(1) / mask.sum(1).clamp(min=1)


def dsg(sae, features: list[int], clamp: float, gate: float) -> SetFeatures:
    """Dynamic SAE Guardrails (Muhamed et al., arXiv 2504.08192): in a sequence whose rho exceeds the gate ALL features
    are set to `clamp` on every token on which any of them is active; other sequences are left alone.

    features: ids, (n,); gate: a share of tokens, 0 to 1. It looks at a whole sequence before it edits the first token,
    so it is for scoring, not for generating with a cache. Differs from the release (github.com/aashiqmuhamed/
    DynamicSAEGuardrails), which counts BOS among the tokens that rho is a share of, and clamps to -500. The
    selection of features is the release's, and so is the gate: the 95th percentile of rho over retain sequences.
    """

    def target(acts, mask):
        blocked = (gate_of(acts, mask) > gate)[:, None, None] & (acts > 0).any(-1, keepdim=True)
        return torch.where(blocked, clamp, acts)

    return SetFeatures(sae, features, target, needs_whole_prompt=True)


def resolve_dsg(stats, n_features: int, clamp: float) -> dict:
    return {"features": stats.features(n_features, "dsg"), "clamp": clamp * stats.clamp, "gate": stats.gate(n_features)}


def diff_in_means(sae, direction: list[float], strength: float = 1.0) -> Callable:
    """h' = h - strength * (u . h) u, u the unit vector along mean(forget tokens) - mean(retain tokens); strength 1
    projects it out (Arditi et al., arXiv 2406.11717). Needs no SAE.

    direction: (d_model,), of any length. Differs from the paper: Arditi et al. take harmful less harmless instructions,
    and project the difference out at every layer (here a choice of the grid, `behind`).
    """
    u = torch.tensor(direction, dtype=torch.float64)
    u = u / u.norm()

    def edit(h, mask):
        x = h.to(torch.promote_types(h.dtype, torch.float32))
        along = u.to(x.dtype).to(x.device)  # in this order: Apple's GPUs have no fp64
        change = (x @ along)[..., None] * along * -strength
        return (x + change * mask[..., None]).to(h.dtype)

    return edit


def resolve_direction(stats, strength: float, behind: bool) -> dict:
    """behind: at all layers from the edited one on, not at it alone."""
    last = stats.model.cfg.n_layers if behind else stats.edited_layer + 1
    return {"direction": stats.direction, "strength": strength, "layers": list(range(stats.edited_layer, last))}


def grid(**axes) -> tuple[dict, ...]:
    """Every combination of the axes' values."""
    return tuple(dict(zip(axes, values)) for values in itertools.product(*axes.values()))


MANY = grid(n_features=(5, 10, 20, 50, 100, 200, 300, 400))
CLAMPS = grid(n_features=(10, 20), clamp=(0.25, 0.5, 1, 2))  # SAEBench: clamps of -25 to -200
MEASURED = grid(n_features=(2, 5, 10, 20), clamp=(1, 2))
THRESHOLDS = grid(n_features=(10, 20), clamp=(1, 2), threshold=(0.25, 0.5))
REFUSALS = grid(n_features=(10, 20), refusal=(0.2, 0.5, 1, 2))
GATED = grid(n_features=(20, 50), clamp=(0.0625, 0.125, 0.25, 1))  # DSG's release: 20 to 200 features at -500
STRENGTHS = grid(strength=(0.5, 1, 1.5, 2), behind=(False, True))

METHODS = {
    "zero-ablation": Method("zero ablation", MANY, clamp, resolve_clamp),
    "mean-ablation": Method("mean ablation", MANY, mean_ablation, resolve_mean),
    "clamp": Method("clamp", CLAMPS, clamp, resolve_clamp, usual={"clamp": 1}),
    "random-features": Method("random features", CLAMPS, clamp, resolve_random, usual={"clamp": 1}),
    "measured-clamp": Method("clamp of measured features", MEASURED, clamp, resolve_measured, usual={"clamp": 1}),
    "conditional-clamp": Method("conditional clamp", THRESHOLDS, clamp, resolve_conditional,
                                usual={"clamp": 1, "threshold": 0.25}),
    "refusal-clamp": Method("refusal clamp", REFUSALS, refusal_clamp, resolve_refusal, usual={"refusal": 1}),
    "dsg": Method("DSG", GATED, dsg, resolve_dsg, usual={"clamp": 1}),
    "diff-in-means": Method("difference of means", STRENGTHS, diff_in_means, resolve_direction, needs_sae=False,
                            usual={"strength": 1, "behind": False}),
    # a'_i = a_i: runs all of an edit, and must change nothing
    "sae-patched": Method("SAE patched, nothing ablated", edit=lambda sae, features: SetFeatures(
        sae, features, lambda acts, mask: acts, always=True)),
    # h' = SAE(h), the error term thrown away: what the SAE alone costs
    "sae-reconstruction": Method("SAE reconstruction, no error term", edit=lambda sae: lambda h, mask: torch.where(
        mask[..., None], run_sae(sae, h)[1].to(h.dtype), h))}  # fmt: skip


def ablation(sae, features: list[int], clamp: float = 0.0, method: str | None = None) -> Edit:
    """Features set to the clamp wherever they are active; method: the row's, as "random-features" for controls
    (default: "zero-ablation" or "clamp"). Raises ValueError as make does."""
    return make(method or ("zero-ablation" if clamp == 0 else "clamp"), sae, features=features, clamp=clamp)


def patched(sae, features: list[int]) -> Edit:
    """The features set to their own activations: with the error term kept, nothing changes."""
    return make("sae-patched", sae, features=features)


def reconstruction(sae) -> Edit:
    """The residual stream replaced by what the SAE makes of it, so without the error term."""
    return make("sae-reconstruction", sae)
