"""The scripts with their real default ids against a stand-in hub on the loopback: real layouts, invented rows."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXTS, random_model, train_tokenizer
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file
from stand_in_hub import serving
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

import common
import edits
from data import CATEGORIES, special_ids

ROOT = Path(__file__).resolve().parent.parent
SAEBENCH = ["high_school_us_history", "college_computer_science", "high_school_geography", "human_aging"]
CHAT = """{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}
{{ message['content'] }}
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
QWEN_SPLIT = (  # of its tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_CHAT = """{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"""
WORDS = ["cat", "mat", "moon", "sea", "river", "heart", "organ", "stone"]


# ------------------------------------------------------------------------------------------- repositories


def qwen_tokenizer(eos: str) -> PreTrainedTokenizerFast:
    """Qwen's rules, added tokens and chat template, trained on a few texts: no BOS, and padding by <|endoftext|>."""
    core = Tokenizer(BPE())
    core.normalizer, core.decoder = normalizers.NFC(), decoders.ByteLevel()
    split, alphabet = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), pre_tokenizers.ByteLevel.alphabet()
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=410, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXTS * 3, trainer)
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    core.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, pad_token="<|endoftext|>")
    tokenizer.chat_template = QWEN_CHAT
    return tokenizer


def save_qwen(folder: Path, model, tokenizer: PreTrainedTokenizerFast) -> None:
    """With more rows than tokens, a BOS in config.json only, and the class that the real repositories name."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.config.bos_token_id, model.config.eos_token_id = pad, end
    model.generation_config = GenerationConfig(
        bos_token_id=pad, eos_token_id=[end, pad], pad_token_id=pad, do_sample=True, repetition_penalty=1.05, top_k=20
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "backend"}))


def write_qwen(root: Path) -> None:
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
                 max_position_embeddings=512, initializer_range=0.2)  # fmt: skip
    tokenizer = qwen_tokenizer("<|endoftext|>")
    rows = len(tokenizer) + 20
    base = Qwen3Config(vocab_size=rows, num_hidden_layers=4, head_dim=16, tie_word_embeddings=True, **sizes)
    save_qwen(root / "models/Qwen/Qwen3-1.7B-Base", Qwen3ForCausalLM(base), tokenizer)
    small = Qwen2Config(vocab_size=rows, num_hidden_layers=5, **sizes)
    save_qwen(root / "models/Qwen/Qwen2.5-7B-Instruct", Qwen2ForCausalLM(small), qwen_tokenizer("<|im_end|>"))


def of_images(text: dict) -> Gemma3ForConditionalGeneration:
    """Gemma-3 from 4B on: a language model inside a model of images."""
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                  patch_size=14)  # fmt: skip
    ids = dict(image_token_index=5, boi_token_index=6, eoi_token_index=7, eos_token_id=[1, 5], bos_token_id=2)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, pad_token_id=0, **ids)
    return Gemma3ForConditionalGeneration(config)


def write_models(root: Path) -> None:
    write_qwen(root)
    tokenizer = train_tokenizer()
    tokenizer.chat_template = CHAT
    names = {"google/gemma-3-1b-it": "gemma3", "google/gemma-3-270m-it": "gemma3", "openai-community/gpt2": "gpt2",
             "Qwen/Qwen3-0.6B": "qwen3"}  # fmt: skip
    models = {name: random_model(family, len(tokenizer)) for name, family in names.items()}
    # Gemma Scope's width is fixed in SAELens, so this one is as wide as the real one
    for name, width, layers in (("google/gemma-2-2b-it", 2304, 4), ("google/gemma-2-9b-it", 3584, 11)):
        models[name] = Gemma2ForCausalLM(Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=8,
            pad_token_id=0, eos_token_id=1, bos_token_id=2, max_position_embeddings=512,
        ))  # fmt: skip
    for size in ("12b", "27b"):
        models[f"google/gemma-3-{size}-it"] = of_images(models["google/gemma-3-1b-it"].config.to_dict())
    for name, model in models.items():
        folder, size = root / "models" / name, {"max_shard_size": "1MB"} if "gemma-2" in name else {}
        model.to(torch.bfloat16).save_pretrained(folder, **size)
        tokenizer.save_pretrained(folder)
        if isinstance(model, Gemma3ForConditionalGeneration):
            both = {"processor_class": "Gemma3Processor"}
            images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 28, "width": 28}} | both
            (folder / "preprocessor_config.json").write_text(json.dumps(images))
            (folder / "processor_config.json").write_text(json.dumps({"image_seq_length": 4} | both))
    assert (root / "models/google/gemma-2-2b-it/model.safetensors.index.json").is_file()


def mirror(d_in: int, d_sae: int) -> dict[str, torch.Tensor]:
    """Weights of a JumpReLU SAE that explains everything: a feature for each sign of each dimension, others dead."""
    eye = torch.eye(d_in)
    W_enc, W_dec = torch.zeros(d_in, d_sae), torch.zeros(d_sae, d_in)
    W_enc[:, : 2 * d_in], W_dec[: 2 * d_in] = torch.cat([eye, -eye], 1), torch.cat([eye, -eye], 0)
    threshold = torch.zeros(d_sae)
    threshold[2 * d_in :] = 1.0
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_in),
            "threshold": threshold}  # fmt: skip


def write_saes(root: Path) -> None:
    for path, width in (("2b-pt-res/layer_1/width_16k/average_l0_102", 2304),
                        ("9b-it-res/layer_9/width_16k/average_l0_88", 3584)):  # fmt: skip
        folder = root / f"models/google/gemma-scope-{path}"
        folder.mkdir(parents=True)
        weights = mirror(width, 16384)
        np.savez_compressed(folder / "params.npz", **{name: value.numpy() for name, value in weights.items()})

    for size in ("270m", "1b", "12b", "27b"):
        folder = root / f"models/google/gemma-scope-2-{size}-it/resid_post_all/layer_1_width_16k_l0_small"
        folder.mkdir(parents=True)
        save_file({name.lower(): value for name, value in mirror(32, 128).items()}, folder / "params.safetensors")
        config = {"architecture": "jump_relu", "model_name": f"google/gemma-3-{size}-it", "l0": 10, "width": 16384,
                  "hf_hook_point_in": "model.layers.1.output", "affine_connection": False, "type": "sae"}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))

    folder = root / "models/Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    folder.mkdir(parents=True)
    weights = mirror(32, 32768)
    weights = {"W_enc": weights["W_enc"].T, "W_dec": weights["W_dec"].T, "b_enc": weights["b_enc"],
               "b_dec": weights["b_dec"]}  # fmt: skip
    torch.save(weights, folder / "layer1.sae.pt")

    folder = root / "models/andyrdt/saes-qwen2.5-7b-instruct/resid_post_layer_3/trainer_1"
    folder.mkdir(parents=True)
    weights = mirror(32, 128)  # dictionary_learning's BatchTopKSAE has one threshold for all features
    weights = {"encoder.weight": weights["W_enc"].T, "decoder.weight": weights["W_dec"].T, "b_dec": weights["b_dec"],
               "encoder.bias": weights["b_enc"], "threshold": torch.tensor(1e-4), "k": torch.tensor(64)}  # fmt: skip
    torch.save(weights, folder / "ae.pt")
    trainer = {
        "trainer_class": "BatchTopKTrainer",
        "dict_class": "BatchTopKSAE",
        "activation_dim": 32,
        "dict_size": 128,
        "k": 64,
        "layer": 3,
        "lm_name": "Qwen/Qwen2.5-7B-Instruct",
        "submodule_name": "resid_post_layer_3",
    }
    config = {"trainer": trainer, "buffer": {"d_submodule": 32, "io": "out", "ctx_len": 1024}}
    (folder / "config.json").write_text(json.dumps(config))

    folder = root / "models/jbloom/GPT2-Small-SAEs-Reformatted/blocks.2.hook_resid_pre"
    folder.mkdir(parents=True)
    weights = mirror(32, 128)
    del weights["threshold"]
    save_file(weights, folder / "sae_weights.safetensors")
    save_file({"sparsity": torch.zeros(128)}, folder / "sparsity.safetensors")
    config = {"model_name": "gpt2-small", "hook_point": "blocks.2.hook_resid_pre", "hook_point_layer": 2, "d_in": 32,
              "d_sae": 128, "context_size": 128, "dataset_path": "Skylion007/openwebtext", "dtype": "torch.float32",
              "use_cached_activations": False, "b_dec_init_method": "mean", "prepend_bos": True}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))


def local_sae(folder: Path) -> Path:
    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post", model_name="Qwen3-0.6B")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=32, d_sae=128, apply_b_dec_to_input=False, metadata=metadata))
    sae.load_state_dict(mirror(32, 128))
    sae.save_model(folder)
    return folder


def question(number: int) -> dict:
    choices = [WORDS[(number + step) % 8] for step in range(4)]
    return {
        # long, as firing rates of a dozen questions are counted on 1,000 tokens or more
        "question": "The cat sat by the sea. " * 30 + f"Which of these {number} is the {choices[number % 4]}?",
        "choices": choices,
        "answer": number % 4,
    }


def write_datasets(root: Path) -> None:
    letters = ClassLabel(names=list("ABCD"))
    quiz = {"question": Value("string"), "choices": Sequence(Value("string")), "answer": letters}
    wmdp = Dataset.from_list([question(i) for i in range(24)], Features({"answer": letters, **quiz}))
    put(root, "cais/wmdp", "wmdp-bio", {"test": wmdp})
    plain = Features({**quiz, "answer": Value("int64")})
    for number, category in enumerate(CATEGORIES):
        rows = [question(i) for i in range(number, 24, 6)]
        put(root, "EleutherAI/wmdp_bio_robust_mcqa", category, {
            "robust": Dataset.from_list(rows, plain), "shortcut": Dataset.from_list(rows[:1], plain),
        })  # fmt: skip
    rows = Dataset.from_list([question(i) for i in range(0, 24, 2)], plain)
    put(root, "EleutherAI/wmdp_bio_cloze", "default", {"cloze_compatible": rows})
    rows = [{**question(i), "subject": SAEBENCH[i % 4]} for i in range(40)]
    mmlu = Dataset.from_list(rows, Features({"subject": Value("string"), **quiz}))
    put(root, "cais/mmlu", "all", {"test": mmlu.select(range(32)), "dev": mmlu.select(range(32, 40))})
    lines = [
        "",
        " = Rivers = \n",
        *(f" The {a} by the {b} is wide , and the {b} is deep . \n" for a in WORDS for b in WORDS),
    ]
    texts = Features({"text": Value("string")})
    put(
        root,
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        {"test": Dataset.from_list([{"text": x} for x in lines], texts)},
    )
    pages = [{"text": f"The {a} looked at the {b}. " * 6} for a in WORDS for b in WORDS[:4]]
    put(root, "Skylion007/openwebtext", "plain_text", {"train": Dataset.from_list(pages, texts)})
    put(root, "stas/openwebtext-10k", "plain_text", {"train": Dataset.from_list(pages[:20], texts)})


def put(root: Path, repo: str, config: str, parts: dict) -> None:
    """Parquet files and a card with the configurations, as the hub has them."""
    folder = root / "datasets" / repo
    (folder / config).mkdir(parents=True)
    for split, rows in parts.items():
        rows.to_parquet(folder / config / f"{split}-00000-of-00001.parquet")
    card = "---\nconfigs:\n"
    for one in sorted(path for path in folder.iterdir() if path.is_dir()):
        card += f"- config_name: {one.name}\n  data_files:\n"
        for path in sorted(one.iterdir()):
            split = path.name.split("-")[0]
            card += f"  - split: {split}\n    path: {one.name}/{split}-*\n"
    (folder / "README.md").write_text(card + "---\n")


# ------------------------------------------------------------------------------------------------ worker

WORKER = """
import contextlib, io, json, os, runpy, sys
sys.path.insert(0, {root!r})
from sae_lens.loading.pretrained_sae_loaders import QWEN_SCOPE_MODEL_INFO as widths
widths["Qwen3-1.7B-Base"] = ("Qwen/Qwen3-1.7B-Base", 32)  # 2048 in truth: every script would take minutes
for line in sys.stdin:
    argv, env = json.loads(line)
    os.environ.update(env)
    sys.argv, errors, printed, code = [{root!r} + "/" + argv[0], *argv[1:]], io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            try:
                sys.excepthook(type(error), error, error.__traceback__)
            except SystemExit as stop:
                code = stop.code
    print(json.dumps([code, printed.getvalue(), errors.getvalue()]), flush=True)
