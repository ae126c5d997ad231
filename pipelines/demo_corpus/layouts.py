"""The demo's recordings and texts in the published layouts of the corpora."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from pipelines.demo_corpus.sounds import Traits, Waveform
from pipelines.demo_corpus.speech import VOICES, sentences, spoken
from pipelines.demo_corpus.words import TEMPLATES, TEST_TEMPLATES, WORDS, caption
from stages.files import write_json

MARGIN = 0.15  # seconds by which speech stays shorter than a clip


@dataclass(frozen=True)
class Clip:
    """One sound to be made."""

    corpus: str
    label: str
    number: int
    split: str

    @property
    def name(self) -> str:
        return hashlib.sha256(f"{self.corpus} {self.label} {self.number}".encode()).hexdigest()[:11]

    def rng(self, seed: int) -> np.random.Generator:
        """Randomness of this clip alone, so that clips can be made in any order."""
        digest = hashlib.sha256(f"{seed} {self.corpus} {self.label} {self.number}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def sound_path(out: Path, clip: Clip) -> Path:
    if clip.corpus == "wavcaps":
        return out / "wavcaps" / "audio" / "FreeSound" / f"{clip.name}.flac"
    if clip.corpus == "msd":
        return out / "msd" / "audio" / _preview(clip)
    return out / clip.corpus / "audio" / f"{clip.name}.flac"


Made = list[tuple[Clip, Traits]]


def _words_rng(clip: Clip, seed: int) -> np.random.Generator:
    return clip.rng(seed + 1_000_003)


def _captions(clip: Clip, traits: Traits, seed: int, count: int = 1) -> list[str]:
    rng = _words_rng(clip, seed)
    templates = TEST_TEMPLATES if clip.split == "test" else TEMPLATES
    return list(dict.fromkeys(caption(rng, clip.label, traits, templates) for _ in range(count)))


def write_wavcaps(root: Path, made: Made, seed: int, seconds: float) -> None:
    """With the optional key "split", which the reader understands: the layout itself has none."""
    data = [
        {
            "id": clip.name,
            "file_name": f"{clip.name}.wav",
            "href": "",
            "duration": seconds,
            "author": "loa",
            "tags": [clip.label],
            "description": "",
            "category": [],
            "audio": "wav_path",
            "download_link": "",
            "caption": _captions(clip, traits, seed)[0],
            "split": clip.split,
            "licence": "CC0",
        }
        for clip, traits in made
    ]
    folder = root / "json_files" / "FreeSound"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "fsd_final.json", {"num_captions_per_audio": 1, "data": data})


def write_audioset(root: Path, made: Made, seed: int, seconds: float) -> None:
    classes = ["index,mid,display_name", *(f'{i},{words.mid},"{label}"' for i, (label, words) in enumerate(WORDS.items()))]
    (root / "class_labels_indices.csv").write_text("\n".join(classes) + "\n", encoding="utf-8")
    for name, split in (("balanced_train_segments.csv", "train"), ("eval_segments.csv", "test")):
        rows = [f'{clip.name}, 0.000, {seconds:.3f}, "{WORDS[clip.label].mid}"' for clip, _ in made if clip.split == split]
        header = ["# Segments csv of the demo corpus", f"# num_ytids={len(rows)}", "# YTID, start_seconds, end_seconds, positive_labels"]
        (root / name).write_text("\n".join(header + rows) + "\n", encoding="utf-8")


def write_audiocaps(root: Path, made: Made, seed: int, seconds: float) -> None:
    number = 0
    for name, split in (("train.csv", "train"), ("val.csv", "validation"), ("test.csv", "test")):
        rows = ["audiocap_id,youtube_id,start_time,caption"]
        for clip, traits in made:
            if clip.split == split:
                for text in _captions(clip, traits, seed, count=1 if split == "train" else 5):
                    number += 1
                    rows.append(f'{number},{clip.name},0,"{text}"')
        (root / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


def _preview(clip: Clip) -> str:
    """The path of a track's preview below audio/, by its 7digital number."""
    number = _preview_id(clip)
    return f"{number[0]}/{number[1]}/{number}.clip.mp3"


def _preview_id(clip: Clip) -> str:
    return str(1_000_000 + int(clip.name, 16) % 9_000_000)


