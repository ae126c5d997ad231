"""The vocoder: log-mel spectrogram → waveform, and the critics it is trained against."""
