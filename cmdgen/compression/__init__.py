"""VDMini: which blocks of a network matter, the network without the others, and its distillation."""
