"""Predicting TTFT and TPOT by recursive least squares, learned online."""
