"""One training loop, its objectives and what they share."""
