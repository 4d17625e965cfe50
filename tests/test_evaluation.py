"""Scores and statistics: by hand, and where a question or a document cannot be scored."""

import argparse
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, QUESTIONS, hf, some_ids
from scipy import stats

import data
import evaluation
import memory
from common import load_model
from data import UserError, encode_prompts, load_rows, prompt
from edits import NONE, Edit, applied, edit_of
from engine import pushed
from evaluation import accuracy_score, loss_scores, normalised, quiz_scores, robust_subset, score_letters, score_words

# ------------------------------------------------------------------------------ longer than the model's positions


@pytest.fixture
def short(gemma):
    """A model that has 40 positions; the questions' prompts have more or fewer."""
    had, gemma.tokenizer.model_max_length = gemma.tokenizer.model_max_length, 40
    yield gemma
    gemma.tokenizer.model_max_length = had


def test_a_prompt_beyond_the_models_positions_is_refused(short, make_sae):
    with pytest.raises(UserError, match=r"text 1 \('.*'\) has 41 tokens, the model 40 positions"):
        score_letters(short, [[2, 30], [2] + [30] * 40], [20, 21, 22, 23], [NONE])


def test_questions_beyond_the_models_positions_are_named_or_left_out(short, make_sae, capsys):
    lengths = [len(ids) for ids in encode_prompts(short.tokenizer, [prompt(row) for row in QUESTIONS])[0]]
    short.tokenizer.model_max_length = max(lengths) - 1
    longest = lengths.index(max(lengths))
    s = argparse.Namespace(limit=None, seed=0, robust=False, prompt="plain", batch_size=4, skip_long=False,
                           max_memory=None, model="mine", device=None, dtype="float32")  # fmt: skip
    rest = ("Quiz", QUESTIONS, [0, 1, 2], [NONE], s)
    named = rf"question {longest} \('{QUESTIONS[longest]['question'].strip()[:20]}"
    with pytest.raises(
        UserError, match=rf"Quiz: {named}.* has {max(lengths)} tokens, the model {max(lengths) - 1} pos"
    ):
        evaluation.score_quiz(short, *rest)
    s.skip_long = True
    scores, asked = evaluation.score_quiz(short, *rest)
    left = [k for k in range(3) if lengths[k] < max(lengths)]
    assert asked == {"questions": left, "skipped_long": 3 - len(left)} and scores[0]["n"] == len(left)
    assert f"Quiz: {3 - len(left)} of 3 questions are left out" in capsys.readouterr().err


def test_cloze_questions_need_no_letters_and_are_as_long_as_their_longest_answer(short, monkeypatch):
    """A tokenizer that has no token for a letter is none of their business, and options do not count."""
    for module in (data, evaluation):
        monkeypatch.setattr(module, "encode_prompts", None)
    rows = [{**row, "cloze": True} for row in QUESTIONS]
    windows, _ = data.encode_words(short.tokenizer, rows, data.CLOZE)
    lengths = [max(map(len, windows[4 * k : 4 * k + 4])) for k in range(3)]
    s = argparse.Namespace(limit=None, seed=0, robust=False, prompt="plain", batch_size=4, skip_long=True,
                           max_memory=None, model="mine", device=None, dtype="float32")  # fmt: skip
    short.tokenizer.model_max_length = sorted(lengths)[1]
    scores, asked = evaluation.score_quiz(short, "Quiz", rows, [0, 1, 2], [NONE], s)
    assert asked["questions"] == [k for k in range(3) if lengths[k] <= sorted(lengths)[1]] and asked["skipped_long"] > 0
    values = evaluation.score_words(short, [rows[k] for k in asked["questions"]], [NONE], form=data.CLOZE)[0]
    assert scores[0]["letters"] == "".join("ABCD"[k] for k in values.argmax(-1).tolist())


# -------------------------------------------------------------------------------------------- rounding


