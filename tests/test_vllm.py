"""vllm_edit.py: without vLLM the worker's part on a model of its form; where vLLM is installed the engine itself."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import D_MODEL, KINDS, NORMS, ROOT, TINY, write_sae
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import common
import edits
import lm_eval_ablated
import vllm_edit
from data import UserError
from edits import NONE, ablation, make, together

needs = pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed here")
FEATURES = [3, 40, 7, 21]
# vLLM for CPUs: one process a core, and no 4 GB of cache; its engine in this process, but for several
ENV = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}


# ---------------------------------------------------------------------------------------- without vLLM
class Layer(torch.nn.Module):
    """A decoder layer of vLLM's: takes the residual stream in two parts, returns it in two."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Linear(D_MODEL, D_MODEL)

    def forward(self, positions, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        return torch.tanh(self.mlp(residual)), residual


class Flat(torch.nn.Module):
    """A model of vLLM's form: a flat batch of tokens, no more than one behind the other."""

    def __init__(self, layer=Layer):
        super().__init__()
        self.embed, self.layers = torch.nn.Embedding(64, D_MODEL), torch.nn.ModuleList(layer() for _ in range(3))

    def forward(self, input_ids, positions):
        hidden, residual = self.embed(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return hidden + residual


class Worker(vllm_edit.EditExtension):
    def __init__(self, model, eager=True, caching=False, n=3):
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(enforce_eager=eager, hf_text_config=SimpleNamespace(num_hidden_layers=n)),
            cache_config=SimpleNamespace(enable_prefix_caching=caching), speculative_config=None)  # fmt: skip


@pytest.fixture
def flat():
    torch.manual_seed(0)
    return Flat().requires_grad_(False)


IDS = torch.tensor([1, 9, 33, 5, 2, 1, 17, 8, 60, 0])  # two prompts, one behind the other; 0 to 2 are special
POSITIONS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
TOKENIZER = SimpleNamespace(all_special_ids=[0, 1, 2], added_tokens_decoder={}, edit_special="never")


def installed(worker, edit, saes, folder, tokenizer=TOKENIZER):
    return worker.install_edit(vllm_edit.write(edit, saes, tokenizer, folder))


def by_hand(flat, edit, mask):
    """What the model gives if each edited layer's whole stream goes through the edit, all tokens as one sequence."""
    h = flat.embed(IDS)
    for at, layer in enumerate(flat.layers):
        h = h + torch.tanh(layer.mlp(h))
        h = edit.at[at](h[None], mask[None])[0] if at in edit.at else h
    return h


def saes_of(tmp_path, *layers, **options):
    view = SimpleNamespace(cfg=SimpleNamespace(n_layers=3, d_model=D_MODEL, model_name="flat", device="cpu"),
                           hook_dict={f"blocks.{at}.hook_resid_post": None for at in range(3)},
                           blocks=[torch.nn.Linear(1, 1) for _ in range(3)])  # fmt: skip
    folders = [write_sae(tmp_path / f"sae{at}", "flat", seed=at, hook_name=f"blocks.{at}.hook_resid_post", **options)
               for at in layers]  # fmt: skip
    return [common.load_sae(str(folder), at, view) for at, folder in zip(layers, folders)]


def edits_of(one, two) -> dict:
    """Every kind of edit that is made token by token."""
    return {
        "zero": ablation(one, FEATURES), "clamp": ablation(one, FEATURES, -3.0),
        "steered": ablation(one, FEATURES, 3.0),
        "mean": make("mean-ablation", one, features=FEATURES, means=[0.1, 0.2, 0.3, 0.4]),
        "conditional": make("conditional-clamp", one, features=FEATURES, clamp=-3.0, threshold=0.3),
        "refusal": make("refusal-clamp", one, features=FEATURES, threshold=0.05, refusal=11, refusal_value=5.0),
        "reconstruction": edits.reconstruction(one), "patched": edits.patched(one, FEATURES),
        "difference": make("diff-in-means", None, layers=[one.layer, two.layer], direction=[1.0] * one.cfg.d_in),
        "two layers": together(ablation(one, FEATURES, -3.0), ablation(two, [5, 2], -2.0))}  # fmt: skip


@pytest.mark.parametrize("special", ["never", "all-but-bos"])
def test_the_workers_edit_is_that_of_edits(flat, tmp_path, special):
    one, two = saes_of(tmp_path, 0, 2)
    mask = POSITIONS > 0 if special == "all-but-bos" else (POSITIONS > 0) & (IDS > 2)
    tokenizer = SimpleNamespace(**{**vars(TOKENIZER), "edit_special": special})
    worker, plain = Worker(flat), flat(IDS, POSITIONS)
    for number, (name, edit) in enumerate(edits_of(one, two).items()):
        folder = tmp_path / str(number)
        assert installed(worker, edit, [one, two], folder, tokenizer) == sorted(edit.at), name
        found = flat(input_ids=IDS, positions=POSITIONS)
        torch.testing.assert_close(found, by_hand(flat, edit, mask), rtol=1e-5, atol=1e-5)
        assert name in ("patched",) or (found - plain).abs().max() > 1e-3, name
        counts = worker.edit_counts()
        assert counts["tokens"] == len(IDS) and counts["finite"] and set(counts["edited"]) == set(edit.at)
        assert all(0 < n <= mask.sum() for n in counts["edited"].values()) or name in ("patched",), (name, counts)
    text = vllm_edit.write(edit, [one, two], tokenizer, tmp_path / "idle", idle=True)
    assert worker.install_edit(text) == sorted(edit.at) and torch.equal(flat(input_ids=IDS, positions=POSITIONS), plain)
    assert installed(worker, NONE, [], tmp_path) == [] and torch.equal(flat(input_ids=IDS, positions=POSITIONS), plain)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_saes_rows_alone_encode_as_the_whole_sae(flat, tmp_path, kind, norm):
    (sae,) = saes_of(tmp_path, 1, kind=kind, norm=norm, b_dec=True)
    edit, h = ablation(sae, FEATURES, -3.0), torch.randn(12, D_MODEL, generator=torch.Generator().manual_seed(3))
    small, settings = vllm_edit.only_rows(sae, {"features": FEATURES, "clamp": -3.0})
    assert small.cfg.d_sae == (sae.cfg.d_sae if "topk" in kind and kind != "batchtopk" else len(FEATURES))
    found, mask = edits.clamp(small, **settings)(h[None], torch.ones(1, 12) > 0), torch.ones(1, 12) > 0
    wanted = edit.at[1](h[None], mask)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert (wanted - h).abs().max() > 0.1


def test_positions_of_three_rows_and_prompts_without_ids(flat, tmp_path):
    """M-RoPE's positions have three rows; models with vision are given embeddings, the worker has their ids."""
    (sae,) = saes_of(tmp_path, 1)
    worker, edit = Worker(flat), ablation(sae, FEATURES, -3.0)
    installed(worker, edit, [sae], tmp_path / "edit")
    wanted = flat(input_ids=IDS, positions=POSITIONS)
    assert torch.equal(flat(input_ids=IDS, positions=POSITIONS.expand(3, -1)), wanted)
    flat.forward = lambda input_ids, positions: Flat.forward(flat, IDS, positions)
    worker.model_runner.input_ids = SimpleNamespace(gpu=torch.cat([IDS, IDS]))
    assert torch.equal(flat(input_ids=None, positions=POSITIONS), wanted)


class Whole(Layer):
    def forward(self, positions, hidden, residual):
        return sum(super().forward(positions, hidden, residual))


def test_what_cannot_be_edited_is_refused_by_name(flat, tmp_path):
    (sae,) = saes_of(tmp_path, 1)
    edit = ablation(sae, FEATURES, -3.0)
    text = vllm_edit.write(edit, [sae], TOKENIZER, tmp_path / "edit")
    for worker, said in (
        (Worker(flat, eager=False), "compiled graph"), (Worker(flat, caching=True), "cached prefixes"),
        (Worker(flat, n=5), r"which modules of vLLM's Flat are its 5 layers"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            worker.install_edit(text)
    beyond = json.loads(text)
    beyond["edits"][0]["layer"] = 7
    with pytest.raises(UserError, match="layer 7: vLLM's Flat has layers 0 to 2"):
        Worker(flat).install_edit(json.dumps(beyond))
    other = Flat(Whole)
    worker = Worker(other)
    worker.install_edit(text)
    other.layers[1](POSITIONS, other.embed(IDS), None)  # tried, and told when asked for
    with pytest.raises(UserError, match=r"vLLM's Whole does not return \(hidden, residual\)"):
        vllm_edit.check_counts([worker.edit_counts()], edit)
    with pytest.raises(UserError, match=r"does not return \(hidden, residual\)"):  # from then on it ends vLLM
        other.layers[1](POSITIONS, other.embed(IDS), None)
    gate = make("dsg", sae, features=FEATURES, clamp=-3.0, gate=0.1)
    with pytest.raises(UserError, match="dsg looks at a whole prompt"):
        vllm_edit.write(gate, [sae], TOKENIZER, tmp_path / "dsg")


def test_a_rank_of_a_pipeline_edits_its_own_layers(flat, tmp_path):
    one, two = saes_of(tmp_path, 0, 2)
    edit = together(ablation(one, FEATURES, -3.0), ablation(two, FEATURES, -3.0))
    flat.layers[2] = torch.nn.Identity()  # vLLM's stand-in for a layer of another rank
    assert installed(Worker(flat), edit, [one, two], tmp_path / "edit") == [0]
    vllm_edit.check_installed([[0], [2]], edit)
    with pytest.raises(UserError, match=r"layers \[2\]: no process"):
        vllm_edit.check_installed([[0], [0]], edit)


READ = {"tokens": 9, "finite": True, "wrong": None}


def test_an_edit_that_was_passed_by_is_an_error(flat, tmp_path):
    one, two = saes_of(tmp_path, 0, 2)
    edit = together(ablation(one, FEATURES, -3.0), ablation(two, FEATURES, -3.0))
    ranks = [{**READ, "edited": {0: 4}}, {**READ, "edited": {2: 0}}]
    some = {"read": 9, "changed at layer 0": 4, "changed at layer 2": 0}
    assert vllm_edit.check_counts(ranks, edit) == some
    assert vllm_edit.check_counts([{**READ, "tokens": 0, "edited": {}}], edit) == {"read": 0}  # all from a cache
    with pytest.raises(UserError, match=r"without calling layers \[0\]"):
        vllm_edit.check_counts(ranks[1:], edit, none_will_do=True)
    none = [{**READ, "edited": {0: 0, 2: 0}}]
    assert vllm_edit.check_counts(none, edit, none_will_do=True) == some | {"changed at layer 0": 0}
    with pytest.raises(UserError, match="together changed none of the 9 tokens"):
        vllm_edit.check_counts(none, edit)
    vllm_edit.check_counts([{**READ, "edited": {0: 0}}], edits.patched(one, FEATURES))


def outputs_of(prompts, log_probs):
    """As vLLM gives them."""
    rows = [[{i: SimpleNamespace(logprob=v)} for i, v in zip(ids[1:], row)]
            for ids, row in zip(prompts, log_probs.split([len(ids) - 1 for ids in prompts]))]  # fmt: skip
    return [SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=[None, *row]) for ids, row in zip(prompts, rows)]


def test_layers_whose_two_parts_are_something_else_are_refused(flat, tmp_path):
    """Cohere's, StableLM's and EXAONE 4's in vLLM return the whole stream, and beside it what it was before."""
    (sae,) = saes_of(tmp_path, 1)
    edit, prompts = ablation(sae, FEATURES, -3.0), [[2, 9, 33, 5], [2, 17, 8]]
    first, counts = torch.arange(-5.0, 0.0), {**READ, "edited": {1: 4}}

    def results(idle, last):
        parts = zip(([[]], [[1]], [[1]]), (first, idle, last), ({**READ, "edited": {}}, counts, counts))
        return [(installed, outputs_of(prompts, found), [seen]) for installed, found, seen in parts]

    said = vllm_edit.judged(results(first + 5e-4, first - 1), edit, {}, True)
    assert said == ["clamp (n_features 4, clamp -3), tokens tried: 9 read, 4 changed at layer 1"]
    known = {NONE: (first, first * 0), edit: (first - 1, first * 0)}
    assert len(vllm_edit.judged(results(first, first - 1), edit, known, True)) == 3
    with pytest.raises(UserError, match=r"under clamp.* more than rounding explains"):
        vllm_edit.judged(results(first, first - 1.1), edit, known, True)
    with pytest.raises(UserError, match="sum up to the residual stream"):
        vllm_edit.judged(results(first + 0.01, first - 1), edit, {}, True)
    vllm_edit.judged(results(first + 0.01, first - 1), edit, {}, False)
    with pytest.raises(UserError, match="sum up to the residual stream"):
        vllm_edit.judged(results(first + 0.1, first - 1), edit, {}, False)


def test_other_log_probabilities_than_hugging_faces_are_an_error(model, tmp_path):
    prompts = [[2, 9, 33, 5], [2, 17, 8]]
    wanted, rounding = vllm_edit.expected(model.original_model, model.tokenizer, NONE, prompts)
    assert wanted.shape == (5,) and (wanted < 0).all() and rounding.abs().max() > 0
    assert torch.equal(vllm_edit.of_prompts(outputs_of(prompts, wanted)), wanted)
    assert "5 log-probabilities differ by up to 0 nats" in vllm_edit.compared(wanted, wanted, rounding, NONE)
    with pytest.raises(UserError, match="more than rounding explains"):
        vllm_edit.compared(wanted + 0.5, wanted, rounding, NONE)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"engine": "vllm"}, "vLLM is not installed here; .*requirements-vllm.txt"),
        ({"serve": 8000}, "serve: give --engine vllm too"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: give --engine vllm too"),
        ({"no_check": True}, "no_check: give --engine vllm too"),
    ],
)
def test_vllm_is_asked_for_where_it_is_not(monkeypatch, flags, said):
    monkeypatch.setattr(lm_eval_ablated, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=said):
        lm_eval_ablated.run(**flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"device_map": "auto"}, "starts its own processes"),
        ({"model_args": "enable_prefix_caching=True"}, "enable_prefix_caching: an edit needs"),
        ({"model_args": "enforce-eager=False"}, "enforce_eager: an edit needs"),
        ({"model_args": "trust-remote-code=True"}, "never run here"),
    ],
)
def test_what_an_edit_needs_of_vllm_is_not_to_be_changed(monkeypatch, flags, said):
    monkeypatch.setattr(lm_eval_ablated, "find_spec", lambda name: True)
    with pytest.raises(UserError, match=said):
        lm_eval_ablated.run(engine="vllm", **flags)


