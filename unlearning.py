"""
Training that unlearns: objectives, one short function each, and the loops that go down them. baselines.py tunes them.

Texts are windows of token ids; those of objectives on next-token losses are (ids, start), the tokens from `start` on to
be predicted (training.training_windows). A step takes BATCH forget and as many retain texts, retain sets in turn.
Every loop returns a log, a row a step, of a forget and a retain part.
"""

import random
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

from common import Rates
from data import UserError, padded, special_ids
from edits import Latents, decoder_layers
from training import Master, Nll, distance, finite, linear_modules, passes, reach, target_mask, text_nll, wide

BATCH = 4

# ------------------------------------------------------------------------------ objectives on next-token losses


# Each takes the forget and the retain batch, and what the forget texts' nats were before training, (batch,); it returns
# the forget and the retain part of the loss. Formulas and defaults are those of github.com/locuslab/open-unlearning
def gradient_ascent(forget: Nll, retain: Nll, before: torch.Tensor) -> tuple:
    """-NLL_f: nothing holds the model back but the number of steps."""
    return -forget.mean, 0 * retain.mean


def grad_diff(forget: Nll, retain: Nll, before: torch.Tensor, alpha: float = 1.0) -> tuple:
    """-NLL_f + alpha NLL_r."""
    return -forget.mean, alpha * retain.mean


def npo(forget: Nll, retain: Nll, before: torch.Tensor, alpha: float = 1.0, beta: float = 0.1) -> tuple:
    """Negative Preference Optimization (Zhang et al., arXiv 2404.05868): -2/beta mean log sigmoid(beta (NLL_f(x) -
    NLL_f,before(x))), NLL summed over a text. The smaller beta, the nearer to gradient ascent."""
    return -2 / beta * F.logsigmoid(beta * (forget.nats - before)).mean(), alpha * retain.mean


def simnpo(forget, retain, before, alpha=1.0, beta: float = 4.5, delta: float = 0.0, gamma: float = 0.125) -> tuple:
    """SimNPO (Fan et al., arXiv 2410.07163): gamma times -2/beta mean log sigmoid(beta (NLL_f(x)/|x| - delta)), without
    a model to refer to."""
    away = -2 / beta * F.logsigmoid(beta * (forget.nats / forget.n - delta)).mean()
    return gamma * away, alpha * retain.mean


# npo-sam differs in the weights at which the gradient is taken
LOSSES = {"gradient-ascent": gradient_ascent, "grad-diff": grad_diff, "npo": npo, "simnpo": simnpo, "npo-sam": npo}


@contextmanager
def perturbed(parameters: list[torch.nn.Parameter], rho: float):
    """Within it the parameters lie rho further along their gradient, rho g / ||g||, ||g|| over all of them, and the
    gradient is empty: where sharpness-aware minimisation takes the one that it follows."""
    moved = [one for one in parameters if one.grad is not None]
    norm, were = torch.stack([one.grad.norm() for one in moved]).norm(), [one.data for one in moved]
    for one in moved:  # not in place: a graph made before may be waiting for its backward pass
        one.data, one.grad = one.data + one.grad * (rho / norm), None
    try:
        yield
    finally:
        for one, was in zip(moved, were):
            one.data = was


