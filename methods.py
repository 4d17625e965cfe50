"""
What the edits of methods that work at inference time are made of: features, means, gates, directions.

In a setting of a method's grid (flags.GRIDS) clamps are multiples of --clamp, thresholds of the mean activation.
`edit_for` makes it an edit from what a forget and a retain set say about a model's layer and its SAE (`Measured`).
"""

from dataclasses import dataclass, field
from functools import cached_property, wraps

import torch

import processes
from common import Rates, firing_rates, largest, load_model, load_sae, matched_random, pick_features, summed
from data import UserError, batches, encode, encode_prompts, halves, load_rows, padded, picking_windows, prompt
from edits import Edit, Latents, applied, edit_of, few_rows, gate_of, hidden, layer_of, residuals, watch_tokens
from engine import check_engine
from flags import GRIDS
from hub import sanity_gate


@dataclass(eq=False)
class Measured:
    """What forget windows and sets of retain windows (lists of ids) say about a model's layer and its SAE.

    sae: None for methods that need none; layer: --layer; clamp: what a grid's clamps multiply; s: the settings.
    """

    lm: object
    sae: object
    layer: int
    forget: list
    retain: list[list]
    clamp: float
    s: object
    sanity: dict = field(default_factory=dict)  # what the SAE check finds, before anything is picked

    @property
    def place(self) -> int:
        """The layer whose output is edited."""
        return self.layer if self.sae is None else layer_of(self.sae)

    @property
    def size(self) -> int:
        return self.s.batch_size if isinstance(self.s.batch_size, int) else 16  # lm-eval's may be "auto"

    @cached_property
    def rates(self) -> tuple[Rates, Rates]:
        self.sanity |= sanity_gate(self.lm, self.sae, self.retain[0], insist=not self.s.no_sanity)
        forget = firing_rates(self.lm, self.sae, self.forget, self.size, "forget rates")
        retain = [firing_rates(self.lm, self.sae, part, self.size, "retain rates") for part in self.retain]
        return forget, largest(retain)

    def features(self, n: int, rule: str | None = None) -> list[int]:
        rule = rule or self.s.pick
        return pick_features(*self.rates, n, rule, score=SCORES[rule](self) if rule in SCORES else None)

    def control(self, n: int, most: int) -> list[int]:
        """The first n of random features matched to the `most` best ones."""
        return matched_random(*self.rates, self.features(most), self.s.seed)[:n]

    @cached_property
    def direction(self) -> list[float]:
        """Mean residual stream of forget tokens less that of retain tokens, each retain set counting alike."""

        def mean(windows):
            total, n = 0.0, 0
            for h, _ in residuals(self.lm, self.place, windows, self.size, "means"):
                total, n = total + summed(h), n + len(h)
            return total / n

        return (mean(self.forget) - torch.stack([mean(part) for part in self.retain]).mean(0)).tolist()


def kept(function):
    """function(m, ...) of a Measured, computed once for it and gone with it: functools.cache would keep the models and
    SAEs that it holds for as long as Python runs."""

    @wraps(function)
    def looked_up(m: Measured, *rest, **named):
        known, key = vars(m).setdefault("known", {}), (function, rest, *named.items())
        if key not in known:
            known[key] = function(m, *rest, **named)
        return known[key]

    return looked_up


@kept
def attributions(m: Measured) -> torch.Tensor:
    """(d_sae,) what each feature's activation adds to the right answer, to first order: activation times the gradient
    of the right letter's log-probability, summed over a question's tokens that edits may touch; the mean over the
    picking half.

    Not so: in their notebooks Farrell et al. (arXiv 2410.19278) take the logit, and then leave out what moves MMLU.
    Questions are asked as --prompt says, also where a forget corpus is picked on.
    """
    rows, _ = load_rows("wmdp_bio", m.s.model, m.s.data)
    rows, style = [rows[i] for i in halves(rows, m.s.seed, m.s.pick_on)[0]], getattr(m.s, "prompt", "plain")
    windows, letters = encode_prompts(m.lm.tokenizer, [prompt(row, style=style) for row in rows], style)
    model, everything, kept = m.lm.original_model, Latents(m.sae, range(m.sae.cfg.d_sae)), {}
    total = torch.zeros(m.sae.cfg.d_sae, dtype=torch.float64)

    def leaf(h, editable):
        kept["h"], kept["editable"] = h.detach().requires_grad_(True), editable
        return kept["h"]

    with applied(model, m.lm.tokenizer, Edit("attribution", {m.place: leaf})):
        for numbers, ids in batches(windows, m.size, m.lm.tokenizer, m.lm.cfg.device, "attribution"):
            with torch.enable_grad():
                logits = model(ids, use_cache=False).logits.float()
                said = logits[range(len(ids)), [len(windows[i]) - 1 for i in numbers]].log_softmax(-1)
                right = torch.tensor(letters).reshape(4, -1)[[rows[i]["answer"] for i in numbers]]  # one id, or two
                gain = said.gather(1, right.to(said.device)).max(1).values.sum()
                (slope,) = torch.autograd.grad(gain, kept["h"])
            with torch.no_grad():
                for h, down in zip(*(few_rows(m.sae, x[kept["editable"]]) for x in (kept["h"], slope))):
                    acts, scale = everything.encode(h)
                    total += summed(acts * ((down.to(acts.dtype) * scale) @ everything.W_dec.T))
    return processes.total(total) / len(rows)


