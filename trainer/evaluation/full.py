"""One evaluation of a run, from opening to report."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from featurestore.console.output import print_line, text_console
from featurestore.published.paths import RunPath
from trainer.comm import Comm
from trainer.errors import ConfigError
from trainer.evaluation import report
from trainer.evaluation.bootstrap import Float
from trainer.evaluation.figures import Figures
from trainer.evaluation.impressions import Impressions, ad_image_field, read_impressions, seen_in_training
from trainer.evaluation.measure import measure_all
from trainer.evaluation.predict import has_feature, predict, predict_without
from trainer.evaluation.slices import Slicing, slicings
from trainer.runs.saved import Opened, RunSource, open_source

HIDDEN_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class EvaluationOptions:
    """How to measure, and where the report goes: by default to RUN/evaluation, and no further JSON file."""

    resamples: int = 1000
    seed: int = 0
    missing_curve: bool = False
    out: RunPath | None = None
    json_file: Path | None = None


def evaluate_run(source: RunSource, options: EvaluationOptions, comm: Comm) -> Figures | None:
    """Evaluate a run and write the report; every rank calls it, rank 0 measures, writes and returns the figures.

    Raises TrainerError or FeatureStoreError.
    """
    console = text_console(quiet=comm.rank != 0)
    with contextlib.closing(open_source(source, comm)) as opened:
        if options.missing_curve and not opened.run.engine.services:
            raise ConfigError("--missing-curve: the run's model.images=none reads no image, so none can be hidden")
        count = f"{opened.test.num_samples:,} impressions, {comm.size} rank{'s' * (comm.size > 1)}"
        print_line(console, f"{opened.saved.path}: {count}")
        impressions = read_impressions(comm, opened.test, opened.run.schema)
        cuts = _slicings(opened, impressions)
        logits = {0.0: predict(opened)}
        num_missing = opened.run.missing_lookups()
        if options.missing_curve:
            logits |= {share: predict_without(opened, share, options.seed) for share in HIDDEN_SHARES}
        about = report.about(opened, num_missing, options.missing_curve, options.resamples, options.seed)
    if comm.rank != 0:
        return None
    curve: dict[float, Float] = logits if options.missing_curve else {}
    figures = measure_all(logits[0.0], impressions, cuts, curve, resamples=options.resamples, seed=options.seed)
    out = options.out or source.folder / "evaluation"
    report.write_report(out, about, figures, options.json_file)
    report.show(console, about, figures, out)
    return figures


def _slicings(opened: Opened, impressions: Impressions) -> list[Slicing]:
    schema, comm = opened.run.schema, opened.run.comm
    seen = seen_in_training(comm, opened.train, schema, impressions)
    image = ad_image_field(schema)
    return slicings(impressions, seen, has_feature(opened, image.store_name, seen.image_I) if image else None)
