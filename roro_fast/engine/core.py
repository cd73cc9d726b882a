"""StepEngine: continuous batching of stepwise-routed sequences over K models, with exact catch-up handoff.

Every iteration runs each model once over a ragged batch in which decode rows and catch-up rows ride together: a
sequence that switches models brings just the tokens its new writer has not seen. Sequences at a step boundary are
routed in one `RoutingPolicy.decide` call per policy. `.slots` holds their state, `.kv` and `.memory` their KV.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from roro_fast.engine import boundary, finish
from roro_fast.engine.checks import check_request
from roro_fast.engine.forward import Launched
from roro_fast.engine.layout import lay_out, may_share
from roro_fast.engine.policy import RoutingPolicy
from roro_fast.engine.projection.catch_up import ProjectedCatchUp, Projections
from roro_fast.engine.request import Request
from roro_fast.engine.score import score_prompts
from roro_fast.engine.slots import Phase, Slots
from roro_fast.engine.tracks import Tracks, vocabularies
from roro_fast.engine.trajectory import Step, Trajectory
from roro_fast.engine.transfer import upload
from roro_fast.errors import CapacityError, ConfigError
from roro_fast.models.decoder import Decoder
from roro_fast.models.trunk import shared_layers
from roro_fast.ops.decoder_forward import forget
from roro_fast.profiling import mark


class StepEngine:
    """K models, one scheduler, one KV arena.

    models: smallest first, each on the device where it is (one for all, or one each); vocabularies of one tokenizer may
    be padded differently, ids past the smallest one are never sampled. tokenizer: one that all models share, or a list
    with one each, the same object for models that share one; what other models wrote is then tokenised step by step,
    see `.tracks`. delimiter: text that ends a step, in one token or spelled over several. max_num_seqs: concurrent
    sequences. kv_bytes: size of the KV arena of a device. max_batch_tokens: tokens one forward may hold, longer prompts
    are chunked. max_model_len: context cap, default the smallest model's. overlap: queue the forwards of all models
    before waiting for the first, so that they run side by side and a row that is routed in this iteration is written
    from the next. graphs: pad batches, all but long prefills, and replay them as CUDA graphs. Both are on by default
    on a GPU; results are the same. projections: {(source, receiver): KVProjection}, gated maps by which a receiver is
    handed the source's KV instead of computing it; answers are then approximate and labelled so in their meta. Off by
    default.
    share_layers: run first layers that all models have in common, bit for bit, once per token for all of them, and keep
    their KV once: a switch then costs only the layers that differ. Default: where there are such layers, unless the
    models have several tokenizers, or graphs or projections are on, with which it does not go. Answers are the same.
    """

    def __init__(
        self,
        models: list[Decoder],
        tokenizer: Any | Sequence[Any],
        *,
        delimiter: str = "\n\n",
        max_num_seqs: int = 256,
        kv_bytes: int = 256 << 20,
        page_size: int = 16,
        max_batch_tokens: int = 8192,
        max_model_len: int | None = None,
        overlap: bool | None = None,
        graphs: bool | None = None,
        projections: Projections | None = None,
        share_layers: bool | None = None,
    ) -> None:
        if not models:
            raise ConfigError("models: the pool is empty; give at least one model")
        if page_size < 1 or max_num_seqs < 1:
            raise ConfigError("engine.page_size and engine.max_num_seqs must be at least 1")
        if max_batch_tokens < max_num_seqs:
            raise ConfigError(
                f"engine.max_batch_tokens: {max_batch_tokens} is below engine.max_num_seqs {max_num_seqs}; "
                "every decode row needs a token per iteration"
            )
        self.models, self.vocabularies = models, vocabularies(models, tokenizer, delimiter)
        self.tokenizer = self.vocabularies[0].tokenizer
        self.num_models = len(models)
        of = [next(v for v in self.vocabularies if m in v.models) for m in range(self.num_models)]
        self.vocab_sizes, self.vocab_size = [v.size for v in of], of[0].size
        self.max_len = min([m.config.max_position for m in models] + [max_model_len or 1 << 62])
        self.max_batch_tokens = max_batch_tokens
        self.slots = Slots(max_num_seqs, self.max_len, self.num_models)
        on_gpu = models[0].device.type == "cuda"
        self.overlap = on_gpu if overlap is None else overlap
        self._layout: dict[str, Any] = {
            "kv_bytes": kv_bytes,
            "page_size": page_size,
            "max_len": self.max_len,
            "vocab_sizes": self.vocab_sizes,
            "max_tokens": max_batch_tokens,
            "graphs": on_gpu if graphs is None else graphs,
            "delimiters": [v.ends for v in of],
            "eos": [v.eos_ids for v in of],
        }
        self._share = may_share(share_layers, graphs, on_gpu, projections, len(self.vocabularies))
        self._lay_out(shared_layers(models) if self._share else 0)
        if share_layers and not self.shared_layers:
            raise ConfigError("share_layers: the models have no first layers in common; leave it out")
        self.tracks: Tracks | None = None
        if len(self.vocabularies) > 1:
            room = [min(self.max_len, *(self.kv.capacity[m] * page_size for m in v.models)) for v in self.vocabularies]
            self.tracks = Tracks(self.vocabularies, self.slots, room)
        if projections:
            if self.tracks is not None:
                raise ConfigError("projections: KV is projected between models of one tokenizer; drop the maps")
            self.forward.projecting = ProjectedCatchUp(models, self.kv, self.slots, projections)
        self._draft_states = torch.zeros(max_num_seqs, models[0].config.hidden_size, device=models[0].device)
        self.waiting: deque[tuple[int, Request, RoutingPolicy | None]] = deque()
        self.iterations = 0
        self._ids = 0
        self._done: list[Trajectory] = []
        self._rollouts: list[set[int]] = []  # request ids of each rollout that is being iterated
        self._inference = torch.inference_mode()  # made once, which is dear; steps do not nest
        self._end = [""] * max_num_seqs  # finish reason that a step under judgement will bring if it is kept

    def _lay_out(self, depth: int) -> None:
        """Make the KV memory of models that share `depth` first layers, and the forward that goes by it."""
        self.shared_layers = depth
        self.kv, self.memory, self.forward = lay_out(self.models, self.slots, depth, **self._layout)

    # -- requests --------------------------------------------------------------------------------------------------

    def add(self, request: Request, policy: RoutingPolicy | None = None) -> int:
        """Queue a request; returns its id. Raises CapacityError or ConfigError before anything is queued."""
        policy = request.policy or policy
        check_request(request, policy, self.kv, self.tracks, self.vocab_sizes, self.max_len)
        self._ids += 1
        self.waiting.append((self._ids, request, policy))
        return self._ids

    def warm_up(self, context: int, *, shared: bool = False, truncated: bool = False) -> int:
        """Capture the CUDA graphs for contexts of up to `context` tokens before their use; see `Forward.warm_up`."""
        return self.forward.warm_up(context, shared=shared, truncated=truncated)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._done) or self.forward.batcher.census()[1] < len(self.slots.phase)

    def abort(self, request_id: int) -> bool:
        """Cancel a queued or running request. Returns False when it is unknown or already finished."""
        for mine in self._rollouts:
            mine.discard(request_id)
        for i, (rid, _, _) in enumerate(self.waiting):
            if rid == request_id:
                del self.waiting[i]
                return True
        for s in np.nonzero(self.slots.request_id == request_id)[0]:
            self.forward.settle()
            self._release(int(s))
            return True
        return False

    def fork(self, request_id: int, request: Request, policy: RoutingPolicy | None = None) -> int:
        """A second sequence that shares everything written so far and goes on by itself under `request`'s settings.

        The new request's prompt is the whole text so far. Raises KeyError when `request_id` is not running, and
        CapacityError when no slot is free.
        """
        found = np.nonzero(self.slots.request_id == request_id)[0]
        free = np.nonzero(self.slots.phase == Phase.FREE)[0]
        if not len(found):
            raise KeyError(f"request {request_id} is not running")
        if not len(free):
            raise CapacityError("engine.max_num_seqs: no free slot to fork into; raise it or wait")
        source, target = int(found[0]), int(free[0])
        so_far = self.slots.tokens[source, : self.slots.length[source]].tolist()
        request = replace(request, prompt_ids=so_far if self.tracks is None else self.tracks.so_far(source))
        policy = request.policy or policy
        check_request(request, policy, self.kv, self.tracks, self.vocab_sizes, self.max_len)
        self._ids += 1
        self._admit(target, self._ids, request, policy)
        self.kv.fork(source, target)
        if self.forward.projecting is not None:
            self.forward.projecting.fork(source, target)
        for mine in self._rollouts:
            if request_id in mine:
                mine.add(self._ids)
        return self._ids

    # -- the loop --------------------------------------------------------------------------------------------------

    def rollout(
        self, requests: Iterable[Request], policy: RoutingPolicy | None = None, *, on_error: str = "raise"
    ) -> Iterator[Trajectory]:
        """Stream trajectories as they finish, in no fixed order; requests are pulled as slots come free.

        on_error "skip" turns a request the engine must refuse into a trajectory with finish_reason "refused" and
        meta["error"], so that a long run goes on; "raise" raises it. Leaving the loop early cancels what is in flight.
        Several rollouts may be iterated at once on one engine; each gets its own trajectories and their forks.
        """
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"on_error: {on_error!r}; use 'raise' or 'skip'")
        return self._stream(iter(requests), policy, on_error)

    def _stream(self, source: Iterator[Request], policy: RoutingPolicy | None, on_error: str) -> Iterator[Trajectory]:
        mine: set[int] = set()
        self._rollouts.append(mine)
        exhausted, same_weights = False, False  # nobody but this loop has run since the last step
        try:
            while mine or not exhausted:
                while not exhausted and len(self.waiting) < self.forward.batcher.census()[1]:
                    request, same_weights = next(source, None), False
                    if request is None:
                        exhausted = True
                        break
                    try:
                        mine.add(self.add(request, policy))
                    except (CapacityError, ConfigError) as e:
                        if on_error == "raise":
                            raise
                        yield finish.refused(request, str(e))
                if not self.has_work:
                    break
                done = self.step(same_weights=same_weights)
                same_weights = not done
                for t in done:
                    if t.meta["request_id"] not in mine:
                        self._done.append(t)
                for t in done:
                    if t.meta["request_id"] in mine:
                        mine.discard(t.meta.pop("request_id"))
                        yield t
        finally:
            self._rollouts = [ids for ids in self._rollouts if ids is not mine]
            for rid in mine:
                self.abort(rid)

    def step(self, *, same_weights: bool = False) -> list[Trajectory]:
        """One iteration: admit, decide, one forward per model with work. Returns what finished.

        same_weights: a promise that no weight has changed since the last step, which saves looking at them all.
        """
        with self._inference:
            return self._step(same_weights)

    def _step(self, same_weights: bool) -> list[Trajectory]:
        if not same_weights:
            self.forward.look_at_weights()
        slots = self.slots
        paused, free, ready = self.forward.batcher.census()
        if self.waiting and free and not paused:  # those preempted come back before newcomers may take their memory
            with mark("admit"):
                for s in np.flatnonzero(slots.phase == Phase.FREE)[: len(self.waiting)].tolist():
                    self._admit(s, *self.waiting.popleft())
            ready = self.forward.batcher.census()[2]
        progress = bool(len(ready) or self._done)
        if len(ready):
            self._decide(ready, None)
        if self.shared_layers:
            progress |= self.forward.launch_shared()
        flying: list[tuple[Launched, list[boundary.Asked]]] = []
        for m in range(self.num_models):
            launched = self.forward.launch(m)
            progress |= launched is not None
            if launched is not None and self.overlap:
                flying.append((launched, self._ask_early(launched)))
            elif launched is not None:
                self._collect(launched)
        for launched, asked in flying:
            self._collect(launched, asked)
        if not progress and (slots.phase != Phase.FREE).any():
            raise RuntimeError("the engine is stuck: no sequence can get memory; please report this")
        self.iterations += 1
        done, self._done = self._done, []
        if not done:
            return done
        with mark("finish"):
            return finish.with_texts(done, self.tokenizer)

    def _admit(self, s: int, request_id: int, request: Request, policy: RoutingPolicy | None) -> None:
        self.slots.admit(s, request, policy, request_id)
        self.slots.max_total[s] = min(self.slots.max_total[s], self.max_len)
        if self.tracks is not None:
            self.tracks.admit(s, request, policy is not None)
        self._end[s] = ""
        if self.forward.projecting is not None:
            self.forward.projecting.admit(s)

    def _scout(self, launched: Launched, chosen: np.ndarray) -> boundary.Scout:
        """What model 0 saw of the rows at positions `chosen` of its forward.

        The state is that of the boundary where the step in question begins: for a finished draft the one kept when it
        began, since the draft's last token is one step too late.
        """
        slot = launched.rows[chosen]
        at, kept, drafted = upload((chosen, slot, self.slots.drafting[slot]), launched.hidden.device)
        hidden = torch.where(drafted[:, None], self._draft_states[kept], launched.hidden[at].float())
        return boundary.Scout(hidden, launched.sampled.entropy[at], launched.sampled.max_prob[at])

    def _ask_early(self, launched: Launched) -> list[boundary.Asked]:
        """Ask the policies that need no host about the rows just scouted, while the forward still runs."""
        rows = launched.rows
        early = [
            i for i in np.flatnonzero(self.slots.phase[rows] == Phase.SCOUT).tolist()
            if getattr(self.slots.policy[rows[i]], "on_device", False)
        ]  # fmt: skip
        if not early:
            return []
        with self.forward.on(launched.model):
            scout = self._scout(launched, np.array(early))
            return boundary.ask(self.slots, self.forward.batcher, rows[early], self.num_models, scout, self._texts)

    def _collect(self, launched: Launched, asked: Sequence[boundary.Asked] = ()) -> None:
        """Wait for a forward's samples, decide its scouted rows and append the tokens of those it writes."""
        if len(launched.rows):
            sampled = launched.fetched.wait()
            with self.forward.on(launched.model), mark("record"):
                self._take(launched, sampled, asked)

    def _take(self, launched: Launched, sampled: Sequence[np.ndarray], asked: Sequence[boundary.Asked]) -> None:
        m, rows, batcher = launched.model, launched.rows, self.forward.batcher
        token, logprob, entropy, _, finite = sampled
        if asked or not batcher.plain(m, rows, finite):
            live = self._sort_out(launched, finite, asked)
            rows, token, logprob, entropy = rows[live], token[live], logprob[live], entropy[live]
        for s, closed, ended, full in batcher.append(m, rows, token, logprob, entropy):
            self._step_ended(s, closed, "eos" if ended else self._full_reason(s) if full else "")

    def _sort_out(self, launched: Launched, finite: np.ndarray, asked: Sequence[boundary.Asked]) -> np.ndarray:
        """Decide the scouted rows and end those without a number; says which rows the forward has written [N] bool."""
        slots, m, rows, hidden = self.slots, launched.model, launched.rows, launched.hidden
        broken = rows[~finite]
        waiting = finite & (slots.phase[rows] == Phase.SCOUT)
        for a in asked:
            waiting &= ~np.isin(rows, a.rows)
            self._settle(a, ~np.isin(a.rows, broken))
        if waiting.any():
            self._decide(rows[waiting], self._scout(launched, np.flatnonzero(waiting)))
        # A row routed to this model, whose draft was not thrown away, goes on from the logits just computed.
        live = finite & (slots.phase[rows] == Phase.WRITE) & (slots.writer[rows] == m)
        begins = live & slots.drafting[rows] & (slots.length[rows] == slots.step_start[rows])
        if begins.any():
            kept, at = upload((rows[begins], np.flatnonzero(begins)), hidden.device)
            self._draft_states[kept] = hidden[at].float()
        for s in broken[slots.phase[broken] != Phase.FREE].tolist():
            for j in range(self.kv.num_parts):
                self.kv.forget(j, self.kv.table[j, s, : self.kv.num_pages[j, s]].tolist())
            self._finish(s, "nan")
        return live

    def _full_reason(self, s: int) -> str:
        request = self.slots.request[s]
        assert request is not None
        return "length" if self.slots.written[:, s].sum() >= request.max_new_tokens else "context"

    # -- step boundaries -------------------------------------------------------------------------------------------

    def _step_ended(self, s: int, closed: bool, reason: str) -> None:
        slots, policy = self.slots, self.slots.policy[s]
        if slots.drafting[s]:
            assert policy is not None
            self._end[s] = reason
            slots.draft_closed[s] = closed
            slots.phase[s] = Phase.SCOUT if policy.needs_scout else Phase.DECIDE
            return
        slots.keep_step(s, slots.close_step(s, closed))
        self._next_step(s, reason)

    def _next_step(self, s: int, reason: str) -> None:
        """The current step was kept: finish, or get the next one going."""
        slots, policy = self.slots, self.slots.policy[s]
        if not reason and slots.step_index[s] >= slots.max_steps[s]:
            reason = "steps"
        if reason:
            self._finish(s, reason)
        elif policy is None:
            slots.phase[s] = Phase.WRITE
        elif slots.regenerate[s]:
            slots.drafting[s], slots.writer[s], slots.phase[s] = True, 0, Phase.WRITE
            self._show(s, 0)
        elif policy.needs_scout:
            slots.phase[s] = Phase.SCOUT
            self._show(s, 0)
        else:
            slots.phase[s] = Phase.DECIDE

    def _show(self, s: int, m: int) -> None:
        """Model m reads slot s next: give it the text in its own tokens, or finish when these are too many."""
        if self.tracks is not None and not self.tracks.activate(s, m):
            self._finish(s, "context")

    def _decide(self, rows: np.ndarray, scout: boundary.Scout | None) -> None:
        for asked in boundary.ask(self.slots, self.forward.batcher, rows, self.num_models, scout, self._texts):
            self._settle(asked)

    def _settle(self, asked: boundary.Asked, keep: np.ndarray | None = None) -> None:
        """Put a policy's answers into effect."""
        for s, action in boundary.answer(self.slots, asked, self.num_models, keep):
            self._apply(s, action)

    def _apply(self, s: int, action: int) -> None:
        slots = self.slots
        if slots.phase[s] == Phase.FREE:  # aborted by the policy itself
            return
        slots.phase[s] = Phase.WRITE
        if not slots.drafting[s]:
            slots.writer[s] = action
            self._show(s, action)
        elif action == 0:
            slots.keep_step(s, slots.close_step(s, bool(slots.draft_closed[s])))
            self._next_step(s, self._end[s])
        else:
            slots.discard_step(s)
            self.kv.truncate(s, int(slots.length[s]), None if self.tracks is None else self.tracks.readers(s))
            slots.drafting[s], slots.writer[s] = False, action
            self._show(s, action)

    def _texts(self, s: int, draft: Step | None) -> list[str]:
        if self.tracks is not None:
            return self.tracks.texts(s, draft)
        slots = self.slots
        steps = slots.steps[s] if draft is None else [*slots.steps[s], draft]
        at = slots.prompt_len[s]
        return finish.decode(self.tokenizer, [slots.tokens[s, at + p.start : at + p.end].tolist() for p in steps])

    def _finish(self, s: int, reason: str) -> None:
        done = finish.trajectory(self.slots, s, reason, self.models, time.perf_counter())
        if self.forward.projecting is not None:
            self.forward.projecting.label(s, done)
        if self.tracks is not None:
            self.tracks.label(s, done)
        self._done.append(done)
        self._release(s)

    def _release(self, s: int) -> None:
        self.kv.free(s)
        self.slots.release(s)

    # -- single-model services -------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: list[list[int]],
        *,
        n: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        model: int = 0,
    ) -> list[list[list[int]]]:
        """n completions per prompt by one model, each a list of token ids including EOS when it was produced.

        Equal prompts get different draws: the i-th prompt runs under seed + i.
        """
        requests = [
            Request(
                p,
                sample=j,
                seed=seed + i,
                max_new_tokens=max_new_tokens,
                max_steps=max_new_tokens,
                temperature=temperature,
                model=model,
                tag={"at": (i, j)},
            )
            for i, p in enumerate(prompts)
            for j in range(n)
        ]
        out: list[list[list[int]]] = [[[] for _ in range(n)] for _ in prompts]
        for t in self.rollout(requests):
            i, j = t.meta["at"]
            out[i][j] = t.token_ids
        return out

    def score(
        self, prompts: list[list[int]], rows: list[list[int]], label_ids: list[int], *, model: int = 0
    ) -> list[torch.Tensor]:
        """Label probabilities at chosen positions: per prompt [len(rows[i]), len(label_ids)] float32, sums to 1.

        One forward pass per batch, only the K label rows of the head are multiplied. Raises ConfigError for a row
        outside its prompt.
        """
        if not 0 <= model < self.num_models:
            raise ConfigError(f"model: {model} is not in the pool of {self.num_models}")
        return score_prompts(self.models[model], prompts, rows, label_ids, self.max_batch_tokens)

    def update_weights(self, model: int) -> None:
        """Tell the engine that the weights of `model` changed in place; nothing cached for it is reused."""
        self.forward.settle()
        forget(self.models[model])
        depth = shared_layers(self.models) if self._share else 0
        if depth != self.shared_layers:
            self._layout["stats"] = self.kv.stats
            del self.kv, self.memory, self.forward  # room for the new
            self._lay_out(depth)  # running sequences have their KV computed anew
            self.forward.look_at_weights()
            return
        if depth:
            forget(self.models[0])  # whose packed weights serve all
        self.forward.look_at_weights()
        for part in range(self.kv.num_parts) if depth else [model]:
            self.kv.bump_version(part)
