"""CLAP: words and sounds in one space."""
