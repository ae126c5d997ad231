"""The front ends against the reference's numbers, and what happens to recordings that cannot be used.

Run alone: python -m pytest tests/test_audio.py -q
"""

import io

import numpy as np
import pytest
import soundfile
import torch

from stages.audio import (
    AUDIO_48K,
    AudioConfig,
    clip_mel,
    decode_flac,
    encode_flac,
    fbank,
    load_audio,
    log_mel,
    normalise,
    pad_or_cut,
    probe,
    resample,
    rolled,
    slaney_filterbank,
    write_wav,
)
from stages.errors import AudioError

TINY = AudioConfig(clip_seconds=2.56)


def tone(sample_rate: int, hz: float = 440.0, seconds: float = 10.24) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * sample_rate)) / sample_rate)).astype(np.float32)


@pytest.fixture(scope="module")
def front_ends(shared):
    return np.load(shared / "golden" / "front_ends.npz")


def assert_log_mels_agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    """FFTs of two processors differ by 1e-8 in magnitude, of which the logarithm makes 1e-3 near the floor (log 1e-5 = -11.5).

    Measured between an Intel and an AMD machine: 9.6e-5 above -9, 9.7e-4 below.
    """
    loud = theirs > -9
    np.testing.assert_allclose(ours[loud], theirs[loud], rtol=0, atol=2e-4)
    np.testing.assert_allclose(ours[~loud], theirs[~loud], rtol=0, atol=2e-3)


@pytest.mark.parametrize("clip", range(3))
def test_front_ends_match_the_reference(front_ends, clip):
    waveform = torch.from_numpy(front_ends[f"clip{clip}.waveform_16k"])[None]
    mel = log_mel(waveform, AudioConfig())[0].numpy()
    assert_log_mels_agree(mel, front_ends[f"clip{clip}.log_mel"])
    np.testing.assert_allclose(fbank(waveform, AudioConfig())[0].numpy(), front_ends[f"clip{clip}.fbank"], atol=1e-3)


@pytest.mark.parametrize("clip", range(3))
def test_loading_matches_the_reference(front_ends, clip):
    file = io.BytesIO()
    soundfile.write(file, front_ends[f"clip{clip}.source"], int(front_ends[f"clip{clip}.source_rate"]), format="WAV", subtype="FLOAT")
    ours = pad_or_cut(normalise(load_audio(file.getvalue(), 16_000, seconds=10.24)), AudioConfig().clip_samples)
    assert np.corrcoef(ours, front_ends[f"clip{clip}.waveform_16k"])[0, 1] > 0.9999


@pytest.mark.parametrize("clip", range(3))
def test_the_torch_resampler_is_the_references(front_ends, clip):
    source = torch.from_numpy(front_ends[f"clip{clip}.source"])
    moved = resample(source, int(front_ends[f"clip{clip}.source_rate"]), 16_000).numpy()
    one_step = 2.0**-15  # of 16 bits; float32 filters differ by a tenth of it
    np.testing.assert_allclose(pad_or_cut(normalise(moved), 163_840), front_ends[f"clip{clip}.waveform_16k"], atol=one_step)


def test_tone_has_the_stated_log_mel():
    mel = log_mel(torch.from_numpy(tone(16_000))[None], AudioConfig())[0]
    assert mel.shape == (1024, 64)
    assert [mel.mean(), mel.std(), mel.max()] == pytest.approx([-9.93702, 2.84995, 1.29073], abs=1e-4)
    assert mel[500, 8:13].tolist() == pytest.approx([1.0858, 0.9799, -3.5020, -5.6045, -6.7154], abs=1e-3)

    mel = log_mel(torch.from_numpy(tone(48_000))[None], AUDIO_48K)[0]
    assert mel.shape == (1024, 256)
    assert [mel.mean(), mel.std(), mel.max()] == pytest.approx([-9.81041, 2.95325, 2.65892], abs=1e-4)
    assert mel[500].argmax() == 26
    assert (AUDIO_48K.clip_samples, AUDIO_48K.mel_frames) == (491_520, 1024)


def test_slaney_filters_have_the_stated_sums():
    filters = slaney_filterbank(16_000, 1024, 64, 0.0, 8000.0)
    assert (filters.sum(), filters.max()) == pytest.approx((4.09588, 0.0213312), abs=1e-5)
    filters = slaney_filterbank(48_000, 2048, 256, AUDIO_48K.fmin, AUDIO_48K.fmax)
    assert (filters.sum(), filters.max()) == pytest.approx((10.91698, 0.0624223), abs=2e-5)  # stated to 5e-6, summed in float32


