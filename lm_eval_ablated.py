# %% [markdown]
r"""
lm-eval with an edit in every forward pass: any of its tasks, any method, several layers, one or many GPUs.

    python lm_eval_ablated.py --layer 7 --n-features 50 --tasks tiny_wmdp_bio,tiny_mmlu --unablated
    python lm_eval_ablated.py --record results/feature_ablate_2_tiny_L7_n50_*.json --tasks tiny_openwebtext --unablated
    python lm_eval_ablated.py --record results/baselines_dsg_tiny_L7_*.json --unablated
    python lm_eval_ablated.py --method dsg --layer 3 --n-features 20 --clamp -10
    python lm_eval_ablated.py --tasks list
    accelerate launch --num_processes 8 lm_eval_ablated.py --model gemma-2-2b-it --layer 7 --n-features 50 \
        --tasks wmdp_bio,mmlu --unablated --batch_size auto
    python lm_eval_ablated.py --engine vllm --model gemma-2-2b-it --layer 7 --n-features 50 --tasks gsm8k --unablated
    python lm_eval_ablated.py --engine vllm --model gemma-2-2b-it --layer 7 --features 449,624 --serve 8000

Features are picked as in the lessons and clamped, or edited by another --method; or they are given with --features, as
ids of --layer's SAE or {layer: ids}, whose SAEs are the preset's or --sae with {layer} in the layer's place; or the
edit is a row of a --record, made again as it was. With --unablated the model is scored without the edit too and the two
are compared question by question, which lm-eval itself does not do. Questions of the half that features are picked on
are left out. Tasks are lm-eval's and those of lm_eval_tasks/; options with underscores are lm-eval's own.

With --engine vllm the model runs in vLLM with the edit inside: faster where answers are written, and on several GPUs
where one does not hold the model (requirements-vllm.txt; docs/real_models.md, "Which engine?"). --serve has vLLM answer
at an OpenAI-compatible address instead of scoring. In lm-eval's own command line the model of Hugging Face's engine is
called sae-ablated.
"""

# %% Flags come first: --help need not wait for the other imports
import runs

flags = runs.parser(__doc__, without=("--skip-long",))
flags.add_argument("--clamp", type=runs.finite_float, help="value that active features are set to, 0 or negative "
                   "(default: the preset's, else -100); of --features also a positive one")  # fmt: skip
group = flags.add_argument_group("edit")
group.add_argument("--record", metavar="FILE", help="take the edit of a row of this record, as it is")
group.add_argument("--row", help="which row (default: the one that the record calls chosen, else its clamp)")
group.add_argument("--method", help="dsg, mean-ablation, ... (default: clamp); of a record the row of that method")
group.add_argument("--setting", nargs="+", metavar="NAME=NUMBER", help="what else the method takes: of picked features "
                   "as in its grid (threshold=0.5 times the mean activation), of --features as it is")  # fmt: skip
group.add_argument("--refusal-latent", type=runs.natural_int, help="of refusal-clamp: active when the model declines")
group.add_argument("--refusal-value", type=runs.finite_float, default=-500.0, help="its value (default: %(default)s)")
add = flags.add_argument_group("engine").add_argument
add("--engine", choices=("hf", "vllm"), default="hf", help="what runs the model (default: %(default)s)")
add("--tensor-parallel-size", type=runs.positive_int, default=1, help="of vllm: GPUs that share each layer")
add("--pipeline-parallel-size", type=runs.positive_int, default=1, help="of vllm: groups of GPUs that share the layers")
add("--no-check", action="store_true", help="of vllm: do not compare it with Hugging Face's model first; with "
    "--features or --record that is not even loaded")  # fmt: skip
add("--serve", type=runs.positive_int, metavar="PORT", help="of vllm: answer OpenAI's clients there until Ctrl-C, in "
    "place of scoring")  # fmt: skip
add("--host", default="127.0.0.1", help="address to --serve at (default: %(default)s, which this machine alone sees)")
add = flags.add_argument_group("lm-eval").add_argument
add("--tasks", help="comma-separated, or list (default: wmdp_bio,sae_mmlu_saebench; of tiny, and with --data, "
    "tiny_wmdp_bio,tiny_mmlu)")  # fmt: skip
add("--unablated", action="store_true", help="score the model without the edit too, and compare")
add("--subjects", help="comma-separated: only the questions on these")
add("--samples", metavar="FILE", help="JSON {task: [indices of documents]}: ask only these")
add("--robust", action="store_true", help="ask only what the model gets right in all 24 orders of the options")
add("--batch_size", "--batch-size", type=lambda given: given if str(given).startswith("auto") else
    runs.positive_int(given), default=16, help="a number, auto or auto:N; vLLM has its own (default: 16)")  # fmt: skip
add("--num_fewshot", "--num-fewshot", type=runs.natural_int, help="examples in front (default: the task's)")
add("--apply_chat_template", "--apply-chat-template", nargs="?", const=True, default=False,
    help="wrap prompts, optionally by name", type=lambda given: given == "True" or given)  # fmt: skip
add("--system_instruction", "--system-instruction", help="text in front of every prompt")
add("--model_args", "--model-args", help="more arguments of lm-eval's hf, as parallelize=True,max_length=2048; of "
    "vLLM's engine with --engine vllm, as max_model_len=2048,gpu_memory_utilization=0.8")  # fmt: skip
add("--gen_kwargs", "--gen-kwargs", help="for tasks that generate, as max_gen_toks=20,temperature=0")
add("--include_path", "--include-path", help="folder with more task files")
add("--use_cache", "--use-cache", metavar="FOLDER", help="keep answers there; every edit has a cache of its own")
add("--output_path", "--output-path", metavar="FOLDER", help="lm-eval's own result files go there")
add("--log_samples", "--log-samples", action="store_true", help="and its per-question log, with --output_path")
runs.help_before_imports(flags, __name__)

# %%
import copy
import gc
import hashlib
import inspect
import itertools
import json
import math
import os
import random
import socket
import sys
import tempfile
from dataclasses import replace
from functools import partial, partialmethod
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from accelerate.utils import gather_object
from lm_eval import simple_evaluate
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import model_registry, register_model
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table, simple_parse_args_string
from transformers import AutoConfig, AutoModelForCausalLM

import data
import hub
import show
import vllm_edit
from common import bare_generation, load_sae, usable_device
from data import HERE, LETTERS, Dataset, UserError
from edits import METHODS, NONE, Edit, applied, decoder_layers, final_norm, from_grid, label, layer_of, make, together
from evaluation import FeatureStats, Measure, check_sae_quality, measure_of

