"""Unlearning by training: what methods share (texts, next-token losses, AdamW in fp32), then the methods themselves.

METHODS holds all there is to know of each. Its `train(training, **setting)` loads the model, trains it on what
`Training` holds, and returns it with a log, a row a step. A text is a window (ids, start): token ids, of which those
from `start` on are predicted. A step takes BATCH forget texts and as many retain texts, retain sets in turn."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

import data
import edits
from common import Rates
from data import LETTERS, Dataset, UserError, encode_answer, opening, padded, prompt, special_ids, token_windows
from edits import Latents, Method, decoder_layers, grid, residual_stream, token_mask

METHODS: dict[str, Method] = {}  # filled below, beside each method
BATCH = 4
NLL_LOG = ("forget text, nats per token", "retain text, nats per token")
QUESTION_TOKENS = 512  # open-unlearning's limit on a question with its answer
Window = tuple[list[int], int]


# ------------------------------------------------------------------------------------------ what is trained on
@dataclass
class Training:
    """What a method trains on. load: () -> the Hugging Face model, anew, without gradients. forget, retain: of
    `training_windows`. picking: of data.picking_windows. stats: layer -> FeatureStats, for methods that need SAEs."""

    load: Callable
    tokenizer: object
    forget: list[Window]
    retain: list[list[Window]]
    picking: tuple[list, list[list]] = ((), ())
    stats: Callable | None = None
    model_name: str = "tiny"
    seed: int = 0
    cache: dict = field(default_factory=dict, repr=False)  # for what several settings share

    def batches(self, steps: int, title: str, *sources: list[list], size: int = BATCH) -> Iterator[tuple]:
        """For each step, under a progress bar, a batch of each source: a list of sets of texts, which take turns."""
        rng = random.Random(self.seed)
        turns = [itertools.cycle([endless_batches(texts, size, rng) for texts in sets]) for sets in sources]
        for _ in tqdm(range(steps), title, unit="step", leave=False):
            yield tuple(next(next(turn)) for turn in turns)


def answer_window(tokenizer, question: str, answer: str) -> Window:
    """A question with its answer as target, without EOS, cut to QUESTION_TOKENS at the front, where no answer is."""
    ids, start = encode_answer(tokenizer, question, answer)
    front = opening(tokenizer) or [tokenizer.bos_token_id]
    bos = front if ids[: len(front)] == front else []
    dropped = max(0, len(ids) - QUESTION_TOKENS)
    return bos + ids[dropped + len(bos) :], start - dropped


def training_windows(tokenizer, forget: Dataset, wikitext: Dataset, mmlu_dev: Dataset) -> tuple:
    """(forget windows, retain sets); of questions the answer is predicted, of texts all. forget: a quiz, as it is
    asked, with letters, and as prose, with answers in words; or texts. Retain: Wikitext, MMLU's dev questions."""

    def of_texts(dataset, max_tokens=None):
        return [(ids, 1) for ids in token_windows(tokenizer, dataset.texts, max_tokens=max_tokens)[0]]

    def with_letter(quiz):
        return [answer_window(tokenizer, prompt(row), LETTERS[row["answer"]]) for row in quiz.rows]

    retain = [of_texts(wikitext, data.RETAIN_TOKENS), with_letter(mmlu_dev)]
    if forget.rows and "text" in forget.rows[0]:
        return of_texts(forget), retain
    in_words = [answer_window(tokenizer, row["question"].strip(), row["choices"][row["answer"]]) for row in forget.rows]
    return with_letter(forget) + in_words, retain


def endless_batches(texts: list, n: int, rng: random.Random) -> Iterator[list]:
    """Batches of n texts (or of all, if fewer) without end: each pass in a new random order, less what is left over."""
    n = min(n, len(texts))
    while True:
        order = rng.sample(texts, len(texts))
        yield from (order[start : start + n] for start in range(0, len(order) - n + 1, n))


def settings_of(method: Method, setting: dict, model_name: str, steps=None, lr=None) -> dict:
    """A setting of a method's grid in absolute numbers, as its `train` takes them: what the setting does not say is as
    usual for the model, and `lr` is a multiple of the rate. steps, lr: in place of the method's steps and rate."""

    def of_model(value):  # a dict is by model, "" all others
        return value.get(model_name, value[""]) if isinstance(value, dict) else value

    usual = {name: of_model(value) for name, value in method.usual.items()}
    setting = {"steps": steps or of_model(method.steps), **usual, **setting}
    return setting | {"lr": setting.get("lr", 1) * (lr or of_model(method.lr))}


def title_of(method: str) -> str:
    """As tables name a method, of edits.METHODS or of these here; of an unknown one the name in the record."""
    return getattr({**METHODS, **edits.METHODS}.get(method), "title", method)


# ------------------------------------------------------------------------------------------ losses and steps
def wide(x: torch.Tensor) -> torch.Tensor:  # in at least fp32
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Nll:
    """Next-token losses of a batch of texts: nats, summed over each text, and numbers of targets, both (batch,)."""

    nats: torch.Tensor
    n: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:  # per token, over all texts
        return self.nats.sum() / self.n.sum()


