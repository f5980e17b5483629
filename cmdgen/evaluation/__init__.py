"""How good a model is: metrics, the probe classifier that reads clips, the report and its cost."""
