"""What python -m trainer.compat prints: lines, one table, and the verdict with what speaks against the store."""

from trainer.compat.check import Compatibility

_IDENTITY = {
    "the same snapshot": "the same snapshot that the run was trained on: nothing to compare",
    "the same store": "the same store, another snapshot",
    "another store": "another store than the one that the run was trained on",
    "unknown": "not known: the checkpoint has no ids",
}


def lines(found: Compatibility) -> list[str]:
    """Say what was compared with what."""
    recorded = found.recorded.described() if found.recorded else "not known"
    if found.recorded and found.can_read_recorded is False:
        recorded += " (cannot be read any more)"
    return [
        f"run          {found.run}, {found.checkpoint.name}",
        f"trained on   {recorded}",
        f"found        {found.found.described()}",
        f"features     {found.kind}",
        f"identity     {_IDENTITY[found.relation]}",
    ]


def figures(found: Compatibility) -> list[tuple[str, str]]:
    """List names and values of the table; empty where nothing was compared."""
    return [*_rows(found), *_scores(found)]


def ending(found: Compatibility) -> list[str]:
    """List notes, what speaks against the store, and the verdict."""
    against = [f"against it   {each}" for each in found.problems]
    return [*(f"note         {each}" for each in found.notes), *against, f"verdict      {found.verdict}"]


def _rows(found: Compatibility) -> list[tuple[str, str]]:
    rows = found.rows
    if rows is None:
        return []
    table = [
        ("images before", f"{rows.num_old:,}"),
        ("images here", f"{rows.num_new:,}"),
        ("  gained", f"{rows.num_gained:,}"),
        ("  lost", f"{rows.num_lost:,}"),
        ("  changed (another image under the key)", f"{rows.num_changed:,}"),
        ("features compared, of unchanged images", f"{rows.num_sampled:,}"),
    ]
    if rows.mean_cosine is None or rows.largest_difference is None:
        return table
    return [
        *table,
        ("  equal to the bit", f"{rows.num_equal / rows.num_sampled:.2%}"),
        ("  others", f"{rows.num_other / rows.num_sampled:.2%}"),
        ("  mean cosine", f"{rows.mean_cosine:.6f}"),
        ("  largest difference, of a feature's length", f"{rows.largest_difference:.2e}"),
    ]


def _scores(found: Compatibility) -> list[tuple[str, str]]:
    scores = found.scores
    if scores is None:
        return []
    before = "log loss before" if found.can_read_recorded else "log loss, as the run reported it"
    return [
        ("test impressions scored", f"{scores.impressions:,}"),
        (f"  {before}", _text(scores.before, ".5f")),
        ("  log loss here", _text(scores.here, ".5f")),
        ("  change", _text(scores.change, "+.3%")),
        ("  mean change of a logit", _text(scores.mean_logit_change, ".2e")),
        ("images of these impressions", f"{scores.images:,}"),
        ("  without a feature before", _text(scores.missing_before, ",")),
        ("  without a feature here", f"{scores.missing_here:,}"),
    ]


def _text(value: float | None, form: str) -> str:
    return "not known" if value is None else format(value, form)