TASKS = HERE / "lm_eval_tasks"
TINY_TASKS, HUB_TASKS = "tiny_wmdp_bio,tiny_mmlu", "wmdp_bio,sae_mmlu_saebench"
QUIZ = {"question", "choices", "answer"}  # what documents of wmdp's and mmlu's form have
# {task: what records call its data; of a quiz that the lessons ask also the preset and variant that it is loaded by}
DATA_SETS = {"tiny_wmdp_bio": ("wmdp_bio", "tiny", "all"), "tiny_mmlu": ("mmlu", "tiny", "all"),
             "tiny_wmdp_bio_cloze": ("wmdp_bio", "tiny", "cloze"), "sae_wmdp_bio_cloze": ("wmdp_bio", "hub", "cloze"),
             "sae_wmdp_bio_robust": ("wmdp_bio", "hub", "robust"), "sae_mmlu_saebench": ("mmlu",),
             "tiny_openwebtext": ("openwebtext",), "sae_openwebtext": ("openwebtext",)}  # fmt: skip


# %% lm-eval's model with an edit
class Checked:
    """What lm-eval's models of both engines lack: prompts as they were meant, or a UserError; caches that know whose
    answers they hold. self.identity, self.arguments: what the answers come from; self.computed: how (attention, dtype);
    self.positions: how many the model has, None if it does not say."""

    def set_edit(self, edit: Edit, saes=()) -> None:
        self.edit, self.saes = edit, saes

    def fingerprint(self) -> str:
        """Hash of what decides the answers: what model, adapter and SAEs are (hub.identity), arguments, the edit."""
        decides = [self.identity, self.arguments, *self.computed]
        if self.edit.at:
            saes = [sae.identity for sae in self.saes]
            decides += [self.edit.method, self.edit.settings, saes, self.tokenizer.edit_special]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def set_cache_hook(self, cache_hook) -> None:
        """lm-eval's cache knows a request, not the model that answered it: another model's cache is refused."""
        known, mine = cache_hook.dbdict, self.fingerprint()
        if len(known) and known.get("sae-ablated") != mine:
            raise UserError("these cached answers are another model's or another edit's: give another cache")
        known["sae-ablated"] = mine
        super().set_cache_hook(cache_hook)

    def check_requests(self, requests: list) -> None:
        """requests: lm-eval's, ((text, answer), context ids, answer ids)."""
        # rolling requests have no key: lm-eval cuts their windows itself, the first with two BOS tokens
        asked = [(key, context, answer) for key, context, answer in requests if key is not None]
        data.check_ends(self.tokenizer, [context for _, context, _ in asked])
        for (text, _), context, answer in asked:
            data.known(self.tokenizer, [*context, *answer])
            data.refuse_thought(text)
            self.refuse_long(text, len(context) + len(answer) - 1)

    def chat_template(self, chat_template=False):
        if isinstance(chat_template, str) and isinstance(self.tokenizer.chat_template, dict):
            # lm-eval looks the name up, and then has the default template written
            self.chat_template_args = {**self.chat_template_args, "chat_template": chat_template}
        return str(self.tokenizer.chat_template)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        write = partial(data.as_chat, self.tokenizer, begun=not add_generation_prompt, **self.chat_template_args)
        try:
            return write(chat_history)
        except UserError:
            if chat_history[0]["role"] != "system":
                raise
        text = write(chat_history[1:])
        data.note_once(f"the chat template takes no system turn: {chat_history[0]['content'][:60]!r} ... is left out")
        return text

    def refuse_long(self, text: str, length: int, most: int | None = None) -> None:
        """lm-eval would cut a prompt's beginning off, or ask the model about positions that it does not have."""
        most = most or min(self.max_length, self.positions or self.max_length)
        if length > most:
            raise UserError(f"the prompt {text[:60]!r} ... has {length} tokens, and there is room for {most}: leave it "
                            "out with --samples, or ask with fewer examples")  # fmt: skip


def identities(path: str, given: dict) -> dict[str, str]:
    """hub.identity of the model and of what else is loaded by `hf`'s arguments."""
    loaded = {name: given[name] for name in ("peft", "delta", "tokenizer") if isinstance(given.get(name), str)}
    return {name: hub.identity(source) for name, source in {"model": path, **loaded}.items()}


class AblatedLM(Checked, HFLM):
    """lm-eval's `hf`, with all of its arguments, and an edit that is on in every forward pass.

    pretrained: preset, hub id or folder. edit_special: see edits.token_mask. Raises UserError for logits that are not
    finite, for a prompt too long for the model's positions, and as data.as_chat, check_ends and refuse_thought do.
    """

    def __init__(self, pretrained: str, device: str | None = None, edit_special: str = "never", **kwargs):
        path = hub.resolve_model(pretrained)
        data.forget_ranks()
        super().__init__(path, device=usable_device(device), **kwargs)  # lm-eval takes cuda even without one
        if hasattr(self, "accelerator"):  # lm-eval knows of several processes on GPUs only, and of one machine
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.tokenizer.edit_special = edit_special
        self.tokenizer.n_embeddings = len(self.model.get_input_embeddings().weight)
        # what the answers come from: content or commit of all that was loaded, and all arguments that may matter
        where = str(Path(path, kwargs.get("subfolder") or "")) if Path(path).is_dir() else path
        self.identity = identities(where, kwargs)
        if "revision" in kwargs:
            self.identity["revision"] = f"{kwargs['revision']}@{getattr(self.model.config, '_commit_hash', None)}"
        self.arguments = {name: str(kwargs[name]) for name in sorted(kwargs) if "batch_size" not in name}
        self.computed = self.model.config._attn_implementation, str(self.model.dtype)
        self.positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.model.generation_config = bare_generation(self.model)
        data.check_ends(self.tokenizer, [self.tok_encode("A")])
        self.model.get_output_embeddings().register_forward_hook(self.refuse_not_finite)
        self.set_edit(NONE)

    def _create_tokenizer(self, pretrained, tokenizer, **more):
        super()._create_tokenizer(pretrained, tokenizer, **more)
        self.tokenizer = hub.as_its_file(self.tokenizer, tokenizer or pretrained, more["revision"], more["subfolder"])
        if (self.tokenizer.pad_token_id or 0) >= self.config.get_text_config().vocab_size:
            self.tokenizer.pad_token = None  # as in hub.load_tokenizer; lm-eval takes another one

    def _create_model(self, *args, **kwargs):
        loader = SimpleNamespace(from_pretrained=partial(hub.load_weights, self.AUTO_MODEL_CLASS))
        path, adapter = kwargs["pretrained"], kwargs.get("peft")
        with (data.in_a_line(f"cannot load {adapter or path}", hub.gated_hint(path)),
              patch.object(self, "AUTO_MODEL_CLASS", loader)):  # fmt: skip
            super()._create_model(*args, **kwargs)
        if adapter:  # read once more, as peft only now says what it found
            found = self.model.load_adapter(adapter, "default", revision=kwargs["revision"])
            hub.refuse_keys(adapter, found.missing_keys, (), found.unexpected_keys)

    def refuse_not_finite(self, module, args, logits):
        """A hook on the unembedding: an argmax over NaN would be an answer like any other, and go into the caches."""
        if logits.numel() and not all(torch.isfinite(end) for end in logits.aminmax()):
            how = f"under {self.edit.method}" if self.edit.at else "as it is"
            raise UserError(f"{self.pretrained} {how} has logits that are not finite (NaN or infinity): look for such "
                            "values in its weights, its adapter and its SAE, or take another dtype")  # fmt: skip

    def _model_call(self, *args, **kwargs):
        with applied(self.model, self.tokenizer, self.edit):
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args, **kwargs):
        if self.edit.needs_whole_prompt:
            raise UserError(f"{self.edit.method} looks at a whole prompt before it edits, so no answer can be written "
                            "under it: leave out tasks that generate")  # fmt: skip
        with applied(self.model, self.tokenizer, self.edit):
            return super()._model_generate(*args, **kwargs)

    def _loglikelihood_tokens(self, requests, **kwargs):
        self.check_requests(requests)
        # lm-eval pads with token 0, which a share of tokens must not count
        alone = self.edit.needs_whole_prompt and data.pad_id(self.tokenizer) != 0
        with patch.object(self, "batch_size_per_gpu", 1 if alone else self.batch_size_per_gpu):
            return super()._loglikelihood_tokens(requests, **kwargs)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        data.check_ends(self.tokenizer, [row[real > 0].tolist() for row, real in zip(ids, mask)])
        data.known(self.tokenizer, ids.flatten().tolist())
        if left_truncate_len:  # what is left of the context when all new tokens are written
            self.refuse_long(max(strings, key=len), ids.shape[1], left_truncate_len)
        return ids, mask


