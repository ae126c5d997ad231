"""The jobs on Ray: a file here is a command or common ground, a folder is one subject."""
