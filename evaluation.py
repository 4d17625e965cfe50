"""Measure what edits do to letters, answers in words, loss and open answers, with statistics; and measure on forget and
retain texts what edits are made of: firing rates, feature scores, directions."""

import itertools
import math
import re
import string
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import pandas
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from scipy import stats
from torch.nn.utils.rnn import pad_sequence

import data
import edits
from common import Rates, activation_ratio, firing_rates, largest, matched_random, pick_features, summed
from data import LETTERS, Dataset, UserError, batches, encode_prompts, prompt, refuse_long, special_ids
from edits import NONE, Edit, Latents, applied, chunks, layer_of, residual_stream
from engine import check_engine, each_edit, head

CHANCE = 0.25
KEEP = 0.99  # SAEBench: the share of the unablated MMLU accuracy that a setting must keep
LEAST_TOKENS = 1000  # behind a firing rate: with as many of Wikitext's 29 of tiny's 50 picks stay, with half as many 22
CANDIDATES, TRIED = 100, 8  # of measured_order: features of highest ratio, and how many are tried for each place
WRITTEN, BEGUN, BEGINNINGS = 64, 32, 32  # of `fluency`: tokens written; tokens of a text before them; prompts
SCORED_TOKENS = 20_000  # of OpenWebText, documents in order: enough for +-0.001 nats on a small change


# --------------------------------------------------------------------------------------------------- measures
@dataclass(frozen=True)
class Score:
    """A mean over n items with its 95% interval, and its paired change against the Measure's first row with its own.
    Fractions, not per cent; a single item has no interval (None). p: McNemar's, only of right and wrong items."""

    mean: float
    low: float | None
    high: float | None
    n: int
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    p: float | None = None


@dataclass(frozen=True, eq=False)
class Measure:
    """A value for each row (an edit, a model) and item (a question, a document); rows are compared with the first.
    values (n_rows, n_items): bool where right or wrong, else float. weights (n_items,): a document's tokens, over which
    a value is a sum and the mean per token. groups: items' subjects; answers: a row's letters; seed: bootstrap's."""

    name: str
    title: str
    unit: str
    rows: tuple[str, ...]
    values: np.ndarray = field(repr=False)
    chance: float | None = None
    weights: np.ndarray | None = field(default=None, repr=False)
    groups: tuple[str, ...] | None = field(default=None, repr=False)
    answers: tuple[str, ...] | None = field(default=None, repr=False)
    seed: int = 0

    def scores(self, only=slice(None)) -> dict[str, Score]:
        """The Score of each row; only: of these items, any index of numpy arrays."""
        return {name: self._score(k, only) for k, name in enumerate(self.rows)}

    def __getitem__(self, row: str) -> Score:
        """The Score of a row over all items. Raises KeyError for a name that no row has."""
        if row not in self.rows:
            raise KeyError(f"no row {row!r}; there are {', '.join(self.rows)}")
        return self._score(self.rows.index(row))

    def _score(self, k: int, only=slice(None)) -> Score:
        values, first = self.values[k, only], self.values[0, only]
        if values.dtype == bool and self.weights is None:
            return share(values, first if k else None)
        tokens = None if self.weights is None else self.weights[only]
        change = average(values - first, tokens, self.seed) if k else ()
        return Score(*average(values, tokens, self.seed), len(values), *change)

    def by_group(self) -> dict[str, dict[str, Score]]:
        """{group: {row: Score}}; {} where items have no group."""
        member = np.array(self.groups or ())
        return {str(group): self.scores(member == group) for group in np.unique(member)}

    def q_values(self) -> dict[str, dict[str, float]]:
        """{group: {row: q}} for every row but the first. If every group with q < 0.05 is called changed, at most 5% of
        these calls are expected to be wrong (Benjamini and Hochberg, J R Stat Soc B 57:289, 1995)."""
        groups = self.by_group()
        q = {row: stats.false_discovery_control([group[row].p for group in groups.values()]) for row in self.rows[1:]}
        return {group: {row: float(q[row][k]) for row in q} for k, group in enumerate(groups)}

    def q_of_rows(self) -> dict[str, float]:
        """{row: q} for every row but the first, as `q_values` over many rows: a feature each, say. p of values that are
        not right or wrong is that of Student's paired test over the items (of documents, over their sums)."""
        before, p = self.values[0], [self[row].p for row in self.rows[1:]]
        if self.values.dtype != bool:  # there is no p of one item, nor of items that are all equal
            p = [stats.ttest_rel(values, before).pvalue if (values != before).any() and len(before) > 1 else 1.0
                 for values in self.values[1:]]  # fmt: skip
        return dict(zip(self.rows[1:], stats.false_discovery_control(p).tolist()))

    def select(self, rows) -> "Measure":
        """These rows alone, in this order: the others are compared with the first of them."""
        at = [self.rows.index(row) for row in rows]
        answers = self.answers and tuple(self.answers[k] for k in at)
        return replace(self, rows=tuple(rows), values=self.values[at], answers=answers)

    def table(self):
        """The Scores as a pandas DataFrame for notebooks, in the measure's unit: per cent where that is "%"."""
        table = pandas.DataFrame({name: vars(score) for name, score in self.scores().items()}).T.astype(float)
        if self.unit == "%":
            table[[name for name in table if name not in ("n", "p")]] *= 100
        return table.astype({"n": int}).dropna(axis=1, how="all").rename_axis(self.title)