class CommandLineLM(AblatedLM):
    """AblatedLM as lm-eval's own command line makes it. sae, layer, features, record, row, method: as this script's
    flags; clamp (default: 0, zero ablation), threshold, gate, ...: what the method takes; all else: as `hf` has it."""

    def __init__(self, pretrained: str, sae=None, layer=7, features=None, record=None, row=None, method=None, **kwargs):
        taken = inspect.signature(METHODS[method or "clamp"].edit).parameters
        numbers = {name: kwargs.pop(name) for name in {*taken} & {*kwargs}}
        if kwargs.get("device") == "cuda:0" and not torch.cuda.is_available():
            del kwargs["device"]  # lm-eval's default, by which `hf` means the CPU there
        if record:
            record = runs.read_record(record)
            kwargs.setdefault("edit_special", record["settings"].get("edit_special", "never"))
        super().__init__(pretrained, **kwargs)
        if record:
            self.set_edit(*edit_of_row(self, record, chosen_row(record, row, method), sae, pretrained))
        else:
            features = data.by_layer(runs.own_features(str(features)), layer)
            self.set_edit(*edit_of_features(self, features, method, sae, pretrained, numbers))


if "sae-ablated" not in model_registry:  # lm-eval refuses a name twice, but a notebook's cell is run again
    register_model("sae-ablated")(CommandLineLM)


class Shared:
    """Shares requests out over the processes; every process gets all answers, in order. self.inner: the model, or a
    cache in front of it. lm-eval itself shares out documents, and fails for very few."""

    def share(self, name: str, requests: list) -> list:
        contexts = [request.args[0] or str(request.args) for request in requests]  # a question's letters share one
        chosen = set(data.own_share(list(dict.fromkeys(contexts))))
        shard = [i for i, context in enumerate(contexts) if context in chosen]
        answers = getattr(self.inner, name)([requests[i] for i in shard]) if shard else []
        answers = dict(gather_object(list(zip(shard, answers))))
        return [answers[i] for i in range(len(requests))]

    loglikelihood = partialmethod(share, "loglikelihood")
    loglikelihood_rolling = partialmethod(share, "loglikelihood_rolling")
    generate_until = partialmethod(share, "generate_until")


def shared(lm: Checked, inner):
    """A view of lm-eval's model that is `Shared`."""
    view = object.__new__(type("Shared", (Shared, type(lm)), {}))
    vars(view).update(vars(lm), inner=inner)
    return view


def model_args(args) -> dict:
    """--model_args by name, with underscores. Raises UserError for code from a repository."""
    given = {name.replace("-", "_"): value for name, value in simple_parse_args_string(args.model_args).items()}
    if given.get("trust_remote_code"):
        raise UserError("--model_args trust_remote_code=True: code from a repository is never run here")
    return given


def hf_args(args) -> dict:
    """Those of `hf`; of vLLM's the ones that decide which model is meant, by `hf`'s names."""
    names = {"revision": "revision", "tokenizer": "tokenizer", "lora_local_path": "peft"}
    given = model_args(args)
    return given if args.engine == "hf" else {names[name]: given[name] for name in names if name in given}


def load_ablated(args) -> AblatedLM:
    """The model, without an edit; UserError if it cannot be loaded. `Shared` alone knows of other processes."""
    more = {"attn_implementation": "eager", **hf_args(args)}  # eager as in TransformerLens
    if args.device_map and (args.device or data.n_processes() > 1):
        raise UserError("--device-map spreads one model over the GPUs: leave out --device and accelerate launch")
    if args.device_map and torch.cuda.is_available():
        more |= {"parallelize": True, "device_map": args.device_map}
    path, dtype = hub.resolve_model(args.model), args.dtype or hub.preset(args.model).dtype
    with data.in_a_line(f"cannot load {path}", hub.gated_hint(path)):
        lm = AblatedLM(args.model, device=args.device, dtype=dtype, edit_special=args.edit_special, **more,
                       batch_size=args.batch_size)  # fmt: skip
    hub.refuse_not_finite(path, lm.model.named_parameters())
    lm._rank, lm._world_size = 0, 1
    return lm


# %% The same model in vLLM
ANY = ("The cell is the smallest unit of life, and bacteria are single cells.", "Question: What is the capital of "
       "France?\nAnswer:", "Once upon a time there was a ship that sailed around the world.")  # fmt: skip


def first_prompts(lm, tasks: dict, chosen: dict, most: int, n: int = 16) -> list[list[int]]:
    """The first n questions of the tasks as ids, without what may stand in front of them, `most` tokens of each; of a
    task that has no text for all of a document's options, what the document says; without tasks ANY."""
    docs = ((part, part.eval_docs[i]) for _, parts in tasks.values() for part in parts
            for i in chosen.get(part.task_name, ()))  # fmt: skip
    texts = (text if isinstance(text := part.doc_to_text(doc), str) and text else
             " ".join(value for value in doc.values() if isinstance(value, str)) for part, doc in docs)  # fmt: skip
    rows = (lm.tokenizer(text)["input_ids"][:most] for text in texts)
    return list(itertools.islice((row for row in rows if len(row) > 1), n)) or [
        lm.tokenizer(text)["input_ids"] for text in ANY]  # fmt: skip