def nll(model, ids: torch.Tensor, targets: torch.Tensor) -> Nll:
    """Next-token losses of ids (batch, pos) where `targets`, (batch, pos) bool, marks the tokens to be predicted."""
    logits = wide(model(ids, use_cache=False).logits[:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return Nll((losses * targets[:, 1:]).sum(1), targets[:, 1:].sum(1))


def not_special(ids: torch.Tensor, tokenizer) -> torch.Tensor:
    return ~torch.isin(ids, torch.tensor(special_ids(tokenizer), device=ids.device))


def target_mask(windows: list[Window], tokenizer, device, loss_on: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (batch, pos), and the mask of their targets: not special, and from `start` on or, with "text", anywhere."""
    ids = padded([ids for ids, _ in windows], tokenizer, device)
    starts = torch.tensor([start if loss_on == "answer" else 1 for _, start in windows], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) >= starts[:, None]) & not_special(ids, tokenizer)


def text_nll(model, windows: list[Window], tokenizer, loss_on: str = "answer") -> Nll:
    return nll(model, *target_mask(windows, tokenizer, model.device, loss_on))


def finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss. Raises UserError if it is not finite."""
    if not torch.isfinite(loss):
        raise UserError("the loss is not finite: take a smaller learning rate or a milder setting")
    return loss


class Fp32AdamW:
    """AdamW on fp32 copies of parameters that run in a smaller dtype: bfloat16 would round an update of less than a
    256th of a weight away. clip: largest norm of the gradient. steps: the rate falls linearly to 0 over so many, as by
    default in Hugging Face's trainer; None: it stays. kind: another class of torch.optim; options: its own."""

    def __init__(self, parameters, lr: float, clip=None, steps: int | None = None, kind=torch.optim.AdamW, **options):
        self.parameters, self.clip = list(parameters), clip
        self.copies = [p if wide(p) is p else wide(p.detach()).requires_grad_(True) for p in self.parameters]
        self.optimizer = kind(self.copies, lr=lr, **options)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1 - n / steps if steps else 1.0)

    def step(self, loss: torch.Tensor) -> None:
        """One step down the loss. Raises UserError if it is not finite."""
        finite(loss).backward()
        self.update()

    def update(self) -> None:
        """One step along the parameters' gradients, which are empty afterwards."""
        for copy, parameter in zip(self.copies, self.parameters):
            if copy is not parameter and parameter.grad is not None:
                copy.grad, parameter.grad = wide(parameter.grad), None
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.copies, self.clip)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for copy, parameter in zip(self.copies, self.parameters):
                if copy is not parameter:
                    parameter.copy_(copy)
        self.optimizer.zero_grad()


@contextmanager
def replaced(parameters, values):
    """Within this context the parameters have other values: not in place, as a graph may await its backward pass."""
    before = [p.data for p in parameters]
    try:
        for p, value in zip(parameters, values):
            p.data = value
        yield
    finally:
        for p, value in zip(parameters, before):
            p.data = value


# Rates are tiny's, whose thin matrices need more, and elsewhere the releases' (1e-5: open-unlearning's; 4e-5: CRISP's
# paper on Gemma-2-2B). Grids have the releases' settings, and lie between doing nothing and losing MMLU, by the tuning
# half alone: in a hundred trial runs on a tiny of 12 layers, in 19 on today's, and in 4 to 6 each for npo-sam, MUDMAN,
# circuit breakers and UNDO


# -------------------------------------------------------------------- next-token losses: NPO and the like, MUDMAN
# Objectives: the forget part of a loss, from a forget batch's losses and its texts' nats before training, (batch,). The
# retain part is always alpha NLL_r. Formulas and usual weights are those of github.com/locuslab/open-unlearning
def gradient_ascent(forget: Nll, before: torch.Tensor) -> torch.Tensor:
    """-NLL_f. Without a retain part only the number of steps holds the model back; with one it is GradDiff."""
    return -forget.mean


def npo(forget: Nll, before: torch.Tensor, beta: float) -> torch.Tensor:
    """Negative Preference Optimization (Zhang et al., arXiv 2404.05868): -2/beta mean log sigmoid(beta (NLL_f(x) -
    NLL_f,before(x))), NLL summed over a text. The smaller beta, the nearer to gradient ascent."""
    return -2 / beta * F.logsigmoid(beta * (forget.nats - before)).mean()


def simnpo(forget: Nll, before: torch.Tensor, beta: float, delta: float, gamma: float) -> torch.Tensor:
    """SimNPO (Fan et al., arXiv 2410.07163): -2 gamma/beta mean log sigmoid(beta (NLL_f(x)/|x| - delta))."""
    return gamma * (-2 / beta * F.logsigmoid(beta * (forget.nats / forget.n - delta)).mean())


def train_by_nll(objective, training: Training, *, steps, lr, loss_on="answer", alpha=0.0, rho=0.0, **weights) -> tuple:
    """Train all parameters on an objective + alpha NLL_r; weights: the objective's. As open-unlearning's trainer: AdamW
    without weight decay, gradients clipped to norm 1, a rate that falls to 0.

    rho > 0 is sharpness-aware minimisation, with `npo` sharpness-aware NPO (Fan et al., arXiv 2502.05374; github.com/
    OPTML-Group/Unlearn-Smooth): the forget part's gradient g is taken at w + rho g(w) / ||g(w)||, the retain part's at
    w. Differs from the release, which takes the sigmoid of the batch's mean loss per token, here `npo` of each text."""
    model = training.load()
    nll_of = partial(text_nll, model, tokenizer=training.tokenizer, loss_on=loss_on)
    with torch.no_grad():
        parts = [nll_of(training.forget[i : i + BATCH]).nats for i in range(0, len(training.forget), BATCH)]
    pairs = [*zip(training.forget, torch.cat(parts).tolist())]
    adam, log = Fp32AdamW(model.requires_grad_(True).parameters(), lr, clip=1.0, steps=steps, weight_decay=0.0), []
    for forget_pairs, retain_texts in training.batches(steps, objective.__name__, [pairs], training.retain):
        windows, nats_before = zip(*forget_pairs)
        away, back = nll_of(windows), nll_of(retain_texts)
        nats_before = away.nats.new_tensor(nats_before)
        forget_part, retain_part = objective(away, nats_before, **weights), alpha * back.mean
        if rho:
            finite(forget_part).backward()
            norm = torch.stack([p.grad.norm() for p in adam.parameters if p.grad is not None]).norm()
            ahead = [p.data if p.grad is None else p.data + p.grad * (rho / norm) for p in adam.parameters]
            model.zero_grad()
            with replaced(adam.parameters, ahead):
                finite(objective(nll_of(windows), nats_before, **weights)).backward()
            finite(retain_part).backward()
            adam.update()
        else:
            adam.step(forget_part + retain_part)
        log.append([away.mean.item(), back.mean.item()])
    return model, log


def by_nll(title: str, objective: Callable, grid: tuple, steps: dict | None = None, **usual) -> Method:
    """The Method that trains all weights by `objective`; usual: alpha, the objective's weights, rho."""
    return Method(title, grid, train=partial(train_by_nll, objective), usual={"loss_on": "answer", **usual},
                  needs_sae=False, steps=steps or {"": 120}, lr={"tiny": 4e-4, "": 1e-5}, log=NLL_LOG)  # fmt: skip


METHODS["gradient-ascent"] = by_nll("gradient ascent", gradient_ascent, grid(lr=(1, 1.5, 2, 3), steps=(10, 20)))
METHODS["grad-diff"] = by_nll("GradDiff", gradient_ascent, grid(lr=(0.125, 0.25, 0.5, 1), alpha=(1, 1000)), alpha=1.0)
METHODS["npo"] = by_nll("NPO", npo, grid(lr=(0.25, 0.5), alpha=(1, 30), beta=(0.1, 1)), alpha=1.0, beta=0.1)
METHODS["simnpo"] = by_nll("SimNPO", simnpo, grid(lr=(0.7, 1, 1.4, 2), gamma=(0.125, 0.25)),
                           alpha=1.0, beta=4.5, delta=0.0, gamma=0.125)  # fmt: skip
METHODS["npo-sam"] = by_nll("sharpness-aware NPO", npo, grid(lr=(0.5, 1, 1.4, 2), alpha=(2.25, 30), beta=(1,),
                            rho=(0.1,)), steps={"tiny": 60, "": 125}, alpha=1.0, beta=0.1, rho=0.1)  # fmt: skip


def train_mudman(training: Training, *, steps, lr, retain, loss_on="answer", momentum=0.9, relearning=1e-3, fork=32):
    """MUDMAN (Sondej et al., arXiv 2506.12484; github.com/filyp/MUDMAN): steps of a given length, masked, up the forget
    loss of an adversary that keeps relearning the text. Every step, by plain gradient descent,

        r <- momentum r + (1 - momentum) grad NLL_r(w),   w <- w - retain r
        g = grad NLL_f(v),   w <- w - lr mask(-g, r) / ||g||,   v <- v - relearning g

    v being the adversary, w anew every `fork` steps, ||g|| over all weights, and the mask 0 where the signs differ. The
    numbers are the release's, lr 0.1 and retain 1e-3 among them. Differs from it: all weights train, as in the authors'
    later code, not the MLPs' gates; the unlearning loss is -NLL, one of the paper's three, not the entropy; g is taken
    before the adversary's step, not after it."""
    model = training.load()
    descent = Fp32AdamW(model.requires_grad_(True).parameters(), 1.0, kind=torch.optim.SGD)
    r, log = [torch.zeros_like(copy) for copy in descent.copies], []

    def gradient(of, texts):
        loss = text_nll(of, texts, training.tokenizer, loss_on).mean
        slopes = torch.autograd.grad(finite(loss), list(of.parameters()), materialize_grads=True)
        return loss.item(), [wide(slope) for slope in slopes]

    batches = training.batches(steps, "MUDMAN", training.retain, [training.forget])
    for number, (retain_texts, forget_texts) in enumerate(batches):
        if number % fork == 0:
            adversary = deepcopy(model)
            relearn = Fp32AdamW(adversary.parameters(), relearning, kind=torch.optim.SGD)
        back, slopes = gradient(model, retain_texts)
        r = [momentum * old + (1 - momentum) * new for old, new in zip(r, slopes)]
        away, slopes = gradient(adversary, forget_texts)
        norm = torch.stack([g.norm() for g in slopes]).norm()
        for w, v, old, g in zip(descent.parameters, relearn.parameters, r, slopes):
            masked = -g * ((-g).sign() == old.sign())
            w.grad, v.grad = (retain * old + lr / norm * masked).to(w.dtype), g.to(v.dtype)
        descent.update()
        relearn.update()
        log.append([away, back])
    return model, log


METHODS["mudman"] = Method("MUDMAN", grid(lr=(1, 2, 4, 8), retain=(1e-3, 1e-2)), train=train_mudman, needs_sae=False,
                           usual={"loss_on": "answer", "retain": 1e-3}, steps={"tiny": 60, "": 100}, lr={"": 0.1},
                           log=NLL_LOG)  # fmt: skip


# ------------------------------------------------- LoRA on the residual stream: circuit breakers and CRISP, then UNDO
def linear_modules(model, layers: list[int]) -> list[str]:
    """Names of all matrices of attention and MLP in these layers."""
    inside = {id(module) for layer in layers for module in decoder_layers(model)[layer].modules()}
    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if id(module) in inside and isinstance(module, kinds)]