def test_below_float32_it_is_told_what_other_batches_change(get_model, monkeypatch, capsys):
    """As if a GPU rounded: what comes of the two sizes of batches differs, here by 0.3 for one letter."""
    s = argparse.Namespace(limit=None, seed=0, robust=False, prompt="plain", batch_size=6, skip_long=False,
                           max_memory=None, model="mine", device=None, dtype="bfloat16")  # fmt: skip
    sizes = []

    def rounds(model, prompts, letters, edits, batch_size=16, desc=None, max_memory=None):
        sizes.append(batch_size)
        found = torch.full((len(edits), len(prompts), 4), -2.0)
        found[..., 1] += 0.1
        found[:, 0, 2] += 0.3 * (batch_size == 2)
        return found

    monkeypatch.setattr(evaluation, "score_letters", rounds)
    found = {}
    for dtype in ("float32", "bfloat16"):
        _, about = evaluation.score_quiz(get_model("gemma2", dtype), "Quiz", QUESTIONS, [0, 1, 2], [NONE], s)
        found[dtype] = about.get("rounding")
    assert found == {"float32": None, "bfloat16": {"asked": 3, "answers": 1, "log_probability": pytest.approx(0.3)}}
    assert sizes[-2:] == [6, 2]
    said = capsys.readouterr().out
    assert said.count("rounding") == 1 and "1 of 3 unablated answers change, a log-probability by 0.3 at most" in said
    assert evaluation.rounding(get_model("gemma2"), [[2, 30]], [20, 21, 22, 23], 1)["asked"] == 1
    assert sizes[-2:] == [1, 3]  # a batch of one has no smaller one
    many = evaluation.rounding(get_model("gemma2"), [[2, 30]] * 130, [20, 21, 22, 23], most=64)
    assert 40 < many["asked"] <= 64


# ----------------------------------------------------------------------------------------- statistics


def test_wilson_interval():
    z = 1.959963984540054
    for right, n in ((0, 7), (3, 10), (50, 80), (12, 12)):
        found = accuracy_score(np.arange(n) < right, "A" * n)
        p, width = right / n, 1 + z * z / n
        middle, half = (p + z * z / (2 * n)) / width, z / width * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert found["accuracy"] == p and found["n"] == n and found["chance"] == 0.25
        assert found["low"] == pytest.approx(middle - half, abs=1e-9)
        assert found["high"] == pytest.approx(middle + half, abs=1e-9)
        assert "change" not in found and "p_value" not in found


def mcnemar(lost, won):
    n = lost + won
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(lost, won) + 1)) / 2**n) if n else 1.0


@pytest.mark.parametrize("lost,won", [(0, 0), (1, 0), (3, 3), (9, 1), (2, 12), (0, 20)])
def test_mcnemar_and_paired_change(lost, won):
    clean = np.array([True] * lost + [False] * won + [True] * 6 + [False] * 5)
    right = np.array([False] * lost + [True] * won + [True] * 6 + [False] * 5)
    found = accuracy_score(right, "", clean)
    assert found["p_value"] == pytest.approx(mcnemar(lost, won))
    assert found["change"] == pytest.approx((won - lost) / len(right))
    assert found["change_low"] <= found["change"] <= found["change_high"]
    if lost != won:  # about 2 standard errors of the paired difference to either side
        change = right.astype(float) - clean
        spread = 1.96 * change.std() / len(change) ** 0.5
        assert found["change_high"] - found["change_low"] == pytest.approx(2 * spread, rel=0.35)


@pytest.mark.parametrize("pairs, low, high", [
    # airway hyper-responsiveness (Bentur et al. 2009) in Fagerland, Lydersen and Laake, Stat Med 33:2850 (2014)
    ((1, 1, 7, 12), -0.507, -0.026),
    # complete response (Cavo et al. 2012) in Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables
    # (2017), chapter 8, as their R package contingencytables prints it
    ((59, 6, 16, 80), -0.1186, -0.0046),
])  # fmt: skip
def test_the_paired_interval_is_newcombes(pairs, low, high):
    digits = 0.5 * 10.0 ** -(len(str(low).partition(".")[2]))
    assert evaluation.paired_interval(*pairs) == (pytest.approx(low, abs=digits), pytest.approx(high, abs=digits))
    both, won, lost, neither = pairs
    turned = evaluation.paired_interval(both, lost, won, neither)
    assert turned == (pytest.approx(-evaluation.paired_interval(*pairs)[1]), pytest.approx(-low, abs=digits))


def test_no_discordant_pair_leaves_the_rule_of_threes_width():
    right = np.arange(178) > 0
    found = accuracy_score(right, "", right)
    assert found["change"] == 0.0 and found["p_value"] == 1.0
    assert -0.03 < found["change_low"] < -3 / 178 < 0 < 3 / 178 < found["change_high"] < 0.03
    alone = accuracy_score(np.array([True]), "", np.array([True]))
    assert -1 <= alone["change_low"] < alone["change_high"] <= 1