def outline(args) -> SimpleNamespace:
    """As much of `load_ablated`'s model as can be had without its weights, which may not fit here."""
    path, given = hub.resolve_model(args.model), hf_args(args)
    if "revision" in given:
        raise UserError("--model_args revision: leave --no-check out, or give a folder with that revision")
    if Path(path).is_dir():  # what else is wrong with the weights, vLLM has to see
        hub.refuse_two_models(Path(path))
        hub.refuse_damaged(path)
        if (Path(path) / "adapter_config.json").is_file():
            raise UserError(
                f"{path} holds an adapter: give its base as the model, it as lora_local_path in --model_args"
            )
    with data.in_a_line(f"cannot load {path}", hub.gated_hint(path)), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    tokenizer = hub.load_tokenizer(given.get("tokenizer", path), args.edit_special)
    return SimpleNamespace(pretrained=path, model=model, tokenizer=tokenizer, identity=identities(path, given),
                           device=torch.device("meta"))  # fmt: skip


def vllm_options(args) -> dict:
    """What vLLM is started with, by its own names. Raises UserError where it is not installed, or cannot be meant."""
    if not find_spec("vllm"):
        raise UserError("--engine vllm: vLLM is not installed here; how to make an environment with it (CUDA: "
                        "requirements-vllm.txt): docs/real_models.md, Which engine?")  # fmt: skip
    if data.n_processes() > 1 or args.device_map:
        raise UserError("--engine vllm starts its own processes: leave out accelerate launch and --device-map, give "
                        "--tensor-parallel-size or --pipeline-parallel-size")  # fmt: skip
    if args.serve:  # before what takes long
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        with data.in_a_line(f"cannot serve at {args.host}:{args.serve}"):
            socket.create_server((args.host, args.serve), family=family).close()
    # other processes are spawned, as a fork of one that has used threads may hang; nothing is reported to anybody, and
    # no development endpoint is open to others
    os.environ |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "0",
                   "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(bool(args.serve)))}  # fmt: skip
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    given = model_args(args)
    if clash := {*given} & {*vllm_edit.ENGINE}:
        raise UserError(f"--model_args {clash.pop()}: an edit needs vLLM's to be as it is set here")
    sizes = {name: vars(args)[name] for name in ("tensor_parallel_size", "pipeline_parallel_size")}
    dtype = args.dtype or hub.preset(args.model).dtype
    return {"dtype": dtype, **sizes, **vllm_edit.ENGINE, **given}


def in_vllm(path: str, tokenizer, identity: dict, options: dict) -> Checked:
    """lm-eval's vllm, checked as AblatedLM is. tokenizer, identity: of `load_ablated`'s model, or `outline`'s."""
    import vllm

    # lm-eval asks for the version of the package vllm; the one for CPUs has another name
    with patch("importlib.metadata.version", lambda name: vllm.__version__ if name == "vllm" else version(name)):
        from lm_eval.models.vllm_causallms import VLLM
    from vllm import SamplingParams

    class AblatedVLLM(Checked, VLLM):
        def __init__(self):
            hook = sys.excepthook
            try:
                with vllm_edit.first_error(f"vLLM cannot load {path}"):
                    super().__init__(path, batch_size="auto", **options)
            finally:  # torch.distributed's hook would lose our line; a launcher's variable stands for no launcher here
                sys.excepthook = hook
                os.environ.pop("LOCAL_WORLD_SIZE", None)
            self.tokenizer, self.identity = tokenizer, identity
            self.arguments = {name: str(value) for name, value in sorted(options.items())}
            self.computed = f"vllm {vllm.__version__}", options["dtype"]
            self.positions = self.max_length - 2  # of a longer prompt lm-eval's vllm would cut the beginning off
            thinking, self.enable_thinking = self.enable_thinking, None
            self.chat_template_args |= {} if thinking is None else {"enable_thinking": thinking}
            self.set_edit(NONE)

        def set_edit(self, edit: Edit, saes=()) -> None:
            super().set_edit(edit, saes)
            with tempfile.TemporaryDirectory() as folder:
                text = vllm_edit.write(edit, saes, self.tokenizer, Path(folder))
                vllm_edit.check_installed(self.call("install_edit", text), edit)

        def call(self, name: str, *args):
            with vllm_edit.first_error():
                return self.model.collective_rpc(name, args=args)

        def tried(self, text: str, prompts: list[list[int]]) -> tuple:
            """For vllm_edit.judged, of one of vllm_edit.tries."""
            installed = self.call("install_edit", text)
            with vllm_edit.first_error():
                outputs = self.model.generate(*vllm_edit.to_read(prompts), use_tqdm=False)
            return installed, outputs, self.call("edit_counts")

        def _model_generate(self, *args, **kwargs):
            bar = "auto" if not os.environ.get("TQDM_DISABLE") else 1  # by which lm-eval's vllm shows one
            with vllm_edit.first_error(), patch.object(self, "batch_size", bar):
                outputs = super()._model_generate(*args, **kwargs)
            vllm_edit.check_counts(self.call("edit_counts"), self.edit, none_will_do=True)  # before they are cached
            return outputs

        def modify_gen_kwargs(self, asked, eos=None, default_max_gen_toks=256):
            """As `hf` writes: greedily unless sampling is asked for, and without special tokens in the text; so one in
            `until` ends the answer as a token."""
            kwargs, until, most = super().modify_gen_kwargs(asked, eos, default_max_gen_toks)
            if not normalize_gen_kwargs(asked)["do_sample"]:
                kwargs["temperature"] = 0.0
            ends = [i for i in data.special_ids(tokenizer) if tokenizer.decode([i]) in until]
            return kwargs | {"skip_special_tokens": True, "stop_token_ids": ends}, until, most

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            if any(len(self.tok_encode(request.args[0])) > self.positions for request in requests):
                data.note_once(f"note: texts are cut into windows of {self.positions} tokens, two fewer than by the "
                               "other engine: lm-eval's vllm has it so")  # fmt: skip
            return super().loglikelihood_rolling(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests, disable_tqdm=False):
            """Answers of one token to one question, as letters are, are read off one prompt."""
            self.check_requests(requests)
            questions = {}
            for i, (_, context, answer) in enumerate(requests):
                questions.setdefault(tuple(context) if len(answer) == 1 else i, []).append(i)
            one = {question: where for question, where in questions.items() if 1 < len(where) <= 100}
            rest = [i for question, where in questions.items() if question not in one for i in where]
            answers = super()._loglikelihood_tokens([requests[i] for i in rest], disable_tqdm) if rest else []
            answers = dict(zip(rest, answers))
            tokens = {question: sorted({requests[i][2][0] for i in where}) for question, where in one.items()}
            how = [SamplingParams(temperature=0, max_tokens=1, detokenize=False, logprob_token_ids=ids)
                   for ids in tokens.values()]  # fmt: skip
            outputs = self._model_generate([list(question) for question in one], True, how) if one else []
            for where, output in zip(one.values(), outputs):
                (likeliest,), (found,) = output.outputs[0].token_ids, output.outputs[0].logprobs
                for i in where:
                    key, _, (token,) = requests[i]
                    answers[i] = found[token].logprob, likeliest == token
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answers[i])
            if not all(math.isfinite(value) for value, _ in answers.values()):
                raise UserError(f"{path} in vLLM has log-probabilities that are not finite (NaN or infinity)")
            return [answers[i] for i in range(len(requests))]

        def generate_until(self, requests, disable_tqdm=False):
            for text, asked in (request.args for request in requests):
                ids, most = self.tok_encode(text), self.modify_gen_kwargs(asked, None, self.max_gen_toks)[2]
                data.check_ends(self.tokenizer, [ids])
                self.refuse_long(text, len(data.known(self.tokenizer, ids)), self.max_length - most)
            with vllm_edit.first_error():
                return super().generate_until(requests, disable_tqdm)

    return AblatedVLLM()


