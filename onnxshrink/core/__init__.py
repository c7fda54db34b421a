"""The vocabulary every layer shares: errors, artifacts, tensors, the store, the report. Imports no framework."""
