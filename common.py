"""What the lessons share and must not disagree on: load a model and an SAE, pick features, ablate them.

A feature's activation is set to 0 (zero ablation) or to a negative clamp (Farrell, Lau and Conmy, arXiv 2410.19278)
where it is active; the formula is in edits.py."""

import atexit
import gc
import os

# The imports below allocate a million objects. Turning the garbage collector off meanwhile, and not collecting them at
# exit, saves 40% of start-up (26 -> 16 s on two busy cores).
gc.disable()
atexit.register(gc.freeze)

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from sae_lens import SAE
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils.logging import _get_default_logging_level, set_verbosity

import edits
import hub
from data import HERE, Dataset, UserError, first_line, in_a_line, n_processes, process_state, total_of_processes
from edits import NONE, Latents, ablation, layer_of, patched, reconstruction  # noqa: F401 (lessons have them from here)

gc.freeze()
gc.unfreeze()  # the two together make all objects old, and the next collection leaves old ones out
gc.enable()
set_verbosity(_get_default_logging_level())  # TransformerLens silences transformers for the whole process


def load_model(name: str, device=None, dtype=None, device_map=None, edit_special="never") -> TransformerBridge:
    """Load a preset's name, a hub id or a local folder as a frozen TransformerBridge (raw HF weights, eager attention).
    device: "cpu", "cuda:1", ... (default: the first GPU, if any); dtype: "float32" or "bfloat16" (default: the
    preset's); device_map: "auto" spreads layers over all GPUs; edit_special: see edits.token_mask. Raises UserError
    as load_hf and as_bridge do."""
    return as_bridge(*load_hf(name, device, dtype, device_map, edit_special), name)


def load_hf(name: str, device=None, dtype=None, device_map=None, edit_special="never") -> tuple:
    """The Hugging Face model, frozen, and the tokenizer behind load_model(name): eager attention, no dropout. Raises
    UserError if there is no such model, it cannot be had or read, its weights are packed, not finite or not those of
    its config.json (hub.load_weights), the disk has no room for it or the GPUs have none."""
    if device_map and (device or n_processes() > 1):
        raise UserError("device_map spreads one model over the GPUs: give no device, and start one process")
    path, dtype = hub.resolve_model(name), dtype or hub.preset(name).dtype
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager", "device_map": device_map}
    own = process_state().device  # what accelerate gives each of several processes
    device = usable_device(device) if n_processes() == 1 else "cpu" if own.type == "cpu" else str(own)
    try:
        tokenizer = hub.load_tokenizer(path, edit_special)
        model = hub.load_weights(AutoModelForCausalLM, path, **options)
    except UserError:
        raise
    except Exception as error:  # transformers raises what it meets in the files
        said, more = f"cannot load {path}", hub.gated_hint(path)
        if "device_map" in str(error):
            said, more = f"device_map {device_map}", ""
        elif isinstance(error, ImportError):
            more = ". Its weights are packed or quantised: give the model that it was made from"
        elif not more:
            said = f"{path} is not a model folder that transformers can read"
        raise UserError(f"{said}: {first_line(error)}{more}") from error
    hub.refuse_not_finite(path, model.named_parameters())
    model.generation_config = bare_generation(model)
    if not device_map:
        model.to(device)
    return model.eval().requires_grad_(False), tokenizer


def bare_generation(model) -> GenerationConfig:
    """Of a model's generation config, else its config, where an answer ends, and no more: penalties, banned or forced
    tokens, beams and a least length act on greedy answers, too."""
    own, usual = model.generation_config, GenerationConfig.from_model_config(model.config)
    ends = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = {name: getattr(usual, name) if i is None else i for name, i in ends.items()}
    for name, given in ends.items():
        if not all(isinstance(i, int | float | None) for i in (given if isinstance(given, list) else [given])):
            raise UserError(f"{model.name_or_path}: {name} of its generation config is no token's number: {given!r}")
    return GenerationConfig(**ends)


def as_bridge(hf, tokenizer, name: str) -> TransformerBridge:
    """A Hugging Face model in memory, of the preset, hub id or folder `name`, as a TransformerBridge: the same object,
    frozen, with TransformerLens's modules put between its own. Raises UserError if TransformerLens cannot run it, or
    its probabilities differ from the model's own."""
    log_probs = partial(edits.log_probs, hf, edits.random_ids(hf))
    before, path = log_probs(), hub.preset(name).model
    # where an image processor fails to load, TransformerLens would pip install torchvision and a new torch
    no_pip = patch("subprocess.check_call", side_effect=OSError("nothing is installed from here"))
    with in_a_line(f"TransformerLens cannot run {name}"), no_pip:
        model = TransformerBridge.boot_transformers(path, hf_model=hf, dtype=hf.dtype, device=str(hf.device))
    model.loaded_as = name, str(hf.dtype)
    model._tokenizer = tokenizer  # the bridge's own adds a BOS where the model's, which lm-eval uses, does not
    ends = tokenizer("a")["input_ids"]
    model.cfg.tokenizer_prepends_bos = model.cfg.default_prepend_bos = ends[:1] == [tokenizer.bos_token_id]
    model.cfg.tokenizer_appends_eos = ends[-1:] == [tokenizer.eos_token_id]
    model.eval().requires_grad_(False)
    if not edits.same_up_to_rounding(before, log_probs(), hf, log_probs):
        raise UserError(f"{name}: TransformerLens's {type(hf).__name__} gives other probabilities than Hugging Face's "
                        "own, so nothing measured on it would be of this model")  # fmt: skip
    return model