def test_without_the_models_weights_what_is_meant_is_known(model_folder, wordy, tmp_path):
    """--no-check does not load them: adapter, tokenizer and what the answers come from are the same."""
    folder = str(model_folder("llama"))
    given = dict(model=folder, edit_special="all-but-bos", engine="vllm")
    plain = lm_eval_ablated.outline(SimpleNamespace(**given, model_args=""))
    other = lm_eval_ablated.outline(SimpleNamespace(**given, model_args=f"tokenizer={TINY / 'model'},max_model_len=64"))
    assert plain.device.type == "meta" and plain.tokenizer.edit_special == "all-but-bos"
    assert [*plain.identity] == ["model"] and {**other.identity, "tokenizer": 0} == {**plain.identity, "tokenizer": 0}
    assert (len(plain.tokenizer), len(other.tokenizer)) == (len(AutoTokenizer.from_pretrained(folder)), 4096)
    adapter = lm_eval_ablated.outline(SimpleNamespace(**given, model_args=f"lora_local_path={TINY / 'sae/layer_7'}"))
    assert [*adapter.identity] == ["model", "peft"]
    for made, said in {"pytorch_model.bin.index.json": "holds two models", "adapter_config.json": "holds an adapter",
                       "model.safetensors": "git-LFS pointer"}.items():  # fmt: skip
        other = shutil.copytree(folder, tmp_path / made)
        (other / made).write_text("version https://git-lfs.github.com/spec/v1" if made.startswith("model") else "{}")
        if made.startswith("pytorch"):
            (other / "pytorch_model.bin").touch()
        with pytest.raises(UserError, match=said):
            lm_eval_ablated.outline(SimpleNamespace(**given | {"model": str(other)}, model_args=""))
    with pytest.raises(UserError, match="revision: leave --no-check out"):
        lm_eval_ablated.outline(SimpleNamespace(**given, model_args="revision=main"))


