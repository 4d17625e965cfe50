"""Random-weight models of six families and SAEs of every kind, saved and loaded as users' own would be."""

import json
import os
import runpy
import shutil
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes: a thread each, and in what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from stand_in_hub import serving
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MptConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    XGLMConfig,
)

import common
import data
import evaluation
import hub
from data import special_ids

FAMILIES = ("gemma2", "gemma3", "llama", "qwen3", "gpt2", "gpt_neox")
KINDS = ("standard", "jumprelu", "gated", "topk", "topk_rescaled", "batchtopk")
NORMS = ("none", "constant_norm_rescale", "layer_norm")
D_MODEL, N_LAYERS, WINDOW, D_SAE = 32, 4, 8, 64
ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny"
CONFIG = json.loads((TINY / "model/config.json").read_text())
LAYERS = f"layers 0 to {CONFIG['num_hidden_layers'] - 1}"  # as messages name tiny's
N_QUESTIONS = {name: len((TINY / f"data/{name}.jsonl").read_text().splitlines()) for name in ("wmdp_bio", "mmlu")}
CLAMP = hub.PRESETS["tiny"].clamp  # by default
HOOK = "blocks.1.hook_resid_post"
BOS, EOS, PAD, MARKER = "<bos>", "<eos>", "<pad>", "<start_of_turn>"

TEXTS = [
    "The following are multiple choice questions (with answers) about biology.",
    "Which of these is an organ of the body? A. The heart B. The moon C. The sea D. The stone",
    "Answer: A", "Answer: B", "Answer: C", "Answer: D",
    "The cat sat on the mat and looked at the moon over the sea.",
    "Rivers of Europe flow to the sea, and the sea is wide and deep.",
    "Blood carries oxygen from the lungs to the heart and to every organ.",
]  # fmt: skip


def train_tokenizer(vocab_size: int = 420) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, EOS, BOS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="right"
    )
    # flagged special but not one of tokenizer.all_special_ids, like a chat model's turn marker
    tokenizer.add_tokens([AddedToken(MARKER, special=True)], special_tokens=True)
    return tokenizer


def other_config(family: str, **ids):
    """Of families that are tried against the engine only."""
    std, few = dict(initializer_range=0.2), dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2)
    some = dict(**ids, **std, **few, intermediate_size=64, max_position_embeddings=512, num_key_value_heads=1)
    two = ["sliding_attention", "full_attention"] * 2
    return {
        "bloom": lambda: BloomConfig(**ids, **std, hidden_size=32, n_layer=4, n_head=2),
        "mpt": lambda: MptConfig(**ids, **std, d_model=32, n_layers=4, n_heads=2, max_seq_len=512),
        "falcon": lambda: FalconConfig(**ids, **std, **few),
        "falcon_alibi": lambda: FalconConfig(**ids, **std, **few, alibi=True),
        "xglm": lambda: XGLMConfig(**ids, init_std=0.2, d_model=32, num_layers=4, attention_heads=2, ffn_dim=64),
        "mamba": lambda: MambaConfig(**ids, **std, hidden_size=32, num_hidden_layers=4, state_size=8),
        "jamba": lambda: JambaConfig(**some, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                                     num_experts=2, use_mamba_kernels=False, mamba_d_state=8),
        "qwen3_next": lambda: Qwen3NextConfig(
            **some, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
            shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=2,
            linear_key_head_dim=16, linear_value_head_dim=16),
        "falcon_h1": lambda: FalconH1Config(**some, head_dim=16, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8,
                                            mamba_d_state=8, mamba_n_groups=1),
        "lfm2": lambda: Lfm2Config(**some, full_attn_idxs=[1, 3]),
        "recurrent_gemma": lambda: RecurrentGemmaConfig(
            **ids, **std, **few, intermediate_size=64, num_key_value_heads=1, head_dim=16, lru_width=32,
            attention_window_size=8),
        "gemma4": lambda: Gemma4TextConfig(
            **some, head_dim=16, global_head_dim=16, sliding_window=WINDOW, layer_types=two, num_kv_shared_layers=2,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=ids["vocab_size"],
            final_logit_softcapping=30.0),
        "cohere": lambda: CohereConfig(**some),
        "olmo2": lambda: Olmo2Config(**some),
        "phi3": lambda: Phi3Config(**some),
    }[family]()  # fmt: skip


def random_model(family: str, vocab_size: int):
    # init_std is ten times the usual so that an edit of the residual moves the logits visibly
    std = dict(initializer_range=0.2)
    ids = dict(vocab_size=vocab_size, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    sizes = dict(
        hidden_size=D_MODEL, intermediate_size=64, num_hidden_layers=N_LAYERS, num_attention_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    grouped = dict(num_key_value_heads=1, head_dim=16)
    short = dict(
        sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2, query_pre_attn_scalar=16
    )
    torch.manual_seed(0)
    if family == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**ids, **std, **sizes, **grouped, **short))
    if family == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**ids, **std, **sizes, **grouped, **short))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**ids, **std, **sizes, **grouped))
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**ids, **std, **sizes, **grouped))
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**ids, **std, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=2, n_positions=512))
    if family == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**ids, **std, **sizes))
    return AutoModelForCausalLM.from_config(other_config(family, **ids))


