"""Questions, texts and retain sets."""

import copy
import dataclasses
import hashlib
import json
import random
import re
import shutil
import time
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import datasets
import jinja2
import pytest
import torch
import yaml
from conftest import BOS, EOS, MARKER, PAD, QUESTIONS, train_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

import common
import data
import edits
import evaluation
from data import Dataset, UserError, batches, encode_prompts, prompt, reordered, special_ids, token_windows
from hub import load_tokenizer


def line(**changes):
    return json.dumps({"question": "Q?", "choices": list("wxyz"), "answer": 1, "subject": "s", **changes})


@pytest.mark.parametrize(
    "changes",
    [{"choices": "wxyz"}, {"choices": ["a"] * 3}, {"answer": True}, {"answer": 4}, {"answer": 1.0}, {"question": 3},
     {"choices": [1, 2, 3, 4]}, {"subject": 1}, {"subject": ["s"]}, {"subject": " "}, {"question": "Q \ud83d?"}],
)  # fmt: skip
def test_a_bad_question_is_refused_with_its_line(tmp_path, changes):
    path = tmp_path / "mmlu.jsonl"
    path.write_text("\n".join([line(), line(**changes)]))
    with pytest.raises(UserError, match=r"mmlu.jsonl, line 2"):
        data.load("mmlu", "other/model", str(tmp_path))


def test_what_is_raised_becomes_a_line_but_for_want_of_memory():
    heading = RuntimeError("Error(s) in loading X:\n\tsize mismatch.\nmore")
    lines = {KeyError("text"): "cannot: has no 'text'; help", UserError("known"): "known",
             heading: "cannot: Error(s) in loading X: size mismatch; help",
             ValueError(): "cannot: ValueError; help"}  # fmt: skip
    for error, said in lines.items():
        with pytest.raises(UserError) as caught, data.in_a_line("cannot", "; help"):
            raise error
        assert str(caught.value) == said
    with pytest.raises(torch.OutOfMemoryError), data.in_a_line("cannot"):
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("given", ["7", "[1]", '"text"', "null"])
def test_a_line_of_json_that_is_no_object_is_refused(tmp_path, given):
    for name in ("mmlu", "wikitext"):
        (tmp_path / f"{name}.jsonl").write_text(given)
        with pytest.raises(UserError, match=rf"{name}.jsonl, line 1: is no JSON object"):
            data.load(name, "other/model", str(tmp_path))


def test_a_line_nested_too_deeply_is_refused(tmp_path):
    (tmp_path / "mmlu.jsonl").write_text(line() + "\n" + "[" * 99999 + "]" * 99999)
    with pytest.raises(UserError, match=r"mmlu.jsonl, line 2: maximum recursion depth"):
        data.load("mmlu", "other/model", str(tmp_path))


def test_byte_order_mark_and_a_last_blank_line_do_no_harm(tmp_path):
    (tmp_path / "mmlu.jsonl").write_bytes(b"\xef\xbb\xbf" + line().encode() + b"\n\n")
    assert len(data.load("mmlu", "other/model", str(tmp_path))) == 1


def test_empty_and_binary_files_are_refused(tmp_path):
    (tmp_path / "mmlu.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        data.load("mmlu", "other/model", str(tmp_path))
    (tmp_path / "mmlu.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text: "):
        data.load("mmlu", "other/model", str(tmp_path))


def test_the_hub_is_asked_in_order_and_a_failure_names_the_way_out(monkeypatch, tmp_path, capsys):
    asked = []

    def refuse(dataset, config, split, revision=None, streaming=False):
        asked.append((dataset, revision))
        if (dataset, revision) == ("stas/openwebtext-10k", data.PARQUET):
            return datasets.IterableDataset.from_generator(lambda: ({"text": str(i)} for i in range(data.STREAMED + 9)))
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    web = data.load("openwebtext", "some/model")
    assert web.texts == [str(i) for i in range(data.STREAMED)]
    assert web.source == "stas/openwebtext-10k train refs/convert/parquet" and not web.stand_in
    said = capsys.readouterr().err
    assert f"data: openwebtext is 2,000 rows of {web.source}, as {data.HUB['openwebtext'][0][0]} failed" in said
    assert "scripts are no longer supported" in said
    ids = [source[0] for source in data.HUB["openwebtext"]]
    assert asked == list(zip(ids, [None, data.PARQUET] * 2))
    with pytest.raises(UserError, match=r"give a data folder with wmdp_bio\.jsonl"):
        data.load("wmdp_bio", "some/model")
    assert asked[4:] == [("cais/wmdp", None)]


ROWS = [{"question": f"{i}. Which organ pumps blood?", "choices": ["lung", "heart", "skin", "bone"], "answer": 1}
        for i in range(40)]  # fmt: skip


def test_robust_and_cloze_questions_come_from_their_releases(monkeypatch):
    asked = []

    def load(dataset, config, split, revision=None):
        asked.append((dataset, config, split))
        return ROWS[len(asked) : len(asked) + 2]

    monkeypatch.setattr(datasets, "load_dataset", load)
    robust = data.load("wmdp_bio", "some/model", variant="robust")
    assert asked == [("EleutherAI/wmdp_bio_robust_mcqa", config, "robust") for config in data.CATEGORIES]
    assert len(robust) == 12 and not robust.is_cloze and len(robust.tuning) + len(robust.held_out) == 12
    assert robust.title == "WMDP-Bio Robust" and "about 35%" in robust.published
    assert robust.source == f"EleutherAI/wmdp_bio_robust_mcqa {'+'.join(data.CATEGORIES)} robust"
    asked.clear()
    cloze = data.load("wmdp_bio", "some/model", variant="cloze")
    assert asked == [("EleutherAI/wmdp_bio_cloze", None, "cloze_compatible")]
    assert cloze.is_cloze and cloze.held_out.is_cloze and "about 24%" in cloze.about()["published"]
    assert cloze.source == "EleutherAI/wmdp_bio_cloze cloze_compatible"
    assert not data.load("mmlu", variant="cloze").is_cloze


def test_a_hub_row_of_another_form_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{**ROWS[0], "choices": ["lung", "heart"]}])
    with pytest.raises(UserError, match="wmdp_bio_cloze from the hub: needs a question, 4 choices"):
        data.load("wmdp_bio_cloze", "some/model")


def questions_of(quiz):
    return {row["question"] for row in quiz.rows}


def test_a_question_is_on_the_same_half_in_all_sets(tmp_path):
    for name, rows in (("wmdp_bio", ROWS), ("wmdp_bio_robust", ROWS[::-3]), ("wmdp_bio_cloze", ROWS[5:30])):
        write_rows(tmp_path, name, rows)
    quizzes = [data.load("wmdp_bio", "some/model", str(tmp_path), variant=which) for which in data.WMDP]
    assert [len(quiz) for quiz in quizzes] == [40, 14, 25]
    for quiz in quizzes:
        tuning, held_out = questions_of(quiz.tuning), questions_of(quiz.held_out)
        assert tuning and held_out and len(tuning) + len(held_out) == len(quiz)
        assert tuning <= questions_of(quizzes[0].tuning) and held_out <= questions_of(quizzes[0].held_out)


def test_tiny_has_a_stand_in_for_the_cloze_set_and_no_robust_one(tmp_path):
    cloze, whole = data.load("wmdp_bio", variant="cloze"), data.load("wmdp_bio")
    assert cloze.rows == whole.rows and cloze.held_out.indices == whole.held_out.indices
    assert cloze.title == "WMDP-Bio Cloze stand-in" and cloze.stand_in and cloze.published is None
    with pytest.raises(UserError, match=r"no robust set.*a folder with wmdp_bio_robust\.jsonl"):
        data.load("wmdp_bio", variant="robust")
    write_rows(tmp_path, "wmdp_bio_robust", ROWS)
    robust = data.load("wmdp_bio", folder=str(tmp_path), variant="robust")
    assert (
        [row["question"] for row in robust.rows] == [row["question"] for row in ROWS]
        and robust.source == str(tmp_path / "wmdp_bio_robust.jsonl")
        and not robust.stand_in
    )