def test_prompts_to_compare_are_what_tasks_ask(model):
    def task(text, docs):
        return SimpleNamespace(task_name="one", eval_docs=docs, doc_to_text=text)

    lm = SimpleNamespace(tokenizer=model.tokenizer, model=model.original_model)
    docs = [{"question": "The cat sat on the mat", "n": 3}, {"question": "Rivers of Europe flow", "n": 1}] * 20
    of = {name: lm_eval_ablated.first_prompts(lm, {"one": (None, [task(text, docs)])}, {"one": [1, *range(20)]}, 5)
          for name, text in {"text": lambda doc: doc["question"], "index": lambda doc: 0}.items()}  # fmt: skip
    wanted = model.tokenizer("Rivers of Europe flow")["input_ids"][:5]
    assert of["text"] == of["index"] and of["text"][0] == of["text"][2] == wanted and len(of["text"]) == 16
    none = lm_eval_ablated.first_prompts(lm, {"one": (None, [task(lambda doc: 0, [{"n": 1}])])}, {"one": [0]}, 5)
    assert none and all(len(row) > 1 for row in none)


def test_an_environment_with_vllm_is_ours_and_vllm():
    lines = [line for line in (ROOT / "requirements-vllm.txt").read_text().splitlines() if line[0] != "#"]
    assert lines[0] == "-r requirements.txt" and re.fullmatch(r"vllm==[\d.]+", lines[1]) and len(lines) == 2
    assert f"vllm-cpu{lines[1][4:]}" in (ROOT / "docs/real_models.md").read_text()  # the same version for CPUs


