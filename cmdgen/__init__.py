"""cmdgen: text to video by content-frame motion-latent decomposition (CMD)."""

__version__ = "0.1.0"
