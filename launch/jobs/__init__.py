"""Runs as jobs: composed, written as scripts, started, supervised, started again."""
