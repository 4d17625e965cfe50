"""lm-eval's model with an edit: a plain reference's numbers, nothing where nothing is edited, requests and caches."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BOS, EOS, FAMILIES, MARKER, ROOT, TINY, listing, some_ids, write_sae
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_common import NOT_ITS_FILES, rewritten, spoiled
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM

import data
import edits
import lm_eval_ablated
from common import firing_rates, load_model, load_sae
from data import LETTERS, Dataset, UserError, encode_prompts, prompt, special_ids
from edits import NONE, Edit, ablation, applied, decoder_layers, make, together
from hub import identity
from lm_eval_ablated import AblatedLM, BridgeView, CommandLineLM, chosen_row, edit_of_row, measures_of, shared


def ablated(folder, edit: Edit, saes=(), **options) -> AblatedLM:
    lm = AblatedLM(str(folder), **{"device": "cpu", "dtype": "float32", **options})
    lm.set_edit(edit, saes)
    return lm


def test_a_gate_is_no_way_to_write_an_answer(model_folder, get_model, make_sae):
    sae = make_sae(get_model("llama"))
    lm = ablated(model_folder("llama"), make("dsg", sae, features=[3, 17], gate=0.1, clamp=-4.0), [sae])
    assert lm.edit.needs_whole_prompt and lm.loglikelihood(requests(SENTENCES, [" sea"]))
    with pytest.raises(UserError, match="leave out tasks that generate"):
        lm.generate_until([Instance("generate_until", {}, ("The cat", {"max_gen_toks": 4, "until": []}), 0)])


@pytest.mark.parametrize("pad", [0, 1])
def test_a_gates_share_of_tokens_leaves_lm_evals_padding_out(model_folder, get_model, make_sae, monkeypatch, pad):
    """lm-eval pads with token 0, which some tokenizers have as a word."""
    monkeypatch.setattr(data, "pad_id", lambda tokenizer: pad)
    monkeypatch.setattr(edits, "special_ids", lambda tokenizer: [2] if pad else [0, 2])
    asked = requests([*SENTENCES, "Blood carries oxygen from the lungs to the heart"], [" sea"])
    sae, found = make_sae(get_model("llama")), {}
    for size in (1, 4):
        values = []
        for gate in (0.1, 0.2, 0.3, 0.4, 0.5):
            edit = make("dsg", sae, features=[3, 17], gate=gate, clamp=-9.0)
            lm = ablated(model_folder("llama"), edit, [sae], batch_size=size)
            values.append([value for value, _ in lm.loglikelihood(asked)])
        found[size] = np.array(values)
    assert np.abs(found[1] - found[1][0]).max() > 0.1  # the gates part them
    assert np.allclose(found[4], found[1], atol=1e-4)


def test_an_answer_under_other_special_tokens_is_another(model_folder, get_model, make_sae):
    sae = make_sae(get_model("llama"))
    lm = ablated(model_folder("llama"), ablation(sae, [3]), [sae])
    known = [lm.fingerprint()]
    lm.tokenizer.edit_special = "all-but-bos"
    known.append(lm.fingerprint())
    lm.set_edit(NONE)
    known.append(lm.fingerprint())
    lm.tokenizer.edit_special = "never"
    assert len(set(known)) == 3 and lm.fingerprint() == known[2]  # with nothing edited it does not matter


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
    sae = load_sae(None, 7, load_model("tiny", "cpu"))
    ours = ablated(TINY / "model", ablation(sae, []), [sae], **same)
    assert list(ours.edit.at) == [7]
    assert ours.loglikelihood(asked) == theirs
    ours.set_edit(ablation(sae, range(300), -80.0))
    assert ours.loglikelihood(asked) != theirs
    ours.set_edit(NONE)
    assert ours.loglikelihood(asked) == theirs


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
    parts = [ablation(sae, ids, clamp) for sae, ids, clamp in edits.values()]
    same = dict(batch_size=2, attn_implementation="eager")
    return ablated(folder, together(*parts), [sae for sae, _, _ in edits.values()], **same, **options)


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
    lm.set_edit(Edit("both", at={0: edit, 1: edit}))
    monkeypatch.setattr(edits, "decoder_layers", lambda model: [whole, pair])
    with torch.no_grad(), applied(lm.model, lm.tokenizer, lm.edit):
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
    sae = load_sae(None, 3, load_model("tiny", "cpu"))
    edit = ablation(sae, [45, 78, 286], -80.0)
    plain = ablated("tiny", edit, batch_size=4).loglikelihood(asked)
    other = ablated("tiny", edit, **{"batch_size": 4, **options}).loglikelihood(asked)
    assert [value for value, _ in other] == pytest.approx([value for value, _ in plain], abs=1e-4)


@pytest.fixture
def chat_folder(tmp_path, model_folder, tokenizer):
    """A model whose chat template writes the BOS itself, as Gemma's does."""
    shutil.copytree(model_folder("gemma2"), tmp_path / "chat")
    template = "{{ bos_token }}{% for m in messages %}" + MARKER + "{{ m['content'] }}{{ '\n' }}{% endfor %}"
    return with_template(tmp_path / "chat", template + opening(MARKER + "\n"))


