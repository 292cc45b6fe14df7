"""What is verified: attention calls as data, listed and random."""