def with_lora(model, names: list[str], seed: int, lora_dropout=0.05, **options):
    """The model with LoRA on modules of these names, and the parameters that train; options: of LoraConfig."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(lora_dropout=lora_dropout, target_modules=names, **options))
    for name, module in adapted.named_modules():  # the adapter's dropout, and none of the model's own
        module.training = "lora_dropout" in name
    return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def streams(adapted, windows: list[Window], tokenizer) -> tuple[tuple, tuple, torch.Tensor]:
    """Residual streams without LoRA and with it, [layer + 1] behind a layer, [0] the embeddings, [-1] behind the final
    norm; and the (batch, pos) mask of tokens that are not special."""
    ids = padded([ids for ids, _ in windows], tokenizer, adapted.device)
    with torch.no_grad(), adapted.disable_adapter():
        before = adapted(ids, use_cache=False, output_hidden_states=True).hidden_states
    return before, adapted(ids, use_cache=False, output_hidden_states=True).hidden_states, not_special(ids, tokenizer)


def rerouted(before, now, counted: torch.Tensor) -> torch.Tensor:
    """Circuit breakers' forgetting term, mean relu(cosine(now, before)): 0 where the residual stream (layers, batch,
    pos, d_model) of a counted token is at right angles to the one before training."""
    return torch.relu(F.cosine_similarity(wide(now), wide(before), dim=-1))[:, counted].mean()


def held(before, now, counted: torch.Tensor) -> torch.Tensor:
    """Circuit breakers' retain term, mean ||now - before||_2 over layers and counted tokens; shapes as above."""
    return (wide(now) - wide(before)).norm(dim=-1)[:, counted].mean()