def with_template(folder: Path, template) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


def opening(text: str) -> str:
    return "{% if add_generation_prompt %}" + text + "{% endif %}"


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


TURNS = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '\n' }}{% endfor %}"
PARTS = TURNS.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TURNS
DATED = "{{ strftime_now('%Y') }} "


def asked_in_chat(folder, template, name=True) -> str:
    lm = Listener(str(with_template(folder, template)), device="cpu", dtype="float32")
    manager = TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False)
    simple_evaluate(lm, tasks=["tiny_wmdp_bio"], samples={"tiny_wmdp_bio": [0]}, task_manager=manager,
                    apply_chat_template=name, evaluation_tracker=EvaluationTracker())  # fmt: skip
    return lm.asked[0][0]


def test_what_lm_eval_asks_in_chat_is_what_was_meant(chat_folder, capsys):
    """Content in parts where the template wants these, on the same day every day; what lm-eval leaves out is said."""
    header, question = asked_in_chat(chat_folder, TURNS + opening("model:")).split("\nuser: ")
    assert header.startswith("system: The following are multiple choice") and question.count("\n") == 6
    assert asked_in_chat(chat_folder, PARTS + opening("model:")) == f"{header}\nuser: {question}"
    assert asked_in_chat(chat_folder, DATED + TURNS + opening("model:")) == f"2024 {header}\nuser: {question}"
    assert "left out" not in capsys.readouterr().err
    assert asked_in_chat(chat_folder, NO_SYSTEM + opening("model:")) == f"user: {question}"
    assert "no system turn: 'The following are multiple" in capsys.readouterr().err
    several = {"default": TURNS + opening("model:"), "rag": TURNS + opening("robot:")}
    assert asked_in_chat(chat_folder, several).endswith("model:")
    assert asked_in_chat(chat_folder, several, "rag").endswith("robot:")


@pytest.mark.parametrize("template, told", [
    (TURNS, "ignores add_generation_prompt"),
    (TURNS.replace("m['content']", "m['content'][:9]") + opening("model:"), "leaves out 'A patient"),
    ("{{ raise_exception('not today') }}", "not today"),
    (TURNS + "{% if", "cannot be used"),
    ({"rag": TURNS, "tool_use": TURNS}, "no default"),
    (TURNS + opening("model:") + "{{ eos_token }}", f"ends with '{EOS}'"),
])  # fmt: skip
def test_a_chat_template_that_lm_eval_cannot_ask_by_is_refused(chat_folder, template, told):
    with pytest.raises(UserError, match=told) as caught:
        asked_in_chat(chat_folder, template)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_ends_every_prompt_is_refused(chat_folder, tokenizer):
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(f"{BOS} $A {EOS}", special_tokens=[(BOS, 2), (EOS, 1)])
    core.save(str(chat_folder / "tokenizer.json"))
    with pytest.raises(UserError, match=f"ends with '{EOS}', after which no answer comes"):
        AblatedLM(str(chat_folder), device="cpu", dtype="float32")


