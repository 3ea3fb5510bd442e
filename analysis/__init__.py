"""What the paper leaves open: the entropy-performance law, how tight the score is, and where SCOPE acts."""