"""


class Worker:
    """A process that runs scripts one after another: imports take longer than these models."""

    def __init__(self, home: Path, address: str, **env):
        everything = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **env}
        command = [sys.executable, "-c", WORKER.format(root=str(ROOT))]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env=everything, cwd=home, **pipes)

    def __call__(self, *argv, **env) -> tuple[int, str, str]:
        """Exit code, standard output and error output of a script; env: variables that are set from then on."""
        self.process.stdin.write(json.dumps([[str(x) for x in argv], env]) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    write_models(root)
    write_saes(root)
    write_datasets(root)
    papers = [{"title": f"{a}", "text": f"The {a} in the {b} of the heart. " * 9} for a in WORDS for b in WORDS[:3]]
    put(root, "cais/wmdp-bio-forget-corpus", "default", {"train": Dataset.from_list(papers)})
    with serving(root) as served:
        served.gated.add("cais/wmdp-bio-forget-corpus")
        yield served


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home):
    worker = Worker(home, hub.address)
    yield worker
    worker.process.kill()


# ------------------------------------------------------------------------------------------------- tests

FAMILIES = {
    "gemma-2-2b-it": ["--model", "gemma-2-2b-it", "--layer", 1],
    "gemma-3-1b-it": ["--model", "gemma-3-1b-it", "--layer", 1],
    "gpt2": ["--model", "gpt2", "--layer", 2],
    "qwen3-1.7b-base": ["--model", "qwen3-1.7b-base", "--layer", 1],
    "qwen2.5-7b-instruct": ["--model", "qwen2.5-7b-instruct", "--layer", 3],
    "gemma-2-9b-it": ["--model", "gemma-2-9b-it", "--layer", 9],
    **{name: ["--model", name, "--layer", 1] for name in ("gemma-3-270m-it", "gemma-3-12b-it", "gemma-3-27b-it")},
    "qwen3": ["--model", "Qwen/Qwen3-0.6B", "--layer", 1, "--sae", "SAE"],
}
SCRIPTS = {
    "feature_ablate_1.py": ["--n-features", 4],
    "feature_ablate_2.py": ["--n-features", 4],
    "feature_ablate_3.py": ["--n-features", 4],
    "pareto.py": ["--n-features", 2, 4],
    "baselines.py": ["--method", "rmu", "--setting", "layer=1", "--steps", 2],
    "lm_eval_ablated.py": ["--n-features", 4, "--tasks", "wmdp_bio", "--unablated"],
}


def flags_of(family: str, script: str, tmp_path: Path) -> list:
    flags = FAMILIES[family] + SCRIPTS[script] + ["--limit", 8, "--out", tmp_path / "r.json"]
    if "SAE" in flags:
        at = flags.index("SAE")
        flags[at] = str(local_sae(tmp_path / "sae"))
    return flags


@pytest.fixture(scope="module")
def first_run(online, tmp_path_factory):
    """(family, script) -> what its first run printed, and its record."""

    @lru_cache(None)
    def run(family: str, script: str) -> tuple[str, dict]:
        folder = tmp_path_factory.mktemp("first")
        code, printed, errors = online(script, *flags_of(family, script, folder))
        assert code == 0, (script, errors[-2000:])
        return printed, json.loads((folder / "r.json").read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_script_runs_to_the_end(first_run, family):
    for script in SCRIPTS if family != "gemma-2-9b-it" else ["feature_ablate_2.py"]:  # 3,584 wide, so slow
        printed, record = first_run(family, script)
        assert record["rows"]["unablated"]["scores"]
        assert re.search(r"@[0-9a-f]{40}$", record["identity"]["model"])
        assert family == "qwen3" or all(re.search(r"@[0-9a-f]{40}:", sae["identity"]) for sae in record["saes"])
        assert record["saes"] or script == "baselines.py"
        assert "stand-in" not in printed


@pytest.mark.slow
def test_a_second_run_needs_no_network(first_run, hub, home, tmp_path):
    """Lesson 2 of each family, and each script of one: what is loaded depends on either, not on the two together."""
    runs = [(family, "feature_ablate_2.py") for family in FAMILIES]
    runs += [("gpt2", script) for script in SCRIPTS if script != "feature_ablate_2.py"]
    first = [first_run(*one)[1] for one in runs]
    web = first_run("gpt2", "feature_ablate_3.py")[1]["data"]["openwebtext"]  # its first documents are streamed once
    assert web["source"] == "Skylion007/openwebtext train"
    asked = len(hub.asked)
    offline = Worker(home, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    for (family, script), record in zip(runs, first):
        code, _, errors = offline(script, *flags_of(family, script, tmp_path))
        assert code == 0, (family, script, errors[-2000:])
        again = json.loads((tmp_path / "r.json").read_text())
        assert (again["rows"], again["data"]) == (record["rows"], record["data"])
        assert again["identity"]["model"] == record["identity"]["model"]
    offline.process.kill()
    assert len(hub.asked) == asked


def test_where_openwebtext_fails_its_sample_serves(hub, tmp_path):
    worker = Worker(tmp_path, hub.address)  # with a fresh cache
    hub.lost.add("Skylion007/openwebtext")
    code, _, errors = worker("feature_ablate_3.py", *flags_of("gemma-3-1b-it", "feature_ablate_3.py", tmp_path))
    hub.lost.clear()
    worker.process.kill()
    assert code == 0, errors[-2000:]
    assert "data: openwebtext is 20 rows of stas/openwebtext-10k train, as Skylion007/openwebtext failed: " in errors
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["data"]["openwebtext"]["source"] == "stas/openwebtext-10k train"


SETS = {"robust": ("EleutherAI/wmdp_bio_robust_mcqa", "35%", 24), "cloze": ("EleutherAI/wmdp_bio_cloze", "24%", 12)}


@pytest.mark.slow
def test_wmdp_bios_other_sets_by_flag_and_by_task_the_second_time_offline(online, home, tmp_path):
    offline = Worker(home, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    flags = flags_of("gemma-3-1b-it", "feature_ablate_2.py", tmp_path)
    by_task = [*FAMILIES["gemma-3-1b-it"], "--n-features", 4, "--pick-on", "all", "--unablated",
               "--out", tmp_path / "r.json",
               "--tasks", ",".join(f"sae_wmdp_bio_{which}" for which in (*SETS, "open"))]  # fmt: skip
    try:
        for worker in (online, offline):
            for which, (source, floor, _) in SETS.items():
                code, said, errors = worker("feature_ablate_2.py", *flags, "--wmdp", which)
                assert code == 0, errors[-2000:]
                record = json.loads((tmp_path / "r.json").read_text())
                found = record["data"]["wmdp_bio"]
                assert found["source"].startswith(source) and found["variant"] == record["settings"]["wmdp"] == which
                assert f"WMDP-Bio {which.capitalize()}" in said and f"about {floor}" in said
            code, said, errors = worker("lm_eval_ablated.py", *by_task)
            assert code == 0, errors[-2000:]
            record = json.loads((tmp_path / "r.json").read_text())
            row, about = record["rows"]["unablated"], record["data"]
            for which, (_, floor, n) in SETS.items():
                (answers,) = [letters for name, letters in row["answers"].items()
                              if which in about[name.rsplit("/", 1)[0]]["source"]]  # fmt: skip
                assert len(answers) == n and f"about {floor}" in said
            assert [score["n"] for name, score in row["scores"].items() if "_open/" in name] == [SETS["cloze"][2]]
    finally:
        offline.process.kill()


@pytest.mark.slow
def test_ones_own_forget_corpus_and_the_form_that_asks_for_it(online, hub, tmp_path):
    name = "cais/wmdp-bio-forget-corpus"
    flags = [*flags_of("gemma-3-1b-it", "feature_ablate_2.py", tmp_path), "--forget-corpus"]
    said = fails(online, *flags, name)
    assert f"cannot load the forget corpus {name}" in said and f"form at https://huggingface.co/datasets/{name}" in said
    hub.gated.discard(name)
    try:
        code, _, errors = online("feature_ablate_2.py", *flags, name)
    finally:
        hub.gated.add(name)
    assert code == 0, errors[-2000:]
    assert json.loads((tmp_path / "r.json").read_text())["data"]["forget_corpus"]["n_rows"] == 24
    rmu = flags_of("gemma-3-1b-it", "baselines.py", tmp_path)
    (tmp_path / "mine.jsonl").write_text('{"text": "The heart is an organ of the cat."}\n' * 9)
    code, _, errors = online("baselines.py", *rmu, "--forget-corpus", tmp_path / "mine.jsonl")
    assert code == 0, errors[-2000:]
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["data"]["forget_corpus"]["source"] == str(tmp_path / "mine.jsonl")


@pytest.mark.parametrize("style", ["chat", "saebench"])
def test_questions_in_the_models_own_chat_format(online, style, tmp_path):
    for script in ("feature_ablate_1.py", "feature_ablate_2.py"):
        code, _, errors = online(script, *flags_of("gemma-3-1b-it", script, tmp_path), "--prompt", style)
        assert code == 0, errors[-2000:]
        assert json.loads((tmp_path / "r.json").read_text())["settings"]["prompt"] == style


@pytest.mark.slow
def test_where_no_clamp_was_chosen_the_sweep_that_a_run_names_runs(online, tmp_path):
    few = ["--limit", 8, "--out", tmp_path / "r.json"]
    for model, layer in (("qwen2.5-7b-instruct", 3), ("gemma-2-2b-it", 1)):
        code, _, errors = online("feature_ablate_2.py", "--model", model, "--layer", layer, "--n-features", 3, *few)
        assert code == 0 and "otherwise than tokenizer.json" not in errors, errors[-2000:]
        notes = [line for line in errors.splitlines() if "no clamp was chosen" in line]
        assert len(notes) == (model != "gemma-2-2b-it")
        assert json.loads((tmp_path / "r.json").read_text())["settings"]["clamp"] == -100
        for note in notes:
            words = shlex.split(note.partition("python ")[2])
            code, _, errors = online(*words, *few)
            assert code == 0 and "no clamp was chosen" not in errors, errors[-2000:]
            rows = json.loads((tmp_path / "r.json").read_text())["rows"]
            assert {"layer 3, n_features 3, clamp -10", "layer 3, n_features 3, clamp -3000"} <= set(rows)


def test_chat_questions_of_qwen(online, tmp_path):
    """Its template writes a system turn of its own; the tokenizer has no BOS, and fewer tokens than the model rows."""
    flags = [*FAMILIES["qwen2.5-7b-instruct"], "--n-features", 4, "--limit", 8, "--out", tmp_path / "r.json"]
    code, _, errors = online("feature_ablate_2.py", *flags, "--prompt", "chat")
    assert code == 0, errors[-2000:]


def published_commands() -> list[list[str]]:
    """The commands of docs/real_models.md's table of published numbers; "the same with X" is X behind the last."""
    text, commands = (ROOT / "docs/real_models.md").read_text(), []
    for row in text[text.index("| command | published |") :].partition("\n\n")[0].splitlines()[2:]:
        words = shlex.split(re.search(r"`([^`]+)`", row.split(" | ")[0])[1])
        commands.append(commands[-1] + words if "the same with" in row.split(" | ")[0] else words)
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("words", published_commands(), ids=lambda words: " ".join(words)[:60])
def test_the_commands_of_published_numbers_run(online, words, tmp_path):
    """With the small stand-in for the model, its SAE and layer, a file for FILE, few questions and few steps."""
    p = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--model", "--layer", "--sae", "--subjects"):
        p.add_argument(name)
    given, rest = p.parse_known_args(words[1:])
    if given.sae:
        release, sae = given.sae.split(":")
        assert sae in get_pretrained_saes_directory()[release].saes_map and f"layer_{given.layer}/" in sae
    (tmp_path / "corpus.jsonl").write_text('{"text": "The heart is an organ of the cat."}\n' * 300)
    # the stand-in's SAE has no feature that is rare enough for SAEBench's threshold
    instead = {"FILE": str(tmp_path / "corpus.jsonl"), "retain-threshold": "any-ratio"}
    rest = [instead.get(word, word) for word in rest]
    rest += ["--subjects", "human_aging"] * bool(given.subjects)
    rest += ["--limit", "8", *(("--steps", "2") if words[0] == "baselines.py" else ("--n-features", "4"))]
    code, _, errors = online(words[0], *FAMILIES["gemma-3-1b-it"], *rest, "--out", tmp_path / "r.json")
    alright = "--robust" in words and "in all 24 orders" in errors  # a random model may get none right
    assert code == 0 or alright, errors[-2000:]


