"""What a user hands in, checked and turned into tensors. No networks here."""
