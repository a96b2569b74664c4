"""Joins the parts: the commands, the loop, and what watches it. The only package that imports all others."""