def joined(measures: list[Measure]) -> Measure:
    """One Measure of all rows, from Measures of the same items. Raises ValueError where items differ or names recur."""
    first, rows = measures[0], tuple(row for measure in measures for row in measure.rows)
    alike = {(m.name, m.groups, m.values.shape[1], m.weights is None or tuple(m.weights)) for m in measures}
    if len(alike) > 1 or len(set(rows)) < len(rows):
        raise ValueError(f"not measures of the same items, or a name comes twice among the rows {', '.join(rows)}")
    answers = first.answers and tuple(row for measure in measures for row in measure.answers)
    return replace(first, rows=rows, values=np.concatenate([m.values for m in measures]), answers=answers)


def share(right: np.ndarray, before: np.ndarray | None = None) -> Score:
    """The share of (n,) bool that is right, by Wilson; its change against `before`, by Newcombe; McNemar's exact p."""
    n = len(right)
    score = right.mean().item(), *wilson(int(right.sum()), n), n
    if before is None:
        return Score(*score)
    both, won, lost = (int(pairs.sum()) for pairs in (right & before, right & ~before, ~right & before))
    p = float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return Score(*score, (won - lost) / n, *paired_interval(both, won, lost, n - both - won - lost), p)


def average(values: np.ndarray, tokens: np.ndarray | None, seed: int) -> tuple[float, float | None, float | None]:
    """Mean and 95% interval: Student's of (n,) values, a bootstrap's of sums over (n,) tokens, none of one value."""
    if tokens is not None:
        ends = bootstrap(lambda sums, n, axis=-1: sums.sum(axis) / n.sum(axis), values, tokens, seed=seed)
        return float(values.sum() / tokens.sum()), *ends
    mean, n = values.mean().item(), len(values)
    if n == 1:
        return mean, None, None
    reach = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5)
    return mean, mean - reach, mean + reach


def each_row(model, rows: dict, score) -> torch.Tensor:
    """(n_rows, ...): of the rows that are Edits score(model, edits), of every other model score(that model, [NONE])[0].
    Raises ValueError where the first row, with which the others are compared, is not an Edit."""
    edits = {name: row for name, row in rows.items() if isinstance(row, Edit)}
    if next(iter(rows)) not in edits:
        raise ValueError("the first row must be an edit of the model, as NONE")
    found = dict(zip(edits, score(model, list(edits.values()))))
    found |= {name: score(other, [NONE])[0] for name, other in rows.items() if name not in edits}
    return torch.stack([found[name] for name in rows])


def measure_of(dataset: Dataset, what: str, title: str, unit: str, rows: dict, values, **more) -> Measure:
    """The Measure DATASET/what or DATASET/tuning/what. more: its other fields; groups: subjects, if all have one."""
    tuning = dataset.half == "tuning"
    name, title = f"{dataset.name}/{'tuning/' * tuning}{what}", f"{dataset.title}{', tuning half' * tuning}, {title}"
    subjects = tuple(row.get("subject") for row in dataset.rows)
    more = {"groups": subjects if all(subjects) else None, "seed": dataset.seed, **more}
    return Measure(name, title, unit, tuple(rows), values, **more)


def right_answers(quiz: Dataset, what: str, title: str, rows: dict, values) -> Measure:
    """Is the option of the highest value, (n_rows, n_questions, 4), the right one?"""
    chosen, right = np.asarray(values).argmax(-1), np.array([row["answer"] for row in quiz.rows])
    answers = tuple("".join(LETTERS[i] for i in row) for row in chosen)
    return measure_of(quiz, what, title, "%", rows, chosen == right, chance=CHANCE, answers=answers)


def letters(model, quiz: Dataset, rows: dict, *, style="plain", prompts=None, batch_size=16) -> tuple[Measure, ...]:
    """Three Measures: whether the right letter is the likeliest; P(a letter), the four letters' probability together
    (if it is low the model does not answer with a letter at all); and P(right letter).

    rows: {name: an Edit of `model`, or another model}, the first an Edit. style: see data.encode_prompts; prompts: one
    per question (default: data.prompt's). A cloze quiz has no letters: its one Measure is that of `words`, with the
    questions in the form data.CLOZE. Raises ValueError as each_row does and UserError as score_letters does."""
    if quiz.is_cloze:
        return (words(model, quiz, rows, batch_size=batch_size, cloze=True),)
    texts = [prompt(row, style=style) for row in quiz.rows] if prompts is None else prompts
    log_probs = each_row(model, rows, lambda model, edits: score_letters(
        model, *encode_prompts(model.tokenizer, texts, style), edits, batch_size, quiz.title))  # fmt: skip
    p, right = np.exp(log_probs.double().numpy()), [row["answer"] for row in quiz.rows]
    probabilities = {"P(a letter)": p.sum(-1), "P(right letter)": p[:, np.arange(len(right)), right]}
    sure = [measure_of(quiz, what, what, "probability", rows, values) for what, values in probabilities.items()]
    return right_answers(quiz, "letters", "in letters", rows, log_probs), *sure


def words(model, quiz: Dataset, rows: dict, *, batch_size: int = 16, cloze: bool = False) -> Measure:
    """Whether the right option is the likeliest in words, per character. cloze: by data.CLOZE. Else as `letters`."""
    return words_and_nats(model, quiz, rows, batch_size=batch_size, cloze=cloze)[0]


def words_and_nats(model, quiz: Dataset, rows: dict, *, batch_size: int = 16, cloze: bool = False) -> tuple:
    """As `words`, and a Measure of the loss on the right option, in nats per character."""
    what, title, form = ("cloze", "as a cloze", data.CLOZE) if cloze else ("words", "in words", data.IN_WORDS)
    values = each_row(model, rows, lambda model, edits: score_words(model, quiz.rows, edits, batch_size,
                                                                    f"{quiz.title} {title}", form))  # fmt: skip
    right = [row["answer"] for row in quiz.rows]
    nats = -values.numpy()[:, np.arange(len(right)), right]
    return (right_answers(quiz, what, title, rows, values),
            measure_of(quiz, f"{what}/nats", f"right answer {title}", "nats per character", rows, nats))  # fmt: skip


