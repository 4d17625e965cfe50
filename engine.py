"""Many edits of the residual stream in one pass of a model.

Edits share the layers below the first that they change. So the model runs once per batch, unablated; then each prompt's
residual stream there is copied once for every edit that changes it (equal changes share a copy), and the later layers
run on the copies from their first edited token on. Tokens that several prompts begin with, such as a quiz's header, run
once for all of them."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad
from torch.utils._pytree import tree_map
from transformers.cache_utils import DynamicCache, KVSharingDict

import edits
from data import UserError, batches, first_line, padded, ran_out, total_of_processes
from edits import NONE, Edit, Latents, SetFeatures, idle_wrappers, token_mask, unwrapped

PASS_TOKENS = 4096  # most tokens, of prompts or of edited copies, that run at a time: it bounds the memory of a pass
STATE = DynamicCache | KVSharingDict  # what a layer takes from earlier tokens, and from lower layers
WORTH_SHARING = 8  # tokens per prompt that must be saved for a batch to be run in two stages


@torch.inference_mode()
def each_edit(model, rows, edits: list[Edit], score, shape=(), *, batch_size=16, desc=None, first=None) -> torch.Tensor:
    """Score every row under every edit, (n_edits, n_rows, *shape) in fp64, as from a plain pass under each edit.

    rows: lists of ids. score(places, start, h) -> (n, *shape) on the CPU gets rows' indices (n,) and what leaves the
    final norm from token `start` on, h (n, pos - start, d_model), right-padded. Every row is scored first unablated,
    with start 0; on tokens before `start` an edited row equals that. desc, first: see data.batches. Raises
    torch.OutOfMemoryError where memory does not suffice for a single row."""
    engine, out = OnePass(model, edits), torch.zeros(len(edits), len(rows), *shape, dtype=torch.float64)
    for places, ids in batches(rows, batch_size, model.tokenizer, model.cfg.device, desc, first=first):
        in_parts(places, PASS_TOKENS // ids.shape[1], partial(engine.fill, out, rows, score))
    return total_of_processes(out)  # rows that other processes score are 0 here


def in_parts(items: list, size: int, run) -> None:
    """run(part) of at most `size` items at a time, of half as many where memory runs out; raises for a single one."""
    for at in range(0, len(items), max(1, size)):
        part = items[at : at + max(1, size)]
        try:
            run(part)
            continue
        except RuntimeError as error:
            if not ran_out(error) or len(part) == 1:
                raise
        torch.cuda.empty_cache()  # here the error, and what it holds, is gone
        in_parts(part, len(part) // 2, run)


@dataclass
class Stage:
    """What one pass of the unablated model over ids (n, pos) leaves behind."""

    ids: torch.Tensor
    editable: torch.Tensor  # (n, pos), the tokens to be edited
    result: torch.Tensor  # (n, pos, d_model), what leaves the final norm
    inputs: dict[int, tuple]  # {layer: (h where it is edited, args, kwargs, copy of what lower layers share)}
    cache: DynamicCache  # keys and values of these tokens and of those before


@dataclass
class Copy:
    """A prompt's residual stream after a layer, to be edited from its token `start` on, for one edit or several."""

    prompt: int
    layer: int
    start: int
    edit: Edit  # the first of them
    used_by: list[int]  # their numbers