def write_msd(root: Path, made: Made, seed: int, seconds: float) -> None:
    tracks = {f"TR{clip.name.upper()}": (clip, traits) for clip, traits in made}
    annotation = {
        track: {
            "tag": _tags(clip, traits),
            "release": "Demo",
            "artist_name": "loa",
            "year": 2025,
            "title": f"{clip.label} {clip.number + 1}",
            "track_id": track,
        }
        for track, (clip, traits) in tracks.items()
    }
    lists = {"train_track": "train", "valid_track": "validation", "test_track": "test"}
    (root / "ecals_annotation").mkdir(parents=True, exist_ok=True)
    (root / "lastfm_annotation").mkdir(parents=True, exist_ok=True)
    write_json(root / "ecals_annotation" / "annotation.json", annotation)
    write_json(root / "ecals_annotation" / "ecals_tags.json", sorted({tag for clip, traits in made for tag in _tags(clip, traits)}))
    split = {key: [track for track, (clip, _) in tracks.items() if clip.split == name] for key, name in lists.items()}
    write_json(root / "ecals_annotation" / "ecals_track_split.json", {**split, "extra_track": []})
    ids = {track: _preview_id(clip) for track, (clip, _) in tracks.items()}
    for name, table in (("MSD_id_to_7D_id", ids), ("7D_id_to_path", {_preview_id(c): _preview(c) for c, _ in tracks.values()})):
        (root / "lastfm_annotation" / f"{name}.pkl").write_bytes(pickle.dumps(table, protocol=4))


def _tags(clip: Clip, traits: Traits) -> list[str]:
    """The label first, then what is remarkable."""
    words = WORDS[clip.label]
    tags = [clip.label, words.does.split()[-1]]
    tags += [words.high[0] if traits.pitch > 0 else words.low[0]] if abs(traits.pitch) > 0.4 else []
    return tags + (["fast" if traits.tempo > 0 else "slow"] if abs(traits.tempo) > 0.4 else [])


def write_speech(out: Path, seed: int, utterances: int, seconds: float) -> dict[str, int]:
    """Both speech layouts; how many recordings each has."""
    rng = np.random.default_rng([seed, 1])
    return {
        "ljspeech": _write_ljspeech(out / "ljspeech", rng, utterances, seconds),
        "gigaspeech": _write_gigaspeech(out / "gigaspeech", rng, utterances, seconds),
    }


def _write_ljspeech(root: Path, rng: np.random.Generator, count: int, seconds: float) -> int:
    (root / "wavs").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, text in enumerate(sentences(rng, count), 1):
        name = f"LJ{number // 100 + 1:03d}-{number % 100:04d}"
        waveform, rate = spoken(text, "en-us+f3", int(rng.integers(155, 175)), int(rng.integers(45, 56)), seconds - MARGIN)
        soundfile.write(root / "wavs" / f"{name}.wav", waveform, rate, subtype="PCM_16")
        lines.append(f"{name}|{text}|{text}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def _write_gigaspeech(root: Path, rng: np.random.Generator, count: int, seconds: float) -> int:
    """One long recording per voice, its sentences parted by pauses; a segment of silence ends it."""
    folder = Path("audio") / "podcast" / "P0001"
    (root / folder).mkdir(parents=True, exist_ok=True)
    audios = []
    for speaker, texts in enumerate(np.array_split(sentences(rng, count), len(VOICES))):
        aid = f"POD{speaker + 1:010d}"
        pieces: list[Waveform] = []
        segments, position = [], 0.0
        for number, text in enumerate([*texts.tolist(), ""]):
            if text:
                waveform, rate = spoken(text, VOICES[speaker], int(rng.integers(150, 185)), int(rng.integers(35, 66)), seconds - MARGIN)
            else:
                waveform = np.zeros(rate, np.float32)
            pause = np.zeros(int(rng.uniform(0.3, 0.7) * rate), np.float32)
            begin = position + len(pause) / rate
            position = begin + len(waveform) / rate
            pieces += [pause, waveform]
            segments.append(
                {
                    "sid": f"{aid}_S{number:07d}",
                    "speaker": "N/A",
                    "begin_time": round(begin, 3),
                    "end_time": round(position, 3),
                    "text_tn": f"{text[:-1].upper()} <PERIOD>" if text else "<SIL>",
                    "subsets": ["{XL}"],
                }
            )
        path = folder / f"{aid}.flac"
        soundfile.write(root / path, np.concatenate(pieces), rate)
        audios.append(
            {
                "title": f"Voice {speaker + 1}",
                "url": "",
                "path": path.as_posix(),
                "aid": aid,
                "source": "Podcast",
                "codec": "flac",
                "channels": 1,
                "sample_rate": rate,
                "duration": round(position, 3),
                "subsets": ["{XL}"],
                "segments": segments,
            }
        )
    write_json(root / "GigaSpeech.json", {"dataset": "GigaSpeech", "language": "EN", "version": "v1.0.0", "audios": audios})
    return len(audios)
