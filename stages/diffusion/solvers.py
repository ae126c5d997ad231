"""The reverse process: schedulers by name, over timesteps that reach from noise to sound for any number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from stages.errors import UserError
from stages.sampling import Sampling

# These three ask for σ at their timesteps and so walk any list of them; `trailing` starts at the very last timestep.
LIBRARY = {"dpm-solver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler, "euler": EulerDiscreteScheduler}


class Step(NamedTuple):
    """What a solver gives back."""

    prev_sample: Tensor


class Solver(Protocol):
    """A scheduler of diffusers after `set_timesteps`, as far as sampling uses it."""

    timesteps: Tensor
    init_noise_sigma: Any

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor: ...

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Any: ...


def strides(num_steps: int, rule: str, num_train: int = 1000, offset: int = 1) -> list[int]:
    """Timesteps of DDIM and PNDM, noisiest first (references.md#sampling).

    With c = num_train // num_steps: "diffusers" takes 0, c, … (num_steps - 1) c, "authors" every multiple of c below
    `num_train`, "loa" the whole parts of i · num_train / num_steps; all shifted by `offset`. A timestep past the end,
    at which the authors' code stops with an index error, is left out.
    """
    if rule == "loa":
        steps = [i * num_train // num_steps for i in range(num_steps)]
    else:
        stride = num_train // num_steps
        steps = list(range(0, num_train if rule == "authors" else num_steps * stride, stride))
    return [t + offset for t in reversed(steps) if t + offset < num_train]


def make_solver(schedule: DDIMScheduler, sampling: Sampling, device: torch.device, generators: Sequence[torch.Generator] = ()) -> Solver:
    """The solver that `sampling` names, for the forward process of `schedule`, ready for its first step.

    `generators`, one per row, give the noise of eta > 0.
    """
    config, steps = schedule.config, sampling.num_inference_steps
    if config.clip_sample or config.thresholding:
        raise UserError("this bundle's scheduler clips what it predicts; AudioLDM 2 does not: set clip_sample and thresholding to false")
    if sampling.scheduler in ("ddim", "pndm"):
        walk = strides(steps, sampling.timesteps, config.num_train_timesteps, config.steps_offset)
        if sampling.scheduler == "ddim":
            return DDIM(schedule, walk, device, sampling.eta, generators)
        return PNDM(schedule, walk, device)
    spacing = {} if sampling.timesteps == "diffusers" else {"timestep_spacing": "trailing"}
    solver: Any = LIBRARY[sampling.scheduler].from_config(config, **spacing)
    solver.set_timesteps(steps, device=device)
    if len(solver.timesteps) > steps:  # for 62 of the 999 counts the library's arange rounds to one step more, at timestep -1
        solver.timesteps = solver.timesteps[:steps]
        solver.sigmas = torch.cat([solver.sigmas[:steps], solver.sigmas[-1:]])
        solver.num_inference_steps = steps
    found: Solver = solver
    return found


class DDIM:
    """DDIM over any decreasing timesteps.

    x_s = √ᾱ_s x̂_0 + √(1 - ᾱ_s - σ²) ε̂ + σ N with σ = η √((1 - ᾱ_s) / (1 - ᾱ_t)) √(1 - ᾱ_t / ᾱ_s). The library's class
    takes s = t - 1000 // steps, which is the next timestep only where steps divide 1000 or the noisy end stays unused.
    """

    init_noise_sigma = 1.0

    def __init__(
        self,
        schedule: DDIMScheduler,
        walk: list[int],
        device: torch.device,
        eta: float = 0.0,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self.prediction: str = schedule.config.prediction_type
        self.timesteps = torch.tensor(walk, device=device)
        at = schedule.alphas_cumprod[walk]
        self.signal = torch.cat([at, schedule.final_alpha_cumprod[None]])  # ᾱ at every timestep, and behind the last
        self.eta, self.generators = eta, generators
        self.done = 0  # calls of `step`

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """`sample`: DDIM's latents are the network's."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Step:
        """The latent at the next timestep, from the network's output at this one."""
        here, there = self.signal[self.done], self.signal[self.done + 1]
        self.done += 1
        sigma = self.eta * ((1 - there) / (1 - here)).sqrt() * (1 - here / there).sqrt()
        sound, noise = self.split(model_output, sample, here)
        moved = there.sqrt() * sound + (1 - there - sigma**2).clamp(min=0).sqrt() * noise
        if self.eta:
            moved = moved + sigma * torch.stack([torch.randn(sample.shape[1:], generator=g) for g in self.generators]).to(sample)
        return Step(moved)

    def split(self, model_output: Tensor, sample: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂_0, ε̂) of a network that predicts ε or v = √ᾱ ε - √(1 - ᾱ) x_0."""
        if self.prediction == "v_prediction":
            return signal.sqrt() * sample - (1 - signal).sqrt() * model_output, signal.sqrt() * model_output + (1 - signal).sqrt() * sample
        return (sample - (1 - signal).sqrt() * model_output) / signal.sqrt(), model_output


class PNDM(DDIM):
    """PNDM without Runge-Kutta steps (the authors' "PLMS"): DDIM's move along a linear multistep of the last four outputs.

    The first move is made twice, the second time along the mean of the outputs at its ends: one call of the network more.
    """

    weights = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))  # Adams-Bashforth

    def __init__(self, schedule: DDIMScheduler, walk: list[int], device: torch.device) -> None:
        super().__init__(schedule, walk, device)
        self.timesteps = torch.tensor([*walk[:1], *walk[1:2], *walk[1:]], device=device)
        self.past: list[Tensor] = []  # outputs of the network, latest first
        self.start: Tensor | None = None  # of the move before this call

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Step:
        """The latent at the next timestep, from the network's output at this one."""
        again, move = self.done == 1, max(self.done - 1, 0)
        self.done += 1
        if again and self.start is not None:
            output, sample = (model_output + self.past[0]) / 2, self.start
        else:
            self.start, self.past = sample, [model_output, *self.past[:3]]
            output = sum((w * e for w, e in zip(self.weights[len(self.past) - 1], self.past, strict=True)), torch.zeros(()))
        here, there = self.signal[move], self.signal[move + 1]
        sound, noise = self.split(output, sample, here)
        return Step(there.sqrt() * sound + (1 - there).sqrt() * noise)
