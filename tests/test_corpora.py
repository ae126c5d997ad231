"""Readers on the real layouts, and on layouts that are broken in every way we could think of."""

import json
import os
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipelines import corpora
from pipelines.corpora import Recording, Rejected, audiocaps, audioset, folder, gigaspeech, ljspeech, msd, wavcaps
from pipelines.corpora.files import BadLine, csv_lines, hash_split, inside, json_entries, safe_id, tidy, walk_audio
from pipelines.corpora.words import class_name
from stages.errors import UserError


def sound(path: Path, seconds: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.sin(np.arange(round(seconds * 16000)) * 0.1), 16000)
    return path


def split(records):
    records = list(records)
    return [r for r in records if isinstance(r, Recording)], [r for r in records if isinstance(r, Rejected)]


def kinds(rejected):
    return Counter(r.kind for r in rejected)


# ------------------------------------------------------------------------------------------------- the real layouts


@pytest.mark.parametrize(
    ("corpus", "recordings", "rejected", "splits"),
    [
        ("audioset", 240, {}, {"train": 153, "validation": 7, "test": 80}),
        ("audiocaps", 0, {"missing file": 51308}, {}),
        ("wavcaps", 80, {"missing file": 1232}, None),
        ("msd", 18, {}, {"train": 14, "validation": 2, "test": 2}),
        ("ljspeech", 60, {}, None),
        ("gigaspeech", 97, {"no speech": 4}, None),
    ],
)
def test_published_layouts(shared, corpus, recordings, rejected, splits):
    root = shared / "data" / corpus
    good, bad = split(corpora.read(corpus, root))
    assert corpora.known(root) == [corpus]
    assert len(good) == recordings == len({r.recording_id for r in good}) and kinds(bad) == rejected
    assert splits is None or Counter(r.split for r in good) == splits
    assert all(os.path.isabs(r.path) and os.path.isfile(r.path) and r.corpus == corpus and r.licence for r in good)


def test_discover_finds_all_and_what_they_say(shared):
    assert [name for name, _ in corpora.discover(shared / "data")] == ["audiocaps", "audioset", "gigaspeech", "ljspeech", "msd", "wavcaps"]
    by_corpus = {name: split(corpora.read(name, root))[0] for name, root in corpora.discover(shared / "data") if name != "audiocaps"}
    first = {name: next((r for r in records), None) for name, records in by_corpus.items()}
    assert first["audioset"].labels == ("Dog", "Bark") and first["audioset"].precut
    assert first["wavcaps"].captions == ("A dog barks.",) and first["wavcaps"].labels == ("Dog", "Bark")
    assert first["gigaspeech"].transcript == "Four, six four five two five three." and first["gigaspeech"].start == 0.957
    tags = "ragtime, piano, happy, playful, solo piano"
    assert (tags, f"Pistachio Ice Cream Ragtime (1) by Lena Orsa: {tags}") in {r.captions for r in by_corpus["msd"]}
    assert first["ljspeech"].transcript.startswith("Seven one nine")


# ------------------------------------------------------------------------------------------------- broken layouts


def test_audioset_lines_and_names(tmp_path):
    (tmp_path / "class_labels_indices.csv").write_text('index,mid,display_name\n0,/m/1,"Dog"\n1,/m/2,"Bark, loud"\n')
    (tmp_path / "eval_segments.csv").write_text('# YTID, start_seconds, ...\ncccc, 30.000, 40.000, "/m/2,/m/404"\n')
    (tmp_path / "unbalanced_train_segments.csv").write_bytes(
        b'# a comment\naaaa, 0.000, 10.000, "/m/1,/m/2"\n\nbbbb, 5, 15, "/m/1\nbb, 10, 5, "/m/1"\n'
        b'\xff\xfe, 0, 1, "/m/1"\nzz\ngone, 0, 10, "/m/1"\n'
    )
    sound(tmp_path / "audio" / "Yaaaa.wav")
    sound(tmp_path / "audio" / "deep" / "cccc_30000_40000.flac")
    sound(tmp_path / "audio" / "nobody.wav")
    good, bad = split(audioset.read(tmp_path))
    assert [(r.recording_id, r.labels, r.split, r.origin) for r in good] == [
        ("cccc", ("Bark, loud",), "test", "youtube:cccc"),
        ("aaaa", ("Dog", "Bark, loud"), "train", "youtube:aaaa"),
    ]
    assert kinds(bad) == {"malformed line": 4, "missing file": 1, "not listed": 1}
    assert [r.reason.split(":")[1].strip() for r in bad if r.kind == "malformed line"] == ["line 4", "line 5", "line 6", "line 7"]


