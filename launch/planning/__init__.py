"""What a run would need and move, computed without memory, devices or other processes."""