# ------------------------------------------------------------------------------------------- with vLLM
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(folder of a random model, its SAEs and data; its SAEs). vLLM for CPUs cannot run tiny: its heads are narrow."""
    root = tmp_path_factory.mktemp("vllm")
    (root / "data").mkdir()
    for name in ("wmdp_bio", "mmlu", "mmlu_dev", "wikitext", "openwebtext"):
        shutil.copy(TINY / f"data/{name}.jsonl", root / "data")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, bos_token_id=2, eos_token_id=1,
        tie_word_embeddings=False, initializer_range=0.2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "model")
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(root / "model")
    model = common.load_model(str(root / "model"), "cpu", "float32")
    saes = []
    for layer in (0, 1):
        ids = torch.randint(3, 4000, (4, 32), generator=torch.Generator().manual_seed(1))
        h = edits.residual_stream(model.original_model, ids, layer)
        write_sae(root / f"sae{layer}", "random", h.pow(2).mean().sqrt().item(), d_in=128, d_sae=256, seed=layer,
                  hook_name=f"blocks.{layer}.hook_resid_post")  # fmt: skip
        saes.append(common.load_sae(str(root / f"sae{layer}"), layer, model, str(root / "model")))
    return root, saes


def command_of(root, *flags) -> list[str]:
    given = {"model": root / "model", "sae": root / "sae{layer}", "data": root / "data", "dtype": "float32", "layer": 1}
    given = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "lm_eval_ablated.py"), *given, "--no-sanity", *map(str, flags)]


def record_of(root, name, *flags, **env) -> tuple[dict, str]:
    """A run's record and what it printed."""
    done = subprocess.run(command_of(root, *flags, "--out", root / f"{name}.json"), capture_output=True, text=True,
                          env=ENV | env, cwd=root)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / f"{name}.json").read_text()), done.stdout


