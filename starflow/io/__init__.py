"""Files: atomic writes, weight files and images."""
