"""What is verified: calls of attention described as data, a fixed list of them and random ones."""
