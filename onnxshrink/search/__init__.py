"""Search above the pipeline: it runs stages with other settings, reads what they found, and proposes a config."""
