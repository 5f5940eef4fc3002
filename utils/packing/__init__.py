"""Training data from prepared datasets: shards read in place, rows of whole documents, shuffles that store nothing."""