def test_audioset_holds_out_validation_from_the_balanced_list(tmp_path):
    """The lists have no validation split; which videos it takes depends on their ids alone."""
    videos = [f"video{i:04d}" for i in range(600)]
    (tmp_path / "balanced_train_segments.csv").write_text("".join(f'{v}, 0, 10, "/m/1"\n' for v in videos[:400]))
    (tmp_path / "unbalanced_train_segments.csv").write_text("".join(f'{v}, 0, 10, "/m/1"\n' for v in videos[400:]))
    (tmp_path / "audio").mkdir()
    for video in videos:
        (tmp_path / "audio" / f"{video}.wav").touch()
    splits = {r.recording_id: r.split for r in split(audioset.read(tmp_path))[0]}
    counts = Counter(splits[v] for v in videos[:400])
    assert set(counts) == {"train", "validation"} and 8 <= counts["validation"] <= 34
    assert {splits[v] for v in videos[400:]} == {"train"}
    (tmp_path / "balanced_train_segments.csv").write_text("".join(f'{v}, 0, 10, "/m/1"\n' for v in videos[100:400]))
    fewer = {r.recording_id: r.split for r in split(audioset.read(tmp_path))[0]}
    assert all(splits[v] == name for v, name in fewer.items())


def test_audiocaps_groups_captions(tmp_path):
    (tmp_path / "test.csv").write_text(
        'audiocap_id,youtube_id,start_time,caption\n1,ab-_cd,30,A dog\n2,ab-_cd,30,"A dog, loud"\n3,ab-_cd,40,Rain\n'
        "4,x,nan,No\n5,x,1\n6,y,0,\n"
    )
    sound(tmp_path / "audio" / "ab-_cd_30.wav")
    sound(tmp_path / "audio" / "3.wav")
    good, bad = split(audiocaps.read(tmp_path))
    assert [(r.recording_id, r.captions) for r in good] == [("ab-_cd_30", ("A dog", "A dog, loud")), ("ab-_cd_40", ("Rain",))]
    assert {r.split for r in good} == {"test"}
    assert kinds(bad) == {"malformed line": 3}


def test_wavcaps_blacklists_splits_and_sources(tmp_path):
    entries = [
        {"id": "1", "caption": "One.", "tags": ["a", "b", "a"]},
        {"id": "2", "caption": "Two.", "split": "val", "licence": "CC0"},
        {"id": "3", "caption": "Three."},
        {"caption": "none"},
        {"id": "5", "split": "sometimes"},
        "text",
        {"id": 6, "caption": None},
    ]
    meta = tmp_path / "json_files"
    for source, data in (("FreeSound", entries), ("AudioSet_SL", [{"id": "Yab.wav", "caption": "A."}, {"id": "Ycd.wav", "caption": "C."}])):
        (meta / source).mkdir(parents=True)
        (meta / source / "x.json").write_text(json.dumps({"data": data}, indent=1))
    (meta / "blacklist").mkdir()
    (meta / "blacklist" / "of_a_test.json").write_text(json.dumps({"FreeSound": ["3"], "AudioSet": ["Yab.wav"]}))
    (meta / "blacklist" / "broken.json").write_text("{")
    for name in ("1", "2", "3", "6"):
        sound(tmp_path / "audio" / "FreeSound" / f"{name}.flac")
    for name in ("Yab", "Ycd"):
        sound(tmp_path / "AudioSet_SL_flac" / f"{name}.flac")
    good, bad = split(wavcaps.read(tmp_path))
    found = {r.recording_id: r for r in good}
    assert set(found) == {"FreeSound_1", "FreeSound_2", "FreeSound_6", "AudioSet_SL_Ycd"}
    assert found["FreeSound_1"].labels == ("a", "b") and found["FreeSound_2"].split == "validation"
    assert found["FreeSound_2"].licence == "CC0" and found["FreeSound_6"].captions == () and found["AudioSet_SL_Ycd"].origin == "youtube:cd"
    assert kinds(bad) == {"blacklisted": 2, "malformed line": 3, "malformed blacklist": 1}
    assert len(split(wavcaps.read(tmp_path, keep_blacklisted=True))[0]) == 6


