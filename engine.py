"""
The engine: many edits of the residual stream in one pass of a model.

Edits share the layers below the first that they change. So the model runs once a batch, unablated; then each prompt's
residual stream there is copied once for every edit that changes it (equal changes share a copy, an edit that changes
nothing costs nothing), and the later layers run on the copies from their first edited token on. What all prompts of a
batch begin with, as a quiz's header, is run once for all of them.
"""

import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, KVSharingDict

import memory
from data import UserError, first_line, padded, special_ids
from edits import (
    NONE,
    Edit,
    Latents,
    OfLatents,
    alike,
    applied,
    hidden,
    log_probs,
    random_ids,
    unwatched_parts,
    watch_tokens,
    without,
)

WORTH_SHARING = 8  # tokens a prompt, at least, that need not be run again, for a batch to be run in two stages


@dataclass
class Stage:
    """What one pass of the unablated model over ids (n, pos) leaves behind, for OnePass."""

    ids: torch.Tensor
    streams: dict[int, torch.Tensor]  # {layer: (n, pos, d_model)}, the residual stream behind each edited layer
    ordinary: torch.Tensor  # (n, pos), which tokens are counted: not special, not the first
    editable: torch.Tensor  # (n, pos), which are edited (edits.watch_tokens)
    result: torch.Tensor  # (n, pos, d_model), what leaves the final norm
    inputs: dict[int, tuple]  # {layer: (args, kwargs, what lower layers had left for it)}; the last, where layers share
    cache: DynamicCache  # keys and values of these tokens and of those before


@dataclass(frozen=True)
class Copy:
    """A prompt's residual stream behind a layer, to be edited from its token `start` on."""

    prompt: int
    layer: int
    start: int
    edit: Edit


