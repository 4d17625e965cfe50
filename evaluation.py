"""
Measure what an ablation does: multiple choice and next-token loss for many ablations in one pass, and statistics.

A list of ablations at one hook point shares the layers below it. So the model runs once a batch: at the hook
point each prompt's residual stream is copied once for every ablation that changes it (equal edits share a copy, an
edit that changes nothing costs nothing), and the later layers run on the stack of copies.
"""

import itertools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from common import Latents, reconstruct, watch_tokens
from data import LETTERS, UserError, batches, encode_prompts, prompt, sample

CHANCE = 0.25
PERMUTATIONS = list(itertools.permutations(range(4)))  # the first is the order of the source

# ------------------------------------------------------------------------------- many ablations, one pass


@dataclass(frozen=True)
class Ablation:
    """One row of a table. method: its name; features and clamp as in common.ablate; or the bare reconstruction."""

    method: str
    features: tuple[int, ...] = ()
    clamp: float = 0.0
    reconstruct: bool = False

    def point(self, **scores) -> dict:
        """The record's entry for this row: method, setting, scores {data set: score}."""
        setting = {"n_features": len(self.features), "clamp": self.clamp, "features": list(self.features)}
        return {"method": self.method, "setting": setting if self.features else {}, "scores": scores}


def standard_rows(features: list[int], control: list[int], clamp: float) -> list[Ablation]:
    """The rows that every script shows beside each other; the first is what the others are compared with."""
    return [
        Ablation("none"),
        Ablation("sae-patched"),
        Ablation("sae-reconstruction", reconstruct=True),
        Ablation("sae-ablation", tuple(features), 0.0),
        Ablation("sae-ablation", tuple(features), clamp),
        Ablation("random-features", tuple(control), clamp),
    ]


class OnePass:
    """Runs a model on token ids (batch, pos) once for a list of ablations at one SAE's hook point.

    After each call `rows` (n_ablations, batch) says which row of the stack belongs to which ablation and prompt;
    the call returns the stack (n_rows, pos, d_model) that leaves the final norm, the unembedding to come.
    """

    def __init__(self, model, sae, ablations: list[Ablation]):
        self.model, self.sae, self.ablations = model, sae, ablations
        union = sorted({i for ablation in ablations for i in ablation.features})
        self.latents = Latents(sae, union)
        place = {feature: k for k, feature in enumerate(union)}
        self.columns = [torch.tensor([place[i] for i in a.features], dtype=torch.long) for a in ablations]
        self.head_checked = False

    @contextmanager
    def attached(self):
        """Hooks that edit and stack at the hook point, repeat later layers' per-row inputs, and keep the result."""
        layer = int(self.sae.hook_point.split(".")[1])
        with ExitStack() as stack:
            self.seen = stack.enter_context(watch_tokens(self.model))
            stack.enter_context(self.model.hooks(fwd_hooks=[(self.sae.hook_point, self.edit)]))
            for block in self.model.blocks[layer + 1 :]:
                handle = block.register_forward_pre_hook(self.repeat_inputs, with_kwargs=True)
                stack.callback(handle.remove)
            handle = self.model.unembed.register_forward_pre_hook(self.keep_result)
            stack.callback(handle.remove)
            yield self

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        self.rows = self.result = None
        logits = self.model(ids, use_cache=False)
        if self.rows is None:
            raise RuntimeError(f"the hook at {self.sae.hook_point} never fired: nothing was ablated")
        if not self.head_checked:  # some model families scale their logits; then our head would not be theirs
            if not torch.allclose(self.head(self.result[:1, :1]), logits[:1, :1].float(), atol=1e-3, rtol=1e-3):
                raise UserError("this model does something to its logits that evaluation.py does not know")
            self.head_checked = True
        return self.result

    def edit(self, h, hook):  # (batch, pos, d_model) -> (n_rows, pos, d_model)
        acts, scale = self.latents.encode(h)
        acts = acts * self.seen["ordinary"][..., None]
        active = (acts > 0).any(1)  # (batch, n_union)
        new, sources, known = [], [], {}
        rows = torch.empty(len(self.ablations), len(h), dtype=torch.long)
        for k, (ablation, columns) in enumerate(zip(self.ablations, self.columns)):
            columns = columns.to(h.device)
            for b in range(len(h)):
                # an edit is its clamp and the picked features that are active anywhere on the prompt
                firing = columns[active[b, columns]].sort().values
                key = (b, ablation.reconstruct, ablation.clamp, tuple(firing.tolist()))
                if not len(firing) and not ablation.reconstruct:
                    rows[k, b] = b
                    continue
                if key not in known:
                    known[key] = len(h) + len(new)
                    sources.append(b)
                    if ablation.reconstruct:
                        row = torch.where(self.seen["ordinary"][b, :, None], reconstruct(self.sae, h[b]), h[b])
                    else:
                        some = acts[b][:, firing]
                        change = torch.where(some > 0, ablation.clamp - some, 0) @ self.latents.W_dec[firing]
                        row = h[b] + change * (scale if isinstance(scale, float) else scale[b])
                    new.append(row.to(h.dtype))
                rows[k, b] = known[key]
        self.rows, self.batch = rows, len(h)
        self.source = torch.tensor([*range(len(h)), *sources], device=h.device)
        return torch.cat([h, torch.stack(new)]) if new else None

    def repeat_inputs(self, module, args, kwargs):
        """Attention masks and the like were made for the original batch: give each copy its prompt's."""

        if self.rows is None:
            raise RuntimeError(f"the hook at {self.sae.hook_point} never fired: nothing was ablated")

        def repeat(value):
            if isinstance(value, tuple):
                return tuple(map(repeat, value))
            per_row = torch.is_tensor(value) and value.ndim > 1 and len(value) == self.batch
            return value[self.source.to(value.device)] if per_row else value

        h, *rest = args  # already stacked
        return (h, *map(repeat, rest)), {name: repeat(value) for name, value in kwargs.items()}

    def keep_result(self, module, args):
        if self.result is not None:  # `head` is at work
            return None
        self.result = args[0]
        return args[0][:1, :1], *args[1:]  # the unembedding that the model goes on to is not what we need

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """(n, pos, d_model) after the final norm -> (n, pos, d_vocab) logits in fp32."""
        logits = self.model.unembed(h)
        cap = getattr(self.model.original_model.config, "final_logit_softcapping", None)
        return (torch.tanh(logits / cap) * cap if cap else logits).float()


