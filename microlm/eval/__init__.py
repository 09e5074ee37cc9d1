"""Answers → numbers: one `Predictor` in two forms, predict and score as two stages, baselines, the report."""
