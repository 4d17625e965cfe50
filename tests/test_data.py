"""Questions, texts and retain sets."""

import argparse
import json

import datasets
import pytest
import torch
from conftest import BOS, MARKER, train_tokenizer
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

import data
from common import Rates, largest
from data import UserError


def line(**changes):
    return json.dumps({"question": "Q?", "choices": list("wxyz"), "answer": 1, "subject": "s", **changes})


@pytest.mark.parametrize(
    "changes",
    [{"choices": "wxyz"}, {"choices": ["a"] * 3}, {"answer": True}, {"answer": 4}, {"answer": 1.0}, {"question": 3},
     {"choices": [1, 2, 3, 4]}, {"subject": 1}],
)  # fmt: skip
def test_a_bad_question_is_refused_with_its_line(tmp_path, changes):
    path = tmp_path / "mmlu.jsonl"
    path.write_text("\n".join([line(), line(**changes)]))
    with pytest.raises(UserError, match=r"mmlu.jsonl, line 2"):
        data.load_rows("mmlu", "other/model", str(tmp_path))


def test_byte_order_mark_and_a_last_blank_line_do_no_harm(tmp_path):
    (tmp_path / "mmlu.jsonl").write_bytes(b"\xef\xbb\xbf" + line().encode() + b"\n\n")
    assert len(data.load_rows("mmlu", "other/model", str(tmp_path))[0]) == 1


def test_empty_and_binary_files_are_refused(tmp_path):
    (tmp_path / "mmlu.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        data.load_rows("mmlu", "other/model", str(tmp_path))
    (tmp_path / "mmlu.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        data.load_rows("mmlu", "other/model", str(tmp_path))


def test_the_hub_is_asked_in_order_and_a_failure_names_the_way_out(monkeypatch, tmp_path, capsys):
    asked = []

    def refuse(dataset, config, split, revision=None, streaming=False):
        asked.append((dataset, revision))
        if (dataset, revision) == ("stas/openwebtext-10k", data.PARQUET):
            return datasets.IterableDataset.from_generator(lambda: ({"text": str(i)} for i in range(data.STREAMED + 9)))
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows, found = data.load_rows("openwebtext", "some/model")
    assert [row["text"] for row in rows] == [str(i) for i in range(data.STREAMED)]
    assert found["source"] == "stas/openwebtext-10k train refs/convert/parquet" and not found["stand_in"]
    said = capsys.readouterr().err
    assert f"data: openwebtext is 2,000 rows of {found['source']}, as {data.HUB['openwebtext'][0][0]} failed" in said
    assert "scripts are no longer supported" in said
    ids = [source[0] for source in data.HUB["openwebtext"]]
    assert asked == list(zip(ids, [None, data.PARQUET] * 2))
    with pytest.raises(UserError, match="give --data FOLDER"):
        data.load_rows("wmdp_bio", "some/model")
    assert asked[4:] == [("cais/wmdp", None)]


def corpus_settings(tmp_path, forget_corpus=None):
    return argparse.Namespace(model="some/model", data=str(tmp_path), forget_corpus=forget_corpus)


def test_a_forget_corpus_of_ones_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"title": "t", "text": f"{i} " + "x" * 2 * data.CORPUS_CHARACTERS} for i in range(data.CORPUS_DOCUMENTS + 5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mmlu.jsonl").touch()  # a folder without any file of a known name is refused
    texts, found = data.load_corpus(corpus_settings(tmp_path, str(path)))
    assert len(texts) == found["documents"] == data.CORPUS_DOCUMENTS and found["source"] == str(path)
    assert texts[3].startswith("3 x") and {len(text) for text in texts} == {data.CORPUS_CHARACTERS}
    assert data.load_corpus(corpus_settings(tmp_path))[0] == []
    path.rename(tmp_path / "forget_corpus.jsonl")
    assert data.load_corpus(corpus_settings(tmp_path))[0] == texts


def test_without_a_forget_corpus_the_line_names_the_form(tmp_path, monkeypatch):
    form = "https://huggingface.co/datasets/cais/wmdp-bio-forget-corpus"
    with pytest.raises(UserError, match=f"mine.jsonl: no such file.* {form}"):
        data.load_corpus(corpus_settings(tmp_path, "mine.jsonl"))

    def refuse(*args, **kwargs):
        raise RuntimeError("Access is restricted")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=f"cais/wmdp-bio-forget-corpus.*restricted.* {form}"):
        data.load_corpus(corpus_settings(tmp_path, "cais/wmdp-bio-forget-corpus"))
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"abstract": "no text"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2: has no 'text'"):
        data.load_corpus(corpus_settings(tmp_path, str(tmp_path / "bad.jsonl")))


def test_every_hub_id_has_an_owner():
    assert all("/" in source[0] for sources in data.HUB.values() for source in sources)


def test_a_feature_must_be_rare_in_every_retain_set():
    first = Rates(torch.tensor([5, 0, 1]), torch.tensor([1.0, 0, 2.0]).double(), 100)
    second = Rates(torch.tensor([0, 2, 3]), torch.tensor([0.0, 1.0, 0.5]).double(), 50)
    both = largest([first, second])
    assert both.fires.tolist() == [5, 4, 6] and both.n_tokens == 100
    assert both.total.tolist() == [1.0, 2.0, 2.0]
    assert largest([first]) is first


def test_picking_texts_are_prompts_on_both_sides_or_prose(tmp_path):
    wmdp = [{"question": "Q?", "choices": list("wxyz"), "answer": 3}]
    (tmp_path / "mmlu.jsonl").touch()
    s = argparse.Namespace(model="tiny", data=str(tmp_path), pick_text="prose", forget_corpus=None)
    forget, retain = data.picking_texts(wmdp, [0], s, {})
    assert forget == ["Q? z"] and len(retain) == 1
    s.pick_text = "prompt"
    assert data.picking_texts(wmdp, [0], s, {})[0] == [data.prompt(wmdp[0])]
    (tmp_path / "forget_corpus.jsonl").write_text('{"text": "a corpus"}')
    sources = {}
    forget, retain = data.picking_texts(wmdp, [0], s, sources)
    assert forget == ["a corpus"] and len(retain) == 2
    assert set(sources) == {"forget_corpus", "wikitext", "mmlu_dev"}
    assert all(text.endswith("Answer:") and "Which" in "".join(retain[1]) for text in retain[1])


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
        "{{ bos_token }}{% for m in messages %}user says: {{ m.content }} model says:\n{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("style, gaps", [("plain", [" "]), ("chat", [""]), ("saebench", ["", " "])])
def test_letters_are_those_that_continue_every_prompt(style, gaps):
    tokenizer, texts = with_dummy_prefix(), ["The cat sat on the sea", "Which of these is an organ of the body?"]
    rows, letters = data.encode_prompts(tokenizer, texts, style)
    for row, text in zip(rows, texts):
        whole = text if style == "plain" else data.in_turn(tokenizer, text)
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


@pytest.mark.parametrize("end", ["<think>", "<think>\n"])
def test_a_template_that_opens_a_thought_is_refused(end):
    chat = train_tokenizer()
    chat.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}" + end
    with pytest.raises(UserError, match="opens a thought"):
        data.encode_prompts(chat, ["The sea"], "chat")


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
        ("wmdp-bio.jsonl", r"wmdp-bio\.jsonl is not read; is it wmdp_bio\.jsonl"),
        ("WMDP_bio.jsonl", r"is it wmdp_bio\.jsonl"),
        ("wmdp_bio.json", r"is it wmdp_bio\.jsonl"),
        ("mmlu-dev.jsonl", r"is it mmlu_dev\.jsonl"),
        ("wikitxt.jsonl", r"is it wikitext\.jsonl"),
        ("questions.jsonl", "none of its files is called"),
    ],
)
def test_a_file_that_would_be_passed_over_is_refused(tmp_path, name, said):
    (tmp_path / name).write_text(json.dumps(QUESTION) + "\n")
    with pytest.raises(UserError, match=said):
        data.load_rows("wmdp_bio", "tiny", str(tmp_path))