def fails(worker: Worker, *flags, **env) -> str:
    """The one line that a failing run says."""
    code, _, errors = worker("feature_ablate_2.py", *flags, **env)
    lines = [line for line in errors.splitlines() if line.strip()]
    assert code == 2 and "Traceback" not in errors, errors[-2000:]
    said = [line for line in lines if line.startswith("error: ")]
    assert len(said) == 1
    return said[0]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "model, SAE and data"])
def test_each_failure_has_one_line_and_leaves_the_cache_usable(hub, tmp_path, what):
    worker = Worker(tmp_path, hub.address)
    flags = ["--model", "gemma-3-1b-it", "--layer", 1, "--n-features", 4, "--limit", 8, "--out", tmp_path / "r.json"]
    try:
        hub.lost.add("google/gemma-3-1b-it")
        assert "google/gemma-3-1b-it" in fails(worker, *flags)
        hub.lost.clear()
        hub.gated.add("google/gemma-3-1b-it")
        for env in ({}, {"HF_TOKEN": "hf_of_someone"}):  # not logged in: 401; no access: 403
            said = fails(worker, *flags, **env)
            assert (
                "accept its licence at https://huggingface.co/google/gemma-3-1b-it" in said and "hf auth login" in said
            )
        hub.gated.clear()
        hub.broken.add("google/gemma-3-1b-it")
        assert "google/gemma-3-1b-it" in fails(worker, *flags)
        hub.broken.clear()
        if what == "model":
            return
        hub.gated.add("google/gemma-scope-2-1b-it")
        assert "gemma-scope-2-1b-it-res-all:layer_1_width_16k_l0_small" in fails(worker, *flags)
        hub.gated.clear()
        hub.gated.add("cais/wmdp")
        said = fails(worker, *flags)
        assert "cais/wmdp" in said and "a data folder with wmdp_bio.jsonl" in said
        hub.gated.clear()
        hub.broken.add("cais/mmlu")
        assert "cais/mmlu" in fails(worker, *flags)
        hub.broken.clear()
        code, _, errors = worker("feature_ablate_2.py", *flags)
        assert code == 0, errors[-2000:]
    finally:
        worker.process.kill()
        for some in (hub.lost, hub.gated, hub.broken):
            some.clear()
        hub.gated.add("cais/wmdp-bio-forget-corpus")


