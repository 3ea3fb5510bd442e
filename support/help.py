"""--help: what a command does, and its keys, from its docstring and config.yaml; before torch is imported."""

import re
import sys

from support import config as configs


def answer(arguments: list[str], doc: str, keys: dict) -> None:
    """-h, --help or help among the words: prints what the command does, and its keys with their defaults."""
    if not {"-h", "--help", "help"} & set(arguments):
        return
    groups, kept = [], False
    shown = [f"{key}: {value}" for key, value in keys.items() if key not in configs.read_defaults()]
    for line in configs.DEFAULTS.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"( *)(\w+):", line):
            groups = [*groups[: len(found[1]) // 2], found[2]]
            name = ".".join(groups)
            kept = any(key == name or key.startswith(name + ".") for key in keys)
        elif not line.strip().startswith("#") or not line.startswith(" "):
            kept = False  # a comment of its own; those that go on from the line above stay with it
        shown += [line] * kept
    print(f"{doc.strip()}\n\nKeys, with their defaults; group.key=value on the command line:\n\n" + "\n".join(shown))
    sys.exit(0)