def test_what_is_used_of_a_folder_is_said_once(tmp_path, capsys):
    where = folder_of(tmp_path, wmdp_bio=[QUESTION], train=[{"text": "x"}])
    for _ in range(2):
        assert data.load_rows("wmdp_bio", "tiny", where)[0] == [QUESTION]
    assert capsys.readouterr().err == f"data: wmdp_bio is 1 rows of {tmp_path}/wmdp_bio.jsonl\n"
    assert data.load_rows("mmlu", "tiny", where)[1]["stand_in"]


def test_saebenchs_subjects_stand_for_mmlu_only_where_they_are_there():
    own = [{**QUESTION, "subject": name} for name in ("art", "law")]
    assert data.utility(own, None) == [0, 1] and data.utility(own, "law") == [1]
    four = [{**QUESTION, "subject": name} for name in data.SUBJECTS.split(",")]
    assert data.utility(own + four, None) == [2, 3, 4, 5]
    with pytest.raises(UserError, match="no philosophy; there are art, law"):
        data.utility(own, "philosophy")


def test_a_subject_may_be_missing_or_null_where_there_is_one_only(tmp_path):
    rows = [QUESTION, {**QUESTION, "subject": None}, {**QUESTION, "subject": "botany"}]
    found = data.load_rows("wmdp_bio", "tiny", folder_of(tmp_path, wmdp_bio=rows))[0]
    assert [data.prompt(row).splitlines()[0].split("about ")[1] for row in found] == ["biology.", "biology.", "botany."]
    for row in ({**QUESTION, "subject": None}, QUESTION):
        with pytest.raises(UserError, match=r"line 1: .*subject"):
            data.load_rows("mmlu", "tiny", folder_of(tmp_path, mmlu=[row]))