@pytest.mark.slow
def test_without_a_network_the_line_says_what_to_do(tmp_path):
    worker = Worker(tmp_path, "http://127.0.0.1:9")
    said = fails(worker, "--model", "gemma-3-1b-it", "--layer", 1, "--out", tmp_path / "r.json")
    assert "google/gemma-3-1b-it" in said and "the model tiny" in said
    worker.process.kill()


# ------------------------------------------------------------------------- Gemma Scope's own file format


@pytest.fixture(scope="module")
def gemma_scope(hub, tmp_path_factory):
    """The Gemma-2 stand-in, an SAE with random weights that was read from a params.npz, the file's arrays, some ids."""
    folder = hub.root / "models/google/gemma-2-2b-it"
    model = common.load_model(str(folder), "cpu")
    ids = torch.randint(3, model.cfg.d_vocab, (4, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[1, 9] = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id
    size = residual(model, ids).square().mean().sqrt().item()
    rng, (d_in, d_sae) = np.random.default_rng(0), (2304, 16384)
    weights = {"W_enc": rng.standard_normal((d_in, d_sae), np.float32) / d_in**0.5,
               "W_dec": rng.standard_normal((d_sae, d_in), np.float32) / d_in**0.5,
               "b_enc": 0.1 * size * rng.standard_normal(d_sae, np.float32),
               "b_dec": size * rng.standard_normal(d_in, np.float32),
               "threshold": size * (2.4 + 0.2 * rng.random(d_sae, np.float32))}  # fmt: skip
    table = get_pretrained_saes_directory()["gemma-scope-2b-pt-res-canonical"]
    path = tmp_path_factory.mktemp("scope") / table.saes_map["layer_2/width_16k/canonical"] / "params.npz"
    path.parent.mkdir(parents=True)
    np.savez(path, **weights)

    def from_disk(repo_id, filename, **options):
        assert repo_id == "google/gemma-scope-2b-pt-res" and str(path).endswith(filename)
        return str(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained_sae_loaders, "hf_hub_download", from_disk)
        sae = common.load_sae(None, 2, model, "gemma-2-2b-it")
    return model, sae, weights, ids


def residual(model, ids) -> torch.Tensor:
    seen = {}
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda h, hook: seen.update(h=h))]), torch.no_grad():
        model(ids, use_cache=False)
    return seen["h"]


