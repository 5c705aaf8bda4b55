"""Where a graph's signals lie: rectangles of fragments, buckets of nodes, who owns which rows."""
