"""Files: atomic writes, weight files, images and digests."""
