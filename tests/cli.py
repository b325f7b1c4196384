"""Commands called in this process."""

import typer
from typer.testing import CliRunner, Result


def invoke(app: typer.Typer, *words: object, code: int | None = None) -> Result:
    """Call an app in this process; it has to end with `code`, where one is given."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert code is None or result.exit_code == code, result.output
    return result