def requests_of(pairs: list[tuple]) -> list[Instance]:
    return [Instance(request_type="", doc={}, arguments=pair, idx=0, metadata=("", 0, 1)) for pair in pairs]


def prompts_of(n: int) -> list[str]:
    rows = [json.loads(line) for line in (TINY / "data/wmdp_bio.jsonl").read_text().splitlines()[:n]]
    return [f"{row['question']}\nA. {row['choices'][0]}\nB. {row['choices'][1]}\nAnswer:" for row in rows]


@pytest.fixture(scope="module")
def engine(real):
    """lm-eval's model of both engines, in this process."""
    root, saes = real
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    plain = lm_eval_ablated.AblatedLM(str(root / "model"), device="cpu", dtype="float32", batch_size=8)
    options = {"dtype": "float32", "max_model_len": 512, **vllm_edit.ENGINE}
    return plain, lm_eval_ablated.in_vllm(plain.pretrained, plain.tokenizer, plain.identity, options), saes


@pytest.mark.slow
@pytest.mark.parametrize("special", ["never", "all-but-bos"])
@pytest.mark.vllm
@needs
def test_vllm_gives_hugging_faces_letters_answers_and_texts(engine, special):
    plain, lm, saes = engine
    lm.tokenizer.edit_special = special
    questions, before = prompts_of(30), None
    letters = requests_of([(text, f" {letter}") for text in questions for letter in "ABCD"])
    words = requests_of([(text, " a moth that eats wool") for text in questions[:8]])
    texts = requests_of([(text, {"until": [], "max_gen_toks": 20, "do_sample": False}) for text in questions])
    for name, edit in {"none": NONE, **edits_of(*saes)}.items():
        for model in (plain, lm):
            model.set_edit(edit, saes)
        one, two = (torch.tensor(model.loglikelihood(letters + words)) for model in (plain, lm))
        torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
        one_text, two_text = plain.generate_until(texts), lm.generate_until(texts)  # vLLM keeps half a character back
        assert two_text == [text.rstrip("\ufffd") for text in one_text], name
        before = one if before is None else before
        assert name in ("none", "patched") or (one - before)[:, 0].abs().max() > 1e-2, name
        counts = vllm_edit.check_counts(lm.call("edit_counts"), edit)
        changed = [counts[f"changed at layer {layer}"] for layer in edit.at]
        assert len(counts) == len(changed) + 1 and (all(changed) or name == "patched"), name


