"""Proof: drift, accuracy, latency and footprint of a candidate against its reference."""
