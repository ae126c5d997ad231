"""The judges: front ends and networks against plain NumPy, published key layouts, the common interface, what is refused."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipelines.judges import main as judges_command
from stages.audio import slaney_filterbank
from stages.checkpoints import read_checkpoint
from stages.errors import UserError
from stages.judges import panns, passt, vggish
from stages.judges.catalogue import AUDIOLDM_EVAL, JUDGES, JudgeOutput, Listening, load_judge, random_judge
from stages.judges.network import Network
from stages.judges.panns import CNN14_16K, CNN14_32K, Cnn14, fourier_kernels
from stages.judges.passt import PaSST, PaSSTConfig
from stages.judges.vggish import VGGish, VGGishConfig
from stages.judges.weights import PUBLISHED, describe_folder, read_manifest, read_weights
from stages.judges.winograd import WinogradConv2d

TINY_CNN14 = replace(CNN14_16K, widths=(4, 5, 6, 7, 8, 9), classes=11)


def noise(samples: int, clips: int = 1, seed: int = 0) -> torch.Tensor:
    """Noise that swells, `[clips, samples]`: no frame is like another."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((clips, samples)) * np.linspace(0.01, 0.3, samples)).astype(np.float32))


def with_statistics(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values also where a new network holds zeros and ones, so that nothing can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if "running_var" in name or (value.ndim == 1 and name.endswith("weight")):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            elif value.ndim == 1:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return network.eval()


def outputs_of(network: torch.nn.Module, names: list[str], waveform: torch.Tensor) -> tuple[dict[str, tuple], tuple]:
    """(input, output) of the named modules in one pass, the clips of several calls put together, and the pass's result."""
    calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda module, given, got, name=name: calls[name].append((given[0], got)))
        for name in names
    ]
    with torch.no_grad():
        result = network(waveform)
    for hook in hooks:
        hook.remove()
    return {name: tuple(torch.cat(parts).double().numpy() for parts in zip(*calls[name], strict=True)) for name in names}, result


# ----------------------------------------------------------------------------------------------- NumPy's versions


def values(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in network.state_dict().items()}


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, stride: int = 1, padding: int = 1) -> np.ndarray:
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    result = np.einsum("bcftij,dcij->bdft", windows, weight, optimize=True)
    return result if bias is None else result + bias[None, :, None, None]


def pooled(x: np.ndarray, how: str) -> np.ndarray:
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    return getattr(x[:, :, : 2 * rows, : 2 * columns].reshape(*x.shape[:2], rows, 2, columns, 2), how)(axis=(3, 5))


