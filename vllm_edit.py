"""
An edit inside vLLM, for generation and for models that one card does not hold.

vLLM's workers load EditExtension beside their own class. It makes the edit that `write` has written, by the code of
edits.py, and puts it behind the decoder layers, whose residual stream vLLM keeps in two parts that it adds up later.
vLLM's batch is flat, (tokens, d_model): several prompts' tokens lie one behind the other, so an edit must not look at a
whole prompt. With tensor parallelism each rank makes the same edit of the whole residual stream.
"""

import asyncio
import copy
import json
import os
import re
import tempfile
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from sae_lens import SAE

import edits
from data import UserError, special_ids
from edits import CLOSE, METHODS, NONE, Edit, applied, explained_by_rounding, label, layer_of, log_probs

# What vLLM must be started with: a graph or a cached prefix would pass the edit by, and custom all-reduce has given
# wrong values to hooks under tensor parallelism (github.com/ndif-team/nnsight/issues/631)
ENGINE = {"worker_extension_cls": "vllm_edit.EditExtension", "enforce_eager": True, "enable_prefix_caching": False,
          "disable_custom_all_reduce": True, "generation_config": "vllm"}  # fmt: skip


HEADING = re.compile(r"\d+ validation errors? for \w+\s+")  # pydantic's, the line before its reason


def only_rows(sae: SAE, settings: dict) -> tuple[SAE, dict]:
    """The SAE with no other features than the settings name, and the settings with its ids. A top-k SAE stays whole,
    as whether a feature is among the top k depends on all others; so does one of which all features are used."""
    if "features" not in settings or sae.cfg.architecture() == "topk":
        return sae, settings
    n, refusal = len(settings["features"]), [settings["refusal"]] if "refusal" in settings else []
    ids, cfg = torch.tensor([*settings["features"], *refusal]), copy.deepcopy(sae.cfg)
    cfg.d_sae = len(ids)
    rows = {name: value.cpu() for name, value in sae.state_dict().items()}
    rows = {name: value if name == "b_dec" else value[:, ids] if name == "W_enc" else value[ids]
            for name, value in rows.items()}  # fmt: skip
    small = type(sae)(cfg)
    small.load_state_dict(rows)
    return small, settings | {"features": [*range(n)]} | ({"refusal": n} if refusal else {})


def write(edit: Edit, saes: list[SAE], tokenizer, folder: Path, idle: bool = False) -> str:
    """What `install_edit` takes, JSON; the SAEs' rows go into the folder, in SAELens's format, where all workers must
    find them. idle: at the same layers an edit that changes nothing. Raises UserError for an edit that looks at a whole
    prompt."""
    if edit.needs_whole_prompt:
        raise UserError(f"{edit.method} looks at a whole prompt before it edits, which vLLM cuts up: it runs with "
                        "Hugging Face's engine alone")  # fmt: skip
    of, written = {layer_of(sae): sae for sae in saes}, []
    parts = edit.settings.get("edits", [{"method": edit.method, "settings": edit.settings}] if edit.at else [])
    for method, given in ((part["method"], part["settings"]) for part in parts):
        for layer in given["layers"]:
            settings, where = {name: value for name, value in given.items() if name != "layers"}, None
            if METHODS[method].needs_sae and not idle:
                sae, settings = only_rows(of[layer], settings)
                where = str(folder / str(layer))
                sae.save_model(where)
            written.append({"method": None if idle else method, "settings": settings, "layer": layer, "sae": where})
    mask = {"special": special_ids(tokenizer), "all_but_bos": getattr(tokenizer, "edit_special", "") == "all-but-bos"}
    return json.dumps({"edits": written, **mask})


