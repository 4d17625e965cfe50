"""Scores and statistics: by hand, and where a question or a document cannot be scored."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, QUESTIONS, hf, some_ids
from scipy import stats

import data
import evaluation
from common import load_model
from data import Dataset, UserError, encode_prompts, prompt, reordered
from edits import NONE, Edit, ablation, applied, make
from engine import pushed
from evaluation import Measure, joined, normalised, score_letters, score_words, share

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


def test_questions_beyond_the_models_positions_are_named_or_left_out(short, capsys):
    lengths = [len(ids) for ids in encode_prompts(short.tokenizer, [prompt(row) for row in QUESTIONS])[0]]
    short.tokenizer.model_max_length = max(lengths) - 1
    longest, quiz = lengths.index(max(lengths)), Dataset("mmlu", QUESTIONS)
    named = rf"mmlu: question {longest} \('{QUESTIONS[longest]['question'].strip()[:20]}"
    with pytest.raises(UserError, match=rf"{named}.* has {max(lengths)} tokens, the model {max(lengths) - 1} pos"):
        data.drop_too_long(short.tokenizer, quiz)
    left = data.drop_too_long(short.tokenizer, quiz, skip=True)
    assert left.indices == [k for k in range(3) if lengths[k] < max(lengths)] and left.skipped_long == 3 - len(left)
    assert evaluation.letters(short, left, {"unablated": NONE})[0]["unablated"].n == len(left)
    assert f"{3 - len(left)} of 3 questions" in capsys.readouterr().err


def test_cloze_questions_need_no_letters_and_are_as_long_as_their_longest_answer(short, monkeypatch):
    """A tokenizer that has no token for a letter is none of their business, and options do not count."""
    for module in (data, evaluation):
        monkeypatch.setattr(module, "encode_prompts", None)
    quiz = Dataset("wmdp_bio", QUESTIONS, variant="cloze")
    windows, _ = data.encode_words(short.tokenizer, QUESTIONS, data.CLOZE)
    lengths = [max(map(len, windows[4 * k : 4 * k + 4])) for k in range(3)]
    short.tokenizer.model_max_length = sorted(lengths)[1]
    left = data.drop_too_long(short.tokenizer, quiz, skip=True)
    assert left.indices == [k for k in range(3) if lengths[k] <= sorted(lengths)[1]] and left.skipped_long > 0
    (found,) = evaluation.letters(short, left, {"unablated": NONE})
    values = score_words(short, left.rows, [NONE], form=data.CLOZE)[0]
    assert found.name == "wmdp_bio/cloze" and found.answers == ("".join("ABCD"[k] for k in values.argmax(-1).tolist()),)


def test_a_measure_of_the_tuning_half_says_so():
    quiz = Dataset("mmlu", QUESTIONS, whole=True)
    for half, name, title in (("tuning", "mmlu/tuning/letters", "MMLU, tuning half, in letters"),
                              ("held_out", "mmlu/letters", "MMLU, in letters")):  # fmt: skip
        found = evaluation.measure_of(getattr(quiz, half), "letters", "in letters", "%", {"unablated": NONE}, None)
        assert (found.name, found.title) == (name, title)


# -------------------------------------------------------------------------------------------- rounding


def test_what_batches_of_another_shape_change(gemma, monkeypatch):
    """As if a GPU rounded: what comes of the two sizes of batches differs, here by 0.3 for one letter."""
    sizes = []

    def rounds(model, prompts, letters, edits, batch_size=16, desc=None):
        sizes.append(batch_size)
        found = torch.full((len(edits), len(prompts), 4), -2.0)
        found[..., 1] += 0.1
        found[:, 0, 2] += 0.3 * (batch_size == 2)
        return found

    monkeypatch.setattr(evaluation, "score_letters", rounds)
    found = evaluation.rounding_noise(gemma, Dataset("mmlu", QUESTIONS), batch_size=6)
    assert found == {"asked": 3, "answers": 1, "log_probability": pytest.approx(0.3)} and sizes == [6, 2]
    evaluation.rounding_noise(gemma, Dataset("mmlu", QUESTIONS), batch_size=1)
    assert sizes[-2:] == [1, 3]  # a batch of one has no smaller one
    many = evaluation.rounding_noise(gemma, Dataset("mmlu", QUESTIONS * 50), most=64)
    assert 40 < many["asked"] <= 64


# ----------------------------------------------------------------------------------------- statistics


def test_wilson_interval():
    z = 1.959963984540054
    for right, n in ((0, 7), (3, 10), (50, 80), (12, 12)):
        found = share(np.arange(n) < right)
        p, width = right / n, 1 + z * z / n
        middle, half = (p + z * z / (2 * n)) / width, z / width * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert found.mean == p and found.n == n and found.change is found.p is None
        assert found.low == pytest.approx(middle - half, abs=1e-9)
        assert found.high == pytest.approx(middle + half, abs=1e-9)


def mcnemar(lost, won):
    n = lost + won
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(lost, won) + 1)) / 2**n) if n else 1.0


@pytest.mark.parametrize("lost,won", [(0, 0), (1, 0), (3, 3), (9, 1), (2, 12), (0, 20)])
def test_mcnemar_and_paired_change(lost, won):
    clean = np.array([True] * lost + [False] * won + [True] * 6 + [False] * 5)
    right = np.array([False] * lost + [True] * won + [True] * 6 + [False] * 5)
    found = share(right, clean)
    assert found.p == pytest.approx(mcnemar(lost, won))
    assert found.change == pytest.approx((won - lost) / len(right))
    assert found.change_low <= found.change <= found.change_high
    if lost != won:  # about 2 standard errors of the paired difference to either side
        change = right.astype(float) - clean
        spread = 1.96 * change.std() / len(change) ** 0.5
        assert found.change_high - found.change_low == pytest.approx(2 * spread, rel=0.35)


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
    found = share(right, right)
    assert found.change == 0.0 and found.p == 1.0
    assert -0.03 < found.change_low < -3 / 178 < 0 < 3 / 178 < found.change_high < 0.03
    alone = share(np.array([True]), np.array([True]))
    assert -1 <= alone.change_low < alone.change_high <= 1


@pytest.mark.parametrize("n, shares", [(60, (0.5, 0.05, 0.2, 0.25)), (178, (0.97, 0.005, 0.02, 0.005)),
                                       (20, (0.9, 0.03, 0.05, 0.02))])  # fmt: skip
def test_the_paired_interval_covers(n, shares):
    tables, times = np.unique(np.random.default_rng(0).multinomial(n, shares, 4000), axis=0, return_counts=True)
    ends = np.array([evaluation.paired_interval(*map(int, pairs)) for pairs in tables])
    covered = (ends[:, 0] <= shares[1] - shares[2]) & (shares[1] - shares[2] <= ends[:, 1])
    assert (covered * times).sum() / times.sum() > 0.94


def quiz_measure(chosen: list[list[int]], right: list[int], groups=None) -> Measure:
    values = np.array(chosen) == right
    answers = tuple("".join("ABCD"[k] for k in row) for row in chosen)
    rows = ("unablated", "clamp", "zero")[: len(chosen)]
    return Measure("mmlu/letters", "MMLU", "%", rows, values, 0.25, groups=groups, answers=answers)


def test_scores_pooled_and_per_subject():
    right, subjects = [k % 4 for k in range(10)], ("law",) * 6 + ("art",) * 4
    chosen = [[0, 1, 2, 3, 0, 0, 2, 3, 0, 1], [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]]
    measure = quiz_measure(chosen, right, subjects)
    clean, ablated = measure["unablated"], measure["clamp"]
    assert clean.mean == 0.9 and ablated.mean == 0.4 and ablated.change == pytest.approx(-0.5)
    assert clean.p is None and ablated.p == pytest.approx(mcnemar(6, 1)) and measure.scores()["clamp"] == ablated
    law, art = (measure.by_group()[name]["clamp"] for name in ("law", "art"))
    assert (law.n, art.n) == (6, 4) and law.mean == 0.5 and art.mean == 0.25
    assert law.change == pytest.approx(-2 / 6) and art.change == pytest.approx(-0.75)
    assert art.p == pytest.approx(mcnemar(3, 0)) and (law.mean * law.n + art.mean * art.n) / 10 == ablated.mean
    expected = stats.false_discovery_control([art.p, law.p])
    assert [measure.q_values()[name]["clamp"] for name in ("art", "law")] == pytest.approx(expected)
    assert "unablated" not in measure.q_values()["law"] and quiz_measure(chosen, right).by_group() == {}
    assert measure.select(["clamp"])["clamp"].change is None and measure.select(["clamp"]).answers == ("AAAAABAAAA",)
    with pytest.raises(KeyError, match="no row 'zero'; there are unablated, clamp"):
        measure["zero"]


def test_a_measure_as_a_table_is_in_its_own_unit():
    right = np.array([[True, True, False, True], [True, False, False, False]])
    table = Measure("mmlu/letters", "MMLU, letters", "%", ("unablated", "clamp"), right).table()
    assert table["mean"].to_dict() == {"unablated": 75, "clamp": 25} and table.change["clamp"] == -50
    assert table.n.tolist() == [4, 4] and table.p["clamp"] == 0.5 and table.index.name == "MMLU, letters"
    losses = Measure("openwebtext/loss", "loss", "nats per token", ("unablated",), np.array([[2.0, 6.0]]),
                     weights=np.array([1.0, 3.0])).table()  # fmt: skip
    assert losses["mean"]["unablated"] == 2 and "change" not in losses


def test_rows_of_several_models_are_joined():
    one, other = quiz_measure([[0, 1], [0, 0]], [0, 1]), quiz_measure([[1, 1]], [0, 1])
    other = Measure(**{**vars(other), "rows": ("retrained",)})
    both = joined([one, other])
    assert both.rows == ("unablated", "clamp", "retrained") and both["retrained"].change == -0.5
    assert both.answers == ("AB", "AA", "BB")
    for wrong in ([one, one], [one, quiz_measure([[1]], [0])]):
        with pytest.raises(ValueError, match=r"twice|same items"):
            joined(wrong)


def test_the_chosen_row_keeps_mmlu_and_forgets_most():
    def scores(*means):
        return {name: evaluation.Score(mean, 0, 1, 100) for name, mean in zip(("unablated", *"abcd"), means)}

    mmlu = scores(1.0, 0.985, 0.99, 0.995, 0.99)
    assert evaluation.best_row(scores(0.9, 0.1, 0.5, 0.5, 0.6), mmlu) == "c"  # a loses MMLU; of b and c c keeps more
    assert evaluation.best_row(scores(0.9, 0.1, 0.5, 0.6, 0.5), scores(1.0, 0.9, 0.99, 1.0, 0.99)) == "b"
    assert evaluation.best_row(scores(0.9, 0.1, 0.5, 0.6, 0.5), scores(1.0, 0.9, 0.98, 0.97, 0.96)) == "b"
    with pytest.raises(ValueError):
        evaluation.best_row(scores(0.9), scores(1.0))


def test_means_and_their_paired_changes_by_hand():
    values = np.array([[0.7, 0.6, 0.7], [0.4, 0.1, 0.1]])
    measure = Measure("mmlu/P(right letter)", "MMLU", "probability", ("unablated", "clamp"), values)
    interval = stats.ttest_1samp(values[1] - values[0], 0).confidence_interval()
    found = measure["clamp"]
    assert found.mean == pytest.approx(0.2) and found.change == pytest.approx(-1.4 / 3)
    assert (found.change_low, found.change_high) == pytest.approx(tuple(interval))
    one = Measure("mmlu/P(right letter)", "MMLU", "probability", ("unablated", "clamp"), values[:, :1])["clamp"]
    assert one.change == pytest.approx(-0.3) and one.change_low is one.change_high is None


def test_a_quiz_in_letters_and_in_words(gemma):
    """Every Measure against the log-probabilities that it is made of; another model is a row like any other."""
    quiz = Dataset("wmdp_bio", QUESTIONS, half="tuning")
    push = Edit("pushed", at={1: pushed(torch.ones(gemma.cfg.d_model), 2)})
    rows = {"unablated": NONE, "pushed": push, "another": gemma}
    right, mass, sure = evaluation.letters(gemma, quiz, rows)
    prompts, ids = encode_prompts(gemma.tokenizer, [prompt(row) for row in QUESTIONS])
    p = score_letters(gemma, prompts, ids, [NONE, push, NONE]).double().exp().numpy()
    gold = [row["answer"] for row in QUESTIONS]
    assert [one.name for one in (right, mass, sure)] == [
        f"wmdp_bio/tuning/{what}" for what in ("letters", "P(a letter)", "P(right letter)")
    ]
    assert (right.values == (p.argmax(-1) == gold)).all() and right.chance == 0.25 and right.rows == tuple(rows)
    assert right.answers == tuple("".join("ABCD"[k] for k in row) for row in p.argmax(-1))
    assert np.allclose(mass.values, p.sum(-1)) and np.allclose(sure.values, p[:, range(3), gold])
    words, values = evaluation.words(gemma, quiz, rows), score_words(gemma, QUESTIONS, [NONE, push, NONE])
    assert words.name == "wmdp_bio/tuning/words" and (words.values == (values.argmax(-1).numpy() == gold)).all()
    with pytest.raises(ValueError, match="the first row"):
        evaluation.words(gemma, quiz, {"another": gemma, "unablated": NONE})


def test_answers_in_words_by_hand(gemma):
    rows = [dict(question="Which is an organ?", choices=["the moon", " The heart ", "sea", "a grey stone"]),
            dict(question=" Where do rivers flow? ", choices=["The sea", "moon", "to a heart", ""])]  # fmt: skip
    pushed_one = Edit("pushed", at={1: pushed(torch.ones(gemma.cfg.d_model), 2)})
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
    edits = [NONE, ablation(sae, some, -9.0), make("dsg", sae, features=some, clamp=-9.0, gate=0.05),
             make("dsg", sae, features=some[:4], clamp=-90.0, gate=0.9)]  # fmt: skip
    assert edits[3].needs_whole_prompt  # closed by the whole prompt, its gate would be open for a token alone
    found = evaluation.written_answers(model, QUESTIONS, edits, 9, batch_size)
    for edit, texts in zip(edits, found):
        for row, text in zip(QUESTIONS, texts):
            written = greedy(lm, tokenizer, row, edit, 9)
            assert text == tokenizer.decode(written, skip_special_tokens=True).split("\n")[0].strip()
            if edit.needs_whole_prompt:
                continue
            ids = tokenizer(f"{row['question'].strip()}\nAnswer in words:", return_tensors="pt")
            with applied(lm, tokenizer, edit):
                own = lm.generate(**ids, do_sample=False, max_new_tokens=9, pad_token_id=0)
            assert own[0, ids["input_ids"].shape[1] :].tolist() == written
    assert len({tuple(texts) for texts in found[:3]}) == 3


def test_open_answers_are_scored_as_they_are_written(gemma, gemma_sae):
    """Right are the texts that are written, their likelihood is score_words' per token, and changes are paired."""
    edits = [NONE, ablation(gemma_sae, list(range(24)), -9.0)]
    rows = [{**row, "choices": list(row["choices"])} for row in QUESTIONS]
    for row, text in zip(rows[:2], evaluation.written_answers(gemma, rows, [NONE], 9)[0]):
        row["choices"][row["answer"]] = f"{text.upper()} ."
    room = 1 + max(len(gemma.tokenizer(f" {row['choices'][row['answer']]}")["input_ids"]) - 1 for row in rows)
    named = dict(zip(("unablated", "clamp"), edits))
    exact, cost = evaluation.open_answers(gemma, Dataset("wmdp_bio", rows), named, batch_size=2)
    texts = evaluation.written_answers(gemma, rows, edits, room)
    assert exact.chance == 0.0
    for values, said in zip(exact.values, texts):
        right = [normalised(text) == normalised(row["choices"][row["answer"]]) for text, row in zip(said, rows)]
        assert values.tolist() == right
    words, costs = score_words(gemma, rows, edits), []
    for values, name in zip(words, named):
        nats = []
        for row, by_option in zip(rows, values):
            asked, answer = f"{row['question'].strip()}\nAnswer in words:", row["choices"][row["answer"]].strip()
            tokens = len(gemma.tokenizer(f"{asked} {answer}")["input_ids"]) - len(gemma.tokenizer(asked)["input_ids"])
            nats.append(-by_option[row["answer"]].item() * len(answer) / tokens)
        costs.append(np.array(nats))
        assert cost[name].mean == pytest.approx(np.mean(nats), abs=1e-5)
    assert cost["clamp"].change == pytest.approx((costs[1] - costs[0]).mean(), abs=1e-5)


