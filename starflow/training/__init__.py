"""Training of flows, autoencoders and decoders."""
