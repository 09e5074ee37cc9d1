"""What people see of a run: a progress line, rows of metrics, samples, a curve. Only rank 0 speaks."""

from microlm.train.reporter.reporter import Reporter
from microlm.train.reporter.speed import TIMED
from microlm.train.reporter.summary import SUMMARY, tell_lengths, write_summary

__all__ = ["SUMMARY", "TIMED", "Reporter", "tell_lengths", "write_summary"]