@pytest.fixture(autouse=True)
def notes_anew():
    """What is said once a run is said in each test anew."""
    data.note_once.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def little_text():
    """Few tokens of Wikitext and OpenWebText, for rates, training and loss; processes of their own see all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "LEAST_TOKENS", 50)
        patch.setattr(data, "RETAIN_TOKENS", 3000)
        patch.setattr(evaluation, "SCORED_TOKENS", 1000)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """family -> folder of a saved model with its tokenizer."""
    root = tmp_path_factory.mktemp("models")

    @lru_cache(None)
    def folder(family: str) -> Path:
        random_model(family, len(tokenizer)).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
        return root / family

    return folder


@pytest.fixture(scope="session")
def get_model(model_folder):
    return lru_cache(None)(lambda family, dtype="float32": common.load_model(str(model_folder(family)), "cpu", dtype))


@pytest.fixture(scope="session", params=FAMILIES)
def model(request, get_model):
    return get_model(request.param)


@pytest.fixture(scope="session", params=FAMILIES)
def half_model(request, get_model):
    return get_model(request.param, "bfloat16")


@pytest.fixture(scope="session")
def gemma(get_model):
    """For tests that have nothing to do with the model's family."""
    return get_model("gemma2")


@torch.no_grad()
def fill(sae, scale: float, seed: int) -> None:
    """Random weights for inputs of root mean square `scale`, so that a fifth to a half of the features fire."""
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=noise)

    lengths = 0.5 + torch.rand(sae.cfg.d_sae, 1, generator=noise)  # decoder norms that matter
    sae.W_enc.copy_(normal(sae.cfg.d_in, sae.cfg.d_sae) / sae.cfg.d_in**0.5)
    sae.W_dec.copy_(torch.nn.functional.normalize(normal(sae.cfg.d_sae, sae.cfg.d_in), dim=-1) * lengths)
    sae.b_dec.copy_(normal(sae.cfg.d_in) * 0.3 * scale)
    for name, mean in dict(b_enc=0.0, b_gate=-0.4, b_mag=0.1, threshold=0.5).items():
        if getattr(sae, name, None) is not None:
            jitter = 0.1 * normal(sae.cfg.d_sae)
            getattr(sae, name).copy_((mean + jitter) * scale)
    if hasattr(sae, "r_mag"):
        sae.r_mag.copy_(0.3 * normal(sae.cfg.d_sae))
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.5 * scale)


@torch.no_grad()
def write_sae(
    folder: Path,
    model_name: str,
    scale: float = 1.0,
    kind: str = "jumprelu",
    norm: str = "none",
    b_dec: bool = False,
    d_in: int = D_MODEL,
    d_sae: int = D_SAE,
    seed: int = 0,
    spoil=None,
    **metadata,
) -> Path:
    """Save an SAE of that kind with random weights. `spoil(sae)` may change it before it is written."""
    metadata = SAEMetadata(**{"hook_name": HOOK, "model_name": model_name, **metadata})
    options = dict(
        d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=b_dec, normalize_activations=norm, metadata=metadata
    )  # fmt: skip
    if kind == "standard":
        sae = StandardSAE(StandardSAEConfig(**options))
    elif kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**options))
    elif kind == "gated":
        sae = GatedSAE(GatedSAEConfig(**options))
    elif kind == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=12, **options))
    else:
        sae = TopKSAE(TopKSAEConfig(k=16, rescale_acts_by_decoder_norm=kind == "topk_rescaled", **options))
    fill(sae, scale if norm == "none" else 1.0, seed)
    if spoil:
        spoil(sae)
    (sae.save_inference_model if kind == "batchtopk" else sae.save_model)(folder)
    return folder


def residual(model, ids: torch.Tensor, layer: int = 1) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, stop_at_layer=layer + 1, use_cache=False).clone()


def some_ids(model, shape=(4, 24), seed: int = 0) -> torch.Tensor:
    """Random ordinary tokens with BOS in front and special tokens strewn in, one row also with a padded end."""
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.tokenizer.vocab_size, shape, generator=noise)
    ids[:, 0] = 2
    marker = model.tokenizer.convert_tokens_to_ids(MARKER)
    for row, token in enumerate([2, 1, 0, marker]):
        ids[row % len(ids), 3 + 2 * row] = token
    ids[0, -4:] = 0
    return ids


@pytest.fixture(scope="session")
def scale_of():
    """Root mean square of a model's residual stream at HOOK: SAE weights must suit it."""
    return lru_cache(None)(lambda model: residual(model, some_ids(model)).float().pow(2).mean().sqrt().item())


