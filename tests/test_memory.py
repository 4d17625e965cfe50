"""What a pass takes of a device's memory, counted on the meta device with true shapes, and where it runs out."""

import itertools
import shutil
import weakref

import pytest
import torch
from conftest import TINY, command, some_ids
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

import data
import edits
import engine
import evaluation
import hub
from edits import NONE, Edit, ablation, patched, reconstruction
from engine import OnePass

GEMMA_2_2B = Gemma2Config(
    architectures=["Gemma2ForCausalLM"], vocab_size=256_000, hidden_size=2304, intermediate_size=9216,
    num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256,
    sliding_window=4096, max_position_embeddings=8192,
)  # fmt: skip


def gemma_3(
    layers: int, width: int, inner: int, heads: int, kv: int, scalar=256, d_head=256, window=1024, vocab=262_208
):
    """The part of a Gemma-3 that reads text."""
    return Gemma3TextConfig(
        architectures=["Gemma3ForCausalLM"], vocab_size=vocab, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, head_dim=d_head,
        query_pre_attn_scalar=scalar, sliding_window=window, max_position_embeddings=131_072,
    )  # fmt: skip


def seeing(config) -> int:
    """Parameters of the part that reads images, which Gemma-3 has from 4B on and which is loaded too."""
    if not isinstance(config, Gemma3TextConfig) or config.hidden_size < 2560:
        return 0
    images = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
                  image_size=896, patch_size=14, vision_use_head=False)  # fmt: skip
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(Gemma3Config(text_config=config.to_dict(), vision_config=images))
    return sum(one.numel() for name, one in whole.named_parameters() if "language_model" not in name)


GEMMA_3_4B = gemma_3(34, 2560, 10_240, 8, 4)
LLAMA_3_8B = LlamaConfig(
    architectures=["LlamaForCausalLM"], vocab_size=128_256, hidden_size=4096, intermediate_size=14_336,
    num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
)  # fmt: skip
# The shapes of the presets' config.json files, by preset
SHAPES = {
    "qwen3-1.7b-base": Qwen3Config(
        architectures=["Qwen3ForCausalLM"], vocab_size=151_936, hidden_size=2048, intermediate_size=6144,
        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        max_position_embeddings=32_768),
    "qwen2.5-7b-instruct": Qwen2Config(
        architectures=["Qwen2ForCausalLM"], vocab_size=152_064, hidden_size=3584, intermediate_size=18_944,
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
        max_position_embeddings=32_768),
    "gemma-2-2b-it": GEMMA_2_2B,
    "gemma-2-9b-it": Gemma2Config(**GEMMA_2_2B.to_dict() | dict(
        hidden_size=3584, intermediate_size=14_336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, layer_types=None)),
    "gemma-3-270m-it": gemma_3(18, 640, 2048, 4, 1, window=512, vocab=262_144),
    "gemma-3-1b-it": gemma_3(26, 1152, 6912, 4, 1, window=512, vocab=262_144),
    "gemma-3-4b-it": GEMMA_3_4B,
    "gemma-3-12b-it": gemma_3(48, 3840, 15_360, 16, 8),
    "gemma-3-27b-it": gemma_3(62, 5376, 21_504, 32, 16, scalar=168, d_head=128)}  # fmt: skip
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
    monkeypatch.setattr(engine, "beginnings", lambda rows: (0, []))
    monkeypatch.setattr(engine, "odd_numbers", lambda n: torch.ones(n, dtype=torch.int64, device="meta"))
    monkeypatch.setattr(engine, "hashes_of", lambda change, weights: [next(numbers) for _ in change])


def peak(model, tokens: int, layer: int) -> float:
    """GB that scoring prompts of so many tokens under the lessons' four edits takes at its most, weights among it."""
    weights, live = sum(one.numel() * one.element_size() for one in model.original_model.parameters()), Live()
    changes = [Edit(str(k), at={layer: lambda h, mask, k=k: h * (k + 1)}) for k in range(4)]
    scored = []

    def score(places, start, h):
        engine.head(model, h[:, -1:])
        scored.extend(places)
        return torch.zeros(len(places))

    with live:
        engine.each_edit(model, [[0] * tokens] * PROMPTS, [NONE, *changes], score)
    assert len(scored) == 5 * PROMPTS
    return (weights + live.most) / 1e9


