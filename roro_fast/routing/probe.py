"""A process reward model for the price of a head: a frozen decoder and one small trained layer on its prefill.

For token t_j of a step, with final-normed states h of the body, x_j = [log p(t_j | before), entropy before t_j, h_j]
and z_j = w x_j + b. A step is right when all its tokens are, so its logit is the soft minimum -log sum_j exp(-z_j).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from roro_fast.engine.score import states
from roro_fast.errors import CapacityError, CheckpointError
from roro_fast.files import write_json
from roro_fast.models.decoder import Decoder
from roro_fast.routing.scoring import Pieces, StepScores, Trace, one_pass

SETTINGS, KIND = "prm.json", "probe"
KNOWN = 65536  # traces whose scores are kept


def step_logits(z: torch.Tensor, step: torch.Tensor, steps: int) -> torch.Tensor:
    """[steps] soft minima of token logits z [T] over the tokens of each step; `step` [T] int64 numbers them."""
    low = torch.full((steps,), torch.inf, device=z.device).scatter_reduce(0, step, z.detach(), "amin")
    total = torch.zeros(steps, device=z.device).index_add(0, step, (low[step] - z).exp())
    return low - total.log()


class ProbeScorer:
    """`weight` [H + 2], `bias` []: the head. Scores are probabilities that a step is right.

    `system` is the system message under which the body is asked the problem. Scores of traces met before are not
    computed again; an answer is charged for its reading all the same, since a cost is the answer's own.
    """

    def __init__(
        self,
        body: Decoder,
        tokenizer: Any,
        weight: torch.Tensor,
        bias: torch.Tensor,
        max_tokens: int = 8192,
        system: str = "",
    ) -> None:
        if weight.shape != (body.config.hidden_size + 2,):
            raise CheckpointError(
                f"prm: a head of {tuple(weight.shape)} weights does not fit a body of width {body.config.hidden_size}; "
                "train it on this body"
            )
        self.body, self.pieces, self.max_tokens = body, Pieces(tokenizer, system=system), max_tokens
        self._known: OrderedDict[Trace, StepScores] = OrderedDict()
        self.weight, self.bias = weight.to(body.device), bias.to(body.device)
        self.name = KIND

    @torch.no_grad()
    def features(self, traces: Sequence[Trace]) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
        """(x [T, H + 2] float32, number of its step [T] int64 counted over all traces, bounds of each trace)."""
        prompts, rows, sizes, after, read = [], [], [], [], []
        for t in traces:
            ids, bounds = self.pieces(t)
            if len(ids) > self.body.config.max_position:
                raise CapacityError(
                    f"prm: {len(ids)} tokens exceed the body's context of {self.body.config.max_position}"
                )
            prompts.append(ids)
            read.append(bounds)
            rows.append(list(range(bounds[0] - 1, len(ids))))
            sizes += np.diff(bounds).tolist()
            after += ids[bounds[0] :]
        hidden, index = states(self.body, prompts, rows, self.max_tokens)
        h = hidden[index].clone().float()  # one row more per trace than tokens: that before its first
        ends = np.cumsum([len(r) for r in rows])
        before, here = np.ones(len(h), bool), np.ones(len(h), bool)
        before[ends - 1] = here[ends - [len(r) for r in rows]] = False
        logp = torch.log_softmax(self.body.logits(h[torch.from_numpy(before)].to(self.body.dtype)).float(), -1)
        chosen = logp.gather(1, torch.tensor(after, device=h.device)[:, None])
        entropy = -(logp.exp() * logp).sum(-1, keepdim=True)
        step = torch.arange(len(sizes), device=h.device).repeat_interleave(torch.tensor(sizes, device=h.device))
        return torch.cat((chosen, entropy, h[torch.from_numpy(here)]), -1), step, read

    def score(self, traces: Sequence[Trace]) -> list[StepScores]:
        new = [t for t in dict.fromkeys(traces) if t.steps and t not in self._known]
        if new:
            self._known.update(zip(new, self._score(new), strict=True))
        found = [self._known[t] if t.steps else StepScores((), (), ()) for t in traces]
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return found

    @torch.no_grad()
    def _score(self, traces: Sequence[Trace]) -> list[StepScores]:
        x, step, read = self.features(traces)
        counts = [len(t.steps) for t in traces]
        p = torch.sigmoid(step_logits(x @ self.weight + self.bias, step, sum(counts))).cpu()
        c = self.body.config
        shape = c.num_params, c.num_layers, c.num_heads * c.head_dim
        return [one_pass(v.tolist(), n, shape) for v, n in zip(p.split(counts), read, strict=True)]

    def save(self, directory: Path, record: dict[str, Any]) -> None:
        """prm.json and model.safetensors (the head alone); `record` must name the body."""
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / "model.safetensors.part"
        save_file({"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu()}, part)
        part.replace(directory / "model.safetensors")
        write_json(directory / SETTINGS, {"kind": KIND, **record})

    @classmethod
    def load(cls, directory: Path, body: Decoder, tokenizer: Any, system: str = "") -> ProbeScorer:
        """A head saved by `save` on the body it was trained for."""
        try:
            head = load_file(directory / "model.safetensors")
            return cls(body, tokenizer, head["weight"], head["bias"], system=system)
        except (OSError, SafetensorError, KeyError) as e:
            raise CheckpointError(f"{directory}: not a readable process reward head ({e})") from e


def settings(directory: Path) -> dict[str, Any]:
    """What prm.json says; empty where there is none."""
    path = directory / SETTINGS
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise CheckpointError(f"{path}: not valid JSON ({e}); save the process reward model again") from e
    return found
