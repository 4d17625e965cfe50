"""Every script fits itself to the device's memory: counted on the meta device with true shapes, and run out of."""

import itertools
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, command, some_ids
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config, Gemma3TextConfig, LlamaConfig

import common
import data
import edits
import engine
import evaluation
import flags
import hub
import memory
import training
from data import UserError
from edits import NONE, Edit
from engine import OnePass

GEMMA_2_2B = Gemma2Config(
    architectures=["Gemma2ForCausalLM"], vocab_size=256_000, hidden_size=2304, intermediate_size=9216,
    num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
    sliding_window=4096, max_position_embeddings=8192,
)  # fmt: skip
GEMMA_3_4B = Gemma3TextConfig(
    architectures=["Gemma3ForCausalLM"], vocab_size=262_208, hidden_size=2560, intermediate_size=10_240,
    num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
    sliding_window=1024, max_position_embeddings=131_072,
)  # fmt: skip
LLAMA_3_8B = LlamaConfig(
    architectures=["LlamaForCausalLM"], vocab_size=128_256, hidden_size=4096, intermediate_size=14_336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
PROMPTS = 16


class Live(TorchDispatchMode):
    """Bytes of the meta device's tensors that live now, and the most of them so far."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if self.known.get(storage._cdata) is not storage:
            self.known[storage._cdata] = storage
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, storage.nbytes())

    def gone(self, size):
        self.now -= size


@pytest.fixture(scope="module")
def empty_model(tmp_path_factory):
    """config -> a TransformerBridge in bfloat16 on the meta device."""

    def make(config):
        folder = tmp_path_factory.mktemp("empty")
        config.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / "model" / name, folder)
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
        tokenizer = hub.load_tokenizer(str(folder))
        model = TransformerBridge.boot_transformers(
            str(folder), hf_model=hf, tokenizer=tokenizer, dtype=torch.bfloat16, device="meta"
        )
        model._tokenizer = tokenizer
        return model.requires_grad_(False)

    return make


@pytest.fixture
def no_values(monkeypatch):
    """What the engine asks of values, answered without any: everything is changed from token 1 on, nothing alike."""
    real, numbers = torch.Tensor.tolist, itertools.count()

    def tolist(x):
        def filled(shape):
            return [filled(shape[1:]) for _ in range(shape[0])] if shape else True if x.dtype == torch.bool else 1

        return filled(tuple(x.shape)) if x.device.type == "meta" else real(x)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(engine, "odd_numbers", lambda n: torch.ones(n, dtype=torch.int64, device="meta"))
    monkeypatch.setattr(engine, "hashes_of", lambda change, weights: [next(numbers) for _ in change])


def peak(model, tokens: int, layer: int, monkeypatch, budget: float = 1e12) -> float:
    """GB that scoring prompts of so many tokens under the lessons' four edits takes at its most, weights among it;
    budget: GB that the engine is told there are."""
    weights, live = sum(one.numel() * one.element_size() for one in model.original_model.parameters()), Live()
    monkeypatch.setattr(memory, "free_bytes", lambda device, most=None: budget * 1e9 - weights - live.now)
    changes = [Edit(str(k), {layer: lambda h, editable, k=k: h * (k + 1)}) for k in range(4)]
    run, copies = OnePass(model, [NONE, *changes]), 0
    run.in_one_piece = True
    ids = torch.zeros(PROMPTS, tokens, dtype=torch.long, device="meta")

    def score(picked, ids):
        nonlocal copies
        run(ids)
        copies += sum(len(rows) for rows, _, _ in run.run_copies())

    with live, torch.inference_mode():
        run.over([(list(range(PROMPTS)), ids)], score)
    assert copies == 4 * PROMPTS
    return (weights + live.most) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("layer", [3, 7, 20])
def test_gemma_2_2b_fits_a_card_of_12_gb(empty_model, no_values, monkeypatch, layer):
    model = empty_model(GEMMA_2_2B)
    found = {tokens: peak(model, tokens, layer, monkeypatch, 12.0) for tokens in (30, 150, 450, 600, 900, 1000)}
    assert min(found.values()) > 5.2 and max(found.values()) <= 11.0
    assert f"takes {found[1000]:.1f} GB\nwith prompts of 1,000 tokens" in (TINY.parent / "README.md").read_text()


@pytest.mark.slow
def test_larger_models_keep_to_their_budget(empty_model, no_values, monkeypatch):
    model = empty_model(GEMMA_3_4B)
    assert max(peak(model, tokens, 7, monkeypatch, 24.0) for tokens in (150, 900, 1000)) <= 22.0
    assert peak(model, 900, 7, monkeypatch, 9.5) <= 9.5  # less than it takes of its own accord
    llama = empty_model(LLAMA_3_8B)
    assert peak(llama, 900, 7, monkeypatch, 18.0) <= 18.0 < peak(llama, 900, 7, monkeypatch, 80.0)


@pytest.mark.parametrize("config", [GEMMA_2_2B, LLAMA_3_8B])
def test_what_a_prompt_takes_is_what_the_formula_says(empty_model, no_values, monkeypatch, config):
    model = empty_model(config)
    for tokens in (30, 450, 900):
        live, ids = Live(), torch.zeros(4, tokens, dtype=torch.long, device="meta")
        monkeypatch.setattr(memory, "free_bytes", lambda device, most=None: 1e12)
        with live, torch.inference_mode():
            OnePass(model, [NONE, Edit("a", {7: lambda h, editable: h})]).forward(ids, DynamicCache())
        assert 0.7 < live.most / 4 / memory.row_bytes(model, tokens, tokens, model.cfg.n_layers) < 1.0


@pytest.mark.slow
def test_at_any_budget_the_answers_are_the_same(monkeypatch):
    """With room for all, for some and for one or two prompts; in float32 the probabilities are to rounding."""
    model = common.load_model("tiny")
    rows = evaluation.standard_rows(common.load_sae(None, 7, model), [30, 31, 32, 500], [[40, 41, 42]], -40.0)
    questions = data.load_rows("wmdp_bio", "tiny", None)[0][:24]
    ids, letters = data.encode_prompts(model.tokenizer, [data.prompt(row) for row in questions])
    free, row, found, sizes, real = memory.free_bytes, memory.row_bytes(model, 100, 100, 20), [], [], OnePass.run_some

    def counted(self, some, layer):
        sizes[-1].append(len(some))
        return real(self, some, layer)

    monkeypatch.setattr(OnePass, "run_some", counted)
    for budget in (None, 20 * row, 2 * row):
        monkeypatch.setattr(memory, "free_bytes", lambda *args, budget=budget: budget or free(*args))
        sizes.append([])
        found.append(torch.cat([evaluation.score_letters(model, ids, letters, rows).double(),
                                evaluation.score_words(model, questions, rows)]))  # fmt: skip
    assert max(sizes[0]) > 1.5 * max(sizes[1]) > 3 * max(sizes[2])
    for other in found[1:]:
        assert torch.equal(other.argmax(-1), found[0].argmax(-1))
        torch.testing.assert_close(other, found[0], atol=2e-5, rtol=0)


# ------------------------------------------------------------------------------------ memory runs out


def exhausted(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_parts_are_halved_until_they_fit(monkeypatch):
    tried = []

    def make(some):
        tried.append(len(some))
        if len(some) > 3:
            raise torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory. (out of memory)")
        return list(some)

    assert list(itertools.chain(*memory.in_parts(list(range(11)), 10, make))) == list(range(11))
    assert tried == [10, 5, 2, 2, 2, 2, 2, 1]
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        next(memory.in_parts([1, 2], 2, lambda some: torch.zeros(2) @ torch.zeros(3)))


def test_copies_at_a_time_are_few_tokens(gemma, gemma_sae, monkeypatch):
    """However much memory there is."""
    sizes, real = [], OnePass.run_some
    monkeypatch.setattr(OnePass, "run_some", lambda *args, **more: sizes.append(len(args[1])) or real(*args, **more))
    monkeypatch.setattr(memory, "COPY_TOKENS", 60)
    rows = evaluation.standard_rows(gemma_sae, [0, 2], [[5]], -3.0)
    evaluation.score_letters(gemma, some_ids(gemma, (9, 20)).tolist(), [20, 21, 22, 23], rows)
    assert sum(sizes) > 9 and 3 <= max(sizes) <= 60 // 10


@pytest.mark.parametrize("most", [1, 3])
def test_where_memory_runs_out_half_as_many_are_run(gemma, gemma_sae, monkeypatch, most):
    """Of prompts and of copies at once; the answers are what they were."""
    prompts, rows = some_ids(gemma, (9, 20)).tolist(), evaluation.standard_rows(gemma_sae, [0, 2], [[5]], -3.0)
    wanted = evaluation.score_letters(gemma, prompts, [20, 21, 22, 23], rows)
    for name, of in (("run_some", len), ("forward", len)):
        real = getattr(OnePass, name)
        monkeypatch.setattr(OnePass, name, lambda self, some, *rest, real=real, of=of, **more: (
            exhausted() if of(some) > most else real(self, some, *rest, **more)))  # fmt: skip
    found = evaluation.score_letters(gemma, prompts, [20, 21, 22, 23], rows)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    monkeypatch.setattr(OnePass, "forward", exhausted)
    with pytest.raises(UserError, match="no memory is left for a single prompt"):
        evaluation.score_letters(gemma, prompts, [20, 21, 22, 23], rows)


def test_what_a_process_may_have_counts_what_it_has(gemma, monkeypatch):
    """All that asks for free memory goes by --max-memory; on a CPU processes share what is free."""
    device, held = torch.device("cpu"), memory.held_bytes(torch.device("cpu"))
    assert abs(memory.free_bytes(device, 50.0) - (50e9 - held)) < 1e8 < held and not memory.free_bytes(device, 0.1)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    monkeypatch.setattr(memory.processes, "count", lambda: 2)
    assert memory.free_bytes(device) == 4e9
    asked = []
    monkeypatch.setattr(memory, "free_bytes", lambda device, most=None: asked.append(most) or 1e12)
    pushed = Edit("pushed", {1: lambda h, editable: h + 1})
    evaluation.score_letters(gemma, some_ids(gemma, (2, 20)).tolist(), [20, 21, 22, 23], [NONE, pushed], max_memory=7.0)
    assert len(asked) >= 3 and set(asked) == {7.0}


def test_a_prompt_without_room_is_refused_before_it_is_run(gemma):
    with pytest.raises(UserError, match=r"a prompt of 20 tokens takes 0\.00 GB .* of --max-memory 0\.001: --dtype"):
        evaluation.score_letters(gemma, some_ids(gemma, (2, 20)).tolist(), [20, 21, 22, 23], [NONE], max_memory=0.001)


RUNS = {
    "feature_ablate_1.py": (edits.Latents, "encode"), "feature_ablate_2.py": (edits.Latents, "encode"),
    "feature_ablate_3.py": (edits.Latents, "encode"), "pareto.py": (edits.Latents, "encode"),
    "rmu.py": (training.Master, "backward"), "baselines.py": (edits.Latents, "encode"),
    "lm_eval_ablated.py": (edits.Latents, "encode"), "train_sae.py": (engine, "check_engine"),
    "robustness.py": (flags, "settings"),
}  # fmt: skip


@pytest.mark.parametrize("script", RUNS)
def test_elsewhere_it_is_one_line_and_exit_code_2(script, monkeypatch, capfd, tmp_path):
    place, name = RUNS[script]
    monkeypatch.setattr(place, name, exhausted)
    more = {"rmu.py": ["--steps", "2"], "lm_eval_ablated.py": ["--tasks", "tiny_wmdp_bio"],
            "robustness.py": ["record.json"]}.get(script, [])  # fmt: skip
    more += [] if script in ("train_sae.py", "robustness.py") else ["--limit", "4"]
    assert command(monkeypatch, script, *more, "--out", tmp_path / "r.json") == 2
    said = capfd.readouterr().err
    assert "error: no memory is left (CUDA out of memory" in said and "--dtype bfloat16" in said
    assert "Traceback" not in said