@pytest.mark.vllm
@needs
def test_what_is_no_plain_prompt_is_refused_in_vllm_too(engine):
    plain, lm, _ = engine
    for model in (plain, lm):
        model.set_edit(NONE)
    long = requests_of([("moth " * 600, " A"), ("moth " * 600, " B")])
    with pytest.raises(UserError, match="there is room for"):
        lm.loglikelihood(long)
    for alone in (True, False):  # at the edge lm-eval's vllm would cut a prompt's beginning off
        answer = [60] if alone else [60, 61, 62]
        words = torch.randint(3, 4000, (510 - len(answer),), generator=torch.Generator().manual_seed(0)).tolist()
        asked = (("x", "y"), [2, *words], answer)
        found = [model._loglikelihood_tokens([asked])[0][0] for model in (plain, lm)]
        assert found[1] == pytest.approx(found[0], abs=1e-3)
        with pytest.raises(UserError, match="has 511 tokens, and there is room for 510"):
            lm._loglikelihood_tokens([(asked[0], asked[1] + [50], answer)])
    with pytest.raises(UserError, match="there is room for"):
        lm.generate_until(requests_of([("moth " * 500, {"until": [], "max_gen_toks": 100})]))


@pytest.mark.vllm
@needs
def test_answers_are_written_as_hugging_faces_engine_writes_them(engine):
    """Greedily unless sampling is asked for, to whatever special token is to end them, none of them in the text."""
    plain, lm, _ = engine
    for model in (plain, lm):
        model.set_edit(NONE)
    for given in ({"until": ["zebra"]}, {"temperature": 0.0}, {"until": [" the"], "do_sample": False}, {}):
        asked = requests_of([(text, {**given, "max_gen_toks": 12}) for text in prompts_of(6)])
        wanted = [text.rstrip("\ufffd") for text in plain.generate_until(asked)]
        assert lm.generate_until(asked) == wanted, given
    kwargs, until, most = lm.modify_gen_kwargs({"until": ["<eos>", "x"], "max_gen_toks": 3}, "<eos>")
    assert kwargs["stop_token_ids"] == [1] and kwargs["skip_special_tokens"] and most == 3 and "x" in until
    assert "temperature" not in lm.modify_gen_kwargs({"do_sample": True})[0]
    assert lm.modify_gen_kwargs({"temperature": 0.5})[0]["temperature"] == 0.5
    with pytest.raises(UserError, match="num_beams"):
        lm.generate_until(requests_of([("The cat", {"num_beams": 2})]))


