"""One answer in the tokens of several models: a pool whose models do not share a tokenizer.

Each tokenizer has a track of its own: the prompt as its models expect it, then every step. The tokens that a model
writes enter its track as they are; into the others a finished step is tokenised by itself, once, when one of their
models next reads it. What a track holds never changes, so cached keys and values stay good. All tracks are one text,
byte for byte (`models.token_bytes`): a character that a step's end cuts in two is spelled in bytes, a byte that a
tokenizer does not know is U+FFFD in its track, a control token stands for no text, and the EOS that ended an answer
ends every track with the EOS of its tokenizer.

`Slots` holds the track of the model that runs next; the others wait here.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from roro_fast.engine.pages import chain_hash
from roro_fast.engine.request import Request
from roro_fast.engine.rng import stream_key
from roro_fast.engine.slots import Slots
from roro_fast.engine.trajectory import Step, Trajectory
from roro_fast.errors import ConfigError
from roro_fast.models.decoder import Decoder
from roro_fast.models.delimiter import StepBoundary
from roro_fast.models.token_bytes import TokenBytes
from roro_fast.tasks.prompting import Prompt


class Vocabulary(NamedTuple):
    """What the engine must know about the tokens of one tokenizer's models.

    size: ids past the smallest model's are never sampled. eos_ids [E] int64. ends: `StepBoundary.table`.
    """

    tokenizer: Any
    models: list[int]
    size: int
    eos_ids: np.ndarray
    ends: np.ndarray


def vocabularies(models: Sequence[Decoder], tokenizer: Any, delimiter: str) -> list[Vocabulary]:
    """One for each different tokenizer, in order of appearance; `tokenizer` is one for all models, or one each."""
    each = list(tokenizer) if isinstance(tokenizer, list | tuple) else [tokenizer] * len(models)
    if len(each) != len(models):
        raise ConfigError(f"tokenizer: {len(each)} for {len(models)} models; give one for all, or one each")
    out = []
    for first in dict.fromkeys(map(id, each)):
        mine = [m for m, t in enumerate(each) if id(t) == first]
        shared = each[mine[0]]
        configs = [models[m].config for m in mine]
        eos = {i for c in configs for i in c.eos_ids} | {shared.eos_token_id}
        size = min(c.vocab_size for c in configs)
        ends = StepBoundary(shared, delimiter, size).table.numpy()
        out.append(Vocabulary(shared, mine, size, np.array(sorted(i for i in eos if i is not None), np.int64), ends))
    return out


class Tracks:
    """The waiting tracks of all slots, and the way from one to the other. `limits[g]`: tokens a track may hold."""

    def __init__(self, vocabularies: Sequence[Vocabulary], slots: Slots, limits: Sequence[int]) -> None:
        self.slots, self.limits, self.vocabularies = slots, list(limits), list(vocabularies)
        self.group = {m: g for g, v in enumerate(vocabularies) for m in v.models}
        self._codecs = [
            TokenBytes(v.tokenizer, v.eos_ids.tolist(), f"models.paths: tokenizer of model {v.models[0]}")
            for v in vocabularies
        ]
        n = len(slots.phase)
        self.active = np.zeros(n, np.int64)
        self._alone = np.zeros(n, bool)  # one model writes it all: nobody else reads
        self._prompts = np.zeros((len(self._codecs), n), np.int64)  # tokens
        self._keys = np.zeros((len(self._codecs), n), np.uint64)
        self._ids: list[list[array[int]]] = [[] for _ in range(n)]  # [slot][tokenizer], prompt included
        self._ends: list[list[list[int]]] = [[] for _ in range(n)]  # where each step ends in the completion
        self._texts: list[list[bytes]] = [[] for _ in range(n)]  # of each kept step

    def prompts(self, r: Request, routed: bool) -> list[tuple[int, list[int]]]:
        """(tokenizer, prompt ids) of the tracks that a request needs; ConfigError when it does not bring them."""
        if not routed:
            return [(self.group[r.model], r.prompt_ids)]
        given = [list(r.prompt_ids), *getattr(r.prompt_ids, "others", ())]
        if len(given) != len(self._codecs):
            raise ConfigError(
                f"request.prompt_ids: {len(given)} prompts for a pool of {len(self._codecs)} tokenizers; give a "
                "Prompt, as tasks.prompting.encode_prompts makes it"
            )
        return list(enumerate(given))

    def admit(self, s: int, r: Request, routed: bool) -> None:
        """Take over a request that `Slots.admit` has just put into slot s."""
        self._ids[s] = [array("q") for _ in self._codecs]
        self._ends[s] = [[] for _ in self._codecs]
        self._texts[s] = []
        self._alone[s] = not routed
        for g, ids in self.prompts(r, routed):
            self._ids[s][g].extend(ids)
            self._prompts[g, s] = len(ids)
            self._keys[g, s] = stream_key(r.seed, r.sample, chain_hash(0, np.array(ids, np.int64)), 0)
        self.active[s] = 0 if routed else self.group[r.model]
        self._load(s)

    def activate(self, s: int, m: int) -> bool:
        """Put the track that model m reads into the slot, every kept step included; False when it is full.

        Only at a step's boundary: what has been written of an unfinished step would be lost.
        """
        g = self.group[m]
        if g != self.active[s]:
            self._note(s)
            self._extend(s, g)
            if len(self._ids[s][g]) >= self.limits[g]:
                return False
            self.active[s] = g
            self._load(s)
        return bool(self.slots.length[s] < self.limits[g])

    def readers(self, s: int) -> list[int]:
        """The models that read the slot's present track."""
        return self.vocabularies[self.active[s]].models

    def texts(self, s: int, draft: Step | None) -> list[str]:
        """Text of each step so far, and of a draft; a character that is not whole is replaced by U+FFFD."""
        self._note(s)
        steps = self._texts[s] if draft is None else [*self._texts[s], self._read(s, draft)]
        return [text.decode(errors="replace") for text in steps]

    def so_far(self, s: int) -> Prompt:
        """Everything written, an unfinished step included, as a prompt for each tokenizer."""
        self._note(s)
        slots, at = self.slots, self.active[s]
        begun = self._codecs[at].decode(slots.tokens[s, slots.step_start[s] : slots.length[s]].tolist())
        out = []
        for g, codec in enumerate(self._codecs):
            if g != at and not self._alone[s]:
                self._extend(s, g)
                out.append([*self._ids[s][g], *codec.encode(begun)])
            elif g == at:
                out.append(slots.tokens[s, : slots.length[s]].tolist())
        return Prompt(out[0], out[1:])

    def label(self, s: int, t: Trajectory) -> None:
        """Write a finished trajectory in the first tokenizer's tokens, the other tracks into its meta."""
        self._note(s)
        t.step_texts = self.texts(s, None)
        if self._alone[s]:
            return
        ended = t.finish_reason == "eos"
        for g, v in enumerate(self.vocabularies):
            if g != self.active[s]:
                self._extend(s, g)
                if ended and len(v.eos_ids):
                    own = v.tokenizer.eos_token_id
                    self._ids[s][g].append(int(v.eos_ids[0] if own is None else own))
                    self._ends[s][g][-1] += 1
        found = []
        for g, v in enumerate(self.vocabularies):
            ids, n = self._ids[s][g].tolist(), int(self._prompts[g, s])
            found.append({"models": v.models, "prompt_ids": ids[:n], "token_ids": ids[n:], "ends": self._ends[s][g]})
        t.prompt_ids, t.token_ids = found[0]["prompt_ids"], found[0]["token_ids"]
        for step, start, end in zip(t.steps, [0, *found[0]["ends"]], found[0]["ends"], strict=False):
            step.start, step.end = start, end
        t.meta["tracks"] = found[1:]

    def _note(self, s: int) -> None:
        """Take the steps kept since the last time out of the slot, in whose track they were written."""
        slots, g = self.slots, self.active[s]
        new = slots.steps[s][len(self._texts[s]) :]
        if not new:
            return
        self._texts[s] += [self._read(s, step) for step in new]
        self._ends[s][g] += [step.end for step in new]
        ids, end = self._ids[s][g], int(slots.prompt_len[s]) + new[-1].end
        ids.frombytes(np.ascontiguousarray(slots.tokens[s, len(ids) : end]).tobytes())

    def _read(self, s: int, step: Step) -> bytes:
        at = int(self.slots.prompt_len[s])
        ids = self.slots.tokens[s, at + step.start : at + step.end].tolist()
        return self._codecs[self.active[s]].decode(ids)

    def _extend(self, s: int, g: int) -> None:
        """Tokenise the steps that track g lacks."""
        ids, ends = self._ids[s][g], self._ends[s][g]
        for text in self._texts[s][len(ends) :]:
            ids.extend(self._codecs[g].encode(text))
            ends.append(len(ids) - int(self._prompts[g, s]))

    def _load(self, s: int) -> None:
        slots, g = self.slots, self.active[s]
        ids = self._ids[s][g]
        n = len(ids)
        slots.tokens[s, :n] = np.frombuffer(ids, np.int64)
        slots.length[s] = slots.step_start[s] = n
        slots.prompt_len[s], slots.key[s] = self._prompts[g, s], self._keys[g, s]
        r = slots.request[s]
        assert r is not None
        left = r.max_new_tokens - int(slots.written[:, s].sum())
        slots.max_total[s] = min(n + left, self.limits[g])