@kept
@torch.inference_mode()
def output_scores(m: Measured, text: str = "From my experience,", top: int = 20, factor: float = 10.0) -> torch.Tensor:
    """(d_sae,) the output scores of Arad et al., arXiv 2505.20063, by their code (github.com/technion-cs-nlp/
    saes-are-good-for-steering): does a feature make the model say what its decoder vector says?

    (1 - rank / d_vocab) * probability, of the likeliest of the `top` tokens that the final norm and the unembedding
    make of W_dec[i], behind a neutral text, when at its last token `factor` times the largest activation there is added
    to the feature's. Raises UserError where the final norm cannot be told.
    """
    model, everything = m.lm.original_model, Latents(m.sae, range(m.sae.cfg.d_sae))
    norms = [one for one in model.get_decoder().children()
             if (sizes := {p.ndim for p in one.parameters()}) and sizes == {1}]  # fmt: skip
    if len(norms) != 1:
        raise UserError(f"--pick output-score: cannot tell which module of {type(model).__name__} is its final norm")
    ids = padded([encode(m.lm.tokenizer, text)], m.lm.tokenizer, m.lm.cfg.device)
    acts, scale = everything.encode(hidden(model, ids, m.place)[:, -1])
    found = []
    for vectors in everything.W_dec.split(256):
        some = factor * acts.max() * vectors * scale

        def amplified(h, editable, some=some):
            return torch.cat([h[:, :-1], (h[:, -1:] + some[:, None].to(h.device)).to(h.dtype)], 1)

        with applied(model, m.lm.tokenizer, Edit("output-score", {m.place: amplified})):
            said = model(ids.expand(len(some), -1), use_cache=False).logits[:, -1].float().softmax(-1)
        head = model.get_output_embeddings()
        weight = next(head.parameters())
        own = head(norms[0](vectors.to(weight.device, weight.dtype)[:, None]))[:, 0].topk(top).indices
        best = said.gather(1, own.to(said.device)).max(1, keepdim=True).values
        found.append(best[:, 0] * (1 - (said > best).sum(1) / said.shape[1]))
    return torch.cat(found).cpu().double()


SCORES = {"attribution": attributions, "output-score": output_scores}  # rules that look at more than rates


@kept
@torch.inference_mode()
def gate_for(m: Measured, n: int, quantile: float = 0.95) -> float:
    """DSG's tau for its n features: that quantile of rho over retain texts."""
    latents, found, lm = Latents(m.sae, m.features(n, "dsg")), [], m.lm
    with watch_tokens(lm.original_model, lm.tokenizer) as seen:
        for part in m.retain:
            for _, ids in batches(part, m.size, lm.tokenizer, lm.cfg.device, "gate"):
                h = hidden(lm.original_model, ids, m.place)
                found.append(gate_of(latents.encode(h)[0], seen["edited"].to(h.device)).cpu())
    return torch.cat(found).quantile(quantile).item()


def load(s) -> tuple:
    """The model and its SAE of --layer, both known to be what they should be and fit for many edits in one pass."""
    lm = load_model(s.model, s.device, s.dtype, s.device_map, s.edit_special)
    sae = load_sae(s.sae, s.layer, lm, s.model)
    check_engine(lm, [layer_of(sae)])
    return lm, sae


def measure(lm, layer: int, sae, forget: list[str], retain: list[list[str]], clamp: float, s) -> Measured:
    """Measured on forget texts and sets of retain texts."""
    return Measured(lm, sae, layer, *picking_windows(lm.tokenizer, forget, retain, s), clamp, s)


def edit_for(method: str, one: dict, m: Measured) -> Edit:
    """A setting of the method's grid as an edit; in its `setting` clamps and thresholds are what they come to."""
    n, layers = one.get("n_features"), [m.place]
    if method == "diff-in-means":
        layers = list(range(m.place, m.lm.cfg.n_layers)) if one["behind"] else layers
        arguments = {"direction": m.direction, "strength": one["strength"]}
    elif method == "mean-ablation":
        features, retain = m.features(n), m.rates[1]
        arguments = {"features": features, "means": (retain.total / retain.n_tokens)[features].tolist()}
    elif method == "dsg":
        features = m.features(n, "dsg")
        arguments = {"features": features, "clamp": one["clamp"] * m.clamp, "gate": gate_for(m, n)}
    elif method == "refusal-clamp":  # Khoriaty et al.: threshold 0.05, latent 15,864 of Gemma Scope's layer 7 at -500
        arguments = {"features": m.features(n), "threshold": 0.05, "refusal": m.s.refusal_latent,
                     "refusal_value": one["refusal"] * m.s.refusal_value}  # fmt: skip
    else:
        most = max(grid_point["n_features"] for grid_point in GRIDS["random-features"])
        features = m.control(n, most) if method == "random-features" else m.features(n)
        arguments = {"features": features, "clamp": one["clamp"] * m.clamp if "clamp" in one else 0.0}
    if method == "conditional-clamp":
        forget = m.rates[0]
        active = (forget.total / forget.fires)[features].mean().item()  # mean activation where active
        arguments["threshold"] = one["threshold"] * active
    numbers = {name: value for name, value in arguments.items() if isinstance(value, int | float)}
    return edit_of(method, m.sae, {"layer": m.layer, **one, **numbers}, layers, **arguments)
