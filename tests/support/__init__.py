"""What several test files share: batches, oracles, and the tools that look at compiled kernels."""