@torch.inference_mode()
def score_letters(model, sae, prompts, letters, ablations, batch_size=16, desc=None) -> torch.Tensor:
    """Log-probability of each answer letter after each prompt: (n_ablations, n_prompts, 4), fp32, over the vocabulary.

    prompts: lists of ids; letters: the four letters' ids. Only the last position meets the unembedding.
    """
    out = torch.empty(len(ablations), len(prompts), 4)
    last = torch.tensor([len(row) - 1 for row in prompts])
    with OnePass(model, sae, ablations).attached() as run:
        for picked, ids in batches(prompts, batch_size, model.tokenizer, model.cfg.device, desc):
            h = run(ids)
            end = last[picked].to(h.device)[run.source]  # (n_rows,) last token of each row's prompt
            logits = run.head(h[torch.arange(len(h), device=h.device), end][:, None])[:, 0]
            scores = logits.log_softmax(-1)[:, letters].cpu()
            out[:, picked] = scores[run.rows]
    return out


@torch.inference_mode()
def score_loss(
    model, sae, windows, ablations, batch_size=16, desc=None, chunk=2**25
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed next-token loss of each window, (n_ablations, n_windows) in nats, fp64, and its targets (n_windows,).

    Special tokens are no targets. `chunk`: how many logits are held at a time.
    """
    nats = torch.empty(len(ablations), len(windows), dtype=torch.float64)
    targets = torch.empty(len(windows), dtype=torch.long)
    with OnePass(model, sae, ablations).attached() as run:
        for picked, ids in batches(windows, batch_size, model.tokenizer, model.cfg.device, desc):
            h = run(ids)
            real = run.seen["ordinary"][:, 1:]  # (batch, pos - 1): is position t + 1 a target
            keep = real[run.source]
            flat, goal = h[:, :-1][keep], ids[:, 1:][run.source][keep]
            losses = [
                F.cross_entropy(run.head(part[None])[0], wanted, reduction="none")
                for part, wanted in zip(*(x.split(max(1, chunk // model.cfg.d_vocab)) for x in (flat, goal)))
            ]
            per_row = torch.zeros(keep.shape, dtype=torch.float64, device=h.device)
            per_row[keep] = torch.cat(losses).double()
            nats[:, picked] = per_row.sum(1).cpu()[run.rows]
            targets[picked] = real.sum(1).cpu()
    return nats, targets


def robust_subset(model, sae, questions: list[dict], batch_size: int = 16, chat: bool = False) -> list[int]:
    """Positions of the questions that the unablated model answers right under all 24 orders of the options (SAEBench).

    A cascade: a question is asked no further order after its first wrong answer.
    """
    alive = list(range(len(questions)))
    for number, order in enumerate(PERMUTATIONS, 1):
        texts = [prompt(questions[i], order) for i in alive]
        if not texts:
            break
        rows, letters = encode_prompts(model.tokenizer, texts, chat)
        scores = score_letters(model, sae, rows, letters, [Ablation("none")], batch_size, f"order {number} of 24")
        chosen = scores[0].argmax(-1).tolist()
        alive = [i for i, letter in zip(alive, chosen) if order[letter] == questions[i]["answer"]]
    return alive


# --------------------------------------------------------------------------------------- statistics


def bootstrap(statistic, *samples, seed: int = 0) -> tuple[float, float]:
    """95% percentile bootstrap interval of statistic(*samples), resampling the samples' entries together."""
    if len(samples[0]) < 2:
        return float("nan"), float("nan")
    result = stats.bootstrap(
        samples, statistic, n_resamples=2000, paired=True, vectorized=True, method="percentile",
        rng=np.random.default_rng(seed), batch=200,
    )  # fmt: skip
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def accuracy_score(right: np.ndarray, letters: str, clean: np.ndarray | None = None, seed: int = 0) -> dict:
    """Accuracy with Wilson 95% interval; against `clean` (the unablated model's right answers, same questions) the
    paired change with bootstrap interval and the exact McNemar p value. right: (n,) bool."""
    n = len(right)
    interval = stats.binomtest(int(right.sum()), n).proportion_ci(method="wilson")
    score = {"accuracy": right.mean().item(), "low": float(interval.low), "high": float(interval.high), "n": n,
             "chance": CHANCE, "letters": letters}  # fmt: skip
    if clean is not None:
        change = right.astype(float) - clean
        lost, won = int((change < 0).sum()), int((change > 0).sum())
        score["change"] = change.mean().item()
        score["change_low"], score["change_high"] = bootstrap(np.mean, change, seed=seed)
        score["p_value"] = float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return score


def quiz_scores(scores: torch.Tensor, questions: list[dict], seed: int = 0) -> list[dict]:
    """One score per ablation from log-probabilities (n_ablations, n_questions, 4); the first ablation is the clean one.

    Where questions have subjects, each score also carries `subjects` with the same fields for each.
    """
    answers = np.array([row["answer"] for row in questions])
    chosen = scores.argmax(-1).numpy()  # (n_ablations, n_questions)
    subjects = sorted({row["subject"] for row in questions if "subject" in row})
    out = []
    for k, row in enumerate(chosen):

        def score(mask, row=row, k=k):
            right, letters = (row == answers)[mask], "".join(LETTERS[i] for i in row[mask])
            return accuracy_score(right, letters, (chosen[0] == answers)[mask] if k else None, seed)

        out.append(score(np.ones(len(answers), dtype=bool)))
        if subjects:
            member = np.array([row["subject"] for row in questions])
            out[-1]["subjects"] = {name: score(member == name) for name in subjects}
    return out


def score_quiz(model, sae, title: str, questions: list[dict], indices: list[int], ablations, s) -> tuple[list, list]:
    """One score per ablation, and the indices of the questions scored. s: the settings.

    Of `indices`, --limit keeps a seeded sample, and --robust those right under all orders of the options.
    """
    indices, chat = sample(indices, s.limit, s.seed), s.prompt == "chat"
    if s.robust:
        indices = [indices[i] for i in robust_subset(model, sae, [questions[i] for i in indices], s.batch_size, chat)]
    asked = [questions[i] for i in indices]
    if not asked:
        raise UserError("no question is left to score: take away --robust, or give more questions")
    prompts, letters = encode_prompts(model.tokenizer, [prompt(row) for row in asked], chat)
    log_probs = score_letters(model, sae, prompts, letters, ablations, s.batch_size, title)
    return quiz_scores(log_probs, asked, s.seed), indices


def loss_scores(nats: torch.Tensor, targets: torch.Tensor, sources: list[int], seed: int = 0) -> list[dict]:
    """One score per ablation: nats per token, and for all but the first (the clean one) the loss added, with a
    bootstrap over documents. nats: (n_ablations, n_windows); targets: (n_windows,); sources: each window's document."""
    documents = np.unique(sources, return_inverse=True)[1]
    tokens = np.bincount(documents, targets.numpy())
    if not tokens.all():
        raise UserError("a document has no token to predict: leave it out of the data")
    per_document = [np.bincount(documents, row.numpy()) for row in nats]

    def per_token(total, count, axis=-1):
        return total.sum(axis) / count.sum(axis)

    out = []
    for k, total in enumerate(per_document):
        score = {
            "nats_per_token": float(per_token(total, tokens)),
            "n_tokens": int(tokens.sum()),
            "n_documents": len(tokens),
        }
        if k:
            added = total - per_document[0]
            score["loss_added"] = float(per_token(added, tokens))
            score["loss_added_low"], score["loss_added_high"] = bootstrap(per_token, added, tokens, seed=seed)
        out.append(score)
    return out