def load_retrained(name: str, forget_set: Dataset, device=None, dtype=None) -> TransformerBridge | None:
    """The preset's model trained from scratch without the forget set; None if it has none, or for other questions."""
    retrained = hub.preset(name).retrained if forget_set.stand_in else None
    return load_model(retrained, device, dtype) if retrained else None


def usable_device(device: str | None = None) -> str:
    """The device, by default the first GPU, if any. Raises UserError where this machine has none of that name."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()  # fails on "meta" as well
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {device!r} here ({first_line(error)[:100]} ...)") from error
    return device


def load_sae(spec: str | None, layer: int, model: TransformerBridge, preset: str = "tiny") -> SAE:
    """Load the SAE of `spec` (RELEASE:ID or a folder; None: the preset's for `layer`) in fp32 on the layer's device.
    Sets `sae.layer`, `sae.source` (str), `sae.identity` (see hub.identity), `sae.loaded_for` (model, dtype) and
    `sae.hook_point` (a resid_post name that the model has). Raises UserError for a layer without SAE, an unknown
    release, and an SAE whose architecture, width, hook point or normalisation cannot be ablated exactly."""
    if not 0 <= layer < model.cfg.n_layers:
        raise UserError(f"layer {layer}: the model has layers 0 to {model.cfg.n_layers - 1}")
    spec = hub.sae_source(spec, layer, preset)
    folder = Path(spec)
    with in_a_line(f"cannot load the SAE {spec}"):
        if folder.is_dir():
            hub.refuse_damaged(spec)
            if (folder / "sae.safetensors").is_file() and not (folder / "sae_weights.safetensors").exists():
                raise UserError(f"{spec} is in sparsify's format: only SAELens's own can be read from a folder "
                                "(cfg.json with `architecture`, sae_weights.safetensors)")  # fmt: skip
            sae = SAE.load_from_disk(spec, dtype="float32")
        elif ":" in spec and not folder.is_absolute():
            with patch("sae_lens.loading.pretrained_sae_loaders.get_safetensors_tensor_shapes", hub.tensor_shapes):
                sae = SAE.from_pretrained(*spec.split(":", 1), dtype="float32")
        else:
            others = sorted(p.name for p in folder.parent.glob("*") if p.is_dir())
            raise UserError(f"no SAE folder {spec}; there are: {', '.join(others) or 'none'}")
        sae.cfg.metadata.l0 = float(str(sae.cfg.metadata.l0 or 0))  # which may be a number's text
    sae.eval().requires_grad_(False).layer = layer
    sae.source = os.path.relpath(spec, HERE) if folder.is_dir() and HERE in folder.parents else spec
    sae.identity, sae.loaded_for = hub.identity(spec), getattr(model, "loaded_as", None)
    sae.hook_point = hub.check_sae(sae, model, layer, sae.source)
    if not edits.encodes_like_saelens(sae):
        raise UserError(f"{spec}: SAELens encodes by another formula than edits.Latents: no ablation would be exact")
    device = next(model.blocks[layer_of(sae)].parameters()).device
    return sae if device.type == "meta" else sae.to(device)  # offloaded weights have no device: edits follow h


PICKING_RULES = ("ratio", "any-ratio", "retain-threshold", "dsg", "attribution", "output-score", "measured")


@dataclass
class Rates:
    """How often and how strongly each of d_sae features is active on some tokens."""

    fires: torch.Tensor  # (d_sae,) int64, tokens on which it is active
    total: torch.Tensor  # (d_sae,) float64, summed activation
    n_tokens: int

    @property
    def rate(self) -> torch.Tensor:  # (d_sae,) share of tokens
        return self.fires.double() / self.n_tokens


def summed(x: torch.Tensor) -> torch.Tensor:
    """x (n, ...) summed over n in fp32, as fp64 on the CPU: Apple's GPUs have none, and a CPU sums it slowly."""
    return x.sum(0, dtype=torch.float32).cpu().double()


@torch.inference_mode()
def firing_rates(model, sae, windows, batch_size: int = 16, desc: str | None = None) -> Rates:
    """The Rates on the counted tokens (see edits.token_mask) of `windows`, lists of ids."""
    fires, n = torch.zeros(sae.cfg.d_sae, dtype=torch.int64), torch.tensor(0)
    total = torch.zeros_like(fires, dtype=torch.float64)
    everything = Latents(sae, range(sae.cfg.d_sae))
    for h, _ in edits.iter_residual_stream(model, layer_of(sae), windows, batch_size, desc):
        for rows in edits.chunks(sae, h):
            acts, _ = everything.encode(rows)
            fires += summed((acts > 0).float()).long()
            total += summed(acts)
        n += len(h)
    fires, total, n = map(total_of_processes, (fires, total, n))
    return Rates(fires, total, int(n))


def largest(rates: list[Rates]) -> Rates:
    """The larger of several retain sets' rates, as counts on the largest set: a picked feature must be rare in all."""
    n = max(part.n_tokens for part in rates)
    fires = [(part.fires * (n / part.n_tokens)).ceil().long() for part in rates]
    totals = [part.total * (n / part.n_tokens) for part in rates]
    return Rates(torch.stack(fires).amax(0), torch.stack(totals).amax(0), n)


def activation_ratio(forget: Rates, retain: Rates) -> torch.Tensor:
    """(d_sae,) ratio of smoothed firing rates: a feature seen twice on one side and never on the other cannot win."""
    return ((forget.fires + 1) / (forget.n_tokens + 1)) / ((retain.fires + 1) / (retain.n_tokens + 1))


def pick_features(forget: Rates, retain: Rates, n: int, rule: str = "ratio", tau=0.01, score=None) -> list[int]:
    """The n features to ablate, best first, ties by index; features that never fire on the forget set are left out.

    ratio: highest `activation_ratio`, at least 1; any-ratio: or less. retain-threshold: retain rate below tau, then
    highest forget rate (SAEBench, arXiv 2503.09532; Farrell et al., arXiv 2410.19278). dsg: squared mean activation,
    its forget/retain ratio in the top 5 per cent and itself above the lowest 5, then highest on the forget set (Muhamed
    et al., arXiv 2504.08192). attribution, output-score: by `score`, (d_sae,), of evaluation.py: the highest of those
    above 0; and highest `activation_ratio` among the quarter of highest score (Arad et al., arXiv 2505.20063, drop
    features of low score). "measured" is evaluation.FeatureStats.measured. Raises UserError if fewer than n are left.
    """
    allowed = forget.fires > 0
    if rule in ("ratio", "any-ratio"):
        score = activation_ratio(forget, retain)
        allowed &= (score >= 1) | (rule == "any-ratio")
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
        raise UserError("the rule 'measured' asks questions: evaluation.FeatureStats has it" if rule == "measured" else
                        f"no rule {rule!r}: the rules are {', '.join(PICKING_RULES)}")  # fmt: skip
    if n > int(allowed.sum()):
        raise UserError(f"no {n} features: of {len(allowed)} the rule {rule!r} leaves only {int(allowed.sum())}")
    return torch.argsort(torch.where(allowed, score.double(), -torch.inf), descending=True, stable=True)[:n].tolist()


def matched_random(forget: Rates, retain: Rates, features: list[int], seed: int, nearest: int = 10) -> list[int]:
    """For each of `features` another, drawn from the `nearest` unused ones in retain rate and those that tie with the
    last: many never fire there. One that fires on neither set is no control. Raises UserError if too few are left."""
    rng, rate, control = random.Random(seed), retain.rate, []
    unused = (forget.fires + retain.fires) > 0
    unused[features] = False
    if len(features) > int(unused.sum()):
        raise UserError(f"too few other features for a control of {len(features)}")
    for feature in features:
        distance = torch.where(unused, (rate - rate[feature]).abs(), torch.inf)
        reach = distance.kthvalue(min(nearest, int(unused.sum()))).values
        control.append(rng.choice(torch.nonzero(unused & (distance <= reach))[:, 0].tolist()))
        unused[control[-1]] = False
    return control


def random_features(sae: SAE, rates: tuple[Rates, Rates], features: list[int], clamp: float, draws: int, seed: int = 0):
    """{row: Edit}: `draws` times as many random features, clamped; rates: forget, retain. Errors: as matched_random."""
    controls = [matched_random(*rates, features, seed + draw) for draw in range(draws)]
    return {f"random features{f' {k}' * (k > 1)}, clamp {clamp:g}": ablation(sae, control, clamp, "random-features")
            for k, control in enumerate(controls, 1)}  # fmt: skip


def ablate(model: TransformerBridge, sae: SAE, features: list[int], clamp: float = 0.0):
    """A context within which the model runs with `features` ablated: clamp 0 zeroes them, a negative clamp overshoots.
    Only tokens on which a feature is active are edited, special tokens never. With no features the output is the
    model's own to the last bit. Raises ValueError as edits.make does, and RuntimeError if the layer never ran."""
    return edits.applied(model, model.tokenizer, ablation(sae, features, clamp))