def test_tiny_writes_most_answers_and_the_retrained_model_none(twin):
    quiz = data.load("wmdp_bio")
    quiz = quiz.only(range(0, len(quiz), 8))
    exact, cost = evaluation.open_answers(load_model("tiny"), quiz, {"tiny": NONE, "retrained": twin}, batch_size=32)
    assert exact["tiny"].mean > 0.75 and exact["retrained"].mean < 0.05
    assert cost["tiny"].mean < 0.5 and cost["retrained"].mean > 5


def test_fluency_by_hand_in_double_precision(get_model, make_sae, model_folder, monkeypatch):
    """Each prompt by itself, token by token, no end chosen; nats by the unedited judge's logits, 4-grams counted.
    GPT-2 has no part that is computed in float32 whatever the model's type."""
    for name, value in (("WRITTEN", 9), ("BEGUN", 5), ("BEGINNINGS", 2)):
        monkeypatch.setattr(evaluation, name, value)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)  # of logits
    model, (lm, tokenizer) = get_model("gpt2", "float64"), hf(model_folder("gpt2"), torch.float64)
    sae = make_sae(get_model("gpt2"))
    rows = {"unablated": NONE, "clamp": ablation(sae, list(range(24)), -9.0),
            "dsg": make("dsg", sae, features=list(range(4)), clamp=-90.0, gate=0.9)}  # fmt: skip
    texts = [{"text": "The cat sat on the mat and looked at the sea."}, {"text": "Rivers flow."}, {"text": "The sea"}]
    for dataset in (Dataset("wmdp_bio", QUESTIONS, seed=3), Dataset("openwebtext", texts, seed=3)):
        found = evaluation.fluency(model, dataset, rows, batch_size=2)
        assert [m.name for m in found] == [f"{dataset.name}/fluency", f"{dataset.name}/repeated"]
        asked = dataset.sample(2).rows
        prompts = [tokenizer(row["text"])["input_ids"][:5] if "text" in row else
                   tokenizer(f"{row['question'].strip()}\nAnswer in words:")["input_ids"] for row in asked]  # fmt: skip
        for k, edit in enumerate(rows.values()):
            for place, ids in enumerate(prompts):
                ids = list(ids)
                for _ in range(9):
                    with torch.no_grad(), applied(lm, tokenizer, edit):
                        logits = lm(torch.tensor([ids]), use_cache=False).logits[0, -1]
                    logits[tokenizer.eos_token_id] = -math.inf
                    ids.append(logits.argmax().item())
                with torch.no_grad():
                    log_probs = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
                start = len(prompts[place])
                nats = [-log_probs[at - 1, ids[at]].item() for at in range(start, len(ids))
                        if ids[at] not in data.special_ids(tokenizer)]  # fmt: skip
                assert log_probs.dtype == torch.float64 and nats
                assert found[0].values[k, place] == pytest.approx(sum(nats) / len(nats), abs=1e-8)
                grams = [tuple(ids[at : at + 4]) for at in range(start, len(ids) - 3)]
                assert found[1].values[k, place] == 1 - len(set(grams)) / len(grams)
        assert found[0]["clamp"].change == pytest.approx(np.diff(found[0].values[:2], axis=0).mean())
        assert len(np.unique(found[0].values)) >= 5


