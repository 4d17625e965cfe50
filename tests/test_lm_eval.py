"""lm-eval's own numbers, with nothing ablated and with features ablated: letters, log-probabilities, generated text."""

import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from conftest import BOS, FAMILIES, MARKER, some_ids, write_sae
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import baselines
import edits
import feature_ablate_1
import feature_ablate_2
import lm_eval_ablated
import lm_eval_model
import pareto
from common import firing_rates, load_model, load_sae
from data import LETTERS, UserError, encode_prompts, halves, prompt, special_ids
from edits import NONE, Edit, decoder_layers, edit_of
from evaluation import score_letters, score_loss
from flags import GRIDS
from hub import identity
from lm_eval_model import AblatedLM, Scored, Spread, by_question

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
TEMPLATES = Path(lm_eval.__file__).parent / "tasks/mmlu/default"


def template(subject: str) -> dict:
    config = yaml.safe_load((TEMPLATES / "_default_template_yaml").read_text())
    keys = ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target")
    about = subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return {**{key: config[key] for key in keys}, "description": header, "num_fewshot": 0}


def lm_eval_scores(model: HFLM, rows: list[dict], subject: str, folder: Path) -> list[list[float]]:
    """(n, 4) log-likelihoods of the letters, by lm-eval's task and model classes."""
    path = folder / f"{subject}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    task = ConfigurableTask(config={"task": f"local_{subject}", **source, **template(subject)})
    task.build_all_requests(limit=None, rank=0, world_size=1)
    requests = task.instances
    assert requests[0].args[0] == prompt(rows[0])
    values = [value for value, _ in model.loglikelihood(requests, disable_tqdm=True)]
    return [values[start : start + 4] for start in range(0, len(values), 4)]