@pytest.mark.parametrize("n, shares", [(60, (0.5, 0.05, 0.2, 0.25)), (178, (0.97, 0.005, 0.02, 0.005)),
                                       (20, (0.9, 0.03, 0.05, 0.02))])  # fmt: skip
def test_the_paired_interval_covers(n, shares):
    tables, times = np.unique(np.random.default_rng(0).multinomial(n, shares, 4000), axis=0, return_counts=True)
    ends = np.array([evaluation.paired_interval(*map(int, pairs)) for pairs in tables])
    covered = (ends[:, 0] <= shares[1] - shares[2]) & (shares[1] - shares[2] <= ends[:, 1])
    assert (covered * times).sum() / times.sum() > 0.94


def test_false_discoveries_are_held_over_subjects():
    p = [0.01, 0.04, 0.03, 0.5]
    found = evaluation.with_q_values({str(k): {"p_value": value} for k, value in enumerate(p)})
    assert [score["q_value"] for score in found.values()] == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])
    assert evaluation.with_q_values({"s": {"n": 3}}) == {"s": {"n": 3}}  # the unablated model


def sure(chosen) -> np.ndarray:
    """Log-probabilities of four letters, the chosen ones' the largest."""
    return np.log(0.1 + 0.6 * np.eye(4)[np.array(chosen)])


def test_quiz_scores_pooled_and_per_subject():
    questions = [dict(answer=k % 4, subject="law" if k < 6 else "art") for k in range(10)]
    chosen = [[0, 1, 2, 3, 0, 0, 2, 3, 0, 1], [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]]
    clean, ablated = quiz_scores(sure(chosen), questions)
    assert clean["accuracy"] == 0.9 and ablated["accuracy"] == 0.4 and ablated["change"] == pytest.approx(-0.5)
    assert clean["letters"] == "ABCDAACDAB" and ablated["letters"] == "AAAAABAAAA"
    assert "p_value" not in clean and ablated["p_value"] == pytest.approx(mcnemar(6, 1))
    law, art = ablated["subjects"]["law"], ablated["subjects"]["art"]
    assert (law["n"], art["n"]) == (6, 4) and set(clean["subjects"]) == {"law", "art"}
    assert law["accuracy"] == 0.5 and art["accuracy"] == 0.25
    assert law["change"] == pytest.approx(-2 / 6) and art["change"] == pytest.approx(-0.75)
    assert law["letters"] == "AAAAAB" and art["p_value"] == pytest.approx(mcnemar(3, 0))
    pooled = (law["accuracy"] * law["n"] + art["accuracy"] * art["n"]) / 10
    assert pooled == pytest.approx(ablated["accuracy"])


def test_quiz_scores_without_subjects():
    found = quiz_scores(sure([range(4)]), [dict(answer=k) for k in range(4)])
    assert found[0]["accuracy"] == 1.0 and "subjects" not in found[0]


def test_what_a_quiz_hides_by_hand():
    questions = [dict(answer=0), dict(answer=1), dict(answer=1)]
    clean = [[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.7, 0.1, 0.0]]
    ablated = [[0.4, 0.1, 0.1, 0.1], [0.2, 0.1, 0.1, 0.1], [0.1, 0.1, 0.0, 0.0]]
    with np.errstate(divide="ignore"):
        letters = np.log([clean, ablated])
    words = -np.array([[[1, 2, 3, 4], [1, 2, 3, 4], [2, 1, 3, 4]], [[1, 2, 3, 4], [2, 1, 3, 4], [2, 1, 3, 4]]])
    before, after = quiz_scores(letters, questions, in_words=words)
    assert before["letters_mass"] == {"mean": pytest.approx(2.9 / 3)}
    assert before["right_probability"]["mean"] == pytest.approx(2.0 / 3)
    change = np.array([-0.3, -0.5, -0.7])
    interval = stats.ttest_1samp(change, 0).confidence_interval()
    assert after["letters_mass"]["mean"] == pytest.approx(1.4 / 3)
    assert after["letters_mass"]["change"] == pytest.approx(-0.5)
    assert [after["letters_mass"][f"change_{end}"] for end in ("low", "high")] == pytest.approx(list(interval))
    assert after["right_probability"]["change"] == pytest.approx((-0.3 - 0.5 - 0.6) / 3)
    assert before["in_words"]["accuracy"] == pytest.approx(2 / 3) and after["in_words"]["accuracy"] == 1.0
    assert before["in_words"]["letters"] == "AAB" and after["in_words"]["change"] == pytest.approx(1 / 3)
    assert "change" not in before["in_words"] and "in_words" not in quiz_scores(letters, questions)[0]
    one = quiz_scores(letters[:, :1], questions[:1])[1]["letters_mass"]
    assert one["change"] == pytest.approx(-0.3) and one["change_low"] is one["change_high"] is None


