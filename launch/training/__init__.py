"""A run at work: its phases and stages, the loop, heads, checkpoints."""
