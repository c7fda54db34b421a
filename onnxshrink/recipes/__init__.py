"""Ready configs and the small reference models they use."""
