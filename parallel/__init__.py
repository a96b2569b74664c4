"""Processes: the runtime, the engine, and what is kept on disk between runs. Knows no data and no models."""
