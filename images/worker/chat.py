"""A job as token ids, safely, and token ids as text: the chat template of the model around the prompt files.

No text of a question or a source ever becomes a control token. Three walls stand one behind the other: the strings of
the tokenizer's control tokens are broken (common/prompts.py); the text is encoded apart from the template, as plain
text, wherever the tokenizer gives the same ids that way; and the control tokens of the finished prompt are compared
with those that the template has around harmless text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import Any

from common.prompts import Prompts, break_tokens, mark_of, neutralise, render_sources
from common.text import clean
from common.wire import Job
from engines import JobError

# What opens and closes the reasoning of the models that have one: Qwen3, DeepSeek and most others; Magistral.
_CLOSE_OF = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_OPEN = re.compile("|".join(map(re.escape, _CLOSE_OF)))
_LONGEST = 16  # tokens; a character has four bytes at most, so what makes none by then never will
# Stands for the user's turn while the template is rendered, so that no template can trim or read what a user wrote.
_PLACE = "c6f1b09e7d2a4835"
# Harmless turns (question, sources, code) with all that tokenizers treat in ways of their own, above all at the edges.
_SAMPLES = [
    (
        "Is ego depletion real?",
        '<source-a1b2c3d4e5f6 id="S1">\n[S1] Klein et al. (2018) · rct · replication: failed\nIt is not.\n</source-a1b2c3d4e5f6>',
        "a1b2c3d4e5f6",
    ),
    ("  Wie groß ist d?\n", "d = 0.04,  95 %\tCI\n\n\n日本 👩‍🔬 …", "0123456789ab"),
    ("2019", "", "ffeeddccbbaa"),
]


@dataclass(frozen=True)
class Encoded:
    """A prompt: its token ids, the ids of the sources that `fit` left out, and whether the answer starts inside a
    reasoning block that the template has opened."""

    ids: list[int]
    dropped: tuple[str, ...]
    thinking: bool


class Chat:
    """The prompts of one model. Holds nothing of a job, and may be used by several threads at once."""

    def __init__(self, tokenizer: Any, prompts: Prompts) -> None:
        """Reads the chat template once (a date in it is that of the start). Raises SystemExit where it cannot be used."""
        self._tokenizer = tokenizer
        self._prompts = prompts
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise SystemExit(f"{tokenizer.name_or_path} has no tokenizer.json; use a model whose repo has one")
        self._find_control_tokens()
        self._head, self._tail = _render(tokenizer, prompts.system)
        last_mark = re.findall("|".join(map(re.escape, [*_CLOSE_OF, *_CLOSE_OF.values()])), self._tail)[-1:]
        self._opened = _CLOSE_OF.get(last_mark[0], "") if last_mark else ""

        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._choose_pieces()
        self._expected = self._controls(self._ids(prompts.user_turn(*_SAMPLES[0])))

    def _find_control_tokens(self) -> None:
        # Some tokenizers (Gemma's, for one) keep runs of white space as added tokens: they control nothing.
        tokenizer = self._tokenizer
        added = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special or token.content.strip("▁ \t\r\n")
        }
        self._control_ids = set(added) | set(tokenizer.all_special_ids)
        if tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            self._control_ids.discard(tokenizer.unk_token_id)  # any rare character may be an unknown one
        self._control_tokens = sorted({*added.values(), *tokenizer.all_special_tokens})
        # What decoding leaves out, except that the marks of reasoning must be seen to be cut out.
        self._silent = {
            number: token.content if token.content in {*_CLOSE_OF, *_CLOSE_OF.values()} else ""
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }

    def _choose_pieces(self) -> None:
        """Encode content apart from the template if that gives the ids of the whole, as for byte-level tokenizers.

        SentencePiece's put a space before each piece, so there the rendered text is encoded as a whole.
        """
        self._apart = True
        self._head_ids, self._tail_ids = self._tokens(self._head, plain=False), self._tokens(self._tail, plain=False)
        turns = [self._prompts.user_turn(*sample) for sample in _SAMPLES]
        apart = [self._ids(turn) for turn in turns]
        self._apart = False
        self._apart = apart == [self._ids(turn) for turn in turns]

    def _tokens(self, text: str, *, plain: bool) -> list[int]:
        # After the start `plain` is always the same, so that threads do not switch the shared tokenizer to and fro.
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _ids(self, turn: str) -> list[int]:
        """The ids of the whole prompt with this user's turn; one BOS if the tokenizer or the template wants one."""
        if self._apart:
            ids = self._head_ids + self._tokens(turn, plain=True) + self._tail_ids
        else:
            ids = self._tokens(self._head + turn + self._tail, plain=False)
        bos = self._tokenizer.bos_token_id
        rendered = next((at for at, number in enumerate(ids) if number != bos), len(ids))
        return [bos] * (rendered > 0 or self._adds_bos) + ids[rendered:]

    @property
    def prefix(self) -> list[int]:
        """The ids that every prompt begins with: the system text and what stands around it; empty if not known."""
        one, other = (self._ids(self._prompts.user_turn(*sample)) for sample in _SAMPLES[:2])
        common = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
        # The last one stands before the code, and goes together with the code's first characters in some prompts.
        return one[: max(common - 1, 0)]

    def _controls(self, ids: list[int]) -> list[int]:
        return [number for number in ids if number in self._control_ids]

    def encode(self, job: Job, limit: int | None) -> Encoded:
        """The prompt of a job. `limit`: the most tokens that prompt and answer may have together; None: no limit.

        With `job.fit` the lowest-ranked sources are left out until the prompt and `max_new_tokens`, or half of the
        limit if that is less, fit; one source always stays. Raises JobError INPUT_TOO_LONG if no room for an answer
        is left, UNSAFE_INPUT if content would act as a control token, INVALID_INPUT if the question is invisible.
        """
        question = break_tokens(clean(job.prompt), self._control_tokens)
        if not question.strip():
            raise JobError("INVALID_INPUT", "prompt has invisible characters only; send a question")
        # The code is that of all sources, also where some are left out; each is rendered by itself, once, however many
        # cuts are tried.
        mark = mark_of(job.prompt, job.sources, job.context)
        blocks = [
            render_sources([source], mark, self._control_tokens, datamarked=job.datamark) for source in job.sources
        ]
        blocks = blocks or [neutralise(job.context, self._control_tokens)]
        datamarked = job.datamark and bool(job.sources)

        def with_first(count: int) -> list[int]:
            return self._ids(
                self._prompts.user_turn(question, "\n\n".join(blocks[:count]), mark, datamarked=datamarked)
            )

        kept = len(blocks)
        ids = with_first(kept)
        if limit is not None:
            room = limit - min(job.max_new_tokens, limit // 2)
            if job.fit and kept > 1 and len(ids) > room:
                kept = max(1, bisect_right(range(1, kept), room, key=lambda count: len(with_first(count))))
                ids = with_first(kept)
            if len(ids) >= limit:
                raise _too_long(job, len(ids), limit)
        if self._controls(ids) != self._expected:
            raise self._unsafe({"the question": question, **dict(zip(_names(job), blocks, strict=True))})
        return Encoded(ids, tuple(_names(job)[kept:]), bool(self._opened))

    def _unsafe(self, parts: dict[str, str]) -> JobError:
        guilty = [name for name, text in parts.items() if self._controls(self._tokens(text, plain=self._apart))]
        where = guilty[0] if guilty else "the question with its sources"
        return JobError("UNSAFE_INPUT", f"{where} holds text that would act as a control token; leave it out")

    def reader(self, encoded: Encoded) -> Reader:
        """A reader of the answer to this prompt."""
        return Reader(self._tokenizer.backend_tokenizer, self._silent, self._opened if encoded.thinking else "")


def _names(job: Job) -> list[str]:
    return [source["id"] for source in job.sources] or ["the context"]


def _too_long(job: Job, tokens: int, limit: int) -> JobError:
    remedy = "shorten the question or the context"
    if job.sources:
        remedy = "shorten the question or the first source" if job.fit else "lower n_results or send fit: true"
    # The answer takes one token at least.
    excess = tokens - limit + 1
    return JobError(
        "INPUT_TOO_LONG", f"the prompt has {tokens} tokens, the model reads {limit}: {excess} too many; {remedy}"
    )


def _render(tokenizer: Any, system: str) -> tuple[str, str]:
    """What the chat template puts before and after the user's text, system text included. Raises SystemExit."""
    from jinja2.exceptions import TemplateError

    name = tokenizer.name_or_path or "the tokenizer"
    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise SystemExit(f"{name} has no chat template; use an instruction-tuned model") from None
    # Some templates (Gemma's, for one) refuse a system turn, others pass it over: its text opens the user's turn then.
    own_turn = [{"role": "system", "content": system}, {"role": "user", "content": _PLACE}]
    one_turn = [{"role": "user", "content": f"{system}\n\n{_PLACE}"}]
    problem = "it leaves out or changes the user's text"
    for turns in (own_turn, one_turn):
        try:
            rendered: str = tokenizer.apply_chat_template(
                turns,
                add_generation_prompt=True,
                tokenize=False,
                # For the templates that know it (Qwen3): the answer, not a monologue before it.
                enable_thinking=False,
            )
        except TemplateError as error:
            problem = str(error)
            continue
        if system in rendered and rendered.count(_PLACE) == 1:
            head, _, tail = rendered.partition(_PLACE)
            return head, tail
    raise SystemExit(f"the chat template of {name} cannot be used: {problem}; use another instruction-tuned model")


class Reader:
    """Turns the token ids of one answer into text as they come: whole characters, reasoning cut out, stripped.

    `text` is what has been given out; `reasoning_tokens` counts the tokens of reasoning, its marks included. A block
    that never closes hides all that follows.
    """

    def __init__(self, decoder: Any, silent: dict[int, str], close: str) -> None:
        """`decoder`: a tokenizers.Tokenizer. `silent`: the special tokens' ids, and what is to be read for each.
        `close`: the mark that ends the reasoning that the prompt has opened, or empty."""
        self.text = ""
        self.reasoning_tokens = 0
        self._decoder = decoder
        self._silent = silent
        self._close = close
        self._context: list[int] = []  # the tokens of the last stretch of text: decoders look at what stands before
        self._pending: list[int] = []  # tokens that make no whole character yet
        self._tokens = 0  # tokens since the last stretch of text
        self._held = ""  # text of which it is not known yet whether it belongs to a mark
        self._stretches: deque[tuple[int, int]] = deque()  # (characters, tokens) of what is held
        self._space = ""  # white space that may turn out to end the text

    def feed(self, token_ids: list[int]) -> str:
        """Read further tokens; the text that became visible by them."""
        return self._show("".join(self._cut(self._decode(number)) for number in token_ids))

    def finish(self) -> str:
        """The answer has ended: the visible text that was still held back."""
        text = self._cut(self._whole(self._pending, ended=True), ended=True)
        if self._close:
            self.reasoning_tokens += self._tokens
        self._pending, self._tokens = [], 0
        return self._show(text)

    def _decode(self, number: int) -> str:
        self._tokens += 1
        if number in self._silent:
            return self._silent[number]
        self._pending.append(number)
        text = self._whole(self._pending, ended=len(self._pending) >= _LONGEST)
        if text:
            self._context, self._pending = self._pending, []
        return text

    def _whole(self, ids: list[int], *, ended: bool = False) -> str:
        """The text of `ids` after the context, empty while its last character may be incomplete.

        tokenizers.decoders.DecodeStream does the same, but raises an error for some sequences of byte tokens.
        """
        before = self._decoder.decode(self._context)
        text: str = self._decoder.decode(self._context + ids)
        # Bytes that do not go together can change how those before them read, which have been given out.
        text = text[len(before) :] if text.startswith(before) else self._decoder.decode(ids)
        return "" if text.endswith("\ufffd") and not ended else text

    def _cut(self, text: str, *, ended: bool = False) -> str:
        """The visible part of what is held and `text`, as far as it can be told yet."""
        if text:
            self._held += text
            self._stretches.append((len(text), self._tokens))
            self._tokens = 0
        visible = ""
        while True:
            mark = re.search(re.escape(self._close), self._held) if self._close else _OPEN.search(self._held)
            if not mark:
                break
            if self._close:
                self._take(mark.end(), reasoning=True)
                self._close = ""
            else:
                visible += self._take(mark.start())
                self._take(len(mark.group()), reasoning=True)
                self._close = _CLOSE_OF[mark.group()]
        start_of_mark = 0 if ended else _begun(self._held, [self._close] if self._close else [*_CLOSE_OF])
        rest = self._take(len(self._held) - start_of_mark, reasoning=bool(self._close))
        return visible if self._close else visible + rest

    def _take(self, length: int, *, reasoning: bool = False) -> str:
        """Remove the first `length` characters from what is held; the tokens of reasoning are counted, each once."""
        taken, self._held = self._held[:length], self._held[length:]
        while length:
            characters, tokens = self._stretches.popleft()
            if reasoning:
                self.reasoning_tokens += tokens
                tokens = 0
            if characters > length:
                self._stretches.appendleft((characters - length, tokens))
            length -= min(characters, length)
        return taken

    def _show(self, text: str) -> str:
        text = self._space + text if self.text else text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        self.text += shown
        return shown


def _begun(text: str, marks: list[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of the marks."""
    return max((size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)
