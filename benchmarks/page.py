"""A page of results: tables that a benchmark writes anew, amid words that stay."""

from pathlib import Path

from parallel.files import write_atomically
from relora.errors import ConfigError

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def write_tables(path: Path, *, title: str, tables: str) -> None:
    """Put tables between the marks of a Markdown file; begin the file where there is none.

    Raises: ConfigError when the file has no such marks.
    """
    old = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n\n{BEGIN}\n{END}\n"
    before, begins, rest = old.partition(BEGIN)
    _, ends, after = rest.partition(END)
    if not begins or not ends:
        raise ConfigError(
            f"--page {path} has no lines {BEGIN} and {END} for tables to stand between: add them, or name a new file"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}")