class EditExtension:
    """What vLLM's workers can do beside their own methods, called by `collective_rpc`. What goes wrong within an edit
    ends vLLM, but in the passes before the first `edit_counts`, which says it: so it comes to the caller in words."""

    def install_edit(self, text: str) -> list[int]:
        """Put the edit of `write`'s text in the place of an earlier one; returns the edited layers that this rank has.
        Raises UserError for an engine that would pass it by, and for layers that cannot be found."""
        given, config = json.loads(text), self.vllm_config
        if not config.model_config.enforce_eager:
            raise UserError("vLLM runs the model as a compiled graph, which an edit does not reach: enforce_eager=True")
        if config.cache_config.enable_prefix_caching or config.speculative_config:
            raise UserError("vLLM's cached prefixes and guessed tokens are not the edited model's: "
                            "enable_prefix_caching=False, no speculative_config")  # fmt: skip
        for handle in getattr(self, "edit_hooks", ()):
            handle.remove()
        model = self.model_runner.get_model()
        inner = getattr(model, "get_language_model", lambda: model)()
        n = config.model_config.hf_text_config.num_hidden_layers
        lists = [part for part in inner.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == n]
        if len(lists) != 1:
            raise UserError(f"cannot tell which modules of vLLM's {type(model).__name__} are its {n} layers")
        special, all_but_bos = torch.tensor(given["special"]), given["all_but_bos"]
        self.edit_seen = SimpleNamespace(special=special, all_but_bos=all_but_bos, mask=None, tokens=0, edited={},
                                         finite=torch.tensor(True), tried=False, wrong=None)  # fmt: skip
        self.edit_hooks = [model.register_forward_pre_hook(self._edit_mask, with_kwargs=True),
                           model.register_forward_hook(self._see_what_is_not_finite)]  # fmt: skip
        here = []
        for at in given["edits"]:
            if at["layer"] >= n:
                raise UserError(f"layer {at['layer']}: vLLM's {type(model).__name__} has layers 0 to {n - 1}")
            layer = lists[0][at["layer"]]
            if not any(True for _ in layer.parameters()):  # another rank of the pipeline has it
                continue
            sae = SAE.load_from_disk(at["sae"], dtype="float32").requires_grad_(False) if at["sae"] else None
            f = METHODS[at["method"]].edit(sae, **at["settings"]) if at["method"] else lambda h, mask: h
            self.edit_hooks.append(layer.register_forward_hook(partial(self._edited, at["layer"], f)))
            here.append(at["layer"])
        return here

    def edit_counts(self) -> dict:
        """{"tokens": how many the model has read since install_edit, "edited": {layer: how many of them it changed}, of
        this rank's layers that ran, "finite": whether all that left the final norm was, "wrong": what went wrong}."""
        seen, self.edit_seen.tried = self.edit_seen, True
        edited = {layer: int(n) for layer, n in seen.edited.items()}
        return {"tokens": seen.tokens, "edited": edited, "finite": bool(seen.finite), "wrong": seen.wrong}

    def _edit_mask(self, module, inputs, kwargs):
        """Before a pass: which tokens of the flat batch are edited, as edits.token_mask has it."""
        seen, ids = self.edit_seen, kwargs.get("input_ids")
        positions = kwargs["positions"].reshape(-1, kwargs["positions"].shape[-1])[0]  # M-RoPE has three rows
        if ids is None:  # a model with vision is given embeddings; vLLM has two kinds of runners
            buffers = getattr(self.model_runner, "input_buffers", None)
            ids = (self.model_runner.input_ids.gpu if buffers is None else buffers.input_ids)[: len(positions)]
        seen.mask = positions > 0
        if not seen.all_but_bos:
            seen.mask = seen.mask & ~torch.isin(ids, seen.special.to(ids.device))
        seen.tokens += len(ids)

    def _see_what_is_not_finite(self, module, inputs, output):
        if torch.is_tensor(output):  # of the last rank of a pipeline
            self.edit_seen.finite = self.edit_seen.finite & output.isfinite().all()

    def _edited(self, layer: int, f, module, inputs, output):
        try:
            return self._edit(layer, f, module, output)
        except Exception as error:
            if self.edit_seen.tried:
                raise
            self.edit_seen.wrong = self.edit_seen.wrong or str(error)

    def _edit(self, layer: int, f, module, output) -> tuple:
        """After a layer: (h, 0), h the edited stream, in the place of (hidden, residual), which sum up to it."""
        parts = output if isinstance(output, tuple) else (output,)
        if len(parts) != 2 or not all(torch.is_tensor(part) and part.shape == parts[0].shape for part in parts):
            raise UserError(
                f"vLLM's {type(module).__name__} does not return (hidden, residual): an edit cannot be made"
            )
        h = parts[0] + parts[1]
        edited = f(h[None], self.edit_seen.mask[None])[0]
        before = self.edit_seen.edited.get(layer, 0)  # summed up where it is: reading it would hold a GPU up
        self.edit_seen.edited[layer] = before + (edited != h).any(-1).sum()
        return edited, torch.zeros_like(parts[1])