def test_tone_has_the_stated_fbank():
    features = fbank(torch.from_numpy(tone(16_000))[None], AudioConfig())[0]
    assert features.shape == (1024, 128)
    assert (features.mean(), features.std()) == pytest.approx((-0.988816, 0.533573), abs=1e-4)
    raw = features[:1022] * 2 * 4.5689974 - 4.2677393
    assert (raw.mean(), raw.std(), raw.max()) == pytest.approx((-13.32956, 4.84488, 3.90881), abs=1e-3)
    assert raw[500].argmax() == 23
    assert features[1022:].unique().tolist() == pytest.approx([0.467032], abs=1e-5)  # padded before normalising


def test_silence_is_the_floor():
    silence = torch.zeros(1, TINY.clip_samples)
    assert log_mel(silence, TINY).unique().tolist() == pytest.approx([-11.512925])
    assert fbank(silence, TINY)[0, 0].unique().tolist() == pytest.approx([-1.277594], abs=1e-5)
    assert not normalise(np.zeros(100, np.float32)).any()


def test_fbank_hears_the_same_at_any_rate():
    at_48 = fbank(torch.from_numpy(tone(48_000))[None], AUDIO_48K)
    assert (at_48 - fbank(torch.from_numpy(tone(16_000))[None], AudioConfig())).abs().max() < 0.01


