"""A few random projections of every node's signal, in place of the signal."""
