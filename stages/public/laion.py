"""LAION CLAP: the original checkpoints as `transformers.ClapModel`, without the package that made them (references.md#clap).

The package itself (extra `clap`) is asked for one thing: `disagreement` runs the same weights through both.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ClapModel, RobertaConfig, RobertaModel

from stages.checkpoints import require_fit
from stages.clap.model import ClapConfig, clap_mel
from stages.errors import UserError
from stages.public.extra import INSTALL, torchvision_fault
from stages.public.layout import UNUSED, clap, computed, expected, origins, take

ROBERTA_HEAD = 64  # channels per head of every RoBERTa; the heads leave no trace in the shapes
# HTSAT's sizes stand in the package under these names (references.md#clap)
_HTSAT_NAMES = {96: "tiny", 128: "base", 256: "large"}


def is_laion(names: Iterable[str]) -> bool:
    """Whether these are the weights of a LAION CLAP."""
    return {"audio_branch", "text_branch"} <= {name.partition(".")[0] for name in names}


def clap_config(state: Mapping[str, Tensor]) -> ClapConfig:
    """The sizes of a LAION CLAP, from its weights.

    Raises UserError for a fusion model, another text tower than RoBERTa, or another audio tower than HTSAT.
    """
    if any(".fusion" in key or ".mel_conv" in key for key in state):
        raise UserError("this is a CLAP with feature fusion; AudioLDM 2 uses one without (music_speech_audioset_epoch_15_esc_89.98.pt)")
    words, patches = (state.get(key) for key in ("text_branch.embeddings.word_embeddings.weight", "audio_branch.patch_embed.proj.weight"))
    if words is None or patches is None:
        raise UserError(
            "this CLAP has other towers than RoBERTa and HTSAT; expected text_branch.embeddings.… and audio_branch.patch_embed.…"
        )
    layers = len({key.split(".")[3] for key in state if key.startswith("text_branch.encoder.layer.")})
    places = sorted(
        {tuple(map(int, key.split(".")[2:5:2])) for key in state if ".blocks." in key and key.startswith("audio_branch.layers.")}
    )
    depths = [sum(1 for level, _ in places if level == i) for i in range(places[-1][0] + 1)]
    tables = [state[f"audio_branch.layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in range(len(depths))]
    return ClapConfig(
        projection_dim=state["text_projection.2.weight"].shape[0],
        text_vocab=words.shape[0],
        text_width=words.shape[1],
        text_layers=layers,
        text_heads=max(1, words.shape[1] // ROBERTA_HEAD),
        audio_width=patches.shape[0],
        audio_depths=tuple(depths),
        audio_heads=tuple(table.shape[1] for table in tables),
        window_size=(math.isqrt(tables[0].shape[0]) + 1) // 2,
        mel_bins=state["audio_branch.bn0.weight"].shape[0],
    )


def clap_of(state: Mapping[str, Tensor], source: Path | str, config: ClapConfig | None = None) -> ClapModel:
    """A ClapModel in evaluation mode with the weights of a LAION CLAP; text LayerNorms have RoBERTa's ε of 1e-5.

    Raises UserError naming what does not fit.
    """
    model = (config or clap_config(state)).build()
    ours = model.state_dict()
    places = origins(ours, clap)
    shapes = expected(places)
    used = {key: value for key, value in state.items() if key in shapes or not UNUSED.search(key)}
    require_fit(shapes, used, source, "LAION CLAP", computed(places))
    model.load_state_dict(take(ours, places, used), assign=True)
    return model.eval()


# ------------------------------------------------------------------------------------------------ the package itself


def package() -> Any:
    """laion-clap's module of networks.

    Imported past the package's front door, which reaches for three tokenizers on the hub.

    Raises UserError when the package, or something it needs, is not installed.
    """
    spec = importlib.util.find_spec("laion_clap")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the package laion-clap is not installed; in an environment of its own: `{INSTALL}`")
    folder = str(spec.submodule_search_locations[0])
    if folder not in sys.path:
        sys.path.append(folder)  # as the package does to itself
    try:
        return importlib.import_module("clap_module.model")
    except (ImportError, RuntimeError, OSError) as error:
        fault = torchvision_fault() or f"laion-clap cannot be imported ({error}); in an environment of its own: `{INSTALL}`"
        raise UserError(fault) from error


def original(state: Mapping[str, Tensor]) -> Any:
    """laion-clap's own CLAP with these weights, in evaluation mode. Raises UserError without the package."""
    module, config = package(), clap_config(state)
    sizes = RobertaConfig(
        vocab_size=config.text_vocab,
        hidden_size=config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.text_heads,
        intermediate_size=4 * config.text_width,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )

    class Roberta:
        """Fresh weights in place of the hub's: the checkpoint brings its own."""

        @staticmethod
        def from_pretrained(_: str) -> RobertaModel:
            return RobertaModel(sizes)

    audio = {
        "model_type": "HTSAT",
        "model_name": _HTSAT_NAMES.get(config.audio_width, "base"),
        "audio_length": 1024,
        "class_num": 527,
        "clip_samples": 480_000,
        "mel_bins": config.mel_bins,
        "sample_rate": 48_000,
        "window_size": 1024,
        "hop_size": 480,
        "fmin": 50,
        "fmax": 14_000,
    }
    text = {"model_type": "roberta", "context_length": 77, "vocab_size": 49_408, "width": 512, "heads": 8, "layers": 12}
    kept, module.RobertaModel = module.RobertaModel, Roberta
    try:
        width = config.audio_width * 2 ** (len(config.audio_depths) - 1)
        model = module.CLAP(width, audio, text)
    finally:
        module.RobertaModel = kept
    strays = [key for key in state if key.endswith(("position_ids", "token_type_ids"))]
    model.load_state_dict({key: value for key, value in state.items() if key not in strays}, strict=False)
    return model.eval()


@torch.no_grad()
def disagreement(state: Mapping[str, Tensor], seconds: float = 10.0) -> dict[str, float]:
    """Greatest distance between the unit embeddings of laion-clap and of the converted model, for text and for audio.

    Same weights, same token ids, same waveforms [2, seconds at 48 kHz]. Raises UserError without the package.
    """
    theirs, ours, config = original(state), clap_of(state, "these weights"), clap_config(state)
    ids = torch.randint(4, config.text_vocab, (2, 16), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[0, 9:] = 0, 1
    mask = (ids != 1).long()
    waveform = 0.3 * torch.randn(2, round(seconds * 48_000), generator=torch.Generator().manual_seed(1))
    waveform[1] = 0.5 * torch.sin(0.05 * torch.arange(waveform.shape[1]))  # noise, and a tone of 382 Hz
    said = theirs.get_text_embedding({"input_ids": ids, "attention_mask": mask})
    heard = F.normalize(theirs.audio_projection(theirs.encode_audio({"waveform": waveform}, "cpu")["embedding"]), dim=-1)
    text = F.normalize(ours.get_text_features(input_ids=ids, attention_mask=mask).pooler_output, dim=-1)
    mel = clap_mel(waveform, config.feature_extractor())
    audio = F.normalize(ours.get_audio_features(input_features=mel).pooler_output, dim=-1)
    return {"text": float((said - text).abs().max()), "audio": float((heard - audio).abs().max())}
