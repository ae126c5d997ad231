"""Translator and T-UNet, finetuned together."""
