"""The precision of encoders: settled when a series begins, in its recipe, the same for whoever continues it."""

import numpy as np
import pytest
import torch
from test_audiomae import GOLDEN, golden  # noqa: F401
from test_failures import here  # noqa: F401
from test_preprocess import VARIANT, clip, encoders, make_store, run_here, tars, tone  # noqa: F401

from pipelines.features import precision, run
from pipelines.features.precision import Device
from pipelines.features.run import choose_precision, execute
from pipelines.preprocess import PASSES, build_pass
from stages.audiomae.model import AudioMAE, load_weights
from stages.errors import UserError

CPU = Device("cpu", "AVX512", True)
T4 = Device("cuda", "Tesla T4", False)
H100 = Device("cuda", "NVIDIA H100", True)

# bf16 has 8 bits of mantissa: features of unit size differ by some 2^-8 after AudioMAE's blocks. Measured: 0.019 at most.
BF16_TOLERANCE = 0.05
FP16_TOLERANCE = 0.01


def loa(store, encoders, device, given=None, shards=None, monkeypatch=None):  # noqa: F811
    work = build_pass("loa", VARIANT, encoders)
    monkeypatch.setattr(run, "_workers_device", lambda *_: device)
    choose_precision(work, store, given)
    return execute(work, store, progress=False, shards=shards), work


def test_a_series_keeps_the_precision_it_began_with(here, tmp_path, encoders, monkeypatch):  # noqa: F811
    """A worker with another device, and one that was killed and repeated, make the same numbers."""
    rows = [clip(tone(tmp_path / "sounds", i)) for i in range(8)]
    mixed, whole, full = (make_store(tmp_path / name, rows) for name in ("mixed", "whole", "full"))
    for store in (mixed, whole, full):
        run_here("mel", store)
    loa(mixed, encoders, H100, shards=[0], monkeypatch=monkeypatch)
    recipe = mixed.recipes()["loa-1"]
    assert recipe["precision"] == "bf16" and recipe["provenance"]["device"] == "cuda (NVIDIA H100)"
    _, work = loa(mixed, encoders, CPU, monkeypatch=monkeypatch)
    assert work.precision == "bf16" and mixed.recipes()["loa-1"] == recipe
    loa(whole, encoders, CPU, "bf16", monkeypatch=monkeypatch)
    _, work = loa(full, encoders, CPU, monkeypatch=monkeypatch)
    assert work.precision == "fp32"
    mixed_files, whole_files = ({k: v for k, v in tars(s).items() if not k.endswith("series.json")} for s in (mixed, whole))
    assert mixed_files == whole_files  # series.json says on which device it began
    half, single = mixed.reader(["loa-1"]), full.reader(["loa-1"])
    differences = [np.abs(half.read(i)["loa"].astype(float) - single.read(i)["loa"]).max() for i in single.clip_ids]
    assert 1e-4 < max(differences) < BF16_TOLERANCE, max(differences)


def test_another_precision_is_refused_with_the_difference(here, tmp_path, encoders, monkeypatch):  # noqa: F811
    store = make_store(tmp_path / "store", [clip(tone(tmp_path / "sounds", 0))])
    run_here("mel", store)
    loa(store, encoders, CPU, monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="precision: was fp32, now bf16"):
        loa(store, encoders, H100, "bf16", monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    "device, expected",
    [
        (CPU, {"loa": "fp32", "latent": "fp32", "text": "fp32", "speech": "fp32"}),
        (H100, {"loa": "bf16", "latent": "bf16", "text": "bf16", "speech": "bf16"}),
        (T4, {"loa": "fp16", "latent": "fp32", "text": "fp32", "speech": "fp32"}),  # T5 overflows in fp16
    ],
)
def test_new_series_take_what_the_device_computes_itself(device, expected, encoders):  # noqa: F811
    passes = {name: build_pass(name, VARIANT, encoders) for name in PASSES if name != "mel"}
    assert {name: precision.choose(device, work.fp16) for name, work in passes.items()} == expected


def test_bf16_is_never_emulated(monkeypatch):
    monkeypatch.setattr(Device, "here", classmethod(lambda cls: T4))
    with pytest.raises(UserError, match="made in bf16, which Tesla T4 only emulates"):
        precision.require("bf16", torch.device("cuda"), "loa")
    precision.require("bf16", torch.device("cpu"), "loa")


def test_fp16_holds_the_golden_features(golden):  # noqa: F811
    """The fp16 that GPUs without bf16 get for AudioMAE, here by a CPU; it was never run on such a GPU."""
    values, weights = golden
    model = AudioMAE(GOLDEN).eval()
    load_weights(model, weights, "golden")
    with torch.inference_mode(), precision.autocast("fp16", torch.device("cpu")):
        features = model.features(values["fbank"][None])
    assert (features.float() - values["feature"]).abs().max() < FP16_TOLERANCE