# %% The edit: of features from a file, of a record's row, or of features picked here
class BridgeView:
    """lm-eval's model with as much of a TransformerBridge as SAEs are loaded, checked, picked and measured with."""

    def __init__(self, lm: AblatedLM):
        config, layers = lm.model.config.get_text_config(), decoder_layers(lm.model)
        self.original_model, self.tokenizer, self.blocks = lm.model, lm.tokenizer, layers
        self.cfg = SimpleNamespace(n_layers=len(layers), d_model=config.hidden_size, d_vocab=config.vocab_size,
                                   model_name=lm.pretrained, device=lm.device)  # fmt: skip
        self.hook_dict = {f"blocks.{i}.hook_resid_post": layer for i, layer in enumerate(layers)}
        self.unembed = lm.model.get_output_embeddings()

    ln_final = property(lambda self: final_norm(self.original_model))

    def __call__(self, *inputs, **options):
        return self.original_model(*inputs, **options)


def read_json(path: str):
    with data.in_a_line(f"cannot read {path}"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def edit_of_features(lm, features: dict[int, list[int]], method: str | None, sae: str | None, model: str, numbers):
    """(Edit, its SAEs): the method, or a clamp, of features, {layer: ids}. numbers: {name: number} of the method, as
    {"clamp": -40}; sae: RELEASE:ID or folder, with {layer} in the layer's place. Raises UserError for features that an
    SAE lacks, and as load_sae and make do."""
    method = method or ("clamp" if numbers.get("clamp") else "zero-ablation")
    saes, parts = [], []
    for layer, ids in features.items():
        saes.append(load_sae(sae and sae.replace("{layer}", str(layer)), layer, BridgeView(lm), model))
        with data.in_a_line(f"layer {layer}"):
            parts.append(make(method, saes[-1], features=ids, **numbers))
    return parts[0] if len(parts) == 1 else together(*parts), saes


def chosen_row(record: dict, row: str | None = None, method: str | None = None) -> str:
    """Which row's edit is meant: `row`; else the record's "chosen" one, if it is of the method; else the only one of
    the method (None: the only clamp, or the only edit). Raises UserError for none or several."""
    rows = {name: entry["method"] for name, entry in record["rows"].items()
            if entry["method"] in METHODS or entry["method"] == "together"}  # fmt: skip
    chosen = record.get("chosen")
    row = row or (chosen if method in (None, rows.get(chosen)) else None)
    left = [name for name, of in rows.items() if (name == row if row else of == (method or "clamp"))]
    left = left or ([] if row or method else list(rows))
    if len(left) != 1:
        raise UserError(f"{record['script']}'s record has {len(left) or 'no'} such edits; name one with --row: "
                        f"{'; '.join(rows) or 'it has none, a trained model is scored with --model'}")  # fmt: skip
    return left[0]


def edit_of_row(lm: AblatedLM, record: dict, row: str, sae: str | None, model: str):
    """(Edit, its SAEs): that row's edit, made again. sae: where its SAE is now. Raises UserError for others."""
    entry = record["rows"][row]
    if record["identity"]["model"] != lm.identity["model"]:
        raise UserError(f"the record is of {record['model']} as it was then, not of what {model} holds now")
    parts = entry["settings"]["edits"] if entry["method"] == "together" else [entry]
    layers = {layer for part in parts if METHODS[part["method"]].needs_sae for layer in part["settings"]["layers"]}
    saes = {}
    for known in record["saes"]:
        if int(known["hook_point"].split(".")[1]) in layers:
            source = sae.replace("{layer}", str(known["layer"])) if sae else known["source"]
            source = str(HERE / source) if (HERE / source).is_dir() else source
            loaded = load_sae(source, known["layer"], BridgeView(lm), model)
            if loaded.identity != known["identity"]:
                raise UserError(f"the record is of another SAE than {source} holds now")
            saes[layer_of(loaded)] = loaded
    return make(entry["method"], saes or None, **entry["settings"]), list(saes.values())


def picked(lm: AblatedLM, args, clamp: float, numbers: dict):
    """(Edit, its SAEs, {layer: what the SAE check found}, data sets): features picked as in the lessons, for a clamp or
    for a point of --method's grid, as baselines.py has it. numbers: of that point."""
    method = args.method or ("clamp" if clamp else "zero-ablation")
    if METHODS[method].resolve is None:
        raise UserError(f"--method {method}: no features are picked for it; give --features or --record")
    takes = set(inspect.signature(METHODS[method].resolve).parameters) - {"stats"}
    n_features = args.n_features or hub.preset(args.model).n_features
    setting = {name: n_features for name in takes & {"n_features"}} | numbers
    if strange := set(setting) - takes:
        raise UserError(f"--setting {min(strange)}: {method} takes {', '.join(sorted(takes))}")
    halves = {"seed": args.seed, "pick_on": args.pick_on, "topic": args.topic}
    wmdp, mmlu = (data.load(name, args.model, args.data, **halves).tuning for name in ("wmdp_bio", "mmlu"))
    wikitext, mmlu_dev = (data.load(name, args.model, args.data) for name in ("wikitext", "mmlu_dev"))
    corpus, view = data.load_corpus(args.forget_corpus, args.model, args.data), BridgeView(lm)
    forget, retain = data.picking_texts(wmdp, corpus, wikitext, mmlu_dev, args.pick_text)
    sae = load_sae(args.sae, args.layer, view, args.model) if METHODS[method].needs_sae else None
    stats = FeatureStats(
        view, sae, args.layer, *data.picking_windows(lm.tokenizer, forget, retain, args.context), rule=args.pick,
        questions=wmdp, utility=data.utility_subset(mmlu, but=wmdp.topic), seed=args.seed,
        batch_size=args.batch_size if isinstance(args.batch_size, int) else 16,
        insist=not args.no_sanity, clamp=clamp, refusal_latent=args.refusal_latent, refusal_value=args.refusal_value,
    )  # fmt: skip
    edit, datasets = from_grid(method, setting, stats), [wmdp, *filter(len, (wikitext, mmlu_dev, corpus))]
    if sae is None:
        return edit, [], {}, datasets
    features = edit.settings["features"]
    show.print_features(stats, features)
    return edit, [sae], {layer_of(sae): stats.quality}, datasets


# %% Tasks, and which of their questions are asked
def find_tasks(names: list[str], include_path: str | None = None, folder=None, topic=None) -> dict[str, tuple]:
    """{name: (what lm-eval loads for it: a group or None, its tasks)}. folder: of data, as --data; topic: as --topic.
    Raises UserError for a name that lm-eval does not know, and for data that cannot be loaded."""
    folders, given = [str(TASKS), *([include_path] if include_path else [])], {"data": folder, "topic": topic}
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=given)
    if not set(names) <= set(manager.all_tasks):  # reading lm-eval's 14,000 task files takes seconds
        manager = TaskManager(include_path=folders, metadata=given)
    tasks = {}
    for name in names:
        more = ". Its data may be gated or out of reach; for names see --tasks list, or lm-eval ls tasks"
        # lm-eval has advice for those who write a task with data of its own; users of these tasks need none
        with (data.in_a_line(f"cannot load task {name}", more),
              hub.without_lines("lm_eval.api.task", "Custom kwargs can be passed")):  # fmt: skip
            loaded = manager.load([name])
        tasks[name] = (loaded["groups"].get(name), [loaded["tasks"][key] for key in sorted(loaded["tasks"])])
    return tasks