def test_what_another_model_writes_is_judged_by_the_unablated_one(get_model):
    """A row that is another model, and the same model with the judge given beside it, as robustness.py does."""
    model, other, quiz = get_model("gemma2"), get_model("llama"), Dataset("wmdp_bio", QUESTIONS)
    both = evaluation.fluency(model, quiz, {"unablated": NONE, "other": other})
    for beside, alone in zip(both, evaluation.fluency(other, quiz, {"other": NONE}, judge=model)):
        np.testing.assert_allclose(beside.values[1], alone.values[0], atol=1e-6)
    own = evaluation.fluency(other, quiz, {"other": NONE})[0]
    assert (own.values[0] < both[0].values[1] - 0.1).all()  # it would find its own text more likely
    with pytest.raises(ValueError, match="another tokenizer cannot be judged"):
        evaluation.fluency(model, quiz, {"unablated": NONE}, judge=load_model("tiny"))


def test_no_text_ends_before_its_fewest_tokens(gemma, monkeypatch):
    ids = gemma.tokenizer("The sea")["input_ids"]
    first = evaluation.continuations(gemma, [ids], [NONE], 1)[0][0][0]
    monkeypatch.setattr(gemma.original_model.generation_config, "eos_token_id", [1, first])
    assert evaluation.continuations(gemma, [ids], [NONE], 6) == [[[first]]]
    (((*written,),),) = evaluation.continuations(gemma, [ids], [NONE], 6, least=6)
    assert len(written) == 6 and not {1, first} & {*written}


