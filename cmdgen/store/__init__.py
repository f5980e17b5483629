"""Models on disk and on the hub: what they consist of, where they lie, how they are made."""