def choose(tasks, held_out: bool, seed: int, subjects=None, samples: dict = (), limit=None) -> dict[str, list[int]]:
    """{task: indices of the documents to ask}; a task without any is left out. tasks: as find_tasks has them; held_out:
    of quizzes like wmdp's and mmlu's that half only. samples {task: indices} takes its place, subjects narrow it down,
    and limit keeps a seeded sample of what is left of each name in `tasks`; documents that are one question in several
    orders (`number`) stay together. Raises UserError where nothing is left."""
    chosen, samples = {}, dict(samples)
    subjects = subjects and {name.strip() for name in subjects.split(",")}
    if strange := set(samples) - {part.task_name for _, parts in tasks.values() for part in parts}:
        raise UserError(f"--samples: {strange.pop()} is none of the tasks to run")
    for name, (_, parts) in tasks.items():
        docs = [(part.task_name, i, doc) for part in parts for i, doc in enumerate(part.eval_docs)]
        for part in parts:
            if strange := set(samples.get(part.task_name, [])) - {*range(len(part.eval_docs))}:
                raise UserError(f"--samples: {part.task_name} has {len(part.eval_docs)} documents, there is no "
                                f"{strange.pop()}")  # fmt: skip
        known = {doc.get("subject") for *_, doc in docs} - {None}
        if subjects and (unknown := subjects - known):
            raise UserError(f"--subjects: {name} has no {', '.join(sorted(unknown))}; there are "
                            f"{', '.join(sorted(known)) or 'none'}")  # fmt: skip
        questions = {}  # {(task, question): documents}
        for task, i, doc in docs:
            asked = {"question": doc.get("left_out", doc.get("question"))}
            tuning = held_out and set(doc) >= QUIZ and data.half_of(asked, seed) == "tuning"
            keep = i in samples[task] if task in samples else not tuning
            if keep and (not subjects or doc.get("subject") in subjects):
                questions.setdefault((task, doc.get("number", i)), []).append(i)
        if not questions:
            raise UserError(f"{name}: --samples, --subjects and --pick-on leave no question to ask")
        keys = list(questions)
        keys = keys if not limit or limit >= len(keys) else sorted(random.Random(seed).sample(keys, limit))
        for key in keys:
            chosen[key[0]] = sorted(chosen.get(key[0], []) + questions[key])
        unseen = ", none that features were picked on" if held_out and not set(samples) else ""
        print(f"{name}: {sum(len(questions[key]) for key in keys)} of {len(docs)} documents{unseen}")
    return chosen


def ask(lm: AblatedLM, tasks: dict[str, tuple], chosen: dict[str, list[int]], args, folder: str | None = None):
    """lm-eval's results of one run, with its samples; None in all processes but the first. folder: of --output_path."""
    inner = lm
    if args.use_cache:  # every process caches what it was asked, every edit has a cache of its own
        file = f"{lm.fingerprint()}_process{data.process_state().process_index}.db"
        inner = CachingLM(lm, str(Path(args.use_cache) / file))
    output = args.output_path and folder and str(Path(args.output_path) / folder)
    tracker, items = EvaluationTracker(output_path=output), []
    for group, parts in tasks.values():  # a group as a whole if all of its tasks have questions to ask
        left = [part for part in parts if part.task_name in chosen]
        items += [group] if group is not None and len(left) == len(parts) else left
    results = simple_evaluate(
        shared(lm, inner), tasks=items, samples=chosen, num_fewshot=args.num_fewshot,
        batch_size=args.batch_size, apply_chat_template=args.apply_chat_template, gen_kwargs=args.gen_kwargs,
        system_instruction=args.system_instruction, evaluation_tracker=tracker, bootstrap_iters=1000,
        task_manager=TaskManager(include_defaults=False))  # fmt: skip
    if results and output:
        samples = copy.deepcopy(results["samples"]) if args.log_samples else None  # numbers become text
        tracker.save_results_aggregated({k: v for k, v in results.items() if k != "samples"}, samples)
        for name in samples or []:
            tracker.save_results_samples(name, samples[name])
    return results


def in_order(task, order: tuple[int, ...]):
    """The task with each question's options in that order."""
    docs, twin = [data.reordered(doc, order) for doc in task.eval_docs], copy.copy(task)
    twin.__class__ = type("InOrder", (type(task),), {"eval_docs": docs})
    return twin


