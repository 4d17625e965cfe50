"""
What scripts that train share: texts and batches of them, next-token losses, AdamW in fp32.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from data import (
    LETTERS,
    RETAIN_TOKENS,
    UserError,
    encode_answer,
    halves,
    load_corpus,
    load_rows,
    padded,
    prompt,
    token_windows,
)
from edits import decoder_layers

QUESTION_TOKENS = 512  # of a question that is trained on with its answer, open-unlearning's


def passes(texts: list, n: int, rng: random.Random) -> Iterator[list]:
    """Batches of n texts without end: pass after pass in a new random order, each text at most once a pass.

    A remainder too short for a batch is left out of its pass; fewer than n texts are one batch.
    """
    n = min(n, len(texts))
    while True:
        order = rng.sample(texts, len(texts))
        yield from (order[start : start + n] for start in range(0, len(order) - n + 1, n))


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Nll:
    """Of a batch of texts: summed next-token losses in nats, (batch,), and number of targets, (batch,)."""

    nats: torch.Tensor
    n: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:  # per token, over all texts
        return self.nats.sum() / self.n.sum()


def nll(model, ids: torch.Tensor, targets: torch.Tensor) -> Nll:
    """Next-token losses of ids (batch, pos) where `targets`, (batch, pos) bool, marks the token to be predicted."""
    logits = wide(model(ids, use_cache=False).logits[:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return Nll((losses * targets[:, 1:]).sum(1), targets[:, 1:].sum(1))


def target_mask(windows: list[tuple[list[int], int]], tokenizer, special: torch.Tensor, device) -> tuple:
    """Ids (batch, pos) of (ids, start) windows, and which are targets: from `start` on all that are not special."""
    ids = padded([one for one, _ in windows], tokenizer, device)
    starts = torch.tensor([start for _, start in windows], device=ids.device)
    behind = torch.arange(ids.shape[1], device=ids.device) >= starts[:, None]
    return ids, behind & ~torch.isin(ids, special.to(ids.device))


def text_nll(model, windows: list[tuple[list[int], int]], tokenizer, special: torch.Tensor) -> Nll:
    """`nll` of (ids, start) windows, with the targets of `target_mask`."""
    return nll(model, *target_mask(windows, tokenizer, special, model.device))


def finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss. Raises UserError where it is no number."""
    if not torch.isfinite(loss):
        raise UserError("the loss is no number any more: a smaller --lr or a milder setting")
    return loss


class Master:
    """AdamW on fp32 copies of parameters that run in a smaller dtype: an update of less than a 256th of a bfloat16
    weight would be rounded away. Parameters in fp32 or fp64 are their own copies.

    optimizer: another class of torch.optim. clip: largest norm of the gradient. steps: over so many the rate goes down
    to 0 in a line, as Hugging Face's trainer has it by default; None: it stays. options: the optimizer's.
    """

    def __init__(
        self, parameters, lr: float, optimizer=torch.optim.AdamW, clip: float | None = None, steps: int | None = None,
        **options,
    ):  # fmt: skip
        self.parameters, self.clip = list(parameters), clip
        self.copies = [one if wide(one) is one else wide(one.detach()).requires_grad_(True) for one in self.parameters]
        self.optimizer = optimizer(self.copies, lr=lr, **options)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1 - n / steps if steps else 1.0)

    def step(self, loss: torch.Tensor) -> None:
        """One step down the loss. Raises UserError where it is no number."""
        self.backward(loss)
        self.update()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient to what the parameters have. Raises UserError where the loss is no number."""
        finite(loss).backward()

    def update(self) -> None:
        """One step along the parameters' gradients, which are empty then."""
        for copy, one in zip(self.copies, self.parameters):
            if copy is not one and one.grad is not None:
                copy.grad, one.grad = wide(one.grad), None
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.copies, self.clip)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for copy, one in zip(self.copies, self.parameters):
                if copy is not one:
                    one.copy_(copy)
        self.optimizer.zero_grad()


# --------------------------------------------------------------------------------------- what is trained on


def by_letter(row: dict) -> tuple[str, str]:
    """The prompt and the letter that answers it."""
    return prompt(row), LETTERS[row["answer"]]


def answer_window(tokenizer, asked: str, answer: str) -> tuple[list[int], int]:
    """(ids, place of the answer's first token) of a question and its answer, cut at the front to QUESTION_TOKENS: at
    the end, where open-unlearning cuts, is the answer. No EOS behind it: a prompt is no turn of a chat here."""
    ids, start = encode_answer(tokenizer, asked, answer)
    bos = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    dropped = max(0, len(ids) - QUESTION_TOKENS)
    return (bos + ids[dropped + len(bos) :], start - dropped) if dropped else (ids, start)


def training_windows(
    tokenizer, texts: dict, s, loss_on: str = "text", rows: list[dict] | None = None
) -> tuple[list, list[list]]:
    """What methods train on that need next tokens to predict: (ids, start) windows, the tokens from `start` on to be
    predicted; texts: load_benchmark's.

    Forget: the user's corpus, or the picking half's questions as they are asked, with their answers, and as prose; with
    `rows` these questions instead.
    Retain sets: Wikitext, and MMLU's development questions with their answers. loss_on "answer": of a question only
    the letter, or the answer in words, as open-unlearning labels its questions; a corpus and Wikitext have no
    answers, and count whole, as its pretraining texts do. "text": everything counts.
    """

    def whole(part, max_tokens=None):
        return [(ids, 1) for ids in token_windows(tokenizer, part, max_tokens=max_tokens)[0]]

    def asked(pairs):
        windows = [answer_window(tokenizer, *pair) for pair in pairs]
        return windows if loss_on == "answer" else [(ids, 1) for ids, _ in windows]

    corpus = [] if rows else load_corpus(s)[0]
    questions, _ = texts["quizzes"]["wmdp_bio"]
    picking = rows or [questions[i] for i in halves(questions, s.seed, s.pick_on)[0]]
    in_words = [(row["question"].strip(), row["choices"][row["answer"]]) for row in picking]
    development = load_rows("mmlu_dev", s.model, s.data)[0]
    forget = whole(corpus) if corpus else asked(map(by_letter, picking)) + asked(in_words)
    return forget, [whole(texts["retain"][0], RETAIN_TOKENS), asked(map(by_letter, development))]


# ---------------------------------------------------------------------------------------------- CRISP's


def distance(was: torch.Tensor, now: torch.Tensor, ordinary: torch.Tensor) -> torch.Tensor:
    """Mean square of now - was, (..., batch, pos, d_model); special tokens count as 0, as in CRISP's release."""
    return ((wide(now) - wide(was)) * ordinary[..., None]).square().mean()


def linear_modules(model, layers: list[int]) -> list[str]:
    """Names of all matrices of attention and MLP in these layers."""
    inside = {id(module) for layer in layers for module in decoder_layers(model)[layer].modules()}
    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if id(module) in inside and isinstance(module, kinds)]


def reach(layers: list[int]) -> list[int]:
    """The layers that CRISP adapts: from the one before the first SAE's to the middle of the SAEs' layers. These are
    the release's 3 to 9 for SAEs of 4 to 14, the paper's on Gemma-2-2B's 26 layers."""
    return list(range(max(0, min(layers) - 1), (min(layers) + max(layers)) // 2 + 1))
