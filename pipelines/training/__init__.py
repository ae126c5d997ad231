"""Training a stage: the order of clips, the loop, and its checkpoints. Imports nothing: Ray's controller loads it before every stage."""