def keep_robust(lm: AblatedLM, tasks: dict, chosen: dict, args) -> dict[str, list[int]]:
    """Of the chosen documents those that the unablated model gets right in all 24 orders (SAEBench, arXiv 2503.09532),
    asked as they are scored: adapter, examples, chat template and all. None is asked again after a wrong answer."""
    asked, left = [part for _, parts in tasks.values() for part in parts if part.task_name in chosen], chosen
    for part in asked:
        docs = part.eval_docs
        if not set(docs[0]) >= QUIZ or {len(docs[i]["choices"]) for i in chosen[part.task_name]} != {4}:
            raise UserError(f"--robust: {part.task_name} does not ask four-way questions")
    for order in data.PERMUTATIONS:
        twins = [in_order(part, order) for part in asked if part.task_name in left]
        with patch("lm_eval.evaluator.add_env_info"):  # asks git and pip, for files that are not written here
            results = ask(lm, {"": (None, twins)}, left, args)
        right = {twin.task_name: [row["doc_id"] for row in logged(results, [twin]) if row[metric_of(row)] == 1]
                 for twin in twins if results}  # fmt: skip
        # lm-eval gives results to the first process alone
        left = {name: ids for name, ids in data.from_first_process(right).items() if ids}
        for name, (_, parts) in tasks.items():
            if not any(part.task_name in left for part in parts):
                raise UserError(f"{name}: --robust leaves no question to ask")
    return left


def data_set(task_name: str, taken: set[str], parts: list, chosen: dict, folder, seed: int, topic=None) -> Dataset:
    """What a task asks, under the name that DATA_SETS has unless an earlier task has `taken` it. Indices of a group are
    over all of its tasks' documents, one after another."""
    rows, asked = [], []
    for part in parts:
        asked += [len(rows) + i for i in chosen.get(part.task_name, [])]
        rows += map(dict, part.eval_docs)
    name, *loaded_by = DATA_SETS.get(task_name, (task_name,))
    if loaded_by:
        found = data.load(name, loaded_by[0], folder, variant=loaded_by[1], topic=topic)
    else:
        found = Dataset(name, rows, f"lm-eval task {task_name}", task_name.startswith("tiny_") and not folder)
    found = replace(found.only(asked), name=task_name if name in taken else name)
    held_out = loaded_by and all(data.half_of(row, seed) == "held-out" for row in found.rows)
    return replace(found, half="held-out") if held_out else found


# %% Scores, of what lm-eval has logged for each document
def logged(results: dict, tasks: list) -> list[dict]:
    """The logged documents of several tasks in one list, by task and document, each once; with "choices" if any."""
    out = []
    for task in tasks:
        rows = results["samples"].get(task.task_name, [])
        rows = sorted((row for row in rows if row["filter"] == rows[0]["filter"]), key=lambda row: row["doc_id"])
        if task.OUTPUT_TYPE == "multiple_choice":
            rows = [{**row, "choices": task.doc_to_choice(row["doc"])} for row in rows]
        out += rows
    return out


def metric_of(row: dict) -> str | None:
    """The metric that a document is scored by here: acc, or else the first that is a number."""
    names = [name for name in row["metrics"] if isinstance(row[name], int | float)]
    return "acc" if "acc" in names else next(iter(names), None)


def measures_of(asked: Dataset, logs: dict[str, list[dict]], count_tokens=len, seed: int = 0) -> list[Measure]:
    """What lm-eval logged, {row: documents as `logged` has them}, as Measures; [] where it has no number for each. An
    item is a document; a question that is asked in several orders is one, and right if it is right in all of them.
    count_tokens(text): for this folder's tasks of next-token loss."""
    first = next(iter(logs.values()))
    metric = metric_of(first[0])

    def letter(row):  # of the choice that the metric takes for the answer, as lm-eval's own process_results
        values = np.array([value for value, _ in row["filtered_resps"][: len(row["choices"])]])
        return chr(ord("A") + int((values / ([*map(len, row["choices"])] if metric == "acc_norm" else 1)).argmax()))

    if "bits_per_byte" in first[0]["metrics"] and "document" in first[0]["doc"]:
        member = np.unique([row["doc"]["document"] for row in first], return_inverse=True)[1]
        tokens = np.bincount(member, [count_tokens(row["doc"]["text"]) for row in first])
        nats = np.stack([np.bincount(member, [-row["bits_per_byte"][0] for row in log]) for log in logs.values()])
        return [measure_of(asked, "loss", "loss", "nats per token", logs, nats, weights=tokens, seed=seed, groups=None)]
    if metric is None:
        return []
    items, in_orders = {}, "all_orders" in first[0]["metrics"]
    for place, row in enumerate(first):
        items.setdefault(row["doc"]["number"] if in_orders else place, []).append(place)
    values = np.array([[min(float(log[i][metric]) for i in item) for item in items.values()] for log in logs.values()])
    places = [item[0] for item in items.values()]
    groups = tuple(str(first[place]["doc"].get("subject")) for place in places)
    groups = groups if len(set(groups)) > 1 else None
    if not set(values.flat) <= {0.0, 1.0}:
        return [measure_of(asked, metric, metric, "mean", logs, values, groups=groups)]
    in_letters = all([str(args[-1]).strip() for args in row["arguments"]] == [*LETTERS] for row in first)
    what, title = (("all orders", "in all orders") if in_orders else ("letters", "in letters") if in_letters else
                   ("cloze", "as a cloze") if asked.is_cloze else (metric, metric))  # fmt: skip
    choices = len(first[0].get("choices", []))
    by_choice = choices and metric in ("acc", "acc_norm")
    answers = tuple("".join(letter(log[place]) for place in places) for log in logs.values()) if by_choice else None
    chance = (1 / choices) ** (len(data.PERMUTATIONS) if in_orders else 1) if choices else 0.0
    measures = [measure_of(asked, what, title, "%", logs, values == 1, chance=chance, groups=groups, answers=answers)]
    if what == "letters":
        p = np.exp([[[value for value, _ in row["filtered_resps"]] for row in log] for log in logs.values()])
        right = [LETTERS.index(row["target"]) if row["target"] in [*LETTERS] else int(row["target"]) for row in first]
        shares = {"P(a letter)": p.sum(-1), "P(right letter)": p[:, np.arange(len(right)), right]}
        measures += [measure_of(asked, of, of, "probability", logs, values, groups=groups)
                     for of, values in shares.items()]  # fmt: skip
    return measures


# %% The run
def edit_to_score(lm: AblatedLM, args, record: dict | None, row: str | None, clamp: float, numbers: dict) -> tuple:
    """(Edit, its SAEs, {layer: SAE check}, data sets): a record's row, of --features, or picked. numbers: --setting."""
    if record:
        edit, saes = edit_of_row(lm, record, row, args.sae, args.model)
    elif args.features:
        numbers = ({"clamp": clamp} if "clamp" in METHODS[args.method or "clamp"].usual else {}) | numbers
        of = {layer: ids[: args.n_features] for layer, ids in data.by_layer(args.features, args.layer).items()}
        edit, saes = edit_of_features(lm, of, args.method, args.sae, args.model, numbers)
        print(*(f"features of layer {layer}: {', '.join(map(str, ids))}" for layer, ids in of.items()), sep="\n")
    else:
        return picked(lm, args, clamp, numbers)
    if lm.device.type == "meta":  # no weights to check the SAEs with
        return edit, saes, {}, []
    wikitext = data.load("wikitext", args.model, args.data)
    windows = data.picking_windows(lm.tokenizer, [], [wikitext.texts], args.context)[1][0]
    quality = {layer_of(sae): check_sae_quality(BridgeView(lm), sae, windows, not args.no_sanity) for sae in saes}
    return edit, saes, quality, [wikitext]


