"""Between HTTP and the scheduler: requests become jobs, a job's events become an async stream."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from serving.chat.rendering import ChatPrompt, ChatRenderer, Reply
from serving.chat.template import ChatTemplate
from serving.llamacpp.adapters import AdapterFile, Adapters
from serving.llamacpp.grammar import Grammar, GrammarCompiler
from serving.llamacpp.images import ImageReader
from serving.llamacpp.runtime import Context, Image, KvType, Model, use_small_pages
from serving.llamacpp.sampling import SamplingParams
from serving.llamacpp.scheduler import QueueFull, Scheduler
from serving.llamacpp.sequence import Event, Job, TextDelta
from serving.llamacpp.speculation import SpeculationKind, speculation_of
from serving.llamacpp.stats import Load, Stats
from serving.llamacpp.tokenization import Tokenization
from serving.protocol.errors import ApiError
from serving.protocol.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest
from serving.protocol.tenancy import Tenancy

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What ``python -m serving.llamacpp`` is told; see its ``--help``."""

    model_path: Path
    served_name: str
    context_length: int
    max_sequences: int
    max_queue: int
    max_batch_tokens: int
    threads: int
    gpu_layers: int
    adapters: list[AdapterFile]
    projector_path: Path | None
    kv_tokens: int | None
    kv_type: KvType
    flash_attention: Literal["on", "off"]
    prefix_cache_mib: int
    speculation: SpeculationKind
    draft_model_path: Path | None
    step_timeout_seconds: float