def by_nll(
    method: str, setting: dict, model, tokenizer, forget: list[tuple], retain_sets: list[list[tuple]], seed: int
) -> list:
    """Train all parameters in place. Log: NLL in nats per target.

    As open-unlearning's trainer: AdamW without weight decay, gradients clipped to norm 1, a rate that falls to 0.

    npo-sam, sharpness-aware NPO (Fan et al., arXiv 2502.05374; github.com/OPTML-Group/Unlearn-Smooth): the forget
    part's gradient g is taken at w + rho g(w) / ||g(w)||, the retain part's at w, and their sum is followed. Not so:
    the forget loss is `npo`, of each text, where the release takes the sigmoid of the batch's mean loss per token.
    """
    weights = {name: value for name, value in setting.items() if name not in ("lr", "steps", "loss_on", "rho")}
    rng, special = random.Random(seed), torch.tensor(special_ids(tokenizer))
    before = []
    with torch.no_grad():
        for start in range(0, len(forget), BATCH):
            before += text_nll(model, forget[start : start + BATCH], tokenizer, special).nats.tolist()
    away_texts, *back_texts = (passes(texts, BATCH, rng) for texts in ([*zip(forget, before)], *retain_sets))
    model.requires_grad_(True)
    master = Master(model.parameters(), setting["lr"], clip=1.0, steps=setting["steps"], weight_decay=0.0)
    log = []
    for number in tqdm(range(setting["steps"]), desc=method, unit="step", leave=False):
        windows, was = zip(*next(away_texts))
        away = text_nll(model, windows, tokenizer, special)
        back = text_nll(model, next(back_texts[number % len(back_texts)]), tokenizer, special)
        was = away.nats.new_tensor(was)
        parts = LOSSES[method](away, back, was, **weights)
        if "rho" in setting:
            master.backward(parts[0])
            with perturbed(master.parameters, setting["rho"]):
                sharp = text_nll(model, windows, tokenizer, special)
                master.backward(LOSSES[method](sharp, back, was, **weights)[0])
            master.backward(parts[1])
            master.update()
        else:
            master.step(sum(parts))
        log.append([away.mean.item(), back.mean.item()])
    return log


# ------------------------------------------------------------------------------------- MUDMAN: agreeing signs


