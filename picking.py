"""
Which features to ablate: firing rates, three published rules, a control of like rates; and does the SAE fit the model?
"""

import math
import random
from dataclasses import dataclass

import torch
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from data import UserError
from edits import Latents, layer_of, passed, residuals
from processes import total as over_processes


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
    """x (n, ...) summed over n, in fp64 on the CPU; Apple's GPUs have no fp64 to sum in."""
    return x.sum(0, dtype=torch.float32 if x.device.type == "mps" else torch.float64).cpu().double()


@torch.inference_mode()
def firing_rates(model, sae, windows, batch_size: int = 16, desc: str | None = None) -> Rates:
    """Count over `windows` (lists of ids) where each feature is active, special tokens left out by id."""
    fires, n = torch.zeros(sae.cfg.d_sae, dtype=torch.int64), torch.tensor(0)
    total = torch.zeros_like(fires, dtype=torch.float64)
    everything = Latents(sae, range(sae.cfg.d_sae))
    for h, _ in residuals(model, layer_of(sae), windows, batch_size, desc):
        acts, _ = everything.encode(h)
        fires += (acts > 0).sum(0).cpu()
        total += summed(acts)
        n += len(h)
    fires, total, n = map(over_processes, (fires, total, n))
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


def pick_features(forget: Rates, retain: Rates, n: int, rule: str = "ratio", tau: float = 0.01) -> list[int]:
    """The n features to ablate, best first, ties by index; features that never fire on the forget set are left out.

    ratio: highest `activation_ratio`. retain-threshold: retain rate below tau, then highest forget rate (SAEBench,
    arXiv 2503.09532; Farrell et al., arXiv 2410.19278). dsg: squared mean activation, its forget/retain ratio in the
    top 5 per cent and itself above the lowest 5, then highest on the forget set (Muhamed et al., arXiv 2504.08192).
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
    else:
        raise UserError(f"--pick {rule}: the rules are ratio, retain-threshold, dsg")
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


@torch.inference_mode()
def fit_of(model, sae, windows: list[list[int]]) -> tuple[float, float, int]:
    """L0, variance explained, and how many ordinary tokens of all windows they were measured on.

    1 - sum |h - SAE(h)|^2 / sum |h - mean h|^2, both sums without the largest thousandth of tokens by norm: a handful
    of attention sinks, tens of times as long as other tokens, would decide it alone. Holds one batch at a time.
    """
    origin, total, n, active, few = None, 0.0, 0, 0, math.ceil(sum(map(len, windows)) / 1000)
    longest = None  # (few, d_model + 2), that thousandth: h less the origin, squared error, norm
    for h, _ in residuals(model, layer_of(sae), windows, 16, shared=False):
        h = h.float()
        origin = h.mean(0) if origin is None else origin  # sums of squares far from it would lose digits
        acts, back = passed(sae, h)
        active += (acts > 0).sum().item()
        error, norm = (h - back).pow(2).sum(-1, keepdim=True), h.norm(dim=-1, keepdim=True)
        rows = torch.cat([h - origin, error, norm], 1)
        sums = torch.cat([rows.sum(0), rows[:, :-2].pow(2).sum()[None]]).cpu().double()
        total, n = total + sums, n + len(h)
        longest = rows if longest is None else torch.cat([longest, rows])
        longest = longest[longest[:, -1].topk(min(few, len(longest))).indices]
    if not n:
        raise UserError("the retain texts hold no token that rates could be counted on")
    some = longest[longest[:, -1].topk(math.ceil(n / 1000)).indices].cpu().double()
    total -= torch.cat([some.sum(0), some[:, :-2].pow(2).sum()[None]])
    varies = total[-1] - total[:-3].pow(2).sum() / max(1, n - len(some))
    return active / n, (1 - total[-3] / varies).item(), n


def sanity_gate(model, sae, windows: list[list[int]], insist: bool = True) -> dict:
    """L0 and variance explained on ordinary tokens, beside what SAELens's table or the SAE itself promises.

    Raises UserError on a gross mismatch unless `insist` is False: an SAE read with the wrong architecture,
    scaling or layer gives numbers too, only not of this SAE. Raises it always where they are not finite.
    """
    l0, explained, n = fit_of(model, sae, windows)
    if not math.isfinite(explained):
        raise UserError(f"{sae.source}: the variance it explains is {explained}: the model's residual stream at "
                        f"{sae.hook_point} or what the SAE makes of it is not finite")  # fmt: skip
    found = {"l0": round(l0, 2), "variance_explained": round(explained, 4), "n_tokens": n}
    release, _, sae_id = sae.source.partition(":")
    entry = get_pretrained_saes_directory().get(release)
    promised = (entry.expected_l0.get(sae_id) if entry else None) or sae.cfg.metadata.l0
    if promised:
        found["promised_l0"] = round(promised, 2)
    wrong = found["variance_explained"] < 0.5 or (promised and not promised / 4 < l0 < promised * 4)
    print(f"SAE check: L0 {l0:.1f}{f' (promised {promised:.1f})' if promised else ''}, variance explained "
          f"{explained:.3f} on {n} tokens, the thousandth of largest norm left out")  # fmt: skip
    if wrong and insist:
        raise UserError(f"{sae.source} does not fit this model (see the line above); --no-sanity goes on regardless")
    return found
