"""The config: one frozen pydantic tree. Typos, wrong types and chains that do not fit stop here, before any work."""
