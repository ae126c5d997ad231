"""Answers requests with an exported bundle, over HTTP or on the command line."""