class OnePass:
    """Runs prompts once for a list of edits, at whatever layers.

    `run` runs the unablated prompts of a batch, `plan` finds the copies that are needed, `run_copies` runs the later
    layers on some of them. A copy branches off after the first layer at which its edit changes anything. Tokens before
    the first that any of its layers changes are not run again: later layers are causal, so the unablated prompt's keys
    and values serve. What prompts begin with is a Stage of its own, which the next batch may reuse."""

    def __init__(self, model, edits: list[Edit], share_beginnings: bool = True):
        self.model, self.wrappers, self.share, self.beginning = model, idle_wrappers(model), share_beginnings, None
        # what such an edit does at its second layer depends on the whole prompt as its first one leaves it
        self.alone = {k: edit for k, edit in enumerate(edits) if edit.needs_whole_prompt and len(edit.at) > 1}
        self.shared = {k: edit for k, edit in enumerate(edits) if k not in self.alone}
        self.layers = sorted({layer for edit in self.shared.values() for layer in edit.at})
        unions = {}  # {(layer, SAE): features of any edit}, which are encoded once for all edits
        for layer, f in [item for edit in self.shared.values() for item in edit.at.items()]:
            if isinstance(f, SetFeatures):
                unions.setdefault((layer, f.latents.sae), set()).update(f.latents.features.tolist())
        self.latents = {(layer, sae): Latents(sae, sorted(union)) for (layer, sae), union in unions.items()}

    def fill(self, out: torch.Tensor, rows: list[list[int]], score, places: list[int]) -> None:
        """Set out[:, places] as each_edit says."""
        ids = padded([rows[i] for i in places], self.model.tokenizer, self.model.cfg.device)
        out[:, places] = score(places, 0, self.run(ids)).to(out.dtype)

        def run_part(copies):
            start, h = self.run_copies(copies)
            for copy, value in zip(copies, score([places[copy.prompt] for copy in copies], start, h)):
                out[copy.used_by, places[copy.prompt]] = value.to(out.dtype)

        for copies in filter(None, self.plan()):  # later ones are shorter. On a CPU half as many at a time are as fast
            in_parts(copies, PASS_TOKENS // (1 + ids.is_cpu) // (ids.shape[1] - copies[0].start), run_part)
        for k, edit in self.alone.items():
            with edits.applied(self.model, self.model.tokenizer, edit):
                out[k, places] = score(places, 0, self.forward(ids, DynamicCache()).result).to(out.dtype)

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """Run the unablated prompts (batch, pos); returns what leaves the final norm, (batch, pos, d_model)."""
        self.stages, self.streams, self.acts, self.changed = [], {}, {}, {}  # frees the memory of the prompts before
        cache = DynamicCache()  # without a config it keeps sliding layers' keys, too
        n_shared, of = beginnings(ids.tolist()) if self.share else (0, [])
        if n_shared:
            beginning, rows = ids[[of.index(k) for k in range(max(of) + 1)], :n_shared], torch.tensor(of)
            if self.beginning is None or not torch.equal(self.beginning.ids, beginning):
                self.beginning = self.forward(beginning, DynamicCache())
            self.stages, cache = [(self.beginning, rows)], for_rows(self.beginning.cache, rows, n_shared)
        self.stages.append((self.forward(ids[:, n_shared:], cache), torch.arange(len(ids))))
        parts = [(stage.result[rows], stage.editable[rows], *(stage.inputs[n + 1][0][rows] for n in self.layers))
                 for stage, rows in self.stages]  # fmt: skip
        result, self.editable, *streams = (torch.cat(part, 1) for part in zip(*parts))
        self.streams = dict(zip(self.layers, streams))
        return result

    def forward(self, ids: torch.Tensor, cache: DynamicCache) -> Stage:
        """One pass of the unablated model after the tokens that `cache` holds, which it adds to."""
        given, result, modules = {}, {}, [*self.model.blocks, self.model.ln_final]

        def keep(module, inputs, kwargs, number):
            shared = next((dict(x) for x in kwargs.values() if isinstance(x, KVSharingDict)), {})
            given[number] = (inputs[0] if number - 1 in self.layers else None, inputs[1:], kwargs, shared)

        def keep_result(module, inputs):
            result["h"] = inputs[0]
            return inputs[0][:1, :1], *inputs[1:]  # the unembedding that the model goes on to is not needed

        with ExitStack() as hooks:
            for n in range(self.layers[0] + 1, len(modules)) if self.layers else ():
                hooks.enter_context(modules[n].register_forward_pre_hook(partial(keep, number=n), with_kwargs=True))
            hooks.enter_context(self.model.unembed.register_forward_pre_hook(keep_result))
            mask = hooks.enter_context(token_mask(self.model.original_model, self.model.tokenizer))
            hooks.enter_context(unwrapped(self.wrappers))
            self.model(ids, past_key_values=cache, use_cache=True)
        if missing := [layer for layer in self.layers if layer + 1 not in given]:
            raise RuntimeError(f"layers {missing} never ran: nothing was edited there")
        return Stage(ids, mask.edited.to(result["h"].device), result["h"], given, cache)

    def plan(self) -> list[list[Copy]]:
        """The copies that the edits need, of each layer those sorted by start; equal changes share one."""
        copies = {}
        self.acts = {key: latents.encode(self.streams[key[0]]) for key, latents in self.latents.items()}
        for k, edit in self.shared.items():
            looks = {layer: self.look(layer, f) for layer, f in sorted(edit.at.items())}
            for b in range(len(self.editable)):
                touched = {layer: first[b] for layer, (first, _) in looks.items() if first[b] is not None}
                if touched:
                    layer, start = min(touched), min(touched.values())
                    key = (b, layer, looks[layer][1][b], k if layer < max(edit.at) else None)  # further edits differ
                    copies.setdefault(key, Copy(b, layer, start, edit, [])).used_by.append(k)
        in_order = sorted(copies.values(), key=lambda copy: copy.start)
        return [[copy for copy in in_order if copy.layer == layer] for layer in self.layers]

    def look(self, layer: int, f) -> tuple[list, list]:
        """What f would change after a layer of the unablated prompts: for each the first token (None: nothing changes),
        and a key that equal changes have in common, whatever method or list of features made them."""
        h, editable, always = self.streams[layer], self.editable.to(self.streams[layer].device), False
        if isinstance(f, SetFeatures):
            space, union = f.latents.sae, self.latents[layer, f.latents.sae].features
            columns = torch.searchsorted(union, f.latents.features.to(union.device))
            (acts, scale), weights = self.acts[layer, space], odd_numbers(len(union)).to(h.device)[columns]
            change = f.change(acts[..., columns], editable)
            always = (acts[..., columns] > 0) & editable[..., None] if f.always else False
            self.changed[layer, f] = lambda h, of: f.latents.moved(h, change[of], scale[of])
        else:
            space, weights, new = None, odd_numbers(h.shape[-1]).to(h.device), f(h, editable)
            change = new.float() - h.float()
            self.changed[layer, f] = lambda h, of: new[of]
        anywhere, first = ((change != 0) | always).any(-1).max(1)
        first = [at if changed else None for changed, at in zip(anywhere.tolist(), first.tolist())]
        return first, [(space, number) for number in hashes_of(change, weights)]

    def run_copies(self, copies: list[Copy]) -> tuple[int, torch.Tensor]:
        """Run copies of one layer, sorted by start. Returns the first start, and what leaves the final norm from there
        on, (n, pos - start, d_model). All run from there on, so the fewer at a time, the fewer tokens in vain."""
        layer, start, prompts = copies[0].layer, copies[0].start, torch.tensor([copy.prompt for copy in copies])
        h, cache, out, offset = self.streams[layer][prompts, start:], None, [], 0
        for edit in {copy.edit for copy in copies}:
            rows = [i for i, copy in enumerate(copies) if copy.edit is edit]
            h[rows] = self.changed[layer, edit.at[layer]](h[rows], (prompts[rows], slice(start, None)))
        for stage, of in self.stages:
            begin, end = max(offset, start), offset + stage.ids.shape[1]
            if begin < end:
                ones, shares = distinct(copies, of[prompts])  # in the last stage, none shares
                cache = cache or for_rows(self.stages[-1][0].cache, prompts[ones], start, layer + 1)
                x, mask = h[ones, begin - start : end - start], self.editable[prompts[ones], begin:end]
                x = self.later_layers(x, [copies[i] for i in ones], stage, of[prompts[ones]], mask, cache)
                out.append(x[shares])
                cache = for_rows(cache, shares, end, layer + 1) if stage is self.beginning else None
            offset = end
        return start, self.model.ln_final(torch.cat(out, 1))

    def later_layers(self, h, copies: list[Copy], stage: Stage, of, mask, cache) -> torch.Tensor:
        """Run the layers after the copies' on h (n, pos, d_model), the stage's last tokens. of (n,): the row of the
        stage that each copy continues, whose arguments the layers get; mask (n, pos): what is edited."""
        blocks, lowest = self.model.blocks, copies[0].layer + 1
        shared = {name: tuple(x[of] for x in pair) for name, pair in stage.inputs[lowest][3].items()}
        given = partial(cut, rows=of, n=h.shape[1], shape=stage.ids.shape, cache=cache, shared=shared)
        with unwrapped(self.wrappers):
            for number in range(lowest, len(blocks)):
                args, kwargs = tree_map(given, stage.inputs[number][1:3], is_leaf=lambda x: isinstance(x, STATE))
                out = blocks[number](h, *args, **kwargs)
                h = out[0] if isinstance(out, tuple) else out
                if stage is not self.beginning and number < len(cache.layers):
                    cache.layers[number] = None  # no later token needs these keys: their memory serves the next layer
                for edit in {copy.edit for copy in copies if number in copy.edit.at}:
                    rows = [i for i, copy in enumerate(copies) if copy.edit is edit]
                    h[rows] = edit.at[number](h[rows], mask[rows].to(h.device))
        return h


def head(model, h: torch.Tensor) -> torch.Tensor:
    """What leaves the final norm (n, pos, d_model) -> logits (n, pos, d_vocab) in fp32."""
    logits = model.unembed(h)
    cap = getattr(model.original_model.config.get_text_config(), "final_logit_softcapping", None)
    return (torch.tanh(logits / cap) * cap if cap else logits).float()


def cut(value, rows: torch.Tensor, n: int, shape: tuple[int, int], cache: DynamicCache, shared: dict):
    """A block's argument in a stage of `shape` (batch, pos), such as an attention mask or positions, for these rows and
    the last n tokens; the cache and what lower layers share are replaced by the rows' own."""
    if isinstance(value, STATE):
        return cache if isinstance(value, DynamicCache) else shared
    if not torch.is_tensor(value):
        return value
    if value.ndim > 1 and len(value) == shape[0]:
        value = value[rows]
    dim = {1: 0, 2: 1, 3: 1, 4: 2}[value.ndim]  # (pos), (batch, pos), (batch, pos, d_head), (batch, 1, pos, pos)
    return value.narrow(dim, shape[1] - n, n) if value.shape[dim] == shape[1] else value


def for_rows(cache: DynamicCache, rows: torch.Tensor, length: int, layer: int = 0) -> DynamicCache:
    """The keys and values of the first `length` tokens, from `layer` on, with row rows[i] of `cache` as row i."""
    return DynamicCache([(old.keys[rows, :, :length], old.values[rows, :, :length]) if length and number >= layer
                         else (None, None) for number, old in enumerate(cache.layers)])  # fmt: skip


def beginnings(rows: list[list[int]]) -> tuple[int, list[int]]:
    """How many first tokens of the rows (of equal length) to run once for all rows that share them, so that most is
    saved, 0 where it is not worth it; and for each row the number of its beginning among the different ones."""
    best, found, numbers = WORTH_SHARING * (len(rows) - 1), (0, []), [0] * len(rows)
    for n in range(1, len(rows[0])):
        known = {}
        numbers = [known.setdefault((number, row[n - 1]), len(known)) for number, row in zip(numbers, rows)]
        if (saved := (len(rows) - len(known)) * n) >= max(best, 1):
            best, found = saved, (n, numbers)
    return found


def distinct(copies: list[Copy], of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies with the same edit and the same row `of` (n,) a stage need running once. Returns the indices of the copies
    to run, and for each copy which of them it shares; one whose edit looks at the whole prompt shares none."""
    known = {}
    shares = [known.setdefault(i if copy.edit.needs_whole_prompt else (copy.edit, row), len(known))
              for i, (copy, row) in enumerate(zip(copies, of.tolist()))]  # fmt: skip
    return torch.tensor([shares.index(n) for n in range(len(known))]), torch.tensor(shares)


@cache
def odd_numbers(n: int) -> torch.Tensor:
    """(n,) random odd int64, the same in every run."""
    return torch.randint(-(2**62), 2**62, (n,), generator=torch.Generator().manual_seed(n)) * 2 + 1


def hashes_of(change: torch.Tensor, weights: torch.Tensor) -> list[int]:
    """A hash of each prompt's change (batch, pos, n), in which zeros count for nothing. weights (n,) int64 belong to
    the entries' places in a larger space, so that a change has the same hash whatever places are looked at."""
    bits = (change.float().contiguous().view(torch.int32).long() * weights).sum(-1)
    return (bits * odd_numbers(change.shape[1] + 1)[1:].to(bits.device)).sum(1).tolist()


CHECKED = WeakKeyDictionary()  # {model: layers at which OnePass has been compared with a plain pass}


def check_engine(model, layers) -> None:
    """Compare OnePass with plain passes on random prompts, with edits after each layer or with none; once per layer.
    Raises UserError where log-probabilities differ by more than rounding explains, or where it cannot run the model."""
    known = CHECKED.setdefault(model, set())
    for layer in sorted(set(layers) - known) or ([] if known else [None]):
        try:
            try_engine(model, layer)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{type(model.original_model).__name__}: the layers of this family cannot be run for many "
                            f"edits in one pass ({type(error).__name__}: {first_line(error)})") from error  # fmt: skip
        known.add(layer)


def pushed(direction: torch.Tensor, turn: int):
    """An edit that adds the direction (d_model,) to the tokens of the mask from the turn-th on."""
    return lambda h, mask: torch.where((mask & (mask.cumsum(1) > turn))[..., None], h + direction, h).to(h.dtype)


@torch.inference_mode()
def try_engine(model, layer: int | None) -> None:
    """check_engine at one layer (None: without an edit). Raises ValueError where log-probabilities differ."""
    plain, tried = model.original_model, [NONE]
    ids = edits.random_ids(plain, (3, 20))
    ids[:, : WORTH_SHARING + 1] = ids[0, : WORTH_SHARING + 1]
    prompts = [row[:n].tolist() for row, n in zip(ids, (20, 17, 12))]
    if layer is not None:
        h = edits.residual_stream(plain, ids, layer)
        noise = torch.randn(2, h.shape[-1], generator=torch.Generator().manual_seed(0)).to(h.device) * h.float().std()
        tried += [Edit(f"pushed {k}", at={layer: pushed(direction, 3 * k)}) for k, direction in enumerate(noise)]

    def one_by_one() -> torch.Tensor:  # (n_edits, tokens of all prompts, d_vocab)
        found = []
        for edit in tried:
            with edits.applied(model, model.tokenizer, edit):
                found.append([edits.log_probs(plain, torch.tensor([row], device=ids.device))[0] for row in prompts])
        return torch.stack([torch.cat(rows) for rows in found])

    def score(places, start, h):  # of tokens that the row does not have or that are unablated, NaN
        return pad(head(model, h).log_softmax(-1).cpu(), (0, 0, start, 20 - start - h.shape[1]), value=torch.nan)

    expected, real = one_by_one(), torch.arange(20) < torch.tensor([[20], [17], [12]])
    for share in (True, False):
        found = torch.empty(len(tried), 3, 20, expected.shape[-1])
        OnePass(model, tried, share).fill(found, prompts, score, [0, 1, 2])
        found = torch.where(found.isnan(), found[0], found)[:, real]
        if not edits.same_up_to_rounding(found, expected, plain, one_by_one):
            raise ValueError("it gives other probabilities than a plain pass for each of them")