def make_msd(root: Path, to_path: dict, to_preview: bytes | None = None) -> None:
    (root / "ecals_annotation").mkdir(parents=True)
    (root / "lastfm_annotation").mkdir()
    tracks = {f"TR{i}": {"tag": ["rock", "loud"]} for i in range(3)}
    (root / "ecals_annotation" / "annotation.json").write_text(json.dumps(tracks))
    (root / "ecals_annotation" / "ecals_track_split.json").write_text(json.dumps({"train_track": ["TR0"], "test_track": ["TR1"]}))
    (root / "lastfm_annotation" / "MSD_id_to_7D_id.pkl").write_bytes(to_preview or pickle.dumps({f"TR{i}": i for i in range(3)}))
    (root / "lastfm_annotation" / "7D_id_to_path.pkl").write_bytes(pickle.dumps(to_path))


def test_msd_refuses_paths_and_pickles_that_reach_outside(tmp_path):
    make_msd(tmp_path / "a", {"0": "0/0.mp3", "1": "../../../../etc/passwd", "2": "gone.mp3"})
    sound(tmp_path / "a" / "audio" / "0" / "0.mp3")
    good, bad = split(msd.read(tmp_path / "a"))
    assert [(r.recording_id, r.captions, r.labels, r.split) for r in good] == [("TR0", ("rock, loud",), ("rock", "loud"), "train")]
    assert [r.reason for r in bad] == ["missing file: the path leaves the corpus", "missing file"]

    proof = tmp_path / "proof"
    evil = b"cos\nsystem\n(S'touch " + str(proof).encode() + b"'\ntR."
    make_msd(tmp_path / "b", {}, evil)
    good, bad = split(msd.read(tmp_path / "b"))
    assert not good and not proof.exists()
    assert "asks for os.system" in bad[0].reason and kinds(bad)["missing file"] == 3


def test_ljspeech_lines(tmp_path):
    (tmp_path / "metadata.csv").write_text('A-1|He said "no|He said "no\nA-2|text\nA-3\nA-4||\nA-5|x|y|z\nA-6|gone|gone\n')
    for name in ("A-1", "A-2", "A-9"):
        sound(tmp_path / "wavs" / f"{name}.wav")
    good, bad = split(ljspeech.read(tmp_path))
    assert [(r.recording_id, r.transcript) for r in good] == [("A-1", 'He said "no'), ("A-2", "text")]
    assert kinds(bad) == {"malformed line": 3, "missing file": 1, "not listed": 1}


def test_gigaspeech_segments(tmp_path):
    texts = ["HELLO <COMMA> IT'S I <PERIOD> YES <QUESTIONMARK>", "<MUSIC>", "<PERIOD>", "WELL <EXCLAMATIONPOINT>", "FINE"]
    segments = [
        {"sid": f"P1_S{i}", "begin_time": i, "end_time": i + 1, "text_tn": text, "subsets": ["{XL}"]} for i, text in enumerate(texts)
    ]
    segments[3]["subsets"], segments[4] = ["{TEST}"], {"sid": "P1_S4"}
    sound(tmp_path / "audio" / "P1.wav")
    audios = [
        {"aid": "P1", "path": "audio/P1.wav", "subsets": ["{XL}"], "segments": segments},
        {"aid": "P2", "path": "audio/gone.wav", "segments": segments[:1]},
        {"aid": "P3"},
    ]
    (tmp_path / "GigaSpeech.json").write_text(json.dumps({"audios": audios}, indent=1))
    good, bad = split(gigaspeech.read(tmp_path))
    assert [(r.recording_id, r.transcript, r.split, r.start, r.seconds) for r in good] == [
        ("P1_S0", "Hello, it's I. Yes?", "train", 0.0, 1.0),
        ("P1_S3", "Well!", "test", 3.0, 1.0),
    ]
    assert kinds(bad) == {"no speech": 2, "malformed line": 2, "missing file": 1}