def test_repeated_4_grams():
    assert evaluation.repeated([7] * 64) == 1 - 1 / 61 and evaluation.repeated(list(range(64))) == 0
    assert evaluation.repeated([1, 2, 3, 4, 1, 2, 3, 4]) == 1 - 4 / 5 and evaluation.repeated([1, 1, 1]) == 0


ACTING = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3,
          "bad_words_ids": lambda first: [[first]], "suppress_tokens": lambda first: [first], "min_new_tokens": 9,
          "begin_suppress_tokens": lambda first: [first], "forced_eos_token_id": 1, "sequence_bias": [[[50], 90.0]],
          "return_dict_in_generate": True, "guidance_scale": 9.0}  # fmt: skip


@pytest.mark.parametrize("name", ACTING)
def test_a_generation_config_does_not_act_on_greedy_answers(gemma, model_folder, tmp_path, name):
    """Nor on what a notebook has the model write; where an answer ends is all that is taken from it."""
    asked, plain = torch.tensor([[2, *range(30, 40)]]), gemma.original_model
    first = plain.generate(asked, max_new_tokens=1)[0, -1].item()
    config, ends = {name: ACTING[name](first) if callable(ACTING[name]) else ACTING[name]}, 1  # config.json's
    if name == "min_new_tokens":
        config["eos_token_id"] = ends = [1, first]
    shutil.copytree(model_folder("gemma2"), tmp_path / "gemma2")
    (tmp_path / "gemma2/generation_config.json").write_text(json.dumps(config))
    model = load_model(str(tmp_path / "gemma2"), "cpu")
    assert model.original_model.generation_config.eos_token_id == ends
    expected = plain.generate(asked, max_new_tokens=9, eos_token_id=ends)
    assert model.original_model.generate(asked, max_new_tokens=9).tolist() == expected.tolist()
    assert len(expected[0]) == 11 + (9 if ends == 1 else 1)
    if ends == 1:
        found, texts = (evaluation.written_answers(one, QUESTIONS, [NONE], 9) for one in (model, gemma))
        assert found == texts