@pytest.mark.parametrize("extra", [0, 1, 159, 1600])
def test_frames_are_samples_over_hop(extra):
    samples = TINY.clip_samples + extra
    assert log_mel(torch.randn(2, samples), TINY).shape == (2, samples // 160, 64)
    assert fbank(torch.randn(2, samples), TINY).shape == (2, 256, 128)


def test_a_clip_does_not_depend_on_its_batch():
    batch = torch.randn(3, TINY.clip_samples, generator=torch.Generator().manual_seed(0))
    assert_log_mels_agree(log_mel(batch, TINY).numpy(), torch.cat([log_mel(clip[None], TINY) for clip in batch]).numpy())
    alone = torch.cat([fbank(clip[None], TINY) for clip in batch])
    torch.testing.assert_close(fbank(batch, TINY), alone, atol=1e-3, rtol=0)  # a logarithm with a floor, too


def test_log_mel_is_differentiable_after_inference_and_exact_under_autocast():
    odd = AudioConfig(clip_seconds=0.64, mel_bins=40)  # settings no other test has cached
    waveform = 0.1 * torch.randn(1, odd.clip_samples, generator=torch.Generator().manual_seed(0))
    waveform[:, :5000] = 0.0
    with torch.inference_mode():
        expected = log_mel(waveform, odd).clone()
    waveform.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mel = log_mel(waveform, odd)
    assert torch.equal(mel, expected)
    mel.sum().backward()
    assert waveform.grad.isfinite().all() and waveform.grad.any()


def test_normalise_and_pad():
    waveform = normalise(tone(16_000) * 0.01 + 0.3)
    assert np.abs(waveform).max() == pytest.approx(0.5, abs=1e-5)
    assert waveform.mean() == pytest.approx(0.0, abs=1e-5)
    assert pad_or_cut(np.ones(3, np.float32), 5).tolist() == [1, 1, 1, 0, 0]
    assert pad_or_cut(np.ones(3, np.float32), 2).tolist() == [1, 1]


def test_config_survives_a_round_trip_and_refuses_strangers():
    assert AudioConfig.from_dict(AUDIO_48K.to_dict()) == AUDIO_48K
    assert (TINY.clip_samples, TINY.mel_frames, TINY.fbank_frames) == (40_960, 256, 256)
    assert (AUDIO_48K.mel_frames, AUDIO_48K.fbank_frames) == (1024, 1024)
    with pytest.raises(ValueError, match="hop"):
        AudioConfig.from_dict({"hop": 160})


def test_flac_round_trip_is_exact_after_the_first():
    waveform = np.random.default_rng(0).uniform(-1, 1, 16_000).astype(np.float32)
    data = encode_flac(waveform, 16_000)
    assert data == encode_flac(waveform, 16_000)
    once = decode_flac(data)
    assert once.dtype == np.float32
    assert np.abs(once - waveform).max() <= 2.0**-15
    np.testing.assert_array_equal(decode_flac(encode_flac(once, 16_000)), once)


def test_segments_and_channels(tmp_path):
    rate = 22_050
    stereo = np.stack([tone(rate, 300.0, 3.0), tone(rate, 900.0, 3.0)], axis=1)
    path = tmp_path / "two tones.flac"
    soundfile.write(path, stereo, rate)
    header = probe(path)
    assert (header.seconds, header.sample_rate, header.channels) == (3.0, rate, 2)

    def pitch(waveform: np.ndarray) -> float:
        return np.abs(np.fft.rfft(waveform)).argmax() * 16_000 / len(waveform)

    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        segment = load_audio(source, 16_000, start=1.0, seconds=0.5)
        assert (segment.dtype, segment.shape) == (np.float32, (8000,))
        assert pitch(segment) == pytest.approx(300.0, abs=2.0)
    assert pitch(load_audio(path, 16_000, channel=1)) == pytest.approx(900.0, abs=1.0)
    assert len(load_audio(path, 16_000, start=2.5, seconds=9.0)) == pytest.approx(8000, abs=2)
    unchanged = load_audio(path, rate, start=1.0, seconds=0.5)
    np.testing.assert_allclose(unchanged, stereo[rate : rate + rate // 2, 0], atol=1e-4)


def test_wav_is_sixteen_bits_and_clips(tmp_path):
    write_wav(tmp_path / "loud.wav", np.array([0.0, 2.0, -2.0, 0.5], np.float32), 16_000)
    samples, rate = soundfile.read(tmp_path / "loud.wav", dtype="int16")
    assert rate == 16_000
    assert samples.tolist() == [0, 32767, -32768, 16384]


def broken_recordings(folder):
    write_wav(folder / "empty.wav", np.zeros(0, np.float32), 16_000)
    (folder / "text.mp3").write_text("no sound here")
    (folder / "nothing.ogg").write_bytes(b"")
    (folder / "headerless.raw").write_bytes(b"\0" * 400)
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "nan.wav", np.full(100, np.nan), 16_000, subtype="FLOAT")
    return ["empty.wav", "text.mp3", "nothing.ogg", "headerless.raw", "folder.wav", "nan.wav", "missing.wav"]


def test_unusable_recordings_are_named_in_the_error(tmp_path):
    for name in broken_recordings(tmp_path):
        with pytest.raises(AudioError, match=name):
            load_audio(tmp_path / name, 16_000)
    with pytest.raises(AudioError, match="13 bytes in memory"):
        probe(b"no sound here")


def test_questions_a_recording_cannot_answer(tmp_path):
    path = tmp_path / "short.wav"
    write_wav(path, tone(16_000, seconds=1.0), 16_000)
    with pytest.raises(AudioError, match="lasts 1.00 s"):
        load_audio(path, 16_000, start=1.0)
    with pytest.raises(AudioError, match="lasts 1.00 s"):
        load_audio(path, 16_000, start=-1.0)
    with pytest.raises(AudioError, match="channel 1 does not exist"):
        load_audio(path, 16_000, channel=1)
    with pytest.raises(AudioError, match="more than 432 samples"):
        log_mel(torch.zeros(1, 432), AudioConfig())
    with pytest.raises(AudioError, match="at least 400 samples"):
        fbank(torch.zeros(1, 399), AudioConfig())


def test_a_truncated_recording_gives_what_it_has_or_an_audio_error(tmp_path):
    soundfile.write(tmp_path / "whole.ogg", np.random.default_rng(0).normal(0, 0.1, 32_000), 16_000)
    data = (tmp_path / "whole.ogg").read_bytes()
    for share in (0.3, 0.6, 0.9):
        try:
            assert len(load_audio(data[: int(share * len(data))], 16_000)) > 0
        except AudioError as error:
            assert "in memory" in str(error)


def test_a_rolled_mel_is_that_of_the_rolled_sound_but_for_the_seams():
    waveform = torch.randn(2, TINY.clip_samples, generator=torch.Generator().manual_seed(0))
    shifts = torch.tensor([5, 130])
    assert torch.equal(rolled(waveform, shifts), torch.stack([w.roll(int(s)) for w, s in zip(waveform, shifts, strict=True)]))
    of_sound = log_mel(rolled(waveform, shifts * TINY.hop_length), TINY)
    of_mel = rolled(log_mel(waveform, TINY), shifts)
    edge = TINY.n_fft // TINY.hop_length  # frames whose window reaches over an end
    for one, other, shift in zip(of_sound, of_mel, shifts.tolist(), strict=True):
        near = {(seam + i) % TINY.mel_frames for seam in (0, shift) for i in range(-edge, edge + 1)}
        inner = [frame for frame in range(TINY.mel_frames) if frame not in near]
        torch.testing.assert_close(one[inner], other[inner], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("audio", [TINY, AudioConfig(), AUDIO_48K], ids=["tiny", "16 kHz", "48 kHz"])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.59, 0.98, 0.997, 1.0, 1.2])
def test_frames_of_padding_alone_need_no_spectrum(audio, share):
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, max(100, int(share * audio.clip_samples))).astype(np.float32)
    whole = log_mel(torch.from_numpy(pad_or_cut(waveform, audio.clip_samples))[None], audio)[0]
    given = clip_mel(waveform, audio)
    assert given.shape == (audio.mel_frames, audio.mel_bins) and given.dtype == torch.float32
    torch.testing.assert_close(given, whole, atol=2e-5, rtol=1e-5)