class Engine:
    """A loaded model that takes requests. Its methods belong to the event loop that made it."""

    def __init__(self, options: EngineOptions, model: Model) -> None:
        """Allocate KV memory; raises ``RuntimeFault``. The engine owns ``model`` from now on."""
        self.options = options
        self._model = model
        if options.context_length > self._model.context_length_trained:
            _log.warning(
                "context_length %d is more than the %d tokens this model was trained on",
                options.context_length,
                self._model.context_length_trained,
            )
        self._context = Context(
            self._model,
            slots=options.max_sequences,
            context_length=options.context_length,
            batch_tokens=options.max_batch_tokens,
            threads=options.threads,
            kv_tokens=options.kv_tokens,
            kv_type=options.kv_type,
            flash_attention=options.flash_attention == "on",
        )
        template = ChatTemplate(
            self._model.chat_template,
            bos_text=self._model.bos_text,
            eos_text=self._model.eos_text,
            tokenizer_adds_bos=self._model.adds_bos,
        )
        self._chats = ChatRenderer(template, self._model.token_of)
        self._grammars = GrammarCompiler(self._model)
        self._images = ImageReader(
            self._model,
            options.projector_path,
            threads=options.threads,
            use_gpu=options.gpu_layers != 0,
            batch_tokens=self._context.batch_tokens,
            check_length=partial(self._check_length, "messages"),
        )
        self.tokenization = Tokenization(model, self._text_of, options.context_length)
        self._speculation = speculation_of(
            options.speculation,
            self._model,
            options.draft_model_path,
            context_length=options.context_length,
            threads=options.threads,
            gpu_layers=options.gpu_layers,
        )
        use_small_pages()
        self._scheduler = Scheduler(
            self._model,
            self._context,
            max_queue=options.max_queue,
            store_bytes=options.prefix_cache_mib * 2**20,
            speculation=self._speculation,
            step_timeout_seconds=options.step_timeout_seconds,
            emit=self._emit,
        )
        self.adapters = Adapters(
            self._model,
            self._context,
            model_path=options.model_path,
            served_name=options.served_name,
            between_steps=self._scheduler.between_steps,
        )
        identity = (
            f"{self._model.build} {options.model_path.name} {options.model_path.stat().st_size}"
        )
        self.system_fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]
        self._loop = asyncio.get_running_loop()
        self._outputs: dict[Job, asyncio.Queue[Event]] = {}
        self._scheduler.start()

    def close(self) -> None:
        """Stop the scheduler and free all memory."""
        self._scheduler.stop()
        self._images.close()
        if self._speculation is not None:
            self._speculation.close()
        self._context.close()
        self._model.close()

    @property
    def alive(self) -> bool:
        """Whether requests are being worked on."""
        return self._scheduler.alive

    def load(self) -> Load:
        """How busy the engine is."""
        return self._scheduler.load()

    def stats(self) -> Stats:
        """What the scheduler has counted since the start."""
        return self._scheduler.stats

    async def chat(
        self, request: ChatCompletionRequest, tenancy: Tenancy
    ) -> tuple[Job, list[Reply]]:
        """Start a chat completion; its choices' text goes through the replies. Raises :class:`ApiError`."""

        def prepare() -> tuple[ChatPrompt, list[int], list[Image], Grammar | None]:
            placed = self._images.place(request)
            prompt = self._chats.prepare(placed.request)
            tokens, images = self._images.read(prompt.text, placed)
            spec = prompt.constraint
            return prompt, tokens, images, self._grammars.compile(spec) if spec else None

        thread = self._images.thread if request.has_images else None
        prompt, tokens, images, grammar = await self._loop.run_in_executor(thread, prepare)
        job = self._start(
            request,
            tenancy,
            [tokens],
            images=images,
            grammar=grammar,
            show_control_tokens=prompt.format.show_control_tokens,
        )
        return job, [prompt.reply() for _ in job.sequences]

    def _text_of(self, chat: ChatCompletionRequest) -> str:
        if chat.has_images:
            raise ApiError(400, "Only text can be tokenized; leave images out.", param="messages")
        return self._chats.prepare(chat).text

    async def complete(
        self, request: CompletionRequest, tenancy: Tenancy
    ) -> tuple[Job, list[Reply]]:
        """Start a text completion, as :meth:`chat` does a chat; raises :class:`ApiError`."""

        def prepare() -> tuple[list[list[int]], Grammar | None]:
            prompts = [self._tokens_of(prompt, request.suffix) for prompt in request.prompts]
            spec = request.constraint
            return prompts, self._grammars.compile(spec) if spec else None

        prompts, grammar = await asyncio.to_thread(prepare)
        job = self._start(request, tenancy, prompts, grammar=grammar, echo=bool(request.echo))
        return job, [Reply() for _ in job.sequences]

    def _tokens_of(self, prompt: str | list[int], suffix: str | None) -> list[int]:
        if suffix:
            return self._fill_in_the_middle(prompt, suffix)
        return self.tokenization.tokens_of(prompt, "prompt")

    def _fill_in_the_middle(self, prompt: str | list[int], suffix: str) -> list[int]:
        """A prompt that asks for what comes between ``prompt`` and ``suffix``."""
        fill = self._model.fill_in_the_middle_tokens
        if fill is None:
            raise ApiError(
                400,
                "This model was not trained to fill in the middle; leave 'suffix' out.",
                param="suffix",
                code="unsupported_parameter",
            )
        before = (
            self._model.tokenize(prompt, add_special=False, parse_special=False)
            if isinstance(prompt, str)
            else self._tokens_of(prompt, None)
        )
        after = self._model.tokenize(suffix, add_special=False, parse_special=False)
        return [*self._model.bos_tokens, fill.prefix, *before, fill.suffix, *after, fill.middle]

    def _start(
        self,
        request: ChatCompletionRequest | CompletionRequest,
        tenancy: Tenancy,
        prompts: list[list[int]],
        *,
        images: list[Image] | None = None,
        grammar: Grammar | None = None,
        show_control_tokens: bool = False,
        echo: bool = False,
    ) -> Job:
        self.tokenization.tokens_of(
            [int(token) for token in request.logit_bias or ()], "logit_bias"
        )
        job = Job(
            adapter=self.adapters.find(request.model),
            ignore_eos=bool(request.ignore_eos),
            top_logprobs=request.top_logprob_count,
            echo=echo,
            grammar=grammar,
            show_control_tokens=show_control_tokens,
            tenant=tenancy.tenant,
            weight=tenancy.weight,
            priority=tenancy.priority,
        )
        param = "messages" if isinstance(request, ChatCompletionRequest) else "prompt"
        for prompt in prompts:
            self._check_length(param, len(prompt))
            room = self.options.context_length - len(prompt)
            wanted = room if request.token_limit is None else request.token_limit
            job.add(
                prompt,
                limit=min(wanted, room),
                params=[SamplingParams.of(request, seed) for seed in _seeds(request)],
                stop_strings=request.stop_strings,
                images=images or (),
            )
        if len(job.sequences) > self._scheduler.capacity:
            raise ApiError(
                400,
                f"The request asks for {len(job.sequences)} completions; "
                f"this model takes at most {self._scheduler.capacity} at a time.",
                param="n" if request.choices > 1 else "prompt",
                code="too_many_choices",
            )
        self._outputs[job] = asyncio.Queue()
        try:
            self._scheduler.submit(job)
        except QueueFull as error:
            del self._outputs[job]
            raise ApiError(
                503,
                f"All {self.options.max_sequences} slots are taken and {self.options.max_queue} "
                "requests wait already; try again in a moment.",
                code="queue_full",
                retry_after_seconds=1,
            ) from error
        self.adapters.hold(job.adapter, len(job.sequences))
        return job

    def _check_length(self, param: str, tokens: int) -> None:
        if not tokens:
            raise ApiError(400, "The prompt is empty.", param=param, code="invalid_value")
        if tokens >= self.options.context_length:
            raise ApiError(
                400,
                f"The prompt has {tokens} tokens; this model's context takes "
                f"{self.options.context_length}, with room for at least one new token.",
                param=param,
                code="context_length_exceeded",
            )

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """A job's events until its last sequence is done."""
        output = self._outputs[job]
        for _ in job.sequences:
            while isinstance(event := await output.get(), TextDelta):
                yield event
            yield event

    def release(self, job: Job) -> None:
        """Forget a job; what is not done of it ends before the scheduler's next step."""
        if self._outputs.pop(job, None) is not None and not job.done:
            self._scheduler.cancel(job)

    def cancel(self, job: Job) -> None:
        """End a job early; :meth:`events` then yields the end of each of its sequences."""
        self._scheduler.cancel(job)

    def _emit(self, events: list[Event]) -> None:
        """Carry a step's events from the scheduler's thread to the event loop, in one wake-up."""
        if events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            if not isinstance(event, TextDelta):
                self.adapters.release(event.sequence.job.adapter)
            output = self._outputs.get(event.sequence.job)
            if output is not None:
                output.put_nowait(event)


def _seeds(request: GenerationRequest) -> list[int]:
    """A sampler seed for each choice: derived from the request's, or random."""
    if request.seed is None:
        return [secrets.randbits(32) for _ in range(request.choices)]
    return [(request.seed + choice) % 2**32 for choice in range(request.choices)]
