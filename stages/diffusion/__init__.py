"""The T-UNet: LOA to latent."""
