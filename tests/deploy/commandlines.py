"""Command lines of manifests, parsed by the programs that they start: an option that is not there is an error."""

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from typer.main import get_command

from tests.commands.calls import COMMANDS
from trainer.config import load_config

_VARIABLE = re.compile(r"\$\(([A-Z_]+)\)")


def expanded(words: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """The words with $(NAME) replaced, as the kubelet does it; KeyError where a name is not known."""
    return [_VARIABLE.sub(lambda found: variables[found.group(1)], word) for word in words]


def parse(words: Sequence[str]) -> dict[str, Any]:
    """What our command, at the end of launchers, makes of a command line: its values by name. Raises where it is wrong.

    `command`: its name.
    """
    if words[0] == "sh":
        assert words[1] == "-ec", words
        *before, words = (line.split() for line in words[2].split(";"))
        for each in before:
            parse(each)
    program, *arguments = words
    match program:
        case "python":
            assert arguments[0] == "-m", words
            return _module(arguments[1], arguments[2:])
        case "horovodrun":
            return parse(horovodrun(arguments).command)
        case "torchrun":
            options = torchrun(arguments)
            assert options.module
            return _module(options.training_script, options.training_script_args)
        case "dask-submit":
            from pipeline.cluster.submit import submit

            values = submit.make_context("dask-submit", list(arguments)).params
            script = values["script"].with_suffix("")
            return {"submit": values, **_module(".".join(script.parts), values["args"])}
        case "dask":
            from distributed.cli import dask_scheduler, dask_worker

            program = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[arguments[0]]
            return {"command": arguments[0], **program.make_context("dask", arguments[1:]).params}
        case "/usr/sbin/sshd":
            assert arguments[:3] == ["-De", "-f", "/dev/null"]
            return {"command": "sshd", **dict(word.removeprefix("-o").split("=", 1) for word in arguments[3:])}
    raise AssertionError(f"nobody knows how to parse {program}")


def horovodrun(arguments: Sequence[str]) -> Any:
    """What horovodrun makes of its options, with `command`."""
    from horovod.runner.launch import parse_args

    with mock.patch("sys.argv", ["horovodrun", *arguments]):
        return parse_args()


def torchrun(arguments: Sequence[str]) -> Any:
    """What torchrun makes of its options, with `training_script` and `training_script_args`."""
    from torch.distributed.run import get_args_parser

    return get_args_parser().parse_args(list(arguments))


def _module(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Parse the arguments of one of our commands, its settings too."""
    known = COMMANDS[name.replace(".", "/") if name.startswith("jobs.") else name]
    values = _values(get_command(importlib.import_module(known).app), name, list(arguments))
    if "settings" in values:
        load_config(values.get("file"), [*(values["settings"] or []), *(values.get("more") or [])])
    return {"command": name, **values}


def _values(command: Any, name: str, arguments: list[str]) -> dict[str, Any]:
    """`command`: typer has classes of its own in place of click's."""
    context = command.make_context(name, arguments)
    if not hasattr(command, "resolve_command"):
        return context.params
    subname, subcommand, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    return _values(subcommand, f"{name} {subname}", rest)