def train_circuit_breakers(training: Training, *, steps: int, lr: float, retain: float) -> tuple:
    """Circuit breakers by representation rerouting (Zou et al., arXiv 2406.04313; github.com/GraySwanAI/
    circuit-breakers): LoRA training on, at step t of T,

        10 (1 - t / 2T) rerouted(forget text) + retain 10 (t / 2T) held(retain text)

    The first is read at what enters layers 10 and 20 of 32, or as deep, the second at the embeddings and behind all
    layers up to the deeper of the two, which LoRA adapts. Differs from the release, which has `retain` 1: LoRA's second
    matrices start a thousandth from 0, where the cosine, at its peak, has no gradient (bfloat16's rounding gives it one
    there); BOS and padding are left out of both means; four texts a step, not sixteen; no final norm follows the last
    layer that is read."""
    model, tokenizer = training.load(), training.tokenizer
    n = len(decoder_layers(model))
    first, last = (round(n * layer / 32) for layer in (10, 20))
    adapted, trained = with_lora(
        model, linear_modules(model, range(min(last + 1, n))), training.seed, r=16, lora_alpha=16
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    adam, log = Fp32AdamW(trained, lr, clip=1.0, weight_decay=0.0), []
    batches = training.batches(steps, "circuit breakers", [training.forget], training.retain)
    for number, (forget_texts, retain_texts) in enumerate(batches):
        before, now, counted = streams(adapted, forget_texts, tokenizer)
        away = rerouted(*(torch.stack([h[first], h[last]]) for h in (before, now)), counted)
        before, now, counted = streams(adapted, retain_texts, tokenizer)
        back = held(*(torch.stack(h[: last + 2]) for h in (before, now)), counted)
        share = (number + 1) / (2 * steps)
        adam.step(10 * (1 - share) * away + retain * 10 * share * back)
        log.append([away.item(), back.item()])
    return adapted.merge_and_unload().eval(), log


METHODS["circuit-breakers"] = Method(
    "circuit breakers", grid(lr=(0.5, 0.7, 1, 1.4), retain=(0.3, 1)), train=train_circuit_breakers, needs_sae=False,
    usual={"retain": 1}, steps={"tiny": 40, "": 150}, lr={"tiny": 1.6e-2, "": 1e-4},
    log=("forget text: cosine to what it was", "retain text: distance from what it was"))  # fmt: skip


def salient(forget: Rates, retain: Rates, k: int, rho: float = 3.0) -> list[int]:
    """CRISP's k features: of the 10 k whose rate on forget tokens exceeds that on retain tokens most, the first whose
    activation summed over the forget tokens is at least rho times 1 plus that over as many retain tokens."""
    strength = forget.total / (retain.total * forget.n_tokens / retain.n_tokens + 1)
    candidates = (forget.rate - retain.rate).sort(descending=True, stable=True).indices[: 10 * k].tolist()
    return [i for i in candidates if strength[i] >= rho][:k]


def crisp_forget(sae, features: list[int], before, now, counted, pull: float) -> torch.Tensor:
    """CRISP's forgetting term at one layer, as in its release: the mean of the positive among

        JumpReLU(pre_i + |pull * mean over all features of pre|)

    over the features and counted tokens, pre being the SAE's encoder output before its nonlinearity; what follows the
    + is there only where the feature was active before training. The paper's a_i + lambda c_t (eq. 9) has no floor.
    before, now: residual stream (batch, pos, d_model). Raises UserError for SAEs of another kind."""
    if sae.cfg.architecture() not in ("standard", "jumprelu") or sae.cfg.normalize_activations != "none":
        raise UserError(f"{sae.source}: CRISP needs a standard or JumpReLU SAE without normalisation")
    latents = Latents(sae, features)
    x = now.to(sae.dtype) - (sae.b_dec if sae.cfg.apply_b_dec_to_input else 0)
    pre, mean = x @ latents.W_enc + sae.b_enc[features], x @ sae.W_enc.mean(1) + sae.b_enc.mean()
    pre = torch.where(latents.encode(before)[0] > 0, pre + (pull * mean).abs()[..., None], pre)
    threshold = sae.threshold[features] if sae.cfg.architecture() == "jumprelu" else 0.0
    active = (pre > threshold) & (pre > 0) & counted[..., None]
    return pre[active].mean() if active.any() else 0 * pre.sum()


def distance(before: torch.Tensor, now: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean square of now - before, (..., batch, pos, d_model), with other tokens as 0, as in CRISP's release."""
    return ((wide(now) - wide(before)) * counted[..., None]).square().mean()


def crisp_adapts(layers: list[int]) -> list[int]:
    """The layers that CRISP trains: from the one before the first SAE's to the middle of the SAEs' layers, which is the
    release's 3 to 9 for the paper's SAEs behind 4 to 14 of Gemma-2-2B."""
    return list(range(max(0, min(layers) - 1), (min(layers) + max(layers)) // 2 + 1))


def train_crisp(training: Training, *, layers: list[int], k: int, alpha, pull, steps, lr) -> tuple:
    """CRISP (Ashuach et al., arXiv 2508.13650; github.com/tomerashuach/CRISP): LoRA training that silences features.

    alpha L_unl + (1 - alpha) (L_ret + 0.01 L_coh): the mean of crisp_forget over the SAEs' layers; the distance of
    retain text's residual stream there from the one before training; the same behind the final norm. Differs from the
    release: SAEs are read at their own hook point, not at the input of the layer that they are named by; L_coh is on
    Wikitext, not on 20 curated sentences; four texts a step, not one. Raises UserError for an SAE behind the last
    layer, and if no feature is salient."""
    model, tokenizer = training.load(), training.tokenizer
    stats = {at.edited_layer: at for at in map(training.stats, layers)}  # by the layer whose output the SAE reads
    features = {layer: salient(*at.rates, k) for layer, at in stats.items()}
    if max(stats) == len(decoder_layers(model)) - 1:
        raise UserError(f"CRISP reads SAEs behind layers 0 to {max(stats) - 1}: layer {max(stats)} is the last")
    if not any(features.values()):
        raise UserError("CRISP: no feature is three times as active on forget text as on retain text")
    adapted, trained = with_lora(model, linear_modules(model, crisp_adapts(stats)), training.seed, r=4, lora_alpha=8)
    adam, log = Fp32AdamW(trained, lr, amsgrad=True), []
    sources = [training.forget], training.retain, training.retain[:1]
    for forget_texts, retain_texts, coherent_texts in training.batches(steps, "CRISP", *sources):
        before, now, counted = streams(adapted, forget_texts, tokenizer)
        terms = [crisp_forget(stats[layer].sae, ids, before[layer + 1], now[layer + 1], counted, pull)
                 for layer, ids in features.items() if ids]  # fmt: skip
        away = torch.stack(terms).mean()
        before, now, counted = streams(adapted, retain_texts, tokenizer)
        back = torch.stack([distance(before[layer + 1], now[layer + 1], counted) for layer in stats]).mean()
        before, now, counted = streams(adapted, coherent_texts, tokenizer)
        adam.step(alpha * away + (1 - alpha) * (back + 0.01 * distance(before[-1], now[-1], counted)))
        log.append([away.item(), back.item()])
    return adapted.merge_and_unload().eval(), log


# Layers whose SAEs it reads, Gemma-2's are the paper's; None: the one that is asked for
CRISP_LAYERS = {"tiny": [3, 5, 7, 9], "gemma-2-2b-it": [4, 6, 8, 10, 12, 14], "": None}
METHODS["crisp"] = Method(
    "CRISP", grid(lr=(0.5, 1), k=(30,), alpha=(0.01, 0.1), pull=(5, 30)), train=train_crisp,
    usual={"layers": CRISP_LAYERS, "k": 30, "alpha": 0.1, "pull": 5}, steps={"": 60}, lr={"tiny": 1.6e-2, "": 4e-5},
    log=("active features on forget text, L_unl", "squared distance of retain text, L_ret"))  # fmt: skip


@torch.no_grad()
def corrupt(model, alpha: float, beta: float, seed: int) -> None:
    """UNDO's noise, in place: w <- (1 - alpha) w + alpha beta n; n is Xavier-uniform for matrices, 0 for vectors."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.zeros_like(parameter)
        if parameter.ndim > 1:
            torch.nn.init.xavier_uniform_(noise)
        parameter.copy_((1 - alpha) * parameter + alpha * beta * noise)


def train_undo(training: Training, *, layers: list[int], alpha: float, beta: float, steps: int, lr: float) -> tuple:
    """UNDO, Unlearn-Noise-Distill-on-Outputs (Lee et al., arXiv 2506.06278; github.com/AddieFoote/
    distillation-robustify-unlearning): a copy of an unlearned model, the teacher, is `corrupt`ed and trained to say
    what the teacher says, by KL(teacher || student) per token of forget and retain text. The teacher is CRISP's, as
    usual, with the SAEs of `layers`. Differs from the release (alpha 0.25, beta 0 on WMDP, 0.1 to 0.7 and 0.1 on
    languages): the rate falls linearly to 0, not by a cosine to a tenth after 50 steps of warm-up; BOS is no target;
    and half of a step's texts are forget texts, where its WMDP runs have general text."""
    if (key := ("UNDO's teacher", *layers)) not in training.cache:
        setting = settings_of(METHODS["crisp"], {"layers": layers}, training.model_name)
        training.cache[key] = train_crisp(training, **setting)[0].requires_grad_(False)
    teacher = training.cache[key]
    student = deepcopy(teacher).requires_grad_(True)
    corrupt(student, alpha, beta, training.seed)
    adam, log = Fp32AdamW(student.parameters(), lr, clip=1.0, steps=steps, weight_decay=0.0), []
    for forget_texts, retain_texts in training.batches(steps, "UNDO", [training.forget], training.retain):
        ids, targets = target_mask(forget_texts + retain_texts, training.tokenizer, teacher.device, "text")
        with torch.no_grad():
            taught = wide(teacher(ids, use_cache=False).logits[:, :-1]).log_softmax(-1)
        said = wide(student(ids, use_cache=False).logits[:, :-1]).log_softmax(-1)
        losses = F.kl_div(said, taught, reduction="none", log_target=True).sum(-1)
        targets, n = targets[:, 1:], len(forget_texts)
        adam.step(losses[targets].mean())
        log.append([losses[texts][targets[texts]].mean().item() for texts in (slice(n), slice(n, None))])
    return student, log


METHODS["undo"] = Method(
    "UNDO", grid(lr=(0.25, 1), alpha=(0.05, 0.1, 0.25, 0.5), beta=(0.1,)), train=train_undo,
    usual={"layers": CRISP_LAYERS, "alpha": 0.25, "beta": 0.1}, steps={"tiny": 60, "": 3000},
    lr={"tiny": 8e-4, "": 2e-5}, log=("forget text, forward KL per token", "retain text, forward KL per token"),
)  # fmt: skip


# --------------------------------------------- RepSelect: one gradient, less what it shares with everything else
def collapse(gradient: torch.Tensor, vectors: torch.Tensor, sizes: torch.Tensor, hard: bool) -> torch.Tensor:
    """G - (G V - G V / s) V^T, s = sizes / min(sizes): of each principal direction, column of V (n, q), the s-th part
    is left; hard: nothing. gradient: (m, n); sizes: (q,) singular values, those that are rounding noise left out."""
    known = sizes > 1e-5 * sizes.max()
    if not known.any():
        return gradient  # 0
    vectors, sizes = vectors[:, known], sizes[known]
    along = gradient @ vectors
    return gradient - (along if hard else along - along / (sizes / sizes.min())) @ vectors.T


@torch.no_grad()
def mean_kl(model, texts: list[tuple], matrices: list, before: list) -> float:
    """KL(before || now) in nats, a mean over the targets of batches (ids, targets), as of target_mask; before: the
    values that the model's matrices had. Each batch is run twice, as log-probabilities of all would take gigabytes."""
    total = 0.0
    for ids, targets in texts:
        parts = []
        for values in (before, [matrix.data for matrix in matrices]):
            with replaced(matrices, values):
                logits = model(ids, use_cache=False).logits[:, :-1]
            parts.append(wide(logits[targets[:, 1:]]).log_softmax(-1))
        total += F.kl_div(parts[1], parts[0], reduction="sum", log_target=True).item()
    return total / sum(targets[:, 1:].sum().item() for _, targets in texts)


def furthest(kl_at: Callable, budget: float, step: float) -> float:
    """The step at which kl_at(step) lies between 95 and 100% of the budget, tried first at `step`, then where it would
    lie if it grew as the step's square; after 30 tries the longest that stays within it, and is tried once more. Raises
    UserError if none does."""
    low, high = 0.0, math.inf
    for _ in range(30):
        kl = kl_at(step)
        if 0.95 * budget <= kl <= budget:
            return step
        low, high = (step, high) if kl < budget else (low, step)  # NaN is too far
        ahead = step * (0.975 * budget / kl) ** 0.5 if kl > 0 else step * 8
        step = ahead if low < ahead < high else (low * high) ** 0.5 if low and high < math.inf else step / 8
    if low > 0 and high < math.inf:  # it jumps, as in bfloat16
        kl_at(low)
        return low
    raise UserError(f"RepSelect: no step changes retain text by a KL of {budget:g} nats")


def train_repselect(
    training: Training, *, q: int | None, kl: float, steps: int, lr: float, loss_on="answer", hard=False
):
    """RepSelect (Sondej et al., arXiv 2606.17168; github.com/filyp/RepSelect): one long step up the forget loss, along
    its gradient less the directions in which that is large, as they are shared with other text.

    1. LoRA (r 8) on the MLPs' matrices W: `steps` batches of gradient descent on NLL_f, of rate `lr`.
    2. With LoRA on, G = the sum over as many batches of the gradient of -NLL_f with respect to W.
    3. Without LoRA, U, s, V = the q largest singular values of G: `collapse` with V, then of the transpose with U.
    4. W <- W - step G, as far as retain text's KL(before || after) per token stays within `kl`.

    q None: an eighth of the model's width. The release has q 512 on models 2,048 to 4,096 wide, kl 0.01 and lr 0.01,
    swept from 0.005 to 0.5. Differs from it: singular values below 1e-5 of the largest are left out, as few forget
    texts leave the last layers few; the step is the longest there is, as in its RepSelectAdaptive, where its main runs
    add G times a swept rate until an epoch exceeds kl; the KL is on 128 windows of the retain set; G is summed in fp32;
    a batch has four texts, not eight; NLL_f is on answers, unless loss_on says otherwise. Raises UserError for a family
    whose MLPs are not known by name, and for a q that leaves no direction."""
    model, tokenizer = training.load(), training.tokenizer
    width = model.config.get_text_config().hidden_size
    q = q or max(1, width // 8)
    if q >= width:
        raise UserError(f"RepSelect: q {q} leaves none of the {width} directions")
    layers = range(len(decoder_layers(model)))
    down_projections(model, max(layers))  # refuses an unknown family
    names = [name for name in linear_modules(model, layers) if ".mlp." in name]
    adapted, trained = with_lora(model, names, training.seed, lora_dropout=0.0)
    matrices = [adapted.get_submodule(f"base_model.model.{name}").base_layer.weight for name in names]
    descent, log = Fp32AdamW(trained, lr, kind=torch.optim.SGD), []
    for (texts,) in training.batches(steps, "RepSelect, LoRA", [training.forget]):
        loss = text_nll(adapted, texts, tokenizer, loss_on).mean
        descent.step(loss)
        log.append([loss.item()])
    adapted.requires_grad_(False)
    gradients = [torch.zeros_like(wide(matrix.requires_grad_(True))) for matrix in matrices]
    for (texts,) in training.batches(steps, "RepSelect, gradient", [training.forget]):
        loss = finite(-text_nll(adapted, texts, tokenizer, loss_on).mean)
        for g, part in zip(gradients, torch.autograd.grad(loss, matrices)):
            g += part
    model, windows = adapted.unload().requires_grad_(False), training.retain[0][:128]
    for at, g in enumerate(gradients):
        u, sizes, v = torch.svd_lowrank(g, min(q, *g.shape))
        gradients[at] = collapse(collapse(g, v, sizes, hard).T, u, sizes, hard).T
    parts = [windows[start : start + BATCH] for start in range(0, len(windows), BATCH)]
    texts = [target_mask(part, tokenizer, model.device, "text") for part in parts]
    before = [matrix.detach().clone() for matrix in matrices]

    def kl_at(step):
        for matrix, then, g in zip(matrices, before, gradients):
            matrix.data.copy_(wide(then) - step * g)
        return mean_kl(model, texts, matrices, before)

    of_weights, of_step = (torch.stack([part.norm() for part in parts]).norm().item() for parts in (before, gradients))
    furthest(kl_at, kl, 0.01 * of_weights / of_step)
    return model, log


by_repselect = partial(
    Method, grid=grid(lr=(0.3, 1), kl=(0.01, 0.03, 0.05, 0.1)), needs_sae=False,
    usual={"loss_on": "answer", "q": None, "kl": 0.01}, steps={"tiny": 120, "": 300},
    lr={"tiny": 1.0, "": 0.01}, log=("forget text with LoRA, nats per token",),
)  # fmt: skip
METHODS["repselect"] = by_repselect("RepSelect", train=train_repselect)
METHODS["repselect-hard"] = by_repselect("RepSelect, hard", train=partial(train_repselect, hard=True))


# ------------------------------------------------------------------------ RMU: misdirect the residual stream
# What a family calls the matrix by which an MLP writes to the residual stream. By name: the one at place 6 of a block's
# parameters, the release's param_ids, is another matrix in Qwen2, Qwen3, Gemma-3, OLMo2, GPT-2 and GPT-NeoX
DOWN_PROJECTIONS = ("mlp.down_proj.weight", "mlp.c_proj.weight", "mlp.dense_4h_to_h.weight")


def rmu_loss(forget, target, retain, frozen, forget_mask, retain_mask, alpha: float) -> tuple:
    """(forget loss, alpha times retain loss): mean squared distance over dimensions and the masks' (batch, pos) tokens
    of the residual stream (batch, pos, d_model) to `target`, and of the retain text's to `frozen`, before training."""
    return (forget - target).square()[forget_mask].mean(), alpha * (retain - frozen).square()[retain_mask].mean()


def down_projections(model, layer: int) -> dict[str, torch.nn.Parameter]:
    """{name: matrix} of the layer and the two before it. Raises UserError for an unknown family or layer."""
    blocks, numbers = decoder_layers(model), range(max(0, layer - 2), layer + 1)
    if not 0 <= layer < len(blocks):
        raise UserError(f"layer {layer}: the model has layers 0 to {len(blocks) - 1}")
    found = {f"layer {number} {name}": matrix for number in numbers
             for name, matrix in blocks[number].named_parameters() if name in DOWN_PROJECTIONS}  # fmt: skip
    if len(found) != len(numbers):
        raise UserError(f"{type(model).__name__}: no down-projection known by name in layers {numbers[0]} to {layer}")
    return found


def control_vector(d_model: int, seed: int, device) -> torch.Tensor:
    """Uniform on [0, 1) in every dimension, of length 1, as in the release: all its entries are positive."""
    u = torch.rand(d_model, generator=torch.Generator().manual_seed(seed))
    return (u / u.norm()).to(device)


def train_rmu(training: Training, *, layer, multiple, alpha, steps, lr, batch=BATCH, adaptive=False) -> tuple:
    """RMU, Representation Misdirection for Unlearning (Li et al., arXiv 2403.03218; github.com/centerforaisafety/wmdp):
    the residual stream of forget text behind the layer is pushed to a fixed random direction, that of retain text is
    held where it was; only the down-projections of the layer and the two before it train.

    How far it is pushed: `multiple` times the mean norm of the first forget batch, as in the release of Adaptive RMU
    (github.com/RebelsNLU-jaist/llm-unlearning, multiple 5); RMU's own takes a number, which does nothing on a model of
    another scale. adaptive: each token by `multiple` times its own norm before training, as in the paper on Adaptive
    RMU (Dang et al., arXiv 2408.06223). Differs from the releases: they average over BOS and padding too, here only
    counted tokens are, in the norms as well (BOS has a norm of its own, and begins retain text alike); they train on
    two topics in turn, each with a control vector, and take texts once, in their corpus's order."""
    model, tokenizer = training.load(), training.tokenizer
    matrices = [matrix.requires_grad_(True) for matrix in down_projections(model.requires_grad_(False), layer).values()]
    originals = [matrix.detach().clone() for matrix in matrices]  # a frozen copy of the model at the price of three
    u = control_vector(model.config.get_text_config().hidden_size, training.seed, model.device)
    forget, retain_sets = training.picking

    def stream(ids):  # in fp32, as bfloat16 would round the squares
        return wide(residual_stream(model, ids, layer))

    adam, log, push = Fp32AdamW(matrices, lr), [], None
    with token_mask(model, tokenizer) as mask:
        for forget_texts, retain_texts in training.batches(steps, "RMU", [forget], retain_sets, size=batch):
            ids = padded(forget_texts, tokenizer, model.device)
            if adaptive or push is None:
                with torch.no_grad(), replaced(matrices, originals):
                    norms = stream(ids).norm(dim=-1, keepdim=True)  # (batch, pos, 1)
                push = multiple * (norms if adaptive else norms[mask.counted].mean().item())
            h_forget, forget_mask = stream(ids), mask.counted
            ids = padded(retain_texts, tokenizer, model.device)
            with torch.no_grad(), replaced(matrices, originals):
                frozen = stream(ids)
            target = (push * u.to(h_forget.dtype)).expand_as(h_forget)
            away, back = rmu_loss(h_forget, target, stream(ids), frozen, forget_mask, mask.counted, alpha)
            adam.step(away + back)
            cosine = torch.cosine_similarity(h_forget.detach(), u, dim=-1)[forget_mask].mean()
            log.append([away.item(), back.item(), cosine.item()])
    return model, log


# zephyr: the CAIS release, c 6.5 over a norm of about 2.8 there; every other one of its 150 steps was on cyber.
# Elsewhere gemma-2-2b-it's: c 400 over a norm of about 92, the best of AMindToThink/sae_jailbreak_unlearning's runs
# (WMDP-Bio 64.9 to 30.9). tiny: the grid's choice; layer, steps and rate that of 21 trial runs at layers 3 to 9 with
# 100 to 600 steps and rates of 1e-3 to 4e-3, by the tuning half too
ZEPHYR = "HuggingFaceH4/zephyr-7b-beta"
by_rmu = partial(
    Method, grid=grid(multiple=(2.0, 4.0, 8.0, 16.0), alpha=(10.0, 30.0)), needs_sae=False,
    usual={"layer": {"tiny": 7, ZEPHYR: 7, "": 3}, "multiple": {"tiny": 8.0, ZEPHYR: 2.3, "": 4.3},
           "alpha": {"tiny": 10.0, ZEPHYR: 1200.0, "": 100.0}, "batch": {"tiny": 4, ZEPHYR: 4, "": 3}},
    steps={ZEPHYR: 75, "": 300}, lr={"tiny": 4e-3, "": 5e-5},
    log=("forget text: to the control vector", "retain sets: to what it was, times alpha", "forget text: cosine to it"),
)  # fmt: skip
METHODS["rmu"] = by_rmu("RMU, first batch's norm", train=train_rmu)
METHODS["adaptive-rmu"] = by_rmu("Adaptive RMU, each token's norm", train=partial(train_rmu, adaptive=True))
