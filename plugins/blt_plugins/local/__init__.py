"""Local encoders and decoders."""