def test_gigaspeech_without_official_splits_is_dealt_by_recording(tmp_path):
    """Whoever speaks in a recording is in one split only."""
    audios = []
    for number in range(60):
        sid = f"POD{number:03d}"
        segments = [{"sid": f"{sid}_S{i}", "begin_time": i, "end_time": i + 1, "text_tn": "HELLO", "subsets": ["{XL}"]} for i in range(20)]
        audios.append({"aid": sid, "path": f"audio/{sid}.opus", "subsets": ["{XL}"], "segments": segments})
        (tmp_path / "audio").mkdir(exist_ok=True)
        (tmp_path / "audio" / f"{sid}.opus").touch()
    (tmp_path / "GigaSpeech.json").write_text(json.dumps({"audios": audios}))
    splits: dict[str, set[str]] = {}
    for r in split(gigaspeech.read(tmp_path))[0]:
        splits.setdefault(r.path, set()).add(r.split)
    assert all(len(names) == 1 for names in splits.values()) and set().union(*splits.values()) == {"train", "validation", "test"}


def test_msd_captions_are_tags_titles_and_artists(tmp_path):
    make_msd(tmp_path, {str(i): f"{i}.mp3" for i in range(3)})
    for i in range(3):
        sound(tmp_path / "audio" / f"{i}.mp3")
    annotation = {
        "TR0": {"tag": ["rock", "loud"], "title": "Song", "artist_name": "The Band", "release": "Album"},
        "TR1": {"tag": ["rock"], "title": "Song"},
        "TR2": {"tag": [], "artist_name": "The Band"},
    }
    (tmp_path / "ecals_annotation" / "annotation.json").write_text(json.dumps(annotation))
    assert [r.captions for r in split(msd.read(tmp_path))[0]] == [
        ("rock, loud", "Song by The Band: rock, loud"),
        ("rock", "Song: rock"),
        ("The Band",),
    ]


def test_msd_without_lists_is_dealt_by_artist(tmp_path):
    make_msd(tmp_path, {str(i): f"{i}.mp3" for i in range(3)})
    (tmp_path / "ecals_annotation" / "ecals_track_split.json").unlink()
    for i in range(3):
        sound(tmp_path / "audio" / f"{i}.mp3")
    for artist in (f"artist {i}" for i in range(40)):
        annotation = {f"TR{i}": {"tag": ["rock"], "artist_name": artist} for i in range(3)}
        (tmp_path / "ecals_annotation" / "annotation.json").write_text(json.dumps(annotation))
        assert {r.split for r in split(msd.read(tmp_path))[0]} == {hash_split(artist)}


def test_second_files_of_a_name_are_counted(tmp_path):
    (tmp_path / "metadata.csv").write_text("A-1|text|text\n")
    sound(tmp_path / "wavs" / "A-1.flac")
    sound(tmp_path / "wavs" / "A-1.wav")
    good, bad = split(ljspeech.read(tmp_path))
    assert [Path(r.path).name for r in good] == ["A-1.flac"] and kinds(bad) == {"second file of a name": 1}


# ------------------------------------------------------------------------------------- what all corpora have in common


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("dog", "Dog"),
        (" DOG.", "Dog"),
        ("waves surf", "Waves, surf"),
        ("Crowing_cock a doodle doo", "Crowing, cock-a-doodle-doo"),
        ("Whimper (dog)", "Whimper (dog)"),
        ("Trip-Hop", "trip hop"),
        ("Drum_and-Bass", "Drum and bass"),
        ("R&B", "r&b"),
        ("Müllabfuhr", "müllabfuhr"),
    ],
)
def test_one_spelling_of_every_class(label, name):
    assert class_name(label) == name == class_name(name)


def test_real_corpora_share_their_classes(shared):
    recordings = [r for name, root in corpora.discover(shared / "data") for r in split(corpora.read(name, root))[0]]
    first = {r.labels[0] for r in recordings if r.labels}
    assert len(first) == 16 and {"Dog", "Rain", "ragtime"} < first


def test_links_out_of_a_corpus_are_left_out_and_counted(tmp_path):
    elsewhere, data = tmp_path / "elsewhere", tmp_path / "data"
    for path in (elsewhere / "a.wav", elsewhere / "deep" / "b.wav", data / "own.wav"):
        sound(path)
    (data / "one.wav").symlink_to(elsewhere / "a.wav")
    (data / "all").symlink_to(elsewhere / "deep")
    (data / "inner.wav").symlink_to(data / "own.wav")
    (elsewhere / "deep" / "circle").symlink_to(data)
    assert corpora.discover(data) == [("folder", data)]
    good, bad = split(corpora.read("folder", data))
    assert [Path(r.path).name for r in good] == ["inner.wav", "own.wav"]
    assert sorted(Path(r.path).name for r in bad) == ["all", "one.wav"] and kinds(bad) == {"link out of the corpus": 2}
    assert all("--follow-links" in r.reason and str(elsewhere) in r.reason for r in bad)
    good, bad = split(corpora.read("folder", data, follow_links=True))
    assert sorted(Path(r.path).name for r in good) == ["b.wav", "inner.wav", "one.wav", "own.wav"] and not bad


