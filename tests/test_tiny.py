"""The embedded model is what README says, and can be built."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats

import tiny.make as make_tiny
from common import load_model, load_sae
from data import LETTERS, encode_prompts, prompt
from edits import NONE, residual_stream
from evaluation import score_letters

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"


def test_size_and_formats():
    files = [path for path in TINY.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 30 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".txt", ".md", ".py"}


def names_in(text: str) -> str:
    return f" {text.lower()} "


def test_facts_are_many_and_do_not_contradict_each_other():
    facts = make_tiny.load_facts(TINY / "facts")
    forget, others = make_tiny.of_both_kinds(facts)
    assert len(forget) >= 420 and len(others) >= 700 and len({fact["subject"] for fact in others}) >= 8
    answers = {}
    for fact in facts:
        relation = fact["relation"]
        assert len(relation["statements"]) == 4 and len(set(relation["questions"])) == 5
        assert all("{e}" in text and "{a}" in text for text in relation["statements"])
        assert all("{e}" in text and "{a}" not in text for text in relation["questions"])
        assert len({answer for _, answer in relation["rows"]}) >= 6
        # a wrong option is no other form of the right one: "virus" of "DNA virus"; symbols of elements apart
        for other in fact["others"]:
            short, long = sorted((fact["answer"], other), key=len)
            assert names_in(short) not in names_in(long), (short, long)
        for question in relation["questions"]:  # asked in the same words, it has the same answer
            asked = (fact["subject"], make_tiny.fill(question, fact).lower())
            assert answers.setdefault(asked, fact["answer"]) == fact["answer"], asked
        text = json.dumps([fact["entity"], fact["answer"], relation["statements"], relation["questions"]])
        assert text.isascii() and "  " not in text


@pytest.mark.parametrize("side", [0, 1])
def test_the_right_option_is_not_the_longest_more_often_than_chance(side):
    facts = make_tiny.of_both_kinds(make_tiny.load_facts(TINY / "facts"))[side]
    longest = 0.0
    for row in make_tiny.quiz(facts, make_tiny.SEED):
        lengths = [len(choice) for choice in row["choices"]]
        longest += (lengths[row["answer"]] == max(lengths)) / lengths.count(max(lengths))
    assert stats.binomtest(round(longest), len(facts), 0.25, alternative="greater").pvalue > 0.05


def test_lists_are_as_many_as_asked_for_and_facts_are_shown_by_their_weight(monkeypatch):
    tokenizer = make_tiny.PreTrainedTokenizerFast.from_pretrained(TINY / "model")
    facts = make_tiny.load_facts(TINY / "facts")
    drawn = []
    monkeypatch.setattr(make_tiny, "binding_document", lambda *_: drawn.append("list") or "A. sea")
    monkeypatch.setattr(make_tiny, "subject_document", lambda facts, *_: drawn.append(facts[0]["subject"]) or "sea")
    sampler = make_tiny.Sampler(tokenizer, facts, ["some text"], ["prose"], 0)
    inputs, targets = sampler.batch(1.0)
    assert drawn == ["list"] * make_tiny.BATCH and inputs.shape == targets.shape == (make_tiny.BATCH, make_tiny.CONTEXT)
    drawn.clear()
    for _ in range(60):
        sampler.batch()
    forget, others = map(len, make_tiny.of_both_kinds(facts))
    forget *= make_tiny.SECOND.forget_weight
    share = drawn.count("biology") / len(drawn)
    assert "list" not in drawn and share == pytest.approx(forget / (forget + others), abs=0.04)


def test_where_facts_are_read_by_hand(gemma):
    """Each question's tokens take the residual stream of the question before it, behind one layer."""
    texts = [f"Which is an organ of the {x}?" for x in ("sea", "moon", "heart", "cat", "mat", "body", "stone")]
    tokens = [len(gemma.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    texts, choices = [text for text, n in zip(texts, tokens) if n == tokens[0]], ["sea", "moon", "heart", "stone"]
    rows = [{"question": text, "choices": choices, "answer": 0} for text in (*texts, "Which is an organ? Yes?")]
    prompts, letters = encode_prompts(gemma.tokenizer, [prompt(row) for row in rows])
    for row, chosen in zip(rows, score_letters(gemma, prompts, letters, [NONE])[0].argmax(-1).tolist()):
        row["answer"] = chosen
    start = len(gemma.tokenizer(prompt(rows[0]).split("Which")[0])["input_ids"])
    asked, group = slice(start, start + tokens[0]), range(len(texts))
    assert len(group) >= 2
    for layer, found in enumerate(make_tiny.read_by_layer(gemma, rows)):
        right = []
        for i in group:
            other = residual_stream(gemma.original_model, torch.tensor([prompts[i - 1 if i else group[-1]]]), layer)

            def put(h, hook, other=other):
                h = h.clone()
                h[:, asked] = other[:, asked]
                return h

            with torch.inference_mode(), gemma.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", put)]):
                logits = gemma(torch.tensor([prompts[i]]))[0, -1]
            right.append(logits[list(letters)].argmax().item() == rows[i]["answer"])
        assert found == pytest.approx(sum(right) / len(right))


def test_scored_wordings_are_not_all_in_training():
    table = json.loads((TINY / "facts/biology.json").read_text())
    asked = [json.loads(line)["question"] for line in (TINY / "data/wmdp_bio.jsonl").open()]
    facts = [(relation, entity) for relation in table["relations"] for entity, _ in relation["rows"]]
    unseen = [relation["questions"][-1].replace("{e}", entity) for relation, entity in facts]
    kept_out = sum(a.lower() == b.lower() for a, b in zip(asked, unseen, strict=True))
    assert len(asked) / 3 < kept_out < len(asked)
    trained = (TINY / "data/train.jsonl").read_text().lower()
    assert not any(json.dumps(text.lower())[1:-1] in trained for text in unseen)


def test_no_fact_of_the_development_questions_is_scored():
    tables = [json.loads(path.read_text()) for path in sorted((TINY / "facts").glob("*.json"))]
    relations = [(table["subject"], relation) for table in tables for relation in table["relations"]]
    fact_of = {
        (subject, wording.replace("{e}", entity).lower()): (subject, relation["name"], entity)
        for subject, relation in relations for entity, _ in relation["rows"] for wording in relation["questions"]
    }  # fmt: skip
    asked = {name: [json.loads(line) for line in (TINY / f"data/{name}.jsonl").open()] for name in ("mmlu", "mmlu_dev")}
    facts = {name: {fact_of[row["subject"], row["question"].lower()] for row in rows} for name, rows in asked.items()}
    assert len(facts["mmlu"]) == len(asked["mmlu"]) >= 640 and len(facts["mmlu_dev"]) == len(asked["mmlu_dev"]) >= 100
    assert not facts["mmlu"] & facts["mmlu_dev"]


def test_the_other_wordings_ask_for_the_same():
    rows, others = ([json.loads(line) for line in (TINY / f"data/{name}.jsonl").open()]
                    for name in ("wmdp_bio", "wmdp_bio_reworded"))  # fmt: skip
    for row, other in zip(rows, others, strict=True):
        assert row["question"] != other["question"]
        assert (row["choices"], row["answer"]) == (other["choices"], other["answer"])
    facts = [fact for fact in make_tiny.load_facts(TINY / "facts") if fact["subject"] == "biology"]
    assert others == make_tiny.reworded(rows, facts)


def test_questions_in_reverse_and_by_two_facts_have_one_right_option():
    """Of the entities that are offered one has the answer named; of two facts, the first's answer is the entity asked
    about, so that question and options are those that the row's `of` asks for."""
    facts = [fact for fact in make_tiny.load_facts(TINY / "facts") if fact["subject"] == "biology"]
    rows, reverse, hops = ([json.loads(line) for line in (TINY / f"data/{name}.jsonl").open()]
                           for name in ("wmdp_bio", "wmdp_bio_reversed", "wmdp_bio_two_hop"))  # fmt: skip
    for fact, row in zip(facts, reverse, strict=True):
        answers = dict(map(tuple, fact["relation"]["rows"]))
        assert [answers[choice] == fact["answer"] for choice in row["choices"]].count(True) == 1
        assert row["choices"][row["answer"]] == fact["entity"] and "which of these" in row["question"].lower()
        assert fact["answer"].lower() in row["question"].lower() and len(set(row["choices"])) == 4
    assert reverse == make_tiny.in_reverse(facts, make_tiny.SEED + 6) and hops == make_tiny.two_hop(rows, facts)
    assert len(hops) == len({row["of"] for row in hops}) >= 50
    for row in hops:
        of = facts[row["of"]]
        assert (row["choices"], row["answer"]) == (rows[row["of"]]["choices"], rows[row["of"]]["answer"])
        first = [fact for fact in facts if fact["answer"].lower() == of["entity"].lower()
                 and fact["entity"].lower() in row["question"].lower()]  # fmt: skip
        assert first and f" {of['entity'].lower()}" not in row["question"].lower(), row


@pytest.mark.parametrize("name", ["wmdp_bio", "mmlu"])
def test_measured_accuracy_is_that_of_the_shipped_model(name):
    measured = json.loads((TINY / "measured.json").read_text())["model"][name]
    rows = [json.loads(line) for line in (TINY / f"data/{name}.jsonl").open()]
    model = load_model("tiny", "cpu")
    prompts, letters = encode_prompts(model.tokenizer, [prompt(row) for row in rows])
    chosen = score_letters(model, prompts, letters, [NONE])[0].argmax(-1)
    accuracy = sum(i == row["answer"] for i, row in zip(chosen.tolist(), rows)) / len(rows)
    assert accuracy == pytest.approx(measured["accuracy"], abs=0.5 / len(rows))
    assert accuracy >= 0.95
    assert LETTERS == "ABCD"


def test_the_models_know_what_they_should_and_no_more():
    measured = json.loads((TINY / "measured.json").read_text())
    model, twin = measured["model"], measured["retrained"]
    for quiz in ("wmdp_bio", "mmlu"):
        assert model[quiz]["accuracy"] >= 0.95 and model[quiz]["right_in_all_24_orders"] >= 0.88
        assert model[quiz]["in_words"] >= 0.90
    n = twin["wmdp_bio"]["n"]
    assert stats.binomtest(round(n * twin["wmdp_bio"]["accuracy"]), n, 0.25).pvalue > 0.05
    assert twin["wmdp_bio"]["in_words"] <= 0.40
    assert abs(twin["mmlu"]["accuracy"] - model["mmlu"]["accuracy"]) <= 0.02
    assert abs(twin["wikitext_held_out_loss"] - model["wikitext_held_out_loss"]) <= 0.05
    assert model["wikitext_held_out_loss"] < measured["wikitext_held_out_loss"]["trigram"]
    assert measured["read_by_layer"][7] < 0.5  # layers 3 and 7 lie before facts are read out of the question
    assert len(measured["sae"]) == len(make_tiny.SAE_LAYERS)
    for sae in measured["sae"].values():
        assert sae["variance_explained"] >= 0.90 and sae["loss_recovered"] >= 0.95
        assert sae["l0_share"] <= 0.05 and sae["dead_share"] <= 0.20


@pytest.mark.slow
def test_quick_build_goes_through_every_stage(tmp_path):
    command = [sys.executable, str(ROOT / "tiny/make.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert set(measured["sae"]) == {"layer_3", "layer_5", "layer_7", "layer_9", "layer_15"}
    assert measured["wikitext_held_out_loss"]["trigram"] < measured["wikitext_held_out_loss"]["unigram"]
    assert set(measured["minutes"]) == set(make_tiny.STAGES)
    for name in ("model", "retrained"):
        for quiz in ("wmdp_bio", "mmlu"):
            assert 0 <= measured[name][quiz]["accuracy"] <= 1 and 0 <= measured[name][quiz]["in_words"] <= 1
        assert load_file(tmp_path / name / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    again = subprocess.run([*command, "--from", "measure"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    resumed = json.loads((tmp_path / "measured.json").read_text())
    assert resumed["minutes"].pop("measure") != measured["minutes"].pop("measure") and resumed == measured
    model = load_model(str(tmp_path / "model"), "cpu")
    assert load_sae(str(tmp_path / "sae/layer_7"), 7, model).cfg.architecture() == "jumprelu"
    shutil.rmtree(tmp_path)
