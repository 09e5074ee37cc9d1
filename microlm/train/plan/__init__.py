"""Before a run: what it takes in weights, memory, arithmetic and time."""

from microlm.train.plan.peak import measured_peak_flops

__all__ = ["measured_peak_flops"]
