"""Networks that judge sound for the metrics: VGGish, CNN14 and PaSST-S behind one interface (`catalogue.py`), Whisper for words."""

# Their names, without what it takes to run them: commands offer these as choices. `catalogue.JUDGES` has a network for each.
NAMES = ("vggish", "vggish-google", "cnn14-16k", "cnn14-32k", "passt-s")