def test_answers_in_words_by_hand(gemma):
    rows = [dict(question="Which is an organ?", choices=["the moon", " The heart ", "sea", "a grey stone"]),
            dict(question=" Where do rivers flow? ", choices=["The sea", "moon", "to a heart", ""])]  # fmt: skip
    pushed_one = Edit("pushed", {1: pushed(torch.ones(gemma.cfg.d_model), 2)})
    found = score_words(gemma, rows, [NONE, pushed_one], batch_size=1)
    for edit, by_hand in zip([NONE, pushed_one], found):
        for row, scores in zip(rows, by_hand):
            for choice, score in zip(row["choices"], scores):
                asked = f"{row['question'].strip()}\nAnswer in words:"
                ids = gemma.tokenizer(f"{asked} {choice.strip()}")["input_ids"]
                with applied(gemma, gemma.tokenizer, edit), torch.inference_mode():
                    logits = gemma(torch.tensor([ids]))[0, :-1].double()
                log_probs = logits.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
                answer = log_probs[len(gemma.tokenizer(asked)["input_ids"]) - 1 :]
                assert score.item() == pytest.approx(answer.sum().item() / max(1, len(choice.strip())), abs=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


# ------------------------------------------------------------------------------------------ open answers


def test_answers_are_graded_as_squad_does():
    assert normalised("The  Heart.") == "heart" and normalised("an X-ray, of the lung!") == "xray of lung"
    assert normalised("theatre") == "theatre" and normalised("Lung") != normalised("Lungs")


def greedy(lm, tokenizer, row, edit, room) -> list[int]:
    """Token by token, each from a pass over all that is written so far."""
    ids = tokenizer(f"{row['question'].strip()}\nAnswer in words:", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(room):
        with torch.no_grad(), applied(lm, tokenizer, edit):
            ids = torch.cat([ids, lm(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return ids[0, start:].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_is_written_is_transformers_own_greedy_answer(get_model, make_sae, model_folder, family, batch_size):
    """Of every family, in batches and one at a time: under no edit, a clamp, and one that looks at the whole prompt."""
    model, some = get_model(family), list(range(24))
    sae, (lm, tokenizer) = make_sae(model), hf(model_folder(family), torch.float32)
    edits = [NONE, edit_of("sae-ablation", sae, features=some, clamp=-9.0),
             edit_of("dsg", sae, features=some, clamp=-9.0, gate=0.05),
             edit_of("dsg", sae, features=some[:4], clamp=-90.0, gate=0.9)]  # fmt: skip
    assert edits[3].whole  # closed by the whole prompt, its gate would be open for a token alone
    found = evaluation.written_answers(model, QUESTIONS, edits, 9, batch_size)
    for edit, texts in zip(edits, found):
        for row, text in zip(QUESTIONS, texts):
            written = greedy(lm, tokenizer, row, edit, 9)
            assert text == tokenizer.decode(written, skip_special_tokens=True).split("\n")[0].strip()
            if edit.whole:
                continue
            ids = tokenizer(f"{row['question'].strip()}\nAnswer in words:", return_tensors="pt")
            with applied(lm, tokenizer, edit):
                own = lm.generate(**ids, do_sample=False, max_new_tokens=9, pad_token_id=0)
            assert own[0, ids["input_ids"].shape[1] :].tolist() == written
    assert len({tuple(texts) for texts in found[:3]}) == 3


def test_open_answers_are_scored_as_they_are_written(gemma, gemma_sae):
    """Right are the texts that are written, their likelihood is score_words' per token, and changes are paired."""
    edits = [NONE, edit_of("sae-ablation", gemma_sae, features=list(range(24)), clamp=-9.0)]
    rows = [{**row, "choices": list(row["choices"])} for row in QUESTIONS]
    for row, text in zip(rows[:2], evaluation.written_answers(gemma, rows, [NONE], 9)[0]):
        row["choices"][row["answer"]] = f"{text.upper()} ."
    room = 1 + max(len(gemma.tokenizer(f" {row['choices'][row['answer']]}")["input_ids"]) - 1 for row in rows)
    clean, ablated = evaluation.score_open(gemma, rows, edits, 2)
    texts = evaluation.written_answers(gemma, rows, edits, room)
    for score, said in zip((clean, ablated), texts):
        right = [normalised(text) == normalised(row["choices"][row["answer"]]) for text, row in zip(said, rows)]
        assert score["exact"]["accuracy"] == pytest.approx(sum(right) / 3) and score["exact"]["chance"] == 0.0
        assert score["exact"]["low"] <= score["exact"]["accuracy"] <= score["exact"]["high"]
    words, costs = score_words(gemma, rows, edits), []
    for values, score in zip(words, (clean, ablated)):
        nats = []
        for row, by_option in zip(rows, values):
            asked, answer = f"{row['question'].strip()}\nAnswer in words:", row["choices"][row["answer"]].strip()
            tokens = len(gemma.tokenizer(f"{asked} {answer}")["input_ids"]) - len(gemma.tokenizer(asked)["input_ids"])
            nats.append(-by_option[row["answer"]].item() * len(answer) / tokens)
        costs.append(np.array(nats))
        assert score["right_nats_per_token"]["mean"] == pytest.approx(np.mean(nats), abs=1e-5)
    assert ablated["right_nats_per_token"]["change"] == pytest.approx((costs[1] - costs[0]).mean(), abs=1e-5)
    assert "change" in ablated["exact"] and "change" not in clean["exact"]


def test_tiny_writes_most_answers_and_its_twin_none(twin):
    rows = load_rows("wmdp_bio")[0][::8]
    (clean,), (never,) = (evaluation.score_open(lm, rows, [NONE], 32) for lm in (load_model("tiny"), twin))
    assert clean["exact"]["accuracy"] > 0.75 and never["exact"]["accuracy"] < 0.05
    assert clean["right_nats_per_token"]["mean"] < 0.5 and never["right_nats_per_token"]["mean"] > 5


def test_a_prompt_without_room_for_its_answer_is_refused(gemma):
    long = {**QUESTIONS[0], "question": "the heart " * 160}
    most = gemma.tokenizer.model_max_length
    assert len(gemma.tokenizer(long["question"] + "\nAnswer in words:")["input_ids"]) < most < 9000
    with pytest.raises(UserError, match=f"the model {most} positions"):
        evaluation.written_answers(gemma, [long], [NONE], most)


NATS = torch.tensor([[2.0, 4.0, 6.0, 3.0], [3.0, 4.0, 9.0, 5.0]], dtype=torch.float64)
TARGETS, SOURCES = torch.tensor([2, 2, 3, 3]), [0, 0, 4, 7]


def test_loss_scores_by_hand():
    clean, ablated = loss_scores(NATS, TARGETS, SOURCES)
    assert clean == dict(nats_per_token=1.5, n_tokens=10, n_documents=3)
    assert ablated["nats_per_token"] == pytest.approx(2.1) and ablated["loss_added"] == pytest.approx(0.6)
    # the documents add 1 nat on 4 tokens, 3 on 3 and 2 on 3: no resample lies outside the extreme ones
    assert 0.25 <= ablated["loss_added_low"] < 0.6 < ablated["loss_added_high"] <= 1.0


def many_documents(n=60):
    noise = np.random.default_rng(0)
    targets = noise.integers(20, 120, n)
    clean = targets * 3.0
    return np.stack([clean, clean + targets * noise.normal(0.2, 0.1, n)]), targets


def test_loss_bootstrap_resamples_documents():
    nats, targets = many_documents()
    whole = loss_scores(torch.tensor(nats), torch.tensor(targets), list(range(60)))[1]
    # a document cut into two windows is still one document
    parts = torch.tensor(np.concatenate([nats * 0.25, nats * 0.75], 1))
    counts = torch.tensor(np.concatenate([targets // 2, targets - targets // 2]))
    cut = loss_scores(parts, counts, list(range(60)) * 2)[1]
    assert whole.keys() == cut.keys() and all(cut[key] == pytest.approx(whole[key]) for key in whole)
    again = loss_scores(torch.tensor(nats), torch.tensor(targets), list(range(60)), seed=0)[1]
    other = loss_scores(torch.tensor(nats), torch.tensor(targets), list(range(60)), seed=1)[1]
    assert again == whole and other["loss_added_low"] != whole["loss_added_low"]
    added = (nats[1] - nats[0]) / targets
    spread = 1.96 * added.std() / 60**0.5
    assert whole["loss_added_high"] - whole["loss_added_low"] == pytest.approx(2 * spread, rel=0.35)


def test_one_document_has_no_interval():
    found = loss_scores(NATS, TARGETS, [0, 0, 0, 0])[1]
    assert found["loss_added_low"] is None and found["loss_added_high"] is None


# -------------------------------------------------------------------------------------- robust subset


class Scorer:
    """Stands in for the model: `knows` gives its letter for a prompt; counts what it is asked."""

    def __init__(self, tokenizer, knows):
        self.tokenizer, self.knows, self.asked = tokenizer, knows, 0

    def __call__(self, model, prompts, letters, edits, *rest):
        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in prompts]
        self.asked += len(texts)
        return F.one_hot(torch.tensor([self.knows(text) for text in texts]), 4).float()[None]


def letter_of(text, choice):
    return [line[3:] for line in text.splitlines() if line[1:3] == ". "].index(choice)


def answers(text):
    """Knows every second question, prefers D on some, and gives another up at one order of the options only."""
    right = next(c for c in ("alpha", "beta", "gamma") if f"find {c}" in text)
    number = int(text.split("number ")[1].split(".")[0])
    if number % 4 == 1:
        return 3
    if number % 4 == 3 and [letter_of(text, c) for c in ("alpha", "beta", "gamma", "delta")] == [3, 2, 1, 0]:
        return (letter_of(text, right) + 1) % 4
    return letter_of(text, right)


def numbered_questions():
    words = ["alpha", "beta", "gamma", "delta"]
    return [dict(question=f"find {words[k % 3]}, number {k}.", choices=words, answer=k % 3) for k in range(12)]


def brute_force(questions, knows):
    right = []
    for k, row in enumerate(questions):
        orders = list(itertools.permutations(range(4)))
        assert len(orders) == 24
        if all(order[knows(prompt(row, order))] == row["answer"] for order in orders):
            right.append(k)
    return right


def test_robust_subset_equals_brute_force(gemma, monkeypatch):
    questions, scorer = numbered_questions(), Scorer(gemma.tokenizer, answers)
    monkeypatch.setattr(evaluation, "score_letters", scorer)
    wanted = brute_force(questions, answers)
    assert wanted == [0, 2, 4, 6, 8, 10]
    assert robust_subset(gemma, questions) == wanted
    assert 24 * len(wanted) < scorer.asked < 24 * len(questions)


def test_robust_subset_of_a_random_model(gemma, make_sae):
    def knows(text):
        ids, letters = encode_prompts(gemma.tokenizer, [text])
        return gemma(torch.tensor(ids))[0, -1, letters].argmax().item()

    assert robust_subset(gemma, QUESTIONS) == brute_force(QUESTIONS, knows)


# ------------------------------------------------------------------------------------------- foretelling


def test_a_long_run_is_foretold_from_one_batch(gemma, monkeypatch, capsys):
    rows, asked = [[2] * length for length in range(1, 101)], []
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: 0.2 * len(asked))
    score = asked.append

    assert evaluation.foretell(gemma, "MMLU", rows, score, 10) is None and not asked
    monkeypatch.setattr(evaluation, "WORTH_FORETELLING", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device, most: 7e9)
    monkeypatch.setattr(memory, "row_bytes", lambda model, tokens, *rest: tokens * 1e5)
    seconds = evaluation.foretell(gemma, "MMLU", rows, score, 10)
    assert [len(row) for row in asked[0]] == list(range(46, 56))  # a tenth of the tokens
    assert seconds == pytest.approx(2.0)
    assert "MMLU: 100 rows of 50 tokens to score, about 0.0 min; the longest takes 0.01 GB, 7.0 GB are free" in (
        capsys.readouterr().out
    )


# ------------------------------------------------------------------------------------- halves and prompts


def test_the_likelier_of_a_letters_two_forms_counts(gemma, make_sae):
    prompts, rows = some_ids(gemma, (3, 12)).tolist(), [NONE]
    both = score_letters(gemma, prompts, [(10, 20), (11, 21), (12, 22), (13, 23)], rows)
    forms = [score_letters(gemma, prompts, letters, rows) for letters in ([10, 11, 12, 13], [20, 21, 22, 23])]
    assert torch.equal(both, torch.maximum(*forms)) and not torch.equal(both, forms[0])
