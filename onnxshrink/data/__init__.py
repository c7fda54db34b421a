"""Samples, streamed: every reader gives the same batches each time it is iterated."""
