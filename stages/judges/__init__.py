"""Networks that listen to sound for the metrics: VGGish, CNN14 and PaSST-S behind one interface (`judge.py`)."""
