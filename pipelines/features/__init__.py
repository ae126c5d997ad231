"""Features of clips: the store that holds them, and the passes that compute them."""

DEFAULT_SHARD_SIZE = 256  # clips
