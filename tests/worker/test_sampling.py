"""How a token is chosen: compared with transformers' own processors, and with itself in other company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import sampling
from sampling import GREEDY, HEAD, BatchSampling, Sampling, SamplingProcessor, _gumbel, adjust, pack

VOCABULARY = 3000  # more than HEAD, so that both ways of finding the nucleus are taken
SETTINGS = [
    Sampling(0.3, 0.9, 1.1, 7),
    Sampling(1.0, 1.0, 1.0, 7),
    Sampling(2.0, 0.95, 0.5, 2**63 - 1),
    Sampling(1e-3, 0.5, 2.0, 0),
    Sampling(0.7, 0.01, 1.3, 12),
    Sampling(2.0, 0.999, 1.0, 3),
]


def logits(seed: int, spread: float = 3.0, rows: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def choose(scores: torch.Tensor, ids: list[int], job: Sampling) -> torch.Tensor:
    """What `adjust` makes of one row's scores after the tokens `ids`."""
    seen = torch.zeros_like(scores, dtype=torch.bool)
    seen[0, ids] = True
    return adjust(scores.clone(), seen, pack([(job, len(ids))]))


def by_transformers(scores: torch.Tensor, ids: list[int], job: Sampling) -> torch.Tensor:
    """The scores that transformers would sample from."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(job.repetition_penalty)])
    if job.temperature:
        processors.append(TemperatureLogitsWarper(job.temperature))
        if job.top_p < 1:
            processors.append(TopPLogitsWarper(job.top_p))
    processed: torch.Tensor = processors(torch.tensor([ids]), scores.clone())
    return processed


def noise(job: Sampling, position: int) -> torch.Tensor:
    key, other = (torch.tensor(key) for key in job.keys(position))
    return _gumbel(key, other, torch.arange(VOCABULARY))


@pytest.mark.parametrize("job", SETTINGS)
@pytest.mark.parametrize("spread", [0.5, 3.0, 30.0])
def test_scores_are_those_of_transformers_plus_noise(job: Sampling, spread: float) -> None:
    ids = [5, 5, 17, 2000, 2999]
    expected = by_transformers(logits(1, spread), ids, job)
    found = choose(logits(1, spread), ids, job)
    # Where sums are a rounding apart, one token at the edge of the nucleus may be in or out.
    assert int((torch.isfinite(found) != torch.isfinite(expected)).sum()) <= 1
    both = torch.isfinite(found) & torch.isfinite(expected)
    assert int(both.sum()) >= 1
    torch.testing.assert_close(found[both], (expected + noise(job, len(ids)))[both], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.1, 2.0])
def test_greedy_is_the_penalty_alone(penalty: float) -> None:
    job = Sampling(0.0, 0.5, penalty, 3)
    assert torch.equal(choose(logits(2), [1, 2, 3], job), by_transformers(logits(2), [1, 2, 3], job))


@pytest.mark.parametrize("job", SETTINGS)
def test_the_way_for_gpus_chooses_the_same(job: Sampling) -> None:
    args = pack([(job, 11)] * 4)
    temperature, top_p = (args[at].view(torch.float32).unsqueeze(-1) for at in (0, 1))
    for spread in (0.1, 1.0, 10.0):
        scores = logits(3, spread, rows=4)
        sparse = sampling._sample_sparse(scores.clone(), temperature, top_p, args[3:5])
        dense = sampling._sample_dense(scores.clone(), temperature, top_p, args[3:5])
        assert torch.equal(sparse.argmax(-1), dense.argmax(-1))


def test_neighbours_change_nothing() -> None:
    jobs = [*SETTINGS, GREEDY]
    scores = logits(4, rows=len(jobs))
    seen = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    together = adjust(scores.clone(), seen, pack([(job, 30 + at) for at, job in enumerate(jobs)]))
    for at, job in enumerate(jobs):
        alone = adjust(scores[at : at + 1].clone(), seen[at : at + 1], pack([(job, 30 + at)]))
        assert int(alone.argmax()) == int(together[at].argmax())


def test_draws_have_the_probabilities_of_the_scores() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, 0.5, 1.5, -8.0]])
    job = Sampling(0.8, 0.97, 1.0, 99)
    draws = 40_000
    rows = adjust(
        scores.repeat(draws, 1),
        torch.zeros(draws, 8, dtype=torch.bool),
        pack([(job, position) for position in range(draws)]),
    ).argmax(-1)
    found = torch.bincount(rows, minlength=8) / draws
    expected = TopPLogitsWarper(0.97)(None, scores / 0.8).softmax(-1)[0]
    # Five standard deviations of a count.
    assert torch.all((found - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt())


def test_seed_and_position_decide_and_nothing_else() -> None:
    def draw(seed: int, position: int) -> int:
        scores = torch.zeros(1, VOCABULARY)
        args = pack([(Sampling(1.0, 1.0, 1.0, seed), position)])
        return int(adjust(scores, torch.zeros_like(scores, dtype=torch.bool), args).argmax())

    assert len({draw(seed, 5) for seed in range(50)}) > 45
    assert len({draw(1, position) for position in range(50)}) > 45
    assert draw(2**63 - 1, 7) == draw(2**63 - 1, 7)


def test_noise_is_never_infinite_where_it_would_win() -> None:
    many = _gumbel(torch.tensor(0), torch.tensor(1), torch.arange(3_000_000))
    assert not torch.isnan(many).any()
    assert float(many.max()) < 20
    assert abs(float(many[torch.isfinite(many)].mean()) - 0.5772) < 0.01


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=40),
    temperature=st.sampled_from([0.0, 1e-4, 0.3, 2.0]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 2**63 - 1),
)
def test_there_is_always_a_token(
    scores: list[float], temperature: float, top_p: float, penalty: float, seed: int
) -> None:
    row = torch.tensor([scores])
    found = adjust(
        row, torch.zeros_like(row, dtype=torch.bool), pack([(Sampling(temperature, top_p, penalty, seed), 9)])
    )
    assert not torch.isnan(found).any()
    assert torch.isfinite(found.max())


def test_the_whole_vocabulary_is_looked_at_where_its_head_is_not_enough() -> None:
    flat = torch.zeros(1, VOCABULARY)
    found = choose(flat, [], Sampling(1.0, 0.9, 1.0, 5))
    assert int(torch.isfinite(found).sum()) == VOCABULARY > HEAD, "all are equally likely, so none is outside"


# --- inside the batch --------------------------------------------------------------------------------------------------


class State:
    """What the batch tells of a request."""

    def __init__(self, name: str, tokens: list[int], **kwargs: Any) -> None:
        self.request_id = name
        self.initial_tokens = tokens
        self.position_offset = len(tokens)
        self.logit_processor_kwargs = kwargs


class Request:
    """A request in a batch."""

    def __init__(self, state: State, has_new_token: bool = True) -> None:
        self.state = state
        self.has_new_token = has_new_token


def in_batch(processor: BatchSampling, requests: list[Request], scores: torch.Tensor) -> torch.Tensor:
    storage = torch.zeros(processor.ROWS, 8, dtype=torch.int32)
    processor.prepare_tensor_args(requests, storage)
    last = torch.tensor([r.state.initial_tokens[-1] for r in requests if r.has_new_token])
    return processor(last, scores, storage[:, : len(scores)])


def test_a_batch_chooses_as_each_job_would_alone() -> None:
    processor = BatchSampling(4, VOCABULARY, torch.device("cpu"))
    prompts = [[1, 2, 3], [2999, 5], [7] * 9]
    requests = [Request(State(f"r{at}", ids, sampling=SETTINGS[at], slot=3 - at)) for at, ids in enumerate(prompts)]
    requests.insert(1, Request(State("reading", [9, 9], sampling=GREEDY, slot=0), has_new_token=False))
    scores = logits(8, rows=3)
    found = in_batch(processor, requests, scores.clone())
    for at, ids in enumerate(prompts):
        alone = SamplingProcessor(SETTINGS[at])(torch.tensor([ids]), scores[at : at + 1].clone())
        assert int(found[at].argmax()) == int(alone.argmax())


def test_tokens_of_the_answer_are_penalised_though_the_host_learns_them_late() -> None:
    processor = BatchSampling(1, VOCABULARY, torch.device("cpu"))
    state = State("r", [1], sampling=Sampling(0.0, 1.0, 2.0, 0), slot=0)
    storage = torch.zeros(processor.ROWS, 8, dtype=torch.int32)
    for last in (1, 40, 41):
        state.position_offset += 1
        processor.prepare_tensor_args([Request(state)], storage)
        scores = processor(torch.tensor([last]), torch.ones(1, VOCABULARY), storage[:, :1])
    assert (scores[0] == 0.5).nonzero()[:, 0].tolist() == [1, 40, 41]


def test_a_slot_s_next_request_starts_afresh() -> None:
    processor = BatchSampling(1, VOCABULARY, torch.device("cpu"))
    job = Sampling(0.0, 1.0, 2.0, 0)
    in_batch(processor, [Request(State("first", [1, 2, 3], sampling=job, slot=0))], torch.ones(1, VOCABULARY))
    scores = in_batch(processor, [Request(State("second", [9], sampling=job, slot=0))], torch.ones(1, VOCABULARY))
    assert (scores[0] == 0.5).nonzero()[:, 0].tolist() == [9]


@pytest.mark.parametrize(
    "given_kwargs", [{}, {"sampling": GREEDY}, {"temperature": 0.5, "sampling": GREEDY, "slot": 1}]
)
def test_a_request_brings_just_what_is_applied(given_kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="sampling and slot"):
        BatchSampling(1, 10, torch.device("cpu")).check_kwargs(given_kwargs)


def test_rows_beyond_the_jobs_touch_no_job() -> None:
    processor = BatchSampling(4, 10, torch.device("cpu"))
    storage = torch.zeros(processor.ROWS, 8, dtype=torch.int32)
    penal = Sampling(0.0, 1.0, 2.0, 0)
    jobs = [Request(State(f"r{at}", [1], sampling=penal, slot=at)) for at in range(3)]
    processor.prepare_tensor_args(jobs, storage)
    # The next batch has a token for one of them only, and two rows more.
    processor.prepare_tensor_args([jobs[0]], storage)
    processor(torch.tensor([2, 7, 7]), torch.ones(3, 10), storage[:, :3])
    assert processor.seen[:3].nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [2, 1]]


def test_padding_goes_to_a_row_of_its_own() -> None:
    processor = BatchSampling(2, 10, torch.device("cpu"))
    defaults = torch.zeros(processor.ROWS, 1, dtype=torch.int32)
    processor.fill_defaults(defaults)
    scores = processor(torch.tensor([4]), torch.ones(1, 10), defaults)
    assert torch.equal(scores, torch.ones(1, 10))
    assert not processor.seen[:2].any()
