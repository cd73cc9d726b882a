"""State of all running sequences as arrays, one row a slot, so that no token-level work is per-sequence Python."""

from __future__ import annotations

import time

import numpy as np

from roro_fast.engine.pages import chain_hash
from roro_fast.engine.policy import RoutingPolicy
from roro_fast.engine.request import Request
from roro_fast.engine.rng import stream_key
from roro_fast.engine.trajectory import Decision, Step
from roro_fast.models.config import pairs


class Phase:
    """What a slot is at. Plain numbers: arrays are compared with them in every iteration."""

    FREE = 0
    WRITE = 1  # the writer's forward gives the next token
    SCOUT = 2  # model 0 must see the boundary token before the policy can decide
    DECIDE = 3  # the policy can decide now


class Slots:
    """Arrays are indexed by slot. `tokens` holds prompt and completion; `step_*` describe the step being written."""

    def __init__(self, num_slots: int, max_len: int, num_models: int) -> None:
        n = num_slots
        self.tokens = np.zeros((n, max_len), np.int64)
        self.length, self.prompt_len = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.max_total, self.max_steps, self.max_step_tokens = (np.zeros(n, np.int64) for _ in range(3))
        self.phase = np.zeros(n, np.int8)
        self.writer = np.zeros(n, np.int64)
        self.arrival = np.zeros(n, np.int64)
        self.paused, self.ignore_eos = np.zeros(n, bool), np.zeros(n, bool)
        self.regenerate, self.drafting, self.draft_closed = (np.zeros(n, bool) for _ in range(3))
        self.temperature, self.top_p = np.zeros(n, np.float32), np.ones(n, np.float32)
        self.top_k = np.zeros(n, np.int64)
        self.key, self.route_key = np.zeros(n, np.uint64), np.zeros(n, np.uint64)
        self.step_start, self.step_index = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.matched = np.zeros(n, np.int64)  # delimiter characters the step's text ends with (StepBoundary)
        self.sum_logprob, self.min_logprob = np.zeros(n), np.zeros(n)
        self.first_entropy, self.sum_entropy = np.zeros(n), np.zeros(n)
        self.run_min_conf, self.run_prod_conf = np.ones(n), np.ones(n)
        # Of the last step that was kept; no tokens by model -1 before the first.
        self.last_tokens, self.last_model = np.zeros(n, np.int64), np.full(n, -1, np.int64)
        self.last_mean_logprob, self.last_min_logprob = np.zeros(n), np.zeros(n)
        self.last_first_entropy, self.last_mean_entropy = np.zeros(n), np.zeros(n)
        self.budget = np.ones(n, np.float32)
        self.written = np.zeros((num_models, n), np.int64)  # kept tokens per writer
        # Tokens that each model has run or been given by the layers it shares; last, those that these layers ran.
        self.forward_tokens = np.zeros((num_models + 1, n), np.int64)
        self.flops = np.zeros(n)
        self.flops_per_token, self.flops_per_pair = np.zeros(num_models + 1), np.zeros(num_models + 1)
        self.window_flops_per_pair = np.zeros(num_models + 1)  # of layers that see a window of this many tokens
        self.windows = np.zeros(num_models + 1, np.int64)
        self.discarded, self.cached = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.routing_seconds = np.zeros(n)
        self.draws = np.zeros(n, np.int64)  # routing decisions drawn so far
        self.rewrites = np.zeros(n, np.int64)  # drafts thrown away so far: a rewrite must not reuse a draft's uniforms
        self.request: list[Request | None] = [None] * n
        self.policy: list[RoutingPolicy | None] = [None] * n
        self.steps: list[list[Step]] = [[] for _ in range(n)]
        self.decisions: list[list[Decision]] = [[] for _ in range(n)]
        self.started = np.zeros(n)
        self.request_id = np.full(n, -1, np.int64)
        self._arrivals = 0

    def admit(self, s: int, r: Request, policy: RoutingPolicy | None, request_id: int) -> None:
        n = len(r.prompt_ids)
        self.tokens[s, :n] = r.prompt_ids
        self.length[s] = self.prompt_len[s] = n
        self.max_total[s], self.max_steps[s] = n + r.max_new_tokens, r.max_steps
        self.max_step_tokens[s] = r.max_step_tokens or self.tokens.shape[1]
        self.paused[s], self.ignore_eos[s] = False, r.ignore_eos
        self.temperature[s], self.top_k[s], self.top_p[s], self.budget[s] = r.temperature, r.top_k, r.top_p, r.budget
        prompt = chain_hash(0, self.tokens[s, :n])  # one seed for a whole data set must not mean equal draws everywhere
        self.key[s] = stream_key(r.seed, r.sample, prompt, 0)
        self.route_key[s] = stream_key(r.seed, r.sample, prompt, 1)
        self.written[:, s] = self.forward_tokens[:, s] = 0
        self.flops[s] = self.cached[s] = self.routing_seconds[s] = 0
        self.discarded[s] = self.draws[s] = self.rewrites[s] = 0
        self.run_min_conf[s] = self.run_prod_conf[s] = 1.0
        self.step_index[s] = 0
        self.last_tokens[s], self.last_model[s] = 0, -1
        self.last_mean_logprob[s] = self.last_min_logprob[s] = 0.0
        self.last_first_entropy[s] = self.last_mean_entropy[s] = 0.0
        self.begin_step(s)
        self.request[s], self.policy[s] = r, policy
        self.steps[s], self.decisions[s] = [], []
        self.started[s] = time.perf_counter()
        self.request_id[s] = request_id
        self.arrival[s] = self._arrivals
        self._arrivals += 1
        self.regenerate[s] = policy is not None and policy.action_space == "regenerate"
        self.drafting[s] = self.regenerate[s]
        self.writer[s] = r.model if policy is None else 0
        if policy is None or self.regenerate[s]:
            self.phase[s] = Phase.WRITE
        else:
            self.phase[s] = Phase.SCOUT if policy.needs_scout else Phase.DECIDE

    def charge(self, c: int, rows: np.ndarray, count: np.ndarray, context: np.ndarray) -> None:
        """Add the FLOPs of running the last `count` of `context` tokens of each row through part c."""
        self.flops[rows] += self.flops_per_token[c] * count + self.flops_per_pair[c] * pairs(count, context)
        if window := self.windows[c]:
            self.flops[rows] += self.window_flops_per_pair[c] * pairs(count, context, window)

    def charge_cached(self, c: int, s: int, n: int) -> None:
        """Count a shared prefix of n tokens as run: a cost must not depend on who else is in the batch."""
        self.cached[s] += n
        self.forward_tokens[c, s] += n
        self.charge(c, np.array([s]), np.array([n]), np.array([n]))

    def begin_step(self, s: int) -> None:
        self.step_start[s] = self.length[s]
        self.matched[s] = 0
        self.sum_logprob[s] = self.first_entropy[s] = self.sum_entropy[s] = 0.0
        self.min_logprob[s] = 0.0

    def append(self, rows: np.ndarray, token: np.ndarray, logprob: np.ndarray, entropy: np.ndarray) -> None:
        """Add one token to each of `rows` and fold its statistics into the current step."""
        self.tokens[rows, self.length[rows]] = token
        first = self.length[rows] == self.step_start[rows]
        self.first_entropy[rows] = np.where(first, entropy, self.first_entropy[rows])
        self.min_logprob[rows] = np.where(first, logprob, np.minimum(self.min_logprob[rows], logprob))
        self.sum_logprob[rows] += logprob
        self.sum_entropy[rows] += entropy
        self.length[rows] += 1
        self.written[self.writer[rows], rows] += 1

    def close_step(self, s: int, closed: bool) -> Step:
        """The record of the step that just ended; the caller decides whether it is kept."""
        n = int(self.length[s] - self.step_start[s])
        offset = int(self.step_start[s] - self.prompt_len[s])
        return Step(
            start=offset,
            end=offset + n,
            model=int(self.writer[s]),
            mean_logprob=float(self.sum_logprob[s] / max(n, 1)),
            min_logprob=float(self.min_logprob[s]),
            first_entropy=float(self.first_entropy[s]),
            mean_entropy=float(self.sum_entropy[s] / max(n, 1)),
            closed=closed,
        )

    def keep_step(self, s: int, step: Step) -> None:
        confidence = float(np.exp(step.mean_logprob))
        self.run_min_conf[s] = min(self.run_min_conf[s], confidence)
        self.run_prod_conf[s] *= confidence
        self.last_tokens[s], self.last_model[s] = step.end - step.start, step.model
        self.last_mean_logprob[s], self.last_min_logprob[s] = step.mean_logprob, step.min_logprob
        self.last_first_entropy[s], self.last_mean_entropy[s] = step.first_entropy, step.mean_entropy
        self.steps[s].append(step)
        self.step_index[s] += 1
        self.begin_step(s)

    def discard_step(self, s: int) -> None:
        """Throw the current draft away and go back to where it began."""
        n = int(self.length[s] - self.step_start[s])
        self.written[self.writer[s], s] -= n
        self.discarded[s] += n
        self.rewrites[s] += 1
        self.length[s] = self.step_start[s]
        self.begin_step(s)

    def release(self, s: int) -> None:
        self.phase[s] = Phase.FREE
        self.paused[s] = False
        self.request[s] = self.policy[s] = None
        self.request_id[s] = -1