def run(**changes) -> dict:
    """run(tasks="tiny_mmlu", unablated=True): any flag by name. Returns the record; {} for the list of tasks."""
    args = runs.settings(flags, changes)
    if args.tasks == "list":
        for path in sorted(TASKS.glob("*.yaml")):
            print(f"{path.stem:32}{path.read_text().splitlines()[0].lstrip('# ')}")
        return {}
    if args.method and args.method not in METHODS:
        raise UserError(f"--method {args.method}: the methods are {', '.join(METHODS)}")
    record = name = None
    if args.record:
        record = runs.read_record(args.record)
        for flag in ("features", "layer", "n_features", "clamp", "setting"):
            if getattr(args, flag) != flags.get_default(flag):
                raise UserError(f"{flag}: a record's row says all about its edit; choose it with --row")
        decided = ("seed", "pick_on", "edit_special", "topic", *(() if args.data else ("data",)))
        args = runs.settings(flags, vars(args) | {k: v for k, v in record["settings"].items() if k in decided})
        vars(args).update(layer=None, n_features=None)  # the row's may be several
        name = chosen_row(record, args.row, args.method)
    clamp = hub.preset(args.model).clamp if args.clamp is None else args.clamp
    names = args.tasks or ("" if args.serve else TINY_TASKS if args.model == "tiny" or args.data else HUB_TASKS)
    names = [name.strip() for name in names.split(",") if name.strip()]
    tasks = find_tasks(names, args.include_path, args.data, args.topic) if names else {}
    numbers = simple_parse_args_string(",".join(args.setting or []))
    if wrong := [name for name, value in numbers.items() if not isinstance(value, int | float)]:
        raise UserError(f"--setting {wrong[0]}: give NAME=NUMBER, as gate=0.1")
    samples = read_json(args.samples) if args.samples else {}
    if not isinstance(samples, dict) or not all(isinstance(ids, list) for ids in samples.values()):
        raise UserError(f'{args.samples}: give JSON {{task: [indices]}}, as {{"tiny_mmlu": [0, 3, 4]}}')
    chosen = choose(tasks, args.pick_on == "half", args.seed, args.subjects, samples, args.limit)

    options = vllm_options(args) if args.engine == "vllm" else None
    for flag in ("serve", "no_check", "tensor_parallel_size", "pipeline_parallel_size"):
        if not options and getattr(args, flag) != flags.get_default(flag):
            raise UserError(f"{flag}: give --engine vllm too")
    lm = (outline if options and args.no_check and (record or args.features) else load_ablated)(args)
    edit, saes, quality, datasets = edit_to_score(lm, args, record, name, clamp, numbers)
    if not name:  # by the method, of several layers that of the first
        name = METHODS[edit.settings.get("edits", [{"method": edit.method}])[0]["method"]].title
        name += f" {clamp:g}" if name == "clamp" else ""
    if options:
        longest = min(256, options.get("max_model_len") or 256, lm.tokenizer.model_max_length) - 1
        prompts = first_prompts(lm, tasks, chosen, longest)
        known = {} if args.no_check else {
            on: vllm_edit.expected(lm.model, lm.tokenizer, on, prompts) for on in (NONE, edit)}  # fmt: skip
        model = lm.pretrained, lm.tokenizer, lm.identity
        del lm  # on a GPU the two do not fit side by side
        for sae in saes:
            sae.to("cpu")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if args.serve:
            runs.note_clamp(args.model, vars(args))
            vllm_edit.serve(model, args.host, args.serve, options, edit, saes, prompts, known)
            return {}
        with tempfile.TemporaryDirectory() as folder:
            texts = vllm_edit.tries(edit, saes, model[1], Path(folder))
            lm = in_vllm(*model, options)
            results = [lm.tried(text, prompts) for text in texts]
        checked = vllm_edit.judged(results, edit, known, options["dtype"] == "float32")
        print(*checked, sep="\n")
        lm.set_edit(NONE)
    if args.robust:
        chosen = keep_robust(lm, tasks, chosen, args)
    asked = {}
    for task, (_, parts) in tasks.items():
        taken = {known.name for known in asked.values()}
        asked[task] = data_set(task, taken, parts, chosen, args.data, args.seed, args.topic)
    if isinstance(args.features, dict):
        vars(args).update(layer=None)  # it may be several
    writer = runs.Run(__file__, args, [*asked.values(), *datasets], saes,
                      also=[edit.method, edit.settings, lm.identity, lm.arguments])  # fmt: skip

    rows, results, counts = ({"unablated": NONE} if args.unablated else {}) | {name: edit}, {}, {}
    for row, on in rows.items():
        lm.set_edit(on, saes)
        results[row] = ask(lm, tasks, chosen, args, "ablated" if on.at else "unablated")
        if options:
            counts[row] = vllm_edit.check_counts(lm.call("edit_counts"), on, args.no_sanity)
    if not data.is_first_process():
        return {}
    measures = []
    for task, (_, parts) in tasks.items():
        logs = {row: logged(result, parts) for row, result in results.items()}
        prompts = data.digest_of([entry["arguments"] for entry in next(iter(logs.values()))])
        asked[task] = replace(asked[task], prompts=prompts)
        new = measures_of(asked[task], logs, lambda text: len(lm.tok_encode(text, False)), args.seed)
        for row in rows if not new else ():
            print(f"\n{task}, {row}, in lm-eval's own table\n\n{make_table(results[row])}")
        measures += new
    show.table(measures)
    for published in filter(None, [dataset.published for dataset in asked.values()]):
        print(f"\n{published}")
    quizzes = [measure for measure in measures if measure.unit in ("%", "probability")]
    writer.data = [*asked.values(), *filter(len, datasets)]
    title = f"{Path(args.model).name}, {name}: {label(edit.method, edit.settings)}, lm-eval"
    return writer.write(
        rows, measures, {"accuracy": lambda: show.intervals(quizzes, title)} if quizzes else {}, quality=quality,
        loaded=lm.identity, attention=lm.computed[0], lm_eval_version=version("lm_eval"),
        **({"vllm": {"checked": checked, "tokens": counts}} if options else {}),
        lm_eval=json.loads(json.dumps({row: result["results"] for row, result in results.items()}, default=str)),
    )  # fmt: skip


# %%
if __name__ == "__main__":
    runs.main(run, flags)