class OnePass:
    """Runs a model on token ids (batch, pos) once for a list of edits, at whatever layers.

    Calling it runs the unablated model and returns what leaves its final norm, (batch, pos, d_model). Then `rows`
    (n_edits, batch) says which row belongs to which edit and prompt, rows 0 to batch - 1 being the unablated prompts
    and the others `copies`; `source` (n_rows,) is each row's prompt; and `run_copies` runs the later layers on the
    copies, as many at a time as there is memory for, at most COPY_TOKENS tokens; max_memory: as memory.free_bytes has
    it. A copy branches off behind the first layer at which its edit changes anything. Tokens before the first that any
    of its layers changes are not run again: later layers are causal, so they take the unablated prompt's keys and
    values. Likewise the tokens that prompts begin with, all alike or some, are a stage of their own, run once for each
    different beginning, and not again while the next batch begins with the same.
    """

    def __init__(self, model, edits: list[Edit], max_memory: float | None = None):
        self.model, self.edits, self.max_memory = model, edits, max_memory
        self.layers = sorted({layer for edit in edits for layer in edit.at})
        # what such an edit does at its second layer hangs on the whole prompt as its first one leaves it
        self.in_one_piece = any(edit.whole and len(edit.at) > 1 for edit in edits)
        some = {(layer, function): function.latents for edit in edits for layer, function in edit.at.items()
                if isinstance(function, OfLatents)}  # fmt: skip
        unions = {}  # {(layer, SAE): features of any edit}
        for (layer, _), latents in some.items():
            unions.setdefault((layer, latents.sae), set()).update(latents.features.tolist())
        unions = {key: sorted(features) for key, features in unions.items()}
        self.latents = {(layer, sae): Latents(sae, union) for (layer, sae), union in unions.items()}
        # {(layer, function): which of the union's are its own}
        self.columns = {(layer, function): np.searchsorted(unions[layer, latents.sae], latents.features.tolist())
                        for (layer, function), latents in some.items()}  # fmt: skip
        self.parts, self.begin = unwatched_parts(model), None

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        first, places = (0, []) if self.in_one_piece else beginnings(ids.tolist())
        # places: which row of each stage is a prompt's. A cache without a config keeps sliding layers' keys, too
        self.stages, self.places, cache = [], [], DynamicCache()
        self.streams, self.changed, self.acts, self.cache = {}, {}, {}, None  # of the prompts before: memory for these
        if first:
            begin = ids[[places.index(row) for row in range(max(places) + 1)], :first]
            if self.begin is None or not torch.equal(self.begin.ids, begin):
                self.begin = self.forward(begin, DynamicCache())
            self.stages, self.places = [self.begin], [torch.tensor(places)]
            cache = for_rows(self.begin.cache, self.places[0], first)
        self.stages.append(self.forward(ids[:, first:], cache))
        self.places.append(torch.arange(len(ids)))

        def whole(parts):
            return torch.cat([x[rows.to(x.device)] for x, rows in zip(parts, self.places)], 1)

        self.streams = {layer: whole([stage.streams[layer] for stage in self.stages]) for layer in self.layers}
        self.ordinary, self.editable, result = (
            whole([vars(stage)[name] for stage in self.stages]) for name in ("ordinary", "editable", "result")
        )
        self.cache = cache
        self.plan(len(ids))
        return result

    def forward(self, ids: torch.Tensor, cache: DynamicCache) -> Stage:
        """One pass of the unablated model behind the tokens that `cache` holds, which it adds to."""
        inputs, streams, kept, blocks = {}, {}, {}, self.model.blocks

        def keep_input(layer):
            def hook(module, args, kwargs):
                store = {}  # a copy, as the layers go on to fill it
                store.update(*(value for value in kwargs.values() if isinstance(value, KVSharingDict)))
                inputs[layer] = (args[1:], kwargs, store)

            return hook

        def keep_result(module, args):
            kept["result"] = args[0]
            return args[0][:1, :1], *args[1:]  # the unembedding that the model goes on to is not what we need

        def keep_stream(layer):  # the block's own hook: a list of hook points is looked up anew for each pass
            def hook(module, args, output):
                streams[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        with ExitStack() as hooks:
            for layer in range(self.layers[0] + 1, len(blocks)) if self.layers else ():
                handle = blocks[layer].register_forward_pre_hook(keep_input(layer), with_kwargs=True)
                hooks.callback(handle.remove)
            hooks.callback(self.model.unembed.register_forward_pre_hook(keep_result).remove)
            seen = hooks.enter_context(watch_tokens(self.model.original_model, self.model.tokenizer))
            for layer in set(self.layers) & set(range(len(blocks))):
                hooks.callback(blocks[layer].register_forward_hook(keep_stream(layer)).remove)
            hooks.enter_context(without(self.parts))
            self.model(ids, past_key_values=cache, use_cache=True)
        if missing := sorted(set(self.layers) - set(streams)):
            raise RuntimeError(f"layers {missing} never ran: nothing was edited there")
        masks = [seen[name].to(kept["result"].device) for name in ("ordinary", "edited")]
        return Stage(ids, streams, *masks, kept["result"], inputs, cache)

    def plan(self, batch: int) -> None:
        """Which edits change which prompts, from which layer and token on; equal changes share a row."""
        self.acts = {(layer, sae): latents.encode(self.streams[layer]) for (layer, sae), latents in
                     self.latents.items()}  # fmt: skip
        self.changed = {}  # {(layer, function): a' - a of its latents, or h'}
        self.rows = torch.arange(batch).repeat(len(self.edits), 1)
        self.copies, source, known = [], list(range(batch)), {}
        for k, edit in enumerate(self.edits):
            looks = {layer: self.looked_at(edit, layer) for layer in sorted(edit.at)}
            for b in range(batch):
                touched = {layer: first[b] for layer, (first, _, _) in looks.items() if first[b] is not None}
                if not touched:
                    continue
                layer = min(touched)
                start = 0 if edit.whole and len(edit.at) > 1 else min(touched.values())
                _, space, hashes = looks[layer]
                # what is to come behind further layers is the edit's own
                own = k if layer < max(edit.at) else None
                key = (b, layer, space, hashes[b], own)
                if key not in known:
                    known[key] = batch + len(self.copies)
                    self.copies.append(Copy(b, layer, start, edit))
                    source.append(b)
                self.rows[k, b] = known[key]
        self.source = torch.tensor(source)

    def looked_at(self, edit: Edit, layer: int) -> tuple[list, object, list]:
        """What an edit would change behind a layer of the unablated prompts: for each prompt the first token (None:
        nothing is changed), and a hash of the change, by which equal ones are known, whatever method or list of
        features made them; and the space that the change is in: an SAE's activations, or the residual stream."""
        function, h, editable = edit.at[layer], self.streams[layer], self.editable.to(self.streams[layer].device)
        if isinstance(function, OfLatents):
            space = function.latents.sae
            places = torch.from_numpy(self.columns[layer, function]).to(h.device)
            acts, weights = self.acts[layer, space][0], odd_numbers(self.acts[layer, space][0].shape[-1])
            acts, weights = acts[..., places], weights.to(h.device)[places]
            change = self.changed[layer, function] = function.change(acts, editable)
            touched = change != 0
            if function.always:
                touched = touched | ((acts > 0) & editable[..., None])
        else:
            space, weights = None, odd_numbers(h.shape[-1]).to(h.device)
            self.changed[layer, function] = function(h, editable)
            change = self.changed[layer, function].float() - h.float()
            touched = change != 0
        found, first = touched.any(-1).max(1)
        first = [at if somewhere else None for somewhere, at in zip(found.tolist(), first.tolist())]
        return first, space, hashes_of(change, weights)

    @torch.inference_mode()
    def run_copies(self):
        """Yield (rows, start, h): rows of copies (n,), and from token `start` on what leaves the final norm,
        (n, pos - start, d_model)."""
        order = sorted(range(len(self.copies)), key=lambda i: (self.copies[i].layer, self.copies[i].start))
        for layer, group in itertools.groupby(order, key=lambda i: self.copies[i].layer):
            some, total = list(group), self.ordinary.shape[1]
            tokens = total - self.copies[some[0]].start  # later ones have fewer
            room = self.at_once(tokens, total, self.model.cfg.n_layers - layer - 1)
            size = min(room, memory.COPY_TOKENS // tokens)
            yield from memory.in_parts(some, size, partial(self.run_some, layer=layer))

    def at_once(self, tokens: int, total: int, layers: int) -> int:
        """How many prompts or copies there is memory for, of which `tokens` tokens, the last of `total`, run through
        `layers` layers."""
        free = memory.free_bytes(torch.device(self.model.cfg.device), self.max_memory)
        return int(memory.SHARE * free / memory.row_bytes(self.model, tokens, total, layers))

    def over(self, some_batches, score) -> None:
        """score(picked, ids) of each batch's prompts, of as many at a time as there is memory for."""
        for picked, ids in some_batches:
            tokens = ids.shape[1]
            memory.refuse_without_room(self.model, tokens, self.max_memory)
            room = self.at_once(tokens, tokens, self.model.cfg.n_layers)

            def part(places, picked=picked, ids=ids):
                score([picked[i] for i in places], ids[places])

            for _ in memory.in_parts(list(range(len(picked))), min(room, len(picked)), part):
                pass

    def run_some(self, some: list[int], layer: int) -> tuple:
        """`run_copies`' triple of these copies."""
        batch = len(self.rows[0])
        copies, rows = [self.copies[i] for i in some], torch.tensor(some) + batch
        start = copies[0].start
        h, cache = self.edited(copies, layer, start), for_rows(self.cache, self.source[rows], start, layer + 1)
        out, first = [], 0
        for stage, places in zip(self.stages, self.places):
            length = stage.ids.shape[1]
            skip = max(0, start - first)
            if skip < length:
                ones, again = alike_so_far(copies, places)
                if len(ones) < len(copies):
                    cache = for_rows(cache, ones, start, layer + 1)
                piece = h[ones.to(h.device), first + skip - start : first + length - start]
                of = [copies[i] for i in ones]
                out.append(self.later_layers(piece, layer, of, stage, places, first, skip, cache)[again])
                if len(ones) < len(copies):
                    cache = for_rows(cache, again, first + length, layer + 1)
            first += length
        return rows, start, self.model.ln_final(torch.cat(out, 1))

    def later_layers(self, h, layer: int, copies: list[Copy], stage: Stage, places, first: int, skip: int, cache):
        """Run the layers behind `layer` on h (n, pos - skip, d_model), given what they were given for the stage's
        tokens, the prompts' tokens from `first` on; row i of h is of copies[i], whose prompt is row places[prompt] of
        the stage."""
        prompts = torch.tensor([copy.prompt for copy in copies])
        source = places[prompts]
        editable = self.editable[prompts.to(self.editable.device), first + skip : first + stage.ids.shape[1]]
        blocks, (_, _, left) = self.model.blocks, stage.inputs.get(layer + 1, ((), {}, {}))
        store = {name: tuple(x[source.to(x.device)] for x in pair) for name, pair in left.items()}
        with without(self.parts):
            for number in range(layer + 1, len(blocks)):
                args, kwargs = self.cut(stage.inputs[number][:2], source, skip, stage.ids.shape, cache, store)
                out = blocks[number](h, *args, **kwargs)
                h = out[0] if isinstance(out, tuple) else out
                for edit, rows in by_edit(copies):
                    if number in edit.at:
                        h[rows] = edit.at[number](h[rows], editable[rows].to(h.device))
        return h

    def edited(self, copies: list[Copy], layer: int, start: int) -> torch.Tensor:
        """The residual stream behind the layer of edited copies from token `start` on, (n, pos - start, d_model)."""
        h = self.streams[layer]
        prompts = torch.tensor([copy.prompt for copy in copies], device=h.device)
        new = h[prompts, start:]
        for edit, rows in by_edit(copies):
            function, some = edit.at[layer], prompts[rows]
            change = self.changed[layer, function][some, start:]
            if isinstance(function, OfLatents):
                scale = self.acts[layer, function.latents.sae][1]
                scale = scale if isinstance(scale, float) else scale[some, start:]
                change = function.latents.moved(new[rows], change, scale)
            new[rows] = change
        return new

    def cut(self, value, source: torch.Tensor, skip: int, shape: tuple[int, int], cache, store: dict):
        """What a block was given for a stage of `shape` (rows, tokens), as its attention mask or positions, for these
        copies from its token `skip` on; the cache and the store are theirs already."""
        if isinstance(value, DynamicCache):
            return cache
        if isinstance(value, KVSharingDict):
            return store
        if isinstance(value, dict):
            return {name: self.cut(item, source, skip, shape, cache, store) for name, item in value.items()}
        if isinstance(value, tuple):
            return tuple(self.cut(item, source, skip, shape, cache, store) for item in value)
        if not torch.is_tensor(value):
            return value
        rows, length = shape
        if value.ndim > 1 and len(value) == rows:
            value = value[source.to(value.device)]
        dim = {1: 0, 2: 1, 3: 1, 4: 2}[value.ndim]  # (pos), (batch, pos), (batch, pos, d_head), (batch, 1, pos, pos)
        return value.narrow(dim, skip, length - skip) if value.shape[dim] == length else value

    def head(self, h: torch.Tensor) -> torch.Tensor:
        """(n, pos, d_model) after the final norm -> (n, pos, d_vocab) logits in fp32."""
        logits = self.model.unembed(h)
        cap = getattr(self.model.original_model.config.get_text_config(), "final_logit_softcapping", None)
        return (torch.tanh(logits / cap) * cap if cap else logits).float()


def beginnings(rows: list[list[int]]) -> tuple[int, list[int]]:
    """How many tokens the rows (of equal length) begin with that are best run once for all that begin alike, and for
    each row the place of its beginning among the different ones; 0 where it is not worth it."""
    best, found, places = WORTH_SHARING * (len(rows) - 1), (0, []), [0] * len(rows)
    for n in range(1, len(rows[0])):
        known = {}
        places = [known.setdefault((place, row[n - 1]), len(known)) for place, row in zip(places, rows)]
        if len(known) == len(rows):
            break
        if (len(rows) - len(known)) * n >= best:
            best, found = (len(rows) - len(known)) * n, (n, places)
    return found


def alike_so_far(copies: list[Copy], places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the copies (n,) stand for all in a stage, as their edit is one and so is their beginning, and for each
    copy, (n,), the place of its own among these. places (n_prompts,): the rows of the stage that are the prompts'. An
    edit that looks at whole prompts has no copies alike."""
    known, ones, again = {}, [], []
    for number, copy in enumerate(copies):
        key = number if copy.edit.whole else (copy.edit, int(places[copy.prompt]))
        if key not in known:
            known[key] = len(ones)
            ones.append(number)
        again.append(known[key])
    return torch.tensor(ones), torch.tensor(again)


def by_edit(copies: list[Copy]) -> list[tuple[Edit, list[int]]]:
    """Each edit with the places of its copies."""
    found = {}
    for place, copy in enumerate(copies):
        found.setdefault(copy.edit, []).append(place)
    return list(found.items())


@cache
def odd_numbers(n: int) -> torch.Tensor:
    """(n,) random odd int64, always the same ones."""
    return torch.randint(-(2**62), 2**62, (n,), generator=torch.Generator().manual_seed(n)) * 2 + 1


def hashes_of(change: torch.Tensor, weights: torch.Tensor) -> list[int]:
    """A hash of each prompt's change (batch, pos, n). Entries that are 0 count for nothing; weights (n,) int64 are the
    places' in a larger space that the entries stand for: it does not matter which places are looked at."""
    bits = (change.float().contiguous().view(torch.int32).long() * weights).sum(-1)
    return (bits * odd_numbers(change.shape[1] + 1)[1:].to(bits.device)).sum(1).tolist()


def for_rows(cache: DynamicCache, source: torch.Tensor, length: int, layer: int = 0) -> DynamicCache:
    """The keys and values of the first `length` tokens, from `layer` on, with row source[i] of `cache` as row i."""
    new = DynamicCache()
    for number, old in enumerate(cache.layers):
        new.layers.append(DynamicLayer())
        if length and number >= layer:
            new.update(*(x[:, :, :length][source.to(x.device)] for x in (old.keys, old.values)), number)
    return new


def pushed(direction: torch.Tensor, turn: int):
    """An edit that adds the direction (d_model,) to every other ordinary token, from the turn-th on."""

    def edit(h, ordinary):
        every_other = ordinary & (ordinary.cumsum(1) % 2 == turn % 2) & (ordinary.cumsum(1) > turn)
        return torch.where(every_other[..., None], h + direction, h).to(h.dtype)

    return edit


def check_engine(model, layers) -> None:
    """Try OnePass on random prompts, with edits behind each of the layers or without any, against the plain model under
    edits.applied; once a model. Raises UserError where log-probabilities differ by more than rounding explains, or
    where OnePass cannot run the model's family."""
    known = vars(model).setdefault("engine_checked", set())
    for layer in sorted(set(layers) - known) or ([] if known else [None]):
        try:
            try_engine(model, layer)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{type(model.original_model).__name__}: the layers of this family cannot be run for many "
                            f"edits in one pass ({type(error).__name__}: {first_line(error)})") from error  # fmt: skip
        known.add(layer)


@torch.inference_mode()
def try_engine(model, layer: int | None) -> None:
    """check_engine for one layer (None: for no edit)."""
    plain, special = model.original_model, special_ids(model.tokenizer)
    ids = random_ids(plain, (3, 20))
    common_id = next(i for i in range(len(special) + 1) if i not in special)
    ids[torch.isin(ids, torch.tensor(special, device=ids.device))] = common_id
    ids[:, : WORTH_SHARING + 1] = ids[0, : WORTH_SHARING + 1]
    real = torch.arange(20)[None] < torch.tensor([[20], [17], [12]])
    prompts, edits = [row[mask].tolist() for row, mask in zip(ids.cpu(), real)], [NONE]
    if layer is not None:
        h = hidden(plain, ids, layer)
        noise = torch.randn(2, h.shape[-1], generator=torch.Generator().manual_seed(0))
        directions = noise.to(h.device) * h.float().std()
        edits += [Edit(f"pushed {k}", {layer: pushed(one, 3 * k)}) for k, one in enumerate(directions)]

    def one_by_one() -> torch.Tensor:  # (n_edits, tokens of all prompts, d_vocab)
        found = []
        for edit in edits:
            with applied(model, model.tokenizer, edit):
                found.append([log_probs(plain, torch.tensor([row], device=ids.device))[0] for row in prompts])
        return torch.stack([torch.cat(rows) for rows in found])

    wanted = one_by_one()
    for in_one_piece in (True, False):
        run = OnePass(model, edits)
        run.in_one_piece = in_one_piece
        h = run(padded(prompts, model.tokenizer, ids.device)).clone()[run.source]
        for rows, start, copies in run.run_copies():
            h[rows, start:] = copies
        found = run.head(h[run.rows]).log_softmax(-1).cpu()[:, real]
        if not alike(found, wanted, plain, one_by_one):
            raise UserError(f"{type(plain).__name__}: many edits in one pass give other probabilities on this model "
                            "than a plain pass for each of them, so it cannot be scored here")  # fmt: skip
