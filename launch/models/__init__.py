"""Models on disk: read from Hugging Face folders and checkpoints, and written as such."""