def layer_norm(x: np.ndarray, w: dict[str, np.ndarray], name: str, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w[name + ".weight"] + w[name + ".bias"]


def framed(x: np.ndarray, size: int, hop: int) -> np.ndarray:
    return np.stack([x[start : start + size] for start in range(0, len(x) - size + 1, hop)])


def hann(size: int, periodic: bool) -> np.ndarray:
    return np.sin(np.pi * np.arange(size) / (size if periodic else size - 1)) ** 2


def triangle(position: float, left: float, centre: float, right: float) -> float:
    if left < position <= centre:
        return (position - left) / (centre - left)
    return (right - position) / (right - centre) if centre < position < right else 0.0


# ---------------------------------------------------------------------------------------------------- front ends


def test_vggish_hears_what_its_reference_hears() -> None:
    wave = noise(20_000)[0].double().numpy()
    spectrum = np.abs(np.fft.rfft(framed(wave, 400, 160) * hann(400, True), 512))
    low, high = (1127 * np.log(1 + hz / 700) for hz in (125, 7500))
    step = (high - low) / 65
    filters = np.zeros((257, 64))
    for k in range(1, 257):
        mel = 1127 * np.log(1 + k * 16_000 / 512 / 700)
        filters[k] = [triangle(mel, low + b * step, low + (b + 1) * step, low + (b + 2) * step) for b in range(64)]
    expected = np.log(spectrum @ filters + 0.01)
    assert expected.shape == (123, 64)
    # in float32 against NumPy's float64: an FFT's rounding, 1e-7 of the loudest bin, depends on the processor
    np.testing.assert_allclose(vggish.log_mel(torch.from_numpy(wave).float()).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("config", [CNN14_16K, CNN14_32K])
def test_cnn14_hears_what_its_reference_hears(config) -> None:
    wave = noise(config.sample_rate // 2)[0].double().numpy()
    centred = np.pad(wave, config.n_fft // 2, mode="reflect")
    power = np.abs(np.fft.rfft(framed(centred, config.n_fft, config.hop_length) * hann(config.n_fft, True))) ** 2

    def to_hz(mel: float) -> float:
        return 200 / 3 * mel if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    mels = [hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4) for hz in (config.fmin, config.fmax)]
    edges = [to_hz(mel) for mel in np.linspace(*mels, 66)]
    filters = np.zeros((config.n_fft // 2 + 1, 64))
    for k in range(len(filters)):
        hz = k * config.sample_rate / config.n_fft
        filters[k] = [triangle(hz, *edges[b : b + 3]) * 2 / (edges[b + 2] - edges[b]) for b in range(64)]
    expected = 10 * np.log10(np.maximum(power @ filters, 1e-10))
    assert expected.shape == (51, 64)
    np.testing.assert_allclose(panns.log_mel(torch.from_numpy(wave).float()[None], config)[0].numpy(), expected, atol=1e-3)  # dB


def test_passt_hears_what_its_reference_hears() -> None:
    wave = noise(16_000)[0].double().numpy()
    emphasised = np.pad(wave[1:] - 0.97 * wave[:-1], 512, mode="reflect")
    window = np.pad(hann(800, False), 112)
    power = np.abs(np.fft.rfft(framed(emphasised, 1024, 320) * window)) ** 2
    step = 1127 * np.log(1 + 15_000 / 700) / 129
    filters = np.zeros((513, 128))
    for k in range(512):
        mel = 1127 * np.log(1 + k * 32_000 / 1024 / 700)
        filters[k] = [triangle(mel, b * step, (b + 1) * step, (b + 2) * step) for b in range(128)]
    expected = (np.log(power @ filters + 1e-5) + 4.5) / 5
    assert expected.shape == (50, 128)
    np.testing.assert_allclose(passt.log_mel(torch.from_numpy(wave).float()[None])[0].numpy(), expected, atol=1e-4)


def test_ten_seconds_have_the_stated_frames() -> None:
    at_16k, at_32k = noise(160_000), noise(320_000)
    assert vggish.log_mel(at_16k).shape == (1, 998, 64)
    assert panns.log_mel(at_16k, CNN14_16K).shape == panns.log_mel(at_32k, CNN14_32K).shape == (1, 1001, 64)
    assert passt.log_mel(at_32k).shape == (1, 1000, 128)
    for windowing, windows in (("audioldm_eval", 10), ("google", 19)):
        network = VGGish(VGGishConfig(windowing, widths=(1, 1, 1, 1), hidden=2))
        assert network.examples(at_16k).shape == (1, windows, 96, 64)
        assert network.examples(noise(163_840)).shape == (1, windows, 96, 64)


def test_google_scales_by_the_largest_sample_and_cuts_samples() -> None:
    network = VGGish(VGGishConfig("google", widths=(1, 1, 1, 1), hidden=2))
    wave = noise(40_000)
    examples = network.examples(wave)[0]
    scaled = wave / wave.max()
    for index in range(4):
        torch.testing.assert_close(examples[index], vggish.log_mel(scaled[0, 8000 * index : 8000 * index + 16_000])[:96])
    torch.testing.assert_close(network.examples(0.5 * wave)[0], examples)  # so its FAD does not hear a gain,
    for clip in (0.05 * scaled, -wave.abs()):  # quiet clips are raised by 20 dB at most, and troughs do not count
        torch.testing.assert_close(network.examples(clip)[0, 0], vggish.log_mel(10 * clip[0, :16_000])[:96])


# ------------------------------------------------------------------------------------------------------ networks


def test_vggish_layer_by_layer() -> None:
    network = with_statistics(VGGish(VGGishConfig(widths=(3, 4, 5, 6), hidden=7, embedding_width=8)))
    convolutions, layers = (0, 3, 6, 8, 11, 13), (0, 2, 4)
    names = [f"features.{i}" for i in range(len(network.features))] + [f"embeddings.{i}" for i in range(5)]
    seen, (embedding, logits) = outputs_of(network, names, noise(16_000 * 2, 2))
    w = values(network)
    for i, layer in enumerate(network.features):
        given, got = seen[f"features.{i}"]
        if i in convolutions:
            expected = convolved(given, w[f"features.{i}.weight"], w[f"features.{i}.bias"])
        else:
            expected = pooled(given, "max") if isinstance(layer, torch.nn.MaxPool2d) else np.maximum(given, 0)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    image = seen["features.15"][1]
    assert image.shape == (4, 6, 6, 4)  # 2 clips of 2 examples
    flat = np.stack([[image[n, c, t, f] for t in range(6) for f in range(4) for c in range(6)] for n in range(4)])
    for i in layers:
        flat = flat @ w[f"embeddings.{i}.weight"].T + w[f"embeddings.{i}.bias"]
        flat = np.maximum(flat, 0) if i < 4 else flat
    assert logits is None and (flat < 0).any()  # the last layer has no activation
    np.testing.assert_allclose(embedding.numpy(), flat.reshape(2, 2, 8), atol=1e-5)


@pytest.mark.parametrize("config", [TINY_CNN14, replace(CNN14_32K, widths=TINY_CNN14.widths, classes=11)])
@pytest.mark.parametrize("fused", [False, True])
def test_cnn14_layer_by_layer(config, fused, monkeypatch) -> None:
    monkeypatch.setattr(panns, "WINOGRAD_WIDTH", 7)  # blocks 4 to 6 of these small ones
    network = with_statistics(Cnn14(config))
    w = values(network)

    def normalised(x: np.ndarray, name: str) -> np.ndarray:
        mean, variance, scale, shift = (
            w[f"{name}.{key}"][None, :, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift

    if fused:
        network.fuse()
    wave = noise(config.sample_rate, 2)
    seen, (embedding, logits) = outputs_of(network, [f"conv_block{k}" for k in range(1, 7)], wave)
    mel = panns.log_mel(wave, config).double().numpy()
    # tens of dB are centred in float32: 1e-5 is what that leaves, more or less of it by the order of operations
    np.testing.assert_allclose(
        seen["conv_block1"][0], normalised(mel.transpose(0, 2, 1)[..., None], "bn0").transpose(0, 3, 2, 1), atol=1e-4
    )
    for k in range(1, 7):
        x, got = seen[f"conv_block{k}"]
        for j in (1, 2):
            x = np.maximum(normalised(convolved(x, w[f"conv_block{k}.conv{j}.weight"]), f"conv_block{k}.bn{j}"), 0)
        np.testing.assert_allclose(got, pooled(x, "mean") if k < 6 else x, atol=1e-5 * max(1, np.abs(x).max()))
    x = seen["conv_block6"][1].mean(3)
    x = np.maximum((x.max(2) + x.mean(2)) @ w["fc1.weight"].T + w["fc1.bias"], 0)
    np.testing.assert_allclose(embedding.numpy(), x, atol=1e-5)
    np.testing.assert_allclose(logits.numpy(), x @ w["fc_audioset.weight"].T + w["fc_audioset.bias"], atol=1e-5)


@pytest.mark.parametrize("size", [(31, 2), (62, 4), (125, 8), (1, 1), (7, 5)])
def test_winograd_is_the_convolution(size) -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 5, 3, padding=1)
    x = torch.randn(3, 6, *size)
    expected = convolved(x.double().numpy(), conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy())
    for layout in (torch.contiguous_format, torch.channels_last):  # both are float32 sums of 54 products
        np.testing.assert_allclose(WinogradConv2d(conv)(x.to(memory_format=layout)).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("samples", [320_000, 100_000])
def test_passt_layer_by_layer(samples) -> None:
    from scipy.special import erf

    config = PaSSTConfig(width=12, depth=2, heads=3, classes=11)
    network = with_statistics(PaSST(config))
    w = values(network)
    wave = noise(samples, 2)
    names = ["patch_embed", *(f"blocks.{i}{part}" for i in range(2) for part in ("", ".norm1", ".attn", ".norm2", ".mlp"))]
    seen, (embedding, logits) = outputs_of(network, names, wave)
    mel = passt.log_mel(wave).double().numpy().transpose(0, 2, 1)[:, None]
    patches = convolved(mel, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=10, padding=0)
    columns = 99 if samples == 320_000 else 30
    assert patches.shape == (2, 12, 12, columns)
    np.testing.assert_allclose(seen["patch_embed"][1], patches, atol=1e-5)

    tokens = [w["cls_token"][0, 0] + w["new_pos_embed"][0, 0], w["dist_token"][0, 0] + w["new_pos_embed"][0, 1]]
    tokens = [np.tile(token, (2, 1)) for token in tokens]
    for row in range(12):  # frequency-major
        for column in range(columns):
            place = w["freq_new_pos_embed"][0, :, row, 0] + w["time_new_pos_embed"][0, :, 0, column]
            tokens.append(patches[:, :, row, column] + place)
    np.testing.assert_allclose(seen["blocks.0"][0], np.stack(tokens, 1), atol=1e-5)

    for i in range(2):
        x, got = seen[f"blocks.{i}"]
        block = f"blocks.{i}."
        h = layer_norm(x, w, block + "norm1", 1e-6)
        np.testing.assert_allclose(seen[block + "norm1"][1], h, atol=1e-5)
        qkv = h @ w[block + "attn.qkv.weight"].T + w[block + "attn.qkv.bias"]
        heads = []
        for head in range(3):
            q, k, v = (qkv[..., part * 12 + head * 4 : part * 12 + head * 4 + 4] for part in range(3))
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(4)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(shares / shares.sum(-1, keepdims=True) @ v)
        mixed = np.concatenate(heads, -1) @ w[block + "attn.proj.weight"].T + w[block + "attn.proj.bias"]
        np.testing.assert_allclose(seen[block + "attn"][1], mixed, atol=1e-5)
        x = x + mixed
        h = layer_norm(x, w, block + "norm2", 1e-6) @ w[block + "mlp.fc1.weight"].T + w[block + "mlp.fc1.bias"]
        h = h * (1 + erf(h / np.sqrt(2))) / 2
        x = x + h @ w[block + "mlp.fc2.weight"].T + w[block + "mlp.fc2.bias"]
        np.testing.assert_allclose(got, x, atol=1e-5)
    feature = layer_norm(x[:, :2], w, "norm", 1e-6).mean(1)
    np.testing.assert_allclose(embedding.numpy(), feature, atol=1e-5)
    expected = layer_norm(feature, w, "head.0", 1e-5) @ w["head.1.weight"].T + w["head.1.bias"]
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "million"),
    [("vggish", 72_141_184, 72.14), ("cnn14-16k", 80_753_615, 80.75), ("cnn14-32k", 80_753_615, 80.75), ("passt-s", 86_153_758, 86.15)],
)
def test_published_sizes(name, parameters, million) -> None:
    with torch.device("meta"):
        network = JUDGES[name].published()
    count = sum(value.numel() for value in network.parameters())
    assert count == parameters and round(count / 1e6, 2) == million  # references.md#judges
    widths = {"vggish": 128, "passt-s": 768}
    assert network.embedding_width == widths.get(name, 2048)


# --------------------------------------------------------------------------------------------- published layouts


def published_shapes(name: str, network: Network) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published files, as VGGish, CNN14 and PaSST name them, sized like `network`."""
    layer: dict[str, tuple[int, ...]] = {}  # layers with a weight and a bias
    shapes: dict[str, tuple[int, ...]] = {}
    config = network.config
    if name == "vggish":
        a, b, c, d = config.widths
        for i, made, given in ((0, a, 1), (3, b, a), (6, c, b), (8, c, c), (11, d, c), (13, d, d)):
            layer[f"features.{i}"] = (made, given, 3, 3)
        for i, made, given in ((0, config.hidden, 24 * d), (2, config.hidden, config.hidden), (4, 128, config.hidden)):
            layer[f"embeddings.{i}"] = (made, given)
    elif name == "passt-s":
        d = config.width
        shapes |= {"cls_token": (1, 1, d), "dist_token": (1, 1, d), "new_pos_embed": (1, 2, d)}
        shapes |= {"freq_new_pos_embed": (1, d, 12, 1), "time_new_pos_embed": (1, d, 1, 99)}
        layer["patch_embed.proj"] = (d, 1, 16, 16)
        for i in range(config.depth):
            layer |= {f"blocks.{i}.norm1": (d,), f"blocks.{i}.norm2": (d,), f"blocks.{i}.attn.qkv": (3 * d, d)}
            layer |= {f"blocks.{i}.attn.proj": (d, d), f"blocks.{i}.mlp.fc1": (4 * d, d), f"blocks.{i}.mlp.fc2": (d, 4 * d)}
        layer |= {"norm": (d,), "head.0": (d,), "head.1": (527, d), "head_dist": (527, d)}
    else:
        normalisations, given = {"bn0": 64}, 1
        for k, made in enumerate(config.widths, 1):
            shapes |= {f"conv_block{k}.conv1.weight": (made, given, 3, 3), f"conv_block{k}.conv2.weight": (made, made, 3, 3)}
            normalisations |= {f"conv_block{k}.bn1": made, f"conv_block{k}.bn2": made}
            given = made
        for key, width in normalisations.items():
            layer[key] = (width,)
            shapes |= {f"{key}.running_mean": (width,), f"{key}.running_var": (width,), f"{key}.num_batches_tracked": ()}
        layer |= {"fc1": (given, given), "fc_audioset": (527, given)}
        bins = config.n_fft // 2 + 1
        shapes |= dict(zip(panns.FRONT_END, ((bins, 1, config.n_fft), (bins, 1, config.n_fft), (bins, 64)), strict=True))
    for key, shape in layer.items():
        shapes |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
    return shapes


def published_state(name: str, network: Network) -> dict[str, torch.Tensor]:
    """Random weights in a published layout; a CNN14 file stores its front end, too."""
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.tensor(5) if shape == () else torch.rand(shape, generator=generator) * 0.2 + ("running_var" in key)
        for key, shape in published_shapes(name, network).items()
    }
    if name.startswith("cnn14"):
        config = network.config
        filters = slaney_filterbank(config.sample_rate, config.n_fft, 64, config.fmin, config.fmax).T
        for key, value in zip(panns.FRONT_END, (*fourier_kernels(config.n_fft), filters), strict=True):
            state[key] = torch.from_numpy(value.astype(np.float32))
    return state


@pytest.mark.parametrize("name", list(JUDGES))
def test_published_names_and_shapes_at_full_size(name) -> None:
    with torch.device("meta"):
        network = JUDGES[name].published()
    shapes = published_shapes(JUDGES[name].weights, network)
    front_end = {key: np.prod(shapes.pop(key)) for key in panns.FRONT_END if key in shapes}
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes
    if front_end:
        assert round(sum(front_end.values()) / 1e6, 2) == {"cnn14-16k": 0.28, "cnn14-32k": 1.08}[name]  # references.md#cnn14


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder for weights, where loading builds the small networks: files in the published layouts stay small."""
    for name, design in list(JUDGES.items()):
        monkeypatch.setitem(JUDGES, name, design._replace(published=design.tiny))
    return tmp_path


def publish(name: str, folder: Path, **more: object) -> dict[str, torch.Tensor]:
    """Write the published file of `name`, sized like the tiny network; its weights."""
    state = published_state(name, JUDGES[name].tiny())
    torch.save({"model": state, **more} if name.startswith("cnn14") else state, folder / PUBLISHED[name].file)
    return state


@pytest.mark.parametrize("name", list(JUDGES))
def test_published_layouts_load(name, small) -> None:
    weights = JUDGES[name].weights
    # PANNs keep the state of their sampler, which is NumPy's
    state = publish(weights, small, iteration=600_000, sampler={"indexes": np.arange(9), "pointer": np.int64(3), "scale": np.float32(0.5)})
    describe_folder(small)
    judge = load_judge(name, small)
    plain = JUDGES[name].tiny().eval()
    plain.load_state_dict({key: value for key, value in state.items() if key not in panns.FRONT_END})
    clips = noise(judge.sample_rate * 10, 2)
    with torch.no_grad():
        embedding, logits = plain(clips)
    heard = judge.embed(clips, judge.sample_rate)
    torch.testing.assert_close(heard.embedding, embedding, atol=1e-5, rtol=1e-5)
    assert (heard.logits is None) == (logits is None)
    if logits is not None:
        torch.testing.assert_close(heard.logits, logits, atol=1e-5, rtol=1e-5)
    record = judge.protocol()
    assert record["weights_sha256"] == judge.weights_hash == read_manifest(small)[weights]["sha256"]
    assert record["file"] == PUBLISHED[weights].file and record["licence"] == PUBLISHED[weights].licence and record["source"]
    json.dumps(record)


def test_safetensors_load_under_any_name(small) -> None:
    from safetensors.torch import save_file

    state = publish("vggish", small)
    save_file(state, small / "converted.safetensors")
    (small / PUBLISHED["vggish"].file).unlink()
    with pytest.raises(UserError, match=r"converted.safetensors is not a known file.*by hand"):
        describe_folder(small)
    entry = {"file": "converted.safetensors", "sha256": "", "licence": "Apache-2.0", "source": "converted by me"}
    (small / "judges.json").write_text(json.dumps({"format": 1, "weights": {"vggish": entry}}))
    described = describe_folder(small)["vggish"]
    assert described == {**entry, "sha256": described["sha256"]} and len(described["sha256"]) == 64
    assert load_judge("vggish", small).protocol()["source"] == "converted by me"


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_code_in_a_checkpoint_does_not_run(small) -> None:
    marker = small / "was-here"
    for path, write in ((small / "a.pth", torch.save), (small / "b.pth", lambda value, path: path.write_bytes(pickle.dumps(value)))):
        write({"model": published_state("vggish", JUDGES["vggish"].tiny()), "extra": Malicious(marker)}, path)
        with pytest.raises(UserError, match="not a file of plain weights, so it was not loaded"):
            read_checkpoint(path)
        assert not marker.exists()
    pickle.loads((small / "b.pth").read_bytes())
    assert marker.exists()  # so it would have


def test_misfitting_weights_are_named(small) -> None:
    state = published_state("vggish", JUDGES["vggish"].tiny())
    state["features.0.wieght"] = state.pop("features.0.weight")
    state["embeddings.4.bias"] = torch.zeros(64)
    torch.save(state, small / PUBLISHED["vggish"].file)
    describe_folder(small)
    with pytest.raises(UserError) as error:
        load_judge("vggish", small)
    for part in (
        "1 missing (features.0.weight)",
        "features.0.wieght, nearest features.0.weight",
        "embeddings.4.bias, [64] instead of [128]",
    ):
        assert part in str(error.value)


def test_a_front_end_of_another_rate_is_refused(small) -> None:
    state = published_state("cnn14-32k", JUDGES["cnn14-32k"].tiny())
    torch.save({"model": state}, small / PUBLISHED["cnn14-16k"].file)
    describe_folder(small)
    with pytest.raises(UserError, match=r"another front end than CNN14 at 16000 Hz.*is \[513, 1, 1024\] instead of \[257, 1, 512\]"):
        load_judge("cnn14-16k", small)
    state = published_state("cnn14-16k", JUDGES["cnn14-16k"].tiny())
    state[panns.FRONT_END[2]] = torch.from_numpy(slaney_filterbank(16_000, 512, 64, 0, 8000).T.astype(np.float32))
    torch.save({"model": state}, small / PUBLISHED["cnn14-16k"].file)
    describe_folder(small)
    with pytest.raises(UserError, match="logmel_extractor.melW differs by"):
        load_judge("cnn14-16k", small)


def test_what_is_wrong_with_a_folder_is_said(small) -> None:
    with pytest.raises(UserError, match="no judges.json.*loa judges"):
        load_judge("passt-s", small)
    with pytest.raises(UserError, match="no judge 'pasts'; nearest: passt-s"):
        load_judge("pasts", small)
    publish("vggish", small)
    describe_folder(small)
    path = small / PUBLISHED["vggish"].file
    with pytest.raises(UserError, match=r"no weights for 'passt-s' \(it lists vggish\); put passt-s-f128"):
        load_judge("passt-s", small)
    (small / PUBLISHED["passt-s"].file).write_bytes(b"later")
    with pytest.raises(UserError, match=r"not in the manifest: passt-s-f128-p16-s10-ap.476-swa.pt"):
        load_judge("passt-s", small)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="its sha256 is .*, expected .*; fetch it again"):
        load_judge("vggish", small)
    path.rename(small / "vggish-10086977.pth")
    with pytest.raises(UserError, match=r"names vggish-10086976.pth for 'vggish', which does not exist; nearest: vggish-10086977.pth"):
        load_judge("vggish", small)
    with pytest.raises(UserError, match=r"vggish-10086977.pth is not a known file; nearest: vggish-10086976.pth"):
        describe_folder(small)
    for path in small.glob("*.p*"):
        path.unlink()
    (small / PUBLISHED["vggish"].file).write_bytes(b"not a checkpoint")
    describe_folder(small)
    with pytest.raises(UserError, match="not a file of plain weights"):
        load_judge("vggish", small)
    torch.save({"epoch": 3}, small / PUBLISHED["vggish"].file)
    describe_folder(small)
    with pytest.raises(UserError, match="holds no weights.*keys such as epoch"):
        load_judge("vggish", small)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "not JSON"),
        ('{"format": 9, "weights": {}}', "no manifest of this version"),
        ('{"format": 1, "weights": {"vgish": {}}}', "names weights for 'vgish', which no judge uses; nearest: vggish"),
        ('{"format": 1, "weights": {"vggish": {"file": "x.pth"}}}', "exactly the texts file, licence, sha256, source"),
        (
            '{"format": 1, "weights": {"vggish": {"file": "../x.pth", "sha256": "", "licence": "", "source": ""}}}',
            "expected a file of that folder, without a path",
        ),
    ],
)
def test_bad_manifests(tmp_path, manifest, message) -> None:
    (tmp_path / "judges.json").write_text(manifest)
    with pytest.raises(UserError, match=message):
        read_weights("vggish", tmp_path)


def test_the_command_describes_a_folder(small) -> None:
    publish("vggish", small)
    publish("cnn14-16k", small)
    result = CliRunner().invoke(judges_command, [str(small)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    digest = read_manifest(small)["vggish"]["sha256"]
    assert lines[0] == f"vggish       vggish-10086976.pth, sha256 {digest[:12]}…, Apache-2.0: vggish, vggish-google"
    assert "Cnn14_16k_mAP=0.438.pth" in lines[1]
    assert lines[2].startswith("cnn14-32k    missing: put Cnn14_mAP=0.431.pth (MIT) from zenodo.org/records/3987831")
    (small / "Cnn14_16k_mAP=0.438.pth").write_bytes(b"")
    result = CliRunner().invoke(judges_command, [str(small)])
    assert result.exit_code == 1 and "not a file of plain weights" in result.output


# ----------------------------------------------------------------------------------------------------- interface


@pytest.mark.parametrize("name", list(JUDGES))
def test_a_clip_does_not_depend_on_its_neighbours(name) -> None:
    judge = random_judge(name, listening=Listening(clip_seconds=None), batch=3)
    rate = judge.sample_rate
    clips = [noise(round(seconds * rate), seed=seed)[0] for seed, seconds in enumerate((2.0, 3.3, 2.0, 2.5, 2.0, 2.0, 3.3))]
    together = judge.embed(clips, rate)
    for index, clip in enumerate(clips):
        alone = judge.embed(clip[None], rate)
        heard = together.embedding[index]
        heard = heard if together.windows is None else heard[: together.windows[index]]
        torch.testing.assert_close(heard, alone.embedding[0], atol=1e-5, rtol=1e-5)
        if alone.logits is not None:
            torch.testing.assert_close(together.logits[index], alone.logits[0], atol=1e-5, rtol=1e-5)
    spread = together.embedding.std(0).mean()
    assert spread > 1e-3  # and the clips do differ
    if name.startswith("vggish"):
        expected = [2, 3, 2, 2, 2, 2, 3] if name == "vggish" else [3, 5, 3, 4, 3, 3, 5]
        assert together.windows.tolist() == expected and together.rows().shape == (sum(expected), 128)
        assert not together.embedding[0, expected[0] :].any()
        torch.testing.assert_close(together.rows()[: expected[0]], together.embedding[0, : expected[0]])
    else:
        assert together.windows is None and torch.equal(together.rows(), together.embedding)


def test_rows_leave_the_padding_out() -> None:
    embedding = torch.arange(12.0).view(2, 3, 2)
    assert JudgeOutput(embedding, None, torch.tensor([1, 3])).rows().tolist() == [[0, 1], [6, 7], [8, 9], [10, 11]]


@pytest.mark.parametrize("name", list(JUDGES))
def test_judges_keep_their_promises(name) -> None:
    judge = random_judge(name)
    clips = noise(12 * judge.sample_rate, 2).double()  # longer than 10 s, in float64
    heard = judge.embed(clips.numpy(), judge.sample_rate)
    windows = {"vggish": (10,), "vggish-google": (19,)}.get(name, ())
    assert heard.embedding.shape == (2, *windows, judge.embedding_width) and heard.embedding.dtype == torch.float32
    assert heard.logits is None if not judge.has_logits else heard.logits.shape == (2, 527)
    torch.testing.assert_close(judge.embed(clips[:, : 10 * judge.sample_rate], judge.sample_rate).embedding, heard.embedding)
    short = clips[:, : 5 * judge.sample_rate]
    padded = torch.nn.functional.pad(short, (0, 5 * judge.sample_rate))
    torch.testing.assert_close(judge.embed(short, judge.sample_rate).embedding, judge.embed(padded, judge.sample_rate).embedding)
    again, other = random_judge(name), random_judge(name, seed=1)
    assert judge.weights_hash == again.weights_hash != other.weights_hash
    assert torch.equal(again.embed(clips, judge.sample_rate).embedding, heard.embedding)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a caller's autocast does not reach the judges
        assert torch.equal(judge.embed(clips, judge.sample_rate).embedding, heard.embedding)


def test_listenings_differ_as_they_say() -> None:
    rng = np.random.default_rng(0)
    time = np.arange(44_100) / 44_100
    clip = (0.2 * np.sin(2 * np.pi * 440 * time) + 0.1 + 0.01 * rng.standard_normal(44_100)).astype(np.float32)
    judge = random_judge("cnn14-16k")
    compatible = random_judge("cnn14-16k", listening=AUDIOLDM_EVAL)
    ours = judge._input(clip, 44_100, 0)
    theirs = compatible._input(clip, 44_100, 0)
    assert len(ours) == 160_000 and len(theirs) == 32_000  # 1 s of sound: 10 s, or the shortest that audioldm_eval allows
    assert ours[:16_000].mean() == pytest.approx(0.1, abs=1e-3) and theirs[:16_000].mean() == pytest.approx(0, abs=1e-6)
    assert np.corrcoef(ours[100:15_900], theirs[100:15_900])[0, 1] > 0.999 and not ours[16_100:].any() and not theirs[16_000:].any()
    assert len(compatible._input(np.zeros(50_000, np.float32), 16_000, 0)) == 50_000
    assert judge.protocol()["listening"] != compatible.protocol()["listening"]


@pytest.mark.parametrize(
    ("clips", "rate", "message"),
    [
        ([], 16_000, "no clips"),
        (torch.zeros(1, 2, 160), 16_000, r"clip 0 is \[2, 160\] of float32.*mono"),
        ([np.zeros(100, np.int16)], 16_000, r"clip 0 is \[100\] of int16"),
        ([np.zeros(10, np.float32), np.zeros(0, np.float32)], 16_000, "clip 1 is"),
        ([np.array([0, np.nan], np.float32)], 16_000, "clip 0 contains samples that are not finite"),
        (torch.zeros(1, 160), 0, "sample_rate is 0"),
    ],
)
def test_clips_that_cannot_be_heard(clips, rate, message) -> None:
    with pytest.raises(UserError, match=message):
        random_judge("cnn14-16k").embed(clips, rate)


@pytest.mark.parametrize(
    ("name", "samples", "message"),
    [
        ("vggish", 15_000, "at least 15600 samples at 16000 Hz, got 15000"),
        ("vggish-google", 15_999, "at least 16000 samples at 16000 Hz, got 15999"),
        ("cnn14-16k", 4959, "at least 4960 samples at 16000 Hz, got 4959"),
        ("cnn14-32k", 9919, "at least 9920 samples at 32000 Hz, got 9919"),
        ("passt-s", 4800, "4801 to 321600 samples at 32000 Hz, got 4800"),
        ("passt-s", 321_601, "4801 to 321600 samples at 32000 Hz, got 321601"),
    ],
)
def test_lengths_that_cannot_be_heard(name, samples, message) -> None:
    judge = random_judge(name, listening=Listening(clip_seconds=None))
    with pytest.raises(UserError, match=message + r" \(clip 0\); pad or cut"):
        judge.embed(noise(samples), judge.sample_rate)
    nearest = samples - 1 if samples > 300_000 else {15_000: 15_600}.get(samples, samples + 1)
    assert judge.embed(noise(nearest), judge.sample_rate).embedding.isfinite().all()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="resampler is 'linear'"):
        Listening(resampler="linear")
    with pytest.raises(UserError, match="clip_seconds is -1"):
        Listening(clip_seconds=-1)
    with pytest.raises(UserError, match="windowing is 'tf'"):
        VGGishConfig("tf")
    with pytest.raises(UserError, match="batch is 0"):
        random_judge("vggish", batch=0)