@pytest.mark.slow
def test_the_table_in_docs_is_what_is_counted(empty_model, no_values):
    """docs/real_models.md: at layer 7, prompts of 150, 450 and 1,000 tokens; the README has gemma-2-2b's last."""
    docs = (TINY.parent / "docs/real_models.md").read_text()
    for column, config in enumerate((GEMMA_2_2B, GEMMA_3_4B, LLAMA_3_8B), 1):
        model = empty_model(config)
        more = 2 * seeing(config) / 1e9
        found = {tokens: f"{peak(model, tokens, 7) + more:.1f} GB" for tokens in (150, 450, 1000)}
        for tokens, taken in found.items():
            row = next(line for line in docs.splitlines() if line.startswith(f"| {tokens:,} |"))
            assert row.split("|")[column + 1].strip() == taken
        if config is GEMMA_2_2B:
            readme = " ".join((TINY.parent / "README.md").read_text().split())
            assert f"takes {found[1000]} with prompts of 1,000 tokens" in readme


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_table_of_presets_in_docs_is_what_is_counted(empty_model, no_values, name):
    """docs/real_models.md: parameters; what scoring prompts of 1,000 tokens takes, at the SAE's layer next to 7; the
    SAE in float32; and a card with a tenth to spare. README has the first preset's."""
    preset, model, images = hub.PRESETS[name], empty_model(SHAPES[name]), seeing(SHAPES[name])
    size = sum(one.numel() for one in model.original_model.parameters()) + images
    taken = peak(model, 1000, min(preset.layers, key=lambda layer: abs(layer - 7))) + 2 * images / 1e9
    sae = 2 * {"16k": 2**14, "32k": 2**15, "131k": 2**17}[preset.width] * model.cfg.d_model * 4 / 1e9
    card = next(card for card in (8, 12, 16, 24, 40, 48, 80) if card * 0.9 > taken + sae)
    docs = (TINY.parent / "docs/real_models.md").read_text()
    (row,) = [line.strip("| ").split(" | ") for line in docs.splitlines() if line.startswith(f"| {name} |")]
    assert row[1:] == [f"{size / 1e9:.2f} billion", preset.dtype, f"{taken:.1f} GB", f"{sae:.1f} GB", f"{card} GB"]
    assert name == "gemma-2-9b-it" or max(preset.layers) == model.cfg.n_layers - 1
    readme = " ".join((TINY.parent / "README.md").read_text().split())
    assert name != "qwen3-1.7b-base" or f"qwen3-1.7b-base takes {taken:.1f} GB" in readme


@pytest.mark.slow
@pytest.mark.parametrize("layer", [3, 20])
def test_gemma_2_2b_fits_a_card_of_8_gb(empty_model, no_values, layer):
    model = empty_model(GEMMA_2_2B)
    assert 5.2 < max(peak(model, tokens, layer) for tokens in (30, 150, 600, 1000)) <= 7.0


# ------------------------------------------------------------------------------------ memory runs out


def exhausted(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_parts_are_halved_until_they_fit():
    tried, done = [], []

    def run(part):
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory. (out of memory)")
        done.extend(part)

    engine.in_parts(list(range(11)), 10, run)
    assert done == list(range(11)) and tried == [10, 5, 2, 2, 1, 5, 2, 2, 1, 1]
    with pytest.raises(torch.OutOfMemoryError):
        engine.in_parts([1, 2], 2, exhausted)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        engine.in_parts([1, 2], 2, lambda part: torch.zeros(2) @ torch.zeros(3))


def rows_of(sae) -> list[Edit]:
    return [NONE, patched(sae, [0, 2]), reconstruction(sae), *(ablation(sae, [0, 2], clamp) for clamp in (0.0, -3.0))]


def test_a_pass_is_of_few_tokens(gemma, gemma_sae, monkeypatch):
    """Of prompts and of copies: the more tokens each has, the fewer at a time."""
    sizes, letters = {"run": [], "run_copies": []}, [20, 21, 22, 23]
    prompts = some_ids(gemma, (9, 20)).tolist()
    expected = evaluation.score_letters(gemma, prompts, letters, rows_of(gemma_sae))
    for name in sizes:
        real = getattr(OnePass, name)
        monkeypatch.setattr(OnePass, name, lambda self, some, real=real, name=name: (
            sizes[name].append(len(some)) or real(self, some)))  # fmt: skip
    monkeypatch.setattr(engine, "PASS_TOKENS", 120)  # and on a CPU 60 of copies
    found = evaluation.score_letters(gemma, prompts, letters, rows_of(gemma_sae))
    assert sizes["run"] == [6, 3] and 3 <= max(sizes["run_copies"]) <= 60 // 10
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("most", [1, 3])
def test_where_memory_runs_out_half_as_many_are_run(gemma, gemma_sae, monkeypatch, most):
    """Of prompts and of copies at once; the answers are what they were."""
    prompts, rows, letters = some_ids(gemma, (9, 20)).tolist(), rows_of(gemma_sae), [20, 21, 22, 23]
    expected = evaluation.score_letters(gemma, prompts, letters, rows)
    for name in ("run_copies", "forward"):
        real = getattr(OnePass, name)
        monkeypatch.setattr(OnePass, name, lambda self, some, *rest, real=real: (
            exhausted() if len(some) > most else real(self, some, *rest)))  # fmt: skip
    found = evaluation.score_letters(gemma, prompts, letters, rows)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    monkeypatch.setattr(OnePass, "forward", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        evaluation.score_letters(gemma, prompts, letters, rows)


RUNS = {
    "feature_ablate_1.py": (edits.Latents, "encode"), "feature_ablate_2.py": (edits.Latents, "encode"),
    "feature_ablate_3.py": (edits.Latents, "encode"), "pareto.py": (edits.Latents, "encode"),
    "baselines.py": (edits.Latents, "encode"), "lm_eval_ablated.py": (edits.Latents, "encode"),
    "train_sae.py": (data, "token_windows"),
}  # fmt: skip


@pytest.mark.parametrize("script", RUNS)
def test_elsewhere_it_is_one_line_and_exit_code_2(script, monkeypatch, capfd, tmp_path):
    place, name = RUNS[script]
    monkeypatch.setattr(place, name, exhausted)
    more = ["--tasks", "tiny_wmdp_bio"] if script == "lm_eval_ablated.py" else []
    more += [] if script == "train_sae.py" else ["--limit", "4"]
    assert command(monkeypatch, script, *more, "--out", tmp_path / "r.json") == 2
    said = capfd.readouterr().err
    assert "error: no memory is left (CUDA out of memory" in said and "dtype bfloat16" in said
    assert "Traceback" not in said
