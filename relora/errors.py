"""The one error that means the user must change something.

A message names the key, the value, the rule and the way out; the commands print it without a traceback.
"""


class ConfigError(ValueError):
    """A setting or an input that cannot work."""