@contextmanager
def first_error(said: str = "vLLM"):
    """What is raised within this context as a UserError of what came first: vLLM clears up, and fails at that."""
    try:
        yield
    except Exception as error:
        while error.__context__ is not None:
            error = error.__context__
        if isinstance(error, UserError):
            raise error from None
        raise UserError(f"{said}: {HEADING.sub('', str(error)).splitlines()[0]}") from None


def check_installed(found: list[list[int]], edit: Edit) -> None:
    """found: what each rank's `install_edit` returned. Raises UserError for a layer that no rank has."""
    if missing := set(edit.at) - {layer for layers in found for layer in layers}:
        raise UserError(f"layers {sorted(missing)}: no process of vLLM has them")


def check_counts(found: list[dict], edit: Edit, none_will_do: bool = False) -> dict[str, int]:
    """{"read": tokens, "changed at layer L": of these}, of each rank's `edit_counts`. Raises UserError if something
    went wrong, was not finite, was read and a layer never ran, or, unless none_will_do, no token was changed."""
    if wrong := [rank["wrong"] for rank in found if rank["wrong"]]:
        raise UserError(wrong[0])
    if not all(rank["finite"] for rank in found):
        raise UserError(f"what vLLM's model makes of prompts under {edit.method} is not finite (NaN or infinity): look "
                        "for such values in its weights and its SAE, or take another dtype")  # fmt: skip
    tokens = max(rank["tokens"] for rank in found)
    edited = {at: max(rank["edited"].get(at, -1) for rank in found) for at in edit.at if tokens}
    if passed_by := [layer for layer, n in edited.items() if n < 0]:
        raise UserError(f"vLLM has run its model without calling layers {passed_by}: an edit cannot be made there")
    idle = all(getattr(f, "always", False) for f in edit.at.values())  # such as SAE patched, nothing ablated
    if edited and not none_will_do and not idle and not any(edited.values()):
        raise UserError(f"{edit.method} changed none of the {tokens} tokens that vLLM's model has read: its features "
                        "are active on none of them (no_sanity: score all the same)")  # fmt: skip
    return {"read": tokens, **{f"changed at layer {layer}": n for layer, n in edited.items()}}


# ----------------------------------------------------------------------------- against Hugging Face's model
def expected(model, tokenizer, edit: Edit, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (tokens,) of the prompts' tokens but each one's first, from a Hugging Face model with the edit,
    and by how much rounding differently changes them."""

    rows = [torch.tensor([ids], device=model.device) for ids in prompts]

    def run():
        with applied(model, tokenizer, edit):
            found = [log_probs(model, ids)[0, :-1].gather(1, ids[0, 1:, None].cpu())[:, 0] for ids in rows]
        return torch.cat(found)

    found = run()
    return found, edits.rounded_differently(model, run) - found


def to_read(prompts: list[list[int]]) -> tuple:
    """What vLLM is asked, so that the log-probabilities of the prompts' tokens can be read off."""
    from vllm import SamplingParams, TokensPrompt

    how = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    return [TokensPrompt(prompt_token_ids=ids) for ids in prompts], how


def of_prompts(outputs: list) -> torch.Tensor:
    """The same of vLLM's outputs for `to_read`."""
    rows = (zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:]) for output in outputs)
    return torch.tensor([found[i].logprob for row in rows for i, found in row])


def tries(edit: Edit, saes: list[SAE], tokenizer, folder: Path) -> list[str]:
    """Three texts for `install_edit`, each to be tried on some prompts: nothing, the edit idle, the edit."""
    return [write(NONE, [], tokenizer, folder), write(edit, saes, tokenizer, folder, idle=True),
            write(edit, saes, tokenizer, folder)]  # fmt: skip


