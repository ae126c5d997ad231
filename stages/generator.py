"""AudioGenerator: prompt → conditioning → LOA → latent → mel → waveform, as evaluation, command line and service use it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from stages.bundle import Components, load
from stages.clap.model import clap_mel
from stages.diffusion.solvers import make_solver
from stages.errors import UserError
from stages.files import Place
from stages.frozen import resample
from stages.lora import Adapter
from stages.phonemes import phoneme_ids
from stages.sampling import Sampling, resolve
from stages.translator.model import generate_loa

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Waveforms = NDArray[np.float32]


class Conditioning(NamedTuple):
    """What the T-UNet attends to, one row per prompt."""

    loa: Tensor  # [B, N, D]
    text: Tensor | None  # [B, L, D'], T5 states; None for speech
    text_mask: Tensor | None  # [B, L]

    def repeat(self, times: int) -> Conditioning:
        """Every row `times` times in a row."""
        text, mask = (x if x is None else x.repeat_interleave(times, 0) for x in self[1:])
        return Conditioning(self.loa.repeat_interleave(times, 0), text, mask)


class AudioGenerator:
    """Generates sound with the networks of a bundle.

    A prompt's result depends on its own seed and settings alone, not on the prompts it shares a batch with: prompts of
    different length never pad each other on the way to the LOA (GPT-2 counts padded places, references.md#condition-sequence), and every
    waveform has a random generator of its own. What remains is rounding. Only `padding="batch"` gives that up.
    """

    def __init__(self, components: Components) -> None:
        self.parts, self.info = components, components.info
        vocoder, vae = components.vocoder.config, components.vae.config
        self.sample_rate: int = vocoder.sampling_rate  # Hz
        self.hop_length: int = math.prod(vocoder.upsample_rates)  # samples
        self.mel_bins: int = vocoder.model_in_dim
        self.compression: int = 2 ** (len(vae.block_out_channels) - 1)  # mel frames per latent frame
        self.clip_seconds: float = components.unet.config.sample_size * self.compression * self.hop_length / self.sample_rate
        self.max_steps: int = components.scheduler.config.num_train_timesteps - 1

    @classmethod
    def load(
        cls,
        bundle: str | Path | Place,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> AudioGenerator:
        """Load a bundle with LoRA `adapters`, by default onto the GPU (in bfloat16) if there is one, else the CPU (in float32).

        Raises UserError when the bundle is missing, not whole, or of another format, an adapter does not fit, or there is no such device.
        """
        try:
            device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"the device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}); leave it out to use the default device"
            ) from error
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(load(bundle, device, dtype, adapters))

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        device: torch.device = self.parts.unet.device
        return device

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        profile: str = "loa",
        negative_prompts: str | Sequence[str | None] | None = None,
        seconds: float | None = None,
        seed: int | Sequence[int] = 0,
        num_waveforms_per_prompt: int = 1,
        transcriptions: str | Sequence[str | None] | None = None,
        latents: Tensor | NDArray[np.float32] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> Waveforms:
        """Generate waveforms for prompts.

        Args:
            prompts: descriptions of sounds; for speech, of the voice.
            profile: whose way of sampling to take, a name of `stages.sampling.PROFILES`.
            negative_prompts: what to steer away from, one for all or one per prompt; needs guidance.
            seconds: length; the bundle's clip length by default.
            seed: one for every prompt, or one per prompt. The first waveform of a prompt starts from
                `torch.Generator().manual_seed(seed)`.
            num_waveforms_per_prompt: variations of each prompt, next to each other in the result.
            transcriptions: what is said, one for all or one per prompt; speech bundles only.
            latents: initial noise `[N, C, T', F']` instead of the seeds', N counting the candidates.
            progress: called with (step, steps) after every step.
            **options: fields of `stages.sampling.Sampling` to put in place of the profile's: scheduler,
                num_inference_steps, guidance_scale, eta, timesteps, unconditional, padding, length, candidates.

        Returns:
            float32 `[N, samples]` at `sample_rate`, N = prompts x num_waveforms_per_prompt.

        Raises:
            UserError: an argument is out of range or does not fit the others.
        """
        sampling = resolve(profile, **options)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = _per_prompt("negative_prompts", negative_prompts, len(prompts))
        spoken = _per_prompt("transcriptions", transcriptions, len(prompts))
        seeds = _per_prompt("seed", seed, len(prompts))
        self._check(prompts, spoken, seconds, sampling, seeds, num_waveforms_per_prompt)
        if sampling.guidance_scale == 1 and any(negatives):
            raise UserError("negative prompts need guidance; raise guidance_scale above 1 or leave them out")

        frames, samples = self.length(seconds, sampling.length)
        shape = (self.parts.unet.config.in_channels, frames, self.mel_bins // self.compression)
        count = max(num_waveforms_per_prompt, sampling.candidates)
        generators = [g for s in seeds for g in _generators(s, count)]
        if latents is None:
            noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        else:
            noise = torch.as_tensor(latents).float()
            if noise.shape != (len(generators), *shape):
                raise UserError(f"latents have the shape {tuple(noise.shape)}; these prompts and seconds need {(len(generators), *shape)}")

        conditioning = self.encode_prompts(prompts, spoken, sampling.padding)
        without = None
        if sampling.guidance_scale != 1:
            rule = sampling.unconditional or self.info.unconditional
            without = self._without(conditioning, negatives, rule, sampling.padding).repeat(count)
        latent = self.denoise(conditioning.repeat(count), noise, sampling, without=without, generators=generators, progress=progress)
        waveforms = self.decode(latent, samples)
        return waveforms if sampling.candidates == 1 else self.best(prompts, waveforms, num_waveforms_per_prompt)

    def length(self, seconds: float | None = None, rule: str = "loa") -> tuple[int, int | None]:
        """Latent frames, and samples to cut to (None: all that the vocoder gives), for a length in seconds.

        The rules are those of `Sampling.length`; without `seconds` every rule gives the frames of the bundle's clips.
        """
        if rule == "authors":  # 25.6 latent frames per second of nominal time at 16 kHz: 10 s are 256, which last 10.24 s
            nominal = 1.024 * self.sample_rate / (self.hop_length * self.compression)
            return self.parts.unet.config.sample_size if seconds is None else int(seconds * nominal), None
        seconds = self.clip_seconds if seconds is None else seconds
        if rule == "diffusers":
            mel_frames, samples = int(seconds / (self.hop_length / self.sample_rate)), int(seconds * self.sample_rate)
            return -(-mel_frames // self.compression), samples
        samples = round(seconds * self.sample_rate)
        return -(-samples // (self.hop_length * self.compression)), samples

    # ------------------------------------------------------------------------------------------------ conditions

    @torch.inference_mode()
    def encode_prompts(
        self, prompts: Sequence[str], transcriptions: Sequence[str | None] | None = None, padding: str = "prompt"
    ) -> Conditioning:
        """LOA and text states of prompts; for speech, of the voices described by `prompts` saying `transcriptions`.

        With `padding="batch"` GPT-2 sees every prompt padded to the longest (see `Sampling.padding`).
        """
        if self.info.speech:
            ids = torch.stack([self._phonemes(text or "") for text in transcriptions or []])
            return Conditioning(self.loa(self._clap(prompts), *self._speak(ids)), None, None)
        lengths = self._lengths(prompts, padding)
        text, mask = self._read(prompts, lengths)
        return Conditioning(self._translate(prompts, text, mask, lengths), text, mask)

    @torch.inference_mode()
    def loa(self, clap: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """The language of audio by GPT-2, one state at a time with cached keys and values.

        CLAP embeddings `[B, C]`, T5 or phoneme states `[B, L, D]` and their mask `[B, L]` → `[B, N, D']`.
        """
        ones = text_mask.new_ones(len(clap), 1)
        prefix = self.parts.projection_model(clap[:, None], text, ones, text_mask)
        return generate_loa(self.parts.language_model, prefix.hidden_states, prefix.attention_mask, self.info.loa_tokens)

    def _clap(self, texts: Sequence[str]) -> Tensor:
        tokens = self.parts.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        embedding: Tensor = self.parts.text_encoder.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return embedding

    def _lengths(self, texts: Sequence[str], padding: str) -> list[int]:
        """Places of each text for T5, at most what T5 reads: its tokens, or those of the longest text of the batch."""
        limit = self.parts.tokenizer_2.model_max_length
        rows = self.parts.tokenizer_2(list(texts), verbose=False).input_ids
        for text, row in zip(texts, rows, strict=True):
            if len(row) > limit:
                log.warning("T5 reads %d tokens and this text has %d, its end is not heard: %s", limit, len(row), text)
        lengths = [min(len(row), limit) for row in rows]
        return lengths if padding == "prompt" else [max(lengths)] * len(lengths)

    def _read(self, texts: Sequence[str], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """T5 states [B, L, D] and mask [B, L] of texts cut to `lengths` tokens; L is the greatest of these."""
        rows = [self.parts.tokenizer_2(t, truncation=True, max_length=n).input_ids for t, n in zip(texts, lengths, strict=True)]
        tokens = self.parts.tokenizer_2.pad({"input_ids": rows}, padding="max_length", max_length=max(lengths), return_tensors="pt")
        tokens = tokens.to(self.device)
        states: Tensor = self.parts.text_encoder_2(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return states, tokens.attention_mask

    def _translate(self, texts: Sequence[str], states: Tensor, mask: Tensor, lengths: Sequence[int]) -> Tensor:
        """LOA [B, N, D] of texts and their T5 states; only rows of equal length share a batch."""
        clap = self._clap(texts)
        said: dict[int, Tensor] = {}
        for length in sorted(set(lengths)):
            rows = [i for i, other in enumerate(lengths) if other == length]
            said.update(zip(rows, self.loa(clap[rows], states[rows, :length], mask[rows, :length]), strict=True))
        return torch.stack([said[i] for i in range(len(lengths))])

    def _phonemes(self, transcription: str) -> Tensor:
        limit = self.parts.projection_model.config.max_seq_length
        ids = torch.from_numpy(phoneme_ids(transcription, limit).astype(np.int64))
        if ids[-1] != 0 and len(phoneme_ids(transcription, limit + 1).nonzero()[0]) > limit:
            log.warning("the model speaks %d phonemes at a time; the end of this transcription is not heard: %s", limit, transcription)
        return ids.to(self.device)

    def _speak(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Phoneme ids [B, L] → states [B, L, D] and mask [B, L]."""
        mask = (ids != 0).long()
        encoder = self.parts.text_encoder_2.text_encoder
        padding = mask[..., None].to(self.parts.projection_model.dtype)
        return encoder(ids, padding_mask=padding, attention_mask=mask).last_hidden_state, mask

    def _without(
        self, conditioning: Conditioning, negatives: Sequence[str | None], unconditional: str, padding: str = "prompt"
    ) -> Conditioning:
        """The condition that guidance steers away from, one row per prompt.

        "zeros": what condition dropout showed the T-UNet, no LOA and an empty text (references.md#condition-dropout); a negative
        prompt that says something is translated like a prompt. "diffusers": GPT-2 run on the negative or empty prompt, which is cut
        or padded to the prompt's length (references.md#guidance).
        """
        texts = [negative or "" for negative in negatives]
        zeros = unconditional == "zeros"
        silent = torch.tensor([zeros and not text for text in texts], device=self.device)[:, None, None]
        if self.info.speech:
            loa = torch.zeros_like(conditioning.loa) if silent.all() else self._silent_voice(texts)
            return Conditioning(loa.masked_fill(silent, 0.0), None, None)
        assert conditioning.text_mask is not None
        if zeros:
            lengths = self._lengths(texts, padding)
        else:
            mask = conditioning.text_mask
            lengths = mask.sum(1).tolist() if padding == "prompt" else [mask.shape[1]] * len(texts)
        text, mask = self._read(texts, lengths)
        loa = torch.zeros_like(conditioning.loa) if silent.all() else self._translate(texts, text, mask, lengths)
        return Conditioning(loa.masked_fill(silent, 0.0), text, mask)

    def _silent_voice(self, texts: Sequence[str]) -> Tensor:
        """The LOA of voices that say nothing: phoneme states of zero, all masked."""
        config = self.parts.projection_model.config
        clap = self._clap(texts)
        states = clap.new_zeros(len(texts), config.max_seq_length, config.text_encoder_1_dim)
        return self.loa(clap, states, states[..., 0].long())

    # ----------------------------------------------------------------------------------------- latents and sound

    @torch.inference_mode()
    def denoise(
        self,
        conditioning: Conditioning,
        noise: Tensor,
        sampling: Sampling,
        *,
        without: Conditioning | None = None,
        generators: Sequence[torch.Generator] = (),
        progress: Progress | None = None,
    ) -> Tensor:
        """Scaled latents `[N, C, T', F']` from standard normal `noise` of that shape.

        With `without`, every step asks the T-UNet both with and without the condition and follows
        ε_without + guidance_scale · (ε_with - ε_without). `generators` (one per row) give the noise of eta > 0.
        """
        solver = make_solver(self.parts.scheduler, sampling, self.device, generators)
        both = conditioning if without is None else _stack(without, conditioning)
        text = {} if both.text is None else {"encoder_hidden_states_1": both.text, "encoder_attention_mask_1": both.text_mask}
        unet = self.parts.unet
        latent = noise.to(self.device) * solver.init_noise_sigma
        for step, timestep in enumerate(solver.timesteps):
            seen = solver.scale_model_input(latent, timestep).to(unet.dtype)
            seen = seen if without is None else torch.cat([seen, seen])
            predicted = unet(seen, timestep, encoder_hidden_states=both.loa, **text).sample.float()
            if without is not None:
                free, guided = predicted.chunk(2)
                predicted = free + sampling.guidance_scale * (guided - free)
            latent = solver.step(predicted, timestep, latent).prev_sample
            if progress is not None:
                progress(step + 1, len(solver.timesteps))
        return latent

    @torch.inference_mode()
    def decode(self, latent: Tensor, samples: int | None = None) -> Waveforms:
        """Waveforms `[N, samples]` of scaled latents `[N, C, T', F']`; all that the vocoder gives if `samples` is None."""
        mel = self.parts.vae.decode(latent.float() / self.parts.vae.config.scaling_factor).sample[:, 0]
        return self.vocode(mel)[:, :samples]

    @torch.inference_mode()
    def vocode(self, mel: Tensor | NDArray[np.float32]) -> Waveforms:
        """Waveforms `[B, T]` of log-mel spectrograms `[B, F, M]`, by the vocoder alone."""
        waveform: Waveforms = self.parts.vocoder(self._mel(mel)).float().cpu().numpy()
        return waveform

    @torch.inference_mode()
    def reconstruct_mel(self, mel: Tensor | NDArray[np.float32]) -> NDArray[np.float32]:
        """Log-mel spectrograms `[B, F, M]` after the way through the VAE, by the mean of its posterior."""
        given = self._mel(mel)
        frames = given.shape[1]
        padded = F.pad(given[:, None], (0, 0, 0, -frames % self.compression), mode="replicate")
        latent = self.parts.vae.encode(padded).latent_dist.mean
        result: NDArray[np.float32] = self.parts.vae.decode(latent).sample[:, 0, :frames].cpu().numpy()
        return result

    def reconstruct(self, mel: Tensor | NDArray[np.float32]) -> Waveforms:
        """Waveforms `[B, F · hop]` of log-mel spectrograms `[B, F, M]` after VAE and vocoder: reconstructions, blurred clip by clip."""
        restored = self.reconstruct_mel(mel)
        return self.vocode(restored)[:, : restored.shape[1] * self.hop_length]

    @torch.inference_mode()
    def similarity(self, prompts: Sequence[str], waveforms: Waveforms) -> NDArray[np.float32]:
        """CLAP's cosine between each prompt and its waveform `[N, T]`, `[N]`; higher is better."""
        extractor, clap = self.parts.feature_extractor, self.parts.text_encoder
        heard = resample(torch.as_tensor(waveforms, device=self.device), self.sample_rate, extractor.sampling_rate)
        features = clap_mel(heard, extractor).to(clap.dtype)
        sound = clap.get_audio_features(input_features=features).pooler_output
        result: NDArray[np.float32] = F.cosine_similarity(sound.float(), self._clap(prompts).float()).cpu().numpy()
        return result

    def best(self, prompts: Sequence[str], waveforms: Waveforms, keep: int) -> Waveforms:
        """The `keep` waveforms of each prompt that CLAP finds most fitting, best first: `[P · K, T]` → `[P · keep, T]`.

        Candidates compete within their prompt; diffusers sorts over all prompts at once and mixes them (references.md#diffusers-pipeline).
        """
        count = len(waveforms) // len(prompts)
        scores = self.similarity([prompt for prompt in prompts for _ in range(count)], waveforms).reshape(len(prompts), count)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :keep] + count * np.arange(len(prompts))[:, None]
        return waveforms[order.ravel()]

    def _mel(self, mel: Tensor | NDArray[np.float32]) -> Tensor:
        given = torch.as_tensor(mel, dtype=torch.float32, device=self.device)
        if given.dim() != 3 or given.shape[2] != self.mel_bins:
            raise UserError(f"a batch of mels has the shape [B, frames, {self.mel_bins}], got {list(given.shape)}")
        return given

    # ---------------------------------------------------------------------------------------------------- checks

    def _check(
        self, prompts: list[str], spoken: list[Any], seconds: float | None, sampling: Sampling, seeds: list[Any], waveforms: int
    ) -> None:
        if not prompts:
            raise UserError("no prompt was given; give at least one")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UserError(f"a prompt is text, got {prompt!r}")
        if self.info.speech and not all(isinstance(t, str) and t.strip() for t in spoken):
            raise UserError(f"{self.info.variant} is a speech model: give the text to speak as a transcription")
        if not self.info.speech and any(t is not None for t in spoken):
            raise UserError(f"{self.info.variant} makes sounds, not speech: leave the transcription out or load a speech bundle")
        shortest = self.compression * self.hop_length / self.sample_rate
        if seconds is not None and not (math.isfinite(seconds) and seconds >= shortest):
            raise UserError(f"seconds is {seconds}; expected at least {shortest:g}")
        if sampling.num_inference_steps > self.max_steps:
            raise UserError(f"num_inference_steps is {sampling.num_inference_steps}; expected an integer from 1 to {self.max_steps}")
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
                raise UserError(f"seed is {seed!r}; expected an integer from 0 to 2^63 - 1")
        if waveforms < 1:
            raise UserError(f"num_waveforms_per_prompt is {waveforms}; expected at least 1")


def _per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """`value` for each of `count` prompts: a single one is shared."""
    if value is None or isinstance(value, (str, int, np.integer)):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise UserError(f"{name} has {len(values)} entries for {count} prompts; give one for all or one for each")
    return values


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """Independent generators of one prompt's waveforms; the first one's seed is `seed` itself.

    They live on the CPU, so that a seed means the same on every device.
    """
    later = [int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0] >> 1) for i in range(1, count)]
    return [torch.Generator().manual_seed(int(s)) for s in (seed, *later)]


def _stack(first: Conditioning, second: Conditioning) -> Conditioning:
    """Both, one after the other along the batch; the shorter text is padded and masked."""
    loa = torch.cat([first.loa, second.loa])
    if first.text is None or first.text_mask is None or second.text is None or second.text_mask is None:
        return Conditioning(loa, None, None)
    longest = max(first.text.shape[1], second.text.shape[1])
    text = torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in (first.text, second.text)])
    mask = torch.cat([F.pad(m, (0, longest - m.shape[1])) for m in (first.text_mask, second.text_mask)])
    return Conditioning(loa, text, mask)