def test_corpora_made_of_links(tmp_path):
    real, data = tmp_path / "real", tmp_path / "data"
    sound(real / "wavs" / "L-1.wav")
    (real / "metadata.csv").write_text("L-1|Hello.|Hello.\n")
    data.mkdir()
    (data / "lj").symlink_to(real)
    assert corpora.discover(data, follow_links=True) == [("ljspeech", data / "lj")]
    assert corpora.discover(data) == [("folder", data)]
    assert [r.kind for r in corpora.read("folder", data)] == ["link out of the corpus"]
    assert len(split(corpora.read("ljspeech", data / "lj"))[0]) == 1  # a root that is a link is where the user pointed

    own = tmp_path / "own"
    own.mkdir()
    (own / "metadata.csv").write_text("L-1|Hello.|Hello.\n")
    (own / "wavs").symlink_to(real / "wavs")
    assert kinds(split(corpora.read("ljspeech", own))[1]) == {"missing file": 1, "link out of the corpus": 1}
    assert len(split(corpora.read("ljspeech", own, follow_links=True))[0]) == 1


# ------------------------------------------------------------------------------------------------- a person's folder


def test_folder_tables_sidecars_and_nothing(tmp_path):
    for name in ("a.wav", "b.flac", "sub/c d.ogg", "sub/e.wav", "plain.wav", ".hidden.wav"):
        sound(tmp_path / name)
    (tmp_path / "captions.csv").write_text(
        '\ufefffile,caption,label,split\na.wav,"A dog, barking",Dog; Bark,test\na.wav,A second one,,\nb.flac,x,,sometimes\n'
        '"broken,x\nb.flac,one field\n'
        "../out.wav,x,,\nnone.wav,x,,\nreadme.md,x,,\n",
        encoding="utf-8",
    )
    (tmp_path / "readme.md").write_text("no sound")
    (tmp_path / "sub" / "metadata.jsonl").write_text(
        '{"file_name": "c d.ogg", "text": ["One", "Two"], "transcription": "hello"}\n{"file_name":\n[1]\n'
    )
    (tmp_path / "sub" / "e.txt").write_text("From the side\n\nTwice\n")
    good, bad = split(folder.read(tmp_path))
    found = {Path(r.path).name: r for r in good}
    assert set(found) == {"a.wav", "b.flac", "c d.ogg", "e.wav", "plain.wav"}
    assert found["a.wav"].captions == ("A dog, barking", "A second one")
    assert found["a.wav"].labels == ("Dog", "Bark") and found["a.wav"].split == "test"
    assert found["c d.ogg"].captions == ("One", "Two") and found["c d.ogg"].transcript == "hello"
    assert found["e.wav"].captions == ("From the side", "Twice") and found["plain.wav"].captions == ()
    assert all(r.recording_id == safe_id(r.recording_id) for r in good)
    assert kinds(bad) == {"malformed line": 6, "missing file": 1, "unreadable": 1}