def judged(results: list[tuple], edit: Edit, known: dict, float32: bool) -> list[str]:
    """What is to be said of `tries`, for each of which `results` has what was installed, vLLM's outputs for `to_read`
    and `edit_counts`. known: {NONE or the edit: what `expected` returned}. Raises UserError as check_installed,
    check_counts and compared do, and where a layer's two parts do not sum up to the residual stream."""
    plain, idle, edited = (of_prompts(outputs) for _, outputs, _ in results)
    for (installed, _, counts), on in zip(results, (NONE, edit, edit)):
        check_installed(installed, on)
        changed = check_counts(counts, on, none_will_do=True)
    if not (idle - plain).pow(2).mean().sqrt() <= CLOSE * (1 if float32 else 50):
        raise UserError("what this model's layers return in vLLM is not (hidden, residual) that sum up to the residual "
                        "stream: an edit cannot be made there")  # fmt: skip
    lines = [compared(found, *known[on], on) for found, on in ((plain, NONE), (edited, edit)) if on in known]
    counted = ", ".join(f"{n} {what}" for what, n in changed.items())
    return [*lines, f"{edit.method} ({label(edit.method, edit.settings)}), tokens tried: {counted}"]


def compared(found: torch.Tensor, wanted: torch.Tensor, rounding: torch.Tensor, edit: Edit) -> str:
    """What comparing came to, as a line. Raises UserError if more than rounding stands between the two."""
    under = f"under {edit.method}" if edit.at else "without an edit"
    largest = (found - wanted).abs().max()
    said = (
        f"vLLM against Hugging Face's model {under}: {len(found)} log-probabilities differ by up to {largest:.2g} nats"
    )
    if not explained_by_rounding(found - wanted, lambda: rounding):
        raise UserError(f"{said}, more than rounding explains: what vLLM scores is not this model")
    return f"{said}, no more than rounding explains"


# ------------------------------------------------------------------------------------------------ serving
def serve(
    model: tuple, host: str, port: int, options: dict, edit: Edit, saes: list, prompts: list, known: dict
) -> None:
    """vLLM's OpenAI-compatible server with the edit inside, until it is stopped. model: (folder or hub id, tokenizer,
    ...); options: of vLLM, by name; prompts: lists of ids, tried first; known: as `judged` has it. Raises UserError as
    install_edit and judged do, and for what vLLM refuses."""
    path, tokenizer, *_ = model
    name, flags = Path(path).resolve().name, []
    for option, value in (options | {"model": path, "served_model_name": name, "host": host, "port": port}).items():
        option = option.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", str(value)]
    with tempfile.TemporaryDirectory() as folder, first_error():
        texts = tries(edit, saes, tokenizer, Path(folder))
        asyncio.run(serving(flags, texts, edit, prompts, known, options["dtype"] == "float32"))


async def serving(flags: list[str], texts: list[str], edit: Edit, prompts: list, known: dict, float32: bool) -> None:
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    validate_parsed_serve_args(args)
    address, sock = setup_server(args, reuse_port=False)

    async def say():
        while True:
            with suppress(OSError):
                (await asyncio.open_connection(args.host, args.port))[1].close()
                return print(f"{address}/v1 answers OpenAI's clients as {args.served_model_name[0]}", flush=True)
            await asyncio.sleep(0.1)

    async with build_async_engine_client(args) as engine:
        os.environ.pop("LOCAL_WORLD_SIZE", None)  # vLLM's, not a launcher's
        results, (asked, how) = [], to_read(prompts)
        for number, text in enumerate(texts):
            installed = await engine.collective_rpc("install_edit", args=(text,))
            answers = [engine.generate(prompt, how, f"{number} {i}") for i, prompt in enumerate(asked)]
            outputs = [[output async for output in answer][-1] for answer in answers]
            results.append((installed, outputs, await engine.collective_rpc("edit_counts")))
        print(*judged(results, edit, known, float32), sep="\n")
        saying = asyncio.create_task(say())
        ended = await build_and_serve(engine, address, sock, args)
        saying.cancel()
    try:
        await ended
    finally:
        sock.close()