def nats_of(probability: Measure) -> Measure:
    """-log of the P(right letter) of `letters`: it tells 0.01 from 0.0001, where accuracy sees two wrong answers."""
    name, title = f"{probability.name}/nats", probability.title.replace("P(right letter)", "right letter")
    return replace(probability, name=name, title=title, unit="nats", values=-np.log(probability.values))


def window_losses(model, texts: Dataset, rows: dict, *, batch_size: int = 16, limit: int | None = None) -> tuple:
    """The texts' first SCORED_TOKENS tokens in windows. Returns the next-token loss in nats summed over each window,
    (n_rows, n_windows); the windows; the index of each window's document; and how many targets each window has. rows,
    errors: as for `letters`, and ValueError for a row of another tokenizer; limit: of documents."""
    others = [row.tokenizer for row in rows.values() if not isinstance(row, Edit)]
    if any(tokenizer.get_vocab() != model.tokenizer.get_vocab() for tokenizer in others):
        raise ValueError("losses per token of models with different tokenizers cannot be compared")
    windows, documents = data.token_windows(model.tokenizer, texts.texts[:limit], max_tokens=SCORED_TOKENS, bos=True)
    nats = each_row(model, rows, lambda model, edits: score_loss(model, windows, edits, batch_size, texts.title)[0])
    return nats, windows, documents, torch.tensor([int(mask.sum()) for mask in target_masks(model.tokenizer, windows)])


def loss(model, texts: Dataset, rows: dict, *, batch_size: int = 16, limit: int | None = None) -> Measure:
    """Nats per token, an item per document. As `window_losses`; UserError for a document without a token to predict."""
    nats, _, documents, targets = window_losses(model, texts, rows, batch_size=batch_size, limit=limit)
    member = np.unique(documents, return_inverse=True)[1]
    tokens, values = np.bincount(member, targets), np.stack([np.bincount(member, row) for row in nats])
    if not len(tokens) or not tokens.all():
        raise UserError("a document has no token to predict: leave it out of the data")
    return measure_of(texts, "loss", "loss", "nats per token", rows, values, weights=tokens, groups=None)


def open_answers(model, quiz: Dataset, rows: dict, *, batch_size: int = 16) -> tuple[Measure, Measure]:
    """Two Measures: whether what the model writes is the right answer, up to what `normalised` removes; and its loss on
    the right answer, in nats per token. rows, errors: as for `letters`."""
    right = [row["choices"][row["answer"]] for row in quiz.rows]
    alone = [{**row, "choices": [answer]} for row, answer in zip(quiz.rows, right)]

    def score(model, edits):  # (n_edits, n_questions, 2): is it right, and the loss
        windows, first = data.encode_words(model.tokenizer, alone)
        room = 1 + max(len(ids) - at for ids, at in zip(windows, first))  # one more, to see an answer that goes on
        written = written_answers(model, quiz.rows, edits, room, batch_size, quiz.title)
        exact = [[normalised(text) == normalised(answer) for text, answer in zip(texts, right)] for texts in written]
        nats, tokens = score_loss(model, windows, edits, 4 * batch_size, quiz.title, first=first)
        return torch.stack([torch.tensor(exact).double(), nats / tokens.clamp(min=1)], -1)

    values = each_row(model, rows, score).numpy()
    exact = measure_of(quiz, "exact", "written", "%", rows, values[..., 0] == 1, chance=0.0)
    return exact, measure_of(quiz, "right answer", "loss on the right answer", "nats per token", rows, values[..., 1])


def fluency(model, dataset: Dataset, rows: dict, *, judge=None, batch_size: int = 16) -> tuple[Measure, Measure]:
    """Two Measures of what each row writes, greedily: WRITTEN tokens y after a prompt x, whatever they say.

    fluency: -1/|y| * sum over t of log p(y_t | x, y_<t), in nats per token; exp of it is y's perplexity. p is of the
    unablated `judge` (default: `model`), also where a row is another model. Special tokens of y are left out.
    repeated: 1 - distinct 4-grams of y's ids / all 4-grams, the seq-rep-4 of Welleck et al. (arXiv 1908.04319). Text
    that repeats itself is likely, too, so neither says much without the other; and after a forget question a wrong
    answer is as unlikely as bad text: fluency proper is told by texts, and by the row that was retrained.

    x: BEGINNINGS of the questions, as data.IN_WORDS, or of the texts, their first BEGUN tokens; drawn by the data's
    seed from those after which the model has room. No y ends early, since repeats depend on length. rows, errors: as
    for `letters`, and ValueError for a judge with another tokenizer. ReLearn's linguistic score (arXiv 2502.11190;
    open-unlearning#103) has perplexity, too."""

    def begun(row):
        text = row["text"] if "text" in row else data.IN_WORDS.format(row["question"].strip())
        return data.encode(model.tokenizer, text)[: BEGUN if "text" in row else None]

    room, judge = model.tokenizer.model_max_length - WRITTEN, judge or model
    fit = [i for i, row in enumerate(dataset.rows) if "text" in row or len(begun(row)) <= room]
    sample = dataset.only(fit).sample(BEGINNINGS)
    prompts = [begun(row) for row in sample.rows]

    def score(model, edits):  # (n_edits, n_prompts, 2)
        if model.tokenizer.get_vocab() != judge.tokenizer.get_vocab():
            raise ValueError("what is written by a model with another tokenizer cannot be judged")
        written = continuations(model, prompts, edits, WRITTEN, batch_size, f"{dataset.title} goes on", WRITTEN)
        texts, asked = [text for of_edit in written for text in of_edit], prompts * len(edits)
        windows, first = [x + y for x, y in zip(asked, texts)], list(map(len, asked))
        nats, tokens = score_loss(judge, windows, [NONE], batch_size, first=first)
        repeats = torch.tensor([repeated(text) for text in texts], dtype=torch.float64)
        return torch.stack([nats[0] / tokens.clamp(min=1), repeats], -1).reshape(len(edits), -1, 2)

    values, more = each_row(model, rows, score).numpy(), {"groups": None}
    return (measure_of(sample, "fluency", "loss of what is written", "nats per token", rows, values[..., 0], **more),
            measure_of(sample, "repeated", "repeated 4-grams", "%", rows, values[..., 1], **more))  # fmt: skip


