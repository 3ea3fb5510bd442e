"""--help: what a command does, and config.yaml."""

import sys

from support import config as configs


def answer(arguments: list[str], doc: str) -> None:
    """-h, --help or help among the words: prints the command's docstring, and every default with its comment."""
    if {"-h", "--help", "help"} & set(arguments):
        print(f"{doc.strip()}\n\nKeys, with their defaults; group.key=value on the command line:\n\n"
              + configs.DEFAULTS.read_text(encoding="utf-8"))
        sys.exit(0)
