"""What is learned, and in which order: sources of text, prepared tokens, and the order of a run."""
