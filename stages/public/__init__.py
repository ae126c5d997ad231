"""Weights that others published, in the layouts they were published in, as the networks of loa."""

# What can be given beside a checkpoint file that lacks it, and where it is found where one has no AudioLDM 2 folder.
PARTS = {
    "tokenizer": "roberta-base's tokenizer files",
    "tokenizer_2": "google/flan-t5-large's tokenizer files",
    "text_encoder_2": "google/flan-t5-large's weights",
    "audiomae": "AudioMAE's pretrained.pth",
}
WEIGHTS = ("raw", "ema")  # which T-UNet of the authors' file: the trained one, as they generate, or its running average
