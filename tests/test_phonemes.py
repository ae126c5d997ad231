"""Phonemes agree with the reference to the last id, and espeak-ng behaves in threads and processes."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from stages.errors import UserError
from stages.phonemes import MAX_LENGTH, PAD_ID, STOP_ID, SYMBOL_TO_ID, SYMBOLS, clean, encode, phoneme_ids, phoneme_vocab, pronounce
from stages.public import layout
from stages.translator.model import PhonemeEncoderConfig

espeak = pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed (extra: speech)")


def test_reference_phonemes_and_ids(shared):
    for row in json.loads((shared / "golden" / "phonemes.json").read_text()):
        assert pronounce(row["text"]) == row["phonemes"]
        assert phoneme_ids(row["text"]).tolist() == row["ids"]


def test_phoneme_encoder_matches_the_reference(shared):
    """Weights under the authors' names; states before the position table, which the projection adds."""
    values = np.load(shared / "golden" / "phoneme_encoder.npz")
    theirs = {key.removeprefix("weights/"): torch.from_numpy(values[key]) for key in values.files if key.startswith("weights/")}
    sizes = json.loads(str(values["config"]))
    config = PhonemeEncoderConfig(
        width=sizes["hidden"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        feed_forward=sizes["filter"],
        kernel=sizes["kernel"],
        window=sizes["window"],
    )
    encoder = config.build().text_encoder.eval()
    ours = encoder.state_dict()
    places = layout.origins(ours, layout.phoneme_encoder)
    assert layout.expected(places) == {key: tuple(value.shape) for key, value in theirs.items()}
    encoder.load_state_dict(layout.take(ours, places, theirs))
    ids = torch.from_numpy(values["ids"])
    mask = (ids != PAD_ID).long()
    np.testing.assert_array_equal(mask, values["mask"])
    with torch.no_grad():
        states = encoder(ids, padding_mask=mask[..., None].float(), attention_mask=mask).last_hidden_state
    np.testing.assert_allclose((states * mask[..., None]).numpy(), values["hidden"] * values["mask"][..., None], atol=1e-4)


def test_symbol_table():
    assert (len(SYMBOLS), len(SYMBOL_TO_ID), PAD_ID, STOP_ID) == (183, 182, 0, 182)
    assert (SYMBOL_TO_ID[" "], SYMBOL_TO_ID["A"], SYMBOL_TO_ID["ɑ"], SYMBOL_TO_ID["'"], SYMBOL_TO_ID["♪"]) == (16, 17, 69, 176, 178)


def test_vocabulary_loads_as_vits_tokenizer(tmp_path):
    from transformers import VitsTokenizer

    (tmp_path / "vocab.json").write_text(json.dumps(phoneme_vocab()))
    tokenizer = VitsTokenizer(str(tmp_path / "vocab.json"), pad_token="_", unk_token="_", phonemize=False, normalize=False, add_blank=False)
    phonemes = pronounce("It's a test, isn't it?")
    assert sorted(phoneme_vocab().values()) == list(range(183))
    assert tokenizer(phonemes + "⚠")["input_ids"] == encode(phonemes)[: len(phonemes) + 1].tolist()


def test_cleaner():
    assert clean("<b>Mrs. Müller</b>—naïve “Œuvre”…") == 'misess muller--naive "oeuvre"...'
    assert clean("Sgt. Smith, Ltd. and Fort. Ft. Wayne") == "sergeant smith, limited and fort. fort wayne"
    assert clean("Астрид 東京").strip() == ""


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("42.50", "forty two point five zero"),
        ("$42.50", "dollar forty two point five zero"),
        ("1,234,567", "one million two hundred thirty four thousand five hundred sixty seven"),
        ("It costs 3.5, no: 4.", "it costs three point five, no: four."),
        ("In 1999, 42 came.", "in nineteen hundred ninety nine, forty two came."),
    ],
)
def test_numbers_stay_whole(written, spoken):
    """A point or comma between digits belongs to the number; every other one is punctuation."""
    assert without_stress(pronounce(written)) == without_stress(pronounce(spoken))


def without_stress(phonemes):
    """Stress and word boundaries differ between a number in digits and in words."""
    return phonemes.translate(str.maketrans("", "", "ˈˌ "))


def test_long_text_is_cut_and_loses_its_stop_symbol():
    ids = phoneme_ids("seventy seven " * 60)
    assert ids.shape == (MAX_LENGTH,) and ids.dtype == np.int16
    assert STOP_ID not in ids and PAD_ID not in ids
    assert phoneme_ids("", 5).tolist() == [STOP_ID, 0, 0, 0, 0]
    assert encode("a\u4e00b", 4).tolist() == [SYMBOL_TO_ID["a"], PAD_ID, SYMBOL_TO_ID["b"], STOP_ID]


def test_threads_take_turns():
    texts = [f"Sentence number {i}." for i in range(40)]
    alone = [pronounce(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(pronounce, texts)) == alone


def test_speech():
    from stages.espeak import synthesise

    slow, rate = synthesise("Hello there, how are you?", speed=120)
    fast, _ = synthesise("Hello there, how are you?", voice="en-us+f3", speed=240)
    assert rate == 22050 and slow.dtype == np.float32 and 0.1 < np.abs(slow).max() <= 1
    assert len(fast) < 0.7 * len(slow)
    with pytest.raises(UserError, match="no voice"):
        synthesise("Hello", voice="xx-none")


def test_missing_library_names_the_extra():
    code = (
        "import sys; sys.modules['espeakng_loader'] = None\n"
        "from stages.espeak import phonemize\n"
        "try: phonemize('a')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install -e '.[speech]'" in done.stdout