@pytest.fixture(scope="session")
def make_sae(tmp_path_factory, scale_of):
    """(model, kind, norm, ...) -> the folder of a saved SAE loaded with common.load_sae."""
    root = tmp_path_factory.mktemp("saes")

    @lru_cache(None)
    def make(model, kind="jumprelu", norm="none", layer=1, **options):
        folder = root / str(len(list(root.iterdir())))
        write_sae(folder, model.cfg.model_name, scale_of(model), kind, norm, **options)
        return common.load_sae(str(folder), layer, model)

    return make


@pytest.fixture(scope="session")
def sae(model, make_sae):
    return make_sae(model)


@pytest.fixture(scope="session")
def gemma_sae(gemma, make_sae):
    return make_sae(gemma)


def ordinary_mask(model, ids):
    special = [model.tokenizer.convert_tokens_to_ids(token) for token in (BOS, EOS, PAD, MARKER)]
    return ~torch.isin(ids, torch.tensor(special))


def dead_features(sae):
    sae.threshold[:8] = 1e9


def some_windows(model, seed=0):
    ids = some_ids(model, (9, 20), seed).tolist()
    return [row[: 5 + 2 * k] for k, row in enumerate(ids)]


QUESTIONS = [
    dict(question="Which of these is an organ?", choices=["the heart", "the moon", "the sea", "a stone"], answer=0),
    dict(question=" Where do rivers flow to? \n", choices=["up", "the sea and the deep", "A", "B"], answer=1),
    dict(question="What is it?", choices=["cat", "mat", "moon", "blood"], answer=3),
]


def hf(folder, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def nats_by_hand(model, ids, targets):
    """Summed next-token losses and number of targets of each row, from the logits in numpy."""
    with torch.no_grad():
        logits = model(ids).logits.numpy()[:, :-1]
    top = logits.max(-1, keepdims=True)
    log_probs = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    real = targets.numpy()[:, 1:]
    losses = -np.take_along_axis(log_probs, ids.numpy()[:, 1:, None], -1)[..., 0] * real
    return losses.sum(1), real.sum(1)


def target_mask(ids, tokenizer, starts):
    return ~torch.isin(ids, torch.tensor(special_ids(tokenizer))) & (torch.arange(ids.shape[1]) >= starts[:, None])


def listing(tmp_path, name, value) -> str:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(value))
    return str(path)


def lesson(script: str, **flags) -> dict:
    """The names that a lesson leaves behind, run as a command with these flags. Raises what it raises."""
    said = {"--" + name.replace("_", "-"): value for name, value in flags.items()}
    argv = [script, *(flag if value is True else f"{flag}={value}" for flag, value in said.items())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "excepthook", sys.excepthook)
        return runpy.run_path(str(ROOT / script), run_name="__main__")


def command(monkeypatch, script: str, *flags) -> int:
    """Exit code of the script's command line, run in this process."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, flags)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    return code_of(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"))


def code_of(run) -> int:
    """What a process would end with that does no more than run()."""
    try:
        try:
            run()
        except (Exception, KeyboardInterrupt) as error:
            sys.excepthook(type(error), error, error.__traceback__)
            return 1
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="session", autouse=True)
def without_twin():
    """To save time, only the tests that are about it score the retrained model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hub.PRESETS, "tiny", replace(hub.PRESETS["tiny"], retrained=None))
        yield


@pytest.fixture
def twin(without_twin, monkeypatch):
    """The model that was trained without the forget set, as tiny's preset names it."""
    monkeypatch.setitem(hub.PRESETS, "tiny", replace(hub.PRESETS["tiny"], retrained="tiny-retrained"))
    return common.load_model("tiny-retrained")


@pytest.fixture(scope="session")
def renamed(tmp_path_factory):
    """tiny's SAE of layer 3, under the other name of its hook point: what goes into layer 4."""
    folder = tmp_path_factory.mktemp("saes") / "renamed"
    shutil.copytree(TINY / "sae/layer_3", folder)
    config = json.loads((folder / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.4.hook_resid_pre"
    (folder / "cfg.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def wordy(model_folder, tmp_path_factory):
    """A GPT-2 whose tokenizer adds no BOS."""
    tokenizer, folder = train_tokenizer(), tmp_path_factory.mktemp("wordy") / "gpt2"
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    shutil.copytree(model_folder("gpt2"), folder)
    tokenizer.save_pretrained(folder)
    model = common.load_model(str(folder), "cpu")
    assert model.tokenizer("a")["input_ids"][0] != 2
    return model


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A stand-in of the hub, nothing in it, which this process asks, with a token and an empty cache."""
    with serving(tmp_path / "hub") as served:
        files = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        known = {"ENDPOINT": served.address, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache"),
                 "HUGGINGFACE_CO_URL_TEMPLATE": files}  # fmt: skip
        for name, value in known.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", "hf_of_someone")
        yield served