def undisrupting(away: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """MUDMAN's mask: of the gradient of the loss that unlearns, what has the sign of the gradient of the retain loss,
    so that a step down the one is none up the other; 0 elsewhere."""
    return away * (away.sign() == back.sign())


def by_mudman(
    setting: dict,
    model,
    tokenizer,
    forget: list[tuple],
    retain_sets: list[list[tuple]],
    seed: int,
    momentum: float = 0.9,
    relearning: float = 1e-3,
    fork: int = 32,
) -> list:
    """MUDMAN (Sondej et al., arXiv 2506.12484; github.com/filyp/MUDMAN): steps of a given length, masked, up the forget
    loss of an adversary that keeps relearning the text. Every step, by plain gradient descent,

        r <- momentum r + (1 - momentum) grad NLL_r(w),   w <- w - retain r
        g = grad NLL_f(v),   w <- w - lr mask(-g, r) / ||g||,   v <- v - relearning g

    v being the adversary, w anew every `fork` steps, and ||g|| over all weights, before the mask. The numbers are the
    release's, lr 0.1 and retain 1e-3 among them. Trains all parameters in place. Log: NLL in nats per target.

    Not so: all weights are trained, as in the authors' later code, where the paper's takes the MLPs' gates, which not
    every family has; the unlearning loss is -NLL, one of the paper's three, where the release's example has the
    entropy; g is taken before the adversary's step, in the release by a second backward pass behind it.
    """
    rng, special = random.Random(seed), torch.tensor(special_ids(tokenizer))
    away_texts, *back_texts = (passes(texts, BATCH, rng) for texts in (forget, *retain_sets))
    model.requires_grad_(True)
    master = Master(model.parameters(), 1.0, torch.optim.SGD)
    r, log = [torch.zeros_like(copy) for copy in master.copies], []

    def gradient(of, texts):
        found = text_nll(of, texts, tokenizer, special)
        return found.mean.item(), torch.autograd.grad(finite(found.mean), list(of.parameters()), materialize_grads=True)

    for number in tqdm(range(setting["steps"]), desc="mudman", unit="step", leave=False):
        if number % fork == 0:
            adversary = deepcopy(model)
            teacher = Master(adversary.parameters(), relearning, torch.optim.SGD)
        back, found = gradient(model, next(back_texts[number % len(back_texts)]))
        r = [momentum * old + (1 - momentum) * wide(new) for old, new in zip(r, found)]
        away, found = gradient(adversary, next(away_texts))
        norm = torch.stack([wide(one).norm() for one in found]).norm()
        for one, old, g, v in zip(master.parameters, r, found, teacher.parameters):
            step = setting["retain"] * old + setting["lr"] / norm * undisrupting(-wide(g), old)
            one.grad, v.grad = step.to(one.dtype), g
        master.update()
        teacher.update()
        log.append([away, back])
    return log


# ------------------------------------------------------------------------- UNDO: noise, and distil the outputs


@torch.no_grad()
def corrupt(model, alpha: float, beta: float, seed: int) -> None:
    """UNDO's noise, in place: w <- (1 - alpha) w + alpha beta n, n a new Xavier-uniform initialisation of a matrix, and
    0 for vectors."""
    torch.manual_seed(seed)
    for one in model.parameters():
        noise = torch.nn.init.xavier_uniform_(torch.empty_like(one)) if one.ndim > 1 else torch.zeros_like(one)
        one.copy_((1 - alpha) * one + alpha * beta * noise)


def forward_kl(teacher: torch.Tensor, student: torch.Tensor, ids: torch.Tensor, targets: torch.Tensor) -> Nll:
    """KL(teacher || student) in nats, of what the logits (batch, pos, d_vocab) say of each marked token of ids,
    (batch, pos), summed over a text."""
    taught, said = (wide(logits[:, :-1]).log_softmax(-1) for logits in (teacher, student))
    losses = (taught.exp() * (taught - said)).sum(-1)
    return Nll((losses * targets[:, 1:]).sum(1), targets[:, 1:].sum(1))


def by_undo(setting: dict, model, tokenizer, forget: list[tuple], retain_sets: list[list[tuple]], seed: int) -> tuple:
    """UNDO, Unlearn-Noise-Distill-on-Outputs (Lee et al., arXiv 2506.06278; github.com/AddieFoote/
    distillation-robustify-unlearning): a copy of an unlearned model, `corrupt`ed, is trained to say what that says,
    forward_kl per token of forget and retain text. alpha 0.25, beta 0 on WMDP, 0.1 to 0.7 and 0.1 on languages.

    Not so: the rate falls to 0 in a line, where the release has a cosine to a tenth, behind 50 steps of warm-up; BOS is
    no target; and of a step's texts half are forget texts, where the release's WMDP runs have general text. Returns
    the trained model and the log: forward KL in nats per token.
    """
    rng, special = random.Random(seed), torch.tensor(special_ids(tokenizer))
    away_texts, *back_texts = (passes(texts, BATCH, rng) for texts in (forget, *retain_sets))
    teacher, student = model.requires_grad_(False), deepcopy(model).requires_grad_(True)
    corrupt(student, setting["alpha"], setting["beta"], seed)
    master = Master(student.parameters(), setting["lr"], clip=1.0, steps=setting["steps"], weight_decay=0.0)
    log = []
    for number in tqdm(range(setting["steps"]), desc="undo", unit="step", leave=False):
        away = next(away_texts)
        ids, targets = target_mask(away + next(back_texts[number % len(back_texts)]), tokenizer, special, model.device)
        with torch.no_grad():
            taught = teacher(ids, use_cache=False).logits
        found = forward_kl(taught, student(ids, use_cache=False).logits, ids, targets)
        master.step(found.mean)
        log.append([Nll(found.nats[part], found.n[part]).mean.item()
                    for part in (slice(len(away)), slice(len(away), None))])  # fmt: skip
    return student, log


# ---------------------------------------------------------------------- LoRA on what the residual stream holds


RANKS = {"crisp": 4, "circuit-breakers": 16}  # their releases'


def lora_matrices(model, layers: list[int], rank: int) -> dict:
    """{name: a matrix as large as LoRA's two} of what with_lora trains, on the meta device."""
    return {name: torch.empty(rank, sum(model.get_submodule(name).weight.shape), device="meta")
            for name in linear_modules(model, layers)}  # fmt: skip


def with_lora(model, layers: list[int], seed: int, **options):
    """The model with LoRA on all matrices of attention and MLP in these layers, and what is trained of it. options: of
    LoraConfig."""
    torch.manual_seed(seed)
    lora = LoraConfig(lora_dropout=0.05, target_modules=linear_modules(model, layers), **options)
    adapted = get_peft_model(model, lora)
    for name, module in adapted.named_modules():  # the adapter's dropout, and none of the model's own
        module.training = "lora_dropout" in name
    return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def both(adapted, texts: list[list[int]], tokenizer) -> tuple[tuple, tuple, torch.Tensor]:
    """Residual streams as they were without LoRA and as they are, [layer + 1] behind a layer, [0] the embeddings, [-1]
    behind the final norm; and which tokens are not special, (batch, pos)."""
    ids = padded(texts, tokenizer, adapted.device)
    with torch.no_grad(), adapted.disable_adapter():
        was = adapted(ids, use_cache=False, output_hidden_states=True).hidden_states
    now = adapted(ids, use_cache=False, output_hidden_states=True).hidden_states
    return was, now, ~torch.isin(ids, torch.tensor(special_ids(tokenizer), device=ids.device))


def rerouted(was, now, ordinary: torch.Tensor) -> torch.Tensor:
    """Circuit breakers' forgetting term, mean relu(cosine(now, was)): 0 where the residual stream (layers, batch, pos,
    d_model) of an ordinary token is at right angles to what it was."""
    return torch.relu(F.cosine_similarity(wide(now), wide(was), dim=-1))[:, ordinary].mean()


def held(was, now, ordinary: torch.Tensor) -> torch.Tensor:
    """Circuit breakers' retain term, mean ||now - was||_2 over layers and ordinary tokens, shapes as for `rerouted`."""
    return (wide(now) - wide(was)).norm(dim=-1)[:, ordinary].mean()


def broken_layers(n: int) -> list[int]:
    """Where circuit breakers look in a model of n layers: what enters layers 10 and 20 of 32, and as deep in others."""
    return [round(n * layer / 32) for layer in (10, 20)]


def adapted_layers(n: int) -> list[int]:
    """Which of n layers circuit breakers train: all up to the deeper of `broken_layers`."""
    return list(range(min(broken_layers(n)[1] + 1, n)))


def by_circuit_breakers(
    setting: dict, model, tokenizer, forget: list[list[int]], retain_sets: list[list[list[int]]], seed: int
) -> tuple:
    """Circuit breakers by representation rerouting (Zou et al., arXiv 2406.04313; github.com/GraySwanAI/
    circuit-breakers): LoRA training on, at step t of T,

        10 (1 - t / 2T) rerouted(forget text) + retain 10 (t / 2T) held(retain text)

    The first is read at `broken_layers`, the second at the embeddings and behind all layers up to the deeper of the
    two, which are the ones that LoRA (rank 16, alpha 16) adapts. As the release with `retain` 1, 150 steps and a rate
    of 1e-4 that stays, AdamW without weight decay, clipped to norm 1. Not so: `retain`; LoRA's second matrices start a
    thousandth from 0, where the cosine, at its peak, has no gradient (in the release's bfloat16 rounding gives it one);
    BOS and padding are left out of both means, padding counts as held there; four texts a step, not sixteen; the last
    layer read is not followed by the final norm, since the model is not cut behind it.
    Returns the trained model and the log.
    """
    n = len(decoder_layers(model))
    at, rng = broken_layers(n), random.Random(seed)
    away_texts, *back_texts = (passes(texts, BATCH, rng) for texts in (forget, *retain_sets))
    adapted, trained = with_lora(model, adapted_layers(n), seed, r=RANKS["circuit-breakers"], lora_alpha=16)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    master, log = Master(trained, setting["lr"], clip=1.0, weight_decay=0.0), []
    for number in tqdm(range(setting["steps"]), desc="circuit-breakers", unit="step", leave=False):
        was, now, ordinary = both(adapted, next(away_texts), tokenizer)
        away = rerouted(*(torch.stack([h[place] for place in at]) for h in (was, now)), ordinary)
        was, now, ordinary = both(adapted, next(back_texts[number % len(back_texts)]), tokenizer)
        back = held(*(torch.stack(h[: at[1] + 2]) for h in (was, now)), ordinary)
        done = (number + 1) / (2 * setting["steps"])
        master.step(10 * (1 - done) * away + setting["retain"] * 10 * done * back)
        log.append([away.item(), back.item()])
    return adapted.merge_and_unload().eval(), log


# ------------------------------------------------------------------------ CRISP: features as the target of training


def salient(forget: Rates, retain: Rates, k: int, rho: float = 3.0) -> list[int]:
    """CRISP's k features: of the 10 k that are active on the most forget tokens beyond their number on as many retain
    tokens, the first whose activation summed over the forget tokens is at least rho times that over the retain tokens
    and 1. The release has as many tokens of both; here retain counts are scaled."""
    more = forget.rate - retain.rate
    strength = forget.total / (retain.total * forget.n_tokens / retain.n_tokens + 1)
    candidates = more.sort(descending=True, stable=True).indices[: 10 * k].tolist()
    return [i for i in candidates if strength[i] >= rho][:k]


def crisp_forget(sae, features: list[int], was, now, ordinary, pull: float) -> torch.Tensor:
    """CRISP's forgetting term at one layer, as its release has it: the mean of the positive among

        JumpReLU(pre_i + |pull * mean over all features of pre|)

    over the features and ordinary tokens, pre being the SAE's encoder output before its nonlinearity; what stands
    behind the + is there only where the feature was active before training. It is never below 0, where the paper's
    a_i + lambda c_t (eq. 9) has no floor. was, now: residual stream (batch, pos, d_model) before and in training;
    ordinary: (batch, pos). Raises UserError for SAEs of another kind.
    """
    if sae.cfg.architecture() not in ("standard", "jumprelu") or sae.cfg.normalize_activations != "none":
        raise UserError(f"{sae.source}: CRISP needs a standard or JumpReLU SAE without normalisation")
    latents = Latents(sae, features)
    x = now.to(sae.dtype) - (sae.b_dec if sae.cfg.apply_b_dec_to_input else 0)
    pre, mean = x @ latents.W_enc + sae.b_enc[features], x @ sae.W_enc.mean(1) + sae.b_enc.mean()
    pre = torch.where(latents.encode(was)[0] > 0, pre + (pull * mean).abs()[..., None], pre)
    threshold = sae.threshold[features] if sae.cfg.architecture() == "jumprelu" else 0.0
    active = (pre > threshold) & (pre > 0) & ordinary[..., None]
    return pre[active].mean() if active.any() else 0 * pre.sum()


def by_crisp(
    setting: dict, model, tokenizer, forget: list, retain_sets: list[list], seed: int, saes: dict, rates: dict
):
    """CRISP (Ashuach et al., arXiv 2508.13650; github.com/tomerashuach/CRISP): LoRA training that silences features.

    alpha L_unl + (1 - alpha) (L_ret + 0.01 L_coh): the mean of crisp_forget over the layers; the distance of retain
    text's residual stream there from what it was; the same behind the final norm. Loss, optimiser and LoRA are the
    release's. Not so: SAEs are read at their own hook point, where the release reads the input of the layer that they
    are named by; L_coh is on Wikitext, not on 20 curated sentences; retain sets take turns; four texts a step, not one.
    saes, rates: by layer. Returns the trained model and the log. Raises UserError for an SAE behind the last layer,
    and where no feature is salient.
    """
    blocks = len(decoder_layers(model))
    if max(saes) == blocks - 1:
        raise UserError(f"CRISP reads SAEs behind layers 0 to {blocks - 2}: --layer {max(saes)} is the last")
    rng, picked = random.Random(seed), {layer: salient(*rates[layer], setting["k"]) for layer in saes}
    if not any(picked.values()):
        raise UserError("CRISP: no feature is three times as active on forget text as on retain text")
    away_texts, coherent, *back_texts = (passes(part, BATCH, rng) for part in (forget, retain_sets[0], *retain_sets))
    adapted, trained = with_lora(model, reach(saes), seed, r=RANKS["crisp"], lora_alpha=8)
    master, log = Master(trained, setting["lr"], amsgrad=True), []

    for number in tqdm(range(setting["steps"]), desc="crisp", unit="step", leave=False):
        was, now, ordinary = both(adapted, next(away_texts), tokenizer)
        parts = [crisp_forget(saes[layer], ids, was[layer + 1], now[layer + 1], ordinary, setting["pull"])
                 for layer, ids in picked.items() if ids]  # fmt: skip
        away = torch.stack(parts).mean()
        was, now, ordinary = both(adapted, next(back_texts[number % len(back_texts)]), tokenizer)
        back = torch.stack([distance(was[layer + 1], now[layer + 1], ordinary) for layer in saes]).mean()
        was, now, ordinary = both(adapted, next(coherent), tokenizer)
        coherence = distance(was[-1], now[-1], ordinary)
        master.step(setting["alpha"] * away + (1 - setting["alpha"]) * (back + 0.01 * coherence))
        log.append([away.item(), back.item()])
    return adapted.merge_and_unload().eval(), log
