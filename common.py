"""
What the lessons share and must not disagree on, three verbs: load a model and an SAE, pick features, ablate them.

Notation: h is the residual stream at the hook point, (batch, pos, d_model); a = SAE.encode(h), (batch, pos, d_sae); F
the picked features. An ablation keeps the SAE's error term:

    h' = h + sum over i in F of (a'_i - a_i) * W_dec[i],    a'_i = clamp where a_i > 0

with clamp 0 for zero ablation and a negative clamp as in Farrell, Lau and Conmy (arXiv 2410.19278).
"""

import atexit
import gc
import os
import random
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # image processors complain at import otherwise

# These make a million objects, none of them garbage. Python would look for some all the same, time and again, and once
# more at the end: nearly half of what a start took
gc.disable()
atexit.register(gc.freeze)

import torch
from sae_lens import SAE
from safetensors import SafetensorError
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.multi_gpu import maybe_cast_floating_params
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import hub
import processes
from data import HERE, UserError, first_line
from edits import Latents, alike, applied, edit_of, few_rows, layer_of, log_probs, random_ids, residuals

gc.freeze()
gc.unfreeze()  # so all counts as old, and is not looked through at once
gc.enable()
disable_progress_bar()  # "Loading weights" would come before the first line of ours

# ---------------------------------------------------------------------------------------------- load


def load_model(
    name: str,
    device: str | None = None,
    dtype: str = "float32",
    device_map: str | None = None,
    edit_special: str = "never",
) -> TransformerBridge:
    """Load a preset's name, a hub id or a local folder as a frozen TransformerBridge (raw HF weights, eager attention).

    device_map: "auto" spreads the layers over all GPUs (Hugging Face's accelerate). edit_special: as edits.watch_tokens
    has it. Raises UserError if there is no such model, the hub does not let us have it, the disk has no room for it or
    the GPUs have none, and if TransformerLens makes another model of it.
    """
    if device_map and (device or processes.count() > 1):
        raise UserError("--device-map spreads one model over the GPUs: leave out --device and accelerate launch")
    path = hub.ready(name)
    place = {"device_map": device_map} if device_map else {"device": processes.device() or device or best_device()}
    try:
        tokenizer = hub.load_tokenizer(path)
        model, ids, plain = boot(path, dtype, place)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if "device_map" in str(error):
            raise UserError(f"--device-map {device_map}: {first_line(error)}") from error
        if isinstance(error, ImportError):
            raise UserError(f"cannot load {path} here: {first_line(error)}. Its weights are packed or quantised: give "
                            "the model that it was made from") from error  # fmt: skip
        if Path(path).is_dir():
            raise UserError(f"{path} is not a model folder that transformers can read: {first_line(error)}") from error
        raise UserError(f"cannot load {path}: {first_line(error)}{hub.gated(path)}") from error
    tokenizer.edit_special = edit_special
    # the bridge's copy of the tokenizer adds a BOS where the model's own does not; prompts must be lm-eval's
    model._tokenizer = tokenizer
    model.eval().requires_grad_(False)
    again = partial(log_probs, model.original_model, ids)
    if not alike(plain, again(), model.original_model, again):
        raise UserError(f"{path}: TransformerLens's {type(model.original_model).__name__} gives other probabilities "
                        "than Hugging Face's own, so nothing measured on it would be of this model")  # fmt: skip
    return model


def load_never_knew(name: str, device: str | None = None, dtype: str = "float32") -> TransformerBridge | None:
    """The model that hub.never_knew names, as load_model has it, loaded once; None where there is none."""
    twin = hub.never_knew(name)
    return load_once(twin, device, dtype) if twin else None


@cache
def load_once(name: str, device: str | None, dtype: str) -> TransformerBridge:
    return load_model(name, device, dtype)


def boot(path: str, dtype: str, place: dict) -> tuple:
    """The TransformerBridge, token ids, and the log-probabilities that the model gave them before it became one."""
    plain = {}

    def keep_plain(hf, dtype):  # the last that TransformerLens does before it puts its own modules in
        maybe_cast_floating_params(hf, dtype)
        hub.refuse_not_finite(path, hf.named_parameters())
        plain["ids"] = random_ids(hf)
        plain["log_probs"] = log_probs(hf, plain["ids"])

    # where a processor of images fails to load, TransformerLens would pip install torchvision and a new torch
    with (
        patch("subprocess.check_call", side_effect=OSError("no installing from here")),
        patch("transformer_lens.utilities.multi_gpu.maybe_cast_floating_params", keep_plain),
    ):
        model = TransformerBridge.boot_transformers(path, dtype=getattr(torch, dtype), **place)
    return model, plain["ids"], plain["log_probs"]


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_hf(name: str, device: str | None = None, dtype: str = "float32") -> tuple:
    """The Hugging Face model and tokenizer behind load_model(name), to be trained: eager attention, no dropout."""
    path = hub.model_source(name)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), attn_implementation="eager")
    hub.refuse_not_finite(path, model.named_parameters())
    model.to(device or best_device())
    return model.eval().requires_grad_(False), hub.load_tokenizer(path)


