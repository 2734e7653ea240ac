"""How a token is chosen: the job's repetition penalty, temperature and top_p, in a batch or alone, from one function.

Each job's choices depend on its own logits, settings, seed and position only, never on what else is in the batch: the
random numbers are a hash of seed, position and token (the Gumbel trick: the likeliest of the scores plus Gumbel noise
is a sample of their softmax). So a job gives the same text alone, in a batch, and drafted ahead, as far as the logits
are the same; and one argmax serves greedy and sampled jobs side by side. Nothing here waits for the device, so that
all of it can be part of a CUDA graph.

The penalty, temperature and top_p are those of transformers (RepetitionPenaltyLogitsProcessor over prompt and answer,
TemperatureLogitsWarper, TopPLogitsWarper), which tests compare with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.utils import stream_context

from engines import LOWEST_TEMPERATURE

HEAD = 1024  # tokens that are looked at first on a CPU
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """One job's settings. `temperature` 0 takes the likeliest token; `seed` is any whole number from 0 on."""

    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int

    def keys(self, position: int) -> tuple[int, int]:
        """Two 32-bit numbers (signed) for the random choice after `position` tokens of prompt and answer."""
        digest = hashlib.blake2b(b"%d %d" % (self.seed, position), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


GREEDY = Sampling(0.0, 1.0, 1.0, 0)


def adjust(scores: torch.Tensor, seen: torch.Tensor, args: torch.Tensor) -> torch.Tensor:
    """Scores whose argmax is each row's next token.

    `scores`: (rows, vocabulary), float32. `seen`: the same shape, bool: tokens of the row's prompt and answer so far.
    `args`: (5, rows), int32: temperature, top_p and repetition penalty as the bits of a float32, and the row's two keys.
    """
    temperature, top_p, penalty = (args[at].view(torch.float32).unsqueeze(-1) for at in range(3))
    scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if scores.is_cuda:
        sampled = _sample_dense(scores, temperature, top_p, args[3:5])
        return torch.where(temperature > 0, sampled, scores)
    # On a CPU only the rows and tokens that need it are worked on. The result is the same.
    rows = (temperature[:, 0] > 0).nonzero()[:, 0]
    if len(rows):
        scores[rows] = _sample_sparse(scores[rows], temperature[rows], top_p[rows], args[3:5, rows])
    return scores


def _sample_dense(
    scores: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    scores = scores / temperature.clamp(min=LOWEST_TEMPERATURE)
    ordered = torch.sort(scores, dim=-1, descending=True)[0]
    kept = _cut(scores, ordered, ordered.softmax(dim=-1), top_p)
    tokens = torch.arange(scores.shape[-1], device=scores.device)
    return kept + _gumbel(keys[0].unsqueeze(-1), keys[1].unsqueeze(-1), tokens)


def _sample_sparse(
    scores: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    scores = scores / temperature
    # The likeliest tokens are nearly always enough, and sorting all of them takes longer than the rest of it.
    ordered = scores.topk(min(HEAD, scores.shape[-1]), dim=-1)[0]
    head = (ordered - scores.logsumexp(dim=-1, keepdim=True)).exp()
    if bool(((head.sum(dim=-1, keepdim=True) < top_p) & (top_p < 1)).any()):
        ordered = torch.sort(scores, dim=-1, descending=True)[0]
        head = ordered.softmax(dim=-1)
    kept = _cut(scores, ordered, head, top_p)
    row, token = torch.isfinite(kept).nonzero(as_tuple=True)
    kept[row, token] += _gumbel(keys[0][row], keys[1][row], token)
    return kept


def _cut(scores: torch.Tensor, ordered: torch.Tensor, probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Scores with the tokens outside of the row's top_p at minus infinity.

    `ordered`: the row's largest scores, falling, and `probabilities` theirs. A token stays while those before it have
    less than top_p together, so the likeliest one always does. With top_p 1 all stay, whatever their sum rounds to.
    """
    before = probabilities.cumsum(dim=-1) - probabilities
    last = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1) - 1
    return scores.masked_fill((scores < ordered.gather(1, last)) & (top_p < 1), -torch.inf)


def _gumbel(key: torch.Tensor, other_key: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Gumbel noise for (key, token), float32, by broadcasting: a hash, 24 bits of which make a uniform number."""
    mixed = _mix(token.long() + (key.long() & _MASK))
    mixed = _mix(mixed ^ (other_key.long() & _MASK))
    uniform = ((mixed >> 8).float() + 0.5) * 2.0**-24
    # log1p keeps the small numbers exact, which become the largest noise; never infinite in that direction.
    return -torch.log(-torch.log1p(-uniform))


def _mix(number: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit numbers that scatters them well (two rounds of multiply and xorshift), in int64.

    The product may overflow; its low 32 bits are right all the same.
    """
    number = number & _MASK
    number = ((number ^ (number >> 16)) * 0x7FEB352D) & _MASK
    number = ((number ^ (number >> 15)) * 0x846CA68B) & _MASK
    return number ^ (number >> 16)


def pack(jobs: Sequence[tuple[Sampling, int]]) -> torch.Tensor:
    """The `args` of `adjust` for jobs and the number of tokens that each has so far: (5, jobs), int32, on the CPU."""
    floats = torch.tensor(
        [[job.temperature, job.top_p, job.repetition_penalty] for job, _ in jobs], dtype=torch.float32
    )
    keys = torch.tensor([job.keys(position) for job, position in jobs], dtype=torch.int32)
    return torch.cat([floats.view(torch.int32), keys], dim=1).t()


class SamplingProcessor(LogitsProcessor):  # type: ignore[misc] # transformers has no types here
    """One job's settings for `generate` with do_sample=False."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids`: (1, tokens so far); `scores`: (1, vocabulary)."""
        scores = scores.float()
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, input_ids, True)
        args = pack([(self.sampling, input_ids.shape[1])]).to(scores.device)
        return adjust(scores, seen, args)


class BatchSampling(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc] # as above
    """Each job's settings for continuous batching, where transformers itself knows one repetition penalty for none.

    Takes the place of the manager's `logit_processor`. A request brings `sampling` and `slot`, a number below `slots`
    that no other request has at the time: the row of `seen` in which its tokens are marked. They are marked on the
    device, because a batch is launched before the host knows the tokens of the one before.
    """

    ROWS = 6  # those of `adjust`, and the slot

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        super().__init__(LogitsProcessorList())
        self.tensors_required = self.ROWS
        self.do_processing = True
        self.spare = slots  # the row of padding
        self.seen = torch.zeros(slots + 1, vocabulary, dtype=torch.bool, device=device)
        self.compute_stream: Any = None  # set once the manager has made it
        self._defaults = torch.cat([pack([(GREEDY, 0)]), torch.tensor([[slots]], dtype=torch.int32)])
        self._marked: dict[int, str] = {}  # slot: the request whose prompt is marked there

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Raises ValueError unless a request brings just what it must: nothing is dropped silently."""
        if kwargs.keys() != {"sampling", "slot"}:
            raise ValueError(f"a request brings sampling and slot, not {sorted(kwargs)}")

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """What padding has, in each column of (6, columns), int32."""
        int32_tensor.copy_(self._defaults)

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Write the settings of the requests that get a token in this batch to `arg_storage` (6, most tokens)."""
        jobs = []
        slots = []
        for request in requests_in_batch:
            if not request.has_new_token:
                continue
            state = request.state
            sampling: Sampling = state.logit_processor_kwargs.get("sampling") or GREEDY
            slot = state.logit_processor_kwargs.get("slot", self.spare)
            if slot != self.spare and self._marked.get(slot) != state.request_id:
                self._mark(slot, state.initial_tokens)
                self._marked[slot] = state.request_id
            # The tokens of this batch are counted already: the position of the token that is chosen now.
            jobs.append((sampling, state.position_offset))
            slots.append(slot)
        if jobs:
            args = torch.cat([pack(jobs), torch.tensor([slots], dtype=torch.int32)])
            arg_storage[:, : len(jobs)] = args.to(arg_storage.device)
        # A batch can have more rows than tokens to choose (padding, prompts that are not read to their end), and what
        # stood there belongs to other jobs by now.
        self.fill_defaults(arg_storage[:, len(jobs) : self.spare])
        return arg_storage

    def _mark(self, slot: int, tokens: list[int]) -> None:
        # In the stream of the batches: one that is still running may write to a row whose request has just ended.
        with stream_context(self.compute_stream):
            self.seen[slot].zero_()
            marked = torch.tensor(tokens)
            if self.seen.is_cuda:  # not to wait for the batch that is running
                marked = marked.pin_memory().to(self.seen.device, non_blocking=True)
            self.seen[slot, marked] = True

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor
    ) -> torch.Tensor:
        """`input_ids`: (rows), the last token of each; `scores`: (rows, vocabulary)."""
        args = logits_processor_args[:, : scores.shape[0]]
        slots = args[5].long()
        self.seen[slots, input_ids.long()] = True
        return adjust(scores, self.seen[slots], args)