TASKS = "tiny_wmdp_bio,tiny_mmlu,tiny_wmdp_bio_open,tiny_openwebtext"


@pytest.mark.slow
@pytest.mark.vllm
@needs
def test_a_run_in_vllm_scores_what_hugging_faces_does(real):
    """The whole command, features picked; and lm-eval's own vllm, as far as nothing is edited."""
    root, _ = real
    flags = ["--tasks", TASKS, "--unablated", "--limit", 20, "--n-features", 10, "--clamp", -3, "--sae", root / "sae1"]
    (one, _), (two, said) = (record_of(root, name, *flags, "--engine", name) for name in ("hf", "vllm"))
    same_records(one, two)
    counts = two["vllm"]["tokens"]
    assert counts["unablated"].keys() == {"read"} and min(counts[[*two["rows"]][1]].values()) > 50
    assert two["vllm"]["checked"] == [line for line in said.splitlines() if line in two["vllm"]["checked"]] != []
    assert two["attention"].startswith("vllm ") and said.count("no more than rounding explains") == 2


def same_records(one: dict, two: dict) -> None:
    assert one["rows"].keys() == two["rows"].keys()
    for row in one["rows"]:
        for part in ("settings", "answers"):
            assert one["rows"][row][part] == two["rows"][row][part]
        for measure, score in one["rows"][row]["scores"].items():
            other = two["rows"][row]["scores"][measure]
            assert other["n"] == score["n"] and other["mean"] == pytest.approx(score["mean"], abs=1e-4), measure


@pytest.mark.slow
@pytest.mark.vllm
@needs
def test_lm_evals_own_vllm_scores_what_ours_does_without_an_edit(engine):
    """All documents of a task, by lm-eval's vllm as it is: one prompt an option; ours asks a question once."""
    _, lm, _ = engine
    lm.set_edit(NONE)
    manager = TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False)
    base = type(lm).__mro__[2]
    own = object.__new__(type("Own", (base,), {}))
    vars(own).update(vars(lm))
    found = [simple_evaluate(one, tasks=["tiny_wmdp_bio", "tiny_wmdp_bio_open"], limit=60, task_manager=manager,
                             bootstrap_iters=0) for one in (own, lm)]  # fmt: skip
    assert base.__module__ == "lm_eval.models.vllm_causallms"
    assert found[0]["results"] == found[1]["results"]
    said = [[row["filtered_resps"][0] for row in results["samples"]["tiny_wmdp_bio_open"]] for results in found]
    bare = [re.sub("<(unk|bos|pad)>", "", text) for text in said[0]]  # ours leaves special tokens out, as `hf` does
    assert bare == said[1]
    values = [[row["filtered_resps"] for row in results["samples"]["tiny_wmdp_bio"]] for results in found]
    torch.testing.assert_close(*map(torch.tensor, values), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.vllm
@needs
def test_two_processes_give_what_one_does(real):
    """Tensor parallel; vLLM 0.30 for CPUs cannot run a pipeline, edited or not."""
    root, saes = real
    features = json.dumps({sae.layer: [3, 40, 7, 21, 99] for sae in saes})
    flags = ["--tasks", "tiny_wmdp_bio,tiny_wmdp_bio_open", "--unablated", "--limit", 20, "--clamp", -3,
             "--features", features]  # fmt: skip
    one, _ = record_of(root, "one", *flags)
    two, said = record_of(root, "two", *flags, "--engine", "vllm", "--tensor-parallel-size", 2,
                          VLLM_CPU_OMP_THREADS_BIND="0|1")  # fmt: skip
    same_records(one, two)
    assert said.count("no more than rounding explains") == 2
    changed = two["vllm"]["tokens"][[*two["rows"]][1]]
    assert [*changed] == ["read", "changed at layer 0", "changed at layer 1"] and min(changed.values()) > 50


@pytest.mark.slow
@pytest.mark.vllm
@needs
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model_args", "model_impl=transformers"], "does not return (hidden, residual)"),
        (["--model_args", "max_model_len=100000"], "Value error, User-specified max_model_len (100000)"),
        (["--method", "dsg", "--clamp", -3, "--setting", "gate=0.1"], "dsg looks at a whole prompt"),
    ],
)
def test_an_edit_that_cannot_run_ends_in_a_line(real, flags, said):
    root, _ = real
    usual = ["--engine", "vllm", "--features", "3,40", "--limit", 4, "--tasks", "tiny_wmdp_bio"]
    run = command_of(root, *usual, *flags, "--out", root / "none.json")
    done = subprocess.run(run, capture_output=True, text=True, env=ENV, cwd=root)
    last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and any("error: " in line and said in line for line in last), last[-5:]
    assert "Traceback" not in done.stderr and not (root / "none.json").exists()


