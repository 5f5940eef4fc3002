"""Training data from prepared datasets: memory-mapped shards, rows of whole documents, shuffles that store nothing."""
