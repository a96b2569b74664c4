"""Studies of quality, speed and memory that anyone can run again: `python -m benchmarks.NAME [--quick]`."""
