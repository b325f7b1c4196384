"""Wrong command lines of serving and of the jobs that publish models: the same three as in lines.py."""

from tests.commands.trainer_lines import HUGE

SERVING = [
    ("serving look {model}", 2, "No such command"),
    ("serving info {missing}", 2, "no published model"),
    ("serving info {emptydir}", 2, "no published model"),
    ("serving info {brackets}", 2, "[/x]"),
    ("serving info {empty}", 1, ""),
    ("serving info {pipe}", 1, ""),
    ("serving info nosuch://bucket/x", 1, "nosuch"),
    ("serving info {model} --version 0", 2, "--version"),
    ("serving info {model} --version 9", 2, "has no version 9; it has version 1"),
    (f"serving info {{model}} --version {HUGE}", 2, HUGE),
    ("serving info {model} --json {emptydir}", 1, "{emptydir}"),
    ("serving info {deepmodel}", 1, "too deep"),
    ("serving info {listmodel}", 1, "damaged"),
    ("serving info {nothingmodel}", 1, "damaged"),
    ("serving log {missing}", 2, "no published model"),
    ("serving log {model} --last 0", 2, "--last"),
    ("serving log {deepmodel}", 1, "too deep"),
    ("serving use {model}", 2, "Missing argument"),
    ("serving use {missing} 1", 2, "no published model"),
    ("serving use {model} 2", 2, "has no version 2"),
    ("serving use {model} x", 2, "VERSION"),
    ("serving use {model} 0", 2, "VERSION"),
    (f"serving use {{model}} {HUGE}", 2, HUGE),
    ("serving use {listmodel} 1", 1, "damaged"),
]