@contextlib.contextmanager
def server(root, port: int, *flags):
    """A server that has said that it answers, and the file of what it says; killed in the end."""
    with (root / "said.txt").open("w") as said:
        run = [*command_of(root, "--engine", "vllm", "--serve", port, *flags)]
        process = subprocess.Popen(
            run, stdout=said, stderr=subprocess.STDOUT, env=ENV, cwd=root, start_new_session=True
        )
        try:
            until = time.time() + 180
            while "answers OpenAI's clients" not in (root / "said.txt").read_text():
                assert process.poll() is None and time.time() < until, (root / "said.txt").read_text()[-3000:]
                time.sleep(0.5)
            yield root / "said.txt"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
@pytest.mark.vllm
@needs
def test_any_client_talks_to_the_edited_model(real, engine):
    openai = pytest.importorskip("openai")
    (root, saes), (plain, _, _) = real, engine
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--features", "3,40,7,21,99", "--clamp", -3]
    plain.tokenizer.edit_special = "never"
    texts = requests_of([(text, {"until": [], "max_gen_toks": 20, "do_sample": False}) for text in prompts_of(8)])
    plain.set_edit(NONE)
    unablated = plain.generate_until(texts)
    plain.set_edit(ablation(saes[1], [3, 40, 7, 21, 99], -3.0), [saes[1]])
    wanted = [text.rstrip("\ufffd") for text in plain.generate_until(texts)]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)

    def ask(text):
        return client.completions.create(model="model", prompt=text, max_tokens=20, temperature=0).choices[0].text

    for attempt in range(2):  # killed, and started again
        with server(root, port, *flags) as said, ThreadPoolExecutor(8) as clients:
            assert [*clients.map(ask, prompts_of(8))] == wanted  # all at once
            assert "under clamp" in said.read_text() and "no more than rounding explains" in said.read_text()
            if attempt:
                continue
            assert wanted != unablated
            with pytest.raises(openai.NotFoundError):
                client.post("/collective_rpc", cast_to=object, body={"method": "edit_counts"})
            with (
                pytest.raises(AssertionError, match=f"error: cannot serve at 127.0.0.1:{port}"),
                server(root, port, *flags),
            ):
                pass
            asked = dict(base_url=f"http://127.0.0.1:{port}/v1/completions", model="model", add_bos_token=True,
                         tokenizer=str(root / "model"))  # fmt: skip
            manager = TaskManager(include_path=str(ROOT / "lm_eval_tasks"), include_defaults=False)
            found = [simple_evaluate(*model, tasks=["tiny_wmdp_bio"], limit=12, task_manager=manager, bootstrap_iters=0)
                     for model in (("local-completions", asked), (plain,))]  # fmt: skip
            values = [[row["filtered_resps"] for row in one["samples"]["tiny_wmdp_bio"]] for one in found]
            torch.testing.assert_close(*map(torch.tensor, values), rtol=0, atol=1e-4)


@pytest.mark.vllm
@needs
def test_what_is_not_finite_is_neither_scored_nor_cached(engine):
    """The last of this engine's tests: NaN stays in vLLM's cache of keys and values."""
    _, lm, saes = engine
    lm.set_edit(make("mean-ablation", saes[0], features=FEATURES, means=[math.nan] * 4), saes)
    with pytest.raises(UserError, match="not finite"):
        lm.loglikelihood(requests_of([(text, f" {letter}") for text in prompts_of(4) for letter in "AB"]))
    lm.set_edit(lm.edit, saes)
    with pytest.raises(UserError, match="not finite"):
        lm.generate_until(requests_of([(prompts_of(1)[0], {"until": [], "max_gen_toks": 3})]))
