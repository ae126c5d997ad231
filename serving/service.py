"""The service: an HTTP API with a page, and replicas that hold the generator, as one Ray Serve application.

Kept apart from `serving/app.py` because replicas import these classes by name, which fails for classes of `__main__`.
"""

from __future__ import annotations

import asyncio
import base64
import difflib
import io
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from stages.bundle import BundleInfo, read_info
from stages.errors import UserError
from stages.files import Place
from stages.generator import AudioGenerator
from stages.sampling import PROFILES, SCHEDULERS, Sampling, resolve

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page" / "index.html"
NDJSON = "application/x-ndjson"
MEDIA_TYPES = {"wav": "audio/wav", "flac": "audio/flac"}
HEADERS = {  # the page is one file that talks to its own server and to nobody else
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self' blob:; "
    "media-src blob:; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


# --------------------------------------------------------------------------------------------- requests and limits


class GenerationRequest(BaseModel):
    """Body of POST /v1/audio/generations."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, description="The sound to generate; for a speech model, the voice.")
    negative_prompt: str | None = Field(None, description="What the sound should not contain.")
    transcription: str | None = Field(None, description="Text to speak; speech models only.")
    seconds: float | None = Field(None, gt=0, description="Length; the model's clip length by default.")
    profile: str = Field("loa", description=f"Sampling settings: {', '.join(PROFILES)}. Fields of the request override single settings.")
    guidance_scale: float | None = Field(None, ge=1, description="Classifier-free guidance scale; 1 means no guidance.")
    num_inference_steps: int | None = Field(None, ge=1, description="Number of denoising steps; more are slower and sound better.")
    scheduler: str | None = Field(None, description=f"One of {', '.join(SCHEDULERS)}.")
    eta: float | None = Field(None, ge=0, le=1, description="Noise added per step; ddim only.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="Seed; random if absent, and returned in the header X-Loa-Seed.")
    format: str = Field("wav", description="wav or flac, 16 bits.")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    default_seconds: float
    max_seconds: float
    max_steps: int = 200
    max_guidance_scale: float = 20.0
    max_characters: int = 1000  # of each text

    @classmethod
    def of(cls, info: BundleInfo, max_seconds: float = 30.0) -> Limits:
        """Limits of a bundle. A LOA of speech spans one clip, so speech cannot be longer."""
        clip = info.audio.clip_seconds
        return cls(clip, clip if info.speech else max(clip, max_seconds))


@dataclass(frozen=True)
class Job:
    """A checked request on its way to a replica."""

    prompt: str
    negative_prompt: str | None
    transcription: str | None
    seconds: float
    sampling: Sampling
    seed: int
    format: str

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Jobs with equal keys can be generated together."""
        return self.seconds, self.sampling


# What a replica tells of a job: {"step", "total"} after every step, then {"audio"} (bytes) or {"error", "status"}.
Event = dict[str, Any]


class Busy(Exception):
    """The queue is full."""


class Backend(Protocol):
    """Whoever carries out jobs: the replicas of the application, or something simpler in a test."""

    def events(self, job: Job) -> AsyncIterator[Event]:
        """Events of a job as they happen. Raises Busy when the queue is full."""
        ...


def check(request: GenerationRequest, limits: Limits, speech: bool) -> Job:
    """The job a request asks for. Raises UserError, with the allowed values, for what is out of bounds."""
    seconds = limits.default_seconds if request.seconds is None else request.seconds
    if seconds > limits.max_seconds:
        raise UserError(f"seconds is {seconds:g}; the maximum of this server is {limits.max_seconds:g}")
    # A server gives the seconds asked for, once, and nobody's sound depends on who else asks at that moment.
    fixed = {"length": "loa", "candidates": 1, "padding": "prompt"}
    chosen = {name: getattr(request, name) for name in ("guidance_scale", "num_inference_steps", "scheduler", "eta")}
    sampling = resolve(request.profile, **chosen, **fixed)
    if sampling.num_inference_steps > limits.max_steps:
        raise UserError(f"num_inference_steps is {sampling.num_inference_steps}; the maximum of this server is {limits.max_steps}")
    if sampling.guidance_scale > limits.max_guidance_scale:
        raise UserError(f"guidance_scale is {sampling.guidance_scale:g}; the maximum of this server is {limits.max_guidance_scale:g}")
    for name in ("prompt", "negative_prompt", "transcription"):
        text = getattr(request, name) or ""
        if len(text) > limits.max_characters:
            raise UserError(f"{name} has {len(text)} characters; the maximum of this server is {limits.max_characters}")
    if not request.prompt.strip():
        raise UserError("prompt is empty; describe a sound")
    if speech and not (request.transcription or "").strip():
        raise UserError("this is a speech model: give the text to speak as transcription")
    if not speech and request.transcription:
        raise UserError("this model makes sounds, not speech: leave transcription out")
    if sampling.guidance_scale == 1 and request.negative_prompt:
        raise UserError("a negative_prompt needs guidance: raise guidance_scale above 1 or leave it out")
    _one_of("format", request.format, MEDIA_TYPES)
    return Job(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        transcription=request.transcription if speech else None,
        seconds=seconds,
        sampling=sampling,
        seed=secrets.randbelow(2**32) if request.seed is None else request.seed,
        format=request.format,
    )


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


# ---------------------------------------------------------------------------------------------------------- HTTP


def create_api(backend: Callable[[], Backend], info: BundleInfo, limits: Limits) -> FastAPI:
    """The routes. `backend` is asked at every request, for it may only exist once the replica runs."""
    api = FastAPI(title="loa", description="Sound from words, by AudioLDM 2.", docs_url=None, redoc_url=None)

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=HEADERS)

    @api.get("/healthz")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/model")
    async def model() -> dict[str, Any]:
        """What is served, what may be asked of it, and what made it."""
        return {
            "variant": info.variant,
            "tiny": info.tiny,
            "speech": info.speech,
            "sample_rate": info.audio.sample_rate,
            "limits": asdict(limits),
            "schedulers": list(SCHEDULERS),
            "profiles": {name: asdict(profile) for name, profile in PROFILES.items()},
            "formats": list(MEDIA_TYPES),
            "provenance": info.provenance,
        }

    @api.post(
        "/v1/audio/generations", response_class=Response, responses={200: {"content": {m: {} for m in (*MEDIA_TYPES.values(), NDJSON)}}}
    )
    async def generate(body: GenerationRequest, request: Request) -> Response:
        """Generate one sound. With `Accept: application/x-ndjson`, a line per step and the sound in base64 at the end."""
        job = check(body, limits, info.speech)
        began = time.monotonic()
        events = backend().events(job)
        first = await anext(events)  # a full queue or a refusal comes here, before any byte of the answer
        if NDJSON in request.headers.get("accept", ""):
            return StreamingResponse(_lines(job, first, events), media_type=NDJSON, headers={"Cache-Control": "no-store"})
        last = first
        async for event in events:
            last = event
        if "error" in last:
            return _problem(last["status"], last["error"])
        headers = {"X-Loa-Seed": str(job.seed), "X-Loa-Seconds": f"{time.monotonic() - began:.3f}", "Cache-Control": "no-store"}
        return Response(last["audio"], media_type=MEDIA_TYPES[job.format], headers=headers)

    @api.exception_handler(UserError)
    async def refuse(_: Request, error: UserError) -> JSONResponse:
        return _problem(422, str(error))

    @api.exception_handler(RequestValidationError)
    async def refuse_shape(_: Request, error: RequestValidationError) -> JSONResponse:
        return _problem(422, "; ".join(_sentence(e) for e in error.errors()))

    @api.exception_handler(Busy)
    async def busy(_: Request, __: Busy) -> JSONResponse:
        return _problem(503, "the server is busy and its queue is full; try again in a moment", {"Retry-After": "5"})

    return api


