"""A local web page that draws samples."""
