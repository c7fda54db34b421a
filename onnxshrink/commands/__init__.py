"""The commands, one file each: a few lines over the Python API; frameworks are imported only when one runs."""