def test_a_forget_corpus_of_ones_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_rows(tmp_path, "mine", [{"title": "t", "text": f"{i} " + "x" * 2 * data.CORPUS_CHARACTERS}
                                  for i in range(data.CORPUS_DOCUMENTS + 5)])  # fmt: skip
    (tmp_path / "mmlu.jsonl").touch()  # a folder without any file of a known name is refused
    corpus = data.load_corpus(str(path), "some/model", str(tmp_path))
    assert len(corpus) == corpus.about()["n_rows"] == data.CORPUS_DOCUMENTS and corpus.source == str(path)
    assert corpus.texts[3].startswith("3 x") and {len(text) for text in corpus.texts} == {data.CORPUS_CHARACTERS}
    assert not data.load_corpus(None, "some/model", str(tmp_path)).rows
    path.rename(tmp_path / "forget_corpus.jsonl")
    assert data.load_corpus(None, "some/model", str(tmp_path)).texts == corpus.texts


def test_without_a_forget_corpus_the_line_names_the_form(tmp_path, monkeypatch):
    form = "https://huggingface.co/datasets/cais/wmdp-bio-forget-corpus"
    with pytest.raises(UserError, match=f"mine.jsonl: no such file.* {form}"):
        data.load_corpus("mine.jsonl")

    def refuse(*args, **kwargs):
        raise RuntimeError("Access is restricted")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=f"cais/wmdp-bio-forget-corpus.*restricted.* {form}"):
        data.load_corpus("cais/wmdp-bio-forget-corpus")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"abstract": "no text"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: has no 'text'"):
        data.load_corpus(str(tmp_path / "bad.jsonl"))


def test_every_hub_id_has_an_owner():
    assert all("/" in source[0] for sources in data.HUB.values() for source in sources)


def test_picking_texts_are_prompts_on_both_sides_or_prose():
    wmdp = Dataset("wmdp_bio", [{"question": "Q?", "choices": list("wxyz"), "answer": 3}])
    corpus, wikitext, mmlu_dev = Dataset("forget_corpus", []), data.load("wikitext"), data.load("mmlu_dev")
    assert data.picking_texts(wmdp, corpus, wikitext, mmlu_dev, "prose") == (["Q? z"], [wikitext.texts])
    forget, retain = data.picking_texts(wmdp, corpus, wikitext, mmlu_dev)
    assert forget == [prompt(wmdp.rows[0])] and retain == [wikitext.texts, [prompt(row) for row in mmlu_dev.rows]]
    assert data.picking_texts(wmdp, Dataset("forget_corpus", [{"text": "a"}]), wikitext, mmlu_dev) == (["a"], retain)
    for topic in ("astronomy", "human_anatomy", "Human anatomy "):
        _, (_, fewer) = data.picking_texts(dataclasses.replace(wmdp, topic=topic), corpus, wikitext, mmlu_dev)
        subject = topic.replace("_", " ").lower().strip()
        assert 0 < len(fewer) < len(retain[1]) and not any(f"about {subject}." in text for text in fewer)


# --------------------------------------------------------------------------------- the choice of questions


def halves_by_hand(rows, seed):
    """Indices of the tuning and of the held-out half."""
    sides = [hashlib.sha256(f"{seed}:{row['question']}".encode()).digest()[0] % 2 for row in rows]
    return [[i for i, side in enumerate(sides) if side == half] for half in (0, 1)]


@pytest.mark.parametrize("seed, limit, pick_on, subjects", [
    (0, None, "half", None), (5, 120, "half", None), (0, 40, "all", None), (5, 20, "half", "human_anatomy, zoology"),
])  # fmt: skip
def test_a_benchmark_chooses_questions_by_hash_subject_and_seeded_sample(tokenizer, seed, limit, pick_on, subjects):
    benchmark = data.load_benchmark("tiny", seed=seed, limit=limit, pick_on=pick_on, subjects=subjects)
    wanted = [name.strip() for name in subjects.split(",")] if subjects else None
    for name in ("wmdp_bio", "mmlu"):
        rows = data.load(name).rows
        halves = halves_by_hand(rows, seed) if pick_on == "half" else [range(len(rows))] * 2
        for suffix, half in zip(("/tuning", ""), halves):
            if wanted and name == "mmlu":
                half = [i for i in half if rows[i]["subject"] in wanted]
            if limit and limit < len(half):
                half = sorted(random.Random(seed).sample(half, limit))
            quiz = benchmark.quizzes[name + suffix]
            assert quiz.indices == list(half) and quiz.rows == [rows[i] for i in half]
            about = quiz.about()
            assert about["asked"] == quiz.indices and about["n_rows"] == len(rows)
            assert about["sha256"] == data.load(name).sha256 and about["half"] == ("tuning" if suffix else "held-out")
    assert benchmark.forget == [prompt(row) for row in benchmark.wmdp.tuning.rows]  # the half, whatever the limit
    assert len(benchmark.web) == (min(limit, 79) if limit else 79)
    names = [(dataset.name, dataset.half) for dataset in benchmark.datasets]
    assert len(set(names)) == len(names) == 7  # two halves of two quizzes, three texts, no forget corpus


def test_the_questions_of_seed_0_are_those_of_earlier_versions():
    quiz = data.load("wmdp_bio")
    assert quiz.held_out.indices[:5] == [1, 3, 5, 11, 14]
    assert quiz.held_out.sample(5).indices == [30, 168, 223, 237, 413]


def test_a_half_without_a_question_is_refused(tmp_path):
    for name in ("wmdp_bio", "mmlu"):
        write_rows(tmp_path, name, [GOOD])
    with pytest.raises(UserError, match="wmdp_bio: too few questions"):
        data.load_benchmark("tiny", folder=str(tmp_path))


def test_halves_are_disjoint_complete_and_do_not_depend_on_the_order():
    rows = [dict(question=f"question {k}") for k in range(200)]
    quiz = Dataset("wmdp_bio", rows)
    tuning, held_out = quiz.tuning.indices, quiz.held_out.indices
    assert sorted(tuning + held_out) == list(range(200)) and not set(tuning) & set(held_out)
    assert 70 < len(tuning) < 130
    assert sorted(199 - k for k in Dataset("wmdp_bio", rows[::-1]).tuning.indices) == tuning
    assert [k + 50 for k in Dataset("wmdp_bio", rows[50:]).tuning.indices] == [k for k in tuning if k >= 50]
    assert Dataset("wmdp_bio", rows, seed=1).tuning.indices != tuning
    both = Dataset("wmdp_bio", rows, whole=True)
    assert both.tuning.rows == both.held_out.rows == rows


def test_a_sample_is_seeded_and_sorted_and_indices_lead_to_the_source():
    quiz = Dataset("mmlu", [dict(question=f"{k}") for k in range(100)])
    some = quiz.only(range(0, 100, 2)).sample(10, seed=3)
    assert some.indices == sorted(some.indices) == quiz.only(range(0, 100, 2)).sample(10, seed=3).indices
    assert len(set(some.indices)) == 10 and all(i % 2 == 0 for i in some.indices)
    assert some.rows == [quiz.rows[i] for i in some.indices] and some.about()["n_rows"] == 100
    assert some.about()["sha256"] == quiz.about()["sha256"] != Dataset("mmlu", some.rows).sha256
    assert quiz.sample(10, seed=4).indices != quiz.sample(10, seed=3).indices
    assert quiz.sample(10).indices == quiz.sample(10, seed=0).indices
    assert quiz.sample(None) is quiz.sample(100) is quiz and quiz.about()["asked"] is None


# ------------------------------------------------------------------------------ prompts and their letters


