"""GPT-2: conditions to LOA."""
