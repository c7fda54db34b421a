"""Own calibration: one streaming pass over the activations, every range method from the same statistics."""
