"""The VAE: log-mel spectrogram ↔ latent, and the patch critic it is trained against."""
