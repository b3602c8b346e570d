"""What a run came to: plots and one page that opens without a network."""