def load_sae(spec: str | None, layer: int, model: TransformerBridge, preset: str = "tiny") -> SAE:
    """Load the SAE of `spec` (RELEASE:ID or a folder; None: the preset's for `layer`) in fp32 on the layer's device.

    Sets `sae.source` (str), `sae.identity` (hub.identity's) and `sae.hook_point` (a resid_post name that the model
    has). Raises UserError for a layer without SAE, an unknown release, and an SAE whose architecture, width, hook
    point or normalisation this code cannot ablate exactly.
    """
    if not 0 <= layer < model.cfg.n_layers:
        raise UserError(f"--layer {layer}: the model has layers 0 to {model.cfg.n_layers - 1}")
    spec = hub.sae_source(spec, layer, preset)
    try:
        if Path(spec).is_dir():
            hub.refuse_damaged(spec)
            if (Path(spec) / "sae.safetensors").is_file() and not (Path(spec) / "sae_weights.safetensors").exists():
                raise UserError(f"{spec} is in sparsify's format: only SAELens's own can be read from a folder "
                                "(cfg.json with `architecture`, sae_weights.safetensors)")  # fmt: skip
            sae = SAE.load_from_disk(spec, dtype="float32")
        elif ":" in spec and not Path(spec).is_absolute():
            hub.announce_sae(*spec.split(":", 1))
            with patch("sae_lens.loading.pretrained_sae_loaders.get_safetensors_tensor_shapes", hub.tensor_shapes):
                sae = SAE.from_pretrained(*spec.split(":", 1), dtype="float32")
        else:
            there = sorted(p.name for p in Path(spec).parent.glob("*") if p.is_dir())
            raise UserError(f"no SAE folder {spec}; there are: {', '.join(there) or 'none'}")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the SAE {spec}: {first_line(error)}{hub.sae_ids_near(spec)}") from error
    sae.source = os.path.relpath(spec, HERE) if Path(spec).is_dir() and HERE in Path(spec).parents else spec
    sae.identity = hub.identity(spec)
    hub.check_sae(sae, model, layer)
    place = next(model.blocks[layer_of(sae)].parameters()).device
    sae.eval().requires_grad_(False)
    return sae if place.type == "meta" else sae.to(place)  # offloaded weights are nowhere: edits follow the residual


# ---------------------------------------------------------------------------------------------- pick


PICKING_RULES = ("ratio", "retain-threshold", "dsg", "attribution", "output-score")


@dataclass
class Rates:
    """How often and how strongly each of d_sae features is active on a set of non-special tokens."""

    fires: torch.Tensor  # (d_sae,) int64, tokens on which a_i > 0
    total: torch.Tensor  # (d_sae,) float64, summed activation
    n_tokens: int

    @property
    def rate(self) -> torch.Tensor:  # (d_sae,) share of tokens
        return self.fires.double() / self.n_tokens


def summed(x: torch.Tensor) -> torch.Tensor:
    """x (n, ...) summed over n in fp32, as fp64 on the CPU: Apple's GPUs have no fp64, and a CPU takes ten times as
    long to sum a batch in it."""
    return x.sum(0, dtype=torch.float32).cpu().double()


@torch.inference_mode()
def firing_rates(model, sae, windows, batch_size: int = 16, desc: str | None = None) -> Rates:
    """Count over `windows` (lists of ids) where each feature is active, special tokens left out by id."""
    fires, n = torch.zeros(sae.cfg.d_sae, dtype=torch.int64), torch.tensor(0)
    total = torch.zeros_like(fires, dtype=torch.float64)
    everything = Latents(sae, range(sae.cfg.d_sae))
    for h, _ in residuals(model, layer_of(sae), windows, batch_size, desc):
        for rows in few_rows(sae, h):
            acts, _ = everything.encode(rows)
            fires += summed((acts > 0).float()).long()
            total += summed(acts)
        n += len(h)
    fires, total, n = map(processes.total, (fires, total, n))
    return Rates(fires, total, int(n))