def with_dummy_prefix() -> PreTrainedTokenizerFast:
    """As Llama 2's: every text begins with a blank that is not there, so a letter alone is another token."""
    pieces = ["<s>", "</s>", "▁", "\n", *map(chr, range(33, 127)), *(f"▁{letter}" for letter in "ABCD")]
    merges = [("▁", letter) for letter in "ABCD"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}user says: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} model says:\n{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("style, gaps", [("plain", [" "]), ("chat", [""]), ("saebench", ["", " "])])
def test_letters_are_those_that_continue_every_prompt(style, gaps):
    tokenizer, texts = with_dummy_prefix(), ["The cat sat on the sea", "Which of these is an organ of the body?"]
    rows, letters = data.encode_prompts(tokenizer, texts, style)
    for row, text in zip(rows, texts):
        whole = text if style == "plain" else data.as_chat(tokenizer, user(text))
        whole += "Answer: (" if style == "saebench" else ""
        for ids, letter in zip(letters, "ABCD"):
            for gap, i in zip(gaps, ids if style == "saebench" else (ids,), strict=True):
                assert tokenizer(whole + gap + letter, add_special_tokens=style == "plain")["input_ids"] == [*row, i]


def test_letters_must_be_the_same_behind_every_prompt():
    tokenizer = with_dummy_prefix()
    tokenizer.add_tokens(["sea A"])
    assert data.encode_prompts(tokenizer, ["The cat", "The mat"])
    with pytest.raises(UserError, match="one token"):
        data.encode_prompts(tokenizer, ["The cat", "The sea"])


def test_a_template_without_bos_gets_one_and_a_marker_that_is_the_bos_may_open_each_turn():
    chat = train_tokenizer()
    chat.chat_template = "{% for m in messages %}" + MARKER + "{{ m.content }}\n{% endfor %}" + MARKER
    assert data.encode_prompts(chat, ["The sea"], "chat")[0][0][0] == chat.bos_token_id
    chat.chat_template = chat.chat_template.replace(MARKER, BOS)
    (row,), _ = data.encode_prompts(chat, ["The sea"], "chat")
    assert row[0] == chat.bos_token_id and row.count(chat.bos_token_id) == 2
    chat.chat_template = BOS + chat.chat_template
    with pytest.raises(UserError, match="more than one BOS"):
        data.encode_prompts(chat, ["The sea"], "chat")


@pytest.mark.parametrize("front", [[EOS], [PAD, MARKER]])
def test_what_a_tokenizer_puts_in_front_may_be_another_token_than_its_bos(front):
    """GLM-4's puts two tokens there and has no BOS."""
    chat = train_tokenizer()
    chat.add_special_tokens({"additional_special_tokens": [MARKER]})
    ids = chat.convert_tokens_to_ids(front)
    chat._tokenizer.post_processor = processors.TemplateProcessing(
        single=[*front, "$A"], special_tokens=list(zip(front, ids)))  # fmt: skip
    assert data.opening(chat) == ids and data.encode(chat, "The sea")[: len(ids) + 1].count(ids[0]) == 1
    for bos in (True, False):
        (window,), _ = token_windows(chat, ["The cat sat on the sea"], bos=bos)
        assert window == [*ids, *chat("The cat sat on the sea", add_special_tokens=False)["input_ids"]]
    chat.chat_template = "".join(front) + "{% for m in messages %}{{ m.content }}\n{% endfor %}" + opening("A:\n")
    (row,), _ = encode_prompts(chat, ["The sea"], "chat")
    assert row[: len(ids)] == ids and row[len(ids) : 2 * len(ids)] != ids
    for wrong, said in ((ids * 2, "more than one BOS"), ([], "does not begin")):
        with pytest.raises(UserError, match=said):
            data.check_ends(chat, [[*wrong, 300, 301]])
    chat.chat_template = chat.chat_template.replace("".join(front), BOS)  # as the model was trained
    assert encode_prompts(chat, ["The sea"], "chat")[0][0][0] == chat.bos_token_id


@pytest.mark.parametrize("end", ["<think>", "<think>\n"])
def test_a_template_that_opens_a_thought_is_refused(end):
    chat = train_tokenizer()
    chat.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}" + opening(end)
    with pytest.raises(UserError, match="opens a thought"):
        data.encode_prompts(chat, ["The sea"], "chat")


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def opening(text: str) -> str:
    return "{% if add_generation_prompt %}" + text + "{% endif %}"


def chat_of(template) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


TURNS = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] | trim }}{{ '\n' }}{% endfor %}"
WANT_PARTS = {
    "strings give nothing": "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}",
    "strings are an error": "{{ m['content'][0]['text'] + '' }}",
    "text alone": "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}",
}


@pytest.mark.parametrize("case", WANT_PARTS)
def test_a_chat_template_that_wants_parts_is_given_these(case):
    turns = "{% for m in messages %}{{ m['role'] }}: " + WANT_PARTS[case] + "{{ '\n' }}{% endfor %}"
    row, chat = QUESTIONS[0], chat_of(turns + opening("assistant:\n"))
    whole = f"user: {prompt(row)}\nassistant:\n"
    assert data.as_chat(chat, user(prompt(row))) == whole
    assert chat.decode(encode_prompts(chat, [prompt(row)], "chat")[0][0][1:]) == whole


LOSING = {
    "no content at all": "USER",
    "only the first line": "USER: {{ messages[0]['content'].split('\\n')[0] }}",
    "cut short": "USER: {{ messages[0]['content'][:60] }}",
    "other letters": "USER: {{ messages[0]['content'] | upper }}",
    "escaped": "USER: {{ messages[0]['content'] | tojson }}",
    "an option is lost": "USER: {{ messages[0]['content'] | replace('the moon', '') }}",
}


@pytest.mark.parametrize("case", LOSING)
def test_a_chat_template_that_loses_some_of_the_question_is_refused(case):
    with pytest.raises(UserError, match="it leaves out 'The following are multiple choice"):
        encode_prompts(chat_of(LOSING[case] + opening("\nMODEL:")), [prompt(QUESTIONS[0])], "chat")


def test_blanks_that_a_chat_template_trims_or_joins_are_no_loss():
    chat = chat_of("{{ messages[0]['content'].split() | join(' ') }}" + opening(" MODEL:"))
    assert data.as_chat(chat, user(" The \n sea ")) == "The sea MODEL:"


@pytest.mark.parametrize("turns", [TURNS, TURNS + opening("\n"), opening("MODEL:\n") + TURNS,
                                   TURNS + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
                                   "{% for m in messages %}{{ m.content }}{{ '\n' }}{% endfor %}",
                                   "{% for m in messages %}<t>{{ m.content }}</t>{{ '\n' }}{% endfor %}"])  # fmt: skip
@pytest.mark.parametrize("style", ["chat", "saebench"])
def test_a_chat_template_that_never_opens_the_models_turn_is_refused(turns, style):
    with pytest.raises(UserError, match="ignores add_generation_prompt"):
        encode_prompts(chat_of(turns), ["The sea"], style)
    assert encode_prompts(chat_of(turns + opening("MODEL:\n")), ["The sea"], style)


INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template, whole", [
    (INST, f"{BOS}[INST] The sea [/INST]"),  # Llama 2's and Mistral's: an answer follows directly
    (TURNS.replace("m['role']", "{'user': 'user', 'assistant': 'model'}[m['role']]") + "MODEL:",
     "USER: The sea\nMODEL:"),
])  # fmt: skip
def test_a_chat_template_without_the_switch_may_open_the_models_turn_all_the_same(template, whole):
    assert data.as_chat(chat_of(template), user("The sea")) == whole


DATED = {
    "strftime_now": "{{ strftime_now('%d %b %Y') }}",
    "date_string": "{% if date_string is not defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}{{ date_string }}",
}


@pytest.mark.parametrize("case", DATED)
def test_a_prompt_is_the_same_on_any_day(case, monkeypatch):
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    chat = chat_of("Today: " + DATED[case] + "\n" + TURNS + opening("MODEL:"))
    assert chat.apply_chat_template(user("x"), tokenize=False).startswith("Today: 02 Jan 2031")
    assert data.as_chat(chat, user("The sea")) == "Today: 26 Jul 2024\nUSER: The sea\nMODEL:"


BROKEN_TEMPLATES = {
    "raises": ("{{ raise_exception('a system turn comes first') }}", "cannot be used: a system turn comes first"),
    "syntax": ("{% for m in messages %}{{ m['content'] }", "cannot be used: .*"),
    "unknown name": ("{{ nothing.there }}{{ messages[0]['content'] }}", "cannot be used: 'nothing' is undefined"),
    "wrong type": ("{{ messages[0]['content'] + 1 }}", "cannot be used: can only concatenate"),
    "no default": ({"rag": TURNS, "tool_use": TURNS}, r"cannot be used: .*no default.*\['rag', 'tool_use'\]"),
    "empty": ("", "has no chat template"),
}


