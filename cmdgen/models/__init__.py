"""Networks, each sized by its configuration."""
