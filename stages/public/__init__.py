"""Weights that others published, in the layouts they were published in, as the networks of loa."""
