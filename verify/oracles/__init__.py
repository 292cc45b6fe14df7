"""What results are compared with: dense attention and networks in float64, and identities."""