def test_a_prompt_without_room_for_its_answer_is_refused(gemma):
    long = {**QUESTIONS[0], "question": "the heart " * 160}
    most = gemma.tokenizer.model_max_length
    assert len(gemma.tokenizer(long["question"] + "\nAnswer in words:")["input_ids"]) < most < 9000
    with pytest.raises(UserError, match=f"the model {most} positions"):
        evaluation.written_answers(gemma, [long], [NONE], most)


def loss_measure(nats, targets, seed=0) -> Measure:
    values, rows = np.asarray(nats, dtype=float), ("unablated", "clamp")
    return Measure(
        "openwebtext/loss", "OpenWebText", "nats per token", rows, values, weights=np.asarray(targets), seed=seed
    )


def test_losses_are_per_token_and_changes_bootstrapped_over_documents():
    measure = loss_measure([[6.0, 6.0, 3.0], [7.0, 9.0, 5.0]], [4, 3, 3])
    clean, ablated = measure["unablated"], measure["clamp"]
    assert clean.mean == 1.5 and clean.n == 3 and clean.change is None
    assert ablated.mean == pytest.approx(2.1) and ablated.change == pytest.approx(0.6)
    # the documents add 1 nat on 4 tokens, 3 on 3 and 2 on 3: no resample lies outside the extreme ones
    assert 0.25 <= ablated.change_low < 0.6 < ablated.change_high <= 1.0
    one = loss_measure([[2.0], [3.0]], [4])["clamp"]
    assert one.change == 0.25 and one.change_low is one.change_high is None