def largest(rates: list[Rates]) -> Rates:
    """Of several retain sets the larger rate of each feature, so that one must be rare in all of them to be picked."""
    first, *others = rates
    for other in others:
        grow = first.n_tokens / other.n_tokens
        fires = torch.maximum(first.fires, (other.fires * grow).ceil().long())
        first = Rates(fires, torch.maximum(first.total, other.total * grow), first.n_tokens)
    return first


def activation_ratio(forget: Rates, retain: Rates) -> torch.Tensor:
    """(d_sae,) ratio of smoothed firing rates: a feature seen twice on one side and never on the other cannot win."""
    return ((forget.fires + 1) / (forget.n_tokens + 1)) / ((retain.fires + 1) / (retain.n_tokens + 1))


def pick_features(
    forget: Rates, retain: Rates, n: int, rule: str = "ratio", tau: float = 0.01, score: torch.Tensor | None = None
) -> list[int]:
    """The n features to ablate, best first, ties by index; features that never fire on the forget set are left out.

    ratio: highest `activation_ratio`. retain-threshold: retain rate below tau, then highest forget rate (SAEBench,
    arXiv 2503.09532; Farrell et al., arXiv 2410.19278). dsg: squared mean activation, its forget/retain ratio in the
    top 5 per cent and itself above the lowest 5, then highest on the forget set (Muhamed et al., arXiv 2504.08192).
    attribution, output-score: by `score`, (d_sae,), from methods.SCORES: the highest of those above 0; and highest
    `activation_ratio` among the quarter of highest score (Arad et al., arXiv 2505.20063, drop features of low score).
    Raises UserError if the rule leaves fewer than n.
    """
    allowed = forget.fires > 0
    if rule == "ratio":
        score = activation_ratio(forget, retain)
    elif rule == "retain-threshold":
        allowed &= retain.rate < tau
        score = forget.rate
    elif rule == "dsg":
        score, other = (forget.total / forget.n_tokens) ** 2, (retain.total / retain.n_tokens) ** 2
        ratio = score / (other + 1e-21)
        allowed &= (score >= score.quantile(0.05)) & (ratio >= ratio.quantile(0.95))
    elif rule == "attribution":
        allowed &= score > 0
    elif rule == "output-score":
        allowed &= score >= score.quantile(0.75)
        score = activation_ratio(forget, retain)
    else:
        raise UserError(f"--pick {rule}: the rules are {', '.join(PICKING_RULES)}")
    if n > len(allowed):
        raise UserError(f"--n-features {n}: the SAE has {len(allowed)} features")
    if n > int(allowed.sum()):
        raise UserError(f"--n-features {n}: the rule {rule!r} leaves only {int(allowed.sum())} features; ask for fewer")
    order = torch.argsort(torch.where(allowed, score.double(), -torch.inf), descending=True, stable=True)
    return order[:n].tolist()


def matched_random(forget: Rates, retain: Rates, features: list[int], seed: int, nearest: int = 10) -> list[int]:
    """As many other features, each drawn from the `nearest` unused ones in retain rate to one of `features`, and from
    all that are as near as the last of these: many features never fire on a retain set.

    A feature that fires on neither set is no control: ablating it does nothing. Raises UserError if too few are left.
    """
    rng, rate, control = random.Random(seed), retain.rate, []
    unused = (forget.fires + retain.fires) > 0
    unused[features] = False
    if len(features) > int(unused.sum()):
        raise UserError(f"--n-features {len(features)}: too few other features for a control of as many")
    for feature in features:
        distance = torch.where(unused, (rate - rate[feature]).abs(), torch.inf)
        reach = distance.kthvalue(min(nearest, int(unused.sum()))).values
        control.append(rng.choice(torch.nonzero(unused & (distance <= reach))[:, 0].tolist()))
        unused[control[-1]] = False
    return control


# -------------------------------------------------------------------------------------------- ablate


def ablate(model: TransformerBridge, sae: SAE, features: list[int], clamp: float = 0.0):
    """A context within which the model runs with `features` ablated: clamp 0 zeroes them, a negative clamp overshoots.

    Only tokens on which a feature is active are edited, special tokens never. With no features the output is the
    model's own to the last bit. Raises ValueError as edits.edit_of does, and RuntimeError if the layer never ran.
    """
    return applied(model, model.tokenizer, edit_of("sae-ablation", sae, features=features, clamp=clamp))
