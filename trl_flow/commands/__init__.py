"""The commands `trl-flow train` and `trl-flow memory`; the others stand with what they are about."""