@pytest.mark.parametrize("config", [{"repetition_penalty": 5.0}, {"num_beams": 3}, {"no_repeat_ngram_size": 1},
                                    {"forced_eos_token_id": 1}, {"sequence_bias": [[[50], 90.0]]}])  # fmt: skip
def test_a_generation_config_does_not_act_on_what_lm_eval_has_written(chat_folder, config):
    asked = [Instance("generate_until", {}, (text, {"max_gen_toks": 9, "until": []}), 0) for text in SENTENCES]
    same = dict(device="cpu", dtype="float32", batch_size=2)
    (chat_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    expected = AblatedLM(str(chat_folder), **same).generate_until(asked)
    assert expected == HFLM(str(chat_folder), **same).generate_until(asked)
    (chat_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **config}))
    assert AblatedLM(str(chat_folder), **same).generate_until(asked) == expected
    assert HFLM(str(chat_folder), **same).generate_until(asked) != expected


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


class Echo(AblatedLM):
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

    monkeypatch.setattr(lm_eval_ablated, "gather_object", collect)
    for index in range(n):
        monkeypatch.setattr(lm_eval_ablated.data, "own_share", lambda items, i=index: items[i::n])
        echo = Echo()
        with pytest.raises(Collected):
            shared(echo, echo).loglikelihood(asked)
        assert echo.answered == len(parts[-1]) <= 3 * math.ceil(10 / n)
    positions = sorted(i for part in parts for i, _ in part)
    assert positions == list(range(len(asked)))  # none lost, none twice
    where = {i: number for number, part in enumerate(parts) for i, _ in part}
    assert all(where[i] == where[i + 1] == where[i + 2] for i in range(0, 21, 3))  # a question's letters stay together
    monkeypatch.setattr(lm_eval_ablated, "gather_object", lambda part: [pair for one in parts for pair in one])
    echo = Echo()
    found = shared(echo, echo).loglikelihood(asked)
    assert [value for value, _ in found] == [len(request.args[0]) for request in asked]


def test_a_cache_is_one_ablations_own(tmp_path):
    asked = requests([prompt(json.loads(line)) for line in list((TINY / "data/mmlu.jsonl").open())[:3]], [" A", " B"])
    sae, same = load_sae(None, 3, load_model("tiny", "cpu")), dict(batch_size=8)
    first = ablated("tiny", ablation(sae, range(200), -80.0), [sae], **same)
    cached = CachingLM(first, str(tmp_path / "cache.db"))
    answers = cached.loglikelihood(asked)
    again = CachingLM(ablated("tiny", first.edit, [sae], **same), str(tmp_path / "cache.db"))
    again.lm._model_call = None  # nothing is left to ask the model
    assert again.loglikelihood(asked) == answers
    for edit in (ablation(sae, range(200), -40.0), ablation(sae, range(199), -80.0), NONE):
        other = ablated("tiny", edit, [sae], **same)
        assert other.fingerprint() != first.fingerprint()
        with pytest.raises(UserError, match="another edit's"):
            CachingLM(other, str(tmp_path / "cache.db"))
    first.set_edit(NONE)
    assert first.fingerprint() == other.fingerprint()


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


