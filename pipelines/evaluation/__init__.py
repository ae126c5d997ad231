"""Evaluating a system: sets of clips, their embeddings by judges, and scores with the records of how they came about."""
