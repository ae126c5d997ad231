"""A small listener that names the class of a clip; evaluation measures generated sound with it."""