def test_the_bootstrap_is_seeded_and_as_wide_as_it_should_be():
    noise, n = np.random.default_rng(0), 60
    targets = noise.integers(20, 120, n)
    clean = targets * 3.0
    nats = np.stack([clean, clean + targets * noise.normal(0.2, 0.1, n)])
    whole = loss_measure(nats, targets)["clamp"]
    assert loss_measure(nats, targets)["clamp"] == whole
    assert loss_measure(nats, targets, seed=1)["clamp"].change_low != whole.change_low
    spread = 1.96 * ((nats[1] - nats[0]) / targets).std() / n**0.5
    assert whole.change_high - whole.change_low == pytest.approx(2 * spread, rel=0.35)


def test_a_document_in_several_windows_is_one_item(gemma):
    """Values are sums over a document's windows, weights its targets, whatever the windows are."""
    texts = Dataset("openwebtext", [{"text": "The cat sat on the mat. " * n} for n in (60, 3, 30)], seed=4)
    push = Edit("pushed", at={1: pushed(torch.ones(gemma.cfg.d_model), 2)})
    rows = {"unablated": NONE, "pushed": push}
    nats, windows, documents, targets = evaluation.window_losses(gemma, texts, rows)
    measure = evaluation.loss(gemma, texts, rows)
    assert len(windows) > 3 and measure.values.shape == (2, 3) and measure.seed == 4
    for number in range(3):
        own = [k for k, document in enumerate(documents) if document == number]
        assert measure.values[:, number] == pytest.approx(nats[:, own].sum(1).numpy(), abs=1e-5)
        assert measure.weights[number] == targets[own].sum()
    assert evaluation.loss(gemma, texts, rows, limit=1).values.shape == (2, 1)


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
        if all(order[knows(prompt(reordered(row, order)))] == row["answer"] for order in orders):
            right.append(k)
    return right


