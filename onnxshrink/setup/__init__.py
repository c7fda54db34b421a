"""The first config: a model and its samples are looked into, and a config that runs is written."""
