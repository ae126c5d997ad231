"""The networks of AudioLDM 2 and how each is trained: plain PyTorch, no Ray, no MLflow, no web server."""

# In training order; every name is a folder here, `<name>/training.py` holds the class.
STAGES: dict[str, str] = {
    "clap": "ClapStage",
    "audiomae": "AudioMAEStage",
    "vae": "VAEStage",
    "vocoder": "VocoderStage",
    "translator": "TranslatorStage",
    "diffusion": "DiffusionStage",
    "joint": "JointStage",
    "classifier": "ClassifierStage",
}
