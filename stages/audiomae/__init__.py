"""AudioMAE, the self-supervised encoder whose pooled features are the language of audio (LOA)."""
