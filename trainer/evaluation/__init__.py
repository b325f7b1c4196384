"""What a trained run is worth on test samples: metrics with intervals, slices of them, plots, and runs side by side."""