def test_a_model_of_lm_evals_command_line_takes_no_other_jobs_ranks(model_folder, monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    ablated(model_folder("llama"), NONE)
    assert not {"WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"} & set(os.environ)


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
    assert torch.equal(firing_rates(BridgeView(lm), sae, windows).fires, merged.fires)
    assert not torch.equal(firing_rates(get_model("llama"), sae, windows).fires, merged.fires)
    adapter(folder, tmp_path / "adapter", 1)
    assert AblatedLM(str(folder), peft=str(tmp_path / "adapter"), **same).fingerprint() != lm.fingerprint()


@pytest.mark.parametrize("case", NOT_ITS_FILES)
def test_a_model_that_is_not_what_its_files_say_is_refused(model_folder, tmp_path, case):
    change, told = NOT_ITS_FILES[case]
    with pytest.raises(UserError, match=told):
        AblatedLM(spoiled(model_folder, tmp_path, change), device="cpu", dtype="float32")


@pytest.mark.parametrize("change, told", [
    (lambda name: name.replace("q_proj", "o_proj"), r"lack .*q_proj\.lora_A.*beyond the model's .*o_proj\.lora_A"),
    (lambda name: name.replace("layers.3", "layers.4"), r"lack .*layers\.3\..*beyond the model's .*layers\.4\."),
])  # fmt: skip
def test_an_adapter_of_another_model_is_refused(model_folder, tmp_path, change, told):
    folder = adapter(model_folder("llama"), tmp_path / "adapter", 0)
    file = folder / "adapter_model.safetensors"
    save_file({change(name): value for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match=told):
        AblatedLM(str(model_folder("llama")), peft=str(folder), device="cpu", dtype="float32")


def test_a_model_in_a_subfolder_is_known_by_what_is_there(model_folder, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(model_folder("llama"), tmp_path / name)
    spoil = rewritten(lambda weights: {**weights, "lm_head.weight": weights["lm_head.weight"].neg()})
    spoil(tmp_path / "second")
    of = [AblatedLM(str(tmp_path), subfolder=name, device="cpu", dtype="float32") for name in ("first", "second")]
    assert [lm.identity["model"] for lm in of] == [identity(str(tmp_path / name)) for name in ("first", "second")]
    assert of[0].identity != of[1].identity


def test_an_adapter_of_another_rank_is_refused(model_folder, tmp_path):
    folder = adapter(model_folder("llama"), tmp_path / "adapter", 0)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    with pytest.raises(UserError, match=r"adapter: .* size mismatch for .*lora_A.*\[4, 32\].*\[8, 32\]") as caught:
        AblatedLM(str(model_folder("llama")), peft=str(folder), device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_embedding_and_a_tokenizer_that_is_not_its_file(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "llama")
    lm = ablated(folder, NONE)
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    told = r"'<\|turn\|>' as token 404, the model's embedding only 404 rows"
    with pytest.raises(UserError, match=told):
        lm.loglikelihood(requests(["<|turn|>user The cat"], [" sea"]))
    with pytest.raises(UserError, match=told):
        lm.generate_until([Instance("generate_until", {}, ("<|turn|>", {"max_gen_toks": 4, "until": []}), 0)])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("backend", None)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GemmaTokenizerFast"}))
    assert ablated(folder, NONE).tok_encode(SENTENCES[0]) == lm.tok_encode(SENTENCES[0])


def test_lm_eval_takes_no_device_that_is_not_there(model_folder):
    with pytest.raises(UserError, match="there is no device 'gpu' here"):
        AblatedLM(str(model_folder("llama")), device="gpu")


def test_a_record_is_of_one_sae_and_one_model(tmp_path, gemma, scale_of, model_folder):
    model, folder = str(model_folder("gemma2")), write_sae(tmp_path / "sae", gemma.cfg.model_name, scale_of(gemma))
    sae = {
        "layer": 1,
        "source": str(folder),
        "identity": identity(str(folder)),
        "hook_point": "blocks.1.hook_resid_post",
    }
    settings = {"features": [3, 17], "clamp": -4.0, "layers": [1]}
    record = {"form": 3, "script": "some.py", "model": model, "identity": {"model": identity(model)}, "saes": [sae],
              "settings": {"edit_special": "all-but-bos"},
              "rows": {"clamp": {"method": "clamp", "settings": settings}}}  # fmt: skip
    path = listing(tmp_path, "record", record)
    lm = CommandLineLM(model, record=path, device="cpu", dtype="float32")
    assert (lm.edit.method, lm.edit.settings, lm.tokenizer.edit_special) == ("clamp", settings, "all-but-bos")
    with pytest.raises(UserError, match=r"not of what .* holds now"):
        edit_of_row(lm, {**record, "identity": {"model": "sha256:1"}}, "clamp", None, model)
    write_sae(folder, gemma.cfg.model_name, scale_of(gemma), seed=1)
    with pytest.raises(UserError, match="another SAE"):
        edit_of_row(lm, record, "clamp", None, model)


def test_lm_evals_command_line_makes_an_edit_of_a_list(tmp_path):
    path, same = listing(tmp_path, "list", [45, 78]), dict(layer=3, device="cpu", dtype="float32")
    lm = CommandLineLM("tiny", features=path, clamp=-80, **same)
    assert (lm.edit.method, lm.edit.settings) == ("clamp", {"features": [45, 78], "clamp": -80, "layers": [3]})
    assert CommandLineLM("tiny", features=path, **same).edit.method == "zero-ablation"
    lm = CommandLineLM("tiny", features=path, method="dsg", gate=0.1, clamp=-9, **same)
    assert lm.edit.settings == {"features": [45, 78], "clamp": -9, "gate": 0.1, "layers": [3]}
    with pytest.raises(UserError, match=r"missing .* .gate."):
        CommandLineLM("tiny", features=path, method="dsg", clamp=-9, **same)


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


def test_which_row_of_a_record_is_meant():
    def record(chosen=None, **methods):
        rows = {name: {"method": method, "settings": {}} for name, method in methods.items()}
        return {"script": "some.py", "rows": rows} | ({"chosen": chosen} if chosen else {})

    row = chosen_row
    lesson = record(unablated="none", zero="zero-ablation", clamp="clamp", control="random-features", twin="retrained")
    assert row(lesson) == "clamp" and row(lesson, "control") == "control"
    assert row(lesson, method="zero-ablation") == "zero"
    swept = record(first="clamp", second="clamp", third="dsg", chosen="second")
    assert row(swept) == row(swept, method="clamp") == "second" and row(swept, method="dsg") == "third"
    assert row(record(unablated="none", both="together")) == "both"
    with pytest.raises(UserError, match="has 2 such edits; name one with --row: first; second; third"):
        row(record(first="clamp", second="clamp", third="dsg"))
    for asked in (dict(row="unablated"), dict(row="twin"), dict(method="dsg")):
        with pytest.raises(UserError, match="no such edits"):
            row(lesson, **asked)
    with pytest.raises(UserError, match="scored with --model"):
        row(record(unablated="none", trained="npo", chosen="trained"))


def test_how_sure_of_its_letter_a_model_is():
    def row(probabilities, target):
        said = {"arguments": [("question", f" {x}") for x in "ABCD"], "target": target, "doc": {}, "choices": [*"ABCD"]}
        chosen = [(math.log(p), False) for p in probabilities]
        return {**said, "metrics": ["acc"], "acc": float(np.argmax(probabilities) == 1), "filtered_resps": chosen}

    logs = {"unablated": [row((0.1, 0.7, 0.1, 0.1), 1), row((0.1, 0.5, 0.1, 0.1), "B")],
            "clamp": [row((0.1, 0.1, 0.1, 0.1), "1")] * 2}  # fmt: skip
    asked = Dataset("some_task", [])
    right, mass, sure = measures_of(asked, logs)
    assert right.name == "some_task/letters" and right.answers == ("BB", "AA") and right.chance == 0.25
    assert mass["unablated"].mean == pytest.approx(0.9) and mass["clamp"].change == pytest.approx(-0.5)
    assert sure["unablated"].mean == pytest.approx(0.6)
    for rows in logs.values():
        for one in rows:
            one["arguments"] = [("question", " the sea")] * 4
    assert [measure.name for measure in measures_of(asked, logs)] == ["some_task/acc"]


def test_means_are_compared_in_pairs():
    def row(value):
        return {"metrics": ["f1"], "f1": value, "doc": {}, "doc_id": 0, "filtered_resps": ["text"]}

    asked = Dataset("some_task", [])
    logs = {"unablated": [row(v) for v in (0.5, 0.25, 1.0)], "clamp": [row(v) for v in (0.25, 0.25, 0.5)]}
    (measure,) = measures_of(asked, logs)
    score = measure["clamp"]
    assert measure["unablated"].mean == pytest.approx(1.75 / 3) and score.change == pytest.approx(-0.25)
    assert score.change_low <= -0.25 <= score.change_high
    assert np.array_equal(measure.values[1], [0.25, 0.25, 0.5])
    assert measures_of(asked, {"clamp": [{**row(1.0), "f1": (1.0, 2)}]}) == []