@pytest.mark.parametrize("device", ["cpu"])
def test_letters_and_log_probabilities_are_lm_evals(tmp_path, monkeypatch, device):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [json.loads(line) for line in (TINY / "data/mmlu.jsonl").open()]
    subjects = sorted({row["subject"] for row in rows})
    asked = [row for subject in subjects for row in rows if row["subject"] == subject][:200:2]
    assert len(asked) == 100
    theirs_model = HFLM(str(TINY / "model"), device=device, dtype="float32", batch_size=8, attn_implementation="eager")
    theirs = []
    for subject in subjects:
        some = [row for row in asked if row["subject"] == subject]
        if some:
            theirs += lm_eval_scores(theirs_model, some, subject, tmp_path)
    model = load_model("tiny", device)
    rows, letters = encode_prompts(model.tokenizer, [prompt(row) for row in asked])
    ours = score_letters(model, rows, letters, [NONE])[0]
    for mine, other in zip(ours.tolist(), theirs, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
        assert LETTERS[mine.index(max(mine))] == LETTERS[other.index(max(other))]


# ------------------------------------------------------------------------------ the lessons' own numbers


def points(record: dict) -> dict:
    return {(point["method"], point["setting"].get("clamp")): point["scores"] for point in record["points"]}


@pytest.mark.slow
def test_scores_and_letters_are_the_lessons_on_every_question(tmp_path):
    same = dict(layer=3, n_features=10, pick_on="all")
    lessons = [
        script.run(**same, out=str(tmp_path / f"{script.__name__}.json"))
        for script in (feature_ablate_1, feature_ablate_2)
    ]
    theirs = lm_eval_ablated.run(**same, unablated=True, out=str(tmp_path / "lm_eval.json"))
    n = {"wmdp_bio": 174, "mmlu": 362}
    for record in lessons:
        for setting in (("none", None), ("sae-ablation", -80.0)):
            mine, other = points(record)[setting], points(theirs)[setting]
            for name in mine:
                assert record["data"][name]["questions"] == theirs["data"][name]["questions"]
                assert record["data"][name]["sha256"] == theirs["data"][name]["sha256"]
                assert len(other[name]["letters"]) == other[name]["n"] == n[name]
                assert mine[name] == other[name]  # accuracy, interval, letters, change, p value, subjects
    own = theirs["lm_eval"]["ablated"]["tiny_wmdp_bio"]["acc,none"]
    assert own == pytest.approx(points(theirs)["sae-ablation", -80.0]["wmdp_bio"]["accuracy"])


METHODS = ["zero-ablation", "mean-ablation", "clamp", "random-features", "conditional-clamp", "refusal-clamp", "dsg",
           "diff-in-means"]  # fmt: skip
FAST = ("dsg",)  # whose gate looks at the whole prompt


@pytest.mark.parametrize("method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_every_method_gives_the_letters_of_baselines(method, monkeypatch, tmp_path):
    """On every question of the reporting half: a record's edit as it is, and for DSG a setting given by flags."""
    assert set(METHODS) == set(GRIDS)
    monkeypatch.setitem(GRIDS, method, GRIDS[method][1:6:4])
    latent = dict(refusal_latent=11, refusal_value=-300.0) if method == "refusal-clamp" else {}
    path = str(tmp_path / "tuned.json")
    tuned = baselines.run(method=method, out=path, **latent)
    flags = dict(out=str(tmp_path / "r.json"))
    chosen = tuned["points"][tuned["chosen"]]
    found = lm_eval_ablated.run(features=path, unablated=True, **flags)["points"]
    for mine, other in zip((tuned["points"][0], chosen), found, strict=True):
        for name in ("wmdp_bio", "mmlu"):
            assert mine["scores"][name]["letters"] == other["scores"][name]["letters"]
    assert found[1]["setting"] == chosen["setting"] and found[1]["edit"] == chosen["edit"]
    if method == "dsg":
        point = tuned["points"][1]  # 20 features
        same = dict(n_features=20, clamp=point["setting"]["clamp"], layer=3)
        picked = lm_eval_ablated.run(method="dsg", **same, **flags)["points"][0]
        assert picked["edit"] == point["edit"]
        assert picked["scores"]["mmlu"]["letters"] == point["scores"]["mmlu"]["letters"]


def test_a_gate_is_no_way_to_write_an_answer(model_folder, get_model, make_sae):
    sae = make_sae(get_model("llama"))
    lm = AblatedLM(str(model_folder("llama")), sae={1: sae}, features={1: [3, 17]}, method="dsg", gate=0.1, clamp=-4.0,
                   device="cpu", dtype="float32")  # fmt: skip
    assert lm.edit.whole and lm.loglikelihood(requests(SENTENCES, [" sea"]))
    with pytest.raises(UserError, match="leave out tasks that generate"):
        lm.generate_until([Instance("generate_until", {}, ("The cat", {"max_gen_toks": 4, "until": []}), 0)])
    with pytest.raises(UserError, match=r"missing .* .gate."):
        AblatedLM(str(model_folder("llama")), sae={1: sae}, features={1: [3]}, method="dsg", clamp=-4.0, device="cpu")


def test_loss_is_our_own_scorers(tmp_path):
    """One BOS in front of every window, every token of it a target."""
    flags = dict(layer=3, n_features=10, tasks="tiny_openwebtext", limit=12, unablated=True)
    record = lm_eval_ablated.run(**flags, out=str(tmp_path / "r.json"))
    (clean, ablated) = (point["scores"]["openwebtext"] for point in record["points"])
    task = TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False).load(["tiny_openwebtext"])
    docs = task["tasks"]["tiny_openwebtext"].eval_docs
    texts = [docs[i]["text"] for i in record["data"]["openwebtext"]["questions"]]
    model = load_model("tiny", "cpu")
    sae = load_sae(None, 3, model)
    windows = [model.tokenizer(text)["input_ids"] for text in texts]
    features = record["points"][1]["setting"]["features"]
    rows = [NONE, edit_of("sae-ablation", sae, features=features, clamp=-80.0)]
    nats, targets = score_loss(model, windows, rows)
    mean = (nats.sum(1) / targets.sum()).tolist()
    assert clean["n_tokens"] == int(targets.sum())
    assert [clean["nats_per_token"], ablated["nats_per_token"]] == pytest.approx(mean, abs=1e-5)
    assert ablated["loss_added"] == pytest.approx(mean[1] - mean[0], abs=1e-5)


# --------------------------------------------------------------------------------- the model class


def requests(contexts: list[str], continuations: list[str], kind: str = "loglikelihood") -> list[Instance]:
    pairs = [(context, continuation) for context in contexts for continuation in continuations]
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


SENTENCES = ["The cat sat on the", "Rivers of Europe flow to the sea, and the", "Answer:"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_no_feature_it_is_hf_to_the_last_bit(dtype):
    questions = [json.loads(line) for line in (TINY / "data/wmdp_bio.jsonl").open()][:40]
    asked = requests([prompt(row) for row in questions], [" A", " B", " C", " D", " Vibrio cholerae"])
    same = dict(device="cpu", dtype=dtype, batch_size=8)
    theirs = HFLM(str(TINY / "model"), **same).loglikelihood(asked)
    ours = AblatedLM(str(TINY / "model"), sae=str(TINY / "sae/layer_7"), features={7: []}, **same)
    assert list(ours.edit.at) == [7]
    assert ours.loglikelihood(asked) == theirs
    other = AblatedLM("tiny", features={7: list(range(300))}, clamp=-80.0, **same)
    assert other.loglikelihood(asked) != theirs
    other.ablated = False
    assert other.loglikelihood(asked) == theirs


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_a_layers_output_is_transformer_lenss_residual(family, get_model, model_folder):
    """blocks.L.hook_resid_post is the output of decoder layer L, not hidden_states, whose last has the final norm."""
    model = get_model(family)
    hf = HFLM(str(model_folder(family)), device="cpu", dtype="float32", attn_implementation="eager").model
    ids, seen, theirs = some_ids(model), {}, {}
    ids = ids.where(ids != 0, 3)  # no padding: the two treat it differently
    for number, layer in enumerate(decoder_layers(hf)):
        layer.register_forward_hook(
            lambda module, args, out, number=number: seen.update({number: out[0] if isinstance(out, tuple) else out})
        )
    hooks = [(f"blocks.{i}.hook_resid_post", lambda h, hook, i=i: theirs.update({i: h.clone()})) for i in range(4)]
    with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
        hf(ids), model(ids)
    for number in range(4):
        assert torch.allclose(seen[number], theirs[number], atol=1e-5)
    assert not torch.allclose(seen[2], seen[3], atol=1e-2)


@torch.no_grad()
def reference_logits(hf, ids: torch.Tensor, edits: dict, ordinary: torch.Tensor) -> torch.Tensor:
    """Logits of a plain forward pass whose layers' outputs become decode(a') plus the SAE's error, all in full.

    edits: {layer: (sae, features, clamp)}.
    """
    handles = []
    for number, (sae, features, clamp) in edits.items():

        def hook(module, args, out, sae=sae, features=features, clamp=clamp):
            h = out[0] if isinstance(out, tuple) else out
            acts = sae.encode(h)
            new = acts.clone()
            new[..., features] = torch.where(acts[..., features] > 0, clamp, 0.0)
            h = torch.where(ordinary[..., None], h - sae.decode(acts) + sae.decode(new), h)
            return (h, *out[1:]) if isinstance(out, tuple) else h

        handles.append(decoder_layers(hf)[number].register_forward_hook(hook))
    logits = hf(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


def edits_of(request_name: str, model, make_sae) -> dict:
    """{layer: (sae, features, clamp)} for each case of the tests below."""
    one = make_sae(model)
    other = make_sae(model, layer=2, hook_name="blocks.2.hook_resid_post", seed=1)
    topk = make_sae(model, "topk")
    return {
        "two features": {1: (one, [3, 17], -4.0)},
        "zero ablation": {1: (one, list(range(0, 64, 2)), 0.0)},
        "two layers": {1: (one, [3, 17, 40], -4.0), 2: (other, [5, 6], -4.0)},
        "topk": {1: (topk, list(range(0, 64, 3)), -4.0)},
    }[request_name]


CASES = ["two features", "zero ablation", "two layers", "topk"]


def ablated_lm(folder: Path, edits: dict, **options) -> AblatedLM:
    saes = {number: sae for number, (sae, _, _) in edits.items()}
    features = {number: ids for number, (_, ids, _) in edits.items()}
    (clamp,) = {clamp for _, _, clamp in edits.values()}
    same = dict(device="cpu", dtype="float32", batch_size=2, attn_implementation="eager")
    return AblatedLM(str(folder), sae=saes, features=features, clamp=clamp, **same, **options)


def ordinary_of(lm: AblatedLM, ids: torch.Tensor) -> torch.Tensor:
    return ~torch.isin(ids, torch.tensor(special_ids(lm.tokenizer)))


@pytest.mark.parametrize("case", CASES)
def test_log_likelihoods_are_a_plain_references(family, case, get_model, model_folder, make_sae):
    edits = edits_of(case, get_model(family), make_sae)
    lm = ablated_lm(model_folder(family), edits)
    moved = 0
    asked = requests([*SENTENCES, f"The cat {MARKER} sat on the"], [" mat and the moon", " sea", "A"])
    for request, (found, _) in zip(asked, lm.loglikelihood(asked), strict=True):
        context, continuation = lm._encode_pair(*request.args)
        ids = torch.tensor([context + continuation])
        values = []
        for some in (edits, {}):
            logits = reference_logits(lm.model, ids, some, ordinary_of(lm, ids))[0].log_softmax(-1)
            picked = logits[len(context) - 1 : -1].gather(1, torch.tensor(continuation)[:, None])
            values.append(picked.sum().item())
        assert found == pytest.approx(values[0], abs=2e-3)
        moved += abs(values[0] - values[1]) > 0.1
    assert moved > 4  # the test would pass without any edit otherwise


@pytest.mark.parametrize("case", CASES)
def test_generated_text_is_a_plain_references(family, case, get_model, model_folder, make_sae):
    """20 tokens with the key-value cache: prompt tokens are edited once, generated ones as they come."""
    edits = edits_of(case, get_model(family), make_sae)
    lm = ablated_lm(model_folder(family), edits)
    options = {"max_gen_toks": 20, "until": [], "do_sample": False}
    asked = [Instance("generate_until", {}, (text, dict(options)), i) for i, text in enumerate(SENTENCES)]
    assert lm.batch_size == 2  # so that a shorter prompt is padded on the left
    differs = 0
    for request, found in zip(asked, lm.generate_until(asked), strict=True):
        texts = []
        for some in (edits, {}):
            ids = torch.tensor([lm.tok_encode(request.args[0])])
            start = ids.shape[1]
            while ids.shape[1] < start + 20 and ids[0, -1] != lm.eot_token_id:
                logits = reference_logits(lm.model, ids, some, ordinary_of(lm, ids))
                ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
            texts.append(lm.tok_decode(ids[0, start:]))
        assert found == texts[0].split(lm.tok_decode(lm.eot_token_id, skip_special_tokens=False))[0]
        differs += texts[0] != texts[1]
    assert differs or case == "two features"


def test_a_layer_may_return_a_tuple(model_folder, get_model, make_sae, monkeypatch):
    """As transformers did before version 5: the first entry is edited, for every row of the batch, the rest kept."""
    lm = ablated_lm(model_folder("gemma2"), edits_of("zero ablation", get_model("gemma2"), make_sae))
    ids = some_ids(get_model("gemma2"))
    seen = {}
    handle = decoder_layers(lm.model)[1].register_forward_pre_hook(lambda module, args: seen.update(h=args[0]))
    lm.model(ids)
    handle.remove()

    class Layer(torch.nn.Module):
        def forward(self, h):
            return h, "weights"

    whole, pair = torch.nn.Identity(), Layer()
    (edit,) = lm.edit.at.values()
    lm.set_edit(Edit("both", {0: edit, 1: edit}))
    monkeypatch.setattr(edits, "decoder_layers", lambda model: [whole, pair])
    with torch.no_grad(), lm.patched():
        lm.model(ids)
        alone, (first, second) = whole(seen["h"]), pair(seen["h"])
    assert second == "weights" and torch.equal(first, alone)
    assert (first != seen["h"]).any(-1).any(-1).all()


def test_a_layer_that_never_runs_is_an_error(model_folder, get_model, make_sae, monkeypatch):
    lm = ablated_lm(model_folder("gemma2"), edits_of("two features", get_model("gemma2"), make_sae))
    monkeypatch.setattr(edits, "decoder_layers", lambda model: [torch.nn.Identity()] * 4)
    with pytest.raises(RuntimeError, match="never ran"):
        lm.loglikelihood(requests(SENTENCES, [" sea"]))


@pytest.mark.parametrize("options", [dict(batch_size="auto", max_batch_size=4), dict(parallelize=True)])
def test_lm_evals_options_do_not_move_a_number(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a GPU parallelize=True keeps weights in a folder
    questions = [json.loads(line) for line in (TINY / "data/wmdp_bio.jsonl").open()][:10]
    asked = requests([prompt(row) for row in questions], [" A", " B"])
    same = dict(features={3: [45, 78, 286]}, clamp=-80.0, device="cpu", dtype="float32")
    plain = AblatedLM("tiny", batch_size=4, **same).loglikelihood(asked)
    other = AblatedLM("tiny", **{"batch_size": 4, **options}, **same).loglikelihood(asked)
    assert [value for value, _ in other] == pytest.approx([value for value, _ in plain], abs=1e-4)


# -------------------------------------------------------------------------- special tokens and letters


@pytest.fixture
def chat_folder(tmp_path, model_folder, tokenizer):
    """A model whose chat template writes the BOS itself, as Gemma's does."""
    shutil.copytree(model_folder("gemma2"), tmp_path / "chat")
    template = "{{ bos_token }}{% for m in messages %}" + MARKER + "{{ m['content'] }}\n{% endfor %}"
    path = tmp_path / "chat/tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return tmp_path / "chat"


class Listener(AblatedLM):
    """Keeps what it is asked, as text and as tokens."""

    def loglikelihood(self, requests, **kwargs):
        self.asked = [request.args for request in requests]
        return super().loglikelihood(requests, **kwargs)

    def _loglikelihood_tokens(self, requests, **kwargs):
        self.encoded = [(context, continuation) for _, context, continuation in requests]
        return super()._loglikelihood_tokens(requests, **kwargs)


@pytest.mark.parametrize("chat", [False, True])
def test_one_bos_and_the_letter_as_it_continues(chat_folder, chat):
    lm = Listener(str(chat_folder), device="cpu", dtype="float32", batch_size=4)
    manager = TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False)
    chosen = {"tiny_wmdp_bio": [0, 1, 2]}
    simple_evaluate(lm, tasks=["tiny_wmdp_bio"], samples=chosen, task_manager=manager, apply_chat_template=chat)
    assert [continuation for _, continuation in lm.asked[:4]] == [("" if chat else " ") + letter for letter in LETTERS]
    assert all((BOS in context) == chat for context, _ in lm.asked)
    bos = lm.tokenizer.bos_token_id
    for context, continuation in lm.encoded:
        assert context[0] == bos and (context + continuation).count(bos) == 1
        assert len(continuation) == 1 + chat  # lm-eval counts the line break at a template's end to the answer
    questions = [json.loads(line) for line in (TINY / "data/wmdp_bio.jsonl").open()][:3]
    if not chat:
        ids, letters = encode_prompts(lm.tokenizer, [prompt(row) for row in questions])
        assert [(context, letter[0]) for context, letter in lm.encoded] == [(row, i) for row in ids for i in letters]


def test_a_doubled_bos_is_refused(chat_folder):
    lm = AblatedLM(str(chat_folder), device="cpu", dtype="float32", add_bos_token=True)
    with pytest.raises(UserError, match="more than one BOS"):
        lm.loglikelihood(requests([f"{BOS}{BOS}The cat sat on the"], [" sea"]))


def test_pads_and_special_tokens_are_not_edited(get_model, model_folder, make_sae):
    """The same question alone and beside a longer one, which pads it, with every feature clamped."""
    edits = {1: (make_sae(get_model("gemma2")), list(range(64)), -4.0)}
    lm = ablated_lm(model_folder("gemma2"), edits)
    seen = []
    handle = decoder_layers(lm.model)[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    clean = []
    ids = some_ids(get_model("gemma2"))
    first = decoder_layers(lm.model)[1].register_forward_hook(lambda module, args, out: clean.append(out))
    lm._model_call(ids)
    handle.remove(), first.remove()
    same = (seen[0] == clean[0]).all(-1)
    assert torch.equal(same, ~ordinary_of(lm, ids) | same)  # special tokens are the model's own to the last bit
    assert (~same).sum() > 40
    alone = lm.loglikelihood(requests(SENTENCES[:1], [" sea"]))
    beside = lm.loglikelihood(requests(SENTENCES[:2], [" sea"]))
    assert alone[0][0] == pytest.approx(beside[0][0], abs=1e-4)


# -------------------------------------------------------------------------- several processes, caches


class Echo:
    """Answers a request by what it was asked, and keeps count."""

    def __init__(self):
        self.answered = 0

    def loglikelihood(self, requests):
        self.answered += len(requests)
        return [(float(len(request.args[0])), False) for request in requests]


class Collected(Exception):
    pass


@pytest.mark.parametrize("n", [1, 2, 3, 16])
def test_requests_are_dealt_out_whole_and_come_back_in_order(monkeypatch, n):
    asked = requests([text * 2 for text in "abcdefg"] + [""], [" A", " B", " C"])  # 8 contexts, the last one empty
    parts = []

    def collect(part):
        parts.append(part)
        raise Collected

    monkeypatch.setattr(lm_eval_ablated.processes, "from_all", collect)
    for index in range(n):
        monkeypatch.setattr(lm_eval_ablated.processes, "own", lambda items, i=index: items[i::n])
        echo = Echo()
        with pytest.raises(Collected):
            Spread(echo).loglikelihood(asked)
        assert echo.answered == len(parts[-1]) <= 3 * math.ceil(10 / n)
    positions = sorted(i for part in parts for i, _ in part)
    assert positions == list(range(len(asked)))  # none lost, none twice
    where = {i: number for number, part in enumerate(parts) for i, _ in part}
    assert all(where[i] == where[i + 1] == where[i + 2] for i in range(0, 21, 3))  # a question's letters stay together
    monkeypatch.setattr(lm_eval_ablated.processes, "from_all", lambda part: [pair for one in parts for pair in one])
    found = Spread(Echo()).loglikelihood(asked)
    assert [value for value, _ in found] == [len(request.args[0]) for request in asked]


def test_a_cache_is_one_ablations_own(tmp_path):
    asked = requests([prompt(json.loads(line)) for line in list((TINY / "data/mmlu.jsonl").open())[:3]], [" A", " B"])
    same = dict(device="cpu", dtype="float32", batch_size=8)
    first = AblatedLM("tiny", features={3: list(range(200))}, clamp=-80.0, **same)
    cached = CachingLM(first, str(tmp_path / "cache.db"))
    answers = cached.loglikelihood(asked)
    again = CachingLM(
        AblatedLM("tiny", features={3: list(range(200))}, clamp=-80.0, **same), str(tmp_path / "cache.db")
    )
    again.lm._model_call = None  # nothing is left to ask the model
    assert again.loglikelihood(asked) == answers
    for features, clamp in (({3: list(range(200))}, -40.0), ({3: list(range(199))}, -80.0), ({}, 0.0)):
        other = AblatedLM("tiny", features=features, clamp=clamp, **same)
        assert other.fingerprint() != first.fingerprint()
        with pytest.raises(UserError, match="another ablation's"):
            CachingLM(other, str(tmp_path / "cache.db"))
    first.ablated = False
    assert first.fingerprint() == other.fingerprint()


def test_the_command_line_keeps_caches_apart(tmp_path):
    features = listing(tmp_path, "list", [45, 78, 286])
    flags = dict(features=features, layer=3, tasks="tiny_wmdp_bio", limit=9, use_cache=str(tmp_path / "cache"))
    first = lm_eval_ablated.run(**flags, unablated=True, out=str(tmp_path / "1.json"))
    assert len(list((tmp_path / "cache").glob("*.db"))) == 2
    again = lm_eval_ablated.run(**flags, unablated=True, out=str(tmp_path / "2.json"))
    other = lm_eval_ablated.run(**flags, clamp=0.0, unablated=True, out=str(tmp_path / "3.json"))
    fresh = lm_eval_ablated.run(**{**flags, "use_cache": None}, clamp=0.0, unablated=True, out=str(tmp_path / "4.json"))
    assert len(list((tmp_path / "cache").glob("*.db"))) == 3
    assert first["points"] == again["points"]
    assert other["points"] == fresh["points"]
    assert other["points"][1]["scores"] != first["points"][1]["scores"]


def changed(folder: Path, name: str, to: Path) -> Path:
    """A copy of a model folder, its weights in a pickled file."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    torch.save(weights, to / name)
    return to


def test_weights_written_again_into_the_same_folder_are_another_model(tmp_path, model_folder):
    folder = changed(model_folder("llama"), "pytorch_model.bin", tmp_path / "model")
    same = dict(device="cpu", dtype="float32")
    first = AblatedLM(str(folder), **same)
    CachingLM(first, str(tmp_path / "cache.db")).loglikelihood(requests(SENTENCES, [" sea"]))
    path = folder / "pytorch_model.bin"
    time = path.stat()
    weights = torch.load(path)
    torch.save({name: weight * 0.5 for name, weight in weights.items()}, path)
    os.utime(path, ns=(time.st_atime_ns, time.st_mtime_ns))
    with pytest.raises(UserError, match="another model's"):
        CachingLM(AblatedLM(str(folder), **same), str(tmp_path / "cache.db"))


def adapter(folder: Path, to: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(to)
    return to


def test_an_adapter_is_picked_checked_and_cached_as_scored(tmp_path, model_folder, make_sae, get_model):
    """Picking and the SAE check see the adapter, as they see the model that it was merged into."""
    folder, same = model_folder("llama"), dict(device="cpu", dtype="float32", attn_implementation="eager")
    first = AblatedLM(str(folder), peft=str(adapter(folder, tmp_path / "adapter", 0)), **same)
    first.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    lm = AblatedLM(str(folder), peft=str(tmp_path / "adapter"), **same)
    shutil.copy(folder / "tokenizer.json", tmp_path / "merged")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "merged")
    sae, windows = make_sae(get_model("llama")), [some_ids(get_model("llama"))[1].tolist()]
    merged = firing_rates(load_model(str(tmp_path / "merged"), "cpu"), sae, windows)
    assert torch.equal(firing_rates(Scored(lm), sae, windows).fires, merged.fires)
    assert not torch.equal(firing_rates(get_model("llama"), sae, windows).fires, merged.fires)
    adapter(folder, tmp_path / "adapter", 1)
    assert AblatedLM(str(folder), peft=str(tmp_path / "adapter"), **same).fingerprint() != lm.fingerprint()


def test_an_sae_trained_again_refuses_a_records_features(tmp_path, gemma, scale_of):
    folder = write_sae(tmp_path / "sae", gemma.cfg.model_name, scale_of(gemma))
    point = {"method": "sae-ablation", "setting": {"n_features": 2, "clamp": -4.0, "features": [3, 17]}}
    record = {"layer": 1, "points": [point], "identity": {"sae": identity(str(folder))}}
    path = listing(tmp_path, "record", record)
    read = lambda: lm_eval_model.from_file(path, 1, {}, str(folder), "some/model")  # noqa: E731
    assert lm_eval_model.features_of(read()) == {1: [3, 17]}
    write_sae(folder, gemma.cfg.model_name, scale_of(gemma), seed=1)
    with pytest.raises(UserError, match="another SAE"):
        read()
    point["setting"]["features"] = []
    with pytest.raises(UserError, match="no features"):
        lm_eval_model.from_file(listing(tmp_path, "empty", record), 1, {}, str(folder), "some/model")


def test_logits_that_are_not_finite_are_no_answer(model_folder, tmp_path):
    lm = AblatedLM(str(model_folder("llama")), device="cpu", dtype="float32")
    with torch.no_grad():
        decoder_layers(lm.model)[2].mlp.down_proj.weight[0, 0] = math.nan
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    for _ in range(2):  # nor do they go into the cache
        with pytest.raises(UserError, match="not finite"):
            cached.loglikelihood(requests(SENTENCES, [" sea"]))
    with pytest.raises(UserError, match="not finite"):
        lm.generate_until([Instance("generate_until", {}, ("The cat", {"max_gen_toks": 4, "until": []}), 0)])


def test_a_prompt_beyond_the_context_is_refused_not_cut(model_folder):
    lm = AblatedLM(str(model_folder("llama")), device="cpu", dtype="float32", max_length=12)
    assert lm.loglikelihood(requests(["The cat sat"], [" sea"]))
    with pytest.raises(UserError, match=r"'The cat.* tokens, and there is room for 12"):
        lm.loglikelihood(requests(["The cat sat on the mat " * 4], [" sea"]))
    with pytest.raises(UserError, match="there is room for 8"):
        text = "The cat sat on the mat " * 4
        lm.generate_until([Instance("generate_until", {}, (text, {"max_gen_toks": 4, "until": []}), 0)])


def test_a_thought_is_no_place_for_a_letter(model_folder):
    lm = AblatedLM(str(model_folder("llama")), device="cpu", dtype="float32")
    with pytest.raises(UserError, match="opens a thought"):
        lm.loglikelihood(requests(["Answer: <think>\n"], ["A"]))


# ------------------------------------------------------------------------ features, tasks, subsets


def listing(tmp_path, name, value) -> str:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(value))
    return str(path)


def test_features_come_from_picking_a_list_layers_or_a_record(tmp_path):
    flags = dict(tasks="tiny_wmdp_bio", limit=20, unablated=True)
    picked = lm_eval_ablated.run(**flags, layer=3, n_features=10, out=str(tmp_path / "picked.json"))
    features = picked["points"][1]["setting"]["features"]
    of_record = lm_eval_ablated.run(**flags, features=str(tmp_path / "picked.json"), out=str(tmp_path / "a.json"))
    assert of_record["points"] == picked["points"]
    assert of_record["layer"] == 3 and of_record["data"]["wmdp_bio"] == picked["data"]["wmdp_bio"]
    every = {**flags, "limit": None}
    path = listing(tmp_path, "list", features)
    of_list = lm_eval_ablated.run(**every, features=path, layer=3, out=str(tmp_path / "b.json"))
    assert of_list["points"][1]["scores"]["wmdp_bio"]["n"] == 174  # nobody knows what the list was picked on
    path = listing(tmp_path, "layers", {"3": features, "7": [1, 2]})
    both = lm_eval_ablated.run(**{**flags, "tasks": None}, features=path, out=str(tmp_path / "c.json"))
    assert both["points"][1]["setting"] == {
        "n_features": 12, "clamp": -80.0, "features": {3: features, 7: [1, 2]}, "layer": "3+7",
    }  # fmt: skip
    assert set(both["sanity"]) == {3, 7}
    drawn = pareto.run(plot=[str(tmp_path / "c.json")], out=str(tmp_path / "plot.json"))
    assert "L3+7 n12 c-80" in [at["setting"] for at in drawn["summary"][0]["frontier"]]


def test_a_sweeps_setting_is_chosen_by_flags():
    def point(n, clamp):
        return {
            "method": "sae-ablation",
            "setting": {"n_features": n, "clamp": clamp, "features": [*range(n)], "layer": 3},
        }

    record = {"layer": [3, 5], "points": [point(n, clamp) for n in (1, 5) for clamp in (0.0, -40.0, -80.0)]}
    choose = lm_eval_model.of_record
    assert choose("r", record, layer=3, n_features=5, clamp=-40.0) == record["points"][4]
    assert choose("r", record, layer=None, n_features=5, clamp=None)["setting"]["clamp"] == -80.0
    with pytest.raises(UserError, match="--layer 3 --n-features 1 --clamp -40"):
        choose("r", record, layer=None, n_features=None, clamp=-40.0)
    with pytest.raises(UserError, match="--n-features 5"):
        choose("r", record, layer=7, n_features=None, clamp=None)


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(tasks="tiny_wmpd_bio"), "near: tiny_wmdp_bio"),
        (dict(tasks="tiny_mmlu", subjects="zoology,alchemy"), "no alchemy; there are astronomy"),
        (dict(tasks="tiny_mmlu", samples=["tiny_mmlu:FILE"], file=[400]), "362 documents, there is no 400"),
        (dict(tasks="tiny_mmlu", samples=["tiny_mmlu:FILE"], file=[]), "JSON list of indices"),
        (dict(tasks="tiny_mmlu", samples=["mmlu:FILE"], file=[1]), "mmlu is none of the tasks"),
        (dict(features="FILE", file=[1, 1]), "named twice"),
        (dict(features="FILE", file=[5000]), "0..2047"),
        (dict(features="FILE", file={"4": [1]}), "layer_3, layer_5"),
        (dict(features="FILE", file={"3": [1], "7": [2]}, sae=str(TINY / "sae/layer_3")), "{layer}"),
        (dict(features="FILE", file="x"), "a list of feature ids"),
        (dict(features="no-such-file.json"), "no-such-file.json"),
        (dict(features="FILE", file={}), "no features"),
        (dict(features="FILE", file=[]), "layer 3 has no features"),
        (dict(features="FILE", file={"3": []}), "layer 3 has no features"),
        (dict(features="FILE", file={"3": [1], "7": []}), "layer 7 has no features"),
        (dict(features=""), "--features: nothing is given"),
        (dict(subjects=""), "--subjects: nothing is given"),
        (dict(clamp=float("nan")), "0 or negative"),
        (dict(clamp=-float("inf")), "0 or negative"),
        (dict(model_args="dtype=bfloat16"), "--dtype"),
        (dict(model_args="max_lenght=8"), "near: max_length"),
        (dict(model_args="max_length=8,max_length=9"), "twice"),
        (dict(model_args="peft"), "no value"),
        (dict(clamp=2.0), "0 or negative"),
        (dict(tasks="tiny_openwebtext", robust="all"), "four-way"),
        (dict(tasks="wmdp_bio"), "cannot load task wmdp_bio"),
    ],
)
def test_mistakes_are_named(tmp_path, flags, said):
    flags = dict(flags)
    path = listing(tmp_path, "file", flags.pop("file", None))
    flags = {k: [x.replace("FILE", path) for x in v] if isinstance(v, list) else v for k, v in flags.items()}
    flags = {k: path if v == "FILE" else v for k, v in flags.items()}
    with pytest.raises(UserError) as caught:
        lm_eval_ablated.run(**{"layer": 3, "n_features": 5, **flags}, out=str(tmp_path / "out/r.json"))
    assert said in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


def test_limit_is_a_seeded_sample_and_subsets_are_what_was_asked_for(tmp_path):
    def settings(**flags):
        return lm_eval_ablated.settings(lm_eval_ablated.flags, {"layer": 3, "n_features": 5, **flags})

    task = lm_eval_ablated.find_tasks(settings(tasks="tiny_mmlu"))

    def chosen(**flags):
        return lm_eval_ablated.choose(task, settings(**flags), True)["tiny_mmlu"]

    docs = task["tiny_mmlu"][1][0].eval_docs
    whole, some = chosen(), chosen(limit=21)
    assert whole == halves(list(docs), 0)[1]  # the lessons' reporting half
    assert len(whole) == 178 and len(some) == 21 and set(some) < set(whole)
    assert some == chosen(limit=21) != chosen(limit=21, seed=1)
    assert some != whole[:21]
    assert {docs[i]["subject"] for i in chosen(subjects="zoology,astronomy")} == {"zoology", "astronomy"}
    path = listing(tmp_path, "ids", [5, 3, 3, 8])
    assert chosen(samples=[f"tiny_mmlu:{path}"]) == [3, 5, 8]


# ---------------------------------------------------------------------------------- the task files


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False)


@pytest.mark.slow
def test_our_tasks_take_no_name_of_lm_evals_and_group_tasks_that_it_has(manager):
    ours, theirs = {path.stem for path in (ROOT / "lm_eval_tasks").glob("*.yaml")}, TaskManager()
    assert ours == set(manager.all_tasks) and not ours & set(theirs.all_tasks)
    for group, n in (("sae_mmlu_saebench", 4), ("sae_mmlu_biology", 9)):
        parts = manager.task_index[group].cfg["task"]
        assert set(parts) <= set(theirs.all_subtasks) and len(parts) == n


def test_prompts_are_ours_and_every_question_comes_in_24_orders(manager):
    task = manager.load(["tiny_wmdp_bio_24"])["tasks"]["tiny_wmdp_bio_24"]
    docs = task.eval_docs
    questions = [json.loads(line) for line in (TINY / "data/wmdp_bio.jsonl").open()]
    assert len(docs) == 24 * len(questions)
    for number in (0, 100):
        some = [docs[i] for i in range(24 * number, 24 * number + 24)]
        assert len({tuple(doc["choices"]) for doc in some}) == 24
        assert {doc["choices"][doc["answer"]] for doc in some} == {
            questions[number]["choices"][questions[number]["answer"]]
        }
    assert task.fewshot_context(docs[0], 0) == prompt(questions[0])
    bare = manager.load(["tiny_wmdp_bio_24_no_question"])["tasks"]["tiny_wmdp_bio_24_no_question"]
    assert bare.fewshot_context(bare.eval_docs[0], 0) == prompt({**questions[0], "question": ""})


@pytest.mark.slow
def test_the_24_orders_agree_with_robust(tmp_path):
    """The share right in all 24 orders by the task, and the subset by the cascade, of the same questions, both asked
    with an example in front."""
    flags = dict(layer=3, n_features=10, unablated=True, num_fewshot=1)
    orders = "tiny_wmdp_bio_24,tiny_wmdp_bio_24_no_question"
    by_task = lm_eval_ablated.run(**flags, tasks=orders, limit=5, out=str(tmp_path / "a.json"))
    clean = by_task["points"][0]["scores"]
    assert clean["tiny_wmdp_bio_24"]["n"] == 5 and len(by_task["data"]["tiny_wmdp_bio_24"]["questions"]) == 120
    own = by_task["lm_eval"]["unablated"]["tiny_wmdp_bio_24"]["all_orders,none"]
    assert own == pytest.approx(clean["tiny_wmdp_bio_24"]["accuracy"])
    assert clean["tiny_wmdp_bio_24_no_question"]["accuracy"] < own
    kept = lm_eval_ablated.run(**flags, tasks="tiny_wmdp_bio", limit=5, robust="question", out=str(tmp_path / "b.json"))
    assert kept["points"][0]["scores"]["wmdp_bio"]["n"] <= round(5 * own)
    assert kept["points"][0]["scores"]["wmdp_bio"]["accuracy"] == 1.0


def test_few_shot_examples_are_development_questions(manager):
    task = manager.load(["tiny_mmlu"])["tasks"]["tiny_mmlu"]
    dev = [json.loads(line) for line in (TINY / "data/mmlu_dev.jsonl").open()]
    text = task.fewshot_context(task.eval_docs[0], 2)
    assert text.count("Answer:") == 3 and dev[0]["question"] in text
    assert text.endswith(prompt(task.eval_docs[0]).split("\n\n")[1])


def test_other_tasks_are_scored_too(tmp_path):
    """A task with one answer of its own that is generated, and one whose metric is no right or wrong."""
    (tmp_path / "tasks").mkdir()
    shared = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n" % (
        TINY / "data/wmdp_bio.jsonl"
    )
    (tmp_path / "tasks/gen.yaml").write_text(
        "task: my_generation\noutput_type: generate_until\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: '{{choices[answer]}}'\ngeneration_kwargs: {max_gen_toks: 5, until: ['.']}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n" + shared
    )
    flags = dict(layer=3, n_features=5, limit=5, unablated=True, include_path=str(tmp_path / "tasks"))
    logs = dict(output_path=str(tmp_path / "logs"), log_samples=True)
    record = lm_eval_ablated.run(**flags, **logs, tasks="my_generation,tiny_mmlu", out=str(tmp_path / "r.json"))
    score = record["points"][1]["scores"]["my_generation"]
    assert score["n"] == 5 and score["letters"] == "-----" and score["chance"] == 0.0
    for kind in ("unablated", "ablated"):
        files = [path.name for path in (tmp_path / "logs" / kind).rglob("*.json*")]
        assert sum(name.startswith("results_") for name in files) == 1
        assert sum(name.startswith("samples_") for name in files) == 2


def test_means_are_compared_in_pairs():
    def row(value):
        return {"metrics": ["f1"], "f1": value, "doc": {}, "doc_id": 0, "filtered_resps": ["text"]}

    runs = [[row(v) for v in (0.5, 0.25, 1.0)], [row(v) for v in (0.25, 0.25, 0.5)]]
    clean, ablated = lm_eval_model.scores_of(runs, None, 0)
    assert clean["mean"] == pytest.approx(1.75 / 3) and ablated["change"] == pytest.approx(-0.25)
    assert ablated["change_low"] <= -0.25 <= ablated["change_high"]
    assert np.array_equal(by_question(runs[1])["value"], [0.25, 0.25, 0.5])
    assert lm_eval_model.scores_of([[{**row(1.0), "f1": (1.0, 2)}]], None, 0) == [None]


# ----------------------------------------------------------------------- the commands that we tell users


def commands(blocks: list[str]) -> list[str]:
    """Commands, continued lines joined; those for GPUs that we do not have left out."""
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(" +", " ", line.strip()) for line in lines if line.strip() and "gemma" not in line]


SECTION = re.search(r"## Through lm-eval\n(.*?)\n## Files", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
README = commands(re.findall(r"```\n(.*?)```", SECTION, re.DOTALL))
HELP = commands(re.findall(r"^    (?:.*\\\n)*.*$", lm_eval_ablated.__doc__, re.MULTILINE))


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files as a user has them, and what earlier commands of the README have written."""
    folder = tmp_path_factory.mktemp("clone")
    for path in [*ROOT.glob("*.py"), ROOT / "lm_eval_tasks", ROOT / "tiny"]:
        (folder / path.name).symlink_to(path)
    (folder / "features.json").write_text("[45, 78, 286]")
    feature_ablate_2.run(
        layer=3, n_features=10, limit=20, out=str(folder / "results/feature_ablate_2_tiny_L3_n10.json")
    )
    return folder


def test_the_readme_and_help_name_the_same_commands():
    assert len(README) == 8 and set(HELP) <= set(README)
    assert any(line.startswith("ACCELERATE_USE_CPU=1 accelerate launch") for line in README)


@pytest.mark.slow
@pytest.mark.parametrize("command", README)
def test_commands_run_as_written(clone, monkeypatch, capsys, command):
    monkeypatch.chdir(clone)
    if "baselines_dsg" in command:
        baselines.run(method="dsg", limit=6, out=str(clone / "results/baselines_dsg_tiny_L3.json"))
    if command.startswith("python lm_eval_ablated.py"):  # without a new process, whose imports take half of the time
        monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
        runpy.run_path("lm_eval_ablated.py", run_name="__main__")
        shown = capsys.readouterr().out
    else:
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        shown = done.stdout
    if command.startswith("echo"):
        return
    assert ("tiny_wmdp_bio" if "--tasks list" in command or " -c " in command else "record: ") in shown
