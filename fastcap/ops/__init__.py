"""One module per operation, its whole story; helpers that operations share begin with an underscore."""