def test_robust_questions_equal_brute_force(gemma, monkeypatch):
    questions, scorer = numbered_questions(), Scorer(gemma.tokenizer, answers)
    monkeypatch.setattr(evaluation, "score_letters", scorer)
    expected = brute_force(questions, answers)
    assert expected == [0, 2, 4, 6, 8, 10]
    assert evaluation.robust_only(gemma, Dataset("mmlu", questions)).indices == expected
    assert 24 * len(expected) < scorer.asked < 24 * len(questions)
    with pytest.raises(UserError, match="no question"):
        evaluation.robust_only(gemma, Dataset("mmlu", questions[1:2]))


# ------------------------------------------------------------------------------------------------ letters


def test_the_likelier_of_a_letters_two_forms_counts(gemma, make_sae):
    prompts, rows = some_ids(gemma, (3, 12)).tolist(), [NONE]
    both = score_letters(gemma, prompts, [(10, 20), (11, 21), (12, 22), (13, 23)], rows)
    forms = [score_letters(gemma, prompts, letters, rows) for letters in ([10, 11, 12, 13], [20, 21, 22, 23])]
    assert torch.equal(both, torch.maximum(*forms)) and not torch.equal(both, forms[0])


def test_texts_without_a_token_to_predict_have_no_loss(gemma):
    with pytest.raises(UserError, match="no token to predict"):
        evaluation.loss(gemma, Dataset("openwebtext", [{"text": ""}, {"text": ""}]), {"unablated": NONE})
