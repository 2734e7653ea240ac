"""One job alone, with drafts: what the answer quotes from its prompt is guessed, and checked in one forward pass.

Prompt-lookup decoding: where the last tokens stand earlier in the prompt or the answer, what followed them there is
the draft. All its tokens go through the model at once, and those that the model chooses too are kept, so the text is
the one without drafts. It saves forward passes where sources are quoted and costs a little where they are paraphrased,
so it stops for a while when drafts fail. (transformers has it too, but asks the job's settings about made-up scores,
which forbids tokens, does not stop when drafts fail, and cannot be left in the middle.)
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from sampling import Sampling, adjust, pack

NGRAM = 3  # tokens that must stand elsewhere
DRAFT = 5  # tokens guessed at once; H100 and H200 read 4-bit weights fast for up to 5 to 7 rows
RECENT = 8  # drafts by which it is judged whether they pay
ENOUGH = 1.0  # tokens of a draft that must be kept on average
PAUSE = 64  # tokens without drafts after they have failed
PIECE = 512  # tokens of a prompt that are read at once: between two pieces a job can be left


@dataclass
class Drafted:
    """An answer so far. `ended`: a token of the model's or the limit ended it; else it was left in the middle."""

    tokens: list[int] = field(default_factory=list)
    ended: bool = False
    forward_passes: int = 0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


class Lookup:
    """Where each run of NGRAM tokens stood last, and whether drafts have paid lately."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._kept: deque[int] = deque(maxlen=RECENT)
        self._quiet_until = 0
        self.add(tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """Further tokens of the text."""
        for token in tokens:
            # The run that ends just before this token: the last one of the text has nothing after it to offer.
            if len(self.tokens) >= NGRAM:
                self._after[tuple(self.tokens[-NGRAM:])] = len(self.tokens)
            self.tokens.append(token)

    def draft(self) -> list[int]:
        """What followed the last tokens where they stood before; empty if nowhere, or if drafts do not pay now."""
        if len(self.tokens) < self._quiet_until:
            return []
        at = self._after.get(tuple(self.tokens[-NGRAM:]))
        return self.tokens[at : at + DRAFT] if at is not None else []

    def judge(self, kept: int) -> None:
        """How many tokens of the last draft were kept."""
        self._kept.append(kept)
        if len(self._kept) == RECENT and sum(self._kept) < ENOUGH * RECENT:
            self._quiet_until = len(self.tokens) + PAUSE
            self._kept.clear()


class Drafter:
    """Answers one job at a time with a model whose layers all attend to everything. Not for several threads at once."""

    def __init__(self, network: Any, ends: Sequence[int], prefix: Sequence[int]) -> None:
        """`prefix`: tokens that all prompts begin with, read here once."""
        self.network = network
        self.ends = frozenset(ends)
        self._prefix = list(prefix)
        self._prefix_cache = DynamicCache(config=network.config)
        if prefix:
            self._forward(self._prefix, self._prefix_cache, 1)

    def run(
        self,
        prompt: Sequence[int],
        new: int,
        sampling: Sampling,
        show: Callable[[list[int]], None],
        leave: Callable[[], bool],
    ) -> Drafted:
        """Answer with at most `new` tokens; each stretch goes to `show`, and it is left once `leave` says so."""
        answer = Drafted()
        started = time.monotonic()
        shared = (
            bool(self._prefix) and list(prompt[: len(self._prefix)]) == self._prefix and len(prompt) > len(self._prefix)
        )
        cache = copy.deepcopy(self._prefix_cache) if shared else DynamicCache(config=self.network.config)
        text = Lookup(prompt)
        vocabulary = self.network.config.get_text_config(decoder=True).vocab_size
        seen = torch.zeros(vocabulary, dtype=torch.bool, device=self.network.device)
        seen[torch.tensor(list(prompt), device=seen.device)] = True
        given = list(prompt[len(self._prefix) :]) if shared else list(prompt)
        draft: list[int] = []
        while len(given) > PIECE and not leave():
            self._forward(given[:PIECE], cache, 1)
            given = given[PIECE:]
        while not answer.ended and not leave():
            scores = self._forward(given, cache, len(draft) + 1)
            answer.forward_passes += 1
            rows = seen.repeat(len(draft) + 1, 1)
            for row, token in enumerate(draft, start=1):
                rows[row:, token] = True
            args = pack([(sampling, len(text.tokens) + row) for row in range(len(draft) + 1)]).to(scores.device)
            chosen: list[int] = adjust(scores, rows, args).argmax(dim=-1).tolist()
            kept = next((at for at, token in enumerate(draft) if token != chosen[at]), len(draft))
            fresh = self._until_end(chosen[: kept + 1], new - len(answer.tokens))
            if not answer.tokens:
                answer.prefill_ms = (time.monotonic() - started) * 1000
            answer.tokens += fresh
            answer.ended = fresh[-1] in self.ends or len(answer.tokens) == new
            text.add(fresh)
            if draft:
                text.judge(kept)
            seen[torch.tensor(fresh, device=seen.device)] = True
            if refused := len(draft) - (len(fresh) - 1):
                cache.crop(-refused)
            show(fresh)
            draft = text.draft()[: new - len(answer.tokens) - 1]
            given = [fresh[-1], *draft]
        answer.decode_ms = (time.monotonic() - started) * 1000 - answer.prefill_ms
        return answer

    def _forward(self, tokens: Sequence[int], cache: DynamicCache, rows: int) -> torch.Tensor:
        """The scores after the last `rows` tokens: (rows, vocabulary), float32."""
        ids = torch.tensor([list(tokens)], device=self.network.device)
        with torch.no_grad():
            logits = self.network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=rows).logits
        scores: torch.Tensor = logits[0, -rows:].float()
        return scores

    def _until_end(self, tokens: list[int], room: int) -> list[int]:
        """The tokens up to the first end of the model's, at most `room`."""
        last = next((at for at, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[: min(last + 1, room)]