def test_discover_mixes_layouts_and_own_sound(tmp_path):
    sound(tmp_path / "mine" / "x.wav")
    sound(tmp_path / "loose.wav")
    sound(tmp_path / "lj" / "wavs" / "L-1.wav")
    (tmp_path / "lj" / "metadata.csv").write_text("L-1|Hello.|Hello.\n")
    assert corpora.discover(tmp_path) == [("ljspeech", tmp_path / "lj"), ("folder", tmp_path)]
    assert sorted(Path(r.path).name for r in corpora.read("folder", tmp_path)) == ["loose.wav", "x.wav"]
    assert corpora.discover(tmp_path / "lj") == [("ljspeech", tmp_path / "lj")]
    (tmp_path / "empty").mkdir()
    assert corpora.discover(tmp_path / "empty") == []
    with pytest.raises(UserError, match="does not exist"):
        corpora.discover(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        corpora.discover(tmp_path / "loose.wav")


def test_names_that_are_not_text(tmp_path):
    sound(tmp_path / "ok.wav").rename(os.path.join(os.fsencode(tmp_path), b"\xff.wav").decode("utf-8", "surrogateescape"))
    (tmp_path / "circle").symlink_to(tmp_path)
    good, bad = split(folder.read(tmp_path))
    assert not good and bad[0].reason.startswith("unreadable: its name is not UTF-8")
    bad[0].path.encode("utf-8")


# ------------------------------------------------------------------------------------------------- the small tools


def test_json_entries_keep_what_comes_before_the_damage(tmp_path, monkeypatch):
    import pipelines.corpora.files as files

    path = tmp_path / "x.json"
    entries = [{"id": i, "text": 'a ] } , " \n é' * i} for i in range(50)]
    path.write_text(json.dumps({"n": 1, "data": entries}, indent=2), encoding="utf-8")
    for chunk in (1, 7, 1 << 20):
        monkeypatch.setattr(files, "_CHUNK", chunk)
        found = list(json_entries(path, "data"))
        assert [value for _, value in found] == entries
        lines = path.read_text().split("\n")
        assert all(lines[line - 1].strip() == "{" for line, _ in found)
    whole = path.read_text()
    path.write_text(whole[: whole.index('"id": 30') + 5])
    *before, last = json_entries(path, "data")
    assert [value for _, value in before] == entries[:30]
    assert isinstance(last, BadLine) and last.number == whole[: whole.index('"id": 30')].count("\n") + 1
    path.write_text("[]")
    assert list(json_entries(path, "data")) == []
    path.write_text('{"other": 1}')
    assert [bad.problem for bad in json_entries(path, "data")] == ['there is no array "data"']


def test_damaged_metadata_never_stops_a_reader(shared, tmp_path):
    """Random bytes changed, cut out or repeated in every metadata file: rows are lost, the reader is not."""
    generator = random.Random(0)
    for corpus, names in {
        "audioset": ["balanced_train_segments.csv", "class_labels_indices.csv"],
        "gigaspeech": ["GigaSpeech.json"],
        "ljspeech": ["metadata.csv"],
        "msd": ["ecals_annotation/annotation.json", "ecals_annotation/ecals_track_split.json", "lastfm_annotation/7D_id_to_path.pkl"],
        "wavcaps": ["json_files/FreeSound/fsd_final.json"],
    }.items():
        for trial in range(12):
            root = tmp_path / corpus / str(trial)
            for name in names:
                data = bytearray((shared / "data" / corpus / name).read_bytes())
                for _ in range(generator.randint(1, 8)):
                    at = generator.randrange(len(data))
                    edit = generator.randrange(3)
                    if edit == 0:
                        data[at] = generator.randrange(256)
                    elif edit == 1:
                        del data[at : at + generator.randint(1, 40)]
                    else:
                        data[at:at] = data[at : at + generator.randint(1, 40)]
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(data)
            found = list(corpora.read(corpus, root))
            assert found, (corpus, trial)  # the sound is not there, so even rows that survive are counted as bad
            assert all(isinstance(row, Recording | Rejected) and repr(row).encode("utf-8") for row in found), (corpus, trial)


def test_csv_lines_number_what_is_bad(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfa,"b, c"\r\n\r\nd,"e\n\xff,g\nh,i')
    found = list(csv_lines(path))
    assert [f for f in found if not isinstance(f, BadLine)] == [(1, ["a", "b, c"]), (5, ["h", "i"])]
    assert [f.number for f in found if isinstance(f, BadLine)] == [3, 4]


def test_ids_splits_and_paths(tmp_path):
    assert safe_id("abc_D-1") == "abc_D-1"
    assert safe_id("a.b") != safe_id("a b") != safe_id("a_b") and set(safe_id("ä/ö.ü")) <= set("0123456789abcdef-_")
    shares = Counter(hash_split(f"clip{i}") for i in range(4000))
    assert 0.03 < shares["test"] / 4000 < 0.07 and 0.03 < shares["validation"] / 4000 < 0.07
    assert inside(tmp_path, "a/../b.wav") == str(tmp_path / "b.wav")
    assert inside(tmp_path, "../b.wav") is None and inside(tmp_path, "/etc/passwd") is None
    assert tidy(" a\n\tb \ud800") == "a b ?" and tidy(None) == "" and tidy(7) == "7"
    assert list(walk_audio(tmp_path / "none")) == []