def repeated(ids: list[int], n: int = 4) -> float:
    """1 - distinct / all n-grams of these ids; 0 of fewer than n."""
    grams = list(zip(*(ids[start:] for start in range(n))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def on_benchmark(model, benchmark, rows: dict, *, style, batch_size, cached=lambda name, make: make()) -> list[Measure]:
    """Letters on both halves of both quizzes of a data.Benchmark, words on WMDP-Bio's, and the loss on web text.
    cached(name, make) may keep what make() returns. rows, errors: as for `letters`."""
    measures, size = [], {"batch_size": batch_size}
    for name, quiz in benchmark.quizzes.items():
        measures += cached(name, partial(letters, model, quiz, rows, style=style, **size))
        if quiz.name == "wmdp_bio":
            measures.append(cached(f"{name} in words", partial(words, model, quiz, rows, **size)))
    return [*measures, cached("web", partial(loss, model, benchmark.web, rows, **size))]


def rounding_noise(model, quiz: Dataset, *, style: str = "plain", batch_size: int = 16, most: int = 64) -> dict:
    """What the batch size alone changes in the unablated model's answers to up to `most` of the questions: batch_size
    against a third of it (3 where that is 0). Next to nothing in float32. Returns {"asked": number of questions,
    "answers": how many letters differ, "log_probability": the largest difference of a letter's, in nats}."""
    rows = quiz.rows[:: math.ceil(len(quiz) / most)]
    prompts, ids = encode_prompts(model.tokenizer, [prompt(row, style=style) for row in rows], style)
    one, other = (score_letters(model, prompts, ids, [NONE], size)[0] for size in (batch_size, batch_size // 3 or 3))
    differ = one.argmax(-1) != other.argmax(-1)
    return {"asked": len(rows), "answers": int(differ.sum()), "log_probability": (one - other).abs().max().item()}


def best_row(forget: dict[str, Score], retain: dict[str, Score]) -> str:
    """SAEBench's choice (arXiv 2503.09532): of the rows but the first that keep KEEP of the first one's accuracy on
    `retain`, the one of lowest accuracy on `forget`; ties go to the higher accuracy on `retain`, then to the earlier
    row. Where none keeps as much, the one that keeps most. Raises ValueError where rows differ or there is but one."""
    first, *others = forget
    if list(retain) != list(forget) or not others:
        raise ValueError("two measures of the same rows, more than one, are needed to choose among them")
    good = [row for row in others if retain[row].mean >= KEEP * retain[first].mean - 1e-12]
    if not good:
        return max(others, key=lambda row: retain[row].mean)
    return min(good, key=lambda row: (forget[row].mean, -retain[row].mean))


def robust_only(model, quiz: Dataset, *, style: str = "plain", batch_size: int = 16) -> Dataset:
    """The questions right in all 24 orders of options (SAEBench, arXiv 2503.09532). Raises UserError for none."""
    for number, order in enumerate(data.PERMUTATIONS, 1):
        rows = [data.reordered(row, order) for row in quiz.rows]
        prompts, ids = encode_prompts(model.tokenizer, [prompt(row, style=style) for row in rows], style)
        chosen = score_letters(model, prompts, ids, [NONE], batch_size, f"order {number} of 24")[0].argmax(-1).tolist()
        quiz = quiz.only(i for i, row in enumerate(rows) if row["answer"] == chosen[i])
        if not quiz.rows:
            raise UserError(f"{quiz.title}: no question is answered right in all 24 orders of its options")
    return data.drop_too_long(model.tokenizer, quiz, style)


def questions(model, quiz: Dataset, limit=None, style: str = "plain", skip_long=False, robust=False) -> Dataset:
    """`limit` sampled questions that fit (data.drop_too_long); robust: what robust_only leaves. Errors: of both."""
    quiz = data.drop_too_long(model.tokenizer, quiz.sample(limit), style, skip_long)
    return robust_only(model, quiz, style=style) if robust else quiz


def refuse_not_numbers(scores: torch.Tensor, rows: list[list[int]], edits, what: str, tokenizer) -> None:
    """Raises UserError naming the first row of ids, and edit, whose scores (n_edits, n_rows, ...) are not finite."""
    bad = ~scores[..., None].isfinite().flatten(2).all(-1)
    if bad.any():
        row, k = bad.T.nonzero()[0].tolist()
        raise UserError(f"{what} {row} ({data.excerpt(tokenizer, rows[row])}): its log-probabilities under "
                        f"{edits[k].method} are not finite (NaN or infinity)")  # fmt: skip


def score_letters(model, prompts, letter_ids, edits, batch_size=16, desc=None) -> torch.Tensor:
    """Log-probability, over the vocabulary, of each answer letter after each prompt: (n_edits, n_prompts, 4), fp32.
    prompts: lists of ids; letter_ids: one for each letter, or several, of which the likeliest counts. Raises UserError
    for a prompt longer than the model's positions, a result that is not finite, and as check_engine does."""
    refuse_long(model.tokenizer, prompts)
    check_engine(model, {min(edit.at) for edit in edits if edit.at})
    letter_ids = torch.tensor(letter_ids).reshape(4, -1)

    def score(places, start, h):
        logits = head(model, h[range(len(h)), [len(prompts[i]) - 1 - start for i in places]][:, None])[:, 0]
        return logits.log_softmax(-1)[:, letter_ids].amax(-1).cpu()

    log_probs = each_edit(model, prompts, edits, score, (4,), batch_size=batch_size, desc=desc).float()
    refuse_not_numbers(log_probs, prompts, edits, "question", model.tokenizer)
    return log_probs


def target_masks(tokenizer, windows: list[list[int]], first: list[int] | None = None) -> list[torch.Tensor]:
    """For each window a mask (pos,) of the tokens that its loss counts: not special, and from index `first` or 1 on."""
    special = torch.tensor(special_ids(tokenizer))
    return [~torch.isin(torch.tensor(ids), special) & (torch.arange(len(ids)) >= max(1, begin))
            for ids, begin in zip(windows, first or [1] * len(windows))]  # fmt: skip


def score_loss(model, windows, edits, batch_size=16, desc=None, chunk=2**25, first=None) -> tuple:
    """Next-token loss in nats summed over each window's targets (see `target_masks`), (n_edits, n_windows) in fp64; and
    how many targets it has, (n_windows,). chunk: how many logits are held at a time. Errors: as score_letters."""
    refuse_long(model.tokenizer, windows)
    check_engine(model, {min(edit.at) for edit in edits if edit.at})
    masks = target_masks(model.tokenizer, windows, first)
    unablated = {}  # {window: loss of each token but the first}, for the tokens before an edit's first one

    def score(places, start, h):
        ids = data.padded([windows[i] for i in places], model.tokenizer, h.device)[:, start + 1 :]
        real = pad_sequence([masks[i] for i in places], batch_first=True)[:, start + 1 :]
        size, parts = max(1, chunk // model.cfg.d_vocab), []
        for part, goal in zip(*(x[real].split(size) for x in (h[:, : ids.shape[1]], ids))):
            logits = head(model, part[None])[0]  # where the unembedding is, which may be another device
            parts.append(F.cross_entropy(logits, goal.to(logits.device), reduction="none").cpu())
        losses = torch.zeros(real.shape, dtype=torch.float64)
        losses[real] = torch.cat(parts).double()
        for place, of_window in zip(places, losses):
            unablated.setdefault(place, of_window)  # every window is scored unablated first
        return losses.sum(1) + torch.stack([unablated[place][:start].sum() for place in places])

    nats = each_edit(model, windows, edits, score, batch_size=batch_size, desc=desc, first=first)
    refuse_not_numbers(nats, windows, edits, "text", model.tokenizer)
    return nats, torch.tensor([int(mask.sum()) for mask in masks])


def score_words(model, questions: list[dict], edits, batch_size=16, desc=None, form=data.IN_WORDS) -> torch.Tensor:
    """Log-probability per character (as in lm-eval's acc_norm, or the shortest option would win) of each option as an
    answer in words, (n_edits, n_questions, 4), fp64. form: data.IN_WORDS or data.CLOZE. Errors: as score_letters."""
    windows, first = data.encode_words(model.tokenizer, questions, form)
    nats, _ = score_loss(model, windows, edits, 4 * batch_size, desc, first=first)  # the windows are short
    lengths = torch.tensor([[max(1, len(choice.strip())) for choice in row["choices"]] for row in questions])
    return -nats.reshape(len(edits), -1, 4) / lengths


def left_padded(rows: list[list[int]], tokenizer, device) -> dict:
    """ids, attention mask and positions, (batch, pos), padded in front, so that every prompt ends at the last place."""
    width, pad = max(map(len, rows)), data.pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def written_answers(model, questions: list[dict], edits, room: int, batch_size=16, desc=None) -> list[list[str]]:
    """The first line of what the model writes, greedily, as an answer in words: a text per edit and question. Asked in
    the form data.IN_WORDS. room, errors: as for `continuations`."""
    rows = [data.encode(model.tokenizer, data.IN_WORDS.format(row["question"].strip())) for row in questions]
    written = continuations(model, rows, edits, room, batch_size, desc)
    texts = [model.tokenizer.batch_decode(of_edit, skip_special_tokens=True) for of_edit in written]
    return [[text.split("\n")[0].strip() for text in of_edit] for of_edit in texts]


@torch.inference_mode()
def continuations(model, rows: list[list[int]], edits, room: int, batch_size=16, desc=None, least: int = 0) -> list:
    """The ids that the model writes, greedily, after each prompt's: [edit][prompt], padded where it has ended. room,
    least: the most and the fewest new tokens. An edit that looks at a whole prompt is run without a cache, on all that
    is written so far. Raises UserError for a prompt that leaves the model too few positions."""
    pad, found = data.pad_id(model.tokenizer), []
    refuse_long(model.tokenizer, [row + [pad] * room for row in rows])
    for picked, _ in batches(rows, batch_size, model.tokenizer, model.cfg.device, desc):
        ids, mask, _ = left_padded([rows[i] for i in picked], model.tokenizer, model.cfg.device).values()
        for k, edit in enumerate(edits):
            with applied(model, model.tokenizer, edit):
                written = model.original_model.generate(
                    ids, attention_mask=mask, do_sample=False, max_new_tokens=room, min_new_tokens=least,
                    pad_token_id=pad, use_cache=not edit.needs_whole_prompt)[:, ids.shape[1] :]  # fmt: skip
            found += [((k, i), text) for i, text in zip(picked, written.tolist())]
    found = dict(gather_object(found))  # each process has written its share
    return [[found[k, i] for i in range(len(rows))] for k in range(len(edits))]


def normalised(text: str) -> str:
    """In lower case, without punctuation and articles, as SQuAD's evaluate-v1.1.py grades (arXiv 1606.05250)."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def bootstrap(statistic, *samples, seed: int = 0) -> tuple[float | None, float | None]:
    """95% percentile bootstrap interval of statistic(*samples), drawn together; (None, None) for a single entry."""
    if len(samples[0]) < 2:
        return None, None
    result = stats.bootstrap(samples, statistic, n_resamples=2000, paired=True, vectorized=True, method="percentile",
                             rng=np.random.default_rng(seed), batch=200)  # fmt: skip
    return tuple(map(float, result.confidence_interval))


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% interval of the share right / n (Wilson, J Am Stat Assoc 22:209, 1927)."""
    return tuple(map(float, stats.binomtest(right, n).proportion_ci(method="wilson")))


def paired_interval(both: int, won: int, lost: int, neither: int) -> tuple[float, float]:
    """95% interval of the paired change (won - lost) / n; both, won, lost, neither: how many of n pairs are right
    before and after, after only, before only, never. Newcombe's square-and-add of two Wilson intervals with a corrected
    phi (Stat Med 17:2635, 1998, method 10): without discordant pairs it has the width that n pairs leave open."""
    n = both + won + lost + neither
    after, before = (both + won) / n, (both + lost) / n
    (low_a, high_a), (low_b, high_b) = wilson(both + won, n), wilson(both + lost, n)
    phi, margins = both * neither - won * lost, (both + won) * (lost + neither) * (both + lost) * (won + neither)
    phi = max(phi - n / 2, 0) if phi > 0 else phi
    phi, change = phi / margins**0.5 if margins else 0.0, (won - lost) / n
    ends = (after - low_a, high_b - before), (high_a - after, before - low_b)
    low, high = ((x * x - 2 * phi * x * y + y * y) ** 0.5 for x, y in ends)
    return change - low, change + high


# -------------------------------------------------------------------------------- what edits are made of
@torch.inference_mode()
def check_sae_quality(model, sae, windows: list[list[int]], insist: bool = True, most: int = 10_000) -> dict:
    """L0 and variance explained on the windows' counted tokens; prints them beside the L0 that SAELens's table or the
    SAE itself promises, and says so where most of the L0 comes from features that are always active. Of more than
    `most` tokens every second window, or third, and so on is read.

    Variance explained is 1 - sum |h - SAE(h)|^2 / sum |h - mean h|^2, both sums without the thousandth of tokens with
    the largest norm: a handful of attention sinks, tens of times as long as other tokens, would decide it alone. Raises
    UserError if values are not finite, and unless `insist` is False for an SAE that does not fit the model: read with
    the wrong architecture, scaling or layer it would give numbers too."""
    windows = windows[:: math.ceil(sum(map(len, windows)) / most) or 1]
    stream = edits.iter_residual_stream(model, layer_of(sae), windows, 16, shared=False)
    if not (parts := [rows.float() for rows, _ in stream if len(rows)]):
        raise UserError("the retain texts hold no token that rates could be counted on")
    fires, back = zip(*(edits.run_sae(sae, rows) for rows in parts))
    h, back, n = torch.cat(parts), torch.cat(back), sum(map(len, parts))
    rates = sum(fires).cpu().double() / n  # (d_sae,)
    finite = bool(torch.isfinite(h).all() and torch.isfinite(back).all())  # the thousandth might hide it
    shortest = h.norm(dim=-1).argsort()[: len(h) - math.ceil(len(h) / 1000)]
    h, back, variance = h[shortest].cpu(), back[shortest].cpu(), ExplainedVarianceCalculator()
    variance.add_batch(back - h.mean(0), h - h.mean(0))  # around the mean, where float32 loses no digits
    l0, explained, dense = rates.sum().item(), variance.compute(), rates[rates > 0.9]
    if not (math.isfinite(explained) and finite):
        raise UserError(f"{sae.source}: the variance it explains is {explained}: the model's residual stream at "
                        f"{sae.hook_point} or what the SAE makes of it is not finite")  # fmt: skip
    release, _, sae_id = sae.source.partition(":")
    entry = get_pretrained_saes_directory().get(release) if sae_id else None
    promised = float((entry.expected_l0.get(sae_id) if entry else None) or sae.cfg.metadata.l0 or 0)
    print(f"SAE check: L0 {l0:.1f}{f' (promised {promised:.1f})' if promised else ''}, variance explained "
          f"{explained:.3f} on {n} tokens, the thousandth of largest norm left out")  # fmt: skip
    if dense.sum() > l0 / 2:
        print(f"note: {dense.sum():.1f} of this L0 are {len(dense)} features active on more than nine tokens in ten")
    if insist and n < LEAST_TOKENS:
        raise UserError(f"{n} tokens of retain text are too few to check the SAE on: give {LEAST_TOKENS}, or no_sanity")
    if insist and (explained < 0.5 or (promised and not promised / 4 < l0 < promised * 4)):
        raise UserError(f"{sae.source} does not fit this model (see the line above)")
    quality = {"l0": round(l0, 2), "variance_explained": round(explained, 4), "n_tokens": n, "always_on": len(dense)}
    return {**quality, "promised_l0": round(promised, 2)} if promised else quality


@dataclass(eq=False)
class FeatureStats:
    """What forget and retain windows say about a model's layer and its SAE. Each thing is computed once, when needed.

    model: a TransformerBridge; sae: None for methods that need none; layer: the SAE's; forget: windows (lists of ids);
    retain: several sets of windows, in each of which a picked feature must be rare; rule: the default of `features`;
    own: ids, or {layer: ids}, in place of what any rule picks; questions, style: for the rules "attribution" and
    "measured", which also needs `utility`, questions that should stay right; insist: as for check_sae_quality; clamp,
    refusal_value: what the grids of edits.METHODS multiply; refusal_latent: for refusal-clamp."""

    model: object
    sae: object
    layer: int
    forget: list
    retain: list[list]
    _: KW_ONLY
    rule: str = "ratio"
    own: list[int] | dict[int, list[int]] | None = None
    questions: Dataset | None = None
    utility: Dataset | None = None
    style: str = "plain"
    seed: int = 0
    batch_size: int = 16
    insist: bool = True
    clamp: float = -100.0
    refusal_latent: int | None = None
    refusal_value: float = -500.0
    known: dict = field(default_factory=dict, init=False)  # scores by rule, orders by clamp, gates by number

    @property
    def edited_layer(self) -> int:
        """The layer whose output is edited: for an SAE that reads hook_resid_pre the one before `layer`."""
        return self.layer if self.sae is None else layer_of(self.sae)

    @cached_property
    def quality(self) -> dict:
        """What check_sae_quality finds on the first retain set. Raises UserError as it does."""
        return check_sae_quality(self.model, self.sae, self.retain[0], self.insist)

    @cached_property
    def rates(self) -> tuple[Rates, Rates]:
        """Of the forget windows, and the larger ones of the retain sets."""
        _ = self.quality  # raises where the SAE does not fit
        forget, *retain = (firing_rates(self.model, self.sae, part, self.batch_size, "rates")
                           for part in (self.forget, *self.retain))  # fmt: skip
        counts, fewest = [part.n_tokens for part in (forget, *retain)], LEAST_TOKENS if self.insist else 1
        print(f"rates on {counts[0]:,} forget tokens and on {' and '.join(f'{n:,}' for n in counts[1:])} retain tokens")
        if min(counts) < fewest:
            raise UserError(f"too few tokens to pick features by ({counts[0]:,} forget, {min(counts[1:]):,} retain): "
                            f"give {fewest} of each, or no_sanity")  # fmt: skip
        return forget, largest(retain)

    def measured(self, n: int, clamp: float) -> list[int]:
        """The first n features of `measured_order` at this clamp. Raises UserError where there are fewer."""
        if not (self.questions and self.utility):
            raise UserError("the rule 'measured' needs questions to forget and questions to keep")
        most = int(((self.rates[0].fires > 0) & (activation_ratio(*self.rates) >= 1)).sum())
        among, key = pick_features(*self.rates, min(CANDIDATES, most)), ("measured", clamp)
        if n > len(among):
            raise UserError(f"no {n} features: the rule 'measured' chooses among the {len(among)} of highest ratio")
        found, order = self.known.pop(key, None) or ([], measured_order(
            self.model, self.sae, among, clamp, self.questions, self.utility, self.style, self.batch_size))  # fmt: skip
        found += itertools.islice(order, max(0, n - len(found)))
        self.known[key] = found, order  # only now: a generator that was stopped would seem to have no more
        if n > len(found):
            raise UserError(f"no {n} features: with {len(found)} picked by their measured effect none is left that "
                            f"keeps {KEEP:.0%} of {self.utility.title}")  # fmt: skip
        return found[:n]

    def features(self, n: int | None, rule: str | None = None, clamp: float | None = None) -> list[int]:
        """The n best features by a rule of common.pick_features or "measured" (None: self.rule), best first, with a
        note on them; of one's own the first n, or all. clamp: the one to measure at (None: self.clamp)."""
        if self.own is not None:
            given = data.by_layer(self.own, self.layer)
            if not (ids := given.get(self.layer)):
                raise UserError(f"no features of layer {self.layer} are given, only of {', '.join(map(str, given))}")
            if others := ", ".join(map(str, sorted({*given} - {self.layer}))):
                data.note_once(f"note: features given of layer {others} are left out at layer {self.layer}")
            with data.in_a_line(f"features {str(ids)[:40]}"):
                return Latents(self.sae, ids).features.tolist()[:n]
        rule = rule or self.rule
        if rule == "measured":
            return self.measured(n, self.clamp if clamp is None else clamp)
        if rule == "attribution" and rule not in self.known:
            if self.questions is None:
                raise UserError("the rule 'attribution' needs questions")
            self.known[rule] = attribution(self.model, self.sae, self.questions, self.style, self.batch_size)
        elif rule == "output-score" and rule not in self.known:
            self.known[rule] = output_scores(self.model, self.sae)
        picked = pick_features(*self.rates, n, rule, score=self.known.get(rule))
        if common := int((activation_ratio(*self.rates)[picked] <= 1).sum()):
            data.note_once(f"note: {common} of {n} features picked by {rule} are no more frequent on forget tokens")
        return picked

    def control(self, n: int, most: int) -> list[int]:
        """The first n of the `most` random features that match the `most` best ones (common.matched_random)."""
        return matched_random(*self.rates, self.features(most), self.seed)[:n]

    @cached_property
    def direction(self) -> list[float]:
        """(d_model,), the mean residual stream of forget tokens less that of retain tokens; the sets weigh the same."""

        def mean(windows):
            total, n = 0.0, 0
            for h, _ in edits.iter_residual_stream(self.model, self.edited_layer, windows, self.batch_size, "means"):
                total, n = total + summed(h), n + len(h)
            return total / n

        return (mean(self.forget) - torch.stack([mean(part) for part in self.retain]).mean(0)).tolist()

    @torch.inference_mode()
    def gate(self, n: int) -> float:
        """DSG's gate for its n features: the 95% quantile of rho (see edits.gate_of) over the retain windows."""
        if n not in self.known:
            latents, shares, model = Latents(self.sae, self.features(n, "dsg")), [], self.model
            with edits.token_mask(model.original_model, model.tokenizer) as mask:
                for part in self.retain:
                    for _, ids in batches(part, self.batch_size, model.tokenizer, model.cfg.device, "gate"):
                        h = residual_stream(model.original_model, ids, self.edited_layer)
                        shares.append(edits.gate_of(latents.encode(h)[0], mask.edited.to(h.device)).cpu())
            self.known[n] = torch.cat(shares).quantile(0.95).item()
        return self.known[n]


def measured_order(model, sae, features, clamp, questions: Dataset, utility: Dataset, style="plain", batch_size=16):
    """Yield the features in the order in which they are worth clamping together: next comes the one that, clamped with
    all before it, leaves fewest of the questions right, in letters and in words; never one with which less than KEEP of
    the accuracy on `utility` is left.

    Greedy and lazy (Minoux, Optimization Techniques 234, 1978): a feature's promise is what it took when it was last
    measured, first alone, then beside those chosen since; only the TRIED most promising are measured for each place. n
    features take some len(features) + TRIED * n edits, where trying all would take n * len(features)."""

    def ask(lists):
        rows = {"unablated": NONE} | {f"{ids}": edits.ablation(sae, ids, clamp) for ids in lists}
        forget = letters(model, questions, rows, style=style, batch_size=batch_size)[0]
        forget = forget, words(model, questions, rows, batch_size=batch_size)
        keep = letters(model, utility, rows, style=style, batch_size=batch_size)[0]
        return [(sum(measure[row].mean for measure in forget), keep[row].mean) for row in rows]

    chosen, ((now, keeps), *alone) = [], ask([[feature] for feature in features])
    promise = {feature: now - right for feature, (right, _) in zip(features, alone)}
    while promise:
        tried = sorted(promise, key=promise.get, reverse=True)[:TRIED]
        found = dict(zip(tried, ask([[*chosen, feature] for feature in tried])[1:]))
        for feature, (right, kept) in found.items():
            promise[feature] = now - right
            if kept < KEEP * keeps - 1e-12:
                del promise[feature]
        if good := [feature for feature in tried if feature in promise]:
            best = max(good, key=lambda feature: (promise[feature], found[feature][1]))
            now -= promise.pop(best)
            chosen.append(best)
            yield best


def attribution(model, sae, questions: Dataset, style: str = "plain", batch_size: int = 16) -> torch.Tensor:
    """(d_sae,) what each feature's activation adds to the right letter's log-probability, to first order: activation
    times gradient, summed over a question's edited tokens; the mean over the questions. Differs from Farrell et al.
    (arXiv 2410.19278), whose notebooks take the logit, and then leave out what moves MMLU."""
    windows, letter_ids = encode_prompts(model.tokenizer, [prompt(row, style=style) for row in questions.rows], style)
    answers = torch.tensor(letter_ids).reshape(4, -1)[[row["answer"] for row in questions.rows]]  # (n, 1 id or 2)
    hf, everything, seen = model.original_model, Latents(sae, range(sae.cfg.d_sae)), {}
    total = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)

    def leaf(h, mask):
        seen["h"], seen["mask"] = h.detach().requires_grad_(True), mask
        return seen["h"]

    with applied(hf, model.tokenizer, Edit("attribution", at={layer_of(sae): leaf})):
        for places, ids in batches(windows, batch_size, model.tokenizer, model.cfg.device, "attribution"):
            with torch.enable_grad():
                logits = hf(ids, use_cache=False).logits.float()
                log_probs = logits[range(len(ids)), [len(windows[i]) - 1 for i in places]].log_softmax(-1)
                right = log_probs.gather(1, answers[places].to(log_probs.device)).max(1).values.sum()
                (gradient,) = torch.autograd.grad(right, seen["h"])
            with torch.no_grad():
                for h, slope in zip(*(chunks(sae, x[seen["mask"]]) for x in (seen["h"], gradient))):
                    acts, scale = everything.encode(h)
                    total += summed(acts * ((slope.to(acts.dtype) * scale) @ everything.W_dec.T))
    return data.total_of_processes(total) / len(questions.rows)


@torch.inference_mode()
def output_scores(model, sae, text: str = "From my experience,", top: int = 20, factor: float = 10.0) -> torch.Tensor:
    """(d_sae,) the output scores of Arad et al., arXiv 2505.20063, by their code (github.com/technion-cs-nlp/
    saes-are-good-for-steering): does a feature make the model say what its decoder vector says?

    A feature's own tokens are the `top` ones of edits.logit_lens(W_dec[i]). At the last token of a neutral text
    `factor` times the largest activation there is added to the feature's. The score is (1 - rank / d_vocab) *
    probability of the most probable of its own tokens as the next one. Raises UserError as logit_lens does."""
    hf, everything, scores = model.original_model, Latents(sae, range(sae.cfg.d_sae)), []
    ids, layer = data.padded([data.encode(model.tokenizer, text)], model.tokenizer, model.cfg.device), layer_of(sae)
    acts, scale = everything.encode(residual_stream(hf, ids, layer)[:, -1])
    for vectors in everything.W_dec.split(256):
        added = factor * acts.max() * vectors * scale
        amplified = Edit("output-score", at={layer: lambda h, mask, added=added: torch.cat(
            [h[:, :-1], (h[:, -1:] + added[:, None].to(h.device)).to(h.dtype)], 1)})  # fmt: skip
        with applied(hf, model.tokenizer, amplified):
            probs = hf(ids.expand(len(added), -1), use_cache=False).logits[:, -1].float().softmax(-1)
        its_own = edits.logit_lens(model, vectors).topk(top).indices
        best = probs.gather(1, its_own.to(probs.device)).max(1, keepdim=True).values
        scores.append(best[:, 0] * (1 - (probs > best).sum(1) / probs.shape[1]))
    return torch.cat(scores).cpu().double()