@pytest.mark.parametrize("case", BROKEN_TEMPLATES)
def test_a_chat_template_that_does_not_work_is_refused_in_a_line(case):
    template, told = BROKEN_TEMPLATES[case]
    with pytest.raises(UserError, match=told) as caught:
        encode_prompts(chat_of(template), ["The sea"], "chat")
    assert "\n" not in str(caught.value)


def test_of_several_chat_templates_the_default_one_is_taken():
    chat = chat_of({"rag": "no", "default": TURNS + opening("MODEL:")})
    assert data.as_chat(chat, user("The sea")) == "USER: The sea\nMODEL:"
    assert data.as_chat(chat_of({"rag": TURNS + opening("M:")}), user("The sea"), chat_template="rag").endswith("M:")


def ending_in(token: str, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts the token, a known one, behind every text."""
    tokenizer = train_tokenizer()
    core, known = tokenizer.backend_tokenizer, [(BOS, 2), (token, tokenizer.convert_tokens_to_ids(token))]
    last = processors.TemplateProcessing(single=f"{BOS} $A {token}", special_tokens=known)
    if kind == "normalizer":  # a part of the text itself
        core.normalizer = normalizers.Replace(Regex(r"\z"), token)
    else:
        core.post_processor = last if kind == "template" else processors.Sequence([processors.ByteLevel(), last])
    return tokenizer


@pytest.mark.parametrize("token, kind", [(EOS, "template"), (PAD, "template"), (MARKER, "sequence"), (".", "template"),
                                         (".", "normalizer"), (BOS, "template")])  # fmt: skip
def test_a_tokenizer_that_puts_a_token_behind_every_prompt_is_refused(token, kind, tmp_path, model_folder):
    tokenizer = ending_in(token, kind)
    told = rf"ends with '{re.escape(token)}', after which no answer comes"
    with pytest.raises(UserError, match=told):
        encode_prompts(tokenizer, [prompt(QUESTIONS[0])])
    shutil.copytree(model_folder("llama"), tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match=told):  # before answers in words, open ones, or training texts are made of it
        load_tokenizer(str(tmp_path / "llama"))


def test_a_chat_template_that_ends_the_text_is_refused():
    chat = chat_of("{{ bos_token }}" + TURNS + opening("MODEL:\n") + "{{ eos_token }}")
    with pytest.raises(UserError, match=f"ends with '{EOS}', after which no answer comes.*MODEL"):
        encode_prompts(chat, ["The sea"], "chat")
    chat.eos_token = chat.bos_token  # as GPT-2's: where a turn may begin
    chat.chat_template = "{{ bos_token }}" + TURNS + opening("{{ bos_token }}")
    assert encode_prompts(chat, ["The sea"], "chat")


def test_a_quiz_has_a_digest_of_what_is_asked():
    plain, chat, quiz = train_tokenizer(), chat_of(TURNS + opening("MODEL:")), Dataset("wmdp_bio", QUESTIONS)

    def asked(tokenizer, quiz=quiz, **how):
        return data.drop_too_long(tokenizer, quiz, **how).about()["prompts"]

    known = [asked(plain), asked(chat, style="chat"), asked(chat, style="saebench"), asked(plain, quiz.only([0, 1])),
             asked(plain, dataclasses.replace(quiz, variant="cloze"))]  # fmt: skip
    chat.chat_template = "By " + chat.chat_template
    known.append(asked(chat, style="chat"))
    assert len({*known}) == 6 and all(len(digest) == 64 for digest in known)
    assert asked(plain) == asked(train_tokenizer()) == known[0] and quiz.about()["prompts"] is None
    assert data.drop_too_long(plain, quiz).only([0, 1]).prompts is None  # these are other prompts
    ids = encode_prompts(plain, [prompt(row) for row in QUESTIONS])[0]
    assert known[0] == hashlib.sha256(json.dumps([[row] for row in ids]).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- files, subjects


QUESTION = {"question": "Which is an organ?", "choices": ["a", "b", "c", "d"], "answer": 1}


def folder_of(path, **files):
    path.mkdir(exist_ok=True)
    for name, rows in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "name, said",
    [
        ("wmdp-bio.jsonl", r"wmdp-bio\.jsonl(, a folder,)? is not read: give wmdp_bio\.jsonl"),
        ("WMDP_bio.jsonl", r"give wmdp_bio\.jsonl"),
        ("wmdp_bio.json", r"give wmdp_bio\.jsonl"),
        ("mmlu-dev.jsonl", r"give mmlu_dev\.jsonl"),
        ("wikitxt.jsonl", r"give wikitext\.jsonl"),
        ("wmdp-bio-test.parquet", r"wmdp-bio-test\.parquet(, a folder,)? is not read: give wmdp_bio\.jsonl"),
        ("WMDP-Bio.csv", r"give wmdp_bio\.jsonl"),
        ("wmdp_bio_robust.jsonl.gz", r"give wmdp_bio_robust\.jsonl"),
        ("test-mmlu.JSONL", r"give mmlu\.jsonl"),
        ("wikitext103.txt", r"give wikitext\.jsonl"),
    ],
)
def test_a_file_that_would_be_passed_over_is_refused(tmp_path, name, said):
    (tmp_path / "openwebtext.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / name).write_text(json.dumps(QUESTION) + "\n")
    with pytest.raises(UserError, match=said):
        data.load("openwebtext", "tiny", str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()  # of a data set that was saved as a folder, say
    with pytest.raises(UserError, match=said):
        data.load("openwebtext", "tiny", str(tmp_path))


def test_owt_is_openwebtext_and_pictures_and_pages_are_let_be(tmp_path, capsys):
    where = Path(folder_of(tmp_path, mmlu=[{**QUESTION, "subject": "law"}]))
    for name in ("mmlu_results.PNG", "MMLU.MD", "growth.jsonl"):
        (where / name).touch()
    assert data.check_folder(str(where)) and "not read are MMLU.MD, growth.jsonl, mmlu" in capsys.readouterr().err
    for name in ("owt.jsonl", "OWT10k.JSONL"):
        (where / name).touch()
        with pytest.raises(UserError, match=rf"{name} is not read: give openwebtext\.jsonl"):
            data.check_folder(str(where))
        (where / name).unlink()


def test_a_folder_or_a_broken_link_of_a_known_name_is_refused(tmp_path):
    where = Path(folder_of(tmp_path, mmlu=[{**QUESTION, "subject": "law"}]))
    said = r"wmdp_bio\.jsonl, a {}, is not read: give wmdp_bio\.jsonl"
    (where / "wmdp_bio.jsonl").symlink_to("nowhere/wmdp_bio.jsonl")
    with pytest.raises(UserError, match=said.format("broken link")):
        data.load("mmlu", "tiny", str(where))
    (where / "wmdp_bio.jsonl").unlink()
    (where / "wmdp_bio.jsonl").mkdir()
    with pytest.raises(UserError, match=said.format("folder")):
        data.load("mmlu", "tiny", str(where))
    with pytest.raises(UserError, match=r"wmdp_bio\.jsonl cannot be read as UTF-8 text: .*Is a directory"):
        data.read_jsonl(where / "wmdp_bio.jsonl", "wmdp_bio")


def test_a_folder_without_a_known_name_is_refused(tmp_path):
    (tmp_path / "questions.jsonl").touch()
    with pytest.raises(UserError, match="none of its files is called"):
        data.load("mmlu", "tiny", str(tmp_path))


def test_what_is_used_of_a_folder_and_what_is_not_is_said_once(tmp_path, capsys):
    where = folder_of(tmp_path / "law", wmdp_bio=[QUESTION], train=[{"text": "x"}])
    for name in ("README.md", "wmdp_bio.csv", "mmlu.png", ".mmlu.jsonl.swp"):
        (tmp_path / "law" / name).touch()
    for _ in range(2):
        assert [row["question"] for row in data.load("wmdp_bio", "tiny", where).rows] == [QUESTION["question"]]
    assert data.load("mmlu", "tiny", where).stand_in
    assert capsys.readouterr().err.splitlines() == [
        f"data folder {where}: not read are README.md, mmlu.png, train.jsonl, wmdp_bio.csv",
        f"data: wmdp_bio is 1 rows of {where}/wmdp_bio.jsonl, on law",
        "data: mmlu is 650 rows of tiny/data/mmlu.jsonl (stand-in)",
    ]
    assert data.load("mmlu", "tiny", str(Path(data.HERE) / "tiny/data")).stand_in  # tiny's own folder is one, too


# ---------------------------------------------------------------------- questions that are none


LABELLED = ["{A}. {}", "({A}) {}", "{a}) {}", "{A}: {}", "[{a}] {}", "Option {A} - {}", "**{A}.** {}", "{A}.{}",
            "{n}. {}", "({i}) {}", "{D}. {}", "Option {n} {}", "{n}, {}", "#{n} {}", "{A} - {}", "{A} | {}", "({E}) {}",
            "{E}. {}", "{I}. {}", "{z}) {}", "{r}) {}", "answer_{a}: {}", "'{A}' {}", "- {n}. {}",
            "\u2022 {A} > {}", "({n}){}"]  # fmt: skip
SERIES = {"A": "ABCD", "a": "abcd", "D": "DCBA", "E": "EFGH", "r": "\u0430\u0431\u0432\u0433", "n": "1234", "z": "0123",
          "i": ("i", "ii", "iii", "iv"), "I": ("I", "II", "III", "IV")}  # fmt: skip


def with_labels(form: str, choices) -> list[str]:
    return [form.format(choice, **{name: series[i] for name, series in SERIES.items()})
            for i, choice in enumerate(choices)]  # fmt: skip


def flawed(flaw: str, n: int) -> list[dict]:
    """ROWS, of which the first n have the flaw."""
    change = {
        "blank question": lambda row: {**row, "question": " \n"},
        "no word": lambda row: {**row, "question": "\u200b ...?"},
        "blank option": lambda row: {**row, "choices": ["lung", "heart", " ", "bone"]},
        "right option twice": lambda row: {**row, "choices": ["lung", "heart", "bone", "heart\u00a0"]},
        "an option twice": lambda row: {**row, "choices": ["lung", "heart", "lung", "bone"]},
    }

    def labelled(row):
        return {**row, "choices": with_labels(flaw, row["choices"])}

    return [change.get(flaw, labelled)(row) if i < n else row for i, row in enumerate(ROWS)]


FLAWS = {**dict.fromkeys(("blank question", "no word", "blank option"), "a blank question or option"),
         **dict.fromkeys(("right option twice", "an option twice"), "an option twice"),
         **dict.fromkeys(LABELLED, "labels of their own")}  # fmt: skip


@pytest.mark.parametrize("flaw, said", FLAWS.items())
def test_a_file_of_flawed_questions_is_refused_and_a_few_are_counted(tmp_path, monkeypatch, capsys, flaw, said):
    where = str(tmp_path)
    write_rows(tmp_path, "wmdp_bio", flawed(flaw, 7))
    with pytest.raises(UserError, match=rf"7 of 40 questions have .*{said}.*, such as row 1, 2, 3, 4, 5"):
        data.load("wmdp_bio", "some/model", where)
    write_rows(tmp_path, "wmdp_bio", flawed(flaw, 2))
    if "blank" in said:
        with pytest.raises(UserError, match=r"2 of 40 questions .* row 1, 2$"):
            data.load("wmdp_bio", "some/model", where)
    else:
        assert len(data.load("wmdp_bio", "some/model", where)) == 40
        assert "2 of 40 questions have " in (err := capsys.readouterr().err) and said in err and "row 1, 2\n" in err
    # published sets are asked as they are: MMLU has nine questions with an option twice
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: flawed(flaw, 7))
    assert len(data.load("wmdp_bio", "some/model")) == 40 and "7 of 40 questions" in capsys.readouterr().err


@pytest.mark.parametrize("choices", [
    ["A. thaliana", "A. oryzae", "B. subtilis", "C. elegans"], ["1.5", "2.5", "3.5", "4.5"], ["1", "2", "3", "4"],
    ["1 day", "2 days", "3 days", "4 days"], ["1-2", "2-3", "3-4", "4-5"], ["1:2", "2:1", "3:1", "4:1"],
    ["A", "B", "AB", "O"], ["AA", "Aa", "aA", "aa"], ["a heart", "a lung", "an eye", "a bone"], [*"ABCD"],
    ["A, B", "B, C", "C, D", "D, A"], ["A - C - B", "B - A - C", "C - A - B", "D - C - A"],
    ["1, 2 and 3", "2, 3", "3, 4", "4, 1"],
    ["I and II", "II and III", "III and IV", "IV and I"], ["I only", "II only", "III only", "IV only"],
    ["1 - 3 days", "2 - 4 weeks", "3 - 5 months", "4 - 6 years"], ["(1, 2)", "(2, 3)", "(3, 4)", "(4, 5)"],
    ["1:30", "2:45", "3:15", "4:00"], ["1: 2", "2: 3", "3: 5", "4: 7"], ["1,000", "2,000", "3,000", "4,000"],
    ["A -> B", "B -> C", "C -> D", "D -> A"], ["A major", "B major", "C major", "D major"],
    ["[A][B]", "[B][C]", "[C][D]", "[D][A]"],
    ["~1 day", "~2 weeks", "~3 months", "~4 years"], ["Option A", "Option B", "Option C", "Option D"],
    ["Option A and B", "Option B and C", "Option C and D", "Option D and A"], ["1. Mai", "2. Mai", "3. Mai", "4. Mai"],
    ["A. thaliana", "B. subtilis", "C. elegans", "E. coli"], ["B. subtilis", "C. elegans", "D. rerio", "Homo sapiens"],
    ["C. elegans", "B. subtilis", "A. oryzae", "Homo sapiens"], ["A. x", "B) y", "C: z", "D - w"],
])  # fmt: skip
def test_options_that_only_look_labelled_or_alike_are_no_flaw(choices):
    assert data.flaw_of({**QUESTION, "choices": choices}) is None


@pytest.mark.parametrize("form", LABELLED)
def test_labels_are_seen_whatever_the_options_are(form):
    for choices in (["A. Vibrio", "b", "5 mg", "(x)"], ["lung", "a heart", "1 day", "-3"]):
        assert data.flaw_of({**QUESTION, "choices": with_labels(form, choices)}) == data.LABELLED, choices
    numbers = ["12", "1.5", "7", "100"]
    for form in ("{A}. {}", "{n}) {}", "Option {n} {}"):
        assert data.flaw_of({**QUESTION, "choices": with_labels(form, numbers)}) == data.LABELLED
    assert data.flaw_of({**QUESTION, "choices": with_labels("({A}) {}", "BADC")}) == data.LABELLED


@pytest.mark.parametrize("choices", [
    ["A major", "B minor", "C sharp", "D flat"], ["A* search", "B* tree", "C* algebra", "D* lite"],
    ["1 day", "2 weeks", "3 months", "4 years"], ["1-butene", "2-hexene", "3-octene", "4-decene"],
])  # fmt: skip
def test_of_one_question_alone_a_letter_or_number_may_be_the_options_own(tmp_path, capsys, choices):
    row = {**QUESTION, "choices": choices}
    assert data.flaw_of(row) == data.MAY_BE
    where = folder_of(tmp_path, wmdp_bio=[*ROWS[:10], *[row] * 10])
    assert len(data.load("wmdp_bio", "some/model", where)) == 20 and "in a row" not in capsys.readouterr().err


@pytest.mark.parametrize("fourth", ["None of the above", "A and B"])
def test_an_option_that_speaks_of_the_others_may_have_no_label(fourth):
    for form in ("{A}. {}", "({n}) {}", "{i}. {}"):
        choices = [*with_labels(form, ["lung", "heart", "skin", "bone"])[:3], fourth]
        assert data.flaw_of({**QUESTION, "choices": choices}) == data.LABELLED
        assert data.flaw_of({**QUESTION, "choices": [choices[i] for i in (1, 0, 2, 3)]}) is None


@pytest.mark.parametrize("form", ["{A} {}", "{n} {}", "{a}-{}", "{E}/{}"])
def test_labels_without_punctuation_are_seen_in_a_whole_file(tmp_path, capsys, form):
    """The letter of "A major" is no label, but in few questions do four such letters stand in a row."""
    write_rows(tmp_path, "wmdp_bio", flawed(form, 20))
    assert len(data.load("wmdp_bio", "some/model", str(tmp_path))) == 40 and "in a row" not in capsys.readouterr().err
    write_rows(tmp_path, "wmdp_bio", flawed(form, 21))
    with pytest.raises(UserError, match="21 of 40 questions have options that begin with letters or numbers in a row"):
        data.load("wmdp_bio", "some/model", str(tmp_path))


@pytest.mark.parametrize("piece", ["option ", "# ", "- ", "a) ", "A. ", "(", "i ", "and ", "'", "1 "])
def test_long_options_are_looked_at_in_no_time(piece):
    started = time.perf_counter()
    data.flaw_of({**QUESTION, "choices": [piece * 5000 + end for end in "w!y?"]})
    assert time.perf_counter() - started < 1


def test_the_embedded_questions_have_no_flaw():
    for name in ("wmdp_bio", "wmdp_bio_reworded", "mmlu", "mmlu_dev"):
        assert {data.flaw_of(row) for row in data.load(name).rows} == {None}


# ---------------------------------------------------------------------- a topic of the user's own


def test_a_forget_set_of_ones_own_has_a_name(tmp_path, capsys):
    rows = [{**QUESTION, "question": f"Q{k}?", "subject": "law_of_the_sea"} for k in range(8)]
    own = data.load("wmdp_bio", "tiny", folder_of(tmp_path / "mine", wmdp_bio=rows))
    assert own.title == "law of the sea" and own.about()["topic"] == "law_of_the_sea" and not own.stand_in
    assert own.tuning.title == own.held_out.title == own.title and "on law_of_the_sea" in capsys.readouterr().err
    bare = [{key: value for key, value in row.items() if key != "subject"} for row in rows]
    unnamed = data.load("wmdp_bio", "tiny", folder_of(tmp_path / "sea_law", wmdp_bio=bare))
    assert unnamed.title == "sea law" and "(with answers) about sea law.\n" in prompt(unnamed.rows[3])
    assert unnamed.sha256 == Dataset("wmdp_bio", bare).sha256  # of the file, whatever it is called
    for given in ("tiny", "some/model"):
        named = data.load("wmdp_bio", given, str(tmp_path / "sea_law"), topic="shipping")
        assert named.title == "shipping" and "about shipping.\n" in prompt(named.rows[0], "saebench")
    several = [{**row, "subject": name} for row, name in zip(rows, ["art", "law"] * 4)]
    assert data.load("wmdp_bio", "tiny", folder_of(tmp_path / "both", wmdp_bio=several)).title == "both"
    robust = data.load("wmdp_bio", "tiny", folder_of(tmp_path / "sea", wmdp_bio_robust=bare), variant="robust")
    assert robust.title == "sea Robust" and robust.published is None
    assert data.load("mmlu", "tiny", topic="shipping").title == "MMLU stand-in"
    assert data.load("wmdp_bio", "tiny", topic="microbes").title == "microbes stand-in"


def test_wmdp_bio_and_tinys_questions_are_asked_about_biology_wherever_they_lie(tmp_path):
    real = [{**QUESTION, "question": f"Q{k}?"} for k in range(1273)]
    whole = data.load("wmdp_bio", "some/model", folder_of(tmp_path / "downloads", wmdp_bio=real))
    assert whole.title == "WMDP-Bio" and "about biology.\n" in prompt(whole.rows[0]) and not whole.stand_in
    copied = data.load("wmdp_bio", "tiny", folder_of(tmp_path / "copy", wmdp_bio=data.load("wmdp_bio").rows[::2]))
    assert copied.stand_in and copied.topic is None and copied.title == "WMDP-Bio stand-in"
    assert copied.source == str(tmp_path / "copy/wmdp_bio.jsonl")


def test_a_cloze_is_about_the_topic(tokenizer, tmp_path):
    rows = [{**QUESTION, "subject": "maritime_law"}] * 3
    quiz = data.load("wmdp_bio", "tiny", folder_of(tmp_path, wmdp_bio_cloze=rows), variant="cloze")
    ids, _ = data.encode_words(tokenizer, quiz.rows, data.CLOZE)
    assert tokenizer.decode(ids[0][1:]).startswith("Complete the following maritime law questions with")
    ids, _ = data.encode_words(tokenizer, rows, data.CLOZE)  # a published set, whatever columns it has
    assert tokenizer.decode(ids[0][1:]).startswith("Complete the following biology questions with")


# ---------------------------------------------------------------------- no more than is used, and not too little


def test_of_texts_no_more_is_read_than_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TEXT_CHARACTERS", 1000)
    for name in ("openwebtext", "wikitext"):
        write_rows(tmp_path, name, [*({"text": f"{k} " + "x" * 90} for k in range(30)), "no JSON at all"])
        read = data.load(name, "some/model", str(tmp_path))
        assert 9 <= len(read) <= 12 and read.about()["n_rows"] == len(read) and read.texts[8].startswith("8 x")
        assert read.sha256 == Dataset(name, [{"text": text} for text in read.texts]).sha256
    monkeypatch.setattr(data, "CORPUS_DOCUMENTS", 4)
    write_rows(tmp_path, "forget_corpus", [*({"text": "y" * 9} for _ in range(4)), "no JSON at all"])
    assert len(data.load_corpus(None, "some/model", str(tmp_path))) == 4
    write_rows(tmp_path, "mmlu", [{**GOOD, "question": "Q" * 100}] * 30)  # of a quiz any row may be asked
    assert len(data.load("mmlu", "some/model", str(tmp_path))) == 30


def test_one_question_has_one_half():
    quiz = Dataset("wmdp_bio", [QUESTION])
    other, its_own = sorted(
        ("tuning", "held_out"), key=lambda half: half.replace("_", "-") == data.half_of(QUESTION, 0)
    )
    assert getattr(quiz, its_own).rows == [QUESTION]
    with pytest.raises(UserError, match="wmdp_bio: too few questions"):
        getattr(quiz, other)
    assert Dataset("wmdp_bio", [QUESTION], whole=True).tuning.rows == [QUESTION]


def test_a_context_without_room_for_two_tokens_is_refused(tokenizer, wordy):
    for one, least in ((tokenizer, 3), (wordy.tokenizer, 2)):
        assert token_windows(one, ["The cat sat on the mat."], least)[0]
        with pytest.raises(UserError, match=f"a context of {least - 1} tokens is too short: {least} are the fewest"):
            token_windows(one, ["The cat sat on the mat."], least - 1)


def test_saebenchs_subjects_stand_for_mmlu_only_where_they_are_there():
    rows = [{**QUESTION, "subject": name} for name in ("art", "law")]
    quiz = Dataset("mmlu", rows)
    assert data.utility_subset(quiz) is quiz and data.utility_subset(quiz, "law").indices == [1]
    four = [{**QUESTION, "subject": name} for name in data.SUBJECTS.split(",")]
    assert data.utility_subset(Dataset("mmlu", rows + four)).indices == [2, 3, 4, 5]
    assert len(data.utility_subset(Dataset("mmlu", rows + four), "all")) == 6
    with pytest.raises(UserError, match="MMLU has no subject philosophy; it has art, law"):
        data.utility_subset(quiz, "philosophy")
    assert quiz.of(None) is quiz and quiz.of(" law,art").indices == [0, 1]


def test_a_subject_may_be_missing_or_null_where_there_is_one_only(tmp_path):
    rows = [QUESTION, {**QUESTION, "subject": None}, *[{**QUESTION, "subject": "botany"}] * 2]
    found = data.load("wmdp_bio", "tiny", folder_of(tmp_path, wmdp_bio=rows)).rows
    assert [data.prompt(row).splitlines()[0].split("about ")[1] for row in found] == ["botany."] * 4
    for row in ({**QUESTION, "subject": None}, QUESTION):
        with pytest.raises(UserError, match=r"line 1: .*subject"):
            data.load("mmlu", "tiny", folder_of(tmp_path, mmlu=[row]))


def test_special_ids_know_the_added_marker(gemma):
    marker = gemma.tokenizer.convert_tokens_to_ids(MARKER)
    assert marker not in gemma.tokenizer.all_special_ids
    assert special_ids(gemma.tokenizer) == [0, 1, 2, marker]


def test_token_windows(tokenizer):
    texts = ["The cat sat on the mat and looked at the moon over the sea. " * 2, "A", "Rivers flow to the sea."]
    windows, sources = token_windows(tokenizer, texts, context=10)
    assert all(row[0] == 2 and row.count(2) == 1 and 3 <= len(row) <= 10 for row in windows)
    assert sorted(set(sources)) == [0, 2]
    for index in (0, 2):
        joined = [i for row, source in zip(windows, sources) if source == index for i in row[1:]]
        whole = tokenizer(texts[index], add_special_tokens=False)["input_ids"]
        assert joined == whole[: len(joined)] and len(whole) - len(joined) <= 1


TEXT = "The cat sat on the mat."


@pytest.mark.parametrize(
    "given",
    [
        lambda m, _: token_windows(m.tokenizer, TEXT),
        lambda m, _: encode_prompts(m.tokenizer, TEXT),
        lambda m, _: data.encode_words(m.tokenizer, QUESTIONS[0]),
        lambda m, _: data.picking_windows(m.tokenizer, TEXT, [[TEXT]]),
        lambda m, _: data.picking_windows(m.tokenizer, [TEXT], [TEXT]),  # a retain set is a list, too
        lambda m, _: data.picking_windows(m.tokenizer, [TEXT], TEXT),
        lambda m, _: Dataset("mine", TEXT),
        lambda m, _: Dataset("mine", [TEXT]),
        lambda m, _: Dataset("mine", QUESTIONS[0]),
        lambda m, _: next(batches([TEXT], 2, m.tokenizer, "cpu")),
        lambda m, _: next(batches([2, 5, 6], 2, m.tokenizer, "cpu")),  # one row's ids
        lambda m, sae: common.firing_rates(m, sae, [TEXT]),
        lambda m, _: evaluation.score_loss(m, TEXT, [edits.NONE]),
        lambda m, _: evaluation.score_letters(m, [TEXT], [3, 4, 5, 6], [edits.NONE]),
        lambda m, _: evaluation.letters(m, Dataset("mmlu", QUESTIONS), {"unablated": edits.NONE}, prompts=TEXT),
    ],
)
def test_a_string_where_a_list_is_meant_is_refused(gemma, gemma_sae, given):
    with pytest.raises(UserError, match=r"a list of .* is needed, not|each row is a dict"):
        given(gemma, gemma_sae)


def test_token_windows_stop_at_the_budget(tokenizer):
    texts = ["The cat sat on the mat.", "The moon is over the sea and the sea is deep."]
    first = len(tokenizer(texts[0])["input_ids"]) - 1
    windows, sources = token_windows(tokenizer, texts, context=64, max_tokens=first + 4)
    assert [len(row) for row in windows] == [first + 1, 5] and sources == [0, 1]
    assert token_windows(tokenizer, texts, context=64, max_tokens=first)[1] == [0]


def test_batches_hold_each_row_once(tokenizer):
    rows = [[2, *range(5, 5 + n)] for n in (3, 9, 1, 4, 9, 2, 7)]
    seen = []
    for picked, ids in batches(rows, 3, tokenizer, "cpu"):
        seen += picked
        for index, row in zip(picked, ids.tolist()):
            assert row == rows[index] + [0] * (len(row) - len(rows[index]))
    assert sorted(seen) == list(range(len(rows)))


def test_windows_begin_as_scored_prompts_do(tokenizer, wordy):
    texts = ["The cat sat on the mat."]
    for one, asked in ((tokenizer, True), (wordy.tokenizer, False)):
        window = token_windows(one, texts)[0][0]
        assert window == one(texts[0])["input_ids"] and (window[0] == 2) == asked
        assert token_windows(one, texts, bos=True)[0] == [[2, *window[asked:]]]


def test_windows_are_no_longer_than_the_models_positions(wordy):
    one = copy.copy(wordy.tokenizer)
    assert one.model_max_length == 512
    one.model_max_length = 5
    assert max(map(len, token_windows(one, ["The cat sat on the mat and looked at the moon."])[0])) == 5


def lm_eval_tasks(folder):
    place = find_spec("lm_eval")
    return Path(place.submodule_search_locations[0]) / "tasks" / folder if place else None


def lm_eval_prompt(path, doc):
    config = yaml.safe_load(path.read_text())
    config = {**yaml.safe_load((path.parent / config["include"]).read_text()), **config}
    template = jinja2.Environment(keep_trailing_newline=True).from_string(config["doc_to_text"])
    assert config["doc_to_choice"] == list("ABCD")
    return config["description"] + template.render(**doc), config


@pytest.mark.skipif(lm_eval_tasks("") is None, reason="lm_eval is not installed")
def test_prompt_is_lm_evals():
    paths = sorted(lm_eval_tasks("mmlu/default").glob("mmlu_*.yaml"))
    assert len(paths) == 57
    for row in QUESTIONS:
        for path in paths:
            wanted, config = lm_eval_prompt(path, row)
            assert prompt({**row, "subject": config["dataset_name"]}) == wanted
        assert prompt(row) == lm_eval_prompt(lm_eval_tasks("wmdp") / "wmdp_bio.yaml", row)[0]


def test_prompt_in_another_order():
    row = dict(question="Q", choices=["w", "x", "y", "z"], answer=0)
    assert prompt(reordered(row, (2, 0, 3, 1))).endswith("\n\nQ\nA. y\nB. w\nC. z\nD. x\nAnswer:")
    assert len(set(data.PERMUTATIONS)) == 24 and reordered(row, data.PERMUTATIONS[0]) == row
    for order in data.PERMUTATIONS:
        new = reordered(row, order)
        assert new["choices"][new["answer"]] == "w" and sorted(new["choices"]) == row["choices"]


def test_encode_prompts(tokenizer):
    rows, letters = encode_prompts(tokenizer, [prompt(row) for row in QUESTIONS])
    assert tokenizer.convert_ids_to_tokens(letters) == ["ĠA", "ĠB", "ĠC", "ĠD"]
    for row, ids in zip(QUESTIONS, rows):
        assert ids[0] == 2 and ids.count(2) == 1
        assert tokenizer.decode(ids[1:]) == prompt(row)


def test_encode_chat_prompts(tokenizer):
    with pytest.raises(UserError, match="chat template"):
        encode_prompts(tokenizer, ["x"], "chat")
    chat = train_tokenizer()
    chat.chat_template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>\n{% endif %}"
    )
    rows, letters = encode_prompts(chat, ["Answer:", "The sea"], "chat")
    assert chat.convert_ids_to_tokens(letters) == list("ABCD")
    assert all(ids[0] == 2 and ids.count(2) == 1 and ids.count(chat.convert_tokens_to_ids(MARKER)) == 2 for ids in rows)


GEMMA_TURN = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def test_saebench_prompts():
    """To the byte what sae_bench/evals/unlearning/utils/metrics.py makes of a question; to_tokens may put a second BOS
    in front of it there."""
    chat, row = train_tokenizer(), dict(question="Which?", choices=["a cat", "mat", "sea", "sky"], answer=0)
    chat.chat_template = GEMMA_TURN
    rows, letters = encode_prompts(chat, [prompt(reordered(row, (1, 0, 2, 3)), "saebench")], "saebench")
    assert chat.decode(rows[0][1:]) == (
        "<start_of_turn>user\nThe following are multiple choice questions (with answers) about biology.\nWhich?\n"
        "A. mat\nB. a cat\nC. sea\nD. sky<end_of_turn>\n<start_of_turn>model\nAnswer: ("
    )
    assert rows[0].count(chat.bos_token_id) == 1
    assert [chat.convert_ids_to_tokens(list(pair)) for pair in letters] == [[x, f"Ġ{x}"] for x in "ABCD"]


def test_tokenizer_that_splits_letters_is_refused():
    split = train_tokenizer(vocab_size=259)
    with pytest.raises(UserError, match="one token"):
        encode_prompts(split, ["Answer:"])


def test_no_prompts_have_no_letters(tokenizer):
    with pytest.raises(UserError, match="no prompt is given"):
        encode_prompts(tokenizer, [])


def test_doubled_bos_is_refused(tokenizer):
    with pytest.raises(UserError, match="more than one BOS"):
        encode_prompts(tokenizer, [f"{BOS}{BOS}Answer:"])


def write_rows(folder, name, rows):
    (folder / f"{name}.jsonl").write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )


GOOD = dict(question="Q", choices=list("wxyz"), answer=2, subject="law")


BROKEN = {
    "not json": '{"question": ',
    "not a row": "7",
    "no question": {**GOOD, "question": None},
    "three choices": {**GOOD, "choices": list("wxy")},
    "no choices": {key: value for key, value in GOOD.items() if key != "choices"},
    "answer 4": {**GOOD, "answer": 4},
    "letter as answer": {**GOOD, "answer": "C"},
    "a list": "[1, 2]",
    "half a character": '{"question": "Q \\ud83d", "choices": ["w", "x", "y", "z"], "answer": 2, "subject": "law"}',
}


@pytest.mark.parametrize("name", ["wmdp_bio", "mmlu"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_line_is_named(tmp_path, name, case):
    rows = [dict(GOOD, question=f"Q{k}") for k in range(20)]
    write_rows(tmp_path, name, rows[:16] + [BROKEN[case]] + rows[17:])
    with pytest.raises(UserError, match=rf"{name}\.jsonl, line 17: ") as caught:
        data.load(name, "gpt2", str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_mmlu_needs_subjects_and_texts_need_text(tmp_path):
    row = {key: value for key, value in GOOD.items() if key != "subject"}
    write_rows(tmp_path, "mmlu", [GOOD, row])
    write_rows(tmp_path, "wmdp_bio", [GOOD, row])
    write_rows(tmp_path, "wikitext", [dict(text="a"), dict(txt="b")])
    assert data.load("wmdp_bio", "gpt2", str(tmp_path)).rows == [{**x, "asked_about": "law"} for x in (GOOD, row)]
    for name in ("mmlu", "wikitext"):
        with pytest.raises(UserError, match=rf"{name}\.jsonl, line 2: "):
            data.load(name, "gpt2", str(tmp_path))


def test_a_dataset_says_where_its_rows_come_from(tmp_path):
    write_rows(tmp_path, "wikitext", [dict(text="über a"), dict(text="b")])
    first = data.load("wikitext", "gpt2", str(tmp_path))
    assert first.texts == ["über a", "b"] and first.source == str(tmp_path / "wikitext.jsonl") and not first.stand_in
    write_rows(tmp_path, "wikitext", [dict(text="über a"), dict(text="c")])
    assert data.load("wikitext", "gpt2", str(tmp_path)).sha256 != first.sha256
    assert data.load("forget_corpus", "gpt2", str(tmp_path)).rows == []
    with pytest.raises(UserError, match="no such folder"):
        data.load("wikitext", "gpt2", str(tmp_path / "absent"))
    assert json.loads(json.dumps(first.about())) == {
        "source": first.source, "sha256": first.sha256, "stand_in": False, "n_rows": 2, "asked": None, "half": None,
        "variant": None, "topic": None, "skipped_long": 0, "published": None, "prompts": None,
    }  # fmt: skip


def test_questions_beyond_the_models_positions_are_refused_or_left_out_and_counted(wordy, capsys):
    tokenizer = copy.copy(wordy.tokenizer)
    quiz = Dataset("wmdp_bio", [GOOD, {**GOOD, "question": "Q" * 60}, GOOD, {**GOOD, "choices": [*"wxy", "z" * 60]}])
    tokenizer.model_max_length = len(tokenizer(prompt(GOOD))["input_ids"])
    quiz = quiz.only([1, 2, 3, 0])
    with pytest.raises(UserError, match=r"wmdp_bio: question 1 \('QQ.* tokens, the model \d+ positions; skip_long"):
        data.drop_too_long(tokenizer, quiz)
    kept = data.drop_too_long(tokenizer, quiz, skip=True)
    assert kept.indices == [2, 0] and kept.skipped_long == kept.about()["skipped_long"] == 2
    assert "left out 2 of 4 questions, longer than the model's" in capsys.readouterr().err
    assert data.drop_too_long(tokenizer, kept) == kept
    words, _ = data.encode_words(tokenizer, [GOOD], data.CLOZE)
    tokenizer.model_max_length = max(map(len, words))
    assert data.drop_too_long(tokenizer, dataclasses.replace(quiz, variant="cloze"), skip=True).indices == [2, 0]


def test_long_texts_are_cut_without_a_warning(monkeypatch):
    """transformers warns of indexing errors where a text is longer than the model's positions."""
    tokenizer, said = load_tokenizer(str(data.HERE / "tiny/model")), []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", said.append)
    tokenizer.model_max_length = 8
    assert len(data.token_windows(tokenizer, ["the cell " * 40])[0]) > 4
    assert len(data.encode(tokenizer, "the cell " * 40)) > 40
    assert not said


def test_a_subject_of_some_rows_is_not_the_topic_of_all(tmp_path):
    rows = [{**QUESTION, "question": f"Q{k}?", **({"subject": "law"} if not k else {})} for k in range(20)]
    assert data.load("wmdp_bio", "tiny", folder_of(tmp_path, wmdp_bio=rows)).topic == tmp_path.name
    rows = [{**QUESTION, "question": f"Q{k}?", "subject": "stars"} for k in range(1273)]
    (tmp_path / "own").mkdir()
    assert data.load("wmdp_bio", "tiny", folder_of(tmp_path / "own", wmdp_bio=rows)).topic == "stars"


@pytest.mark.parametrize("name", ["wmdp.jsonl", "cloze.jsonl", "wiki.jsonl", "robust.jsonl"])
def test_a_part_of_a_known_name_is_refused(tmp_path, name):
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(UserError, match=f"{name} is not read: give "):
        data.load("mmlu", "tiny", folder_of(tmp_path, mmlu=[{**QUESTION, "subject": "law"}]))


def test_a_record_in_the_data_folder_is_no_data_file(tmp_path):
    where = folder_of(tmp_path, mmlu=[{**QUESTION, "subject": "law"}])
    for name in ("cloze.csv", "cloze.json", "wmdp_bio_sweep.csv", "wmdp_bio_sweep.json", "wmdp_bio_sweep.png"):
        (tmp_path / name).touch()
    assert data.load("mmlu", "tiny", where).rows
    (tmp_path / "cloze.json").unlink()
    with pytest.raises(UserError, match=r"cloze\.csv is not read: give wmdp_bio_cloze.jsonl"):
        data.load("mmlu", "tiny", where)


def test_the_topic_is_no_subject_of_what_should_stay(tmp_path, capsys):
    rows = [{**QUESTION, "question": f"Q{k}?", "subject": ["human_anatomy", "law"][k % 2]} for k in range(6)]
    quiz = Dataset("mmlu", rows)
    for topic in ("human anatomy", "human_anatomy", "Human Anatomy "):
        assert data.utility_subset(quiz, None, topic).indices == [1, 3, 5]
    assert "MMLU: left out 3 questions on human anatomy, the topic" in capsys.readouterr().err
    for subjects, topic in (("all", "law"), ("law", "law"), (None, "music"), (None, None)):
        assert len(data.utility_subset(quiz, subjects, topic)) == (3 if subjects == "law" else 6)
    assert data.utility_subset(quiz.only([1, 3]), None, "law").indices == [1, 3]  # all else would be nothing


def test_answers_that_count_from_1_are_said(tmp_path, capsys):
    rows = [{**QUESTION, "question": f"Q{k}?", "answer": 1 + k % 3} for k in range(12)]
    data.load("wmdp_bio", "tiny", folder_of(tmp_path, wmdp_bio=rows))
    assert "no right answer is the first option; answers count from 0" in capsys.readouterr().err
    rows[0]["answer"] = 0
    data.load("wmdp_bio", "tiny", folder_of(tmp_path, wmdp_bio=rows))
    assert "answers count from 0" not in capsys.readouterr().err
