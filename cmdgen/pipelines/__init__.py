"""Complete systems: each file composes the networks of one family."""