def _problem(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": sentence}, status, headers)


def _sentence(error: Any) -> str:
    """One problem of a request's shape, in plain words."""
    names = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(names[-1], GenerationRequest.model_fields, 1)
        return f"unknown field {names[-1]!r}" + (f"; did you mean {near[0]!r}?" if near else "")
    if error["type"] == "json_invalid":
        return "the body is not valid JSON"
    said = error["msg"][0].lower() + error["msg"][1:]
    return f"{'.'.join(names) or 'the body'}: {said}"


async def _lines(job: Job, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    """Events as lines of JSON; the sound in base64."""
    event: Event | None = first
    while event is not None:
        if "audio" in event:
            audio = base64.b64encode(event["audio"]).decode()
            event = {"audio": audio, "media_type": MEDIA_TYPES[job.format], "seed": job.seed, "seconds": job.seconds}
        yield json.dumps(event) + "\n"
        event = await anext(events, None)


# ------------------------------------------------------------------------------------------------------ generating


class Abandoned(Exception):
    """Nobody waits for these jobs any more."""


def run_jobs(
    generator: AudioGenerator,
    jobs: list[Job],
    tell: Callable[[dict[int, Event]], None],
    wanted: Callable[[int], bool] = lambda index: True,
) -> None:
    """Carry out jobs, those that fit together as one batch. Every job ends with an "audio" or "error" event.

    Blocking, so replicas call it on a thread of its own. `tell` gets events by the index of their job; a batch of which
    no job is `wanted` any more is given up.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault(job.batch_key, []).append(i)
    for rows in groups.values():
        chosen = [jobs[i] for i in rows]

        def step(done: int, total: int, rows: list[int] = rows) -> None:
            if not any(wanted(i) for i in rows):
                raise Abandoned
            tell({i: {"step": done, "total": total} for i in rows})

        results: list[Event]
        try:
            waveforms = generator.generate(
                [job.prompt for job in chosen],
                negative_prompts=[job.negative_prompt for job in chosen],
                transcriptions=[job.transcription for job in chosen],
                seed=[job.seed for job in chosen],
                seconds=chosen[0].seconds,
                progress=step,
                **asdict(chosen[0].sampling),
            )
            results = [{"audio": encode(w, generator.sample_rate, job.format)} for w, job in zip(waveforms, chosen, strict=True)]
        except Abandoned:
            continue
        except UserError as error:
            results = [{"error": str(error), "status": 422}] * len(chosen)
        except torch.OutOfMemoryError:
            sentence = "the device ran out of memory; ask for fewer seconds, or serve with a smaller --max-batch"
            results = [{"error": sentence, "status": 503}] * len(chosen)
        tell(dict(zip(rows, results, strict=True)))


def encode(waveform: np.ndarray, sample_rate: int, container: str) -> bytes:
    """A waveform [T] as the bytes of a 16-bit WAV or FLAC file; what is louder than full scale is clipped."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(waveform, -1.0, 1.0), sample_rate, format=container.upper(), subtype="PCM_16")
    return buffer.getvalue()


class SoundModel:
    """A replica: one generator, batches of jobs one after the other."""

    def __init__(self, bundle: str, max_batch: int, threads: int | None) -> None:
        if threads:  # Ray allots one arithmetic thread per reserved CPU, which would leave most cores idle
            torch.set_num_threads(threads)
        self.generator = AudioGenerator.load(bundle)
        self._batch.set_max_batch_size(max_batch)

    async def events(self, job: Job) -> AsyncIterator[Event | None]:
        """The events of a job, which may be carried out together with others."""
        gone = threading.Event()
        try:
            async for event in self._batch((job, gone)):
                yield event
        finally:
            gone.set()

    @serve.batch(batch_wait_timeout_s=0.02)
    async def _batch(self, asked: list[tuple[Job, threading.Event]]) -> AsyncIterator[list[Any]]:
        """The events of a batch, one entry per job: an event, None for nothing new, StopAsyncIteration after the end."""
        jobs = [job for job, _ in asked]
        loop, news = asyncio.get_running_loop(), asyncio.Queue[dict[int, Event] | None]()

        def tell(events: dict[int, Event]) -> None:
            loop.call_soon_threadsafe(news.put_nowait, events)

        def work() -> None:
            try:
                run_jobs(self.generator, jobs, tell, wanted=lambda i: not asked[i][1].is_set())
            except Exception:  # the thread's only way to speak; the replica lives on and the log has the traceback
                log.exception("generation failed")
            finally:
                loop.call_soon_threadsafe(news.put_nowait, None)

        threading.Thread(target=work, name="generate", daemon=True).start()
        ended: set[int] = set()
        while (said := await news.get()) is not None:
            yield [StopAsyncIteration if i in ended else said.get(i) for i in range(len(jobs))]
            ended |= {i for i, event in said.items() if "step" not in event}
        failure = {"error": "the request failed on the server; see its log", "status": 500}
        yield [StopAsyncIteration if i in ended else failure for i in range(len(jobs))]


class Replicas:
    """The backend of the application: jobs go to whichever replica is free."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle.options(stream=True)

    async def events(self, job: Job) -> AsyncIterator[Event]:
        """See Backend."""
        stream = self.handle.events.remote(job)
        try:
            async for event in stream:
                if event is not None:
                    yield event
        except BackPressureError as error:
            raise Busy from error
        finally:
            stream.cancel()  # without effect at the end; before it, the client has left


class Api:
    """The HTTP side; holds no model, so pages and refusals are answered while replicas work."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.backend = Replicas(model)


def _backend_here() -> Backend:
    """The backend of the Api replica this runs in."""
    replica: Api = serve.get_replica_context().servable_object
    return replica.backend


class ServeArgs(BaseModel):
    """Arguments of `build`, also for `serve run serving.service:build bundle=…` and Serve configuration files."""

    model_config = ConfigDict(extra="forbid")

    bundle: str
    num_replicas: int = Field(default=1, ge=1)
    max_batch: int = Field(default=4, ge=1, description="Requests generated together by one replica.")
    max_queue: int = Field(default=32, ge=0, description="Requests that may wait; further ones get 503.")
    max_seconds: float = Field(default=30.0, gt=0)
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs reserved per replica.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs reserved per replica.")
    threads: int | None = Field(default=None, ge=1, description="Arithmetic threads per replica.")


def build(args: ServeArgs) -> serve.Application:
    """The application. Raises UserError when the bundle cannot be served."""
    bundle = str(Place.of(args.bundle))  # replicas on other nodes make copies of their own
    info = read_info(bundle)
    api = create_api(_backend_here, info, Limits.of(info, args.max_seconds))
    model = serve.deployment(
        SoundModel,
        num_replicas=args.num_replicas,
        # one batch at work and one waiting: batches never fill beyond what is let in
        max_ongoing_requests=2 * args.max_batch,
        max_queued_requests=args.max_queue,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5,
    ).bind(bundle, args.max_batch, args.threads)
    front = serve.deployment(
        serve.ingress(api)(Api), max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_wait_loop_s=0.1
    )
    application: serve.Application = front.bind(model)
    return application