def test_gemma_scope_encodes_by_its_own_formula(gemma_scope):
    model, sae, weights, ids = gemma_scope
    h = residual(model, ids)
    pre = h.double().numpy() @ weights["W_enc"] + weights["b_enc"]
    by_hand = np.maximum(pre, 0) * (pre > weights["threshold"])
    features = list(range(0, 16384, 7))
    found, scale = edits.Latents(sae, features).encode(h)
    assert (scale == 1).all() and 0.001 < (by_hand[..., features] > 0).mean() < 0.05
    assert abs(pre - weights["threshold"])[..., features].min() > 1e-7  # else rounding decides what fires
    np.testing.assert_allclose(found.numpy(), by_hand[..., features], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clamp", [0.0, -20.0])
def test_an_edit_with_gemma_scope_is_saelens_attached_sae_with_its_error_term(gemma_scope, hub, clamp):
    model, sae, _, ids = gemma_scope
    features = list(range(0, 16384, 50))
    with torch.inference_mode(), common.ablate(model, sae, features, clamp):
        ours = model(ids, use_cache=False)
    theirs = SAETransformerBridge.boot_transformers(str(hub.root / "models/google/gemma-2-2b-it"), device="cpu").eval()
    theirs.add_sae(sae, use_error_term=True)
    ordinary = ~torch.isin(ids, torch.tensor(special_ids(model.tokenizer)))[..., None]

    def edit(acts, hook):
        some = acts[..., features]
        acts[..., features] = torch.where((some > 0) & ordinary, clamp, some)
        return acts

    with torch.inference_mode():
        wanted = theirs.run_with_hooks(ids, fwd_hooks=[(theirs.get_sae_hook_name(sae), edit)], use_cache=False)
        clean = model(ids, use_cache=False)
    assert (wanted - clean).abs().max() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
